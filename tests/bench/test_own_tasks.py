"""A task of a user's own: every kind, every complaint, and the examples on real data."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hilum.bench.check import describe
from hilum.bench.datasets import read_region, read_scan, read_truth
from hilum.bench.nuisances import nuisances_of
from hilum.bench.own_tasks import read_own_task
from hilum.bench.splits import split_cases
from hilum.errors import UsageError
from hilum.metrics import METRICS

sys.path.insert(0, str(Path(__file__).parent))
import publishers as made

sys.path.pop(0)

EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"


def toml(folder: Path, kind: str, unit: str, metric: str, data: str, classes: str = '["a", "b"]') -> Path:
    path = folder / "mine.toml"
    path.write_text(
        f'[task]\ntitle = "Mine"\nkind = "{kind}"\nunit = "{unit}"\nmodality = "CT"\nmetric = "{metric}"\nclasses = {classes}\n'
        f'[data]\ntable = "cases.csv"\n{data}\n'
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two scans with masks and a table with a column for everything."""
    for n in (1, 2):
        made.nifti(tmp_path / f"scans/{n}.nii.gz", made.scan(n))
        made.nifti(tmp_path / f"masks/{n}.nii.gz", made.mask((1, (2, 5), (3, 6), (3, 7)), (2, (5, 6), (3, 9), (3, 8))))
    columns = ["scan", "patient", "label", "a", "b", "months", "dead", "x", "y", "z", "side", "slice", "mask", "number"]
    rows = [
        ["1.nii.gz", "A", "a", 1, "", 12.5, 1, -4.0, -7.0, 6.0, "fold1", 3, "1.nii.gz", 1],
        ["2.nii.gz", "B", "b", 0, 1, 30, 0, 3.0, 5.0, 4.0, "fold2", 4, "2.nii.gz", 2],
    ]
    made.table(tmp_path / "cases.csv", columns, rows)
    return tmp_path


PLACES = 'scan_folder = "scans"\nmask_folder = "masks"\n'


def test_a_table_of_classes(folder: Path) -> None:
    data = PLACES + 'split = "side"\ntrain = ["fold1"]\nval = []\ntest = ["fold2"]\nslice = "slice"'
    task, found = read_own_task(toml(folder, "classification", "slice", "accuracy", data))
    assert (task.id, task.suite, task.classes, task.chance) == (
        "own:mine",
        "own",
        ("a", "b"),
        METRICS["accuracy"].chance,
    )
    assert not found.problems
    assert [(c.patient, c.target, c.split, c.slices) for c in found.cases] == [
        ("A", (0,), "train", (3,)),
        ("B", (1,), "test", (4,)),
    ]
    assert read_scan(found.cases[1]).unit == "HU"


@pytest.mark.parametrize(
    ("kind", "metric", "label", "expected"),
    [
        ("multilabel", "auroc", '["a", "b"]', [(1.0, None), (0.0, 1.0)]),
        ("survival", "auroc", '["months", "dead"]', [(12.5, 1.0), (30.0, 0.0)]),
        ("regression", "r2", '["months"]', [(12.5,), (30.0,)]),
        # the made affine: voxel (k, j, i) lies at LPS (i, j, 2k) mm
        ("localisation", "r2", '["x", "y", "z"]', [None, (2.0, 5.0, 3.0)]),
    ],
)
def test_labels_of_every_kind(
    folder: Path, kind: str, metric: str, label: str, expected: list[tuple[float, ...]]
) -> None:
    _, found = read_own_task(toml(folder, kind, "volume", metric, PLACES + f"label = {label}"))
    seen = {c.patient: tuple(None if np.isnan(v) else pytest.approx(v) for v in c.target) for c in found.cases}
    assert seen == {patient: target for patient, target in zip("AB", expected) if target is not None}
    if kind == "localisation":
        assert found.problems[0].found == "row 1: a place outside of the scan"


