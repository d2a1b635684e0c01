"""The doctor: letters, sides and millimetres of its pictures, and what it says about scans that are used or refused."""

import html
import itertools
import json
import re

import numpy as np
import pytest

from hilum import figures
from hilum.archive import workers
from hilum.archive.doctor import inspect as inspect_module
from hilum.archive.doctor import look as look_module
from hilum.archive.doctor.display import direction, middle_planes, oblique_deg, slice_panels
from hilum.archive.doctor.inspect import inspect, sparkline, terminal_text, verdict_lines, write_page
from hilum.archive.doctor.look import describe, look
from hilum.archive.ledger import Entry
from hilum.archive.prepare import prepare
from hilum.archive.reasons import REASONS
from hilum.archive.scan import find
from hilum.errors import InputError, UsageError
from hilum.volume import Volume

SIZE_MM = {"x": 40.0, "y": 60.0, "z": 90.0}  # right to left, front to back, feet to head
COUNT = {"x": 10, "y": 20, "z": 6}
# One bright voxel, as fractions of the field: near the right, front and head.
MARK = {"x": 0.15, "y": 0.225, "z": 0.75}
ORIENTATIONS = [
    (axes, signs) for axes in itertools.permutations("xyz") for signs in itertools.product((1, -1), repeat=3)
]


