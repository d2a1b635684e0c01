import numpy as np
import pytest

from hilum.errors import UsageError
from hilum.probe.heads import make_head
from hilum.probe.heads.knn import KNNProbe
from hilum.probe.heads.linear import FIXED_STRENGTH, STRENGTHS, LinearProbe

RNG = np.random.default_rng(0)


def test_logistic_regression_meets_the_condition_of_its_minimum():
    """At the minimum the gradient of Σ log-loss + λ/2 ‖w‖² is zero: Xᵀ(p - y) + λ w = 0."""
    X = RNG.normal(size=(120, 6))
    y = (X[:, 0] + RNG.normal(size=120) > 0).astype(int)
    head = LinearProbe().fit(X, y, np.arange(120) // 4)
    scaled = (X - X.mean(axis=0)) / X.std(axis=0)
    gradient = scaled.T @ (head.predict_proba(X)[:, 1] - y) + head.strength_ * head.model_.coef_[0]
    assert np.abs(gradient).max() < 120 * 2e-4


def test_ridge_is_the_closed_form_on_standardised_features():
    X = RNG.normal(3, 5, size=(80, 5))
    y = X @ np.arange(5) + RNG.normal(size=80) + 40
    head = LinearProbe("regression").fit(X, y, np.arange(80) // 4)
    scaled = (X - X.mean(axis=0)) / X.std(axis=0)
    weights = np.linalg.solve(scaled.T @ scaled + head.strength_ * np.eye(5), scaled.T @ (y - y.mean()))
    np.testing.assert_allclose(head.predict(X), scaled @ weights + y.mean(), rtol=1e-9)


def test_strength_follows_the_signal():
    groups = np.arange(200) // 4
    X = RNG.normal(size=(200, 50))
    noise = LinearProbe("regression").fit(X, RNG.normal(size=200), groups).strength_
    signal = LinearProbe("regression").fit(X, X @ RNG.normal(size=50), groups).strength_
    assert noise >= 1000
    assert signal == STRENGTHS[-1]


def test_inner_folds_keep_groups_apart():
    """A feature that names the patient helps only when a patient stands on both sides: then the penalty gets weak."""
    patient = np.repeat(np.arange(60), 6)
    y = RNG.integers(0, 2, 60)[patient]
    X = RNG.normal(size=(60, 100))[patient] + 0.01 * RNG.normal(size=(360, 100))
    assert LinearProbe().fit(X, y, patient).strength_ >= 1e4
    assert LinearProbe().fit(X, y, groups=np.arange(360)).strength_ <= 10


def test_strength_is_fixed_when_there_is_too_little_to_choose_from():
    X = RNG.normal(size=(4, 3))
    assert LinearProbe().fit(X, [0, 1, 0, 1]).strength_ == FIXED_STRENGTH
    assert LinearProbe("regression").fit(X, [0.0, 1.0, 2.0, 3.0]).strength_ == FIXED_STRENGTH
    one_class_each = np.array([0, 1, 0, 1])
    assert LinearProbe().fit(X, one_class_each, groups=one_class_each).strength_ == FIXED_STRENGTH


def test_principal_components_come_from_the_training_rows_and_are_capped():
    X, y = RNG.normal(size=(40, 10)), np.arange(40) % 2
    assert LinearProbe(num_components=4).fit(X, y).pca_.n_components_ == 4
    assert LinearProbe(num_components=99).fit(X, y).pca_.n_components_ == 10
    assert LinearProbe(num_components=99).fit(X[:6], y[:6]).pca_.n_components_ == 6
    full = LinearProbe(num_components=10).fit(X, y).predict_proba(X)  # a rotation changes nothing
    np.testing.assert_allclose(full, LinearProbe().fit(X, y).predict_proba(X), atol=1e-3)


def test_scale_of_features_does_not_matter_to_the_linear_head():
    X, y = RNG.normal(size=(60, 8)), np.arange(60) % 3
    scale = 10.0 ** RNG.uniform(-3, 3, 8)
    np.testing.assert_allclose(
        LinearProbe().fit(X * scale + 5, y).predict_proba(X * scale + 5),
        LinearProbe().fit(X, y).predict_proba(X),
        atol=1e-6,
    )


def test_knn_is_the_slow_loop():
    X, y, new = RNG.normal(size=(50, 6)), RNG.integers(0, 3, 50), RNG.normal(size=(9, 6))
    values = RNG.normal(size=50)
    head, mean = KNNProbe(num_neighbors=5).fit(X, y), KNNProbe("regression", num_neighbors=5).fit(X, values)
    for row, proba, value in zip(new, head.predict_proba(new), mean.predict(new)):
        cosine = [row @ x / np.linalg.norm(row) / np.linalg.norm(x) for x in X]
        near = sorted(range(50), key=lambda i: -cosine[i])[:5]
        weight = {i: np.exp(cosine[i] / 0.07) for i in near}
        expected = [sum(weight[i] for i in near if y[i] == c) / sum(weight.values()) for c in range(3)]
        np.testing.assert_allclose(proba, expected, atol=1e-12)
        assert value == pytest.approx(sum(weight[i] * values[i] for i in near) / sum(weight.values()))


def test_knn_ignores_length_and_survives_many_and_empty_rows():
    X, y = RNG.normal(size=(50, 6)), np.arange(50) % 2
    head = KNNProbe().fit(X, y)
    np.testing.assert_allclose(head.predict_proba(X * 7), head.predict_proba(X))
    many = np.concatenate([np.tile(X, (50, 1)), np.zeros((1, 6))])
    proba = head.predict_proba(many)
    np.testing.assert_allclose(proba[2000:2050], proba[:50])
    assert np.isfinite(proba).all()


def test_unknown_names_list_the_known():
    with pytest.raises(UsageError, match="unknown head 'svm'; known: linear, knn"):
        make_head("svm")
    with pytest.raises(UsageError, match="head 'knn' has no option num_components; known: num_neighbors"):
        make_head("knn", num_components=5)
    assert make_head("knn", num_components=None, seed=3).num_neighbors == 20
    assert make_head("linear", seed=3).seed == 3
