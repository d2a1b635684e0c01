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


def verdicts(archive, key):
    """Of each row: reason, number of slices, distance of slices in mm, what split it."""
    return sorted(
        (e.reason, e.num_slices, round(e.spacing_mm[0], 3) if e.spacing_mm else 0.0, e.split_by)
        for e in find(archive, key)
    )


@pytest.mark.parametrize(("keyword", "values"), [("EchoTime", (10, 90)), ("ConvolutionKernel", ("B30f", "B80f"))])
def test_two_volumes_on_interleaved_positions_are_never_one(write_volume, tmp_path, key, keyword, values):
    for n, value in enumerate(values):
        write_volume(n, num_slices=10, start=10.0 + 1.0 * n, **{keyword: value})
    assert verdicts(tmp_path / "archive", key) == [("", 10, 2.0, keyword)] * 2
    assert volumes(find(tmp_path / "archive", key)) == [{0}, {1}]


def test_interleaved_passes_are_not_volumes(write_volume, tmp_path, key):
    """Two dynamics, each acquired in two passes of every other slice: four acquisition times, two volumes."""
    for n in range(2):
        write_volume(n, num_slices=10, edit=lambda k, d, n=n: setattr(d, "AcquisitionTime", f"12000{2 * n + k % 2}"),
                     TemporalPositionIdentifier=n + 1)  # fmt: skip
    assert verdicts(tmp_path / "archive", key) == [("", 10, 2.0, "TemporalPositionIdentifier")] * 2


def test_one_value_written_in_two_ways(write_volume, tmp_path, key):
    write_volume(0, edit=lambda k, d: setattr(d, "EchoTime", "4.6" if k % 2 else "4.60"))
    assert verdicts(tmp_path / "archive", key) == [("", 4, 2.0, "")]


@pytest.mark.parametrize("angle", [0.0012, 0.003])
def test_orientations_that_waver_are_one_stack(write_volume, tmp_path, key, angle):
    turned = lambda k, d: setattr(  # noqa: E731
        d, "ImageOrientationPatient", [1, 0, 0, 0, round(float(np.cos(angle * (k % 2))), 8), round(angle * (k % 2), 8)]
    )
    write_volume(0, num_slices=20, edit=turned)
    assert verdicts(tmp_path / "archive", key) == [("", 20, 2.0, "")]


def test_two_orientations_in_turn_are_refused(write_volume, tmp_path, key):
    turned = lambda k, d: setattr(  # noqa: E731
        d, "ImageOrientationPatient", [1, 0, 0, 0, round(float(np.cos(0.03 * (k % 2))), 8), round(0.03 * (k % 2), 8)]
    )
    write_volume(0, num_slices=20, edit=turned)
    ((reason, num, _, _),) = verdicts(tmp_path / "archive", key)
    assert (reason, num) == ("mixed_orientations", 20)


def test_pixel_spacing_written_with_other_digits(write_volume, tmp_path, key):
    write_volume(
        0, num_slices=20, edit=lambda k, d: setattr(d, "PixelSpacing", [("0.68359375", "0.683594")[k % 2]] * 2)
    )
    assert [row[:3] for row in verdicts(tmp_path / "archive", key)] == [("", 20, 2.0)]


@pytest.mark.parametrize("step", [0.625, 0.9375, 1.25])
def test_positions_rounded_to_a_tenth_of_a_millimetre(write_series, tmp_path, key, step):
    voxels = np.arange(40 * 30, dtype=np.uint16).reshape(40, 6, 5)
    write_series(voxels, positions=[(0, 0, round(step * k, 1)) for k in range(40)])
    ((reason, num, spacing, _),) = verdicts(tmp_path / "archive", key)
    assert (reason, num) == ("", 40)
    assert spacing == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize("gone", [1, 20, 38])
def test_one_missing_slice_shows_also_in_rounded_positions(write_series, tmp_path, key, gone):
    voxels = np.arange(40 * 30, dtype=np.uint16).reshape(40, 6, 5)
    write_series(np.delete(voxels, gone, 0), positions=[(0, 0, round(0.625 * k, 1)) for k in range(40) if k != gone])
    ((reason, *_),) = verdicts(tmp_path / "archive", key)
    assert reason in ("missing_slices", "irregular_spacing")


