"""Metrics of classes and labels: arrays in, one number out. Undefined is a ValueError, never a guess."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

NUM_BINS = 15


def auroc(y_true: ArrayLike, score: ArrayLike) -> float:
    """Area under the ROC curve: how often a random positive scores higher than a random negative; ties count half.

    y_true   (N,) of 0 and 1, or class numbers 0 … C-1 when `score` has C columns
    score    (N,) for class 1, or (N, C), finite
    returns  0 … 1; with C columns the plain mean over the classes present, each against all others

    With mid-ranks r: (Σ r over positives - n₊(n₊+1)/2) / (n₊ · n₋), the Mann-Whitney form (Hanley & McNeil 1982).
    ValueError when fewer than two classes are present.
    """
    y, s = np.asarray(y_true), np.asarray(score, dtype=np.float64)
    check_lengths(y, s)
    if not np.isfinite(s).all():
        raise ValueError("AUROC needs finite scores")
    if s.ndim == 1:
        if not np.isin(y, (0, 1)).all():
            raise ValueError("binary AUROC expects labels 0 and 1; for more classes give one score column per class")
        columns, classes = s[:, None], np.array([1])
        y = y.astype(np.intp)
    else:
        columns, classes = s, np.arange(s.shape[1])
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= len(classes):
            raise ValueError(f"AUROC with {len(classes)} score columns expects class numbers 0 to {len(classes) - 1}")
    counts = np.array([np.count_nonzero(y == c) for c in classes], dtype=np.float64)
    usable = (counts > 0) & (counts < len(y))
    if not usable.any():
        raise ValueError("AUROC is undefined: only one class is present")
    ranks = rankdata(columns[:, usable], axis=0)
    counts = counts[usable]
    rank_sums = (ranks * (y[:, None] == classes[usable])).sum(axis=0)
    areas = (rank_sums - counts * (counts + 1) / 2) / (counts * (len(y) - counts))
    return float(areas.mean())


def accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Share of cases whose class is right: #(y_pred = y_true) / N. Both (N,); returns 0 … 1."""
    y, p = np.asarray(y_true), np.asarray(y_pred)
    check_lengths(y, p)
    return float(np.mean(y == p))


