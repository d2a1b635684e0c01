"""One run on many devices, one process each: joining in, and sharing gradients or weights.

`torchrun` or `srun` start the processes and say who is who in the environment (docs/distributed.md). Plain data parallelism
is torch's own, because it reduces gradients while the backward pass goes on, in buckets whose layout never changes, so a
resumed run adds in the same order. It is told that parameters may go without gradient: heads of another objective, for one.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hilum.encode.encoder import pick_device
from hilum.encode.vit import ViT
from hilum.errors import HilumError, RankLost
from hilum.pretrain import ranks
from hilum.pretrain.distill import Learner, StepResult
from hilum.pretrain.loader import Batch
from hilum.pretrain.recipe import Run


@contextlib.contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the run that torchrun's variables name (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), if any.

    device    as for one process; on CUDA without a number, every process takes the one of its LOCAL_RANK
    yields    this process's device

    Inside, an error of one rank says which, and the others end with RankLost. A group that the caller made is kept.
    """
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    join = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if join:
        nccl = chosen.type == "cuda"
        dist.init_process_group("nccl" if nccl else "gloo", device_id=chosen if nccl else None)
    try:
        yield chosen
    except HilumError as error:
        if ranks.rank():  # what all meet alike is told by the first alone
            error.args = (f"rank {ranks.rank()} of {ranks.num_ranks()}: {error}", *error.args[1:])
        raise
    except RuntimeError as error:
        if not _says_lost(error):
            raise
        raise RankLost(
            f"rank {ranks.rank()} of {ranks.num_ranks()} lost another rank; the message of the one that ended first says "
            "why. Run the same command again to go on from the last checkpoint"
        ) from error
    finally:
        if join:
            dist.destroy_process_group()


def _says_lost(error: RuntimeError) -> bool:
    """NCCL has classes for it; gloo raises RuntimeError with the system's words."""
    words = ("Connection closed", "Connection reset", "Broken pipe", "Socket closed")
    known = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
    return ranks.num_ranks() > 1 and (known or any(word in str(error) for word in words))


class Replica:
    """This rank's learner, tied to those of the other ranks. Make it after the weights are there, before the optimiser.

    learner   the learner itself; under FSDP its tensors become this rank's rows
    """

    def __init__(self, learner: Learner, run: Run) -> None:
        self.learner = learner
        self._module: nn.Module = _Forward(learner).to(next(learner.parameters()).device)
        self._sharded = run.parallel == "fsdp" and ranks.num_ranks() > 1
        for parameter in learner.parameters():
            parameter.requires_grad_(
                parameter.requires_grad and parameter.numel() > 0
            )  # no registers, nothing to share
        if self._sharded:
            _shard(learner)
        elif ranks.num_ranks() > 1:
            self._module = nn.parallel.DistributedDataParallel(
                self._module, find_unused_parameters=True, gradient_as_bucket_view=True
            )
            self._module.broadcast_buffers = (
                False  # all ranks compute the same; the argument's name depends on torch's version
            )

    def forward(self, batch: Batch, step: int) -> StepResult:
        result: StepResult = self._module(batch, step)
        return result

    @contextlib.contextmanager
    def holding_back(self, hold: bool) -> Iterator[None]:
        """With `hold`, gradients of this micro-batch stay on the rank and are added to those of the next one."""
        if isinstance(self._module, nn.parallel.DistributedDataParallel) and hold:
            with self._module.no_sync():
                yield
            return
        if self._sharded:
            self.learner.set_requires_gradient_sync(not hold)  # type: ignore[operator]
        yield

    def teacher_weights(self) -> dict[str, Tensor]:
        """The teacher's backbone with the rows of all ranks, on the CPU. Call it on every rank."""
        state = self.learner.teacher["backbone"].state_dict()
        return {name: ranks.whole(tensor).cpu() for name, tensor in state.items()}


class _Forward(nn.Module):
    """Only the loss leads back into the graph, so that unused parameters are found by what is minimised."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner
        self.unused = nn.Parameter(torch.zeros(1))  # torch prints advice when it looks for such and finds none

    def forward(self, batch: Batch, step: int) -> StepResult:
        result: StepResult = self.learner(batch, step)
        return replace(result, parts={name: value.detach() for name, value in result.parts.items()})


def _shard(learner: Learner) -> None:
    """FSDP2: every block of student and teacher is gathered for its own computation, then the rest of the backbone and each
    head; the learner is the root. In fp32, as the same numbers as plain data parallelism are worth the traffic."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Nothing here changes a block's output in place, which this warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    empty = {parameter for parameter in learner.parameters() if not parameter.numel()}
    anchor = [learner.gram] if learner.recipe.objective.gram_weight else []
    for module in (*learner.student.values(), *learner.teacher.values(), *anchor):
        if isinstance(module, ViT):
            for block in module.blocks:
                fully_shard(block)
        fully_shard(module, ignored_params=empty)
        if isinstance(module, ViT):
            register_fsdp_forward_method(module, "encode_crops")
    fully_shard(learner, ignored_params=empty)
