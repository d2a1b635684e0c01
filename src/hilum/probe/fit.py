"""Fit a head on frozen features and judge it on patients it has not seen.

One out-of-fold prediction per case is made and written; every score and interval is computed from these rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hilum.archive.privacy import Key
from hilum.errors import LabelsError, UsageError
from hilum.probe.heads import make_head
from hilum.probe.heads.head import Head, Task
from hilum.probe.labels import IDENTIFIERS, Cases, Features, match_cases, read_features, read_labels
from hilum.probe.result import ProbeResult, score, score_folds
from hilum.probe.split import Units, find_units, make_folds
from hilum.records import hash_file, table_metadata, versions, write_table
from hilum.stats import NUM_RESAMPLES
from hilum.terminal import Progress

Array = NDArray[Any]

FEW_VALUES = 10  # up to so many distinct numbers are classes
MANY_VALUES = 30  # more distinct whole numbers than this are a quantity


@dataclass(frozen=True, kw_only=True)
class _Design:
    """Everything that is decided before a head is fitted, for n cases.

    y         (n,) class numbers, or values
    classes   names in the order of the class numbers; () for regression
    folds     (n,) the fold in which a case is held out
    held_out  the group that each fold leaves out, "" for several
    """

    source: Features
    cases: Cases
    units: Units
    task: Task
    y: Array
    classes: tuple[str, ...]
    folds: NDArray[np.intp]
    held_out: list[str]
    notes: tuple[str, ...]


def probe(
    features: Path,
    labels: Path | None,
    *,
    target: str,
    groups: str | None = None,
    patients: str | None = None,
    head: str = "linear",
    task: str = "auto",
    level: str | None = None,
    num_components: int | None = None,
    num_folds: int = 5,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    output: Path | None = None,
    save: Path | None = None,
    key: Key | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Cross-validate a head on one features file; no patient stands on both sides of a split.

    features        Parquet from `hilum embed`
    labels          CSV or Parquet with the target and one of item, series, patient (hashes) or file, series_uid,
                    patient_id (raw, hashed on the fly); None when the target is a column of the features, e.g. region
    target          column to predict
    groups          column to split by: each of up to 10 groups is left out once, more are dealt into `num_folds` folds;
                    None deals patients into `num_folds` folds
    patients        column that names the patient, when the features do not know it
    head            a name from `HEADS`
    task            "classification", "regression", or "auto", see `choose_task`
    level           "slice", "region" or "volume"; needed when the file holds several
    num_components  principal components kept, for heads that can
    seed            of folds, head and resamples
    num_resamples   bootstrap draws of whole patients
    output          Parquet for the predictions: item, patient, fold, split, seed, target, y_true, y_pred, one
                    proba_<class> per class, head, model, contract; its metadata names the inputs by hash
    save            folder for a head fitted on all cases (`hilum.probe.saved`), its probabilities calibrated by the
                    temperature that suits the out-of-fold predictions best
    key             for raw identifiers; None reads the user's key when one is needed
    progress        called as (folds done, folds, what is being done)

    Rows of all folds are scored together, so offsets between folds count as errors; `per_fold` has the scores within
    each. LabelsError, InputError and UsageError say what does not fit.
    """
    _check(head, num_components, num_folds, num_resamples, save)
    source = read_features(features, level)
    table = read_labels(labels) if labels is not None else None
    cases = match_cases(source, table, target=target, groups=groups, patients=patients, key=key)
    own_column = table is None or target not in table.columns
    chosen, why = choose_task(cases.target, own_column=own_column) if task == "auto" else (task, "")
    units = find_units(source, cases, groups, patients, key)
    design = _design(source, cases, units, chosen, target, num_folds, seed)
    new_head = partial(make_head, head, task=design.task, num_components=num_components, seed=seed)
    y_pred, proba = _predict_out_of_fold(design, new_head, progress)
    rows = _prediction_table(design, y_pred, proba, target=target, head=head, seed=seed)
    if output is not None:
        about: dict[str, Any] = {"format": "hilum-predictions", "key": source.key_fingerprint, "versions": versions()}
        about["inputs"] = {"features": hash_file(features), "labels": hash_file(labels) if labels else None}
        about |= {"target": target, "groups": groups, "patients": patients, "task": design.task, "head": head}
        about |= {"level": source.level, "model": source.model, "contract": source.contract, "left_out": cases.left_out}
        write_table(output, rows, about | {"num_components": num_components, "num_folds": num_folds, "seed": seed})
    hidden = groups is not None and groups in {*IDENTIFIERS, patients}  # identifiers are not shown
    held_out = [""] * len(design.held_out) if hidden else design.held_out
    result = ProbeResult(
        target=target,
        task=design.task,
        head=head,
        model=source.model,
        contract=source.contract,
        level=source.level,
        classes=design.classes,
        scores=score(rows, design.task, units.cluster, num_resamples=num_resamples, seed=seed),
        per_fold=score_folds(rows, design.task, held_out),
        cluster=units.kind,
        clusters=tuple(units.cluster),
        joined_on=cases.joined_on,
        left_out=cases.left_out,
        notes=tuple(note for note in (why, *design.notes) if note),
        predictions=rows,
    )
    if save is not None:
        _save(save, design, new_head(), head, result, proba)
    return result