def marked(axes: tuple[str, ...], signs: tuple[int, ...]) -> Volume:
    """The same anatomy stored along `axes` with `signs` (1: towards left, posterior, superior): one bright voxel."""
    step = {a: SIZE_MM[a] / COUNT[a] for a in "xyz"}
    shape = tuple(COUNT[a] for a in axes)
    affine = np.eye(4)
    affine[:3, :3] = 0
    index = []
    for k, (axis, sign) in enumerate(zip(axes, signs)):
        row = "xyz".index(axis)
        affine[row, k] = sign * step[axis]
        affine[row, 3] = 0.5 * step[axis] if sign > 0 else SIZE_MM[axis] - 0.5 * step[axis]
        at = int(MARK[axis] * COUNT[axis])
        index.append(at if sign > 0 else COUNT[axis] - 1 - at)
    voxels = np.zeros(shape, np.int16)
    voxels[tuple(index)] = 1000
    return Volume(voxels=voxels, affine=affine, modality="MR")


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_planes_show_every_orientation_alike(axes, signs):
    """48 ways to store one anatomy: letters, sides and sizes are those of the patient, computed without `Volume`."""
    volume = marked(axes, signs)
    middle = {a: COUNT[a] // 2 for a in "xyz"}
    # Move the mark into each middle plane in turn: the plane must show it on the patient's side.
    for number, (cut, down, right, letters) in enumerate(
        (
            ("z", "y", "x", ("A", "P", "R", "L")),
            ("y", "z", "x", ("H", "F", "R", "L")),
            ("x", "z", "y", ("H", "F", "A", "P")),
        )
    ):
        axis = axes.index(cut)
        sign = signs[axis]
        mark = np.argwhere(volume.voxels)[0]
        mark[axis] = middle[cut] if sign > 0 else COUNT[cut] - 1 - middle[cut]
        voxels = np.zeros_like(volume.voxels)
        voxels[tuple(mark)] = 1000
        panel = middle_planes(Volume(voxels=voxels, affine=volume.affine, modality="MR"))[number]
        assert panel.edges == letters
        assert panel.size == pytest.approx((SIZE_MM[down], SIZE_MM[right]))
        y, x = np.argwhere(panel.pixels)[0] + 0.5
        from_top = 1 - MARK[down] if down == "z" else MARK[down]  # feet to head is drawn upwards
        assert (y / panel.pixels.shape[0], x / panel.pixels.shape[1]) == pytest.approx((from_top, MARK[right]))


def test_the_orientations_are_all_there():
    assert len({"".join(a) + str(s) for a, s in ORIENTATIONS}) == 48


@pytest.mark.parametrize(
    ("vector", "letters"),
    [
        ((1, 0, 0), "L"), ((-2, 0, 0), "R"), ((0, 1, 0), "P"), ((0, -1, 0), "A"), ((0, 0, 3), "H"), ((0, 0, -1), "F"),
        ((np.cos(0.33), np.sin(0.33), 0), "L"),  # 18.9°
        ((np.cos(0.37), np.sin(0.37), 0), "LP"),  # 21.2°
        ((-0.5, 0, -0.8), "FR"), ((0.1, -0.6, 0.7), "HA"),
    ],
)  # fmt: skip
def test_letters_of_a_direction(vector, letters):
    assert direction(np.array(vector, float)) == letters


def test_oblique_angle_is_that_of_the_rotation():
    angle = np.radians(25)
    affine = np.eye(4)
    affine[:3, :3] = [[0, -np.sin(angle), np.cos(angle)], [0, np.cos(angle), np.sin(angle)], [3, 0, 0]]
    assert oblique_deg(affine) == pytest.approx(25)
    panels = middle_planes(Volume(voxels=np.zeros((3, 4, 5), np.int16), affine=affine, modality="MR"))
    assert panels[0].edges == ("AL", "PR", "RA", "LP")


def test_an_image_without_geometry_has_no_letters():
    vol = Volume(voxels=np.arange(12, dtype=np.uint8).reshape(1, 3, 4), affine=None, modality="OT")
    (panel,) = middle_planes(vol)
    assert (panel.edges, panel.pixel_mm, panel.size) == ((), None, (3, 4))


def test_slices_are_evenly_taken():
    vol = Volume(voxels=np.arange(10, dtype=np.int16)[:, None, None] + np.zeros((1, 2, 2), np.int16), affine=np.eye(4),
                 modality="MR")  # fmt: skip
    assert [int(p.pixels[0, 0]) for p in slice_panels(vol, 5)] == [1, 3, 5, 7, 9]
    assert [int(p.pixels[0, 0]) for p in slice_panels(vol, 50)] == list(range(10))
    assert [p.title for p in slice_panels(vol, 1)] == ["6"]


# ---- what is said


@pytest.fixture
def here(monkeypatch):
    """Look in this process: starting another takes a second."""
    monkeypatch.setattr(inspect_module, "run", lambda function, items, _: workers.run(function, items, 1))


SECRETS = ("Secret", "P-001", "1.2.826", "archive", "im00")


def no_secret(text: str, tmp_path) -> None:
    plain = re.sub(r'base64,[^"]+', "", text)
    for secret in (*SECRETS, str(tmp_path)):
        assert secret not in plain.replace("whole archive", "")


def test_one_slice_stands_for_its_series(write_series, large, key, tmp_path):
    paths = write_series(large)
    write_series(large + 7, series="2", prefix="other", InstanceNumber=1)
    result = inspect(paths[3], key=key, out=tmp_path / "page.html")
    (record,) = result["scans"]
    assert result["num_rows"] == 1
    assert (record["verdict"], record["shape"], record["num_files"]) == ("used", [6, 18, 21], 6)
    assert record["geometry"]["spacing_mm"] == [2.0, 0.8, 0.5]
    assert record["geometry"]["orientation"] == "SPL"
    assert record["geometry"]["field_of_view_mm"] == [12.0, 14.4, 10.5]
    assert record["key"] == key.hash("series", "1.2.826.0.1.3680043.10.9999.1")
    values = large.astype(int) - 1024
    assert (record["values"]["min"], record["values"]["max"]) == (values.min(), values.max())
    assert record["values"]["percentiles"]["50"] == pytest.approx(np.median(values))
    assert sum(record["values"]["histogram"]["counts"]) == values.size
    text = terminal_text(result)
    assert "USED. Nothing had to be repaired." in text
    assert "rows down to posterior" in text
    assert max(map(len, text.splitlines())) <= 100
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 3  # planes, slices, histogram
    no_secret(page, tmp_path)
    no_secret(json.dumps(result), tmp_path)
    no_secret(text, tmp_path)


def test_a_folder_lists_all_and_shows_the_best_first(here, write_series, large, key, tmp_path):
    write_series(large)
    write_series(large, series="2", prefix="gap", positions=[(0, 0, z) for z in (0, 2, 4, 9, 11, 13)])
    (tmp_path / "archive" / "note.txt").write_text("Secret")
    result = inspect(tmp_path / "archive", key=key, out=tmp_path / "page.html")
    assert [row["reason"] for row in result["rows"]] == ["", "irregular_spacing", "not_an_image"]
    assert [record["verdict"] for record in result["scans"]] == ["used", "refused"]
    refused = result["scans"][1]
    assert refused["steps_mm"] == {"median": 2.0, "min": 2.0, "max": 5.0}
    assert refused["sentence"] == REASONS["irregular_spacing"].sentence
    assert refused["detail"] in " ".join(verdict_lines(refused))
    assert refused["advice"] == REASONS["irregular_spacing"].advice
    one = inspect(tmp_path / "archive", series=refused["key"][:6], key=key)
    assert [record["key"] for record in one["scans"]] == [refused["key"]]
    with pytest.raises(InputError, match="no scan begins with the key 'zz'"):
        inspect(tmp_path / "archive", series="zz", key=key)
    no_secret((tmp_path / "page.html").read_text(), tmp_path)
    text = terminal_text(result)
    assert max(map(len, text.splitlines())) <= 100
    assert "What to do:" in text


def test_refused_slices_are_drawn_in_the_order_of_their_positions(write_series, voxels, key, tmp_path):
    """The files are named against the order of their positions."""
    write_series(voxels, positions=[(0, 0, z) for z in (20, 11, 9, 4, 2, 0)], SliceThickness=2.0)
    (entry,) = find(tmp_path / "archive", key)
    shown = look(entry)
    assert entry.reason == "irregular_spacing"
    assert shown.steps == pytest.approx((2, 2, 5, 2, 9))
    assert shown.planes == ()
    wanted = voxels[::-1].astype(int) - 1024
    assert len(shown.slices) == 6
    for panel, pixels in zip(shown.slices, wanted):
        np.testing.assert_array_equal(panel.pixels, pixels)
        assert panel.pixel_mm == pytest.approx((0.8, 0.5))


def test_a_scan_without_any_picture_still_gets_a_page(here, write_series, voxels, key, tmp_path):
    paths = write_series(voxels)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-60])
    result = inspect(tmp_path / "archive", key=key, out=tmp_path / "page.html")
    assert result["scans"][0]["reason"] == "truncated"
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page
    assert html.escape(REASONS["truncated"].sentence) in page


