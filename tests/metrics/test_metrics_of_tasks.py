"""Metrics of labels, quantities, survival and places against scikit-learn, slow loops and hand counts."""

import numpy as np
import pytest
from sklearn import metrics as reference

from hilum import metrics

RNG = np.random.default_rng(0)


def test_f1_precision_and_brier_agree_with_scikit_learn():
    y = RNG.integers(0, 2, 200)
    p = np.clip(0.3 * y + 0.7 * RNG.random(200), 0, 1).round(1)
    assert metrics.f1(y, p) == pytest.approx(reference.f1_score(y, p >= 0.5))
    assert metrics.average_precision(y, p) == pytest.approx(reference.average_precision_score(y, p), abs=1e-12)
    assert metrics.brier(y, p) == pytest.approx(reference.brier_score_loss(y, p))
    classes, proba = RNG.integers(0, 4, 300), RNG.dirichlet(np.ones(4), 300)
    assert metrics.f1(classes, proba) == pytest.approx(reference.f1_score(classes, proba.argmax(1), average="macro"))
    assert metrics.brier(classes, proba) == pytest.approx(((proba - np.eye(4)[classes]) ** 2).sum(axis=1).mean())


def test_labels_are_averaged_over_those_that_are_defined():
    y = RNG.integers(0, 2, (100, 3)).astype(float)
    score = RNG.random((100, 3))
    y[::3, 0], y[:, 2] = np.nan, 1.0
    known = ~np.isnan(y[:, 0])
    each = [reference.roc_auc_score(y[known, 0], score[known, 0]), reference.roc_auc_score(y[:, 1], score[:, 1])]
    assert metrics.label_scores(metrics.auroc, y, score) == pytest.approx([*each, np.nan], nan_ok=True)
    assert metrics.macro_auroc(y, score) == pytest.approx(np.mean(each))
    assert metrics.macro_auroc_rate(y, score) == pytest.approx(sum(each) / 3)
    known_score = metrics.label_scores(metrics.average_precision, y, score)
    assert metrics.macro_average_precision(y, score) == pytest.approx(known_score.mean())
    assert metrics.macro_f1(y, score) == pytest.approx(metrics.label_scores(metrics.f1, y, score).mean())


def test_ece_by_hand():
    # bin (.6, .667]: confidence .65 twice, one right; bin (.867, .933]: .9 twice, both right
    assert metrics.ece([1, 0, 1, 0], [0.65, 0.65, 0.9, 0.1]) == pytest.approx((abs(1 - 1.3) + abs(2 - 1.8)) / 4)
    y = RNG.integers(0, 2, 50)
    p = RNG.random(50)
    assert metrics.ece(y, p) == pytest.approx(metrics.ece(y, np.stack([1 - p, p], axis=1)))
    sure = (RNG.random(20000) < 0.8).astype(int)
    assert metrics.ece(sure, np.full(20000, 0.8)) < 0.01


def slow_c_index(y, risk):
    ordered = pairs = 0.0
    for i, (ti, ei) in enumerate(y):
        for j, (tj, ej) in enumerate(y):
            first = ei == 1 and (ti < tj or (ti == tj and ej == 0))
            if i != j and first:
                pairs += 1
                ordered += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return ordered / pairs


@pytest.mark.parametrize("decimals", [1, 8])
def test_c_index_is_the_count_over_all_pairs(decimals):
    y = np.stack([RNG.exponential(size=300).round(decimals), RNG.random(300) < 0.5], axis=1)
    risk = RNG.normal(size=300).round(decimals) - 0.3 * y[:, 0]
    assert metrics.c_index(y, risk) == slow_c_index(y, risk)
    assert metrics.c_index(y, -risk) == pytest.approx(1 - metrics.c_index(y, risk))


def test_c_index_without_censoring_of_two_times_is_an_auroc():
    early = RNG.integers(0, 2, 100)
    risk = RNG.normal(size=100) + early
    y = np.stack([np.where(early == 1, 1.0, 2.0), early], axis=1)  # the others are censored at 2
    assert metrics.c_index(y, risk) == pytest.approx(metrics.auroc(early, risk))


def test_c_index_agrees_with_scikit_survival_and_lifelines():
    """Times without ties: their rules for two deaths at one time differ from each other."""
    y = np.stack([RNG.permutation(200) + 1.0, RNG.random(200) < 0.5], axis=1)
    risk = RNG.normal(size=200).round(1)
    sksurv = pytest.importorskip("sksurv.metrics", reason="scikit-survival is a test-only peer")
    assert metrics.c_index(y, risk) == pytest.approx(sksurv.concordance_index_censored(y[:, 1] == 1, y[:, 0], risk)[0])
    lifelines = pytest.importorskip("lifelines.utils", reason="lifelines is a test-only peer")
    assert metrics.c_index(y, risk) == pytest.approx(lifelines.concordance_index(y[:, 0], -risk, y[:, 1]))


def test_errors_in_the_unit_of_the_target():
    y = RNG.normal(size=(50, 3))
    p = y + RNG.normal(size=(50, 3))
    assert metrics.rmse(y[:, 0], p[:, 0]) == pytest.approx(reference.root_mean_squared_error(y[:, 0], p[:, 0]))
    assert metrics.mae(y[:, 0], p[:, 0]) == pytest.approx(reference.mean_absolute_error(y[:, 0], p[:, 0]))
    assert metrics.mean_distance_mm([[0, 0, 0], [1, 1, 1]], [[3, 4, 0], [1, 1, 2]]) == 3.0


def test_recall_by_hand():
    assert metrics.recall_at_k([1, 3, 11, 2], 2) == 0.5
    label, recalls = [0, 0, 0, 1], np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0.5]])
    assert metrics.recall_at_1(label, recalls) == pytest.approx((1 / 3 + 0) / 2)
    assert metrics.recall_at_5(label, recalls) == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.recall_at_10(label, recalls) == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.f1([0, 0], [0.1, 0.2]), "no case is positive"),
        (lambda: metrics.average_precision([0, 0], [0.1, 0.2]), "no case is positive"),
        (lambda: metrics.average_precision([0, 1], np.eye(2)), "one finite score each"),
        (lambda: metrics.macro_auroc(np.ones((3, 2)), np.ones((3, 2))), "every label"),
        (lambda: metrics.macro_auroc(np.ones(3), np.ones(3)), r"\(cases, labels\)"),
        (lambda: metrics.ece([0, 1], [0.5, 1.5]), "between 0 and 1"),
        (lambda: metrics.c_index([[1, 0], [2, 0]], [1, 2]), "died first"),
        (lambda: metrics.c_index([[1, 2], [2, 0]], [1, 2]), "events of 0 or 1"),
        (lambda: metrics.c_index([1, 2], [1, 2]), r"\(N, 2\)"),
        (lambda: metrics.mean_distance_mm([[1, 2, 3]], [[1, 2]]), "points"),
        (lambda: metrics.recall_at_k([0, 1], 1), "ranks from 1"),
        (lambda: metrics.mean_where([False], [1.0]), "no case"),
    ],
)
def test_undefined_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
