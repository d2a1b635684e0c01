"""Every fast statistic against the metric itself on the repeated rows of the same draws."""

import numpy as np
import pytest

from hilum import metrics
from hilum.metrics import METRICS
from hilum.stats.draws import bootstrap_weights, cluster_codes, swap_weights
from hilum.stats.intervals import bootstrap_many
from hilum.stats.weighted import WEIGHTED, Loop, statistic

N = 90


def columns_of(name, rng, decimals=1):
    """A truth and a prediction that `name` takes, with ties, rare classes and unknown labels."""
    needs = METRICS[name].needs
    if needs in ("score", "label"):
        classes = rng.choice(5, N, p=[0.4, 0.3, 0.2, 0.08, 0.02])
        if needs == "label":
            return classes, np.where(rng.random(N) < 0.6, classes, rng.integers(0, 5, N))
        y = rng.integers(0, 2, N)
        return y, np.round(np.clip(0.3 * y + rng.random(N) * 0.7, 0, 1), decimals)
    if needs == "labels":
        y = (rng.random((N, 4)) < [0.5, 0.2, 0.02, 0.0]).astype(float)
        score = np.round(y + rng.normal(size=y.shape), decimals)
        y[rng.random(y.shape) < 0.2] = np.nan
        return y, score
    if needs == "value":
        y = 50 + rng.normal(size=N)
        return y, y + rng.normal(size=N)
    if needs == "risk":
        time = np.round(rng.exponential(size=N), decimals)
        return np.stack([time, rng.random(N) < 0.4], axis=1).astype(float), np.round(rng.normal(size=N), decimals)
    if needs == "point":
        y = rng.normal(size=(N, 3))
        return y, y + rng.normal(size=(N, 3))
    if needs == "recalls":
        return rng.integers(0, 6, N), rng.random((N, 3))
    true = rng.integers(0, 50, (N, 3)) * (rng.random((N, 3)) < [0.9, 0.3, 0.02])
    predicted = rng.integers(0, 50, (N, 3)) * (rng.random((N, 3)) < [0.9, 0.4, 0.02])
    shared = rng.integers(0, 51, (N, 3)).clip(max=np.minimum(true, predicted))
    there = (true > 0) & (predicted > 0)
    distances = np.where(there[..., None], rng.random((N, 3, 2)) * 9, np.nan)
    return true.astype(float), np.concatenate([np.stack([predicted, shared], axis=-1), distances], axis=-1)


def test_the_table_knows_every_metric():
    assert set(WEIGHTED) == {metric.function for metric in METRICS.values()} | {metrics.mean_where}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("items", [1, 4])
def test_fast_values_are_those_of_the_repeated_rows(name, items):
    rng = np.random.default_rng(items)
    codes, num = cluster_codes(rng.permutation(np.arange(N) // items))
    weights = bootstrap_weights(num, 7, 0, 100)
    columns = columns_of(name, rng)
    fast = statistic(METRICS[name].function, columns, codes, num)(weights)
    slow = Loop(METRICS[name].function, columns, codes)(weights)
    assert np.isfinite(slow).sum() > 20
    np.testing.assert_allclose(fast, slow, rtol=1e-12, atol=1e-13)
    if name in ("auroc", "accuracy", "c_index"):
        assert np.array_equal(fast, slow, equal_nan=True)  # bit for bit


@pytest.mark.parametrize("name", ["auroc", "f1", "brier", "ece"])
def test_fast_values_of_many_classes(name):
    rng = np.random.default_rng(0)
    y = rng.choice(6, N, p=[0.4, 0.3, 0.2, 0.07, 0.03, 0.0])
    proba = np.round(rng.dirichlet(np.ones(6), N), 2)
    codes, num = cluster_codes(np.arange(N) // 2)
    weights = bootstrap_weights(num, 1, 0, 60)
    fast = statistic(METRICS[name].function, (y, proba), codes, num)(weights)
    np.testing.assert_allclose(fast, Loop(METRICS[name].function, (y, proba), codes)(weights), rtol=1e-12)


def test_undefined_draws_are_undefined_in_both():
    y, score = np.array([1, 0, 0, 0, 1.0]), np.array([0.9, 0.1, 0.2, 0.3, 0.2])
    survival = np.stack([np.arange(5.0), y], axis=1)
    codes, num = cluster_codes(np.arange(5))
    weights = bootstrap_weights(num, 0, 0, 400)
    for metric, columns in (
        (metrics.auroc, (y, score)),
        (metrics.average_precision, (y, score)),
        (metrics.c_index, (survival, score)),
        (metrics.balanced_accuracy, (y, y)),
        (metrics.r2, (y, score)),
        (metrics.mean_where, (y == 1, score)),
    ):
        fast, slow = statistic(metric, columns, codes, num)(weights), Loop(metric, columns, codes)(weights)
        assert 0 < np.isnan(slow).sum() < 400
        assert np.array_equal(np.isnan(fast), np.isnan(slow))


def test_large_counts_leave_float32_before_they_are_wrong():
    """7,000 cases give more pairs than float32 counts exactly."""
    rng = np.random.default_rng(0)
    y = np.arange(14_000) % 2
    score = np.round(rng.normal(size=14_000) + y, 2)
    codes, num = cluster_codes(np.arange(14_000))
    weights = bootstrap_weights(num, 0, 0, 3)
    assert np.array_equal(
        statistic(metrics.auroc, (y, score), codes, num)(weights), Loop(metrics.auroc, (y, score), codes)(weights)
    )


def test_pairs_of_a_c_index_may_be_made_anew(monkeypatch):
    columns, (codes, num) = columns_of("c_index", np.random.default_rng(0)), cluster_codes(np.arange(N))
    weights = bootstrap_weights(num, 0, 0, 50)
    kept = statistic(metrics.c_index, columns, codes, num)(weights)
    monkeypatch.setattr("hilum.stats.weighted.MAX_PAIRS", 0)
    assert np.array_equal(statistic(metrics.c_index, columns, codes, num)(weights), kept)


def test_draws_are_patients_with_replacement_and_the_same_in_any_portions():
    weights = bootstrap_weights(50, 3, 0, 320)
    assert weights.shape == (51, 320)
    assert (weights[:-1].sum(axis=0) == 50).all()
    assert not weights[-1].any()
    assert weights[:-1].var() == pytest.approx(1 - 1 / 50, abs=0.05)  # binomial(50, 1/50)
    assert np.array_equal(bootstrap_weights(50, 3, 64, 40), weights[:, 64:104])
    assert not np.array_equal(bootstrap_weights(50, 4, 0, 320), weights)
    swaps = swap_weights(50, 3, 0, 320)
    assert (swaps[:50] + swaps[50:-1] == 1).all()
    assert swaps[:50].mean() == pytest.approx(0.5, abs=0.02)


def test_threads_and_blocks_do_not_change_a_value(monkeypatch):
    rng = np.random.default_rng(0)
    y, score = columns_of("auroc", rng)
    runs = [(metrics.auroc, (y, score)), (metrics.brier, (y, score))]
    expected = bootstrap_many(runs, clusters=np.arange(N), num_resamples=1000)
    monkeypatch.setattr("hilum.stats.draws.BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("hilum.stats.draws.num_threads", lambda: 3)
    np.testing.assert_array_equal(bootstrap_many(runs, clusters=np.arange(N), num_resamples=1000)[0], expected[0])
