"""One forward pass put together by hand from its parts; and what reaches which weights."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hilum.archive.store.store import Store
from hilum.pretrain.distill import Learner, step_generator
from hilum.pretrain.heads import make_mlp
from hilum.pretrain.loader import Batch, Slices
from hilum.pretrain.loop import contract_of
from hilum.pretrain.losses import invariance, koleo, sigreg
from hilum.pretrain.prototypes import centred_softmax, dino_loss, ibot_loss, sinkhorn_knopp
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch.health import feature_health


def make(recipe: Recipe, store_path) -> tuple[Learner, Batch]:
    torch.manual_seed(0)
    learner = Learner(recipe).train()
    with torch.no_grad():  # a teacher unlike the student, so that a mix-up shows
        for parameter in learner.teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return learner, Slices(Store(store_path), recipe, contract_of(recipe))[0]


def through(head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bottleneck = head.mlp(x)
    unit = bottleneck / bottleneck.norm(dim=-1, keepdim=True)
    return unit, head.prototypes / head.prototypes.norm(dim=-1, keepdim=True), bottleneck


@pytest.mark.parametrize("name", ["dino, sinkhorn", "dino, ema"])
def test_dino_step_from_its_parts(small, store_path, name):
    recipe = replace(small[name], model=replace(small[name].model, drop_path=0.0))
    recipe = replace(recipe, objective=replace(recipe.objective, batch_norm=False, dino_weight=0.7, ibot_weight=1.3))
    learner, batch = make(recipe, store_path)
    objective = recipe.objective
    result = learner(batch, 6)

    with torch.no_grad():
        tokens = learner.student["backbone"].encode_crops([batch.globals, batch.locals], [batch.masks, None])
        seen = learner.teacher["backbone"](batch.globals)  # unmasked
        views = torch.cat([tokens[0].cls, tokens[1].cls])
        unit, prototypes, bottleneck = through(learner.student["dino_head"], views)
        hidden, hidden_prototypes, _ = through(learner.student["ibot_head"], tokens[0].patches[batch.masks])
        temperature = 0.04 + 0.03 * 6 / (0.3 * 20)
        asked = {
            "dino": through(learner.teacher["dino_head"], seen.cls)[:2],
            "ibot": through(learner.teacher["ibot_head"], seen.patches[batch.masks])[:2],
        }
        if objective.centring == "sinkhorn":
            targets = {name: sinkhorn_knopp(*given, temperature) for name, given in asked.items()}
        else:
            zero = torch.zeros(objective.prototypes)
            targets = {name: centred_softmax(*given, zero, temperature) for name, given in asked.items()}
            for name, (x, p) in asked.items():  # the first mean is taken whole, the next ones with momentum 0.9
                torch.testing.assert_close(getattr(learner, f"{name}_center"), (x @ p.T).mean(0))
                getattr(learner, f"{name}_center").fill_(0.5)
            learner(batch, 6)
            for name, (x, p) in asked.items():
                torch.testing.assert_close(getattr(learner, f"{name}_center"), 0.45 + 0.1 * (x @ p.T).mean(0))
        dino = dino_loss(unit, prototypes, targets["dino"].rows(slice(None)).view(2, 4, -1), 4, 0.1)
        ibot = ibot_loss(hidden, hidden_prototypes, targets["ibot"], batch.masks, 0.1)
        if objective.regulariser == "koleo":
            regulariser = koleo(bottleneck[:4]) + koleo(bottleneck[4:8])
        else:
            generator = step_generator(0, 6, 1)
            regulariser = (sigreg(bottleneck[:4], 32, generator) + sigreg(bottleneck[4:8], 32, generator)) / 2
    torch.testing.assert_close(result.parts["dino"].detach(), dino, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.parts["ibot"].detach(), ibot, rtol=1e-4, atol=1e-5)
    wanted = 0.7 * dino + 1.3 * ibot + 0.05 * regulariser
    torch.testing.assert_close(result.loss.detach(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.features, tokens[0].cls, rtol=1e-4, atol=1e-5)


def test_lejepa_step_from_its_parts(small, store_path):
    recipe = replace(small["lejepa"], model=replace(small["lejepa"].model, drop_path=0.0))
    learner, batch = make(recipe, store_path)
    result = learner(batch, 2)
    with torch.no_grad():
        tokens = learner.student["backbone"].encode_crops([batch.globals, batch.locals], [batch.masks, None])
        projected = learner.student["projector"](torch.cat([tokens[0].cls, tokens[1].cls])).view(4, 4, 8)
        generator = step_generator(0, 2, 1)
        statistic = sum(sigreg(view, 32, generator) for view in projected) / 4
    wanted = 0.95 * invariance(projected, 2) + 0.05 * statistic
    torch.testing.assert_close(result.loss.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_patch_places_are_read_off_the_token_map(small, store_path):
    """Bilinear between patch centres, clamped at the rim, at each crop's own coordinates of the shared place."""
    recipe = replace(small["lejepa, patches"], model=replace(small["lejepa, patches"].model, drop_path=0.0))
    learner, batch = make(recipe, store_path)
    points = batch.points.clone()
    points[:, 1] = torch.nan  # one slice whose crops share no place
    batch = replace(batch, points=points)
    result = learner(batch, 2)
    with torch.no_grad():
        tokens = learner.student["backbone"].encode_crops([batch.globals, batch.locals], [batch.masks, None])
        maps = tokens[0].patches.view(2, 4, 4, 4, -1)
        views = []
        for g in range(2):
            places = []
            for b in (0, 2, 3):
                for y, x in points[g, b]:
                    v, u = (4 * y - 0.5).clamp(0, 3), (4 * x - 0.5).clamp(0, 3)
                    j, i = int(v.clamp(max=2)), int(u.clamp(max=2))
                    grid, dv, du = maps[g, b], v - j, u - i
                    top = (1 - du) * grid[j, i] + du * grid[j, i + 1]
                    bottom = (1 - du) * grid[j + 1, i] + du * grid[j + 1, i + 1]
                    places.append((1 - dv) * top + dv * bottom)
            views.append(torch.stack(places))
        projected = learner.student["patch_projector"](torch.cat(views)).view(2, -1, 8)
    torch.testing.assert_close(
        result.parts["patch_invariance"].detach(), invariance(projected, 2), rtol=1e-3, atol=1e-5
    )
    assert result.parts["patch_sigreg"].isfinite()


