"""Then render: stored voxels and views → crops as the network sees them, on the CPU.

VoxelFM's order (its public code): cut out and resized, axes laid and flipped, window, clip, normalised. The view's change of
intensity comes between window and clip. Resizing is trilinear with half-pixel centres and, as there, has no filter where voxels
get coarser, so that an output voxel is made of at most eight of the region, and only those are ever turned into floats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.pretrain.recipe import Range
from hilum.pretrain.render import AIR_HU, noise_rows
from hilum.pretrain.volume_spec import Shape
from hilum.pretrain.volume_views import VolumeView

Read = Callable[[Shape, Shape], NDArray[np.int16]]  # (start, size) → stored numbers
Taps = tuple[Tensor, Tensor, Tensor]  # lower and upper neighbour, weight of the upper

CACHE = 1 << 18  # voxels worked on at once, so that they stay in a core's cache
WINDOW_BINS = 512
WINDOW_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True, kw_only=True)
class VolumeFacts:
    """What turns stored numbers into network input: value = stored · slope + intercept, input = (value − mean) / std.

    unit       "HU" or ""
    mean, std  the contract's constants for HU, else those of the scan; std above 0
    clip       lowest and highest value, or None
    """

    slope: float
    intercept: float
    unit: str
    mean: float
    std: float
    clip: Range | None


@torch.no_grad()
def render_volume_views(read: Read, views: Sequence[VolumeView], facts: VolumeFacts) -> list[NDArray[np.float32]]:
    """The crops, each of the shape its view says, normalised. Of the volume only the box of each view is read."""
    crops = []
    for view in views:
        crop = resize(read(view.start, view.size), view).mul_(facts.slope).add_(facts.intercept)
        crops.append(change(crop, view, facts).numpy())
    return crops


def resize(region: NDArray[np.int16], view: VolumeView) -> Tensor:
    """The box of a view, along the axes of the volume → the crop, in stored numbers.

    The same as `functional.interpolate(mode="trilinear")` of the turned region. One axis after the other, a few planes at a
    time; the result is written where permutation and flips want it.
    """
    crop = torch.empty(view.shape)
    laid = crop.permute([view.axes.index(axis) for axis in range(3)])  # the same memory, along the axes of the volume
    flips = [view.flips[view.axes.index(axis)] for axis in range(3)]
    (z_low, z_high, z_part), y, x = (taps(n, side, flip) for n, side, flip in zip(region.shape, laid.shape, flips))
    stored = torch.from_numpy(region)
    step = max(1, CACHE // (region.shape[1] * region.shape[2]))
    for first in range(0, len(z_low), step):
        some = slice(first, first + step)
        low, high = (stored.index_select(0, at[some]).float() for at in (z_low, z_high))
        planes = torch.lerp(low, high, z_part[some, None, None])
        planes = torch.lerp(planes.index_select(1, y[0]), planes.index_select(1, y[1]), y[2][:, None])
        rows = planes.flatten(0, 1)
        rows = torch.lerp(rows.index_select(1, x[0]), rows.index_select(1, x[1]), x[2])
        laid[some] = rows.view(-1, *laid.shape[1:])
    return crop


def taps(length: int, side: int, flip: bool) -> Taps:
    """Between which voxels of a line each of `side` voxels lies, and how far from the lower."""
    at = torch.arange(side, dtype=torch.float32).add_(0.5).mul_(length / side).sub_(0.5).clamp_(min=0)
    at = at.flip(0) if flip else at
    low = at.long().clamp_(max=length - 1)
    return low, (low + 1).clamp_(max=length - 1), at - low


def change(crop: Tensor, view: VolumeView, facts: VolumeFacts) -> Tensor:
    """Values (Z, Y, X) in their unit → network input, with the view's window and change of intensity; in place.

    Without a unit gamma bends what lies between the darkest value of the crop and the mean of the scan, which both stay, and
    gain turns about that mean; in HU about air.
    """
    mean, std = facts.mean, facts.std
    if view.window and facts.clip:
        crop.clamp_(*window_of(crop, facts.clip, view.window))
    darkest = float(crop.min()) if view.gamma != 1 else mean
    if darkest < mean:
        reach = mean - darkest
        crop.sub_(darkest).div_(reach).pow_(view.gamma).mul_(reach).add_(darkest)
    pivot, unit = (AIR_HU, 1.0) if facts.unit == "HU" else (mean, std)
    crop.mul_(view.gain / std).add_((pivot * (1 - view.gain) + view.offset * unit - mean) / std)
    if view.noise:
        crop.add_(noise(view.noise_seed, view.shape), alpha=view.noise * unit / std)
    if facts.clip:
        crop.clamp_(*((end - mean) / std for end in facts.clip))
    return crop


def noise(seed: int, shape: Shape) -> Tensor:
    """Standard normal noise, rows of which are pieces of the table of `render.noise_rows`."""
    z, y, x = shape
    seeds = seed * 65536 + torch.arange(-(-z * y // x))  # each gives x rows of x
    return noise_rows(seeds, x).view(-1, x)[: z * y].view(shape)


def quantiles(values: Tensor, clip: Range) -> tuple[float, ...]:
    """VoxelFM's quantiles of a crop: left edges of the bins of a histogram over the range, where the first q of it end.

    Values outside the range are not counted.
    """
    low, high = clip
    bins = ((values - low) * WINDOW_BINS / (high - low)).flatten()
    bins = torch.where(values.flatten() == high, WINDOW_BINS - 1, bins.floor_().clamp_(-1, WINDOW_BINS)).long()
    below = np.cumsum(torch.bincount(bins + 1, minlength=WINDOW_BINS + 2)[1:-1].numpy())
    width = (high - low) / WINDOW_BINS
    return tuple(low + width * int(np.searchsorted(below, q * below[-1])) for q in WINDOW_QUANTILES)


def window_of(values: Tensor, clip: Range, drawn: tuple[float, float]) -> Range:
    """Lowest and highest value of a window: level Normal(median, .2·IQR), width U(.5·IQR, 2·IQR), at least 10 (VoxelFM).

    drawn  a standard normal and a uniform number

    Where the quartiles are less than 1 apart, the 1st and 99th percentile stand in, and at least 1.
    """
    low, first, median, third, high = quantiles(values, clip)
    spread = third - first if third - first >= 1 else max(high - low, 1.0)
    level, width = median + 0.2 * spread * drawn[0], max(spread * (0.5 + 1.5 * drawn[1]), 10.0)
    return level - width / 2, level + width / 2
