"""scores.parquet: one row for each file of predictions, computed once."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from hilum.bench.judge.scoring import Score, score_predictions
from hilum.bench.predictions import read_predictions
from hilum.errors import InputError
from hilum.records import hash_json, read_table, table_metadata, write_table
from hilum.terminal import Progress

ABOUT = ("task", "kind", "model", "contract", "features", "head", "protocol")
SE = ("DeLong", "Hanley-McNeil")
_CLASS = pa.struct(
    [("name", pa.string()), ("metric", pa.string())]
    + [(name, pa.float64()) for name in ("value", "low", "high")]
    + [(name, pa.int64()) for name in ("num_cases", "num_present")]
)
_TYPES = {
    "higher_is_better": pa.bool_(),
    **dict.fromkeys(
        ("value", "low", "high", "case_se", "seed_sd", "draw_sd", "total_se", "chance", "ece", "brier"), pa.float64()
    ),
    **dict.fromkeys(
        ("num_cases", "num_patients", "num_seeds", "num_draws", "num_resamples", "num_undefined"), pa.int64()
    ),
    "se": pa.struct([(name, pa.float64()) for name in SE]),
    "per_class": pa.list_(_CLASS),
    "notes": pa.list_(pa.string()),
}
_NAMES = (*ABOUT, "file", "inputs", *(field.name for field in fields(Score) if field.name != "kind"))
_SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in _NAMES])


def write_scores(
    out: Path,
    *,
    num_resamples: int,
    seed: int,
    progress: Progress | None = None,
    data: Mapping[str, str] | None = None,
    left_out: Callable[[dict[str, Any], str], None] | None = None,
) -> list[dict[str, Any]]:
    """Score what has no score yet. Returns the rows, by task, model, features, head and protocol.

    data      hash of the cases and labels of each task as they are now; predictions for others are left out
    left_out  called with ABOUT and the reason for predictions that have no score, such as an AUROC where all test cases are
              of one class; without it the InputError is raised

    A row holds ABOUT, the name of its file, `inputs` (hash) and every field of `hilum.bench.judge.scoring.Score`.
    """
    path = out / "scores.parquet"
    old = {row["file"]: row for row in read_table(path).to_pylist()} if path.is_file() else {}
    files = sorted((out / "predictions").glob("*.parquet"))
    rows = []
    for done, file in enumerate(files, 1):
        table = read_predictions(file)
        about = table_metadata(table)
        inputs = hash_json([about.get("inputs"), num_resamples, seed])
        row = old.get(file.name)
        first = {name: table[name][0].as_py() for name in ABOUT}
        now = (data or {}).get(first["task"], about.get("data"))
        if left_out is not None and about.get("data") != now:
            left_out(first, "made of other cases, labels or another split than now; run this model again")
            continue
        if row is None or row["inputs"] != inputs:
            try:
                score = score_predictions(
                    table, about["metric"], classes=tuple(about["classes"]), num_resamples=num_resamples, seed=seed
                )
            except InputError as error:
                if left_out is None:
                    raise
                left_out(first, str(error))
                continue
            row = {**first, "file": file.name, "inputs": inputs, **score.to_dict()}
            row["se"] = {name: row["se"].get(name) for name in SE}
        rows.append(row)
        if progress:
            progress(done, len(files), "scores")
    rows.sort(key=lambda row: [str(row[name]) for name in ABOUT])
    if rows or path.is_file():
        write_table(path, pa.Table.from_pylist(rows, schema=_SCHEMA), {"format": "hilum-bench-scores", "version": 1})
    return rows
