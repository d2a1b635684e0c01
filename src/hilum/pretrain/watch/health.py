"""Is the run learning? Numbers read off tensors that are there anyway, and what the device could do at best."""

import functools
import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hilum.encode.vit import Tokens
from hilum.pretrain.losses import sigreg
from hilum.pretrain.ranks import all_sum, device, is_sharded, local_rows, num_ranks

CLOCK = ("seconds", "data_wait", "images_per_second", "utilisation")
"""Names in a log line that say how fast it went; all others are the same in a resumed run as in an uninterrupted one."""


def effective_rank(x_ND: Tensor) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values of the centred rows.

    Compare it at one N only: N rows of iid normal numbers of width 768 have 458 at N = 512 and 749 at N = 4,096. NaN when
    there is a number that is not finite.
    """
    if not bool(x_ND.isfinite().all()):
        return math.nan
    sigma = torch.linalg.svdvals(x_ND.float() - x_ND.float().mean(0))
    share = sigma / sigma.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def feature_spread(x_ND: Tensor) -> float:
    """Standard deviation of each dimension of the unit vectors, times √D: 1 = all directions alike, 0 = one point."""
    unit = functional.normalize(x_ND.float(), dim=-1)
    return float(unit.std(0).mean() * x_ND.shape[1] ** 0.5)


@torch.no_grad()
def feature_health(features_BD: Tensor) -> dict[str, float]:
    """Signs of life in the class tokens of one batch, after the final norm. Its rank is at most B − 1."""
    norm = float(features_BD.float().norm(dim=-1).mean())
    return {"spread": feature_spread(features_BD), "rank": effective_rank(features_BD), "norm": norm}


@torch.no_grad()
def probe_health(teacher: Tokens, student_cls: Tensor) -> dict[str, float]:
    """What the tokens of the same slices say each time they are encoded.

    teacher      tokens of N slices
    student_cls  (n, D) class tokens of the student, of the first n slices
    returns      probe_rank, probe_spread   of the class tokens, at one N for the whole run
                 probe_sigreg     N·∫ of the class tokens, along the same directions each time; 1.06 if normal
                 probe_norm, probe_patch_norm   mean length of class and patch tokens
                 probe_class_patch   mean cosine of a class token with its patches; dense features fade as it rises
                 probe_lag   mean of 1 − cosine between student and teacher
    """
    cls, patches = teacher.cls.float(), teacher.patches.float()
    unit = functional.normalize(cls, dim=-1)
    cosine = torch.einsum("nd,npd->np", unit, functional.normalize(patches, dim=-1))
    lag = 1 - functional.cosine_similarity(student_cls.float(), cls[: len(student_cls)], dim=-1)
    numbers: dict[str, Any] = {
        "probe_rank": effective_rank(cls),
        "probe_spread": feature_spread(cls),
        # every rank brings the same slices, and SigReg counts those of all ranks
        "probe_sigreg": sigreg(cls.to(device()), 256, torch.Generator().manual_seed(0)) / num_ranks(),
        "probe_norm": cls.norm(dim=-1).mean(),
        "probe_patch_norm": patches.norm(dim=-1).mean(),
        "probe_class_patch": cosine.mean(),
        "probe_lag": lag.mean(),
    }
    return {name: float(value) for name, value in numbers.items()}


@torch.no_grad()
def update_ratio(optimiser: torch.optim.AdamW, parameter: torch.nn.Parameter) -> float | None:
    """Length of AdamW's last change of a weight over the weight's length; about 1e-3 is usual, None before any step.

    Worked out from the moments, which are the ones of that step, so that no copy of the weights is kept. All ranks call it.
    """
    state = optimiser.state.get(parameter, {})
    if not state:
        return None
    group = next(g for g in optimiser.param_groups if any(p is parameter for p in g["params"]))
    weight, first, second = (
        local_rows(t)[0].float() for t in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
    )
    count, (beta1, beta2) = float(state["step"]), group["betas"]
    change = (first / (1 - beta1**count)) / ((second / (1 - beta2**count)).sqrt() + group["eps"])
    before = (weight + group["lr"] * change) / (1 - group["lr"] * group["weight_decay"])
    squares = torch.stack([(weight - before).square().sum(), before.square().sum().clamp_min(1e-24)])
    squares = all_sum(squares) if is_sharded(parameter) else squares
    return float((squares[0] / squares[1]).sqrt())


@functools.cache
def measure_peak(device: str, precision: str, seconds: float = 0.2) -> float:
    """FLOP/s of the best of a few large matrix products: the ceiling that utilisation is a share of. Once a process."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        c = a @ b
        if c.is_cuda:
            torch.cuda.synchronize(c.device)
        best = max(best, 2.0 * side**3 / (time.perf_counter() - began))
        rounds += 1
    return best
