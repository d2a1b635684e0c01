"""Rendering of volumes against the plain way: cut, turned, interpolated and changed by explicit arithmetic."""

import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch.nn import functional

from hilum.pretrain.volume_render import VolumeFacts, noise, quantiles, render_volume_views, resize, window_of
from hilum.pretrain.volume_views import VolumeView, view_affine

CLIP = (-1000.0, 1900.0)
CT = VolumeFacts(slope=1.0, intercept=0.0, unit="HU", mean=-573.8, std=461.3, clip=CLIP)
MR = VolumeFacts(slope=0.4, intercept=150.0, unit="", mean=300.0, std=120.0, clip=None)
VIEW = VolumeView((3, 2, 4), (17, 30, 21), (0, 1, 2), (False, False, False), (12, 10, 14), 1.0, 0)


def make_volume(seed: int = 0, shape: tuple[int, int, int] = (25, 36, 30)) -> np.ndarray:
    """From below the range to above it."""
    return np.random.default_rng(seed).integers(-1300, 2300, shape).astype(np.int16)


def read_from(volume: np.ndarray, asked: list | None = None):
    def read(start, size):
        if asked is not None:
            asked.append((start, size))
        return volume[tuple(slice(a, a + n) for a, n in zip(start, size))]

    return read


def render(view: VolumeView, facts: VolumeFacts = CT, volume: np.ndarray | None = None) -> np.ndarray:
    return render_volume_views(read_from(make_volume() if volume is None else volume), [view], facts)[0]


# ---- the plain way


def resize_plain(region: np.ndarray, view: VolumeView) -> np.ndarray:
    image = torch.from_numpy(region.astype(np.float64)).permute(view.axes)[None, None]
    crop = functional.interpolate(image, view.shape, mode="trilinear", align_corners=False)[0, 0].numpy()
    for axis, flip in enumerate(view.flips):
        crop = np.flip(crop, axis) if flip else crop
    return crop


def quantiles_plain(values: np.ndarray) -> list[float]:
    """facts/voxelfm.md §2, bin by bin."""
    counts, _ = np.histogram(values, 512, CLIP)
    found = []
    for q in (0.01, 0.25, 0.5, 0.75, 0.99):
        so_far, number = int(counts[0]), 0
        while so_far < q * counts.sum():
            number += 1
            so_far += int(counts[number])
        found.append(-1000 + number * 5.6640625)
    return found


def render_plain(volume: np.ndarray, view: VolumeView, facts: VolumeFacts) -> np.ndarray:
    region = volume[tuple(slice(a, a + n) for a, n in zip(view.start, view.size))]
    values = resize_plain(region, view) * facts.slope + facts.intercept
    if view.window:
        q1, q25, q50, q75, q99 = quantiles_plain(values)
        iqr = q75 - q25 if q75 - q25 >= 1 else max(q99 - q1, 1)
        level, width = q50 + 0.2 * iqr * view.window[0], max(iqr * (0.5 + 1.5 * view.window[1]), 10)
        values = np.clip(values, level - width / 2, level + width / 2)
    if view.gamma != 1:
        low = values.min()
        values = low + (facts.mean - low) * ((values - low) / (facts.mean - low)) ** view.gamma
    pivot, unit = (-1000.0, 1.0) if facts.unit == "HU" else (facts.mean, facts.std)
    values = pivot + (values - pivot) * view.gain + view.offset * unit
    values = values + view.noise * unit * noise(view.noise_seed, view.shape).numpy()
    return (np.clip(values, *(facts.clip or (-math.inf, math.inf))) - facts.mean) / facts.std


# ---- from voxels to crops


@pytest.mark.parametrize("size", [(17, 30, 21), (5, 3, 40), (12, 10, 14), (1, 7, 30)])
def test_resizing_is_torchs_of_the_turned_region(size):
    """Coarser, finer, as it is; all 48 ways to turn."""
    region = np.random.default_rng(0).integers(-1000, 1900, size).astype(np.int16)
    for axes, flips in product(permutations(range(3)), product([False, True], repeat=3)):
        view = replace(VIEW, size=size, axes=axes, flips=flips)
        np.testing.assert_allclose(resize(region, view).numpy(), resize_plain(region, view), atol=0.02)  # of 2,900


@pytest.mark.parametrize("chunk", [1, 500, 1 << 20])
def test_how_many_planes_are_made_at_once_changes_nothing(chunk, monkeypatch):
    before = render(VIEW)
    monkeypatch.setattr("hilum.pretrain.volume_render.CACHE", chunk)
    assert (render(VIEW) == before).all()


def test_a_region_that_is_no_block_of_memory_is_rendered_alike():
    volume = make_volume()
    turned = np.asfortranarray(volume)
    assert (render(VIEW, volume=turned) == render(VIEW, volume=volume)).all()


def test_only_the_boxes_are_read():
    asked: list = []
    other = replace(VIEW, start=(0, 0, 0), size=(4, 5, 6), axes=(2, 0, 1))
    crops = render_volume_views(read_from(make_volume(), asked), [VIEW, other], CT)
    assert asked == [((3, 2, 4), (17, 30, 21)), ((0, 0, 0), (4, 5, 6))]
    assert [c.shape for c in crops] == [VIEW.shape] * 2
    assert all(c.dtype == np.float32 and c.flags.c_contiguous for c in crops)


