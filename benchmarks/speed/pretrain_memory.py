"""Memory of pre-training on a CPU: the peak of a large model's step, and whether a small run grows.

    python benchmarks/speed/pretrain_memory.py peak [--recipe curia2-b] [--batch 8] [--steps 2] >> RESULTS
    python benchmarks/speed/pretrain_memory.py growth [--recipe tiny] [--steps 500] >> RESULTS

`peak` prints the resident memory of the process at its highest, optimiser and data loading included, no checkpoint; the heads
are the recipe's (65,536 prototypes for curia2-b). `growth` reads the resident memory after every step and compares the mean
of the last tenth with that of the first tenth.
"""

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pretrain_step import make_store

from hilum.encode.vit import ViT
from hilum.pretrain.distill import Learner
from hilum.pretrain.loader import Slices
from hilum.pretrain.loop import contract_of, train_step
from hilum.pretrain.optim import make_optimiser
from hilum.pretrain.parallel import Replica
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.records import machine, versions


def steps_of(recipe: Recipe, store_folder: Path) -> Iterator[float]:
    """Train step by step, as the loop does; yields the resident memory (MiB) after each."""
    slices = Slices(make_store(store_folder), recipe, contract_of(recipe))
    torch.manual_seed(0)
    replica = Replica(Learner(recipe), recipe.run)
    optimiser = make_optimiser(replica.learner.student, recipe)
    for step in range(recipe.run.steps):
        train_step(replica, optimiser, [slices[step]], step)
        yield resident_mib()


def resident_mib() -> float:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def growth(resident: list[float]) -> dict[str, float]:
    """Mean resident memory of the first and the last tenth of the steps, in MiB."""
    tenth = max(len(resident) // 10, 1)
    first, last = statistics.mean(resident[:tenth]), statistics.mean(resident[-tenth:])
    return {"first_tenth_mib": round(first, 1), "last_tenth_mib": round(last, 1), "growth_mib": round(last - first, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peak", "growth"])
    parser.add_argument("--recipe")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    peak = given.what == "peak"
    recipe = load_recipe(given.recipe or ("curia2-b" if peak else "tiny"))
    batch_size = given.batch or (8 if peak else recipe.run.batch_size)
    run = replace(recipe.run, steps=given.steps or (2 if peak else 500), batch_size=batch_size, num_workers=0)
    recipe = replace(recipe, run=run)
    with tempfile.TemporaryDirectory() as temporary:
        resident = list(steps_of(recipe, Path(temporary) / "store"))
    line: dict[str, Any] = {"what": f"pre-training memory, {given.what}", "recipe": recipe.name, "steps": run.steps}
    line |= {"batch_size": batch_size, "precision": run.precision}
    line |= {"prototypes": recipe.objective.prototypes} if recipe.objective.kind == "dino" else {}
    line["million_parameters"] = round(sum(p.numel() for p in ViT(recipe.model).parameters()) / 1e6, 1)
    line["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    line |= {} if peak else growth(resident)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    line |= {"commit": git.stdout.strip(), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(line | {"machine": machine(), "versions": versions()}))


if __name__ == "__main__":
    main()
