"""Metrics of quantities, survival and places: arrays in, one number out."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hilum.metrics.classes import check_lengths


def r2(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Share of variance explained: 1 - Σ(y - ŷ)² / Σ(y - mean y)².

    y_true, y_pred  (N,) numbers
    returns         at most 1; 0 for always predicting the mean, below 0 for worse

    ValueError when all true values are equal.
    """
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_pred, dtype=np.float64)
    check_lengths(y, p)
    spread = float(np.sum((y - y.mean()) ** 2))
    if spread == 0.0 or np.all(y == y[0]):
        raise ValueError("R² is undefined: all true values are equal")
    return 1.0 - float(np.sum((y - p) ** 2)) / spread


def rmse(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Root of the mean squared error, in the unit of the target. Both (N,)."""
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_pred, dtype=np.float64)
    check_lengths(y, p)
    return float(np.sqrt(np.mean((y - p) ** 2)))


def mae(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean absolute error, in the unit of the target. Both (N,)."""
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_pred, dtype=np.float64)
    check_lengths(y, p)
    return float(np.mean(np.abs(y - p)))


def mean_where(where: ArrayLike, value: ArrayLike) -> float:
    """Mean of the values (N,) where `where` (N,) is true. ValueError where it never is."""
    w, v = np.asarray(where, dtype=bool), np.asarray(value, dtype=np.float64)
    check_lengths(w, v)
    if not w.any():
        raise ValueError("undefined: no case to take the mean of")
    return float(v[w].mean())


def mean_distance_mm(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean Euclidean distance between true and predicted points, both (N, 3) in mm."""
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_pred, dtype=np.float64)
    if y.ndim != 2 or y.shape != p.shape or len(y) == 0:
        raise ValueError(f"expected as many predicted as true points, at least one; found {y.shape}, {p.shape}")
    return float(np.mean(np.sqrt(((y - p) ** 2).sum(axis=1))))


def c_index(y_true: ArrayLike, risk: ArrayLike) -> float:
    """Concordance index of censored survival times (Harrell et al. 1982): how often who dies sooner had the higher risk.

    y_true   (N, 2): time, and 1 for an event or 0 for censored
    risk     (N,), finite, higher dies sooner
    returns  0 … 1; ties in risk count half

    A pair counts when it is known who died first: the shorter time is an event; of two equal times exactly one is an
    event (the censored one lived longer). ValueError when no pair counts.
    """
    comparable, ordered = 0.0, 0.0
    for pairs, twice in concordance_rows(y_true, risk):
        comparable += float(pairs.sum(dtype=np.float64))
        ordered += float(twice.sum(dtype=np.float64))
    if comparable == 0:
        raise ValueError("the C-index is undefined: no pair in which it is known who died first")
    return ordered / 2 / comparable


def concordance_rows(
    y_true: ArrayLike, risk: ArrayLike, rows: int = 256
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Pairs of the C-index, `rows` events at a time.

    yields  (E, N) 1 where case j is known to outlive event i; (E, N) twice the credit of that pair: 2, 1 (tie) or 0.
            Row by row the events, in the order of cases.
    """
    y, r = np.asarray(y_true, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    if y.ndim != 2 or y.shape[1] != 2 or r.shape != (len(y),) or len(y) == 0:
        raise ValueError(f"the C-index expects (N, 2) times with events and (N,) risks; found {y.shape}, {r.shape}")
    if not np.isfinite(r).all() or not np.isfinite(y).all() or not np.isin(y[:, 1], (0, 1)).all():
        raise ValueError("the C-index needs finite times and risks, and events of 0 or 1")
    time, event = y[:, 0], y[:, 1] == 1
    events = np.flatnonzero(event)
    for start in range(0, len(events), rows):
        some = events[start : start + rows, None]
        pairs = (time > time[some]) | ((time == time[some]) & ~event)
        credit = np.sign(r[some] - r) + 1
        yield pairs.astype(np.float32), np.where(pairs, credit, 0).astype(np.float32)
