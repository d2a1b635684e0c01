"""Predictions: one row per case, head seed and draw. Every score, interval and figure is computed from these rows.

kind            target                      output
classification  (class number)              probability of each class
multilabel      0, 1 or NaN of each label   probability of each label
regression      (value)                     (value)
survival        (time, event)               (risk), higher dies sooner
localisation    (x, y, z) in LPS mm         (x, y, z) in LPS mm
segmentation    true voxels of each class   class after class: predicted voxels, shared voxels, 95 % Hausdorff
                                            distance in mm, mean surface distance in mm; NaN where undefined
retrieval       (label number)              recall at 1, 5, 10 over the query's trials of that label, negatives of a trial
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from hilum.errors import InputError
from hilum.records import read_table, write_table

FORMAT = "hilum-bench-predictions"
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("kind", pa.string()),
        ("model", pa.string()),
        ("contract", pa.string()),
        ("features", pa.string()),  # what the head saw: class, mean, patches, …
        ("head", pa.string()),
        ("protocol", pa.string()),  # full, few-shot:5, fraction:0.1, ct-to-mr, …
        ("draw", pa.int32()),  # of few-shot cases; 0 else
        ("seed", pa.int32()),  # of the head; 0 for heads that draw nothing
        ("split", pa.string()),  # val or test
        ("case", pa.string()),  # keyed hash
        ("patient", pa.string()),  # keyed hash
        ("target", pa.list_(pa.float64())),
        ("output", pa.list_(pa.float64())),
    ]
)


def write_predictions(path: Path, rows: pa.Table, about: dict[str, Any]) -> None:
    """Write rows of `SCHEMA`, atomically; `about` names inputs, classes, settings and versions."""
    write_table(path, rows.cast(SCHEMA), {"format": FORMAT, "version": 1} | about)


def read_predictions(path: Path) -> pa.Table:
    """Rows of one file. InputError when it is none of ours."""
    table = read_table(path)
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path.name} is no predictions file: it has no column {', '.join(missing)}. Make one: hilum bench run"
        )
    return table
