"""Prediction rows as the arrays that figures and case tables need. All seeds and draws are pooled: what is drawn is what an
average run does, as a score is the mean over runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hilum.bench.report.pictures import Reliability

Array = NDArray[Any]

BINS = 10
RESAMPLES = 1000  # of the small intervals inside figures
MIN_BIN = 5  # cases of one run; a bin with fewer is not drawn


@dataclass(frozen=True, eq=False)
class Rows:
    """The test rows of one predictions file.

    case, patient   (R,) keyed hashes
    target, output  (R, …) as `bench.predictions` says for the kind
    num_runs        seeds × draws
    """

    case: Array
    patient: Array
    target: Array
    output: Array
    num_runs: int


def pooled_rows(table: pa.Table) -> Rows:
    """The test rows, without those that have no prediction."""
    rows = table.filter(pc.equal(table["split"], "test"))
    runs = {(d, s) for d, s in zip(rows["draw"].to_pylist(), rows["seed"].to_pylist())}
    return Rows(
        case=np.array(rows["case"].to_pylist(), str),
        patient=np.array(rows["patient"].to_pylist(), str),
        target=np.array(rows["target"].to_pylist(), float).reshape(rows.num_rows, -1),
        output=np.array(rows["output"].to_pylist(), float).reshape(rows.num_rows, -1),
        num_runs=max(len(runs), 1),
    )


def reliability_of(kind: str, rows: Rows, name: str, ece: float) -> Reliability:
    """Bins of equal numbers of predictions, with limits that resample patients.

    Of two classes the probability of the second; of more the one of the predicted class, against how often it is right; of
    labels all together, unknown ones left out.
    """
    probability, hit, patient = _chances(kind, rows)
    order = np.argsort(probability, kind="stable")
    num = int(np.clip(len(order) // (MIN_BIN * rows.num_runs), 1, BINS))
    bin_of = np.empty(len(order), np.intp)
    bin_of[order] = np.arange(len(order)) * num // len(order)
    names, who = np.unique(patient, return_inverse=True)
    hits, counts = np.zeros((len(names), num)), np.zeros((len(names), num))
    np.add.at(hits, (who, bin_of), hit)
    np.add.at(counts, (who, bin_of), 1)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES).astype(float)
    drawn = weights @ counts
    shares = np.divide(weights @ hits, drawn, out=np.full(drawn.shape, np.nan), where=drawn > 0)
    low, high = np.nanpercentile(shares, [2.5, 97.5], axis=0)
    mean = np.bincount(bin_of, probability, num) / counts.sum(0)
    return Reliability(name, mean, hits.sum(0) / counts.sum(0), low, high, counts.sum(0) / rows.num_runs, ece)


def _chances(kind: str, rows: Rows) -> tuple[Array, Array, Array]:
    """Predicted probability, whether it came true, and the patient, one a prediction."""
    if kind == "multilabel":
        known = np.isfinite(rows.target)
        who = np.broadcast_to(rows.patient[:, None], rows.target.shape)
        return rows.output[known], rows.target[known], who[known]
    truth = rows.target[:, 0].astype(int)
    if rows.output.shape[1] == 2:
        return rows.output[:, 1], (truth == 1).astype(float), rows.patient
    chosen = rows.output.argmax(1)
    return rows.output.max(1), (chosen == truth).astype(float), rows.patient


def confusion_counts(rows: Rows) -> Array:
    """(C, C) cases of an average run: true class down, predicted across."""
    classes = rows.output.shape[1]
    at = rows.target[:, 0].astype(int) * classes + rows.output.argmax(1)
    return np.bincount(at, minlength=classes**2).reshape(classes, classes) / rows.num_runs


def roc_curve(truth: Array, score: Array) -> tuple[Array, Array]:
    """1 − specificity and sensitivity at every threshold, from (0, 0) to (1, 1); ties are one step."""
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(score[order])), len(order) - 1]
    found = np.cumsum(truth[order])[last]
    false = last + 1 - found
    return np.r_[0, false / max(false[-1], 1)], np.r_[0, found / max(found[-1], 1)]


def kaplan_meier(time: Array, event: Array) -> tuple[Array, Array]:
    """Times, from 0, and the share surviving beyond each: ∏ (1 − deaths / at risk) (Kaplan & Meier 1958)."""
    times = np.unique(time)
    at_risk = len(time) - np.searchsorted(np.sort(time), times)
    deaths = np.array([np.count_nonzero(event[time == t]) for t in times])
    return np.r_[0, times], np.r_[1, np.cumprod(1 - deaths / at_risk)]


def mean_over_runs(rows: Rows) -> Rows:
    """One row a case: the mean output over seeds and draws, in the order of the cases' names."""
    case, first, place = np.unique(rows.case, return_index=True, return_inverse=True)
    sums = np.zeros((len(case), rows.output.shape[1]))
    np.add.at(sums, place, rows.output)
    return Rows(case, rows.patient[first], rows.target[first], sums / np.bincount(place)[:, None], 1)


