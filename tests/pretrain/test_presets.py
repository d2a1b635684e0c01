"""Presets: the paper's numbers, the ladder row by row, and an origin for every value."""

import typing
from dataclasses import replace

import pytest

from hilum.errors import UsageError
from hilum.pretrain.describe import (
    NOT_IN_3D,
    check_read,
    describe,
    format_list,
    format_recipe,
    last_change,
    leaves,
    show,
    what_differs,
)
from hilum.pretrain.origins import SETTINGS, Change, Origin
from hilum.pretrain.presets import PRESETS, RECIPES, apply, find_base, load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.settings import differences, override, to_dict

AT_512 = {"model.image", "views.global_px", "views.local_px"}
# Table 2 of Curia-2, and what each row changes in the one before.
LADDER = [
    {"views.min_image_foreground", "views.min_crop_foreground"},
    {"objective.regulariser"},
    {"objective.regulariser", "objective.regulariser_weight"},
    {"views.mask_prior"},
    {"optimiser.lr"},
    {*AT_512, "run.steps", "needs_start"},
    {
        "objective.teacher_temperature",
        "optimiser.lr",
        "optimiser.weight_decay",
        "optimiser.momentum",
        "optimiser.freeze_last_layer",
        "run.steps",
        "run.batch_size",
    },
]


def changed(a: Recipe, b: Recipe) -> set[str]:
    return {line.split(":")[0] for line in differences(to_dict(a), to_dict(b))} - {"name"}


# ---- the ladder


@pytest.mark.parametrize("row", range(1, 8))
def test_each_row_changes_what_the_paper_says_and_nothing_else(row):
    assert changed(RECIPES[f"ablation/{row - 1}"], RECIPES[f"ablation/{row}"]) == LADDER[row - 1]


def test_the_ladder_starts_at_dinov2_and_ends_at_curia2():
    first = RECIPES["ablation/0"]
    assert (first.objective.regulariser, first.views.mask_prior, first.optimiser.lr) == ("koleo", "uniform", 5e-4)
    assert (first.views.min_image_foreground, first.views.min_crop_foreground) == (0, 0)
    assert first.views.global_px == 256
    assert changed(RECIPES["ablation/5"], RECIPES["curia2-b"]) == set()
    assert changed(RECIPES["ablation/7"], RECIPES["curia2-b-512"]) == set()
    assert RECIPES["ablation/6"].run.steps == 0


def test_the_numbers_of_the_paper():
    """Curia-2, Table 1 and section 3: devices × batch, iterations, learning rate; 20,000 iterations at 512 pixels."""
    for name, (batch, steps, size) in {
        "curia2-b": (32 * 120, 125_000, "base"),
        "curia2-l": (64 * 48, 156_300, "large"),
        "curia2-g": (128 * 20, 156_300, "giant"),
    }.items():
        recipe = RECIPES[name]
        assert (recipe.run.batch_size, recipe.run.steps, recipe.model.size) == (batch, steps, size)
        assert (recipe.optimiser.lr, recipe.views.min_image_foreground, recipe.views.min_crop_foreground) == (
            1e-3,
            0.5,
            0.3,
        )
        assert (recipe.views.num_global, recipe.views.num_local, recipe.model.patch) == (2, 8, (16, 16))
        fine = RECIPES[f"{name}-512"]
        assert (fine.run.steps, fine.views.global_px, fine.model.image) == (20_000, 512, (512, 512))
    assert RECIPES["curia-b"].run.steps == 475_000
    assert RECIPES["curia-b"].optimiser.lr == 5e-4


# ---- origins


def test_every_setting_of_every_class_has_unit_meaning_and_origin():
    assert set(leaves(to_dict(Recipe(name="x")))) - {"name"} == set(SETTINGS)
    for name, setting in SETTINGS.items():
        for text in (setting.unit, setting.meaning, setting.why):
            assert text.strip() == text != "", name
        assert setting.origin in typing.get_args(Origin), name


@pytest.mark.parametrize("name", PRESETS)
def test_every_change_of_a_preset_is_one_and_says_why(name):
    preset = PRESETS[name]
    settings = [change.setting for change in preset.changes]
    assert len(settings) == len(set(settings))
    base = RECIPES[preset.base] if preset.base else Recipe(name="x")
    before = leaves(to_dict(base))
    for change in preset.changes:
        assert change.why.strip()
        assert change.origin in typing.get_args(Origin)
        if leaves(to_dict(RECIPES[name]))[change.setting] == before[change.setting]:
            above = last_change(preset.base, change.setting) or SETTINGS[change.setting]
            assert (change.origin, change.why) != (above.origin, above.why), f"{change.setting} says nothing new"
    assert changed(base, RECIPES[name]) <= set(settings)


