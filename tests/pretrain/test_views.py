"""Draws: exact shares, where crops and masks fall, and how intensity may change."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ks_2samp

from hilum.archive.store.content import SliceContent
from hilum.errors import UsageError
from hilum.pretrain.recipe import Intensity, ViewSpec
from hilum.pretrain.sampling import sample_rng
from hilum.pretrain.views import (
    anatomy_in_crop,
    foreground_share,
    sample_boxes,
    sample_crops,
    sample_intensity,
    sample_points,
    sample_views,
)

SPEC = ViewSpec(global_px=128, local_px=48)
GRID = (8, 8)


def make_content(box: tuple[float, float, float, float] = (0.2, 0.3, 0.9, 0.8), cells: int = 32) -> SliceContent:
    """Anatomy that fills a box (fractions) of the slice."""
    at = (np.arange(cells) + 0.5) / cells
    y0, x0, y1, x1 = box
    grid = ((at[:, None] > y0) & (at[:, None] < y1) & (at > x0) & (at < x1)).astype(np.uint8)
    return SliceContent(grid * 255)


def draw(
    sample: int, content: SliceContent, spec: ViewSpec = SPEC, grid=GRID, counts=(0, 0), unit="HU", seed=0
) -> list:
    sizes = spec.global_px, spec.local_px
    return sample_views(sample_rng(seed, sample), content, unit, spec, sizes, grid, list(counts))


def share_of(grid: np.ndarray, box: tuple) -> float:
    return float(foreground_share(grid, np.array([box]))[0])


# ---- masks


def mean_place(masks: list[np.ndarray]) -> tuple[float, float]:
    total = np.sum(masks, 0).astype(float)
    at = [(np.arange(n) + 0.5) / n for n in total.shape]
    return float(total.sum(1) @ at[0] / total.sum()), float(total.sum(0) @ at[1] / total.sum())


def test_the_anatomy_is_shifted_with_the_crop_and_mirrored_with_it():
    assert anatomy_in_crop((0.5, 0.25), (0.0, 0.0, 1.0, 1.0), False) == (0.5, 0.25)
    assert anatomy_in_crop((0.5, 0.25), (0.0, 0.0, 1.0, 1.0), True) == (0.5, 0.75)
    assert anatomy_in_crop((0.5, 0.25), (0.25, 0.0, 0.75, 0.5), False) == pytest.approx((0.5, 0.5))
    assert anatomy_in_crop((0.5, 0.25), (0.5, 0.5, 1.0, 1.0), False) == pytest.approx((0.0, -0.5))  # outside


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_guided_masks_fall_where_the_anatomy_is_in_the_crop(flip):
    """Crop by crop, the mean masked place correlates with the anatomy's place in that crop, in both axes."""
    content = make_content((0.1, 0.1, 0.4, 0.4))
    spec = replace(SPEC, num_local=0, flip=flip, global_scale=(0.3, 0.5), mask_sigma=0.1, min_crop_foreground=0.0)
    wanted, found = [], []
    for sample in range(120):
        for view in draw(sample, content, spec, (16, 16), (20, 20)):
            y0, x0, y1, x1 = view.box
            y, x = (0.25 - y0) / (y1 - y0), (0.25 - x0) / (x1 - x0)
            wanted.append((y, 1 - x if flip else x))
            assert view.mask is not None
            found.append(mean_place([view.mask]))
    wanted_at, found_at = np.clip(wanted, 0.15, 0.85), np.array(found)
    for axis in (0, 1):
        assert np.corrcoef(wanted_at[:, axis], found_at[:, axis])[0, 1] > 0.7
    uniform = [
        mean_place([v.mask])
        for s in range(60)
        for v in draw(s, content, replace(spec, mask_prior="uniform"), (16, 16), (20, 20))
        if v.mask is not None
    ]
    assert np.mean(uniform, 0) == pytest.approx((0.5, 0.5), abs=0.06)


# ---- crops


def test_foreground_share_equals_a_fine_sum():
    rng = np.random.default_rng(0)
    grid = rng.random((7, 5)).astype(np.float32)
    fine = np.kron(grid, np.ones((60, 84)))  # 420 × 420
    for _ in range(20):
        (a, b), (c, d) = (np.sort(rng.choice(421, 2, replace=False)) for _ in range(2))
        share = share_of(grid, (a / 420, c / 420, b / 420, d / 420))
        assert share == pytest.approx(fine[a:b, c:d].mean(), abs=1e-9)
    assert share_of(grid, (0.0, 0.0, 1.0, 1.0)) == pytest.approx(grid.mean())


