"""What the processes of `test_ranks.py` do. Not a test: its functions run in children, one a rank."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from hilum.errors import HilumError
from hilum.pretrain import checkpoint, loop
from hilum.pretrain.distill import StepResult
from hilum.pretrain.losses import koleo, sigreg
from hilum.pretrain.prototypes import sinkhorn_knopp
from hilum.pretrain.recipe import Recipe


def enter(scenario: Callable[..., None], rank: int, world: int, meeting: Path, arguments: tuple[Any, ...]) -> None:
    """Join the group, run the scenario, end as the command line would."""
    warnings.simplefilter("error")
    sys.stderr = meeting.with_suffix(f".{rank}.txt").open("w", buffering=1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        scenario(*arguments)
    except HilumError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    dist.destroy_process_group()


def train(store: Path, runs: list[tuple[Recipe, Path]]) -> None:
    for recipe, out in runs:
        loop.pretrain(recipe, store, out)


def train_and_kill(store: Path, recipe: Recipe, out: Path, step: int) -> None:
    """Rank 0 dies when `step` steps are done."""

    def progress(done: int, total: int | None, what: str) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.pretrain(recipe, store, out, progress=progress)


def train_and_kill_in_save(store: Path, recipe: Recipe, out: Path, step: int) -> None:
    """Rank 1 dies in the middle of writing its share of the checkpoint of `step`."""
    plain = checkpoint.save_file

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        plain(tensors, path, metadata)
        if dist.get_rank() == 1 and f"{step:08d}" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save
    loop.pretrain(recipe, store, out)


def train_and_signal(store: Path, recipe: Recipe, out: Path, step: int, number: int) -> None:
    """Rank 1 alone is told to stop."""
    plain = loop._forward

    def forward(replica: Any, batch: Any, now: int) -> StepResult:
        if dist.get_rank() == 1 and now == step:
            os.kill(os.getpid(), number)
        return plain(replica, batch, now)

    loop._forward = forward
    loop.pretrain(recipe, store, out)


def train_with_nan(store: Path, recipe: Recipe, out: Path, steps: set[int]) -> None:
    """On rank 1 the loss of these steps is infinite, with gradients that are numbers."""
    plain = loop._forward

    def forward(replica: Any, batch: Any, now: int) -> StepResult:
        result = plain(replica, batch, now)
        bad = dist.get_rank() == 1 and now in steps
        return replace(result, loss=result.loss + torch.inf) if bad else result

    loop._forward = forward
    loop.pretrain(recipe, store, out)


def train_and_fail(store: Path, recipe: Recipe, out: Path) -> None:
    """Rank 1 meets an error of its own."""
    plain = loop._forward

    def forward(replica: Any, batch: Any, now: int) -> StepResult:
        if dist.get_rank() == 1 and now == 2:
            raise HilumError("the disk of this node is gone")
        return plain(replica, batch, now)

    loop._forward = forward
    loop.pretrain(recipe, store, out)


def lose(out: Path) -> None:
    """Losses of this rank's rows of one batch: values, and gradients with respect to the rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.save(loss_values(rank, world), out / f"{rank}-of-{world}.pt")


def loss_values(rank: int, world: int) -> dict[str, torch.Tensor]:
    """SigReg, KoLeo and Sinkhorn-Knopp of rows rank, rank + 1, … of `world` equal parts of 16 rows, in float64."""
    rows = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).chunk(world)[rank]
    found = {}
    losses = {"sigreg": lambda z: sigreg(z, 8, torch.Generator().manual_seed(2)), "koleo": koleo}
    for name, loss in losses.items():
        z = rows.clone().requires_grad_()
        value = loss(z)
        value.backward()
        assert z.grad is not None
        found |= {name: value.detach(), f"{name} gradient": z.grad / world}  # training averages gradients over ranks
    prototypes = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).double())
    targets = sinkhorn_knopp(torch.nn.functional.normalize(rows), prototypes, 0.5)
    return found | {"sinkhorn": targets.rows(slice(None))}
