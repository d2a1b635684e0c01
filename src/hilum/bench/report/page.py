"""The page of a benchmark: `hilum show RESULTS`. Tables as in the papers, with intervals, and what lies behind them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hilum.bench.report.against import add_differences
from hilum.bench.report.arrays import pooled_rows, reliability_of
from hilum.bench.report.case_images import data_pictures
from hilum.bench.report.case_pages import ImageOf, add_cases
from hilum.bench.report.how import add_how
from hilum.bench.report.pictures import Curve, Line, forest, learning_curves, reliability
from hilum.bench.report.results import FULL, Entry, Results, read_results
from hilum.bench.report.tables import (
    Board,
    board_latex,
    cell_of,
    cell_of_paper,
    make_board,
    published_of,
    results_csv,
    same_model,
    text_of,
)
from hilum.metrics import METRICS
from hilum.pages import Page
from hilum.records import write_text
from hilum.terminal import Progress

WIDEST = 8  # tasks in one table
MOST_FORESTS = 12  # panels in one figure


def show_results(
    results: str | Path,
    out: str | Path,
    *,
    reference: str | None = None,
    data: str | Path | None = None,
    own: Sequence[Path] = (),
    csv: str | Path | None = None,
    latex: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one self-contained HTML page about a folder that `hilum bench run` made.

    reference  the model that the others are compared with; None: the first
    data       folder of the data sets, from which the worst cases are drawn; None: files RESULTS/pictures/CASE.png, if any
    own        TOML files of tasks of one's own, for their pictures
    csv, latex also write all scores, or one table a suite, to these files

    returns    num_tasks, num_models, num_scores
    """
    found = read_results(Path(results))
    page = Page("Benchmark of radiology encoders", _lead(found))
    suites = tuple(dict.fromkeys(task.suite for task in found.tasks.values()))
    boards = [board for suite in suites if (board := make_board(found, suite))]
    for board in boards:
        _add_board(page, found, board)
    add_differences(page, found, reference, progress)
    _add_curves(page, found)
    _add_calibration(page, found)
    image_of = folder_pictures(found.folder) if data is None else data_pictures(dict(found.tasks), Path(data), own=own)
    _add_all_cases(page, found, image_of, progress)
    add_how(page, found)
    page.write(Path(out))
    if csv is not None:
        write_text(Path(csv), results_csv(found))
    if latex is not None:
        write_text(Path(latex), "\n".join(board_latex(board) for board in boards))
    return {
        "num_tasks": len({e.task for e in found.entries}),
        "num_models": len({e.model for e in found.entries}),
        "num_scores": len(found.entries),
    }


def _lead(found: Results) -> str:
    cases = {e.task: e.score.num_cases for e in found.entries}
    models = list(dict.fromkeys(e.model for e in found.entries))
    return (
        f"{len(models)} models ({', '.join(models)}) on {len(cases)} tasks with {sum(cases.values()):,} test cases. The "
        "encoders are frozen; only light heads were fitted. Every number comes with the interval that its patients allow."
    )


def folder_pictures(folder: Path) -> ImageOf:
    """Pictures that lie in RESULTS/pictures, one PNG a case."""

    def image_of(task: str, case: str) -> tuple[NDArray[Any], str] | None:
        path = folder / "pictures" / f"{case}.png"
        if not path.is_file():
            return None
        with Image.open(path) as found:
            return np.asarray(found.convert("L"), np.float32), ""

    return image_of


def _add_board(page: Page, found: Results, board: Board) -> None:
    page.section(
        f"Scores: {board.suite}",
        "Shares are given × 100, as the papers print them; below each its 95 % interval, which resamples patients. In colour: "
        "the best of each task among our own numbers. "
        + ("Rows marked “published” are copied from the papers, which give no interval unless one is shown: other splits, "
           "cases and label rules may lie behind them." if any(line.published for line in board.lines) else ""),
    )  # fmt: skip
    for first in range(0, len(board.tasks), WIDEST):
        _add_table(page, board, board.tasks[first : first + WIDEST], first + WIDEST >= len(board.tasks))
    titles = ", ".join(f"{_short(t)} {found.tasks[t].title}" for t in board.tasks)
    page.note(f"{titles}.")
    if any(line.average for line in board.lines):
        page.note(
            "Mean: over the tasks whose score is a share, for models that have all of them. Its interval takes data sets as "
            "independent and tasks on one data set as moving together, which makes it rather too wide than too narrow."
        )
    for first in range(0, len(board.tasks), MOST_FORESTS):
        some = board.tasks[first : first + MOST_FORESTS]
        page.figure(
            forest([_forest_panel(found, board, task) for task in some]),
            "Squares: our scores with 95 % intervals. Open diamonds: published for the same model; open squares: other "
            "published models. Dashed: chance.",
        )


