"""Each loss against the slow loops that define it, in float64, values and gradients; then the known numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hilum.pretrain.losses import gram_loss, invariance, koleo, sigreg


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(dim: int, num: int, seed: int) -> Tensor:
    """The random directions that `sigreg` draws from a generator of this seed."""
    drawn = torch.randn(dim, num, generator=torch.Generator().manual_seed(seed)).double()
    return drawn / drawn.norm(dim=0)


# ---- slow versions


def slow_koleo(x: Tensor) -> Tensor:
    unit = [row / row.norm() for row in x]
    logs = []
    for i, a in enumerate(unit):
        nearest = min((a - b).norm() for j, b in enumerate(unit) if j != i)
        logs.append((nearest + 1e-8).log())
    return -sum(logs) / len(logs)


def slow_sigreg(z: Tensor, along: Tensor) -> Tensor:
    """N · mean over directions of ∫ w |φ̂ − φ|², complex, over the whole symmetric grid of 17 knots."""
    knots = torch.linspace(-5, 5, 17, dtype=z.dtype)
    values = []
    for direction in along.T:
        projected = z @ direction
        height = []
        for t in knots:
            empirical = torch.polar(torch.ones_like(projected), t * projected).mean()
            target = torch.exp(-(t**2) / 2)
            height.append(target * (empirical - target).abs() ** 2)
        values.append(torch.trapezoid(torch.stack(height), knots))
    return len(z) * torch.stack(values).mean()


def slow_invariance(projected: Tensor, num_global: int) -> Tensor:
    num_views, num_slices, width = projected.shape
    total = torch.zeros((), dtype=projected.dtype)
    for b in range(num_slices):
        for d in range(width):
            center = sum(projected[g, b, d] for g in range(num_global)) / num_global
            for v in range(num_views):
                total = total + (projected[v, b, d] - center) ** 2
    return total / (num_views * num_slices * width)


def slow_gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences of all pairs' cosines, image by image, mean over everything."""
    total, count = torch.zeros((), dtype=student.dtype), 0
    for ours, theirs in zip(student, teacher):
        for i in range(len(ours)):
            for j in range(len(ours)):
                a = ours[i] @ ours[j] / (ours[i].norm() * ours[j].norm())
                b = theirs[i] @ theirs[j] / (theirs[i].norm() * theirs[j].norm())
                total, count = total + (a - b) ** 2, count + 1
    return total / count


def agree(fast, slow, x: Tensor, tolerance: float = 1e-6) -> None:
    """Equal value and equal gradient by x."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    value, wanted = fast(a), slow(b)
    value.backward()
    wanted.backward()
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, wanted, atol=tolerance, rtol=tolerance)
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.grad, atol=tolerance, rtol=tolerance)
    assert a.grad.abs().max() > 0


# ---- fast = slow


def test_koleo():
    agree(koleo, slow_koleo, normal(9, 6))


def test_koleo_is_bounded_below_and_blind_to_scale():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(koleo(opposite)) == pytest.approx(-math.log(2), abs=1e-6)
    x = normal(20, 5)
    assert float(koleo(x)) == pytest.approx(float(koleo(37 * x)), abs=1e-6)


@pytest.mark.parametrize(("num", "wanted"), [(16, -0.317), (120, -0.299), (512, -0.288)])
def test_koleo_of_normal_samples(num, wanted):
    """ssl.md §8.4, width 768."""
    found = np.mean([float(koleo(normal(num, 768, seed=s))) for s in range(5)])
    assert found == pytest.approx(wanted, abs=0.01)  # .003 between seeds at 16 samples


def test_koleo_refuses_a_batch_of_one():
    with pytest.raises(ValueError, match="at least two samples; found 1"):
        koleo(normal(1, 4))


def test_sigreg():
    z, along = normal(7, 5, scale=0.8), directions(5, 6, seed=3)
    agree(lambda x: sigreg(x, 6, torch.Generator().manual_seed(3)), lambda x: slow_sigreg(x, along), z)


def test_sigreg_known_values():
    """Per sample: .4089 at collapse to zero, about .82 when over-dispersed; 1.06 in all for normal samples (§8.5)."""

    def value(z: Tensor, seed: int = 0) -> float:
        return float(sigreg(z, 256, torch.Generator().manual_seed(seed)))

    assert value(torch.zeros(512, 256)) / 512 == pytest.approx(0.4089, abs=1e-4)
    null = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    for num in (128, 512):  # the mean of 12 draws has a standard error of .025
        assert np.mean([value(normal(num, 256, seed=s), s) for s in range(12)]) == pytest.approx(null, abs=0.1)
    z = normal(512, 256)
    assert 0.80 < value(10 * z) / 512 < 0.84
    assert value(torch.nn.functional.normalize(z, dim=-1)) / 512 == pytest.approx(0.403, abs=0.002)


def test_sigreg_draws_other_directions_from_another_seed():
    z = normal(30, 8)
    values = [float(sigreg(z, 16, torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_invariance():
    agree(lambda p: invariance(p, 2), lambda p: slow_invariance(p, 2), normal(5, 3, 4))
    same = normal(1, 3, 4).expand(5, 3, 4)
    assert float(invariance(same, 2)) == pytest.approx(0, abs=1e-30)


def test_gram():
    teacher = normal(2, 5, 7, seed=1)
    agree(lambda x: gram_loss(x, teacher), lambda x: slow_gram(x, teacher), normal(2, 5, 4))
    x = normal(2, 5, 4)
    assert float(gram_loss(x, 3 * x)) == pytest.approx(0, abs=1e-12)  # blind to scale


# ---- precision


def test_losses_are_fp32_whatever_autocast_says():
    """Autocast would run einsum and matmul in bf16, three digits of a loss."""
    z = normal(24, 16).float()

    def all_losses() -> list[Tensor]:
        return [
            koleo(z),
            sigreg(z, 32, torch.Generator().manual_seed(0)),
            invariance(z.view(2, 3, 4, 16)[:, 0], 1),
        ]

    plain = all_losses()
    with torch.autocast("cpu", torch.bfloat16):
        cast = all_losses()
    for a, b in zip(plain, cast):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(dtype):
    z = normal(10, 6).to(dtype)
    assert koleo(z).dtype == torch.float32
    assert torch.equal(koleo(z), koleo(z.float()))
    assert sigreg(z, 8, torch.Generator().manual_seed(0)).dtype == torch.float32
