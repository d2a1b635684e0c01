"""NIfTI: geometry by definition and on real files, refusals, and the two rules that read values."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from hilum.archive.files import nifti, values
from hilum.archive.intake import read_scan
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


def patch(path, offset, values):
    """Overwrite float32 fields of a little-endian header that nibabel would not write so."""
    content = bytearray(path.read_bytes())
    content[offset : offset + 4 * len(values)] = np.array(values, "<f4").tobytes()
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
        (lambda p, a: patch(write(p, a), 312, [0] * 4), "no_geometry"),
        (lambda p, a: write(p, np.stack([a, a], 3)[..., None, :]), "not_3d"),
        (lambda p, a: write(p, np.stack([a, a], 3), intent_code=1007), "not_3d"),
        (lambda p, a: write(p, np.where(a == a.max(), np.inf, a).astype(np.float32)), "non_finite"),
        (lambda p, a: write(p, np.where(a == a.max(), np.nan, a - 9).astype(np.float32)), "non_finite"),
        (lambda p, a: write(p, np.where(a < 2900, np.nan, a).astype(np.float32)), "non_finite"),
        (lambda p, a: patch(write(p, a), 108, [0]), "corrupt"),
        (lambda p, a: patch(write(p, a), 108, [np.nan]), "corrupt"),
        (lambda p, a: patch(write(p, a), 108, [1e9]), "truncated"),
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


@pytest.mark.parametrize("flip", list(np.ndindex(2, 2, 2)))
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_every_orientation_against_itk(tmp_path, order, flip):
    """One bright voxel lies where ITK says it lies, for all 48 axis orders and signs, under a rotation."""
    turn = np.array(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.15).GetMatrix()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, order] * (np.array(flip) * 2 - 1) * [0.9, 2.0, 3.5]
    affine[:3, 3] = 10, -20, 30
    data = np.random.default_rng(0).integers(0, 900, (5, 6, 7)).astype(np.int16)
    data[1, 4, 2] = 5000
    path = write(tmp_path / "x.nii", data, affine)
    vol, _ = nifti.read(path)
    (marked,) = np.argwhere(vol.voxels == 5000)
    place = sitk.ReadImage(str(path)).TransformContinuousIndexToPhysicalPoint((1.0, 4.0, 2.0))
    np.testing.assert_allclose(vol.affine @ [*marked, 1], [*place, 1], atol=1e-3)


def test_a_sheared_sform_keeps_its_shear(tmp_path, image, key):
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    affine[1, 2] = 4 * np.tan(np.radians(15))
    path = write(tmp_path / "x.nii", image, affine)
    vol, _ = nifti.read(path)
    (entry,) = scan(tmp_path, key)
    assert (round(vol.shear_deg, 3), entry.shear_deg, entry.verdict) == (15, 15, "used")
    back = np.linalg.inv(affine) @ np.diag([-1, -1, 1, 1]) @ vol.affine
    for index in np.ndindex(vol.shape):
        assert vol.voxels[index] == image[tuple(np.round((back @ [*index, 1])[:3]).astype(int))]


@pytest.mark.parametrize(
    "dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">i2", ">u4", ">f4", ">f8"]
)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxel_types(tmp_path, kind, dtype):
    data = (np.arange(210) % 97).reshape(5, 6, 7).astype(dtype)
    data[0, 0, 0] += 1
    header = kind.header_class().as_byteswapped(">" if dtype[0] == ">" else "<")
    header.set_data_dtype(dtype)
    out = kind(data, np.eye(4), header)
    nib.save(out, tmp_path / "x.nii.gz")
    vol, _ = nifti.read(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(vol.voxels[:, ::-1, ::-1].T, data)


@pytest.mark.parametrize("slope", [1.0, 2.5, 0.0, np.nan, np.inf])
@pytest.mark.parametrize("intercept", [0.0, -1024.0, 0.125])
def test_slope_and_intercept_as_nibabel_has_them(tmp_path, image, slope, intercept):
    path = patch(write(tmp_path / "x.nii", image), 112, [slope, intercept])
    vol, _ = nifti.read(path)
    expected = np.asarray(nib.load(path).dataobj)
    np.testing.assert_allclose(vol.voxels[:, ::-1, ::-1].T, expected, rtol=1e-6)
    assert vol.voxels.dtype == (np.int16 if (expected == expected.astype(np.int16)).all() else np.float32)


def test_an_intercept_that_is_no_number(tmp_path, image):
    path = patch(write(tmp_path / "x.nii", image), 112, [1, np.nan])
    with pytest.raises(ScanRefused, match="corrupt"):
        nifti.read(path)


@pytest.mark.parametrize(
    ("shift_mm", "turn_deg", "expected"),
    [
        (0, 0, ()),
        (0.5, 0, ()),
        (5, 0, ("sform_qform: 5.0 mm, 0.0°",)),
        (0, 3, (f"sform_qform: {2 * np.sin(np.radians(1.5)) * 17:.1f} mm, 3.0°",)),
    ],
)
def test_sform_against_qform(tmp_path, image, key, shift_mm, turn_deg, expected):
    out = nib.Nifti1Image(image, np.diag([2.0, 3.0, 4.0, 1.0]))
    c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    qform = np.array([[c, -s, 0, shift_mm], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ out.affine
    out.set_qform(qform, 1)
    out.set_sform(out.affine, 2)
    nib.save(out, tmp_path / "x.nii")
    (entry,) = scan(tmp_path, key)
    assert entry.flags == expected
    np.testing.assert_allclose(nifti.read(tmp_path / "x.nii")[0].affine[0, 3], -8)  # that of the sform


def test_pixdim_against_the_affine(tmp_path, image, key):
    patch(write(tmp_path / "x.nii", image), 80, [2.5])
    (entry,) = scan(tmp_path, key)
    assert (entry.verdict, entry.flags, entry.spacing_mm) == (
        "used", ("pixdim: 2.5 for 2, 3 for 3, 4 for 4 mm",), (4, 3, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("offset", "values"), [(80, [0.0]), (80, [np.nan]), (256, [0.9, 0.9, 0.9])], ids=["zero", "nan", "no rotation"]
)
def test_a_qform_that_is_none(tmp_path, image, offset, values):
    """A voxel size of 0 and a quaternion longer than 1: nibabel's repairs are guesses. A good sform still counts."""
    out = nib.Nifti1Image(image, np.diag([2.0, 3.0, 4.0, 1.0]))
    for sform_code, reason in ((0, "no_geometry"), (1, None)):
        out.set_sform(out.affine, sform_code)
        out.set_qform(out.affine, 1)
        nib.save(out, tmp_path / "x.nii")
        patch(tmp_path / "x.nii", offset, values)
        if reason:
            with pytest.raises(ScanRefused, match=reason):
                nifti.read(tmp_path / "x.nii")
        else:
            np.testing.assert_allclose(nifti.read(tmp_path / "x.nii")[0].spacing_mm, (4, 3, 2))


