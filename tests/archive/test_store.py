"""The store gives back what was put in, slice by slice, and refuses what is none."""

import json

import numpy as np
import pytest

from hilum.archive.store import (
    Store,
    check_header,
    index_path,
    open_for_writing,
    quantise,
    write_header,
    write_index,
    write_volume,
)
from hilum.errors import StoreError
from hilum.volume import Volume

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
