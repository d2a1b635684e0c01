"""Paired permutation test: is it the model that makes the difference, or the patients who came?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from hilum import metrics
from hilum.stats.draws import Values, Weights, cluster_codes, evaluate, swap_weights
from hilum.stats.intervals import NUM_RESAMPLES
from hilum.stats.weighted import statistic

Array = NDArray[Any]

# Only the order of scores matters to these. Before scores of two models are exchanged they become ranks within their
# model, or a difference in scale alone would spoil the order of the mixture.
ORDER_ONLY = (
    metrics.auroc,
    metrics.average_precision,
    metrics.c_index,
    metrics.macro_auroc,
    metrics.macro_auroc_rate,
    metrics.macro_average_precision,
)


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """First method minus second.

    p_value           two-sided: share of exchanges with at least this difference; with random ones (n + 1) / (N + 1)
    num_permutations  exchanges looked at
    exact             all 2^patients of them
    """

    difference: float
    p_value: float
    num_permutations: int
    exact: bool


def permutation_test(
    metric: Callable[..., float],
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    clusters: ArrayLike,
    num_permutations: int = NUM_RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> PermutationTest:
    """Exchange the two methods' predictions, patient by patient, and see how often the metrics differ as much.

    first, second     (y_true, prediction) of each method, the same N items in the same order
    clusters          (N,) the patient of each item; all items of one are exchanged together
    num_permutations  random exchanges; when there are no more than that in all, each is taken once and the test is exact

    Metrics of order (`ORDER_ONLY`) exchange ranks within each method. ValueError when the truths differ.
    """
    return permutation_test_of_runs(
        metric, [first], [second], clusters=clusters, num_permutations=num_permutations, seed=seed
    )


def permutation_test_of_runs(
    metric: Callable[..., float],
    first: Sequence[Sequence[ArrayLike]],
    second: Sequence[Sequence[ArrayLike]],
    *,
    clusters: ArrayLike,
    num_permutations: int = NUM_RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> PermutationTest:
    """As `permutation_test` for methods with several runs (head seeds): the means over runs are compared.

    A patient's predictions are exchanged in all runs at once, run by run; where one method has fewer runs they repeat.
    """
    codes, num_clusters = cluster_codes(clusters)
    num_runs = math.lcm(len(first), len(second))
    both_codes = np.concatenate([codes, codes + num_clusters])
    mixtures = []
    for run in range(num_runs):
        columns = _stack(metric, first[run % len(first)], second[run % len(second)])
        if len(columns[0]) != len(both_codes):
            raise ValueError(f"expected one row per item ({len(codes)}); found {len(columns[0]) // 2}")
        mixtures.append(statistic(metric, columns, both_codes, 2 * num_clusters))

    def difference(weights: Weights) -> Values:
        other = np.concatenate([weights[num_clusters:-1], weights[:num_clusters], weights[-1:]])
        values: Values = np.mean([m(weights) - m(other) for m in mixtures], axis=0)
        return values

    exact = num_clusters < 60 and 2**num_clusters <= num_permutations
    number = 2**num_clusters if exact else num_permutations

    def draw(start: int, num: int) -> Weights:
        return _all_swaps(num_clusters, start, num) if exact else swap_weights(num_clusters, seed, start, num)

    parallel = all(m.parallel for m in mixtures)
    found = evaluate([difference], draw, number, 2 * max(num_clusters, len(codes)), parallel)[0]
    observed = float(difference(_all_swaps(num_clusters, 0, 1))[0])
    as_large = int(np.count_nonzero(~(np.abs(found) < abs(observed) - 1e-12)))  # undefined ones count against us
    p_value = as_large / number if exact else (as_large + 1) / (number + 1)
    return PermutationTest(difference=observed, p_value=p_value, num_permutations=number, exact=exact)


def _stack(metric: Callable[..., float], first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> list[Array]:
    (y, a), (y_other, b) = ([np.asarray(c) for c in columns] for columns in (first, second))
    if y.shape != y_other.shape or not np.array_equal(y, y_other, equal_nan=y.dtype.kind == "f"):
        raise ValueError("the two methods disagree on the truth; expected the same items in the same order")
    if metric in ORDER_ONLY:
        a, b = rankdata(a, axis=0), rankdata(b, axis=0)
    return [np.concatenate([y, y]), np.concatenate([a, b])]


def _all_swaps(num_clusters: int, start: int, num: int) -> Weights:
    """Exchanges `start` … `start + num - 1` in the order of binary numbers; number 0 exchanges nobody."""
    bits = (np.arange(start, start + num) >> np.arange(num_clusters)[:, None]) & 1 if num_clusters < 60 else 0
    swapped = np.broadcast_to(np.asarray(bits, dtype=np.float32), (num_clusters, num))
    return np.concatenate([1 - swapped, swapped, np.zeros((1, num), np.float32)])
