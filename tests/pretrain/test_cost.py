"""FLOPs against the table of the facts and torch's own counter; sizes and memory against what torch holds."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hilum.encode import attention
from hilum.encode.shape import SIZES, ViTConfig
from hilum.encode.vit import ViT
from hilum.pretrain.cost import (
    activation_bytes,
    backbone_parameters,
    checkpoint_bytes,
    crop_tokens,
    flops_per_image,
    head_parameters,
    hidden_patches,
    memory,
)
from hilum.pretrain.distill import Learner
from hilum.pretrain.presets import RECIPES
from hilum.pretrain.recipe import Recipe
from hilum.settings import override

# TFLOP of one image at 256/96 px, 4 registers, 65,536 prototypes: student (no drop path), teacher, heads, total, and
# the total with drop path .3 (B, L) or .4 (g). Student tokens: 850.
TABLE = {
    "curia2-b": (0.451, 0.094, 0.016, 0.560, 0.425, 0.3),
    "curia2-l": (1.586, 0.329, 0.016, 1.930, 1.455, 0.3),
    "curia2-g": (5.888, 1.216, 0.017, 7.121, 4.766, 0.4),
}


@pytest.mark.parametrize("name", TABLE)
def test_flops_of_the_table(name):
    student, teacher, heads, total, dropped, drop_path = TABLE[name]
    settings = ["model.num_registers=4", "objective.prototypes=65536"]
    plain = override(RECIPES[name], [*settings, "model.drop_path=0"])
    found = flops_per_image(plain)
    assert found.total / 1e12 == pytest.approx(total, rel=0.01)
    assert found.student / 1e12 == pytest.approx(student, rel=0.01)
    assert found.teacher / 1e12 == pytest.approx(teacher, rel=0.01)
    assert found.heads / 1e12 == pytest.approx(heads, abs=0.0006)
    with_drop = flops_per_image(override(plain, [f"model.drop_path={drop_path}"]))
    assert with_drop.total / 1e12 == pytest.approx(dropped, rel=0.01)
    assert sum(count * tokens for count, tokens in crop_tokens(plain)) == 850


@pytest.mark.parametrize(("drop_path", "total"), [(0.0, 1.395), (0.1, 1.286)])
def test_flops_of_voxelfm(drop_path, total):
    """TFLOP of a volume with 2 crops of 112³ and 8 of 56³, half of the crops masked at 10 to 50 %."""
    masks = ["views.mask_probability=0.5", "views.mask_ratio=[0.1, 0.5]", f"model.drop_path={drop_path}"]
    cubes = override(RECIPES["voxelfm-paper"], masks)
    assert flops_per_image(cubes).total / 1e12 == pytest.approx(total, abs=0.0006)
    assert crop_tokens(cubes) == [(2, 517), (8, 69)]
    long = override(RECIPES["voxelfm"], [f"model.drop_path={drop_path}"])  # long shapes with about as many patches
    assert flops_per_image(long).total == pytest.approx(flops_per_image(cubes).total, rel=0.01)
    assert backbone_parameters(long.model) == 110_029_536  # the released encoder's


def test_a_teacher_that_is_asked_for_part_of_the_run_counts_for_that_part():
    plain = flops_per_image(RECIPES["curia2-b"])
    late = flops_per_image(override(RECIPES["curia2-b"], ["objective.handover=0.25"]))
    assert (late.student, late.teacher) == (plain.student, pytest.approx(0.75 * plain.teacher))
    same = ["objective.gram_weight=2", "objective.gram_start=0.5", "objective.gram_px=256"]
    anchored = flops_per_image(override(RECIPES["curia2-b"], same))
    assert anchored.teacher == pytest.approx(1.5 * plain.teacher)


def test_hidden_patches():
    """128 crops of 16×16 patches hide 4,941 in DINOv3's exact count; the mean of the range gives 4,915."""
    assert hidden_patches(RECIPES["curia2-b"]) * 64 == pytest.approx(4941, rel=0.006)


SMALL = [
    "model.size=nano",
    "model.image=[64, 64]",
    "model.drop_path=0",
    "views.global_px=64",
    "views.local_px=32",
    "objective.hidden=32",
    "objective.bottleneck=16",
    "objective.prototypes=64",
]


