"""Cox heads against a slow partial likelihood, finite differences, and numbers of lifelines and scikit-survival."""

import numpy as np
import pytest

from hilum.errors import UsageError
from hilum.metrics import c_index
from hilum.probe.heads.survival import CoxHead, _derivatives, fit_cox, partial_likelihood, risk_sets

RNG = np.random.default_rng(0)


def _cohort():
    """60 cases, 40 of which share their time with another: the numbers below are of these."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(60, 3)).round(3)
    time = np.ceil(rng.exponential(np.exp(-X @ [0.8, -0.5, 0.0])) * 6)
    return X, np.stack([time, rng.random(60) < 0.7], 1).astype(float)


# lifelines 0.30.3 (CoxPHFitter, penalizer 0) and scikit-survival 0.28.0 (CoxPHSurvivalAnalysis, alpha 0 and 10)
LIFELINES = [0.516878843115798, -0.761145307738381, -0.09921470742200539]
LIFELINES_LOG_LIKELIHOOD = -121.50162498522477
SKSURV = {
    ("efron", 0.0): [0.5168788433984705, -0.761145308327736, -0.09921470770533419],
    ("efron", 10.0): [0.350628969058738, -0.551215966742064, -0.05666204630985086],
    ("breslow", 0.0): [0.47498530174429787, -0.7141424264496152, -0.09325380930093187],
    ("breslow", 10.0): [0.32352065735777724, -0.5183255753982866, -0.055423268561084454],
}


def _slow_likelihood(X, y, beta, ties):
    """The formulas of the module's docstring, sum by sum."""
    total, eta = 0.0, X @ beta
    for t in sorted(set(y[y[:, 1] == 1, 0])):
        died = [i for i in range(len(y)) if y[i, 0] == t and y[i, 1] == 1]
        at_risk = sum(np.exp(eta[j]) for j in range(len(y)) if y[j, 0] >= t)
        total += sum(eta[i] for i in died)
        for number in range(len(died)):
            share = number / len(died) if ties == "efron" else 0
            total -= np.log(at_risk - share * sum(np.exp(eta[i]) for i in died))
    return total


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_likelihood_is_the_slow_one_and_derivatives_are_its_differences(ties):
    X, y = _cohort()
    beta = RNG.normal(size=3)
    assert partial_likelihood(X, y, beta, ties) == pytest.approx(_slow_likelihood(X, y, beta, ties), rel=1e-12)
    sets = risk_sets(y, ties)
    _, gradient, information = _derivatives(X[sets.order], sets, beta)
    for d, e in enumerate(np.eye(3) * 1e-5):
        above, below = (_slow_likelihood(X, y, beta + s * e, ties) for s in (1, -1))
        assert gradient[d] == pytest.approx((above - below) / 2e-5, rel=1e-5)
        above, below = (_derivatives(X[sets.order], sets, beta + s * e)[1] for s in (1, -1))
        np.testing.assert_allclose(information[d], -(above - below) / 2e-5, rtol=1e-5, atol=1e-6)


def test_coefficients_of_lifelines_and_scikit_survival():
    X, y = _cohort()
    np.testing.assert_allclose(fit_cox(X, y, 0.0), LIFELINES, atol=1e-7)
    assert partial_likelihood(X, y, np.array(LIFELINES)) == pytest.approx(LIFELINES_LOG_LIKELIHOOD, abs=1e-6)
    for (ties, penalty), coefficients in SKSURV.items():
        np.testing.assert_allclose(fit_cox(X, y, penalty, ties), coefficients, atol=1e-7)


def test_both_peers_say_so_today():
    pytest.importorskip("sksurv")
    from sksurv.linear_model import CoxPHSurvivalAnalysis

    X, y = _cohort()
    table = np.array([(bool(e), t) for t, e in y], dtype=[("event", bool), ("time", float)])
    for ties, penalty in SKSURV:
        peer = CoxPHSurvivalAnalysis(alpha=penalty, ties=ties, tol=1e-12, n_iter=200).fit(X, table)
        np.testing.assert_allclose(fit_cox(X, y, penalty, ties), peer.coef_, atol=1e-6)


def test_the_head_chooses_the_penalty_by_concordance_and_finds_the_signal():
    X = RNG.normal(size=(400, 30)) * 5 + 3
    time = RNG.exponential(np.exp(-(X[:, 0] - 3) / 5))
    censor = RNG.exponential(1.5, 400)
    y = np.stack([np.minimum(time, censor), time <= censor], 1)
    head = CoxHead().fit(X[:200], y[:200], validation=(X[200:300], y[200:300]))
    best = np.flatnonzero(head.validation_c_ == head.validation_c_.max())[0]
    assert head.penalty_ == head.penalties[best]
    assert c_index(y[300:], head.predict(X[300:])) > 0.65
    assert head.outputs(X[300:]).shape == (1, 100, 1)


def test_more_features_than_cases_is_the_same_problem():
    X = RNG.normal(size=(40, 60))
    y = np.stack([RNG.exponential(size=40), RNG.random(40) < 0.6], 1)
    head = CoxHead(penalties=(0.5,)).fit(X, y)
    scaled = (X - X.mean(0)) / X.std(0)
    beta = fit_cox(scaled, y, 0.5 * y[:, 1].sum())
    np.testing.assert_allclose(head.weights_[0, :, 0], beta / X.std(0), atol=1e-7)


def test_what_no_cox_model_can_use_is_refused():
    X, y = _cohort()
    for change, message in (
        (lambda y: y * [-1, 1], "durations from a common start"),
        (lambda y: y * [1, 0], "none of 60 cases had an event"),
        (lambda y: y * [1, 2], "events are 1"),
        (lambda y: y[:, 0], "time and event"),
        (lambda y: np.where(np.arange(60)[:, None] == 3, np.nan, y), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            CoxHead().fit(X, change(y))
    with pytest.raises(UsageError, match="efron or breslow"):
        CoxHead(ties="exact").fit(X, y)
    ordered = np.stack([np.arange(60.0), np.ones(60)], 1)
    with pytest.raises(ValueError, match="did not converge"):
        fit_cox(-np.arange(60.0)[:, None], ordered, 0.0)
