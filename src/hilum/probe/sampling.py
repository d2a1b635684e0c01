"""Which cases a head is trained on: k of each class, a share of the patients, and how much each case counts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.errors import LabelsError, UsageError
from hilum.probe.heads.head import Array, Task

Rows = NDArray[np.intp]


def draw_few(
    y: Any, k: int, *, groups: Any = None, num_draws: int = 1, seed: int = 0, classes: Any = None
) -> Iterator[tuple[Rows, Rows]]:
    """k cases of each class, several times: (rows drawn, rows of all groups of which nothing was drawn).

    y        (N,) classes
    groups   (N,) patients; cases of different patients are taken first, and no patient stands in both parts
    classes  that must be there; None: those in y
    seed     draw number n does not depend on how many there are

    LabelsError when a class has fewer than k cases.
    """
    y = np.asarray(y)
    groups = np.arange(len(y)) if groups is None else np.asarray(groups)
    wanted = np.unique(y) if classes is None else np.asarray(classes)
    if k < 1 or num_draws < 1:
        raise UsageError(f"expected at least one case a class and one draw; found {k} and {num_draws}")
    short = [f"{c} ({np.count_nonzero(y == c)})" for c in wanted if np.count_nonzero(y == c) < k]
    if short:
        raise LabelsError(
            f"{k} cases of each class were asked for; too few have: {', '.join(short[:10])}. Choose a smaller k"
        )
    for draw in range(num_draws):
        rng = np.random.default_rng((seed, draw))
        taken: list[int] = []
        for c in wanted:
            rows = rng.permutation(np.flatnonzero(y == c))
            again = _repeats(groups[rows])
            taken += rows[np.argsort(again, kind="stable")][:k].tolist()
        drawn = np.sort(np.array(taken, dtype=np.intp))
        yield drawn, np.flatnonzero(~np.isin(groups, groups[drawn]))


def _repeats(groups: Array) -> Array:
    """How often each value stood before in the list."""
    order = np.argsort(groups, kind="stable")
    _, start, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    found = np.empty(len(groups), dtype=np.int64)
    found[order] = np.arange(len(groups)) - start[inverse]
    return found


def draw_share(groups: Any, share: float, *, seed: int = 0) -> Rows:
    """Rows of a share of the patients, at least one; with one seed the smaller shares lie within the larger ones."""
    if not 0 < share <= 1:
        raise UsageError(f"share {share}: expected more than 0 and at most 1")
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(names))
    return np.flatnonzero(rank[codes] < max(1, round(share * len(names))))


def balance(targets: Array, weights: Array, task: Task) -> Array:
    """Weights with which every class, or the positives and the negatives of a label, count the same in sum.

    targets  classification: (N, C) one-hot; multilabel: (N, L)
    weights  (N, 1) or (N, L) before
    returns  classification: times N / (C · n_c); multilabel: positives times n₋ / n₊
    """
    if task == "classification":
        present = np.maximum(targets.sum(axis=0), 1)
        return np.asarray(weights * (targets @ (len(targets) / (targets.shape[1] * present)))[:, None])
    positive = (weights * targets).sum(axis=0)
    ratio = (weights.sum(axis=0) - positive) / np.maximum(positive, 1)
    return np.asarray(weights * np.where(targets > 0, np.where(ratio > 0, ratio, 1), 1))
