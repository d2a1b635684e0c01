"""Rendering against explicit cutting, resampling and arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hilum.pretrain.render import blur, pixel_box, render
from hilum.pretrain.views import View

PLAIN = View(
    box=(0.0, 0.0, 1.0, 1.0), foreground=1.0, rejected=(), flip=False, gain=1.0, offset=0.0, noise=0.0, noise_seed=0,
    blur=0.0, size_px=32,
)  # fmt: skip


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 40, 60, generator=torch.Generator().manual_seed(0))


def triangle(size_in: int, size_out: int) -> np.ndarray:
    """Weights (out, in) of bilinear resampling with antialiasing: a triangle as wide as the step, half-pixel centres."""
    step = size_in / size_out
    width = max(step, 1.0)
    centers = (np.arange(size_out) + 0.5) * step
    weights = np.clip(1 - np.abs(np.arange(size_in) + 0.5 - centers[:, None]) / width, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.7, 0.45), (0.5, 0.55, 0.8, 0.9)])
def test_crops_equal_the_triangle_filter(image, box):
    """Coarser along one axis and finer along the other, too."""
    found = render(image, [replace(PLAIN, box=box)])[0]
    top, bottom = round(box[0] * 40), round(box[2] * 40)
    left, right = round(box[1] * 60), round(box[3] * 60)
    crop = image[0, top:bottom, left:right].double().numpy()
    wanted = triangle(crop.shape[0], 32) @ crop @ triangle(crop.shape[1], 32).T
    assert found.shape == (1, 32, 32)
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=2e-5)


def test_the_whole_slice_at_its_own_size_is_itself():
    image = torch.randn(1, 32, 32)
    assert torch.equal(render(image, [PLAIN])[0], image)


def test_flipping_twice_is_identity(image):
    once = render(image, [replace(PLAIN, flip=True)])[0]
    plain = render(image, [PLAIN])[0]
    assert torch.equal(once.flip(-1), plain)
    mirrored = render(image.flip(-1), [replace(PLAIN, flip=True)])[0]
    torch.testing.assert_close(mirrored, plain, atol=1e-5, rtol=1e-5)


def test_gain_and_offset(image):
    found = render(image, [replace(PLAIN, gain=1.3, offset=-0.4)])[0]
    torch.testing.assert_close(found, render(image, [PLAIN])[0] * 1.3 - 0.4)


def test_noise_follows_its_seed_and_strength(image):
    noisy = replace(PLAIN, noise=0.1, noise_seed=4)
    a, b, other = (render(image, [v])[0] for v in (noisy, noisy, replace(noisy, noise_seed=5)))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    difference = a - render(image, [PLAIN])[0]
    assert float(difference.std()) == pytest.approx(0.1, rel=0.1)
    assert float(difference.mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.2])
def test_blur_is_a_gaussian(sigma):
    reach = max(int(3 * sigma + 0.5), 1)
    impulse = torch.zeros(1, 21, 21)
    impulse[0, 10, 10] = 1
    found = blur(impulse, sigma)[0]
    line = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    line /= line.sum()
    wanted = np.zeros((21, 21))
    wanted[10 - reach : 11 + reach, 10 - reach : 11 + reach] = np.outer(line, line)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    assert torch.allclose(blur(torch.full((1, 9, 9), 2.0), sigma), torch.full((1, 9, 9), 2.0))


def test_blur_is_in_pixels_of_the_crop(image):
    plain = render(image, [PLAIN])[0]
    torch.testing.assert_close(render(image, [replace(PLAIN, blur=0.9)])[0], blur(plain, 0.9))


def test_pixel_boxes_are_whole_and_never_empty():
    assert pixel_box(replace(PLAIN, box=(0.25, 0.5, 0.75, 1.0)), 40, 60) == (10, 30, 30, 60)
    for box in ((0.999, 0.999, 1.0, 1.0), (0.0, 0.0, 0.001, 0.001), (0.5, 0.5, 0.5001, 0.5001)):
        top, left, bottom, right = pixel_box(replace(PLAIN, box=box), 5, 7)
        assert 0 <= top < bottom <= 5
        assert 0 <= left < right <= 7
        assert min(bottom - top, right - left) >= 2


def test_several_views_come_in_order(image):
    views = [PLAIN, replace(PLAIN, size_px=16), replace(PLAIN, offset=1.0)]
    assert [tuple(c.shape) for c in render(image, views)] == [(1, 32, 32), (1, 16, 16), (1, 32, 32)]
