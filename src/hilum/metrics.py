"""Metrics: arrays in, one number out. numpy and scipy only.

Where a metric is undefined (one class only, no spread) it raises ValueError with the reason; it never returns a guess.
Whoever calls decides what that means: a bootstrap counts such a draw, a report leaves the cell empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric is and how to read it.

    function          (y_true, prediction) → one number
    needs             the prediction it takes: "score" (higher means more likely; (N,) or (N, classes)),
                      "label" (a class), "value" (a number)
    chance            expected value of a predictor that knows nothing; None when it depends on the data
    higher_is_better  direction
    """

    function: Callable[[NDArray[Any], NDArray[Any]], float]
    needs: Literal["score", "label", "value"]
    chance: float | None
    higher_is_better: bool = True


def auroc(y_true: ArrayLike, score: ArrayLike) -> float:
    """Area under the ROC curve: how often a random positive scores higher than a random negative; ties count half.

    y_true   (N,) of 0 and 1, or class numbers 0 … C-1 when `score` has C columns
    score    (N,) for class 1, or (N, C), finite
    returns  0 … 1; with C columns the plain mean over the classes present, each against all others

    With mid-ranks r: (Σ r over positives - n₊(n₊+1)/2) / (n₊ · n₋), the Mann-Whitney form (Hanley & McNeil 1982).
    ValueError when fewer than two classes are present.
    """
    y, s = np.asarray(y_true), np.asarray(score, dtype=np.float64)
    _check_lengths(y, s)
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
    _check_lengths(y, p)
    return float(np.mean(y == p))


def balanced_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean over the classes present of the share found: (1/C) Σ_c #(y_true = c and y_pred = c) / #(y_true = c).

    y_true, y_pred  (N,) classes
    returns         0 … 1

    ValueError when only one class is present.
    """
    y, p = np.asarray(y_true), np.asarray(y_pred)
    _check_lengths(y, p)
    _, codes = np.unique(y, return_inverse=True)
    if codes.max() == 0:
        raise ValueError("balanced accuracy is undefined: only one class is present")
    return float(np.mean(np.bincount(codes, weights=y == p) / np.bincount(codes)))


def r2(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Share of variance explained: 1 - Σ(y - ŷ)² / Σ(y - mean y)².

    y_true, y_pred  (N,) numbers
    returns         at most 1; 0 for always predicting the mean, below 0 for worse

    ValueError when all true values are equal.
    """
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_pred, dtype=np.float64)
    _check_lengths(y, p)
    spread = float(np.sum((y - y.mean()) ** 2))
    if spread == 0.0 or np.all(y == y[0]):
        raise ValueError("R² is undefined: all true values are equal")
    return 1.0 - float(np.sum((y - p) ** 2)) / spread


METRICS: dict[str, Metric] = {
    "auroc": Metric(function=auroc, needs="score", chance=0.5),
    "accuracy": Metric(function=accuracy, needs="label", chance=None),
    "balanced_accuracy": Metric(function=balanced_accuracy, needs="label", chance=None),
    "r2": Metric(function=r2, needs="value", chance=0.0),
}


def _check_lengths(y: NDArray[Any], prediction: NDArray[Any]) -> None:
    if y.ndim != 1 or len(y) != len(prediction) or len(y) == 0:
        raise ValueError(f"expected as many predictions as labels, at least one; found {y.shape}, {prediction.shape}")
