"""Analytic errors against their definitions and published figures."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from hilum.metrics import auroc
from hilum.stats import bootstrap_many, delong, delong_contrast, delong_test, hanley_mcneil_se

# Ratings 1 to 5 of 109 CT images, 58 normal and 51 abnormal (Hanley & McNeil, Radiology 143, 1982, table I).
NORMAL, ABNORMAL = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
Y = np.repeat([0, 1], [58, 51])
RATING = np.concatenate([np.repeat(np.arange(1, 6), NORMAL), np.repeat(np.arange(1, 6), ABNORMAL)])


def components(y, score):
    """DeLong's structural components by their definition, O(mn)."""
    kernel = [[1.0 if p > n else 0.5 if p == n else 0.0 for n in score[y == 0]] for p in score[y == 1]]
    return np.mean(kernel, axis=1), np.mean(kernel, axis=0)


def test_the_published_ratings():
    """Area .893 with SE .032 (paper); DeLong's SE of the same data is .0307 (Stata's manual, roctab)."""
    assert auroc(Y, RATING) == pytest.approx(0.893, abs=5e-4)
    assert hanley_mcneil_se(0.893, 51, 58) == pytest.approx(0.032, abs=6e-4)
    areas, covariance = delong(Y, RATING)
    assert areas[0] == pytest.approx(0.8932, abs=5e-5)
    assert math.sqrt(covariance[0, 0]) == pytest.approx(0.0307, abs=5e-5)


def test_delong_is_its_definition():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    scores = np.round(rng.normal(size=(3, 60)) + y, 1)
    areas, covariance = delong(y, scores)
    v10, v01 = (np.array(part) for part in zip(*(components(y, s) for s in scores)))
    m, n = v10.shape[1], v01.shape[1]
    for r, a in np.ndindex(3, 3):
        s10 = sum((v10[r] - areas[r]) * (v10[a] - areas[a])) / (m - 1)
        s01 = sum((v01[r] - areas[r]) * (v01[a] - areas[a])) / (n - 1)
        assert covariance[r, a] == pytest.approx(s10 / m + s01 / n, abs=1e-14)
    assert areas == pytest.approx([auroc(y, s) for s in scores], abs=1e-14)


def test_clusters_of_one_are_no_clusters_and_copies_add_nothing():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 80)
    scores = rng.normal(size=(2, 80)) + y
    plain = delong(y, scores)[1]
    assert delong(y, scores, np.arange(80))[1] == pytest.approx(plain, rel=1e-10)
    doubled = delong(np.repeat(y, 2), np.repeat(scores, 2, axis=1), np.repeat(np.arange(80), 2))[1]
    assert doubled == pytest.approx(plain, rel=1e-10)
    naive = delong(np.repeat(y, 2), np.repeat(scores, 2, axis=1))[1]
    assert naive[0, 0] == pytest.approx(plain[0, 0] / 2, rel=0.05)  # what clusters protect from


def test_the_clustered_error_is_that_of_the_cluster_bootstrap():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(150), 4)
    y = (rng.random(600) < rng.random(150)[patients]).astype(int)
    score = y + rng.normal(size=150)[patients] + rng.normal(size=600)
    drawn = bootstrap_many([(auroc, (y, score))], clusters=patients, num_resamples=3000)[0]
    assert math.sqrt(delong(y, score, patients)[1][0, 0]) == pytest.approx(drawn.std(), rel=0.06)


def test_the_paired_test_and_the_mean_over_seeds():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 100)
    scores = rng.normal(size=(4, 100)) + y * [[1.0], [1.0], [0.5], [0.5]]
    areas, covariance = delong(y, scores)
    found = delong_test(y, scores[0], scores[2])
    variance = covariance[0, 0] + covariance[2, 2] - 2 * covariance[0, 2]
    assert found.difference == pytest.approx(areas[0] - areas[2])
    assert found.p_value == pytest.approx(2 * norm.sf(abs(found.difference) / math.sqrt(variance)))
    mean = delong_contrast(areas, covariance, [0.5, 0.5, -0.5, -0.5])
    assert mean.difference == pytest.approx(areas[:2].mean() - areas[2:].mean())
    assert mean.p_value < found.p_value
    assert delong_test(y, scores[0], scores[0]).p_value == 1.0
    assert math.isnan(delong_test(y, y, 1 - y).p_value)  # 1 against 0, without any spread


def test_errors():
    with pytest.raises(ValueError, match="found 1 and 3"):
        delong([1, 0, 0, 0], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="2 patients"):
        delong([1, 1, 0, 0], [1, 2, 3, 4], [1, 1, 2, 3])
    with pytest.raises(ValueError, match="cases of both classes"):
        hanley_mcneil_se(0.5, 0, 3)
