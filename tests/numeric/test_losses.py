"""Each loss against the slow loops that define it, in float64, values and gradients; then the known numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hilum.pretrain.losses import centred_softmax, dino_loss, ibot_loss, invariance, koleo, sigreg, sinkhorn_knopp


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(dim: int, num: int, seed: int) -> Tensor:
    """The random directions that `sigreg` draws from a generator of this seed."""
    drawn = torch.randn(dim, num, generator=torch.Generator().manual_seed(seed)).double()
    return drawn / drawn.norm(dim=0)


# ---- slow versions


def slow_log_softmax(row: Tensor, temperature: float) -> Tensor:
    z = row / temperature
    return z - z.exp().sum().log()


def slow_sinkhorn(logits: Tensor, temperature: float, num_rounds: int) -> Tensor:
    """The K×B version of SwAV and DINOv2: rewrite the matrix, rows to 1/K, columns to 1/B, three times."""
    q = (logits / temperature).exp().T.clone()
    num_prototypes, num_samples = q.shape
    q /= q.sum()
    for _ in range(num_rounds):
        for k in range(num_prototypes):
            q[k] /= q[k].sum() * num_prototypes
        for b in range(num_samples):
            q[:, b] /= q[:, b].sum() * num_samples
    return (q * num_samples).T


def slow_dino(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, int]:
    """Mean over pairs (global view of the teacher, other view of the student), and the number of pairs."""
    pairs = []
    for g in range(len(teacher)):
        for v in range(len(student)):
            if g == v:
                continue
            per_slice = [
                -(teacher[g, b] * slow_log_softmax(student[v, b], temperature)).sum() for b in range(student.shape[1])
            ]
            pairs.append(sum(per_slice) / len(per_slice))
    return sum(pairs) / len(pairs), len(pairs)


def slow_ibot(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    total, row = torch.zeros((), dtype=student.dtype), 0
    for crop in mask:
        per_patch = []
        for hidden in crop:
            if hidden:
                per_patch.append(-(teacher[row] * slow_log_softmax(student[row], temperature)).sum())
                row += 1
        if per_patch:
            total = total + sum(per_patch) / len(per_patch)
    assert row == len(student)
    return total / len(mask)


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


@pytest.mark.parametrize("num_rounds", [1, 3])
@pytest.mark.parametrize("shape", [(12, 7), (6, 20)])
def test_sinkhorn_equals_the_matrix_version(shape, num_rounds):
    logits = normal(*shape)
    found = sinkhorn_knopp(logits, 0.07, num_rounds)
    assert (found - slow_sinkhorn(logits, 0.07, num_rounds)).abs().max() < 1e-12


def test_sinkhorn_rows_sum_to_one_and_columns_to_b_over_k():
    """The last scaling is by rows; the columns meet theirs when the rounds have converged (ssl.md §8.2)."""
    logits = normal(40, 10, scale=0.2)
    assert torch.allclose(sinkhorn_knopp(logits, 0.1).sum(1), torch.ones(40, dtype=torch.float64), atol=1e-12)
    many = sinkhorn_knopp(logits, 0.1, 200)
    assert torch.allclose(many.sum(0), torch.full((10,), 4.0, dtype=torch.float64), atol=1e-9)


def test_sinkhorn_of_equal_logits_is_uniform():
    assert torch.allclose(
        sinkhorn_knopp(torch.full((5, 8), 3.3, dtype=torch.float64), 0.04), torch.tensor(1 / 8.0).double()
    )


def test_sinkhorn_does_not_overflow_where_the_matrix_version_does():
    """exp(logit/temperature) leaves fp32 at 88, a logit of 3.55 at temperature .04."""
    logits = normal(8, 16, scale=10).float()
    assert not torch.isfinite((logits / 0.04).exp()).all()
    found = sinkhorn_knopp(logits, 0.04)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(1), torch.ones(8), atol=1e-4)


def test_sinkhorn_targets_are_not_sharper_than_prototypes_per_sample():
    """Each prototype has mass B/K in all, so with B < K no entropy falls below about ln(K/B)."""
    targets = sinkhorn_knopp(normal(8, 64, scale=5), 0.04, 100)
    entropy = -(targets * targets.clamp_min(1e-300).log()).sum(1).mean()
    assert entropy > math.log(64 / 8) - 1e-6


def test_centred_softmax():
    logits, center = normal(5, 9), normal(9, seed=1)
    wanted = torch.stack([slow_log_softmax(row - center, 0.04).exp() for row in logits])
    torch.testing.assert_close(centred_softmax(logits, center, 0.04), wanted)


@pytest.mark.parametrize(("num_global", "num_local", "num_pairs"), [(2, 8, 18), (2, 0, 2), (3, 2, 12)])
def test_dino(num_global, num_local, num_pairs):
    student = normal(num_global + num_local, 3, 11)
    teacher = torch.softmax(normal(num_global, 3, 11, seed=1) / 0.5, -1)
    assert slow_dino(student, teacher, 0.1)[1] == num_pairs
    agree(lambda s: dino_loss(s, teacher, 0.1), lambda s: slow_dino(s, teacher, 0.1)[0], student)


def test_dino_leaves_out_a_view_with_itself():
    """Two global views alone: what the teacher says of view 0 is compared with the student's view 1 only."""
    teacher = torch.softmax(normal(2, 4, 6, seed=1), -1)
    student = normal(2, 4, 6).requires_grad_()
    dino_loss(student, torch.stack([teacher[0], torch.zeros_like(teacher[1])]), 0.1).backward()
    assert student.grad is not None
    assert student.grad[0].abs().max() == 0
    assert student.grad[1].abs().max() > 0


def test_ibot():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    teacher = torch.softmax(normal(9, 7, seed=1), -1)
    agree(lambda s: ibot_loss(s, teacher, mask, 0.1), lambda s: slow_ibot(s, teacher, mask, 0.1), normal(9, 7))


def test_cross_entropies_of_an_untrained_model_are_ln_k():
    """Equal logits: ln K for DINO; for iBOT ln K times the share of masked crops (ssl.md §8.1)."""
    k = 32
    uniform = torch.full((2, 4, k), 1 / k)
    assert float(dino_loss(torch.zeros(10, 4, k), uniform, 0.1)) == pytest.approx(math.log(k), rel=1e-6)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[::2, :5] = True
    hidden = int(mask.sum())
    loss = ibot_loss(torch.zeros(hidden, k), torch.full((hidden, k), 1 / k), mask, 0.1)
    assert float(loss) == pytest.approx(math.log(k) / 2, rel=1e-6)


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


# ---- precision


def test_losses_are_fp32_whatever_autocast_says():
    """Autocast would run einsum and matmul in bf16, three digits of a loss."""
    student, teacher = normal(4, 6, 32).float(), torch.softmax(normal(2, 6, 32, seed=1).float(), -1)
    z, mask = normal(24, 16).float(), torch.ones(2, 3, dtype=torch.bool)

    def all_losses() -> list[Tensor]:
        return [
            dino_loss(student, teacher, 0.1),
            ibot_loss(student[0], teacher[0], mask, 0.1),
            koleo(z),
            sigreg(z, 32, torch.Generator().manual_seed(0)),
            invariance(z.view(2, 3, 4, 16)[:, 0], 1),
            sinkhorn_knopp(student[0], 0.1),
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
