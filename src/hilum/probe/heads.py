"""Light heads on frozen features, in the manners of scikit-learn.

A head is a final class: `fit(X, y, groups=None)`, `predict(X)`, for classification `predict_proba(X)` and `classes_`;
`sklearn.base.clone` copies it unfitted. A new head is one class here and one line in `HEADS`; the suite in
`tests/contract/test_heads.py` runs over all of them.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y
from threadpoolctl import threadpool_limits

from hilum.errors import UsageError

Task = Literal["classification", "regression"]
Array = NDArray[Any]
Fold = tuple[NDArray[np.intp], NDArray[np.intp]]

STRENGTHS = tuple(10.0**e for e in range(5, -2, -1))  # λ of the L2 penalty, strong to weak
FIXED_STRENGTH = 100.0  # when the training part is too small to choose
NUM_INNER_FOLDS = 3


class LinearProbe(BaseEstimator):  # type: ignore[misc]
    """A linear model on standardised features: logistic regression, or ridge for numbers.

    task            "classification" (any labels, at least two classes) or "regression"
    num_components  keep so many principal components, capped by rows and columns; None keeps the features
    seed            of the inner folds when no groups are given

    Features are scaled to mean 0 and variance 1, and reduced, by the rows given to `fit`. The penalty λ/2 · ‖w‖²
    (ridge: λ · ‖w‖²) is added to the summed loss; λ is the one of STRENGTHS with the lowest log-loss (regression:
    squared error) in an inner 3-fold cross-validation that keeps groups apart, walked from strong to weak until it got
    worse twice. With two groups there are two folds. With one group or none the folds are drawn over rows (classes in
    equal shares); when a class has too few rows for that, or every inner training part holds one class only,
    λ = FIXED_STRENGTH.
    """

    def __init__(self, task: Task = "classification", num_components: int | None = None, seed: int = 0) -> None:
        self.task = task
        self.num_components = num_components
        self.seed = seed

    def fit(self, X: Array, y: Array, groups: Array | None = None) -> "LinearProbe":
        """Fit on (N, D) features and (N,) targets; `groups` (N,) are patients that inner folds keep apart.

        ValueError when features are not finite or classification meets one class only. One thread: the many small
        fits would only wait for each other, and sums would depend on the number of cores.
        """
        X, y = _check_training(X, y, self.task)
        with threadpool_limits(1):
            self._fit(X, y, groups)
        return self

    def _fit(self, X: Array, y: Array, groups: Array | None) -> None:
        self.scaler_ = StandardScaler().fit(X)
        X = self.scaler_.transform(X)
        self.pca_ = None
        if self.num_components is not None:
            self.pca_ = PCA(min(self.num_components, *X.shape), svd_solver="full").fit(X)
            X = self.pca_.transform(X)
        if self.task == "classification":
            self.classes_, y = np.unique(y, return_inverse=True)
        self.strength_ = _choose_strength(self.task, X, y, _inner_folds(self.task, y, groups, self.seed))
        self.model_ = _linear_model(self.task, self.strength_).fit(X, y)
        self.n_features_in_ = self.scaler_.n_features_in_

    def predict(self, X: Array) -> Array:
        """(N,) classes or numbers."""
        reduced = self._transform(X)
        predicted: Array = self.model_.predict(reduced)
        return self.classes_[predicted] if self.task == "classification" else predicted

    def predict_proba(self, X: Array) -> Array:
        """(N, classes) in the order of `classes_`; rows sum to 1. UsageError for regression."""
        _check_classifier(self.task)
        reduced = self._transform(X)
        proba: Array = self.model_.predict_proba(reduced)
        return proba

    def _transform(self, X: Array) -> Array:
        check_is_fitted(self)
        scaled: Array = self.scaler_.transform(check_array(X, dtype=np.float64))
        return scaled if self.pca_ is None else self.pca_.transform(scaled)


class KNNProbe(BaseEstimator):  # type: ignore[misc]
    """Vote of the most similar training rows, by cosine similarity.

    task           "classification" or "regression"
    num_neighbors  rows that vote, capped by the training rows
    temperature    weight of a vote = exp(similarity / temperature)

    The weighted k-NN of DINO (Caron et al. 2021, after Wu et al. 2018): features are scaled to unit length, nothing is
    fitted. Classification gives each class its share of the weights, regression the weighted mean.
    """

    def __init__(self, task: Task = "classification", num_neighbors: int = 20, temperature: float = 0.07) -> None:
        self.task = task
        self.num_neighbors = num_neighbors
        self.temperature = temperature

    def fit(self, X: Array, y: Array, groups: Array | None = None) -> "KNNProbe":
        """Keep (N, D) features and (N,) targets; `groups` plays no part. Same errors as LinearProbe."""
        X, y = _check_training(X, y, self.task)
        if self.task == "classification":
            self.classes_, codes = np.unique(y, return_inverse=True)
            self.votes_ = np.eye(len(self.classes_))[codes]
        else:
            self.votes_ = y[:, None]
        self.rows_ = _unit_length(X)
        self.n_features_in_ = X.shape[1]
        return self

    def predict(self, X: Array) -> Array:
        """(N,) classes or numbers."""
        mean = self._mean_vote(X)
        return self.classes_[mean.argmax(axis=1)] if self.task == "classification" else mean[:, 0]

    def predict_proba(self, X: Array) -> Array:
        """(N, classes) in the order of `classes_`; rows sum to 1. UsageError for regression."""
        _check_classifier(self.task)
        return self._mean_vote(X)

    def _mean_vote(self, X: Array) -> Array:
        check_is_fitted(self)
        X = _unit_length(check_array(X, dtype=np.float64))
        k = min(self.num_neighbors, len(self.rows_))
        parts = []
        for start in range(0, len(X), 1024):  # bounds the memory of the similarity matrix
            similarity = X[start : start + 1024] @ self.rows_.T
            near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
            close = np.take_along_axis(similarity, near, axis=1)
            weights = np.exp((close - close.max(axis=1, keepdims=True)) / self.temperature)
            weights /= weights.sum(axis=1, keepdims=True)
            parts.append(np.einsum("nk,nkc->nc", weights, self.votes_[near]))
        return np.concatenate(parts)


HEADS: dict[str, type[LinearProbe] | type[KNNProbe]] = {"linear": LinearProbe, "knn": KNNProbe}


def make_head(name: str, *, seed: int = 0, **options: Any) -> LinearProbe | KNNProbe:
    """An unfitted head by name.

    seed     goes to heads that draw
    options  of the head; None keeps its default

    UsageError for an unknown name or option, listing the known ones.
    """
    if name not in HEADS:
        raise UsageError(f"unknown head '{name}'; known: {', '.join(HEADS)}")
    known = HEADS[name]().get_params()
    given = {option: value for option, value in options.items() if value is not None}
    unknown = [option for option in given if option not in known]
    if unknown:
        raise UsageError(f"head '{name}' has no option {', '.join(unknown)}; known: {', '.join(known)}")
    if "seed" in known:
        given["seed"] = seed
    return HEADS[name](**given)


def _linear_model(task: Task, strength: float) -> Any:
    if task == "classification":
        return LogisticRegression(C=1 / strength, max_iter=2000, warm_start=True)
    return Ridge(alpha=strength)


def _choose_strength(task: Task, X: Array, y: Array, folds: list[Fold]) -> float:
    """The strength with the lowest held-out loss, walked from strong to weak with warm starts."""
    models = [_linear_model(task, STRENGTHS[0]) for _ in folds]
    losses: list[float] = []
    for strength in STRENGTHS if folds else ():
        loss = 0.0
        for model, (train, test) in zip(models, folds):
            model.set_params(**({"C": 1 / strength} if task == "classification" else {"alpha": strength}))
            model.fit(X[train], y[train])
            loss += _held_out_loss(task, model, X[test], y[test])
        losses.append(loss)
        if len(losses) - 1 - int(np.argmin(losses)) >= 2:
            break
    return STRENGTHS[int(np.argmin(losses))] if losses else FIXED_STRENGTH


def _held_out_loss(task: Task, model: Any, X: Array, y: Array) -> float:
    """Summed log-loss or squared error. A class that the model never saw costs the same at every strength."""
    if task == "regression":
        return float(np.sum((model.predict(X) - y) ** 2))
    proba = np.zeros((len(X), max(int(model.classes_.max()), int(y.max())) + 1))
    proba[:, model.classes_] = model.predict_proba(X)
    return float(-np.log(np.maximum(proba[np.arange(len(y)), y], 1e-12)).sum())


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


def _check_training(X: Array, y: Array, task: Task) -> tuple[Array, Array]:
    if task not in ("classification", "regression"):
        raise UsageError(f"unknown task '{task}'; known: classification, regression")
    X, y = check_X_y(X, y, dtype=np.float64, y_numeric=task == "regression")
    if task == "classification" and len(np.unique(y)) < 2:
        raise ValueError("classification needs at least two classes; found one")
    return X, y


def _check_classifier(task: Task) -> None:
    if task != "classification":
        raise UsageError("a regression head predicts numbers and has no class probabilities; use predict")


def _unit_length(X: Array) -> Array:
    unit: Array = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    return unit
