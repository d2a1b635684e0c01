"""Regions of volumes: each scan encoded once for all of them, beside once for each (what the benchmark did before).

    python benchmarks/speed/volume_regions.py --data DATA [--task FILE.toml] [--size 192x6x3-mlp768] [--scans 4] >> RESULTS

DATA is what `hilum bench run --data` takes; without a task of one's own it is the organs of the phantom. The encoder has random
weights: which they are changes no time. The two take turns, each with an empty folder of features.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import print_lines, take_turns

from hilum.bench.run.features import FeatureCache
from hilum.bench.run.suites import choose_tasks, open_task
from hilum.bench.task import Case, Task
from hilum.encode.encoder import Encoder
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract


def together(encoder: Encoder, task: Task, cases: Sequence[Case]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        FeatureCache(Path(folder), encoder).features(task, cases)


def apart(encoder: Encoder, task: Task, cases: Sequence[Case]) -> None:
    """Asked case by case; the scan itself stays in memory between its cases, as before."""
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), encoder)
        for case in cases:
            cache.features(task, [case])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="phantom:organ")
    parser.add_argument("--size", default="192x6x3-mlp768")
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--scans", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    patch = (given.patch,) * 3
    config = ViTConfig(size=given.size, patch=patch, image=tuple(8 * p for p in patch), positions="rotary")
    encoder = Encoder(ViT(config), VolumeContract(patch=patch, background_px=0), "random", patch=patch)
    task, found = open_task(choose_tasks(ids=[given.task])[0], given.data)
    scans = list(dict.fromkeys(case.scan for case in found.cases))[: given.scans]
    cases = [case for case in found.cases if case.scan in scans]
    ways = {"together": together, "one by one": apart}
    turns = {
        f"regions/s, {name}": (lambda work=work: work(encoder, task, cases), float(len(cases)))
        for name, work in ways.items()
    }
    results = take_turns(turns, given.repeats)  # type: ignore[arg-type]
    pairs = zip(results["regions/s, together"], results["regions/s, one by one"])
    results["times faster together"] = [ours / theirs for ours, theirs in pairs]
    print_lines(results, task=task.id, scans=len(scans), regions=len(cases), size=given.size, patch=given.patch)


if __name__ == "__main__":
    main()
