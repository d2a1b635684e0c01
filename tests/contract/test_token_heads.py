"""What every head on tokens with a vector for an answer must do, for each of its tasks."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from hilum.encode.table.patches import Patches
from hilum.errors import UsageError
from hilum.probe.heads.attention import AttentionHead, QFormerHead
from hilum.probe.heads.tokens import TokenSequence, case_tokens

SMALL = {"seeds": 2, "learning_rates": (1e-3, 1e-2), "epochs": 8, "batch_size": 8}
MADE = {
    "attention": lambda task: AttentionHead(task, **SMALL | {"learning_rates": (0.03, 0.1)}),
    "q-former": lambda task: QFormerHead(task, hidden=32, **SMALL),
}
TASKS = ("classification", "multilabel", "regression", "survival")


@pytest.fixture(params=[(name, task) for name in MADE for task in TASKS], ids=" ".join)
def head(request):
    name, task = request.param
    return MADE[name](task)


def _data(task, seed=0, num=64):
    """Noise tokens, and in each case two that carry the signal: a mean over the tokens sees little of it."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(7).normal(size=(3, 16)) * 2.5
    signal = rng.integers(0, 3, num)
    cases = []
    for kind in signal:
        grid = (int(rng.integers(2, 5)), 2, 3)
        tokens = 0.7 * rng.normal(size=(grid[0] * 6, 16)).astype(np.float32)
        tokens[rng.choice(len(tokens), 2, replace=False)] += kinds[kind]
        cases.append(case_tokens(Patches(tokens.reshape(*grid, 16), grid, None, None, tuple(range(grid[0])), {})))
    y = {
        "classification": lambda: np.array(["x", "y", "z"])[signal],
        "multilabel": lambda: np.where(rng.random((num, 2)) < 0.1, np.nan, np.stack([signal == 0, signal > 1], 1)),
        "regression": lambda: signal * 2.5 + 100,
        "survival": lambda: np.stack([rng.exponential(np.exp(-2.0 * signal)), rng.random(num) < 0.8], 1),
    }[task]()
    return TokenSequence(cases), y, np.arange(num) // 2, signal


def test_it_learns_what_is_plain_to_see_and_answers_in_the_right_form(head):
    X, y, groups, _ = _data(head.task)
    X_new, y_new, _, signal = _data(head.task, seed=1)
    assert head.fit(X, y, groups) is head
    out, predicted = head.outputs(X_new), head.predict(X_new)
    assert out.dtype == np.float32
    assert out.shape == (2, 64, {"classification": 3, "multilabel": 2}.get(head.task, 1))
    if head.task == "classification":
        np.testing.assert_allclose(out.sum(2), 1, rtol=1e-5)
        assert np.mean(predicted == y_new) > 0.9
    elif head.task == "multilabel":
        assert np.mean((predicted == y_new)[~np.isnan(y_new)]) > 0.9
    else:
        assert np.corrcoef(predicted, signal)[0, 1] > 0.8
    if head.task == "regression":
        assert abs(predicted.mean() - y_new.mean()) < 1
    assert head.learning_rate_ in head.learning_rates
    assert head.scores_.shape == (8, 2, 2)


def test_same_data_same_outputs_whatever_the_pieces(head):
    """Neither another run, nor a memory limit that cuts batches and lanes, nor files instead of memory change a fit."""
    X, y, groups, _ = _data(head.task, num=40)
    head.set_params(epochs=2)
    with pytest.raises(NotFittedError):
        head.predict(X)
    first = head.fit(X, y, groups).outputs(X)
    np.testing.assert_array_equal(clone(head).fit(X, y, groups).outputs(X), first)
    cut = clone(head).set_params(max_floats=20_000).fit(X, y, groups).outputs(X)
    if head.task == "survival":  # a risk has no zero
        cut, first = cut - cut.mean(1, keepdims=True), first - first.mean(1, keepdims=True)
    np.testing.assert_allclose(cut, first, atol=2e-3 * np.abs(first).max())


def test_one_seed_and_rate_alone_are_what_they_are_among_others(head):
    X, y, groups, _ = _data(head.task, num=40)
    validation = _data(head.task, seed=3, num=20)[:2]
    head.set_params(epochs=1).fit(X, y, groups, validation)  # of several, one seed alone may choose another
    alone = clone(head).set_params(seeds=1, learning_rates=(head.learning_rate_,)).fit(X, y, groups, validation)
    one, among = alone.outputs(X)[0], head.outputs(X)[0]
    if head.task == "survival":
        one, among = one - one.mean(), among - among.mean()
    np.testing.assert_allclose(one, among, rtol=1e-3, atol=1e-4)


def test_validation_decides_and_is_not_trained_on(head):
    X, y, groups, _ = _data(head.task, num=40)
    X_val, y_val, _, _ = _data(head.task, seed=3, num=20)
    head.set_params(epochs=2).fit(X, y, groups, (X_val, y_val))
    means = head.scores_.mean(2)
    assert means.max() == means[head.epoch_ - 1, head.learning_rates.index(head.learning_rate_)]
    other = y_val[::-1] if head.task == "classification" else y_val
    twice = clone(head).set_params(epochs=1, learning_rates=(0.01,)).fit(X, y, groups, (X_val, y_val)).outputs(X)
    np.testing.assert_array_equal(
        clone(head).set_params(epochs=1, learning_rates=(0.01,)).fit(X, y, groups, (X_val, other)).outputs(X), twice
    )


def test_what_cannot_be_fitted_is_refused(head):
    X, y, groups, _ = _data(head.task, num=10)
    with pytest.raises(ValueError, match="for 10 cases"):
        head.fit(X, y[:9], groups)
    with pytest.raises(UsageError, match="unknown task 'guessing'"):
        head.set_params(task="guessing").fit(X, y, groups)
