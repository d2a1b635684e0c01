"""Every publisher's folder in its exact layout: which cases come out, and that voxels can be read."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from hilum.bench.catalogue.tasks import DATASETS, TASKS
from hilum.bench.datasets import READERS, read_cases, read_region, read_scan, read_truth, source_hash
from hilum.bench.nuisances import nuisances_of
from hilum.bench.task import Case
from hilum.volume import orient

sys.path.insert(0, str(Path(__file__).parent))
import publishers as made

sys.path.pop(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a maker, made once; whoever breaks it makes its own."""
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            made.MAKERS[name](known[name])
        return known[name]

    return folder


def said(case: Case) -> tuple[Any, ...]:
    """Target and split, as the tables below write them."""
    target = tuple(round(v, 3) for v in case.target)
    return (*target, case.split) if case.split else target


def organ(name: str, classes: tuple[str, ...]) -> int:
    return classes.index(name)


A1, A2 = TASKS["curiabench-2d:A1"].classes, TASKS["curiabench-2d:A2"].classes
TRAUMA = {"7/71": (1,), "8/80": (0,)}
FINDINGS = (1.0, 0.0, *[0.0] * 16)
NOT_SAID = (1.0, 0.0, 0.0, *[0.0] * 27)
ORGANS_CT = {
    "s1/liver": (organ("liver", A1), "train"), "s2/liver": (organ("liver", A1), "val"),
    "s3/liver": (organ("liver", A1), "test"), "s3/aorta": (organ("aorta", A1), "test"),
}  # fmt: skip
HUB = {
    "train/0": (0, "train"),
    "train/1": (1, "train"),
    "train/2": (0, "train"),
    "validation/0": (0, "val"),
    "test/0": (0, "test"),
}
BOTH = {
    f"{side}/{n}": (v, split)
    for side, split in (("train", "train"), ("val", "val"), ("test", "test"))
    for v, n in enumerate("ab")
}
# task → (maker, the cases that must come out)
EXPECTED: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "curiabench-2d:A1": ("TotalSegmentator", ORGANS_CT),
    "curiabench-3d:A1": ("TotalSegmentator", ORGANS_CT),
    "curiabench-2d:A2": (
        "TotalSegmentator-MRI",
        {k: (A2.index(k.split("/")[1]), v[1]) for k, v in ORGANS_CT.items()},
    ),
    "voxelfm:TotalSegmentator": ("TotalSegmentator-2", {"s1": ("train",), "s2": ("val",), "s3": ("test",)}),
    "curiabench-2d:A3": ("IXI", {"IXI002": (35.8,), "IXI012": (38.78,)}),
    "curiabench-3d:A3": ("IXI", {"IXI002": (35.8,), "IXI012": (38.78,)}),
    "curiabench-2d:O1": ("KiTS23", {"case_00000": (1,), "case_00001": (0,), "case_00002": (1,)}),
    "curiabench-2d:O2": ("LUNA16", {"1.3.1/1": (1,)}),
    "curiabench-3d:O2": ("LUNA16", {"1.3.1/1": (1,)}),
    "curiabench-2d:O3": ("DeepLesion", {"000001_01_01/109/1": (2, "train"), "000004_01_01/109/4": (7, "test")}),
    "curiabench-3d:O4": ("TCGA-KIRC", {"TCGA-B0-1": (400, 1), "TCGA-B0-2": (900, 0)}),
    "curiabench-2d:M3": (
        "RSNA-Lumbar",
        {"11/spinal_canal_stenosis_l1_l2": (0,), "11/spinal_canal_stenosis_l2_l3": (2,)},
    ),
    "curiabench-3d:M4": ("KneeMRI", {"0/1": (0,), "1/1": (1,), "2/1": (2,)}),
    "curiabench-2d:E1": ("RSNA-ICH", {f"ID_{n}a": (int(n == 1),) for n in range(6)}),
    "curiabench-3d:E1": ("RSNA-ICH", {"1.2.0": (1,), "1.2.1": (0,)}),
    "curiabench-2d:E2": ("RSNA-Abdominal-Trauma", TRAUMA),
    "curiabench-3d:E2": ("RSNA-Abdominal-Trauma", TRAUMA),
    "curiabench-2d:E3": (
        "EMIDEC",
        {f"Case_N006/{z}": (0,) for z in range(1, 6)} | {f"Case_P001/{z}": (int(z in (2, 3)),) for z in range(1, 6)},
    ),
    "curiabench-3d:E3": ("EMIDEC", {"Case_N006": (0,), "Case_P001": (1,)}),
    # the middle of 40 slices lies between 19 and 20; a lesion in 20 to 23 leaves 10 (10 mm away) as the nearest
    "curiabench-2d:E4": ("ATLAS-R2", {f"sub-r00{n}s001/{z}": (y,) for n in (1, 2) for z, y in ((22, 1), (10, 0))}),
    "curiabench-2d:I": (
        "COVIDx-CT",
        {
            "NCP_96_1328_0032.png": (2, "train"), "NCP_96_1328_0033.png": (2, "train"), "Normal_7_1_0001.png": (0, "train"),
            "CP_3_4_0007.png": (1, "val"), "ncovr-a_17.png": (2, "test"), "Normal_9_1_0002.png": (0, "test"),
        },
    ),
    "curiabench-3d:N": ("OASIS-1", {"OAS1_0001_MR1": (0,), "OAS1_0002_MR1": (0,), "OAS1_0003_MR1": (1,)}),
    "voxelfm:Merlin": ("Merlin", {f"AC42{n}": (*NOT_SAID, s) for n, s in enumerate(("train", "val", "test"))}),
    "voxelfm:CT-RATE": (
        "CT-RATE",
        {
            "train_1_a_1": (*FINDINGS, "train"), "train_1_a_2": (*FINDINGS, "train"), "train_2_a_1": (*[0.0] * 18, "train"),
            "valid_1_a_1": (*FINDINGS, "test"), "valid_1_a_2": (*FINDINGS, "test"), "valid_2_b_1": (*[0.0] * 18, "test"),
        },
    ),
    "voxelfm:CT-RATE-retrieval": (
        "CT-RATE",
        {"train_1_a_1": (*FINDINGS, "train"), "valid_1_a_1": (*FINDINGS, "test")},
    ),
    "voxelfm:RSNA-STR": ("RSNA-STR", {"1.1.5": (1,), "1.2.5": (0,)}),
    "voxelfm:iCTCF-Covid": ("iCTCF", {"Patient_1": (1,), "Patient_2": (0,)}),
    "voxelfm:iCTCF-severity": ("iCTCF", {"Patient_1": (1,), "Patient_2": (0,), "Patient_3": (0,)}),
    "voxelfm:Mycobacterial": ("Mycobacterial", {"NTMNiFTi/1": (0,), "TBNifTI/2": (1,)}),
    "voxelfm:OSIC": ("OSIC", {"1_0": (71.5,), "2_0": (93.0,)}),
    "voxelfm:NSCLC-Radiomics": ("NSCLC-Radiomics", {"LUNG1-001": (2165, 1), "LUNG1-002": (155, 0)}),
    "voxelfm:Mediastinal": ("Mediastinal-Lymph-Node-SEG", {"case_01": ()}),
    "voxelfm:AirRC": ("AirRC", {"1.3.1": (), "1.3.2": ()}),
    "curiabench-hub:kits": ("CuriaBench-tables", HUB),
    "curiabench-hub:luna16-3D": ("CuriaBench-folders", BOTH),
}  # fmt: skip


