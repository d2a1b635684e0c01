"""Rendering against the plain way: one crop after the other, cut, interpolated and changed by explicit arithmetic."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hilum.archive.store.store import restore
from hilum.encode.contract import Contract, normalise_slice
from hilum.pretrain import render as render_module
from hilum.pretrain.render import Source, blur_taps, noise_rows, pack, pixel_box, render, standardise
from hilum.pretrain.views import View

PLAIN = View(box=(0.0, 0.0, 1.0, 1.0), foreground=1.0, rejected=(), flip=False, size_px=32)
CONTRACT = Contract(size_px=32)
BOXES = [(0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.7, 0.45), (0.5, 0.55, 0.8, 0.9), (0.3, 0.1, 0.4, 0.9)]


def make_source(unit: str = "HU", shape: tuple[int, int] = (40, 60), seed: int = 0) -> Source:
    """CT from below the contract's range to above it; MR with a slope, as wide values are stored."""
    rng = np.random.default_rng(seed)
    if unit == "HU":
        return Source(rng.integers(-1500, 2500, shape).astype(np.int16), 1.0, 0.0, "HU")
    return Source(np.abs(rng.normal(0, 300, shape)).astype(np.int16), 0.37, 120.0, "")


def make(sources: list[Source], views: list[list[View]], contract: Contract = CONTRACT) -> torch.Tensor:
    """(V, B, 1, S, S)"""
    raw = pack(sources, views, contract)
    return render(raw, [(raw, views[0][0].size_px)], contract)[0]


def one(view: View, source: Source | None = None, contract: Contract = CONTRACT) -> torch.Tensor:
    return make([source or make_source()], [[view]], contract)[0, 0, 0]


# ---- the plain way


def render_plain(source: Source, view: View, contract: Contract, dtype: torch.dtype = torch.float64) -> Tensor:
    """One crop (size, size). Everything in the slice's own unit; the contract's normalisation comes last."""
    image = torch.from_numpy(np.array(restore(source.stored, source.slope, source.intercept))).to(dtype)
    low, high = contract.clip_hu if source.unit == "HU" else (-math.inf, math.inf)
    image = image.clamp(low, high)
    std, mean = torch.std_mean(image)
    std = std if std >= contract.eps else torch.ones_like(std)
    top, left, bottom, right = pixel_box(view, *image.shape)
    crop = functional.interpolate(
        image[None, None, top:bottom, left:right],
        (view.size_px, view.size_px),
        mode=contract.resampling,
        antialias=True,
        align_corners=False,
    )[0]
    crop = crop.flip(-1) if view.flip else crop
    crop = blur(crop, view.blur)[0] if view.blur else crop[0]
    if view.gamma != 1:
        darkest = image.min()
        crop = darkest + (mean - darkest) * ((crop - darkest) / (mean - darkest)).clamp(min=0) ** view.gamma
    unit, pivot = (1.0, -1000.0) if source.unit == "HU" else (std, mean)
    crop = pivot + (crop - pivot) * view.gain + view.offset * unit
    crop = crop + view.noise * unit * noise_rows(torch.tensor([[view.noise_seed]]), view.size_px)[0, 0]
    if view.window_hu:
        low, high = max(low, view.window_hu[0]), min(high, view.window_hu[1])
    return (crop.clamp(low, high) - mean) / std


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (1, Y, X), separable, 3-sigma kernel, edges reflected."""
    reach = max(int(3 * sigma + 0.5), 1)
    at = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = functional.pad(image[None], [reach] * 4, mode="reflect")
    rows = functional.conv2d(padded, kernel[None, None, :, None])
    return functional.conv2d(rows, kernel[None, None, None, :])[0]


# ---- the whole way against the plain one


def random_view(rng: np.random.Generator, unit: str, size_px: int) -> View:
    y0, x0 = rng.uniform(0, 0.5, 2)
    height, width = rng.uniform(0.2, 0.5, 2)
    hu = unit == "HU"
    return View(
        box=(y0, x0, y0 + height, x0 + width), foreground=1.0, rejected=(), flip=bool(rng.integers(2)), size_px=size_px,
        gain=rng.uniform(0.8, 1.2), offset=rng.uniform(-1, 1) * (50 if hu else 0.3),
        gamma=1.0 if hu else rng.uniform(0.8, 1.25), noise=rng.uniform(0, 30 if hu else 0.1),
        blur=rng.uniform(0.3, 1.2) * rng.integers(2), noise_seed=int(rng.integers(2**31)),
        window_hu=(-200.0, 300.0) if hu and rng.integers(2) else None,
    )  # fmt: skip


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
@pytest.mark.parametrize("unit", ["HU", ""])
@pytest.mark.parametrize("size_px", [16, 48])
def test_crops_are_those_of_the_plain_way(unit, resampling, size_px):
    """Slices of several sizes, all changes at once, coarser and finer, against float64."""
    contract = Contract(size_px=32, resampling=resampling)
    rng = np.random.default_rng(1)
    sources = [make_source(unit, shape, n) for n, shape in enumerate([(40, 60), (100, 33), (64, 64)])]
    views = [[random_view(rng, unit, size_px) for _ in range(8)] for _ in sources]
    found = make(sources, views, contract)
    for b, (source, drawn) in enumerate(zip(sources, views)):
        for v, view in enumerate(drawn):
            torch.testing.assert_close(
                found[v, b, 0].double(), render_plain(source, view, contract), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("unit", ["HU", ""])
def test_all_at_once_equals_one_by_one(unit, monkeypatch):
    """What a GPU does in a few calls, padded slices and all, is what a CPU does crop by crop."""
    rng = np.random.default_rng(2)
    sources = [make_source(unit, shape, n) for n, shape in enumerate([(40, 60), (100, 33), (64, 64)])]
    views = [[random_view(rng, unit, 24) for _ in range(5)] for _ in sources]
    raw = pack(sources, views, CONTRACT)
    values, mean, std = standardise(raw, CONTRACT.eps)
    for n, source in enumerate(sources):
        height, width = source.stored.shape
        single = standardise(pack([source], [views[n]], CONTRACT), CONTRACT.eps)
        torch.testing.assert_close(values[n, :height, :width], single[0][0], atol=1e-3, rtol=1e-6)
        torch.testing.assert_close(torch.stack([mean[n], std[n]]), torch.stack([single[1][0], single[2][0]]))
    assert float(values[0, 40:].abs().max()) == 0
    monkeypatch.setattr(render_module, "_one_by_one", lambda tensor: False)
    at_once = render(raw, [(raw, 24)], CONTRACT)[0]
    monkeypatch.undo()
    torch.testing.assert_close(at_once, make(sources, views), atol=1e-5, rtol=1e-5)


def test_a_chunk_of_one_padded_slice(monkeypatch):
    """A GPU's last chunk may be a single slice, with the padding of the larger ones before it."""
    sources = [make_source("HU", shape, n) for n, shape in enumerate([(64, 64), (60, 50), (40, 33)])]
    views = [[replace(PLAIN, box=box) for box in BOXES] for _ in sources]
    raw = pack(sources, views, CONTRACT)
    monkeypatch.setattr(render_module, "_one_by_one", lambda tensor: False)
    monkeypatch.setattr(render_module, "CHUNK", 2)
    in_chunks = render(raw, [(raw, 32)], CONTRACT)[0]
    monkeypatch.undo()
    torch.testing.assert_close(in_chunks, make(sources, views), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("unit", "box"), [("HU", BOXES[0]), ("", BOXES[0]), ("HU", BOXES[1])])
