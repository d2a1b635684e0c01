"""Prediction rows in, one score with its interval out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hilum import metrics
from hilum.bench.judge.runs import Array, Runs, form, metric_of, read_runs
from hilum.errors import InputError
from hilum.metrics import METRICS
from hilum.stats import (
    NUM_RESAMPLES,
    bootstrap_many,
    delong,
    delong_contrast,
    hanley_mcneil_se,
    interval_of,
    run_spread,
    total_se,
)
from hilum.stats.weighted import mean_defined
from hilum.terminal import few

MEANS_OF_LABELS = (metrics.macro_auroc, metrics.macro_average_precision, metrics.macro_f1)
NUM_NEGATIVES = 99  # of a retrieval trial (VoxelFM, arXiv 2604.04133)
# Simulated (docs/statistics.md): 95 % intervals of skewed errors hold the truth 89 times in 100 with 20 patients, 93 with 50;
# of an AUROC of .92, 77 times with 4 positive patients, 92 with 10.
FEW_PATIENTS = 50
FEW_OF_A_CLASS = 10  # patients


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class or label.

    name         as given, else its number
    metric       AUROC against all others (classification, multilabel), Dice, recall
    value        mean over runs; None where undefined, never 0 for want of a case
    low, high    95 % interval over patients, as the whole score's; None where undefined
    num_cases    where it is known
    num_present  where it is present
    """

    name: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    num_cases: int
    num_present: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the test rows of one predictions file are worth.

    value          mean of the metric over runs: head seeds and draws of training cases
    low, high      95 % interval of that mean, resampling patients (`stats.interval_of`); None when no resample gave a value
    case_se        standard deviation of that mean over the same resamples
    seed_sd        standard deviation over head seeds, pooled over draws; None with one seed
    draw_sd        standard deviation over draws of their means; None with one draw
    total_se       standard error when cases and runs are both a sample (`stats.total_se`)
    se             analytic, of a binary AUROC: "DeLong" (of the mean over runs, patients as clusters), "Hanley-McNeil" (cases
                   as independent); None where there is none
    chance         of a predictor that knows nothing but the test labels' frequencies; None where there is no such level
    per_class      classes or labels, when there are any
    ece, brier     calibration of classification; None else
    num_undefined  resamples without a value
    notes          what a reader of the number must know
    """

    metric: str
    kind: str
    higher_is_better: bool
    value: float
    low: float | None
    high: float | None
    case_se: float | None
    seed_sd: float | None
    draw_sd: float | None
    total_se: float | None
    se: dict[str, float | None]
    chance: float | None
    num_cases: int
    num_patients: int
    num_seeds: int
    num_draws: int
    num_resamples: int
    num_undefined: int
    per_class: tuple[ClassScore, ...]
    ece: float | None
    brier: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def score_predictions(
    predictions: pa.Table,
    metric: str | None = None,
    *,
    classes: Sequence[str] = (),
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Score:
    """Score of the test rows of one predictions file (`bench.predictions`).

    metric         a name in `METRICS` that fits the kind; None: that of the kind. `auroc` of labels is `macro_auroc`
    classes        names of classes or labels for `per_class`
    num_resamples  of patients, for all intervals

    InputError when the rows are not one task with every case in every run, or the metric is undefined on all of them;
    UsageError when the metric does not fit.
    """
    runs = read_runs(predictions)
    name = metric_of(runs.kind, metric)
    columns = [runs.columns(name, d, s) for d in range(len(runs.outputs)) for s in range(runs.outputs.shape[1])]
    parts = _class_parts(runs, name, classes)
    values = [_value(METRICS[name].function, c, name) for c in columns]
    value, notes = float(np.mean(values)), _notes(runs)
    by_part = _draw(runs, METRICS[name].function, columns, parts, num_resamples, seed)
    interval = interval_of(value, by_part[0], runs.patients)
    grid = np.reshape(values, runs.outputs.shape[:2])
    case_se = float(np.nanstd(by_part[0])) if math.isfinite(interval.low) else math.nan
    undefined = interval.num_undefined if interval.num_clusters > 1 else 0  # of one patient nothing was drawn
    if undefined:
        notes.append(f"{name} is undefined in {undefined:,} of {num_resamples:,} resamples; they are left out")
    return Score(
        metric=name,
        kind=runs.kind,
        higher_is_better=METRICS[name].higher_is_better,
        value=value,
        low=_known(interval.low),
        high=_known(interval.high),
        case_se=_known(case_se),
        seed_sd=_known(run_spread(grid).seed_sd),
        draw_sd=_known(run_spread(grid).draw_sd),
        total_se=_known(total_se(case_se, grid)),
        se=_analytic(name, value, columns, runs.patients),
        chance=_chance(runs, name, columns[0][0]),
        num_cases=len(runs.cases),
        num_patients=interval.num_clusters,
        num_seeds=runs.outputs.shape[1],
        num_draws=runs.outputs.shape[0],
        num_resamples=num_resamples,
        num_undefined=undefined,
        per_class=tuple(part.score(drawn, runs.patients) for part, drawn in zip(parts, by_part[1:])),
        ece=_calibration(runs, "ece"),
        brier=_calibration(runs, "brier"),
        notes=tuple(notes),
    )


def _draw(
    runs: Runs,
    metric: Callable[..., float],
    columns: list[tuple[Array, Array]],
    parts: "list[_Part]",
    num_resamples: int,
    seed: int,
) -> Array:
    """Bootstrap values of the score and of each class, means over runs: (1 + classes, R), R = 1 without two patients."""
    if len(np.unique(runs.patients)) < 2:
        return np.full((1 + len(parts), 1), np.nan)
    whole = metric in MEANS_OF_LABELS  # follows from its parts
    wanted = [] if whole else [(metric, c) for c in columns]
    wanted += [(part.function, c) for part in parts for c in part.columns]
    draws = bootstrap_many(wanted, clusters=runs.patients, num_resamples=num_resamples, seed=seed)
    draws = draws.reshape(-1, len(columns), num_resamples)
    if whole:
        draws = np.concatenate([mean_defined(draws)[None], draws])
    means: Array = draws.mean(axis=1)
    return means


def _chance(runs: Runs, metric: str, y_true: Array) -> float | None:
    """`chance_level`; of retrieval the mean of k / candidates, which are fewer where fewer scans lack a label."""
    if runs.kind != "retrieval":
        return chance_level(metric, y_true)
    cut = int(metric.removeprefix("recall_at_"))
    return metrics.mean_recall(y_true, np.minimum(cut / (runs.outputs[0, 0, :, 3] + 1), 1))


def chance_level(metric: str, y_true: Array) -> float | None:
    """Value of a predictor that knows the truth's frequencies and nothing of the case; None where there is no such level.

    accuracy: the commonest class. balanced_accuracy: 1 / classes present. average_precision: share of positives (mean over
    labels). brier: predicting those shares. rmse, mae, mean_distance_mm: predicting mean, median, mean point.
    """
    if METRICS[metric].chance is not None:
        return METRICS[metric].chance
    if metric in ("accuracy", "balanced_accuracy", "brier"):
        share = np.unique(y_true, return_counts=True)[1] / len(y_true)
        if metric == "brier":
            squares = float(1 - (share**2).sum())
            return squares / 2 if len(share) == 2 else squares
        return float(share.max() if metric == "accuracy" else 1 / len(share))
    if metric in ("average_precision", "macro_average_precision"):
        shares = [
            column[~np.isnan(column)].mean() for column in np.atleast_2d(y_true.T.astype(float)) if (column == 1).any()
        ]
        return float(np.mean(shares))
    if metric == "rmse":
        return float(np.std(y_true))
    if metric == "mae":
        return float(np.mean(np.abs(y_true - np.median(y_true))))
    if metric == "mean_distance_mm":
        return metrics.mean_distance_mm(y_true, np.broadcast_to(y_true.mean(axis=0), y_true.shape))
    return None


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One class: a metric and its columns for each run."""

    name: str
    metric: str
    function: Callable[..., float]
    columns: list[tuple[Array, Array]]
    num_cases: int
    num_present: int

    def score(self, draws: Array, patients: Array) -> ClassScore:
        try:
            value = float(np.mean([self.function(*c) for c in self.columns]))
        except ValueError:  # undefined: no case, or one class only
            interval, value = None, math.nan
        else:
            interval = interval_of(value, draws, patients)
        return ClassScore(
            name=self.name,
            metric=self.metric,
            value=_known(value),
            low=_known(interval.low) if interval else None,
            high=_known(interval.high) if interval else None,
            num_cases=self.num_cases,
            num_present=self.num_present,
        )


