"""Prediction rows in, one score with its interval out."""

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

# The metric of a kind when a task names none.
DEFAULT_METRICS = {
    "classification": "auroc",
    "multilabel": "macro_auroc",
    "regression": "r2",
    "survival": "c_index",
    "localisation": "distance_mm",
    "segmentation": "dice",
    "retrieval": "recall_at_10",
}


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class or label.

    name         as given, else its number
    metric       AUROC against all others (classification, multilabel), Dice, recall
    value        mean over runs; None where undefined, never 0 for want of a case
    low, high    percentile interval over patients; None where undefined
    num_cases    where it is known
    num_present  where it is present
    """

    name: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    num_cases: int
    num_present: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the test rows of one predictions file are worth.

    value          mean of the metric over runs: head seeds and draws of training cases
    low, high      95 % percentile interval of that mean, resampling patients; None when no resample gave a value
    case_se        standard deviation of that mean over the same resamples
    seed_sd        standard deviation over head seeds, mean over draws; None with one seed
    draw_sd        standard deviation over draws of their means; None with one draw
    total_se       of the score of a new case sample and new heads: √(case_se² + seed_sd² / seeds + draw_sd² / draws)
    se, se_name    analytic, mean over runs: "DeLong" and "Hanley-McNeil" of a binary AUROC; they take cases as independent
    chance         of a predictor that knows nothing but the test labels' frequencies; None where there is no such level
    per_class      classes or labels, when there are any
    ece, brier     calibration of classification; None else
    num_undefined  resamples without a value
    notes          what a reader of the number must know
    """

    metric: str
    kind: str
    higher_is_better: bool
    value: float
    low: float | None
    high: float | None
    case_se: float | None
    seed_sd: float | None
    draw_sd: float | None
    total_se: float | None
    se: dict[str, float]
    chance: float | None
    num_cases: int
    num_patients: int
    num_seeds: int
    num_draws: int
    num_resamples: int
    num_undefined: int
    per_class: tuple[ClassScore, ...]
    ece: float | None
    brier: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def score_predictions(
    predictions: pa.Table,
    metric: str | None = None,
    *,
    classes: tuple[str, ...] = (),
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Score:
    """Score of the test rows of one predictions file (`bench.predictions`)."""
    raise NotImplementedError
