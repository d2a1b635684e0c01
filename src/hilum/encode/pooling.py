"""Tokens → one vector, without anything learned."""

import torch
from torch import Tensor

from hilum.encode.vit import Tokens
from hilum.errors import ContractError, UsageError

POOLINGS = ("class", "mean", "max", "class+mean", "class+max", "mean+max", "class+mean+max")
ACROSS = ("mean", "max", "mean+max")


def pool(tokens: Tokens, pooling: str, weights: Tensor | None = None) -> Tensor:
    """One vector for each slice or volume: the named parts one after the other.

    pooling  of POOLINGS: class token, mean of the patch tokens, largest value of each channel over the patch tokens
    weights  (B, N) share of each patch that belongs to a region, or None. A region's mean is weighted, its maximum runs
             over the patches it touches; the class token says nothing of a region and is left out (alone: the mean)
    returns  (B, D) for each part, joined along D
    """
    if pooling not in POOLINGS:
        raise UsageError(f"pooling '{pooling}' is unknown; expected {', '.join(POOLINGS)}")
    parts = pooling.split("+")
    if weights is None:
        found = {
            "class": lambda: tokens.cls,
            "mean": lambda: tokens.patches.mean(1),
            "max": lambda: tokens.patches.amax(1),
        }
        return torch.cat([found[part]() for part in parts], 1)
    total = weights.sum(1, keepdim=True)
    if not bool((total > 0).all()):
        raise ContractError("a region covers no patch; expected at least one voxel inside the slice")
    outside = (weights <= 0)[..., None]
    found = {
        "mean": lambda: torch.einsum("bn,bnd->bd", weights / total, tokens.patches),
        "max": lambda: tokens.patches.masked_fill(outside, -torch.inf).amax(1),
    }
    return torch.cat([found[part]() for part in parts if part in found] or [found["mean"]()], 1)


def pool_slices(vectors: Tensor, across: str) -> Tensor:
    """The vectors (M, D) of a scan's slices as one: their mean, the largest value of each channel, or both (2D,)."""
    if across not in ACROSS:
        raise UsageError(f"pooling across slices '{across}' is unknown; expected {', '.join(ACROSS)}")
    found = {"mean": vectors.double().mean(0).float(), "max": vectors.amax(0)}
    return torch.cat([found[part] for part in across.split("+")])
