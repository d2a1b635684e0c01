"""RTSTRUCT → labels on the scan's grid: shapes of known area, written as contours in patient millimetres."""

from dataclasses import replace

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon
from pydicom.dataset import Dataset

from hilum.archive.dicom.rtstruct import STRUCTURE_SET, fill
from hilum.archive.intake import read_scan
from hilum.archive.labels import read_labels
from hilum.archive.scan import find
from hilum.errors import ScanRefused
from hilum.volume import Volume, orient

SHAPE = (6, 60, 80)


def make_grid(tilt_mm=0.0, oblique=True) -> Volume:
    """An empty scan of 3 × 0.8 × 0.5 mm, turned about two axes, its slices shifted along rows by tilt_mm each."""
    a, b = np.radians((25, -40)) if oblique else (0, 0)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = (about_z @ about_x)[:, ::-1] * (3.0, 0.8, 0.5)
    affine[:3, 0] += (about_z @ about_x)[:, 1] * tilt_mm
    affine[:3, 3] = (-31.5, 17.25, 102.125)
    return Volume(voxels=np.zeros(SHAPE, np.int16), affine=affine, modality="CT", unit="HU")


def to_mm(grid: Volume, k: float, corners: np.ndarray) -> np.ndarray:
    """Corners (N, 2) as indices (j, i) in the plane of slice k → LPS mm (N, 3)."""
    assert grid.affine is not None
    corners = np.asarray(corners, float)
    return np.column_stack([np.full(len(corners), k), corners, np.ones(len(corners))]) @ grid.affine.T[:, :3]


def circle(centre, radius_mm, num=90) -> np.ndarray:
    """Corners as indices (j, i) of a circle on pixels of 0.8 × 0.5 mm."""
    angle = np.arange(num) * 2 * np.pi / num
    return np.column_stack([centre[0] + radius_mm * np.sin(angle) / 0.8, centre[1] + radius_mm * np.cos(angle) / 0.5])


def square(low, high) -> np.ndarray:
    return np.array([[low, low], [low, high], [high, high], [high, low]], float)


@pytest.fixture
def write_rtstruct(tmp_path, write_multiframe):
    """Write structures: name → list of contours in mm, or of (type, contour); ROI numbers as given, else 1, 2, …"""

    def write(structures, numbers=None, path=tmp_path / "rtss.dcm"):
        write_multiframe(path, np.zeros((1, 2, 2)), [(0, 0, 0)])
        old = pydicom.dcmread(path)
        data = Dataset()
        data.file_meta, data.SOPClassUID, data.SOPInstanceUID = old.file_meta, STRUCTURE_SET, old.SOPInstanceUID
        data.Modality, data.StructureSetROISequence, data.ROIContourSequence = "RTSTRUCT", [], []
        for number, (name, contours) in zip(numbers or range(1, 99), structures.items()):
            roi, drawn = Dataset(), Dataset()
            roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber = number, name, number
            drawn.ContourSequence = []
            for contour in contours:
                kind, points = contour if isinstance(contour, tuple) else ("CLOSED_PLANAR", contour)
                item = Dataset()
                item.ContourGeometricType, item.NumberOfContourPoints = kind, len(points)
                item.ContourData = [f"{v:.4f}" for v in np.asarray(points).ravel()]
                drawn.ContourSequence.append(item)
            data.StructureSetROISequence.append(roi)
            if contours:
                data.ROIContourSequence.append(drawn)
        data.save_as(path, enforce_file_format=True)
        return path

    return write


# ---- filling


