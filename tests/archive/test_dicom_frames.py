"""Enhanced CT and MR written frame by frame, every voxel and position known; real ones against their classic twins."""

import builtins

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, RLELossless

from hilum.archive import dicom
from hilum.archive.intake import read_scan
from hilum.archive.scan import find, scan

ENHANCED_CT, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4.1"
CONVERTED_CT, CONVERTED_MR = "1.2.840.10008.5.1.4.1.1.2.2", "1.2.840.10008.5.1.4.1.1.4.4"
PLANE = [1.0, 0.0, 0.0, 0.0, 0.8, -0.6]
STEP = np.array([0.0, 1.5, 2.0])  # 2.5 mm along the normal
FIRST = np.array([-50.0, -40.0, 10.0])


def group(**attributes):
    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return [item]


def frame_groups(position, **groups):
    """The per-frame functional groups of one frame: its position, and what else is given."""
    item = Dataset()
    item.PlanePositionSequence = group(ImagePositionPatient=[float(v) for v in position])
    for name, value in groups.items():
        setattr(item, name, value)
    return item


@pytest.fixture
def write_enhanced(write_series):
    """One file from frames (N, Y, X). `groups(n)` adds groups to frame n, `edit(data)` changes the whole."""

    def write(
        frames, *, groups=lambda n: {}, positions=None, edit=lambda data: None, sop_class=ENHANCED_MR, **attributes
    ):
        def make(k, data):
            data.PixelData = frames.tobytes()
            data.NumberOfFrames = len(frames)
            shared = Dataset()
            shared.PlaneOrientationSequence = group(ImageOrientationPatient=PLANE)
            shared.PixelMeasuresSequence = group(PixelSpacing=[0.8, 0.5], SliceThickness=2.5)
            shared.PixelValueTransformationSequence = group(RescaleSlope=1, RescaleIntercept=-1000, RescaleType="HU")
            data.SharedFunctionalGroupsSequence = [shared]
            data.PerFrameFunctionalGroupsSequence = [
                frame_groups(FIRST + n * STEP if positions is None else positions[n], **groups(n))
                for n in range(len(frames))
            ]
            edit(data)

        plain = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "PixelSpacing": None,
                 "RescaleSlope": None, "RescaleIntercept": None, "SOPClassUID": sop_class}  # fmt: skip
        return write_series(frames[:1], edit=make, **plain | attributes)

    return write


def every_voxel_lies_at(vol, frames, positions):
    """Frame n (Y, X) of values lies with its first voxel at positions[n]."""
    rows, columns = np.indices(frames[0].shape)
    for values, position in zip(frames, positions):
        world = position + 0.8 * rows[..., None] * np.array(PLANE[3:]) + 0.5 * columns[..., None] * np.array(PLANE[:3])
        place = np.linalg.solve(vol.affine[:3, :3], (world.reshape(-1, 3) - vol.affine[:3, 3]).T)
        np.testing.assert_allclose(place, np.round(place), atol=1e-4)
        np.testing.assert_array_equal(vol.voxels[tuple(np.round(place).astype(int))], values.ravel())
    assert vol.shape == (len(frames), *frames[0].shape)


@pytest.mark.parametrize("sop_class", [ENHANCED_CT, ENHANCED_MR, CONVERTED_CT, CONVERTED_MR])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_every_voxel_lies_where_its_frame_says(write_enhanced, voxels, tmp_path, key, sop_class, order):
    positions = [FIRST + n * STEP for n in order]
    write_enhanced(voxels, positions=positions, sop_class=sop_class)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.verdict, entry.num_files, entry.num_slices) == ("used", 1, 6)
    assert entry.modality == ("CT" if sop_class in (ENHANCED_CT, CONVERTED_CT) else "MR")
    np.testing.assert_allclose(entry.spacing_mm, (2.5, 0.8, 0.5))
    vol = read_scan(entry)
    assert vol.unit == ("HU" if entry.modality == "CT" else "")
    every_voxel_lies_at(vol, voxels.astype(int) - 1000, positions)


