"""NumPy files: numbers without geometry, never objects."""

import pickle

import numpy as np
import pytest

from hilum.archive.files import array
from hilum.archive.intake import read_scan
from hilum.archive.scan import find, scan
from hilum.errors import GeometryError, ScanRefused


@pytest.fixture
def voxels():
    return np.random.default_rng(0).permutation(5 * 6 * 7).reshape(5, 6, 7)


def save(path, values, version=None):
    with open(path, "wb") as handle:
        np.lib.format.write_array(handle, values, version, allow_pickle=True)
    return path


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["i1", "u1", ">i2", "u2", "i4", ">u4", "i8", "u8", "f2", ">f4", "f8"])
def test_numbers_as_numpy_loads_them(tmp_path, key, voxels, dtype, order, version):
    path = save(tmp_path / "x", np.asarray(voxels % 100 + (voxels == 7), dtype, order=order), version)
    vol, repairs = array.read(path)
    np.testing.assert_array_equal(vol.voxels, np.load(path))
    assert (vol.affine, vol.modality, repairs) == (None, "OT", ())
    (entry,) = find(path, key)
    assert (entry.reader, entry.num_slices, entry.rows, entry.columns, entry.spacing_mm, entry.orientation) == (
        "array", 5, 6, 7, None, "",
    )  # fmt: skip
    np.testing.assert_array_equal(read_scan(entry).voxels, vol.voxels)
    with pytest.raises(GeometryError):
        _ = vol.spacing_mm


@pytest.mark.parametrize("order", ["C", "F"])
def test_two_axes_are_one_slice(tmp_path, voxels, order):
    vol, _ = array.read(save(tmp_path / "x", np.asarray(voxels[0], order=order)))
    np.testing.assert_array_equal(vol.voxels, voxels[:1])


def test_hounsfield_units_are_seen(tmp_path):
    body = np.random.default_rng(0).integers(-120, 120, (20, 20, 20))
    body[:8] = -1000
    vol, _ = array.read(save(tmp_path / "x", body))
    assert (vol.modality, vol.unit) == ("CT", "HU")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda v: np.array([[[Evil()]]], object), "other_format: an array of Python objects"),
        (lambda v: v > 3, "other_format"),
        (lambda v: v.astype(complex), "other_format"),
        (lambda v: np.zeros((3, 3), [("a", "i2")]), "other_format"),
        (lambda v: np.array([["a", "b"]]), "other_format"),
        (lambda v: v[0, 0], "not_3d"),
        (lambda v: np.int16(3), "not_3d"),
        (lambda v: v[None, None], "not_3d"),
        (lambda v: v[:0], "corrupt"),
        (lambda v: v * 0, "constant"),
        (lambda v: v // 100, "label_map"),
        (lambda v: np.where(v > 100, np.inf, v), "non_finite"),
    ],
)
def test_refusals_by_name(tmp_path, key, voxels, make, reason):
    path = save(tmp_path / "x", np.asarray(make(voxels)))
    with pytest.raises(ScanRefused, match=reason):
        array.read(path)
    assert [e.reason for e in scan(tmp_path, key)] == [reason.split(":")[0]]


def test_cut_off_anywhere_and_absurd_sizes(tmp_path, key, voxels):
    content = save(tmp_path / "x", voxels).read_bytes()
    for length in range(0, len(content), 10):
        (tmp_path / "x").write_bytes(content[:length])
        assert [e.used for e in scan(tmp_path, key)] == [False], length
    for old, new, reason in (
        (b"(5, 6, 7), }      ", b"(5, 6, 7777777), }", "truncated"),
        (b"(5, 6, 7), }         ", b"(5, 6, 7777777777), }", "too_large"),
        (b"(5, 6, 7)", b"(5, 6,-7)", "corrupt"),
        (b"{", b"(", "corrupt"),
        (b"(5, 6, 7)", b"(((((((((", "corrupt"),
    ):
        assert old in content
        (tmp_path / "x").write_bytes(content.replace(old, new, 1))
        with pytest.raises(ScanRefused, match=reason):
            array.read(tmp_path / "x")


def test_a_pickle_is_no_image(tmp_path, key):
    (tmp_path / "x.npy").write_bytes(pickle.dumps(Evil()))
    assert [e.reason for e in scan(tmp_path, key)] == ["not_an_image"]
