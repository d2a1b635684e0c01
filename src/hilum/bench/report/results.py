"""The RESULTS folder of `hilum bench run`, read: what was asked of whom, and the score of every predictions file."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from hilum.bench.judge.scoring import ClassScore, Score
from hilum.bench.predictions import read_predictions
from hilum.bench.task import Task
from hilum.errors import InputError
from hilum.records import read_json, read_table
from hilum.settings import from_dict

FORMAT = "hilum-bench-results"
FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One predictions file and its score.

    method  names the model in tables, with features and head where a model has several
    """

    path: Path
    task: str
    kind: str
    model: str
    contract: str
    features: str
    head: str
    protocol: str
    method: str
    score: Score

    def predictions(self) -> pa.Table:
        return read_predictions(self.path)


@dataclass(frozen=True)
class Results:
    """A whole folder: its results.json, the tasks as they were when it was made, all scores."""

    folder: Path
    record: dict[str, Any]
    tasks: Mapping[str, Task]
    entries: tuple[Entry, ...]

    def of(self, task: str, protocol: str = FULL) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.task == task and e.protocol == protocol)

    def of_suite(self, suite: str, protocol: str = FULL) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if self.tasks[e.task].suite == suite and e.protocol == protocol)


def read_results(folder: Path) -> Results:
    """InputError when the folder is none of `hilum bench run`, or nothing in it has a score yet."""
    if not (folder / "results.json").is_file():
        raise InputError(f"{folder} has no results.json; expected a folder that hilum bench run has written")
    record = read_json(folder / "results.json")
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != 1:
        raise InputError(f"{folder}/results.json is no {FORMAT} of version 1; make the folder with hilum bench run")
    if not (folder / "scores.parquet").is_file():
        raise InputError(f"{folder} has no scores yet; let hilum bench run finish: the same command goes on")
    known = {field.name for field in fields(Task)}
    tasks = {
        name: from_dict(Task, {k: v for k, v in found.items() if k in known}, f"{folder}/results.json")
        for name, found in record["tasks"].items()
    }
    rows = read_table(folder / "scores.parquet").to_pylist()
    entries = [_entry(folder, row) for row in rows]
    unknown = sorted({e.task for e in entries} - set(tasks))
    if not entries or unknown:
        what = f"tasks that its results.json lacks: {', '.join(unknown)}" if unknown else "no score"
        raise InputError(f"{folder}/scores.parquet holds {what}; run the same hilum bench run again")
    return Results(folder, record, tasks, tuple(_name_methods(entries)))


def _entry(folder: Path, row: dict[str, Any]) -> Entry:
    score = {field.name: row[field.name] for field in fields(Score)}
    score["per_class"] = tuple(ClassScore(**c) for c in score["per_class"] or ())
    score["se"] = {name: value for name, value in (score["se"] or {}).items() if value is not None}
    score["notes"] = tuple(score["notes"] or ())
    names = {n: row[n] for n in ("task", "kind", "model", "contract", "features", "head", "protocol")}
    return Entry(path=folder / "predictions" / row["file"], method=row["model"], score=Score(**score), **names)


def _name_methods(entries: list[Entry]) -> list[Entry]:
    """A model that was asked with one head and one kind of features a task goes by its own name."""
    ways: dict[tuple[str, str, str], set[tuple[str, str]]] = defaultdict(set)
    for e in entries:
        ways[e.model, e.task, e.protocol].add((e.features, e.head))
    several = {model for (model, _, _), found in ways.items() if len(found) > 1}
    return [replace(e, method=f"{e.model} · {e.features} · {e.head}") if e.model in several else e for e in entries]
