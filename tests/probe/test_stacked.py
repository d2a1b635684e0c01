"""Stacked heads against plain torch: one head after another, autograd, torch's own optimiser, schedule and clip."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn import functional

from hilum.errors import UsageError
from hilum.probe.heads.descent import Descent, descend, draw
from hilum.probe.heads.losses import CaseLoss
from hilum.probe.heads.stacked import StackedLinear

RNG = np.random.default_rng(0)
N, D, C = 150, 7, 4  # the last batch of 64 has 22 cases


def _plain(X, seed, rate, descent, compute_loss, num_outputs):
    """One head, as the public trainer's loop writes it."""
    weights, orders = draw(seed, X.shape[1], num_outputs, len(X), descent.epochs)
    head = torch.nn.Linear(X.shape[1], num_outputs, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weights.T)
        head.bias.zero_()
    optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    per_epoch = len(X) // descent.batch_size if descent.floor else -(-len(X) // descent.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=per_epoch * descent.epochs)
    for order in orders:
        for start in range(0, len(X), descent.batch_size):
            rows = order[start : start + descent.batch_size]
            optimiser.zero_grad()
            compute_loss(head(X[rows]), rows).backward()
            if descent.clip is not None:
                torch.nn.utils.clip_grad_norm_(head.parameters(), descent.clip)
            optimiser.step()
            schedule.step()
    return head.weight.detach().T, head.bias.detach()


def _case(kind):
    X = torch.from_numpy(RNG.normal(size=(N, D)) * 3)
    if kind == "softmax":
        y = torch.from_numpy(RNG.integers(0, C, N))
        loss = CaseLoss(activation="softmax", targets=torch.eye(C).double()[y], weights=torch.ones(N, 1).double())
        return X, loss, lambda z, rows: functional.cross_entropy(z, y[rows])
    if kind == "sigmoid":
        y = torch.from_numpy(RNG.integers(0, 2, (N, C)).astype(float))
        known = torch.from_numpy(RNG.random((N, C)) < 0.7).double()
        weight = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
        loss = CaseLoss(activation="sigmoid", targets=y, weights=known * torch.where(y > 0, weight, 1.0))

        def bce(z, rows):
            each = functional.binary_cross_entropy_with_logits(z, y[rows], pos_weight=weight, reduction="none")
            return (each * known[rows]).sum() / len(rows)

        return X, loss, bce
    y = torch.from_numpy(RNG.normal(60, 12, (N, 1)))
    loss = CaseLoss(activation="none", targets=y, weights=torch.full((N, 1), 2.0).double())
    return X, loss, lambda z, rows: functional.mse_loss(z, y[rows])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize(("clip", "floor"), [(None, False), (1.0, True)])
