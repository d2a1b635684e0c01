"""Where the anatomy lies in each slice: measured once, when the store is written; read by crops and masks.

Curia-2 (arXiv 2604.01987) drops images with more than half "uniform background", keeps crops with at least 30 %
foreground, and centres masks on the anatomy, without saying how any of it is measured. Ours: a slice is averaged onto
a 64×64 grid; cells above a threshold are anatomy; enclosed holes (lungs) count as anatomy. The threshold is −600 HU
for CT and, without a physical unit, half-way between the darkest level and Otsu's threshold of the whole volume.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.volume import Volume

GRID = 32  # cells per side of the stored foreground grid
CT_AIR_HU = -600.0


@dataclass(frozen=True)
class SliceContent:
    """What is known of one slice.

    grid        (GRID, GRID) float32 in [0, 1]: share of anatomy in each cell
    foreground  share of anatomy in the whole slice
    center      (y, x) of the anatomy, as fractions of the image
    spread      its standard deviation in (y, x), same unit
    """

    grid: NDArray[np.float32]
    foreground: float
    center: tuple[float, float]
    spread: tuple[float, float]


@dataclass(frozen=True)
class Content:
    """The same for all slices of a volume: grid (Z, GRID, GRID) uint8, 255 = all anatomy; the others (Z,) or (Z, 2)."""

    grid: NDArray[np.uint8]
    foreground: NDArray[np.float32]
    center: NDArray[np.float32]
    spread: NDArray[np.float32]
    threshold: float

    @staticmethod
    def grid_from_bytes(data: bytes, num_slices: int) -> NDArray[np.float32]:
        grid = np.frombuffer(data, np.uint8).reshape(num_slices, GRID, GRID)
        return grid.astype(np.float32) / np.float32(255)


def measure_content(vol: Volume) -> Content:
    """Find the anatomy in every slice (axis 0) of a volume."""
    cells = np.stack([shrink(s, 2 * GRID) for s in vol.voxels])
    threshold = CT_AIR_HU if vol.unit == "HU" else foreground_threshold(cells)
    anatomy = cells > threshold
    for mask in anatomy:
        ndimage.binary_fill_holes(mask, output=mask)
    share = anatomy.reshape(len(anatomy), GRID, 2, GRID, 2).mean((2, 4), dtype=np.float32)
    grid = np.rint(share * 255).astype(np.uint8)
    weight = share.reshape(len(share), GRID, GRID)
    total = weight.sum((1, 2))
    safe = np.maximum(total, 1e-6)
    at = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID
    marginal_y, marginal_x = weight.sum(2) / safe[:, None], weight.sum(1) / safe[:, None]
    center = np.stack([marginal_y @ at, marginal_x @ at], 1)
    spread = np.stack([marginal_y @ at**2, marginal_x @ at**2], 1) - center**2
    empty = total == 0
    center[empty], spread[empty] = 0.5, 0.0
    return Content(
        grid=grid,
        foreground=(total / GRID**2).astype(np.float32),
        center=center.astype(np.float32),
        spread=np.sqrt(np.maximum(spread, 0)).astype(np.float32),
        threshold=float(threshold),
    )


def shrink(image: NDArray[np.generic], side: int) -> NDArray[np.float32]:
    """Average an image (Y, X) onto (side, side) cells; an image smaller than that repeats its pixels."""
    image = np.asarray(image, np.float32)
    for axis in (0, 1):
        n = image.shape[axis]
        if n % side == 0:
            shape = (side, n // side, -1) if axis == 0 else (image.shape[0], side, n // side)
            image = image.reshape(shape).mean(axis + 1, dtype=np.float32)
        elif n > side:
            edges = np.arange(side) * n // side
            counts = np.diff(np.append(edges, n))
            image = np.add.reduceat(image, edges, axis) / counts.reshape((-1, 1) if axis == 0 else (1, -1))
        else:
            image = np.take(image, np.arange(side) * n // side, axis)
    return np.asarray(image, np.float32)


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
