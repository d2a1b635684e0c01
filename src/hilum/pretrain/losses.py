"""Losses on features: tensors in, one number out, in fp32. Slow loop versions of each stand in tests/numeric.

KoLeo and SigReg look at the samples of all ranks, so their value is the same on every rank and for any number of them.
Axes in names: G global views, V all views, B slices, N samples, P patches, S directions, T knots, D width.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional

from hilum.pretrain.ranks import all_rows, all_sum

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
def koleo(x_BD: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour on the sphere (Sablayrolles 2019; DINOv2), over all ranks.

    DINOv2 looks within one device's batch; there the value depends on how many devices share the work.
    Raises ValueError for a batch of one, where there is no neighbour.
    """
    x = functional.normalize(all_rows(x_BD), dim=-1, eps=1e-8)
    if len(x) < 2:
        raise ValueError("KoLeo needs at least two samples; found 1")
    similarity = (x @ x.T).fill_diagonal_(-2)
    neighbour = x[similarity.argmax(1)]
    distance = functional.pairwise_distance(x, neighbour, eps=1e-8)
    return -torch.log(distance + 1e-8).mean()


@in_fp32
def sigreg(
    z_ND: Tensor, num_slices: int, generator: torch.Generator, reach: float = 5.0, num_knots: int = 17
) -> Tensor:
    """How far samples are from a standard normal: the Epps-Pulley statistic along random directions (LeJEPA).

    z_ND        this rank's samples, not normalised: the statistic wants unit scale and no correlation
    num_slices  random directions, drawn by `generator` (a CPU generator seeded by the step)
    returns     N · mean over directions of ∫ e^(−t²/2) |φ̂(t) − e^(−t²/2)|² dt over [−reach, reach] by the trapezoid
                rule, N and φ̂ over all ranks; expectation √2π − √(2π/3) = 1.06 for normal samples whatever N, 0.409·N
                at collapse to zero

    Cosine is even and sine odd, so the knots at t > 0 count twice and the others are left out.
    """
    directions_DS = torch.randn(z_ND.shape[1], num_slices, generator=generator)
    directions_DS = directions_DS.to(z_ND.device, z_ND.dtype, non_blocking=True)
    directions_DS = functional.normalize(directions_DS, dim=0)
    t = torch.linspace(0, reach, (num_knots + 1) // 2, dtype=z_ND.dtype, device=z_ND.device)
    gauss = torch.exp(-(t**2) / 2)
    weight = 2 * gauss * (t[1] - t[0])
    weight[0] /= 2
    weight[-1] /= 2
    angles_TNS = t[:, None, None] * (z_ND @ directions_DS)
    num = all_sum(z_ND.new_full((), len(z_ND)))
    waves = all_sum(torch.stack([angles_TNS.cos().sum(1), angles_TNS.sin().sum(1)])) / num
    away = (waves[0] - gauss[:, None]).square() + waves[1].square()
    return (weight @ away).mean() * num


@in_fp32
def invariance(projected_VBD: Tensor, num_global: int) -> Tensor:
    """LeJEPA's prediction term: mean squared distance of every view to the mean of the global views."""
    target = projected_VBD[:num_global].mean(0)
    return (projected_VBD - target).square().mean()


@in_fp32
def gram_loss(student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
    """Mean squared difference of the patches' cosine similarities, image by image (Gram anchoring, DINOv3).

    student_BPD, teacher_BPD  patch tokens after the final norm on the same grid; the widths may differ
    """
    student, teacher = (functional.normalize(x, dim=-1) for x in (student_BPD, teacher_BPD))
    return functional.mse_loss(student @ student.mT, teacher @ teacher.mT)