def test_nuisances_of_a_table_go_before_those_of_the_header(folder: Path) -> None:
    """A column of numbers stays numbers, one with a word is words; of the header what the table does not say."""
    data = PLACES + 'slice = "slice"\nnuisances = ["months", "side", "a", "b"]'
    _, found = read_own_task(toml(folder, "classification", "slice", "accuracy", data))
    first, second = nuisances_of(found.cases)
    steps = read_scan(found.cases[0]).spacing_mm
    assert {name: first[name] for name in ("months", "side", "a")} == {"months": 12.5, "side": "fold1", "a": 1.0}
    assert "b" not in first
    assert second["b"] == 1.0
    assert (first["thickness"], first["spacing"]) == pytest.approx((steps[0], steps[1]), abs=1e-3)


def test_labels_from_masks(folder: Path) -> None:
    """Voxels of 2 mm³: 36 of label 1; its centre; the slice where label 2 covers most."""
    data = PLACES + 'mask = "mask"\nmask_values = [1]\nlabel_from = "mask volume"'
    _, found = read_own_task(toml(folder, "regression", "volume", "r2", data))
    assert [c.target[0] for c in found.cases] == pytest.approx([36 * 2 / 1000] * 2)
    data = PLACES + 'mask = "mask"\nmask_values = [1]\nlabel_from = "mask centre"'
    _, found = read_own_task(toml(folder, "localisation", "volume", "r2", data))
    assert found.cases[0].target == pytest.approx((3.0, 4.0, 4.5))
    data = PLACES + 'mask = "mask"\nmask_value = "number"'
    _, found = read_own_task(toml(folder, "classification", "region", "accuracy", data))
    assert [(c.id, c.slices) for c in found.cases] == [("1.nii.gz/1", None), ("2.nii.gz/2", None)]
    case = found.cases[1]
    assert case.region is not None
    assert read_region(case.region, read_scan(case)).voxels.sum() == 30
    data = PLACES + 'mask = "mask"\nmask_values = [2, 1]'
    task, found = read_own_task(toml(folder, "segmentation", "volume", "accuracy", data))
    truth = read_truth(task, found.cases[0].region, read_scan(found.cases[0])).voxels
    assert (np.bincount(truth.ravel())[1:]).tolist() == [30, 36]


def test_any_configuration_of_the_hub(tmp_path: Path) -> None:
    """One that hilum does not list: the task says what its numbers mean."""
    made.hub_tables(tmp_path)
    (tmp_path / "CuriaBench/kits").rename(tmp_path / "CuriaBench/new")
    path = toml(tmp_path, "classification", "region", "auroc", 'hub = "new"\nfolder = "CuriaBench"')
    path.write_text(path.read_text().replace('table = "cases.csv"\n', ""))
    task, found = read_own_task(path)
    assert (task.id, len(found.cases), found.cases[0].split) == ("own:mine", 5, "test")
    assert [p.found for p in found.problems] == ["no mask"]


def test_every_mistake_of_the_file_is_named(folder: Path) -> None:
    data = 'label = ["a", "b"]\nlabel_from = "mask"\ntrain = ["x"]\nval = ["x"]'
    path = toml(folder, "classification", "region", "gini", data, classes="[]")
    with pytest.raises(UsageError) as error:
        read_own_task(path)
    for said in ("classes is empty", "metric 'gini'", "label_from is 'mask'", "data.mask is missing", "share an entry"):
        assert said in str(error.value)
    with pytest.raises(UsageError, match=r"unknown setting data.labels .*known: folder, hub, id, label.*"):
        read_own_task(toml(folder, "classification", "slice", "accuracy", 'labels = "a"'))
    with pytest.raises(UsageError, match="names 1 columns; a survival needs 2"):
        read_own_task(toml(folder, "survival", "volume", "auroc", 'label = ["a"]'))


def test_a_folder_that_is_not_there_is_named(folder: Path) -> None:
    _, found = read_own_task(toml(folder, "classification", "slice", "accuracy", 'folder = "elsewhere"'))
    assert "'elsewhere' below" in found.problems[0].expected


def test_what_to_check_is_named_as_it_was_given(folder: Path, hilum: Callable[..., tuple[int, str, str]]) -> None:
    path = toml(folder, "classification", "slice", "accuracy", PLACES, classes='["a"]')
    code, _, error = hilum("bench", "run", "--task", path, "--data", folder, "--model", "pixels", "-o", folder / "out")
    assert code == 3
    assert f"hilum bench check {path}" in error


