"""Curia-2's ablation ladder at the size of a CPU: what each change to DINOv2 does, judged on patients never trained on.

    python benchmarks/quality/ablation.py DATA -o OUT [--steps 300] [--batch 32] [--seeds 0 1 2] [--workers 2]
    python benchmarks/quality/ablation.py DATA -o OUT --report >> benchmarks/results/ablation_MACHINE_DATE.jsonl

DATA holds slices/mr_brain_tumour_cheng (labels.csv) and nifti/ct_head_neck_openkbp (ct/, oar/, cases.csv). Pre-training sees
tumour folds 1 and 2, three quarters of the OpenKBP patients and 20 phantom patients; heads are fitted on features of
these and tested on tumour fold 3, the other OpenKBP patients and 12 other phantom patients.

Rows 0 to 5 take from `ablation/N` what distinguishes it (filters on or off, mask prior, regulariser and its weight, learning
rate relative to the last row's) and everything else from `small`. KoLeo sits on the class token, as DINOv2 has it, SigReg where
`small` has it. "untrained" is the network that the runs start from. Row 6 and "untrained-6" show an encoder twice the pixels,
with interpolated positions; row 7 goes on from row 5 there. "handover" and "lejepa" are beside the ladder. Every row and seed
is a folder of OUT; what is there is not done again, and a killed run goes on from its checkpoint.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ablation_data import DATA_SETS, make_stores

from hilum.encode.encoder import write_encoder
from hilum.encode.table.embed import embed
from hilum.metrics import METRICS
from hilum.pretrain.distill import Learner
from hilum.pretrain.loop import contract_of, pretrain
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch.health import feature_health
from hilum.probe.fit import probe
from hilum.probe.labels import read_features
from hilum.probe.result import score_columns
from hilum.records import machine, read_json, versions, write_json, write_table, write_text
from hilum.settings import override, to_dict
from hilum.stats import bootstrap_interval, paired_difference

_LEJEPA = ["objective.projector_dim=64", "objective.patch_weight=1", "objective.patch_points=32"]
BESIDE = {
    "handover": ["objective.handover=0.5", *_LEJEPA],
    "lejepa": ["objective.kind=lejepa", "objective.hidden=256", *_LEJEPA, "views.mask_probability=1"],
}
ROWS = {
    "pixels": "raw pixels, PCA 128",
    "untrained": "untrained network",
    "0": "DINOv2",
    "1": "+ content-aware crops",
    "2": "− KoLeo",
    "3": "+ SigReg",
    "4": "+ guided masks",
    "5": "+ twice the learning rate",
    "untrained-6": "untrained at twice the pixels",
    "6": "row 5 at twice the pixels",
    "7": "+ fine-tuned there",
    "handover": "row 5, LeJEPA in its first half",
    "lejepa": "row 5, LeJEPA throughout",
}
WIDE = {"5": "6", "untrained": "untrained-6"}  # whose encoder is also shown twice the pixels
BEFORE = {
    "pixels": "untrained",
    "untrained": "untrained",
    "untrained-6": "untrained",
    "0": "untrained",
    "handover": "5",
    "lejepa": "5",
}  # else one lower
NUM_HEALTH_SLICES = 200  # held-out slices of each data set; the rank is at most this
COLLAPSED = 0.25  # of the untrained network's effective rank


@dataclass(frozen=True)
class Task:
    """One question to frozen features; `level` slice or region, `target` a column of the labels or the features."""

    name: str
    data: str
    level: str
    target: str
    task: str
    metric: str


TASKS = (
    Task("tumour type", "tumour", "slice", "label", "classification", "auroc"),
    Task("organ at risk", "openkbp", "region", "region", "classification", "accuracy"),
    Task("phantom organ", "phantom", "region", "region", "classification", "accuracy"),
    Task("phantom height", "phantom", "slice", "slice", "regression", "r2"),
)
MAX_SLICES = {"tumour": None, "openkbp": 10, "phantom": 12}


def row_recipe(row: str, seed: int, steps: int, batch_size: int) -> Recipe:
    """`small`, changed as `ablation/row` changes the ladder's last row."""
    if row in BESIDE:
        return override(replace(row_recipe("5", seed, steps, batch_size), name=f"small-{row}"), BESIDE[row])
    base, step, last = load_recipe("small"), load_recipe(f"ablation/{row}"), load_recipe("ablation/5")
    filters = {
        name: getattr(base.views, name) if getattr(step.views, name) else 0.0
        for name in ("min_image_foreground", "min_crop_foreground")
    }
    koleo = step.objective.regulariser == "koleo"
    return replace(
        base,
        name=f"small-ablation-{row}",
        views=replace(base.views, mask_prior=step.views.mask_prior, **filters),
        objective=replace(
            base.objective,
            regulariser=step.objective.regulariser,
            regulariser_weight=step.objective.regulariser_weight,
            regulariser_on="class_token" if koleo else base.objective.regulariser_on,
        ),
        optimiser=replace(base.optimiser, lr=base.optimiser.lr * step.optimiser.lr / last.optimiser.lr),
        run=replace(
            base.run, steps=steps, batch_size=batch_size, seed=seed, checkpoint_every=40, on_collapse="continue"
        ),
    )


