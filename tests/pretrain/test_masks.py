"""Masks: exact counts that follow from the sample number, and where blocks fall."""

import math
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hilum.pretrain.masks import _block_sides, mask_counts, sample_block_mask, sample_mask_counts
from hilum.pretrain.recipe import ViewSpec
from hilum.pretrain.sampling import sample_rng

SPEC = ViewSpec()


# ---- how many patches are hidden


@pytest.mark.parametrize(
    ("num_crops", "num_patches", "wanted"), [(128, 256, 4941), (128, 1024, 19840), (96, 256, 3715), (96, 1024, 14928)]
)
def test_mask_counts_of_dinov3(num_crops, num_patches, wanted):
    """facts/ssl.md §8.3."""
    for step in range(3):
        counts = mask_counts(num_crops, num_patches, SPEC, sample_rng(0, step))
        assert sum(counts) == wanted
        assert sum(c == 0 for c in counts) == num_crops // 2
        assert max(counts) == num_patches // 2
    assert mask_counts(num_crops, num_patches, SPEC, sample_rng(0, 0)) != counts  # shuffled anew each step


def test_mask_counts_are_the_upper_edges_of_the_strata():
    spec = replace(SPEC, mask_probability=1.0, mask_ratio=(0.2, 0.6))
    assert sorted(mask_counts(4, 100, spec, sample_rng(0, 0))) == [30, 40, 50, 60]
    assert mask_counts(4, 100, replace(SPEC, mask_probability=0.0), sample_rng(0, 0)) == [0] * 4


def test_a_sample_has_its_counts_whatever_batch_it_is_in():
    """Any batch of whole groups hides the same number of patches, and each group the strata of its own crops."""
    counts = [sample_mask_counts(sample, 256, SPEC, 0) for sample in range(240)]
    assert all(len(c) == SPEC.num_global for c in counts)
    sums = np.sum(counts, 1)
    for size in (8, 24, 48):
        assert len(set(sums.reshape(-1, size).sum(1).tolist())) == 1
    wanted = Counter(mask_counts(16, 256, SPEC, sample_rng(0, 0)))
    for group in range(30):
        assert Counter(np.ravel(counts[8 * group : 8 * group + 8]).tolist()) == wanted
    assert counts[:8] != counts[8:16]
    assert counts != [sample_mask_counts(sample, 256, SPEC, 1) for sample in range(240)]
    assert {len(set(c)) for c in counts} == {1, 2}  # both crops of a slice masked, one, or none


def test_masks_of_images_are_those_of_earlier_versions():
    """Training samples of a recipe stay what they were: the CRC of 300 masks of a version before volumes."""
    rng, crc = np.random.default_rng(0), 0
    for number in range(300):
        center = (0.3, 0.7) if number % 2 else None
        crc = zlib.crc32(np.packbits(sample_block_mask(rng, (16, 12), number % 190, center)).tobytes(), crc)
    assert crc == 0x7B756383


@pytest.mark.parametrize("center", [None, (0.5, 0.5), (1.8, -0.7)])
def test_masks_hide_exactly_what_was_asked(center):
    rng = np.random.default_rng(0)
    for grid in ((8, 8), (6, 4), (1, 5)):
        for count in range(grid[0] * grid[1] + 1):
            mask = sample_block_mask(rng, grid, count, center)
            assert mask.shape == grid
            assert mask.dtype == bool
            assert int(mask.sum()) == count
    with pytest.raises(ValueError, match="cannot hide 65 of 64"):
        sample_block_mask(rng, (8, 8), 65)


def test_masks_come_in_blocks():
    """Hidden patches have more hidden neighbours than scattered ones would."""
    rng = np.random.default_rng(0)
    alike = []
    for _ in range(40):
        mask = sample_block_mask(rng, (16, 16), 64)
        alike.append((mask[1:] == mask[:-1]).mean())
    assert np.mean(alike) > 0.8  # a scatter of a quarter gives .625


# ---- where masks fall


