"""Tables of results: models down, tasks across, as in the papers; the same for spreadsheets (CSV) and papers (LaTeX)."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hilum.bench.catalogue.published import Published, published_scores
from hilum.bench.report.results import FULL, Entry, Results
from hilum.bench.task import Task
from hilum.metrics import METRICS

IN_UNITS = frozenset({"mae", "rmse", "mean_distance_mm", "hd95_mm", "surface_distance_mm"})  # all others are shares


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number with its 95 % limits; NaN limits are unknown."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def scaled(self, factor: float) -> "Cell":
        return Cell(value=self.value * factor, low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model: its cell of each task, their average. `published`: numbers of a paper, not ours."""

    name: str
    cells: Mapping[str, Cell]
    average: Cell | None = None
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class Board:
    """Models × tasks of one suite under one protocol; `metrics` by task, None where nothing was measured."""

    suite: str
    tasks: tuple[str, ...]
    metrics: Mapping[str, str]
    lines: tuple[Line, ...]

    def best(self, task: str) -> Line | None:
        """Of our own numbers."""
        ours = [line for line in self.lines if task in line.cells and not line.published]
        sign = 1 if METRICS[self.metrics[task]].higher_is_better else -1
        return max(ours, key=lambda line: sign * line.cells[task].value, default=None)


def cell_of(entry: Entry) -> Cell:
    low, high = entry.score.low, entry.score.high
    return Cell(
        value=entry.score.value,
        low=math.nan if low is None else low,
        high=math.nan if high is None else high,
    )


def published_of(task: Task, metric: str) -> list[Published]:
    """What papers print for a task in this metric."""
    return [p for p in published_scores(task) if p.metric == metric]


def cell_of_paper(p: Published) -> Cell:
    """Limits are 1.96 of the printed standard errors away, where there are any."""
    half = math.nan if p.se is None else 1.96 * p.se
    return Cell(value=p.score, low=p.score - half, high=p.score + half)


# Names of released weights that papers call otherwise.
_ALSO = {"curia": "curiab", "curia2": "curia2b"}


def same_model(ours: str, theirs: str) -> bool:
    """Whether two spellings mean one model: "curia-2-b" and "Curia-2 B"; "curia-2", the released weights, is that one, too."""
    first, second = ("".join(c for c in name.lower() if c.isalnum()) for name in (ours, theirs))
    return _ALSO.get(first, first) == second


def make_board(results: Results, suite: str, protocol: str = FULL) -> Board | None:
    """The table of one suite, our models first, then what papers print for the same tasks and metrics; None when nothing
    of the suite was run under this protocol."""
    entries = results.of_suite(suite, protocol)
    if not entries:
        return None
    metrics = {e.task: e.score.metric for e in entries}
    ours: dict[str, dict[str, Cell]] = defaultdict(dict)
    theirs: dict[str, dict[str, Cell]] = defaultdict(dict)
    for e in entries:
        ours[e.method][e.task] = cell_of(e)
    for task, metric in metrics.items():
        for p in published_of(results.tasks[task], metric):
            theirs[p.model][task] = cell_of_paper(p)
    averaged = [t for t, m in metrics.items() if m not in IN_UNITS and METRICS[m].higher_is_better]
    data = {t: results.tasks[t].dataset for t in metrics}
    lines = [
        Line(name=name, cells=cells, average=average(cells, averaged, data), published=found is theirs)
        for found in (ours, theirs)
        for name, cells in found.items()
    ]
    return Board(suite=suite, tasks=tuple(metrics), metrics=metrics, lines=tuple(lines))


