"""What a volume encoder is shown: each step against a slow obvious version, and every place in the patient kept."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hilum.encode.volume_contract import (
    PreparedVolume,
    VolumeContract,
    budget_shape,
    fit_volume,
    prepare_volume,
)
from hilum.errors import ContractError
from hilum.volume import Volume, orient

SMALL = VolumeContract(background_px=5, patch=(4, 4, 4), min_spacing_mm=0.75)


def diagonal(*spacing: float) -> np.ndarray:
    """SPL: k to Superior, j to Posterior, i to Left."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1
    affine[:3, 3] = (-30.5, 12.25, 700)
    return affine


def body(shape=(30, 40, 44), spacing=(2.0, 1.0, 1.0), seed=0) -> Volume:
    """An ellipsoid of fat and muscle with a bone off centre, in air, all slightly noisy."""
    z, y, x = (np.linspace(-1, 1, n) for n in shape)
    r = (z[:, None, None] / 1.4) ** 2 + (y[:, None] / 0.8) ** 2 + (x / 0.85) ** 2
    voxels = np.where(r < 1, np.where(r > 0.75, -100.0, 45.0), -1000.0)
    bone = (z[:, None, None] - 0.2) ** 2 + (y[:, None] - 0.4) ** 2 + (x + 0.3) ** 2 < 0.03
    voxels = np.where(bone, 1500.0, voxels) + np.random.default_rng(seed).normal(0, 12, shape)
    return Volume(voxels=np.rint(voxels).astype(np.int16), affine=diagonal(*spacing), modality="CT", unit="HU")


# ---- the steps


def test_budget_of_patches():
    """The two sizes that VoxelFM's own code gives."""
    contract = VolumeContract()
    assert budget_shape((400, 512, 512), contract) == (346, 443, 443)
    assert budget_shape((467, 467, 467), contract) == (409, 409, 409)
    assert budget_shape((14 * 25, 14 * 25, 14 * 40), contract) == (350, 350, 560)  # exactly the budget


