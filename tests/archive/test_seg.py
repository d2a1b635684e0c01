"""DICOM SEG → labels on the scan's grid, against segmentations whose every voxel the test placed."""

import shutil
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from hilum.archive.dicom import seg
from hilum.archive.dicom.planes import rle_bits
from hilum.archive.intake import read_scan
from hilum.archive.labels import read_labels
from hilum.archive.scan import find
from hilum.errors import ScanRefused
from hilum.volume import Volume, orient

SHAPE = (5, 13, 11)  # 143 pixels a frame: no frame but the first begins at a byte


def make_grid(angles=(0.0, 0.0, 0.0), tilt_mm=0.0, shape=SHAPE, spacing=(3.0, 0.8, 0.5)) -> Volume:
    """An empty scan turned about x, y and z, its slices shifted along rows by tilt_mm each."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(angles)):
        a, b = [n for n in range(3) if n != axis]
        one = np.eye(3)
        one[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = one @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn[:, ::-1] * spacing
    affine[:3, 0] += turn[:, 1] * tilt_mm
    affine[:3, 3] = (-31.5, 17.25, 102.125)
    return Volume(voxels=np.zeros(shape, np.int16), affine=affine, modality="CT", unit="HU")


def make_labels(shape=SHAPE) -> np.ndarray:
    """Three parts without symmetry, slice 3 empty; part 3 in one slice only."""
    labels = np.zeros(shape, np.uint8)
    labels[0:3, 1:6, 2:9] = 1
    labels[1:3, 4:12, 5:7] = 2
    labels[4, 0, 0] = labels[4, 0, 1] = labels[4, 12, 10] = 3
    return labels


def plane_of(grid: Volume) -> tuple[list[float], list[float]]:
    """Orientation and pixel spacing of the slices of a grid."""
    assert grid.affine is not None
    row, column = grid.affine[:3, 2], grid.affine[:3, 1]
    lengths = np.linalg.norm(column), np.linalg.norm(row)
    return [*(row / lengths[1]), *(column / lengths[0])], [round(float(n), 6) for n in lengths]


def frames_of(labels: np.ndarray, grid: Volume, seed=0):
    """Frames, segments and positions in a random order; empty frames left out, as writers do."""
    assert grid.affine is not None
    found = [(k, n) for k in range(len(labels)) for n in (1, 2, 3) if (labels[k] == n).any()]
    order = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    frames = np.array([labels[k] == n for k, n in order])
    return frames, [n for _, n in order], [(grid.affine @ [k, 0, 0, 1])[:3] for k, _ in order]


@pytest.fixture
def write_seg(tmp_path, write_multiframe):
    def write(labels, grid, **attributes):
        frames, segments, positions = frames_of(labels, grid)
        orientation, spacing = plane_of(grid)
        given = {"orientation": orientation, "spacing": spacing, "segments": segments} | attributes
        return write_multiframe(tmp_path / "seg.dcm", frames, positions, **given)

    return write


# ---- where frames lie


@pytest.mark.parametrize("code", ["SPL", "IAR", "PIL", "LSA"])
@pytest.mark.parametrize("grid", [
    pytest.param(make_grid(), id="axial"), pytest.param(make_grid((20, -35, 10)), id="oblique"),
    pytest.param(make_grid(tilt_mm=0.9), id="tilted"), pytest.param(make_grid((-15, 5, 80), tilt_mm=1.1), id="both"),
])  # fmt: skip
def test_every_voxel_keeps_its_place(write_seg, grid, code):
    """Shuffled frames, none for empty slices, in a scan that the reader has turned into any orientation."""
    labels = make_labels()
    scan = orient(grid, code)
    found = read_labels(write_seg(labels, grid), scan)
    truth = orient(replace(grid, voxels=labels, kind="label"), code)
    np.testing.assert_array_equal(found.volume.voxels, truth.voxels)
    assert scan.affine is not None
    assert found.volume.affine is not None
    assert np.array_equal(found.volume.affine, scan.affine)
    assert (found.volume.kind, found.volume.unit, found.volume.voxels.dtype) == ("label", "", np.uint8)
    assert found.names == {1: "part 1", 2: "part 2", 3: "part 3"}
    assert found.notes == ()


def test_frames_drawn_in_another_direction(tmp_path, write_multiframe):
    """Rows from right to left, then rows and columns exchanged: the same voxels."""
    grid, labels = make_grid((10, 20, 30)), make_labels()
    assert grid.affine is not None
    orientation, spacing = plane_of(grid)
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    frames = np.array([labels[k] == 1 for k in range(3)])
    far = [(grid.affine @ [k, 0, SHAPE[2] - 1, 1])[:3] for k in range(3)]
    mirrored = write_multiframe(tmp_path / "a", frames[:, :, ::-1], far, orientation=[*(-row), *column],
                                spacing=spacing, segments=[1] * 3)  # fmt: skip
    near = [(grid.affine @ [k, 0, 0, 1])[:3] for k in range(3)]
    exchanged = write_multiframe(tmp_path / "b", frames.transpose(0, 2, 1), near, orientation=[*column, *row],
                                 spacing=spacing[::-1], segments=[1] * 3)  # fmt: skip
    for path in (mirrored, exchanged):
        np.testing.assert_array_equal(read_labels(path, grid).volume.voxels, labels == 1)


def test_a_reformat_across_the_slices(tmp_path, write_multiframe):
    """A sagittal frame on an axial scan lies in one column of all its slices."""
    grid = make_grid()
    assert grid.affine is not None
    frame = np.random.default_rng(1).random((SHAPE[0], SHAPE[1])) < 0.4
    orientation = [0, 1, 0, 0, 0, 1]  # columns go posterior, rows go up
    path = write_multiframe(tmp_path / "s", frame[None], [(grid.affine @ [0, 0, 7, 1])[:3]],
                            orientation=orientation, spacing=[3.0, 0.8], segments=[1])  # fmt: skip
    found = read_labels(path, grid).volume.voxels
    np.testing.assert_array_equal(found[:, :, 7], frame)
    assert found.sum() == frame.sum()


def test_a_part_of_the_slice(tmp_path, write_multiframe):
    """Frames that cover a corner of the scan, or reach beyond it: what lies beside is counted."""
    grid, labels = make_grid((20, -35, 10)), make_labels()
    assert grid.affine is not None
    orientation, spacing = plane_of(grid)
    part = np.array([labels[k, 4:, 5:] == 2 for k in (1, 2)])
    where = [(grid.affine @ [k, 4, 5, 1])[:3] for k in (1, 2)]
    path = write_multiframe(tmp_path / "p", part, where, orientation=orientation, spacing=spacing, segments=[1, 1])
    np.testing.assert_array_equal(read_labels(path, grid).volume.voxels, labels == 2)
    where = [(grid.affine @ [k, 4, 5 + shift, 1])[:3] for k, shift in ((1, 0), (2, 3))]  # each with its own offset
    path = write_multiframe(tmp_path / "o", part, where, orientation=orientation, spacing=spacing, segments=[1, 1])
    truth = (labels == 2).astype(int)
    truth[2] = np.roll(truth[2], 3, axis=1)
    np.testing.assert_array_equal(read_labels(path, grid).volume.voxels, truth)
    where = [(grid.affine @ [k, 4, 9, 1])[:3] for k in (1, 2)]
    path = write_multiframe(tmp_path / "q", part, where, orientation=orientation, spacing=spacing, segments=[1, 1])
    assert read_labels(path, grid).notes == ()  # two columns fit
    where = [(grid.affine @ [k, 4, 10, 1])[:3] for k in (1, 2)]
    path = write_multiframe(tmp_path / "r", part, where, orientation=orientation, spacing=spacing, segments=[1, 1])
    found = read_labels(path, grid)
    assert found.notes == ("outside: 16 of 32 pixels lie beside the scan",)
    assert int(found.volume.voxels.sum()) == 16


@pytest.mark.parametrize("factor", [0.5, 1.7])
def test_another_pixel_size_keeps_the_place(tmp_path, write_multiframe, factor):
    """A disc drawn with finer or coarser pixels, turned within the plane: centroid and area in mm stay."""
    grid = make_grid((20, -35, 10), shape=(3, 60, 80))
    assert grid.affine is not None
    row, column = (np.array(v) for v in np.reshape(plane_of(grid)[0], (2, 3)))
    angle = np.radians(25)
    along, down = np.cos(angle) * row + np.sin(angle) * column, -np.sin(angle) * row + np.cos(angle) * column
    step = np.array([0.8, 0.5]) * factor
    centre = (grid.affine @ [1, 31.3, 44.8, 1])[:3]
    rows, columns = 81, 121
    corner = centre - down * step[0] * 40.2 - along * step[1] * 60.4
    y, x = np.mgrid[:rows, :columns]
    disc = np.hypot((y - 40.2) * step[0], (x - 60.4) * step[1]) < 9
    path = write_multiframe(tmp_path / "d", disc[None], [corner], orientation=[*along, *down], spacing=step.tolist(),
                            segments=[1])  # fmt: skip
    found = read_labels(path, grid).volume.voxels
    assert found[[0, 2]].sum() == 0
    np.testing.assert_allclose(np.argwhere(found[1]).mean(0), (31.3, 44.8), atol=0.5)
    assert int(found.sum()) * 0.8 * 0.5 == pytest.approx(np.pi * 81, rel=0.03)


@pytest.mark.parametrize(("k", "message"), [
    (0.4, r"a frame 0\.40 slice steps off the nearest slice"), (5.0, "a frame at slice 6 of a scan of 5"),
    (-1.0, "a frame at slice 0 of a scan of 5"),
])  # fmt: skip
def test_frames_off_the_scan_are_refused(tmp_path, write_multiframe, k, message):
    grid = make_grid((20, -35, 10))
    assert grid.affine is not None
    orientation, spacing = plane_of(grid)

    def write(k):
        where = [(grid.affine @ [k, 0, 0, 1])[:3]]
        return write_multiframe(tmp_path / "f", np.ones((1, 13, 11)), where, orientation=orientation, spacing=spacing,
                                segments=[1])  # fmt: skip

    with pytest.raises(ScanRefused, match=f"labels_off_grid: {message}"):
        read_labels(write(k), grid)
    assert read_labels(write(2.2), grid).volume.voxels[2].all()


def test_frames_that_lean_or_lie_beside_are_refused(tmp_path, write_multiframe):
    grid = make_grid(shape=(5, 60, 80))
    assert grid.affine is not None
    leaning = [np.cos(0.1), 0, np.sin(0.1), 0, 1, 0]
    path = write_multiframe(tmp_path / "f", np.ones((1, 60, 80)), [grid.affine[:3, 3]], orientation=leaning,
                            segments=[1])  # fmt: skip
    with pytest.raises(ScanRefused, match=r"labels_off_grid: .* slice steps off"):
        read_labels(path, grid)
    path = write_multiframe(tmp_path / "f", np.ones((1, 60, 80)), [grid.affine[:3, 3] + [500, 0, 0]], segments=[1])
    with pytest.raises(ScanRefused, match="labels_off_grid: all 4800 pixels lie beside the scan"):
        read_labels(path, grid)
    with pytest.raises(ScanRefused, match="no_geometry"):
        read_labels(path, replace(grid, affine=None))


def test_its_own_grid(write_seg, tmp_path, write_multiframe):
    grid, labels = make_grid((0, 0, 0), tilt_mm=0.9), make_labels()
    labels[3] = 2
    found = read_labels(write_seg(labels, grid), None).volume
    np.testing.assert_array_equal(found.voxels, labels)
    assert found.affine is not None
    assert grid.affine is not None
    np.testing.assert_allclose(found.affine, grid.affine, atol=1e-5)
    with pytest.raises(ScanRefused, match="missing_slices"):
        read_labels(write_seg(make_labels(), grid), None)  # slice 3 is not there


# ---- what frames mean


def test_overlapping_segments(tmp_path, write_multiframe):
    grid = make_grid()
    assert grid.affine is not None
    frames = np.zeros((3, 13, 11), bool)
    frames[0, :6], frames[1, 4:8], frames[2, 5:] = True, True, True
    where = [grid.affine[:3, 3]] * 3
    truth = np.repeat([1, 4, 9], [4, 1, 8])[:, None] * np.ones(11, int)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        path = write_multiframe(tmp_path / "o", frames[order], where, segments=[(1, 4, 9)[n] for n in order])
        found = read_labels(path, grid)
        np.testing.assert_array_equal(found.volume.voxels[0], truth)
        # row 4: 1 and 4; row 5: all three; rows 6, 7: 4 and 9
        assert found.notes == (f"overlaps: {11 * (1 + 2 + 2)} voxels went to the higher of two segments",)


def test_fractional_from_one_half(tmp_path, write_multiframe):
    grid = make_grid()
    assert grid.affine is not None
    values = (np.arange(143) % 101).astype(np.uint8).reshape(1, 13, 11)
    path = write_multiframe(tmp_path / "f", values, [grid.affine[:3, 3]], segments=[300], bits=8,
                            PixelData=values.tobytes(), SegmentationType="FRACTIONAL", MaximumFractionalValue=100)  # fmt: skip
    found = read_labels(path, grid).volume.voxels
    np.testing.assert_array_equal(found[0], np.where(values[0] >= 50, 300, 0))
    assert found.dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_maps(tmp_path, write_multiframe, dtype):
    grid, labels = make_grid((20, -35, 10)), make_labels().astype(dtype)
    assert grid.affine is not None
    orientation, spacing = plane_of(grid)
    order = [3, 0, 4, 2, 1]

    def write(stored, numbers=(1, 2, 3), **attributes):
        described = []
        for number in numbers:
            described.append(pydicom.Dataset())
            described[-1].SegmentNumber, described[-1].SegmentLabel = number, f"part {number}"
        return write_multiframe(
            tmp_path / "m", stored, [(grid.affine @ [k, 0, 0, 1])[:3] for k in order], orientation=orientation,
            spacing=spacing, bits=8 * np.dtype(dtype).itemsize, SegmentationType="LABELMAP",
            SOPClassUID=seg.LABEL_MAP, PixelData=stored.tobytes(), SegmentSequence=described, **attributes,
        )  # fmt: skip

    np.testing.assert_array_equal(read_labels(write(labels[order]), grid).volume.voxels, labels)
    padded = np.where(labels == 0, 255, labels).astype(dtype)
    for numbers in ((1, 2, 3), (1, 2, 3, 255)):  # writers may describe the background, too
        found = read_labels(write(padded[order], numbers, PixelPaddingValue=255), grid)
        np.testing.assert_array_equal(found.volume.voxels, labels)
        assert set(found.names) == {1, 2, 3}
    with pytest.raises(ScanRefused, match="other_format: segment number 0 is a structure"):
        read_labels(write(labels[order], (0, 1, 2, 3), PixelPaddingValue=255), grid)
    with pytest.raises(ScanRefused, match=f"corrupt: {int((padded[3] == 255).sum())} pixels name no described"):
        read_labels(write(padded[order]), grid)


# ---- encodings


def packbits(data: bytes) -> bytes:
    """RLE of one segment (PS3.5 G.3): replicate runs of equal bytes, literal runs of one byte."""
    out, at = bytearray(), 0
    while at < len(data):
        run = 1
        while run < 128 and data[at : at + run + 1] == data[at : at + 1] * (run + 1):
            run += 1
        out += bytes([257 - run if run > 1 else 0, data[at]])
        at += run
    return b"\1\0\0\0\x40\0\0\0" + bytes(56) + bytes(out) + bytes(len(out) % 2)


@pytest.mark.parametrize("packed", [True, False])
def test_run_length_encoded_bits(write_seg, packed):
    grid, labels = make_grid(), make_labels()
    path = write_seg(labels, grid)
    data = pydicom.dcmread(path)
    frames = data.pixel_array
    pack = (lambda f: np.packbits(f.ravel(), bitorder="little").tobytes()) if packed else (lambda f: f.tobytes())
    data.PixelData = encapsulate([packbits(pack(f)) for f in frames])
    data.file_meta.TransferSyntaxUID = RLELossless
    data.save_as(path)
    np.testing.assert_array_equal(read_labels(path, grid).volume.voxels, labels)
    data.PixelData = encapsulate([packbits(pack(f)[:9]) for f in frames])
    data.save_as(path)
    with pytest.raises(ScanRefused, match=r"cannot_decode: RLE Lossless \(ValueError\)"):
        read_labels(path, grid)


def test_run_lengths_as_the_standard_writes_them():
    """PS3.5 G.3.1: literal runs, replicate runs, and −128, which stands for nothing."""
    stream = bytes([2, 0x0F, 0x00, 0x81, 128, 254, 0xAA, 128, 0, 0x01])
    bits = [0x0F, 0x00, 0x81, 0xAA, 0xAA, 0xAA, 0x01]
    wanted = [(byte >> n) & 1 for byte in bits for n in range(8)]
    assert rle_bits(b"\1\0\0\0\x40\0\0\0" + bytes(56) + stream, 55).tolist() == wanted[:55]


def test_a_run_length_stream_cannot_grow_beyond_its_frame():
    stream = b"\1\0\0\0\x40\0\0\0" + bytes(56) + bytes([129, 1]) * 100_000
    assert rle_bits(stream, 143).tolist() == [1] * 143


def test_deflated(write_seg):
    grid, labels = make_grid(), make_labels()
    path = write_seg(labels, grid)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path)
    np.testing.assert_array_equal(read_labels(path, grid).volume.voxels, labels)


# ---- broken files


def drop_position(data):
    del data.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence


def drop_segment(data):
    data.SegmentSequence = data.SegmentSequence[:1]


def other_syntax(data):
    data.PixelData = encapsulate([b"\0" * 20] * 6)
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"


@pytest.mark.parametrize(("edit", "message"), [
    (lambda d: setattr(d, "NumberOfFrames", 999_999_999), "corrupt: 999999999 frames, 6 of them described"),
    (lambda d: (setattr(d, "Rows", 65535), setattr(d, "Columns", 65535)), "too_large: 6×65535×65535"),
    (lambda d: setattr(d, "Rows", 14), "truncated: 108 of 116 bytes"),
    (drop_position, "no_geometry"),
    (drop_segment, r"corrupt: [1-6] of 6 frames name no described segment"),
    (lambda d: delattr(d, "PixelData"), "truncated: no pixel data"),
    (other_syntax, "cannot_decode: MPEG-4"),
    (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.66.5"), "other_object: Surface Segmentation"),
])  # fmt: skip
def test_broken_segmentations_are_refused(write_seg, edit, message):
    grid = make_grid()
    path = write_seg(make_labels(), grid)
    data = pydicom.dcmread(path)
    edit(data)
    data.save_as(path)
    with pytest.raises(ScanRefused, match=message):
        read_labels(path, grid)


def test_a_broken_syntax_is_refused_without_a_word(write_seg):
    """pydicom would warn, with the value in the message; warnings are errors here."""
    path = write_seg(make_labels(), make_grid())
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1/2.840.10008.1.2.1\0"))
    with pytest.raises(ScanRefused, match="cannot_decode: unknown transfer syntax"):
        read_labels(path, make_grid())


# ---- real data


def test_a_liver_lies_in_its_ct(real_data, key, tmp_path):
    """Each frame lands in the slice whose SOPInstanceUID it names as its source: an answer that positions do not give."""
    folder = real_data / "dicom" / "seg_liver_ct"
    scan = read_scan(next(e for e in find(folder, key) if e.used))
    found = read_labels(folder / "liver_seg.dcm", scan)
    assert found.names == {1: "Liver"}
    files = {d.SOPInstanceUID: d for d in (pydicom.dcmread(p) for p in folder.glob("0?.dcm"))}
    data = pydicom.dcmread(folder / "liver_seg.dcm")
    for frame, groups in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence):
        source = files[groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        hu = source.pixel_array * float(source.RescaleSlope) + float(source.RescaleIntercept)
        k = next(k for k in range(3) if np.array_equal(scan.voxels[k], np.maximum(hu, -1024)))  # padding is air
        np.testing.assert_array_equal(found.volume.voxels[k], frame)
    assert (found.volume.voxels > 0).sum((1, 2)).tolist() == [36233, 35645, 35220]


def test_encodings_agree(real_data):
    folder = real_data / "dicom" / "seg_encodings"
    native = read_labels(folder / "liver.dcm", None).volume
    for name in ("liver_rle.dcm", "liver_j2k.dcm"):
        np.testing.assert_array_equal(read_labels(folder / name, None).volume.voxels, native.voxels)
    for grid in (None, native):
        cropped = read_labels(folder / "liver_nonbyte_aligned.dcm", grid).volume
        np.testing.assert_array_equal(cropped.voxels[:, :510, :510], native.voxels[:, :510, :510])
        assert cropped.voxels.sum() == native.voxels.sum()


def test_more_rows_than_columns(real_data, key, tmp_path):
    """24 columns, 38 rows; the image of this sample is its own mask."""
    folder = real_data / "dicom" / "seg_tiny_24x38x3"
    found = read_labels(folder / "seg" / "label.seg", None).volume
    assert found.shape == (3, 38, 24)
    for path in (folder / "image").glob("*.dcm"):
        data = pydicom.dcmread(path)
        k = round((float(data.ImagePositionPatient[2]) + 177.75) / 2.5)
        np.testing.assert_array_equal(found.voxels[k], data.pixel_array)
    shutil.copytree(folder / "image", tmp_path / "image")
    scan = read_scan(next(e for e in find(tmp_path / "image", key) if e.used))
    np.testing.assert_array_equal(read_labels(folder / "seg" / "label.seg", scan).volume.voxels, found.voxels)