def _save(folder: Path, design: _Design, head: Head, name: str, result: ProbeResult, proba: Array) -> None:
    """Fit a head on all cases and write it with what the cross-validation found."""
    from hilum.probe.saved import write_head

    head.fit(design.source.vectors[design.cases.index], design.y, np.array(design.units.inner))
    training: dict[str, Any] = {"cases": len(design.y), f"{design.units.kind}s": len(set(design.units.cluster))}
    training |= (
        {"classes": {c: int((design.y == i).sum()) for i, c in enumerate(design.classes)}} if design.classes else {}
    )
    write_head(
        folder,
        head,
        name=name,
        target=result.target,
        classes=design.classes,
        features=table_metadata(design.source.table),
        scores={metric: {n: getattr(s, n) for n in ("value", "low", "high")} for metric, s in result.scores.items()},
        training=training | {n: repr(v) for n, v in head.get_params().items() if n not in ("task", "device")},
        temperature=_temperature(proba, design.y) if design.classes else 1.0,
    )


def _temperature(proba: Array, y: Array) -> float:
    """Of out-of-fold probabilities; cases of a class that their fold's training part lacked (probability 0) say nothing."""
    from hilum.probe.calibration import fit_temperature

    known = proba[np.arange(len(y)), y] > 0
    return fit_temperature(proba[known], y[known]) if known.any() else 1.0


def _check(head: str, num_components: int | None, num_folds: int, num_resamples: int, save: Path | None) -> None:
    """UsageError for what is wrong before anything is read: it costs no time."""
    if num_folds < 2 or num_resamples < 1:
        raise UsageError(f"expected num_folds ≥ 2 and num_resamples ≥ 1; found {num_folds} and {num_resamples}")
    if make_head(head, num_components=num_components).sees == "tokens":
        raise UsageError(
            f"a {head} head takes patch tokens, not vectors; hilum bench run fits it (and --save-heads keeps it)"
        )
    if save is not None:
        from hilum.probe.saved import check_saved

        check_saved(head)


def choose_task(values: list[str], *, own_column: bool) -> tuple[Task, str]:
    """Whether a target is a class or a quantity, and a sentence that says so.

    values      text of every label
    own_column  the target is a column of the features themselves (e.g. region), always a class

    Regression when all values are numbers, more than 10 distinct, and some are not whole or more than 30 are distinct.
    """
    numbers = _numbers(values)
    num_distinct = len(set(values))
    if numbers is None or own_column or num_distinct <= FEW_VALUES:
        quantity = False
    else:
        quantity = num_distinct > MANY_VALUES or not (numbers == np.rint(numbers)).all()
    if quantity:
        return "regression", f"target taken as a quantity ({num_distinct} distinct numbers); --task changes that"
    return "classification", f"target taken as {num_distinct} classes; --task changes that"


