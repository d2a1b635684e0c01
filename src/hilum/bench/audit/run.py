"""`hilum bench audit` as a function: tasks, their data, and if wanted a pre-training store and an encoder; findings out."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hilum.archive.privacy import Key, read_key
from hilum.archive.store.store import Store
from hilum.bench.audit.find import NEIGHBOURS, Finding, check_copies, check_features, check_labels, find_leaks
from hilum.bench.audit.images import Images, add_cases, add_store
from hilum.bench.audit.vectors import can_judge
from hilum.bench.run.features import FeatureCache
from hilum.bench.run.scans import CaseReader
from hilum.bench.run.suites import Asked, open_task
from hilum.bench.splits import hash_case
from hilum.bench.task import Case, Task
from hilum.encode.zoo import load_encoder
from hilum.errors import InputError, UsageError
from hilum.terminal import Progress, format_table, wrap_row


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found.

    slices   looked at; nearly blank ones are compared by their pixels only
    refused  cases whose scan could not be read
    notes    what could not be checked
    """

    findings: tuple[Finding, ...]
    slices: int
    refused: int
    notes: tuple[str, ...]

    @property
    def leaks(self) -> bool:
        return any(f.leak for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"leaks": self.leaks}

    def text(self) -> str:
        """At most 100 columns: who (keyed hashes), where, how many, and what to do."""
        lines = [
            f"looked at {self.slices:,} slices" + (f"; {self.refused:,} cases cannot be read" if self.refused else "")
        ]
        if not self.findings:
            lines.append("nothing found: no patient, scan or slice on two sides, nothing that looks like a copy")
        else:
            rows = [[f.task, f.kind, f.where, f"{f.affected:,} of {f.of:,}"] for f in self.findings]
            lines.append(format_table(["task", "found", "where", "cases"], rows))
            for kind in dict.fromkeys(f.kind for f in self.findings):
                some = [f for f in self.findings if f.kind == kind]
                lines += ["", wrap_row([], [], f"{kind}: {some[0].advice}")]
                lines += [f"  {example}" for f in some for example in f.examples]
        return "\n".join([*lines, *(wrap_row([], [], f"note: {note}") for note in self.notes)])


def audit(
    tasks: Sequence[Asked],
    data: str | Path,
    *,
    store: str | Path | None = None,
    model: str | None = None,
    features: str | Path | None = None,
    seed: int = 0,
    key: Key | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Look for what train, val and test cases share with each other and with a pre-training store.

    data      folder of the data sets
    store     that the encoder was pre-trained on, made with the same key
    model     an encoder, by which copies are sought and features and labels are checked too; `features` is a folder that keeps
              its vectors, such as RESULTS/features; without it they are not kept

    seed      of splits that no publisher made, as in `hilum bench run`

    InputError when a task has no case in the folder.
    """
    key = key or read_key()
    reader = CaseReader()
    asked = [_read(one, Path(data), seed, progress) for one in tasks]
    encoder = None if model is None else load_encoder(model)
    found: list[Finding] = []
    notes: list[str] = []
    slices = refused = 0
    with Images() as stored:
        if store is not None:
            opened = Store(store)
            single = any(case.slices for _, cases in asked for case in cases)
            add_store(stored, opened, every_slice=single, progress=progress)
            slices += len(stored.slices)
            if opened.header.get("key") != key.fingerprint:
                notes.append("the store was made with another key: its patients cannot be recognised, only its pixels")
        for task, cases in asked:
            with Images() as images:
                add_cases(images, task, cases, reader, key, progress)
                found += find_leaks(images, task.id, stored, progress)
                slices, refused = slices + len(images.slices), refused + images.refused
            if encoder is not None:
                with nullcontext(features) if features is not None else TemporaryDirectory() as folder:
                    cache = FeatureCache(Path(folder), encoder, reader=reader)
                    more, said = _check_encoder(task, cases, cache, key, progress)
                    found, notes = found + more, notes + said
    return Audit(findings=tuple(found), slices=slices, refused=refused, notes=tuple(notes))


def _read(asked: Asked, data: Path, seed: int, progress: Progress | None) -> tuple[Task, tuple[Case, ...]]:
    task, found = open_task(asked, data, seed=seed, progress=progress)
    if not found.cases:
        name = asked if isinstance(asked, Path) else task.id
        raise InputError(f"{task.id} has no case in this folder; see what is missing: hilum bench check {name}")
    return task, found.cases


def _check_encoder(
    task: Task, cases: Sequence[Case], cache: FeatureCache, key: Key, progress: Progress | None
) -> tuple[list[Finding], list[str]]:
    """Copies by the features of all cases; features and labels of the training cases. And what could not be checked."""
    found: list[Finding] = []
    try:
        rows = cache.features(task, cases, progress=progress)
    except UsageError as error:  # an encoder of volumes, a task of slices: the other checks stand
        return found, [f"{task.id}: {error}"]
    refused = Counter(reason for reason in rows.reasons if reason)
    notes = [
        f"{task.id}: {cache.encoder.name} refuses {number:,} cases: {reason}" for reason, number in refused.items()
    ]
    kept = [n for n, reason in enumerate(rows.reasons) if not reason]
    if not kept:
        return found, notes
    vectors, cases = rows.take(kept).vectors("mean"), [cases[n] for n in kept]
    patients, sides = [case.patient for case in cases], [str(case.split) for case in cases]
    if np.isfinite(vectors).all():
        owners = [hash_case(task, case, key) for case in cases]
        found += check_copies(task.id, vectors, sides, owners, patients)
        for side in ("train", "val"):
            own = [patient for patient, where in zip(patients, sides) if where == side]
            if own and not can_judge(own):
                notes.append(f"{task.id}: too few {side} cases ({len(own)}) to know copies of them by features")
    else:
        notes.append(f"{task.id}: features that are not finite; copies are not sought by them")
    train = [n for n, side in enumerate(sides) if side == "train"]
    if not train or task.kind in ("segmentation", "localisation"):
        return found, notes
    targets = np.array([cases[n].target for n in train], float)
    found += check_features(task.id, vectors[train])
    trained = [patients[n] for n in train]
    if len(set(trained)) <= NEIGHBOURS:
        notes.append(f"{task.id}: {len(set(trained))} training patients are too few to check labels")
    return found + check_labels(task.id, task.kind, vectors[train], targets, trained), notes
