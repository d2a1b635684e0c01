"""What only views of volumes need; the rest of their settings is `recipe.ViewSpec`'s.

VoxelFM's paper (arXiv 2604.04133) and its public code differ in places: both are named here, and the presets `voxelfm` and
`voxelfm-paper` choose.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hilum.errors import UsageError

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class VolumeSpec:
    """Crops of volumes. All numbers of voxels are along (Z, Y, X) of a crop.

    shapes         (global shape, local shape, weight): each step draws one of them, the same on all ranks. VoxelFM: 112³ with
                   56³, and lists of longer ones; a long shape is what thin slabs and stacks of few slices are trained with
    min_share      a volume is shown at a shape when each of its sides, sorted, is at least this share of the global crop's,
                   sorted; one that fits no shape is left out, by name (VoxelFM's code: 0.5)
    scale_of       what `views.global_scale` and `local_scale` are shares of: "side", the volume's shortest side, so that a
                   cubic crop is a cube of that side (VoxelFM's code); "volume", of the volume itself (its paper)
    permute        how the axes of a crop are laid on those of the volume: "none" as they are; "all" at random; "fitting" at
                   random among the ways that let the crop be largest, which matters for long shapes; "needed" as they are,
                   unless that lets the crop be twice as long
    flip           probability of a flip along each axis
    mirror         whether flips and permutations may turn the patient into his mirror image; if not, one more axis is flipped
                   where they would, so that left and right organs keep their sides (only rotations are left)
    flip_locals    local crops are flipped, too (VoxelFM's paper; its code flips global ones only)
    window         probability that the values of a CT crop are cut to a window drawn from its quantiles
    window_views   of which crops: the "first" global one (VoxelFM's code) or "all" (its paper)
    clip_hu, mean, std   HU are cut to this range and normalised by these constants; other units by the mean and deviation of
                   the scan
    min_spacing_mm       smallest side of a voxel that the training store was made with, and scans will be given
    max_patches          of a scan at once, when the encoder is used
    """

    shapes: tuple[tuple[Shape, Shape, float], ...] = (((112, 112, 112), (56, 56, 56), 1.0),)
    min_share: float = 0.5
    scale_of: Literal["side", "volume"] = "side"
    permute: Literal["none", "all", "fitting", "needed"] = "all"
    flip: float = 0.5
    mirror: bool = True
    flip_locals: bool = False
    window: float = 0.5
    window_views: Literal["first", "all"] = "first"
    clip_hu: tuple[float, float] = (-1000.0, 1900.0)
    mean: float = -573.8
    std: float = 461.3
    min_spacing_mm: float = 0.75
    max_patches: int = 25_000

    def __post_init__(self) -> None:
        if not self.shapes or any(weight <= 0 for *_, weight in self.shapes):
            raise UsageError(f"volumes.shapes must be pairs of shapes with a weight above 0; found {self.shapes}")
        for name in ("min_share", "flip", "window"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"volumes.{name} must be between 0 and 1; found {getattr(self, name)}")
        if not self.clip_hu[0] < self.clip_hu[1] or self.std <= 0 or self.min_spacing_mm <= 0 or self.max_patches < 1:
            raise UsageError("volumes.clip_hu must rise; std, min_spacing_mm and max_patches must be above 0")

    def check_patch(self, patch: tuple[int, ...]) -> None:
        """UsageError unless all crops are whole patches."""
        for *shapes, _ in self.shapes:
            for shape in shapes:
                if any(n % p for n, p in zip(shape, patch)):
                    raise UsageError(f"volumes.shapes: {shape} is no multiple of the patch {patch}")

    def mean_patches(self, patch: tuple[int, ...], which: int) -> float:
        """Patches of a global (which = 0) or local (1) crop, the mean over what steps draw."""
        total = sum(weight for *_, weight in self.shapes)
        voxels = sum(math.prod((large, small)[which]) * weight for large, small, weight in self.shapes)
        return voxels / total / math.prod(patch)
