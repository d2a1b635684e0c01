"""The store gives back what was put in, slice by slice, and refuses what is none."""

import json
import pickle
from dataclasses import replace

import blosc2
import numpy as np
import pytest

from hilum.archive.store import index as index_module
from hilum.archive.store import store as module
from hilum.archive.store.content import measure_content
from hilum.archive.store.index import index_path, merge_indexes, read_index, write_index
from hilum.archive.store.store import Store, check_header, open_for_writing, quantise, write_header, write_volume
from hilum.errors import InputError, StoreError
from hilum.volume import Volume, crop_or_pad

AFFINE = np.array([[0, 0, 0.5, -1], [0, 0.8, 0, -2], [2.0, 0, 0, 3], [0, 0, 0, 1]])


@pytest.fixture
def make_store(tmp_path):
    def make(*volumes: Volume) -> Store:
        open_for_writing(tmp_path / "store", {"key": "k"})
        rows = [write_volume(tmp_path / "store", f"{n:016x}", v, patient="p") for n, v in enumerate(volumes)]
        write_index(index_path(tmp_path / "store"), rows)
        write_header(tmp_path / "store", {"key": "k", "status": "complete"})
        return Store(tmp_path / "store")

    return make


@pytest.mark.parametrize(
    ("values", "exact", "atol"),
    [
        (np.arange(-1024, 3000, dtype=np.int16), True, 0),
        (np.arange(0, 65536, 7, dtype=np.uint16), True, 0),
        (np.arange(100000, 165000, 11, dtype=np.int32), True, 0),
        (np.arange(0, 500, dtype=np.float32), True, 0),
        (np.linspace(-3, 1.7e6, 999, dtype=np.float32), False, 1.7e6 / 65534),
        (np.linspace(0, 1e-3, 999, dtype=np.float32), False, 1e-3 / 65534),
        (np.array([0, 200000], np.int32), False, 200000 / 65534),
    ],
)
def test_values_come_back(values, exact, atol):
    stored, slope, intercept, found = quantise(values)
    assert stored.dtype == np.int16
    assert found == exact
    np.testing.assert_allclose(stored * slope + intercept, values.astype(float), atol=atol, rtol=0)


def test_volume_and_single_slices_come_back(make_store):
    rng = np.random.default_rng(0)
    ct = Volume(voxels=rng.integers(-1000, 2000, (7, 40, 30)).astype(np.int16), affine=AFFINE, modality="CT", unit="HU")
    image = Volume(voxels=rng.random((1, 20, 20), np.float32), affine=None, modality="OT")
    store = make_store(ct, image)
    assert len(store) == 2
    read = store.read_volume("0" * 16)
    np.testing.assert_array_equal(read.voxels, ct.voxels)
    np.testing.assert_array_equal(read.affine, AFFINE)
    assert (read.modality, read.unit, store.row("0" * 16).patient) == ("CT", "HU", "p")
    for z in range(7):
        pixels, content = store.read_slice("0" * 16, z)
        np.testing.assert_array_equal(pixels, ct.voxels[z])
        assert content.foreground == pytest.approx(content.grid.mean(), abs=0.5 / 255)
        assert content.foreground == store.row("0" * 16).shares[z]
    np.testing.assert_allclose(store.read_volume(f"{1:016x}").voxels, image.voxels, atol=1e-5)
    assert store.read_volume(f"{1:016x}").affine is None


def test_hash_names_the_content(make_store, tmp_path):
    one = Volume(voxels=np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine=AFFINE, modality="CT")
    first = make_store(one).hash
    assert make_store(one).hash == first
    assert make_store(one, one).hash != first


