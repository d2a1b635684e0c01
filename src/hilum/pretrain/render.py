"""Then render: stored slices and views → pixels, on whatever device the tensors are, by the same operations.

In this order: values of the slice, cut to the contract's range; minus the mean of the slice; resampled to the crop
(antialiased, as `encode.contract.resize`), mirrored, blurred; the view's gamma, gain, offset, noise and window; divided by
the standard deviation of the slice. Mean and deviation are those of the whole unchanged slice, which the encoder
uses too, so a view's change in HU is the same share of the input whatever the crop, and is not normalised away again.

Resampling and blur are weighted sums of a few rows, once down the columns and, transposed, once along them: one
`embedding_bag` each, which CPUs and GPUs do fast. Noise is taken row by row from a table of 2^20 normal numbers at places
that a hash of the view's seed decides, so it costs a copy and is the same everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum.encode.contract import Contract
from hilum.pretrain.views import BLUR_SIGMA, View

AIR_HU = -1000.0
CHUNK = 16  # slices rendered at once on a GPU: 50 MB of rows at 512 px
_NOISE = 1 << 20
_BLUR_REACH = int(3 * BLUR_SIGMA[1] + 0.5)
_NUM_NUMBERS = 12


@dataclass(frozen=True)
class Source:
    """One slice as stored: value = stored · slope + intercept, in its unit."""

    stored: NDArray[np.int16]
    slope: float
    intercept: float
    unit: str


@dataclass(frozen=True)
class Raw:
    """Slices as stored, and what was drawn of them: all that a device needs to make the crops.

    stored   (B, Y, X) int16; slices smaller than the largest are padded at the lower right
    slices   (B, 7): rows, columns, slope, intercept, lowest and highest value of the contract (infinite without a unit),
             1 for HU else 0
    views    (B, V, 12) float64: top, left, bottom, right in pixels, flip, gain, offset, gamma, noise, blur, lowest and
             highest value of the window
    seeds    (B, V) int64
    """

    stored: Tensor
    slices: Tensor
    views: Tensor
    seeds: Tensor

    def __getitem__(self, where: slice) -> "Raw":
        return Raw(self.stored[where], self.slices[where], self.views[where], self.seeds[where])

    def select(self, views: slice) -> "Raw":
        """Some of the views of every slice."""
        return replace(self, views=self.views[:, views], seeds=self.seeds[:, views])

    def plain(self) -> "Raw":
        """The same crops without any change of intensity."""
        views = self.views.clone()
        views[..., 5:10] = 0
        views[..., 5] = views[..., 7] = 1  # gain and gamma
        views[..., 10:12] = self.slices[:, None, 4:6]
        return replace(self, views=views)


def pack(sources: Sequence[Source], views: Sequence[Sequence[View]], contract: Contract) -> Raw:
    """Slices and their views as tensors."""
    rows, columns = (max(s.stored.shape[axis] for s in sources) for axis in (0, 1))
    equal = all(s.stored.shape == (rows, columns) for s in sources)
    stored = (np.empty if equal else np.zeros)((len(sources), rows, columns), np.int16)
    slices = np.zeros((len(sources), 7))
    numbers = np.zeros((len(sources), len(views[0]), _NUM_NUMBERS))
    for n, (source, drawn) in enumerate(zip(sources, views)):
        height, width = source.stored.shape
        stored[n, :height, :width] = source.stored
        is_hu = source.unit == "HU"
        low, high = (is_hu and contract.clip_hu) or (-np.inf, np.inf)
        slices[n] = height, width, source.slope, source.intercept, low, high, is_hu
        numbers[n] = [_numbers(view, height, width, low, high) for view in drawn]
    seeds = torch.tensor([[view.noise_seed for view in drawn] for drawn in views])
    return Raw(torch.from_numpy(stored), torch.from_numpy(slices), torch.from_numpy(numbers), seeds)


def _numbers(view: View, height: int, width: int, low: float, high: float) -> tuple[float, ...]:
    if view.window_hu:
        low, high = max(low, view.window_hu[0]), min(high, view.window_hu[1])
    box = pixel_box(view, height, width)
    return *box, view.flip, view.gain, view.offset, view.gamma, view.noise, view.blur, low, high


def pixel_box(view: View, height: int, width: int) -> tuple[int, int, int, int]:
    """The view's box in whole pixels (top, left, bottom, right), at least 2×2."""
    y0, x0, y1, x1 = view.box
    top, left = min(round(y0 * height), height - 2), min(round(x0 * width), width - 2)
    return top, left, max(round(y1 * height), top + 2), max(round(x1 * width), left + 2)


