"""Least-squares concept erasure (LEACE; Belrose et al. 2023, arXiv 2306.03819, theorem 4.3): features from which no linear
probe can tell a nuisance, such as the scanner, changed as little as possible.

    r(x) = x − W⁺ P W (x − μ),   W = (Σ_xx^½)⁺,   P the orthogonal projection onto the column space of W Σ_xz

After it the cross-covariance with z is zero on the rows it was fitted on, so that no linear predictor of z, by whatever convex
loss, beats a constant there (theorem 3.1). Of all affine maps that do so it moves x least, in every norm x^T M x.

Fewer rows than dimensions: Σ_xx is shrunk towards a multiple of the identity, S = (1 − λ) Σ_xx + λ (tr Σ_xx / D) I. The
cross-covariance is zero all the same, whatever λ: W⁻¹ P W Σ_xz = Σ_xz for every invertible W. λ = 0 is LEACE itself (directions
of eigenvalues below 1e-10 of the largest are left alone), λ = 1 the orthogonal projection off the columns of Σ_xz (SAL).

Only linear traces go. A head that is not linear may still find the nuisance, and so may a nearest neighbour. Where a label
depends on the nuisance, what they share is erased from the label, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from hilum.errors import LabelsError, UsageError

Floats = NDArray[np.float64]
Value = str | float | None

EIGENVALUE_CUT = 1e-10  # of the largest
CORRELATION_CUT = 1e-9  # a nuisance that correlates less with every direction of x has left no trace
MIN_PATIENTS = 5  # of a category of its own
MISSING, OTHER = "missing", "other"


class ConceptEraser(BaseEstimator):  # type: ignore[misc]
    """Erases linear traces of Z from X, in scikit-learn's manners.

    shrinkage  λ in [0, 1], or "auto": Ledoit and Wolf (2004), one patient counting as one observation

    After `fit`: `mean_` (D,), `projection_` (D, D), the oblique W⁺ P W, `rank_` its rank, `shrinkage_`, `num_rows_`,
    `num_patients_`.
    """

    def __init__(self, shrinkage: float | Literal["auto"] = "auto") -> None:
        self.shrinkage = shrinkage

    def fit(self, X: Any, Z: Any, groups: Any = None) -> "ConceptEraser":
        """X (N, D), Z (N, K) numbers, one-hot for categories (`NuisanceCoder`); neither needs to be centred.

        groups  (N,) patients: each counts as much as any other, however many rows it has; None: each row does

        LabelsError when there are too few patients for what is to be erased.
        """
        x, z = np.asarray(X, np.float64), np.asarray(Z, np.float64)
        z = z[:, None] if z.ndim == 1 else z
        if x.ndim != 2 or len(x) != len(z) or not (np.isfinite(x).all() and np.isfinite(z).all()):
            raise LabelsError(f"expected finite X (N, D) and Z (N, K) of equal N; found {x.shape} and {z.shape}")
        weight, num_patients = _weights(len(x), groups)
        self.mean_: Floats = weight @ x
        root = np.sqrt(weight)[:, None]
        centred, nuisance = root * (x - self.mean_), root * (z - weight @ z)
        basis = _orthonormal(nuisance)  # so that a nuisance's unit plays no part
        if basis.shape[1] >= min(num_patients - 1, x.shape[1]):
            raise LabelsError(
                f"{basis.shape[1]} independent nuisances cannot be erased from {x.shape[1]} dimensions with {num_patients} "
                "patients; expected fewer than either. Erase fewer columns, or give more patients"
            )
        covariance = centred.T @ centred
        self.shrinkage_ = _shrinkage(self.shrinkage, covariance, x - self.mean_, weight, num_patients)
        scale = float(np.trace(covariance)) / x.shape[1]
        values, vectors = np.linalg.eigh((1 - self.shrinkage_) * covariance)
        values += self.shrinkage_ * scale
        kept = values > EIGENVALUE_CUT * max(float(values[-1]), np.finfo(float).tiny)
        half = np.sqrt(values[kept])
        whiten, colour = (vectors[:, kept] / half).T, vectors[:, kept] * half
        left, strength, _ = np.linalg.svd(whiten @ (centred.T @ basis), full_matrices=False)
        left = left[:, strength > CORRELATION_CUT]
        self.projection_: Floats = (colour @ left) @ (left.T @ whiten)
        self.rank_, self.num_rows_, self.num_patients_ = left.shape[1], len(x), num_patients
        return self

    def transform(self, X: Any) -> NDArray[Any]:
        """X (N, D) without the nuisance, in the type of X. What the nuisances of these rows are is not asked."""
        x = np.asarray(X)
        if x.ndim != 2 or x.shape[1] != len(self.mean_):
            raise UsageError(f"features of shape {x.shape}; the eraser was fitted on {len(self.mean_)} dimensions")
        erased: NDArray[Any] = (x - (x - self.mean_) @ self.projection_.T).astype(x.dtype, copy=False)
        return erased


def _weights(rows: int, groups: Any) -> tuple[Floats, int]:
    """Weights of rows that sum to one, and how many patients there are."""
    owner = np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(owner) != rows or rows == 0:
        raise LabelsError(f"{len(owner)} patients for {rows} rows; expected one for each, and at least one")
    counts = np.bincount(owner)
    return 1 / (counts[owner] * len(counts)), len(counts)


def _orthonormal(columns: Floats) -> Floats:
    """An orthonormal basis of what columns span, each as important as any other; (N, 0) when all are constant."""
    norms = np.linalg.norm(columns, axis=0)
    columns = columns[:, norms > 1e-12] / norms[norms > 1e-12]
    if columns.shape[1] == 0:
        return columns
    left, strength, _ = np.linalg.svd(columns, full_matrices=False)
    basis: Floats = left[:, strength > 1e-9 * strength[0]]
    return basis


def _shrinkage(wanted: float | str, covariance: Floats, centred: Floats, weight: Floats, patients: int) -> float:
    """λ; by Ledoit and Wolf (2004, lemma 3.1 f.) the share of the spread of S about its mean scale that is noise."""
    if wanted != "auto":
        if isinstance(wanted, str) or not 0 <= wanted <= 1:
            raise UsageError(f"shrinkage is {wanted!r}; expected a number from 0 to 1, or auto")
        return float(wanted)
    size = covariance.shape[0]
    total = float((covariance**2).sum())
    spread = total - float(np.trace(covariance)) ** 2 / size
    fourth = float(weight @ (centred**2).sum(1) ** 2)
    return float(np.clip((fourth - total) / patients / spread, 0, 1)) if spread > 1e-12 * total else 0.0


@dataclass(frozen=True, kw_only=True)
class NuisanceCoder:
    """Nuisances of cases → numbers that `ConceptEraser` takes. Learnt from training cases by `learn_nuisances`.

    categories  of each nuisance that is a word; rarer ones than `MIN_PATIENTS` patients are one category `other`, cases without
                a value one of their own, `missing`
    scales      mean, and where there are missing values 1.0, of each nuisance that is a number: it enters as it is; a missing
                value enters as the mean, beside a column that says so
    """

    categories: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, tuple[float, bool]]

    @property
    def names(self) -> tuple[str, ...]:
        """What is erased."""
        return (*self.categories, *self.scales)

    def columns(self, cases: Sequence[Mapping[str, Value]]) -> Floats:
        """(N, K) float64."""
        found: list[list[float]] = []
        for name, known in self.categories.items():
            words = [_word(case.get(name)) for case in cases]
            words = [word if word in known else OTHER for word in words]
            found += [[float(word == one) for word in words] for one in known]
        for name, (mean, sometimes_missing) in self.scales.items():
            values = [case.get(name) for case in cases]
            found.append([mean if value is None else float(value) for value in values])
            if sometimes_missing:
                found.append([float(value is None) for value in values])
        return np.array(found, np.float64).reshape(len(found), len(cases)).T


def learn_nuisances(
    cases: Sequence[Mapping[str, Value]], names: Sequence[str], patients: Sequence[str]
) -> NuisanceCoder:
    """How nuisances become columns, from the training cases. A name is a number when all its known values are.

    LabelsError when a name does not vary (`why_constant`): nothing could be erased.
    """
    categories, scales, empty = {}, {}, []
    for name in names:
        values = [case.get(name) for case in cases]
        if reason := why_constant(values, patients):
            empty.append(f"{name} ({reason})")
        elif _are_numbers(values):
            known = [float(value) for value in values if value is not None]
            scales[name] = (float(np.mean(known)), len(known) < len(values))
        else:
            categories[name] = _categories(values, patients)
    if empty:
        raise LabelsError(f"nothing to erase of {', '.join(empty)}; expected values that differ between training cases")
    return NuisanceCoder(categories=categories, scales=scales)


def why_constant(values: Sequence[Value], patients: Sequence[str]) -> str:
    """Why the columns of a nuisance would be the same in all cases; "" where they are not. No value is named: reasons stand in
    results."""
    words = {_word(value) for value in values}
    if words <= {MISSING}:
        return "no value"
    if len(words) == 1:
        return "always the same"
    if not _are_numbers(values) and len(_categories(values, patients)) < 2:
        return f"no value of {MIN_PATIENTS} patients or more"
    return ""


def _are_numbers(values: Sequence[Value]) -> bool:
    return all(value is None or isinstance(value, (int, float)) for value in values)


def _categories(values: Sequence[Value], patients: Sequence[str]) -> tuple[str, ...]:
    """Words of at least MIN_PATIENTS patients, and OTHER where there are more."""
    owners: dict[str, set[str]] = {}
    for value, patient in zip(values, patients):
        owners.setdefault(_word(value), set()).add(patient)
    often = sorted(word for word, who in owners.items() if len(who) >= MIN_PATIENTS)
    return (*often, *([OTHER] if len(often) < len(owners) and OTHER not in often else []))


def _word(value: Value) -> str:
    return MISSING if value is None or value == "" else str(value)