def test_without_changes_a_crop_is_what_the_encoder_is_shown(unit, box):
    """`normalise_slice` and `resize` of the contract."""
    source = make_source(unit)
    pixels = source.stored.astype(np.float32) * np.float32(source.slope) + np.float32(source.intercept)
    view = replace(PLAIN, box=box)
    top, left, bottom, right = pixel_box(view, 40, 60)
    image = normalise_slice(pixels, unit, CONTRACT)[:, top:bottom, left:right]
    wanted = torch.nn.functional.interpolate(image[None], (32, 32), mode="bilinear", antialias=True)[0, 0]
    torch.testing.assert_close(one(view, source), wanted, atol=2e-5, rtol=1e-5)


def test_a_slice_without_content_stays_finite():
    flat = Source(np.full((40, 60), 7, np.int16), 1.0, 0.0, "")
    found = one(replace(PLAIN, gamma=1.2, gain=1.3, offset=0.5), flat)
    torch.testing.assert_close(found, torch.full((32, 32), 0.5))


# ---- geometry


def triangle(size_in: int, size_out: int) -> np.ndarray:
    """Weights (out, in) of bilinear resampling with antialiasing: a triangle as wide as the step, half-pixel centres."""
    step = size_in / size_out
    width = max(step, 1.0)
    centers = (np.arange(size_out) + 0.5) * step
    weights = np.clip(1 - np.abs(np.arange(size_in) + 0.5 - centers[:, None]) / width, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("box", BOXES)
def test_crops_equal_the_triangle_filter(box):
    """Coarser along one axis and finer along the other, too."""
    source = make_source("")
    values = source.stored * source.slope
    values = (values - values.mean()) / values.std(ddof=1)
    top, bottom = round(box[0] * 40), round(box[2] * 40)
    left, right = round(box[1] * 60), round(box[3] * 60)
    wanted = triangle(bottom - top, 32) @ values[top:bottom, left:right] @ triangle(right - left, 32).T
    np.testing.assert_allclose(one(replace(PLAIN, box=box), source).numpy(), wanted, atol=1e-5)


def test_flipping_twice_is_identity():
    source = make_source()
    mirrored = replace(source, stored=np.ascontiguousarray(source.stored[:, ::-1]))
    torch.testing.assert_close(one(replace(PLAIN, flip=True), mirrored), one(PLAIN, source))
    torch.testing.assert_close(one(replace(PLAIN, flip=True), source).flip(-1), one(PLAIN, source))


def test_pixel_boxes_are_whole_and_never_empty():
    assert pixel_box(replace(PLAIN, box=(0.25, 0.5, 0.75, 1.0)), 40, 60) == (10, 30, 30, 60)
    for box in ((0.999, 0.999, 1.0, 1.0), (0.0, 0.0, 0.001, 0.001), (0.5, 0.5, 0.5001, 0.5001)):
        top, left, bottom, right = pixel_box(replace(PLAIN, box=box), 5, 7)
        assert 0 <= top < bottom <= 5
        assert 0 <= left < right <= 7
        assert min(bottom - top, right - left) >= 2


# ---- intensity


def to_hu(crop: torch.Tensor, source: Source) -> torch.Tensor:
    std, mean = torch.std_mean(torch.from_numpy(source.stored).double().clamp(-1000, 2000))
    return crop.double() * std + mean


def test_ct_changes_are_in_hu_and_air_stays_air():
    source = Source(np.random.default_rng(0).integers(-1000, 1500, (32, 32)).astype(np.int16), 1.0, 0.0, "HU")
    plain = to_hu(one(PLAIN, source), source)
    torch.testing.assert_close(plain, torch.from_numpy(source.stored).double(), atol=1e-3, rtol=0)
    shifted = to_hu(one(replace(PLAIN, offset=12.0), source), source)
    torch.testing.assert_close(shifted, plain + 12, atol=1e-3, rtol=0)
    scaled = to_hu(one(replace(PLAIN, gain=1.02), source), source)
    torch.testing.assert_close(scaled, (plain + 1000) * 1.02 - 1000, atol=1e-3, rtol=0)
    windowed = to_hu(one(replace(PLAIN, window_hu=(-160.0, 240.0)), source), source)
    torch.testing.assert_close(windowed, plain.clamp(-160, 240), atol=1e-3, rtol=0)
    noisy = to_hu(one(replace(PLAIN, noise=20.0), source), source) - plain
    assert float(noisy[plain > -900].std()) == pytest.approx(20, rel=0.1)


def test_no_change_leaves_the_range_of_the_contract():
    found = to_hu(one(replace(PLAIN, gain=1.3, noise=100.0, offset=50.0)), make_source())
    assert float(found.min()) >= -1000.001
    assert float(found.max()) <= 2000.001


def test_mr_changes_are_in_standard_deviations_and_gamma_keeps_the_darkest_value_and_the_mean():
    source = make_source("", (32, 32))
    plain = one(PLAIN, source)
    torch.testing.assert_close(one(replace(PLAIN, gain=1.2, offset=-0.4), source), plain * 1.2 - 0.4)
    bent = one(replace(PLAIN, gamma=1.3), source)
    darkest = plain.min()
    torch.testing.assert_close(bent.min(), darkest)
    assert bool((bent[plain > 0] > plain[plain > 0] - 1e-5).all())
    assert bool((bent[plain < 0] < plain[plain < 0] + 1e-5).all())


def test_plain_views_have_the_boxes_without_the_changes():
    source, rng = make_source(), np.random.default_rng(3)
    views = [random_view(rng, "HU", 32) for _ in range(4)]
    raw = pack([source], [views], CONTRACT)
    found = render(raw, [(raw.plain(), 24)], CONTRACT)[0]
    wanted = make([source], [[replace(PLAIN, box=v.box, flip=v.flip, size_px=24) for v in views]])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.2])
