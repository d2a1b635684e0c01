"""The whole story on a phantom archive, told with the public functions: what a user does, in the order they do it."""

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

from hilum.archive.ledger import count, write_ledger
from hilum.archive.phantom import write_phantom
from hilum.archive.prepare import prepare
from hilum.archive.privacy import Key, read_key
from hilum.archive.scan import scan
from hilum.demo_report import Task, write_report
from hilum.encode.table.embed import embed
from hilum.pretrain.loop import pretrain
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.probe.fit import probe
from hilum.probe.result import ProbeResult, compare
from hilum.records import hash_json, machine, versions, write_json, write_text
from hilum.settings import override, to_dict
from hilum.terminal import Progress

NUM_PATIENTS, NUM_SLICES, MATRIX = 40, 40, 192


TASKS = (
    Task("organ", "Which organ is this? One slice and its mask.", "region", "region", "classification", "accuracy"),
    Task("level", "How high in the body is this slice?", "slice", "slice", "regression", "r2"),
)

# name in the report → (model argument, principal components kept)
METHODS = {
    "pre-trained": ("{run}/export", None),
    "random initialisation": ("random:{run}/export", None),
    "raw pixels, PCA": ("pixels", 128),
}


def demo(
    out: str | Path = "demo",
    *,
    seed: int = 0,
    num_patients: int = NUM_PATIENTS,
    num_slices: int = NUM_SLICES,
    matrix: int = MATRIX,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Phantom archive → ledger → store → pre-training → features → probes → `report.html`.

    out      folder for everything; the same call goes on where an earlier one stopped
    recipe   other than the preset "tiny"
    returns  scores by task and method, seconds of each stage
    """
    out, began, seconds = Path(out), time.monotonic(), {}
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe or override(load_recipe("tiny"), [f"run.seed={seed}"])
    key = _demo_key(out)

    def timed(stage: str, since: float) -> float:
        seconds[stage] = round(time.monotonic() - since, 1)
        return time.monotonic()

    archive = _phantom(out, num_patients, num_slices, matrix, seed, progress)
    now = timed("phantom", began)
    entries = scan(archive / "scans", key, progress=progress)
    write_ledger(out / "ledger.parquet", entries, archive_root=archive / "scans")
    now = timed("scan", now)
    prepare(archive / "scans", out / "store", key=key, progress=progress)
    now = timed("prepare", now)
    pretrain(recipe, out / "store", out / "run", device="cpu", progress=progress)
    now = timed("pre-train", now)
    _embed_all(out, archive, key, seed, progress)
    now = timed("embed", now)
    results = _probe_all(out, key, seed, progress)
    now = timed("probe", now)
    scores = _scores(results)
    record = {
        "scores": scores,
        "seconds": seconds,
        "recipe": to_dict(recipe),
        "versions": versions(),
        "machine": machine(),
    }
    write_report(out / "report.html", out, archive, key, entries, recipe, TASKS, scores, record)
    timed("report", now)
    seconds["total"] = round(time.monotonic() - began, 1)
    write_json(out / "demo.json", record)
    return {**record, "ledger": count(entries), "seconds": seconds["total"], "stages": seconds}


def _demo_key(out: Path) -> Key:
    """A key of the demo's own: phantoms are no patients, and equal demos should give equal numbers."""
    path = out / "key"
    if not path.exists():
        write_text(path, hashlib.sha256(b"hilum demo").hexdigest() + "\n")
    return read_key(path)


def _phantom(out: Path, num_patients: int, num_slices: int, matrix: int, seed: int, progress: Progress | None) -> Path:
    """The archive; begun again when an earlier call was stopped before its record was written or asked for another."""
    archive, record = out / "phantom", out / "phantom.json"
    wanted = hash_json([num_patients, num_slices, matrix, seed])
    if record.exists() and record.read_text().strip() == wanted:
        return archive
    shutil.rmtree(archive, ignore_errors=True)
    write_phantom(
        archive, num_patients=num_patients, num_slices=num_slices, matrix=matrix, seed=seed, progress=progress
    )
    write_text(record, wanted + "\n")
    return archive


def _embed_all(out: Path, archive: Path, key: Key, seed: int, progress: Progress | None) -> None:
    for method, (model, _) in METHODS.items():
        for level in sorted({task.level for task in TASKS}):
            embed(
                out / "store",
                model=model.format(run=out / "run"),
                out=out / "features" / f"{_first_word(method)}-{level}.parquet",
                level=level,
                masks=archive / "series.csv" if level == "region" else None,
                max_slices=12 if level == "slice" else None,
                seed=seed,
                key=key,
                progress=progress,
            )


def _first_word(method: str) -> str:
    """What names a method in file names: pre-trained, random, raw."""
    return method.split()[0]


def _probe_all(out: Path, key: Key, seed: int, progress: Progress | None) -> dict[str, dict[str, ProbeResult]]:
    """Every task with every method: five folds of patients, linear head."""
    results: dict[str, dict[str, ProbeResult]] = {}
    for task in TASKS:
        for method, (_, num_components) in METHODS.items():
            results.setdefault(task.name, {})[method] = probe(
                out / "features" / f"{_first_word(method)}-{task.level}.parquet",
                None,
                target=task.target,
                task=task.task,
                num_components=num_components,
                seed=seed,
                output=out / "predictions" / f"{task.name}-{_first_word(method)}.parquet",
                key=key,
                progress=progress,
            )
    return results


def _scores(results: dict[str, dict[str, ProbeResult]]) -> dict[str, Any]:
    """Plain numbers: value and interval of each method, and the paired difference of the first to each other one."""
    scores: dict[str, Any] = {}
    for task in TASKS:
        found = results[task.name]
        values = {method: result.to_dict()["scores"][task.metric] for method, result in found.items()}
        differences = {}
        first, *others = found
        for other in others:
            pairs = compare([found[first], found[other]])
            differences[other] = next(c.to_dict() for c in pairs if c.metric == task.metric)
        num_cases = found[first].predictions.num_rows
        scores[task.name] = {
            "metric": task.metric,
            "num_cases": num_cases,
            "methods": values,
            "differences": differences,
        }
    return scores
