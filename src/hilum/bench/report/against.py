"""The part of the benchmark's page that compares models: paired differences to one of them, and mean ranks."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hilum.bench.judge.compare import TaskComparison, compare_results
from hilum.bench.judge.runs import read_runs
from hilum.bench.report.pictures import Line, forest
from hilum.bench.report.results import FULL, Entry, Results
from hilum.bench.report.tables import IN_UNITS
from hilum.errors import InputError, UsageError
from hilum.metrics import METRICS
from hilum.pages import Page
from hilum.stats import MeanRank, bootstrap_many, holm, mean_ranks
from hilum.terminal import Progress

ALPHA = 0.05


def add_differences(page: Page, found: Results, reference: str | None, progress: Progress | None = None) -> None:
    """Each other model minus the reference, on the same cases. UsageError for a reference that is not there."""
    methods = list(dict.fromkeys(e.method for e in found.entries if e.protocol == FULL))
    if reference is not None and reference not in methods:
        raise UsageError(f"no model '{reference}' in these results; there are: {', '.join(methods)}")
    if len(methods) < 2:
        return
    chosen = reference or methods[0]
    rows, not_compared = _compare_all(found, [m for m in methods if m != chosen], chosen, progress)
    page.section(
        f"Differences to {chosen}",
        "Same cases, same resampled patients for both models. p: patients' predictions exchanged between the models "
        f"(permutation); Holm: corrected for all {len(rows)} comparisons of this table, so that at most 5 % of such tables "
        "hold a false claim.",
    )
    for sentence in dict.fromkeys(not_compared):
        page.note(f"Not compared: {sentence}.")
    if not rows:
        return
    _draw(page, rows, chosen)
    table = []
    for method, r in rows:
        verdict = {"first": "better", "second": "worse", "": "undecided"}[r.better]
        delong = "" if r.p_delong is None else _p(r.p_delong)
        table.append([method, r.task, r.metric, f"{r.difference:+.3f}", f"{r.low:+.3f} to {r.high:+.3f}", _p(r.p), delong,
                      _p(r.p_holm), verdict])  # fmt: skip
    page.table(["model", "task", "metric", "difference", "95 % interval", "p", "DeLong", "Holm", "verdict"], table)
    _add_ranks(page, found, methods)


def _compare_all(
    found: Results, methods: Sequence[str], reference: str, progress: Progress | None
) -> tuple[list[tuple[str, TaskComparison]], list[str]]:
    """Every shared task of every method, Holm over all of them; and why a task is not among them."""
    rows, not_compared = [], []
    resamples = int(found.record["settings"].get("num_resamples", 10_000))
    theirs = {e.task: e for e in found.entries if e.method == reference and e.protocol == FULL}
    ours = [e for m in methods for e in found.entries if e.method == m and e.protocol == FULL and e.task in theirs]
    for done, e in enumerate(ours, 1):
        try:
            told = compare_results(
                found.folder, first_is=_is(e), second_is=_is(theirs[e.task]), num_resamples=resamples, seed=0
            )
            rows += [(e.method, row) for row in told.tasks]
        except InputError as error:  # one patient only, or different cases: the other tasks go on
            not_compared.append(f"{e.task}: {error}")
        if progress:
            progress(done, len(ours), f"comparing with {reference}")
    corrected = holm([row.p for _, row in rows])
    made = []
    for (method, row), p in zip(rows, corrected.tolist()):
        ahead = (row.difference > 0) == METRICS[row.metric].higher_is_better
        made.append((method, replace(row, p_holm=p, better=("first" if ahead else "second") if p < ALPHA else "")))
    return made, not_compared


def _is(e: Entry) -> dict[str, str]:
    return {name: getattr(e, name) for name in ("task", "model", "features", "head", "protocol")}


def _draw(page: Page, rows: Sequence[tuple[str, TaskComparison]], reference: str) -> None:
    """One panel a model; quantities in mm or years stay in the table, their axis is another."""
    panels = []
    for method in dict.fromkeys(m for m, _ in rows):
        lines = [
            Line(name=r.task.partition(":")[2], value=r.difference, low=r.low, high=r.high, strong=bool(r.better))
            for m, r in rows
            if m == method and r.metric not in IN_UNITS
        ]
        if lines:
            panels.append((f"{method} minus {reference}", "difference of shares; right: better", 0.0, lines))
    if panels:
        page.figure(
            forest(panels), "Filled: different after Holm's correction. Scores in mm or years are in the table only."
        )


def _add_ranks(page: Page, found: Results, methods: Sequence[str]) -> None:
    ranks = ranks_of(found, methods)
    if ranks is None:
        return
    tasks, values = ranks
    lines = [Line(name=m, value=r.value, low=r.low, high=r.high) for m, r in zip(methods, values)]
    page.figure(
        forest([(f"Mean rank over {len(tasks)} tasks", "mean rank; 1 is best", None, lines)], columns=1),
        "Over the tasks that all models have. The interval speaks about other patients of these tasks, not about other tasks.",
    )


def ranks_of(found: Results, methods: Sequence[str]) -> tuple[tuple[str, ...], list[MeanRank]] | None:
    """The tasks that all methods have with the same cases, and the mean rank of each method; None without such a task."""
    tasks, values, draws, higher = [], [], [], []
    for task in found.tasks:
        entries = {e.method: e for e in found.of(task)}
        runs = {m: read_runs(e.predictions()) for m, e in entries.items() if m in methods}
        if len(runs) < len(methods) or any(len(set(r.patients.tolist())) < 2 for r in runs.values()):
            continue  # one patient has no interval
        if any(not np.array_equal(r.cases, runs[methods[0]].cases) for r in runs.values()):
            continue
        metric = entries[methods[0]].score.metric
        columns = [
            [r.columns(metric, d, s) for d, s in np.ndindex(r.outputs.shape[:2])] for r in (runs[m] for m in methods)
        ]
        wanted = [(METRICS[metric].function, c) for side in columns for c in side]
        drawn = bootstrap_many(
            wanted, clusters=runs[methods[0]].patients, num_resamples=2000, seed=(0, zlib.crc32(task.encode()))
        )
        ends = np.cumsum([len(side) for side in columns])[:-1]
        draws.append(np.stack([part.mean(0) for part in np.split(drawn, ends)]))
        values.append([entries[m].score.value for m in methods])
        higher.append(METRICS[metric].higher_is_better)
        tasks.append(task)
    return (tuple(tasks), mean_ranks(values, draws, higher)) if len(tasks) > 1 else None


def _p(value: float) -> str:
    return "" if math.isnan(value) else "<\u00a00.001" if value < 0.001 else f"{value:.3f}"
