"""Where is it, in millimetres: softmax-weighted positions of patch tokens. Axes: M lanes, B cases, L tokens, D width."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hilum.errors import UsageError
from hilum.probe.heads.attention import lane_linear, pool_tokens, uniform
from hilum.probe.heads.head import Array, Task
from hilum.probe.heads.lanes import Draws, Weights
from hilum.probe.heads.token_head import TokenHead
from hilum.probe.heads.tokens import TokenBatch

UNIT_MM = 10.0  # the loss is quadratic below one such error and linear above
NUM_HEADS, HIDDEN = 4, 128  # of VoxelFM's head


class LightLocaliser:
    """Σ a (p + W x) + b with a = softmax(w · x) over tokens x at positions p. A `Network` of `hilum.probe.heads.lanes`.

    W x, which is 0 at first, points from a token to the place, so that answers are bound neither to the hull of the tokens
    nor to their steps; b is the mean place relative to the middle of the grid.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "score": 0.01 * torch.randn(self.width, generator=generator),
            "offset.weight": torch.zeros(3, self.width),
            "offset.bias": torch.zeros(3),
        }

    def outputs(self, weights: Weights, batch: TokenBatch, draws: Draws | None) -> Tensor:
        places, middle = _places(batch)
        tokens = torch.cat([batch.tokens, places / UNIT_MM], -1)
        direction = functional.pad(weights["score"], (0, 3))[:, None, None]
        pooled = pool_tokens(direction, tokens, batch.seen)[0]
        point = lane_linear(pooled[..., :-3], weights["offset.weight"], weights["offset.bias"]) + pooled[..., -3:]
        return point[:, :, 0] * UNIT_MM + middle


class AttentionLocaliser:
    """VoxelFM's head: x + Linear(grid), self-attention of 4 heads, a score MLP, softmax-weighted positions.
    3,103,745 weights at width 864. A `Network` of `hilum.probe.heads.lanes`.

    The grid that is added runs from 0 to 1 along each axis; positions are those of the tokens in mm, so an answer lies in their
    hull, as upstream in [0, 1]³.
    """

    def __init__(self, width: int) -> None:
        if width % NUM_HEADS:
            raise UsageError(f"this head needs tokens whose width is a multiple of {NUM_HEADS}; found {width}")
        self.width = width

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        D = self.width
        return {
            "place.weight": uniform((D, 3), 1 / math.sqrt(3), generator),
            "place.bias": uniform((D,), 1 / math.sqrt(3), generator),
            "in_proj_weight": uniform((3 * D, D), math.sqrt(6 / (4 * D)), generator),
            "in_proj_bias": torch.zeros(3 * D),
            "out_proj.weight": uniform((D, D), 1 / math.sqrt(D), generator),
            "out_proj.bias": torch.zeros(D),
            "hidden.weight": uniform((HIDDEN, D), 1 / math.sqrt(D), generator),
            "hidden.bias": uniform((HIDDEN,), 1 / math.sqrt(D), generator),
            "score.weight": uniform((1, HIDDEN), 1 / math.sqrt(HIDDEN), generator),
            "score.bias": uniform((1,), 1 / math.sqrt(HIDDEN), generator),
        }

    def outputs(self, weights: Weights, batch: TokenBatch, draws: Draws | None) -> Tensor:
        places, middle = _places(batch)
        x = batch.tokens + lane_linear(_unit_grid(batch), weights["place.weight"], weights["place.bias"])
        q, k, v = (
            part.reshape(*part.shape[:-1], NUM_HEADS, -1).transpose(2, 3)
            for part in lane_linear(x, weights["in_proj_weight"], weights["in_proj_bias"]).chunk(3, -1)
        )
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=batch.seen[:, None, None])
        x = seen.transpose(2, 3).flatten(3)
        x = lane_linear(x, weights["out_proj.weight"], weights["out_proj.bias"])
        x = functional.relu(lane_linear(x, weights["hidden.weight"], weights["hidden.bias"]))
        scores = lane_linear(x, weights["score.weight"], weights["score.bias"])[..., 0]
        shares = scores.masked_fill(~batch.seen, -torch.inf).softmax(-1)
        return (shares[..., None] * places).sum(2) + middle


