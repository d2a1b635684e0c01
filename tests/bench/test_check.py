"""What a user is told of their folder, the table of tasks, published scores, and pickles that want to do harm."""

import csv
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hilum.bench.catalogue.describe import catalogue
from hilum.bench.catalogue.published import all_published, published_scores
from hilum.bench.catalogue.tasks import DATASETS, SUITES, TASKS, suite_tasks
from hilum.bench.check import check_task
from hilum.bench.datasets.pickles import read_array
from hilum.bench.run.suites import choose_tasks
from hilum.errors import ScanRefused, UsageError
from hilum.metrics import METRICS

sys.path.insert(0, str(Path(__file__).parent))
import publishers as made

sys.path.pop(0)


def test_a_whole_folder(tmp_path: Path) -> None:
    made.kits23(tmp_path)
    check = check_task(TASKS["curiabench-2d:O1"], tmp_path)
    assert check.exit_code == 0
    assert "All 3 cases can be used." in check.text
    assert "our choice: the region is label 2" in check.text.replace("\n      ", " ")
    assert check.text.splitlines()[-4:] == [
        "class      cases",
        "─────────  ─────",
        "benign         1",
        "malignant      2",
    ]


def test_a_folder_with_holes(tmp_path: Path) -> None:
    """Exit code 4; like problems together; where the data comes from; the folder may also be given itself."""
    made.totalsegmentator(tmp_path)
    (tmp_path / "TotalSegmentator/s1/ct.nii.gz").unlink()
    for root in (tmp_path, tmp_path / "TotalSegmentator"):
        check = check_task(TASKS["curiabench-2d:A1"], root)
        assert (check.exit_code, check.lost) == (4, 1)
    text = check.text
    assert "3 cases can be used, 1 missing or malformed." in text
    assert "missing; expected the scan, costs 1 case\n      s1/ct.nii.gz" in text
    assert "102 of 104 classes have no case." in text
    for word in ("zenodo.6802614", "CC BY 4.0", "meta.csv", "sNNNN/segmentations/<class>.nii.gz"):
        assert word in text


@pytest.mark.parametrize("task", TASKS)
def test_an_empty_folder_tells_what_should_be_there(task: str, tmp_path: Path) -> None:
    check = check_task(TASKS[task], tmp_path)
    assert check.exit_code == 3
    assert "Nothing can be used." in check.text
    assert DATASETS[TASKS[task].dataset].licence.split()[0] in check.text
    assert max(len(line) for line in check.text.splitlines()) <= 100
    assert check_task(TASKS[task], tmp_path / "nowhere").exit_code == 3


def test_the_table_of_tasks_has_no_gaps() -> None:
    """Every record says everything; published rows exist where a task names them; tracks are those of the paper's Table 1."""
    flat = {"A1", "A2", "A3", "O1", "O2", "O3", "M1", "M2", "M3", "E1", "E2", "E3", "E4", "I"}
    deep = {"A1", "A2", "A3", "O1", "O2", "O4", "M4", "E1", "E2", "E3", "N", "F"}
    assert {t.id.partition(":")[2] for t in suite_tasks("curiabench-2d")} == flat
    assert {t.id.partition(":")[2] for t in suite_tasks("curiabench-3d")} == deep
    assert SUITES == ("curiabench-2d", "curiabench-3d", "curiabench-hub", "voxelfm")
    for task in TASKS.values():
        assert all((task.title, task.label_rule, task.split_rule)), task.id
        assert (len(task.classes) > 0) == (
            task.kind in ("classification", "multilabel", "retrieval", "segmentation")
        ), task.id
        assert len(set(task.classes)) == len(task.classes), task.id
        assert (task.published is None) == (not published_scores(task)), task.id
        if task.metric in METRICS and METRICS[task.metric].chance is not None:
            assert task.chance == METRICS[task.metric].chance, task.id
    for dataset in DATASETS.values():
        assert all((dataset.title, dataset.url, dataset.licence, dataset.layout.strip())), dataset.name