@pytest.mark.parametrize(
    ("name", "setting", "origin"),
    [
        ("curia2-b", "optimiser.lr", "paper"),
        ("ablation/0", "optimiser.lr", "paper"),
        ("curia2-b-512", "optimiser.lr", "ours"),
        ("tiny", "optimiser.lr", "ours"),
        ("small", "optimiser.lr", "ours"),
        ("small", "objective.kind", "paper"),
        ("small", "views.global_px", "ours"),
        ("curia2-b", "run.steps", "paper"),
        ("curia-b", "run.steps", "code"),
        ("curia-l", "run.steps", "ours"),
        ("curia2-g", "objective.prototypes", "code"),
        ("curia2-g", "objective.regulariser_weight", "ours"),
        ("ablation/0", "objective.regulariser_weight", "code"),
        ("ablation/7", "objective.regulariser_weight", "ours"),
        ("curia2-l-512", "run.batch_size", "ours"),
        ("curia2-l-512", "run.steps", "paper"),
    ],
)
def test_the_origin_of_a_value_is_that_of_the_last_change(name, setting, origin):
    (line,) = [line for line in describe(RECIPES[name], name) if line.setting == setting]
    assert line.origin == origin
    assert line.value == leaves(to_dict(RECIPES[name]))[setting]


def test_what_the_user_changed_is_the_users(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "curia2-l"\n[run]\nsteps = 7\n')
    recipe = override(load_recipe(str(path)), ["views.flip=0.5"])
    lines = {line.setting: line for line in describe(recipe, str(path))}
    assert {name for name, line in lines.items() if line.origin == "yours"} == {"run.steps", "views.flip"}
    assert lines["run.steps"].why == "curia2-l has 156,300"
    assert what_differs(recipe, str(path)) == ("curia2-l", ["run.steps: 156300 ≠ 7", "views.flip: 0.0 ≠ 0.5"])
    assert find_base(str(path)) == "curia2-l"
    assert "yours" in format_recipe(recipe, str(path))


# ---- pages


def test_the_list_is_whole_and_fits():
    text = format_list()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "…" not in text
    for name in PRESETS:
        assert f"\n{name} " in text


@pytest.mark.parametrize("name", PRESETS)
def test_a_page_shows_every_setting_within_its_width(name):
    text = format_recipe(RECIPES[name], name)
    assert all(len(line) <= 100 for line in text.splitlines())
    rows = {line.split()[0] for line in text.splitlines() if line.strip()}
    read = [n for n in SETTINGS if (n not in NOT_IN_3D if RECIPES[name].is_3d else not n.startswith("volumes."))]
    assert {setting.rpartition(".")[2] for setting in read} <= rows
    assert ("min_share" in rows) == RECIPES[name].is_3d
    if PRESETS[name].base:
        assert f"It differs from {PRESETS[name].base} in:" in text


@pytest.mark.parametrize(("name", "asked"), [("small3d", "views.flip=0.5"), ("tiny", "volumes.flip=0.3")])
def test_a_setting_that_nothing_reads_is_refused(name, asked):
    setting = asked.partition("=")[0]
    with pytest.raises(UsageError, match=rf"nothing reads {setting};.*--show {name}"):
        check_read(override(RECIPES[name], [asked]), name)


def test_settings_that_are_read_pass_and_so_do_files(tmp_path):
    check_read(override(RECIPES["small3d"], ["volumes.flip=0.5", "views.num_local=2"]), "small3d")
    mine = tmp_path / "mine.toml"  # what slices alone have must be taken away in 3D
    mine.write_text(
        'base = "tiny"\nmodel = {patch = [8, 8, 8], image = [48, 48, 48]}\n'
        "[volumes]\nshapes = [[[48, 48, 48], [24, 24, 24], 1.0]]\n"
        "[views]\nct = {blur = 0.0, window = 0.0}\nmr = {blur = 0.0}\n"
    )
    check_read(load_recipe(str(mine)), str(mine))
    for preset, recipe in RECIPES.items():
        check_read(recipe, preset)


def test_a_row_tells_what_differs_from_the_row_before():
    text = format_recipe(RECIPES["ablation/3"], "ablation/3")
    assert "ablation/3: + SigReg\n\nIt differs from ablation/2 in:\n  objective.regulariser: none → sigreg\n" in text


def test_a_change_reaches_settings_at_the_top_and_below():
    recipe = apply(RECIPES["tiny"], [Change("name", "x", "ours", "w"), Change("run.steps", 3, "ours", "w")])
    assert recipe == replace(RECIPES["tiny"], name="x", run=replace(RECIPES["tiny"].run, steps=3))
    with pytest.raises(UsageError):
        apply(RECIPES["tiny"], [Change("views.local_px", 50, "ours", "w")])


def test_values_are_written_as_a_reader_would():
    assert [show(v) for v in (1e-6, 0.07, 125_000, True, "sigreg", "", (0.04, 0.07), ())] == [
        "1e-06", "0.07", "125,000", "yes", "sigreg", "–", "0.04, 0.07", "–",
    ]  # fmt: skip
    assert show(((40.0, 400.0), (-600.0, 1500.0))) == "(40, 400), (-600, 1500)"
