"""Drawing whole patients: weights instead of rows, in blocks that stay in the processor's cache."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNIT = 32  # draws that share a random stream; results depend on it, on nothing else of the way of computing
BLOCK_ELEMENTS = 1 << 18  # 1 MB of float32

Weights = NDArray[np.float32]
Values = NDArray[np.float64]


class Statistic(Protocol):
    """A metric on fixed rows, for many weightings of their clusters at once.

    Called with weights (clusters + 1, B), whole numbers, the last row zero; returns (B,), NaN where undefined.
    """

    parallel: bool  # may run in several threads, and gains by it

    def __call__(self, weights: Weights) -> Values: ...


def cluster_codes(clusters: ArrayLike) -> tuple[NDArray[np.intp], int]:
    """Numbers 0 … K-1 of the clusters of each row, in the order of their names, and K. ValueError below two clusters."""
    names, codes = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"an interval needs at least 2 clusters (patients); found {len(names)}")
    return codes.ravel(), len(names)


def bootstrap_weights(num_clusters: int, seed: int | Sequence[int], first: int, num: int) -> Weights:
    """How often each cluster is drawn in draws `first` … `first + num - 1`, of K clusters with replacement from K.

    returns  (K + 1, num); the last row is zero. `first` is a multiple of UNIT
    """
    weights = np.zeros((num_clusters + 1, num), dtype=np.float32)
    for start in range(0, num, UNIT):
        drawn = _stream(seed, first + start).integers(num_clusters, size=(UNIT, num_clusters))
        drawn *= UNIT
        drawn += np.arange(UNIT)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_clusters * UNIT).reshape(num_clusters, UNIT)
        weights[:-1, start : start + UNIT] = counts[:, : num - start]
    return weights


def swap_weights(num_clusters: int, seed: int | Sequence[int], first: int, num: int) -> Weights:
    """Fair coins: (2 K + 1, num). Rows K … 2 K - 1 are 1 where a cluster is swapped, rows 0 … K - 1 where it is not."""
    weights = np.zeros((2 * num_clusters + 1, num), dtype=np.float32)
    for start in range(0, num, UNIT):
        coins = _stream(seed, first + start).integers(2, size=(num_clusters, UNIT), dtype=np.uint8)
        weights[num_clusters:-1, start : start + UNIT] = coins[:, : num - start]
    weights[:num_clusters] = 1 - weights[num_clusters:-1]
    return weights


def evaluate(
    statistics: Sequence[Callable[[Weights], Values]],
    make_weights: Callable[[int, int], Weights],
    num: int,
    num_rows: int,
    parallel: bool = True,
) -> Values:
    """Every statistic on the same `num` draws, block by block.

    make_weights  (first draw, draws) → weights; called from several threads
    num_rows      of those weights, which sets how many draws are computed at once
    returns       (statistics, num)
    """
    if num < 1:
        raise ValueError(f"expected at least one resample; found {num}")
    size = min(max(BLOCK_ELEMENTS // num_rows // UNIT, 1) * UNIT, 4096)
    values = np.full((len(statistics), num), np.nan)

    def work(start: int) -> None:
        weights = make_weights(start, min(size, num - start))
        for row, statistic in enumerate(statistics):
            values[row, start : start + size] = statistic(weights)

    starts = range(0, num, size)
    threads = min(num_threads(), len(starts)) if parallel else 1
    if threads == 1:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts))
    return values


def num_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stream(seed: int | Sequence[int], first: int) -> np.random.Generator:
    words: list[Any] = [seed] if isinstance(seed, int) else list(seed)
    return np.random.default_rng([*words, first // UNIT])
