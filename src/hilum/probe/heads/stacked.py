"""Linear heads of several seeds and learning rates, fitted in one pass; the learning rate is chosen on validation cases."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hilum.encode.encoder import pick_device
from hilum.errors import UsageError
from hilum.probe.heads.descent import Descent, descend
from hilum.probe.heads.head import Array, Task, check_vectors, column_moments
from hilum.probe.heads.losses import ACTIVATIONS, activate, make_target
from hilum.probe.heads.rates import RatesHead

HALF_FROM = 1 << 18  # weights of one seed; smaller products are as quick in float32
LEAST_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a head is trained, where the caller does not say.

    standardise     features to mean 0 and variance 1 / D over the training rows, so that a row has length 1 and one grid of
                    rates fits all widths; targets of regression to mean 0 and variance 1. Else raw
    rates, epochs   of the search and of the training; None: 20 epochs, or more where these make less than LEAST_STEPS steps
    per_256         rates are meant for batches of 256 and applied as rate · batch / 256
    clip, floor     `hilum.probe.heads.descent.Descent`
    """

    standardise: bool
    rates: tuple[float, ...]
    epochs: int | None
    per_256: bool
    clip: float | None
    floor: bool


PROTOCOLS = {
    "hilum": Protocol(
        standardise=True,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        epochs=None,
        per_256=False,
        clip=None,
        floor=False,
    ),
    # Raidium's public trainer; rates and epochs are those of its shipped configurations and their middle.
    "curia": Protocol(
        standardise=False,
        rates=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02),
        epochs=50,
        per_256=True,
        clip=1.0,
        floor=True,
    ),
}


class StackedLinear(RatesHead):
    """Linear heads by SGD: softmax, one logistic output a label, or least squares.

    task            "classification", "multilabel" or "regression"
    seeds           heads, each with its own first weights and order of cases
    learning_rates  to choose from; None: the protocol's
    epochs          None: the protocol's
    batch_size      cases of a step
    protocol        "hilum" or "curia" (`PROTOCOLS`)
    class_weight    "balanced": classes weigh N / (C · n_c), positives of a label n₋ / n₊; None: cases weigh the same
    precision       "float32", or "auto": products in bfloat16 where the device is fast in it, the head is large, and outputs
                    are probabilities
    device          auto, cpu, cuda or cuda:N
    seed            the first; it also draws the cases held out when no validation cases are given

    One learning rate is chosen for all seeds: that with the lowest loss on the validation cases, mean over seeds (log-loss,
    binary log-loss, squared error). The weights of the last step are kept. Unknown labels (NaN) have no gradient.
    After fitting: `learning_rate_`, `validation_loss_` (S, R) or None, `weights_` (S, D, C) and `biases_` (S, C) for raw
    features, of the learning rate chosen.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multilabel", "regression")

    def __init__(
        self,
        task: Task = "classification",
        seeds: int = 5,
        learning_rates: tuple[float, ...] | None = None,
        epochs: int | None = None,
        batch_size: int = 64,
        protocol: str = "hilum",
        class_weight: str | None = None,
        precision: str = "auto",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.task = task
        self.seeds = seeds
        self.learning_rates = learning_rates
        self.epochs = epochs
        self.batch_size = batch_size
        self.protocol = protocol
        self.class_weight = class_weight
        self.precision = precision
        self.device = device
        self.seed = seed

    def _check(self) -> tuple[float, ...]:
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"unknown protocol '{self.protocol}'; known: {', '.join(PROTOCOLS)}")
        if self.class_weight not in (None, "balanced") or self.precision not in ("auto", "float32"):
            raise UsageError(f"class_weight '{self.class_weight}', precision '{self.precision}': expected None or balanced, "
                             "and auto or float32")  # fmt: skip
        if self.seeds < 1 or self.batch_size < 1 or (self.epochs is not None and self.epochs < 1):
            raise UsageError(f"expected at least one seed, epoch and case a batch; found {self.seeds} seeds, "
                             f"{self.epochs} epochs, batches of {self.batch_size}")  # fmt: skip
        protocol = PROTOCOLS[self.protocol]
        return protocol.rates

    def _train(self, X: Array, y: Array, rates: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Weights (S, R, D, C) and biases (S, R, C) for raw features and targets."""
        protocol, device = PROTOCOLS[self.protocol], pick_device(self.device)
        mean, scale = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if protocol.standardise:
            mean, sd = column_moments(X)
            scale = sd * math.sqrt(X.shape[1])
        classes = self.classes_ if self.task == "classification" else None
        target = make_target(
            self.task, y, classes, device, standardise=protocol.standardise, class_weight=self.class_weight
        )
        steps = math.ceil(len(X) / self.batch_size)
        descent = Descent(
            rates=tuple(rate * self.batch_size / 256 if protocol.per_256 else rate for rate in rates),
            epochs=self.epochs or protocol.epochs or max(20, math.ceil(LEAST_STEPS / steps)),
            batch_size=self.batch_size,
            clip=protocol.clip,
            floor=protocol.floor,
            half=self._halve(X.shape[1] * len(rates) * target.num_outputs, device),
        )
        rows = torch.from_numpy(((X - mean) / scale).astype(np.float32)).to(device)
        seeds = range(self.seed, self.seed + self.seeds)
        trained = descend(rows, target.loss, target.num_outputs, descent, seeds)
        weights, biases = (part.cpu().double() for part in trained)
        weights = weights / torch.from_numpy(scale)[:, None]
        biases = biases - torch.einsum("srdo,d->sro", weights, torch.from_numpy(mean))
        return (weights * target.spread).float(), (biases * target.spread + target.offset).float()

    def _halve(self, size: int, device: torch.device) -> bool:
        if self.precision != "auto" or self.task == "regression" or size < HALF_FROM:
            return False
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

    def _raw(self, parts: Sequence[Tensor], X: Array) -> Iterator[Tensor]:
        weights, biases = parts
        for s, r in np.ndindex(*weights.shape[:2]):
            yield torch.addmm(biases[s, r], torch.from_numpy(X), weights[s, r])

    def _keep(self, parts: Sequence[Tensor]) -> None:
        self.weights_, self.biases_ = (part.numpy() for part in parts)

    def _outputs(self, X: Any) -> Array:
        rows = check_vectors(X, np.float32)
        logits = torch.from_numpy(np.matmul(rows, self.weights_) + self.biases_[:, None])
        found: Array = activate(ACTIVATIONS[self.task], logits).numpy()
        return found
