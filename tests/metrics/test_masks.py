"""Overlap and surfaces against counts over voxels, all pairs and closed forms."""

import numpy as np
import pytest

from hilum import metrics
from hilum.metrics.masks import surface_distances

RNG = np.random.default_rng(0)


def surface_points(mask, spacing):
    """Voxels with a face neighbour outside, by looking at each."""
    points = []
    for place in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                n = place.copy()
                n[axis] += step
                if not (0 <= n[axis] < mask.shape[axis] and mask[tuple(n)]):
                    points.append(place * spacing)
    return np.unique(points, axis=0)


@pytest.mark.parametrize("shape", [(6, 7, 8), (9, 11)])
def test_surface_distances_are_those_of_all_pairs(shape):
    spacing = np.array([2.5, 0.8, 1.3])[-len(shape) :]
    first, second = RNG.random((2, *shape)) < 0.5
    found = surface_distances(first, second, spacing)
    a, b = surface_points(first, spacing), surface_points(second, spacing)
    pairs = np.linalg.norm(a[:, None] - b[None], axis=2)
    assert np.sort(found.forward) == pytest.approx(np.sort(pairs.min(axis=1)))
    assert np.sort(found.backward) == pytest.approx(np.sort(pairs.min(axis=0)))
    both = np.concatenate([pairs.min(axis=1), pairs.min(axis=0)])
    assert found.mean_mm == pytest.approx(both.mean())
    assert found.nsd(1.0) == pytest.approx((both <= 1.0).mean())
    assert found.hd95_mm == pytest.approx(max(np.percentile(pairs.min(axis=n), 95) for n in (0, 1)))


def test_a_box_moved_by_two_slices_of_three_millimetres():
    first = np.zeros((20, 10, 10), bool)
    first[5:10, 2:8, 2:8] = True
    found = surface_distances(first, np.roll(first, 2, axis=0), (3.0, 1.0, 1.0))
    assert (found.hd95_mm, found.nsd(6.0)) == (6.0, 1.0)
    assert 0 < found.mean_mm < 6
    same = surface_distances(first, first, (3.0, 1.0, 1.0))
    assert (same.hd95_mm, same.mean_mm, same.nsd(0.0)) == (0.0, 0.0, 1.0)


def test_masks_at_the_edge_have_a_surface_there():
    full = np.ones((3, 3, 3), bool)
    corner = np.zeros_like(full)
    corner[0, 0, 0] = True
    found = surface_distances(full, corner, (1.0, 1.0, 1.0))
    assert len(found.forward) == 26
    assert found.forward.max() == pytest.approx(np.sqrt(12))


def test_surfaces_of_an_empty_mask_are_not_invented():
    empty = np.zeros((3, 3), bool)
    with pytest.raises(ValueError, match="a mask is empty"):
        surface_distances(empty, ~empty, (1.0, 1.0))
    with pytest.raises(ValueError, match="spacings above 0"):
        surface_distances(~empty, ~empty, (1.0, 0.0))


def test_dice_from_counts_is_dice_from_masks_and_empty_masks_follow_the_rule():
    true, predicted = RNG.random((2, 5, 3, 40)) < 0.4  # cases, classes, voxels
    true[:2, 1] = False  # absent in two cases, predicted in the first of them
    predicted[1, 1] = False
    counts = true.sum(-1), predicted.sum(-1), (true & predicted).sum(-1)
    found = metrics.dice_per_case(*counts)
    assert found[2, 0] == pytest.approx(2 * (true & predicted)[2, 0].sum() / (true[2, 0].sum() + predicted[2, 0].sum()))
    assert found[0, 1] == 0
    assert np.isnan(found[1, 1])
    empty = metrics.empty_masks(*counts[:2])
    assert (empty.num_absent, empty.num_false, empty.false_positive_voxels) == (1, 1, predicted[0, 1].sum())
    rows = np.stack(counts[1:], axis=-1)
    by_class = [found[:, 0].mean(), found[[0, 2, 3, 4], 1].mean(), found[:, 2].mean()]
    assert metrics.dice(counts[0], rows) == pytest.approx(np.mean(by_class))
    pooled = 2 * counts[2].sum(axis=0) / (counts[0] + counts[1]).sum(axis=0)
    assert metrics.dice_pooled(counts[0], rows) == pytest.approx(pooled.mean())
    weighted = np.nansum(found * counts[0]) / counts[0].sum()
    assert metrics.dice_weighted(counts[0], rows) == pytest.approx(weighted)


def test_dice_without_anything_to_measure_is_undefined():
    nothing = np.zeros((2, 3))
    with pytest.raises(ValueError, match="in no case"):
        metrics.dice(nothing, np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="no class has a true voxel"):
        metrics.dice_weighted(nothing, np.ones((2, 3, 2)) * [1, 0])
    with pytest.raises(ValueError, match="no more shared voxels"):
        metrics.dice_per_case([1], [1], [2])
