"""Where a run begins: another run's teacher, an encoder, released weights; and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from hilum.encode.contract import Contract
from hilum.encode.encoder import write_encoder
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.zoo import open_folder
from hilum.errors import CheckpointError, UsageError
from hilum.pretrain.checkpoint import last_checkpoint, read_learner
from hilum.pretrain.distill import Learner
from hilum.pretrain.loop import pretrain
from hilum.pretrain.presets import RECIPES
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.start import initialise, read_start
from hilum.records import read_json


def twice(recipe: Recipe, **changes) -> Recipe:
    """The stage at twice the side."""
    model, views = replace(recipe.model, image=(64, 64)), replace(recipe.views, global_px=64, local_px=32)
    return replace(recipe, name="twice", model=model, views=views, needs_start=True, **changes)


@pytest.fixture(scope="module")
def run(small, store_path, tmp_path_factory):
    """A short run of DINO with running centres, finished."""
    recipe = replace(small["dino, ema"], run=replace(small["dino, ema"].run, steps=4))
    out = tmp_path_factory.mktemp("start") / "run"
    pretrain(recipe, store_path, out)
    return recipe, out


def last_learner(out):
    return read_learner(last_checkpoint(out / "checkpoints"))[0]


# ---- from a run


def test_a_stage_without_training_exports_what_the_transformer_does_at_that_size(run, store_path, tmp_path):
    """Rung 6 of the ladder: the run's encoder with positions interpolated, which is the same function on larger images."""
    recipe, out = run
    record = pretrain(
        twice(recipe, start_from=str(out), run=replace(recipe.run, steps=0)), store_path, tmp_path / "run"
    )
    before, after = open_folder(out / "export"), open_folder(tmp_path / "run" / "export")
    assert before.grid == (4, 4)
    assert after.grid == (8, 8)
    images = torch.randn(2, 1, 64, 64)
    for a, b in zip(before.tokens(images), after.tokens(images)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert after.contract.size_px == 64
    assert record["status"] == "finished"
    assert record["start"]["step"] == 4
    assert record["start"]["changes"] == ["positions interpolated from 4×4 to 8×8 (bicubic)"]
    assert record["start"]["heads"] == {"dino_head": "taken", "ibot_head": "taken"}
    assert record == read_json(tmp_path / "run" / "run.json")
    assert record["start"]["summary"] in (tmp_path / "run" / "export" / "README.md").read_text()
    assert (
        pretrain(twice(recipe, start_from=str(out), run=replace(recipe.run, steps=0)), store_path, tmp_path / "run")
        == record
    )


def test_student_and_teacher_begin_as_the_teacher_ended(run):
    recipe, out = run
    left = last_learner(out)
    learner = Learner(recipe)
    initialise(learner, replace(recipe, start_from=str(out)))
    state = learner.state_dict()
    for name, tensor in state.items():
        side, _, rest = name.partition(".")
        expected = left[f"teacher.{rest}"] if side in ("student", "teacher") else left[name]
        assert torch.equal(tensor, expected), name
    assert any(
        not torch.equal(left[n], left[n.replace("teacher", "student", 1)]) for n in left if n.startswith("teacher")
    )


def test_the_anchor_of_a_gram_stage_begins_as_the_teacher_ended(run):
    recipe, out = run
    objective = replace(recipe.objective, gram_weight=1.0, gram_start=0.0, gram_px=64)
    learner = Learner(replace(recipe, objective=objective))
    initialise(learner, replace(recipe, objective=objective, start_from=str(out)))
    left = last_learner(out)
    assert all(
        torch.equal(tensor, left[f"teacher.backbone.{name}"]) for name, tensor in learner.gram.state_dict().items()
    )


def test_heads_of_other_shapes_stay_drawn(run):
    recipe, out = run
    other = replace(recipe, start_from=str(out), objective=replace(recipe.objective, prototypes=25))
    learner = Learner(other)
    drawn = {n: t.clone() for n, t in learner.student["dino_head"].state_dict().items()}
    record = initialise(learner, other)
    assert record["heads"] == {"dino_head": "drawn (other shapes)", "ibot_head": "drawn (other shapes)"}
    assert all(torch.equal(drawn[n], t) for n, t in learner.teacher["dino_head"].state_dict().items())
    assert torch.equal(
        learner.state_dict()["student.backbone.pos_embed"], last_learner(out)["teacher.backbone.pos_embed"]
    )
    assert not learner.get_buffer("dino_center").any()


def test_a_run_that_is_begun_from_another_objective_takes_the_backbone(run, small):
    recipe, out = run
    other = replace(small["lejepa"], start_from=str(out), model=recipe.model)
    assert initialise(Learner(other), other)["heads"] == {"projector": "drawn (the run has none)"}


def test_a_stage_can_start_from_a_stage_that_trained_nothing(run, store_path, tmp_path):
    recipe, out = run
    stage = twice(recipe, start_from=str(out), run=replace(recipe.run, steps=0))
    pretrain(stage, store_path, tmp_path / "run")
    start = read_start(tmp_path / "run")
    assert (start.step, start.weights.config.grid, start.others) == (None, (8, 8), {})


# ---- resume


def test_a_stage_resumes_from_its_checkpoint_and_checks_where_it_began(run, store_path, tmp_path):
    recipe, out = run
    stage = twice(recipe, start_from=str(out), run=replace(recipe.run, steps=4, checkpoint_every=2))
    whole = pretrain(stage, store_path, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done: int, total: int | None, what: str) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        pretrain(stage, store_path, tmp_path / "parts", progress=stop)
    encoder = tmp_path / "encoder"
    write_encoder(encoder, ViT(recipe.model), Contract(size_px=32), {})
    for other in (str(encoder), ""):
        with pytest.raises(CheckpointError, match=f"began from {out}"):
            pretrain(replace(stage, start_from=other), store_path, tmp_path / "parts")
    pretrain(
        replace(stage, start_from=str(out / ".." / out.name)), store_path, tmp_path / "parts"
    )  # the same by another name
    left, right = last_learner(tmp_path / "whole"), last_learner(tmp_path / "parts")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert whole["start"]["hash"] == read_json(tmp_path / "parts" / "run.json")["start"]["hash"]


def test_a_start_that_is_gone_is_not_missed_after_the_first_checkpoint(run, store_path, tmp_path):
    recipe, _ = run
    write_encoder(tmp_path / "encoder", ViT(recipe.model), Contract(size_px=32), {})
    stage = replace(recipe, start_from=str(tmp_path / "encoder"), run=replace(recipe.run, steps=2, checkpoint_every=1))

    class Stop(Exception):
        pass

    def stop(done: int, total: int | None, what: str) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        pretrain(stage, store_path, tmp_path / "run", progress=stop)
    (tmp_path / "encoder").rename(tmp_path / "elsewhere")
    assert pretrain(stage, store_path, tmp_path / "run")["status"] == "finished"


# ---- refusals


def test_a_stage_without_a_start_says_what_to_give(run, store_path, tmp_path):
    recipe, out = run
    with pytest.raises(UsageError, match="recipe twice continues another run; say which: --from RUN"):
        pretrain(twice(recipe), store_path, tmp_path / "run")
    assert pretrain(
        twice(recipe, start_from=str(out), run=replace(recipe.run, steps=0)), store_path, tmp_path / "other"
    )
    assert [n for n, r in RECIPES.items() if r.needs_start] == [n for n in RECIPES if n.endswith(("-512", "/6", "/7"))]


def test_other_transformers_are_refused_with_the_settings_to_change(run, tmp_path):
    recipe, _ = run
    shape = ViTConfig(size="micro", patch=(16, 16), image=(32, 32), num_registers=2, norm_eps=1e-5, layer_scale=1.0)
    write_encoder(tmp_path, ViT(shape), Contract(size_px=32), {})
    with pytest.raises(UsageError) as refused:
        initialise(Learner(recipe), replace(recipe, start_from=str(tmp_path)))
    assert "patch (16, 16) where the recipe has (8, 8)" in str(refused.value)
    for change in ("size=micro", "patch=[16,16]", "num_registers=2", "norm_eps=1e-05", "layer_scale=1.0"):
        assert f"--set model.{change}" in str(refused.value)


def test_a_checkpoint_that_is_broken_or_no_file_at_all_is_an_error_of_the_user(tmp_path):
    with pytest.raises(UsageError, match="holds no weights"):
        read_start(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "index.json").write_bytes(b"x" * 100)
    (tmp_path / "run.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_start(tmp_path)
