"""The probe that runs beside training: labelled images of the store, and how well frozen features tell their labels apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.archive.privacy import Key
from hilum.archive.store.index import Row
from hilum.archive.store.store import Store
from hilum.encode.contract import Contract, prepare_slice
from hilum.errors import LabelsError
from hilum.metrics import auroc, r2
from hilum.pretrain.volume_loader import Crops
from hilum.pretrain.watch.samples import middle_crop
from hilum.probe.fit import choose_task
from hilum.probe.heads.head import Task
from hilum.probe.heads.knn import KNNProbe
from hilum.probe.labels import Features, Labels, match_cases, read_labels

MAX_SLICES, MAX_VOLUMES = 512, 128
RIDGE = 100.0  # penalty on standardised features, as the linear probe's when it cannot choose


@dataclass(frozen=True)
class Labelled:
    """Slices or volumes with labels.

    images   (N, 1, S, S) float16, prepared by the contract; of volumes (N, 1, Z, Y, X), the middle of each
    y        (N,) class numbers, or values
    half     (N,) 0 or 1: which half of the patients an image belongs to
    """

    target: str
    task: Task
    images: Tensor
    y: NDArray[Any]
    half: NDArray[np.intp]


def read_labelled(store: Store, shown: Contract | Crops, path: Path, target: str, key: Key | None = None) -> Labelled:
    """Up to 512 labelled slices of a store, or 128 volumes.

    shown   what slices are prepared by; or the volumes that are trained on, of which the middle is shown
    path    CSV or Parquet with file, series_uid or patient_id (hashed on the fly), or series or patient (hashes); with a
            `slice` column a label belongs to that slice, else to the slice of the scan with most anatomy
    target  column to predict

    Many cases are thinned evenly in the order of their hashes. LabelsError when nothing matches, or fewer than two
    patients or classes are left.
    """
    labels = read_labels(path)
    if isinstance(shown, Crops) and "slice" in labels.columns:
        raise LabelsError(f"{path} has labels of slices; an encoder of volumes is probed with labels of scans")
    most = MAX_VOLUMES if isinstance(shown, Crops) else MAX_SLICES
    places, features = _candidates(store, labels)
    cases = match_cases(features, labels, target=target, groups=None, patients=None, key=key)
    if not len(cases.index):
        raise LabelsError(f"nothing in the store has a value of '{target}'")
    chosen = np.unique(np.linspace(0, len(cases.index) - 1, min(len(cases.index), most)).round().astype(int))
    texts = [cases.target[n] for n in chosen]
    task, _ = choose_task(texts, own_column=False)
    y: NDArray[Any] = np.array(texts, float) if task == "regression" else np.unique(texts, return_inverse=True)[1]
    rows = [(store.rows[places[i][0]], places[i][1]) for i in cases.index[chosen]]
    half = _halves([row.patient or row.key for row, _ in rows], y, task)
    images = [_image(store, row, z, shown) for row, z in rows]
    return Labelled(target, task, torch.stack(images).half(), y, half)


def _image(store: Store, row: Row, z: int, shown: Contract | Crops) -> Tensor:
    if isinstance(shown, Crops):
        return middle_crop(shown, row.key, shown.shapes[0][0])
    return prepare_slice(store.read_slice(row.key, z)[0], row.modality, row.unit, shown)


def _candidates(store: Store, labels: Labels) -> tuple[list[tuple[int, int]], Features]:
    """(volume, slice) of everything that could have a label, and the same as a table that labels can be joined to."""
    if "slice" in labels.columns:
        places = [(int(v), int(z)) for volume, number, _ in store.foreground() for v, z in zip(volume, number)]
        slices: list[int | None] = [z for _, z in places]
    else:
        places = [(n, int(np.argmax(row.shares))) for n, row in enumerate(store.rows)]
        slices = [None] * len(places)
    keys, patients, studies = (store.rows.table[name].to_pylist() for name in ("key", "patient", "study"))
    columns = {
        "item": pa.array([keys[v] if z is None else f"{keys[v]}/{z}" for (v, _), z in zip(places, slices)]),
        "patient": pa.array([patients[v] for v, _ in places]),
        "study": pa.array([studies[v] for v, _ in places]),
        "series": pa.array([keys[v] for v, _ in places]),
        "slice": pa.array(slices, pa.int32()),
        "region": pa.nulls(len(places), pa.int32()),
    }
    return places, Features(
        table=pa.table(columns),
        vectors=np.zeros((len(places), 0), np.float32),
        level="slice",
        model="teacher",
        contract="",
        key_fingerprint=str(store.header.get("key", "")),
    )


def _halves(patients: list[str], y: NDArray[Any], task: Task) -> NDArray[np.intp]:
    """Deal patients into two halves, in the order of their hashes; within classes, so that both halves know each."""
    first: dict[str, Any] = {}
    for patient, value in zip(patients, y):
        first.setdefault(patient, value if task == "classification" else 0)
    side, dealt = {}, dict.fromkeys(first.values(), 0)
    for patient in sorted(first):
        side[patient] = dealt[first[patient]] % 2
        dealt[first[patient]] += 1
    half = np.array([side[patient] for patient in patients], np.intp)
    one_class = task == "classification" and len(np.unique(y)) < 2
    if len(first) < 2 or one_class or len(np.unique(half)) < 2:
        raise LabelsError(
            f"the labels fit {len(first)} patients and {len(np.unique(y))} values; the online probe needs two of each, "
            "half of the patients to learn from and half to be judged on"
        )
    return half


def probe_scores(features: NDArray[np.float32], labelled: Labelled) -> dict[str, float]:
    """`knn` and `linear`: mean area under the ROC curve (R² for quantities), each half of the patients from the other.

    The linear head is ridge regression on standardised features in closed form. Both are for comparing moments of one run;
    `hilum probe` is for results. NaN where features are not finite.
    """
    if not np.isfinite(features).all():
        return {"knn": np.nan, "linear": np.nan}
    classification = labelled.task == "classification"
    num_outputs = int(labelled.y.max()) + 1 if classification else 1
    knn, linear = np.zeros((2, len(features), num_outputs))
    for side in (0, 1):
        fit, test = labelled.half != side, labelled.half == side
        head = KNNProbe(labelled.task).fit(features[fit], labelled.y[fit])
        goal = np.eye(num_outputs)[labelled.y[fit]] if classification else labelled.y[fit, None]
        linear[test] = _ridge(features[fit], goal, features[test])
        if classification:
            knn[np.ix_(np.flatnonzero(test), head.classes_)] = head.predict_proba(features[test])
        else:
            knn[test, 0] = head.predict(features[test])
    if classification:
        return {"knn": auroc(labelled.y, knn), "linear": auroc(labelled.y, linear)}
    return {"knn": r2(labelled.y, knn[:, 0]), "linear": r2(labelled.y, linear[:, 0])}


def _ridge(x: NDArray[Any], goal: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
    mean, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale[scale < 1e-12] = 1.0
    z = (x - mean) / scale
    weights = np.linalg.solve(z.T @ z + RIDGE * np.eye(x.shape[1]), z.T @ (goal - goal.mean(0)))
    predicted: NDArray[Any] = (new - mean) / scale @ weights + goal.mean(0)
    return predicted