@pytest.mark.parametrize("task", EXPECTED)
def test_cases_of_a_whole_folder(task: str, folders: Callable[[str], Path]) -> None:
    """Every case that the publisher's files hold, with target and split; each can be read, and its region lies in its scan."""
    maker, expected = EXPECTED[task]
    root = folders(maker)
    found = read_cases(root, TASKS[task])
    assert {case.id: said(case) for case in found.cases} == expected
    assert [case.id for case in found.cases] == sorted(expected)
    if maker == "Mediastinal-Lymph-Node-SEG":
        return  # its SEG is a stand-in; `hilum.archive.labels` is tested by its own
    for case in found.cases:
        vol = read_scan(case)
        assert vol.modality == case.modality == TASKS[task].modality
        assert vol.unit == ("HU" if case.modality == "CT" else "")
        assert case.slices is None or max(case.slices) < vol.shape[0]
        if case.region is not None and TASKS[task].kind != "segmentation":
            inside = read_region(case.region, vol).voxels
            assert inside.any()
            if case.slices and "E3" not in task:
                areas = inside.sum(axis=(1, 2))
                assert areas[case.slices[0]] == areas.max()


@pytest.mark.parametrize(
    "task", ["curiabench-2d:A1", "curiabench-2d:O3", "curiabench-2d:A3", "curiabench-3d:E3", "voxelfm:RSNA-STR"]
)
def test_what_the_rules_leave_out_is_told_and_costs_nothing(task: str, folders: Callable[[str], Path]) -> None:
    """A folder as its publisher ships it is whole, though not everything in it has a label: a run need not be forced."""
    found = read_cases(folders(EXPECTED[task][0]), TASKS[task])
    assert sum(problem.cases for problem in found.problems) == 0
    assert bool(found.problems) == (task not in ("curiabench-2d:A1", "curiabench-3d:E3"))


def test_every_data_set_has_a_reader_and_is_tested() -> None:
    assert set(READERS) == set(DATASETS) == {task.dataset for task in TASKS.values()}
    assert {TASKS[task].dataset for task in EXPECTED} == set(DATASETS)


