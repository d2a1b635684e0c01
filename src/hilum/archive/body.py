"""The geometry of isotropic volumes: where the patient is, how large the volume becomes, how it is interpolated.

One set of rules for the store that encoders of volumes are trained from (`archive.store.isotropic`) and for the scans they are
shown later (`encode.volume_contract`), after VoxelFM's public code. Everything goes through a volume slice by slice.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.volume import FloatArray

BODY_HU = -800.0  # what lies above is patient or table
SAME = 1e-4  # relative difference of spacings that are one: direction cosines are rounded
MAX_SHEAR_DEG = 0.5

Box = tuple[slice, slice, slice]
Sides = tuple[int, int, int]
Slices = Iterable[NDArray[Any]]


def body_sides(side: int, affine: FloatArray, unit: str) -> Sides:
    """Voxels per side of the neighbourhood that `body_box` looks at; all odd.

    A cube of `side` voxels for HU, as in VoxelFM's code. Without a unit, a cube of `side` of the smallest voxel sides in mm:
    MR often has slices ten times as thick as its pixels, and a cube of voxels would be thicker than the patient.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = np.ones(3) if unit == "HU" else spacing.min() / spacing
    z, y, x = (2 * int(side * float(r) / 2 + 1e-6) + 1 for r in ratio)
    return z, y, x


