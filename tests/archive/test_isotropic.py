"""A derived store is a store like any other; its volumes are isotropic, in place, and cheap to read in cubes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from hilum import api
from hilum.archive.ledger import Entry, read_entries, write_sorted
from hilum.archive.store import isotropic as module
from hilum.archive.store.care import append, merge
from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.isotropic import (
    IsotropicSettings,
    is_isotropic,
    read_moments,
    read_region,
    read_volume_content,
    resample_store,
)
from hilum.archive.store.store import Store, open_for_writing, write_header, write_volume
from hilum.archive.store.verify import verify
from hilum.cli import main
from hilum.errors import StoreError, UsageError
from hilum.volume import Volume, orient

SETTINGS = IsotropicSettings(background_px=5, min_spacing_mm=1.0)


def head(shape=(24, 60, 50), spacing=(3.0, 1.2, 1.2), unit="HU", centre=(0.5, 0.5, 0.5), seed=0) -> Volume:
    """An ellipsoid with an off-centre bright ball in air; SPL, noisy."""
    at = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    body = sum(((a - c) / r) ** 2 for a, c, r in zip(at, centre, (0.45, 0.3, 0.35))) < 1
    ball = sum((a - c - d) ** 2 for a, c, d in zip(at, centre, (0.15, -0.1, 0.12))) < 0.006
    noise = np.random.default_rng(seed).normal(0, 8, shape)
    voxels = np.where(ball, 700, np.where(body, 60, -1000)) + noise
    if unit == "":
        voxels = (voxels + 1000) * 0.37
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1
    affine[:3, 3] = (-20, 5, 300)
    whole = np.rint(voxels).astype(np.int16) if unit else voxels.astype(np.float32)
    return Volume(voxels=whole, affine=affine, modality="CT" if unit else "MR", unit=unit)


def write_plain(root, volumes: dict[str, Volume]) -> Store:
    open_for_writing(root, {"key": "k"})
    rows = [write_volume(root, key, v, patient=f"p{key[0]}", study="s", region="head") for key, v in volumes.items()]
    write_index(index_path(root), rows)
    entries = [Entry(key=key, patient=f"p{key[0]}", modality=v.modality) for key, v in volumes.items()]
    aside = Entry(key="f" * 16, reason="localizer")
    write_sorted(root / "ledger.parquet", sorted([*entries, aside], key=lambda e: e.key))
    write_header(root, {"key": "k", "status": "complete"})
    return Store(root)


KEYS = {name: f"{n}" * 16 for n, name in enumerate(["ct", "mr", "coronal", "thin", "bare", "sheared", "air"], 1)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Store:
    ct, mr = head(), head(unit="", seed=1)
    sheared = mr.affine.copy()
    sheared[1, 0] = 0.4
    flat = np.full((10, 12, 12), -1000, np.int16)
    volumes = {
        "ct": ct,
        "mr": mr,
        "coronal": orient(ct, "PIL"),
        "thin": head((2, 60, 50), (6.0, 1.2, 1.2), centre=(0.5, 0.5, 0.5)),
        "bare": replace(mr, affine=None),
        "sheared": replace(mr, affine=sheared),
        "air": replace(ct, voxels=flat + np.random.default_rng(0).integers(-9, 9, flat.shape).astype(np.int16)),
    }
    return write_plain(tmp_path_factory.mktemp("plain") / "store", {KEYS[n]: v for n, v in volumes.items()})


@pytest.fixture(scope="module")
def derived(plain) -> Store:
    out = plain.root.parent / "derived"
    resample_store(plain.root, out, settings=SETTINGS, num_workers=1)
    return Store(out)


def files(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_what_is_left_out_is_named(plain, derived):
    entries = {e.key: e for e in read_entries(derived.root / "ledger.parquet")}
    assert {name: entries[key].reason for name, key in KEYS.items()} == {
        "ct": "", "mr": "", "coronal": "", "thin": "", "bare": "no_geometry", "sheared": "sheared", "air": "no_body",
    }  # fmt: skip
    assert entries["f" * 16].reason == "localizer"
    assert list(derived.sorted_keys()) == sorted(KEYS[n] for n in ("ct", "mr", "coronal", "thin"))
    assert verify(derived.root, deep=True, num_workers=1)["findings"] == []
    row = derived.row(KEYS["ct"])
    assert (row.patient, row.study, row.region, row.modality, row.unit) == ("p1", "s", "head", "CT", "HU")
    assert is_isotropic(derived)
    assert not is_isotropic(plain)
    assert derived.header["derived"] == {
        "kind": "isotropic", "orientation": "SPL", "background_px": 5, "clip_hu": [-1000.0, 1900.0], "min_spacing_mm": 1.0,
        "longest": 768, "source_hash": plain.hash,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ct", "mr", "coronal", "thin"])
def test_every_voxel_lies_where_the_scan_has_its_value(plain, derived, name):
    """The scan, interpolated by scipy at the world coordinates of the new voxels."""
    old, new = plain.read_volume(KEYS[name]), derived.read_volume(KEYS[name])
    assert new.orientation == "SPL"
    spacing = np.array(new.spacing_mm)
    assert max(spacing) / min(spacing) < 1 + 1 / min(new.shape)
    places = np.vstack([np.indices(new.shape).reshape(3, -1), np.ones(np.prod(new.shape))])
    at = (np.linalg.solve(old.affine, new.affine) @ places)[:3]
    inside = ((at > 0) & (at < np.array(old.shape)[:, None] - 1)).all(0)
    assert inside.mean() > (0.3 if name == "thin" else 0.8)
    values = np.clip(old.voxels.astype(float), *((-1000, 1900) if old.unit == "HU" else (-np.inf, np.inf)))
    expected = ndimage.map_coordinates(values, at[:, inside], order=1)
    # Beside the box's edge a voxel is interpolated from within the box alone.
    error = np.abs(new.voxels.reshape(-1)[inside] - expected)
    assert np.quantile(error, 0.95) <= derived.row(KEYS[name]).slope / 2 + 1e-2
    assert np.corrcoef(new.voxels.reshape(-1)[inside], expected)[0, 1] > 0.999


def test_the_acquired_plane_does_not_matter(derived):
    axial, coronal = derived.read_volume(KEYS["ct"]), derived.read_volume(KEYS["coronal"])
    assert np.abs(axial.voxels - coronal.voxels).max() <= 1
    np.testing.assert_allclose(axial.affine, coronal.affine, atol=1e-9)


def test_regions_are_those_of_the_whole(derived):
    whole, rng = derived.read_stored(KEYS["ct"]), np.random.default_rng(0)
    for _ in range(20):
        size = rng.integers(1, np.array(whole.shape) + 1)
        start = rng.integers(0, np.array(whole.shape) - size + 1)
        box = tuple(slice(a, a + n) for a, n in zip(start.tolist(), size.tolist()))
        np.testing.assert_array_equal(read_region(derived, KEYS["ct"], tuple(start), tuple(size)), whole[box])
    with pytest.raises(StoreError, match="outside of it"):
        read_region(derived, KEYS["ct"], (-1, 0, 0), (2, 2, 2))
    pixels, _ = derived.read_slice(KEYS["ct"], 5)
    np.testing.assert_array_equal(pixels, whole[5])


def test_moments_are_of_the_box_before_it_was_resampled(plain, derived):
    """The box found again: it is where the corners of the new volume lie in the scan."""
    for name in ("ct", "mr"):
        old, new = plain.read_volume(KEYS[name]), derived.read_volume(KEYS[name])
        matrix = np.linalg.solve(old.affine, new.affine)
        low = np.rint((matrix @ [-0.5, -0.5, -0.5, 1])[:3] + 0.5).astype(int)
        high = np.rint((matrix @ [*(np.array(new.shape) - 0.5), 1])[:3] + 0.5).astype(int)
        values = old.voxels[tuple(slice(a, b) for a, b in zip(low, high))].astype(float)
        if name == "ct":
            values = values.clip(-1000, 1900)
        assert values.size < old.voxels.size
        assert read_moments(derived, KEYS[name]) == pytest.approx((values.mean(), values.std()), rel=1e-6)


def test_content_says_where_the_patient_is(derived):
    found = read_volume_content(derived, KEYS["ct"])
    voxels = derived.read_volume(KEYS["ct"]).voxels
    body = ndimage.center_of_mass(voxels > -600)
    centre = [(c + 0.5) / n for c, n in zip(body, voxels.shape)]
    np.testing.assert_allclose(found.center, centre, atol=0.02)
    assert found.foreground == pytest.approx((voxels > -600).mean(), abs=0.05)
    assert found.grid.shape == (32, 32, 32)
    assert found.grid.dtype == np.float32
    assert found.grid.max() == 1
    corner, middle = found.grid[0, 0, 0], found.grid[16, 16, 16]
    assert (corner, middle) == (0, 1)
    assert read_volume_content(derived, KEYS["thin"]).grid.shape == (32, 32, 32)


def test_a_plain_store_has_none_of_it(plain):
    for read in (read_moments, read_volume_content):
        with pytest.raises(StoreError, match="hilum resample"):
            read(plain, KEYS["ct"])


def test_a_volume_that_keeps_its_grid_keeps_its_numbers(tmp_path):
    vol = head((30, 34, 32), (1.0, 1.0, 1.0), unit="")
    plain = write_plain(tmp_path / "plain", {"1" * 16: vol})
    settings = replace(SETTINGS, background_px=0)
    resample_store(plain.root, tmp_path / "out", settings=settings, num_workers=1)
    made = Store(tmp_path / "out")
    np.testing.assert_array_equal(made.read_stored("1" * 16), plain.read_stored("1" * 16))
    assert made.row("1" * 16).exact == plain.row("1" * 16).exact
    resample_store(plain.root, tmp_path / "small", settings=replace(settings, longest=17), num_workers=1)
    assert Store(tmp_path / "small").row("1" * 16).shape == (15, 17, 16)


def test_volumes_too_large_for_memory_end_in_the_same_bytes(plain, derived, tmp_path, monkeypatch):
    monkeypatch.setattr("hilum.large.LIMIT_BYTES", 100)
    resample_store(plain.root, tmp_path / "out", settings=SETTINGS, num_workers=1)
    for key in derived.sorted_keys():
        np.testing.assert_array_equal(Store(tmp_path / "out").read_stored(key), derived.read_stored(key))
        assert Store(tmp_path / "out").row(key).pixel_hash == derived.row(key).pixel_hash


SLOW = """
import sys, time
from hilum.archive.store import isotropic as module
original = module.write_isotropic
def slow(*args):
    row = original(*args)
    print("one", flush=True)
    time.sleep(0.2)
    return row