@torch.no_grad()
def render(raw: Raw, parts: Sequence[tuple[Raw, int]], contract: Contract) -> list[Tensor]:
    """Make crops of the slices of `raw`.

    parts    views of them (`raw.select`, `.plain`) and the side of their crops
    returns  for each part (V, B, 1, side, side)
    """
    single, num = _one_by_one(raw.stored), len(raw.stored)
    made = [torch.empty(part.seeds.shape[1], num, 1, side, side, device=raw.stored.device) for part, side in parts]
    step = 1 if single else CHUNK
    for start in range(0, num, step):
        some = slice(start, start + step)
        chunk = raw[some]
        if single:  # one slice, without its padding
            height, width = map(int, chunk.slices[0, :2])
            chunk = replace(chunk, stored=chunk.stored[:, :height, :width])
        values, mean, std = standardise(chunk, contract.eps)
        for out, (part, side) in zip(made, parts):
            pixels = _resample(values, part[some].views, side, contract.resampling)
            out[:, some, 0] = _change(pixels, values, mean, std, part[some]).transpose(0, 1)
    return made


def _one_by_one(tensor: Tensor) -> bool:
    """On a CPU crops are made one after the other, and what no view asks for is skipped; on a GPU all at once and unasked,
    since a GPU that is asked for a number has to be waited for."""
    return tensor.device.type == "cpu"