def mean_place(masks: list[np.ndarray]) -> tuple[float, float]:
    total = np.sum(masks, 0).astype(float)
    at = [(np.arange(n) + 0.5) / n for n in total.shape]
    return float(total.sum(1) @ at[0] / total.sum()), float(total.sum(0) @ at[1] / total.sum())


def test_uniform_masks_are_centred_and_guided_ones_follow_the_anatomy():
    rng = np.random.default_rng(0)
    uniform = mean_place([sample_block_mask(rng, (16, 16), 40) for _ in range(150)])
    assert uniform == pytest.approx((0.5, 0.5), abs=0.04)
    places = {
        c: mean_place([sample_block_mask(rng, (16, 16), 40, c) for _ in range(150)])
        for c in ((0.5, 0.5), (0.3, 0.7), (0.3, 0.2))
    }
    assert places[0.5, 0.5] == pytest.approx((0.5, 0.5), abs=0.04)
    assert places[0.3, 0.7][0] < 0.42
    assert places[0.3, 0.7][1] > 0.58
    assert places[0.3, 0.2][1] < 0.38
    tight = mean_place([sample_block_mask(rng, (16, 16), 40, (0.3, 0.7), sigma=0.05) for _ in range(50)])
    assert tight == pytest.approx((0.3, 0.7), abs=0.05)


def naive_block_mask(rng, grid, count, center, sigma):
    """The same rule with arrays: a block, when it hides at least one and at most `left` more, until ten in a row do not."""
    mask, failed = np.zeros(grid, bool), 0
    while (left := count - int(mask.sum())) and failed < 10:
        area, aspect = rng.uniform(4, max(left, 4)), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        failed += 1
        if not (0 < height <= grid[0] and 0 < width <= grid[1]):
            continue
        if center is None:
            top, start = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
        else:
            y, x = rng.normal(center, sigma)
            top = np.clip(round(y * grid[0] - height / 2), 0, grid[0] - height)
            start = np.clip(round(x * grid[1] - width / 2), 0, grid[1] - width)
        block = np.zeros(grid, bool)
        block[top : top + height, start : start + width] = True
        if 0 < (block & ~mask).sum() <= left:
            mask, failed = mask | block, 0
    return mask


@pytest.mark.parametrize("center", [None, (0.4, 0.7)])
def test_masks_have_the_law_of_the_naive_rule(center):
    """How often each patch is hidden, and how many neighbours agree, over 1,500 draws of each."""
    rng = np.random.default_rng(0)
    fast = np.array([sample_block_mask(rng, (12, 10), 50, center) for _ in range(1500)])
    slow = np.array([naive_block_mask(rng, (12, 10), 50, center, 0.25) for _ in range(1500)])
    assert slow.sum((1, 2)).mean() > 48  # the rest is topped up by single patches
    assert np.abs(fast.mean(0) - slow.mean(0)).max() < 0.09  # 1.4 % standard error, two points of topping up
    alike = [(m[:, 1:] == m[:, :-1]).mean() for m in (fast, slow)]
    assert alike[0] == pytest.approx(alike[1], abs=0.03)


# ---- volumes


def naive_cuboid_mask(rng, grid, count, center, sigma):
    """VoxelFM's rule (facts/voxelfm.md §4) with arrays; the rest drawn by weight, one after the other."""
    mask, failed, num = np.zeros(grid, bool), 0, math.prod(grid)
    while (left := count - int(mask.sum())) and failed < 10:
        failed += 1
        size = rng.uniform(4, max(4, min(left, 0.5 * num)))
        tall, deep = np.exp(rng.uniform(np.log(0.3), -np.log(0.3), 2))  # h/w and d/w
        width = np.cbrt(size / tall / deep)
        sides = np.rint([deep * width, tall * width, width]).astype(int)
        if (sides < 1).any() or (sides >= grid).any():
            continue
        if center is None:
            corner = [rng.integers(n - side + 1) for n, side in zip(grid, sides)]
        else:
            places = rng.normal(center, sigma)
            corner = [int(np.clip(round(p * n - s / 2), 0, n - s)) for p, n, s in zip(places, grid, sides)]
        block = np.zeros(grid, bool)
        block[tuple(slice(a, a + s) for a, s in zip(corner, sides))] = True
        if 0 < (block & ~mask).sum() <= left:
            mask, failed = mask | block, 0
    free = np.flatnonzero(~mask)
    weight = np.ones(len(free))
    if center is not None:
        at = (np.stack(np.unravel_index(free, grid), 1) + 0.5) / grid
        weight = np.maximum(np.exp(-((at - center) ** 2).sum(1) / (2 * sigma**2)), 1e-6)
    mask.flat[rng.choice(free, count - int(mask.sum()), replace=False, p=weight / weight.sum())] = True
    return mask