def body_box(
    slices: Slices, shape: tuple[int, ...], sides: Sides, threshold: float = BODY_HU, *, thin: bool = True
) -> Box | None:
    """Where the patient is: the box around all voxels in whose neighbourhood more than half is above a threshold, and half a
    neighbourhood more on every side. None when there is no such voxel.

    slices  (Y, X) each, the Z of them in order
    shape   (Z, Y, X)
    sides   of the neighbourhood in voxels, odd; outside the scan is background
    thin    a scan with fewer voxels than the neighbourhood along an axis has one no thicker than itself there: "half" is of
            what fits into the scan. VoxelFM's code (False) finds nothing in a scan of less than half a cube

    Counts are sums of whole numbers, one axis at a time, slice by slice: exact, and as many slices in memory as `sides` says.
    """
    deep, reaches = sides[0], [side // 2 for side in sides]
    least = np.prod([min(n, m) if thin else m for n, m in zip(shape, sides)], dtype=np.int64) / 2
    total = np.zeros(shape[1:], np.int32)
    window: deque[NDArray[np.int32]] = deque()
    along_z, in_plane = np.zeros(shape[0], bool), np.zeros(shape[1:], bool)
    source = iter(slices)
    for k in range(shape[0] + reaches[0]):
        if k < shape[0]:
            window.append(_box_sum(next(source) > threshold, sides[1], sides[2]))
            total += window[-1]
        if k - deep >= 0:
            total -= window.popleft()
        if k >= reaches[0]:  # `total` now is of the neighbourhood of slice k − reach
            kept = total > least
            along_z[k - reaches[0]] = kept.any()
            in_plane |= kept
    if not along_z.any():
        return None
    places = (np.flatnonzero(along_z), *np.nonzero(in_plane))
    z, y, x = (
        slice(max(int(at.min()) - reach, 0), min(int(at.max()) + reach + 1, n))
        for at, reach, n in zip(places, reaches, shape)
    )
    return z, y, x


def whole(shape: tuple[int, ...]) -> Box:
    """The box that holds all of a volume (Z, Y, X)."""
    z, y, x = (slice(0, n) for n in shape)
    return z, y, x


def _box_sum(mask: NDArray[np.bool_], rows: int, columns: int) -> NDArray[np.int32]:
    """How many of the rows × columns pixels around each pixel are set; outside are none."""
    counts = mask.astype(np.uint16 if rows * columns < 1 << 16 else np.int32)
    counts = np.pad(counts, ((rows // 2,) * 2, (columns // 2,) * 2))
    return _run_sum(_run_sum(counts, rows).T, columns).T.astype(np.int32)


def _run_sum(counts: NDArray[Any], side: int) -> NDArray[Any]:
    """Sums of `side` neighbours along axis 0, from sums of 1, 2, 4, … neighbours: side − 1 rows fewer."""
    num, width, start = len(counts) - side + 1, 1, 1
    out = counts[:num]  # `side` is odd
    while 2 * width <= side:
        counts, width = counts[:-width] + counts[width:], 2 * width
        if side & width:
            out, start = out + counts[start : start + num], start + width
    return out


def moments(slices: Slices) -> tuple[float, float]:
    """Mean and standard deviation (of all, divided by their number) of all pixels of all slices.

    Double precision; slices are joined by the differences of their means (Chan, Golub, LeVeque 1979), so nothing cancels.
    """
    count, mean, squares = 0, 0.0, 0.0
    for one in slices:
        values = np.asarray(one, np.float64)
        middle = float(values.mean())
        values = (values - middle).ravel()
        apart, total = middle - mean, count + values.size
        squares += float(values @ values) + apart**2 * count * values.size / total
        mean += apart * values.size / total
        count = total
    return mean, float((squares / count) ** 0.5)


def isotropic_shape(
    shape: Any, affine: FloatArray, min_spacing_mm: float, longest: int = 0, same: float = SAME
) -> tuple[int, ...]:
    """round(N·s/t) along each axis with t = max(smallest spacing, min_spacing_mm); equal spacings stay as they are.

    longest  t grows until no side has more voxels than this; 0: no limit
    same     spacings that differ by no more than this share are one
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    target = max(float(spacing.min()), min_spacing_mm)
    equal = spacing.max() - spacing.min() <= same * spacing.min()
    sides = tuple(shape) if equal else _sides(shape, spacing, target)
    if longest and max(sides) > longest:
        sides = _sides(shape, spacing, max(float(n * s) for n, s in zip(shape, spacing)) / longest)
    return sides


def _sides(shape: Any, spacing: FloatArray, target: float) -> tuple[int, ...]:
    return tuple(max(round(n * float(s) / target), 1) for n, s in zip(shape, spacing))


def resize(slices: Slices, shape: tuple[int, ...], new: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Trilinear with half-pixel centres: voxel i of the result lies at (i + ½)·N/N' − ½ of the volume, held inside.

    slices  (Y, X) each, in order; of a volume of `shape`
    yields  the slices (Y', X') float32 of a volume of shape `new`

    One axis at a time, three slices in memory; `torch.nn.functional.interpolate` with align_corners=False does the same.
    """
    (below, above, share), (rows, columns) = _neighbours(shape[0], new[0]), zip(shape[1:], new[1:])
    source, held = enumerate(slices), {}
    for low, high, weight in zip(below.tolist(), above.tolist(), share):
        while high not in held:
            k, one = next(source)
            if k >= low:
                held[k] = _along(_along(np.asarray(one, np.float32), 0, *rows), 1, *columns)
        for k in [k for k in held if k < low]:
            del held[k]
        yield held[low] if weight == 0 else held[low] + weight * (held[high] - held[low])


def _along(image: NDArray[np.float32], axis: int, length: int, new: int) -> NDArray[np.float32]:
    if length == new:
        return image
    below, above, share = _neighbours(length, new)
    lower, upper = np.take(image, below, axis), np.take(image, above, axis)
    upper -= lower
    upper *= share[:, None] if axis == 0 else share
    return np.add(lower, upper, out=lower)


def _neighbours(length: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Of each new voxel along an axis: the old ones below and above it, and the share of that above."""
    at = np.maximum((np.arange(new) + 0.5) * (length / new) - 0.5, 0)
    below = np.minimum(at.astype(np.intp), length - 1)
    return below, np.minimum(below + 1, length - 1), (at - below).astype(np.float32)


def cut(affine: FloatArray, start: Any) -> FloatArray:
    """The affine of a grid whose first voxel is at index `start` of another."""
    out = affine.copy()
    out[:3, 3] += affine[:3, :3] @ np.asarray(start, float)
    return out


def resized(affine: FloatArray, shape: Any, new: Any) -> FloatArray:
    """The affine of a volume of `shape` that was resized to `new` (half-pixel centres)."""
    ratio = np.array(shape) / np.array(new)
    out = cut(affine, (ratio - 1) / 2)
    out[:3, :3] *= ratio
    return out
