"""Lanes against torch's own optimisers, one network after the other."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hilum.errors import TrainingDiverged, UsageError
from hilum.probe.heads.lanes import Data, Draws, LaneSettings, ModuleNetwork, fit_lanes, run_lanes
from hilum.probe.heads.losses import cox_loss
from hilum.probe.heads.task_loss import TaskLoss
from hilum.probe.heads.tokens import plan_batches

RNG = np.random.default_rng(1)
X = torch.from_numpy(RNG.normal(size=(40, 6)).astype(np.float32))
Y = RNG.integers(0, 3, 40)
RATES = (0.01, 0.1)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


NETWORK = ModuleNetwork(make, lambda module, batch: module(batch))


def data(x, most=1000):
    lengths = np.ones(len(x), int)
    return Data(
        num=len(x),
        plan=lambda order, size: plan_batches(lengths, order, size, most),
        read=lambda pieces: (x[list(piece)] for piece in pieces),
    )


def objective(y=Y):
    return TaskLoss("classification", y, np.arange(3), 0.0, 1.0)


def settings(**changes):
    return LaneSettings(
        **{"seeds": (4, 5), "learning_rates": RATES, "epochs": 3, "batch_size": 16, "shuffle": False} | changes
    )


def fit(how, most=1000, **more):
    judge = objective(Y[30:])
    return fit_lanes(
        NETWORK, data(X[:30], most), data(X[30:]), how, loss=objective(Y[:30]).loss, score=judge.score, **more
    )


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize(("schedule", "clip"), [("constant", None), ("cosine", 0.05)])
def test_lanes_end_where_torch_ends_one_by_one(optimiser, schedule, clip):
    how = settings(optimiser=optimiser, schedule=schedule, clip=clip, weight_decay=0.05)
    found = fit(how)
    scores = np.zeros((3, 2, 2))
    ends = {}
    for r, rate in enumerate(RATES):
        for s, seed in enumerate((4, 5)):
            torch.manual_seed(seed)
            model = make()
            if optimiser == "adamw":
                optim = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
            else:
                optim = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=0.05)
            step = 0
            for epoch in range(3):
                for start in (0, 16):
                    rows = slice(start, min(start + 16, 30))
                    if schedule == "cosine":
                        optim.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 6))
                    optim.zero_grad()
                    nn.functional.cross_entropy(model(X[rows]), torch.from_numpy(Y[rows])).backward()
                    if clip:
                        nn.utils.clip_grad_norm_(model.parameters(), clip)
                    optim.step()
                    step += 1
                with torch.no_grad():
                    scores[epoch, r, s] = -nn.functional.cross_entropy(model(X[30:]), torch.from_numpy(Y[30:]))
                ends[epoch, r, s] = {n: p.detach().clone() for n, p in model.named_parameters()}
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    epoch, rate = np.unravel_index(scores.mean(2).argmax(), (3, 2))
    assert (found.epoch, found.learning_rate) == (epoch + 1, RATES[rate])
    for s in range(2):
        for name, weight in ends[epoch, rate, s].items():
            torch.testing.assert_close(found.weights[name][s], weight, atol=1e-5, rtol=1e-4)


def test_pieces_and_groups_of_lanes_change_nothing():
    whole = fit(settings(shuffle=True))
    parts = fit(settings(shuffle=True, lanes_at_once=3), most=5)
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-5)
    for name in whole.weights:
        torch.testing.assert_close(parts.weights[name], whole.weights[name], atol=1e-5, rtol=1e-4)


def test_a_loss_that_couples_cases_is_the_same_in_pieces():
    y = np.stack([RNG.exponential(size=30), RNG.integers(0, 2, 30)], 1)
    own = TaskLoss("survival", y, None, 0.0, 1.0)
    found = [
        fit_lanes(NETWORK, data(X[:30], most), None, settings(), loss=own.loss, score=own.score, couples_cases=True)
        for most in (1000, 3)
    ]
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-5)


def test_stop_ends_at_an_epoch_of_the_whole_schedule():
    how = settings(schedule="cosine", learning_rates=(0.1,))
    every = fit(how)
    again = fit(how, stop=every.epoch)
    for name in every.weights:
        torch.testing.assert_close(again.weights[name], every.weights[name])


def test_outputs_come_in_order_with_their_cases():
    found = fit(settings())
    parts = list(run_lanes(NETWORK, found.weights, data(X, 7), 16))
    assert [case for _, piece in parts for case in piece] == list(range(40))
    whole = torch.cat([out for out, _ in parts], 1)
    assert whole.shape == (2, 40, 3)
    torch.testing.assert_close(whole, NETWORK.outputs(found.weights, X, None))


def test_a_learning_rate_that_breaks_is_not_chosen():
    found = fit(settings(optimiser="sgd", learning_rates=(1e20, 0.01)))
    assert found.learning_rate == 0.01
    assert np.isneginf(found.scores[:, 0]).any()
    with pytest.raises(TrainingDiverged, match="smaller"):
        fit(settings(optimiser="sgd", learning_rates=(1e30,)))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="at least one seed"):
        settings(epochs=0)
    with pytest.raises(UsageError, match="found lbfgs"):
        settings(optimiser="lbfgs")


def test_draws_depend_on_seed_epoch_and_case_only():
    together = Draws([3, 4, 3], 2, [7, 8, 9]).keep((50,), 0.4)
    alone = Draws([4], 2, [9]).keep((50,), 0.4)
    torch.testing.assert_close(together[1, 2], alone[0, 0])
    torch.testing.assert_close(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert set(np.unique(together.numpy().round(4))) == {0.0, np.float32(1 / 0.6).round(4)}
    tokens = Draws([3], 2, [7, 8]).keep_tokens(2, [5, 30], 30, 0.5)
    torch.testing.assert_close(tokens[0, 0, :, :5], Draws([3], 2, [7]).keep_tokens(2, [5], 5, 0.5)[0, 0])
    assert not tokens[0, 0, :, 5:].any()
    many = Draws([0], 0, [0]).keep((100_000,), 0.3)
    assert many.mean() == pytest.approx(1, abs=0.01)


def test_cox_is_the_sum_over_events():
    time, event = np.array([3.0, 1, 3, 5, 1, 2]), np.array([1.0, 1, 0, 0, 1, 1])
    risk = RNG.normal(size=(2, 6))
    expected = [
        -sum(r[i] - np.log(sum(np.exp(r[j]) for j in range(6) if time[j] >= time[i])) for i in range(6) if event[i]) / 4
        for r in risk
    ]
    found = cox_loss(torch.from_numpy(risk), torch.from_numpy(time), torch.from_numpy(event))
    np.testing.assert_allclose(found, expected)
    assert cox_loss(torch.zeros(1, 2), torch.ones(2), torch.zeros(2)).item() == 0
