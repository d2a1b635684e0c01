"""Parameter groups, schedules, clipping."""

import math
from typing import Any

import torch
from torch import nn

from hilum.pretrain import ranks
from hilum.pretrain.recipe import Optimiser, Recipe


def cosine(start: float, end: float, share: float) -> float:
    """From start (share 0) to end (share 1) along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up from 0, then cosine to final_lr. The last step reaches final_lr's neighbourhood, not zero."""
    o, steps = recipe.optimiser, recipe.run.steps
    warmup = int(o.warmup * steps)
    if step < warmup:
        return o.lr * step / warmup
    return cosine(o.lr, o.final_lr, (step - warmup) / max(steps - warmup, 1))


def weight_decay(recipe: Recipe, step: int) -> float:
    return cosine(*recipe.optimiser.weight_decay, step / recipe.run.steps)


def momentum(recipe: Recipe, step: int) -> float:
    return cosine(*recipe.optimiser.momentum, step / recipe.run.steps)


def lr_multiplier(name: str, depth: int, optimiser: Optimiser) -> float:
    """Factor on the learning rate of one parameter: layer_decay^(depth + 1 − id), DINOv2.

    id is 0 for patch embedding, positions, class, register and mask tokens; i + 1 for block i; depth + 1 for the final
    norm and the heads. The patch embedding has a further factor.
    """
    parts = name.split(".")
    if parts[0] != "backbone" or parts[1] == "norm":
        layer = depth + 1
    elif parts[1] == "blocks":
        layer = int(parts[2]) + 1
    else:
        layer = 0
    factor = optimiser.layer_decay ** (depth + 1 - layer)
    return factor * (optimiser.patch_embed_lr if parts[1] == "patch_embed" else 1.0)


def make_optimiser(student: nn.ModuleDict, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with one group for each (factor, decayed, prototypes) that occurs.

    Parameters of one axis have no weight decay: biases, norms and LayerScale. Tokens and positions are decayed, as by
    DINOv2's code, not its comments.
    """
    backbone: Any = student["backbone"]
    depth = len(backbone.blocks)
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        key = (lr_multiplier(name, depth, recipe.optimiser), parameter.ndim > 1, name.endswith("prototypes"))
        groups.setdefault(key, []).append(parameter)
    described = [
        {"params": parameters, "factor": factor, "decayed": decayed, "is_last_layer": last}
        for (factor, decayed, last), parameters in groups.items()
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in student.parameters())
    return torch.optim.AdamW(described, lr=0.0, betas=recipe.optimiser.betas, eps=1e-8, fused=fused)


def set_schedules(optimiser: torch.optim.AdamW, recipe: Recipe, step: int) -> float:
    """Write this step's learning rate and weight decay into the groups; returns the learning rate.

    Prototypes are frozen by a learning rate of 0, so their moments accumulate (DINOv2); a hand-over starts that anew.
    """
    lr, decay = learning_rate(recipe, step), weight_decay(recipe, step)
    begin = recipe.handover_step
    frozen = step - begin < recipe.optimiser.freeze_last_layer * (recipe.run.steps - begin)
    for group in optimiser.param_groups:
        group["lr"] = 0.0 if group["is_last_layer"] and frozen else lr * group["factor"]
        group["weight_decay"] = decay if group["decayed"] else 0.0
    return lr


@torch.no_grad()
def clip_gradients(student: nn.ModuleDict, largest: float) -> dict[str, float]:
    """Clip each module's gradient norm on its own; returns the norms before clipping, of the modules that have gradients.

    Under FSDP, where a rank holds some rows of each gradient, the norm is that of all rows.
    """
    grads = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in student.items()}
    local = {name: ranks.local(found) for name, found in grads.items() if found}
    norms = torch.stack([torch.stack(torch._foreach_norm(found)).norm() for found in local.values()])
    if any(ranks.is_sharded(grad) for found in grads.values() for grad in found):
        norms = ranks.all_sum(norms.square()).sqrt()
    for found, norm in zip(local.values(), norms):
        torch._foreach_mul_(found, (largest / (norm + 1e-6)).clamp(max=1.0))
    return dict(zip(local, norms.tolist()))
