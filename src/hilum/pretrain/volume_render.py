"""Then render: stored voxels and views → crops as the network sees them, on the CPU.

In VoxelFM's order: cut out and resized (trilinear, no filter where voxels get coarser), axes laid and flipped, window, the
view's change of intensity, cut to the contract's range, normalised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hilum.pretrain.recipe import Range
from hilum.pretrain.volume_spec import Shape
from hilum.pretrain.volume_views import VolumeView

Read = Callable[[Shape, Shape], NDArray[np.int16]]  # (start, size) → stored voxels

AIR_HU = -1000.0
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


def render_volume_views(read: Read, views: Sequence[VolumeView], facts: VolumeFacts) -> list[NDArray[np.float32]]:
    """The crops, each of the shape its view says, normalised."""
    return [change(resize(read(view.start, view.size), view), view, facts) for view in views]


def resize(region: NDArray[np.int16], view: VolumeView) -> NDArray[np.float32]:
    """A region along the axes of the volume → the crop, in stored numbers."""
    laid = torch.from_numpy(region.transpose(view.axes).astype(np.float32))
    crop = functional.interpolate(laid[None, None], view.shape, mode="trilinear", align_corners=False)[0, 0].numpy()
    return np.ascontiguousarray(np.flip(crop, [axis for axis, flip in enumerate(view.flips) if flip]))


def change(crop: NDArray[np.float32], view: VolumeView, facts: VolumeFacts) -> NDArray[np.float32]:
    """Stored numbers → network input, with the view's window and change of intensity."""
    values = crop * np.float32(facts.slope) + np.float32(facts.intercept)
    if view.window and facts.clip:
        low, high = window_of(values, facts.clip, view.window)
        values = values.clip(low, high)
    is_hu = facts.unit == "HU"
    if view.gamma != 1 and (darkest := float(values.min())) < facts.mean:
        reach = facts.mean - darkest
        values = darkest + reach * ((values - darkest) / reach) ** view.gamma
    pivot, unit = (AIR_HU, 1.0) if is_hu else (facts.mean, facts.std)
    values = pivot + (values - pivot) * view.gain + view.offset * unit
    if view.noise:
        noise = np.random.default_rng(view.noise_seed).standard_normal(values.shape, np.float32)
        values = values + noise * (view.noise * unit)
    if facts.clip:
        values = values.clip(*facts.clip)
    return ((values - facts.mean) / facts.std).astype(np.float32)


def quantiles(values: NDArray[np.float32], clip: Range) -> tuple[float, ...]:
    """VoxelFM's quantiles of a crop: left edges of bins of a histogram over the range; what lies outside counts for none."""
    counts, edges = np.histogram(values, WINDOW_BINS, clip)
    below = np.cumsum(counts)
    return tuple(float(edges[np.searchsorted(below, q * below[-1])]) for q in WINDOW_QUANTILES)


def window_of(values: NDArray[np.float32], clip: Range, drawn: tuple[float, float]) -> Range:
    """Lowest and highest value of a window: level Normal(median, .2·IQR), width U(.5·IQR, 2·IQR), at least 10."""
    low, first, median, third, high = quantiles(values, clip)
    spread = third - first if third - first >= 1 else max(high - low, 1.0)
    level, width = median + 0.2 * spread * drawn[0], max(spread * (0.5 + 1.5 * drawn[1]), 10.0)
    return level - width / 2, level + width / 2
