"""Recipes as values, by name and as files."""

from dataclasses import replace

import pytest

from hilum.encode.vit import ViTConfig
from hilum.errors import UsageError
from hilum.pretrain.presets import RECIPES, load_recipe
from hilum.pretrain.recipe import Recipe, Run
from hilum.records import hash_json
from hilum.settings import from_dict, override, to_dict


@pytest.mark.parametrize("name", RECIPES)
def test_presets_survive_json(name):
    recipe = RECIPES[name]
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert load_recipe(name) is recipe
    assert recipe.name == name


def test_recipes_differ():
    assert len({hash_json(to_dict(r)) for r in RECIPES.values()}) == len(RECIPES)


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(UsageError, match=r"no recipe 'huge'; known: tiny, .*curia2-g, .*or a TOML file"):
        load_recipe("huge")


def test_a_toml_file_names_its_base_and_what_differs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "curia2-b"\n[run]\nsteps = 7\n[views]\nglobal_scale = [0.5, 1]\n')
    base = RECIPES["curia2-b"]
    wanted = replace(
        base, name="mine", run=replace(base.run, steps=7), views=replace(base.views, global_scale=(0.5, 1.0))
    )
    assert load_recipe(str(path)) == wanted


def test_a_toml_file_builds_on_another_and_on_tiny_by_default(tmp_path):
    (tmp_path / "a.toml").write_text("[run]\nseed = 3\n")
    assert load_recipe(str(tmp_path / "a.toml")) == replace(
        RECIPES["tiny"], name="a", run=replace(RECIPES["tiny"].run, seed=3)
    )
    (tmp_path / "b.toml").write_text(f'base = "{tmp_path / "a.toml"}"\nname = "given"\n[run]\nsteps = 4\n')
    found = load_recipe(str(tmp_path / "b.toml"))
    assert (found.name, found.run.seed, found.run.steps) == ("given", 3, 4)


def test_mistakes_in_a_toml_file_are_told_together(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('learning_rate = 1\n[run]\nsteps = "many"\n[views]\nglobl_px = 3\n')
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    for part in ("bad.toml", "unknown setting learning_rate", "run.steps: expected a whole number", "views.globl_px"):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(str(tmp_path / "absent.toml"))
    path.write_text("[run")
    with pytest.raises(UsageError, match="is no TOML"):
        load_recipe(str(path))
    path.write_text('base = "huge"\n')
    with pytest.raises(UsageError, match="no recipe 'huge'"):
        load_recipe(str(path))


def test_overrides_keep_the_checks():
    recipe = override(RECIPES["tiny"], ["run.steps=9", "objective.kind=dino", "views.local_px=64"])
    assert (recipe.run.steps, recipe.objective.kind, recipe.views.local_px) == (9, "dino", 64)
    with pytest.raises(UsageError, match=r"views\.local_px 50 is no multiple of the patch"):
        override(RECIPES["tiny"], ["views.local_px=50"])
    with pytest.raises(UsageError, match=r"'run\.step=9' is no setting \(known here: steps, "):
        override(RECIPES["tiny"], ["run.step=9"])


def test_what_would_end_a_run_later_is_refused_at_once():
    for settings, message in (
        (["objective.gram_weight=2", "objective.gram_px=500"], r"objective\.gram_px 500 is no multiple"),
        (["objective.kind=dino", "objective.regulariser=koleo", "run.batch_size=4", "run.accumulate=4"], "two slices"),
        (["objective.kind=dino", "views.mask_group=1", "views.mask_probability=0.4"], "needs a masked crop"),
    ):
        with pytest.raises(UsageError, match=message):
            override(RECIPES["tiny"], settings)


def test_crops_of_volumes_are_whole_patches():
    with pytest.raises(UsageError, match=r"volumes\.shapes: \(56, 56, 56\) is no multiple of the patch \(8, 16, 16\)"):
        Recipe(name="x", model=ViTConfig(patch=(8, 16, 16), image=(32, 256, 256)), run=Run())


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("views.num_local=-1", r"views\.num_local must be at least 0; found -1"),
        ("views.mask_probability=1.5", r"views\.mask_probability must be between 0 and 1; found 1\.5"),
        ("views.mask_sigma=0", r"views\.mask_sigma must be above 0; found 0"),
        ("objective.prototypes=0", r"objective\.prototypes must be at least 1; found 0"),
        ("objective.ibot_weight=-1", r"objective\.ibot_weight must be at least 0; found -1"),
        (
            "objective.teacher_temperature=[0, 0.07]",
            r"temperatures must be at least 0\.025, or they leave fp32; found 0\.0",
        ),
        (
            "objective.teacher_warmup=37500",
            r"objective\.teacher_warmup must be a share of the run, 0 to 1; found 37500",
        ),
        ("objective.regulariser_weight=2", r"objective\.regulariser_weight must be at most 1; found 2"),
        ("optimiser.lr=0", r"optimiser\.lr must be above 0; found 0"),
        ("optimiser.warmup=12500", r"optimiser\.warmup must be a share of the run, 0 to 1; found 12500"),
        ("optimiser.momentum=[0.9, 1.1]", r"optimiser\.momentum must be two numbers, 0 to 1; found \(0\.9, 1\.1\)"),
        ("optimiser.betas=[0.9, 1.0]", r"optimiser\.betas must be two numbers, 0 to below 1"),
        ("optimiser.weight_decay=[-1, 0.4]", r"optimiser\.weight_decay must be two numbers, at least 0"),
        ("run.steps=-1", r"run\.steps must be at least 0; found -1"),
        ("run.batch_size=0", r"run\.batch_size must be at least 1; found 0"),
    ],
)
def test_values_out_of_range_say_what_is_expected(assignment, message):
    with pytest.raises(UsageError, match=message):
        override(RECIPES["tiny"], [assignment])
