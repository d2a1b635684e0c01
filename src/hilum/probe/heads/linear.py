"""A linear head with an L2 penalty, solved to its minimum: logistic regression, or ridge for numbers."""

import warnings
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits

from hilum.probe.heads.head import (
    Array,
    Head,
    Task,
    Validation,
    check_targets,
    check_task,
    check_vectors,
    class_numbers,
)

Fold = tuple[Array, Array]

STRENGTHS = tuple(10.0**e for e in range(5, -2, -1))  # λ of the L2 penalty, strong to weak
FIXED_STRENGTH = 100.0  # when the training part is too small to choose
NUM_INNER_FOLDS = 3


class LinearProbe(Head):
    """A linear model on standardised features: logistic regression, or ridge for numbers. S = 1: its minimum is unique.

    task            "classification" (any labels, at least two classes), "multilabel" or "regression"
    num_components  keep so many principal components, capped by rows and columns; None keeps the features
    seed            of the inner folds when no groups are given

    Features are scaled to mean 0 and variance 1, and reduced, by the rows given to `fit`. The penalty λ/2 · ‖w‖²
    (ridge: λ · ‖w‖²) is added to the summed loss; λ is the one of STRENGTHS with the lowest log-loss (regression:
    squared error) on the validation cases, walked from strong to weak until it got worse twice. Without them an inner 3-fold
    cross-validation that keeps groups apart decides. With two groups there are two folds. With one group or none the
    folds are drawn over rows (classes in equal shares); when a class has too few rows for that, or every inner training
    part holds one class only, λ = FIXED_STRENGTH. Each label of a multi-label target is a head of its own, on the rows
    where it is known; a label with one known value is constant.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multilabel", "regression")

    def __init__(self, task: Task = "classification", num_components: int | None = None, seed: int = 0) -> None:
        self.task = task
        self.num_components = num_components
        self.seed = seed

    def fit(self, X: Any, y: Any, groups: Array | None = None, validation: Validation | None = None) -> Self:
        """As every head. One thread: the many small fits would only wait for each other, and sums would depend on the
        number of cores."""
        check_task(self)
        X = check_vectors(X)
        y = check_targets(y, self.task, len(X))
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The number of unique classes is greater than 50%"
            )  # few cases of many organs
            if self.task == "multilabel":
                self.labels_ = [self._fit_label(X, y, groups, validation, label) for label in range(y.shape[1])]
            else:
                self._fit(X, y, groups, validation)
        self.n_features_in_ = X.shape[1]
        return self

    def _fit_label(
        self, X: Array, y: Array, groups: Array | None, validation: Validation | None, label: int
    ) -> "LinearProbe | float":
        """A head for one label, or its only known value."""
        known = ~np.isnan(y[:, label])
        if len(np.unique(y[known, label])) < 2:
            return float(y[known, label].mean()) if known.any() else 0.5
        head = LinearProbe("classification", self.num_components, self.seed)
        inner = None
        if validation is not None:
            seen = ~np.isnan(np.asarray(validation[1], dtype=np.float64)[:, label])
            inner = (np.asarray(validation[0])[seen], np.asarray(validation[1])[seen, label]) if seen.any() else None
        return head.fit(X[known], y[known, label], None if groups is None else np.asarray(groups)[known], inner)

    def _fit(self, X: Array, y: Array, groups: Array | None, validation: Validation | None) -> None:
        self.scaler_ = StandardScaler().fit(X)
        X = self.scaler_.transform(X)
        self.pca_ = None
        if self.num_components is not None:
            self.pca_ = PCA(min(self.num_components, *X.shape), svd_solver="full").fit(X)
            X = self.pca_.transform(X)
        if self.task == "classification":
            self.classes_, y = np.unique(y, return_inverse=True)
        if validation is None:
            folds = [(X[a], y[a], X[b], y[b]) for a, b in _inner_folds(self.task, y, groups, self.seed)]
        else:
            folds = [(X, y, self._reduce(validation[0]), self._numbers(validation[1]))]
        self.strength_ = _choose_strength(self.task, folds)
        self.model_ = _linear_model(self.task, self.strength_).fit(X, y)

    def _numbers(self, y: Any) -> Array:
        return class_numbers(y, self.classes_) if self.task == "classification" else np.asarray(y, dtype=np.float64)

    def _outputs(self, X: Any) -> Array:
        if self.task == "multilabel":
            X = check_vectors(X)
            columns = [
                np.full(len(X), label) if isinstance(label, float) else label.predict_proba(X)[:, 1]
                for label in self.labels_
            ]
            return np.stack(columns, axis=1)[None]
        reduced = self._reduce(X)
        if self.task == "classification":
            proba: Array = self.model_.predict_proba(reduced)
            return proba[None]
        values: Array = self.model_.predict(reduced)
        return values[None, :, None]

    def _reduce(self, X: Any) -> Array:
        check_is_fitted(self, "scaler_")
        scaled: Array = self.scaler_.transform(check_vectors(X))
        return scaled if self.pca_ is None else self.pca_.transform(scaled)


def _linear_model(task: Task, strength: float) -> Any:
    if task == "classification":
        return LogisticRegression(C=1 / strength, max_iter=2000, warm_start=True)
    return Ridge(alpha=strength)


def _choose_strength(task: Task, folds: list[tuple[Array, Array, Array, Array]]) -> float:
    """The strength with the lowest held-out loss, walked from strong to weak with warm starts."""
    models = [_linear_model(task, STRENGTHS[0]) for _ in folds]
    losses: list[float] = []
    for strength in STRENGTHS if folds else ():
        loss = 0.0
        for model, (X, y, X_out, y_out) in zip(models, folds):
            model.set_params(**({"C": 1 / strength} if task == "classification" else {"alpha": strength}))
            model.fit(X, y)
            loss += _held_out_loss(task, model, X_out, y_out)
        losses.append(loss)
        if len(losses) - 1 - int(np.argmin(losses)) >= 2:
            break
    return STRENGTHS[int(np.argmin(losses))] if losses else FIXED_STRENGTH


def _held_out_loss(task: Task, model: Any, X: Array, y: Array) -> float:
    """Summed log-loss or squared error. A class that the model never saw costs the same at every strength: nothing."""
    if task == "regression":
        return float(np.sum((model.predict(X) - y) ** 2))
    column = class_numbers(y, model.classes_)
    proba = model.predict_proba(X)[np.flatnonzero(column >= 0), column[column >= 0]]
    return float(-np.log(np.maximum(proba, 1e-12)).sum())


def _inner_folds(task: Task, y: Array, groups: Array | None, seed: int) -> list[Fold]:
    """Train and test rows of the inner folds; none when the rows are too few. See LinearProbe."""
    rows = np.zeros((len(y), 1))
    num_groups = 0 if groups is None else len(np.unique(groups))
    if num_groups >= 2:
        folds = list(GroupKFold(min(NUM_INNER_FOLDS, num_groups)).split(rows, y, groups))
    elif task == "classification":
        if np.bincount(y).min() < NUM_INNER_FOLDS:
            return []
        folds = list(StratifiedKFold(NUM_INNER_FOLDS, shuffle=True, random_state=seed).split(rows, y))
    elif len(y) < 2 * NUM_INNER_FOLDS:
        return []
    else:
        folds = list(KFold(NUM_INNER_FOLDS, shuffle=True, random_state=seed).split(rows))
    return [(a, b) for a, b in folds if task == "regression" or len(np.unique(y[a])) > 1]
