"""DICOM series with voxels known by construction, against their definition and against SimpleITK."""

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.uid import JPEGLosslessSV1, RLELossless

from hilum.archive import dicom
from hilum.archive.dicom.header import looks_like_dicom
from hilum.archive.dicom.pixels import read_slice
from hilum.archive.intake import read_scan
from hilum.archive.scan import find, scan
from hilum.errors import ScanRefused
from hilum.volume import Volume

MR = "1.2.840.10008.5.1.4.1.1.4"


def turned(x_deg, y_deg, z_deg):
    """Row and column direction of a plane turned about three axes."""
    x, y, z = np.radians([x_deg, y_deg, z_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return (about_z @ about_y @ about_x)[:, :2].T


def agrees_with_sitk(vol: Volume, paths, order, atol=0.0):
    """Every voxel has the value that SimpleITK finds at the same place in the patient."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(paths[i]) for i in order])
    reference = reader.Execute()
    values = sitk.GetArrayFromImage(reference)
    seen = set()
    for index in np.ndindex(vol.shape):
        world = (vol.affine @ [*index, 1])[:3]
        i, j, k = reference.TransformPhysicalPointToContinuousIndex(world.tolist())
        place = round(k), round(j), round(i)
        np.testing.assert_allclose((k, j, i), place, atol=1e-3)
        np.testing.assert_allclose(vol.voxels[index], values[place], atol=atol)
        seen.add(place)
    assert len(seen) == values.size


@pytest.mark.parametrize(
    ("plane", "code"),
    [
        ([1, 0, 0, 0, 1, 0], "SPL"),
        ([0, 1, 0, 0, 0, -1], "LIP"),
        ([1, 0, 0, 0, 0, -1], "PIL"),
        ([-1, 0, 0, 0, -1, 0], "SPL"),  # prone
        ([1, 0, 0, 0, -1, 0], "SPL"),
        (turned(12, 0, 0).ravel(), "SPL"),
        (turned(20, -15, 35).ravel(), "SPL"),
        (turned(70, 10, -25).ravel(), "PIL"),
    ],
)
@pytest.mark.parametrize("direction", [1, -1])
def test_every_voxel_lies_where_sitk_finds_it(write_series, voxels, plane, code, direction):
    row, column = np.reshape(plane, (2, 3)).astype(float)
    step = direction * 3.0 * np.cross(row, column)
    paths = write_series(voxels, step=step, ImageOrientationPatient=[float(v) for v in np.ravel(plane)])
    vol, notes = dicom.read(paths)
    assert vol.orientation == code
    assert (vol.modality, vol.unit, vol.voxels.dtype, notes) == ("CT", "HU", np.int16, ())
    np.testing.assert_allclose(vol.spacing_mm, (3.0, 0.8, 0.5), atol=1e-5)
    agrees_with_sitk(vol, paths, range(len(paths)))


def test_affine_and_values_by_definition(write_series, voxels):
    vol, _ = dicom.read(write_series(voxels))
    expected = [[0, 0, 0.5, -50], [0, 0.8, 0, -40], [2, 0, 0, 10], [0, 0, 0, 1]]
    np.testing.assert_allclose(vol.affine, expected, atol=1e-9)
    np.testing.assert_array_equal(vol.voxels, voxels.astype(int) - 1024)


def test_order_of_files_and_names_does_not_matter(write_series, voxels, tmp_path, key):
    paths = write_series(voxels)
    straight, _ = dicom.read(paths)
    random.Random(1).shuffle(paths)
    shuffled, _ = dicom.read(paths)
    np.testing.assert_array_equal(straight.voxels, shuffled.voxels)
    np.testing.assert_array_equal(straight.affine, shuffled.affine)
    for n, path in enumerate(paths):  # other names, several folders
        other = tmp_path / "archive" / f"{n % 2}"
        other.mkdir(exist_ok=True)
        path.rename(other / f"{n}.png")
    (entry,) = scan(tmp_path / "archive", key)
    np.testing.assert_array_equal(read_scan(entry).voxels, straight.voxels)


def test_gantry_tilt_keeps_a_sheared_affine(write_series, voxels, tmp_path, key):
    tilt = np.radians(18.5)
    plane = [1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt))]
    paths = write_series(voxels, step=(0, 0, 4.0), ImageOrientationPatient=plane)
    vol, _ = dicom.read(paths)
    assert vol.shear_deg == pytest.approx(18.5, abs=1e-3)
    for k in range(6):  # the first voxel of each slice lies where its file says
        np.testing.assert_allclose((vol.affine @ [k, 0, 0, 1])[:3], (-50, -40, 10 + 4 * k), atol=1e-4)
    (entry,) = scan(tmp_path / "archive", key)
    assert entry.used
    assert entry.shear_deg == pytest.approx(18.5, abs=1e-3)


def z_positions(*z):
    return [(-50.0, -40.0, v) for v in z]


@pytest.mark.parametrize(
    ("positions", "reason", "detail"),
    [
        (
            z_positions(0, 3, 6, 9, 15, 18),
            "missing_slices",
            r"1 missing, after slice 4 of 6: gaps of up to 6.00 mm, expected 3.00",
        ),
        (z_positions(0, 3, 6, 7, 8, 9), "irregular_spacing", r"gap of 3.0 mm after slice 1, expected 1.0 mm \(2 such"),
        (z_positions(0, 3, 6, 10, 14, 18), "irregular_spacing", r"steps from 3.00 to 4.00 mm"),
        (z_positions(0, 2, 4, 6, 8, 8), "duplicate_positions", "up to 2 slices at one of 5 positions"),
        ([(-50, -40 + 2.0 * (k == 3), 2 * k) for k in range(6)], "positions_not_on_a_line", "slice 4 is 2.00 mm off"),
        ([(-50, 0.2 * k * k, 2 * k) for k in range(6)], "positions_not_on_a_line", ""),
    ],
)
def test_wrong_positions_are_refused_with_numbers(write_series, voxels, tmp_path, key, positions, reason, detail):
    write_series(voxels, positions=positions)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.verdict, entry.reason, entry.num_files) == ("refused", reason, 6)
    assert re.search(detail, entry.detail)


def test_steps_within_tolerance_may_not_add_up(write_series):
    steps = np.repeat([0.96, 1.04], 40)
    positions = z_positions(*np.concatenate([[0], np.cumsum(steps)]))
    many = np.random.default_rng(0).integers(0, 99, (81, 4, 4)).astype(np.uint16)
    with pytest.raises(ScanRefused, match=r"irregular_spacing: positions stray 1\.\d\d mm"):
        dicom.read(write_series(many, positions=positions))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"ImagePositionPatient": None}, "no_geometry"),
        ({"ImageOrientationPatient": None}, "no_geometry"),
        ({"PixelSpacing": None}, "no_geometry"),
        ({"ImageOrientationPatient": [2.0, 0, 0, 0, 1, 0]}, "bad_orientation"),
        ({"ImageOrientationPatient": [1.0, 0, 0, 0.5, 0.8660254, 0]}, "bad_orientation"),
        ({"RescaleSlope": None}, "no_rescale"),
        ({"RescaleType": "Z_EFF"}, "not_hu"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "SOPClassUID": MR}, "mosaic"),
        ({"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], "SOPClassUID": MR}, "derived"),
        ({"NumberOfFrames": 3}, "multiframe"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, "no_geometry"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.3"}, "multiframe"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary_capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1"}, "projection"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, "ultrasound"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "segmentation"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3"}, "structure_set"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33"}, "report"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1"}, "presentation"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.30"}, "parametric_map"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}, "other_modality"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "other_object"),
    ],
)
def test_what_is_no_plain_slice_is_refused_by_name(write_series, voxels, tmp_path, key, attributes, reason):
    write_series(voxels, **attributes)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.verdict, entry.reason, entry.num_files) == ("refused", reason, 6)


@pytest.mark.parametrize("kind", [["DERIVED", "PRIMARY", "AXIAL"], ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]])
def test_plain_derived_images_are_used(write_series, voxels, tmp_path, key, kind):
    write_series(voxels, ImageType=kind)
    (entry,) = scan(tmp_path / "archive", key)
    assert entry.used


def test_slope_and_intercept_of_each_slice(write_series, voxels):
    def edit(k, data):
        data.RescaleSlope, data.RescaleIntercept = 0.5 + k, 10.0 * k

    paths = write_series(voxels, edit=edit, SOPClassUID=MR)
    vol, _ = dicom.read(paths)
    expected = np.stack([voxels[k] * (0.5 + k) + 10 * k for k in range(6)])
    assert (vol.voxels.dtype, vol.modality, vol.unit) == (np.float32, "MR", "")
    np.testing.assert_allclose(vol.voxels, expected)


def test_mr_without_rescale_is_read_as_stored(write_series, voxels):
    vol, _ = dicom.read(write_series(voxels, SOPClassUID=MR, RescaleSlope=None, RescaleIntercept=None))
    np.testing.assert_array_equal(vol.voxels, voxels)


def test_mixed_integer_and_scaled_slices(write_series, voxels):
    def edit(k, data):
        data.RescaleSlope = 2.5 if k == 4 else 1

    vol, _ = dicom.read(write_series(voxels, edit=edit))
    expected = voxels * np.where(np.arange(6) == 4, 2.5, 1.0)[:, None, None] - 1024
    np.testing.assert_allclose(vol.voxels, expected)


def test_signed_pixels(write_series, voxels):
    signed = voxels.astype(np.int16) - 900
    vol, _ = dicom.read(write_series(signed, RescaleIntercept=0))
    np.testing.assert_array_equal(vol.voxels, signed)


@pytest.mark.parametrize("sign", [0, 1])
def test_overlay_bits_do_not_leak_into_the_pixels(write_series, sign):
    values = np.random.default_rng(3).integers(-2048 if sign else 0, 2048, (5, 8, 8))
    stored = (values & 0x0FFF) | (np.random.default_rng(4).integers(0, 16, values.shape) << 12)
    paths = write_series(stored.astype(np.uint16), BitsStored=12, HighBit=11, PixelRepresentation=sign)
    vol, notes = dicom.read(paths)
    np.testing.assert_array_equal(vol.voxels, values - 1024)
    assert notes == ("bits outside BitsStored cleared",)


def test_large_unsigned_values_survive(write_series):
    wide = np.full((5, 4, 4), 60000, np.uint16)
    wide[2] = 7
    vol, _ = dicom.read(write_series(wide, SOPClassUID=MR, RescaleIntercept=0))
    assert vol.voxels.dtype == np.float32
    np.testing.assert_array_equal(vol.voxels, wide)


def test_run_length_compressed(write_series, voxels, tmp_path):
    paths = write_series(voxels)
    plain, _ = dicom.read(paths)
    for path in paths:
        data = dcmread(path)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(path)
    packed, _ = dicom.read(paths)
    np.testing.assert_array_equal(plain.voxels, packed.voxels)


def test_two_series_in_one_folder(write_series, voxels, tmp_path, key):
    write_series(voxels, series="1", prefix="b")
    write_series(voxels[:5, :8], series="2", prefix="a", SOPClassUID=MR)
    found = {e.modality: e for e in scan(tmp_path / "archive", key)}
    assert {m: (e.num_files, e.rows) for m, e in found.items()} == {"CT": (6, 9), "MR": (5, 8)}
    np.testing.assert_array_equal(read_scan(found["CT"]).voxels, voxels.astype(int) - 1024)


def test_two_matrix_sizes_in_one_series_are_split(write_series, voxels, tmp_path, key):
    write_series(voxels, prefix="a")
    write_series(voxels[:, :8], prefix="b", edit=lambda k, d: setattr(d, "SOPInstanceUID", f"1.2.3.{k}"))
    found = scan(tmp_path / "archive", key)
    assert sorted((e.rows, e.split_by, e.used) for e in found) == [
        (8, "Rows,Columns,PixelSpacing,FrameOfReferenceUID", True),
        (9, "Rows,Columns,PixelSpacing,FrameOfReferenceUID", True),
    ]
    assert len({e.key for e in found}) == 2


@pytest.mark.parametrize(
    ("keyword", "values"),
    [("EchoTime", (10.0, 80.0)), ("DiffusionBValue", (0.0, 1000.0)), ("AcquisitionNumber", (1, 2))],
)
def test_volumes_at_the_same_positions_are_split(write_series, voxels, tmp_path, key, keyword, values):
    for n, value in enumerate(values):
        attributes = {keyword: value, "SOPClassUID": MR, "RescaleIntercept": 0}
        rename = lambda k, d, n=n: setattr(d, "SOPInstanceUID", f"1.2.3.{n}.{k}")  # noqa: E731
        write_series(voxels + 1000 * n, prefix="ab"[n], edit=rename, **attributes)
    found = scan(tmp_path / "archive", key)
    assert [(e.used, e.num_slices, e.split_by) for e in found] == [(True, 6, keyword)] * 2
    lows = sorted(int(read_scan(e).voxels.min()) for e in found)
    assert lows == [3, 1003]
    for entry in found:
        assert np.ptp(read_scan(entry).voxels) < 6 * 9 * 7 * 5  # no slice of the other volume


def test_incomplete_sister_volume_is_refused(write_series, voxels, tmp_path, key):
    write_series(voxels, prefix="a", EchoTime=10.0)
    write_series(
        voxels[:4], prefix="b", EchoTime=80.0, edit=lambda k, d: setattr(d, "SOPInstanceUID", f"1.2.3.{k}")
    )  # fmt: skip
    found = {e.reason: e for e in scan(tmp_path / "archive", key)}
    assert found[""].num_files == 6
    assert found["incomplete_volume"].detail == "4 of 6 slices"


def test_several_orientations_are_never_stacked(write_series, voxels, tmp_path, key):
    write_series(voxels[:3], prefix="a")
    write_series(
        voxels[:3, :8], prefix="b", step=(3, 0, 0), ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
        edit=lambda k, d: setattr(d, "SOPInstanceUID", f"1.2.3.{k}"),
    )  # fmt: skip
    found = sorted(scan(tmp_path / "archive", key), key=lambda e: e.orientation)
    assert [(e.orientation, e.num_files, e.split_by) for e in found] == [
        (plane, 3, "Rows,Columns,PixelSpacing,FrameOfReferenceUID") for plane in ("LIP", "SPL")
    ]  # fmt: skip


def test_copies_of_a_slice_are_set_aside(write_series, voxels, tmp_path, key):
    paths = write_series(voxels)
    (tmp_path / "archive" / "copy").mkdir()
    shutil.copy(paths[0], tmp_path / "archive" / "zz")
    shutil.copy(paths[1], tmp_path / "archive" / "copy" / "aa")
    found = {e.reason: e for e in scan(tmp_path / "archive", key)}
    assert found[""].num_files == 6
    assert found["duplicate_instance"].num_files == 2
    assert paths[0] in found[""].paths


def test_two_patients_under_one_series_are_refused(write_series, voxels, tmp_path, key):
    write_series(voxels, edit=lambda k, d: setattr(d, "PatientID", "A" if k < 3 else "B"))
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.num_files) == ("mixed_patients", 6)


def test_one_slice_needs_its_thickness(write_series, voxels, tmp_path, key):
    write_series(voxels[:1], SliceThickness=4.0)
    (entry,) = scan(tmp_path / "archive", key)
    assert entry.spacing_mm == (4.0, 0.8, 0.5)
    assert read_scan(entry).shape == (1, 9, 7)
    write_series(voxels[:1])
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.detail) == ("no_geometry", "one slice without SliceThickness: its extent is unknown")


def test_without_preamble_and_meta_header(write_series, voxels, tmp_path, key):
    paths = write_series(voxels)
    plain, _ = dicom.read(paths)
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[content.index(b"\x08\x00\x08\x00CS") :])
    (entry,) = scan(tmp_path / "archive", key)
    assert entry.repairs == ("no preamble or meta header",)
    np.testing.assert_array_equal(read_scan(entry).voxels, plain.voxels)


@pytest.mark.parametrize("keep", [0.98, 0.6, 0.3])
def test_truncated_slice(write_series, key, tmp_path, keep):
    big = np.random.default_rng(0).integers(0, 2000, (5, 64, 64)).astype(np.uint16)
    paths = write_series(big)
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[: int(len(content) * keep)])
    reasons = {e.reason for e in scan(tmp_path / "archive", key, pixels=True)}
    assert reasons & {"truncated"}
    assert reasons <= {"truncated", "missing_slices"}  # without the broken one, a slice is missing


def test_cut_and_changed_files_never_crash(write_series, voxels, tmp_path, key):
    """Every cut, and many single-byte changes, of one file: a verdict each time, and never another shape."""
    (path,) = write_series(voxels[:1], SliceThickness=1.0)
    content = path.read_bytes()
    rng = random.Random(5)
    for n in range(300):
        mutant = bytearray(content)
        if n % 3 == 0:
            del mutant[rng.randrange(len(mutant)) :]
        else:
            for _ in range(n % 5 + 1):
                mutant[rng.randrange(128, len(mutant) - 126)] = rng.randrange(256)
        path.write_bytes(mutant)
        for entry in scan(tmp_path / "archive", key, pixels=True):
            assert entry.num_files == 1
            assert entry.reason or entry.num_slices == 1


def test_unknown_compression_names_the_syntax(write_series, voxels):
    def edit(k, data):
        data["PixelData"].VR = "OB"
        data.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\x04\0\0\0abcd" + b"\xfe\xff\xdd\xe0\0\0\0\0"
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = JPEGLosslessSV1

    with pytest.raises(ScanRefused, match=r"cannot_decode: JPEG Lossless, Non-Hierarchical"):
        dicom.read(write_series(voxels, edit=edit))


def test_constant_volume_is_refused(write_series):
    with pytest.raises(ScanRefused, match="constant"):
        dicom.read(write_series(np.full((5, 4, 4), 9, np.uint16)))


def test_text_is_not_dicom():
    assert not looks_like_dicom(b"patient,label\n1,2\n" * 20)
    assert not looks_like_dicom(b"\x08\x00" * 100)
    assert not looks_like_dicom(b"")


def test_no_identifier_in_the_entry(write_series, voxels, tmp_path, key):
    write_series(voxels, Manufacturer="Dr Secret's Workshop", SeriesDescription="Secret^Name")
    (entry,) = scan(tmp_path / "archive", key)
    written = [v for k, v in vars(entry).items() if k != "paths"]
    assert not any("ecret" in str(v) or "P-001" in str(v) for v in written)
    assert (entry.manufacturer, entry.patient) == ("OTHER", key.hash("patient", "P-001"))


# Real files


def test_all_encodings_of_one_real_slice_agree(real_data):
    for folder, reference in (("ct_transfer_syntaxes_ge", "Explicit VR Little Endian"),):
        decoded = {}
        for path in sorted(p for p in (real_data / "dicom" / folder).iterdir() if p.suffix == ".dcm"):
            header, pixels, _ = read_slice(path)
            decoded[header.transfer_syntax] = pixels
        assert len(decoded) == 7
        for name, pixels in decoded.items():
            np.testing.assert_array_equal(pixels, decoded[reference], err_msg=name)


def test_jpeg_lossless_equals_raw(real_data):
    folder = real_data / "dicom" / "mr_sagittal_jpeg_variants"
    slices = [read_slice(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".md"]
    by_instance: dict[str, list[np.ndarray]] = {}
    for header, pixels, _ in slices:
        by_instance.setdefault(header.instance_uid, []).append(pixels)
    twins = [p for p in by_instance.values() if len(p) == 2]
    assert len(twins) == 2
    for one, other in twins:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("folder", "reference"),
    [
        ("mr_hitachi", "expected.nii.gz"),
        ("noise_pixels_real_headers/mr_compressed_jpeg", "expected.nii.gz"),
        ("noise_pixels_real_headers/mr_compressed_rle", "expected.nii.gz"),
        ("noise_pixels_real_headers/mr_non_isotropic", "expected.nii.gz"),
        ("noise_pixels_real_headers/mr_philips_3d_scaling", "expected.nii.gz"),
        ("ct_axial_j2k_siemens", "reference_seg.nii.gz"),
    ],
)
def test_geometry_and_values_equal_those_of_other_tools(real_data, key, folder, reference):
    """dicom2nifti and TotalSegmentator wrote these references; nibabel reads them here."""
    nibabel = pytest.importorskip("nibabel")
    entry = max((e for e in find(real_data / "dicom" / folder, key) if e.reader == "dicom" and e.used),
                key=lambda e: e.num_slices)  # fmt: skip
    vol = read_scan(entry)
    image = nibabel.load(real_data / "dicom" / folder / reference)
    values = np.asanyarray(image.dataobj)
    to_index = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ image.affine)
    corners = np.array([(k, j, i, 1) for k in (0, vol.shape[0] - 1) for j in (0, vol.shape[1] - 1)
                        for i in (0, vol.shape[2] - 1)])  # fmt: skip
    index = (to_index @ vol.affine @ corners.T).T[:, :3]
    np.testing.assert_allclose(index, np.round(index), atol=0.01)
    np.testing.assert_array_equal(np.round(index).max(0) + 1, values.shape)
    if reference == "expected.nii.gz":
        for k, j, i in np.random.default_rng(0).integers(0, vol.shape, (200, 3)):
            place = tuple(np.round(to_index @ vol.affine @ [k, j, i, 1])[:3].astype(int))
            assert vol.voxels[k, j, i] == pytest.approx(values[place], rel=1e-5)


def test_paths_stay_private(write_series, voxels, tmp_path):
    with pytest.raises(ScanRefused) as refused:
        dicom.read([Path(tmp_path / "Secret^Name")])
    assert "ecret" not in str(refused.value)
    assert refused.value.reason == "unreadable"