def run_one(out: Path, row: str, seed: int, steps: int, batch_size: int) -> str:
    """Train (if the row trains), embed, probe; what is there is kept."""
    torch.set_num_threads(1)
    home = out / f"row-{row}" / f"seed-{seed}"
    if not (home / "scores.json").exists():
        evaluate(out, home, row, make_model(out, home, row, seed, steps, batch_size))
    if row in WIDE:
        wide = out / f"row-{WIDE[row]}" / f"seed-{seed}"
        if not (wide / "scores.json").exists():
            export = home / ("export" if row == "untrained" else "run/export")
            evaluate(out, wide, WIDE[row], widen(export, wide / "export"))
    return f"row {row} seed {seed}"


def make_model(out: Path, home: Path, row: str, seed: int, steps: int, batch_size: int) -> str:
    """Name of the row's encoder, after training it where the row trains."""
    if row == "pixels":
        return "pixels"
    if row == "untrained":
        recipe = row_recipe("0", seed, steps, batch_size)
        torch.manual_seed(seed)
        facts = {"recipe": "untrained", "step": 0}
        write_encoder(home / "export", Learner(recipe).teacher_backbone(), contract_of(recipe), facts)
        return str(home / "export")
    if row == "7":
        recipe = fine_tuned(row_recipe("5", seed, steps, batch_size), out / "row-5" / f"seed-{seed}" / "run")
    else:
        recipe = row_recipe(row, seed, steps, batch_size)
    pretrain(recipe, out / "stores" / "train", home / "run", device="cpu")
    return str(home / "run" / "export")


