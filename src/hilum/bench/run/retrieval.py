"""Retrieval: is a scan with the same finding found among scans that lack it? Nothing is fitted.

For each label, each query that has it and each other scan that has it: the rank of that one, by cosine similarity, among 99
drawn from the scans that lack the label (VoxelFM, arXiv 2604.04133). Scans of the query's patient are no candidates. Where
fewer than 99 lack it, all of them are taken: the task is easier then, and how many there were is kept with the result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hilum.bench.judge.scoring import NUM_NEGATIVES

CUTS = (1, 5, 10)


class Recall(NamedTuple):
    """One query and label: row of the query, label, recall at CUTS over its trials, negatives of a trial."""

    row: int
    label: int
    recall: tuple[float, float, float]
    negatives: int


def recalls(
    vectors: NDArray[np.float32], labels: NDArray[np.float64], patients: Sequence[str], *, seed: int
) -> list[Recall]:
    """Each query and label that has at least one trial.

    vectors  (N, D)
    labels   (N, L) of 0, 1, NaN
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    found = []
    for label in range(labels.shape[1]):
        has, lacks = np.flatnonzero(labels[:, label] == 1), np.flatnonzero(labels[:, label] == 0)
        for query in has:
            rng = np.random.default_rng([seed, label, int(query)])
            sought = has[owner[has] != owner[query]]
            others = lacks[owner[lacks] != owner[query]]
            if not len(sought) or not len(others):
                continue
            number = min(NUM_NEGATIVES, len(others))
            near = unit @ unit[query]
            ranks = np.empty(len(sought))
            for n, one in enumerate(sought):
                drawn = near[rng.choice(others, number, replace=False)]
                ranks[n] = 1 + np.count_nonzero(drawn > near[one]) + np.count_nonzero(drawn == near[one]) / 2
            at = [float(np.mean(ranks <= cut)) for cut in CUTS]
            found.append(Recall(int(query), label, (at[0], at[1], at[2]), number))
    return found
