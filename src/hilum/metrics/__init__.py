"""Metrics: arrays in, one number out. numpy and scipy only.

Where a metric is undefined (one class only, no spread) it raises ValueError with the reason; it never returns a guess.
Whoever calls decides what that means: a bootstrap counts such a draw, a report leaves the cell empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hilum.metrics.classes import accuracy as accuracy
from hilum.metrics.classes import auroc as auroc
from hilum.metrics.classes import average_precision as average_precision
from hilum.metrics.classes import balanced_accuracy as balanced_accuracy
from hilum.metrics.classes import brier as brier
from hilum.metrics.classes import ece as ece
from hilum.metrics.classes import f1 as f1
from hilum.metrics.classes import label_scores as label_scores
from hilum.metrics.classes import macro_auroc as macro_auroc
from hilum.metrics.classes import macro_auroc_rate as macro_auroc_rate
from hilum.metrics.classes import macro_average_precision as macro_average_precision
from hilum.metrics.classes import macro_f1 as macro_f1
from hilum.metrics.masks import dice as dice
from hilum.metrics.masks import dice_per_case as dice_per_case
from hilum.metrics.masks import dice_pooled as dice_pooled
from hilum.metrics.masks import dice_weighted as dice_weighted
from hilum.metrics.masks import empty_masks as empty_masks
from hilum.metrics.masks import hd95_mm as hd95_mm
from hilum.metrics.masks import surface_distance_mm as surface_distance_mm
from hilum.metrics.masks import surface_distances as surface_distances
from hilum.metrics.retrieval import mean_recall as mean_recall
from hilum.metrics.retrieval import recall_at_1 as recall_at_1
from hilum.metrics.retrieval import recall_at_5 as recall_at_5
from hilum.metrics.retrieval import recall_at_10 as recall_at_10
from hilum.metrics.retrieval import recall_at_k as recall_at_k
from hilum.metrics.values import c_index as c_index
from hilum.metrics.values import mae as mae
from hilum.metrics.values import mean_distance_mm as mean_distance_mm
from hilum.metrics.values import mean_where as mean_where
from hilum.metrics.values import r2 as r2
from hilum.metrics.values import rmse as rmse


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric is and how to read it.

    function          (y_true, prediction) → one number
    needs             the prediction it takes: "score" (higher means more likely; (N,) or (N, classes)), "label" (a class),
                      "value" (a number), "labels" (a score for each label, (N, L)), "risk", "point" (in mm), "masks"
                      (voxel counts and surface distances, see `masks.dice`), "recalls" (at 1, 5 and 10)
    chance            expected value of a predictor that knows nothing; None when it depends on the data
    higher_is_better  direction
    """

    function: Callable[[Any, Any], float]
    needs: Literal["score", "label", "value", "labels", "risk", "point", "masks", "recalls"]
    chance: float | None = None
    higher_is_better: bool = True


METRICS: dict[str, Metric] = {
    "auroc": Metric(function=auroc, needs="score", chance=0.5),
    "average_precision": Metric(function=average_precision, needs="score"),
    "f1": Metric(function=f1, needs="score"),
    "brier": Metric(function=brier, needs="score", higher_is_better=False),
    "ece": Metric(function=ece, needs="score", higher_is_better=False),
    "accuracy": Metric(function=accuracy, needs="label"),
    "balanced_accuracy": Metric(function=balanced_accuracy, needs="label"),
    "macro_auroc": Metric(function=macro_auroc, needs="labels", chance=0.5),
    "macro_auroc_rate": Metric(function=macro_auroc_rate, needs="labels"),
    "macro_average_precision": Metric(function=macro_average_precision, needs="labels"),
    "macro_f1": Metric(function=macro_f1, needs="labels"),
    "r2": Metric(function=r2, needs="value", chance=0.0),
    "rmse": Metric(function=rmse, needs="value", higher_is_better=False),
    "mae": Metric(function=mae, needs="value", higher_is_better=False),
    "c_index": Metric(function=c_index, needs="risk", chance=0.5),
    "mean_distance_mm": Metric(function=mean_distance_mm, needs="point", higher_is_better=False),
    "dice": Metric(function=dice, needs="masks"),
    "dice_weighted": Metric(function=dice_weighted, needs="masks"),
    "dice_pooled": Metric(function=dice_pooled, needs="masks"),
    "hd95_mm": Metric(function=hd95_mm, needs="masks", higher_is_better=False),
    "surface_distance_mm": Metric(function=surface_distance_mm, needs="masks", higher_is_better=False),
    "recall_at_1": Metric(function=recall_at_1, needs="recalls"),
    "recall_at_5": Metric(function=recall_at_5, needs="recalls"),
    "recall_at_10": Metric(function=recall_at_10, needs="recalls"),
}