def _add_table(page: Page, board: Board, tasks: Sequence[str], last: bool) -> None:
    mean = last and any(line.average for line in board.lines)
    best = {task: board.best(task) for task in tasks}
    columns = ["model", *(f"{_short(t)}\n{board.metrics[t]}" for t in tasks), *["mean"] * mean]
    rows, marked = [], []
    for n, line in enumerate(board.lines):
        cells = [text_of(line.cells.get(t), board.metrics[t]) for t in tasks]
        marked += [(n, 1 + c) for c, t in enumerate(tasks) if best[t] is line]
        name = f"{line.name}\u00a0(published)" if line.published else line.name
        rows.append([name, *cells, *[text_of(line.average, "auroc")] * mean])
    page.table(columns, rows, marked)


def _forest_panel(found: Results, board: Board, task: str) -> tuple[str, str, float | None, list[Line]]:
    metric = board.metrics[task]
    theirs = {p.model: p for p in published_of(found.tasks[task], metric)}
    lines = []
    for e in found.of(task):
        cell = cell_of(e)
        same = next((name for name in theirs if same_model(e.model, name)), None)
        beside = theirs.pop(same).score if same else None
        lines.append(Line(name=e.method, value=cell.value, low=cell.low, high=cell.high, published=beside))
    for p in theirs.values():
        cell = cell_of_paper(p)
        lines.append(Line(name=f"{p.model} (published)", value=cell.value, low=cell.low, high=cell.high, strong=False))
    chance = next((e.score.chance for e in found.of(task) if e.score.chance is not None), None)
    direction = "higher is better" if METRICS[metric].higher_is_better else "lower is better"
    return f"{_short(task)} {found.tasks[task].title}", f"{metric}, {direction}", chance, lines


def _add_curves(page: Page, found: Results) -> None:
    """Few-shot and data-fraction curves."""
    for kind, heading, across in (
        ("few-shot", "Learning from few cases", "training cases a class"),
        ("fraction", "Learning from a part of the patients", "share of the training patients"),
    ):
        panels = []
        for task in dict.fromkeys(e.task for e in found.entries if e.protocol.startswith(f"{kind}:")):
            panels.append(_curve_panel(found, task, kind, across))
        if not panels:
            continue
        page.section(
            heading,
            "Each point is the mean over draws of training cases and head seeds; bands are 95 % intervals over test patients. "
            "Test cases are the same throughout. Dashed: chance.",
        )
        for first in range(0, len(panels), 9):
            page.figure(learning_curves(panels[first : first + 9]), across)


def _curve_panel(found: Results, task: str, kind: str, across: str) -> tuple[str, str, str, float | None, list[Curve]]:
    curves: dict[str, list[tuple[float, Entry]]] = {}
    for e in found.entries:
        if e.task == task and (e.protocol.startswith(f"{kind}:") or (kind == "fraction" and e.protocol == FULL)):
            amount = 1.0 if e.protocol == FULL else float(e.protocol.partition(":")[2])
            curves.setdefault(e.method, []).append((amount, e))
    made = []
    for name, points in curves.items():
        points.sort(key=lambda point: point[0])
        cells = [cell_of(e) for _, e in points]
        made.append(
            Curve(name, np.array([at for at, _ in points]), *(np.array([getattr(c, v) for c in cells])
                                                              for v in ("value", "low", "high")))
        )  # fmt: skip
    entry = next(iter(curves.values()))[0][1]
    return f"{_short(task)} {found.tasks[task].title}", across, entry.score.metric, entry.score.chance, made


def _add_calibration(page: Page, found: Results) -> None:
    entries = [e for e in found.entries if e.protocol == FULL and e.kind in ("classification", "multilabel")]
    if not entries:
        return
    page.section(
        "Do the probabilities mean what they say?",
        "Reliability diagrams: of all cases given a probability, how often it was so. Below the diagonal a model promises too "
        "much. Dots hold equally many cases; their lines are 95 % intervals over patients. ECE (expected calibration error): "
        "the mean distance to the diagonal.",
    )
    for task in dict.fromkeys(e.task for e in entries):
        some = [e for e in entries if e.task == task]
        panels = [
            reliability_of(
                e.kind, pooled_rows(e.predictions()), e.method, math.nan if e.score.ece is None else e.score.ece
            )
            for e in some
        ]
        classes = some[0].score.per_class
        label = "share with the label" if some[0].kind == "multilabel" else "share that was right"
        if some[0].kind == "classification" and len(classes) == 2:
            label = f"share of {classes[1].name}"
        page.figure(reliability(panels, label), f"{_short(task)}: {found.tasks[task].title}.")


def _add_all_cases(page: Page, found: Results, image_of: ImageOf, progress: Progress | None) -> None:
    tasks = list(dict.fromkeys(e.task for e in found.entries if e.protocol == FULL))
    for done, task in enumerate(tasks, 1):
        add_cases(page, found.tasks[task], found.of(task), image_of)
        if progress:
            progress(done, len(tasks), "pages of the tasks")


def _short(task: str) -> str:
    return task.partition(":")[2]
