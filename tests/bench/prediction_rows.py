"""Prediction rows for tests."""

import numpy as np
import pyarrow as pa

from hilum.bench.predictions import SCHEMA


def make_table(kind, target, outputs, *, patients=None, **about):
    """Rows as heads write them: `outputs` (draws, seeds, N, O), plus a validation row that must not count."""
    outputs = np.asarray(outputs, dtype=float)
    if outputs.ndim == 2:
        outputs = outputs[None, None]
    names = about.pop("cases", [f"c{n:04}" for n in range(len(target))])
    patients = names if patients is None else [f"p{p}" for p in patients]
    fixed = {
        "task": "t",
        "kind": kind,
        "model": "m",
        "contract": "k",
        "features": "class",
        "head": "linear",
        "protocol": "full",
    }
    rows = []
    for draw, seed in np.ndindex(*outputs.shape[:2]):
        for case, patient, t, o in zip(names, patients, target, outputs[draw, seed]):
            rows.append(
                fixed
                | about
                | {"draw": draw, "seed": seed, "split": "test", "case": case, "patient": patient}
                | {"target": list(np.atleast_1d(t).astype(float)), "output": list(np.atleast_1d(o))}
            )
    rows.append(rows[0] | {"split": "val", "case": "v"})
    return pa.Table.from_pylist(rows[::-1], schema=SCHEMA)