def test_boxes_have_the_area_and_shape_asked_for():
    rng = np.random.default_rng(0)
    for y0, x0, y1, x1 in sample_boxes(rng, np.full((300, 2), (0.05, 0.32)), (0.75, 4 / 3)):
        assert 0 <= y0 < y1 <= 1
        assert 0 <= x0 < x1 <= 1
        assert 0.05 - 1e-9 <= (y1 - y0) * (x1 - x0) <= 0.32 + 1e-9
        assert 0.75 - 1e-9 <= (x1 - x0) / (y1 - y0) <= 4 / 3 + 1e-9
    whole = sample_boxes(rng, np.array([[1.0, 1.0]]), (1.2, 4 / 3))[
        0
    ]  # no such shape fits: the largest square is taken
    assert whole == pytest.approx((0, 0, 1, 1))


def test_boxes_have_the_law_of_random_resized_crop():
    """Area and shape drawn together again until both sides fit, one box after the other."""

    def plain(rng: np.random.Generator) -> tuple[float, float, float]:
        while True:
            area, ratio = rng.uniform(0.32, 1), np.exp(rng.uniform(*np.log([0.75, 4 / 3])))
            height, width = np.sqrt(area / ratio), np.sqrt(area * ratio)
            if height <= 1 and width <= 1:
                return area, np.log(ratio), rng.uniform(0, 1 - height)

    rng = np.random.default_rng(0)
    boxes = sample_boxes(rng, np.full((6000, 2), (0.32, 1.0)), (0.75, 4 / 3))
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    found = np.stack([height * width, np.log(width / height), boxes[:, 0]], 1)
    wanted = np.array([plain(rng) for _ in range(6000)])
    for column in range(3):
        assert ks_2samp(found[:, column], wanted[:, column]).pvalue > 1e-3


def test_crops_hold_enough_anatomy_when_a_draw_can():
    """A third of the slice is anatomy: with twenty draws next to no crop is left with less than 30 %."""
    content = make_content((0.2, 0.2, 0.8, 0.8))
    too_little = 0
    for sample in range(100):
        for view in draw(sample, content, seed=1):
            assert view.foreground == pytest.approx(share_of(content.grid, view.box))
            too_little += view.foreground < 0.3
            for box in view.rejected:
                assert share_of(content.grid, box) < 0.3
    assert too_little == 0


def test_the_best_draw_is_taken_when_none_is_good():
    content = make_content((0.45, 0.45, 0.55, 0.55))
    spec = replace(SPEC, max_tries=7)
    box, share, rejected = sample_crops(np.random.default_rng(0), content.grid, np.array([[0.3, 0.4]]), spec)[0]
    assert len(rejected) == 6
    assert share < 0.3
    assert share >= max(share_of(content.grid, b) for b in rejected)
    assert share == pytest.approx(share_of(content.grid, box))


def test_rejection_is_off_at_zero():
    content = make_content((0.9, 0.9, 1.0, 1.0))
    assert all(not v.rejected for v in draw(0, content, replace(SPEC, min_crop_foreground=0.0)))


# ---- shared places


def test_points_are_one_place_of_the_slice_seen_by_every_crop():
    """Back in the slice, all crops mean the same place, and it shows anatomy that all of them hold."""
    content = make_content((0.2, 0.3, 0.9, 0.8))
    spec = replace(SPEC, flip=0.5, num_local=0)
    for sample in range(20):
        rng = sample_rng(0, sample)
        views = sample_views(rng, content, "HU", spec, (128, 48), GRID, [0, 0])
        points = sample_points(rng, content.grid, views, 30)
        assert points.shape == (2, 30, 2)
        assert points.min() >= -1e-6
        assert points.max() <= 1 + 1e-6
        places = []
        for own, view in zip(points.astype(float), views):
            y0, x0, y1, x1 = view.box
            x = 1 - own[:, 1] if view.flip else own[:, 1]
            places.append(np.stack([y0 + own[:, 0] * (y1 - y0), x0 + x * (x1 - x0)], 1))
        np.testing.assert_allclose(places[0], places[1], atol=1e-6)
        cells = (places[0] * 32).astype(int).clip(0, 31)
        assert (content.grid[cells[:, 0], cells[:, 1]] > 0).mean() > 0.9  # a cell on the rim may be clipped out of it


def test_crops_without_a_common_place_have_no_points():
    views = draw(0, make_content(), replace(SPEC, num_local=0))
    apart = [replace(views[0], box=(0.0, 0.0, 0.4, 1.0)), replace(views[1], box=(0.5, 0.0, 1.0, 1.0))]
    assert np.isnan(sample_points(sample_rng(0, 0), make_content().grid, apart, 5)).all()
    assert np.isnan(sample_points(sample_rng(0, 0), np.zeros((32, 32), np.float32), views, 5)).all()


