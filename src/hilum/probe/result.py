"""What a probe found: scores computed from prediction rows, and comparisons on common cases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hilum.errors import LabelsError, UsageError
from hilum.metrics import METRICS, Metric
from hilum.probe.heads.head import Task
from hilum.stats import NUM_RESAMPLES, Difference, Interval, bootstrap_interval, paired_difference

Array = NDArray[Any]

TASK_METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("auroc", "accuracy", "balanced_accuracy"),
    "regression": ("r2",),
}


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe found. `predictions` has one row per case; see `hilum.probe.fit.probe` for its columns.

    scores     metric → value with interval, from all out-of-fold rows together
    per_fold   fold, what it held out (None when several groups or an identifier), cases, each metric (None: undefined)
    cluster    what the interval resamples: "patient", "group" or "item"
    clusters   the cluster of each row of `predictions`
    joined_on  label columns that identified the cases
    left_out   cases and labels that were not used, counted by reason
    notes      what a reader of the numbers must know
    """

    target: str
    task: Task
    head: str
    model: str
    contract: str
    level: str
    classes: tuple[str, ...]
    scores: dict[str, Interval]
    per_fold: tuple[dict[str, Any], ...]
    cluster: str
    clusters: tuple[str, ...]
    joined_on: tuple[str, ...]
    left_out: dict[str, int]
    notes: tuple[str, ...]
    predictions: pa.Table

    def table(self) -> list[dict[str, Any]]:
        """One row per metric for printing: metric, value, low, high, chance."""
        return [
            {"metric": name, "value": s.value, "low": s.low, "high": s.high, "chance": METRICS[name].chance}
            for name, s in self.scores.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the predictions stay in their file."""
        names = ("target", "task", "head", "model", "contract", "level", "cluster", "left_out")
        plain: dict[str, Any] = {name: getattr(self, name) for name in names}
        plain["num_cases"] = self.predictions.num_rows
        plain["scores"] = {name: _plain(s) for name, s in self.scores.items()}
        return plain | {n: list(getattr(self, n)) for n in ("classes", "per_fold", "joined_on", "notes")}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """First result minus second on one metric, over the cases that both have."""

    metric: str
    first: str
    second: str
    num_cases: int
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        about = {"metric": self.metric, "first": self.first, "second": self.second, "num_cases": self.num_cases}
        return about | _plain(self.difference.interval) | {"p_value": _or_none(self.difference.p_value)}


def score_columns(predictions: pa.Table, metric: Metric) -> tuple[Array, Array]:
    """What a metric takes, from prediction rows: (true, predicted).

    Classes become their numbers in the order of the proba_ columns; with two classes the score is that of the second.
    """
    if metric.needs == "value":
        return predictions["y_true"].to_numpy(), predictions["y_pred"].to_numpy()
    names = [name for name in predictions.column_names if name.startswith("proba_")]
    number = {name.removeprefix("proba_"): i for i, name in enumerate(names)}
    y_true = np.array([number[v] for v in predictions["y_true"].to_pylist()])
    if metric.needs == "label":
        return y_true, np.array([number[v] for v in predictions["y_pred"].to_pylist()])
    proba = np.stack([predictions[name].to_numpy() for name in names], axis=1)
    return y_true, proba[:, 1] if len(names) == 2 else proba


def score(
    predictions: pa.Table, task: Task, clusters: Sequence[str], *, num_resamples: int, seed: int
) -> dict[str, Interval]:
    """Every metric of the task with its 95 % interval."""
    return {
        name: bootstrap_interval(
            METRICS[name].function,
            *score_columns(predictions, METRICS[name]),
            clusters=np.array(clusters),
            num_resamples=num_resamples,
            seed=seed,
        )
        for name in TASK_METRICS[task]
    }


def score_folds(predictions: pa.Table, task: Task, held_out: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Every metric within each fold; None where it is undefined there."""
    folds = predictions["fold"].to_numpy()
    rows = []
    for fold, name in enumerate(held_out):
        inside = folds == fold
        row: dict[str, Any] = {"fold": fold, "held_out": name or None, "num_cases": int(inside.sum())}
        for metric in TASK_METRICS[task]:
            y_true, predicted = score_columns(predictions, METRICS[metric])
            try:
                row[metric] = METRICS[metric].function(y_true[inside], predicted[inside])
            except ValueError:  # e.g. one class only
                row[metric] = None
        rows.append(row)
    return tuple(rows)


def compare(results: Sequence[ProbeResult], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> list[Comparison]:
    """Every pair of results, on the cases both have, resampling the same patients for both.

    results  two or more of one target and task; `item` names a case across models
    returns  one Comparison per pair and metric, first minus second

    UsageError for one result or different tasks; LabelsError without common cases or with different true values.
    """
    if len(results) < 2 or len({(r.target, r.task, r.classes) for r in results}) > 1:
        raise UsageError("expected two or more results of the same target, task and classes")
    comparisons = []
    for a, b in combinations(results, 2):
        place = {item: i for i, item in enumerate(b.predictions["item"].to_pylist())}
        pairs = [(i, place[item]) for i, item in enumerate(a.predictions["item"].to_pylist()) if item in place]
        if not pairs:
            raise LabelsError(f"{_name(a)} and {_name(b)} have no case in common; expected features of the same scans")
        rows_a, rows_b = (r.predictions.take(list(index)) for r, index in zip((a, b), zip(*pairs)))
        if not rows_a["y_true"].equals(rows_b["y_true"]):
            raise LabelsError(f"{_name(a)} and {_name(b)} disagree on the true values; expected the same labels")
        for metric in TASK_METRICS[a.task]:
            difference = paired_difference(
                METRICS[metric].function,
                score_columns(rows_a, METRICS[metric]),
                score_columns(rows_b, METRICS[metric]),
                clusters=np.array([a.clusters[i] for i, _ in pairs]),
                num_resamples=num_resamples,
                seed=seed,
            )
            comparisons.append(
                Comparison(metric=metric, first=_name(a), second=_name(b), num_cases=len(pairs), difference=difference)
            )
    return comparisons


def _name(result: ProbeResult) -> str:
    return f"{result.model} · {result.head}"


def _plain(interval: Interval) -> dict[str, Any]:
    numbers = {name: _or_none(getattr(interval, name)) for name in ("value", "low", "high")}
    return numbers | {"num_clusters": interval.num_clusters, "num_undefined": interval.num_undefined}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
