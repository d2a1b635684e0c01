"""Metrics of `hilum.metrics` on weighted clusters: thousands of resamples at once instead of one after the other.

A resample is a weighting of patients by whole numbers. Sums are matrix products with the weights; an AUROC counts weighted
pairs by running sums over sorted scores; a C-index by the matrix of its pairs. Values are those of the metric on the repeated
rows: bit for bit where only counts enter (AUROC, accuracy, C-index), else to rounding. A metric that is not in the table is
called on the repeated rows, one resample after the other (`Loop`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum import metrics
from hilum.metrics.classes import NUM_BINS, confidence_bins
from hilum.metrics.masks import HD95, MEAN_SURFACE, PREDICTED, SHARED
from hilum.metrics.values import concordance_rows
from hilum.stats.draws import Statistic, Values, Weights

Array = NDArray[Any]
Codes = NDArray[np.intp]
Build = Callable[[Array, Array, Codes, int], Statistic]

EXACT = 1 << 24  # whole numbers below it are exact in float32
MAX_PAIRS = 1 << 26  # of a C-index, 256 MB, are kept; beyond, they are made anew for each block of draws


class Loop:
    """Any metric, called with the rows of each resample. Undefined where it raises ValueError."""

    parallel = False

    def __init__(self, metric: Callable[..., float], columns: Sequence[Array], codes: Codes) -> None:
        self.metric, self.columns, self.codes = metric, columns, codes

    def __call__(self, weights: Weights) -> Values:
        counts = weights.astype(np.intp)[self.codes]
        values = np.full(weights.shape[1], np.nan)
        for draw in range(len(values)):
            index = np.repeat(np.arange(len(counts)), counts[:, draw])
            try:
                values[draw] = self.metric(*[c[index] for c in self.columns])
            except ValueError:  # undefined on this draw
                continue
        return values


class Sums:
    """A function of weighted sums over rows: `finish` takes (M, B) sums of the M columns and returns (B,)."""

    parallel = True

    def __init__(self, columns: Array, codes: Codes, num_clusters: int, finish: Callable[[Values], Values]) -> None:
        self.table, self.finish = np.zeros((columns.shape[1], num_clusters + 1)), finish
        for row, column in zip(self.table, columns.T):
            row[:] = np.bincount(codes, weights=column, minlength=num_clusters + 1)

    def __call__(self, weights: Weights) -> Values:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.finish(self.table @ weights.astype(np.float64))


class Mean:
    """Mean of several statistics over those that are defined in a draw; `undefined` stands in for the others if given."""

    parallel = True

    def __init__(self, parts: Sequence[Statistic], undefined: float = np.nan) -> None:
        self.parts, self.undefined = parts, undefined

    def __call__(self, weights: Weights) -> Values:
        values = np.full((len(self.parts), weights.shape[1]), np.nan)
        for row, part in zip(values, self.parts):
            row[:] = part(weights)
        values[np.isnan(values)] = self.undefined
        return mean_defined(values)


class RunningSums:
    """Running sums of weights over rows in a fixed order, for all draws at once.

    codes    (n,) clusters in that order
    at(i)    row of the result that holds the sum over the first i rows, 0 ≤ i ≤ n

    The order is cut into k strips of m; the j-th members of all strips stand together, so that each step of the sum is one
    addition of long contiguous rows. A leading row of weight zero makes place for "none yet".
    """

    def __init__(self, codes: Codes, num_clusters: int) -> None:
        n = len(codes) + 1
        self.m = min(32, int(np.ceil(np.sqrt(n))))
        self.k = -(-n // self.m)
        padded = np.full(self.m * self.k, num_clusters, dtype=np.intp)
        padded[1:n] = codes
        self.gather = padded.reshape(self.k, self.m).T.ravel()

    def at(self, num: Any) -> Any:
        return num % self.m * self.k + num // self.m

    def __call__(self, weights: Weights) -> Weights:
        sums = weights[self.gather].reshape(self.m, self.k, -1)
        for j in range(1, self.m):
            np.add(sums[j], sums[j - 1], out=sums[j])
        before = np.zeros_like(sums[0])
        np.cumsum(sums[-1, :-1], axis=0, out=before[1:])
        sums += before
        flat: Weights = sums.reshape(self.m * self.k, -1)
        return flat


class Auroc:
    """Weighted pairs (positive above negative, ties half) over all pairs."""

    parallel = True

    def __init__(self, positive: Array, score: Array, codes: Codes, num_clusters: int) -> None:
        negatives, positives = (rows[np.argsort(score[rows])] for rows in map(np.flatnonzero, (~positive, positive)))
        self.sums = RunningSums(codes[negatives], num_clusters)
        low, high = (np.searchsorted(score[negatives], score[positives], side) for side in ("left", "right"))
        self.positives, self.ties = codes[positives], bool((low != high).any())
        self.below, self.upto, self.all = self.sums.at(low), self.sums.at(high), self.sums.at(len(negatives))

    def __call__(self, weights: Weights) -> Values:
        running, mine = self.sums(weights), weights[self.positives]
        credit = running[self.below]
        credit += running[self.upto] if self.ties else credit
        pairs = mine.sum(axis=0, dtype=np.float64) * running[self.all]
        kind = np.float32 if 2 * pairs.max() < EXACT else np.float64
        twice = np.einsum("ib,ib->b", mine, credit, dtype=kind).astype(np.float64)
        return _ratio(twice / 2, pairs)


class AveragePrecision:
    """Σ over distinct scores, from the highest: positives there · positives so far / cases so far, over all positives."""

    parallel = True

    def __init__(self, positive: Array, score: Array, codes: Codes, num_clusters: int) -> None:
        order = np.argsort(-score, kind="stable")
        self.codes, self.positive = codes[order], positive[order][:, None]
        self.ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)

    def __call__(self, weights: Weights) -> Values:
        mine = weights[self.codes].astype(np.float64)
        cases = np.cumsum(mine, axis=0)[self.ends]
        found = np.cumsum(mine * self.positive, axis=0)[self.ends]
        precision = np.divide(found, cases, out=np.zeros_like(found), where=cases > 0)
        steps = np.diff(found, axis=0, prepend=0.0)
        total = np.einsum("ib,ib->b", steps, precision)
        return _ratio(total, found[-1])


class Concordance:
    """C-index: wᵀ A w over events and cases, A twice the credit of each pair; the pairs that count by running sums."""

    parallel = True

    def __init__(self, y: Array, risk: Array, codes: Codes, num_clusters: int) -> None:
        time, event = y[:, 0], y[:, 1] == 1
        order = np.lexsort((~event, time))  # of equal times, events come first: the others outlive them
        self.sums, self.num = RunningSums(codes[order], num_clusters), len(order)
        begin, end = (np.searchsorted(time[order], time[event], side) for side in ("left", "right"))
        so_far = np.concatenate([[0], np.cumsum(event[order])])  # events among the first i cases
        self.dead = self.sums.at(begin + so_far[end] - so_far[begin])  # who is no longer at risk after each event
        self.events, self.codes = codes[event], codes
        self.credit: Callable[[], Iterable[Array]] = partial(_credit, y, risk)
        if len(y) * len(self.events) <= MAX_PAIRS:
            kept = [np.concatenate(list(self.credit()))] if len(self.events) else []
            self.credit = lambda: kept

    def __call__(self, weights: Weights) -> Values:
        running, mine, all_cases = self.sums(weights), weights[self.events].astype(np.float64), weights[self.codes]
        pairs = np.einsum("ib,ib->b", mine, running[self.sums.at(self.num)] - running[self.dead])
        twice, row = np.zeros(len(pairs)), 0
        for credit in self.credit():
            twice += np.einsum("ib,ib->b", mine[row : row + len(credit)], credit @ all_cases)
            row += len(credit)
        return _ratio(twice / 2, pairs)


def _credit(y: Array, risk: Array) -> Iterator[Array]:
    """Twice the credit of the pairs of a C-index, some events at a time."""
    return (twice for _, twice in concordance_rows(y, risk))


def _ratio(part: Values, whole: Values) -> Values:
    """NaN where the whole is 0."""
    values = np.full(len(whole), np.nan)
    np.divide(part, whole, out=values, where=whole > 0)
    return values


def mean_defined(values: Values) -> Values:
    """Mean over the first axis without NaN; NaN where all are."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Values = np.where(defined, values, 0.0).sum(axis=0) / defined.sum(axis=0)
    return mean


