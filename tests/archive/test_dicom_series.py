"""One series, several volumes; uneven steps; tilt: which slices go together is known because the test wrote them."""

import itertools

import numpy as np
import pytest

from hilum.archive import dicom
from hilum.archive.intake import read_entry, read_scan
from hilum.archive.policy import Policy
from hilum.archive.scan import find, scan
from hilum.volume import Volume, straighten

MR = "1.2.840.10008.5.1.4.1.1.4"


@pytest.fixture
def write_volume(write_series):
    """Write volume `n` of a series: values 1000 n + position number, so that every slice says where it belongs."""

    def write(n, num_slices=4, start=10.0, **attributes):
        edit = attributes.pop("edit", lambda k, d: None)
        voxels = np.empty((num_slices, 6, 5), np.uint16)
        voxels[:] = 1000 * n + np.arange(num_slices)[:, None, None]
        voxels[:, 0, 0] += 500  # no volume is constant

        def name(k, d):
            d.SOPInstanceUID = f"1.2.3.{n}.{k}"
            edit(k, d)

        attributes = {"SOPClassUID": MR, "RescaleIntercept": 0, "InstanceNumber": 1} | attributes
        return write_series(voxels, prefix=f"{n}_", start=(0, 0, start), edit=name, **attributes)

    return write


def volumes(entries):
    """Which volume number the slices of each entry carry."""
    found = [{int(v) // 1000 for v in np.unique(read_scan(e).voxels[:, 1, 1])} for e in entries if e.used]
    return sorted(found, key=min)


def test_two_attributes_together(write_volume, tmp_path, key):
    """Two echoes in two dynamics: neither attribute alone tells the four volumes apart."""
    for n, (echo, time) in enumerate(itertools.product((10.0, 80.0), (1, 2))):
        write_volume(n, EchoTime=echo, TemporalPositionIdentifier=time)
    found = scan(tmp_path / "archive", key)
    assert [e.split_by for e in found] == ["EchoTime,TemporalPositionIdentifier"] * 4
    assert volumes(found) == [{0}, {1}, {2}, {3}]
    assert len({e.key for e in found}) == 4


def test_overlapping_stations(write_volume, tmp_path, key):
    """Three acquisitions that overlap by one slice: no position has three slices, yet there are three volumes."""
    for n in range(3):
        write_volume(n, num_slices=5, start=10.0 + 8.0 * n, AcquisitionNumber=n + 1)
    found = scan(tmp_path / "archive", key)
    assert [(e.used, e.num_slices, e.split_by) for e in found] == [(True, 5, "AcquisitionNumber")] * 3
    assert volumes(found) == [{0}, {1}, {2}]


@pytest.mark.parametrize("order", ["volume after volume", "position after position"])
def test_only_the_numbers_tell(write_volume, tmp_path, key, order):
    for n in range(3):
        number = (lambda k, n=n: 10 * n + k) if order == "volume after volume" else (lambda k, n=n: 10 * k + n)
        write_volume(n, edit=lambda k, d, number=number: setattr(d, "InstanceNumber", number(k) + 1))
    found = scan(tmp_path / "archive", key)
    assert [(e.split_by, e.flags) for e in found] == [("InstanceNumber", ("split_by_order: 3 volumes",))] * 3
    assert volumes(found) == [{0}, {1}, {2}]


def test_numbers_without_order_are_no_proof(write_volume, tmp_path, key):
    numbers = iter([1, 5, 2, 8, 3, 4, 7, 6])
    for n in range(2):
        write_volume(n, edit=lambda k, d: setattr(d, "InstanceNumber", next(numbers)))
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.num_files) == ("duplicate_positions", 8)


def test_orientations_are_split_and_a_radial_scan_is_refused(write_volume, tmp_path, key):
    planes = {"SPL": ([1, 0, 0, 0, 1, 0], (0, 0, 3)), "PIL": ([1, 0, 0, 0, 0, -1], (0, 3, 0))}
    for n, (plane, step) in enumerate(planes.values()):
        write_volume(n, num_slices=20, ImageOrientationPatient=plane, step=step)
    found = scan(tmp_path / "archive", key)
    assert sorted(e.orientation for e in found) == sorted(planes)
    assert {e.split_by for e in found} == {"ImageOrientationPatient"}
    turned = lambda k, d: setattr(  # noqa: E731
        d, "ImageOrientationPatient", [round(float(v), 6) for v in (np.cos(k / 4), np.sin(k / 4), 0, 0, 0, -1)]
    )
    write_volume(9, num_slices=8, series="2", edit=turned)
    radial = [e for e in scan(tmp_path / "archive", key) if not e.used]
    assert [(e.reason, e.detail) for e in radial] == [("mixed_orientations", "8 orientations in 8 slices")]


def test_three_planes_at_right_angles_are_a_localizer(write_volume, tmp_path, key):
    for n, plane in enumerate(([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])):
        write_volume(n, num_slices=7, ImageOrientationPatient=plane, step=np.cross(plane[:3], plane[3:]) * 10.0)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.num_files) == ("localizer", 21)


