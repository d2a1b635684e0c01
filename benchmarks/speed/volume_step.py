"""How fast a pre-training step on volumes is, beside the plain way, in the same run.

    python benchmarks/speed/volume_step.py [--data STORE] [--batch 16] >> benchmarks/results/volume_step_MACHINE_DATE.jsonl

`small3d` (LeJEPA, bf16), of changes of intensity windows only. Without --data a synthetic CT of 300×350×450 voxels. The
plain way has the same weights, views and precision: each box to float32 and through `functional.interpolate`, NumPy's
histogram, one forward pass for each size of crop, conv3d as patch embedding, attention as matrix products and a softmax,
AdamW and the momentum teacher parameter by parameter; and once more in fp32, which VoxelFM's code has by default. The losses
must agree, which is checked first. One thread, and processor time (not the clock), so that a busy machine changes little.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import print_lines
from torch import Tensor
from torch.nn import functional
from volume_crops import make_ct, render_plain, write_store

from hilum.archive.store.isotropic import read_region
from hilum.archive.store.store import Store
from hilum.encode.vit import Tokens, ViT, make_rotation
from hilum.pretrain.distill import Learner
from hilum.pretrain.loader import Batch
from hilum.pretrain.loop import keep_freed_memory, train_step, training_samples
from hilum.pretrain.optim import learning_rate, make_optimiser, momentum
from hilum.pretrain.parallel import Replica
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.volume_loader import Crops, DrawnCrops, volume_facts
from hilum.settings import override

PLAIN_VIEWS = ["views.ct.gain=0", "views.ct.offset=0", "views.ct.noise=0", "views.mr.gain=0", "views.mr.offset=0"]
PLAIN_VIEWS += ["views.mr.gamma=0", "views.mr.noise=0", "volumes.window=0.5", "run.num_workers=0"]


def plain_batch(crops: Crops, drawn: DrawnCrops, like: Batch) -> Batch:
    """The pixels of a drawn batch; masks and points, which cost nothing, as ours has them."""
    num = crops.recipe.views.num_global
    made = []
    for volume in drawn.volumes:
        facts = volume_facts(crops.store, crops.store.row(volume.key), crops.contract)
        made.append(render_plain(partial(read_region, crops.store, volume.key), volume.views, facts))
    views = [torch.from_numpy(np.stack([one[n] for one in made]))[:, None] for n in range(len(made[0]))]
    large, small = torch.cat(views[:num]), torch.cat(views[num:])
    return Batch(large, small, like.masks, like.hidden, like.points, like.foreground, like.num_rejected)


def plain_tokens(model: ViT, images: Tensor, mask: Tensor | None) -> Tokens:
    x = model.patch_embed(images.float()).flatten(2).transpose(1, 2)
    if mask is not None:
        x = torch.where(mask[..., None], model.mask_token.to(x.dtype), x)
    cls, registers = (token.expand(len(x), -1, -1) for token in (model.cls_token, model.registers))
    x = torch.cat([cls, registers, x], 1)
    grid = [side // p for side, p in zip(images.shape[2:], model.config.patch)]
    cos, sin = make_rotation(grid, model.head_dim, model.num_prefix, x.device)
    for block in model.blocks:
        b, n, width = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).view(b, n, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (turn(y.float(), cos, sin).to(v.dtype) for y in (q, k))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, width))
        x = x + block.mlp.fc2(functional.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.norm(x)
    return Tokens(x[:, 0], x[:, 1 : model.num_prefix], x[:, model.num_prefix :])


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = part.chunk(2, -1)
    return torch.cat([part * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class Plain:
    """The step as one would write it first."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.recipe, self.learner = recipe, Learner(recipe).train()
        self.optimiser = torch.optim.AdamW(self.learner.student.parameters(), foreach=False)

    def loss(self, batch: Batch) -> Tensor:
        assert batch.locals is not None
        model = self.learner.student_backbone()
        tokens = [plain_tokens(model, batch.globals, batch.masks), plain_tokens(model, batch.locals, None)]
        return self.learner._join_views(batch, tokens, 1, {})

    def forward(self, batch: Batch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.run.precision == "bf16"):
            self.value = self.loss(batch)

    def backward(self) -> None:
        self.optimiser.zero_grad()
        self.value.backward()

    def update(self) -> None:
        for module in self.learner.student.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.recipe.optimiser.clip, foreach=False)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, 1)
        self.optimiser.step()
        decay = momentum(self.recipe, 1)
        with torch.no_grad():
            for ours, theirs in zip(self.learner.teacher.parameters(), self.learner.student.parameters()):
                ours.mul_(decay).add_(theirs, alpha=1 - decay)


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def one_round(crops: Crops, step: int, plain: Plain, wide: Plain, replica: Replica, optimiser: Any) -> dict[str, float]:
    """Processor seconds of each part, ours and plain, on the same samples."""
    size, found, kept = crops.recipe.run.batch_size, {}, {}

    def make(name: str, work: Callable[[], object]) -> None:
        found[name] = seconds(lambda: kept.update({name: work()}))

    make("draw", lambda: crops.draw_batch(step * size, size))
    make("render", lambda: crops.render_batch(kept["draw"]))
    make("plain render", lambda: plain_batch(crops, kept["draw"], kept["render"]))
    make("step", lambda: train_step(replica, optimiser, [kept["render"]], 1))
    make("plain forward", lambda: plain.forward(kept["plain render"]))
    make("plain backward", plain.backward)
    make("plain update", plain.update)
    make("plain fp32 forward", lambda: wide.forward(kept["plain render"]))
    make("plain fp32 backward", wide.backward)
    make("plain fp32 update", wide.update)
    make("update", optimiser.step)
    return found


