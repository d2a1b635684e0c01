"""How fast a pre-training step is: data alone, step alone, and against the plain way in the same run.

    python benchmarks/speed/pretrain_step.py [--recipe tiny] [--repeats 5] >> benchmarks/results/pretrain_MACHINE_DATE.jsonl

The plain way is the same model with one forward pass per crop size and torch's default attention kernel. The limit is the
rate of a bf16 matrix product on this machine, measured here: `model GFLOP/s` over `matmul GFLOP/s` is the utilisation.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from measure import print_lines, take_turns

from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct
from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.store import Store, open_for_writing, write_header, write_volume
from hilum.encode import vit
from hilum.pretrain.distill import Learner
from hilum.pretrain.loader import Batch, Slices
from hilum.pretrain.loop import contract_of, train_step
from hilum.pretrain.optim import make_optimiser
from hilum.pretrain.parallel import Replica
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe


def make_store(root: Path, num_patients: int = 2) -> Store:
    header = {"key": "benchmark"}
    open_for_writing(root, header)
    rows = [write_volume(root, f"{n:016x}", scan_ct(make_anatomy(sample_patient(n)))) for n in range(num_patients)]
    write_index(index_path(root), rows)
    write_header(root, {**header, "status": "complete"})
    return Store(root)


def model_gflop(recipe: Recipe) -> float:
    """Matrix products of one slice: student forward and backward (3×), heads left out; 2 per multiply-add."""
    width, depth, _, kind, hidden = vit.SIZES[recipe.model.size]
    block = 4 * width * width + (3 if kind == "swiglu" else 2) * width * hidden
    total = 0.0
    for count, px in (
        (recipe.views.num_global, recipe.views.global_px),
        (recipe.views.num_local, recipe.views.local_px),
    ):
        patches = (px // recipe.model.patch[0]) ** 2
        tokens = patches + 1 + recipe.model.num_registers
        total += count * (
            depth * (2 * block * tokens + 4 * tokens**2 * width) + 2 * patches * recipe.model.patch[0] ** 2 * width
        )
    return 3 * total / 1e9


@contextlib.contextmanager
def plain_way() -> Iterator[None]:
    """One forward pass per crop size, torch's default attention."""
    packed = vit.ViT.encode_crops

    def separate(self, crops, masks, generator=None):  # type: ignore[no-untyped-def]
        return [packed(self, [c], [m], generator)[0] for c, m in zip(crops, masks)]

    with mock.patch.object(vit.ViT, "encode_crops", separate), mock.patch.object(vit, "SHORT_SEQUENCE", 0):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    recipe = replace(recipe, run=replace(recipe.run, num_workers=0))
    with tempfile.TemporaryDirectory() as temporary:
        slices = Slices(make_store(Path(temporary) / "store"), recipe, contract_of(recipe))
        replica = Replica(Learner(recipe), recipe.run)
        optimiser = make_optimiser(replica.learner.student, recipe)
        batch: Batch = slices[0]

        def step() -> None:
            train_step(replica, optimiser, [batch], 1)

        def plain() -> None:
            with plain_way():
                step()

        def matmul() -> None:
            for _ in range(10):
                left @ left

        left = torch.randn(2048, 2048, dtype=torch.bfloat16)
        num = recipe.run.batch_size
        gflop = model_gflop(recipe) * num
        for warm_up in (step, plain, matmul):
            warm_up()
        results = take_turns(
            {
                "data, slices/s of one process": (lambda: slices[1], num),
                "step, slices/s": (step, num),
                "plain step, slices/s": (plain, num),
                "model GFLOP/s": (step, gflop),
                "bf16 matmul GFLOP/s": (matmul, 10 * 2 * 2048**3 / 1e9),
            },
            given.repeats,
        )
    print_lines(results, recipe=recipe.name, batch_size=num, gflop_per_slice=round(gflop / num, 3))


if __name__ == "__main__":
    main()
