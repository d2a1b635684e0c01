"""Prototypes: the teacher's assignments and the student's cross-entropy with them, without a matrix that lives for long.

A head yields M unit vectors (M, d) and has K prototypes of unit length (K, d); logits are their cosines. A cosine is at most 1,
so exp((cosine − 1) / temperature) needs no search for the largest and cannot overflow; above a temperature of 0.025 it does not
underflow fp32 either. So Sinkhorn-Knopp is a few products of one matrix with vectors, as safe as in the log domain.

Axes in names: M rows, K prototypes, d bottleneck, B slices, G global views, V all views.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hilum.pretrain.ranks import all_sum

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}  # of logits at once: within a CPU's cache, enough to fill a GPU


@dataclass(frozen=True)
class Assignments:
    """Target probabilities of M rows over K prototypes, as factors: row[m] · kernel[m, k] · column[k]."""

    kernel_MK: Tensor
    row_M: Tensor
    column_K: Tensor

    def rows(self, where: slice) -> Tensor:
        """Some rows, written out; each sums to 1."""
        return (self.kernel_MK[where] * self.column_K).mul_(self.row_M[where, None])


@torch.no_grad()
def sinkhorn_knopp(unit_Md: Tensor, prototypes_Kd: Tensor, temperature: float, num_rounds: int = 3) -> Assignments:
    """Soft assignments in which every prototype is used alike (Cuturi 2013; SwAV; DINOv2's `sinkhorn_knopp_teacher`).

    unit_Md   the teacher's rows on this rank; prototypes share the rows of all ranks
    returns   rows sum to 1; columns, over all ranks, to about rows/K

    Fewer rows than prototypes bound the entropy of the targets from below by about ln(K/rows).
    """
    kernel = _kernel(unit_Md, prototypes_Kd, temperature)
    row = kernel.new_ones(len(kernel))
    with torch.autocast(kernel.device.type, enabled=False):
        for _ in range(num_rounds):
            column = 1 / all_sum(row @ kernel)
            row = 1 / (kernel @ column)
    return Assignments(kernel, row, column)


@torch.no_grad()
def centred_softmax(unit_Md: Tensor, prototypes_Kd: Tensor, center_K: Tensor, temperature: float) -> Assignments:
    """Softmax of the teacher's logits after subtracting their running mean (DINO)."""
    kernel = _kernel(unit_Md, prototypes_Kd, temperature)
    column = torch.exp(-center_K.to(kernel) / temperature)
    with torch.autocast(kernel.device.type, enabled=False):
        return Assignments(kernel, 1 / (kernel @ column), column)


@torch.no_grad()
def mean_logits(unit_Md: Tensor, prototypes_Kd: Tensor) -> Tensor:
    """The mean over all rows of all ranks, (K,); ranks may have different numbers of hidden patches."""
    with torch.autocast(unit_Md.device.type, enabled=False):
        return prototypes_Kd @ (all_sum(unit_Md.sum(0)) / all_sum(unit_Md.new_full((), len(unit_Md))))


def _kernel(unit_Md: Tensor, prototypes_Kd: Tensor, temperature: float) -> Tensor:
    """exp((cosine − 1) / temperature), (M, K), at least fp32."""
    dtype = _product_dtype(unit_Md)
    unit, prototypes_dK = unit_Md.to(dtype), prototypes_Kd.to(dtype).T
    out = unit_Md.new_empty(len(unit_Md), len(prototypes_Kd), dtype=torch.promote_types(unit_Md.dtype, torch.float32))
    with torch.autocast(unit.device.type, enabled=False):
        for rows in _chunks(len(unit), out.shape[1], unit.device):
            torch.exp(out[rows].copy_(unit[rows] @ prototypes_dK).sub_(1).div_(temperature), out=out[rows])
    return out


def dino_loss(
    student_Md: Tensor, prototypes_Kd: Tensor, teacher_GBK: Tensor, num_views: int, temperature: float
) -> Tensor:
    """Cross-entropy of every student view against every other global view of the teacher, mean over pairs and slices.

    student_Md   unit vectors of all views, V·B rows, the global views first
    teacher_GBK  target probabilities
    Pairs of one view with itself are left out: with 2 global and 8 local views 18 pairs remain.
    """
    num_global, num_slices, _ = teacher_GBK.shape
    total_BK, own_MK = teacher_GBK.sum(0), teacher_GBK.flatten(0, 1)

    def targets(rows: slice) -> Tensor:
        out = total_BK[torch.arange(rows.start, rows.stop, device=total_BK.device) % num_slices]
        own = own_MK[rows]  # what the teacher says of the same view
        out[: len(own)] -= own
        return out

    mass = teacher_GBK.new_full((num_views * num_slices,), float(num_global))
    mass[: len(own_MK)] -= 1
    weight = torch.full_like(mass, 1 / (num_slices * num_global * (num_views - 1)))
    return cross_entropy(student_Md, prototypes_Kd, targets, mass, weight, temperature)


def ibot_loss(
    student_Md: Tensor, prototypes_Kd: Tensor, teacher: Assignments, mask_CN: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy at masked patches: mean over the patches of a crop, summed over crops, divided by all crops.

    student_Md   unit vectors of the hidden patches, in the order of mask.nonzero()
    mask_CN      (crops, patches) bool; crops without a mask count in the divisor (DINOv2's code)
    """
    num = mask_CN.sum(1)
    per_crop = 1 / (num.clamp(min=1).to(teacher.row_M) * len(mask_CN))
    weight = per_crop.repeat_interleave(num, output_size=len(student_Md))  # a GPU need not be asked how many
    return cross_entropy(student_Md, prototypes_Kd, teacher.rows, torch.ones_like(weight), weight, temperature)


def cross_entropy(
    unit_Md: Tensor,
    prototypes_Kd: Tensor,
    targets: Callable[[slice], Tensor],
    mass_M: Tensor,
    weight_M: Tensor,
    temperature: float,
) -> Tensor:
    """Σ weight[m] · −Σ_k target[m, k] · log softmax(cosines[m] / temperature)[k], gradient and all in one pass over chunks.

    targets   rows of targets when they are needed, (rows, K); each sums to its mass
    Under autocast the three products of each chunk run in its dtype, everything else in fp32.
    """
    out: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        unit_Md, prototypes_Kd, targets, mass_M, weight_M, temperature, _product_dtype(unit_Md)
    )
    return out


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made together with the value, while a chunk of logits is at hand; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        unit_Md: Tensor,
        prototypes_Kd: Tensor,
        targets: Callable[[slice], Tensor],
        mass_M: Tensor,
        weight_M: Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = torch.promote_types(unit_Md.dtype, torch.float32)
        unit, prototypes = (unit_Md / temperature).to(dtype), prototypes_Kd.to(dtype)
        unit_grad = torch.empty_like(unit_Md, dtype=wide)
        prototypes_grad = torch.zeros_like(prototypes_Kd, dtype=wide)
        total = unit_grad.new_zeros(())
        with torch.autocast(unit.device.type, enabled=False):
            for rows in _chunks(len(unit), len(prototypes), unit.device):
                logits, target = (unit[rows] @ prototypes.T).to(wide), targets(rows)
                mass, weight = mass_M[rows], weight_M[rows]
                against = torch.einsum("mk,mk->m", target, logits)
                power = logits.sub_(1 / temperature).exp_()  # at most 1, since cosines are
                norm = power.sum(1)
                total += (weight * (mass * (norm.log() + 1 / temperature) - against)).sum()
                grad = power.mul_((weight * mass / norm)[:, None]).addcmul_(target, weight[:, None], value=-1).to(dtype)
                unit_grad[rows] = grad @ prototypes
                prototypes_grad += grad.T @ unit[rows]
        ctx.save_for_backward((unit_grad / temperature).to(unit_Md.dtype), prototypes_grad.to(prototypes_Kd.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit_grad, prototypes_grad = ctx.saved_tensors
        return grad * unit_grad, grad * prototypes_grad, None, None, None, None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _chunks(num_rows: int, num_prototypes: int, device: torch.device) -> Iterator[slice]:
    size = max(CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * num_prototypes), 16)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