def test_the_slice_follows_the_content_however_the_file_is_stored(tmp_path: Path) -> None:
    """A scan stored mirrored, from head to feet and axes swapped gives the same slice, voxels and region."""
    made.kits23(tmp_path)
    folder = tmp_path / "KiTS23/dataset/case_00000"
    plain = read_cases(tmp_path, TASKS["curiabench-2d:O1"]).cases[0]
    scan, region = read_scan(plain), read_region(plain.region, read_scan(plain))
    for name in ("imaging", "segmentation"):
        image = nib.load(folder / f"{name}.nii.gz")
        voxels = np.asarray(image.dataobj)[::-1, :, ::-1]
        affine = image.affine.copy()
        affine[:3, 3] += affine[:3, 0] * (voxels.shape[0] - 1) + affine[:3, 2] * (voxels.shape[2] - 1)
        affine[:3, [0, 2]] *= -1
        nib.save(nib.Nifti1Image(voxels.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]]), folder / f"{name}.nii.gz")
    turned = read_cases(tmp_path, TASKS["curiabench-2d:O1"]).cases[0]
    assert turned.slices == plain.slices == (4,)
    np.testing.assert_array_equal(read_scan(turned).voxels, scan.voxels)
    np.testing.assert_array_equal(read_region(turned.region, read_scan(turned)).voxels, region.voxels)


def test_a_nodule_is_found_by_its_world_coordinates(folders: Callable[[str], Path]) -> None:
    """Voxel (20, 10, 30) by construction; its cube of 8 mm; in every crop it lies inside, at the same place of the patient."""
    root = folders("LUNA16")
    case = read_cases(root, TASKS["curiabench-2d:O2"]).cases[0]
    assert case.slices == (20,)
    assert case.region.box == ((19, 8, 28), (21, 12, 32))  # 4 mm around: 1.6 slices, 2 rows, 2 columns
    found = read_cases(root, TASKS["voxelfm:LUNA16"])
    assert [p.found for p in found.problems if p.cases] == ["missing", "nodule 4 lies outside"]
    assert {c.id.partition("_")[0] for c in found.cases} == {"1.3.1/1", "1.3.1/2", "1.3.2/3"}
    assert len(found.cases) == 18
    places = {"1": (0.0, -30.0, 150.0), "2": (10.0, 0.0, 130.0), "3": (0.0, -30.0, 150.0)}
    for crop in found.cases:
        vol = read_scan(crop)
        sizes = np.array(vol.shape) * vol.spacing_mm
        assert 39 <= sizes.min() <= sizes.max() <= 103
        np.testing.assert_allclose(
            vol.affine @ [*crop.target, 1.0], [*places[crop.id.split("/")[1][0]], 1.0], atol=1e-6
        )
        assert all(-0.5 <= t <= n - 0.5 for t, n in zip(crop.target, vol.shape))
    assert len({source_hash(crop.scan) for crop in found.cases}) == 18
    assert [c.scan.box for c in read_cases(root, TASKS["voxelfm:LUNA16"]).cases] == [c.scan.box for c in found.cases]


def test_a_point_of_a_sagittal_slice_stays_where_it_is(folders: Callable[[str], Path]) -> None:
    """x = 30, y = 20 of a slice whose rows run down: 10 mm to every side of that pixel, in the slice as it is read."""
    case = read_cases(folders("RSNA-Lumbar"), TASKS["curiabench-2d:M3"]).cases[0]
    vol = read_scan(case)
    stored = np.abs(made.scan(1, (1, 60, 60))[0])
    assert vol.shape == (1, 60, 60)
    inside = read_region(case.region, vol).voxels.astype(bool)
    assert inside.sum() == 21 * 21
    assert orient(vol, "LIP").voxels[inside].tolist() == vol.voxels[inside].tolist()  # already as radiologists see it
    np.testing.assert_array_equal(vol.voxels[0], stored)
    assert inside[0, 10:31, 20:41].all()


