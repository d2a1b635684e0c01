import numpy as np
import pytest

from hilum.stats import holm, mean_ranks, run_spread, total_se


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 → ×4 ×3 ×2 ×1 = .04 .06 .06 .04, then never falling
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.01, np.nan, 0.9]) == pytest.approx([0.02, np.nan, 0.9], nan_ok=True)
    assert holm([0.6, 0.7]).max() == 1.0
    assert holm([]).shape == (0,)


def test_holm_keeps_the_chance_of_any_false_alarm():
    p = np.random.default_rng(0).random((4000, 8))
    assert np.mean([holm(row).min() <= 0.05 for row in p]) == pytest.approx(0.05, abs=0.01)


def test_mean_ranks_by_hand():
    values = [[0.9, 0.8, 0.7], [0.5, 0.6, 0.6], [1.0, 3.0, 2.0]]  # the last: an error in mm
    draws = np.repeat(np.array(values)[..., None], 50, axis=2)
    found = mean_ranks(values, draws, [True, True, False])
    assert [r.value for r in found] == pytest.approx([(1 + 3 + 1) / 3, (2 + 1.5 + 3) / 3, (3 + 1.5 + 2) / 3])
    assert all(r.low == pytest.approx(r.value) == r.high for r in found)


def test_mean_ranks_spread_with_the_draws_and_leave_undefined_ones_out():
    rng = np.random.default_rng(0)
    values = np.tile([[0.8, 0.79]], (6, 1))
    draws = values[..., None] + 0.05 * rng.normal(size=(6, 2, 2000))
    first, second = mean_ranks(values, draws, [True] * 6)
    assert (first.value, second.value) == (1.0, 2.0)
    assert first.low < 1.3 < 1.5 < first.high <= second.high
    draws[0, 0, :] = np.nan  # ranks by the other five
    again = mean_ranks(values, draws, [True] * 6)[0]
    assert np.isfinite([again.low, again.high]).all()
    with pytest.raises(ValueError, match="all models"):
        mean_ranks([[np.nan, 0.5]], np.zeros((1, 2, 3)), [True])


def test_seed_variance_and_case_variance_add_up():
    """Law of total variance, by simulation: score = case sample + draw + seed."""
    rng = np.random.default_rng(0)
    case, draw, seed = 0.03, 0.02, 0.04
    means, squares = [], []
    for _ in range(4000):
        runs = draw * rng.normal(size=(4, 1)) + seed * rng.normal(size=(4, 5))
        means.append(case * rng.normal() + runs.mean())
        squares.append(total_se(case, runs) ** 2)
    assert np.sqrt(np.mean(squares)) == pytest.approx(np.std(means), rel=0.03)
    one_draw = seed * rng.normal(size=(1, 5))
    assert total_se(case, one_draw) == pytest.approx(np.hypot(case, one_draw.std(ddof=1) / np.sqrt(5)))
    assert total_se(case, [[0.7]]) == case
    assert np.isnan(run_spread([[0.7]]).seed_sd)
