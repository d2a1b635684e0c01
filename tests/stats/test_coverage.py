"""The 95 % interval holds the truth 93 to 97 times in 100, on patients with several cases each, be they many or few."""

import numpy as np
import pytest
from scipy.stats import norm

from hilum.metrics import auroc, c_index, mae, r2
from hilum.stats import bootstrap_interval


def clustered(rng, num_patients):
    """1 to 5 cases a patient; scores share a patient's part. Area of a positive over a negative of another patient known."""
    patients = np.repeat(np.arange(num_patients), rng.integers(1, 6, num_patients))
    y = rng.integers(0, 2, len(patients))
    score = y + 0.5 * rng.normal(size=num_patients)[patients] + rng.normal(size=len(patients))
    return y, score, patients


def covered(metric, make, truth, num_trials, num_resamples, num_patients):
    inside = 0
    for trial in range(num_trials):
        y, prediction, patients = make(np.random.default_rng([trial, 5]), num_patients)
        found = bootstrap_interval(metric, y, prediction, clusters=patients, num_resamples=num_resamples, seed=trial)
        inside += found.low <= truth <= found.high
    return inside / num_trials


AREA = norm.cdf(1 / np.sqrt(2 * 1.25))


def errors_of_patients(rng, num_patients):
    patients = np.repeat(np.arange(num_patients), rng.integers(1, 6, num_patients))
    y = 3 * rng.normal(size=len(patients))
    return y, y + rng.normal(size=num_patients)[patients] + rng.normal(size=len(patients)), patients


def survival(rng, num_patients):
    """Exponential times with hazard e^risk: P(first to die has the higher risk) is known for two risks."""
    patients = np.arange(num_patients)
    risk = rng.integers(0, 2, num_patients) * 1.0
    time = rng.exponential(size=num_patients) / np.exp(risk)
    return np.stack([time, np.ones(num_patients)], axis=1), risk, patients


# ties in risk count half: half of the pairs are tied, else the higher hazard e goes first with e / (1 + e)
CONCORDANCE = 0.5 * 0.5 + 0.5 * np.e / (1 + np.e)
CASES = {
    "auroc": (auroc, clustered, AREA),
    "mae": (mae, errors_of_patients, np.sqrt(2) * np.sqrt(2 / np.pi)),
    "r2": (r2, errors_of_patients, 1 - 2 / 9),
    "c_index": (c_index, survival, CONCORDANCE),
}


@pytest.mark.parametrize("name", ["auroc", "mae", "c_index"])
def test_coverage(name):
    metric, make, truth = CASES[name]
    assert 0.92 <= covered(metric, make, truth, 500, 300, 200) <= 0.98  # 500 trials: a standard error of .01


@pytest.mark.parametrize("num_patients", [20, 50])
def test_coverage_with_few_patients(num_patients):
    for name in ("auroc", "mae"):
        metric, make, truth = CASES[name]
        assert 0.90 <= covered(metric, make, truth, 300, 300, num_patients) <= 0.99


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_patients", [20, 50, 200])
def test_coverage_in_many_trials(name, num_patients):
    metric, make, truth = CASES[name]
    low, high = (
        (0.93, 0.97) if num_patients == 200 else (0.91, 0.985)
    )  # of few patients docs/statistics.md tells what was seen
    assert low <= covered(metric, make, truth, 3000, 2000, num_patients) <= high
