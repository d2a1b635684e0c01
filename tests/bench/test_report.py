"""The page of a benchmark, its tables and figures, and what `reproduce` says, on predictions of known quality."""

import csv
import io
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix
from sklearn.metrics import roc_curve as sklearn_roc

from hilum.archive.privacy import Key
from hilum.bench.own_tasks import read_own_task
from hilum.bench.predictions import write_predictions
from hilum.bench.report.arrays import (
    Rows,
    confusion_counts,
    kaplan_meier,
    mean_over_runs,
    pooled_rows,
    reliability_of,
    roc_curve,
    worst_cases,
)
from hilum.bench.report.case_images import data_pictures
from hilum.bench.report.page import show_results
from hilum.bench.report.pictures import Curve, learning_curves
from hilum.bench.report.reproduce import reproduce
from hilum.bench.report.results import read_results
from hilum.bench.report.tables import Cell, average, board_latex, make_board, same_model, text_of
from hilum.bench.run.scores import write_scores
from hilum.bench.splits import hash_case
from hilum.errors import InputError, UsageError
from hilum.records import read_json, read_table, table_metadata, write_json

sys.path.insert(0, str(Path(__file__).parent))
import publishers as made
from synthetic_results import MODELS, TASKS, task, write_results

sys.path.pop(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two tasks, two models: quickly drawn."""
    return write_results(
        tmp_path_factory.mktemp("small"), (TASKS[1], TASKS[3]), models=MODELS[:2], num_patients=20, seeds=1
    )


@pytest.fixture(scope="module")
def shown(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    told = show_results(results, folder / "page.html", csv=folder / "scores.csv", latex=folder / "tables.tex")
    return folder, told


def test_the_page_holds_every_part(shown):
    folder, told = shown
    page = (folder / "page.html").read_text()
    assert told == {"num_tasks": 8, "num_models": 3, "num_scores": 24 + 15}
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:6] == [
        "Scores: curiabench-2d", "Scores: toy", "Every pair of models", "Learning from few cases",
        "Learning from a part of the patients", "Do the probabilities mean what they say?",
    ]  # fmt: skip
    assert set(headings[6:-1]) == {t.id for t in TASKS}
    assert headings[-1] == "How it was done"
    for text in ("rare &lt;gland&gt;", "0123456789abcdef", "no_geometry", "the rarest first", "Curia-2-B\u00a0(published)",
                 "95 % interval comes from drawing patients again", "CC BY-NC-SA 4.0"):  # fmt: skip
        assert text in page, text
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing from elsewhere


def test_the_page_is_the_same_each_time(small, tmp_path):
    for name in ("a.html", "b.html"):
        show_results(small, tmp_path / name, reference="small vit")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "Differences to small vit" in (tmp_path / "a.html").read_text()


def test_the_spreadsheet_holds_all_scores(shown, results):
    rows = list(csv.DictReader(io.StringIO((shown[0] / "scores.csv").read_text())))
    ours = [r for r in rows if r["source"] == "ours"]
    assert len(ours) == 39
    by_name = {(e.task, e.model, e.protocol): e for e in read_results(results).entries}
    for r in ours:
        score = by_name[r["task"], r["model"], r["protocol"]].score
        assert float(r["value"]) == score.value
        assert float(r["low"]) == score.low
    theirs = {(r["task"], r["model"]): float(r["value"]) for r in rows if r["source"] == "published"}
    assert theirs["curiabench-2d:O1", "Curia-2-B"] == pytest.approx(0.753)  # Table 3 of the paper
    assert {r["task"] for r in rows if r["source"] == "published"} == {"curiabench-2d:O1", "curiabench-2d:A1"}


def test_latex_is_balanced_and_escaped(shown):
    text = (shown[0] / "tables.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    for table in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(\w+)\}", table)[1])
        body = [line for line in table.split(r"\end{tabular}")[0].splitlines() if line.endswith(r"\\")]
        assert len(body) >= 5
        assert {line.count(" & ") + 1 for line in body} == {columns}
    assert r"macro\_auroc" in text
    assert re.search(r"\\textbf\{\d", text)


def test_published_rows_are_ours_never(results):
    board = make_board(read_results(results), "curiabench-2d")
    assert [line.name for line in board.lines if not line.published] == sorted(MODELS)
    assert {line.name for line in board.lines if line.published} >= {"Curia-2-B", "MedImageInsight"}
    assert board.best("curiabench-2d:A1").name == "curia-2"
    assert all(math.isnan(c.low) for line in board.lines if line.published for c in line.cells.values())
    assert "(published)" in board_latex(board)


def test_mean_over_tasks_against_simulation():
    """Two tasks on one data set with the same error, one on another: the interval of the mean covers that of the mean."""
    rng = np.random.default_rng(0)
    shared, alone = rng.normal(0, 0.02, 100_000), rng.normal(0, 0.03, 100_000)
    drawn = (0.8 + shared + 0.7 + shared + 0.6 + alone) / 3
    z = norm.ppf(0.975)
    cells = {
        "a": Cell(value=0.8, low=0.8 - z * 0.02, high=0.8 + z * 0.02),
        "b": Cell(value=0.7, low=0.7 - z * 0.02, high=0.7 + z * 0.02),
        "c": Cell(value=0.6, low=0.6 - z * 0.03, high=0.6 + z * 0.03),
    }
    found = average(cells, ["a", "b", "c"], {"a": "x", "b": "x", "c": "y"})
    assert found.value == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=5e-4)
    assert average(cells, ["a", "b", "d"], {}) is None


def test_cells_as_text():
    assert text_of(Cell(value=0.9123, low=0.88, high=0.94), "auroc") == "91.2\n88.0 to 94.0"
    assert text_of(Cell(value=12.34, low=11.0, high=14.0), "mean_distance_mm") == "12.3\n11 to 14"
    assert text_of(Cell(value=0.5), "auroc") == "50.0"
    assert text_of(None, "auroc") == ""
    assert same_model("curia-2", "Curia-2-B")
    assert not same_model("curia-2", "Curia-2-L")


@pytest.fixture
def binary() -> Rows:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 400)
    score = np.clip(rng.normal(0.4 + 0.2 * truth, 0.2), 0.01, 0.99).round(2)
    return Rows(
        case=np.array([f"c{n}" for n in range(400)]), patient=np.array([f"p{n // 2}" for n in range(400)]),
        target=truth[:, None].astype(float), output=np.column_stack([1 - score, score]), num_runs=1,
    )  # fmt: skip


def test_roc_and_confusion_as_in_scikit_learn(binary):
    across, up = roc_curve(binary.target[:, 0], binary.output[:, 1])
    theirs = sklearn_roc(binary.target[:, 0], binary.output[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(across, theirs[0])
    np.testing.assert_allclose(up, theirs[1])
    wanted = confusion_matrix(binary.target[:, 0], binary.output.argmax(1))
    np.testing.assert_array_equal(confusion_counts(binary), wanted)


def test_reliability_as_in_scikit_learn(binary):
    rng = np.random.default_rng(0)
    smooth = Rows(binary.case, binary.patient, binary.target, np.abs(binary.output - rng.uniform(0, 1e-4, (400, 1))), 1)
    found = reliability_of("classification", smooth, "m", 0.1)
    observed, predicted = calibration_curve(smooth.target[:, 0], smooth.output[:, 1], n_bins=10, strategy="quantile")
    np.testing.assert_allclose(found.observed, observed, atol=0.02)  # a case at an edge may fall on either side
    np.testing.assert_allclose(found.predicted, predicted, atol=0.02)
    assert found.counts.sum() == 400
    assert ((found.low <= found.observed) & (found.observed <= found.high)).all()


def test_kaplan_meier_by_hand():
    """Six patients of a textbook: deaths at 1, 3, 3 and 6, censored at 2 and 4."""
    times, share = kaplan_meier(np.array([1, 2, 3, 3, 4, 6]), np.array([True, False, True, True, False, True]))
    np.testing.assert_array_equal(times, [0, 1, 2, 3, 4, 6])
    np.testing.assert_allclose(share, [1, 5 / 6, 5 / 6, 5 / 6 * 2 / 4, 5 / 12, 0])


def test_worst_cases_one_a_patient(binary):
    bad = worst_cases("classification", binary, ("benign", "malignant"), 5)
    assert len({b.patient for b in bad}) == 5
    assert [b.loss for b in bad] == sorted((b.loss for b in bad), reverse=True)
    wrong = np.abs(binary.output[:, 1] - binary.target[:, 0])
    assert bad[0].case == binary.case[wrong.argmax()]
    assert (bad[0].true.split()[0] == "malignant") == bool(binary.target[wrong.argmax(), 0])


def test_runs_are_averaged_case_by_case(results):
    entry = read_results(results).of("toy:age")[0]
    rows = pooled_rows(entry.predictions())
    assert (rows.num_runs, len(rows.case)) == (2, 240)
    mean = mean_over_runs(rows)
    at = rows.case == mean.case[7]
    np.testing.assert_allclose(mean.output[7], rows.output[at].mean(0))
    np.testing.assert_array_equal(mean.target[7], rows.target[at][0])


def test_worst_cases_are_drawn_from_pictures_in_the_folder(small, tmp_path):
    show_results(small, tmp_path / "plain.html")
    (small / "pictures").mkdir()
    for n in range(60):
        Image.fromarray(np.full((8, 8), n, np.uint8)).save(small / "pictures" / f"{n:016x}.png")
    show_results(small, tmp_path / "drawn.html")
    count = [(tmp_path / name).read_text().count("<img") for name in ("plain.html", "drawn.html")]
    assert count[1] - count[0] == 2  # one for each task


def test_reproduce_tells_the_gap_and_its_likely_reasons(results):
    found = reproduce(results, "curiabench-2d:O1", "curia-2")
    assert found.published == pytest.approx(0.753)
    assert found.published_as == "Curia-2-B"
    assert found.inside is False
    text = found.text()
    assert max(map(len, text.splitlines())) <= 100
    assert "our choice: all of it" in text
    assert "another split" in text
    assert "no interval" in text
    assert found.to_dict()["published_low"] is None


@pytest.mark.parametrize(
    ("task", "model", "why"),
    [
        ("curiabench-2d:O1", "vit-9", "is not in these results"),
        ("curiabench-2d:O1", "small vit", "no paper prints auroc of small vit"),
        ("toy:age", "curia-2", "published there: nothing"),
    ],
)
def test_reproduce_says_what_there_is(results, task, model, why):
    with pytest.raises(InputError, match=why):
        reproduce(results, task, model)


def test_folders_that_are_none(results, small, tmp_path):
    with pytest.raises(InputError, match=r"has no results\.json"):
        show_results(tmp_path, tmp_path / "x.html")
    write_json(tmp_path / "results.json", {"format": "hilum-run"})
    with pytest.raises(InputError, match="is no hilum-bench-results"):
        show_results(tmp_path, tmp_path / "x.html")
    write_json(tmp_path / "results.json", read_json(results / "results.json"))
    with pytest.raises(InputError, match="has no scores yet"):
        show_results(tmp_path, tmp_path / "x.html")
    with pytest.raises(UsageError, match=r"no model 'nobody'.*curia-2"):
        show_results(small, tmp_path / "x.html", reference="nobody")
    assert not (tmp_path / "x.html").exists()


def test_a_task_of_one_patient_is_told_and_the_others_go_on(tmp_path):
    results = write_results(tmp_path / "r", (TASKS[1], TASKS[3]), models=MODELS[:2], num_patients=20, seeds=1)
    for path in (results / "predictions").glob("*age*"):
        table = read_table(path)
        one = pa.array(["p"] * len(table))
        write_predictions(
            path, table.set_column(table.column_names.index("patient"), "patient", one), table_metadata(table)
        )
    (results / "scores.parquet").unlink()
    scores = write_scores(results, num_resamples=50, seed=0)
    told = {tuple(s["notes"]) for s in scores if s["task"] == "toy:age"}
    assert told == {("all test cases are of one patient: there is no interval",)}
    show_results(results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Not compared: toy:age" in page
    assert "corrected for all 1 comparisons" in page


def test_worst_cases_of_a_task_of_ones_own(tmp_path):
    """Results hold no path, so its TOML file is given."""
    made.nifti(tmp_path / "scan.nii.gz", made.scan(1))
    made.table(tmp_path / "cases.csv", ["scan", "patient", "label"], [["scan.nii.gz", "A", "a"]])
    file = tmp_path / "mine.toml"
    file.write_text(
        '[task]\ntitle = "Mine"\nkind = "classification"\nunit = "volume"\nmodality = "CT"\nmetric = "accuracy"\n'
        'classes = ["a"]\n[data]\ntable = "cases.csv"\n'
    )
    mine, found = read_own_task(file)
    name = hash_case(mine, found.cases[0], Key(bytes(32)))
    assert data_pictures({mine.id: mine}, tmp_path, Key(bytes(32)))(mine.id, name) is None
    drawn = data_pictures({mine.id: mine}, tmp_path, Key(bytes(32)), own=[file])(mine.id, name)
    assert drawn is not None
    assert drawn[1] == "HU"


def test_one_model_alone_has_no_differences(tmp_path):
    one = (task("own:only", "classification", "auroc", ("no", "yes")),)
    show_results(
        write_results(tmp_path / "r", one, models=("small vit",), seeds=1, num_patients=20), tmp_path / "page.html"
    )
    assert "Differences" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("number", [1, 2, 5])
def test_titles_of_panels_do_not_overlap(number):
    at = np.array([1.0, 5.0])
    curves = [Curve(name="a model", at=at, value=at, low=at - 1, high=at + 1)]
    panels = [
        ("Which organ is in the box, few cases of each class, whole volumes", "cases", "accuracy", 0.1, curves)
    ] * number
    figure = learning_curves(panels)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [
        text.get_window_extent(canvas.get_renderer())
        for axes in figure.axes if axes.get_visible() for text in (axes._left_title, axes.xaxis.label)
    ]  # fmt: skip
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