def _one_hot(classes: Array, num: int) -> Array:
    hot: Array = (classes[:, None] == np.arange(num)).astype(np.float64)
    return hot


def _average(values: Array, codes: Codes, num_clusters: int, finish: Callable[[Values], Values] = lambda v: v) -> Sums:
    """Weighted mean of one value a row."""
    columns = np.stack([values, np.ones(len(values))], axis=1)
    return Sums(columns, codes, num_clusters, lambda s: finish(s[0] / s[1]))


def _class_means(values: Array, codes: Codes, num_clusters: int) -> Sums:
    """Mean over the defined rows of each column of (N, C), then over the columns that have one."""
    defined = ~np.isnan(values)
    columns = np.concatenate([np.where(defined, values, 0.0), defined], axis=1)
    return Sums(columns, codes, num_clusters, lambda s: mean_defined(s[: len(s) // 2] / s[len(s) // 2 :]))


def _auroc(y: Array, score: Array, codes: Codes, num: int) -> Statistic:
    if score.ndim == 1:
        return Auroc(y == 1, score, codes, num)
    return Mean([Auroc(y == c, score[:, c], codes, num) for c in range(score.shape[1]) if (y == c).any()])


def _balanced_accuracy(y: Array, predicted: Array, codes: Codes, num: int) -> Statistic:
    names, classes = np.unique(y, return_inverse=True)
    true = _one_hot(classes.ravel(), len(names))

    def finish(sums: Values) -> Values:
        hits, counts = sums[: len(names)], sums[len(names) :]
        return np.where((counts > 0).sum(axis=0) > 1, mean_defined(hits / counts), np.nan)

    return Sums(np.concatenate([true * (y == predicted)[:, None], true], axis=1), codes, num, finish)


def _f1(y: Array, score: Array, codes: Codes, num: int) -> Statistic:
    if score.ndim == 1:
        true, said = (y == 1).astype(np.float64)[:, None], (score >= 0.5).astype(np.float64)[:, None]
    else:
        true, said = _one_hot(y, score.shape[1]), _one_hot(score.argmax(axis=1), score.shape[1])
    columns = np.concatenate([2 * true * said, true + said], axis=1)
    return Sums(columns, codes, num, lambda s: mean_defined(s[: len(s) // 2] / s[len(s) // 2 :]))


def _brier(y: Array, proba: Array, codes: Codes, num: int) -> Statistic:
    if proba.ndim == 1:
        return _average((proba - y) ** 2, codes, num)
    return _average(((proba - _one_hot(y, proba.shape[1])) ** 2).sum(axis=1), codes, num)


def _ece(y: Array, proba: Array, codes: Codes, num: int) -> Statistic:
    bins, hit, confidence = confidence_bins(y, proba)
    columns = np.column_stack([_one_hot(bins, NUM_BINS) * (hit - confidence)[:, None], np.ones(len(bins))])
    return Sums(columns, codes, num, lambda s: np.abs(s[:-1]).sum(axis=0) / s[-1])


def _r2(y: Array, predicted: Array, codes: Codes, num: int) -> Statistic:
    centred = y - y.mean()
    columns = np.stack([np.ones(len(y)), centred, centred**2, (y - predicted) ** 2], axis=1)

    def finish(sums: Values) -> Values:
        spread = sums[2] - sums[1] ** 2 / sums[0]
        share: Values = sums[3] / np.where(spread > 1e-12 * sums[2], spread, np.nan)
        return 1.0 - share

    return Sums(columns, codes, num, finish)


def _labels(build: Build, undefined: float = np.nan) -> Build:
    def build_all(y: Array, score: Array, codes: Codes, num: int) -> Statistic:
        known = ~np.isnan(y)
        columns = [(k, y[k, n], score[k, n]) for n, k in enumerate(known.T)]
        used = [c for c in columns if len(c[1]) or undefined == 0.0]  # a label that nobody knows has no part in a mean
        return Mean([build(true, s, codes[k], num) for k, true, s in used], undefined)

    return build_all


def _masks(column: int) -> Build:
    def build(_: Array, found: Array, codes: Codes, num: int) -> Statistic:
        return _class_means(found[..., column], codes, num)

    return build


def _dice(true: Array, found: Array, codes: Codes, num: int) -> Statistic:
    return _class_means(metrics.dice_per_case(true, found[..., PREDICTED], found[..., SHARED]), codes, num)


def _dice_weighted(true: Array, found: Array, codes: Codes, num: int) -> Statistic:
    values = metrics.dice_per_case(true, found[..., PREDICTED], found[..., SHARED])
    columns = np.stack([np.nansum(values * true, axis=1), true.sum(axis=1)], axis=1)
    return Sums(columns, codes, num, lambda s: s[0] / s[1])


def _dice_pooled(true: Array, found: Array, codes: Codes, num: int) -> Statistic:
    columns = np.concatenate([2 * found[..., SHARED], true + found[..., PREDICTED]], axis=1)
    return Sums(columns, codes, num, lambda s: mean_defined(s[: len(s) // 2] / s[len(s) // 2 :]))


def _recall(column: int) -> Build:
    def build(label: Array, recalls: Array, codes: Codes, num: int) -> Statistic:
        names, labels = np.unique(label, return_inverse=True)
        values = np.where(_one_hot(labels.ravel(), len(names)) == 1, recalls[:, column, None], np.nan)
        return _class_means(values, codes, num)

    return build


def _mean_where(where: Array, value: Array, codes: Codes, num: int) -> Statistic:
    return _class_means(np.where(where, value, np.nan)[:, None], codes, num)


def _mae(y: Array, predicted: Array, codes: Codes, num: int) -> Statistic:
    return _average(np.abs(y - predicted), codes, num)


def _rmse(y: Array, predicted: Array, codes: Codes, num: int) -> Statistic:
    return _average((y - predicted) ** 2, codes, num, np.sqrt)


def _distance(y: Array, predicted: Array, codes: Codes, num: int) -> Statistic:
    return _average(np.sqrt(((y - predicted) ** 2).sum(axis=1)), codes, num)


def _accuracy(y: Array, predicted: Array, codes: Codes, num: int) -> Statistic:
    return _average((y == predicted).astype(np.float64), codes, num)


def _average_precision(y: Array, score: Array, codes: Codes, num: int) -> Statistic:
    return AveragePrecision(y == 1, score, codes, num)


WEIGHTED: dict[Callable[..., float], Build] = {
    metrics.auroc: _auroc,
    metrics.average_precision: _average_precision,
    metrics.f1: _f1,
    metrics.brier: _brier,
    metrics.ece: _ece,
    metrics.accuracy: _accuracy,
    metrics.balanced_accuracy: _balanced_accuracy,
    metrics.macro_auroc: _labels(_auroc),
    metrics.macro_auroc_rate: _labels(_auroc, undefined=0.0),
    metrics.macro_average_precision: _labels(_average_precision),
    metrics.macro_f1: _labels(_f1),
    metrics.r2: _r2,
    metrics.rmse: _rmse,
    metrics.mae: _mae,
    metrics.mean_where: _mean_where,
    metrics.c_index: Concordance,
    metrics.mean_distance_mm: _distance,
    metrics.dice: _dice,
    metrics.dice_weighted: _dice_weighted,
    metrics.dice_pooled: _dice_pooled,
    metrics.hd95_mm: _masks(HD95),
    metrics.surface_distance_mm: _masks(MEAN_SURFACE),
    metrics.recall_at_1: _recall(0),
    metrics.recall_at_5: _recall(1),
    metrics.recall_at_10: _recall(2),
}


def statistic(metric: Callable[..., float], columns: Sequence[Array], codes: Codes, num_clusters: int) -> Statistic:
    """The metric on weighted clusters: vectorised where the table knows it, else a loop. `codes` as of `cluster_codes`.

    The columns have passed `metric` before: what it refuses is refused there.
    """
    if metric in WEIGHTED:
        return WEIGHTED[metric](columns[0], columns[1], codes, num_clusters)
    return Loop(metric, columns, codes)
