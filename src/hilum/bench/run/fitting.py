"""One fit after another → prediction rows. Nothing here knows of files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hilum.bench.predictions import SCHEMA
from hilum.bench.run.features import CaseFeatures
from hilum.bench.run.joined import JoinedFeatures
from hilum.bench.run.protocols import TOKEN_FEATURES, Trial
from hilum.bench.run.retrieval import recalls
from hilum.bench.run.scans import CaseReader
from hilum.bench.task import Case, Task
from hilum.probe.erasure import ConceptEraser
from hilum.probe.heads import head_class, make_head
from hilum.probe.heads.dense import SegmentationHead
from hilum.probe.heads.head import Head
from hilum.records import hash_json
from hilum.terminal import Progress
from hilum.volume import Volume


@dataclass(frozen=True, kw_only=True)
class Names:
    """What identifies the rows of one predictions file."""

    model: str
    contract: str
    features: str
    head: str
    protocol: str


class LabelMaps(Sequence[Volume]):
    """True label maps on the grids of their scans, read when they are asked for."""

    def __init__(self, task: Task, cases: Sequence[Case], reader: CaseReader) -> None:
        self.task, self.cases, self._reader = task, cases, reader

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, number: Any) -> Any:
        return self._reader.truth(self.task, self.cases[number])

    def take(self, rows: Sequence[int]) -> "LabelMaps":
        return LabelMaps(self.task, [self.cases[n] for n in rows], self._reader)


@dataclass(frozen=True, kw_only=True)
class Material:
    """The cases of a task as heads see them, one row each.

    cases, patients  keyed hashes
    targets          as in `Case`; of localisation LPS mm
    truth            of segmentation; no maps else
    contents         hash of the voxels of each: what was encoded, of segmentation the true map, too
    eraser           what is taken out of the vectors (`hilum.bench.run.erasing`); None: nothing
    """

    task: Task
    cases: list[str]
    patients: list[str]
    splits: list[str]
    targets: list[tuple[float, ...]]
    features: CaseFeatures | JoinedFeatures
    truth: "LabelMaps"
    contents: list[str]
    eraser: ConceptEraser | None = None

    def vectors(self, pooling: str) -> NDArray[np.float32]:
        """(N, D), without what is to be erased."""
        found = self.features.vectors(pooling)
        return found if self.eraser is None else self.eraser.transform(found)

    @property
    def hash(self) -> str:
        task = self.task
        asked = [task.id, task.kind, task.metric, task.classes]
        targets = [list(map(str, t)) for t in self.targets]
        return hash_json([asked, self.cases, self.patients, self.splits, targets, self.contents])


def fit_trials(
    material: Material,
    trials: Sequence[Trial],
    names: Names,
    *,
    seeds: int,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
    keep: Callable[[Head], None] | None = None,
) -> pa.Table:
    """Rows of SCHEMA: val and test cases of each trial and head seed. `keep` is given the head of the first trial."""
    if material.task.kind == "retrieval":
        return _retrieve(material, names, seed)
    tables = []
    for done, trial in enumerate(trials, 1):
        head, outputs, rows = _fit(
            material, trial, names, seeds=seeds, seed=seed + 1000 * trial.draw, device=device, progress=progress
        )
        if keep is not None and done == 1:
            keep(head)
        tables.append(_rows(material, trial, names, outputs, rows))
        if progress:
            progress(done, len(trials), f"heads, {material.task.id} {names.head} {names.protocol}")
    return pa.concat_tables(tables)


def _fit(
    material: Material, trial: Trial, names: Names, *, seeds: int, seed: int, device: str, progress: Progress | None
) -> tuple[Head, NDArray[np.float32], NDArray[np.intp]]:
    """The head, (S, N, O) of the val and test rows, and these rows."""
    task = material.task
    known = head_class(names.head)().get_params()
    wanted = {"task": task.kind, "seeds": seeds, "device": device, "num_classes": len(task.classes)}
    options = {name: value for name, value in wanted.items() if name in known}
    head = make_head(names.head, seed=seed, **options)
    head.progress = _saying(f"{names.head} head of {names.model}, {task.id}", progress)
    tokens = names.features == TOKEN_FEATURES
    X: Any = material.features.sequence() if tokens else material.vectors(names.features)
    y = head_targets(material)
    validation = (X[trial.val], _some(y, trial.val)) if len(trial.val) else None
    groups = np.array([material.patients[n] for n in trial.train])
    head.fit(X[trial.train], _some(y, trial.train), groups=groups, validation=validation)
    rows = np.concatenate([trial.val, trial.test])
    outputs = head.outputs(X[rows], _some(y, rows)) if isinstance(head, SegmentationHead) else head.outputs(X[rows])
    if task.kind == "classification":
        outputs = all_classes(outputs, head.classes_, len(task.classes))
    return head, outputs, rows


def _saying(what: str, progress: Progress | None) -> Progress | None:
    """A progress that says what of its own."""
    return None if progress is None else lambda done, total, _: progress(done, total, what)


def head_targets(material: Material) -> Any:
    """y of every case in the form that heads take (`hilum.probe.heads.head`)."""
    if material.task.kind == "segmentation":
        return material.truth
    targets = np.array(material.targets, dtype=np.float64)
    if material.task.kind == "classification":
        return targets[:, 0].astype(np.int64)
    return targets[:, 0] if material.task.kind == "regression" else targets


def _some(y: Any, rows: NDArray[np.intp]) -> Any:
    return y.take(rows.tolist()) if isinstance(y, LabelMaps) else y[rows]


def all_classes(outputs: NDArray[np.float32], classes: NDArray[Any], number: int) -> NDArray[np.float32]:
    """Probabilities (S, N, known) with a column for each of the task's classes: 0 for those that training did not have."""
    if len(classes) == number:
        return outputs
    whole = np.zeros((*outputs.shape[:2], number), np.float32)
    whole[..., classes] = outputs
    return whole