def test_the_audit_looks_at_a_task_of_ones_own(folder: Path, hilum: Callable[..., tuple[int, str, str]]) -> None:
    made.nifti(folder / "scans/2.nii.gz", made.scan(1))  # the scan of another patient
    data = PLACES + 'split = "side"\ntrain = ["fold1"]\nval = []\ntest = ["fold2"]\nslice = "slice"'
    path = toml(folder, "classification", "slice", "accuracy", data)
    code, out, _ = hilum("bench", "audit", "--task", path, "--data", folder)
    assert code == 4
    assert "own:mine" in out


def test_bad_rows_are_problems(folder: Path) -> None:
    """A scan that is not there, a path that leaves the folder, an unknown class, no patient, a mask of another size."""
    rows = [["1.nii.gz", "A", "a", "1.nii.gz"], ["9.nii.gz", "B", "a", "1.nii.gz"], ["../cases.csv", "C", "a", "1.nii.gz"],
            ["2.nii.gz", "D", "c", "1.nii.gz"], ["2.nii.gz", "", "a", "1.nii.gz"],
            ["2.nii.gz", "F", "a", "3.nii.gz"]]  # fmt: skip
    rows[2][0] = "../../etc/passwd"
    made.nifti(folder / "masks/3.nii.gz", made.mask((1, (0, 2), (3, 6), (3, 6)), shape=(5, 12, 10)))
    made.table(folder / "cases.csv", ["scan", "patient", "label", "mask"], rows)
    task, found = read_own_task(toml(folder, "classification", "region", "accuracy", PLACES + 'mask = "mask"'))
    assert [c.patient for c in found.cases] == ["A"]
    said = [p.found for p in found.problems]
    assert said[:4] == ["row 2: missing", "row 3: scan is '../../etc/passwd'", "row 4: label 'c'", "row 5: no patient"]
    assert "labels_off_grid" in said[4]
    check = describe(task, found, folder)
    assert check.exit_code == 4
    assert "1 case can be used, 5 missing or malformed" in check.text


def test_a_table_that_lacks_a_column(folder: Path) -> None:
    task, found = read_own_task(toml(folder, "classification", "slice", "accuracy", 'patient = "who"'))
    assert not found.cases
    assert found.problems[0].found == "no column who"
    assert describe(task, found, folder).exit_code == 3


# example → cases, patients
REAL = {
    "tumour_type": (1787, 298),
    "hippocampus_volume": (160, 160),
    "hippocampus_segmentation": (160, 160),
    "hippocampus_place": (160, 160),
}


@pytest.mark.parametrize("name", REAL)
def test_the_examples_on_real_data(name: str, real_data: Path) -> None:
    """Counts as the README files of the data state them; volumes against the voxel counts of the publisher's table."""
    metric = next(
        line.split('"')[1] for line in (EXAMPLES / f"{name}.toml").read_text().splitlines() if "metric" in line
    )
    if metric not in METRICS:
        pytest.skip(f"metric {metric} is not in this version")
    task, found = read_own_task(EXAMPLES / f"{name}.toml", real_data)
    assert not found.problems
    assert (len(found.cases), len({case.patient for case in found.cases})) == REAL[name]
    assert {case.split for case in split_cases(task, found.cases)} == {"train", "val", "test"}
    if name == "hippocampus_volume":
        assert found.cases[0].target == pytest.approx((1.324 + 1.624,))


def test_every_example_is_well_formed() -> None:
    """Also those whose table a script must write first."""
    names = sorted(path.stem for path in EXAMPLES.glob("*.toml"))
    assert len(names) == 8
    for name in names:
        text = (EXAMPLES / f"{name}.toml").read_text()
        if any(metric in text for metric in ('"dice"', '"mean_distance_mm"')) and "dice" not in METRICS:
            continue
        task, found = read_own_task(EXAMPLES / f"{name}.toml", EXAMPLES)
        assert task.title
        assert found.problems[0].fatal