def test_accepted_gap_is_interpolated(write_series, tmp_path, key):
    """Values rise linearly with z, so that interpolation has one right answer."""
    z = np.array([0.0, 3, 6, 12, 15, 18])
    voxels = np.broadcast_to((z * 10).astype(np.uint16)[:, None, None], (6, 4, 4)).copy()
    voxels[:, 0, 0] = 7
    paths = write_series(voxels, positions=[(0, 0, v) for v in z])
    (refused,) = find(tmp_path / "archive", key)
    assert refused.reason == "missing_slices"
    (small,) = find(tmp_path / "archive", key, policy=Policy(accept_gap_mm=5))
    assert small.reason == "missing_slices"
    policy = Policy(accept_gap_mm=6)
    (entry,) = find(tmp_path / "archive", key, policy=policy)
    assert (entry.verdict, entry.repairs) == ("repaired", ("uneven slices put on even steps of 3 mm",))
    vol, repairs = read_entry(entry, policy)
    assert repairs == ("1 of 7 slices interpolated",)
    assert vol.voxels[:, 2, 2].tolist() == [v - 1024 for v in range(0, 181, 30)]
    np.testing.assert_allclose(vol.spacing_mm, (3, 0.8, 0.5))
    with pytest.raises(Exception, match="missing_slices"):
        dicom.read(paths)


def test_two_spacings_are_put_on_even_steps(write_series, tmp_path, key):
    z = np.array([0.0, 4, 8, 12, 20, 28, 36])
    voxels = np.broadcast_to((z * 10).astype(np.uint16)[:, None, None], (7, 4, 4)).copy()
    voxels[:, 0, 0] = 7
    write_series(voxels, positions=[(0, 0, v) for v in z])
    policy = Policy(accept_gap_mm=8)
    (entry,) = find(tmp_path / "archive", key, policy=policy)
    vol, _ = read_entry(entry, policy)
    where = vol.affine[2, 3] + vol.affine[2, 0] * np.arange(vol.shape[0])
    np.testing.assert_allclose(where[[0, -1]], (0, 36))
    np.testing.assert_allclose(vol.voxels[:, 2, 2] + 1024, where * 10, atol=0.51)


def test_tilt_is_resampled_on_request(write_series, tmp_path, key):
    """A ball in patient space, sliced by a tilted gantry: after resampling it is the same ball."""
    tilt = np.radians(20)
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(tilt), -np.sin(tilt)])
    centre = np.array([30.0, 0, 40])
    k, j, i = np.indices((40, 60, 60))
    at = np.array([0.0, -30, 20])[:, None, None, None] + np.array([0, 0, 1.5])[:, None, None, None] * k
    at = at + row[:, None, None, None] * i + column[:, None, None, None] * j
    voxels = (1000 * (np.linalg.norm(at - centre[:, None, None, None], axis=0) < 15) + 24).astype(np.uint16)
    write_series(
        voxels, start=(0, -30, 20), step=(0, 0, 1.5), PixelSpacing=[1, 1], ImageOrientationPatient=[*row, *column]
    )
    (entry,) = find(tmp_path / "archive", key)
    assert entry.shear_deg == pytest.approx(20, abs=0.01)
    assert read_scan(entry).shear_deg == pytest.approx(20, abs=0.01)  # kept unless asked
    vol, repairs = read_entry(entry, Policy(resample_tilt=True))
    assert vol.shear_deg < 1e-6
    assert repairs == ("tilt of 20.00 degrees resampled to a right-angled box",)
    ball = np.argwhere(vol.voxels > -500)
    found = vol.affine[:3, :3] @ ball.mean(0) + vol.affine[:3, 3]
    np.testing.assert_allclose(found, centre, atol=0.3)
    volume = len(ball) * abs(np.linalg.det(vol.affine[:3, :3]))
    assert volume == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.05)


def test_straighten_of_a_right_angled_volume_changes_nothing():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (3.0, 2.0, 1.0), (5, 6, 7)
    vol = Volume(voxels=rng.integers(0, 99, (4, 5, 6)).astype(np.int16), affine=affine, modality="CT")
    same = straighten(vol, fill=0)
    np.testing.assert_array_equal(same.voxels, vol.voxels)
    np.testing.assert_allclose(same.affine, affine, atol=1e-9)


def test_frames_of_one_file_are_counted_once(key, tmp_path):
    from hilum.archive.dicom.header import Header
    from hilum.archive.dicom.series import entries

    frames = [
        Header(
            path=tmp_path / "one", size=1, series_uid="1.2", patient_id="P", study_uid="1", instance_uid="1.2.3",
            modality="MR", rows=4, columns=4, bits_allocated=16, position=(0.0, 0.0, float(n % 3)),
            orientation=(1.0, 0, 0, 0, 1, 0), pixel_spacing=(1.0, 1.0), frame=n, splits={"EchoTime": str(n // 3)},
        )
        for n in range(6)
    ]  # fmt: skip
    found = sorted(entries(frames, tmp_path, key), key=lambda e: e.frames)
    assert [(e.frames, e.num_slices) for e in found] == [((0, 1, 2), 3), ((3, 4, 5), 3)]
    assert sum(e.num_files for e in found) == 1