def fine_tuned(recipe: Recipe, run: Path) -> Recipe:
    """A fifth of the steps at twice the pixels and a quarter of the learning rate, from a finished run."""
    return replace(
        override(recipe, ["model.image=[256, 256]", "views.global_px=256", "views.local_px=96"]),
        name="small-ablation-7",
        start_from=str(run),
        optimiser=replace(recipe.optimiser, lr=recipe.optimiser.lr / 4),
        run=replace(recipe.run, steps=recipe.run.steps // 5),
    )


def widen(export: Path, to: Path) -> str:
    """The same weights with a contract of twice the side; the encoder interpolates its positions."""
    shutil.copytree(export, to, dirs_exist_ok=True)
    contract = read_json(to / "contract.json")
    write_json(to / "contract.json", contract | {"size_px": 2 * contract["size_px"]})
    return str(to)


def evaluate(out: Path, home: Path, row: str, model: str) -> None:
    """Features, heads, held-out predictions and their scores; scores.json comes last and says that the row is whole."""
    for data in DATA_SETS:
        for level in ("slice", "region"):
            if level == "region" and data == "tumour":
                continue
            embed(
                out / "stores" / data,
                model=model,
                out=home / f"{data}-{level}.parquet",
                level=level,
                masks=out / "tables" / f"{data}-masks.csv" if level == "region" else None,
                max_slices=MAX_SLICES[data] if level == "slice" else None,
                device="cpu",
            )
    lines = [judge(out, home, row, task) for task in TASKS]
    write_json(home / "scores.json", {"scores": lines, "health": held_out_health(out, home), "commit": commit()})


def judge(out: Path, home: Path, row: str, task: Task) -> dict[str, Any]:
    """Fit on the patients of pre-training, predict the held-out ones; keeps their predictions with their patients."""
    result = probe(
        home / f"{task.data}-{task.level}.parquet",
        out / "tables" / f"{task.data}.csv",
        target=task.target,
        groups="split",
        patients="person",
        task=task.task,
        num_components=128 if row == "pixels" else None,
        num_resamples=1,
    )
    fold = next(row["fold"] for row in result.per_fold if row["held_out"] == "test")
    keep = np.flatnonzero(result.predictions["fold"].to_numpy() == fold)
    table = result.predictions.take(keep)
    table = table.append_column("cluster", pa.array([result.clusters[i] for i in keep]))
    table = table.take(np.argsort(table["item"].to_pylist()))
    write_table(home / f"{task.name.replace(' ', '-')}.parquet", table, {"task": task.name})
    metric = METRICS[task.metric]
    found = bootstrap_interval(
        metric.function, *score_columns(table, metric), clusters=np.array(table["cluster"].to_pylist())
    )
    numbers = {"value": found.value, "low": found.low, "high": found.high}
    counts = {"cases": len(table), "clusters": found.num_clusters}
    return {"task": task.name, "metric": task.metric} | {n: round(v, 4) for n, v in numbers.items()} | counts


def held_out_health(out: Path, home: Path) -> dict[str, dict[str, float]]:
    """Effective rank and spread of class tokens on held-out slices of each data set (raw pixels: of the pixels)."""
    found = {}
    for data in DATA_SETS:
        with open(out / "tables" / f"{data}.csv", newline="") as handle:
            held_out = {row["series"] for row in csv.DictReader(handle) if row["split"] == "test"}
        features = read_features(home / f"{data}-slice.parquet")
        index = [i for i, series in enumerate(features.column("series")) if series in held_out]
        index = [index[int(k)] for k in np.linspace(0, len(index) - 1, min(NUM_HEALTH_SLICES, len(index)))]
        vectors = torch.from_numpy(features.vectors[index])
        width = vectors.shape[1] if features.model == "pixels" else vectors.shape[1] // 2  # class token, mean patch
        found[data] = {n: round(v, 3) for n, v in feature_health(vectors[:, :width]).items()}
    return found


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip()


def report(out: Path) -> None:
    """One JSON line a row, seed and task on stdout, then OUT/table.md: rows side by side and each against the one before."""
    facts = read_json(out / "settings.json") | {"report_commit": commit()}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(out.glob("row-*/seed-*/scores.json")):
        row, seed = path.parts[-3].removeprefix("row-"), int(path.parts[-2].removeprefix("seed-"))
        found.setdefault(row, {})[seed] = read_json(path)
        for line in found[row][seed]["scores"]:
            run = {name: found[row][seed][name] for name in ("health", "commit")}
            print(json.dumps(line | {"row": row, "change": ROWS[row], "seed": seed} | facts | run))
    text = [str(facts), ""]
    for task in TASKS:
        text += [f"## {task.name} ({task.metric})", "", *compare_rows(out, found, task), ""]
    text += ["## held-out class tokens", "", *health_rows(found), ""]
    write_text(out / "table.md", "\n".join(text))
    print("\n".join(text), file=sys.stderr)


def compare_rows(out: Path, found: dict[str, dict[int, dict[str, Any]]], task: Task) -> list[str]:
    """Mean over seeds, lowest to highest seed, and mean differences over the seeds that both rows have."""
    lines = []
    for row, change in ROWS.items():
        if row not in found:
            continue
        values = [next(s["value"] for s in run["scores"] if s["task"] == task.name) for run in found[row].values()]
        cells = [row, change, f"{np.mean(values):.3f}", f"{min(values):.3f} to {max(values):.3f}", str(len(values))]
        for other in (BEFORE[row] if row in BEFORE else str(int(row) - 1), start_of(row)):
            seeds = sorted(found[row].keys() & found.get(other, {}).keys())
            cells.append(difference_text(out, row, other, seeds, task) if seeds and row != other else "")
        lines.append(cells)
    header = ["row", "change", "mean", "lowest to highest seed", "seeds", "minus the row before", "minus untrained"]
    return markdown(header, lines)


def start_of(row: str) -> str:
    """The untrained network, shown as many pixels as the row."""
    return "untrained-6" if row in ("6", "7") else "untrained"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def difference_text(out: Path, row: str, before: str, seeds: Sequence[int], task: Task) -> str:
    """Mean over seeds of the paired difference; patients are resampled, each with its cases under every seed."""
    metric = METRICS[task.metric]
    sides, clusters = [], np.array([])
    for name in (row, before):
        tables = [
            pq.read_table(out / f"row-{name}" / f"seed-{seed}" / f"{task.name.replace(' ', '-')}.parquet")
            for seed in seeds
        ]
        columns = [score_columns(table, metric) for table in tables]
        sides.append((columns[0][0], np.stack([predicted for _, predicted in columns], 1)))
        clusters = np.array(tables[0]["cluster"].to_pylist())
    if not np.array_equal(sides[0][0], sides[1][0]):
        raise ValueError(f"rows {row} and {before} were judged on different cases of {task.name}; run them anew")

    def mean_over_seeds(y_true: Any, predicted_NS: Any) -> float:
        return float(np.mean([metric.function(y_true, predicted_NS[:, s]) for s in range(predicted_NS.shape[1])]))

    found = paired_difference(mean_over_seeds, *sides, clusters=clusters)
    interval = found.interval
    return f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f}), p {found.p_value:.3f}"


