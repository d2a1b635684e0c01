"""Assignments and cross-entropies against slow loops over whole logits, in float64, values and gradients; known numbers."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hilum.pretrain import prototypes
from hilum.pretrain.prototypes import centred_softmax, cross_entropy, dino_loss, ibot_loss, mean_logits, sinkhorn_knopp


def unit(num: int, width: int = 5, seed: int = 0) -> Tensor:
    x = torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(x, dim=-1)


def dense(assignments: prototypes.Assignments) -> Tensor:
    return assignments.rows(slice(None))


@pytest.fixture(autouse=True, params=[1 << 20, 1])
def _chunks(request):
    """All rows at once, and sixteen at a time."""
    with mock.patch.dict(prototypes.CHUNK_BYTES, cpu=request.param):
        yield


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


def sinkhorn_in_logs(logits: Tensor, temperature: float, num_rounds: int) -> Tensor:
    """The same in the log domain, where nothing can overflow."""
    scores = logits / temperature
    row = torch.zeros_like(scores[:, :1])
    for _ in range(num_rounds):
        column = -torch.logsumexp(scores + row, 0, keepdim=True)
        row = -torch.logsumexp(scores + column, 1, keepdim=True)
    return torch.exp(scores + row + column)


def agree(fast, slow, x: Tensor, directions: Tensor) -> None:
    """Equal value, and equal gradient by the rows and by the prototypes."""
    values, gradients = [], []
    for loss in (fast, slow):
        a, b = x.clone().requires_grad_(), directions.clone().requires_grad_()
        value = 3 * loss(a, b)  # a factor from outside must reach the gradient
        value.backward()
        values.append(value.detach())
        gradients.append((a.grad, b.grad))
    assert values[0].dtype == torch.float64
    torch.testing.assert_close(values[0], values[1], atol=1e-9, rtol=1e-9)
    for ours, wanted in zip(*gradients):
        torch.testing.assert_close(ours, wanted, atol=1e-9, rtol=1e-9)
        assert ours.abs().max() > 0


# ---- assignments


@pytest.mark.parametrize("num_rounds", [1, 3])
@pytest.mark.parametrize("shape", [(12, 7), (40, 20)])
def test_sinkhorn_equals_the_matrix_version(shape, num_rounds):
    x, directions = unit(shape[0]), unit(shape[1], seed=1)
    found = dense(sinkhorn_knopp(x, directions, 0.07, num_rounds))
    assert (found - slow_sinkhorn(x @ directions.T, 0.07, num_rounds)).abs().max() < 1e-12
    assert (found - sinkhorn_in_logs(x @ directions.T, 0.07, num_rounds)).abs().max() < 1e-12


def test_sinkhorn_rows_sum_to_one_and_columns_to_b_over_k():
    """The last scaling is by rows; the columns meet theirs when the rounds have converged (ssl.md §8.2)."""
    x, directions = unit(40), unit(10, seed=1)
    assert torch.allclose(dense(sinkhorn_knopp(x, directions, 0.1)).sum(1), torch.ones(40).double(), atol=1e-12)
    many = dense(sinkhorn_knopp(x, directions, 0.5, 500))
    assert torch.allclose(many.sum(0), torch.full((10,), 4.0, dtype=torch.float64), atol=1e-9)


def test_sinkhorn_of_equal_rows_and_prototypes_is_uniform():
    one = unit(1)
    found = dense(sinkhorn_knopp(one.expand(5, -1), one.expand(8, -1), 0.04))
    torch.testing.assert_close(found, torch.full((5, 8), 1 / 8.0).double())


def test_sinkhorn_stays_in_fp32_at_its_coldest():
    """Cosines of 1 and -1 at a temperature of .025: 80 apart in the exponent, near the end of fp32."""
    axes = torch.eye(4)
    x, directions = torch.cat([axes, axes]), torch.cat([axes, -axes])
    found = dense(sinkhorn_knopp(x, directions, 0.025))
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    wanted = sinkhorn_in_logs((x @ directions.T).double(), 0.025, 3)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


def test_sinkhorn_targets_are_not_sharper_than_prototypes_per_sample():
    """Each prototype has mass B/K in all, so with B < K no entropy falls below about ln(K/B)."""
    targets = dense(sinkhorn_knopp(unit(8), unit(64, seed=1), 0.04, 100))
    entropy = -torch.xlogy(targets, targets).sum(1).mean()
    assert entropy > math.log(64 / 8) - 1e-6


def test_centred_softmax():
    x, directions, center = unit(20), unit(9, seed=1), 0.1 * unit(1, 9)[0]
    logits = x @ directions.T
    wanted = torch.stack([slow_log_softmax(row - center, 0.04).exp() for row in logits])
    torch.testing.assert_close(dense(centred_softmax(x, directions, center, 0.04)), wanted)
    torch.testing.assert_close(mean_logits(x, directions), logits.mean(0))


# ---- losses


@pytest.mark.parametrize(("num_global", "num_local", "num_pairs"), [(2, 8, 18), (2, 0, 2), (3, 2, 12)])
def test_dino(num_global, num_local, num_pairs):
    num_views, num_slices, k = num_global + num_local, 3, 11
    teacher = torch.softmax(2 * unit(num_global * num_slices, k, seed=1), -1).view(num_global, num_slices, k)
    assert slow_dino(torch.zeros(num_views, 3, k).double(), teacher, 0.1)[1] == num_pairs
    agree(
        lambda x, p: dino_loss(x, p, teacher, num_views, 0.1),
        lambda x, p: slow_dino((x @ p.T).view(num_views, num_slices, k), teacher, 0.1)[0],
        unit(num_views * num_slices),
        unit(k, seed=2),
    )


def test_dino_leaves_out_a_view_with_itself():
    """Two global views alone: what the teacher says of view 0 is compared with the student's view 1 only."""
    teacher = torch.softmax(unit(8, 6, seed=1), -1).view(2, 4, 6).clone()
    teacher[1] = teacher[1].mean(0)  # says the same of each slice
    student, directions = unit(8).requires_grad_(), unit(6, seed=2)
    dino_loss(student, directions, teacher, 2, 0.1).backward()
    assert student.grad is not None
    alone = unit(8).requires_grad_()
    (slow_dino((alone @ directions.T).view(2, 4, 6), teacher, 0.1)[0]).backward()
    torch.testing.assert_close(student.grad, alone.grad)


