"""Patient-level intervals and paired comparisons (numpy only).

Slices of one patient are not independent, so patients are resampled, never slices: the cluster bootstrap (Efron &
Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 8 and 13; Field & Welsh, *JRSS B* 69, 2007, for clusters).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its percentile interval.

    value          the metric on all items
    low, high      percentile limits; NaN when no resample gave a value
    num_clusters   independent units (patients) that were resampled
    num_undefined  resamples in which the metric had no value; they are left out of the limits
    """

    value: float
    low: float
    high: float
    num_clusters: int
    num_undefined: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First method minus second, on the same items and resamples.

    interval  of the difference
    p_value   two-sided bootstrap p of "no difference"; never below 2 / (resamples + 1)
    """

    interval: Interval
    p_value: float


def bootstrap_interval(
    metric: Callable[..., float],
    *columns: ArrayLike,
    clusters: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a metric under the cluster bootstrap.

    metric         called with the columns, e.g. `auroc(y_true, score)`; may raise ValueError where it is undefined
    columns        each (N, …), one row per item
    clusters       (N,) the patient of each item
    num_resamples  draws, > 0; each draws as many clusters as there are, with replacement, and keeps all their items
    seed           same seed, same interval; the order of items does not matter
    level          share of draws inside the interval, between 0 and 1

    ValueError when the metric is undefined on all items, or when there are fewer than two clusters. An undefined draw
    is counted in `num_undefined` and never replaced by a number.
    """
    arrays = [np.asarray(c) for c in columns]
    value = metric(*arrays)
    draws = np.array([_value(metric, arrays, index) for index in _resamples(clusters, arrays, num_resamples, seed)])
    return _interval(value, draws, clusters, level)


def paired_difference(
    metric: Callable[..., float],
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    clusters: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Interval and p-value of `metric(*first) - metric(*second)`, both computed on the same resamples.

    first, second  the columns of each method, the same N items in the same order
    clusters       (N,) the patient of each item

    p = 2 · min(#(d ≤ 0) + 1, #(d ≥ 0) + 1) / (draws + 1), at most 1: the interval turned round (Efron & Tibshirani,
    ch. 15-16). Same errors as `bootstrap_interval`; a draw is undefined when either side is; p is NaN when all are.
    """
    a, b = [np.asarray(c) for c in first], [np.asarray(c) for c in second]
    value = metric(*a) - metric(*b)
    resamples = _resamples(clusters, [*a, *b], num_resamples, seed)
    draws = np.array([_value(metric, a, index) - _value(metric, b, index) for index in resamples])
    defined = draws[~np.isnan(draws)]
    tail = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
    p_value = min(1.0, 2 * (tail + 1) / (len(defined) + 1)) if len(defined) else float("nan")
    return Difference(interval=_interval(value, draws, clusters, level), p_value=p_value)


def _resamples(clusters: ArrayLike, arrays: Sequence[Array], num: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """Yield `num` index arrays, each all items of K clusters drawn with replacement from K."""
    names, codes = np.unique(np.asarray(clusters), return_inverse=True)
    if any(len(a) != len(codes) for a in arrays):
        raise ValueError(f"expected one row per item ({len(codes)}); found {[len(a) for a in arrays]}")
    if len(names) < 2:
        raise ValueError(f"an interval needs at least 2 clusters (patients); found {len(names)}")
    order = np.argsort(codes, kind="stable")  # items of one cluster stand together
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    for _ in range(num):
        drawn = rng.integers(len(names), size=len(names))
        lengths = sizes[drawn]
        ends = np.cumsum(lengths)
        yield order[np.arange(ends[-1]) + np.repeat(starts[drawn] - (ends - lengths), lengths)]


def _value(metric: Callable[..., float], arrays: Sequence[Array], index: NDArray[np.intp]) -> float:
    try:
        return metric(*[a[index] for a in arrays])
    except ValueError:  # undefined on this draw
        return float("nan")


def _interval(value: float, draws: Array, clusters: ArrayLike, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level lies between 0 and 1; found {level}")
    defined = draws[~np.isnan(draws)]
    tails = [50 * (1 - level), 50 * (1 + level)]
    low, high = np.percentile(defined, tails) if len(defined) else (np.nan, np.nan)
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        num_clusters=len(np.unique(np.asarray(clusters))),
        num_undefined=len(draws) - len(defined),
    )
