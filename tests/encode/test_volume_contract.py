"""What a volume encoder is shown: each step against a slow obvious version, and every place in the patient kept."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hilum.archive.ledger import Entry, write_entries
from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.isotropic import IsotropicSettings, read_moments, read_region, resample_store
from hilum.archive.store.store import Store, open_for_writing, write_header, write_volume
from hilum.encode.volume_contract import (
    PreparedVolume,
    VolumeContract,
    budget_shape,
    fit_volume,
    prepare_volume,
)
from hilum.errors import ContractError
from hilum.records import hash_json
from hilum.settings import to_dict
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


@pytest.mark.parametrize("shape", [(1, 700, 700), (2, 900, 500), (8, 2000, 2000), (2000, 3, 900), (20, 900, 900)])
def test_thin_scans_keep_the_budget_too(shape):
    """A side of one patch cannot give its cube root of the rest; padded, it takes at least a voxel."""
    contract = VolumeContract(patch=(8, 8, 8), max_patches=4096, edges="pad")
    made = budget_shape(shape, contract)
    num = int(np.prod([-(-n // 8) for n in made]))
    assert 0.6 * 4096 < num <= 4096
    assert min(made) >= 1
    long = [n / m for n, m in zip(shape, made) if m > 100]
    assert max(long) < 1.02 * min(long)  # in proportion


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


# ---- images without a unit, and what training sees

ANY = replace(SMALL, modalities=("CT", "MR"))


def mr(shape=(30, 40, 44), spacing=(2.0, 1.0, 1.0), **changes: object) -> Volume:
    """The same body as MR: its own unit, not whole numbers, dark air."""
    vol = body(shape, spacing)
    return replace(
        vol, voxels=(vol.voxels + 1000).astype(np.float32) * np.float32(0.37), modality="MR", unit="", **changes
    )


def test_what_has_no_unit_is_normalised_by_the_scan_in_its_box():
    vol, contract = mr(spacing=(1.0, 1.0, 1.0)), replace(ANY, patch=(1, 1, 1), max_patches=10**9)
    found = prepare_volume(vol, contract)  # isotropic already: the image is the box, normalised
    assert any("background cut away" in note for note in found.notes)
    assert float(found.image.mean()) == pytest.approx(0, abs=1e-4)
    assert float(found.image.std(correction=0)) == pytest.approx(1, abs=1e-4)
    louder = prepare_volume(replace(vol, voxels=vol.voxels * 7 + 100), contract)
    np.testing.assert_allclose(louder.image.numpy(), found.image.numpy(), atol=1e-4)


def test_a_contract_for_ct_and_mr_does_to_ct_what_one_for_ct_does():
    assert np.array_equal(prepare_volume(body(), ANY).image, prepare_volume(body(), SMALL).image)
    for broken, message in (
        (replace(body(), unit=""), "CT comes in HU"),
        (replace(body(), voxels=body().voxels + 1024), "not HU"),
        (mr(kind="label"), "label map"),
        (mr(affine=None), "needs the geometry"),
        (replace(mr(), voxels=np.full((30, 40, 44), 5.0)), "nothing but background"),
    ):
        with pytest.raises(ContractError, match=message):
            prepare_volume(broken, ANY)
    with pytest.raises(ContractError, match="all values are 5"):
        prepare_volume(replace(mr(), voxels=np.full((30, 40, 44), 5.0)), replace(ANY, background_px=0))


def test_contracts_of_before_keep_their_name():
    assert VolumeContract().hash == "48a74946cb9bfc21"


def test_a_thin_slab_is_taken():
    slab = body(shape=(2, 40, 44), spacing=(5.0, 1, 1))
    found = prepare_volume(slab, SMALL)
    assert found.grid[0] == 2  # 10 mm
    with pytest.raises(ContractError, match="nothing but air"):
        fit_volume(slab.voxels, slab.affine, SMALL, [], thin=False)


@pytest.mark.parametrize("make", [body, mr])
@pytest.mark.parametrize("plane", ["SPL", "PIL"])
def test_training_and_inference_see_the_same_numbers(tmp_path, make, plane):
    """The region of the derived store against the encoder's input, made of the scan itself."""
    vol = orient(make((20, 50, 46), (2.5, 0.9, 0.9)), plane)
    open_for_writing(tmp_path / "plain", {"key": "k"})
    write_index(index_path(tmp_path / "plain"), [write_volume(tmp_path / "plain", "a" * 16, vol)])
    write_entries(tmp_path / "plain" / "ledger.parquet", [Entry(key="a" * 16)])
    write_header(tmp_path / "plain", {"key": "k", "status": "complete"})
    settings = IsotropicSettings(background_px=5, min_spacing_mm=0.75)
    resample_store(tmp_path / "plain", tmp_path / "cubes", settings=settings, num_workers=1)
    store = Store(tmp_path / "cubes")
    row = store.row("a" * 16)
    contract = replace(ANY, patch=(1, 1, 1), max_patches=10**9)
    found = prepare_volume(vol, contract)
    assert found.grid == row.shape
    region = read_region(store, "a" * 16, (0, 0, 0), row.shape)
    mean, std = (contract.mean, contract.std) if row.unit == "HU" else read_moments(store, "a" * 16)
    trained = (region * row.slope + row.intercept - mean) / std
    assert row.slope <= std / 400
    rounded = row.slope + Store(tmp_path / "plain").row("a" * 16).slope * (vol.unit == "")  # MR with fractions: twice
    np.testing.assert_allclose(trained, found.image[0].numpy(), atol=0.5 * rounded / std + 2e-5)
    np.testing.assert_allclose(np.array(row.affine).reshape(4, 4), found.affine, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 20, 17), (8, 8, 8), (9, 31, 5)])
def test_padded_edges_keep_every_voxel_and_its_place(shape):
    """Each voxel of the scan is in the image, at the place in mm that the tokens' affine gives it."""
    contract = VolumeContract(modalities=("MR",), background_px=0, patch=(8, 8, 8), edges="pad")
    voxels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    affine = diagonal(1.0, 1.0, 1.0)
    found = fit_volume(voxels, affine, contract, [], unit="")
    assert found.grid == tuple(-(-n // 8) for n in shape)
    corner = (found.affine @ [-0.4375, -0.4375, -0.4375, 1])[:3]  # the first voxel of the first patch
    at = np.rint(np.linalg.inv(affine) @ [*corner, 1])[:3].astype(int)
    assert all(-8 < n <= 0 for n in at)
    inside = tuple(slice(-n, -n + side) for n, side in zip(at, shape))
    expected = (voxels - voxels.mean(dtype=np.float64)) / voxels.std(dtype=np.float64)
    assert np.abs(found.image[0].numpy()[inside] - expected).max() < 1e-4


def test_contracts_from_before_edges_keep_their_hash():
    values = to_dict(VolumeContract())
    del values["edges"], values["longest"]
    assert VolumeContract().hash == hash_json(values)
    assert len({VolumeContract().hash, VolumeContract(edges="pad").hash, VolumeContract(longest=768).hash}) == 3
