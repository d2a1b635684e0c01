import numpy as np
import pytest
from scipy.stats import t

from hilum.metrics import accuracy, auroc
from hilum.stats import bootstrap_interval, interval_of, paired_difference


def _mean(values):
    return float(np.mean(values))


def _patients(rng, num_patients=40, num_items=5, spread=1.0, noise=0.2):
    """Items of one patient share most of their value."""
    clusters = np.repeat(np.arange(num_patients), num_items)
    values = rng.normal(scale=spread, size=num_patients)[clusters] + rng.normal(scale=noise, size=len(clusters))
    return values, clusters


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = {"cluster": 0, "item": 0}
    for trial in range(150):
        values, clusters = _patients(np.random.default_rng(trial))
        for name, units in (("cluster", clusters), ("item", np.arange(len(values)))):
            found = bootstrap_interval(_mean, values, clusters=units, num_resamples=200, seed=trial)
            covered[name] += found.low <= 0.0 <= found.high
    assert 0.88 <= covered["cluster"] / 150 <= 0.99
    assert covered["item"] / 150 < 0.75  # why slices must not be resampled


def test_interval_has_the_textbook_width_for_independent_items():
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap_interval(_mean, values, clusters=np.arange(400), num_resamples=2000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    wider = bootstrap_interval(_mean, values, clusters=np.arange(400), num_resamples=2000, level=0.99)
    assert wider.low < found.low < found.high < wider.high


def test_a_resample_keeps_all_items_of_a_patient():
    clusters = np.array(["b", "a", "b", "c", "b"])
    seen = []

    def record(names, place):
        seen.append(len(place))
        for name, size in (("a", 1), ("b", 3), ("c", 1)):
            held = place[names == name]
            assert len(held) % size == 0
            assert len(set(np.bincount(held, minlength=5)[clusters == name])) == 1  # each item equally often
        return 0.0

    bootstrap_interval(record, clusters, np.arange(5), clusters=clusters, num_resamples=200)
    assert min(seen) == 3
    assert max(seen) == 9


def test_same_seed_same_interval_whatever_the_order_of_items():
    values, clusters = _patients(np.random.default_rng(1))
    order = np.random.default_rng(2).permutation(len(values))
    a = bootstrap_interval(_mean, values, clusters=clusters, seed=3)
    b = bootstrap_interval(_mean, values[order], clusters=clusters[order], seed=3)
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=1e-12)
    assert a == bootstrap_interval(_mean, values, clusters=clusters, seed=3)
    assert a != bootstrap_interval(_mean, values, clusters=clusters, seed=4)
    assert a.num_clusters == 40


def test_undefined_resamples_are_counted_and_left_out():
    y, score = np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3])
    found = bootstrap_interval(auroc, y, score, clusters=np.arange(4), num_resamples=2000)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    # no positive drawn: (3/4)^4; only positives drawn: (1/4)^4
    assert found.num_undefined / 2000 == pytest.approx(0.75**4 + 0.25**4, abs=0.04)


def test_an_interval_without_any_defined_resample_is_nan_and_not_a_number_of_ours():
    calls = []

    def defined_once(values):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError
        return 0.5

    found = bootstrap_interval(defined_once, np.arange(4), clusters=np.arange(4), num_resamples=10)
    assert np.isnan([found.low, found.high]).all()
    assert found.num_undefined == 10


def test_paired_difference_sees_what_two_separate_intervals_cannot():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    clusters = np.repeat(np.arange(100), 3)
    hard = rng.random(300) < 0.4
    first = np.where(hard, 1 - y, y)
    second = np.where(hard | (rng.random(300) < 0.05), 1 - y, y)  # the same mistakes and a few more
    a = bootstrap_interval(accuracy, y, first, clusters=clusters)
    b = bootstrap_interval(accuracy, y, second, clusters=clusters)
    found = paired_difference(accuracy, (y, first), (y, second), clusters=clusters)
    assert a.low < b.high
    assert found.interval.value == pytest.approx(a.value - b.value)
    assert found.interval.low > 0
    assert found.p_value == pytest.approx(2 / 10_001)


def test_paired_difference_of_equal_and_of_swapped_methods():
    values, clusters = _patients(np.random.default_rng(5))
    other = values + np.random.default_rng(6).normal(size=len(values))
    same = paired_difference(_mean, (values,), (values,), clusters=clusters)
    assert (same.interval.low, same.interval.high, same.p_value) == (0.0, 0.0, 1.0)
    there = paired_difference(_mean, (values,), (other,), clusters=clusters)
    back = paired_difference(_mean, (other,), (values,), clusters=clusters)
    assert there.p_value == back.p_value > 0.05
    assert there.interval.low == pytest.approx(-back.interval.high)


def test_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="at least 2 clusters"):
        bootstrap_interval(_mean, np.arange(3), clusters=[1, 1, 1])
    with pytest.raises(ValueError, match="one row per item"):
        bootstrap_interval(_mean, np.arange(3), clusters=[1, 2])
    with pytest.raises(ValueError, match="only one class"):
        bootstrap_interval(auroc, np.ones(4), np.arange(4), clusters=np.arange(4))
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval(_mean, np.arange(3), clusters=[1, 2, 3], level=95)


def test_of_few_patients_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(3).normal(size=8)
    found = bootstrap_interval(lambda x: float(x.mean()), values, clusters=np.arange(8), num_resamples=20_000)
    half = t.ppf(0.975, 7) * values.std(ddof=1) / np.sqrt(8)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_the_bias_of_resampling_is_undone():
    """A resample's variance is on average (n - 1) / n of the sample's; limits of a logarithm are logarithms of the limits."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=30)
    draws = np.array([rng.choice(values, 30).var() for _ in range(4000)])
    corrected, plain = (interval_of(values.var(), draws, np.arange(30), corrected=c) for c in (True, False))
    assert corrected.low > plain.low
    assert corrected.high > 1.05 * plain.high
    logarithm = interval_of(np.log(values.var()), np.log(draws), np.arange(30))
    assert np.exp([logarithm.low, logarithm.high]) == pytest.approx([corrected.low, corrected.high], rel=1e-3)
    many = interval_of(0.0, np.linspace(-1, 1, 1001), np.arange(100_000))
    assert (many.low, many.high) == pytest.approx((-0.95, 0.95), abs=1e-3)