def test_what_is_no_store(tmp_path, make_store):
    with pytest.raises(StoreError, match="is missing"):
        check_header(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="is no store"):
        check_header(tmp_path / "empty")
    store = make_store(Volume(voxels=np.ones((1, 2, 2), np.int16), affine=None, modality="OT"))
    with pytest.raises(StoreError, match="has no volume"):
        store.read_volume("nope")
    header = json.loads((store.root / "store.json").read_text())
    (store.root / "store.json").write_text(json.dumps(header | {"version": 99}))
    with pytest.raises(StoreError, match="version 99"):
        Store(store.root)
    (store.root / "store.json").write_text(json.dumps(header | {"status": "writing"}))
    with pytest.raises(StoreError, match="not finished"):
        Store(store.root)
    with pytest.raises(StoreError, match="other settings"):
        open_for_writing(store.root, {"key": "other"})


CROPS = [
    ((0, 0, 0), (5, 70, 90)),
    ((2, 10, 20), (2, 30, 64)),
    ((1, 63, 60), (1, 1, 9)),
    ((-2, -3, 80), (5, 20, 20)),
    ((3, 60, -4), (6, 30, 200)),
    ((-9, 0, 0), (4, 8, 8)),  # wholly outside
    ((5, 70, 90), (2, 2, 2)),
]


@pytest.mark.parametrize(("start", "shape"), CROPS)
@pytest.mark.parametrize("kind", ["int16", "float", "whole floats", "no geometry"])
def test_a_crop_is_the_same_part_of_the_whole(make_store, make_volume, start, shape, kind):
    vol = make_volume(0)
    if kind == "float":
        vol = Volume(voxels=vol.voxels * np.float32(0.37), affine=vol.affine, modality="MR")
    elif kind == "whole floats":
        vol = Volume(voxels=vol.voxels + np.float32(40000), affine=vol.affine, modality="MR")
    elif kind == "no geometry":
        vol = Volume(voxels=vol.voxels, affine=None, modality="OT")
    store = make_store(vol)
    wanted = crop_or_pad(store.read_volume("0" * 16), start, shape, -1024 if vol.unit == "HU" else 0)
    crop = store.read_crop("0" * 16, start, shape)
    np.testing.assert_array_equal(crop.voxels, wanted.voxels)
    assert crop.voxels.dtype == wanted.voxels.dtype
    assert (crop.modality, crop.unit) == (vol.modality, vol.unit)
    if vol.affine is None:
        assert crop.affine is None
    else:
        np.testing.assert_allclose(crop.affine, wanted.affine, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (35, 50, 35), (1, 513, 65), (2000, 9, 8)])
def test_small_single_and_long_volumes(make_store, make_volume, shape):
    vol = make_volume(1, shape)
    store = make_store(vol)
    np.testing.assert_array_equal(store.read_volume("0" * 16).voxels, vol.voxels)
    last = shape[0] - 1
    pixels, content = store.read_slice("0" * 16, last)
    np.testing.assert_array_equal(pixels, vol.voxels[last])
    np.testing.assert_array_equal(content.cells, measure_content(vol).cells[last])
    assert store.num_slices == shape[0]


def test_content_is_that_of_the_stored_numbers(make_store, make_volume):
    """What a reader gets, what the index says and what can be measured again are the same numbers."""
    vol = Volume(voxels=make_volume(2).voxels * np.float32(0.0123), affine=None, modality="MR")
    store = make_store(vol)
    measured = measure_content(store.read_volume("0" * 16))
    row = store.row("0" * 16)
    assert row.threshold == np.float32(measured.threshold)
    for z in range(5):
        content = store.read_slice("0" * 16, z)[1]
        np.testing.assert_array_equal(content.cells, measured[z].cells)
        assert (content.foreground, content.center, content.spread) == (
            row.shares[z], measured[z].center, measured[z].spread,
        )  # fmt: skip


