"""Draws of volumes: VoxelFM's rule of crops restated word by word, shares counted, geometry in millimetres."""

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import kstest

from hilum.archive.store.isotropic import VolumeContent
from hilum.pretrain.recipe import Intensity, ViewSpec
from hilum.pretrain.sampling import sample_rng
from hilum.pretrain.volume_spec import VolumeSpec
from hilum.pretrain.volume_views import (
    anatomy_in_crop,
    box_sides,
    foreground_share,
    mirrors,
    sample_boxes,
    sample_volume_points,
    sample_volume_views,
    view_affine,
    ways_to_lay,
)

SHAPE = (300, 350, 450)
SHAPES = ((112, 112, 112), (56, 56, 56))
SPEC, VOLUMES = ViewSpec(min_crop_foreground=0.0, max_tries=1), VolumeSpec()
FULL = VolumeContent(np.ones((32, 32, 32), np.float32))


def make_content(*box: tuple[float, float], cells: int = 32) -> VolumeContent:
    """Anatomy that fills a box, given by (low, high) fractions along Z, Y, X."""
    at = (np.arange(cells) + 0.5) / cells
    z, y, x = ((at > low) & (at < high) for low, high in box)
    return VolumeContent((z[:, None, None] & y[:, None] & x).astype(np.float32))