def test_a_batch_without_shared_places_has_no_patch_term(small, store_path):
    learner, batch = make(small["lejepa, patches"], store_path)
    result = learner(replace(batch, points=torch.full_like(batch.points, torch.nan)), 0)
    assert "patch_invariance" not in result.parts
    result.loss.backward()
    assert result.loss.isfinite()


@pytest.mark.parametrize("name", ["lejepa", "lejepa, patches", "dino, sinkhorn", "dino, ema"])
def test_gradients_reach_the_student_and_never_the_teacher(small, store_path, name):
    learner, batch = make(small[name], store_path)
    learner(batch, 3).loss.backward()
    assert all(p.grad is None for p in learner.teacher.parameters())
    silent = [n for n, p in learner.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == ["backbone.registers"]  # there are none: no numbers, no gradient


def test_the_teacher_starts_as_the_student(small):
    learner = Learner(small["dino, sinkhorn"])
    for a, b in zip(learner.student.parameters(), learner.teacher.parameters()):
        assert torch.equal(a, b)
        assert not b.requires_grad


def test_a_step_depends_on_its_number_only(small, store_path):
    """Drop path and SigReg's directions follow the step, not what was drawn before."""
    learner, batch = make(small["lejepa"], store_path)
    a = float(learner(batch, 5).loss.detach())
    torch.rand(7)
    learner(batch, 6)
    assert float(learner(batch, 5).loss.detach()) == a
    assert float(learner(batch, 6).loss.detach()) != a


def test_bf16_is_close_to_fp32_and_its_losses_are_fp32(small, store_path):
    learner, batch = make(small["dino, sinkhorn"], store_path)
    plain = learner(batch, 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = learner(batch, 3)
    assert cast.loss.dtype == torch.float32
    torch.testing.assert_close(cast.loss, plain.loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("hidden", [0, 1])
@pytest.mark.parametrize("name", ["dino, sinkhorn", "dino, ema"])
def test_a_batch_that_hides_next_to_nothing(small, store_path, name, hidden):
    """Micro-batches smaller than a mask group may have no masked crop; BatchNorm then has no rows, or one."""
    learner, batch = make(small[name], store_path)
    masks = torch.zeros_like(batch.masks)
    masks[0, :hidden] = True
    result = learner(replace(batch, masks=masks, hidden=masks.flatten().nonzero()[:, 0]), 3)
    result.loss.backward()
    assert bool(result.loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in learner.student.parameters() if p.grad is not None)
    assert all(bool(buffer.isfinite().all()) for buffer in learner.buffers())


def test_what_is_kept_for_health_is_no_larger_than_it_says(small, store_path):
    learner, batch = make(small["lejepa"], store_path)
    features = learner(batch, 3).features
    assert features.untyped_storage().nbytes() == features.nbytes


@pytest.mark.parametrize("name", ["lejepa", "dino, sinkhorn", "dino, ema"])
def test_no_step_waits_for_its_device(small, store_path, name, monkeypatch):
    """torch's meta device has no numbers, so whatever asks for one fails, as does what mixes its tensors with the CPU's."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know the device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    recipe = replace(small[name], model=replace(small[name].model, num_registers=1, positions="rotary"))
    if name.startswith("dino"):
        recipe = replace(recipe, objective=replace(recipe.objective, gram_weight=1.0, gram_start=0.0, gram_px=64))
    slices = Slices(Store(store_path), recipe, contract_of(recipe))
    batch = slices.render_batch(slices.draw_batch(0, 4).to(torch.device("meta")))
    learner = Learner(recipe).to("meta").train()
    result = learner(batch, 3)
    result.loss.backward()
    learner.update_teacher(0.99, 3)
    assert {p.grad.device.type for p in learner.student.parameters() if p.grad is not None} == {"meta"}


def test_heads_without_batch_norm_start_at_dinov2s_spread():
    torch.manual_seed(0)
    linears = [m for m in make_mlp(64, 128, 16, False) if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linears] == [(128, 64), (128, 128), (16, 128)]
    assert all(float(m.weight.detach().std()) == pytest.approx(0.02, rel=0.1) for m in linears)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in make_mlp(4, 4, 4, False))
    assert sum(isinstance(m, nn.BatchNorm1d) for m in make_mlp(4, 4, 4, True)) == 2


# ---- health


def test_health_of_isotropic_and_collapsed_features():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    good = feature_health(x)
    assert good["spread"] == pytest.approx(1, abs=0.05)
    assert 55 < good["rank"] <= 64
    assert good["norm"] == pytest.approx(8, rel=0.05)
    flat = feature_health(torch.ones(512, 64) + 1e-4 * x[:, :1])
    assert flat["spread"] < 0.01
    assert flat["rank"] == pytest.approx(1, abs=0.1)


def test_rank_is_that_of_rankme():
    """exp of the entropy of the normalised singular values (arXiv 2210.02885): k equal directions have rank k."""
    basis = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))[0]
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(20)  # centred columns of equal length
    columns = torch.stack([signs.roll(5 * n) for n in range(3)], 1)
    columns = torch.linalg.qr(columns - columns.mean(0))[0]
    assert feature_health(columns @ basis[:3])["rank"] == pytest.approx(3, abs=0.01)


# ---- hand-over, Gram anchoring, less memory


def test_the_hand_over_changes_what_is_learned(small, store_path):
    """LeJEPA in the first half, DINO + iBOT in the second, whose temperature warms up from there; one set of heads at a time
    learns."""
    base = small["dino, sinkhorn"]
    recipe = replace(base, objective=replace(base.objective, handover=0.5, projector_dim=8, patch_weight=0.5))
    learner, batch = make(recipe, store_path)
    assert recipe.handover_step == 10
    for step, named, idle in ((9, "invariance", "dino_head"), (10, "dino", "projector")):
        learner.zero_grad()
        result = learner(batch, step)
        result.loss.backward()
        assert named in result.parts
        assert all(p.grad is None for p in learner.student[idle].parameters())
        assert all(p.grad is not None for p in learner.student["backbone"].blocks.parameters())
    assert learner.teacher_temperature(10) == 0.04
    assert learner.teacher_temperature(13) == pytest.approx(0.07)


def test_gram_anchoring_from_its_parts(small, store_path):
    """From `gram_start` on the anchor is the teacher of that step; it sees larger crops, and its map is brought to ours."""
    base = small["lejepa"]
    base = replace(base, model=replace(base.model, drop_path=0.0))
    recipe = replace(base, objective=replace(base.objective, gram_weight=2.0, gram_start=0.5, gram_px=64))
    learner, batch = make(recipe, store_path)
    batch = replace(batch, gram=torch.randn(8, 1, 64, 64))
    assert "gram" not in learner(batch, 9).parts
    learner.update_teacher(1.0, 9)
    assert all(torch.equal(a, b) for a, b in zip(learner.gram.parameters(), learner.teacher_backbone().parameters()))
    result = learner(batch, 10)
    with torch.no_grad():
        ours = learner.student["backbone"].encode_crops([batch.globals, batch.locals], [batch.masks, None])[0].patches
        maps = learner.gram(batch.gram).patches.transpose(1, 2).reshape(8, -1, 8, 8)
        theirs = nn.functional.interpolate(maps, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
        a, b = nn.functional.normalize(ours, dim=-1), nn.functional.normalize(theirs, dim=-1)
        wanted = (a @ a.mT - b @ b.mT).square().mean()
    torch.testing.assert_close(result.parts["gram"].detach(), wanted, rtol=1e-4, atol=1e-6)
    plain = replace(recipe, objective=replace(recipe.objective, gram_weight=0.0))
    learner.recipe = plain
    torch.testing.assert_close(result.loss - learner(batch, 10).loss, 2 * result.parts["gram"], rtol=3e-3, atol=3e-6)


def test_anchors_are_renewed_at_most_three_times(small):
    recipe = small["lejepa"]
    plan = replace(recipe.objective, gram_weight=1.0, gram_start=0.5, gram_refresh=0.1)
    assert replace(recipe, objective=plan).gram_steps == [10, 12, 14, 16]
    assert replace(recipe, objective=replace(plan, gram_refresh=0.0)).gram_steps == [10]


@pytest.mark.parametrize(
    "setting",
    [
        "recompute",
        pytest.param(
            "compile",  # needs a C++ compiler, and most of a minute
            marks=[pytest.mark.nightly, pytest.mark.filterwarnings("ignore")],
        ),
    ],
)
def test_recomputed_and_compiled_blocks_yield_the_same_gradients(small, store_path, setting):
    """With drop path, whose subsets must be the same when a block is computed again."""
    recipe = small["dino, sinkhorn"]
    gradients = []
    for chosen in (False, True):
        learner, batch = make(replace(recipe, run=replace(recipe.run, **{setting: chosen})), store_path)
        result = learner(batch, 3)
        result.loss.backward()
        gradients.append([p.grad.clone() for p in learner.student.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, other in zip(*gradients):
        torch.testing.assert_close(plain, other, rtol=3e-3, atol=3e-6)
