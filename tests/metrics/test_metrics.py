import numpy as np
import pytest
from sklearn import metrics as reference

from hilum.metrics import METRICS, accuracy, auroc, balanced_accuracy, r2

RNG = np.random.default_rng(0)


def test_auroc_counts_ordered_pairs_by_hand():
    # positives 3, 1; negatives 2, 1: pairs 3>2, 3>1, 1<2, 1=1 → (1 + 1 + 0 + 0.5) / 4
    assert auroc([1, 0, 1, 0], [3.0, 2.0, 1.0, 1.0]) == 0.625


@pytest.mark.parametrize("decimals", [1, 6])  # many ties, no ties
def test_auroc_agrees_with_scikit_learn(decimals):
    y = RNG.integers(0, 2, 200)
    score = np.round(y * 0.4 + RNG.normal(size=200), decimals)
    assert auroc(y, score) == pytest.approx(reference.roc_auc_score(y, score), abs=1e-12)
    classes = RNG.integers(0, 5, 300)
    proba = np.round(RNG.dirichlet(np.ones(5), 300), decimals) + 0.1 * np.eye(5)[classes]
    expected = np.mean([reference.roc_auc_score(classes == c, proba[:, c]) for c in range(5)])
    assert auroc(classes, proba) == pytest.approx(expected, abs=1e-12)


def test_auroc_averages_over_the_classes_present():
    y = np.array([0, 0, 2, 2])
    proba = np.array([[0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.5, 0.1, 0.4], [0.1, 0.1, 0.8]])
    assert auroc(y, proba) == pytest.approx((0.75 + 1.0) / 2)


def test_auroc_laws():
    y, score = RNG.integers(0, 2, 100), RNG.normal(size=100)
    order = RNG.permutation(100)
    assert auroc(y[order], score[order]) == pytest.approx(auroc(y, score))
    assert auroc(y, np.exp(score)) == pytest.approx(auroc(y, score))  # only the order of scores matters
    assert auroc(y, -score) == pytest.approx(1 - auroc(y, score))
    assert auroc(y, np.stack([-score, score], axis=1)) == pytest.approx(auroc(y, score))


def test_accuracy_and_balanced_accuracy_by_hand_and_against_scikit_learn():
    y, p = np.array(["a", "a", "a", "b"]), np.array(["a", "a", "c", "a"])
    assert accuracy(y, p) == 0.5
    assert balanced_accuracy(y, p) == pytest.approx((2 / 3 + 0) / 2)
    y, p = RNG.integers(0, 4, 300), RNG.integers(0, 4, 300)
    assert accuracy(y, p) == pytest.approx(reference.accuracy_score(y, p))
    assert balanced_accuracy(y, p) == pytest.approx(reference.balanced_accuracy_score(y, p))


def test_r2_by_hand_and_against_scikit_learn():
    assert r2([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0.0
    y = RNG.normal(size=50)
    p = y + RNG.normal(size=50)
    assert r2(y, p) == pytest.approx(reference.r2_score(y, p))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([1, 1], [0.1, 0.2]), "only one class"),
        (lambda: auroc([2, 2], np.eye(3)[:2]), "only one class"),
        (lambda: auroc([1, 2], [0.1, 0.2]), "labels 0 and 1"),
        (lambda: auroc([0, 3], np.eye(3)[:2]), "class numbers 0 to 2"),
        (lambda: auroc([0, 1], [np.nan, 0.2]), "finite"),
        (lambda: balanced_accuracy(["a", "a"], ["a", "b"]), "only one class"),
        (lambda: r2([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]), "all true values are equal"),
        (lambda: accuracy([], []), "at least one"),
        (lambda: accuracy([1, 2], [1]), "as many predictions"),
    ],
)
def test_undefined_is_an_error_and_never_a_number(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_chance_is_what_a_predictor_without_knowledge_gets():
    y = np.repeat([0, 1], 5000)
    assert auroc(y, RNG.normal(size=10000)) == pytest.approx(METRICS["auroc"].chance, abs=0.02)
    assert r2(y, np.full(10000, y.mean())) == METRICS["r2"].chance
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"brier", "ece", "rmse", "mae", "mean_distance_mm", "hd95_mm", "surface_distance_mm"}
