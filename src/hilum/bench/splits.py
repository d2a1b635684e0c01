"""Who trains and who tests: the publisher's split, a seeded one by patient, or a user's own; on disk as CSV with a hash.

    case,patient,split      keyed hashes and train, val or test, one row a case

Cases of one patient never stand on two sides, whoever made the split.
"""

import csv
import hashlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hilum.archive.privacy import Key
from hilum.bench.task import Case, Split, Task
from hilum.errors import InputError
from hilum.probe.labels import read_labels
from hilum.records import write_text

SPLITS: tuple[Split, ...] = ("train", "val", "test")
HELD_OUT = 0.15  # share of patients for validation, and for test
_COLUMNS = ("case", "patient", "split")


def split_cases(task: Task, cases: Sequence[Case], *, seed: int = 0) -> tuple[Case, ...]:
    """Cases with a split each.

    seed     of what is drawn. The same seed, data set and target give the same sides on both tracks and every machine
    returns  cases in their order; the publisher's split stays. Where it has no validation part, 15/85 of its training
             patients become one; where there is no split at all, patients are dealt 70/15/15. Patients are stratified by class
             (of survival by event) where each has one. Retrieval trains nothing: its cases stay as they are

    InputError when a patient stands on two sides of the publisher's split, or only some cases have a split.
    """
    _check_sides(task, cases)
    given = {case.split for case in cases}
    if "" in given and len(given) > 1:
        raise InputError(f"{task.id}: some cases have an official split and some have none; expected all or none")
    if task.kind == "retrieval" and "" not in given:
        return tuple(cases)
    if given == {""}:
        sides = _deal(task, cases, (("test", HELD_OUT), ("val", HELD_OUT)), seed)
    elif "val" not in given and "train" in given:
        sides = _deal(task, [c for c in cases if c.split == "train"], (("val", HELD_OUT / (1 - HELD_OUT)),), seed)
    else:
        sides = {}
    return tuple(
        replace(case, split=sides[case.patient]) if case.split in ("", "train") and case.patient in sides else case
        for case in cases
    )


def _deal(task: Task, cases: Sequence[Case], parts: Sequence[tuple[Split, float]], seed: int) -> dict[str, Split]:
    """Patient → side: stratum after stratum in hashed order, so that each part has its share of all and, to one, of each; of
    three patients or more of a stratum at least one in each part."""
    stratum = _strata(task, cases)

    def draw(patient: str) -> bytes:
        return hashlib.sha256(f"{seed}|{task.dataset}|{task.target}|{patient}".encode()).digest()

    sides: dict[str, Split] = {}
    dealt: Counter[Split] = Counter()
    for group in sorted(set(stratum.values())):
        members = sorted((p for p, g in stratum.items() if g == group), key=draw)
        size, seen = len(members), len(sides) + len(members)
        for part, share in parts:
            least = max(math.floor(share * size), int(size >= 3))
            number = max(round(share * seen) - dealt[part], least)
            number = min(number, math.ceil(share * size), len(members) - 1)  # the rest is train, and it has one
            sides |= dict.fromkeys(members[:number], part)
            dealt[part] += number
            members = members[number:]
        sides |= dict.fromkeys(members, "train")
    return sides


def _strata(task: Task, cases: Sequence[Case]) -> dict[str, float]:
    """Patient → class, or 0 for all where a patient has several or the task has none."""
    found: dict[str, set[float]] = defaultdict(set)
    for case in cases:
        labelled = {"classification": case.target[:1], "survival": case.target[1:2]}.get(task.kind, ())
        found[case.patient] |= set(labelled)
    if any(len(values) != 1 for values in found.values()):
        return dict.fromkeys(found, 0.0)
    return {patient: next(iter(values)) for patient, values in found.items()}


def _check_sides(task: Task, cases: Sequence[Case]) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        sides[case.patient].add(case.split)
    both = [found for found in sides.values() if len(found) > 1]
    if both:
        where = " and ".join(sorted(side or "no side" for side in both[0]))
        raise InputError(
            f"{task.id}: {len(both)} of {len(sides)} patients stand on two sides of the split (one in {where}); expected "
            "every patient on one. Correct the split, or give your own"
        )


def hash_case(task: Task, case: Case, key: Key) -> str:
    """How a case is named in what we write."""
    return key.hash("item", f"{task.dataset}:{case.id}")


def split_text(task: Task, cases: Sequence[Case], key: Key) -> str:
    """The CSV of a split, rows in order of their hashes."""
    rows = sorted([hash_case(task, case, key), key.hash("patient", case.patient), case.split] for case in cases)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *rows])
    return text.getvalue()


def write_split(path: Path, task: Task, cases: Sequence[Case], key: Key) -> str:
    """Write the CSV, atomically. Returns 16 hex digits of its content."""
    text = split_text(task, cases, key)
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_split(path: Path, task: Task, cases: Sequence[Case], key: Key) -> tuple[Case, ...]:
    """Cases with the split of a file: one that `write_split` wrote, or a user's own.

    path  CSV with a column split (train, val, test) and a column case or patient, as publishers name them or hashed by the
          same key

    InputError when the file is malformed, leaves out a case, names another case, or puts a patient on two sides.
    """
    table = read_labels(path)
    column = next((name for name in ("case", "patient") if name in table.columns), "")
    if not column or "split" not in table.columns:
        raise InputError(f"{path.name} has the columns {', '.join(table.columns)}; expected split, and case or patient")
    sides: dict[str, Split] = {}
    for number, row in enumerate(table.rows, 2):
        side = next((s for s in SPLITS if s == row["split"]), None)
        if side is None or sides.get(row[column], side) != side:
            what = "two sides for one " + column if side else f"split '{row['split']}'"
            raise InputError(f"{path.name}, row {number}: {what}; expected one of train, val, test")
        sides[row[column]] = side
    named = [_names(task, case, column, key) for case in cases]
    found = [next((sides[name] for name in names if name in sides), None) for names in named]
    known = {name for names in named for name in names}
    strangers = sum(name not in known for name in sides)
    if strangers or None in found:
        raise InputError(
            f"{path.name} lacks {found.count(None)} of {len(cases)} cases and names {strangers} that are not here; expected a "
            f"row for each {column} of {task.id}, by the publisher's name or hashed with key {key.fingerprint}"
        )
    done = tuple(replace(case, split=side) for case, side in zip(cases, found) if side)
    _check_sides(task, done)
    return done


def _names(task: Task, case: Case, column: str, key: Key) -> tuple[str, str]:
    if column == "case":
        return case.id, hash_case(task, case, key)
    return case.patient, key.hash("patient", case.patient)
