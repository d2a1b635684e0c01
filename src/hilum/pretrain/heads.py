"""Heads that exist only in pre-training."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hilum.pretrain.ranks import all_sum, num_ranks
from hilum.pretrain.recipe import Objective


class PrototypeHead(nn.Module):
    """Three linear layers, unit length, then cosines with K prototypes (DINO).

    The prototypes are kept at unit length: DINO's norm_last_layer, which DINOv2's trained weight norm approximates.
    """

    def __init__(self, width: int, objective: Objective) -> None:
        super().__init__()
        self.mlp = make_mlp(width, objective.hidden, objective.bottleneck, objective.batch_norm)
        self.prototypes = nn.Parameter(torch.empty(objective.prototypes, objective.bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, D) → unit vectors (M, d), prototypes (K, d) of unit length, and the bottleneck (M, d) before it is normalised."""
        bottleneck = self.mlp(x)
        unit = functional.normalize(bottleneck.to(self.prototypes.dtype), dim=-1, eps=1e-6)
        return unit, functional.normalize(self.prototypes, dim=-1), bottleneck


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics in training are those of the rows of all ranks (torch's own does that on CUDA only).

    One row alone, which torch's own refuses, becomes the bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (num_ranks() == 1 and len(x) > 1) or not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        wide = x.float()
        num = all_sum(wide.new_full((), len(x)))
        mean = all_sum(wide.sum(0)) / num.clamp(min=1)
        var = all_sum((wide - mean).square().sum(0)) / num.clamp(min=1)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * num / (num - 1).clamp(min=1), self.momentum)
        return ((wide - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias).to(x.dtype)


def make_mlp(width: int, hidden: int, out: int, batch_norm: bool) -> nn.Sequential:
    """Linear-GELU-Linear-GELU-Linear; with BatchNorm it keeps torch's initialisation, else DINOv2's (.02)."""
    layers: list[nn.Module] = []
    for a, b in ((width, hidden), (hidden, hidden)):
        layers += [nn.Linear(a, b), *([BatchNorm(b)] if batch_norm else []), nn.GELU()]
    layers.append(nn.Linear(hidden, out))
    if not batch_norm:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
