"""k nearest neighbours: what the geometry of the features says, with nothing fitted."""

from typing import Any, ClassVar, Self

import numpy as np

from hilum.probe.heads.head import Array, Head, Task, Validation, check_targets, check_task, check_vectors


class KNNProbe(Head):
    """Vote of the most similar training rows, by cosine similarity. S = 1.

    task           "classification", "multilabel" or "regression"
    num_neighbors  rows that vote, capped by the training rows
    temperature    weight of a vote = exp(similarity / temperature)

    The weighted k-NN of DINO (Caron et al. 2021, after Wu et al. 2018): features are scaled to unit length, nothing is
    fitted and nothing chosen. Classification gives each class its share of the weights, regression the weighted mean,
    multi-label the share among neighbours whose label is known (the label's mean when none is).
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multilabel", "regression")

    def __init__(self, task: Task = "classification", num_neighbors: int = 20, temperature: float = 0.07) -> None:
        self.task = task
        self.num_neighbors = num_neighbors
        self.temperature = temperature

    def fit(self, X: Any, y: Any, groups: Array | None = None, validation: Validation | None = None) -> Self:
        """Keep (N, D) features and targets; `groups` and `validation` play no part. Same errors as every head."""
        check_task(self)
        X = check_vectors(X)
        y = check_targets(y, self.task, len(X))
        if self.task == "classification":
            self.classes_, codes = np.unique(y, return_inverse=True)
            self.votes_ = np.eye(len(self.classes_))[codes]
        else:
            self.votes_ = y.reshape(len(y), -1)
        self.rows_ = _unit_length(X)
        self.n_features_in_ = X.shape[1]
        return self

    def _outputs(self, X: Any) -> Array:
        X = _unit_length(check_vectors(X))
        k = min(self.num_neighbors, len(self.rows_))
        known = ~np.isnan(self.votes_)
        votes, seen = np.where(known, self.votes_, 0), known.astype(np.float64)
        usual = votes.sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
        parts = []
        for start in range(0, len(X), 1024):  # bounds the memory of the similarity matrix
            similarity = X[start : start + 1024] @ self.rows_.T
            near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
            close = np.take_along_axis(similarity, near, axis=1)
            weights = np.exp((close - close.max(axis=1, keepdims=True)) / self.temperature)
            weights /= weights.sum(axis=1, keepdims=True)
            total = np.einsum("nk,nkc->nc", weights, votes[near])
            share = np.einsum("nk,nkc->nc", weights, seen[near])
            parts.append(np.where(share > 0, total / np.where(share > 0, share, 1), usual))
        return np.concatenate(parts)[None]


def _unit_length(X: Array) -> Array:
    unit: Array = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    return unit