def test_two_spacings_are_not_missing_slices(write_series, tmp_path, key):
    z = [*np.arange(20) * 2.5, *(47.5 + 5.0 * np.arange(1, 11))]
    write_series(np.arange(900, dtype=np.uint16).reshape(30, 6, 5), positions=[(0, 0, v) for v in z])
    assert [row[0] for row in verdicts(tmp_path / "archive", key)] == ["irregular_spacing"]


def test_a_stray_image_leaves_the_others_alone(write_volume, tmp_path, key):
    write_volume(0, num_slices=10)
    write_volume(1, num_slices=1, ImagePositionPatient=None)
    assert [row[:2] for row in verdicts(tmp_path / "archive", key)] == [("", 10), ("no_geometry", 1)]


@pytest.mark.parametrize("num", [2, 10])
def test_slices_sent_again_under_other_identifiers(write_volume, tmp_path, key, num):
    number = lambda k, d: setattr(d, "InstanceNumber", k + 1)  # noqa: E731
    write_volume(0, num_slices=10, edit=number, ContentTime="120000.1")
    write_volume(1, num_slices=num, edit=number, ContentTime="120000.1")
    found = verdicts(tmp_path / "archive", key)
    assert [row[:2] for row in found] == [("", 10), ("duplicate_instance", num)]


def test_one_instance_identifier_on_all_slices_loses_none(write_volume, tmp_path, key):
    write_volume(0, num_slices=10, edit=lambda k, d: setattr(d, "SOPInstanceUID", "1.2.3"))
    assert verdicts(tmp_path / "archive", key) == [("", 10, 2.0, "")]


def test_the_shorter_of_two_stations_is_whole(write_volume, tmp_path, key):
    write_volume(0, num_slices=12, start=0, AcquisitionNumber=1)
    write_volume(1, num_slices=8, start=20, AcquisitionNumber=2)
    assert verdicts(tmp_path / "archive", key) == [
        ("", 8, 2.0, "AcquisitionNumber"),
        ("", 12, 2.0, "AcquisitionNumber"),
    ]


def test_frames_of_reference_are_kept_apart(write_volume, tmp_path, key):
    write_volume(0, start=0, FrameOfReferenceUID="1.1")
    write_volume(1, start=8, FrameOfReferenceUID="1.2")
    assert [row[:3] for row in verdicts(tmp_path / "archive", key)] == [("", 4, 2.0)] * 2


def test_an_impossible_tilt_is_refused(write_volume, tmp_path, key):
    write_volume(0, step=(0, 10.0, 0.5))
    assert [row[0] for row in verdicts(tmp_path / "archive", key)] == ["positions_not_on_a_line"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("CSA MIP", "derived"), ("CT_SOM5 MIP", "derived"), ("I", "derived"), ("R", ""), ("M", "")]
)
def test_projections_and_parts_of_a_signal(write_volume, tmp_path, key, kind, reason):
    write_volume(0, ImageType=["DERIVED", "SECONDARY", kind])
    assert [row[0] for row in verdicts(tmp_path / "archive", key)] == [reason]


def test_padding_that_uses_all_bits(write_series, tmp_path, key):
    """Padding −2000 in a file that stores 12 of 16 bits: air, not the value that its low bits would make."""
    stored = np.full((5, 8, 8), 1064, np.uint16)
    stored[:, :, 4:] = 24
    stored[:, 0, 0] = 63536
    paths = write_series(stored, BitsStored=12, HighBit=11, edit=lambda k, d: d.add_new(0x00280120, "US", 63536))
    vol, repairs = dicom.read(paths)
    assert np.unique(vol.voxels).tolist() == [-1024, -1000, 40]
    assert "5 padding pixels set to -1024 HU" in repairs


def test_a_slope_of_zero_is_refused(write_volume, tmp_path, key):
    write_volume(0, edit=lambda k, d: setattr(d, "RescaleSlope", 0 if k == 2 else 1))
    assert ("no_rescale", 1) in [row[:2] for row in verdicts(tmp_path / "archive", key)]