def balanced_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean over the classes present of the share found: (1/C) Σ_c #(y_true = c and y_pred = c) / #(y_true = c).

    y_true, y_pred  (N,) classes
    returns         0 … 1

    ValueError when only one class is present.
    """
    y, p = np.asarray(y_true), np.asarray(y_pred)
    check_lengths(y, p)
    _, codes = np.unique(y, return_inverse=True)
    if codes.max() == 0:
        raise ValueError("balanced accuracy is undefined: only one class is present")
    return float(np.mean(np.bincount(codes, weights=y == p) / np.bincount(codes)))


def f1(y_true: ArrayLike, score: ArrayLike) -> float:
    """F1 at a threshold of .5: 2·TP / (2·TP + FP + FN).

    y_true  (N,) of 0 and 1, or class numbers when `score` has C columns
    score   (N,) probability of class 1, positive from .5 on; or (N, C), where the likeliest class is the prediction and
            the value is the mean over the classes that are true or predicted somewhere

    ValueError when no case is positive, neither in truth nor in prediction.
    """
    y, s = np.asarray(y_true), np.asarray(score, dtype=np.float64)
    check_lengths(y, s)
    classes = np.array([1]) if s.ndim == 1 else np.arange(s.shape[1])
    predicted = (s >= 0.5).astype(np.intp) if s.ndim == 1 else s.argmax(axis=1)
    true, said = y[:, None] == classes, predicted[:, None] == classes
    twice, either = 2 * (true & said).sum(axis=0), true.sum(axis=0) + said.sum(axis=0)
    if not either.any():
        raise ValueError("F1 is undefined: no case is positive, and none is predicted so")
    return float(np.mean(twice[either > 0] / either[either > 0]))


def average_precision(y_true: ArrayLike, score: ArrayLike) -> float:
    """Area under the precision-recall curve, as a sum of steps: Σ (Rₙ - Rₙ₋₁) Pₙ; tied scores are one step.

    y_true   (N,) of 0 and 1
    score    (N,), finite, higher means more likely
    returns  0 … 1; the share of positives for a score that knows nothing

    ValueError without a positive.
    """
    y, s = np.asarray(y_true), np.asarray(score, dtype=np.float64)
    check_lengths(y, s)
    if s.ndim != 1 or not np.isfinite(s).all() or not np.isin(y, (0, 1)).all():
        raise ValueError("average precision expects labels 0 and 1, and one finite score each")
    order = np.argsort(-s, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(s[order])), len(s) - 1)
    found = np.cumsum(y[order], dtype=np.float64)[ends]
    if found[-1] == 0:
        raise ValueError("average precision is undefined: no case is positive")
    return float(np.sum(np.diff(found, prepend=0.0) * found / (ends + 1)) / found[-1])


def label_scores(metric: Any, y_true: ArrayLike, score: ArrayLike) -> NDArray[np.float64]:
    """A binary metric of each label of a multi-label target, over the cases where the label is known.

    y_true   (N, L) of 0, 1 and NaN (unknown)
    score    (N, L)
    returns  (L,); NaN where the metric is undefined, e.g. only one class is known
    """
    y, s = np.asarray(y_true, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if y.ndim != 2 or y.shape != s.shape:
        raise ValueError(f"expected targets and scores (cases, labels); found {y.shape}, {s.shape}")
    values = np.full(y.shape[1], np.nan)
    for label in range(y.shape[1]):
        known = ~np.isnan(y[:, label])
        try:
            values[label] = metric(y[known, label], s[known, label])
        except ValueError:  # undefined for this label
            continue
    return values


def macro_auroc(y_true: ArrayLike, score: ArrayLike) -> float:
    """Mean AUROC over the labels where it is defined; see `label_scores`. ValueError when there is none."""
    return _mean_defined(label_scores(auroc, y_true, score))


def macro_auroc_rate(y_true: ArrayLike, score: ArrayLike) -> float:
    """As `macro_auroc`, but a label with one class counts as 0: the rule of the public RATE evaluation."""
    return float(np.mean(np.nan_to_num(label_scores(auroc, y_true, score))))


def macro_average_precision(y_true: ArrayLike, score: ArrayLike) -> float:
    """Mean average precision over the labels where it is defined; see `label_scores`."""
    return _mean_defined(label_scores(average_precision, y_true, score))


def macro_f1(y_true: ArrayLike, score: ArrayLike) -> float:
    """Mean F1 at .5 over the labels where it is defined; see `label_scores`."""
    return _mean_defined(label_scores(f1, y_true, score))


def brier(y_true: ArrayLike, proba: ArrayLike) -> float:
    """Mean squared error of probabilities (Brier 1950): Σ_c (p_c - [y = c])², averaged over cases.

    proba    (N,) of class 1: (p - y)², 0 … 1; or (N, C): summed over the classes, 0 … 2
    """
    y, p = np.asarray(y_true), np.asarray(proba, dtype=np.float64)
    check_lengths(y, p)
    if p.ndim == 1:
        return float(np.mean((p - y) ** 2))
    return float(np.mean(((p - (y[:, None] == np.arange(p.shape[1]))) ** 2).sum(axis=1)))


def ece(y_true: ArrayLike, proba: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error (Guo et al. 2017): Σ_b n_b / N · |accuracy_b - confidence_b|.

    proba     (N,) of class 1, or (N, C); the confidence is that of the predicted class
    num_bins  of equal width over 0 … 1, open to the left
    """
    bins, hit, confidence = confidence_bins(y_true, proba, num_bins)
    gaps = np.bincount(bins, weights=hit - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(bins))


def confidence_bins(
    y_true: ArrayLike, proba: ArrayLike, num_bins: int = NUM_BINS
) -> tuple[NDArray[np.intp], NDArray[np.bool_], NDArray[np.float64]]:
    """What ECE and reliability diagrams count: bin, rightness and confidence of each case, all (N,)."""
    y, p = np.asarray(y_true), np.asarray(proba, dtype=np.float64)
    check_lengths(y, p)
    columns = np.stack([1 - p, p], axis=1) if p.ndim == 1 else p
    if not ((columns >= -1e-6) & (columns <= 1 + 1e-6)).all():
        raise ValueError("calibration needs probabilities between 0 and 1")
    confidence = columns.max(axis=1).clip(max=1.0)
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.intp) - 1, 0, num_bins - 1)
    return bins, columns.argmax(axis=1) == y, confidence


def check_lengths(y: NDArray[Any], prediction: NDArray[Any]) -> None:
    """ValueError unless there are as many predictions as labels (N,), at least one."""
    if y.ndim != 1 or len(y) != len(prediction) or len(y) == 0:
        raise ValueError(f"expected as many predictions as labels, at least one; found {y.shape}, {prediction.shape}")


def _mean_defined(values: NDArray[np.float64]) -> float:
    if np.isnan(values).all():
        raise ValueError("undefined for every label: no label has both classes among its known cases")
    return float(np.nanmean(values))