def _places(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(B, L, 3) LPS mm of tokens relative to the mean of their case, 0 for padding, and that mean (B, 3)."""
    places = torch.zeros(*batch.seen.shape, 3)
    middle = torch.zeros(len(batch.cases), 3)
    for row, case in enumerate(batch.cases):
        at = case.positions_mm()
        middle[row] = torch.from_numpy(at.mean(0))
        places[row, : len(at)] = torch.from_numpy(at - at.mean(0))
    return places.to(batch.tokens.device), middle.to(batch.tokens.device)


def _unit_grid(batch: TokenBatch) -> Tensor:
    """(B, L, 3): place in the grid, 0 … 1 along each axis."""
    grid = torch.zeros(*batch.seen.shape, 3)
    for row, case in enumerate(batch.cases):
        index = np.stack(np.unravel_index(case.place, case.grid), 1)
        grid[row, : len(index)] = torch.from_numpy(index / np.maximum(np.array(case.grid) - 1, 1))
    return grid.to(batch.tokens.device)


class _Distance:
    """Smooth L1 in centimetres; the score is minus the mean Euclidean distance in mm."""

    def __init__(self, y: Array) -> None:
        self._y = torch.from_numpy(np.asarray(y, np.float32))

    def loss(self, outputs: Tensor, cases: Sequence[int]) -> Tensor:
        wanted = self._y[torch.as_tensor(cases)].to(outputs.device)
        error = (outputs - wanted) / UNIT_MM
        return functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").mean((1, 2))

    def score(self, parts: list[Any], pieces: list[list[int]]) -> Tensor:
        found = torch.cat(parts, 1)
        wanted = self._y[[case for piece in pieces for case in piece]].to(found.device)
        error: Tensor = (found - wanted).square().sum(-1).sqrt().mean(1)
        return -error


class LocalisationHead(TokenHead):
    """A point in LPS mm for each case: y and outputs are (x, y, z).

    task, seed … device  of every head on tokens, see `TokenHead`
    attention            VoxelFM's head (`AttentionLocaliser`); else the light one, for few cases (`LightLocaliser`)

    Every case needs geometry; else GeometryError.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("localisation",)

    def __init__(
        self,
        task: Task = "localisation",
        *,
        seed: int = 0,
        seeds: int = 5,
        learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2),
        epochs: int = 40,
        batch_size: int = 16,
        optimiser: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 0.01,
        schedule: Literal["constant", "cosine"] = "cosine",
        clip: float | None = None,
        attention: bool = False,
        max_floats: int = 64_000_000,
        device: str = "cpu",
    ) -> None:
        self.task, self.seed, self.seeds, self.learning_rates = task, seed, seeds, learning_rates
        self.epochs, self.batch_size, self.optimiser, self.weight_decay = epochs, batch_size, optimiser, weight_decay
        self.schedule, self.clip, self.attention = schedule, clip, attention
        self.max_floats, self.device = max_floats, device

    def _network(self, width: int, num_outputs: int) -> LightLocaliser | AttentionLocaliser:
        return AttentionLocaliser(width) if self.attention else LightLocaliser(width)

    def _floats(self, width: int) -> int:
        return 8 * width if self.attention else 6

    def _targets(self, y: Any, num_cases: int) -> Array:
        found = np.asarray(y, np.float64)
        if found.shape != (num_cases, 3) or not np.isfinite(found).all():
            raise ValueError(
                f"localisation expects y of (N, 3) finite LPS mm for {num_cases} cases; found {found.shape}"
            )
        return found

    def _objective(self, y: Array, classes: Array | None, centre: float, spread: float) -> _Distance:
        return _Distance(y)