def _class_parts(runs: Runs, metric: str, classes: Sequence[str]) -> list[_Part]:
    """What is scored class by class: one against the others, the share found, or the metric of that class alone."""
    if runs.kind in ("regression", "survival", "localisation"):
        return []
    y, outputs = runs.target, [o for draw in runs.outputs for o in draw]
    if runs.kind in ("classification", "retrieval"):
        num = outputs[0].shape[1] if runs.kind == "classification" else int(y.max()) + 1
        present = y == np.arange(max(num, len(classes)))
        known = np.ones_like(present)
    else:
        present, known = y > 0, ~np.isnan(y)
    parts = []
    for c in range(present.shape[1]):
        name, function, columns = _one_class(runs.kind, metric, c, y, outputs)
        parts.append(
            _Part(
                name=classes[c] if c < len(classes) else str(c),
                metric=name,
                function=function,
                columns=columns,
                num_cases=int(known[:, c].sum()),
                num_present=int(present[:, c].sum()),
            )
        )
    return parts


def _one_class(
    kind: str, metric: str, c: int, y: Array, outputs: list[Array]
) -> tuple[str, Callable[..., float], list[tuple[Array, Array]]]:
    if kind == "retrieval":
        columns = [form(kind, metric, y, o) for o in outputs]
        column = ("recall_at_1", "recall_at_5", "recall_at_10").index(metric)
        return metric, metrics.mean_where, [(labels == c, recalls[:, column]) for labels, recalls in columns]
    if kind == "classification" and METRICS[metric].needs == "label":
        return "share found", metrics.mean_where, [(y[:, 0] == c, o.argmax(axis=1) == c) for o in outputs]
    if kind == "classification":
        return "auroc", metrics.auroc, [((y[:, 0] == c).astype(np.intp), o[:, c]) for o in outputs]
    name = "macro_auroc" if metric == "macro_auroc_rate" else metric
    columns = [form(kind, name, y, o) for o in outputs]
    return name.removeprefix("macro_"), METRICS[name].function, [(t[:, c : c + 1], p[:, c : c + 1]) for t, p in columns]


