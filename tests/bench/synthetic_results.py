"""A RESULTS folder as `hilum bench run` writes it, made of drawn predictions whose quality is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hilum.bench.predictions import SCHEMA, write_predictions
from hilum.bench.run.scores import write_scores
from hilum.bench.task import Task
from hilum.records import versions, write_json
from hilum.settings import to_dict

MODELS = ("curia-2", "small vit", "random:small")
SKILL = dict(zip(MODELS, (2.0, 1.2, 0.0)))


def task(name: str, kind: Any, metric: str, classes: Sequence[str] = (), **more: Any) -> Task:
    return Task(
        id=name, title=f"What is {name}", dataset="KiTS23", target="x", kind=kind, unit="slice", modality="CT",
        metric=metric, classes=tuple(classes), label_rule="drawn", split_rule="drawn", our_choice="all of it", **more,
    )  # fmt: skip


ORGANS = ("liver", "spleen", "aorta", "rare <gland>")
TASKS = (
    task("curiabench-2d:O1", "classification", "auroc", ("benign", "malignant"), chance=0.5, published=("2D", "O1")),
    task("curiabench-2d:A1", "classification", "accuracy", ORGANS, published=("2D", "A1")),
    task("toy:labels", "multilabel", "macro_auroc", ("effusion", "nodule")),
    task("toy:age", "regression", "r2"),
    task("toy:survival", "survival", "c_index"),
    task("toy:place", "localisation", "mean_distance_mm"),
    task("toy:organs", "segmentation", "dice", ("left", "right")),
    task("toy:twins", "retrieval", "recall_at_10", ("effusion", "nodule")),
)  # fmt: skip


def draw_targets(task: Task, number: int, rng: np.random.Generator) -> np.ndarray:
    """(N, T) true values of N cases."""
    if task.kind == "classification":
        odds = np.r_[np.full(len(task.classes) - 1, 1.0), 0.3 if len(task.classes) > 2 else 1.0]
        return rng.choice(len(odds), number, p=odds / odds.sum())[:, None].astype(float)
    if task.kind == "multilabel":
        found = rng.integers(0, 2, (number, 2)).astype(float)
        found[rng.random(found.shape) < 0.1] = np.nan
        return found
    if task.kind == "survival":
        return np.column_stack([rng.exponential(500, number).round(), rng.random(number) < 0.6]).astype(float)
    if task.kind == "segmentation":
        return np.column_stack([rng.integers(500, 900, number), rng.integers(0, 2, number) * 300]).astype(float)
    if task.kind == "retrieval":
        return rng.integers(0, 2, (number, 1)).astype(float)
    return rng.normal(50, 15, (number, 3 if task.kind == "localisation" else 1))


def draw_outputs(task: Task, target: np.ndarray, skill: float, rng: np.random.Generator) -> np.ndarray:
    """(N, O) what a head of this skill says; 0 knows nothing."""
    number = len(target)
    if task.kind == "classification":
        logits = rng.normal(size=(number, len(task.classes)))
        logits[np.arange(number), target[:, 0].astype(int)] += skill
        odds = np.exp(logits)
        return odds / odds.sum(1, keepdims=True)
    if task.kind == "multilabel":
        return 1 / (1 + np.exp(-(skill * (2 * np.nan_to_num(target, nan=0.5) - 1) + rng.normal(size=target.shape))))
    if task.kind == "survival":
        return -skill * np.log1p(target[:, :1]) + rng.normal(size=(number, 1))
    if task.kind == "segmentation":
        out = np.zeros((number, 8))
        predicted = np.rint(target * rng.uniform(0.7, 1.3, target.shape))
        out[:, 0::4], out[:, 1::4] = predicted, np.rint(np.minimum(target, predicted) * min(1, 0.4 + skill / 4))
        far = np.where(target > 0, rng.exponential(8 - 2 * skill, target.shape), np.nan)
        out[:, 2::4], out[:, 3::4] = far, far / 3
        return out
    if task.kind == "retrieval":
        return np.c_[np.sort(rng.beta(1 + skill, 4, (number, 3)), axis=1), np.full(number, 99.0)]
    mean = 50 + (target - 50) * skill / (skill + 0.5)
    return mean + rng.normal(0, 6, target.shape)


def write_results(
    folder: Path, tasks: Sequence[Task] = TASKS, *, models: Sequence[str] = MODELS, num_patients: int = 40, seeds: int = 2,
    few_shot: Sequence[str] = ("curiabench-2d:O1",), num_resamples: int = 200,
) -> Path:  # fmt: skip
    """The whole folder: splits are not needed by readers, so none are written."""
    about: dict[str, Any] = {}
    for number, one in enumerate(tasks):
        rng = np.random.default_rng(number)
        cases = 3 * num_patients
        target = draw_targets(one, cases, rng)
        for model in models:
            protocols = ["full"]
            if one.id in few_shot:
                protocols += ["few-shot:1", "few-shot:5", "few-shot:20", "fraction:0.1", "fraction:0.5"]
            for protocol in protocols:
                _write_predictions(folder, one, model, protocol, target, seeds, rng)
        about[one.id] = to_dict(one) | {
            "num_cases": {"train": 5 * cases, "val": cases, "test": cases}, "num_patients": 7 * num_patients,
            "split_hash": "0123456789abcdef", "num_missing": 0,
        }  # fmt: skip
    write_json(folder / "results.json", {
        "format": "hilum-bench-results", "version": 1, "key": "aaaa",
        "settings": {"protocols": ["full"], "seeds": seeds, "num_resamples": num_resamples},
        "models": {m: {"weights": "ab" * 8, "contract": "cd" * 8, "contract_is": {}, "precision": "float32",
                       "random": m.startswith("random")} for m in models},
        "tasks": about, "left_out": [{"task": "toy:age", "model": "x", "cases": 3, "reason": "no_geometry"}],
        "versions": versions(), "machine": {"processor": "p", "num_cores": 2},
    })  # fmt: skip
    write_scores(folder, num_resamples=num_resamples, seed=0)
    return folder


def _write_predictions(
    folder: Path, task: Task, model: str, protocol: str, target: np.ndarray, seeds: int, rng: np.random.Generator
) -> None:
    share = {"few-shot:1": 0.3, "few-shot:5": 0.6, "few-shot:20": 0.9, "fraction:0.1": 0.5, "fraction:0.5": 0.9}
    skill = SKILL[model] * share.get(protocol, 1.0)
    names = {"task": task.id, "kind": task.kind, "model": model, "contract": "cd" * 8, "features": "mean", "head": "linear",
             "protocol": protocol, "split": "test"}  # fmt: skip
    rows = []
    for draw in range(1 if protocol == "full" else 2):
        for seed in range(seeds):
            output = draw_outputs(task, target, skill, rng)
            rows += [
                {**names, "draw": draw, "seed": seed, "case": f"{n:016x}", "patient": f"{n // 3:08x}p", "target": list(t),
                 "output": list(o)}
                for n, (t, o) in enumerate(zip(target, output))
            ]  # fmt: skip
    name = "__".join(
        [
            task.id.replace(":", "-"),
            model.replace(":", "-").replace(" ", "-"),
            "mean-linear",
            protocol.replace(":", "-"),
        ]
    )
    about = {"inputs": name, "classes": list(task.classes), "metric": task.metric, "versions": versions()}
    write_predictions(folder / "predictions" / f"{name}.parquet", pa.Table.from_pylist(rows, schema=SCHEMA), about)
