"""Many linear heads by stochastic gradient descent in one pass: every learning rate of a seed in one matrix.

The heads of one seed differ in their learning rate only. They see the same cases in the same order, so one product
(B, D) × (D, R·C) serves them all, and so do one product for the gradients and one sweep over weights and momentum. Gradients
are scaled by each head's own rate before that product, which makes the sweep the same for all heads. The norm of a
head's gradient Xᵀ G, by which it is clipped, needs no gradient: ‖Xᵀ G‖² = Σ (X Xᵀ) ∘ (G Gᵀ).

Axes in names: s seeds, N cases, B cases of a step, D width, R learning rates, C outputs.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hilum.probe.heads.losses import Loss, take_rows

MOMENTUM = 0.9
INITIAL_SD = 0.01
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
CACHE_BYTES = 2 << 20  # of weights in one piece of work


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Stochastic gradient descent with momentum 0.9 and a cosine to zero.

    rates       learning rates as applied, one for each head of a seed
    batch_size  cases of a step; the last step of an epoch has what is left
    clip        largest norm of a head's gradient, bias included; None: any
    floor       the cosine ends after floor(N / B) steps an epoch, as in Curia's trainer, and turns up again; else after all
    half        matrix products in bfloat16; weights, momentum and losses in float32
    """

    rates: tuple[float, ...]
    epochs: int
    batch_size: int
    clip: float | None = None
    floor: bool = False
    half: bool = False

    def steps_an_epoch(self, num_cases: int) -> int:
        return math.ceil(num_cases / self.batch_size)

    def factor(self, step: int, num_cases: int) -> float:
        """What the learning rates are multiplied with at a step."""
        an_epoch = num_cases // self.batch_size if self.floor else self.steps_an_epoch(num_cases)
        return (1 + math.cos(math.pi * step / max(1, an_epoch * self.epochs))) / 2


def draw(seed: int, width: int, num_outputs: int, num_cases: int, epochs: int) -> tuple[Tensor, Tensor]:
    """First weights (D, C) float64 ~ N(0, 0.01) and the order of cases (epochs, N) of one seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = INITIAL_SD * torch.randn(width, num_outputs, generator=generator, dtype=torch.float64)
    return weights, torch.stack([torch.randperm(num_cases, generator=generator) for _ in range(epochs)])


def descend(X: Tensor, loss: Loss, num_outputs: int, descent: Descent, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weights (S, R, D, C) and biases (S, R, C) after the last step, on the device and in the precision of X (N, D).

    On a CPU the work is cut into pieces whose weights stay in a core's cache, and each core takes pieces: no core waits for
    another within a step.
    """
    width = X.shape[1] * num_outputs * X.element_size()
    num_rates = num_seeds = len(descent.rates) * len(seeds)
    if X.device.type == "cpu":
        num_pieces = math.ceil(len(descent.rates) / max(1, CACHE_BYTES // width))
        num_rates = math.ceil(len(descent.rates) / num_pieces)
        num_seeds = min(len(seeds), max(1, CACHE_BYTES // (width * num_rates)))
    rates = [descent.rates[n : n + num_rates] for n in range(0, len(descent.rates), num_rates)]
    groups = [seeds[n : n + num_seeds] for n in range(0, len(seeds), num_seeds)]
    pieces = [(group, replace(descent, rates=some)) for some in rates for group in groups]  # large ones first
    done = _on_all_cores([partial(_descend, X, loss, num_outputs, some, group) for group, some in pieces])
    by_rate = [done[n : n + len(groups)] for n in range(0, len(done), len(groups))]
    weights, biases = (torch.cat([torch.cat([part[i] for part in parts]) for parts in by_rate], 1) for i in (0, 1))
    return weights, biases


def _on_all_cores(work: Sequence[Callable[[], tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Results in order; as many threads as torch would use, each with one of its own."""
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(work) == 1:
        return [one() for one in work]
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda one: one(), work))
    finally:
        torch.set_num_threads(num_threads)


def _descend(X: Tensor, loss: Loss, C: int, descent: Descent, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    (N, D), R, S = X.shape, len(descent.rates), len(seeds)
    drawn = [draw(seed, D, C, N, descent.epochs) for seed in seeds]
    W = torch.stack([weights.to(X).repeat(1, R) for weights, _ in drawn])  # (s, D, R·C)
    V, b, u = torch.zeros_like(W), W.new_zeros(S, R * C), W.new_zeros(S, R * C)
    orders = torch.stack([order for _, order in drawn], 1).to(X.device)  # (epochs, s, N)
    rates = X.new_tensor(descent.rates)
    product = _Half(X, W) if descent.half else _Full(X, W)
    step = 0
    for order_sN in orders:
        for rows_sB in order_sN.split(descent.batch_size, 1):
            x = product.take(rows_sB)
            logits = product.logits(x).add_(b.unsqueeze(1))
            gradient = loss.gradient(logits.view(*rows_sB.shape, R, C), rows_sB)
            scale = rates if descent.clip is None else rates * _clip(x.to(W.dtype), gradient, descent.clip)
            G = gradient.mul_(scale.view(-1, 1, R, 1)).flatten(2)
            factor = descent.factor(step, N)
            u.mul_(MOMENTUM).add_(G.sum(1))
            b.add_(u, alpha=-factor)
            product.move(V, x, G)
            W.add_(V, alpha=-factor)
            product.follow(W)
            step += 1
    return W.view(-1, D, R, C).transpose(1, 2), b.view(-1, R, C)


class _Full:
    """Products with the weights W (s, D, R·C) in their own precision."""

    def __init__(self, X: Tensor, W: Tensor) -> None:
        self.X, self.W = X, W

    def take(self, rows_sB: Tensor) -> Tensor:
        """(s, B, D) of the cases."""
        return take_rows(self.X, rows_sB)

    def logits(self, x_sBD: Tensor) -> Tensor:
        return torch.bmm(x_sBD, self.W)

    def move(self, V: Tensor, x_sBD: Tensor, G: Tensor) -> None:
        """V = MOMENTUM · V + xᵀ G, in place."""
        V.baddbmm_(x_sBD.mT, G, beta=MOMENTUM)

    def follow(self, W: Tensor) -> None:
        """Told after each change of W."""


class _Half(_Full):
    """Products in bfloat16 with a copy of W, into memory of their own: fresh memory of this size costs more than the sums."""

    def __init__(self, X: Tensor, W: Tensor) -> None:
        super().__init__(X.bfloat16(), W.bfloat16())
        self.product, self.gradient = torch.empty_like(self.W), torch.empty_like(W)

    def logits(self, x_sBD: Tensor) -> Tensor:
        return super().logits(x_sBD).to(self.gradient.dtype)

    def move(self, V: Tensor, x_sBD: Tensor, G: Tensor) -> None:
        torch.bmm(x_sBD.mT, G.bfloat16(), out=self.product)
        torch.add(self.gradient.copy_(self.product), V, alpha=MOMENTUM, out=V)

    def follow(self, W: Tensor) -> None:
        self.W.copy_(W)


def _clip(x_sBD: Tensor, gradient_sBRC: Tensor, largest: float) -> Tensor:
    """(s, R) factors that bring the norm of each head's gradient, weights and bias, to at most `largest`."""
    gram = torch.bmm(x_sBD, x_sBD.mT) + 1  # + 1: the bias is the weight of a feature that is always 1
    by_rate = gradient_sBRC.transpose(1, 2)
    norm = (gram.unsqueeze(1) * (by_rate @ by_rate.mT)).sum((-2, -1)).clamp(min=0).sqrt()
    return (largest / (norm + CLIP_EPS)).clamp(max=1)
