"""Metrics of retrieval: arrays in, one number out."""

import numpy as np
from numpy.typing import ArrayLike


def recall_at_k(ranks: ArrayLike, k: int) -> float:
    """Share of trials in which the case sought is among the first k. `ranks` (trials,) count from 1."""
    r = np.asarray(ranks)
    if r.ndim != 1 or len(r) == 0 or r.min() < 1:
        raise ValueError(f"expected ranks from 1, at least one; found {r.shape}")
    return float(np.mean(r <= k))


def mean_recall(label: ArrayLike, recall: ArrayLike) -> float:
    """Mean over labels of the mean over the queries of that label. Both (N,)."""
    names, codes = np.unique(np.asarray(label), return_inverse=True)
    if len(names) == 0:
        raise ValueError("recall is undefined: no query")
    sums = np.bincount(codes, weights=np.asarray(recall, dtype=np.float64))
    return float(np.mean(sums / np.bincount(codes)))


def recall_at_1(label: ArrayLike, recalls: ArrayLike) -> float:
    """`mean_recall` of the first of the columns that hold recall at 1, 5 and 10 of each query."""
    return mean_recall(label, np.asarray(recalls)[:, 0])


def recall_at_5(label: ArrayLike, recalls: ArrayLike) -> float:
    """`mean_recall` of the second column."""
    return mean_recall(label, np.asarray(recalls)[:, 1])


def recall_at_10(label: ArrayLike, recalls: ArrayLike) -> float:
    """`mean_recall` of the third column."""
    return mean_recall(label, np.asarray(recalls)[:, 2])
