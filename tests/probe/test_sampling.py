"""Draws keep patients apart; balanced weights and temperatures are what their formulas say."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.utils.class_weight import compute_sample_weight

from hilum.errors import LabelsError, UsageError
from hilum.probe.calibration import apply_temperature, fit_temperature
from hilum.probe.sampling import balance, draw_few, draw_share

RNG = np.random.default_rng(0)


def test_few_of_each_class_from_different_patients_and_none_of_theirs_in_the_rest():
    groups = np.repeat(np.arange(30), 4)
    y = groups % 3
    y[::4] = (y[::4] + 1) % 3
    draws = list(draw_few(y, 5, groups=groups, num_draws=4, seed=1))
    for drawn, rest in draws:
        assert np.bincount(y[drawn]).tolist() == [5, 5, 5]
        assert not set(groups[drawn]) & set(groups[rest])
        assert len(rest) > 50
        for c in range(3):
            assert len(set(groups[drawn[y[drawn] == c]])) == 5  # five patients, as there are enough
    assert len({tuple(drawn) for drawn, _ in draws}) == 4
    again = list(draw_few(y, 5, groups=groups, num_draws=2, seed=1))
    np.testing.assert_array_equal(again[1][0], draws[1][0])


def test_a_class_with_too_few_cases_is_named():
    with pytest.raises(LabelsError, match=r"too few have: 1 \(2\), 2 \(0\)"):
        next(draw_few([0, 0, 0, 1, 1], 3, classes=[0, 1, 2]))


def test_shares_are_of_patients_and_nested():
    groups = RNG.integers(0, 40, 500)
    some, more = draw_share(groups, 0.25, seed=3), draw_share(groups, 0.5, seed=3)
    assert len(set(groups[some])) == 10
    assert set(some) < set(more)
    assert not set(groups[some]) & set(np.delete(groups, some))
    assert len(draw_share(groups, 1.0)) == 500
    assert len(set(groups[draw_share(groups, 0.001)])) == 1
    with pytest.raises(UsageError, match="at most 1"):
        draw_share(groups, 10)


def test_balanced_weights_are_scikit_learns_and_even_out_labels():
    y = RNG.choice(3, 100, p=[0.7, 0.2, 0.1])
    found = balance(np.eye(3)[y], np.ones((100, 1)), "classification")
    np.testing.assert_allclose(found[:, 0], compute_sample_weight("balanced", y))
    labels, known = (RNG.random((100, 2)) < 0.2).astype(float), (RNG.random((100, 2)) < 0.8).astype(float)
    weights = balance(labels, known, "multilabel")
    np.testing.assert_allclose((weights * labels).sum(0), (weights * (1 - labels)).sum(0))
    assert not weights[known == 0].any()


def test_temperature_finds_what_made_the_probabilities_too_sure():
    logits = RNG.normal(size=(20000, 4)) * 1.5
    y = (logits + RNG.gumbel(size=logits.shape)).argmax(1)
    assert fit_temperature(softmax(3 * logits, axis=1), y) == pytest.approx(3, rel=0.05)
    assert fit_temperature(softmax(logits / 2, axis=1), y) == pytest.approx(0.5, rel=0.05)
    np.testing.assert_allclose(apply_temperature(softmax(3 * logits, axis=1), 3.0), softmax(logits, axis=1), atol=1e-9)
    truth = (RNG.random(logits.shape) < expit(logits)).astype(float)
    truth[::5] = np.nan
    assert fit_temperature(expit(2 * logits), truth, multilabel=True) == pytest.approx(2, rel=0.05)
    np.testing.assert_allclose(apply_temperature(expit(2 * logits), 2.0, multilabel=True), expit(logits), atol=1e-9)


def test_certain_probabilities_stay_finite():
    assert np.isfinite(apply_temperature([[1.0, 0.0]], 0.1)).all()
    assert apply_temperature([[1.0, 0.0]], 2.0, multilabel=True)[0, 0] > 0.99
    assert 0 < fit_temperature([[1.0, 0.0], [1.0, 0.0]], [0, 1]) <= 20
