"""Losses: tensors in, one number out, in fp32. Slow loop versions of each stand in tests/numeric.

Axes in names: G global views, V all views, B slices, K prototypes, M masked patches, S directions, T knots, D width.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional

P = ParamSpec("P")


def in_fp32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Take half precision as fp32 and leave autocast, which would run a loss's matrix products in bf16.

    fp64 stays fp64, so that the tests can compare to many digits.
    """

    @wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        wide = [a.float() if isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16) else a for a in args]
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*wide, **kwargs)  # type: ignore[arg-type]

    return run


@in_fp32
def sinkhorn_knopp(logits_BK: Tensor, temperature: float, num_rounds: int = 3) -> Tensor:
    """Soft assignments in which every prototype is used alike (Cuturi 2013; SwAV; DINOv2's `sinkhorn_knopp_teacher`).

    logits_BK    teacher logits of the whole batch
    returns      (B, K), rows sum to 1; columns to about B/K

    Rows and columns are scaled in the log domain by two vectors, so nothing overflows and the matrix is not rewritten.
    Fewer rows than prototypes bound the entropy of the targets from below by about ln(K/B).
    """
    scores = logits_BK / temperature
    row = torch.zeros_like(scores[:, :1])
    for _ in range(num_rounds):
        column = -torch.logsumexp(scores + row, 0, keepdim=True)
        row = -torch.logsumexp(scores + column, 1, keepdim=True)
    return torch.exp(scores + row + column)


@in_fp32
def centred_softmax(logits_BK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """Softmax of the teacher's logits after subtracting their running mean (DINO)."""
    return torch.softmax((logits_BK - center_K) / temperature, -1)


@in_fp32
def dino_loss(student_VBK: Tensor, teacher_GBK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every student view against every other global view of the teacher, mean over pairs and slices.

    student_VBK  logits; the first G views are the global ones
    teacher_GBK  target probabilities
    Pairs of one view with itself are left out: with 2 global and 8 local views 18 pairs remain.
    """
    num_views, num_slices, _ = student_VBK.shape
    num_global = len(teacher_GBK)
    log_p = torch.log_softmax(student_VBK / temperature, -1)
    cross = -torch.einsum("gbk,vbk->gv", teacher_GBK, log_p)  # all pairs at once, never materialised
    same = torch.eye(num_global, num_views, device=cross.device, dtype=torch.bool)
    return cross.masked_fill(same, 0).sum() / (num_slices * num_global * (num_views - 1))


@in_fp32
def ibot_loss(student_MK: Tensor, teacher_MK: Tensor, mask_CN: Tensor, temperature: float) -> Tensor:
    """Cross-entropy at masked patches: mean over the patches of a crop, summed over crops, divided by all crops.

    student_MK, teacher_MK  logits and target probabilities of the M hidden patches, in the order of mask.nonzero()
    mask_CN      (crops, patches) bool; crops without a mask count in the divisor (DINOv2's code)
    """
    log_p = torch.log_softmax(student_MK / temperature, -1)
    per_patch = -(teacher_MK * log_p).sum(-1)
    weight = 1 / mask_CN.sum(1).clamp(min=1)
    return (per_patch * weight[mask_CN.nonzero()[:, 0]]).sum() / len(mask_CN)


@in_fp32
def koleo(x_BD: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour on the sphere (Sablayrolles 2019; DINOv2).

    Raises ValueError for a batch of one, where there is no neighbour.
    """
    if len(x_BD) < 2:
        raise ValueError("KoLeo needs at least two samples; found 1")
    x = functional.normalize(x_BD, dim=-1, eps=1e-8)
    similarity = (x @ x.T).fill_diagonal_(-2)
    neighbour = x[similarity.argmax(1)]
    distance = functional.pairwise_distance(x, neighbour, eps=1e-8)
    return -torch.log(distance + 1e-8).mean()


@in_fp32
def sigreg(
    z_ND: Tensor, num_slices: int, generator: torch.Generator, reach: float = 5.0, num_knots: int = 17
) -> Tensor:
    """How far samples are from a standard normal: the Epps-Pulley statistic along random directions (LeJEPA).

    z_ND        samples, not normalised: the statistic wants unit scale and no correlation
    num_slices  random directions, drawn by `generator` (a CPU generator seeded by the step)
    returns     N · mean over directions of ∫ e^(−t²/2) |φ̂(t) − e^(−t²/2)|² dt over [−reach, reach] by the trapezoid
                rule; expectation √2π − √(2π/3) = 1.06 for normal samples whatever N, 0.409·N at collapse to zero

    Cosine is even and sine odd, so the knots at t > 0 count twice and the others are left out.
    """
    directions_DS = torch.randn(z_ND.shape[1], num_slices, generator=generator).to(z_ND)
    directions_DS = functional.normalize(directions_DS, dim=0)
    t = torch.linspace(0, reach, (num_knots + 1) // 2, dtype=z_ND.dtype, device=z_ND.device)
    gauss = torch.exp(-(t**2) / 2)
    weight = 2 * gauss * (t[1] - t[0])
    weight[0] /= 2
    weight[-1] /= 2
    angles_TNS = t[:, None, None] * (z_ND @ directions_DS)
    real, imaginary = angles_TNS.cos().mean(1) - gauss[:, None], angles_TNS.sin().mean(1)
    return (weight @ (real.square() + imaginary.square())).mean() * len(z_ND)


@in_fp32
def invariance(projected_VBD: Tensor, num_global: int) -> Tensor:
    """LeJEPA's prediction term: mean squared distance of every view to the mean of the global views."""
    target = projected_VBD[:num_global].mean(0)
    return (projected_VBD - target).square().mean()