def standardise(raw: Raw, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`encode.contract.normalise_slice`, undivided, for slices of several sizes.

    returns  values minus mean (B, Y, X), 0 in the padding; mean (B, 1, 1); standard deviation (B, 1, 1), 1 for a slice
             without content
    """
    height, width, slope, intercept, low, high, _ = (column.view(-1, 1, 1) for column in raw.slices.float().unbind(1))
    values = raw.stored.float().mul_(slope).add_(intercept)
    torch.minimum(torch.maximum(values, low, out=values), high, out=values)  # much faster than clamp with tensors
    num = height * width
    if len(values) > 1 or not _one_by_one(values):  # else nothing is padded
        rows, columns = (torch.arange(n, device=values.device) for n in values.shape[1:])
        inside = (rows[:, None] < height) & (columns < width)
        mean = torch.where(inside, values, 0).sum((1, 2), keepdim=True) / num
        values = torch.where(inside, values - mean, 0)
    else:
        mean = values.mean((1, 2), keepdim=True)
        values = values.sub_(mean)
    std = torch.linalg.vector_norm(values, dim=(1, 2), keepdim=True) / (num - 1).sqrt()
    return values, mean, torch.where(std >= eps, std, 1)


Taps = tuple[Tensor, Tensor]  # row numbers and their weights


def _resample(values: Tensor, views: Tensor, side: int, mode: str) -> Tensor:
    """Crops (B, V, side, side) of slices (B, Y, X): resampled, mirrored, blurred."""
    box, flip, sigma = views[..., :4], views[..., 4, None, None], views[..., 9]
    single = _one_by_one(values)
    longest = float((box[..., 2:] - box[..., :2]).max()) if single else max(values.shape[1:])
    index, weight = taps(box[..., 2:] - box[..., :2], side, mode, longest)
    columns, column_weight = index[:, :, 1], weight[:, :, 1]
    if not single or bool(flip.any()):
        columns = torch.where(flip == 0, columns, columns.flip(-2))
        column_weight = torch.where(flip == 0, column_weight, column_weight.flip(-2))
    blur = blur_taps(sigma, side) if not single or bool(sigma.any()) else None
    if not single:
        left, top = box[..., 1, None, None].long(), box[..., 0, None, None].long()
        return _crop_all(values, (index[:, :, 0] + top, weight[:, :, 0]), (columns + left, column_weight), blur)
    rows = _flat(index[0, :, 0]), _flat(weight[0, :, 0])
    across = _flat(columns[0]), _flat(column_weight[0])
    out, sigmas = values.new_empty(1, len(rows[0]), side, side), sigma[0].tolist()
    for v, (y0, x0, y1, x1) in enumerate(box[0].int().tolist()):  # cut out first: it stays in the cache
        crop = _sum_rows(values[0, y0:y1, x0:x1], rows[0][v], rows[1][v], side)
        if blur and sigmas[v]:
            smooth = blur[0][0, v].flatten(), blur[1][0, v].flatten()
            crop = _sum_rows(_sum_rows(crop, *smooth, side).t(), across[0][v], across[1][v], side)
            crop = _sum_rows(crop, *smooth, side)
        else:
            crop = _sum_rows(crop.t(), across[0][v], across[1][v], side)
        out[0, v] = crop.t()
    return out


def _flat(taps: Tensor) -> tuple[Tensor, ...]:
    """(V, S, T) → V times (S·T)."""
    return taps.flatten(1).unbind()


def _crop_all(values: Tensor, rows: Taps, columns: Taps, blur: Taps | None) -> Tensor:
    """The same for all views of all slices at once: every sum is one call."""
    num_slices, num_views, side, _ = rows[0].shape
    crops = _sum_rows_batched(values, *rows).flatten(0, 1)

    def each(taps: Taps) -> Taps:
        return taps[0].flatten(0, 1)[:, None], taps[1].flatten(0, 1)[:, None]

    if blur:
        crops = _sum_rows_batched(crops.view(-1, side, values.shape[2]), *each(blur)).flatten(0, 1)
    crops = crops.view(-1, side, values.shape[2]).transpose(1, 2)
    crops = _sum_rows_batched(crops, *each(columns)).flatten(0, 1)
    if blur:
        crops = _sum_rows_batched(crops, *each(blur)).flatten(0, 1)
    return crops.view(num_slices, num_views, side, side).transpose(2, 3)


def _sum_rows_batched(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """(B, Y, X), row numbers and weights (B, V, S, T) → (B, V, S, X)."""
    b, y, x = values.shape
    start = torch.arange(0, b * y, y, device=values.device).view(-1, 1, 1, 1)
    num = math.prod(index.shape[:3])
    sums = _sum_rows(values.reshape(b * y, x), (index + start).flatten(), weight.flatten(), num)
    return sums.view(*index.shape[:3], x)


def _sum_rows(values: Tensor, index: Tensor, weight: Tensor, num: int) -> Tensor:
    """(Y, X), row numbers and weights (num · T) → (num, X): Σ_t weight · row."""
    offsets = torch.arange(0, len(index), len(index) // num, device=index.device)
    return functional.embedding_bag(index, values, offsets, per_sample_weights=weight, mode="sum")


def taps(length: Tensor, side: int, mode: str, longest: float) -> Taps:
    """Which pixels of a line make each of `side` pixels, as `functional.interpolate(antialias=True)` has it.

    length   (…) whole pixels, float64
    longest  at least the largest of them
    returns  index (…, side, T) int64 and weight float32: a triangle, or Keys' cubic, as wide as the step
    """
    end = length[..., None, None]
    width = (end / side).clamp(min=1)
    reach = 1 if mode == "bilinear" else 2
    num = math.ceil(2 * reach * max(longest / side, 1.0))
    center = torch.arange(0.5, side, device=length.device, dtype=length.dtype)[:, None] * (end / side)
    index = (center - (reach * width - 0.5)).floor() + torch.arange(num, device=length.device)
    distance = ((index + 0.5 - center) / width).abs()
    if mode == "bilinear":
        weight = (1 - distance).clamp_(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1  # a = −½
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, far) * (distance < 2)
    weight = weight * ((index >= 0) & (index < end))
    weight = weight / weight.sum(-1, keepdim=True)
    return torch.minimum(index.clamp_(min=0), end - 1).long(), weight.float()


def blur_taps(sigma: Tensor, side: int) -> Taps:
    """Gaussian along one axis of a crop, cut at 3 sigma, edges reflected; sigma 0 leaves it as it is.

    sigma    (B, V) pixels
    returns  index (B, V, side, T) int64, weight float32
    """
    at = torch.arange(-_BLUR_REACH, _BLUR_REACH + 1, device=sigma.device, dtype=sigma.dtype)
    reach = (3 * sigma + 0.5).floor().clamp(min=1)[..., None]
    weight = torch.exp(-(at**2) / (2 * sigma[..., None].clamp(min=1e-3) ** 2)) * (at.abs() <= reach)
    weight = weight / weight.sum(-1, keepdim=True)
    index = (torch.arange(side, device=sigma.device)[:, None] + at.long()).abs()
    index = torch.minimum(index, 2 * (side - 1) - index)
    shape = *sigma.shape, side, len(at)
    return index.expand(shape), weight[..., None, :].float().expand(shape)


def _change(pixels: Tensor, values: Tensor, mean: Tensor, std: Tensor, raw: Raw) -> Tensor:
    """Crops minus the slice's mean (B, V, S, S) → the view's gamma, gain, offset, noise and window, over the deviation."""
    gain, offset, gamma, noise, _, low, high = (
        column[..., None, None] for column in raw.views[..., 5:].float().unbind(-1)
    )
    mean, std, is_hu = mean[:, None], std[:, None], raw.slices[:, 6].float().view(-1, 1, 1, 1)
    unit = torch.where(is_hu == 1, 1, std)
    pivot = torch.where(is_hu == 1, AIR_HU - mean, 0)
    if not _one_by_one(pixels) or bool((gamma != 1).any()):
        darkest = values.amin((1, 2)).view(-1, 1, 1, 1).clamp(max=-1e-6)
        bent = darkest * (1 - (1 - pixels / darkest).clamp_(min=0) ** gamma)
        pixels = torch.where(gamma == 1, pixels, bent)
    pixels = pixels.mul_(gain / std).add_((pivot * (1 - gain) + offset * unit) / std)
    if not _one_by_one(pixels) or bool(noise.any()):
        pixels.addcmul_(noise_rows(raw.seeds, pixels.shape[-1]), noise * unit / std)
    torch.maximum(pixels, (low - mean) / std, out=pixels)
    return torch.minimum(pixels, (high - mean) / std, out=pixels)


def noise_rows(seeds: Tensor, side: int) -> Tensor:
    """Standard normal noise (B, V, side, side) of seeds (B, V): each row is a piece of one fixed table.

    Where it begins is a hash (MurmurHash3's finaliser on 64-bit words, which wrap) of the seed and the row.
    """
    table = _noise_table(seeds.device)
    at = seeds[..., None] * 65536 + torch.arange(side, device=seeds.device)
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        at = (at ^ ((at >> 33) & 0x7FFFFFFF)) * factor
    at = (at ^ ((at >> 33) & 0x7FFFFFFF)) & 0x7FFFFFFFFFFFFFFF
    pieces = table.as_strided((_NOISE - side + 1, side), (1, 1))
    return pieces.index_select(0, (at % len(pieces)).flatten()).view(*at.shape, side)


@lru_cache(maxsize=4)
def _noise_table(device: torch.device) -> Tensor:
    return torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).to(device)
