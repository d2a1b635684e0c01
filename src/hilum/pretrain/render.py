"""Then render: views → pixels. Exact: equal views of equal pixels give equal crops, on any machine of one kind."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hilum.encode.contract import resize
from hilum.pretrain.views import View


def render(image: Tensor, views: Sequence[View], resampling: str = "bilinear") -> list[Tensor]:
    """Make the crops of one slice.

    image    (1, Y, X), normalised
    returns  one (1, size, size) a view
    """
    return [_render(image, view, resampling) for view in views]


def _render(image: Tensor, view: View, resampling: str) -> Tensor:
    top, left, bottom, right = pixel_box(view, image.shape[1], image.shape[2])
    crop = resize(image[None, :, top:bottom, left:right], (view.size_px, view.size_px), resampling)[0]
    if view.flip:
        crop = crop.flip(-1)
    if view.blur:
        crop = blur(crop, view.blur)
    crop = crop * view.gain + view.offset
    if view.noise:
        generator = torch.Generator().manual_seed(view.noise_seed)
        crop = crop + view.noise * torch.randn(crop.shape, generator=generator)
    return crop


def pixel_box(view: View, height: int, width: int) -> tuple[int, int, int, int]:
    """The view's box in whole pixels (top, left, bottom, right), at least 2×2."""
    y0, x0, y1, x1 = view.box
    top, left = min(round(y0 * height), height - 2), min(round(x0 * width), width - 2)
    return top, left, max(round(y1 * height), top + 2), max(round(x1 * width), left + 2)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (1, Y, X), separable, 3-sigma kernel, edges reflected."""
    reach = max(int(3 * sigma + 0.5), 1)
    at = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = functional.pad(image[None], [reach] * 4, mode="reflect")
    rows = functional.conv2d(padded, kernel[None, None, :, None])
    return functional.conv2d(rows, kernel[None, None, None, :])[0]
