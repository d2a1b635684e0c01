"""What every head must do. A head listed in HEADS is tested here without another line."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from hilum.errors import UsageError
from hilum.probe.heads import HEADS, make_head

TASKS = ("classification", "regression")


@pytest.fixture(params=[(name, task) for name in HEADS for task in TASKS], ids=" ".join)
def head(request):
    name, task = request.param
    return make_head(name, task=task)


def _data(task, seed=0, num=150):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num // 5), 5)
    signal = rng.integers(0, 3, num)
    X = np.eye(3)[signal] @ np.random.default_rng(7).normal(size=(3, 12)) + 0.3 * rng.normal(size=(num, 12))
    y = np.array(["x", "y", "z"])[signal] if task == "classification" else signal * 2.5 + 1
    return X.astype(np.float32), y, groups


def test_clone_is_equal_and_unfitted(head):
    X, y, groups = _data(head.task)
    head.fit(X, y, groups)
    copy = clone(head)
    assert copy.get_params() == head.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(X)


def test_fit_returns_itself_and_predictions_have_the_right_form(head):
    X, y, groups = _data(head.task)
    assert head.fit(X, y, groups) is head
    assert head.n_features_in_ == 12
    assert head.predict(X[:7]).shape == (7,)
    if head.task == "classification":
        proba = head.predict_proba(X)
        assert head.classes_.tolist() == ["x", "y", "z"]
        assert proba.shape == (150, 3)
        np.testing.assert_allclose(proba.sum(axis=1), 1)
        np.testing.assert_array_equal(head.predict(X), head.classes_[proba.argmax(axis=1)])
    else:
        with pytest.raises(UsageError, match="no class probabilities"):
            head.predict_proba(X)


def test_it_learns_what_is_plain_to_see(head):
    X, y, groups = _data(head.task)
    X_new, y_new, _ = _data(head.task, seed=1)
    predicted = head.fit(X, y, groups).predict(X_new)
    if head.task == "classification":
        assert np.mean(predicted == y_new) > 0.95
    else:
        assert np.corrcoef(predicted, y_new)[0, 1] > 0.95


def test_same_data_same_predictions(head):
    X, y, groups = _data(head.task)
    first = head.fit(X, y, groups).predict(X)
    np.testing.assert_array_equal(clone(head).fit(X, y, groups).predict(X), first)
    np.testing.assert_array_equal(head.fit(X, y, groups).predict(X), first)  # nothing is left from the first fit


def test_the_order_of_rows_does_not_matter(head):
    X, y, groups = _data(head.task)
    order = np.random.default_rng(3).permutation(len(y))
    shuffled = clone(head).fit(X[order], y[order], groups[order])
    head.fit(X, y, groups)
    if head.task == "classification":
        np.testing.assert_allclose(shuffled.predict_proba(X), head.predict_proba(X), atol=2e-3)
    else:
        np.testing.assert_allclose(shuffled.predict(X), head.predict(X), atol=1e-6)


def test_inputs_are_left_alone(head):
    X, y, groups = _data(head.task)
    before = X.copy(), y.copy(), groups.copy()
    head.fit(X, y, groups).predict(X)
    for array, copy in zip((X, y, groups), before):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("num", [4, 7])
def test_it_fits_a_handful_of_rows_with_or_without_groups(head, num):
    X, y, _ = _data(head.task)
    pick = np.concatenate([np.flatnonzero(y == v)[:3] for v in np.unique(y)])[:num]
    for groups in (None, np.zeros(num), np.arange(num), np.arange(num) % 2):
        assert len(clone(head).fit(X[pick], y[pick], groups).predict(X)) == 150


def test_a_constant_column_and_more_columns_than_rows_do_no_harm(head):
    X, y, groups = _data(head.task)
    wide = np.hstack([X, np.ones((len(X), 400), np.float32)])[:60]
    assert np.isfinite(head.fit(wide, y[:60], groups[:60]).predict(wide)).all() if head.task == "regression" else True
    assert len(head.fit(wide, y[:60], groups[:60]).predict(wide)) == 60


def test_what_cannot_be_fitted_is_refused(head):
    X, y, groups = _data(head.task)
    broken = X.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        head.fit(broken, y, groups)
    if head.task == "classification":
        with pytest.raises(ValueError, match="at least two classes"):
            head.fit(X, np.full(len(y), "x"), groups)
    with pytest.raises(UsageError, match="unknown task 'guessing'; known: "):
        head.set_params(task="guessing").fit(X, y)
