"""MLP heads against torch's own layers and Adam, one head after another; the Cox loss against the formula."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hilum.metrics import c_index
from hilum.probe.heads.losses import CaseLoss, CoxLoss
from hilum.probe.heads.mlp import MLPHead, first_weights, train_mlps
from hilum.probe.heads.survival import partial_likelihood

RNG = np.random.default_rng(0)
N, D, W, C = 50, 5, 8, 3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_head_is_the_plain_loop(dropout):
    X, y = torch.from_numpy(RNG.normal(size=(N, D))), torch.from_numpy(RNG.integers(0, C, N))
    loss = CaseLoss(activation="softmax", targets=torch.eye(C).double()[y], weights=torch.ones(N, 1).double())
    rates, seeds = (0.001, 0.02), (4, 9)
    found = train_mlps(X, loss, C, rates=rates, seeds=seeds, epochs=3, batch_size=16, width=W, dropout=dropout)
    for n, (seed, rate) in enumerate((s, r) for s in seeds for r in rates):
        weights, generator = first_weights(seed, (D, W, C))
        parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        optimiser = torch.optim.Adam(parameters, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=3 * 4)
        for _ in range(3):
            for rows in torch.randperm(N, generator=generator).split(16):
                hidden = torch.relu(X[rows] @ parameters[0] + parameters[1])
                if dropout:
                    hidden = hidden * (torch.rand(len(rows), W, generator=generator) >= dropout) / (1 - dropout)
                optimiser.zero_grad()
                functional.cross_entropy(hidden @ parameters[2] + parameters[3], y[rows]).backward()
                optimiser.step()
                schedule.step()
        for ours, theirs in zip(found, parameters):
            np.testing.assert_allclose(ours[n], theirs.detach(), rtol=1e-9, atol=1e-11)


def test_cox_loss_is_the_partial_likelihood_of_the_batch():
    y = np.stack([RNG.integers(1, 6, 12), RNG.random(12) < 0.6], 1).astype(float)
    loss = CoxLoss(time=torch.from_numpy(y[:, 0]), event=torch.from_numpy(y[:, 1]))
    rows = torch.tensor([[3, 1, 4, 0, 9, 2], [5, 6, 7, 8, 10, 11]])
    risk = torch.from_numpy(RNG.normal(size=(2, 6, 2, 1)))
    value = loss.value(risk.squeeze(-1).transpose(1, 2), rows)
    gradient = loss.gradient(risk, rows)
    for s in range(2):
        batch = y[rows[s].numpy()]
        for r in range(2):
            one = risk[s, :, r].numpy()
            events = batch[:, 1].sum()
            expected = -partial_likelihood(one, batch, np.ones(1), "breslow") / events
            assert float(value[s, r]) == pytest.approx(expected)
            for b in range(6):
                moved = one.copy()
                moved[b] += 1e-6
                slope = (-partial_likelihood(moved, batch, np.ones(1), "breslow") / events - expected) / 1e-6
                assert float(gradient[s, b, r, 0]) == pytest.approx(slope, abs=1e-4)
    none = CoxLoss(time=loss.time, event=torch.zeros(12).double())
    assert not none.gradient(risk, rows).any()


def test_it_learns_what_no_linear_head_can():
    X = RNG.normal(size=(400, 2)).astype(np.float32)
    xor = (X[:, 0] * X[:, 1] > 0).astype(int)
    head = MLPHead(seeds=2, epochs=60, width=64, learning_rates=(1e-5, 1e-2))
    head.fit(X[:300], xor[:300], validation=(X[300:350], xor[300:350]))
    assert head.learning_rate_ == 1e-2
    assert (head.predict(X[300:]) == xor[300:]).mean() > 0.9
    X = RNG.normal(size=(1200, 2)).astype(np.float32)
    xor = X[:, 0] * X[:, 1] > 0
    y = np.stack([RNG.exponential(np.exp(-2.0 * xor)), RNG.random(1200) < 0.8], 1)
    head = MLPHead("survival", seeds=2, epochs=30, width=64, learning_rates=(1e-2,)).fit(X[:800], y[:800])
    assert c_index(y[800:], head.predict(X[800:])) > 0.6
