"""The test rows of one predictions file as arrays: cases in one order, and what each run said of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hilum.errors import InputError, UsageError
from hilum.metrics import METRICS
from hilum.terminal import few

Array = NDArray[Any]

# The metric of a kind when a task names none.
DEFAULT_METRICS = {
    "classification": "auroc",
    "multilabel": "macro_auroc",
    "regression": "r2",
    "survival": "c_index",
    "localisation": "mean_distance_mm",
    "segmentation": "dice",
    "retrieval": "recall_at_10",
}
_NEEDS: dict[str, tuple[str, ...]] = {
    "classification": ("score", "label"),
    "multilabel": ("labels",),
    "regression": ("value",),
    "survival": ("risk",),
    "localisation": ("point",),
    "segmentation": ("masks",),
    "retrieval": ("recalls",),
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What several runs (head seeds, draws of training cases) said of the same cases.

    cases     (N,) names, sorted; a query of retrieval has its label beside its name
    patients  (N,)
    target    (N, T) as in `bench.predictions`
    outputs   (draws, seeds, N, O)
    """

    kind: str
    cases: tuple[str, ...]
    patients: Array
    target: Array
    outputs: Array

    def columns(self, metric: str, draw: int, seed: int) -> tuple[Array, Array]:
        """(truth, prediction) of one run in the form that `METRICS[metric]` takes."""
        return form(self.kind, metric, self.target, self.outputs[draw, seed])

    def take(self, index: Array) -> "Runs":
        """The cases with these numbers, in this order."""
        return Runs(
            kind=self.kind,
            cases=tuple(self.cases[i] for i in index),
            patients=self.patients[index],
            target=self.target[index],
            outputs=self.outputs[:, :, index],
        )


def metric_of(kind: str, metric: str | None) -> str:
    """The name in `METRICS` for a kind: `auroc` of a multi-label task is `macro_auroc`. UsageError when it does not fit."""
    name = metric or DEFAULT_METRICS[kind]
    if kind == "multilabel" and f"macro_{name}" in METRICS:
        name = f"macro_{name}"
    fitting = [known for known, m in METRICS.items() if m.needs in _NEEDS[kind]]
    if name not in fitting:
        raise UsageError(f"{name} is no metric of a {kind} task; expected one of {', '.join(fitting)}")
    return name


def form(kind: str, metric: str, target: Array, output: Array) -> tuple[Array, Array]:
    """Rows of one run as `METRICS[metric]` takes them. `target` (N, T), `output` (N, O) as in `bench.predictions`."""
    if kind == "classification":
        y = target[:, 0].astype(np.intp)
        if METRICS[metric].needs == "label":
            return y, output.argmax(axis=1)
        return y, output[:, 1] if output.shape[1] == 2 else output
    if kind in ("regression", "survival"):
        return (target[:, 0] if kind == "regression" else target), output[:, 0]
    if kind == "segmentation":
        return target, output.reshape(len(target), target.shape[1], 4)
    return (target[:, 0] if kind == "retrieval" else target), output


def read_runs(predictions: pa.Table) -> Runs:
    """Test rows of one predictions table. InputError when they are not one task with every case in every run."""
    rows = predictions.filter(pc.equal(predictions["split"], "test"))
    if rows.num_rows == 0:
        raise InputError(f"no test rows among {predictions.num_rows} predictions; expected split = test")
    for name in ("task", "kind", "model", "features", "head", "protocol"):
        if len(found := pc.unique(rows[name]).to_pylist()) > 1:
            raise InputError(f"predictions of several {name}s: {few(map(str, found))}; expected one (one file each)")
    kind = rows["kind"][0].as_py()
    if kind not in _NEEDS:
        raise InputError(f"predictions of unknown kind {kind!r}; expected one of {', '.join(_NEEDS)}")
    for name in ("case", "patient", "draw", "seed"):
        if rows[name].null_count:
            raise InputError(
                f"{rows[name].null_count} of {rows.num_rows} test rows have no {name}; expected one in each"
            )
    rows = rows.sort_by([(name, "ascending") for name in ("draw", "seed", "case")])
    target, output = _matrix(rows, "target"), _matrix(rows, "output")
    names = np.array(rows["case"].to_pylist())
    if kind == "retrieval":  # one row per query and label
        names = np.array([f"{name} {label:g}" for name, label in zip(names, target[:, 0])])
    runs = np.stack([rows["draw"].to_numpy(), rows["seed"].to_numpy()], axis=1)
    order = np.lexsort((names, runs[:, 1], runs[:, 0]))
    names, runs, target, output = names[order], runs[order], target[order], output[order]
    patients = np.array(rows["patient"].to_pylist())[order]
    draws, seeds = np.unique(runs[:, 0]), np.unique(runs[:, 1])
    num_runs, num_cases = len(draws) * len(seeds), len(np.unique(names))
    grid = np.repeat([(d, s) for d in draws for s in seeds], num_cases, axis=0)
    whole = grid.shape == runs.shape and (grid == runs).all()
    if not whole or (names.reshape(num_runs, -1) != names[:num_cases]).any():
        raise InputError(
            f"{len(names)} test rows of {num_cases} cases do not fill {len(draws)} draw(s) × {len(seeds)} seed(s): cases "
            "are missing or doubled in a run. Make the file again: hilum bench run"
        )
    same = np.array_equal(target, np.tile(target[:num_cases], (num_runs, 1)), equal_nan=True)
    if not same or (patients.reshape(num_runs, -1) != patients[:num_cases]).any():
        raise InputError("runs of one predictions file disagree on the true values or the patients of cases")
    _check(kind, target[:num_cases], output)
    return Runs(
        kind=kind,
        cases=tuple(names[:num_cases].tolist()),
        patients=patients[:num_cases],
        target=target[:num_cases],
        outputs=output.reshape(len(draws), len(seeds), num_cases, -1),
    )


def _matrix(rows: pa.Table, name: str) -> Array:
    column = rows[name].combine_chunks()
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) != 1 or not widths[0]:
        raise InputError(
            f"{name} of the predictions has lengths {few(map(str, widths))}; expected one length for all rows"
        )
    values: Array = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)


def _check(kind: str, target: Array, output: Array) -> None:
    """Lengths and values that a kind allows."""
    num_t, num_o = target.shape[1], output.shape[1]
    expected = {
        "classification": (1, max(num_o, 2)),
        "multilabel": (num_t, num_t),
        "regression": (1, 1),
        "survival": (2, 1),
        "localisation": (3, 3),
        "segmentation": (num_t, 4 * num_t),
        "retrieval": (1, 4),
    }[kind]
    if (num_t, num_o) != expected:
        raise InputError(
            f"a {kind} row has a target of {num_t} and an output of {num_o} numbers; expected {expected[0]} and {expected[1]}"
        )
    if kind == "classification" and not (np.isin(target, np.arange(num_o)).all()):
        raise InputError(
            f"class numbers {few(map(str, np.unique(target)))}; expected 0 to {num_o - 1}, as there are outputs"
        )
    if kind != "segmentation" and not np.isfinite(output).all():
        raise InputError(f"{int((~np.isfinite(output)).any(axis=1).sum())} rows have an output that is not finite")
    if kind != "multilabel" and not np.isfinite(target).all():
        raise InputError(f"{int((~np.isfinite(target)).any(axis=1).sum())} rows have a target that is not finite")