def test_ibot():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]] * 3, dtype=torch.bool)
    teacher = sinkhorn_knopp(unit(27, seed=1), unit(7, seed=3), 0.05)
    agree(
        lambda x, p: ibot_loss(x, p, teacher, mask, 0.1),
        lambda x, p: slow_ibot(x @ p.T, dense(teacher), mask, 0.1),
        unit(27),
        unit(7, seed=2),
    )


def test_cross_entropies_of_an_untrained_model_are_ln_k():
    """Equal logits: ln K for DINO; for iBOT ln K times the share of masked crops (ssl.md §8.1)."""
    k = 32
    one = torch.ones(1, 1).double()
    uniform = torch.full((2, 4, k), 1 / k).double()
    assert float(dino_loss(one.expand(40, 1), one.expand(k, 1), uniform, 10, 0.1)) == pytest.approx(math.log(k))
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[::2, :5] = True
    rows = one.expand(int(mask.sum()), 1)
    targets = sinkhorn_knopp(rows, one.expand(k, 1), 0.05)
    assert float(ibot_loss(rows, one.expand(k, 1), targets, mask, 0.1)) == pytest.approx(math.log(k) / 2)


def test_autocast_runs_the_products_in_bf16_and_nothing_else():
    x, directions = unit(50).float().requires_grad_(), unit(33, seed=1).float().requires_grad_()
    targets = sinkhorn_knopp(unit(50, seed=2).float(), unit(33, seed=3).float(), 0.05)
    ones = torch.ones(50)

    def loss() -> Tensor:
        return cross_entropy(x, directions, targets.rows, ones, ones / 50, 0.1)

    exact = torch.autograd.grad(loss(), (x, directions))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()
        cold = sinkhorn_knopp(x, directions, 0.05)
    assert value.dtype == torch.float32
    assert cold.kernel_MK.dtype == torch.float32
    torch.testing.assert_close(dense(cold).sum(1), ones)
    assert float((value - loss()).detach()) == pytest.approx(0, abs=0.02)
    for rough, wanted in zip(torch.autograd.grad(value, (x, directions)), exact):
        torch.testing.assert_close(rough, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0.05)


def test_a_row_that_is_no_number_makes_the_loss_no_number():
    """So that the loop sees it and skips the step."""
    x = unit(20)
    x[3] = torch.nan
    targets = sinkhorn_knopp(unit(20, seed=1), unit(7, seed=2), 0.05)
    assert torch.isnan(cross_entropy(x, unit(7, seed=2), targets.rows, torch.ones(20), torch.ones(20), 0.1))