def test_sitk_finds_the_same(write_enhanced, voxels):
    (path,) = write_enhanced(voxels, sop_class=ENHANCED_CT)
    image = sitk.ReadImage(str(path))
    vol, _ = dicom.read([path] * 6, range(6))
    values = sitk.GetArrayFromImage(image)
    for index in np.ndindex(vol.shape):
        i, j, k = image.TransformPhysicalPointToIndex((vol.affine @ [*index, 1])[:3].tolist())
        assert vol.voxels[index] == values[k, j, i]


def test_slope_and_intercept_of_each_frame(write_enhanced, voxels, tmp_path, key):
    def groups(n):
        return {"PixelValueTransformationSequence": group(RescaleSlope=n + 0.5, RescaleIntercept=n * 10)}

    write_enhanced(voxels, groups=groups)
    (entry,) = scan(tmp_path / "archive", key)
    factor = np.arange(6)[:, None, None]
    every_voxel_lies_at(read_scan(entry), voxels * (factor + 0.5) + 10 * factor, [FIRST + n * STEP for n in range(6)])


@pytest.mark.parametrize(
    ("sequence", "keyword", "values"),
    [
        ("FrameContentSequence", "StackID", ("1", "2")),
        ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
        ("FrameContentSequence", "FrameAcquisitionNumber", (1, 2)),
        ("MREchoSequence", "EffectiveEchoTime", (10.5, 80.25)),
        ("MRDiffusionSequence", "DiffusionBValue", (0.0, 1000.0)),
        ("MRArterialSpinLabelingSequence", "ASLContext", ("LABEL", "CONTROL")),
        ("MRMetaboliteMapSequence", "MetaboliteMapDescription", ("WATER", "FAT")),
        ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", (0.0, 35.5)),
        ("MRModifierSequence", "InversionTimes", ([50.0, 60.0], [50.0, 70.0])),
        ("MRImageFrameTypeSequence", "FrameType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "R"])),
        ("UnassignedPerFrameConvertedAttributesSequence", "EchoTime", (5, 7)),
    ],
)
def test_volumes_of_one_file_are_told_apart(write_enhanced, voxels, tmp_path, key, sequence, keyword, values):
    """Two volumes of three slices each, interleaved."""
    write_enhanced(
        voxels, positions=[FIRST + n // 2 * STEP for n in range(6)],
        groups=lambda n: {sequence: group(**{keyword: values[n % 2]})},
    )  # fmt: skip
    found = sorted(scan(tmp_path / "archive", key), key=lambda e: e.frames)
    assert [(e.verdict, e.num_slices, e.split_by) for e in found] == [("used", 3, keyword)] * 2
    assert sum(e.num_files for e in found) == 1
    for first, entry in enumerate(found):
        mine = voxels[first::2].astype(int) - 1000
        every_voxel_lies_at(read_scan(entry), mine, [FIRST + n * STEP for n in range(3)])


def test_gradient_directions_and_dimension_indices(write_enhanced, voxels, tmp_path, key):
    def directions(n):
        item = group(DiffusionBValue=1000.0)
        item[0].DiffusionGradientDirectionSequence = group(DiffusionGradientOrientation=[1.0, 0.0, float(n % 2)])
        return {"MRDiffusionSequence": item}

    positions = [FIRST + n // 2 * STEP for n in range(6)]
    write_enhanced(voxels, positions=positions, groups=directions)
    assert [e.split_by for e in scan(tmp_path / "archive", key)] == ["DiffusionGradientOrientation"] * 2

    def point(data):
        data.DimensionIndexSequence = [
            *group(DimensionIndexPointer=0x00209057),
            *group(DimensionIndexPointer=0x20051413),
        ]

    def indices(n):
        return {"FrameContentSequence": group(DimensionIndexValues=[n // 2 + 1, n % 2 + 1])}

    write_enhanced(voxels, positions=positions, groups=indices, edit=point)
    assert [e.split_by for e in scan(tmp_path / "archive", key)] == ["DimensionIndexValues[2]"] * 2


def drop(name):
    def edit(data):
        del data.SharedFunctionalGroupsSequence[0][name]

    return edit


def put(name, value):
    return lambda data: setattr(data, name, value)


@pytest.mark.parametrize(
    ("edit", "reason", "detail"),
    [
        (drop("PlaneOrientationSequence"), "no_geometry", "functional group missing or not usable: PlaneOrientation"),
        (drop("PixelMeasuresSequence"), "no_geometry", "functional group missing or not usable: PixelMeasures"),
        (drop("PixelValueTransformationSequence"), "no_rescale", ""),
        (put("PerFrameFunctionalGroupsSequence", []), "no_geometry", "no per-frame functional groups"),
        (put("NumberOfFrames", 10**9), "no_geometry", "NumberOfFrames 1000000000, functional groups for 6"),
        (put("NumberOfFrames", 5), "no_geometry", "NumberOfFrames 5, functional groups for 6"),
        (put("PixelData", b"\0" * 100), "truncated", None),
        (put("SamplesPerPixel", 3), "colour", "3 samples per pixel"),
        (put("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]), "localizer", ""),
    ],
)
def test_what_is_missing_is_never_filled_in(write_enhanced, voxels, tmp_path, key, edit, reason, detail):
    stray = {
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": PLANE,
        "PixelSpacing": [1, 1],
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
    }  # fmt: skip  no substitute for functional groups
    write_enhanced(voxels, sop_class=ENHANCED_CT, edit=edit, **stray)
    (entry,) = scan(tmp_path / "archive", key, pixels=True)
    assert (entry.reason, entry.num_files) == (reason, 1)
    assert detail is None or entry.detail == detail


def test_frames_that_are_no_images_stand_aside_alone(write_enhanced, voxels, tmp_path, key):
    def groups(n):
        kind = {"FrameType": ["ORIGINAL", "PRIMARY", "M", "NONE"]}
        if n == 3:
            kind["VolumeBasedCalculationTechnique"] = "MAX_IP"
        if n == 4:
            kind["ComplexImageComponent"] = "PHASE"
        if n == 5:
            kind["FrameType"] = ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]
        return {"MRImageFrameTypeSequence": group(**kind)}

    write_enhanced(voxels, groups=groups)
    found = {e.reason: e for e in scan(tmp_path / "archive", key)}
    assert {r: e.frames for r, e in found.items()} == {"": (0, 1, 2), "derived": (3, 4, 5)}
    every_voxel_lies_at(read_scan(found[""]), voxels[:3].astype(int) - 1000, [FIRST + n * STEP for n in range(3)])


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize("offsets", [True, False])
def test_compressed_frames_all_or_some(write_enhanced, syntax, offsets):
    frames = np.random.default_rng(1).integers(0, 4000, (6, 40, 36)).astype(np.uint16)
    (path,) = write_enhanced(frames)
    data = dcmread(path)
    data.compress(syntax, generate_instance_uid=False)
    if not offsets:  # an empty table, as many writers leave it
        length = int.from_bytes(data.PixelData[4:8], "little")
        data.PixelData = data.PixelData[:4] + b"\0\0\0\0" + data.PixelData[8 + length :]
    data.save_as(path)
    for wanted in (range(6), [4, 2], [5, 4, 3, 2, 1]):
        wanted = list(wanted)
        vol, _ = dicom.read([path] * len(wanted), wanted)
        every_voxel_lies_at(vol, frames[wanted].astype(int) - 1000, [FIRST + n * STEP for n in wanted])


def test_a_file_is_opened_once(write_enhanced, voxels, tmp_path, key, monkeypatch):
    (path,) = write_enhanced(voxels)
    opened = []
    real_open = builtins.open

    def counting(file, *args, **kwargs):
        opened.append(str(file))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", counting)
    (entry,) = find(tmp_path / "archive", key)
    assert opened.count(str(path)) == 1
    read_scan(entry)
    assert opened.count(str(path)) == 2


def test_one_enhanced_file_for_each_slice(write_series, voxels, tmp_path, key):
    def make(k, data):
        data.NumberOfFrames = 1
        data.SharedFunctionalGroupsSequence = []
        data.PerFrameFunctionalGroupsSequence = [
            frame_groups(
                FIRST + k * STEP, PlaneOrientationSequence=group(ImageOrientationPatient=PLANE),
                PixelMeasuresSequence=group(PixelSpacing=[0.8, 0.5]),
                PixelValueTransformationSequence=group(RescaleSlope=1, RescaleIntercept=-1000),
            )
        ]  # fmt: skip

    write_series(voxels, edit=make, SOPClassUID=ENHANCED_CT)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.num_files, entry.num_slices, entry.frames) == (6, 6, ())
    every_voxel_lies_at(read_scan(entry), voxels.astype(int) - 1000, [FIRST + n * STEP for n in range(6)])


def test_cut_and_changed_enhanced_files_never_crash(write_enhanced, voxels, tmp_path, key):
    (path,) = write_enhanced(voxels)
    content = path.read_bytes()
    rng = np.random.default_rng(7)
    for n in range(200):
        mutant = bytearray(content)
        if n % 3 == 0:
            del mutant[int(rng.integers(132, len(mutant))) :]
        else:
            for _ in range(n % 5 + 1):
                mutant[int(rng.integers(132, len(mutant) - voxels.nbytes))] = int(rng.integers(256))
        path.write_bytes(mutant)
        found = scan(tmp_path / "archive", key, pixels=True)
        assert sum(e.num_files for e in found) == 1
        assert all(e.reason or e.num_slices <= 6 for e in found)


# Real files


def test_converted_file_equals_its_classic_twin(real_data, key):
    found = [e for e in find(real_data / "dicom" / "seg_tiny_24x38x3", key) if e.used]
    one, three = sorted(found, key=lambda e: e.num_files)
    assert (one.num_files, three.num_files) == (1, 3)
    np.testing.assert_array_equal(read_scan(one).voxels, read_scan(three).voxels)
    np.testing.assert_array_equal(read_scan(one).affine, read_scan(three).affine)


def test_enhanced_mr_equals_dicom2nifti(real_data, key):
    folder = real_data / "dicom" / "noise_pixels_real_headers" / "mr_hyperfine_enhanced"
    image = nibabel.load(folder / "expected.nii.gz")
    (entry,) = (e for e in find(folder, key) if e.reader == "dicom")
    vol = read_scan(entry)
    index = np.moveaxis(np.indices(vol.shape), 0, -1).reshape(-1, 3)
    to_index = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ image.affine) @ vol.affine
    place = index @ to_index[:3, :3].T + to_index[:3, 3]
    np.testing.assert_allclose(place, np.round(place), atol=1e-3)
    np.testing.assert_array_equal(
        np.asanyarray(image.dataobj)[tuple(np.round(place).astype(int).T)], vol.voxels.ravel()
    )


def test_philips_enhanced_values_are_rescaled_frame_by_frame(real_data, key):
    for name in ("enhanced_multiframe/philips_enhanced_pcasl.dcm", "noise_pixels_real_headers/mr_philips_enhanced_3d"):
        (entry,) = (e for e in find(real_data / "dicom" / name, key) if e.reader == "dicom")
        assert "philips_scaling" in entry.flags
        data = dcmread(entry.paths[0])
        vol = read_scan(entry)
        for item, pixels in zip(data.PerFrameFunctionalGroupsSequence, data.pixel_array):
            values = item.PixelValueTransformationSequence[0]
            position = [float(v) for v in item.PlanePositionSequence[0].ImagePositionPatient]
            place = np.linalg.inv(vol.affine) @ [*position, 1]
            np.testing.assert_allclose(place[1:], [0, 0, 1], atol=2e-3)
            expected = pixels * float(values.RescaleSlope) + float(values.RescaleIntercept)
            np.testing.assert_allclose(vol.voxels[round(place[0])], expected, rtol=1e-6)
