"""What losses ask of the other ranks. Without a process group every function is the identity.

A loss computed from sums over all ranks is the same number on every rank. Its gradient is right after data-parallel training
has averaged over ranks, because the sums are differentiated: the gradient on one rank counts every rank's copy of the loss.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from hilum.errors import HilumError

T = TypeVar("T")


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_sum(x: Tensor) -> Tensor:
    """The sum over ranks, on every rank; differentiable."""
    return x if num_ranks() == 1 else _reduce_differentiably(x)


def all_mean(x: Tensor) -> Tensor:
    """The mean over ranks, on every rank; differentiable."""
    return all_sum(x) / num_ranks()


def all_rows(x: Tensor) -> Tensor:
    """(N, …) of every rank, one after the other, on every rank; differentiable. All ranks bring the same number of rows."""
    if num_ranks() == 1:
        return x
    own = [torch.zeros_like(x)] * num_ranks()
    own[rank()] = x
    return all_sum(torch.cat(own))


def all_max(x: Tensor) -> Tensor:
    """The largest over ranks, on every rank; no gradient."""
    return x if num_ranks() == 1 else _reduce(x, dist.ReduceOp.MAX)


def _reduce(x: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    y = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, operation)
    return y


class _Sum(torch.autograd.Function):
    """y = Σ x over ranks on every rank, so dL/dx on one rank is Σ dL/dy over ranks."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _reduce(x)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return _reduce(grad)


def _reduce_differentiably(x: Tensor) -> Tensor:
    out: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return out


# ---- agreement


def device() -> torch.device:
    """Where tensors must lie to travel between ranks."""
    nccl = num_ranks() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def on_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, on every rank; what it raises ends them all."""
    if num_ranks() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:  # raised below, on every rank
            box[1] = error
    dist.broadcast_object_list(box, device=device())
    if box[1] is not None:
        raise agreed(box[1])
    made: T = box[0]
    return made


def agreed(error: Exception) -> BaseException:
    """For an error that all ranks meet alike: the first raises it, the others end silently with its exit code."""
    if rank() == 0:
        return error
    return SystemExit(error.exit_code if isinstance(error, HilumError) else 1)


# ---- tensors of which each rank has some rows (FSDP)


def is_sharded(x: Tensor) -> bool:
    if num_ranks() == 1:
        return False
    from torch.distributed.tensor import DTensor  # half a second that one device need not wait

    return isinstance(x, DTensor)


def local_rows(x: Any) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, sharing its memory, and the number of its first row."""
    if not is_sharded(x):
        return x, 0
    rows = -(-len(x) // x.device_mesh.size())
    return x.to_local(), min(x.device_mesh.get_local_rank() * rows, len(x))


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor, sharing its memory."""
    return [local_rows(x)[0] for x in tensors]


def whole(x: Any) -> Tensor:
    """The tensor with the rows of all ranks, on every rank."""
    tensor: Tensor = x.full_tensor() if is_sharded(x) else x
    return tensor
