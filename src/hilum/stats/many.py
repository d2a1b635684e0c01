"""Many tests, many tasks, many seeds."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values corrected for their number (Holm, *Scand. J. Statist.* 6, 1979); NaN stays and does not count.

    Rejecting where the result is below α keeps the chance of any false rejection below α, however tests depend.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


@dataclass(frozen=True, kw_only=True)
class MeanRank:
    """Mean rank of one model over tasks, 1 is best, with its 95 % interval over resampled patients."""

    value: float
    low: float
    high: float


def mean_ranks(values: ArrayLike, draws: ArrayLike, higher_is_better: ArrayLike, level: float = 0.95) -> list[MeanRank]:
    """Mean rank of each model over tasks; ties share their ranks.

    values            (tasks, models)
    draws             (tasks, models, R) bootstrap values, the models of a task on the same draws
    higher_is_better  (tasks,)

    The interval speaks about other patients for these tasks; it does not speak about other tasks. A draw in which a task is
    undefined for a model ranks by the other tasks. ValueError when no task has a value for all models.
    """
    sign = np.where(np.asarray(higher_is_better, dtype=bool), -1.0, 1.0)
    v = np.asarray(values, dtype=np.float64) * sign[:, None]
    d = np.asarray(draws, dtype=np.float64) * sign[:, None, None]
    used = ~np.isnan(v).any(axis=1)
    if not used.any():
        raise ValueError("mean ranks need a task in which all models have a value")
    ranks = rankdata(d[used], axis=1)
    ranks = np.where(np.isnan(d[used]).any(axis=1, keepdims=True), np.nan, ranks)
    counts = (~np.isnan(ranks)).sum(axis=0)
    with np.errstate(invalid="ignore"):
        means = np.nansum(ranks, axis=0) / counts
    found = rankdata(v[used], axis=1).mean(axis=0)
    result = []
    for value, drawn in zip(found, means):
        defined = drawn[~np.isnan(drawn)]
        limits = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)]) if len(defined) else (np.nan, np.nan)
        result.append(MeanRank(value=float(value), low=float(limits[0]), high=float(limits[1])))
    return result


@dataclass(frozen=True, kw_only=True)
class RunSpread:
    """Where scores of repeated runs differ; NaN with one run of that kind.

    seed_sd  over head seeds within a draw of training cases (pooled over draws)
    draw_sd  over draws, of their means over seeds
    """

    seed_sd: float
    draw_sd: float


def run_spread(values: ArrayLike) -> RunSpread:
    """Standard deviations (n - 1) over runs. `values` (draws, seeds) of the metric on all cases."""
    v = np.asarray(values, dtype=np.float64)
    num_draws, num_seeds = v.shape
    seed_sd = math.sqrt(float(v.var(axis=1, ddof=1).mean())) if num_seeds > 1 else math.nan
    draw_sd = float(v.mean(axis=1).std(ddof=1)) if num_draws > 1 else math.nan
    return RunSpread(seed_sd=seed_sd, draw_sd=draw_sd)


def total_se(case_se: float, values: ArrayLike) -> float:
    """Standard error of a mean over runs when both the cases and the runs are a sample (law of total variance).

    case_se  bootstrap standard deviation over cases of the mean over runs
    values   (draws, seeds). With several draws their means vary through draws and seeds both: SE² = case² + draw² / draws;
             with one draw SE² = case² + seed² / seeds. NaN parts (one run) add nothing
    """
    spread, (num_draws, num_seeds) = run_spread(values), np.shape(values)
    run = spread.draw_sd**2 / num_draws if num_draws > 1 else spread.seed_sd**2 / num_seeds
    return math.sqrt(case_se**2 + (0.0 if math.isnan(run) else run))