def _design(source: Features, cases: Cases, units: Units, task: str, target: str, num_folds: int, seed: int) -> _Design:
    if task not in ("classification", "regression"):
        raise UsageError(f"unknown task '{task}'; known: auto, classification, regression")
    y, classes = _encode(cases.target, cast(Task, task), target)
    folds, held_out = make_folds(source, cases, units, num_folds=num_folds, seed=seed)
    return _Design(
        source=source,
        cases=cases,
        units=units,
        task=cast(Task, task),
        y=y,
        classes=classes,
        folds=folds,
        held_out=held_out,
        notes=(*units.notes, *_class_notes(y, classes, np.array(units.group))),
    )


def _numbers(values: list[str]) -> NDArray[np.float64] | None:
    """The values as finite numbers, or None when some are not."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _encode(values: list[str], task: Task, target: str) -> tuple[Array, tuple[str, ...]]:
    """Targets as class numbers with their names (sorted as numbers when all are), or as values with no names."""
    if len(set(values)) < 2:
        found = f"all {len(values)} labels are '{values[0]}'" if values else "no case has a label"
        raise LabelsError(f"target '{target}' has nothing to tell apart: {found}; expected at least two values")
    numbers = _numbers(values)
    if task == "regression":
        if numbers is None:
            raise LabelsError(f"target '{target}' has values that are no finite numbers; expected numbers, or classes")
        return numbers, ()
    distinct = sorted(set(values), key=(lambda v: (float(v), v)) if numbers is not None else None)
    place = {name: i for i, name in enumerate(distinct)}
    return np.array([place[v] for v in values]), tuple(distinct)


def _class_notes(y: Array, classes: tuple[str, ...], group: Array) -> tuple[str, ...]:
    """A class that lives in one group can never be predicted there, as that group is held out."""
    lonely = [name for i, name in enumerate(classes) if len(set(group[y == i].tolist())) < 2]
    if not lonely:
        return ()
    if len(lonely) == len(classes):
        raise LabelsError(
            f"each of the {len(classes)} classes stays within one group, so no class can be learnt and tested; "
            "expected classes in at least two groups. Choose another groups column, or another target"
        )
    return (f"{len(lonely)} of {len(classes)} classes occur in one group only and cannot be predicted there",)


def _predict_out_of_fold(
    design: _Design, new_head: Callable[[], Head], progress: Progress | None
) -> tuple[Array, Array]:
    """Predictions (n,) and probabilities (n, classes) of heads that never saw the case's fold.

    A class that was absent from the training part gets probability 0. LabelsError when only one class was present.
    """
    X = design.source.vectors[design.cases.index]
    inner = np.array(design.units.inner)
    y_pred = np.empty_like(design.y)
    proba = np.zeros((len(X), len(design.classes)))
    for fold in range(len(design.held_out)):
        test = design.folds == fold
        if design.task == "classification" and len(set(design.y[~test].tolist())) < 2:
            raise LabelsError(
                f"with fold {fold} held out, the remaining {np.count_nonzero(~test)} cases are all of class "
                f"'{design.classes[design.y[~test][0]]}'; expected two classes in every training part. Choose other "
                "groups"
            )
        head = new_head().fit(X[~test], design.y[~test], inner[~test])
        y_pred[test] = head.predict(X[test])
        if design.task == "classification":
            proba[np.ix_(test, head.classes_)] = head.predict_proba(X[test])
        if progress:
            progress(fold + 1, len(design.held_out), "fitting heads, fold by fold")
    return y_pred, proba


def _prediction_table(design: _Design, y_pred: Array, proba: Array, *, target: str, head: str, seed: int) -> pa.Table:
    """One row per case in the order of the features; identifiers only as keyed hashes."""
    count = len(y_pred)
    items = design.source.column("item")
    names = np.array(design.classes)
    classify = design.task == "classification"
    columns: dict[str, Any] = {
        "item": [items[i] for i in design.cases.index],
        "patient": design.units.patient,
        "fold": pa.array(design.folds, pa.int32()),
        "split": ["test"] * count,
        "seed": pa.array([seed] * count, pa.int32()),
        "target": [target] * count,
        "y_true": names[design.y].tolist() if classify else design.y,
        "y_pred": names[y_pred].tolist() if classify else y_pred,
    }
    columns |= {f"proba_{name}": proba[:, i] for i, name in enumerate(design.classes)}
    columns |= {"head": [head] * count, "model": [design.source.model] * count}
    return pa.table(columns | {"contract": [design.source.contract] * count})
