"""Concept erasure against a slow optimiser, linear probes and the theorem's own claims."""

import numpy as np
import pytest
from scipy import linalg, optimize
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LinearRegression, LogisticRegression

from hilum.errors import LabelsError, UsageError
from hilum.probe.erasure import ConceptEraser, learn_nuisances


def mixture(n: int = 400, d: int = 8, seed: int = 0):
    """Features of which three directions depend on a scanner and a thickness."""
    rng = np.random.default_rng(seed)
    vendor, thickness = rng.integers(0, 3, n), rng.uniform(1, 5, n)
    Z = np.c_[np.eye(3)[vendor], thickness]
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + Z @ rng.normal(size=(4, d)) * 2
    return X, Z, vendor


def cross(X, Z) -> float:
    return float(np.abs((X - X.mean(0)).T @ (Z - Z.mean(0)) / len(X)).max())


@pytest.mark.parametrize("shrinkage", [0, 0.3, 1, "auto"])
@pytest.mark.parametrize("d", [8, 120])
def test_no_linear_trace_is_left_on_the_training_rows(shrinkage, d):
    X, Z, vendor = mixture(n=100 if d > 8 else 400, d=d)
    eraser = ConceptEraser(shrinkage=shrinkage).fit(X, Z)
    erased = eraser.transform(X)
    assert eraser.rank_ == 3  # three one-hot columns have two degrees of freedom
    assert cross(X, Z) > 0.1
    assert cross(erased, Z) < 1e-8
    if d == 8:
        assert LinearRegression().fit(erased, Z).score(erased, Z) < 1e-10
        probe = LogisticRegression(C=1e6, max_iter=2000).fit(erased, vendor)
        shares = np.bincount(vendor) / len(vendor)
        np.testing.assert_allclose(probe.predict_proba(erased), np.tile(shares, (len(X), 1)), atol=2e-3)
        assert LogisticRegression(max_iter=2000).fit(X, vendor).score(X, vendor) > shares.max() + 0.2


def test_no_other_affine_eraser_moves_features_less():
    """A slow optimiser over all matrices A with A Σ_xz = 0 finds no smaller mean squared Mahalanobis distance."""
    X, Z, _ = mixture(n=150, d=4)
    Z = Z[:, 3:]
    X = X - X.mean(0)
    eraser = ConceptEraser(shrinkage=0).fit(X, Z)
    inverse = np.linalg.inv(X.T @ X / len(X))

    def moved(erased) -> float:
        return float(np.mean(np.einsum("nd,de,ne->n", erased - X, inverse, erased - X)))

    free = linalg.null_space((X.T @ (Z - Z.mean(0))).T)  # columns: what rows of A may be made of
    found = optimize.minimize(
        lambda a: moved(X @ (free @ a.reshape(free.shape[1], 4))), np.zeros(free.shape[1] * 4), tol=1e-12
    )
    least = moved(eraser.transform(X))
    assert least == pytest.approx(found.fun, rel=1e-5)
    assert least < 0.99 * moved(ConceptEraser(shrinkage=1).fit(X, Z).transform(X))  # orthogonal projection (SAL)
    assert least == pytest.approx(eraser.rank_, rel=1e-8)  # whitened features have variance 1 in every direction


def test_it_follows_a_change_of_basis_and_ignores_units_of_the_nuisance():
    X, Z, _ = mixture()
    basis = np.random.default_rng(1).normal(size=(8, 8))
    plain = ConceptEraser(shrinkage=0).fit(X, Z).transform(X)
    turned = ConceptEraser(shrinkage=0).fit(X @ basis + 7, Z * [1, 1, 1, 1e3] - 5).transform(X @ basis + 7)
    np.testing.assert_allclose(turned, plain @ basis + 7, atol=1e-8)


def test_features_without_a_trace_stay_as_they_are():
    X, Z, _ = mixture()
    residual = X - LinearRegression().fit(Z, X).predict(Z)
    eraser = ConceptEraser().fit(residual, Z)
    assert eraser.rank_ == 0
    np.testing.assert_array_equal(eraser.transform(residual), residual)
    once = ConceptEraser().fit(X, Z).transform(X)
    np.testing.assert_allclose(ConceptEraser().fit(once, Z).transform(once), once, atol=1e-9)


def test_a_patient_counts_once_however_many_rows():
    X, Z, _ = mixture(n=60)
    often = np.repeat(np.arange(60), np.random.default_rng(0).integers(1, 6, 60))
    one, many = ConceptEraser().fit(X, Z), ConceptEraser().fit(X[often], Z[often], groups=often)
    np.testing.assert_allclose(many.projection_, one.projection_, atol=1e-9)
    assert (many.num_rows_, many.num_patients_) == (len(often), 60)


@pytest.mark.parametrize(("n", "d"), [(30, 50), (500, 8)])
def test_shrinkage_is_that_of_ledoit_and_wolf(n, d):
    X = mixture(n=n, d=d)[0]
    assert ConceptEraser().fit(X, X[:, :1]).shrinkage_ == pytest.approx(LedoitWolf().fit(X).shrinkage_, rel=1e-9)


def test_what_cannot_be_erased_is_refused():
    X, Z, _ = mixture(n=30, d=3)
    with pytest.raises(LabelsError, match="3 independent nuisances"):
        ConceptEraser().fit(X, Z)
    with pytest.raises(UsageError, match="shrinkage"):
        ConceptEraser(shrinkage=2).fit(X, Z[:, :1])
    with pytest.raises(LabelsError, match="finite"):
        ConceptEraser().fit(np.full((3, 2), np.nan), np.ones((3, 1)))
    with pytest.raises(UsageError, match="3 dimensions"):
        ConceptEraser().fit(X, Z[:, 3:]).transform(X[:, :2])


def test_nuisances_become_columns():
    """Own category for missing, rare ones together, numbers as they are with a mark where they are missing."""
    cases = [{"vendor": "A", "age": 50.0}] * 6 + [{"vendor": "B", "age": 70.0}] * 5 + [{"age": None, "vendor": "C"}]
    cases += [{}] * 5
    patients = [str(n) for n in range(len(cases))]
    coder = learn_nuisances(cases, ["vendor", "age"], patients)
    assert coder.categories == {"vendor": ("A", "B", "missing", "other")}
    mean = (6 * 50 + 5 * 70) / 11
    found = coder.columns([{"vendor": "B", "age": 61}, {"vendor": "new"}])
    np.testing.assert_allclose(found, [[0, 1, 0, 0, 61, 0], [0, 0, 0, 1, mean, 1]])
    with pytest.raises(LabelsError, match=r"vendor \(no value of 5 patients or more\)"):  # one column `other`, always 1
        learn_nuisances(cases, ["vendor"], ["one"] * 17)
    with pytest.raises(LabelsError, match=r"kernel \(no value\)"):
        learn_nuisances(cases, ["kernel"], patients)
    with pytest.raises(LabelsError, match="always the same"):
        learn_nuisances(cases[:6], ["vendor"], patients[:6])
