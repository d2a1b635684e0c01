"""Metrics of masks: overlap from voxel counts, surface distances in millimetres.

The rule for empty masks, everywhere: a class that is neither in the truth nor predicted has no value in that case and is left
out; a class that is absent but predicted has Dice 0, which counts. Surface distances exist only where both masks have voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

# What `bench.predictions` keeps of each case and class, in this order.
PREDICTED, SHARED, HD95, MEAN_SURFACE = range(4)


@dataclass(frozen=True, kw_only=True)
class EmptyMasks:
    """How often classes were absent, over cases × classes.

    num_absent             absent and not predicted: left out
    num_false              absent but predicted: Dice 0
    false_positive_voxels  predicted voxels of the latter, all cases together
    """

    num_absent: int
    num_false: int
    false_positive_voxels: int


def dice_per_case(true: ArrayLike, predicted: ArrayLike, shared: ArrayLike) -> NDArray[np.float64]:
    """2·shared / (true + predicted) of each case and class, from voxel counts of one shape, e.g. (N, C).

    returns  the same shape; NaN where the class is neither there nor predicted, 0 where it is predicted but not there
    """
    t, p, s = (np.asarray(counts, dtype=np.float64) for counts in (true, predicted, shared))
    if not t.shape == p.shape == s.shape or (s > np.minimum(t, p)).any():
        raise ValueError("expected counts of one shape, with no more shared voxels than true or predicted ones")
    total = t + p
    values = np.full(t.shape, np.nan)
    np.divide(2 * s, total, out=values, where=total > 0)
    return values


def empty_masks(true: ArrayLike, predicted: ArrayLike) -> EmptyMasks:
    """Counts of the rule for empty masks, from voxel counts (N, C)."""
    t, p = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    false = (t == 0) & (p > 0)
    return EmptyMasks(
        num_absent=int(((t == 0) & (p == 0)).sum()),
        num_false=int(false.sum()),
        false_positive_voxels=int(p[false].sum()),
    )


def dice(true: ArrayLike, found: ArrayLike) -> float:
    """Dice per case, averaged over the cases of a class where it is defined, then over classes.

    true   (N, C) voxels of each class
    found  (N, C, 2 or more): predicted voxels, shared voxels, …
    """
    return _mean_of_classes(_case_dice(true, found))


def dice_weighted(true: ArrayLike, found: ArrayLike) -> float:
    """As `dice`, but cases weigh by their true voxels within a class, and classes by theirs ("micro" in VoxelFM's tables).

    A class that is absent but predicted has weight 0. ValueError without a true voxel.
    """
    values, weight = _case_dice(true, found), np.asarray(true, dtype=np.float64)
    if weight.sum() == 0:
        raise ValueError("the weighted Dice is undefined: no class has a true voxel")
    return float(np.nansum(values * weight) / weight.sum())


def dice_pooled(true: ArrayLike, found: ArrayLike) -> float:
    """Dice of all cases taken as one, 2·Σshared / (Σtrue + Σpredicted), averaged over the classes present. As `dice`."""
    t, f = np.asarray(true, dtype=np.float64), np.asarray(found, dtype=np.float64)
    return _mean_of_classes(dice_per_case(t.sum(axis=0), *f.sum(axis=0).T[:2])[None])


def hd95_mm(true: ArrayLike, found: ArrayLike) -> float:
    """Mean 95 % Hausdorff distance in mm over cases, then over classes, of those where it is defined. As `dice`."""
    return _mean_of_classes(np.asarray(found, dtype=np.float64)[..., HD95])


def surface_distance_mm(true: ArrayLike, found: ArrayLike) -> float:
    """Mean surface distance in mm, averaged as `hd95_mm`."""
    return _mean_of_classes(np.asarray(found, dtype=np.float64)[..., MEAN_SURFACE])


@dataclass(frozen=True, kw_only=True)
class SurfaceDistances:
    """How far two surfaces are apart, voxel by voxel, in mm.

    forward   from each surface voxel of the first mask to the nearest one of the second
    backward  the other way
    """

    forward: NDArray[np.float64]
    backward: NDArray[np.float64]

    @property
    def hd95_mm(self) -> float:
        """The larger of the two directed 95th percentiles."""
        return float(max(np.percentile(self.forward, 95), np.percentile(self.backward, 95)))

    @property
    def mean_mm(self) -> float:
        """Mean over the voxels of both surfaces (average symmetric surface distance)."""
        return float(np.concatenate([self.forward, self.backward]).mean())

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface Dice: share of the voxels of both surfaces that lie within the tolerance of the other."""
        return float(np.mean(np.concatenate([self.forward, self.backward]) <= tolerance_mm))


def surface_distances(first: ArrayLike, second: ArrayLike, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two masks.

    first, second  boolean, one shape, 2 or 3 axes
    spacing_mm     between voxel centres along each axis

    A surface voxel has a face neighbour outside its mask; beyond the array is outside. Every surface voxel counts once
    whatever its area. ValueError when either mask is empty: there is no distance then, and none is invented.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or len(spacing_mm) != a.ndim or min(spacing_mm) <= 0:
        raise ValueError(f"expected two masks of one shape, spacings above 0; found {a.shape}, {b.shape}, {spacing_mm}")
    if not a.any() or not b.any():
        raise ValueError("surface distances are undefined: a mask is empty")
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (np.pad(a[box], 1), np.pad(b[box], 1))]
    to_second, to_first = (ndimage.distance_transform_edt(~s, sampling=spacing_mm) for s in reversed(surfaces))
    return SurfaceDistances(forward=to_second[surfaces[0]], backward=to_first[surfaces[1]])


def _case_dice(true: ArrayLike, found: ArrayLike) -> NDArray[np.float64]:
    f = np.asarray(found, dtype=np.float64)
    return dice_per_case(true, f[..., PREDICTED], f[..., SHARED])


def _mean_of_classes(values: NDArray[np.float64]) -> float:
    """Mean over the defined cases of each class (N, C), then over the classes that have one."""
    defined = ~np.isnan(values)
    counts = defined.sum(axis=0)
    if not counts.any():
        raise ValueError("undefined: in no case is there a class to measure")
    sums = np.where(defined, values, 0.0).sum(axis=0)
    return float(np.mean(sums[counts > 0] / counts[counts > 0]))
