"""Who belongs together: patients and groups into folds and clusters."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from hilum.archive.privacy import Key
from hilum.errors import LabelsError
from hilum.probe.labels import Cases, Features, hash_identifiers

MAX_LEFT_OUT_GROUPS = 10  # up to so many groups each is left out once
MIN_CLUSTERS = 10  # fewer groups cannot stand for patients in an interval; fewer patients make it rough


@dataclass(frozen=True, kw_only=True)
class Units:
    """Who belongs together, for each of n cases.

    patient  keyed hash, "" when unknown
    group    what a split keeps together
    inner    what a head keeps together in its own cross-validation: patients, else groups
    cluster  what an interval resamples
    kind     what a cluster is: "patient", "group" or "item"
    notes    what a reader of the interval must know
    """

    patient: list[str]
    group: list[str]
    inner: list[str]
    cluster: list[str]
    kind: str
    notes: tuple[str, ...]


def find_units(features: Features, cases: Cases, groups: str | None, patients: str | None, key: Key | None) -> Units:
    """Patients from the `patients` column, else from the features; groups from the `groups` column, else patients.

    Clusters are patients when all are known, else groups when there are at least 10, else single items, with a note.
    LabelsError when patients are unknown and no groups are given.
    """
    known = features.column("patient")
    patient = [known[i] for i in cases.index]
    if patients is not None and cases.patient is not None:
        hashed = patients == "patient" or patients in features.table.column_names
        patient = cases.patient if hashed else hash_identifiers(features, patients, cases.patient, "patient", key)
    num_unknown = sum(not p for p in patient)
    if cases.group is None and num_unknown:
        raise LabelsError(
            f"the patient of {num_unknown} of {len(patient)} cases is unknown, so a split could put one patient on "
            "both sides. Name a column that keeps patients together: --groups COLUMN (or --patients COLUMN)"
        )
    group = cases.group if cases.group is not None else patient
    notes: tuple[str, ...] = ()
    if not num_unknown:
        cluster, kind = patient, "patient"
    elif len(set(group)) >= MIN_CLUSTERS:
        cluster, kind = group, "group"
    else:
        cluster, kind = [features.column("item")[i] for i in cases.index], "item"
        notes = ("patients unknown: interval treats every item as independent and is likely too narrow",)
    if len(set(cluster)) < MIN_CLUSTERS:
        notes += (f"only {len(set(cluster))} {kind}s: the interval is rough",)
    inner = group if num_unknown else patient
    return Units(patient=patient, group=group, inner=inner, cluster=cluster, kind=kind, notes=notes)


def make_folds(
    features: Features, cases: Cases, units: Units, *, num_folds: int, seed: int
) -> tuple[NDArray[np.intp], list[str]]:
    """The fold in which each case is held out, and the group that each fold leaves out ("" for several).

    Up to 10 given groups are left out one by one; more, or patients, are dealt at random into `num_folds` folds.
    LabelsError with fewer than two groups, or when a known patient would stand on both sides of a split.
    """
    names, codes = np.unique(np.array(units.group), return_inverse=True)
    if len(names) < 2:
        raise LabelsError(
            f"all {len(codes)} cases belong to one {'group' if cases.group else 'patient'}; expected at least two, to "
            "fit on some and test on others"
        )
    if cases.group is not None and len(names) <= MAX_LEFT_OUT_GROUPS:
        folds, held_out = codes.astype(np.intp), [str(n) for n in names]
    else:
        splitter = GroupKFold(min(num_folds, len(names)), shuffle=True, random_state=seed)
        folds = np.empty(len(codes), dtype=np.intp)
        for fold, (_, test) in enumerate(splitter.split(codes[:, None], groups=codes)):
            folds[test] = fold
        held_out = [""] * int(folds.max() + 1)
    embedded = features.column("patient")
    for patient in (units.patient, [embedded[i] for i in cases.index]):
        _check_patients_apart(patient, folds)
    return folds, held_out


def _check_patients_apart(patient: list[str], folds: NDArray[Any]) -> None:
    seen: dict[str, set[int]] = {}
    for name, fold in zip(patient, folds.tolist()):
        if name:
            seen.setdefault(name, set()).add(fold)
    num_split = sum(len(s) > 1 for s in seen.values())
    if num_split:
        raise LabelsError(
            f"the groups put {num_split} of {len(seen)} known patients on both sides of a split; expected every "
            "patient within one group. Choose another groups column, or none"
        )
