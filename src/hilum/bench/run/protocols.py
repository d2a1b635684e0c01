"""Protocols: which cases of a task a head learns from, chooses by, and is judged on.

    full             all train cases; val cases choose settings
    few-shot:K       K cases a class, several draws; settings are chosen by min(K, 4) val cases a class, so that few means few
    fraction:F       a share F of the train patients, several draws; val as in full
    curia            as full, by the head of Curia's public trainer on features of one kind
    chunked:N        as full, by an encoder of volumes that sees at most N patches at once: what blocks cost beside the whole
    erased[:A+B]     as full, on features without the linear traces of these nuisances, or of all that are known
    tokens           class token, mean of patch tokens, and attention over patch tokens beside one another

Test cases are always all of the task's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.bench.task import Case, Found, Task
from hilum.errors import UsageError
from hilum.probe.heads import head_class
from hilum.probe.sampling import draw_few, draw_share
from hilum.terminal import few

FEW_SHOT = ("few-shot:1", "few-shot:5", "few-shot:10", "few-shot:20")
FRACTIONS = ("fraction:0.05", "fraction:0.1", "fraction:0.25", "fraction:0.5")
CURVES = {"few-shot": FEW_SHOT, "fraction": FRACTIONS, "chunked": ("chunked:512",)}
MAX_VAL_SHOTS = 4
TOKEN_FEATURES = "patches"  # what a head on patch tokens sees, in the column features

# Heads of a kind of task: (features, head). "" for features: what the contract and the unit say.
DEFAULT_HEADS: dict[str, tuple[tuple[str, str], ...]] = {
    "classification": (("", "linear"),),
    "multilabel": (("", "linear"),),
    "regression": (("", "linear"),),
    "survival": (("", "cox"),),
    "localisation": ((TOKEN_FEATURES, "localisation"),),
    "segmentation": ((TOKEN_FEATURES, "segmentation"),),
    "retrieval": (("", "cosine"),),
}

_OF_VECTORS = ("classification", "regression", "multilabel", "survival")
_KINDS: dict[str, tuple[str, ...]] = {  # of tasks; protocols that are not here have all but retrieval
    "full": tuple(DEFAULT_HEADS),
    "few-shot": ("classification",),
    "curia": ("classification", "regression"),
    "tokens": _OF_VECTORS,
    "erased": (*_OF_VECTORS, "retrieval"),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fit: row numbers of the cases. `draw` counts from 0."""

    draw: int
    train: NDArray[np.intp]
    val: NDArray[np.intp]
    test: NDArray[np.intp]


def expand_protocols(names: Sequence[str]) -> tuple[str, ...]:
    """Protocols by name; a curve stands for its points. UsageError for an unknown one."""
    found = [point for name in names for point in CURVES.get(name, (name,))]
    for name in found:
        if name not in ("full", "curia", "tokens") and erased_names(name) is None and not _is_point(name):
            raise UsageError(
                f"protocol '{name}' is unknown; expected full, few-shot or few-shot:K, fraction or fraction:F (a share "
                "such as fraction:0.25), chunked or chunked:N, curia, tokens, erased or erased:NUISANCE+NUISANCE"
            )
    return tuple(dict.fromkeys(found))


def _is_point(name: str) -> bool:
    kind, _, number = name.partition(":")
    try:
        whole = kind in ("few-shot", "chunked")
        return int(number) > 0 if whole else kind == "fraction" and 0 < float(number) <= 1
    except ValueError:
        return False


def erased_names(protocol: str) -> tuple[str, ...] | None:
    """Of the protocol erased:A+B; () for all that are known; None of other protocols."""
    kind, mark, names = protocol.partition(":")
    if kind != "erased" or (mark and not all(names.split("+"))):
        return None
    return tuple(names.split("+")) if mark else ()


def patches_at_once(protocol: str) -> int | None:
    """Of the protocol chunked:N; None of others."""
    kind, _, number = protocol.partition(":")
    return int(number) if kind == "chunked" else None


def kinds_of(protocol: str) -> tuple[str, ...]:
    """Kinds of tasks for which a protocol has a meaning."""
    usual = tuple(kind for kind in DEFAULT_HEADS if kind != "retrieval")
    return _KINDS.get(protocol.partition(":")[0], usual)


