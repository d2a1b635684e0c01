"""What a volume encoder expects of its input, as data, and the one function that makes input so (VoxelFM).

Every step keeps the affine, so that a patch token always knows where in the patient it is.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum.archive.body import (
    BODY_HU,
    MAX_SHEAR_DEG,
    SAME,
    body_box,
    body_sides,
    cut,
    isotropic_shape,
    moments,
    resized,
)
from hilum.archive.judge.hounsfield import check_hounsfield
from hilum.archive.store.content import find_threshold
from hilum.errors import ContractError
from hilum.large import each
from hilum.records import hash_json
from hilum.settings import to_dict
from hilum.volume import FloatArray, Volume, orient


@dataclass(frozen=True, kw_only=True)
class VolumeContract:
    """Input and output of a volume encoder. The steps, in order: orient, clip, crop background, make isotropic, keep within
    the budget, cut to whole patches, normalise.

    modalities         what it may be shown; CT must be in HU, what has no unit is not clipped
    orientation        patient directions of (Z, Y, X)
    clip_hu            values are cut to this range
    background_px      cut to the box of what is above −800 HU (a box filter of this many voxels); 0 leaves it out. Without
                       a unit: above the threshold of the anatomy, the filter a cube in mm (`archive.body.body_sides`)
    min_spacing_mm     isotropic at the smallest spacing of the scan, but not finer than this
    longest            and no side of more voxels: larger voxels then (VoxelFM's paper 768); 0: no limit (its code)
    max_patches        a volume of more is made smaller
    patch              voxels of a patch along (Z, Y, X)
    edges              what is over whole patches: "cut" evenly from both ends (VoxelFM), or "pad", the edge voxels repeated on
                       both ends until patches are whole, so that every voxel has a token and thin scans are taken
    mean, std          constants of the normalisation, HU; what has no unit is normalised by mean and standard deviation of the
                       scan within the box, before it is made isotropic
    pooling            vector of a volume: class token, mean of the patch tokens, or both one after the other
    """

    modalities: tuple[str, ...] = ("CT",)
    orientation: str = "SPL"
    clip_hu: tuple[float, float] = (-1000.0, 1900.0)
    background_px: int = 21
    min_spacing_mm: float = 0.75
    longest: int = 0
    max_patches: int = 25_000
    patch: tuple[int, int, int] = (14, 14, 14)
    edges: Literal["cut", "pad"] = "cut"
    mean: float = -573.8
    std: float = 461.3
    pooling: Literal["class", "mean", "class+mean"] = "class"

    def __post_init__(self) -> None:
        """A contract that asks for what this version cannot do is refused, never bent."""
        low, high = self.clip_hu
        if not low < BODY_HU < high:
            raise ContractError(f"clip_hu {self.clip_hu} must hold {BODY_HU:g} HU, where the background ends")
        if self.background_px and self.background_px % 2 == 0:
            raise ContractError(f"background_px is {self.background_px}; expected an odd number of voxels, or 0")
        if min(self.patch) < 1 or self.max_patches < 1 or self.std <= 0 or self.min_spacing_mm <= 0:
            raise ContractError("patch, max_patches, std and min_spacing_mm must be above 0")

    @property
    def hash(self) -> str:
        values = to_dict(self)
        for name, before in (("edges", "cut"), ("longest", 0)):
            if values[name] == before:
                del values[name]  # contracts had no such choice at first; theirs is this one
        return hash_json(values)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedVolume:
    """A scan as a volume encoder wants it.

    image   (1, Z, Y, X) float32 without unit; sides are multiples of the patch
    affine  4×4, index (k, j, i, 1) of a patch → LPS millimetres of its centre
    grid    patches along (Z, Y, X)
    notes   what was converted, in words
    """

    image: Tensor
    affine: FloatArray
    grid: tuple[int, int, int]
    notes: tuple[str, ...]


def prepare_volume(vol: Volume, contract: VolumeContract) -> PreparedVolume:
    """One scan as the encoder wants it. ContractError when it breaks the contract, and says how."""
    affine = check_volume(vol, contract)
    notes = []
    if vol.orientation != contract.orientation:
        notes.append(f"axes turned from {vol.orientation} to {contract.orientation}")
        vol = orient(vol, contract.orientation)
        assert vol.affine is not None
        affine = vol.affine
    return fit_volume(vol.voxels, affine, contract, notes, vol.unit)


def check_volume(vol: Volume, contract: VolumeContract) -> FloatArray:
    """The affine of a scan that the encoder may be shown; ContractError for any other."""
    if vol.modality not in contract.modalities:
        raise ContractError(
            f"modality {vol.modality} is not in the contract; expected {' or '.join(contract.modalities)}"
        )
    if vol.kind != "intensity":
        raise ContractError("the encoder takes intensities; found a label map")
    if vol.modality == "CT" and vol.unit != "HU":
        raise ContractError(f"CT comes in HU; found unit '{vol.unit}'")
    if vol.affine is None:
        raise ContractError("the encoder needs the geometry of the scan, and this one has none")
    if vol.shear_deg > MAX_SHEAR_DEG:
        raise ContractError(
            f"the axes are sheared by {vol.shear_deg:.1f}° (gantry tilt); expected right angles: prepare the scan with "
            "--resample tilt"
        )
    if vol.voxels.dtype.kind == "f" and not np.isfinite(vol.voxels).all():
        raise ContractError("the scan holds NaN or infinite values; expected finite numbers")
    if vol.unit == "HU":
        check_range(float(vol.voxels.min()), float(vol.voxels.max()))
        check = check_hounsfield(vol.voxels)
        if check.verdict == "not_hu":
            raise ContractError(f"the values are not HU: {check.numbers()}")
    return vol.affine


def check_range(low: float, high: float) -> None:
    """ContractError when a range cannot be HU of a scan: VoxelFM's own check (minimum below 800, maximum above −100)."""
    if low >= 800 or high <= -100:
        raise ContractError(
            f"values from {low:g} to {high:g} are no HU of a patient; expected air or tissue, and both in HU"
        )


def fit_volume(
    voxels: NDArray[Any],
    affine: FloatArray,
    contract: VolumeContract,
    notes: list[str],
    unit: str = "HU",
    *,
    same: float = SAME,
    thin: bool = True,
) -> PreparedVolume:
    """All steps after the orientation.

    voxels  (Z, Y, X)
    affine  (k, j, i, 1) → millimetres; its column norms are the spacing
    notes   what was done before; what is done here is added
    unit    of the voxels: "HU", or "" for values that only compare with others of the same scan
    same    spacings that differ by no more than this share are one; 0 as VoxelFM's code
    thin    whether scans thinner than the box filter are taken (`archive.body.body_box`); False as VoxelFM's code
    """
    if contract.background_px:
        box = _find_body(voxels, affine, contract.background_px, unit, thin)
        if any(s.stop - s.start < n for s, n in zip(box, voxels.shape)):
            shape = "×".join(str(s.stop - s.start) for s in box)
            notes.append(f"background cut away: {shape} of {'×'.join(map(str, voxels.shape))} voxels left")
        voxels, affine = voxels[box], cut(affine, [s.start for s in box])
    mean, std = (contract.mean, contract.std) if unit == "HU" else moments(each(voxels))
    if std == 0:
        raise ContractError(f"all values are {mean:g}; expected an image")
    image = torch.from_numpy(np.array(voxels, np.float32, order="C"))
    if unit == "HU":
        image.clamp_(*contract.clip_hu)
    cubic = isotropic_shape(image.shape, affine, contract.min_spacing_mm, contract.longest, same)
    image, affine = _resize(image, affine, cubic, notes, "made isotropic")
    smaller = budget_shape(image.shape, contract)
    image, affine = _resize(image, affine, smaller, notes, f"kept within {contract.max_patches:,} patches")
    image, affine = _whole_patches(image, affine, contract)
    grid = tuple(n // p for n, p in zip(image.shape, contract.patch))
    token_affine = cut(affine, [(p - 1) / 2 for p in contract.patch])  # the middle of the first patch
    token_affine[:3, :3] *= contract.patch
    image = (image - mean).div_(std)
    return PreparedVolume(image=image[None], affine=token_affine, grid=(grid[0], grid[1], grid[2]), notes=tuple(notes))


def _whole_patches(image: Tensor, affine: FloatArray, contract: VolumeContract) -> tuple[Tensor, FloatArray]:
    """Cut or padded at both ends, the odd voxel at the high one; ContractError when cutting leaves nothing."""
    if contract.edges == "pad":
        over = [-n % p for n, p in zip(image.shape, contract.patch)]
        width = [side for n in reversed(over) for side in (n // 2, n - n // 2)]
        return functional.pad(image[None, None], width, mode="replicate")[0, 0], cut(affine, [-(n // 2) for n in over])
    if any(n < p for n, p in zip(image.shape, contract.patch)):
        raise ContractError(
            f"the scan has {'×'.join(map(str, image.shape))} voxels of {_spacing(affine)} mm; expected at least one patch of "
            f"{'×'.join(map(str, contract.patch))}"
        )
    start = [(n % p) // 2 for n, p in zip(image.shape, contract.patch)]
    whole = tuple(slice(s, s + n - n % p) for s, n, p in zip(start, image.shape, contract.patch))
    return image[whole], cut(affine, start)


def _find_body(
    voxels: NDArray[Any], affine: FloatArray, side: int, unit: str, thin: bool
) -> tuple[slice, slice, slice]:
    """The box of the patient; ContractError when there is none."""
    threshold = BODY_HU if unit == "HU" else find_threshold(each(voxels))
    sides = body_sides(side, affine, unit)
    box = body_box(each(voxels), voxels.shape, sides, threshold, thin=thin)
    if box is None:
        what = f"no box of {'×'.join(map(str, sides))} voxels is more than half above {threshold:g}"
        if not thin and min(len(voxels), side) * side**2 <= side**3 / 2:
            what += f" (a scan of {len(voxels)} slices cannot fill it)"
        raise ContractError(f"nothing but {'air' if unit == 'HU' else 'background'}: {what} {unit}".rstrip())
    return box


def budget_shape(shape: Any, contract: VolumeContract) -> tuple[int, ...]:
    """The shape of at most `max_patches` patches. Of five factors around f = ∛(budget / patches) the one that keeps most
    patches (the smallest of equals), and 0.95 f when none is small enough; sides are int(N·factor).

    That is VoxelFM's rule. Thin scans break it, since a side of one patch has nothing to give: where edges are padded, sides
    keep a voxel and the factor goes on falling until the budget is kept; where they are cut, the last patch would be lost.
    """
    pad = contract.edges == "pad"

    def num_patches(sides: Any) -> int:
        return math.prod(-(-n // p) if pad else n // p for n, p in zip(sides, contract.patch))

    def smaller(factor: float) -> tuple[int, ...]:
        return tuple(max(int(n * factor), int(pad)) for n in shape)

    if num_patches(shape) <= contract.max_patches:
        return tuple(shape)
    f = (contract.max_patches / num_patches(shape)) ** (1 / 3)
    tried = [smaller(f * share) for share in (0.98, 0.99, 1.0, 1.01, 1.02)]
    if fitting := [sides for sides in tried if num_patches(sides) <= contract.max_patches]:
        return max(fitting, key=num_patches)
    f *= 0.95
    while pad and num_patches(smaller(f)) > contract.max_patches:
        f *= 0.99
    return smaller(f)


def _resize(
    image: Tensor, affine: FloatArray, shape: tuple[int, ...], notes: list[str], why: str
) -> tuple[Tensor, FloatArray]:
    """Trilinear, half-pixel centres: voxel i of the result lies at (i + ½)·N/N' − ½ of the image."""
    if tuple(image.shape) == shape or 0 in shape:
        return image, affine
    old, affine = affine, resized(affine, image.shape, shape)
    image = functional.interpolate(image[None, None], shape, mode="trilinear", align_corners=False)[0, 0]
    notes.append(f"{why}: from {_spacing(old)} mm to {_spacing(affine)} mm")
    return image, affine


def _spacing(affine: FloatArray) -> str:
    return "×".join(f"{s:.4g}" for s in np.linalg.norm(affine[:3, :3], axis=0))