def _rows(
    material: Material, trial: Trial, names: Names, outputs: NDArray[np.float32], rows: NDArray[np.intp]
) -> pa.Table:
    num_seeds, num_rows = outputs.shape[:2]
    columns: dict[str, Any] = _same(material.task, names, num_seeds * num_rows)
    columns |= {
        "draw": [trial.draw] * (num_seeds * num_rows),
        "seed": np.repeat(np.arange(num_seeds), num_rows),
        "split": [material.splits[n] for n in rows] * num_seeds,
        "case": [material.cases[n] for n in rows] * num_seeds,
        "patient": [material.patients[n] for n in rows] * num_seeds,
        "target": [list(material.targets[n]) for n in rows] * num_seeds,
        "output": list(outputs.reshape(num_seeds * num_rows, -1).astype(np.float64)),
    }
    return pa.table(columns, schema=SCHEMA)


def _same(task: Task, names: Names, number: int) -> dict[str, Any]:
    """Columns that are the same in all rows."""
    values = {"task": task.id, "kind": task.kind, **vars(names)}
    return {name: [value] * number for name, value in values.items()}


def _retrieve(material: Material, names: Names, seed: int) -> pa.Table:
    labels = np.array(material.targets)
    rows = [n for n, split in enumerate(material.splits) if split == "test"]
    vectors = material.vectors(names.features)[rows]
    found = recalls(vectors, labels[rows], [material.patients[n] for n in rows], seed=seed)
    columns = _same(material.task, names, len(found)) | {
        "draw": [0] * len(found),
        "seed": [0] * len(found),
        "split": ["test"] * len(found),
        "case": [material.cases[rows[one.row]] for one in found],
        "patient": [material.patients[rows[one.row]] for one in found],
        "target": [[float(one.label)] for one in found],
        "output": [[*one.recall, float(one.negatives)] for one in found],
    }
    return pa.table(columns, schema=SCHEMA)
