"""Losses of trained heads, as gradients by their outputs, and the losses that choose between them.

Axes in names: s seeds, N cases, B cases of a step, R learning rates, C outputs.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hilum.metrics import c_index
from hilum.probe.heads.head import Array, Task, class_numbers
from hilum.probe.sampling import balance


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
        targets, weights = (take_rows(part, rows_sB).unsqueeze(2) for part in (self.targets, self.weights))
        if self.activation == "none":
            outputs_sBRC = outputs_sBRC.clone()
        return activate(self.activation, outputs_sBRC).sub_(targets).mul_(weights / rows_sB.shape[1])


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
        return cox_loss(risk_sRB, self.time[rows_sB].unsqueeze(1), self.event[rows_sB].unsqueeze(1))


def take_rows(table: Tensor, rows_sB: Tensor) -> Tensor:
    """(s, B, …) rows of a table (N, …). `index_select` is several times as quick as an index."""
    return table.index_select(0, rows_sB.flatten()).view(*rows_sB.shape, *table.shape[1:])


def cox_loss(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative log partial likelihood per event, tied times after Breslow; 0 without events. (…, B) each → (…).

    -1/E Σ over events i of (risk_i - log Σ over j with time_j ≥ time_i of exp risk_j)  (Cox 1972, Breslow 1974)
    """
    time, order = time.sort(-1, descending=True)
    last = torch.searchsorted(-time, -time, right=True) - 1  # tied cases share one risk set
    event, risk = event.gather(-1, order), risk.gather(-1, order.expand_as(risk))
    at_risk = risk.logcumsumexp(-1).gather(-1, last.expand_as(risk))
    return (event * (at_risk - risk)).sum(-1) / event.sum(-1).clamp(min=1)


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
        try:
            found = 1 - c_index(y, outputs[:, 0].double().numpy())
        except ValueError:  # no pair can be ordered, or a risk is not finite
            return float("inf")
    else:
        truth = torch.from_numpy(np.asarray(y, dtype=np.float32)).reshape(len(outputs), -1)
        known = ~truth.isnan()
        if task == "regression":
            found = float((outputs - truth).square().mean())
        else:
            found = float(functional.binary_cross_entropy_with_logits(outputs[known], truth[known]))
    return found if np.isfinite(found) else float("inf")
