"""Schedules, parameter groups, clipping and the teacher's average against the formulas of the papers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hilum.encode.vit import ViT, ViTConfig
from hilum.pretrain.distill import Learner
from hilum.pretrain.optim import (
    clip_gradients,
    learning_rate,
    lr_multiplier,
    make_optimiser,
    momentum,
    set_schedules,
    weight_decay,
)
from hilum.pretrain.presets import RECIPES
from hilum.pretrain.recipe import Objective, Optimiser, Recipe, Run, ViewSpec

MODEL = ViTConfig(size="nano", patch=(8, 8), image=(32, 32), num_registers=2)
VIEWS = ViewSpec(global_px=32, local_px=16, num_local=2)


def recipe(**optimiser) -> Recipe:
    return Recipe(
        name="test",
        model=MODEL,
        views=VIEWS,
        objective=Objective(prototypes=12, hidden=16, bottleneck=8, batch_norm=True),
        optimiser=Optimiser(**optimiser),
        run=Run(steps=100, batch_size=4),
    )


def test_learning_rate_warms_up_from_zero_and_ends_at_final_lr():
    r = recipe(lr=2e-3, final_lr=1e-5, warmup=0.1)
    assert learning_rate(r, 0) == 0
    assert learning_rate(r, 5) == pytest.approx(1e-3)
    assert learning_rate(r, 10) == pytest.approx(2e-3)
    assert learning_rate(r, 55) == pytest.approx((2e-3 + 1e-5) / 2)  # half-way down the cosine
    assert learning_rate(r, 100) == pytest.approx(1e-5)
    rates = [learning_rate(r, step) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(recipe(lr=2e-3, warmup=0.0), 0) == pytest.approx(2e-3)


def test_the_learning_rate_is_absolute():
    """DINOv2's rule base·sqrt(batch/1024) and DINOv3's, four times that, hide one number (ssl.md §8.8); ours is it."""
    assert (
        4e-3 * math.sqrt(2048 / 1024)
        == pytest.approx(4 * 1e-3 * math.sqrt(2048 / 1024))
        == pytest.approx(5.657e-3, rel=1e-4)
    )
    r = recipe(lr=5.657e-3, warmup=0.0)
    for batch_size in (2, 2048):
        assert learning_rate(replace(r, run=replace(r.run, batch_size=batch_size)), 0) == pytest.approx(5.657e-3)


def test_weight_decay_and_momentum_follow_a_cosine_to_their_ends():
    r = recipe(weight_decay=(0.04, 0.4), momentum=(0.992, 1.0))
    for schedule, (start, end) in ((weight_decay, (0.04, 0.4)), (momentum, (0.992, 1.0))):
        assert schedule(r, 0) == pytest.approx(start)
        assert schedule(r, 50) == pytest.approx((start + end) / 2)
        assert schedule(r, 100) == pytest.approx(end)
        wanted = end + (start - end) * (1 + math.cos(math.pi * 0.3)) / 2
        assert schedule(r, 30) == pytest.approx(wanted)


def test_teacher_temperature_rises_in_a_line_then_stays():
    r = recipe()
    r = replace(r, objective=replace(r.objective, teacher_temperature=(0.04, 0.07), teacher_warmup=0.3))
    learner = Learner(r)
    assert [learner.teacher_temperature(s) for s in (0, 15, 30, 99)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    still = Learner(replace(r, objective=replace(r.objective, teacher_warmup=0.0)))
    assert still.teacher_temperature(0) == 0.07


def test_layer_decay_of_vit_b():
    """ssl.md §8.7: depth 12 at .9."""
    o = Optimiser(layer_decay=0.9, patch_embed_lr=0.2)
    assert lr_multiplier("backbone.blocks.11.attn.qkv.weight", 12, o) == pytest.approx(0.9)
    assert (
        lr_multiplier("backbone.blocks.0.norm1.bias", 12, o) == pytest.approx(0.9**12) == pytest.approx(0.282, abs=5e-4)
    )
    assert (
        lr_multiplier("backbone.patch_embed.weight", 12, o)
        == pytest.approx(0.9**13 * 0.2)
        == pytest.approx(0.0508, abs=5e-5)
    )
    for token in ("cls_token", "pos_embed", "mask_token", "registers"):
        assert lr_multiplier(f"backbone.{token}", 12, o) == pytest.approx(0.9**13)
    for top in ("backbone.norm.weight", "dino_head.mlp.0.weight", "ibot_head.prototypes", "projector.0.bias"):
        assert lr_multiplier(top, 12, o) == 1


def groups_by_name(r: Recipe) -> dict[str, dict]:
    learner = Learner(r)
    optimiser = make_optimiser(learner.student, r)
    names = {id(p): name for name, p in learner.student.named_parameters()}
    found = {names[id(p)]: group for group in optimiser.param_groups for p in group["params"]}
    assert len(found) == len(names)
    return found


@pytest.mark.parametrize("batch_norm", [True, False])
def test_what_is_decayed(batch_norm):
    """Biases, norms, LayerScale and BatchNorm are exempt; tokens and positions are not (DINOv2's code)."""
    r = recipe()
    groups = groups_by_name(replace(r, objective=replace(r.objective, batch_norm=batch_norm)))
    decayed = {name for name, group in groups.items() if group["decayed"]}
    learner = Learner(replace(r, objective=replace(r.objective, batch_norm=batch_norm)))
    wanted = {f"backbone.{t}" for t in ("cls_token", "mask_token", "registers", "pos_embed", "patch_embed.weight")}
    wanted |= {f"{head}.prototypes" for head in ("dino_head", "ibot_head")}
    for name, module in learner.student.named_modules():
        if isinstance(module, nn.Linear):
            wanted.add(f"{name}.weight")
    assert decayed == wanted
    assert any(name.endswith("ls1.gamma") for name in groups.keys() - decayed)


def test_schedules_reach_the_groups():
    r = recipe(lr=1e-2, warmup=0.0, layer_decay=0.5, weight_decay=(0.1, 0.1), freeze_last_layer=0.0)
    learner = Learner(r)
    optimiser = make_optimiser(learner.student, r)
    assert set_schedules(optimiser, r, 0) == pytest.approx(1e-2)
    names = {id(p): name for name, p in learner.student.named_parameters()}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            factor = lr_multiplier(names[id(parameter)], 3, r.optimiser)
            assert group["lr"] == pytest.approx(1e-2 * factor)
        assert group["weight_decay"] == (0.1 if group["decayed"] else 0.0)


def test_prototypes_stay_in_the_freeze_and_their_moments_grow():
    r = recipe(lr=1e-2, warmup=0.0, freeze_last_layer=0.05)
    learner = Learner(r)
    optimiser = make_optimiser(learner.student, r)
    prototypes = learner.student["dino_head"].prototypes
    other = learner.student["dino_head"].mlp[0].weight
    before, other_before = prototypes.detach().clone(), other.detach().clone()
    for step in range(6):
        set_schedules(optimiser, r, step)
        for parameter in learner.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        assert torch.equal(prototypes, before) == (step < 5)  # .05 of 100 steps
        assert not torch.equal(other, other_before)
        assert optimiser.state[prototypes]["exp_avg"].abs().max() > 0


def test_the_first_teacher_is_an_average_with_the_updated_student():
    """teacher' = .992·teacher + .008·student, the student as it is after the optimiser's step (ssl.md §8.9)."""
    learner = Learner(recipe())
    start = {name: p.clone() for name, p in learner.teacher.named_parameters()}
    for parameter in learner.student.parameters():
        parameter.data += 0.5
    learner.update_teacher(0.992, 0)
    for name, parameter in learner.teacher.named_parameters():
        updated = start[name] + 0.5
        torch.testing.assert_close(parameter, 0.992 * start[name] + 0.008 * updated, rtol=1e-5, atol=1e-6)
    kept = {name: p.clone() for name, p in learner.teacher.named_parameters()}
    learner.update_teacher(1.0, 0)
    assert all(torch.equal(p, kept[name]) for name, p in learner.teacher.named_parameters())


def test_each_module_is_clipped_on_its_own():
    """A head's gradient a million times too large leaves the backbone's as it is (ssl.md §8.10)."""

    def clipped(factor: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        torch.manual_seed(0)
        student = nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter)
        for parameter in student["head"].parameters():
            parameter.grad *= factor
        norms = clip_gradients(student, 0.5)
        return {n: p.grad.clone() for n, p in student.named_parameters()}, {n: float(v) for n, v in norms.items()}

    plain, norms = clipped(1.0)
    huge, huge_norms = clipped(1e6)
    for name in ("backbone.weight", "backbone.bias"):
        assert torch.equal(plain[name], huge[name])
    assert huge_norms["head"] == pytest.approx(1e6 * norms["head"], rel=1e-5)
    assert huge_norms["backbone"] == norms["backbone"]
    total = math.sqrt(sum(float(huge[f"head.{part}"].square().sum()) for part in ("weight", "bias")))
    assert total == pytest.approx(0.5, rel=1e-4)


def test_the_presets_say_what_their_papers_say():
    """Curia-2: global batch and iterations; DINOv2: prototypes and drop path."""
    b, g = RECIPES["curia2-b"], RECIPES["curia2-g"]
    assert (b.run.batch_size, b.run.steps, b.model.size, b.views.num_local) == (3840, 125_000, "base", 8)
    assert (g.run.batch_size, g.run.steps, g.model.drop_path) == (2560, 156_300, 0.4)
    assert b.run.batch_size * b.run.steps == 480_000_000


def test_initial_weights():
    """DINOv2: linears truncated normal .02, class token 1e-6, mask token zero, LayerScale 1e-5."""
    torch.manual_seed(0)
    model = ViT(MODEL)
    weight = model.blocks[0].mlp.fc1.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(weight.abs().max()) <= 2.0
    assert float(model.cls_token.detach().abs().max()) < 1e-5
    assert not model.mask_token.any()
    assert (model.blocks[1].ls2.gamma == 1e-5).all()
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))