module.write_isotropic = slow
module.fill.__globals__["FEWEST_SCANS"] = 1
settings = module.IsotropicSettings(background_px=5, min_spacing_mm=1.0)
module.resample_store(sys.argv[1], sys.argv[2], settings=settings, num_workers=1)
"""


def test_killed_and_run_again_it_ends_in_the_same_bytes(plain, derived, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, plain.root, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    )
    for _ in range(2):
        run.stdout.readline()
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    with pytest.raises(StoreError, match="not finished; run the same hilum resample"):
        Store(tmp_path / "out")
    before = time.time_ns()
    resample_store(plain.root, tmp_path / "out", settings=SETTINGS, num_workers=1)
    assert files(tmp_path / "out") == files(derived.root)
    kept = [p for p in (tmp_path / "out" / "volumes").rglob("*.b2nd") if p.stat().st_mtime_ns < before]
    assert kept, "what was done is not done again"


def test_a_damaged_volume_is_named_and_the_run_goes_on_once_it_is_mended(plain, derived, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(plain.root, store)
    key = max(derived.rows, key=lambda row: row.bytes).key
    path = store / "volumes" / key[:2] / f"{key}.b2nd"
    whole = path.read_bytes()
    low, high = len(whole) // 8, len(whole) * 7 // 8
    path.write_bytes(whole[:low] + bytes(byte ^ 0xA5 for byte in whole[low:high]) + whole[high:])
    with pytest.raises(StoreError, match=rf"{key}.*hilum store verify"):
        resample_store(store, tmp_path / "out", settings=SETTINGS, num_workers=2)
    path.write_bytes(whole)
    resample_store(store, tmp_path / "out", settings=SETTINGS, num_workers=1)
    assert files(tmp_path / "out") == files(derived.root)


def test_a_second_run_does_nothing_and_other_settings_are_refused(plain, derived, monkeypatch):
    monkeypatch.setattr(module, "make_isotropic", lambda *_: pytest.fail("done again"))
    result = resample_store(plain.root, derived.root, settings=SETTINGS, num_workers=1)
    assert result["num_volumes"] == 4
    assert [left["reason"] for left in result["left_out"]] == ["no_geometry", "sheared", "no_body"]
    with pytest.raises(StoreError, match="other settings"):
        resample_store(plain.root, derived.root, settings=replace(SETTINGS, longest=9))
    with pytest.raises(StoreError, match="isotropic already"):
        resample_store(derived.root, plain.root.parent / "twice")
    with pytest.raises(StoreError, match="inside the store"):
        resample_store(plain.root, plain.root / "inner")


def test_joined_stores_stay_isotropic(plain, derived, tmp_path):
    merge([derived.root], tmp_path / "joined")
    assert is_isotropic(Store(tmp_path / "joined"))
    assert read_moments(Store(tmp_path / "joined"), KEYS["mr"]) == read_moments(derived, KEYS["mr"])
    with pytest.raises(StoreError, match="derived"):
        merge([plain.root, derived.root], tmp_path / "mixed")
    with pytest.raises(StoreError, match="append to that one"):
        append(derived.root, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"background_px": 4}, {"orientation": "SPS"}, {"clip_hu": (0.0, 100.0)}, {"min_spacing_mm": 0.0}, {"longest": -1}],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UsageError):
        IsotropicSettings(**wrong)


def test_the_command(plain, derived, monkeypatch, capsys):
    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["hilum", "resample", str(plain.root), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    given = ("-o", str(derived.root), "--set", "background_px=5", "--set", "min_spacing_mm=1")
    assert call(*given, "--json") == 4
    assert json.loads(capsys.readouterr().out)["num_volumes"] == 4
    assert call(*given) == 4
    out = capsys.readouterr().out
    assert "4 isotropic volumes" in out
    assert "3 left out" in out
    assert "sheared: The axes are not at right angles" in out
    assert max(map(len, out.splitlines())) <= 120
    assert call("-o", "x", "--set", "nothing=1") == 2
    assert api.resample is resample_store
