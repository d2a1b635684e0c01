"""Two models on the same cases: paired differences, tests, and what remains after correcting for the number of tasks."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hilum.bench.judge.runs import Array, Runs, metric_of, read_runs
from hilum.bench.predictions import read_predictions
from hilum.errors import InputError, UsageError
from hilum.metrics import METRICS
from hilum.records import read_table, table_metadata
from hilum.stats import (
    NUM_RESAMPLES,
    MeanRank,
    bootstrap_many,
    delong,
    delong_contrast,
    difference_of,
    holm,
    mean_ranks,
    permutation_test_of_runs,
)
from hilum.terminal import Progress, few, format_table

ALPHA = 0.05
SETTINGS = ("task", "model", "features", "head", "protocol")
Key = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """First minus second on one task, over the cases that both have; means over runs.

    setting        what tells this row from others of its task: features, head, protocol, where they vary
    first, second  the metric
    low, high      95 % interval of the difference, the same resampled patients for both
    p              paired permutation of patients; `exact` when all exchanges were taken
    p_bootstrap    the interval turned round
    p_delong       of a binary AUROC, patients as clusters; None else
    p_holm         `p` corrected for the number of rows of this comparison
    better         after that correction, at 5 %
    only_first     cases that the other has not; they are not used
    """

    task: str
    setting: str
    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    exact: bool
    p_bootstrap: float
    p_delong: float | None
    p_holm: float
    better: Literal["first", "second", ""]
    num_cases: int
    num_patients: int
    only_first: int
    only_second: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on all tasks they share. `left_out` names what could not be compared, with the reason, `pooled`
    where the two see other features."""

    first: str
    second: str
    tasks: tuple[TaskComparison, ...]
    first_rank: MeanRank
    second_rank: MeanRank
    left_out: tuple[str, ...]
    num_resamples: int
    pooled: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Who is better, on how many tasks, and the mean ranks."""
        won, lost = (sum(t.better == side for t in self.tasks) for side in ("first", "second"))
        number, one = len(self.tasks), self.first_rank
        return (
            f"{self.first} is better than {self.second} on {won} of {number} {'task' if number == 1 else 'tasks'} after Holm "
            f"(p < {ALPHA:g}), worse on {lost}, undecided on {number - won - lost}; mean rank "
            f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f}) against {self.second_rank.value:.2f}."
        )

    def table(self) -> str:
        """One line a task, at most 100 columns."""
        setting, delong = any(t.setting for t in self.tasks), any(t.p_delong is not None for t in self.tasks)
        columns = [
            "task",
            *["setting"] * setting,
            "metric",
            "A",
            "B",
            "A − B (95 %)",
            "p",
            "Holm",
            *["DeLong"] * delong,
        ]
        rows = []
        for t in self.tasks:
            difference = f"{t.difference:+.3f} ({t.low:+.3f}, {t.high:+.3f})"
            tests = [p_text(t.p), p_text(t.p_holm), *[p_text(t.p_delong)] * delong]
            rows.append([t.task, *[t.setting] * setting, t.metric, t.first, t.second, difference, *tests, t.num_cases])
        table = format_table([*columns, "cases"], rows, whole=("A − B (95 %)", "p", "Holm", "DeLong"))
        return f"A: {self.first}\nB: {self.second}\n\n{table}"

    def notes(self) -> list[str]:
        """Cases and tasks that were not used."""
        found = [
            f"{t.task}: {t.only_first:,} cases only in A, {t.only_second:,} only in B; {t.num_cases:,} compared"
            for t in self.tasks
            if t.only_first or t.only_second
        ]
        return [*found, *self.pooled, *(f"left out: {text}" for text in self.left_out)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"sentence": self.sentence(), "notes": self.notes()}


def compare_results(
    first: Path,
    second: Path | None = None,
    *,
    first_is: Mapping[str, str] | None = None,
    second_is: Mapping[str, str] | None = None,
    metrics: Mapping[str, str] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two RESULTS folders, or two models (heads, protocols, …) within one.

    first, second        RESULTS folders; without `second` both sides are in `first`
    first_is, second_is  what a side is, e.g. {"model": "curia-2-b"}, {"head": "knn"}; keys among task, model, features, head,
                         protocol. What neither side names must be equal in both; the model need not be where each folder
                         holds one, nor the features where each side has one for a task: encoders pool in their own ways
    metrics              task → metric; else what the predictions file names, else that of the kind

    UsageError when a side is ambiguous or empty; InputError when nothing is shared, or the two sides disagree on the truth.
    """
    one, two = dict(first_is or {}), dict(second_is or {})
    if unknown := (one.keys() | two.keys()) - set(SETTINGS):
        raise UsageError(f"unknown setting {few(sorted(unknown))}; expected one of {', '.join(SETTINGS)}")
    found = [find_predictions(folder, wanted) for folder, wanted in ((first, one), (second or first, two))]
    free = {"model"} if second and all(len({k[1] for k in f}) == 1 for f in found) else set()
    matched = [name for name in SETTINGS if name not in one and name not in two and name not in free]
    sides, pooled = _whatever_features(_by_key(found[0], matched), _by_key(found[1], matched), matched)
    both = sorted(sides[0].keys() & sides[1].keys())
    if not both or any(sides[0][k] == sides[1][k] for k in both):
        raise UsageError(
            f"nothing to compare: the sides must differ in what is named and share {', '.join(matched)}. "
            f"First: {_listed(found[0])}. Second: {_listed(found[1])}"
        )
    rows: list[tuple[TaskComparison, Array]] = []
    left_out = [_name(k) for k in sorted(sides[0].keys() ^ sides[1].keys())]
    left_out = [f"{name}: only one side has it" for name in left_out]
    varying = _varying(both, matched)
    for done, key in enumerate(both):
        setting = " ".join(key[n] for n in varying)
        try:
            rows.append(_compare_task(sides[0][key], sides[1][key], setting, metrics or {}, num_resamples, seed))
        except ValueError as error:  # undefined on the common cases, or one patient only
            left_out.append(f"{_name(key)}: {error}".removeprefix(": "))
        if progress:
            progress(done + 1, len(both), "comparing")
    if not rows:
        raise InputError(f"no task can be compared: {few(left_out)}")
    told = _summary(rows, _side_name(first, one, found[0], free), _side_name(second or first, two, found[1], free), left_out,
                    num_resamples)  # fmt: skip
    return replace(told, pooled=tuple(pooled))


