"""The permutation test against all exchanges written out, and against itself under the null."""

import itertools

import numpy as np
import pytest
from scipy.stats import kstest, rankdata

from hilum.metrics import accuracy, auroc, c_index, mae
from hilum.stats import permutation_test, permutation_test_of_runs


def slow(metric, y, first, second, patients, ranks):
    """Every exchange of whole patients, by hand."""
    if ranks:
        first, second = rankdata(first), rankdata(second)
    observed = metric(y, first) - metric(y, second)
    as_large = []
    for swapped in itertools.product([False, True], repeat=len(set(patients))):
        swap = np.array(swapped)[patients]
        a, b = np.where(swap, second, first), np.where(swap, first, second)
        as_large.append(abs(metric(y, a) - metric(y, b)) >= abs(observed) - 1e-12)
    return observed, np.mean(as_large)


@pytest.mark.parametrize(("metric", "ranks"), [(auroc, True), (mae, False), (accuracy, False), (c_index, True)])
def test_few_patients_are_enumerated(metric, ranks):
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(8), 3)
    y = rng.integers(0, 2, 24)
    if metric is c_index:
        y = np.stack([rng.exponential(size=24), y], axis=1)
    first, second = (rng.normal(size=(2, 24)) + 0.5).round(1) if metric is not accuracy else rng.integers(0, 2, (2, 24))
    found = permutation_test(metric, (y, first), (y, second), clusters=patients)
    observed, p_value = slow(metric, y, first, second, patients, ranks)
    assert (found.exact, found.num_permutations) == (True, 256)
    assert found.difference == pytest.approx(observed, abs=1e-12)
    assert found.p_value == pytest.approx(p_value, abs=1e-12)


def test_random_exchanges_come_near_the_exact_answer_and_never_to_zero():
    rng = np.random.default_rng(1)
    y = np.arange(14) % 2
    first, second = y + rng.normal(size=14), y + 3 * rng.normal(size=14)
    exact = permutation_test(auroc, (y, first), (y, second), clusters=np.arange(14), num_permutations=2**14)
    drawn = permutation_test(auroc, (y, first), (y, second), clusters=np.arange(14), num_permutations=2**14 - 1)
    assert (exact.exact, drawn.exact) == (True, False)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.02)
    y = np.arange(400) % 2
    sure = permutation_test(auroc, (y, y), (y, rng.normal(size=400)), clusters=np.arange(400), num_permutations=999)
    assert sure.p_value == 1 / 1000


def test_a_scale_of_its_own_does_not_matter_to_an_order():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 100)
    first, second = y + rng.normal(size=100), y + rng.normal(size=100)
    plain = permutation_test(auroc, (y, first), (y, second), clusters=np.arange(100), num_permutations=500)
    bent = permutation_test(
        auroc, (y, np.exp(first) * 1e-6), (y, second - 50), clusters=np.arange(100), num_permutations=500
    )
    assert plain == bent
    same = permutation_test(auroc, (y, first), (y, 7 * first), clusters=np.arange(100), num_permutations=500)
    assert (same.difference, same.p_value) == (0.0, 1.0)


def test_runs_are_averaged_and_a_single_run_stands_against_all():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 60)
    seeds = [(y, y + rng.normal(size=60)) for _ in range(3)]
    one = (y, rng.normal(size=60))
    found = permutation_test_of_runs(auroc, seeds, [one], clusters=np.arange(60), num_permutations=300)
    assert found.difference == pytest.approx(np.mean([auroc(*s) for s in seeds]) - auroc(*one))
    repeated = permutation_test_of_runs(auroc, seeds, [one] * 3, clusters=np.arange(60), num_permutations=300)
    assert repeated == found


def null_p_values(num_trials, num_permutations, num_patients=40):
    """Two equally good models on clustered cases, the second on another scale."""
    p_values = []
    for trial in range(num_trials):
        rng = np.random.default_rng(trial)
        patients = np.repeat(np.arange(num_patients), 3)
        y = rng.permutation(num_patients)[patients] % 2
        shared = y + rng.normal(size=num_patients)[patients]
        first, second = shared + rng.normal(size=(2, len(y))) + rng.normal(size=(2, num_patients))[:, patients]
        p_values.append(
            permutation_test(
                auroc, (y, first), (y, 100 * second), clusters=patients, num_permutations=num_permutations, seed=trial
            ).p_value
        )
    return p_values


def test_p_values_are_uniform_under_the_null():
    assert kstest(null_p_values(300, 199), "uniform").pvalue > 0.05


@pytest.mark.nightly
def test_p_values_are_uniform_under_the_null_in_many_trials():
    p_values = np.array(null_p_values(4000, 999))
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert 0.043 < (p_values <= 0.05).mean() < 0.057


def test_methods_must_have_the_same_truth():
    with pytest.raises(ValueError, match="disagree on the truth"):
        permutation_test(auroc, ([0, 1], [1, 2]), ([1, 0], [1, 2]), clusters=[0, 1])
    with pytest.raises(ValueError, match="one row per item"):
        permutation_test(auroc, ([0, 1], [1, 2]), ([0, 1], [1, 2]), clusters=[0, 1, 2])