def test_listing_tasks_loads_nothing_heavy() -> None:
    code = "import sys, hilum.bench.catalogue.tasks; print(sorted({'torch', 'numpy', 'pyarrow', 'scipy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_task_is_answered_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"did you mean curiabench-hub:luna16, .*voxelfm:LUNA16"):
        choose_tasks(ids=["luna"])
    with pytest.raises(UsageError, match=r"no task 'phantom:orgn'; did you mean phantom:organ, "):
        choose_tasks(ids=["phantom:orgn"])
    with pytest.raises(UsageError, match=r"no task '2d:A9'; did you mean .*curiabench-2d:A1"):
        choose_tasks(ids=["2d:A9"])
    with pytest.raises(UsageError, match="no task '3d'; that is a suite: --suite 3d"):
        choose_tasks(ids=["3d"])
    with pytest.raises(UsageError, match="no suite '4d'; expected 2d, 3d, voxelfm, phantom, curiabench-2d"):
        choose_tasks("4d")


def test_published_numbers() -> None:
    """Cells of the papers' tables; the printed average of a track is the mean of its cells."""
    scores = {row.model: row.score for row in published_scores(TASKS["curiabench-2d:I"])}
    assert max(scores, key=lambda model: scores[model]) == "Curia-L"
    luna = {row.model: row for row in published_scores(TASKS["voxelfm:CT-RATE"])}["VoxelFM"]
    assert (luna.score, luna.se, luna.metric) == (0.870, 0.006, "macro_auroc")
    rows = [row for row in all_published() if row.suite == "curiabench" and row.track in ("2D", "3D")]
    printed = {(r.track, r.model): r.score for r in rows if r.task == "AVG"}
    assert len(printed) == 19
    for (track, model), average in printed.items():
        cells = [r.score for r in rows if (r.track, r.model) == (track, model) and r.task != "AVG"]
        assert len(cells) == {"2D": 14, "3D": 12}[track] or model not in ("Curia-2-L", "MedImageInsight")
        assert np.mean(cells) == pytest.approx(average, abs=0.0011)


def test_published_numbers_are_those_of_the_facts() -> None:
    path = Path(__file__).parents[2] / "src" / "hilum" / "bench" / "catalogue" / "published.csv"
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 476
    assert all(-1 <= float(row["score"]) <= 1 for row in rows)


class Harm:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    """Neither by itself nor hidden in an array of objects; an array of numbers comes back whole, from Python 2, too."""
    traces = tmp_path / "trace"
    hidden = np.empty(2, object)
    hidden[0] = Harm(str(traces))
    for harmful in (Harm(str(traces)), [np.zeros(3), Harm(str(traces))], hidden):
        (tmp_path / "a.pck").write_bytes(pickle.dumps(harmful, protocol=protocol))
        with pytest.raises(ScanRefused, match=r"asks for posix.mkdir|corrupt|other_format"):
            read_array(tmp_path / "a.pck")
        assert not traces.exists()
    pickle.loads((tmp_path / "a.pck").read_bytes())
    assert traces.exists()  # the pickle is harmful: the plain reader ran it
    wanted = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    (tmp_path / "b.pck").write_bytes(pickle.dumps(wanted, protocol=protocol))
    np.testing.assert_array_equal(read_array(tmp_path / "b.pck"), wanted)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x02K\x01.", b"not a pickle", b"\x80\x04\x8c\x01a."],
)
def test_what_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pck").write_bytes(content)
    with pytest.raises(ScanRefused):
        read_array(tmp_path / "c.pck")


def test_a_task_of_a_data_set_without_a_reader() -> None:
    with pytest.raises(UsageError, match="has no reader"):
        check_task(replace(TASKS["voxelfm:OSIC"], dataset="Elsewhere"), Path("."))


def test_the_page_of_tasks_is_up_to_date() -> None:
    """To renew it, write `hilum.bench.catalogue.describe.catalogue()` from "## The tasks" on."""
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert page[page.index("## The tasks") :] == catalogue()
    shown = page[page.index("    [task]") : page.index("| setting of")]
    example = (Path(__file__).parents[2] / "examples" / "tasks" / "tumour_type.toml").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in shown.splitlines()]
    assert all(line in example for line in lines if line)