def test_a_slice_and_a_crop_do_not_read_the_rest(make_store, make_volume):
    """With every other block of the file destroyed, they still come back."""
    vol = make_volume(3, (4, 130, 130))
    store = make_store(vol)
    path = module.volume_path(store.root, "0" * 16)
    data = path.read_bytes()
    array = blosc2.open(str(path), mode="r")
    chunks = [array.schunk.get_chunk(z) for z in range(4)]
    for z in (0, 1, 3):
        data = data.replace(chunks[z][32:], bytes(len(chunks[z]) - 32))
    path.write_bytes(data)
    np.testing.assert_array_equal(store.read_slice("0" * 16, 2)[0], vol.voxels[2])
    crop = store.read_crop("0" * 16, (2, 100, 5), (1, 30, 125))
    np.testing.assert_array_equal(crop.voxels, vol.voxels[2:3, 100:130, 5:130])
    with pytest.raises(StoreError, match="broken"):
        store.read_slice("0" * 16, 1)


# ---- the index


def test_rows_are_found_and_built_when_asked_for(make_store, make_volume, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH_ROWS", 3)  # several pieces
    volumes = [make_volume(n, (n % 3 + 1, 5, 6)) for n in range(8)]
    store = make_store(*volumes)
    assert len(store.rows.table["key"].chunks) == 3
    assert [r.key for r in store.rows] == list(store.sorted_keys()) == [f"{n:016x}" for n in range(8)]
    assert [r.shape for r in store.rows[2:5]] == [v.shape for v in volumes[2:5]]
    assert store.rows[-1] == store.row(f"{7:016x}")
    assert store.row(f"{5:016x}").affine == tuple(volumes[5].affine.ravel())
    for missing in ("", "0", f"{7:016x}0", "f" * 16):
        assert store.rows.find(missing) is None
    with pytest.raises(IndexError):
        store.rows[8]
    found = [(v, z, f) for volume, number, level in store.foreground() for v, z, f in zip(volume, number, level)]
    assert found == [(n, z, f) for n, row in enumerate(store.rows) for z, f in enumerate(row.foreground)]


def test_a_store_travels_to_other_processes_as_its_path(make_store, make_volume):
    store = make_store(make_volume(0))
    data = pickle.dumps(store)
    assert len(data) < 500
    assert pickle.loads(data).rows[0] == store.rows[0]


def test_joined_indexes_are_those_of_all_rows(make_store, make_volume, tmp_path, monkeypatch):
    """However many there are, whatever is in which; of equal keys the first stays."""
    rows = list(make_store(*[make_volume(n, (1, 3, 3)) for n in range(12)]).rows)
    rows[4:7] = [replace(row, affine=None) for row in rows[4:7]]
    monkeypatch.setattr(index_module, "BATCH_ROWS", 5)
    write_index(tmp_path / "whole", rows)
    parts = [rows[7:2:-1], rows[:4], [], rows[8:], rows[5:9]]
    for n, part in enumerate(parts):
        write_index(tmp_path / f"part{n}", part)
    for max_open in (2, 3, 256):
        monkeypatch.setattr(index_module, "MAX_OPEN", max_open)
        merge_indexes(tmp_path / "joined", [tmp_path / f"part{n}" for n in range(len(parts))])
        assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_store_without_volumes(tmp_path, make_store):
    store = make_store()
    merge_indexes(tmp_path / "joined", [])
    assert len(store) == len(read_index(tmp_path / "joined")) == store.num_slices == 0
    assert list(store.sorted_keys()) == list(store.foreground()) == list(store.rows) == []
    assert len(store.hash) == 16
    with pytest.raises(StoreError, match="no volume"):
        store.row("00")


def test_what_is_no_index(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        read_index(tmp_path / "index")
    (tmp_path / "index").write_bytes(b"PAR1" * 9)
    with pytest.raises(InputError, match="cannot be read as Arrow"):
        read_index(tmp_path / "index")


def test_pixel_hash_names_values_and_grid(make_store, make_volume):
    vol = make_volume(0)
    other = Volume(voxels=vol.voxels.reshape(5, 90, 70), affine=None, modality="MR")
    changed = Volume(voxels=vol.voxels + np.eye(70, 90, dtype=np.int16), affine=vol.affine, modality="CT")
    moved = Volume(voxels=vol.voxels, affine=None, modality="OT")
    hashes = [r.pixel_hash for r in make_store(vol, other, changed, moved).rows]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3