@pytest.mark.parametrize("base", ["tiny", "small"])
def test_flops_against_torchs_counter(base):
    """Forward, backward and the heads, counted by torch as it runs."""
    from hilum.pretrain.loader import Batch

    settings = [*SMALL, "run.batch_size=4", "run.precision=fp32", "model.num_registers=2", "objective.regulariser=none"]
    if base == "tiny":
        settings.append("objective.patch_weight=0")
    recipe = override(RECIPES[base], settings)
    learner = Learner(recipe)
    masks = torch.zeros(8, 16, dtype=torch.bool)
    share = hidden_patches(recipe) * 4
    masks.view(-1)[torch.arange(round(share))] = True
    hidden, points = masks.flatten().nonzero()[:, 0], torch.zeros(2, 4, 16, 2)
    batch = Batch(torch.randn(8, 1, 64, 64), torch.randn(16, 1, 32, 32), masks, hidden, points, 1.0, 0.0)
    learner.train()
    with FlopCounterMode(display=False) as counter:
        learner(batch, 0).loss.backward()
    assert counter.get_total_flops() / 4 == pytest.approx(flops_per_image(recipe).total, rel=0.06)


@pytest.mark.parametrize("name", ["tiny", "small", "curia2-b", "curia2-g", "small3d", "voxelfm", "curia2-3d"])
def test_parameters_are_those_of_the_module(name):
    recipe = override(RECIPES[name], ["model.num_registers=3"])
    with torch.device("meta"):
        learner = Learner(recipe)
    backbone = sum(p.numel() for p in learner.student["backbone"].parameters())
    assert backbone_parameters(recipe.model) == backbone
    assert head_parameters(recipe) == sum(p.numel() for p in learner.student.parameters()) - backbone
    assert (
        backbone_parameters(ViTConfig(positions="rotary")) == 85_483_008 - 257 * 768
    )  # facts: ViT-B with SwiGLU at 256


def test_a_checkpoint_is_as_large_as_reckoned(tmp_path):
    from hilum.pretrain.checkpoint import CheckpointWriter, last_checkpoint
    from hilum.pretrain.optim import make_optimiser

    recipe = override(RECIPES["small"], SMALL)
    learner = Learner(recipe)
    optimiser = make_optimiser(learner.student, recipe)
    for p in learner.student.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    with CheckpointWriter(tmp_path, recipe.hash) as writer:
        writer.save(learner, optimiser, 1)
    path = last_checkpoint(tmp_path)
    assert path is not None
    assert sum(file.stat().st_size for file in path.iterdir()) == pytest.approx(checkpoint_bytes(recipe), rel=0.1)


def kept_for_backward(recipe: Recipe, num: int) -> float:
    """Bytes that autograd keeps of the student's blocks; weights, cast or with LayerScale folded in, aside."""
    torch.manual_seed(0)
    model = ViT(recipe.model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {p.numel() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and x.numel() not in sizes:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(x)
        return x

    views = recipe.views
    crops = [
        torch.randn(num * count, 1, px, px)
        for count, px in ((views.num_global, views.global_px), (views.num_local, views.local_px))
    ]
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=recipe.run.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), bf16:
        model.train().encode_crops(crops, [None, None], torch.Generator().manual_seed(0))
    return sum(kept.values())


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "hidden"), [("mlp", 512), ("swiglu", 344)])
def test_activations_are_what_autograd_keeps(monkeypatch, kind, hidden, precision, drop_path):
    """With the fused attention kernel that a GPU has, too; a CPU also keeps the weights of its products."""
    monkeypatch.setattr(attention, "PRODUCTS_UP_TO", 0)
    monkeypatch.setitem(SIZES, "tiny", (128, 8, 2, kind, hidden))
    settings = [
        f"run.precision={precision}",
        f"model.drop_path={drop_path}",
        "model.size=tiny",
        "model.image=[208, 208]",
    ]
    settings += ["views.global_px=208", "views.local_px=192", "views.num_local=1"]
    recipe = override(RECIPES["curia2-b"], settings)
    assert kept_for_backward(recipe, 2) / 2 == pytest.approx(activation_bytes(recipe, False), rel=0.1)


def test_what_checkpointing_and_sharing_out_save():
    recipe = RECIPES["curia2-l"]
    plain, lean = memory(recipe, 48), memory(recipe, 48, checkpoint_blocks=True, shards=64)
    assert lean.activations < plain.activations / 4
    assert (lean.heads, lean.casts) == (plain.heads, plain.casts)
    assert lean.moments * 64 == pytest.approx(plain.moments)
    assert memory(recipe, 96).activations == 2 * plain.activations
    assert memory(recipe, 96).state == plain.state


def test_the_papers_batches_fit_its_devices():
    """Curia-2 trained on A100 of 64 GB with 120, 48 and 20 slices each, the giant surely shared out."""
    for name, batch, shards in (("curia2-b", 120, 1), ("curia2-l", 48, 1), ("curia2-g", 20, 128)):
        total = memory(RECIPES[name], batch, shards=shards).total
        assert 0.4 * 64e9 < total < 64e9, name
    assert memory(replace(RECIPES["curia2-b-512"]), 120).total > 64e9