def test_a_screenshot_is_never_drawn(write_series, voxels, key, tmp_path):
    """Burned-in names: what was set aside by its kind shows no pixels."""
    write_series(voxels[:1], SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT")
    (entry,) = find(tmp_path / "archive", key)
    shown = look(entry)
    assert (shown.record["reason"], shown.planes, shown.slices) == ("secondary_capture", (), ())


@pytest.mark.parametrize(("step", "drawn"), [(1.0, 3), (0.5, 0)])
def test_label_maps_are_drawn_when_they_hold_whole_numbers(tmp_path, key, step, drawn):
    """Both call themselves labels (intent code 1002); only the first can be read as such."""
    import nibabel as nib

    image = nib.Nifti1Image((np.arange(60).reshape(3, 4, 5) % 4 * step).astype(np.float32), np.eye(4))
    image.header.set_intent("label")
    nib.save(image, tmp_path / "labels.nii")
    (entry,) = find(tmp_path / "labels.nii", key)
    shown = look(entry)
    assert (shown.record["reason"], len(shown.planes)) == ("label_map", drawn)


def test_tilt_gaps_and_anisotropy_are_named(here, write_series, large, key, tmp_path):
    write_series(large, step=(0, 1.0, 5.0), SliceThickness=1.0)
    (record,) = inspect(tmp_path / "archive", key=key)["scans"]
    assert record["geometry"]["shear_deg"] == pytest.approx(np.degrees(np.arctan(1 / 5)), abs=0.01)
    remarks = " ".join(record["remarks"])
    assert "Sheared by 11.3°" in remarks
    assert "Anisotropic" in remarks
    assert {f["code"] for f in record["flags"]} >= {"gaps_between", "residual_identifiers"}
    assert "thick every 5 mm" in record["flags"][0]["numbers"]


def test_a_store_shows_one_of_its_scans(write_series, large, key, tmp_path):
    write_series(large)
    prepare(tmp_path / "archive", tmp_path / "store", key=key, num_workers=1)
    name = key.hash("series", "1.2.826.0.1.3680043.10.9999.1")
    result = inspect(f"{tmp_path / 'store'}:{name[:5]}", key=key, out=tmp_path / "page.html")
    assert [r["shape"] for r in result["scans"]] == [[6, 18, 21]]
    with pytest.raises(InputError, match="no scan begins with the key 'ffffffffff'"):
        inspect(f"{tmp_path / 'store'}:ffffffffff", key=key)
    with pytest.raises(UsageError, match="is a store; name one scan as"):
        inspect(tmp_path / "store", key=key)


def test_nothing_to_look_at(tmp_path, key):
    with pytest.raises(InputError, match="is missing; expected a file, a folder, or STORE:KEY"):
        inspect(tmp_path / "absent", key=key)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        inspect(tmp_path / "empty", key=key)


def test_a_reader_that_dies_is_a_verdict(write_series, voxels, key, tmp_path, monkeypatch):
    """The crash is one of the process that reads, not of the doctor."""
    write_series(voxels)
    monkeypatch.setattr(inspect_module, "run", lambda _, items, __: (pair for pair in [(items[0], workers.Crashed())]))
    (record,) = inspect(tmp_path / "archive", key=key)["scans"]
    assert (record["verdict"], record["reason"], record["fault"]) == ("refused", "reader_crashed", True)


def test_every_reason_can_be_told(tmp_path):
    """A page and a text for each reason of the ledger, with advice; nothing breaks on an entry without geometry."""
    looks = [describe(Entry(key=f"{n:016x}", reason=reason)) for n, reason in enumerate(REASONS)]
    rows = [{name: seen.record[name] for name in ("key", "verdict", "reason", "modality", "num_slices", "num_files")}
            for seen in looks]  # fmt: skip
    result = {"num_rows": len(looks), "rows": rows, "scans": [seen.record for seen in looks]}
    write_page(tmp_path / "page.html", looks, result)
    page = (tmp_path / "page.html").read_text()
    text = terminal_text(result)
    for reason in REASONS:
        assert html.escape(REASONS[reason].sentence) in page
        assert f"({reason})" in text
        assert REASONS[reason].advice.endswith(".")


def test_sparkline_heights_follow_the_counts():
    line = sparkline([0, 1, 10, 100, 1000], width=5)
    assert line[0] == " "
    assert line[4] == "█"
    assert list(line[1:]) == sorted(line[1:])
    assert len(sparkline(list(range(128)))) == 48


def test_the_sample_keeps_every_slice(monkeypatch):
    monkeypatch.setattr(look_module, "_SAMPLE", 100)
    vol = Volume(voxels=np.arange(6, dtype=np.int16)[:, None, None] + np.zeros((1, 30, 30), np.int16), affine=np.eye(4),
                 modality="MR")  # fmt: skip
    record = describe(Entry(key="k", reader="nifti", modality="MR"), vol).record
    assert record["values"]["mean"] == 2.5
    assert record["values"]["histogram"]["num_voxels"] < 150


# ---- real scans


def test_real_scans(here, real_data, key, tmp_path):
    canon = inspect(real_data / "dicom" / "mr_canon_dti", key=key)["scans"][0]
    assert canon["geometry"]["oblique_deg"] == pytest.approx(20, abs=0.5)
    tilt = inspect(real_data / "dicom" / "ct_gantry_tilt_variable_spacing_ge", key=key, out=tmp_path / "p.html")
    assert tilt["scans"][0]["reason"] == "irregular_spacing"
    assert (tmp_path / "p.html").read_text().count("<img") == 2  # slices and distances
    tumour = inspect(real_data / "nifti" / "mr_brain_tumour_pyradiomics" / "brain1_image.nii.gz", key=key)["scans"][0]
    assert tumour["geometry"]["spacing_mm"][0] == pytest.approx(6.5, abs=0.1)


def test_millimetres_reach_the_figure():
    """Pixels are drawn in millimetres with one scale for all panels."""
    panels = [figures.Panel(np.zeros((10, 20)), (3.0, 0.5), ("A", "P", "R", "L"), "a"),
              figures.Panel(np.zeros((40, 20)), (1.0, 2.0), ("H", "F", "R", "L"), "b")]  # fmt: skip
    figure = figures.planes(panels, (0, 1))
    scales = []
    for axes, panel in zip(figure.axes, panels):
        assert axes.get_aspect() == 1
        assert axes.get_images()[0].get_extent() == [0, panel.size[1], panel.size[0], 0]
        box = axes.get_position()
        width, height = figure.get_size_inches()
        scales += [box.width * width / panel.size[1], box.height * height / panel.size[0]]
        places = {t.get_text(): t.get_position() for t in axes.texts}
        top, bottom, left, right = (places[letter] for letter in panel.edges)
        assert top[1] < 0 < panel.size[0] < bottom[1]
        assert left[0] < 0 < panel.size[1] < right[0]
    assert scales == pytest.approx([scales[0]] * 4)