def test_filling_agrees_with_an_independent_test_of_points():
    """Stars with random corners, also far outside: matplotlib's point-in-polygon says the same of every voxel centre."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :50]
    centres = np.column_stack([y.ravel(), x.ravel()])
    for _ in range(50):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 30)))
        radius = rng.uniform(2, 60, len(angle))
        star = np.column_stack([15 + radius * np.sin(angle), 30 + radius * np.cos(angle)])
        wanted = Polygon(np.vstack([star, star[:1]]), closed=True).contains_points(centres).reshape(40, 50)
        np.testing.assert_array_equal(fill([star], (40, 50)), wanted)


def test_neighbours_share_no_voxel_and_leave_none_out():
    """Corners on voxel centres: two squares with a common edge fill their union once, whichever way they are drawn."""
    left, right = np.array([[2, 1], [2, 4], [6, 4], [6, 1.0]]), np.array([[2, 4], [2, 9], [6, 9], [6, 4.0]])[::-1]
    one, two = fill([left], (9, 12)), fill([right], (9, 12))
    assert not (one & two).any()
    assert one.sum() == 4 * 3
    assert (one | two).sum() == 4 * 8


def test_many_edges_are_filled_in_parts():
    ring = circle((30.2, 40.1), 18, num=10_007)
    assert fill([ring], (60, 80)).sum() * 0.4 == pytest.approx(np.pi * 324, rel=0.005)


# ---- on the slices


@pytest.mark.parametrize("code", ["SPL", "ARI", "LIP"])
@pytest.mark.parametrize("tilt_mm", [0.0, 0.9])
def test_a_circle_has_its_area_and_place(write_rtstruct, code, tilt_mm):
    """Oblique and tilted, in a scan turned in any way: area within 1 %, centroid within half a pixel."""
    grid = make_grid(tilt_mm)
    middle, radius = (31.3, 44.8), 11.0
    path = write_rtstruct({"ball": [to_mm(grid, k, circle(middle, radius)) for k in (4, 1, 2, 3)]})
    found = read_labels(path, orient(grid, code))
    assert found.notes == ()
    assert found.names == {1: "ball"}
    voxels = orient(found.volume, "".join(grid.orientation)).voxels
    assert voxels.any((1, 2)).tolist() == [False, True, True, True, True, False]
    for k in (1, 2, 3, 4):
        assert abs(voxels[k].sum() * 0.4 - np.pi * radius**2) < 0.01 * np.pi * radius**2
    assert found.volume.affine is not None
    centroid = found.volume.affine @ [*np.argwhere(found.volume.voxels).mean(0), 1]
    wanted = to_mm(grid, 2.5, np.array([middle]))[0]
    assert np.abs(centroid[:3] - wanted).max() < 0.25


def test_holes_and_keyholes(write_rtstruct):
    """A square with a hole, as two contours and as one with a slit: 20² − 8² voxels; an island inside the hole counts."""
    grid = make_grid()
    outer, hole, island = square(9.5, 29.5), square(15.5, 23.5), square(18.5, 20.5)
    slit = np.vstack([outer, outer[:1], hole, hole[:1], outer[:1]])
    truth = np.zeros(SHAPE[1:], bool)
    truth[10:30, 10:30] = True
    truth[16:24, 16:24] = False
    rings = write_rtstruct({"ring": [to_mm(grid, 2, c) for c in (hole, outer)]})
    np.testing.assert_array_equal(read_labels(rings, grid).volume.voxels[2], truth)
    keyhole = write_rtstruct({"ring": [to_mm(grid, 2, slit)]})
    np.testing.assert_array_equal(read_labels(keyhole, grid).volume.voxels[2], truth)
    three = write_rtstruct({"ring": [to_mm(grid, 2, c) for c in (outer, hole, island)]})
    truth[19:21, 19:21] = True
    np.testing.assert_array_equal(read_labels(three, grid).volume.voxels[2], truth)


def test_contours_off_the_slices(write_rtstruct):
    """Half a step decides; contours beyond the scan are counted, and refused when there are no others."""
    grid = make_grid()
    box = square(9.5, 29.5)
    path = write_rtstruct({"a": [to_mm(grid, k, box) for k in (-0.6, -0.45, 2.4, 5.45, 5.6, 40)]})
    found = read_labels(path, grid)
    assert found.volume.voxels.any((1, 2)).tolist() == [True, False, True, False, False, True]
    assert found.notes == (
        "outside: 3 contours lie on no slice of the scan", "gaps: 3 slices between contours of one structure are empty",
    )  # fmt: skip
    path = write_rtstruct({"a": [to_mm(grid, k, box) for k in (-3, 7, 8)]})
    with pytest.raises(ScanRefused, match="labels_off_grid: none of 3 closed contours lies on a slice"):
        read_labels(path, grid)


def test_finer_contours_do_not_cancel(write_rtstruct):
    """Contours every 1.5 mm on slices every 3 mm: the plane of the slice counts, not the parity of two planes."""
    grid = make_grid()
    path = write_rtstruct({"a": [to_mm(grid, k, square(9.5, 29.5 + 4 * (k % 1))) for k in (1.0, 1.5, 2.0, 2.5, 3.0)]})
    found = read_labels(path, grid)
    assert found.volume.voxels.sum((1, 2)).tolist() == [0, 400, 400, 400, 0, 0]
    assert found.notes == ("between: 2 contours lie between slices, where a nearer plane counts",)


def test_what_has_no_area_and_what_leans_is_counted(write_rtstruct):
    grid = make_grid()
    box = to_mm(grid, 2, square(9.5, 29.5))
    leaning = box.copy()
    leaning[:2] += to_mm(grid, 4, square(9.5, 29.5))[:2] - box[:2]
    structures = {"a": [box, leaning, ("POINT", box[:1]), ("OPEN_NONPLANAR", box), box[:2]], "empty": []}
    found = read_labels(write_rtstruct(structures), grid)
    assert int(found.volume.voxels.sum()) == 400
    assert set(found.notes) == {
        "no area: 2 points or open contours left out",
        "no area: 1 closed contours of less than 3 points left out",
        "tilted: 1 contours lie across the slices and were left out",
    }
    assert found.names == {1: "a", 2: "empty"}
    with pytest.raises(ScanRefused, match="labels_off_grid: no closed contour in 1 structures"):
        read_labels(write_rtstruct({"a": [("POINT", box[:1])]}), grid)


def test_the_later_number_wins(write_rtstruct):
    grid = make_grid()
    structures = {"late": [to_mm(grid, 2, square(19.5, 39.5))], "early": [to_mm(grid, 2, square(9.5, 29.5))]}
    found = read_labels(write_rtstruct(structures, numbers=[300, 7]), grid)
    assert found.names == {7: "early", 300: "late"}
    assert np.unique(found.volume.voxels, return_counts=True)[1].tolist()[1:] == [300, 400]
    assert found.notes == ("overlaps: 100 voxels went to the later of two structures",)
    found = read_labels(write_rtstruct(structures, numbers=[4, 0]), grid)  # 0 is background: numbered anew
    assert found.names == {1: "early", 2: "late"}
    assert np.unique(found.volume.voxels, return_counts=True)[1].tolist()[1:] == [300, 400]


def test_broken_structure_sets_are_refused(write_rtstruct):
    grid = make_grid()
    box = to_mm(grid, 2, square(9.5, 29.5))
    with pytest.raises(ScanRefused, match="no_geometry: contours have no grid of their own"):
        read_labels(write_rtstruct({"a": [box]}), None)
    with pytest.raises(ScanRefused, match="no_geometry: the scan has no positions"):
        read_labels(write_rtstruct({"a": [box]}), replace(grid, affine=None))
    with pytest.raises(ScanRefused, match="corrupt: contour points that are no positions"):
        read_labels(write_rtstruct({"a": [box.ravel()[:11]]}), grid)
    path = write_rtstruct({"a": [box, np.full((4, 3), 123456789.0)]})
    for wrong in (b"123456789.0000", b"nan           ", b"here and there"):
        path.write_bytes(path.read_bytes().replace(b"123456789.0000", wrong))
        with pytest.raises(ScanRefused, match="corrupt"):
            read_labels(path, grid)
        path = write_rtstruct({"a": [box, np.full((4, 3), 123456789.0)]})
    path = write_rtstruct({"a": [box]})
    data = pydicom.dcmread(path)
    data.ROIContourSequence[0].ReferencedROINumber = 5
    data.save_as(path)
    with pytest.raises(ScanRefused, match="corrupt: contours of a structure that is not described"):
        read_labels(path, grid)


# ---- real data


def test_a_body_lies_in_its_ct(real_data, key):
    """One slice of 441 contours: the body holds nearly all tissue of the slice, and nearly no air of the room."""
    folder = real_data / "dicom" / "rt_ct_with_rtstruct"
    scan = read_scan(next(e for e in find(folder, key) if e.used))
    found = read_labels(folder / "rtss.dcm", scan)
    assert len(found.names) == 10
    assert found.notes == ("outside: 437 contours lie on no slice of the scan",)
    body = found.volume.voxels == 1
    assert (found.volume.voxels[~body] == 0).all()
    assert (scan.voxels[body] > -300).mean() > 0.97
    tissue = (scan.voxels > -200) & (scan.voxels < 200)
    assert (tissue & body).sum() > 0.9 * tissue.sum()