def test_nan_is_no_value(tmp_path, image, key):
    values = np.where(image < 1500, np.nan, image).astype(np.float64)
    path = write(tmp_path / "x.nii", values)
    vol, repairs = nifti.read(path)
    np.testing.assert_array_equal(vol.voxels[:, ::-1, ::-1].T, np.where(image < 1500, 0, image))
    assert repairs == (f"NaN set to 0 in {(image < 1500).sum()} of 210 voxels",)
    assert [e.verdict for e in scan(tmp_path, key)] == ["repaired"]


# Several volumes in one file


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_each_volume_is_a_scan(tmp_path, key, name):
    data = np.random.default_rng(0).integers(0, 3000, (5, 6, 7, 4)).astype(np.int16)
    data[..., 2] = 7
    path = write(tmp_path / name, data)
    entries = sorted(scan(tmp_path, key), key=lambda e: e.frames)
    assert [(e.frames, e.num_files, e.split_by, e.reason) for e in entries] == [
        ((0,), 1, "axis 4", ""), ((1,), 0, "axis 4", ""), ((2,), 0, "axis 4", "constant"), ((3,), 0, "axis 4", ""),
    ]  # fmt: skip
    assert [e.key for e in entries] == [key.hash("item", f"{name}|{t}") for t in range(4)]
    for t in (3, 0, 1):  # in any order
        np.testing.assert_array_equal(read_scan(entries[t]).voxels[:, ::-1, ::-1].T, data[..., t])
    with pytest.raises(ScanRefused, match="corrupt: volume 4 of 4"):
        nifti.read(path, 4)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_header_and_voxels_in_two_files(tmp_path, image, key, kind, packed):
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    nib.save(kind(image, affine), tmp_path / f"a.img{packed}")
    found = {e.paths[0].name: e for e in scan(tmp_path, key)}
    header, voxels = found[f"a.hdr{packed}"], found[f"a.img{packed}"]
    assert (header.verdict, header.num_files, header.orientation) == ("used", 1, "SAL")
    assert (voxels.reason, voxels.detail) == ("not_an_image", "voxels of the header file beside it")
    np.testing.assert_array_equal(read_scan(header).voxels[:, ::-1].T, image)
    (tmp_path / f"a.img{packed}").unlink()
    assert [e.reason for e in scan(tmp_path, key)] == ["detached_voxels"]


@pytest.mark.parametrize("volumes", [None, 2])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_cut_off_anywhere(tmp_path, image, key, name, volumes):
    content = write(tmp_path / name, image if volumes is None else np.stack([image, image[::-1]], 3)).read_bytes()
    for length in range(0, len(content), 10):
        (tmp_path / name).write_bytes(content[:length])
        rows = scan(tmp_path, key)
        assert not any(row.used for row in rows), length
        assert sum(row.num_files for row in rows) == 1


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


# Real files


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.nightly)])
def test_label_maps_and_only_those_are_recognised(real_data, every):
    paths = sorted((real_data / "nifti").rglob("*.nii*"))
    assert len(paths) > 500
    for path in paths[::every]:
        label = path.parent.name in ("oar", "target", "labels") or "seg" in path.name or "label" in path.name
        ct = not label and ("openkbp" in str(path) or path.name.startswith("ct_"))
        expected = "label_map" if label else "CT" if ct else "OT"
        assert verdict(path) == expected, path


def verdict(path) -> str:
    try:
        vol, notes = nifti.read(path)
    except ScanRefused as refused:
        return refused.reason
    assert vol.unit == ("HU" if vol.modality == "CT" else "")
    assert notes == (("NaN set to 0 in 408 of 27744 voxels",) if path.name.startswith("fmri_tsnr") else ())
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
