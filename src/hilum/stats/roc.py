"""Analytic standard errors and tests of the area under the ROC curve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

Values = NDArray[np.float64]


def hanley_mcneil_se(area: float, num_positive: int, num_negative: int) -> float:
    """Standard error of an AUROC from its value and the numbers of cases (Hanley & McNeil, *Radiology* 143, 1982).

    SE² = [A(1 - A) + (n₊ - 1)(Q₁ - A²) + (n₋ - 1)(Q₂ - A²)] / (n₊ n₋), Q₁ = A / (2 - A), Q₂ = 2A² / (1 + A)

    It takes all cases as independent, and exponential scores; at areas of 0 and 1 it is 0.
    """
    if not 0 <= area <= 1 or min(num_positive, num_negative) < 1:
        raise ValueError(
            f"expected an area in 0 … 1 and cases of both classes; found {area}, {num_positive}, {num_negative}"
        )
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (num_positive - 1) * (q1 - area**2) + (num_negative - 1) * (q2 - area**2)
    return math.sqrt(max(spread, 0.0) / (num_positive * num_negative))


def delong(y_true: ArrayLike, scores: ArrayLike, clusters: ArrayLike | None = None) -> tuple[Values, Values]:
    """AUROCs of several scores of the same cases, and their covariance (DeLong, DeLong & Clarke-Pearson, 1988).

    y_true    (N,) of 0 and 1, at least two of each
    scores    (M, N)
    clusters  (N,) the patient of each case: covariance for clustered cases (Obuchowski, *Biometrics* 53, 1997), which is
              DeLong's when every patient has one case. None: cases are independent
    returns   (M,) areas, (M, M) covariance

    Structural components by mid-ranks (Sun & Xu, *IEEE Signal Processing Letters* 21, 2014), O(N log N).
    """
    y, s = np.asarray(y_true), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    positive = y == 1
    m, n = int(positive.sum()), int((y == 0).sum())
    if s.shape[1] != len(y) or m + n != len(y) or min(m, n) < 2 or not np.isfinite(s).all():
        raise ValueError(
            f"DeLong expects finite scores, and at least 2 cases of classes 0 and 1 each; found {m} and {n}"
        )
    ranks = rankdata(s, axis=1)
    above = (ranks[:, positive] - rankdata(s[:, positive], axis=1)) / n  # share of negatives below each positive
    below = 1 - (ranks[:, ~positive] - rankdata(s[:, ~positive], axis=1)) / m
    areas = above.mean(axis=1)
    if clusters is None:
        return areas, np.cov(above).reshape(len(s), -1) / m + np.cov(below).reshape(len(s), -1) / n
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    x, num_x = _by_cluster(above - areas[:, None], codes[positive], codes.max() + 1)
    z, num_z = _by_cluster(below - areas[:, None], codes[~positive], codes.max() + 1)
    if min(num_x, num_z) < 2:
        raise ValueError("DeLong expects at least 2 patients with cases of each class")
    both = x @ z.T * (codes.max() + 1) / codes.max() / (m * n)
    return areas, x @ x.T * num_x / (num_x - 1) / m**2 + z @ z.T * num_z / (num_z - 1) / n**2 + both + both.T


@dataclass(frozen=True, kw_only=True)
class DeLongTest:
    """Difference of two AUROCs on the same cases, first minus second; p two-sided, NaN when its SE is 0 and it is not."""

    difference: float
    se: float
    p_value: float


def delong_test(
    y_true: ArrayLike, first: ArrayLike, second: ArrayLike, clusters: ArrayLike | None = None
) -> DeLongTest:
    """Paired test of two scores of the same cases. Arguments and errors as `delong`."""
    areas, covariance = delong(y_true, [np.asarray(first), np.asarray(second)], clusters)
    return delong_contrast(areas, covariance, [1.0, -1.0])


def delong_contrast(areas: Values, covariance: Values, weights: Sequence[float]) -> DeLongTest:
    """Test of Σ w · area = 0, e.g. weights ½, ½, -½, -½ for the mean of two seeds against that of two others."""
    w = np.asarray(weights)
    difference, variance = float(w @ areas), float(w @ covariance @ w)
    se = math.sqrt(max(variance, 0.0))
    if se < 1e-12:
        return DeLongTest(difference=difference, se=0.0, p_value=1.0 if abs(difference) < 1e-12 else math.nan)
    return DeLongTest(difference=difference, se=se, p_value=float(2 * norm.sf(abs(difference) / se)))


def _by_cluster(parts: Values, codes: NDArray[np.intp], num: int) -> tuple[Values, int]:
    sums = np.array([np.bincount(codes, weights=row, minlength=num) for row in parts])
    return sums, len(np.unique(codes))