def why_none(protocols: Sequence[str], task: Task) -> str:
    """Why none of these protocols is fitted on a task; "" where one is."""
    if any(task.kind in kinds_of(name) for name in protocols):
        return ""
    return f"{'; '.join(f'{name} is for {few(kinds_of(name))}' for name in protocols)}; this task is {task.kind}"


def heads_of(protocol: str, task: Task, chosen: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
    """(features, head) pairs that a protocol fits on a task; `chosen` heads stand in for the usual ones."""
    if protocol == "curia":
        return (("mean" if task.unit == "region" else "class", "linear-sgd"),)
    if protocol == "tokens":
        usual = DEFAULT_HEADS[task.kind][0][1]
        return (("class", usual), ("mean", usual), (TOKEN_FEATURES, "attention"))
    if chosen and task.kind in ("classification", "multilabel", "regression", "survival"):
        return tuple((TOKEN_FEATURES if head_class(name).sees == "tokens" else "", name) for name in chosen)
    return DEFAULT_HEADS[task.kind]


def make_trials(
    protocol: str,
    kind: str,
    splits: Sequence[str],
    targets: Sequence[Sequence[float]],
    patients: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> list[Trial]:
    """The fits of a protocol.

    splits    of each case: train, val, test
    UsageError when a part is empty, LabelsError when a class has fewer than K cases.
    """
    part = {name: np.flatnonzero(np.array([s == name for s in splits])) for name in ("train", "val", "test")}
    empty = [name for name in ("train", "test") if not len(part[name])]
    if empty and kind != "retrieval":
        raise UsageError(f"no case is in the part {' and '.join(empty)}; expected some in train and test")
    name, _, number = protocol.partition(":")
    rest = {"val": part["val"], "test": part["test"]}
    owners = np.array(patients)[part["train"]]
    if name == "few-shot":
        labels, k = np.array([target[0] for target in targets]), int(number)
        drawn = draw_few(labels[part["train"]], k, groups=owners, num_draws=draws, seed=seed)
        return [
            Trial(
                draw=d, train=part["train"][rows], test=part["test"],
                val=_shots(part["val"], labels, min(k, MAX_VAL_SHOTS), [seed, d]),
            )
            for d, (rows, _) in enumerate(drawn)
        ]  # fmt: skip
    if name == "fraction":
        shares = [draw_share(owners, float(number), seed=seed + d) for d in range(draws)]
        return [Trial(draw=d, train=part["train"][rows], **rest) for d, rows in enumerate(shares)]
    return [Trial(draw=0, train=part["train"], **rest)]


def _shots(rows: NDArray[np.intp], labels: NDArray[Any], k: int, seed: list[int]) -> NDArray[np.intp]:
    """k rows of each class, all of a class that has fewer."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels[rows]):
        of = rng.permutation(rows[labels[rows] == label])
        chosen.append(of[:k])
    return np.sort(np.concatenate(chosen)) if chosen else rows[:0]


def cross_tasks(train: Task, train_found: Found, test: Task, test_found: Found) -> tuple[Task, Found]:
    """The task "learn on one modality, be asked on the other": train and val cases of the first, test cases of the second.

    Classes are those that both tasks name, in the order of the first. Patients of both keep to their side: a test patient who
    also stands in train or val of the first task is left out of these.
    """
    both = tuple(name for name in train.classes if name in test.classes)
    if len(both) < 2:
        raise UsageError(f"{train.id} and {test.id} share {len(both)} classes; expected at least two")
    held = {case.patient for case in test_found.cases if case.split == "test"}
    cases = _renamed(train_found, train, both, lambda c: c.split != "test" and c.patient not in held, "learn/")
    cases += _renamed(test_found, test, both, lambda c: c.split == "test", "ask/")
    task = replace(
        train, id=f"{train.id}-to-{test.id.partition(':')[2]}", title=f"{train.title}, asked of {test.title}", classes=both,
        modality=", ".join(dict.fromkeys((train.modality, test.modality))), chance=1 / len(both), published=None,
    )  # fmt: skip
    return task, Found(cases=tuple(cases), problems=(*train_found.problems, *test_found.problems))


def _renamed(found: Found, task: Task, classes: tuple[str, ...], keep: Any, prefix: str) -> list[Case]:
    number = {float(task.classes.index(name)): float(n) for n, name in enumerate(classes)}
    return [
        replace(case, id=prefix + case.id, target=(number[case.target[0]],))
        for case in found.cases
        if case.target[0] in number and keep(case)
    ]
