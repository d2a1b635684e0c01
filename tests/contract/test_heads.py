"""What every head must do. A head listed in HEADS is tested here without another line; heads on tokens have a suite of
their own."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from hilum.errors import UsageError
from hilum.probe.heads import HEADS, head_class, make_head

VECTOR_HEADS = [name for name in HEADS if head_class(name).sees == "vectors"]
QUICK = {"seeds": 2, "learning_rates": (0.01, 0.1), "epochs": 30, "width": 32}


@pytest.fixture(params=[f"{name} {task}" for name in VECTOR_HEADS for task in head_class(name).tasks])
def head(request):
    name, task = request.param.split()
    known = head_class(name)().get_params()
    return make_head(name, task=task, **{option: value for option, value in QUICK.items() if option in known})


def _data(task, seed=0, num=150):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num // 5 + 1), 5)[:num]
    signal = rng.integers(0, 3, num)
    X = np.eye(3)[signal] @ np.random.default_rng(7).normal(size=(3, 12)) + 0.3 * rng.normal(size=(num, 12))
    if task == "classification":
        y = np.array(["x", "y", "z"])[signal]
    elif task == "multilabel":
        y = np.stack([signal == 1, signal != 2], 1).astype(float)
        y[::7, 0] = np.nan
    elif task == "survival":
        y = np.stack([rng.exponential(np.exp(-2.0 * signal)), rng.random(num) < 0.8], 1)
    else:
        y = signal * 2.5 + 1
    return X.astype(np.float32), y, groups


def _quality(head, X, y):
    """1 for right, 0 for wrong or no relation."""
    found = head.predict(X)
    if head.task == "regression":
        return np.corrcoef(found, y)[0, 1]
    if head.task == "survival":
        return -2 * np.corrcoef(found, np.log(y[:, 0]))[0, 1]  # noise of the times remains
    known = ~np.isnan(y) if head.task == "multilabel" else slice(None)
    return np.mean((found == y)[known])


def test_clone_is_equal_and_unfitted(head):
    X, y, groups = _data(head.task)
    head.fit(X, y, groups)
    copy = clone(head)
    assert copy.get_params() == head.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(X)
    with pytest.raises(NotFittedError):
        copy.outputs(X)


def test_fit_returns_itself_and_predictions_have_the_right_form(head):
    X, y, groups = _data(head.task)
    assert head.fit(X, y, groups) is head
    assert head.n_features_in_ == 12
    outputs = head.outputs(X[:7])
    num_outputs = {"classification": 3, "multilabel": 2}.get(head.task, 1)
    assert outputs.dtype == np.float32
    assert outputs.shape == (getattr(head, "seeds", 1), 7, num_outputs)
    assert head.predict(X[:7]).shape == ((7, 2) if head.task == "multilabel" else (7,))
    if head.task in ("classification", "multilabel"):
        proba = head.predict_proba(X)
        assert proba.shape == (150, num_outputs)
        np.testing.assert_allclose(proba[:7], outputs.mean(0), atol=1e-6)
        assert proba.min() >= 0
        assert proba.max() <= 1 + 1e-6
    if head.task == "classification":
        assert head.classes_.tolist() == ["x", "y", "z"]
        np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_array_equal(head.predict(X), head.classes_[proba.argmax(axis=1)])
    elif head.task != "multilabel":
        np.testing.assert_allclose(head.predict(X[:7]), outputs.mean(0)[:, 0], rtol=1e-4, atol=1e-5)
        with pytest.raises(UsageError, match="no class probabilities"):
            head.predict_proba(X)


def test_it_learns_what_is_plain_to_see(head):
    X, y, groups = _data(head.task)
    assert _quality(head.fit(X, y, groups), *_data(head.task, seed=1)[:2]) > 0.94


def test_seeds_differ_and_are_each_right(head):
    X, y, groups = _data(head.task)
    outputs = head.fit(X, y, groups).outputs(X)
    for one in outputs[1:]:
        assert not np.array_equal(one, outputs[0])
        assert np.corrcoef(one.ravel(), outputs[0].ravel())[0, 1] > 0.9


def test_same_data_same_predictions(head):
    X, y, groups = _data(head.task)
    first = head.fit(X, y, groups).predict(X)
    np.testing.assert_array_equal(clone(head).fit(X, y, groups).predict(X), first)
    np.testing.assert_array_equal(head.fit(X, y, groups).predict(X), first)  # nothing is left from the first fit


def test_the_order_of_rows_does_not_matter(head):
    """Exactly for heads with one minimum; heads of several seeds draw an order of their own."""
    X, y, groups = _data(head.task)
    order = np.random.default_rng(3).permutation(len(y))
    shuffled = clone(head).fit(X[order], y[order], groups[order])
    head.fit(X, y, groups)
    a, b = (one.outputs(X).mean(0) for one in (shuffled, head))
    if hasattr(head, "seeds"):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.95
    else:
        np.testing.assert_allclose(a, b, atol=2e-3 if head.task != "regression" else 1e-5)


def test_validation_cases_are_not_trained_on_and_groups_may_be_anything(head):
    """Their truth moves a choice at most: with one thing to choose from nothing changes."""
    X, y, _ = _data(head.task)
    X_val, y_val, _ = _data(head.task, seed=1)
    if "learning_rates" in head.get_params():
        head.set_params(learning_rates=(0.03,))
    if "penalties" in head.get_params():
        head.set_params(penalties=(0.1,))
    if hasattr(head, "patience"):
        head.set_params(patience=None)
    wrong = np.roll(y_val, 1, axis=0)
    first, second = (clone(head).fit(X, y, validation=(X_val, truth)) for truth in (y_val, wrong))
    if hasattr(first, "strength_") or hasattr(first, "labels_"):
        assert _quality(first, X_val, y_val) >= _quality(second, X_val, y_val) - 0.02
    else:
        np.testing.assert_array_equal(first.outputs(X_val), second.outputs(X_val))
    assert _quality(first, X_val, y_val) > 0.94


def test_inputs_are_left_alone(head):
    X, y, groups = _data(head.task)
    before = X.copy(), y.copy(), groups.copy()
    head.fit(X, y, groups, validation=(X, y)).predict(X)
    for array, copy in zip((X, y, groups), before):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("num", [4, 7])
def test_it_fits_a_handful_of_rows_with_or_without_groups(head, num):
    X, y, _ = _data(head.task)
    key = y if head.task != "survival" else y[:, 1]
    key = key if key.ndim == 1 else key[:, 1]
    pick = np.concatenate([np.flatnonzero(key == v)[:3] for v in np.unique(key)])[-num:]
    for groups in (None, np.zeros(len(pick)), np.arange(len(pick)), np.arange(len(pick)) % 2):
        assert len(clone(head).fit(X[pick], y[pick], groups).predict(X)) == 150


def test_a_constant_column_and_more_columns_than_rows_do_no_harm(head):
    X, y, groups = _data(head.task)
    wide = np.hstack([X, np.ones((len(X), 400), np.float32)])[:60]
    outputs = head.fit(wide, y[:60], groups[:60]).outputs(wide)
    assert outputs.shape[1] == 60
    assert np.isfinite(outputs).all()


def test_what_cannot_be_fitted_is_refused(head):
    X, y, groups = _data(head.task)
    broken = X.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        head.fit(broken, y, groups)
    with pytest.raises(ValueError, match="expects y of"):
        head.fit(X, y[:-1], groups[:-1])
    if head.task == "classification":
        with pytest.raises(ValueError, match="at least two classes"):
            head.fit(X, np.full(len(y), "x"), groups)
    with pytest.raises(UsageError, match="unknown task 'guessing'; known: "):
        head.set_params(task="guessing").fit(X, y)
