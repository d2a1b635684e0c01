"""NIfTI: geometry by definition and on real files, refusals, and the two rules that read values."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from hilum.archive import nifti, values
from hilum.archive.scan import scan
from hilum.errors import ScanRefused


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 3000, (5, 6, 7)).astype(np.int16)  # (i, j, k)


def write(path, data, affine=None, code=1, **fields):
    out = nib.Nifti1Image(data, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)
    out.header.set_data_dtype(data.dtype)
    out.set_sform(out.affine, code)
    out.set_qform(None, 0)
    for name, value in fields.items():
        out.header[name] = value
    nib.save(out, path)
    return path


def flatten(path):
    """Overwrite the third row of the sform (bytes 312 to 328) with zeros: nibabel would not write such a file."""
    content = bytearray(path.read_bytes())
    content[312:328] = bytes(16)
    path.write_bytes(content)
    return path


def test_ras_becomes_lps_and_every_voxel_keeps_its_place(tmp_path, image):
    turn = np.array([[0.9, -0.3, 0.1], [0.3, 0.95, 0.0], [-0.1, 0.05, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([2.0, 3.0, 4.0])
    affine[:3, 3] = [-11, 22, 33]
    vol, notes = nifti.read(write(tmp_path / "x.nii.gz", image, affine))
    assert (vol.modality, vol.unit, vol.orientation, notes) == ("OT", "", "SPL", ())
    back = np.linalg.inv(affine) @ np.diag([-1, -1, 1, 1]) @ vol.affine
    for index in np.ndindex(vol.shape):
        i, j, k = np.round((back @ [*index, 1])[:3], 4).astype(int)
        assert vol.voxels[index] == image[i, j, k]


@pytest.mark.parametrize(("units", "factor"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001)])
def test_units_become_millimetres(tmp_path, image, units, factor):
    path = write(tmp_path / "x.nii", image, np.diag([2 / factor, 3 / factor, 4 / factor, 1]), xyzt_units=units)
    np.testing.assert_allclose(nifti.read(path)[0].spacing_mm, (4, 3, 2), rtol=1e-5)


def test_big_endian_and_scaled_values(tmp_path, image):
    swapped = nib.Nifti1Image(image, np.eye(4)).header.as_byteswapped(">")
    big = nib.Nifti1Image(image.astype(">i2"), np.diag([2.0, 3.0, 4.0, 1]), swapped)
    nib.save(big, tmp_path / "big.nii")
    plain, _ = nifti.read(write(tmp_path / "x.nii", image))
    np.testing.assert_array_equal(nifti.read(tmp_path / "big.nii")[0].voxels, plain.voxels)
    scaled = nib.Nifti1Image(image * 0.25 + 7, np.diag([2.0, 3.0, 4.0, 1]))
    scaled.header.set_data_dtype(np.int16)
    nib.save(scaled, tmp_path / "scaled.nii")
    vol, _ = nifti.read(tmp_path / "scaled.nii")
    assert vol.voxels.dtype == np.float32
    np.testing.assert_allclose(vol.voxels, plain.voxels * 0.25 + 7, atol=0.02)


def test_recognised_by_content_not_by_name(tmp_path, image, key):
    write(tmp_path / "x.nii.gz", image).rename(tmp_path / "report.pdf")
    write(tmp_path / "y.nii", image).rename(tmp_path / "y")
    assert [(e.reader, e.verdict) for e in scan(tmp_path, key)] == [("nifti", "used")] * 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p, a: write(p, a, code=0), "no_geometry"),
        (lambda p, a: flatten(write(p, a)), "no_geometry"),
        (lambda p, a: write(p, np.stack([a, a], 3)), "not_3d"),
        (lambda p, a: write(p, np.where(a == a.max(), np.nan, a).astype(np.float32)), "non_finite"),
        (lambda p, a: write(p, a.astype(np.float64) * 1e300), "non_finite"),
        (lambda p, a: write(p, np.full_like(a, 7)), "constant"),
        (lambda p, a: write(p, (a > 1500).astype(np.uint8)), "label_map"),
        (lambda p, a: write(p, a, intent_code=1002), "label_map"),
        (lambda p, a: write(p, a.astype(np.complex64)), "other_format"),
        (lambda p, a: write(p, np.zeros(a.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "colour"),
    ],
)
def test_refusals_by_name(tmp_path, image, key, make, reason):
    with pytest.raises(ScanRefused, match=reason):
        nifti.read(make(tmp_path / "x.nii", image))
    (entry,) = scan(tmp_path, key)
    assert (entry.verdict, entry.reason) == ("refused", reason)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("keep", [0.95, 0.7])
def test_truncated(tmp_path, key, name, keep):
    noise = np.random.default_rng(0).integers(0, 3000, (20, 20, 20)).astype(np.int16)
    path = write(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    (entry,) = scan(tmp_path, key)
    assert entry.reason == "truncated"


def test_trailing_single_axes_are_dropped(tmp_path, image):
    vol, _ = nifti.read(write(tmp_path / "x.nii", image[..., None, None]))
    assert vol.shape == (7, 6, 5)


def test_gzip_of_something_else(tmp_path, key):
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(b"name,label\n" * 100))
    assert [e.reason for e in scan(tmp_path, key)] == ["not_an_image"]


def test_plateaus_are_labels_and_noise_is_not():
    grid = np.indices((24, 24, 24)).sum(0)
    blocks = np.kron(np.arange(27).reshape(3, 3, 3), np.ones((8, 8, 8))).astype(np.int16)
    assert values.is_label_map(blocks)
    assert values.is_label_map(blocks.astype(np.float64))
    assert values.is_label_map((grid > 40) * 3)
    assert not values.is_label_map(grid)  # a smooth ramp with 70 values
    assert not values.is_label_map(blocks + 0.5)
    assert not values.is_label_map(blocks - 1)
    assert not values.is_label_map(np.random.default_rng(0).integers(0, 256, (24, 24, 24)))


def test_hounsfield_rule():
    rng = np.random.default_rng(0)
    body = rng.integers(-120, 120, (20, 20, 20)).astype(np.int16)
    body[:8] = -1000
    phase = rng.integers(-4096, 4096, (20, 20, 20)).astype(np.int16)
    assert values.looks_like_hu(body)
    assert not values.looks_like_hu(phase)
    assert not values.looks_like_hu(body + 1000)
    assert not values.looks_like_hu(body.astype(np.float32))


# Real files


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_label_maps_and_only_those_are_recognised(real_data, every):
    paths = sorted((real_data / "nifti").rglob("*.nii*"))
    assert len(paths) > 500
    for path in paths[::every]:
        label = path.parent.name in ("oar", "target", "labels") or "seg" in path.name or "label" in path.name
        ct = not label and ("openkbp" in str(path) or path.name.startswith("ct_"))
        expected = "label_map" if label else "CT" if ct else "OT"
        assert verdict(path) == {"fmri_tsn": "non_finite", "epi_4d_t": "not_3d"}.get(path.name[:8], expected), path


def verdict(path) -> str:
    try:
        vol, notes = nifti.read(path)
    except ScanRefused as refused:
        return refused.reason
    assert (vol.unit, notes) == ("HU" if vol.modality == "CT" else "", ())
    return vol.modality


def test_left_is_left_in_a_real_head_and_neck_ct(real_data):
    """The parotid that the data set calls right must lie on the patient's right: at smaller LPS x."""
    folder = real_data / "nifti" / "ct_head_neck_openkbp"
    labels = nib.load(folder / "oar" / "pt_1.nii.gz")
    values = np.asanyarray(labels.dataobj)
    header = nifti.read_header(folder / "ct" / "pt_1.nii.gz")
    centre = {n: header.affine @ [*np.argwhere(np.equal(values.T, n)).mean(0), 1] for n in (1, 3, 4, 7)}
    assert centre[3][0] < centre[1][0] < centre[4][0]  # right parotid, brainstem, left parotid
    assert centre[7][1] < centre[1][1]  # the mandible lies in front of the brainstem
    assert centre[7][2] < centre[1][2]  # and below it