# ---- the whole draw


def test_draws_depend_on_seed_and_sample_only():
    def drawn(seed: int, sample: int) -> list[str]:
        return list(map(repr, draw(sample, make_content(), counts=(10, 0), seed=seed)))

    first = drawn(3, 5)
    np.random.default_rng(0).random(100)
    drawn(3, 6)
    assert drawn(3, 5) == first
    assert drawn(3, 6) != first
    assert drawn(4, 5) != first


def test_views_are_what_the_spec_says():
    spec = replace(SPEC, flip=0.5, mr=Intensity(gain=0.3, offset=0.1, gamma=0.2, noise=0.02, blur=0.4))
    views = [v for s in range(150) for v in draw(s, make_content(), spec, counts=(12, 0), unit="")]
    first, second, local = views[0::10], views[1::10], views[2::10]
    assert all(v.size_px == 128 for v in first + second)
    assert all(v.size_px == 48 for v in local)
    assert all(v.mask is not None and v.mask.sum() == 12 for v in first)
    assert all(v.mask is None for v in second + local)
    gains, offsets, noises, gammas = (
        np.array([getattr(v, n) for v in views]) for n in ("gain", "offset", "noise", "gamma")
    )
    assert 0.7 <= gains.min() < 0.75 < 1.25 < gains.max() <= 1.3
    assert -0.1 <= offsets.min() < -0.09 < 0.09 < offsets.max() <= 0.1
    assert np.exp(-0.2) <= gammas.min() < 0.84 < 1.2 < gammas.max() <= np.exp(0.2)
    assert 0 <= noises.min() < noises.max() <= 0.02
    blurs = np.array([v.blur for v in views])
    assert (blurs > 0).mean() == pytest.approx(0.4, abs=0.05)
    assert blurs[blurs > 0].min() >= 0.3
    assert blurs.max() <= 1.2
    assert np.mean([v.flip for v in views]) == pytest.approx(0.5, abs=0.05)
    assert len({v.noise_seed for v in views}) == len(views)
    assert all(v.window_hu is None for v in views)


def test_changes_of_ct_are_small_calibration_errors_noise_and_display_windows():
    views = [v for s in range(150) for v in draw(s, make_content())]
    assert all(0.98 <= v.gain <= 1.02 and abs(v.offset) <= 10 and v.gamma == 1 and v.noise <= 25 for v in views)
    windows = [v.window_hu for v in views if v.window_hu]
    assert len(windows) / len(views) == pytest.approx(0.2, abs=0.04)
    widths, chosen = dict(SPEC.ct.windows_hu), set()
    for low, high in windows:
        level = min(widths, key=lambda one: abs((low + high) / 2 - one))
        assert abs((low + high) / 2 - level) <= 0.1 * widths[level]
        assert 0.8 * widths[level] <= high - low <= 1.2 * widths[level]
        chosen.add(level)
    assert chosen == set(widths)


def test_without_settings_nothing_changes():
    for change in sample_intensity(np.random.default_rng(0), Intensity(), 5):
        assert change[:5] == (1.0, 0.0, 1.0, 0.0, 0.0)
        assert change[6] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_global": 1}, "num_global must be at least 2; found 1"),
        ({"global_scale": (0.5, 0.2)}, "views.global_scale must be two rising numbers"),
        ({"local_scale": (0.0, 0.2)}, "views.local_scale"),
        ({"global_scale": (0.5, 1.5)}, "views.global_scale .* at most 1"),
        ({"mask_ratio": (0.5, 1.2)}, "views.mask_ratio .* at most 1"),
        ({"max_tries": 0}, "views.max_tries must be at least 1; found 0"),
        ({"mask_group": 0}, "views.mask_group must be at least 1; found 0"),
        ({"ct": Intensity(gamma=0.1)}, "views.ct.gamma must be 0, since it would bend Hounsfield units"),
        ({"mr": Intensity(window=0.1)}, "views.mr.window must be 0, since windows are in Hounsfield units"),
        ({"resolutions": ((64, 32, 0.0),)}, "views.resolutions must be of weights above 0"),
    ],
)
def test_specs_that_cannot_be_drawn_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(SPEC, **changes)


@pytest.mark.parametrize("changes", [{"gain": 1.0}, {"noise": -1.0}, {"window": 0.1, "windows_hu": ((40.0, 0.0),)}])
def test_intensities_that_cannot_be_are_refused(changes):
    with pytest.raises(UsageError, match=r"gain below 1|pairs of level and width > 0"):
        Intensity(**changes)