@pytest.mark.parametrize("center", [None, (0.3, 0.6, 0.8)])
def test_masks_of_volumes_have_the_law_of_the_naive_rule(center):
    """How often each patch is hidden, and how many neighbours along each axis agree, over 800 draws of each."""
    rng, grid = np.random.default_rng(0), (5, 6, 4)
    fast = np.array([sample_block_mask(rng, grid, 40, center) for _ in range(800)])
    slow = np.array([naive_cuboid_mask(rng, grid, 40, center, 0.25) for _ in range(800)])
    assert (fast.sum((1, 2, 3)) == 40).all()
    assert np.abs(fast.mean(0) - slow.mean(0)).max() < 0.1  # 2.4 % standard error of a difference, 120 patches
    for axis in (1, 2, 3):
        alike = [1 - np.abs(np.diff(m.astype(int), axis=axis)).mean() for m in (fast, slow)]
        assert alike[0] == pytest.approx(alike[1], abs=0.02)
        assert alike[0] > 0.65  # a scatter of a third gives .56


@pytest.mark.parametrize("center", [None, (0.5, 0.2, 0.9), (2.0, -1.0, 0.5)])
def test_masks_of_volumes_hide_exactly_what_was_asked(center):
    rng = np.random.default_rng(0)
    for grid in ((4, 4, 4), (2, 5, 3), (1, 6, 6), (5, 1, 4), (1, 1, 7), (1, 1, 1)):
        for count in range(math.prod(grid) + 1):
            mask = sample_block_mask(rng, grid, count, center)
            assert mask.shape == grid
            assert int(mask.sum()) == count
    with pytest.raises(ValueError, match="cannot hide 9 of 8"):
        sample_block_mask(rng, (2, 2, 2), 9)


def test_blocks_of_volumes_are_smaller_than_the_grid_and_at_most_half_of_it():
    rng, grid = np.random.default_rng(0), (8, 6, 10)
    drawn = [_block_sides(grid, 400, draw) for draw in rng.random((3000, 6)).tolist()]
    sides = np.array([s for s in drawn if s])
    assert len(sides) > 1000
    assert (sides >= 1).all()
    assert (sides < grid).all()
    assert (sides.max(0) == np.array(grid) - 1).all()
    assert sides.prod(1).max() < 0.75 * 480  # half of it, and rounding
    small = np.array([s for d in rng.random((500, 6)).tolist() if (s := _block_sides(grid, 6, d))])
    assert small.prod(1).max() <= 12  # 6 and rounding


def test_a_grid_one_patch_thick_is_masked_like_an_image():
    mask = sample_block_mask(np.random.default_rng(5), (1, 12, 10), 50, (0.5, 0.4, 0.7))
    assert (mask[0] == sample_block_mask(np.random.default_rng(5), (12, 10), 50, (0.4, 0.7))).all()
    mask = sample_block_mask(np.random.default_rng(5), (12, 10, 1), 50)
    assert (mask[..., 0] == sample_block_mask(np.random.default_rng(5), (12, 10), 50)).all()


def test_many_crops_hide_as_much_as_voxelfm():
    """facts/voxelfm.md §4: masked crops 29.9 % in the mean, all 15.0 %; upper edges of many strata come to the same."""
    shares = np.array(mask_counts(2048, 512, SPEC, sample_rng(0, 0))) / 512
    assert shares[shares > 0].mean() == pytest.approx(0.299, abs=1e-3)
    assert shares.mean() == pytest.approx(0.150, abs=1e-3)