def _compare_task(
    first: Path, second: Path, setting: str, metrics: Mapping[str, str], num_resamples: int, seed: int
) -> tuple[TaskComparison, Array]:
    """One row without its correction, and the bootstrap values (2, R)."""
    tables = read_predictions(first), read_predictions(second)
    task = tables[0]["task"][0].as_py()
    a, b, only = _common(task, *map(read_runs, tables))
    name = metric_of(a.kind, metrics.get(task) or _named_metric(tables[0]))
    metric = METRICS[name].function
    columns = [[r.columns(name, d, s) for d, s in np.ndindex(r.outputs.shape[:2])] for r in (a, b)]
    values = [float(np.mean([metric(*c) for c in side])) for side in columns]
    stream = (seed, zlib.crc32(task.encode()))  # tasks are different patients: their draws are independent
    wanted = [(metric, c) for side in columns for c in side]
    draws = bootstrap_many(wanted, clusters=a.patients, num_resamples=num_resamples, seed=stream)
    drawn = np.stack([part.mean(axis=0) for part in (draws[: len(columns[0])], draws[len(columns[0]) :])])
    found = difference_of(values[0] - values[1], drawn[0] - drawn[1], a.patients)
    tested = permutation_test_of_runs(
        metric, *columns, clusters=a.patients, num_permutations=num_resamples, seed=(*stream, 1)
    )
    row = TaskComparison(
        task=task,
        setting=setting,
        metric=name,
        first=values[0],
        second=values[1],
        difference=found.interval.value,
        low=found.interval.low,
        high=found.interval.high,
        p=tested.p_value,
        exact=tested.exact,
        p_bootstrap=found.p_value,
        p_delong=_delong_p(name, columns, a.patients),
        p_holm=math.nan,
        better="",
        num_cases=len(a.cases),
        num_patients=found.interval.num_clusters,
        only_first=only[0],
        only_second=only[1],
    )
    return row, drawn


def _common(task: str, a: Runs, b: Runs) -> tuple[Runs, Runs, tuple[int, int]]:
    """Both sides on the cases that both have, in one order, and how many only one has."""
    place = {case: n for n, case in enumerate(b.cases)}
    pairs = np.array([(n, place[case]) for n, case in enumerate(a.cases) if case in place], dtype=np.intp).reshape(
        -1, 2
    )
    if len(pairs) == 0 or a.kind != b.kind:
        raise InputError(
            f"{task}: the two sides have no case in common; expected results made from the same data with the same key"
        )
    x, y = a.take(pairs[:, 0]), b.take(pairs[:, 1])
    if x.target.shape != y.target.shape or not np.array_equal(x.target, y.target, equal_nan=True):
        raise InputError(f"{task}: the two sides disagree on the true values of cases; expected the same labels")
    if (x.patients != y.patients).any():
        raise InputError(f"{task}: the two sides disagree on which patient a case belongs to; expected the same labels")
    return x, y, (len(a.cases) - len(pairs), len(b.cases) - len(pairs))


def _delong_p(metric: str, columns: list[list[tuple[Array, Array]]], patients: Array) -> float | None:
    y, score = columns[0][0]
    if metric != "auroc" or score.ndim > 1:
        return None
    weights = [sign / len(side) for sign, side in zip((1, -1), columns) for _ in side]
    try:
        areas, covariance = delong(y, [s for side in columns for _, s in side], patients)
    except ValueError:  # a class with one case or patient
        return None
    p_value = delong_contrast(areas, covariance, weights).p_value
    return None if math.isnan(p_value) else p_value