def test_blur_is_a_gaussian_of_the_crop(sigma):
    plain = one(PLAIN)
    torch.testing.assert_close(one(replace(PLAIN, blur=sigma)), blur(plain[None], sigma)[0], atol=1e-5, rtol=1e-5)
    index, weight = blur_taps(torch.tensor([[0.0, sigma]], dtype=torch.float64), 32)
    torch.testing.assert_close(weight.sum(-1), torch.ones(1, 2, 32))
    assert torch.equal((weight[0, 0] * (index[0, 0] == torch.arange(32)[:, None])).sum(-1), torch.ones(32))


# ---- noise


def test_noise_is_white_and_normal():
    noise = noise_rows(torch.arange(40)[None], 128)[0]
    flat = noise.flatten().sort().values
    normal = torch.distributions.Normal(0, 1).icdf((torch.arange(len(flat)) + 0.5) / len(flat))
    assert float((flat - normal)[500:-500].abs().max()) < 0.02  # quantiles of 655,360 numbers
    rows = noise[:, :-1].flatten(1), noise[:, 1:].flatten(1)
    assert abs(float((noise[..., 1:] * noise[..., :-1]).mean())) < 0.01
    assert abs(float((rows[0] * rows[1]).mean())) < 0.01
    views = noise.flatten(1)
    products = views @ views.T / views.shape[1]
    assert float((products - products.diag().diag()).abs().max()) < 0.05  # 1/128 each, 780 pairs


def test_noise_follows_its_seed():
    seeds = torch.tensor([[4, 4, 5, 2**31 - 1]])
    noise = noise_rows(seeds, 32)[0]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    assert torch.equal(noise_rows(seeds[:, 3:], 32)[0, 0], noise[3])
    assert not torch.equal(noise[0, 0], noise[0, 1])
