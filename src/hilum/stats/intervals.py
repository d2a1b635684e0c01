"""Patient-level intervals and paired comparisons.

Slices of one patient are not independent, so patients are resampled, never slices: the cluster bootstrap (Efron &
Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 8 and 13; Field & Welsh, *JRSS B* 69, 2007, for clusters).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as t_distribution

from hilum.stats.draws import bootstrap_weights, cluster_codes, evaluate
from hilum.stats.weighted import statistic

Array = NDArray[Any]
NUM_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its bootstrap interval.

    value          the metric on all items
    low, high      limits; NaN when no resample gave a value
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


def bootstrap_many(
    runs: Sequence[tuple[Callable[..., float], Sequence[ArrayLike]]],
    *,
    clusters: ArrayLike,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> NDArray[np.float64]:
    """Resamples of several metrics, models or seeds on the same rows: every draw of patients serves all of them.

    runs           (metric, its columns), each column with one row per item
    clusters       (N,) the patient of each item
    num_resamples  draws, > 0; each draws as many clusters as there are, with replacement, and keeps all their items
    seed           same seed, same draws, whatever the order of items and the number of cores
    returns        (runs, num_resamples); NaN where a metric is undefined

    Metrics of `hilum.metrics` are computed for many draws at once (`stats.weighted`), any other one after the other.
    """
    codes, num_clusters = cluster_codes(clusters)
    built = []
    for metric, columns in runs:
        arrays = [np.asarray(c) for c in columns]
        if any(len(a) != len(codes) for a in arrays):
            raise ValueError(f"expected one row per item ({len(codes)}); found {[len(a) for a in arrays]}")
        built.append(statistic(metric, arrays, codes, num_clusters))
    draw = partial(bootstrap_weights, num_clusters, seed)
    return evaluate(built, draw, num_resamples, max(num_clusters, len(codes)), all(b.parallel for b in built))


def bootstrap_interval(
    metric: Callable[..., float],
    *columns: ArrayLike,
    clusters: ArrayLike,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | Sequence[int] = 0,
    level: float = 0.95,
) -> Interval:
    """Bias-corrected interval of a metric under the cluster bootstrap (`corrected_shares`).

    metric         called with the columns, e.g. `auroc(y_true, score)`; may raise ValueError where it is undefined
    columns        each (N, …), one row per item
    level          share of draws inside the interval, between 0 and 1

    The rest as `bootstrap_many`. ValueError when the metric is undefined on all items, or when there are fewer than two
    clusters. An undefined draw is counted in `num_undefined` and never replaced by a number.
    """
    value = metric(*[np.asarray(c) for c in columns])
    draws = bootstrap_many([(metric, columns)], clusters=clusters, num_resamples=num_resamples, seed=seed)[0]
    return interval_of(value, draws, clusters, level)


def paired_difference(
    metric: Callable[..., float],
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    clusters: ArrayLike,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | Sequence[int] = 0,
    level: float = 0.95,
) -> Difference:
    """Interval and p-value of `metric(*first) - metric(*second)`, both computed on the same resamples.

    first, second  the columns of each method, the same N items in the same order
    clusters       (N,) the patient of each item

    Same errors as `bootstrap_interval`; a draw is undefined when either side is; p is NaN when all are.
    """
    value = metric(*[np.asarray(c) for c in first]) - metric(*[np.asarray(c) for c in second])
    runs = [(metric, first), (metric, second)]
    a, b = bootstrap_many(runs, clusters=clusters, num_resamples=num_resamples, seed=seed)
    return difference_of(value, a - b, clusters, level)


def difference_of(value: float, draws: Array, clusters: ArrayLike, level: float = 0.95) -> Difference:
    """A difference from its draws: p = 2 · min(#(d ≤ 0) + 1, #(d ≥ 0) + 1) / (draws + 1), at most 1.

    This is the percentile interval turned round (Efron & Tibshirani, ch. 15-16), which is why the interval is that one.
    """
    defined = draws[~np.isnan(draws)]
    tail = int(min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0)))
    p_value = min(1.0, 2 * (tail + 1) / (len(defined) + 1)) if len(defined) else float("nan")
    return Difference(interval=interval_of(value, draws, clusters, level, corrected=False), p_value=p_value)


def interval_of(
    value: float, draws: Array, clusters: ArrayLike, level: float = 0.95, *, corrected: bool = True
) -> Interval:
    """An interval from draws, NaN left out and counted: between `corrected_shares` of them, or between plain percentiles."""
    if not 0 < level < 1:
        raise ValueError(f"level lies between 0 and 1; found {level}")
    defined, num_clusters = draws[~np.isnan(draws)], len(np.unique(np.asarray(clusters)))
    shares = np.array([(1 - level) / 2, (1 + level) / 2])
    if corrected and len(defined):
        shares = corrected_shares(value, defined, num_clusters, level)
    low, high = np.quantile(defined, shares) if len(defined) else (np.nan, np.nan)
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        num_clusters=num_clusters,
        num_undefined=len(draws) - len(defined),
    )


def corrected_shares(value: float, draws: Array, num_clusters: int, level: float) -> NDArray[np.float64]:
    """Shares of the draws (…, defined) below the lower and the upper limit: Φ(2 z₀ ± t √(K / (K - 1))).

    z₀ = Φ⁻¹(share of draws below the value, ties half) undoes the bias of resampling (Efron & Tibshirani, ch. 14.3, without
    acceleration); Student's t with K - 1 degrees and the factor make up for the spread that K patients show too little of
    (Hesterberg, *Am. Stat.* 69, 2015). With many patients and no bias these are the percentiles.
    """
    bias = 0.0
    if num_clusters < 2:
        return np.array([0.0, 1.0])
    if np.isfinite(value):
        below = (np.count_nonzero(draws < value) + np.count_nonzero(draws <= value)) / (2 * len(draws))
        bias = float(norm.ppf(np.clip(below, 1 / (2 * len(draws)), 1 - 1 / (2 * len(draws)))))
    wide = t_distribution.ppf([(1 - level) / 2, (1 + level) / 2], num_clusters - 1)
    shares: NDArray[np.float64] = norm.cdf(2 * bias + wide * np.sqrt(num_clusters / (num_clusters - 1)))
    return shares