def test_publishers_forms_are_read_by_value(folders: Callable[[str], Path]) -> None:
    """DeepLesion's offset and spacing, scaled windows, Analyze in big-endian, pickles, hub rows: against the written voxels."""
    lesion = read_cases(folders("DeepLesion"), TASKS["curiabench-2d:O3"]).cases[0]
    vol = read_scan(lesion)
    np.testing.assert_array_equal(vol.voxels[0], made.scan(1)[0])
    assert vol.spacing_mm == (5.0, 0.7, 0.8)
    assert lesion.region.box == ((0, 3, 2), (0, 8, 6))
    tuberculosis = read_scan(read_cases(folders("Mycobacterial"), TASKS["voxelfm:Mycobacterial"]).cases[1])
    np.testing.assert_allclose(tuberculosis.voxels, np.clip(made.scan(2), -1350, 150), atol=0.01)
    brain = read_scan(read_cases(folders("OASIS-1"), TASKS["curiabench-3d:N"]).cases[0])
    np.testing.assert_array_equal(
        brain.voxels, np.abs(made.scan(1))[:, ::-1]
    )  # rows run to the back, the file's to the front
    assert brain.orientation == "SPL"
    knee = read_cases(folders("KneeMRI"), TASKS["curiabench-3d:M4"]).cases[1]
    np.testing.assert_array_equal(read_scan(knee).voxels, np.abs(made.scan(1)))
    assert knee.region.box == ((4, 3, 2), (6, 8, 6))
    row = read_cases(folders("CuriaBench-tables"), TASKS["curiabench-hub:kits"]).cases[-2]
    assert (row.id, row.patient) == ("train/2", "train1")
    np.testing.assert_array_equal(read_scan(row).voxels[0], made.scan(2)[0])
    assert read_region(row.region, read_scan(row)).voxels[0, 3:6, 4:7].all()
    volume = read_cases(folders("CuriaBench-folders"), TASKS["curiabench-hub:luna16-3D"]).cases[0]
    np.testing.assert_array_equal(read_scan(volume).voxels, made.scan(0))


def test_a_series_of_slices_in_one_folder_of_thousands(folders: Callable[[str], Path]) -> None:
    """Its own slices only, in the order of their positions; and one slice alone, without a thickness."""
    whole = read_cases(folders("RSNA-ICH"), TASKS["curiabench-3d:E1"]).cases[1]
    vol = read_scan(whole)
    np.testing.assert_array_equal(vol.voxels, [made.scan(n)[0] for n in (3, 4, 5)])
    assert vol.spacing_mm[0] == 5.0
    lone = next(c for c in read_cases(folders("RSNA-ICH"), TASKS["curiabench-2d:E1"]).cases if c.id == "ID_4a")
    np.testing.assert_array_equal(read_scan(lone).voxels[0], made.scan(4)[0])
    assert lone.patient == "p1"


def test_the_slice_of_an_injury_is_the_middle_by_position(folders: Callable[[str], Path]) -> None:
    """Listed are files 0, 1 and 3, from top to bottom: 1 is the middle one. Uninjured: the middle of all five."""
    cases = read_cases(folders("RSNA-Abdominal-Trauma"), TASKS["curiabench-2d:E2"]).cases
    assert [case.scan.path.name for case in cases] == ["1.dcm", "2.dcm"]


def test_the_truth_of_a_segmentation_is_numbered_by_class(folders: Callable[[str], Path]) -> None:
    task = TASKS["voxelfm:TotalSegmentator"]
    case = read_cases(folders("TotalSegmentator-2"), task).cases[2]
    truth = read_truth(task, case.region, read_scan(case)).voxels
    names = {task.classes[n - 1] for n in np.unique(truth) if n}
    assert names == {"liver", "aorta"}  # the liver lies over the crumbs of the spleen, whose number is lower
    aorta = made.mask((1, (0, 8), (6, 9), (6, 8))) > 0
    assert (truth[aorta] == task.classes.index("aorta") + 1).all()
    airway = read_cases(folders("AirRC"), TASKS["voxelfm:AirRC"]).cases[0]
    assert np.unique(read_truth(TASKS["voxelfm:AirRC"], airway.region, read_scan(airway)).voxels).tolist() == [0, 1, 4]


def test_label_maps_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of counts gives the same cases without opening the maps, holds no name, and notices a changed file."""
    made.kits23(tmp_path)
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    task, cache = TASKS["curiabench-2d:O1"], tmp_path / "cache"
    first = read_cases(tmp_path, task, cache=cache)
    assert "case_0" not in (cache / "label_areas_KiTS23.json").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("hilum.bench.datasets.grids.label_areas", lambda *_: pytest.fail("opened"))
        assert read_cases(tmp_path, task, cache=cache) == first
    other = made.mask((2, (6, 7), (3, 9), (3, 8)))
    made.nifti(tmp_path / "KiTS23/dataset/case_00000/segmentation.nii.gz", other)
    assert read_cases(tmp_path, task, cache=cache).cases[0].slices == (6,)


def test_ct_rate_ships_its_headers(folders):
    """The publisher's table comes first, the NIfTI header says the rest; a scan without a row has only that."""
    found = read_cases(folders("CT-RATE"), TASKS["voxelfm:CT-RATE"])
    first, second = nuisances_of(found.cases[:2])
    told = {"vendor": "SIEMENS", "kernel": "Br60f", "sex": "M", "age": 36.0, "field_of_view": 350.0}
    assert first == told | {name: second[name] for name in ("spacing", "thickness")}
    assert set(second) == {"spacing", "thickness", "field_of_view"}
