"""Temperature scaling (Guo et al. 2017): one number, found on validation cases, that makes probabilities honest.

Probabilities p become softmax(log p / T), those of single labels sigmoid(logit p / T). T > 1 softens; no order changes within
a case. The expected calibration error is `hilum.metrics`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from hilum.errors import UsageError

LEAST, MOST = 0.05, 20.0  # temperatures looked at
TINY = 1e-38  # about the smallest probability in float32


def apply_temperature(proba: Any, temperature: float, *, multilabel: bool = False) -> NDArray[np.float64]:
    """Probabilities (…, C) at another temperature."""
    if temperature <= 0:
        raise UsageError(f"temperature {temperature}: expected more than 0")
    p = np.clip(np.asarray(proba, dtype=np.float64), TINY, 1)
    if multilabel:
        odds = np.log(p) - np.log(np.clip(1 - np.asarray(proba, dtype=np.float64), TINY, 1))
        return np.asarray(1 / (1 + np.exp(-odds / temperature)))
    scaled = np.log(p) / temperature
    scaled = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(scaled / scaled.sum(axis=-1, keepdims=True))


def fit_temperature(proba: Any, y: Any, *, multilabel: bool = False) -> float:
    """The temperature with the lowest mean log-loss.

    proba  (N, C) with y (N,) class numbers, or (N, L) with y (N, L) of 0, 1 and NaN for unknown, of cases not trained on
    """
    proba, y = np.asarray(proba, dtype=np.float64), np.asarray(y)
    if len(y) == 0 or len(proba) != len(y):
        raise UsageError(f"expected probabilities and truths of the same cases; found {len(proba)} and {len(y)}")

    def loss(log_temperature: float) -> float:
        p = np.clip(apply_temperature(proba, float(np.exp(log_temperature)), multilabel=multilabel), TINY, 1)
        if multilabel:
            return float(
                -np.nanmean(np.where(np.isnan(y), np.nan, y * np.log(p) + (1 - y) * np.log(np.maximum(1 - p, TINY))))
            )
        return float(-np.log(p[np.arange(len(y)), y.astype(np.intp)]).mean())

    found = minimize_scalar(loss, bounds=(np.log(LEAST), np.log(MOST)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
