"""What losses ask of the other ranks. Without a process group every function is the identity.

A loss computed from sums over all ranks is the same number on every rank. Its gradient is right after data-parallel training
has averaged over ranks, because the sums are differentiated: the gradient on one rank counts every rank's copy of the loss.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


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
