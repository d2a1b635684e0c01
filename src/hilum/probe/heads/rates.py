"""Heads on vectors whose seeds × learning rates are trained side by side; validation cases choose one rate for all seeds."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor

from hilum.probe.heads.head import Array, Head, Validation, check_targets, check_task, check_vectors, hold_out
from hilum.probe.heads.losses import choice_loss


class RatesHead(Head):
    """One learning rate is chosen for all seeds: that with the lowest `choice_loss` on the validation cases, mean over seeds.

    A head below this one trains and tells what it says; the three ways of choosing are here: one rate needs no choice,
    validation cases choose among heads trained on all cases, and else a held-out share chooses and all cases are trained on.
    After fitting: `learning_rate_`, and `validation_loss_` (S, R) or None.
    """

    learning_rates: tuple[float, ...] | None
    seed: int

    @abstractmethod
    def _check(self) -> tuple[float, ...]:
        """The learning rates where the caller named none. UsageError for wrong settings."""

    @abstractmethod
    def _train(self, X: Array, y: Array, rates: tuple[float, ...]) -> Sequence[Tensor]:
        """Parts (S, R, …) of the heads."""

    @abstractmethod
    def _raw(self, parts: Sequence[Tensor], X: Array) -> Iterable[Tensor]:
        """(N, C) before activation, in the unit of the target: of each seed, and of each rate within it."""

    @abstractmethod
    def _keep(self, parts: Sequence[Tensor]) -> None:
        """Be fitted with these parts (S, …)."""

    def fit(self, X: Any, y: Any, groups: Array | None = None, validation: Validation | None = None) -> Self:
        """As every head."""
        check_task(self)
        usual = self._check()
        rates = tuple(self.learning_rates or usual)
        X = check_vectors(X, np.float32)
        y = check_targets(y, self.task, len(X))
        if self.task == "classification":
            self.classes_ = np.unique(y)
        self.validation_loss_: Array | None = None
        self.learning_rate_ = rates[len(rates) // 2]
        if len(rates) > 1 and validation is None:
            train, held = hold_out(y, self.task, groups, self.seed)
            if len(held) and (self.task != "survival" or y[train, 1].any()):
                self._choose(self._train(X[train], y[train], rates), rates, X[held], y[held])
            rates = (self.learning_rate_,)
        parts = self._train(X, y, rates)
        place = self._choose(parts, rates, *validation) if len(rates) > 1 and validation is not None else 0
        self._keep([part[:, place].contiguous() for part in parts])
        self.n_features_in_ = X.shape[1]
        return self

    def _choose(self, parts: Sequence[Tensor], rates: tuple[float, ...], X: Any, y: Any) -> int:
        """Place of the best rate."""
        classes = self.classes_ if self.task == "classification" else None
        losses = [choice_loss(self.task, one, y, classes) for one in self._raw(parts, check_vectors(X, np.float32))]
        self.validation_loss_ = np.array(losses).reshape(parts[0].shape[:2])
        place = int(self.validation_loss_.mean(axis=0).argmin())
        self.learning_rate_ = rates[place]
        return place