def draw(sample: int, content=FULL, spec=SPEC, volumes=VOLUMES, shapes=SHAPES, shape=SHAPE, counts=(0, 0), unit="HU"):
    grid = tuple(n // 14 for n in shapes[0])
    return sample_volume_views(sample_rng(0, sample), shape, unit, content, spec, volumes, shapes, grid, list(counts))


def many(num: int = 150, **changes):
    return [view for sample in range(num) for view in draw(sample, **changes)]


# ---- which box


def random_crop_3d(n, p, permutation, s):
    """facts/voxelfm.md §2: sides of the crop along the axes of the image, and how it is transposed."""
    q = [p[permutation[i]] for i in range(3)]
    alpha = min(s * min(n) / min(q), *(n[i] / q[i] for i in range(3)))
    sides = [min(max(round(alpha * q[i]), 1), n[i]) for i in range(3)]
    inverse = [permutation.index(axis) for axis in range(3)]
    return sides, inverse


@pytest.mark.parametrize("target", [(112, 112, 112), (28, 112, 224), (56, 42, 14)])
def test_boxes_are_those_of_random_crop_3d(target):
    rng = np.random.default_rng(0)
    for shape in (SHAPE, (40, 300, 310), (9, 5, 200)):
        for permutation in permutations(range(3)):
            for s in rng.uniform(0.05, 1, 20):
                sides, axes = random_crop_3d(shape, target, permutation, s)
                found = box_sides(np.array(shape), np.array(target), np.array([axes]), np.array([s]), VOLUMES)
                assert found[0].tolist() == sides
                laid = [sides[axis] for axis in axes]  # transposed, the box has the proportions of the target
                assert max(abs(a - b * max(laid) / max(target)) for a, b in zip(laid, target)) <= 1.5


def test_cubes_of_the_fact_sheet():
    """300×350×450: local cubes of 15 to 96 voxels, global ones of 96 to 300, 1.9 to 57 % of the volume."""
    views = many(120)
    sides = [{v.size for v in views[first::10]} for first in (0, 2)]
    assert all(len(set(size)) == 1 for some in sides for size in some)
    large, small = (np.array([size[0] for size in some]) for some in sides)
    assert 96 <= large.min() < 105 < 285 < large.max() <= 300
    assert 15 <= small.min() < 22 < 90 < small.max() <= 96
    assert 96**3 / math.prod(SHAPE) == pytest.approx(0.019, abs=5e-4)
    assert 300**3 / math.prod(SHAPE) == pytest.approx(0.57, abs=5e-3)


def test_scales_starts_and_permutations_are_uniform():
    boxes = sample_boxes(np.random.default_rng(0), (1000, 1100, 1200), FULL, SPEC, VOLUMES, SHAPES[0], (0.1, 0.5), 3000)
    starts, sizes = (np.array([box[n] for box in boxes]) for n in (0, 1))
    assert kstest(sizes[:, 0] / 1000, "uniform", (0.1, 0.4)).pvalue > 1e-3
    free = np.array((1000, 1100, 1200)) - sizes
    assert (starts >= 0).all()
    assert (starts <= free).all()
    for axis in range(3):
        assert kstest(starts[:, axis] / free[:, axis], "uniform").pvalue > 1e-3
    counts = Counter(box[2] for box in boxes)
    assert len(counts) == 6
    assert max(abs(c - 500) for c in counts.values()) < 90  # 4.4 standard errors
    whole = sample_boxes(np.random.default_rng(0), (4, 4, 4), FULL, SPEC, VOLUMES, (14, 14, 14), (0.6, 0.7), 200)
    ends = {(s, n) for box in whole for s, n in zip(box[0], box[1])}
    assert ends == {(0, 2), (1, 2), (2, 2), (0, 3), (1, 3)}  # both ends are reached


def test_shares_of_the_volume_are_what_the_paper_says():
    volumes = replace(VOLUMES, scale_of="volume", permute="none")
    target, shape = (28, 56, 56), (200, 300, 400)
    sides = box_sides(np.array(shape), np.array(target), np.array([[0, 1, 2]] * 3), np.array([0.05, 0.3, 1.0]), volumes)
    assert (sides[:2].prod(1) / math.prod(shape)).tolist() == pytest.approx([0.05, 0.3], rel=0.02)
    assert sides[2].tolist() == [150, 300, 300]  # as large as fits


def test_fitting_permutations_are_those_with_the_largest_box():
    fitting = replace(VOLUMES, permute="fitting")
    for shape in ((40, 300, 280), (300, 40, 280), (40, 40, 200), (64, 64, 64)):
        for target in ((28, 112, 112), (112, 28, 56), (56, 56, 56)):
            voxels = {}
            for way in permutations(range(3)):
                laid = [target[way.index(axis)] for axis in range(3)]
                voxels[way] = min(n / q for n, q in zip(shape, laid))
            best = {way for way, factor in voxels.items() if factor == pytest.approx(max(voxels.values()))}
            assert set(ways_to_lay(shape, target, fitting)) == best
    slab = draw(0, volumes=fitting, shapes=((28, 112, 112), (14, 56, 56)), shape=(40, 300, 280))
    assert all(view.axes[0] == 0 for view in slab)
    assert ways_to_lay(SHAPE, (28, 112, 112), replace(VOLUMES, permute="none")) == [(0, 1, 2)]


# ---- flips


def determinant(view) -> float:
    return float(np.linalg.det(view_affine(view, np.eye(4))[:3, :3]))


@pytest.mark.parametrize("permute", ["none", "all", "fitting"])
@pytest.mark.parametrize("flip_locals", [False, True])
def test_without_mirrors_only_rotations_are_left(permute, flip_locals):
    volumes = replace(VOLUMES, permute=permute, flip_locals=flip_locals, mirror=False)
    views = many(60, volumes=volumes)
    assert all(determinant(v) > 0 for v in views)
    turned = Counter((v.axes, v.flips) for v in many(300, volumes=volumes, spec=replace(SPEC, num_local=0))[0::2])
    assert len(turned) == (4 if permute == "none" else 24)  # the rotations of a box, of a cube
    assert max(turned.values()) < 3.5 * 300 / len(turned)
    mirrored = many(40, volumes=replace(volumes, mirror=True))
    signs = {determinant(v) > 0 for v in mirrored[0::10]}
    assert signs == {True, False}


def test_flips_are_drawn_for_each_axis_and_for_local_crops_only_on_request():
    views = many(300)
    globals_ = np.array([v.flips for n, v in enumerate(views) if n % 10 < 2])
    assert globals_.mean(0) == pytest.approx([0.5] * 3, abs=0.07)
    assert abs(np.corrcoef(globals_.T)[0, 1]) < 0.15
    assert not np.array([v.flips for n, v in enumerate(views) if n % 10 >= 2]).any()
    both = np.array([v.flips for v in many(60, volumes=replace(VOLUMES, flip_locals=True, flip=0.2))])
    assert both.mean() == pytest.approx(0.2, abs=0.04)


def test_mirrors_is_the_determinant():
    for axes in permutations(range(3)):
        for number in range(8):
            flips = tuple(bool(number >> k & 1) for k in range(3))
            matrix = np.eye(3)[list(axes)] * np.where(flips, -1, 1)[:, None]
            assert mirrors(axes, flips) == (np.linalg.det(matrix) < 0)


# ---- anatomy


def test_foreground_shares_equal_a_count():
    rng = np.random.default_rng(0)
    grid = rng.random((5, 4, 6)).astype(np.float32)
    fine = np.kron(grid, np.ones((12, 15, 10)))  # 60³
    low = rng.integers(0, 50, (20, 3))
    high = low + rng.integers(1, 11, (20, 3))
    shares = foreground_share(grid, low / 60, high / 60)
    for share, a, b in zip(shares, low, high):
        assert share == pytest.approx(fine[tuple(slice(*ends) for ends in zip(a, b))].mean(), abs=1e-6)


def test_crops_with_little_anatomy_are_drawn_again():
    content = make_content((0.2, 0.9), (0.3, 0.8), (0.1, 0.6))
    spec = replace(SPEC, min_crop_foreground=0.3, max_tries=20)
    views = many(60, content=content, spec=spec)
    for view in views:
        low = np.array(view.start) / SHAPE
        share = foreground_share(content.grid, low[None], (low + np.array(view.size) / SHAPE)[None])[0]
        assert view.foreground == pytest.approx(share)
    local = [v for n, v in enumerate(views) if n % 10 >= 2]
    assert min(v.foreground for v in local) >= 0.3
    assert np.mean([v.num_rejected for v in local]) > 0.3
    assert all(v.num_rejected == 0 for v in many(5, content=content))  # at a threshold of 0


def test_the_best_draw_is_taken_when_none_is_good():
    content, tries = make_content((0.45, 0.55), (0.45, 0.55), (0.45, 0.55)), 7
    spec = replace(SPEC, min_crop_foreground=0.9, max_tries=tries)
    every = sample_boxes(np.random.default_rng(3), SHAPE, content, SPEC, VOLUMES, SHAPES[0], (0.3, 0.9), 4 * tries)
    chosen = sample_boxes(np.random.default_rng(3), SHAPE, content, spec, VOLUMES, SHAPES[0], (0.3, 0.9), 4)
    for number, box in enumerate(chosen):
        assert box[4] == tries - 1
        assert box[3] == max(b[3] for b in every[number * tries : (number + 1) * tries]) < 0.9


def test_guided_masks_fall_where_the_anatomy_is_in_the_turned_crop():
    content = make_content((0.1, 0.3), (0.6, 0.9), (0.2, 0.5))
    spec = replace(SPEC, num_local=0, mask_sigma=0.1, global_scale=(0.6, 1.0))
    wanted, found = [], []
    for sample in range(80):
        for view in draw(sample, content, spec, counts=(60, 60)):
            voxel = np.array(content.center) * SHAPE - 0.5
            index = np.linalg.solve(view_affine(view, np.eye(4)), [*voxel, 1])[:3]
            fraction = (index + 0.5) / view.shape
            own = anatomy_in_crop(content.center, SHAPE, view.start, view.size, view.axes, view.flips)
            assert own == pytest.approx(tuple(fraction))
            assert view.mask.shape == (8, 8, 8)
            assert view.mask.sum() == 60
            wanted.append(fraction.clip(0.2, 0.8))
            found.append((np.argwhere(view.mask).mean(0) + 0.5) / 8)
    wanted_at, found_at = np.array(wanted), np.array(found)
    for axis in range(3):
        assert np.corrcoef(wanted_at[:, axis], found_at[:, axis])[0, 1] > 0.8
    uniform = many(60, content=content, spec=replace(spec, mask_prior="uniform"), counts=(60, 0))
    assert all(v.mask is None for v in uniform[1::2])
    middle = np.mean([np.argwhere(v.mask).mean(0) for v in uniform[0::2]], 0)
    assert middle == pytest.approx([3.5] * 3, abs=0.5)


# ---- shared places and geometry


def test_points_are_one_place_of_the_volume_seen_by_every_crop():
    content = make_content((0.1, 0.8), (0.3, 0.9), (0.2, 0.7))
    for sample in range(15):
        views = draw(sample, content, replace(SPEC, num_local=0, global_scale=(0.8, 1.0)))
        points = sample_volume_points(sample_rng(1, sample), content, views, SHAPE, 40)
        assert points.shape == (2, 40, 3)
        assert points.dtype == np.float32
        places = []
        for own, view in zip(points.astype(float), views):
            assert own.min() > -1e-6
            assert own.max() < 1 + 1e-6
            index = own * view.shape - 0.5
            voxel = np.c_[index, np.ones(40)] @ view_affine(view, np.eye(4)).T
            places.append((voxel[:, :3] + 0.5) / SHAPE)
        np.testing.assert_allclose(places[0], places[1], atol=1e-6)
        assert (content.grid[tuple((places[0] * 32).clip(0, 31.999).astype(int).T)] > 0).mean() > 0.98  # float32


def test_points_are_uniform_over_the_shared_anatomy():
    grid = np.zeros((4, 4, 4), np.float32)
    grid[0], grid[2] = 1.0, 0.5
    view = draw(0)[0]
    crops = [
        replace(view, start=s, size=(30, 40, 40), axes=(0, 1, 2), flips=(False,) * 3) for s in ((0, 0, 0), (5, 0, 0))
    ]
    points = sample_volume_points(np.random.default_rng(0), VolumeContent(grid), crops, (40, 40, 40), 4000)
    z = points[0, :, 0] * 30  # shared: 5 to 30. Anatomy 5 to 10, and half as dense 20 to 30
    first, second = z[z < 15], z[z >= 15]
    assert len(first) == pytest.approx(2000, abs=150)
    assert kstest(first, "uniform", (5, 5)).pvalue > 1e-3
    assert kstest(second, "uniform", (20, 10)).pvalue > 1e-3
    np.testing.assert_allclose(points[1, :, 0] * 30, z - 5, atol=1e-4)


def test_crops_without_a_common_place_have_no_points():
    view = draw(0)[0]
    apart = [replace(view, start=s, size=(100, 300, 300)) for s in ((0, 0, 0), (100, 0, 0))]
    assert np.isnan(sample_volume_points(sample_rng(0, 0), FULL, apart, SHAPE, 5)).all()
    nothing = VolumeContent(np.zeros((8, 8, 8), np.float32))
    assert np.isnan(sample_volume_points(sample_rng(0, 0), nothing, apart[:1] * 2, SHAPE, 5)).all()
    assert sample_volume_points(sample_rng(0, 0), FULL, apart, SHAPE, 0).shape == (2, 0, 3)


# ---- the whole draw


def test_draws_depend_on_seed_and_sample_only():
    first = repr(draw(5, counts=(100, 0)))
    np.random.default_rng(0).random(100)
    assert repr(draw(6, counts=(100, 0))) != first
    assert repr(draw(5, counts=(100, 0))) == first


def test_views_are_what_the_settings_say():
    views = many(100, shapes=((28, 112, 112), (14, 56, 28)))
    assert [v.shape for v in views[:10]] == [(28, 112, 112)] * 2 + [(14, 56, 28)] * 8
    assert all(0 <= a <= side - n for v in views for a, n, side in zip(v.start, v.size, SHAPE))
    assert all(abs(v.gain - 1) <= 0.02 and abs(v.offset) <= 10 and v.gamma == 1 and 0 <= v.noise <= 25 for v in views)
    assert len({v.noise_seed for v in views}) == len(views)
    other = many(30, unit="", spec=replace(SPEC, mr=Intensity(gain=0.3, gamma=0.2)))
    assert max(abs(v.gain - 1) for v in other) > 0.25
    assert max(v.gamma for v in other) > 1.15
    assert all(v.noise == 0 and v.window is None for v in other)


def test_windows_are_drawn_for_the_first_crop_or_for_all():
    first = many(300)
    assert not [v for n, v in enumerate(first) if n % 10 and v.window]
    drawn = np.array([v.window for v in first if v.window])
    assert len(drawn) / 300 == pytest.approx(0.5, abs=0.1)
    assert kstest(drawn[:, 0], "norm").pvalue > 1e-3
    assert kstest(drawn[:, 1], "uniform").pvalue > 1e-3
    every = many(60, volumes=replace(VOLUMES, window_views="all"))
    assert np.mean([v.window is not None for v in every]) == pytest.approx(0.5, abs=0.07)
    assert all(v.window for v in many(3, volumes=replace(VOLUMES, window_views="all", window=1.0)))
