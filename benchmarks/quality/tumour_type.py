"""Tumour type on contrast-enhanced T1 slices (Cheng 2015), one patient fold left out of everything in turn.

    python benchmarks/quality/tumour_type.py SLICES -o OUT [--recipe tiny] [--set a.b=c]

SLICES holds labels.csv (file, label, patient_fold, run) and the images it names. For each fold an encoder is pre-trained on
the slices of the other folds, a linear head is fitted on their features, and both meet the left-out fold for the first time.
The same heads on the untrained network and on raw pixels stand beside it. Intervals resample runs of consecutive slices
(about one series), because the set names no patients. Prints one JSON line per method and writes OUT/predictions.parquet.
"""

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hilum.archive.prepare import prepare
from hilum.encode.table.embed import embed
from hilum.metrics import METRICS
from hilum.pretrain.loop import pretrain
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.probe.fit import probe
from hilum.probe.result import ProbeResult, score_columns
from hilum.records import write_table
from hilum.settings import override
from hilum.stats import bootstrap_interval, paired_difference
from hilum.terminal import Reporter

FOLD = "patient_fold"


def pretrain_without(slices: Path, fold: str, recipe: Recipe, out: Path, progress: Reporter) -> Path:
    """An encoder that never saw the slices of one fold; returns its folder."""
    archive = out / "archive"
    with open(slices / "labels.csv", newline="") as handle:
        for row in csv.DictReader(handle):
            link = archive / row["file"]
            if row[FOLD] != fold and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((slices / row["file"]).resolve())
    prepare(archive, out / "store", progress=progress)
    pretrain(recipe, out / "store", out / "run", progress=progress)
    return out / "run" / "export"


def judge(features: Path, slices: Path, num_components: int | None = None) -> ProbeResult:
    return probe(
        features, slices / "labels.csv", target="label", groups=FOLD, patients="run", num_components=num_components
    )


def rows_of_fold(result: ProbeResult, fold: str) -> tuple[pa.Table, list[str]]:
    """Predictions for one left-out fold, and their clusters."""
    number = next(row["fold"] for row in result.per_fold if row["held_out"] == fold)
    keep = np.flatnonzero(result.predictions["fold"].to_numpy() == number)
    return result.predictions.take(keep), [result.clusters[i] for i in keep]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    recipe = override(load_recipe(given.recipe), given.set)
    with open(given.slices / "labels.csv", newline="") as handle:
        folds = sorted({row[FOLD] for row in csv.DictReader(handle)})
    began = time.monotonic()
    tables: dict[str, list[tuple[pa.Table, list[str]]]] = {}
    with Reporter() as progress:
        for fold in folds:
            home = given.out / f"without-{fold}"
            model = pretrain_without(given.slices, fold, recipe, home, progress)
            methods = {
                "pre-trained": str(model),
                "random initialisation": f"random:{model}",
                "raw pixels, PCA 128": "pixels",
            }
            for method, name in methods.items():
                features = home / f"{method.split()[0]}.parquet"
                embed(given.slices, model=name, out=features, progress=progress)
                result = judge(features, given.slices, 128 if name == "pixels" else None)
                tables.setdefault(method, []).append(rows_of_fold(result, fold))
    report(tables, recipe, given.out, time.monotonic() - began)


def report(tables: dict[str, list[tuple[pa.Table, list[str]]]], recipe: Recipe, out: Path, seconds: float) -> None:
    metric = METRICS["auroc"]
    columns: dict[str, Any] = {}
    merged = []
    for method, parts in tables.items():
        table = pa.concat_tables([t for t, _ in parts])
        clusters = np.array([c for _, part in parts for c in part])
        order = np.argsort(table["item"].to_pylist())
        table, clusters = table.take(order), clusters[order]
        columns[method] = score_columns(table, metric)
        found = bootstrap_interval(metric.function, *columns[method], clusters=clusters)
        line = {"method": method, "macro_auroc": found.value, "low": found.low, "high": found.high}
        if method != "pre-trained":
            difference = paired_difference(metric.function, columns["pre-trained"], columns[method], clusters=clusters)
            line |= {"gain": difference.interval.value, "gain_low": difference.interval.low}
            line |= {"gain_high": difference.interval.high, "p": difference.p_value}
        numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        print(json.dumps(numbers | {"recipe": recipe.name, "cases": len(table), "clusters": found.num_clusters}))
        merged.append(table.append_column("method", pa.array([method] * len(table))))
    write_table(
        out / "predictions.parquet", pa.concat_tables(merged), {"recipe": recipe.hash, "seconds": round(seconds)}
    )


if __name__ == "__main__":
    main()
