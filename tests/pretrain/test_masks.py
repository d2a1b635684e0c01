"""Masks: exact counts that follow from the sample number, and where blocks fall."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hilum.pretrain.masks import mask_counts, sample_block_mask, sample_mask_counts
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