def test_every_head_is_the_plain_loop(kind, clip, floor):
    X, loss, plain_loss = _case(kind)
    rates = (0.001, 0.01, 0.05) if kind != "none" else (0.0001, 0.001, 0.002)
    descent = Descent(rates=rates, epochs=3, batch_size=64, clip=clip, floor=floor)
    weights, biases = descend(X, loss, loss.targets.shape[1], descent, [3, 11])
    for s, seed in enumerate([3, 11]):
        for r, rate in enumerate(rates):
            expected = _plain(X, seed, rate, descent, plain_loss, loss.targets.shape[1])
            np.testing.assert_allclose(weights[s, r], expected[0], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(biases[s, r], expected[1], rtol=1e-9, atol=1e-11)


def test_clip_was_at_work_and_the_schedule_turned_up():
    """Else the test above would not see them."""
    X, loss, _ = _case("softmax")
    free = Descent(rates=(0.05,), epochs=3, batch_size=64)
    clipped = Descent(rates=(0.05,), epochs=3, batch_size=64, clip=1.0)
    assert (descend(X, loss, C, free, [0])[0] - descend(X, loss, C, clipped, [0])[0]).abs().max() > 0.01
    curia = Descent(rates=(1.0,), epochs=3, batch_size=64, floor=True)
    factors = [curia.factor(step, N) for step in range(9)]  # 2 · 3 steps to zero, then up
    assert factors[6] == 0
    assert 0 < factors[7] < factors[8]


def test_the_curia_protocol_is_the_public_trainers_head_on_raw_features():
    X = RNG.normal(2, 3, size=(N, D)).astype(np.float32)
    y = RNG.integers(0, 3, N)
    head = StackedLinear(protocol="curia", learning_rates=(0.02,), epochs=4, batch_size=32, seeds=2).fit(X, y)
    descent = Descent(rates=(0.02,), epochs=4, batch_size=32, clip=1.0, floor=True)
    truth = torch.from_numpy(y)
    for s in range(2):
        w, b = _plain(torch.from_numpy(X).double(), s, 0.02 * 32 / 256, descent,
                      lambda z, rows: functional.cross_entropy(z, truth[rows]), 3)  # fmt: skip
        np.testing.assert_allclose(head.weights_[s], w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(head.outputs(X)[s], (torch.from_numpy(X).double() @ w + b).softmax(-1), atol=1e-4)


def test_bfloat16_products_give_the_same_scores():
    X = RNG.normal(size=(600, 64)).astype(np.float32)
    y = (X @ RNG.normal(size=(64, 10)) + 3 * RNG.normal(size=(600, 10))).argmax(1)
    rows = torch.from_numpy(X / 8)
    loss = CaseLoss(activation="softmax", targets=torch.eye(10)[y], weights=torch.ones(600, 1))
    exact, half = (
        descend(rows[:400], CaseLoss(activation="softmax", targets=loss.targets[:400], weights=loss.weights[:400]), 10,
                Descent(rates=(0.1, 1.0), epochs=10, batch_size=64, half=half), [0])
        for half in (False, True)
    )  # fmt: skip
    for r in range(2):
        a, b = ((rows[400:] @ w[0, r] + c[0, r]) for w, c in (exact, half))
        assert (a - b).abs().max() < 0.02 * a.abs().max()
        assert abs(float((a.argmax(1).numpy() == y[400:]).mean() - (b.argmax(1).numpy() == y[400:]).mean())) <= 0.01


def test_long_training_approaches_the_solvers_minimum():
    X = RNG.normal(size=(400, 5)) * [1, 10, 0.1, 3, 1] + 7
    scaled = (X - X.mean(0)) / X.std(0)
    y = (scaled[:, 0] - scaled[:, 2] + RNG.logistic(size=400) > 0).astype(int)
    head = StackedLinear(learning_rates=(0.3,), epochs=300, seeds=2).fit(X, y)
    solved = LogisticRegression(C=1e6).fit(scaled, y)
    np.testing.assert_allclose(head.predict_proba(X), solved.predict_proba(scaled), atol=0.01)
    value = scaled @ np.arange(5) + 40 + RNG.normal(size=400)
    head = StackedLinear("regression", learning_rates=(0.1,), epochs=300, seeds=2).fit(X, value)
    np.testing.assert_allclose(head.predict(X), Ridge(1e-9).fit(scaled, value).predict(scaled), atol=0.05)


def test_the_learning_rate_is_the_best_on_validation_cases_alone():
    X, y = RNG.normal(size=(200, 6)), RNG.integers(0, 2, 200)  # nothing to learn: the slowest is best
    X_val, y_val = RNG.normal(size=(200, 6)), RNG.integers(0, 2, 200)
    head = StackedLinear(learning_rates=(0.001, 10.0), epochs=30).fit(X, y, validation=(X_val, y_val))
    assert head.learning_rate_ == 0.001
    assert head.validation_loss_.shape == (5, 2)
    expected = -np.log(head.outputs(X_val)[:, np.arange(200), y_val]).mean(1)
    np.testing.assert_allclose(head.validation_loss_[:, 0], expected, rtol=1e-5)
    told = StackedLinear(learning_rates=(0.001, 10.0), epochs=30).fit(
        X, y, validation=(X_val, (X_val[:, 0] > 9).astype(int))
    )
    assert told.learning_rate_ == 0.001  # a truth that training does not know moves nothing but the choice
    np.testing.assert_array_equal(told.weights_, head.weights_)
    strong = (X[:, 0] > 0).astype(int)
    head = StackedLinear(learning_rates=(0.001, 10.0), epochs=30).fit(X, strong, validation=(X_val, X_val[:, 0] > 0))
    assert head.learning_rate_ == 10.0


def test_balanced_weights_find_the_rare_class():
    y = (RNG.random(1000) < 0.05).astype(int)
    X = RNG.normal(size=(1000, 3)) + y[:, None] * 0.8
    plain, balanced = (StackedLinear(learning_rates=(1.0,), class_weight=w).fit(X, y) for w in (None, "balanced"))
    found = [(head.predict(X)[y == 1] == 1).mean() for head in (plain, balanced)]
    assert found[0] < 0.3 < 0.6 < found[1]
    labels = np.stack([y, y], 1)
    multi = StackedLinear("multilabel", learning_rates=(1.0,), class_weight="balanced").fit(X, labels)
    assert multi.predict(X)[y == 1].mean() > 0.6


def test_wrong_settings_are_refused():
    X, y = RNG.normal(size=(20, 3)), np.arange(20) % 2
    with pytest.raises(UsageError, match="unknown protocol 'dino'; known: hilum, curia"):
        StackedLinear(protocol="dino").fit(X, y)
    with pytest.raises(UsageError, match="at least one seed"):
        StackedLinear(seeds=0).fit(X, y)
    with pytest.raises(UsageError, match="balanced"):
        StackedLinear(class_weight="more").fit(X, y)
