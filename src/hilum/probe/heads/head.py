"""What every head is, whatever it does inside: the tasks, the interface, and the checks that heads share.

    task            y in `fit`                                 outputs (S, N, O)
    classification  (N,) classes, at least two                 probability of each of `classes_`
    multilabel      (N, L) of 0, 1, NaN for unknown            probability of each label
    regression      (N,) numbers                               (value,)
    survival        (N, 2) time ≥ 0, 1 for an event else 0     (risk,): higher dies sooner
    localisation, segmentation: `hilum.probe.heads.dense`

S head seeds (1 for a head that draws nothing), N cases.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.utils.validation import check_array, check_is_fitted

from hilum.errors import UsageError
from hilum.terminal import Progress

Task = Literal["classification", "multilabel", "regression", "survival", "localisation", "segmentation"]
Array = NDArray[Any]
Validation = tuple[Any, Any]

HELD_OUT_FOLDS = 5  # one of so many is held out for a choice when no validation cases are given


class Head(BaseEstimator, ABC):  # type: ignore[misc]
    """A head on frozen features, in the manners of scikit-learn: `sklearn.base.clone` copies it unfitted.

    A head is a final class below this one with keyword settings, `fit` and `_outputs`; all else is here.

    tasks     what it can do
    sees      "vectors": X is (N, D) numbers; "tokens": a sequence of the tokens of N scans
    progress  told of the steps of a long `fit`, where somebody set it; no setting
    classes_  after fitting, in classification: the classes of `fit`, sorted; outputs have one column for each
    """

    tasks: ClassVar[tuple[Task, ...]]
    sees: ClassVar[Literal["vectors", "tokens"]] = "vectors"
    task: Task
    classes_: Array
    progress: Progress | None = None

    @abstractmethod
    def fit(self, X: Any, y: Any, groups: Array | None = None, validation: Validation | None = None) -> Self:
        """Fit, and return itself.

        groups      (N,) patients: where a choice needs cases that were not trained on, a patient is on one side only
        validation  (X, y) that alone decide every choice and are never trained on; None: a seeded share of the groups is
                    held out for it, and the choice is fitted on all

        ValueError for what cannot be fitted (NaN features, one class only, no event); UsageError for wrong settings.
        """

    @abstractmethod
    def _outputs(self, X: Any) -> Array:
        """(S, N, O), in the precision that the head computes in."""

    def outputs(self, X: Any) -> NDArray[np.float32]:
        """(S, N, O): what each of S head seeds says of N cases, as the table above."""
        check_is_fitted(self)
        return np.asarray(self._outputs(X), dtype=np.float32)

    def predict_proba(self, X: Any) -> Array:
        """(N, classes) in the order of `classes_`, rows sum to 1, or (N, labels): mean over seeds. UsageError for others."""
        if self.task not in ("classification", "multilabel"):
            raise UsageError(f"a {self.task} head predicts numbers and has no class probabilities; use predict")
        return self._mean(X)

    def predict(self, X: Any) -> Array:
        """From the mean over seeds: (N,) classes, numbers or risks; (N, labels) of 0 and 1; else (N, O)."""
        mean = self._mean(X)
        if self.task == "classification":
            chosen: Array = self.classes_[mean.argmax(axis=1)]
            return chosen
        if self.task == "multilabel":
            return (mean >= 0.5).astype(np.int64)
        return mean[:, 0] if mean.shape[1] == 1 else mean

    def _mean(self, X: Any) -> Array:
        check_is_fitted(self)
        mean: Array = np.asarray(self._outputs(X)).mean(axis=0, dtype=np.float64)
        return mean


def check_task(head: Head) -> None:
    """UsageError for a task that the head cannot do."""
    if head.task not in head.tasks:
        raise UsageError(f"unknown task '{head.task}'; known: {', '.join(head.tasks)}")


def check_vectors(X: Any, dtype: Any = np.float64) -> Array:
    """(N, D) finite numbers. ValueError else."""
    checked: Array = check_array(X, dtype=dtype)
    return checked


def check_targets(y: Any, task: Task, num_cases: int) -> Array:
    """y in the form of the table above. ValueError says what is wrong with it."""
    found: Array = np.asarray(y)
    columns = {"multilabel": "(N, labels)", "survival": "(N, 2) time and event"}.get(task, "(N,)")
    if (
        len(found) != num_cases
        or found.ndim != (1 if columns == "(N,)" else 2)
        or (task == "survival" and found.shape[1] != 2)
    ):
        raise ValueError(f"{task} expects y of {columns} for {num_cases} cases; found {found.shape}")
    if task == "classification":
        if len(np.unique(found)) < 2:
            raise ValueError("classification needs at least two classes; found one")
        return found
    found = found.astype(np.float64)
    if task == "multilabel":
        known = ~np.isnan(found)
        if not known.any() or not np.isin(found[known], (0, 1)).all():
            raise ValueError("multilabel expects 0, 1 or NaN (unknown), and at least one known label")
        return found
    if not np.isfinite(found).all():
        raise ValueError(f"{task} expects finite targets; found {np.count_nonzero(~np.isfinite(found))} that are not")
    if task == "survival":
        check_survival(found)
    return found


def check_survival(y: Array) -> None:
    """ValueError for negative times, events other than 0 and 1, and when nobody had one."""
    if (y[:, 0] < 0).any():
        raise ValueError(f"survival times are durations from a common start; {int((y[:, 0] < 0).sum())} are negative")
    if not np.isin(y[:, 1], (0, 1)).all():
        raise ValueError("events are 1 (happened at that time) or 0 (censored then); found others")
    if not y[:, 1].any():
        raise ValueError(f"none of {len(y)} cases had an event; all are censored, so no risk can be learnt")


def class_numbers(y: Any, classes: Array) -> NDArray[np.int64]:
    """(N,) places in the sorted `classes`; -1 for a class that is not among them."""
    y = np.asarray(y)
    place = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    return np.where(classes[place] == y, place, -1).astype(np.int64)


def hold_out(y: Array, task: Task, groups: Array | None, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to train on and rows to choose by: about a fifth of the groups, classes (events) in about equal shares.

    Groups that hold the last cases of a class stay in training. The second part is empty when there is too little to hold out.
    """
    strata = np.zeros(len(y), dtype=np.int64)
    if task == "classification":
        strata = np.unique(y, return_inverse=True)[1]
    elif task == "survival":
        strata = y[:, 1].astype(np.int64)
    owners = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    num_folds = min(HELD_OUT_FOLDS, int(owners.max()) + 1, int(np.bincount(strata).max()))
    if num_folds < 2:
        return np.arange(len(y)), np.arange(0)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    held = np.zeros(len(y), dtype=bool)
    order = np.random.default_rng(seed).permutation(int(owners.max()) + 1)[owners]  # a seed draws other groups
    held[next(iter(_quiet_split(splitter, strata, order)))[1]] = True
    lost = np.setdiff1d(strata[held], strata[~held])
    held &= ~np.isin(owners, owners[np.isin(strata, lost)])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _quiet_split(splitter: StratifiedGroupKFold, strata: Array, owners: Array) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # which `hold_out` makes good itself
        yield from splitter.split(strata[:, None], strata, owners)


def column_moments(X: Array, tolerance: float = 1e-6) -> tuple[Array, Array]:
    """Mean and standard deviation (D,) of the columns, float64; ∞ for a constant one, so that divided by it it counts nothing.

    tolerance  a deviation below this share of the mean is rounding: of float32 1e-6, of float64 1e-9
    """
    mean, sd = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
    return mean, np.where(sd > tolerance * np.abs(mean) + 1e-12, sd, np.inf)