def check(crops: Crops) -> float:
    """Relative difference of the two losses in fp32; AssertionError above 1e-4."""
    exact = override(crops.recipe, ["run.precision=fp32", "run.batch_size=4"])
    some = Crops(crops.store, exact, crops.contract)
    drawn = some.draw_batch(0, 4)
    batch, plain = some.render_batch(drawn), Plain(exact)
    with torch.no_grad():
        ours = float(plain.learner(batch, 1).loss)
        other = float(plain.loss(plain_batch(some, drawn, batch)))
    assert abs(ours - other) <= 1e-4 * abs(other), (ours, other)
    return abs(ours - other) / abs(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    load = os.getloadavg()[0]
    recipe = override(load_recipe("small3d"), [*PLAIN_VIEWS, f"run.batch_size={given.batch}"])
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(given.data) if given.data else write_store(Path(temporary), make_ct())
        crops = training_samples(store, recipe)
        assert isinstance(crops, Crops)
        difference, plain, wide = check(crops), Plain(recipe), Plain(override(recipe, ["run.precision=fp32"]))
        torch.manual_seed(0)
        learner = Learner(recipe)
        replica, optimiser = Replica(learner, recipe.run), make_optimiser(learner.student, recipe)
        one_round(crops, 0, plain, wide, replica, optimiser)
        rounds = [one_round(crops, n + 1, plain, wide, replica, optimiser) for n in range(given.repeats)]
    results = {f"{name}, CPU s": [r[name] for r in rounds] for name in rounds[0]}
    plain_step = [sum(r[f"plain {n}"] for n in ("forward", "backward", "update")) for r in rounds]
    wide_step = [sum(r[f"plain fp32 {n}"] for n in ("forward", "backward", "update")) for r in rounds]
    results["step / plain"] = [p / r["step"] for p, r in zip(plain_step, rounds)]
    results["step / plain fp32"] = [p / r["step"] for p, r in zip(wide_step, rounds)]
    results["render / plain"] = [r["plain render"] / r["render"] for r in rounds]
    whole = [r["draw"] + r["render"] + r["step"] for r in rounds]
    results["step with data / plain"] = [
        (r["draw"] + r["plain render"] + p) / w for p, r, w in zip(plain_step, rounds, whole)
    ]
    results["share of data"] = [(r["draw"] + r["render"]) / w for r, w in zip(rounds, whole)]
    results["share of the optimiser"] = [r["update"] / w for r, w in zip(rounds, whole)]
    facts = {"recipe": "small3d", "batch_size": given.batch, "data": "given" if given.data else "synthetic"}
    print_lines(results, **facts, loss_difference=difference, load_before=round(load, 2))


if __name__ == "__main__":
    main()
