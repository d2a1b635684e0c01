"""A head with one hidden layer, of several seeds and learning rates, trained in one pass by batched products.

The form is VoxelFM's: Linear D → 1024, ReLU, dropout 0.5, Linear. Axes in names: s seeds, R learning rates, H = s·R heads,
B cases of a step, D width, C outputs.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hilum.encode.encoder import pick_device
from hilum.errors import UsageError
from hilum.probe.heads.head import Array, Task, check_vectors, column_moments
from hilum.probe.heads.losses import ACTIVATIONS, Loss, activate, make_target
from hilum.probe.heads.rates import RatesHead

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
LEAST_EPOCHS, LEAST_STEPS = 20, 300
ROWS_AT_ONCE = 4096  # of cases that are judged


class MLPHead(RatesHead):
    """One hidden layer on standardised features, by Adam with a cosine to zero.

    task            "classification", "multilabel", "regression" or "survival" (Cox, within each batch)
    seeds           heads, each with its own first weights, order of cases and dropout
    learning_rates  to choose from; None: RATES
    epochs          None: 20, or more where these make less than 300 steps
    batch_size      cases of a step
    width, dropout  of the hidden layer
    class_weight    None or "balanced", as `StackedLinear`
    device          auto, cpu, cuda or cuda:N
    seed            the first; it also draws the cases held out when no validation cases are given

    One learning rate is chosen for all seeds by the mean of `hilum.probe.heads.losses.choice_loss`, on validation cases only;
    the weights of the last step are kept. VoxelFM keeps the rate constant and takes the best epoch on validation instead.
    After fitting: `learning_rate_`, `validation_loss_` (S, R) or None, `parameters_`.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multilabel", "regression", "survival")

    def __init__(
        self,
        task: Task = "classification",
        seeds: int = 5,
        learning_rates: tuple[float, ...] | None = None,
        epochs: int | None = None,
        batch_size: int = 64,
        width: int = 1024,
        dropout: float = 0.5,
        class_weight: str | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.task = task
        self.seeds = seeds
        self.learning_rates = learning_rates
        self.epochs = epochs
        self.batch_size = batch_size
        self.width = width
        self.dropout = dropout
        self.class_weight = class_weight
        self.device = device
        self.seed = seed

    def _check(self) -> tuple[float, ...]:
        if min(self.seeds, self.batch_size, self.width, self.epochs or 1) < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"expected at least one seed, case a batch, hidden unit and epoch, and 0 ≤ dropout < 1; found "
                             f"{self.seeds}, {self.batch_size}, {self.width}, {self.epochs}, {self.dropout}")  # fmt: skip
        return RATES

    def _train(self, X: Array, y: Array, rates: tuple[float, ...]) -> list[Tensor]:
        device = pick_device(self.device)
        self.mean_, self.scale_ = column_moments(X)
        classes = self.classes_ if self.task == "classification" else None
        target = make_target(self.task, y, classes, device, standardise=True, class_weight=self.class_weight)
        self.offset_, self.spread_ = target.offset, target.spread
        steps = math.ceil(len(X) / self.batch_size)
        found = train_mlps(
            torch.from_numpy(((X - self.mean_) / self.scale_).astype(np.float32)).to(device),
            target.loss,
            target.num_outputs,
            rates=rates,
            seeds=range(self.seed, self.seed + self.seeds),
            epochs=self.epochs or max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / steps)),
            batch_size=self.batch_size,
            width=self.width,
            dropout=self.dropout,
        )
        return [part.cpu().view(self.seeds, len(rates), *part.shape[1:]) for part in found]

    def _raw(self, parts: Sequence[Tensor], X: Array) -> Tensor:
        heads = [part.flatten(0, 1) for part in parts]
        rows = torch.from_numpy(((X - self.mean_) / self.scale_).astype(np.float32))
        with torch.inference_mode():
            some = [forward(heads, part.expand(len(heads[0]), -1, -1)) for part in rows.split(ROWS_AT_ONCE)]  # type: ignore[no-untyped-call]
            return torch.cat(some, 1) * self.spread_ + self.offset_

    def _keep(self, parts: Sequence[Tensor]) -> None:
        self.parameters_ = list(parts)

    def _outputs(self, X: Any) -> Array:
        raw = self._raw([part.unsqueeze(1) for part in self.parameters_], check_vectors(X, np.float32))
        found: Array = activate(ACTIVATIONS[self.task], raw).numpy()
        return found


def forward(parameters: Sequence[Tensor], x_HBD: Tensor, dropped_HBW: Tensor | None = None) -> Tensor:
    """(H, B, C) of H heads; `dropped` multiplies the hidden layer."""
    W1, b1, W2, b2 = parameters
    hidden = torch.baddbmm(b1.unsqueeze(1), x_HBD, W1).relu()
    if dropped_HBW is not None:
        hidden = hidden * dropped_HBW
    return torch.baddbmm(b2.unsqueeze(1), hidden, W2)


def first_weights(seed: int, sizes: Sequence[int]) -> tuple[list[Tensor], torch.Generator]:
    """Weights and biases of one head, uniform within 1 / √(inputs) as torch.nn.Linear draws them, and the generator that goes
    on to draw orders and dropout."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for before, after in itertools.pairwise(sizes):
        for shape in ((before, after), (after,)):
            drawn.append((2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(before))
    return drawn, generator


def train_mlps(
    X: Tensor,
    loss: Loss,
    num_outputs: int,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    batch_size: int,
    width: int,
    dropout: float,
) -> list[Tensor]:
    """W1 (H, D, W), b1 (H, W), W2 (H, W, C), b2 (H, C) after the last step; the heads of a seed follow each other.

    The rates of a seed share first weights, orders and dropout.
    """
    drawn = [first_weights(seed, (X.shape[1], width, num_outputs)) for seed in seeds]
    parameters = [
        torch.stack([one[i].to(X) for one, _ in drawn for _ in rates]).requires_grad_() for i in range(len(drawn[0][0]))
    ]
    generators = [generator for _, generator in drawn]
    rate_H = X.new_tensor(rates).repeat(len(seeds))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    total, step = epochs * math.ceil(len(X) / batch_size), 0
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(len(X), generator=g) for g in generators])
        for rows_sB in orders.split(batch_size, 1):  # type: ignore[no-untyped-call]
            kept = None
            if dropout:
                shape = (rows_sB.shape[1], width)
                kept = torch.stack([(torch.rand(shape, generator=g) >= dropout).to(X) for g in generators]) / (
                    1 - dropout
                )
                kept = kept.repeat_interleave(len(rates), 0)
            rows_sB = rows_sB.to(X.device)
            outputs = forward(parameters, X[rows_sB].repeat_interleave(len(rates), 0), kept)
            by_case = outputs.detach().view(len(seeds), len(rates), -1, num_outputs).transpose(1, 2)
            gradient = loss.gradient(by_case, rows_sB).transpose(1, 2).reshape_as(outputs)
            gradients = torch.autograd.grad(outputs, parameters, gradient)
            factor = (1 + math.cos(math.pi * step / total)) / 2
            step += 1
            _adam(parameters, gradients, moments, rate_H * factor, step)
    return [part.detach() for part in parameters]


def _adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    rate_H: Tensor,
    step: int,
) -> None:
    """One step of Adam (Kingma & Ba 2015; β 0.9 and 0.999, ε 1e-8), each head with its own learning rate."""
    with torch.no_grad():
        for p, g, (first, second) in zip(parameters, gradients, moments):
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
            size = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            p.sub_((rate_H / (1 - 0.9**step)).view(-1, *[1] * (p.ndim - 1)) * first / size)
