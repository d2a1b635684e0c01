"""Where the anatomy lies in each slice: measured once, when the store is written; read by crops and masks.

Curia-2 (arXiv 2604.01987) drops images with more than half "uniform background", keeps crops with at least 30 %
foreground, and centres masks on the anatomy, without saying how any of it is measured. Ours: a slice is averaged onto
a 64×64 grid; cells above a threshold are anatomy; enclosed holes (lungs) count as anatomy. The threshold is −600 HU
for CT and, without a physical unit, half-way between the darkest level and Otsu's threshold of the whole volume.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.volume import Volume

GRID = 32  # cells per side of the stored foreground grid
CT_AIR_HU = -600.0
IN_PLANE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))], bool)  # neighbours
_AT = (np.arange(GRID, dtype=np.float64) + 0.5) / GRID  # centre of each cell, as a fraction of the image


@dataclass(frozen=True, eq=False)
class SliceContent:
    """What is known of one slice; everything follows from its grid, so that it is the same when measured and when read.

    cells  (GRID, GRID) uint8: share of anatomy in each cell, 255 = all
    """

    cells: NDArray[np.uint8]

    @cached_property
    def grid(self) -> NDArray[np.float32]:
        """The cells as shares in [0, 1]."""
        return self.cells.astype(np.float32) / np.float32(255)

    @property
    def foreground(self) -> float:
        """Share of anatomy in the whole slice, in steps of 1/255 as the index keeps it."""
        return int(foreground_levels(self.cells)) / 255

    @cached_property
    def center(self) -> tuple[float, float]:
        """(y, x) of the anatomy, as fractions of the image; the middle of an image without anatomy."""
        return self._moments[0]

    @cached_property
    def spread(self) -> tuple[float, float]:
        """Standard deviation of the anatomy in (y, x), same unit."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[tuple[float, float], tuple[float, float]]:
        weight = self.cells.astype(np.float64)
        total = weight.sum()
        if total == 0:
            return (0.5, 0.5), (0.0, 0.0)
        marginals = weight.sum(1) / total, weight.sum(0) / total
        y, x = (float(m @ _AT) for m in marginals)
        variances = [float(m @ (_AT - at) ** 2) for m, at in zip(marginals, (y, x))]
        return (y, x), (variances[0] ** 0.5, variances[1] ** 0.5)


@dataclass(frozen=True, eq=False)
class Content:
    """The same for all slices of a volume.

    cells      (Z, GRID, GRID) uint8, 255 = all anatomy
    threshold  voxels at or below are background
    """

    cells: NDArray[np.uint8]
    threshold: float

    @property
    def foreground(self) -> NDArray[np.uint8]:
        """(Z,) share of anatomy of each slice, 255 = all."""
        return foreground_levels(self.cells)

    def __getitem__(self, z: int) -> SliceContent:
        return SliceContent(self.cells[z])


def foreground_levels(cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean of each grid (…, GRID, GRID), rounded: 255 = all anatomy."""
    levels: NDArray[np.uint8] = np.rint(cells.mean((-2, -1), dtype=np.float64)).astype(np.uint8)
    return levels


def measure_content(vol: Volume) -> Content:
    """Find the anatomy in every slice (axis 0) of a volume."""
    return measure_slices(vol.voxels, vol.unit)


def measure_slices(slices: Iterable[NDArray[np.generic]], unit: str) -> Content:
    """Find the anatomy in slices (Y, X) of one volume, given one after the other."""
    means = _means(slices)
    threshold = CT_AIR_HU if unit == "HU" else foreground_threshold(means)
    anatomy = ~outside(means > threshold)
    share = anatomy.reshape(len(anatomy), GRID, 2, GRID, 2).mean((2, 4), dtype=np.float32)
    return Content(cells=np.rint(share * 255).astype(np.uint8), threshold=float(threshold))


def find_threshold(slices: Iterable[NDArray[np.generic]]) -> float:
    """The `foreground_threshold` of a volume without a physical unit, from the means that `measure_slices` looks at."""
    return foreground_threshold(_means(slices))


def _means(slices: Iterable[NDArray[np.generic]]) -> NDArray[np.float32]:
    return np.stack([shrink(s, 2 * GRID) for s in slices])


def outside(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is not in a mask and connected, within the slice, with the border of the image."""
    labels, num = ndimage.label(np.pad(~mask, ((0, 0), (1, 1), (1, 1)), constant_values=True), IN_PLANE)
    outer = np.zeros(num + 1, bool)
    outer[labels[:, 0, 0]] = True
    return np.asarray(outer[labels[:, 1:-1, 1:-1]])


def pack_cells(cells: NDArray[np.uint8]) -> bytes:
    """Grids (Z, GRID, GRID) as bytes from which one can be read alone: Z + 1 offsets (uint32), then a zlib stream each."""
    streams = [zlib.compress(grid.tobytes(), 6) for grid in cells]
    offsets = np.cumsum([4 * (len(cells) + 1), *map(len, streams)]).astype("<u4")
    return offsets.tobytes() + b"".join(streams)


def unpack_cells(data: bytes, z: int) -> NDArray[np.uint8]:
    """The grid (GRID, GRID) of one slice. ValueError when the bytes do not hold it."""
    start, end = np.frombuffer(data, "<u4", 2, 4 * z)
    try:
        found = zlib.decompressobj().decompress(data[start:end], GRID**2 + 1)
    except zlib.error as error:
        raise ValueError(f"content of slice {z}: {error}") from None
    return np.frombuffer(found, np.uint8).reshape(GRID, GRID)


def shrink(image: NDArray[np.generic], side: int) -> NDArray[np.float32]:
    """Average an image (Y, X) onto (side, side) cells; an image smaller than that repeats its pixels."""
    return np.asarray(average(average(np.asarray(image, np.float32), 0, side), 1, side), np.float32)


def average(values: NDArray[Any], axis: int, cells: int) -> NDArray[Any]:
    """Means of `cells` runs of values along an axis, as equal as whole numbers allow; fewer values than that are repeated."""
    n = values.shape[axis]
    if n % cells == 0:
        shape = (*values.shape[:axis], cells, n // cells, *values.shape[axis + 1 :])
        mean: NDArray[np.float32] = values.reshape(shape).mean(axis + 1, dtype=np.float32)
        return mean
    edges = np.arange(cells) * n // cells
    if n < cells:
        return np.asarray(np.take(values, edges, axis))
    counts = np.diff(np.append(edges, n)).reshape(-1, *[1] * (values.ndim - axis - 1))
    return np.asarray(np.add.reduceat(values, edges, axis) / counts)


def foreground_threshold(values: NDArray[np.float32]) -> float:
    """Half-way from the 1st percentile to Otsu's threshold (Otsu 1979) of values cut at the 99.5th percentile."""
    low, high = np.percentile(values, [1, 99.5])
    if high <= low:
        return float(low)
    counts, edges = np.histogram(np.clip(values, low, high), 256)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    moment = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    otsu = edges[1:][int(np.nanargmax(between))]
    return float((low + otsu) / 2)
