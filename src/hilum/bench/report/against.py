"""The part of the benchmark's page that compares models: paired differences, and mean ranks."""

import math
import zlib
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from hilum.bench.judge.compare import TaskComparison, compare_results, correct_together
from hilum.bench.judge.runs import read_runs
from hilum.bench.report.pictures import Line, forest
from hilum.bench.report.results import FULL, Entry, Results
from hilum.bench.report.tables import IN_UNITS
from hilum.errors import InputError, UsageError
from hilum.metrics import METRICS
from hilum.pages import Page
from hilum.stats import MeanRank, bootstrap_many, mean_ranks
from hilum.terminal import Progress

MOST_PAIRED = 4  # models; of more, pairs are too many to read
MOST_PANELS = 12  # in one figure
Pair = tuple[str, str]  # method, the one that is subtracted


def add_differences(page: Page, found: Results, reference: str | None, progress: Progress | None = None) -> None:
    """Models against each other on the same cases: every pair of up to MOST_PAIRED models, else each other one minus the
    reference (the first). UsageError for a reference that is not there."""
    methods = list(dict.fromkeys(e.method for e in found.entries if e.protocol == FULL))
    if reference is not None and reference not in methods:
        raise UsageError(f"no model '{reference}' in these results; there are: {', '.join(methods)}")
    if len(methods) < 2:
        return
    by_pairs = reference is None and 3 <= len(methods) <= MOST_PAIRED
    if by_pairs:
        joined = {name for name, about in found.record["models"].items() if "joined" in about["contract_is"]}
        methods.sort(key=lambda method: any(e.model in joined for e in found.entries if e.method == method))  # last
        pairs, heading = [(b, a) for a, b in combinations(methods, 2)], "Every pair of models"
    else:
        chosen = reference or methods[0]
        pairs, heading = [(m, chosen) for m in methods if m != chosen], f"Differences to {chosen}"
    rows, not_compared = _compare_all(found, pairs, progress)
    page.section(
        heading,
        "Same cases, same resampled patients for both models. p: patients' predictions exchanged between the models "
        f"(permutation); Holm: corrected for all {len(rows)} comparisons of this table, so that at most 5 % of such tables "
        "hold a false claim.",
    )
    for sentence in dict.fromkeys(not_compared):
        page.note(f"Not compared: {sentence}.")
    if not rows:
        return
    (_draw_tasks if by_pairs else _draw)(page, rows)
    table = []
    for (method, other), r in rows:
        verdict = {"first": "better", "second": "worse", "": "undecided"}[r.better]
        delong = "" if r.p_delong is None else _p(r.p_delong)
        table.append([*[method, other][: 1 + by_pairs], r.task, r.metric, f"{r.difference:+.3f}",
                      f"{r.low:+.3f} to {r.high:+.3f}", _p(r.p), delong, _p(r.p_holm), verdict])  # fmt: skip
    columns = ["task", "metric", "difference", "95 % interval", "p", "DeLong", "Holm", "verdict"]
    page.table([*["model", "minus"][: 1 + by_pairs], *columns], table)
    _add_ranks(page, found, methods)


def _compare_all(
    found: Results, pairs: Sequence[Pair], progress: Progress | None
) -> tuple[list[tuple[Pair, TaskComparison]], list[str]]:
    """Every shared task of every pair, Holm over all of them; and why a task is not among them."""
    rows, not_compared = [], []
    resamples = int(found.record["settings"].get("num_resamples", 10_000))
    entries = {(e.method, e.task): e for e in found.entries if e.protocol == FULL}
    wanted = [
        (pair, entries[pair[0], task], entries[pair[1], task])
        for pair in pairs
        for task in dict.fromkeys(task for _, task in entries)
        if (pair[0], task) in entries and (pair[1], task) in entries
    ]
    for done, (pair, ours, theirs) in enumerate(wanted, 1):
        try:
            told = compare_results(
                found.folder, first_is=_is(ours), second_is=_is(theirs), num_resamples=resamples, seed=0
            )
            rows += [(pair, row) for row in told.tasks]
        except InputError as error:  # one patient only, or different cases: the other tasks go on
            not_compared.append(f"{ours.task}: {error}")
        if progress:
            progress(done, len(wanted), "comparing models")
    corrected = correct_together([row for _, row in rows])
    return [(pair, row) for (pair, _), row in zip(rows, corrected)], not_compared


def _is(e: Entry) -> dict[str, str]:
    return {name: getattr(e, name) for name in ("task", "model", "features", "head", "protocol")}


def _draw(page: Page, rows: Sequence[tuple[Pair, TaskComparison]]) -> None:
    """One panel a model; quantities in mm or years stay in the table, their axis is another."""
    panels = []
    for pair in dict.fromkeys(pair for pair, _ in rows):
        lines = [_line(r.task.partition(":")[2], r) for p, r in rows if p == pair and r.metric not in IN_UNITS]
        if lines:
            panels.append((f"{pair[0]} minus {pair[1]}", "difference of shares; right: better", 0.0, lines))
    if panels:
        page.figure(
            forest(panels), "Filled: different after Holm's correction. Scores in mm or years are in the table only."
        )


def _draw_tasks(page: Page, rows: Sequence[tuple[Pair, TaskComparison]]) -> None:
    """One panel a task, a row a pair."""
    panels = []
    for task in dict.fromkeys(r.task for _, r in rows):
        some = [(pair, r) for pair, r in rows if r.task == task]
        better = "right" if METRICS[some[0][1].metric].higher_is_better else "left"
        lines = [_line(f"{pair[0]} − {pair[1]}", r) for pair, r in some]
        panels.append((task.partition(":")[2], f"difference in {some[0][1].metric}; {better}: better", 0.0, lines))
    for first in range(0, len(panels), MOST_PANELS):
        page.figure(forest(panels[first : first + MOST_PANELS]), "Filled: different after Holm's correction.")


def _line(name: str, r: TaskComparison) -> Line:
    return Line(name=name, value=r.difference, low=r.low, high=r.high, strong=bool(r.better))


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