def correct_together(rows: Sequence[TaskComparison]) -> list[TaskComparison]:
    """The rows with `p_holm` and `better` after Holm's correction for all of them."""
    corrected = []
    for row, p_holm in zip(rows, holm([row.p for row in rows]).tolist()):
        ahead = (row.difference > 0) == METRICS[row.metric].higher_is_better
        side: Literal["first", "second"] = "first" if ahead else "second"
        corrected.append(replace(row, p_holm=p_holm, better=side if p_holm < ALPHA else ""))
    return corrected


def _summary(
    rows: list[tuple[TaskComparison, Array]], first: str, second: str, left_out: list[str], num_resamples: int
) -> Comparison:
    tasks = correct_together([row for row, _ in rows])
    ranks = mean_ranks(
        [[row.first, row.second] for row, _ in rows],
        [drawn for _, drawn in rows],
        [METRICS[row.metric].higher_is_better for row, _ in rows],
    )
    return Comparison(
        first=first,
        second=second,
        tasks=tuple(tasks),
        first_rank=ranks[0],
        second_rank=ranks[1],
        left_out=tuple(left_out),
        num_resamples=num_resamples,
    )


def find_predictions(results: Path, wanted: Mapping[str, str]) -> dict[Key, Path]:
    """Predictions files of one side by (task, model, features, head, protocol)."""
    paths = sorted((results / "predictions").glob("*.parquet"))
    if not paths:
        raise InputError(f"{results} holds no predictions; expected a RESULTS folder of hilum bench run")
    found: dict[Key, Path] = {}
    for path in paths:
        rows = read_table(path, columns=list(SETTINGS)).slice(0, 1).to_pylist()
        key = tuple(str(rows[0][name]) for name in SETTINGS) if rows else ()
        if key and all(key[SETTINGS.index(name)] == value for name, value in wanted.items()):
            found[key] = path
    if not found:
        everything = find_predictions(results, {}) if wanted else {}
        raise UsageError(f"no predictions with {dict(wanted)} in {results.name}; there are {_listed(everything)}")
    return found


def _by_key(found: Mapping[Key, Path], matched: list[str]) -> dict[Key, Path]:
    sides: dict[Key, Path] = {}
    for key, path in found.items():
        short = tuple(key[SETTINGS.index(name)] for name in matched)
        if short in sides:
            raise UsageError(
                f"several predictions for {_name(short)}: {_listed(found)}. Say which, e.g. a model or a head"
            )
        sides[short] = path
    return sides


def _whatever_features(
    first: dict[Key, Path], second: dict[Key, Path], matched: list[str]
) -> tuple[tuple[dict[Key, Path], dict[Key, Path]], list[str]]:
    """Both sides with the features struck out of the keys that have one on each side, but another; and a note on each."""
    notes: list[str] = []
    if "features" not in matched:
        return (first, second), notes
    at = matched.index("features")
    rest = [{key: (*key[:at], "", *key[at + 1 :]) for key in side} for side in (first, second)]
    for short in sorted(set(rest[0].values()) & set(rest[1].values())):
        one, two = ([key for key, name in side.items() if name == short] for side in rest)
        if len(one) == len(two) == 1 and one != two:
            first[short], second[short] = first.pop(one[0]), second.pop(two[0])
            notes.append(f"{_name(short)}: features {one[0][at]} of A, {two[0][at]} of B")
    return (first, second), notes


def _varying(keys: Sequence[Key], names: Sequence[str]) -> list[int]:
    """Places of the keys that tell rows of one task apart."""
    tasks: dict[str, list[Key]] = {}
    for key in keys:
        tasks.setdefault(key[names.index("task")] if "task" in names else "", []).append(key)
    return [n for n in range(len(names)) if any(len({key[n] for key in some}) > 1 for some in tasks.values())]


def _listed(found: Mapping[Key, Path]) -> str:
    parts = [(name, sorted({key[n] for key in found})) for n, name in enumerate(SETTINGS)]
    return "; ".join(f"{name} {few(values, 4)}" for name, values in parts)


def _name(key: Key) -> str:
    return " ".join(part for part in key if part)


def _side_name(results: Path, wanted: Mapping[str, str], found: Mapping[Key, Path], free: set[str]) -> str:
    if wanted:
        return " · ".join(wanted.values())
    return next(iter(found))[SETTINGS.index("model")] if free else results.name


def _named_metric(table: pa.Table) -> str | None:
    metric = table_metadata(table).get("metric")
    return str(metric) if metric else None


def p_text(value: float | None) -> str:
    """A p value in few letters."""
    if value is None or math.isnan(value):
        return "–"
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