def test_voxels_keep_their_place_in_the_patient():
    """Volumes that hold their own coordinates in mm: each crop shows the coordinates that its affine says. A border of voxels
    that are interpolated with nothing is left out."""
    rng = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * (0.8, 1.2, 2.0)
    affine[:3, 3] = (-30, 12, 99)
    shape = (40, 50, 60)
    index = np.stack([*np.indices(shape), np.ones(shape)], -1)
    volumes = [np.rint((index @ affine.T)[..., axis] * 100).astype(np.int16) for axis in range(3)]
    plain = VolumeFacts(slope=0.01, intercept=0.0, unit="", mean=0.0, std=1.0, clip=None)
    for axes, flips in product(permutations(range(3)), product([False, True], repeat=3)):
        view = replace(VIEW, start=(5, 11, 2), size=(30, 20, 44), axes=axes, flips=flips, shape=(11, 24, 30))
        shown = np.stack([render(view, plain, volume) for volume in volumes], -1)
        own = np.stack([*np.indices(view.shape), np.ones(view.shape)], -1)
        wanted = (own @ view_affine(view, affine).T)[..., :3]
        inside = (slice(2, -2),) * 3
        np.testing.assert_allclose(shown[inside], wanted[inside], atol=0.006)  # stored to 0.005 mm


# ---- windows


def test_quantiles_of_the_fact_sheet():
    ramp = torch.linspace(-1000, 1900, 64**3).view(64, 64, 64)
    assert np.round(quantiles(ramp, CLIP), 2).tolist() == [-971.68, -280.66, 444.34, 1169.34, 1866.02]


@pytest.mark.parametrize("case", range(5))
def test_quantiles_are_those_of_numpys_histogram(case):
    rng = np.random.default_rng(case)
    values = [
        rng.normal(0, 900, (20, 21, 22)),
        rng.integers(-1100, 2000, (20, 20, 20)),  # many on edges of bins
        rng.choice([-1000.0, -275.0, 450.0, 1175.0, 1900.0], (20, 20, 20)),  # all on edges
        np.full((4, 4, 4), 40.0),
        np.full((4, 4, 4), 1900.0),
    ][case].astype(np.float32)
    assert quantiles(torch.from_numpy(values), CLIP) == pytest.approx(quantiles_plain(values), abs=1e-9)


def test_windows_follow_the_crops_quartiles():
    ramp = torch.linspace(-1000, 1900, 64**3)
    median, spread = 444.3359375, 1450.0
    assert window_of(ramp, CLIP, (0.0, 0.0)) == pytest.approx((median - spread / 4, median + spread / 4))
    assert window_of(ramp, CLIP, (1.0, 1.0)) == pytest.approx((median + (0.2 - 1) * spread, median + 1.2 * spread))
    flat = torch.full((100,), 40.0)
    low, high = window_of(flat, CLIP, (0.0, 0.5))
    assert high - low == pytest.approx(10)  # at least
    flat[:10] = 400.0  # quartiles fall together: the 1st and 99th percentile stand in
    low, high = window_of(flat, CLIP, (0.0, 1.0))
    assert high - low == pytest.approx(2 * 362.5, abs=12)


# ---- intensity


@pytest.mark.parametrize("facts", [CT, MR])
def test_crops_are_those_of_the_plain_way(facts):
    rng = np.random.default_rng(1)
    for number in range(12):
        view = replace(
            VIEW,
            axes=tuple(rng.permutation(3).tolist()),
            flips=tuple((rng.random(3) < 0.5).tolist()),
            gain=1 + 0.2 * rng.normal(),
            offset=(20 if facts is CT else 0.3) * rng.normal(),
            gamma=1.0 if facts is CT else float(np.exp(0.3 * rng.normal())),
            noise=(20.0 if facts is CT else 0.2) * (number % 2),
            noise_seed=number,
            window=(float(rng.normal()), float(rng.random())) if facts is CT and number % 3 else None,
        )
        np.testing.assert_allclose(render(view, facts), render_plain(make_volume(), view, facts), atol=3e-4)


def test_nothing_leaves_the_range_and_nothing_changes_unasked():
    volume = make_volume()
    loud = replace(VIEW, noise=500.0, gain=1.5, noise_seed=3)
    ends = [(end - CT.mean) / CT.std for end in CLIP]
    assert (render(loud).min(), render(loud).max()) == pytest.approx(ends)
    same = replace(VIEW, size=VIEW.shape)
    region = volume[3:15, 2:12, 4:18].clip(*CLIP)
    np.testing.assert_allclose(render(same), (region - CT.mean) / CT.std, atol=1e-5)
    windowed = replace(same, window=(0.0, 0.5))
    assert (render(windowed, replace(CT, clip=None)) != render(windowed)).any()


def test_a_crop_without_contrast_stays_as_it_is():
    """Gamma has nothing to bend where all is as bright as the mean, or brighter."""
    flat = np.full((25, 36, 30), 400, np.int16)
    assert np.isfinite(render(replace(VIEW, gamma=1.3), MR, flat)).all()
    assert render(replace(VIEW, gamma=1.3), MR, flat) == pytest.approx((400 * 0.4 + 150 - 300) / 120, abs=1e-5)


def test_noise_is_normal_and_its_own_for_each_seed():
    shape = (24, 30, 40)
    one, other = noise(5, shape), noise(6, shape)
    assert one.shape == shape
    assert kstest(one.flatten().numpy()[:20000], "norm").pvalue > 1e-3
    for axis in range(3):
        a, b = one.narrow(axis, 1, shape[axis] - 1), one.narrow(axis, 0, shape[axis] - 1)
        assert abs(float((a * b).mean())) < 0.03  # no trace of the neighbour: 0.006 standard error
    assert abs(float((one * other).mean())) < 0.03
    assert (noise(5, shape) == one).all()
    assert not torch.equal(noise(2**31 - 1, shape), one)
    assert noise(1, (56, 3, 2)).shape == (56, 3, 2)
