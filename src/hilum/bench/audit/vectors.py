"""Copies as an encoder sees them: test cases nearer to a training case than two patients are.

Features are whitened by the first side's covariance, so that what all bodies have in common counts little and what is one's own
counts much, and compared by cosine. How alike two patients can be is read off the first side itself: copies are pairs whose
1 - cosine is below STANDS_OUT times that of the nearest hundredth of its cases, each with its nearest case of another patient.
All pairs are compared, block by block.

Measured with copies planted among other patients (benchmarks/quality/copies.py, docs/bench.md): of 940 cases that are no
copies, raw pixels took 7 for one and a tiny encoder 13.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hilum.bench.audit.fingerprints import unit

STANDS_OUT = 0.75
NEAREST_SHARE = 0.01  # of the cases of the first side
LEAST_CASES = 20  # on the first side; of fewer, nothing is known of how alike patients are
SHRINK = 0.1  # of the mean variance, added to each: directions that are mostly noise stay small
BLOCK = 4096  # cases; two blocks and their product are in memory at once
MOST_OWN = 8192  # cases of the first side of which the nearest is sought there

Array = NDArray[np.float32]
Codes = NDArray[np.intp]


def find_copies(
    first: Array, first_patients: Sequence[str], second: Array, second_patients: Sequence[str]
) -> list[tuple[int, int, float]]:
    """Rows of the second side that are copies of rows of the first: (first row, second row, whitened cosine).

    first, second  (N, D) and (M, D) features of one encoder, finite
    patients       of each row; cases of one patient are alike and no findings
    """
    if not can_judge(first_patients) or not len(second):
        return []
    codes = np.unique([*first_patients, *second_patients], return_inverse=True)[1].astype(np.intp)
    here, there = codes[: len(first)], codes[len(first) :]
    mean, turn = _whitening(first)
    one, two = (unit(np.asarray((part - mean) @ turn, np.float32)) for part in (first, second))
    own = np.unique(np.linspace(0, len(one) - 1, min(len(one), MOST_OWN)).astype(np.intp))
    alike = nearest_of_others(one[own], here[own], one, here)[1]
    enough = 1 - STANDS_OUT * float(np.quantile(1 - alike, NEAREST_SHARE))
    near, cosine = nearest_of_others(two, there, one, here)
    return [(int(near[row]), int(row), float(cosine[row])) for row in np.flatnonzero(cosine >= enough)]


def can_judge(first_patients: Sequence[str]) -> bool:
    """Whether cases of these patients tell how alike two patients are."""
    return len(first_patients) >= LEAST_CASES and len(set(first_patients)) > 1


def nearest_of_others(queries: Array, asking: Codes, references: Array, owners: Codes) -> tuple[Codes, Array]:
    """For each query the nearest reference of another patient and its cosine; -∞ where there is none.

    queries, references  (N, D) and (M, D) of length 1
    asking, owners       (N,) and (M,) numbers of patients
    """
    found, best = np.zeros(len(queries), np.intp), np.full(len(queries), -np.inf, np.float32)
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, start + BLOCK)
        for first in range(0, len(references), BLOCK):
            product = queries[rows] @ references[first : first + BLOCK].T
            product[asking[rows, None] == owners[None, first : first + BLOCK]] = -np.inf
            at = product.argmax(1)
            value = product[np.arange(len(at)), at]
            better = value > best[rows]
            found[rows] = np.where(better, at + first, found[rows])
            best[rows] = np.where(better, value, best[rows])
    return found, best


def _whitening(vectors: Array) -> tuple[Array, Array]:
    """Mean (D,) and a matrix (D, D) that makes all directions vary alike, those of little variance less."""
    mean = vectors.mean(0, dtype=np.float64)
    centred = vectors - mean
    values, axes = np.linalg.eigh(centred.T @ centred / len(vectors))
    values = np.maximum(values, 0)
    turn = axes / np.sqrt(values + SHRINK * values.mean() + np.finfo(float).tiny)
    return mean.astype(np.float32), turn.astype(np.float32)
