"""Scores that others have published, beside which ours are put."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from hilum.bench.task import Task


@dataclass(frozen=True, kw_only=True)
class Published:
    """One printed number. Shares are 0 … 1, whatever the paper prints.

    track   of CuriaBench ("2D", "3D", …), or the family of VoxelFM's tasks
    metric  `hilum.metrics` where it is one of ours; "dice_micro" and "dice_macro" are VoxelFM's own definitions
    se      its printed standard error; None where the paper gives none
    """

    suite: str
    track: str
    task: str
    dataset: str
    metric: str
    model: str
    score: float
    se: float | None


@cache
def all_published() -> tuple[Published, ...]:
    """Every row of published.csv."""
    text = files("hilum.bench.catalogue").joinpath("published.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    names = ("suite", "track", "task", "dataset", "metric", "model")
    return tuple(
        Published(**{n: row[n] for n in names}, score=float(row["score"]), se=float(row["se"]) if row["se"] else None)
        for row in rows
    )


def published_scores(task: Task) -> list[Published]:
    """What has been published for a task, in the order of the paper; [] where nothing has."""
    suite = task.suite.partition("-")[0]
    if task.published is None:
        return []
    return [row for row in all_published() if row.suite == suite and (row.track, row.task) == task.published]
