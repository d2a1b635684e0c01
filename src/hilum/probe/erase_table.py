"""A feature table without the linear traces of nuisances → another feature table."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hilum.archive.privacy import Key
from hilum.errors import LabelsError, UsageError
from hilum.probe.erasure import ConceptEraser, Value, learn_nuisances
from hilum.probe.labels import Cases, match_cases, read_features, read_labels
from hilum.records import hash_file, read_table, table_metadata, versions, write_table


def erase_table(
    features: Path,
    nuisances: Path,
    columns: tuple[str, ...],
    out: Path,
    *,
    train: str = "",
    level: str | None = None,
    key: Key | None = None,
) -> dict[str, Any]:
    """Write `out`: the rows of one level, all other columns as they were, the contract with them. Returns what was erased.

    nuisances  CSV or Parquet that names cases as labels do (`hilum.probe.labels`)
    columns    of it: words, or numbers where every cell is one; an empty cell is missing
    train      COLUMN=VALUE of it: the cases that the eraser learns from; "": all that it names

    The eraser is fitted on patients, each counting once; of cases whose patient is unknown each is its own. All rows are
    transformed, also those that the table of nuisances does not name. UsageError for a table that was erased before.
    """
    table = read_table(features)
    about = table_metadata(table)
    if "erased" in about:
        raise UsageError(f"{features.name} was erased before; name all columns at once, on the table of hilum embed")
    if out.resolve() == features.resolve():
        raise UsageError(f"{out.name} would replace the features it is made from; choose another name")
    read, labels = read_features(features, level), read_labels(nuisances)

    def matched(name: str) -> Cases:
        return match_cases(read, labels, target=name, groups=None, patients=None, key=key)

    values: list[dict[str, Value]] = [{} for _ in range(len(read.vectors))]
    known: set[int] = set()
    for name in columns:
        cases = matched(name)
        number = all(_is_number(text) for text in cases.target)
        for row, text in zip(cases.index.tolist(), cases.target):
            values[row][name] = float(text) if number else text
        known |= set(cases.index.tolist())
    chosen = sorted(known)
    if train:
        column, mark, wanted = train.partition("=")
        if not mark:
            raise UsageError(f"train '{train}' is no COLUMN=VALUE; expected the cases to learn from, e.g. split=train")
        cases = matched(column)
        chosen = [row for row, text in zip(cases.index.tolist(), cases.target) if text == wanted]
        if not chosen:
            raise LabelsError(f"no case has {train}; column {column} holds {', '.join(sorted(set(cases.target))[:10])}")
    named = read.column("patient")
    patients = [named[row] or f"row {row}" for row in chosen]
    seen = [values[row] for row in chosen]
    coder = learn_nuisances(seen, columns, patients)
    eraser = ConceptEraser().fit(read.vectors[chosen], coder.columns(seen), patients)
    erased = eraser.transform(read.vectors)
    told = {
        "nuisances": list(coder.names), "rank": eraser.rank_, "shrinkage": eraser.shrinkage_,
        "num_cases": eraser.num_rows_, "num_patients": eraser.num_patients_, "train": train,
        "missing": {name: sum(case.get(name) is None for case in seen) for name in columns}, "from": hash_file(features),
    }  # fmt: skip
    width = erased.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(erased.astype(np.float32).ravel(), pa.float32()), width)
    rows = read.table.append_column("vector", vectors).select(
        [name for name in table.column_names if name in (*read.table.column_names, "vector")]
    )
    write_table(out, rows, about | {"erased": told, "versions": versions()})
    return told | {"num_rows": len(erased), "failed": read.failed}


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
