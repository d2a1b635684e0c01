"""How fast a pre-training step is: data included, step alone, and beside the plain way and a peer in the same run.

    python benchmarks/speed/pretrain_step.py [--repeats 5] [--peer PYTHON] >> benchmarks/results/pretrain_MACHINE_DATE.jsonl
    python benchmarks/speed/pretrain_step.py --recipe tiny
    python benchmarks/speed/pretrain_step.py --recipe curia2-b --batch 128     # on a GPU

Without --recipe it is ViT-S/16 with 2 crops of 256 px and 8 of 112 px, batch 16, DINO + iBOT + KoLeo with 65,536 prototypes
each. The plain way (`plain_step.py`) has the same weights and, without drop path, must give the same loss, which is checked
first. PYTHON is an interpreter that has lightly-train (`lightly_peer.py`). The limit is the rate of a bf16 matrix product,
measured here; `model TFLOP/s` counts the products that the recipe asks for, work skipped by drop path left out.
"""

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import print_lines, take_turns
from plain_step import plain_loss, plain_step

from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct
from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.store import Store, open_for_writing, write_header, write_volume
from hilum.encode.encoder import pick_device
from hilum.pretrain.cost import flops_per_image
from hilum.pretrain.distill import Learner
from hilum.pretrain.loader import Batch, Slices, batches
from hilum.pretrain.loop import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, contract_of, keep_freed_memory, train_step
from hilum.pretrain.optim import make_optimiser
from hilum.pretrain.parallel import Replica
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.settings import override

AGAINST_PEER = [
    "model.size=small",
    "model.num_registers=4",
    "model.drop_path=0.1",
    "views.local_px=112",
    "views.min_image_foreground=0.2",
    "objective.regulariser=koleo",
    "objective.regulariser_weight=0.1",
    "run.batch_size=16",
]


def make_store(root: Path, num_patients: int = 2) -> Store:
    """Phantom CT of 512×512 pixels."""
    header = {"key": "benchmark"}
    open_for_writing(root, header)
    rows = [
        write_volume(root, f"{n:016x}", scan_ct(make_anatomy(sample_patient(n), num_slices=24, matrix=512)))
        for n in range(num_patients)
    ]
    write_index(index_path(root), rows)
    write_header(root, {**header, "status": "complete"})
    return Store(root)


def check_plain(recipe: Recipe, batch: Batch) -> float:
    """Relative difference of the two losses in fp32 without drop path; AssertionError above 1e-4."""
    exact = override(recipe, ["model.drop_path=0", "run.precision=fp32"])
    torch.manual_seed(0)
    learner = Learner(exact).to(batch.globals.device)
    with torch.no_grad():
        ours, plain = float(learner.train()(batch, 1).loss), float(plain_loss(learner, batch, 1))
    assert abs(ours - plain) <= 1e-4 * abs(plain), (ours, plain)
    return abs(ours - plain) / abs(plain)


def peer_rate(python: str, batch_size: int) -> list[float]:
    """Images/s of the peer's steps, from a process of its own."""
    script = Path(__file__).with_name("lightly_peer.py")
    command = [sys.executable, str(script), "--python", python, "--steps", "4", "--batch", str(batch_size)]
    line = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [batch_size / seconds for seconds in line["seconds_a_step"]]


class Stepper:
    """Whole steps of one learner, with data made on the way or given."""

    def __init__(self, slices: Slices, device: torch.device) -> None:
        self.slices, self.device = slices, device
        torch.manual_seed(0)
        self.learner = Learner(slices.recipe).to(device)
        self.replica = Replica(self.learner, slices.recipe.run)
        self.optimiser = make_optimiser(self.learner.student, slices.recipe)
        self.number, self.waited = 0, 0.0

    def plain(self, batch: Batch) -> None:
        """Freed memory goes back to the system as malloc would have it: keeping it is part of our way."""
        libc = ctypes.CDLL(None)
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 128 << 10)
        plain_step(self.learner, self.optimiser, batch, 1)
        keep_freed_memory()

    def step(self, batch: Batch) -> None:
        train_step(self.replica, self.optimiser, [batch], 1)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def fed(self, stream: Iterator[Batch], count: int) -> None:
        for _ in range(count):
            began = time.perf_counter()
            batch = next(stream)
            self.waited += time.perf_counter() - began
            self.step(batch)


def matmul_work(device: torch.device) -> tuple[Any, float]:
    side, times = (2048, 5) if device.type == "cpu" else (8192, 50)
    left = torch.randn(side, side, dtype=torch.bfloat16, device=device)

    def work() -> None:
        for _ in range(times):
            left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work, times * 2 * side**3 / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=2, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = pick_device(given.device)
    recipe = override(load_recipe(given.recipe or "curia2-b"), [] if given.recipe else AGAINST_PEER)
    recipe = override(recipe, [*given.set, *([f"run.batch_size={given.batch}"] if given.batch else [])])
    if device.type == "cpu":
        recipe = replace(recipe, run=replace(recipe.run, num_workers=0))
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        slices = Slices(make_store(Path(temporary) / "store"), recipe, contract_of(recipe))
        with contextlib.closing(batches(slices, 0, device=device)) as stream:
            results, facts = measure(slices, stream, device, given)
    print_lines(results, recipe=given.recipe or "ViT-S/16 2x256+8x112", batch_size=recipe.run.batch_size, **facts)


def measure(
    slices: Slices, stream: Iterator[Batch], device: torch.device, given: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    recipe, num = slices.recipe, slices.recipe.run.batch_size
    ours, batch = Stepper(slices, device), next(stream)
    matmul, matmul_tflop = matmul_work(device)
    tflop = flops_per_image(recipe).total / 1e12
    steps: dict[str, tuple[Any, float]] = {
        "step with data, slices/s": (lambda: ours.fed(stream, given.steps), given.steps * num),
        "step, slices/s": (lambda: ours.step(batch), num),
        "bf16 matmul TFLOP/s": (matmul, matmul_tflop),
    }
    facts: dict[str, Any] = {"device": str(device), "tflop_per_slice": round(tflop, 4)}
    comparable = recipe.objective.kind == "dino" and recipe.objective.regulariser == "koleo"
    if comparable:
        facts["plain_loss_difference"] = check_plain(recipe, batch)
        plain = Stepper(slices, device)
        steps["plain step, slices/s"] = (lambda: plain.plain(batch), num)
    for work, _ in steps.values():
        work()
    ours.waited, began = 0.0, time.perf_counter()
    results = take_turns(steps, given.repeats)
    fed = sum(given.steps * num / rate for rate in results["step with data, slices/s"])
    facts["data_wait_share"] = round(ours.waited / fed, 4)
    facts["seconds"] = round(time.perf_counter() - began)
    results["model TFLOP/s"] = [rate * tflop for rate in results["step with data, slices/s"]]
    pairs = zip(results["model TFLOP/s"], results["bf16 matmul TFLOP/s"])
    results["share of matmul rate"] = [model / peak for model, peak in pairs]
    if comparable:
        results["step / plain"] = [a / b for a, b in zip(results["step, slices/s"], results["plain step, slices/s"])]
    if given.peer:
        results["LightlyTrain, slices/s"] = peer_rate(given.peer, num)
        after = take_turns({"again": steps["step with data, slices/s"]}, 2)["again"]
        slowest_first = sorted(results["LightlyTrain, slices/s"])
        results["step with data / LightlyTrain"] = [rate / slowest_first[len(slowest_first) // 2] for rate in after]
    return results, facts


if __name__ == "__main__":
    main()