def average(cells: Mapping[str, Cell], tasks: Sequence[str], data: Mapping[str, str]) -> Cell | None:
    """Plain mean over tasks, as the papers print it; None unless all are there.

    data   the data set of each task

    Limits from those of the tasks (MOVER: Zou & Donner, *Stat. Med.* 27, 2008): distances to the limits add in squares
    between data sets, whose patients differ, and plainly within one, whose tasks share patients.
    """
    if len(tasks) < 2 or any(t not in cells for t in tasks):
        return None
    value = sum(cells[t].value for t in tasks) / len(tasks)
    below: dict[str, float] = defaultdict(float)
    above: dict[str, float] = defaultdict(float)
    for t in tasks:
        below[data[t]] += cells[t].value - cells[t].low
        above[data[t]] += cells[t].high - cells[t].value
    down, up = (math.sqrt(sum(d**2 for d in side.values())) / len(tasks) for side in (below, above))
    return Cell(value=value, low=value - down, high=value + up)


def text_of(cell: Cell | None, metric: str, line_break: str = "\n") -> str:
    """ "91.2⏎88.1–94.0": shares × 100, quantities with a unit as they are."""
    if cell is None:
        return ""
    if metric not in IN_UNITS:
        cell, form = cell.scaled(100), ".1f"
    else:
        form = ".3g"
    if math.isnan(cell.low):
        return f"{cell.value:{form}}"
    return f"{cell.value:{form}}{line_break}{cell.low:{form}} to {cell.high:{form}}"


CSV_COLUMNS = (
    "source", "task", "protocol", "model", "features", "head", "metric", "value", "low", "high", "seed_sd", "draw_sd",
    "chance", "num_cases", "num_patients", "num_seeds", "num_draws",
)  # fmt: skip


def results_csv(results: Results) -> str:
    """All scores, one a line, ours first, then the published ones of the same tasks and metrics; in the metric's own scale."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for e in results.entries:
        same = {name: getattr(e.score, name) for name in CSV_COLUMNS if hasattr(e.score, name)}
        named = {name: getattr(e, name) for name in ("task", "protocol", "model", "features", "head")}
        writer.writerow({"source": "ours", **named, **{k: "" if v is None else v for k, v in same.items()}})
    for task, metric in dict.fromkeys((e.task, e.score.metric) for e in results.entries):
        for p in published_of(results.tasks[task], metric):
            cell = cell_of_paper(p)
            row = {"source": "published", "task": task, "model": p.model, "metric": metric, "value": cell.value}
            writer.writerow(row | ({} if math.isnan(cell.low) else {"low": cell.low, "high": cell.high}))
    return out.getvalue()


def board_latex(board: Board) -> str:
    """A table for a paper (package booktabs): best of ours bold, published numbers in italics."""
    best = {task: board.best(task) for task in board.tasks}
    shown_average = any(line.average for line in board.lines)
    head = ["model", *(t.partition(":")[2] for t in board.tasks)]
    head += ["mean"] * shown_average
    lines = [
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small",
        rf"\caption{{{_tex(_caption(board))}}}", rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}", r"\toprule",
        " & ".join(map(_tex, head)) + r" \\",
        " & ".join(["", *(_tex(board.metrics[t]) for t in board.tasks), *[""] * shown_average]) + r" \\",
        r"\midrule",
    ]  # fmt: skip
    was_ours = True
    for line in board.lines:
        if line.published and was_ours:
            lines.append(r"\midrule")
            was_ours = False
        cells = [_tex_cell(text_of(line.cells.get(t), board.metrics[t]), best[t] is line) for t in board.tasks]
        cells += [_tex_cell(text_of(line.average, "auroc"))] * shown_average
        name = rf"\textit{{{_tex(line.name)} (published)}}" if line.published else _tex(line.name)
        lines.append(" & ".join([name, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _caption(board: Board) -> str:
    theirs = " Numbers in italics are copied from the papers." if any(line.published for line in board.lines) else ""
    return f"{board.suite}: scores with 95 % intervals over patients, shares times 100.{theirs}"


def _tex_cell(text: str, bold: bool = False) -> str:
    value, _, limits = text.partition("\n")
    shown = rf"\textbf{{{value}}}" if bold and value else value
    return shown + (rf" {{\scriptsize [{limits.replace(' to ', ', ')}]}}" if limits else "")


def _tex(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "·": r"$\cdot$",
    }
    return "".join({**special, "\\": r"\textbackslash{}"}.get(c, c) for c in text)