def health_rows(found: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Effective rank and spread, mean over seeds, for each data set; collapsed when the rank fell below a quarter."""
    lines = []
    means = {
        row: {
            d: {n: np.mean([r["health"][d][n] for r in runs.values()]) for n in ("rank", "spread")} for d in DATA_SETS
        }
        for row, runs in found.items()
    }
    for row, change in ROWS.items():
        if row not in means:
            continue
        start = means.get(start_of(row), {})
        fallen = [d for d in DATA_SETS if start and means[row][d]["rank"] < COLLAPSED * start[d]["rank"]]
        cells = [f"{means[row][d]['rank']:.1f} / {means[row][d]['spread']:.3f}" for d in DATA_SETS]
        lines.append([row, change, *cells, ", ".join(fallen) or "no"])
    return markdown(["row", "change", *[f"{d}: rank / spread" for d in DATA_SETS], "collapsed"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=["0", "1", "2", "3", "4", "5", "untrained", "pixels"])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    given = parser.parse_args()
    if given.report:
        return report(given.out)
    make_stores(given.data, given.out)
    settings, path = {"steps": given.steps, "batch_size": given.batch}, given.out / "settings.json"
    if not path.exists():
        write_json(path, settings | {"machine": machine(), "versions": versions()})
    if (found := {name: read_json(path)[name] for name in settings}) != settings:
        parser.error(f"{given.out} holds runs with {found}, not {settings}; choose another folder")
    write_json(
        given.out / "recipes.json",
        {row: to_dict(row_recipe(row, 0, given.steps, given.batch)) for row in given.rows if row.isdigit()},
    )
    jobs = [(row, seed) for seed in given.seeds for row in given.rows if row != "pixels" or seed == given.seeds[0]]
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_one, given.out, row, seed, given.steps, given.batch) for row, seed in jobs]
        for done, future in enumerate(as_completed(running), 1):
            print(f"{done} of {len(jobs)}: {future.result()}", file=sys.stderr, flush=True)
    report(given.out)


if __name__ == "__main__":
    main()