def trilinear(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each voxel from its eight neighbours, coordinates held inside."""
    out = np.zeros(shape)
    for place in np.ndindex(shape):
        at = [min(max((i + 0.5) * n / m - 0.5, 0), n - 1) for i, n, m in zip(place, image.shape, shape)]
        low = [min(int(a), n - 1) for a, n in zip(at, image.shape)]
        for corner in product((0, 1), repeat=3):
            index = tuple(min(b + c, n - 1) for b, c, n in zip(low, corner, image.shape))
            share = np.prod([a - b if c else 1 - (a - b) for a, b, c in zip(at, low, corner)])
            out[place] += share * image[index]
    return out


def test_the_whole_way_against_a_slow_one():
    """Clip, isotropic, budget, cut and normalise of a small volume, each written out."""
    contract = replace(SMALL, background_px=0, max_patches=24)
    voxels = np.random.default_rng(1).normal(0, 900, (9, 14, 13)).astype(np.float32)
    found = fit_volume(voxels, diagonal(1.5, 0.9, 1.0), contract, [])
    image = np.clip(voxels, -1000, 1900)
    image = trilinear(image, (15, 14, 14))  # 9·1.5/0.9, 14, 13·1.0/0.9 = 14.4; patches 3·3·3 = 27
    shape = budget_shape(image.shape, contract)
    assert shape != image.shape
    image = trilinear(image, shape)
    grid = tuple(n // 4 for n in shape)
    image = image[tuple(slice((n % 4) // 2, (n % 4) // 2 + 4 * g) for n, g in zip(shape, grid))]
    np.testing.assert_allclose(found.image[0].numpy(), (image + 573.8) / 461.3, atol=2e-5)
    assert found.grid == grid
    assert found.image.shape == (1, *(4 * g for g in grid))


def test_the_rest_is_cut_from_both_ends():
    voxels = np.arange(20 * 4 * 4, dtype=np.float32).reshape(20, 4, 4)
    contract = replace(SMALL, background_px=0, patch=(14, 4, 4), mean=0.0, std=1.0)
    found = fit_volume(voxels, diagonal(1, 1, 1), contract, [])
    assert np.array_equal(found.image[0].numpy(), voxels[3:17])


# ---- places


def patch_means(found: PreparedVolume, contract: VolumeContract) -> np.ndarray:
    sides = [n for pair in zip(found.grid, contract.patch) for n in pair]
    return found.image.numpy().reshape(sides).mean((1, 3, 5)) * contract.std + contract.mean


@pytest.mark.parametrize("spacing", [(2.0, 0.9, 0.9), (0.5, 0.5, 0.5), (1.0, 1.3, 0.6)])
@pytest.mark.parametrize("budget", [25_000, 200])
def test_every_patch_knows_its_place(spacing, budget):
    """HU that grow evenly through the patient: the mean of a patch tells where its centre is, to a hundredth of a mm."""
    contract = replace(SMALL, max_patches=budget)
    axis, other = np.array([0.6, 0.0, 0.8]), np.array([0.0, 1.0, 0.0])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([axis, other, np.cross(axis, other)], 1) * spacing  # oblique
    affine[:3, 3] = (-11, 7, 40)
    index = np.indices((26, 35, 38)).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    slopes = np.array([[3.0, -2.0, 1.5]])
    voxels = (slopes @ world + 300).reshape(26, 35, 38)
    assert voxels.min() > -795
    assert voxels.max() < 1900
    voxels[:, :, 30:] = -1000  # air on one side: it is cut away, except within the reach of the filter
    found = fit_volume(voxels, affine, contract, [])
    inner = np.indices(found.grid).reshape(3, -1)
    inside = ((inner > 0) & (inner < np.array(found.grid)[:, None] - [[1], [1], [2]])).all(0)  # away from the border
    inner = inner[:, inside]
    assert inner.shape[1] >= 1
    centres = found.affine[:3, :3] @ inner + found.affine[:3, 3:]
    expected = (slopes @ centres + 300)[0]
    means = patch_means(found, contract)[tuple(inner)]
    np.testing.assert_allclose(means, expected, atol=0.02)


def test_the_same_scan_turned_gives_the_same_input():
    plain = prepare_volume(body(), SMALL)
    for code in ("IPL", "PIL", "LIP", "RAS", "AIR"):
        turned = prepare_volume(orient(body(), code), SMALL)
        assert np.array_equal(plain.image, turned.image)
        np.testing.assert_allclose(plain.affine, turned.affine, atol=1e-9)
        assert f"axes turned from {code} to SPL" in turned.notes
    assert not any("turned" in note for note in plain.notes)


def test_notes_say_what_was_done():
    found = prepare_volume(body(), replace(SMALL, max_patches=100))
    assert [note.split(":")[0] for note in found.notes] == [
        "background cut away", "made isotropic", "kept within 100 patches",
    ]  # fmt: skip
    assert "from 2×1×1 mm to 1×1×1 mm" in found.notes[1]
    assert np.prod(found.grid) <= 100


def test_the_input_is_not_changed():
    vol = body()
    before = vol.voxels.copy()
    prepare_volume(vol, SMALL)
    assert np.array_equal(vol.voxels, before)


# ---- what is refused


def test_what_breaks_the_contract():
    vol = body()
    sheared = vol.affine.copy()
    sheared[1, 0] = 0.5
    floats = vol.voxels.astype(np.float32)
    floats[0, 0, 0] = np.nan
    for broken, message in (
        (replace(vol, modality="MR", unit=""), "modality MR is not in the contract; expected CT"),
        (replace(vol, unit=""), "CT comes in HU"),
        (replace(vol, affine=None), "needs the geometry"),
        (replace(vol, affine=sheared), "sheared by 14.0°"),
        (replace(vol, kind="label"), "label map"),
        (replace(vol, voxels=floats), "NaN"),
        (replace(vol, voxels=vol.voxels + 2000), "no HU of a patient"),
        (replace(vol, voxels=vol.voxels + 1024), "the values are not HU"),
        (replace(vol, voxels=np.full((12, 12, 12), -1000)), "no HU of a patient"),
        (replace(vol, voxels=np.where(np.arange(27000).reshape(30, 30, 30) % 64, -1000, 40)), "nothing but air"),
        (body(shape=(3, 40, 44), spacing=(1.0, 1, 1)), r"3×\d+×\d+ voxels of 1×1×1 mm; expected at least one patch"),
    ):
        with pytest.raises(ContractError, match=message):
            prepare_volume(broken, SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_hu": (-700.0, 1900.0)}, "-800"),
        ({"background_px": 20}, "odd"),
        ({"std": 0.0}, "above 0"),
    ],
)
def test_a_contract_that_cannot_be(changes, message):
    with pytest.raises(ContractError, match=message):
        VolumeContract(**changes)
