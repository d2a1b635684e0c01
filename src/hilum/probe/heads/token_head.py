"""What heads on tokens share: targets, lanes, the choice on held-out cases, outputs."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.errors import ContractError, UsageError
from hilum.probe.heads.head import Array, Head, Task, Validation, check_targets, check_task, hold_out
from hilum.probe.heads.lanes import Data, LaneSettings, Network, fit_lanes, run_lanes
from hilum.probe.heads.task_loss import TaskLoss, finish
from hilum.probe.heads.tokens import TokenBatch, TokenSequence, plan_batches


class TokenHead(Head):
    """A head whose X is a `TokenSequence` and whose answer is a short vector: (O,) a case.

    task           classification, multilabel, regression or survival
    seed, seeds    networks seed … seed + seeds - 1 are fitted for every learning rate
    learning_rates one is chosen, by the mean over seeds on validation, and an epoch with it
    epochs, batch_size, optimiser, weight_decay, schedule, clip  see `LaneSettings`
    max_floats     numbers held at once for the tokens of a piece and what lanes make of them; a batch is cut into pieces and
                   lanes into groups until it holds (4 bytes each). One case with one lane is the least
    device         where it is computed

    Weights after `fit`: `weights_`, each (seeds, …); `learning_rate_`, `epoch_` and `scores_` (epochs, rates, seeds) say how
    they were chosen. Without `validation` the choice is made on held-out groups, then fitted on all cases.
    """

    sees: ClassVar[Literal["vectors", "tokens"]] = "tokens"
    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multilabel", "regression", "survival")
    seed: int
    seeds: int
    learning_rates: tuple[float, ...]
    epochs: int
    batch_size: int
    optimiser: Literal["adamw", "sgd"]
    weight_decay: float
    schedule: Literal["constant", "cosine"]
    clip: float | None
    max_floats: int
    device: str

    pooled_: bool = False
    whole_batches_: bool = False

    @abstractmethod
    def _network(self, width: int, num_outputs: int) -> Network: ...

    @abstractmethod
    def _floats(self, width: int) -> int:
        """Numbers that one lane makes of one token."""

    def _prepare(self, X: TokenSequence) -> None:
        """Check and decide what depends on the training cases."""

    def _targets(self, y: Any, num_cases: int) -> Array:
        return check_targets(y, self.task, num_cases)

    def _objective(self, y: Array, classes: Array | None, centre: float, spread: float) -> Any:
        return TaskLoss(self.task, y, classes, centre, spread)

    def fit(self, X: TokenSequence, y: Any, groups: Array | None = None, validation: Validation | None = None) -> Self:
        check_task(self)
        y = self._targets(y, len(X))
        width = X.width
        self._prepare(X)
        settings = self._settings(X, width)
        num_outputs = y.shape[1] if y.ndim == 2 and self.task != "survival" else 1
        if self.task == "classification":
            self.classes_ = np.unique(y)
            num_outputs = len(self.classes_)
        network = self._network(width, num_outputs)
        train, refit = np.arange(len(X)), False
        X_val, y_val = (None, None) if validation is None else validation
        if validation is None:
            train, held = hold_out(y, self.task, groups, self.seed)
            if len(held):
                X_val, y_val, refit = X[held], y[held], True
        fitted = self._fit_lanes(network, X[train], y[train], X_val, y_val, settings)
        self.learning_rate_, self.epoch_, self.scores_ = fitted.learning_rate, fitted.epoch, fitted.scores
        if refit:
            chosen = dataclasses.replace(settings, learning_rates=(fitted.learning_rate,))
            fitted = self._fit_lanes(network, X, y, None, None, chosen, stop=fitted.epoch)
        self._take(fitted.weights, width, num_outputs, getattr(self, "classes_", None))
        return self

    def _fit_lanes(
        self,
        network: Network,
        X: TokenSequence,
        y: Array,
        X_val: TokenSequence | None,
        y_val: Any,
        settings: LaneSettings,
        stop: int | None = None,
    ) -> Any:
        centre, spread = 0.0, 1.0
        if self.task == "regression":
            centre, spread = float(y.mean()), float(y.std()) or 1.0
        classes = getattr(self, "classes_", None)
        own = self._objective(y, classes, centre, spread)
        judge = own if X_val is None else self._objective(np.asarray(y_val), classes, centre, spread)
        fitted = fit_lanes(
            network,
            self._data(X, settings.lanes_at_once),
            None if X_val is None else self._data(X_val, settings.lanes_at_once),
            settings,
            loss=own.loss,
            score=judge.score,
            couples_cases=self.task == "survival",
            stop=stop,
            device=self.device,
            progress=self.progress,
        )
        if self.task == "regression":  # the last layer speaks in the unit of y
            fitted.weights["classifier.weight"] *= spread
            fitted.weights["classifier.bias"] *= spread
            fitted.weights["classifier.bias"] += centre
        return fitted

    def _take(self, weights: dict[str, Tensor], width: int, num_outputs: int, classes: Array | None) -> None:
        """Be fitted with these weights, each (seeds, …)."""
        self.weights_, self.n_features_in_, self.num_outputs_ = weights, width, num_outputs
        if self.task == "classification":
            self.classes_ = np.arange(num_outputs) if classes is None else np.asarray(classes)

    def _settings(self, X: TokenSequence, width: int) -> LaneSettings:
        return LaneSettings(
            seeds=tuple(range(self.seed, self.seed + self.seeds)),
            learning_rates=tuple(self.learning_rates),
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimiser=self.optimiser,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            clip=self.clip,
            lanes_at_once=self._lanes_at_once(X, width),
        )

    def _lanes_at_once(self, X: TokenSequence, width: int) -> int:
        longest = int(self._lengths(X).max())
        room = (self.max_floats / longest - width) / self._floats(width)
        return int(np.clip(room, 1, self.seeds * len(self.learning_rates)))

    def _lengths(self, X: TokenSequence) -> NDArray[np.int64]:
        return np.minimum(X.lengths, X.num_planes) if self.pooled_ else X.lengths

    def _data(self, X: TokenSequence, lanes: int) -> Data:
        lengths = self._lengths(X)
        most = int(self.max_floats / (X.width + lanes * self._floats(X.width)))
        if self.whole_batches_:
            most = int(lengths.max()) * len(X)

        def plan(order: Sequence[int], batch_size: int) -> list[list[list[int]]]:
            return plan_batches(lengths, order, batch_size, most)

        def read(pieces: Sequence[Sequence[int]]) -> Iterator[TokenBatch]:
            # A loop variable here would hold each batch while the next is awaited: three in memory instead of two.
            yield from map(lambda batch: batch.to(self.device), X.batches(pieces, per_plane=self.pooled_))  # noqa: C417

        return Data(num=len(X), plan=plan, read=read)

    def _outputs(self, X: Any) -> Array:
        if not isinstance(X, TokenSequence):
            raise UsageError(f"this head takes the tokens of cases (TokenSequence); found {type(X).__name__}")
        if X.width != self.n_features_in_:
            raise ContractError(
                f"the head was fitted on tokens of width {self.n_features_in_}; found {X.width}. Was it another model?"
            )
        network = self._network(self.n_features_in_, self.num_outputs_)
        parts = run_lanes(network, self.weights_, self._data(X, self.seeds), self.batch_size)
        return finish(self.task, torch.cat([out for out, _ in parts], 1))
