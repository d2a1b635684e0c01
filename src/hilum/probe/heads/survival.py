"""Cox proportional hazards on frozen features: partial likelihood, ties, censoring, a ridge penalty chosen on validation cases.

The hazard of a case is λ₀(t) · exp(β · x). With the events at each distinct time t in D_t (d_t of them) and the cases
still at risk in R_t (time ≥ t), the log partial likelihood is

    Breslow   Σ_t [Σ_{i ∈ D_t} β·x_i - d_t log Σ_{j ∈ R_t} exp(β·x_j)]
    Efron     Σ_t [Σ_{i ∈ D_t} β·x_i - Σ_{l < d_t} log(Σ_{j ∈ R_t} exp(β·x_j) - (l / d_t) Σ_{i ∈ D_t} exp(β·x_i))]

(Cox 1972; Breslow 1974; Efron 1977.) They are one and the same without ties.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from threadpoolctl import threadpool_limits

from hilum.errors import UsageError
from hilum.metrics import c_index
from hilum.probe.heads.head import (
    Array,
    Head,
    Task,
    Validation,
    check_targets,
    check_task,
    check_vectors,
    column_moments,
    hold_out,
)

PENALTIES = tuple(10.0**e for e in range(4, -4, -1))  # strong to weak
FIXED_PENALTY = 1.0  # per event, when there is nothing to choose by
MAX_STEPS = 100
MAX_HALVINGS = 30
MAX_RANGE = 500.0  # of log hazards: beyond it exp() leaves nothing of the smaller
CONVERGED = 1e-9  # change of the objective, relative


class RiskSets(NamedTuple):
    """Times and events of N cases, latest first, ready for sums over everyone still at risk.

    order  (N,) places of the cases
    term   (E,) of each event: which of T distinct event times
    last   (T,) place, in that order, of the last case still at risk at each of these times
    share  (E,) l / d_t of each event (0 with Breslow)
    """

    order: Array
    event: Array
    term: Array
    last: Array
    share: Array


def risk_sets(y: Array, ties: str) -> RiskSets:
    order = np.argsort(-y[:, 0], kind="stable")
    time, event = y[order, 0], np.flatnonzero(y[order, 1])
    times, term = np.unique(-time[event], return_inverse=True)
    last = np.searchsorted(-time, times, side="right") - 1
    number = np.arange(len(term)) - np.searchsorted(term, term)  # events are sorted by time, so by term
    share = number / np.bincount(term)[term] if ties == "efron" else np.zeros(len(term))
    return RiskSets(order, event, term, last, share)


def partial_likelihood(X: Array, y: Array, beta: Array, ties: str = "efron") -> float:
    """Log partial likelihood of coefficients `beta` (D,) for features (N, D) and (time, event) (N, 2)."""
    sets = risk_sets(y, ties)
    return _derivatives(X[sets.order], sets, beta, first_only=True)[0]


def _derivatives(X: Array, sets: RiskSets, beta: Array, *, first_only: bool = False) -> tuple[float, Array, Array]:
    """Log partial likelihood, its gradient (D,) and its negative Hessian (D, D); X in the order of the sets.

    A denominator is Σ_j c_j exp(η_j) with c = 1 for those at risk and 1 - l/d_t for the tied events; the negative Hessian is
    the sum over denominators of the covariance of x under these weights: Σ_j a_j x_j x_jᵀ - Σ_terms m mᵀ.
    """
    eta = X @ beta
    top = eta.max()
    if first_only and top - eta.min() > MAX_RANGE:
        return -np.inf, beta, np.zeros((0, 0))
    weight = np.exp(eta - top)
    at_risk = np.cumsum(weight)[sets.last][sets.term]
    tied = np.bincount(sets.term, weight[sets.event], len(sets.last))[sets.term]
    total = at_risk - sets.share * tied
    value = float(np.sum(eta[sets.event] - top - np.log(total)))
    # How much each case counts, summed over all denominators that it is part of.
    opened = np.bincount(sets.last[sets.term], 1 / total, len(X))
    expected = weight * np.cumsum(opened[::-1])[::-1]
    expected[sets.event] -= weight[sets.event] * np.bincount(sets.term, sets.share / total, len(sets.last))[sets.term]
    gradient = X[sets.event].sum(axis=0) - expected @ X
    if first_only:
        return value, gradient, np.zeros((0, 0))
    weighted = weight[:, None] * X
    sums = np.cumsum(weighted, axis=0)[sets.last][sets.term]
    tied_sums = np.zeros((len(sets.last), X.shape[1]))
    np.add.at(tied_sums, sets.term, weighted[sets.event])
    means = (sums - sets.share[:, None] * tied_sums[sets.term]) / total[:, None]
    information = (expected[:, None] * X).T @ X - means.T @ means
    return value, gradient, information


def fit_cox(X: Array, y: Array, penalty: float, ties: str = "efron", start: Array | None = None) -> Array:
    """Coefficients (D,) that maximise log partial likelihood - penalty / 2 · ‖β‖², by Newton's method with step halving.

    ValueError when nothing converges: with penalty 0 and features that order the events completely, β grows without end.
    """
    sets = risk_sets(y, ties)
    X = X[sets.order]
    beta = np.zeros(X.shape[1]) if start is None else start
    identity = np.eye(X.shape[1])

    def objective(at: Array, first_only: bool = True) -> tuple[float, Array, Array]:
        value, gradient, information = _derivatives(X, sets, at, first_only=first_only)
        return value - penalty / 2 * float(at @ at), gradient - penalty * at, information

    for _ in range(MAX_STEPS):
        value, gradient, information = objective(beta, False)
        step = np.linalg.lstsq(information + penalty * identity, gradient, rcond=None)[0]
        found, gain = _halve_until_better(lambda at: objective(at)[0], beta, step, value)
        beta = found
        if gain <= CONVERGED * (abs(value) + 1):
            if penalty == 0 and np.ptp(X @ beta) > MAX_RANGE / 5:
                break
            return beta
    raise ValueError(
        f"the Cox model did not converge in {MAX_STEPS} steps with a penalty of {penalty}: features that order the events "
        "completely need a penalty above 0"
    )


def _halve_until_better(
    objective: Callable[[Array], float], beta: Array, step: Array, value: float
) -> tuple[Array, float]:
    """The longest of step, step / 2, step / 4, … that does not lower the objective, and its gain; no step when none does."""
    for _ in range(MAX_HALVINGS):
        new = objective(beta + step)
        if np.isfinite(new) and new >= value:
            return beta + step, new - value
        step = step / 2
    return beta, 0.0


class CoxHead(Head):
    """Cox proportional hazards with a ridge penalty on standardised features. S = 1: its maximum is unique.

    ties       "efron" or "breslow"
    penalties  to choose from, per event: penalty · events / 2 · ‖β‖² is taken from the log partial likelihood
    seed       of the cases held out when no validation cases are given

    The penalty is the one with the highest C-index on the validation cases, the stronger of equals; walked from strong to weak
    with warm starts. When nothing can be held out, or no pair of the held-out cases can be ordered, it is FIXED_PENALTY.
    With more features than cases the problem is solved in the space that the cases span, where its solution lies.
    After fitting: `weights_` (1, D, 1) for raw features, `penalty_`, `validation_c_` of each penalty or None.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("survival",)

    def __init__(
        self, task: Task = "survival", ties: str = "efron", penalties: tuple[float, ...] = PENALTIES, seed: int = 0
    ) -> None:
        self.task = task
        self.ties = ties
        self.penalties = penalties
        self.seed = seed

    def fit(self, X: Any, y: Any, groups: Array | None = None, validation: Validation | None = None) -> Self:
        """As every head. One thread, as `LinearProbe.fit`."""
        check_task(self)
        if self.ties not in ("efron", "breslow") or min(self.penalties, default=-1) < 0:
            raise UsageError(f"ties '{self.ties}', penalties {self.penalties}: expected efron or breslow, and ≥ 0")
        X = check_vectors(X)
        y = check_targets(y, "survival", len(X))
        self.penalty_ = FIXED_PENALTY
        self.validation_c_: Array | None = None
        with threadpool_limits(1):
            if len(self.penalties) == 1:
                self.penalty_ = self.penalties[0]
            elif validation is not None:
                y_val = np.asarray(validation[1], dtype=np.float64)
                self._choose(X, y, check_vectors(validation[0]), y_val)
            else:
                train, held = hold_out(y, "survival", groups, self.seed)
                if len(held) and y[train, 1].any():
                    self._choose(X[train], y[train], X[held], y[held])
            self.weights_ = self._path(X, y, [p for p in self.penalties if p >= self.penalty_] or [self.penalty_])[-1][
                None
            ]
        self.n_features_in_ = X.shape[1]
        return self

    def _choose(self, X: Array, y: Array, X_val: Array, y_val: Array) -> None:
        path = self._path(X, y, self.penalties)
        try:
            found = np.array([c_index(y_val, X_val @ weights[:, 0]) for weights in path])
        except ValueError:  # no pair can be ordered
            return
        self.validation_c_ = found
        if len(found):
            strong_first = np.argsort([-p for p in self.penalties[: len(path)]], kind="stable")
            self.penalty_ = self.penalties[strong_first[int(found[strong_first].argmax())]]

    def _path(self, X: Array, y: Array, penalties: Any) -> list[Array]:
        """Weights (D, 1) for raw features at each penalty, up to the first that does not converge."""
        mean, sd = column_moments(X, 1e-9)
        scaled = (X - mean) / sd
        basis = None
        if X.shape[1] > len(X):
            basis = np.linalg.svd(scaled, full_matrices=False)[2]  # (N, D): β = basisᵀ γ has the norm of γ
            scaled = scaled @ basis.T
        beta: Array | None = None
        found: list[Array] = []
        for penalty in penalties:
            try:
                beta = fit_cox(scaled, y, penalty * y[:, 1].sum(), self.ties, beta)
            except ValueError:
                if not found:
                    raise
                break
            found.append(((beta if basis is None else basis.T @ beta) / sd)[:, None])
        return found

    def _outputs(self, X: Any) -> Array:
        risk: Array = check_vectors(X) @ self.weights_
        return risk
