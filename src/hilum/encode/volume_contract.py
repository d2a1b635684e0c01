"""What a volume encoder expects of its input, as data, and the one function that makes input so (VoxelFM).

Every step keeps the affine, so that a patch token always knows where in the patient it is.
"""

from dataclasses import dataclass
from typing import Literal

from hilum.records import hash_json
from hilum.settings import to_dict


@dataclass(frozen=True, kw_only=True)
class VolumeContract:
    """Input and output of a volume encoder. The steps, in order: orient, clip, crop background, make isotropic, keep within
    the budget, cut to whole patches, normalise.

    modalities         what it may be shown
    orientation        patient directions of (Z, Y, X)
    clip_hu            values are cut to this range
    crop_background    cut to the box of what is above −800 HU (a box filter of `background_px` voxels); 0 leaves it out
    min_spacing_mm     isotropic at the smallest spacing of the scan, but not finer than this
    max_patches        a volume of more is made smaller
    patch              voxels of a patch along (Z, Y, X); what is over is cut evenly from both ends
    mean, std          constants of the normalisation, HU
    pooling            vector of a volume: class token, mean of the patch tokens, or both one after the other
    """

    modalities: tuple[str, ...] = ("CT",)
    orientation: str = "SPL"
    clip_hu: tuple[float, float] = (-1000.0, 1900.0)
    background_px: int = 21
    min_spacing_mm: float = 0.75
    max_patches: int = 25_000
    patch: tuple[int, int, int] = (14, 14, 14)
    mean: float = -573.8
    std: float = 461.3
    pooling: Literal["class", "mean", "class+mean"] = "class"

    @property
    def hash(self) -> str:
        return hash_json(to_dict(self))
