"""Losses of trained heads, as gradients by their outputs, and the losses that choose between them.

Axes in names: s seeds, N cases, B cases of a step, R learning rates, C outputs.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hilum.probe.head import Array, Task, class_numbers
from hilum.probe.sampling import balance
from hilum.probe.survival import harrell_c


class Loss(Protocol):
    """What training needs: the gradient of each head's loss on its batch, by the outputs."""

    def gradient(self, outputs_sBRC: Tensor, rows_sB: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class CaseLoss:
    """A mean over cases whose gradient is weights ∘ (activation(outputs) - targets) / B.

    activation  softmax (cross-entropy), sigmoid (binary cross-entropy of each output), or none (squared error / 2)
    targets     (N, C)
    weights     (N, C) or (N, 1); 0 leaves an unknown target out
    """

    activation: Literal["softmax", "sigmoid", "none"]
    targets: Tensor
    weights: Tensor

    def gradient(self, outputs_sBRC: Tensor, rows_sB: Tensor) -> Tensor:
        weights = self.weights[rows_sB].unsqueeze(2) / rows_sB.shape[1]
        activated = activate(self.activation, outputs_sBRC)
        return (activated - self.targets[rows_sB].unsqueeze(2)).mul_(weights)


@dataclass(frozen=True, kw_only=True)
class CoxLoss:
    """Negative log partial likelihood within each batch (Breslow), divided by its events; 0 in a batch without one.

    time, event  (N,)
    """

    time: Tensor
    event: Tensor

    def gradient(self, outputs_sBRC: Tensor, rows_sB: Tensor) -> Tensor:
        risk = outputs_sBRC.detach().squeeze(-1).transpose(1, 2).requires_grad_()  # (s, R, B)
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.value(risk, rows_sB).sum(), risk)
        return found.transpose(1, 2).unsqueeze(-1)

    def value(self, risk_sRB: Tensor, rows_sB: Tensor) -> Tensor:
        """(s, R)."""
        time, order = self.time[rows_sB].sort(1, descending=True)
        event = self.event[rows_sB].gather(1, order).unsqueeze(1)
        last = torch.searchsorted(-time, -time, right=True) - 1  # of those still at risk, as the times are sorted
        risk = risk_sRB.gather(2, order.unsqueeze(1).expand_as(risk_sRB))
        at_risk = risk.logcumsumexp(2).gather(2, last.unsqueeze(1).expand_as(risk))
        return (event * (at_risk - risk)).sum(2) / event.sum(2).clamp(min=1)


def activate(activation: str, outputs: Tensor) -> Tensor:
    if activation == "softmax":
        return outputs.softmax(-1)
    return outputs.sigmoid() if activation == "sigmoid" else outputs


ACTIVATIONS: dict[Task, Literal["softmax", "sigmoid", "none"]] = {
    "classification": "softmax",
    "multilabel": "sigmoid",
    "regression": "none",
    "survival": "none",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loss, how many outputs it takes, and what turns outputs into targets: outputs · spread + offset."""

    loss: Loss
    num_outputs: int
    offset: float = 0.0
    spread: float = 1.0


def make_target(
    task: Task,
    y: Array,
    classes: Array | None,
    device: torch.device,
    *,
    standardise: bool,
    class_weight: str | None = None,
) -> Target:
    """The loss of a task on checked targets.

    standardise   numbers to mean 0 and variance 1; labels as heads of their own (the sum of their losses, not the mean)
    class_weight  None or "balanced" (`hilum.probe.sampling.balance`)
    """

    def tensor(values: Array) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    if task == "survival":
        return Target(loss=CoxLoss(time=tensor(y[:, 0]), event=tensor(y[:, 1])), num_outputs=1)
    offset, spread = 0.0, 1.0
    if task == "classification":
        assert classes is not None
        targets, weights = np.eye(len(classes))[class_numbers(y, classes)], np.ones((len(y), 1))
    elif task == "multilabel":
        targets, weights = np.nan_to_num(y), (~np.isnan(y)).astype(np.float64)
        weights /= 1 if standardise else y.shape[1]
    else:
        if standardise:
            offset, spread = float(y.mean()), float(y.std()) or 1.0
        targets, weights = (y[:, None] - offset) / spread, np.full((len(y), 1), 2.0)
    if class_weight == "balanced" and task != "regression":
        weights = balance(targets, weights, task)
    loss = CaseLoss(activation=ACTIVATIONS[task], targets=tensor(targets), weights=tensor(weights))
    return Target(loss=loss, num_outputs=targets.shape[1], offset=offset, spread=spread)


def choice_loss(task: Task, outputs: Tensor, y: Any, classes: Array | None) -> float:
    """What decides between learning rates, lower is better: mean log-loss (of classes seen in training, of known labels),
    squared error, or 1 - C-index, for outputs (N, C) before activation. ∞ where it is undefined."""
    if task == "classification":
        assert classes is not None
        numbers = torch.from_numpy(class_numbers(y, classes))
        found = float(functional.cross_entropy(outputs, numbers, ignore_index=-1))
    elif task == "survival":
        found = 1 - harrell_c(np.asarray(y, dtype=np.float64), outputs[:, 0].double().numpy())
    else:
        truth = torch.from_numpy(np.asarray(y, dtype=np.float32)).reshape(len(outputs), -1)
        known = ~truth.isnan()
        if task == "regression":
            found = float((outputs - truth).square().mean())
        else:
            found = float(functional.binary_cross_entropy_with_logits(outputs[known], truth[known]))
    return found if np.isfinite(found) else float("inf")
