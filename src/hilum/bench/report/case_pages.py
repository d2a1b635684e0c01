"""The part of the benchmark's page that goes down to cases: the figure each kind of task is read by, rare classes, and the
cases that went most wrong."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hilum.bench.report.arrays import (
    BadCase,
    Rows,
    case_dice,
    confusion_counts,
    kaplan_meier,
    mean_over_runs,
    pooled_rows,
    roc_curve,
    worst_cases,
)  # fmt: skip
from hilum.bench.report.pictures import Line, agreement, confusion, forest, roc, spread, survival
from hilum.bench.report.results import Entry
from hilum.bench.task import Task
from hilum.figures import Panel, montage, window
from hilum.metrics import METRICS
from hilum.pages import Page

ImageOf = Callable[[str, str], tuple[NDArray[Any], str] | None]
"""(task, case) → pixels (Y, X) and their unit, or None when there is no picture."""

MOST_WORST = 6  # cases shown
MOST_CLASSES = 40  # rows of a table of classes
LARGEST_MATRIX = 60  # classes of a confusion matrix
MOST_PANELS = 6


def add_cases(page: Page, task: Task, entries: Sequence[Entry], image_of: ImageOf | None) -> None:
    """A section about one task: all methods in one figure where that can be, else the best one."""
    sign = 1 if METRICS[entries[0].score.metric].higher_is_better else -1
    best = max(entries, key=lambda e: sign * e.score.value)
    rows = {e.method: pooled_rows(e.predictions()) for e in ([best] if len(entries) > MOST_PANELS else entries)}
    page.section(
        task.id,
        f"{task.title}. {best.score.num_cases:,} test cases of {best.score.num_patients:,} patients. "
        f"Best of these models: {best.method}.",
    )
    for note in best.score.notes:
        page.note(note)
    _FIGURES[task.kind](page, task, best, rows)
    _add_classes(page, best)
    _add_worst(page, task, best, rows[best.method], image_of)


def _classification(page: Page, task: Task, best: Entry, rows: dict[str, Rows]) -> None:
    mine = rows[best.method]
    names = task.classes or tuple(str(n) for n in range(mine.output.shape[1]))
    if len(names) == 2:
        curves = [(method, *_roc(found)) for method, found in rows.items()]
        page.figure(
            roc("Receiver operating characteristic", curves), "Mean probability over head seeds; diagonal: chance."
        )
    if len(names) <= LARGEST_MATRIX:
        page.figure(
            confusion(confusion_counts(mine), names, best.method),
            "Each row is a true class, with its number of test cases, and adds up to 100 %: a rare class is as visible as a "
            "frequent one.",
        )
    else:
        _add_mistakes(page, mine, names)


def _roc(rows: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
    mean = mean_over_runs(rows)
    return roc_curve(mean.target[:, 0], mean.output[:, 1])


def _add_mistakes(page: Page, rows: Rows, names: Sequence[str]) -> None:
    counts = confusion_counts(rows)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:15]
    pairs = [np.unravel_index(n, counts.shape) for n in order]
    table = [[names[t], names[p], f"{counts[t, p]:,.1f}"] for t, p in pairs if counts[t, p] > 0]
    page.text("The most frequent confusions, in cases of an average run:")
    page.table(["true", "predicted", "cases"], table)


def _multilabel(page: Page, task: Task, best: Entry, rows: dict[str, Rows]) -> None:
    lines = [
        Line(name=c.name, value=c.value, low=_number(c.low), high=_number(c.high))
        for c in sorted(best.score.per_class, key=lambda c: c.num_present)[:MOST_CLASSES]
        if c.value is not None
    ]
    if lines:
        panel = (f"Labels of {best.method}, the rarest first", best.score.per_class[0].metric, 0.5, lines)
        page.figure(forest([panel], columns=1), "Squares with 95 % intervals over patients. Dashed: chance.")


def _regression(page: Page, task: Task, best: Entry, rows: dict[str, Rows]) -> None:
    means = {method: mean_over_runs(found) for method, found in rows.items()}
    page.figure(
        agreement([(name, m.target[:, 0], m.output[:, 0]) for name, m in means.items()]),
        "Bland–Altman: difference of predicted and true value against their mean. Solid: bias, dashed: ± 1.96 standard "
        "deviations. Clouds that fall from left to right mean that high values are underestimated.",
    )


def _survival(page: Page, task: Task, best: Entry, rows: dict[str, Rows]) -> None:
    panels = []
    for method, found in rows.items():
        mean = mean_over_runs(found)
        risk, time, event = mean.output[:, 0], mean.target[:, 0], mean.target[:, 1] > 0
        third = np.searchsorted(np.quantile(risk, [1 / 3, 2 / 3]), risk)
        groups = []
        for n, name in enumerate(("low risk", "middle", "high risk")):
            of = third == n
            if of.any():
                times, share = kaplan_meier(time[of], event[of])
                groups.append((f"{name} ({of.sum():,})", times, share, time[of & ~event]))
        panels.append((method, groups))
    page.figure(
        survival(panels),
        "Kaplan–Meier curves of the thirds of predicted risk among test cases; ticks are censored cases. Curves that lie "
        "apart in the right order show that the risk says something.",
    )


def _localisation(page: Page, task: Task, best: Entry, rows: dict[str, Rows]) -> None:
    means = {method: mean_over_runs(found) for method, found in rows.items()}
    distances = [(name, np.linalg.norm(m.output - m.target, axis=1)) for name, m in means.items()]
    page.figure(
        spread([("Distance to the true place", "mm", distances)]),
        "Each dot a test case; orange: median and quartiles.",
    )


def _segmentation(page: Page, task: Task, best: Entry, rows: dict[str, Rows]) -> None:
    mean = mean_over_runs(rows[best.method])
    dice = case_dice(mean.target, mean.output)
    names = task.classes or tuple(str(n) for n in range(dice.shape[1]))
    far = mean.output[:, 2::4]
    page.figure(
        spread([
            ("Dice", "Dice", [(name, dice[:, n]) for n, name in enumerate(names)]),
            ("95 % Hausdorff distance", "mm", [(name, far[:, n]) for n, name in enumerate(names)]),
        ]),
        f"{best.method}, each dot a test case; orange: median and quartiles. Cases in which a class is neither present nor "
        "predicted have no Dice, those in which one of both is missing no distance.",
    )  # fmt: skip


def _retrieval(page: Page, task: Task, best: Entry, rows: dict[str, Rows]) -> None:
    table = []
    for method, found in rows.items():
        of = found.output[:, 3]
        negatives = f"{of.min():.0f}" if of.min() == of.max() else f"{of.min():.0f} to {of.max():.0f}"
        table.append([method, *(f"{v:.3f}" for v in np.nanmean(found.output[:, :3], axis=0)), negatives])
    page.table(["model", "recall at 1", "at 5", "at 10", "negatives"], table)


_FIGURES: dict[str, Callable[[Page, Task, Entry, dict[str, Rows]], None]] = {
    "classification": _classification,
    "multilabel": _multilabel,
    "regression": _regression,
    "survival": _survival,
    "localisation": _localisation,
    "segmentation": _segmentation,
    "retrieval": _retrieval,
}


def _add_classes(page: Page, best: Entry) -> None:
    """Classes, the rarest first."""
    found = sorted(best.score.per_class, key=lambda c: c.num_present)
    if len(found) < 2:
        return
    rows = []
    for c in found[:MOST_CLASSES]:
        limits = "" if c.low is None or c.high is None else f"{c.low:.3f} to {c.high:.3f}"
        rows.append(
            [
                c.name,
                f"{c.num_present:,}",
                f"{c.num_cases:,}",
                "undefined" if c.value is None else f"{c.value:.3f}",
                limits,
            ]
        )
    page.text(f"Classes of {best.method}, the rarest first:")
    page.table(["class", "present in", "of cases", found[0].metric, "95 % interval"], rows)
    if len(found) > MOST_CLASSES:
        page.note(f"{len(found) - MOST_CLASSES} more frequent classes are left out here; all are in scores.parquet.")


def _add_worst(page: Page, task: Task, best: Entry, rows: Rows, image_of: ImageOf | None) -> None:
    bad = worst_cases(task.kind, rows, task.classes, MOST_WORST)
    if not bad:
        return
    page.text(f"Cases that {best.method} gets most wrong, at most one a patient:")
    drawn = _picture(task.id, bad, image_of)
    if drawn is not None:
        page.figure(drawn, "The slice that was judged, or the middle one; below it the truth and what was predicted.")
    page.table(
        ["case", "patient", "true", "predicted"], [[f"`{b.case}`", f"`{b.patient}`", b.true, b.predicted] for b in bad]
    )


def _picture(task: str, bad: Sequence[BadCase], image_of: ImageOf | None) -> Figure | None:
    panels, limits = [], []
    for case in bad:
        found = image_of(task, case.case) if image_of else None
        if found is not None:
            pixels, unit = found
            panels.append(
                Panel(pixels, title=f"{case.case[:8]}\ntrue: {_cut(case.true)}\npredicted: {_cut(case.predicted)}")
            )
            limits.append(window(pixels, unit))
    return montage(panels, limits, columns=min(6, max(3, len(panels)))) if panels else None


def _cut(text: str) -> str:
    return text if len(text) <= 34 else text[:33] + "…"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