def _value(function: Callable[..., float], columns: tuple[Array, Array], name: str) -> float:
    try:
        return function(*columns)
    except ValueError as error:
        raise InputError(f"{name} has no value on these {len(columns[0])} test cases: {error}") from None


def _analytic(
    metric: str, value: float, columns: list[tuple[Array, Array]], patients: Array
) -> dict[str, float | None]:
    y, score = columns[0]
    if metric != "auroc" or score.ndim > 1:
        return {"DeLong": None, "Hanley-McNeil": None}
    hanley = hanley_mcneil_se(value, int(np.sum(y == 1)), int(np.sum(y == 0)))
    try:
        areas, covariance = delong(y, [score for _, score in columns], patients)
    except ValueError:  # a class with one case or patient
        return {"DeLong": None, "Hanley-McNeil": hanley}
    mean = [1 / len(columns)] * len(columns)
    return {"DeLong": delong_contrast(areas, covariance, mean).se, "Hanley-McNeil": hanley}


def _calibration(runs: Runs, metric: str) -> float | None:
    if runs.kind != "classification":
        return None
    pairs = [form(runs.kind, metric, runs.target, o) for draw in runs.outputs for o in draw]
    return float(np.mean([_value(METRICS[metric].function, pair, metric) for pair in pairs]))


def _notes(runs: Runs) -> list[str]:
    notes, num_patients = [], len(np.unique(runs.patients))
    if num_patients == 1:
        notes.append("all test cases are of one patient: there is no interval")
    elif num_patients < FEW_PATIENTS:
        notes.append(f"{num_patients} patients: below {FEW_PATIENTS}, intervals may run too narrow")
    if runs.kind == "classification" and num_patients > 1:
        least = min(len(np.unique(runs.patients[runs.target[:, 0] == c])) for c in np.unique(runs.target))
        if least < FEW_OF_A_CLASS:
            notes.append(
                f"a class with {least} patients: below {FEW_OF_A_CLASS}, its scores have intervals that run too narrow"
            )
    if len(runs.cases) > 1 and (runs.outputs == runs.outputs[:, :, :1]).all():
        notes.append("every case has the same output: the features or the head say nothing about the case")
    if runs.kind == "segmentation":
        predicted = runs.outputs[0, 0].reshape(len(runs.cases), -1, 4)[..., 0]
        empty = metrics.empty_masks(runs.target, predicted)
        notes.append(
            f"of {runs.target.size:,} cases × classes {empty.num_absent:,} are absent and not predicted (left out), "
            f"{empty.num_false:,} absent but predicted (Dice 0; {empty.false_positive_voxels:,} voxels), first run"
        )
    if runs.kind == "retrieval":
        least, most = (int(f(runs.outputs[0, 0, :, 3])) for f in (np.min, np.max))
        of = f"{least}" if least == most else f"{least} to {most}"
        fewer = "" if least == NUM_NEGATIVES else f", not {NUM_NEGATIVES} as VoxelFM has: too few scans lack the label"
        notes.append(f"each scan sought stands among {of} that lack the label{fewer}")
    if runs.kind == "multilabel":
        one = [str(n) for n, y in enumerate(runs.target.T) if len(np.unique(y[~np.isnan(y)])) < 2]
        if one:
            notes.append(f"labels without both classes among the known cases, not in the mean: {few(one)}")
    return notes


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