@dataclass(frozen=True, kw_only=True)
class BadCase:
    """A case that went wrong: how, in words, and by how much (higher is worse)."""

    case: str
    patient: str
    true: str
    predicted: str
    loss: float


def worst_cases(kind: str, rows: Rows, classes: Sequence[str], number: int) -> list[BadCase]:
    """The cases with the largest error, worst first, at most one a patient; of mean predictions over runs."""
    rows = mean_over_runs(rows)
    loss = _losses(kind, rows)
    found: list[BadCase] = []
    seen: set[str] = set()
    for n in np.argsort(-np.nan_to_num(loss, nan=-np.inf), kind="stable"):
        if len(found) == number or not loss[n] > 0:
            break
        if rows.patient[n] in seen:
            continue
        seen.add(rows.patient[n])
        true, predicted = _in_words(kind, rows.target[n], rows.output[n], classes)
        found.append(
            BadCase(case=rows.case[n], patient=rows.patient[n], true=true, predicted=predicted, loss=float(loss[n]))
        )
    return found


def _losses(kind: str, rows: Rows) -> Array:
    target, output = rows.target, rows.output
    if kind == "classification":
        truth = target[:, 0].astype(int)
        share: Array = output.max(1) - output[np.arange(len(output)), truth]
        return share
    if kind == "multilabel":
        error = np.where(np.isfinite(target), np.abs(target - output), 0)
        worst: Array = np.where((error > 0.5).any(1), error.max(1), 0)
        return worst
    if kind == "segmentation":
        dice = case_dice(target, output)
        known = np.isfinite(dice)
        lost: Array = np.where(known, 1 - np.nan_to_num(dice), 0).sum(1) / np.maximum(known.sum(1), 1)
        return lost
    if kind == "retrieval":
        missed: Array = 1 - output[:, 2]
        return missed
    if kind == "survival":
        return np.zeros(len(target))  # a single time says nothing about a risk
    far: Array = np.linalg.norm(output - target, axis=1)
    return far


def case_dice(target: Array, output: Array) -> Array:
    """(N, C) Dice of each case and class; NaN where the class is neither there nor predicted."""
    predicted, shared = output[:, 0::4], output[:, 1::4]
    total = target + predicted
    dice: Array = np.divide(2 * shared, total, out=np.full(total.shape, np.nan), where=total > 0)
    return dice


def _in_words(kind: str, target: Array, output: Array, classes: Sequence[str]) -> tuple[str, str]:
    name = dict(enumerate(classes))
    if kind == "classification":
        truth, chosen = int(target[0]), int(output.argmax())
        return (
            f"{name.get(truth, truth)} (p {output[truth]:.2f})",
            f"{name.get(chosen, chosen)} (p {output[chosen]:.2f})",
        )
    if kind == "multilabel":
        at = int(np.nanargmax(np.abs(target - output)))
        return f"{name.get(at, at)}: {'yes' if target[at] else 'no'}", f"p {output[at]:.2f}"
    if kind == "segmentation":
        dice = case_dice(target[None], output[None])[0]
        at = int(np.nanargmin(dice))
        return f"{name.get(at, at)}: {target[at]:,.0f} voxels", f"{output[4 * at]:,.0f} voxels, Dice {dice[at]:.2f}"
    if kind == "retrieval":
        return str(name.get(int(target[0]), int(target[0]))), f"recall at 10: {output[2]:.2f}, among {output[3]:.0f}"
    return ", ".join(f"{v:.4g}" for v in target), ", ".join(f"{v:.4g}" for v in output)
