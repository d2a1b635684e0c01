"""The geometry of isotropic volumes, each rule against a slow obvious version."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from hilum.archive.body import body_box, body_sides, cut, isotropic_shape, moments, resize, resized


def diagonal(*spacing: float) -> np.ndarray:
    """SPL: k to Superior, j to Posterior, i to Left."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1
    affine[:3, 3] = (-30.5, 12.25, 700)
    return affine


def dense_box(mask: np.ndarray, sides: tuple[int, ...], least: float) -> tuple[slice, ...] | None:
    """Every neighbourhood counted by itself."""
    reach, kept = np.array(sides) // 2, []
    for place in np.ndindex(mask.shape):
        inside = tuple(slice(max(p - r, 0), p + r + 1) for p, r in zip(place, reach))
        if mask[inside].sum() > least:
            kept.append(place)
    if not kept:
        return None
    low, high = np.min(kept, 0) - reach, np.max(kept, 0) + reach
    return tuple(slice(max(a, 0), min(b, n - 1) + 1) for a, b, n in zip(low, high, mask.shape))


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("sides", [(3, 3, 3), (5, 5, 5), (7, 7, 7), (1, 5, 3)])
@pytest.mark.parametrize("shape", [(9, 11, 10), (3, 12, 6), (14, 4, 9), (1, 12, 12)])
def test_the_box_around_the_patient_is_that_of_dense_counting(shape, sides, thin):
    rng = np.random.default_rng(sum(sides))
    voxels = np.full(shape, -1000)
    centre = [rng.integers(0, n) for n in shape]
    near = tuple(slice(max(c - 3, 0), c + 4) for c in centre)
    voxels[near] = np.where(rng.random(voxels[near].shape) < 0.85, 0, -1000)
    voxels[rng.random(shape) < 0.05] = -800  # not above
    full = [min(n, side) for n, side in zip(shape, sides)] if thin else sides
    expected = dense_box(voxels > -800, sides, np.prod(full) / 2)
    assert body_box(voxels, shape, sides, thin=thin) == expected
    enough = all(n >= side for n, side in zip(shape, sides))
    if enough:
        assert body_box(voxels, shape, sides) == body_box(voxels, shape, sides, thin=False)


def test_large_neighbourhoods_do_not_overflow():
    voxels = np.zeros((3, 700, 600), np.int16)
    assert body_box(voxels, voxels.shape, (1, 401, 301)) == (slice(0, 3), slice(0, 700), slice(0, 600))
    voxels[:, :, :299] = -1000  # 301 columns of tissue: half of 301 is 150.5, and 150 more on the air's side
    assert body_box(voxels, voxels.shape, (1, 401, 301))[2] == slice(149, 600)


def test_a_slab_of_one_slice_has_a_body():
    voxels = np.full((1, 60, 60), -1000)
    voxels[:, 20:40, 15:50] = 40
    assert body_box(voxels, voxels.shape, (21, 21, 21), thin=False) is None
    z, y, x = body_box(voxels, voxels.shape, (21, 21, 21))
    assert z == slice(0, 1)
    assert (y.start, y.stop) == (10, 50)  # 20 rows, and 10 on either side
    assert x.start <= 15
    assert x.stop >= 50


def test_neighbourhoods_without_a_unit_are_cubes_in_mm():
    thick = diagonal(5.0, 0.5, 0.5)
    assert body_sides(21, thick, "HU") == (21, 21, 21)
    assert body_sides(21, thick, "") == (3, 21, 21)  # 10.5 mm each: 2.1 slices, the odd number below 3.1
    assert body_sides(21, diagonal(1.0, 1.0, 1.0), "") == (21, 21, 21)
    assert body_sides(21, diagonal(0.7, 1.4, 30.0), "") == (21, 11, 1)


def test_isotropic_sizes():
    rule = 0.75
    assert isotropic_shape((100, 512, 512), diagonal(2.5, 0.7, 0.7), rule) == (333, 478, 478)  # 0.75 at least
    assert isotropic_shape((100, 512, 512), diagonal(2.5, 0.8, 0.8), rule) == (312, 512, 512)  # 312.5: to even
    assert isotropic_shape((64, 64, 64), diagonal(0.5, 0.5, 0.5), rule) == (64, 64, 64)  # equal: as they are
    turned = diagonal(0.5, 0.5, 0.5)
    turned[:3, :3] *= 1 + 1e-7 * np.arange(3)
    assert isotropic_shape((64, 64, 64), turned, rule) == (64, 64, 64)
    assert isotropic_shape((64, 64, 64), turned, rule, same=0) == (43, 43, 43)
    assert isotropic_shape((1000, 512, 512), diagonal(1.0, 0.8, 0.8), rule) == (1250, 512, 512)
    assert isotropic_shape((1000, 512, 512), diagonal(1.0, 0.8, 0.8), rule, 768) == (768, 315, 315)  # t = 1000/768 mm
    assert isotropic_shape((1536, 512, 512), diagonal(0.5, 0.5, 0.5), rule, 768) == (768, 256, 256)
    assert isotropic_shape((1, 512, 512), diagonal(5.0, 0.5, 0.5), rule) == (7, 341, 341)


@pytest.mark.parametrize(("shape", "new"), [
    ((7, 9, 8), (20, 13, 8)), ((20, 13, 11), (7, 9, 10)), ((1, 5, 6), (4, 10, 3)), ((12, 5, 6), (1, 1, 1)),
    ((6, 6, 6), (6, 6, 6)), ((40, 3, 3), (3, 3, 3)),
])  # fmt: skip
def test_interpolation_is_that_of_torch_and_scipy(shape, new):
    image = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    found = np.stack(list(resize(image, shape, new)))
    assert found.dtype == np.float32
    torchs = functional.interpolate(torch.from_numpy(image)[None, None], new, mode="trilinear", align_corners=False)
    np.testing.assert_allclose(found, torchs[0, 0].numpy(), atol=1e-5)
    at = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(shape, new)]
    scipys = ndimage.map_coordinates(image.astype(float), np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(found, scipys, atol=1e-5)


def test_the_affine_follows_cut_and_resize():
    """Values that grow evenly through the patient: the new voxels still say where they are."""
    affine = diagonal(2.0, 0.9, 1.1)
    affine[:3, :3] = np.array([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]]) @ affine[:3, :3]
    slopes = np.array([3.0, -2.0, 1.5])
    voxels = np.tensordot(slopes, np.tensordot(affine[:3, :3], np.indices((12, 15, 14)), 1), 1) + slopes @ affine[:3, 3]
    box, new = np.s_[2:12, 3:15, 1:13], (20, 11, 12)
    inner = np.stack(list(resize(voxels[box], (10, 12, 12), new)))
    moved = resized(cut(affine, [2, 3, 1]), (10, 12, 12), new)
    expected = np.tensordot(slopes, np.tensordot(moved[:3, :3], np.indices(new), 1), 1) + slopes @ moved[:3, 3]
    np.testing.assert_allclose(inner[2:-2, 1:-1, 1:-1], expected[2:-2, 1:-1, 1:-1], atol=2e-3)


def test_moments():
    values = np.random.default_rng(0).normal(1e6, 3, (6, 40, 30))
    mean, std = moments(values.astype(np.float32))
    assert mean == pytest.approx(values.astype(np.float32).astype(float).mean(), rel=1e-12)
    assert std == pytest.approx(values.astype(np.float32).astype(float).std(), rel=1e-9)
