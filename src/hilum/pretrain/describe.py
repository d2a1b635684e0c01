"""What recipes there are, and every value of one with its unit, meaning and origin. Loads no torch."""

import textwrap
from dataclasses import asdict, dataclass, replace
from typing import Any

from hilum.errors import UsageError
from hilum.pretrain.origins import SETTINGS, Change
from hilum.pretrain.presets import PRESETS, RECIPES, find_base
from hilum.pretrain.recipe import Recipe
from hilum.settings import differences, to_dict
from hilum.terminal import WIDTH, format_table, wrap_row

# settings of views that crops of volumes have no use for, or must leave out
NOT_IN_3D = frozenset(
    f"views.{name}"
    for name in (
        *("global_px", "local_px", "aspect", "flip", "min_image_foreground", "resolutions"),
        *("ct.blur", "ct.window", "ct.windows_hu", "mr.blur", "mr.window", "mr.windows_hu"),
    )
)
MAX_CELL = 22  # a longer value does not widen its column


@dataclass(frozen=True)
class Line:
    """One setting of a recipe; `origin` is paper, code, ours, or yours (from a TOML file or `--set`)."""

    setting: str
    value: Any
    unit: str
    meaning: str
    origin: str
    why: str


def leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"views.flip": 0.0, …}, in their order."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def unread_settings(recipe: Recipe) -> frozenset[str]:
    """Settings that training does not look at: those of slices in 3D, those of volumes in 2D."""
    return NOT_IN_3D if recipe.is_3d else frozenset(name for name in SETTINGS if name.startswith("volumes."))


def check_read(recipe: Recipe, name: str) -> None:
    """UsageError when a user changed what training does not look at; `name` as in `describe`."""
    preset, kind = leaves(to_dict(RECIPES[find_base(name)])), "volumes" if recipe.is_3d else "slices"
    unread, asked = unread_settings(recipe), leaves(to_dict(recipe))
    changed = [setting for setting, value in asked.items() if setting in unread and value != preset[setting]]
    if recipe.is_3d:  # what a recipe of volumes must set to 0 is refused elsewhere
        changed = [setting for setting in changed if asked[setting]]
    if changed:
        hint = "volumes.flip, volumes.shapes and others of volumes" if recipe.is_3d else "those of views"
        raise UsageError(
            f"recipe {recipe.name} trains on {kind}, where nothing reads {', '.join(changed)}; leave it out, or see {hint}: "
            f"hilum pretrain --show {name}"
        )


def describe(recipe: Recipe, name: str) -> list[Line]:
    """Every setting that a recipe reads, but its name.

    recipe   what will run: the recipe `name`, with changes or without
    name     a preset or TOML file; a value that differs from the preset below it is "yours"
    """
    preset = find_base(name)
    published = leaves(to_dict(RECIPES[preset]))
    unread, lines = unread_settings(recipe), []
    for setting, value in leaves(to_dict(recipe)).items():
        if setting == "name" or setting in unread:
            continue
        about = SETTINGS[setting]
        source = last_change(preset, setting) or about
        origin, why = (
            (source.origin, source.why)
            if value == published[setting]
            else ("yours", f"{preset} has {show(published[setting])}")
        )
        lines.append(Line(setting, value, about.unit, about.meaning, origin, why))
    return lines


def last_change(preset: str, setting: str) -> Change | None:
    """The change that gave a setting of a preset its value, if any did."""
    while preset:
        for change in PRESETS[preset].changes:
            if change.setting == setting:
                return change
        preset = PRESETS[preset].base
    return None


def list_recipes() -> list[dict[str, Any]]:
    """Name, size and purpose of every preset."""
    return [
        {
            "name": name,
            "model": recipe.model.size,
            "pixels": _crops(recipe),
            "batch": recipe.run.batch_size,
            "steps": recipe.run.steps,
            "what": PRESETS[name].about,
        }
        for name, recipe in RECIPES.items()
    ]


def _crops(recipe: Recipe) -> str:
    """The first shape of global and local crops."""
    power = "³" if recipe.is_3d else ""
    large, small, _ = recipe.crop_shapes[0]
    return f"{large[-1]}{power}/{small[-1]}{power}"


def format_list() -> str:
    rows = [list(row.values()) for row in list_recipes()]
    table = format_table(["name", "model", "pixels", "batch", "steps", "what it is"], rows)
    return (
        f"{table}\n\npixels: sides of the first global and local crops, ³ of volumes.\nhilum pretrain --show NAME: every "
        "value and its origin."
    )


def recipe_record(recipe: Recipe, name: str) -> dict[str, Any]:
    """The description as plain JSON values."""
    base, changed = what_differs(recipe, name)
    lines = [asdict(line) for line in describe(recipe, name)]
    return {"name": recipe.name, "base": base, "differs": changed, "settings": lines}


def what_differs(recipe: Recipe, name: str) -> tuple[str, list[str]]:
    """The preset that a recipe builds on and how it differs, as `objective.regulariser: none ≠ sigreg`.

    A preset builds on the one it names as its base ("" for none), a changed preset or a TOML file on a preset.
    """
    preset = find_base(name)
    base = PRESETS[preset].base if replace(recipe, name=preset) == RECIPES[preset] else preset
    if not base:
        return "", []
    return base, differences(to_dict(RECIPES[base]), to_dict(replace(recipe, name=base)))


def format_recipe(recipe: Recipe, name: str) -> str:
    """Every setting on a page of at most 100 columns, section by section."""
    lines = describe(recipe, name)
    base, changed = what_differs(recipe, name)
    text = [f"{recipe.name}: {PRESETS[name].about}" if name in PRESETS else recipe.name]
    if base:
        text += ["", f"It differs from {base} in:", *(_fold(f"  {c.replace(' ≠ ', ' → ')}", 4) for c in changed)]
    columns = ["setting", "value", "unit", "origin"]
    cells = [[line.setting.rpartition(".")[2], show(line.value), line.unit, line.origin] for line in lines]
    widths = [max(len(row[n]) for row in [columns, *cells] if len(row[n]) <= MAX_CELL) for n in range(4)]
    section = None
    for line, row in zip(lines, cells):
        if line.setting.rpartition(".")[0] != section:
            section = line.setting.rpartition(".")[0]
            text += [
                "",
                wrap_row([f"{section}." if section else "recipe", *columns[1:]], widths, "meaning (origin or reason)"),
            ]
            text += ["─" * WIDTH]
        text += [
            _fold(part, widths[0] + 2) for part in wrap_row(row, widths, f"{line.meaning} ({line.why})").splitlines()
        ]
    return "\n".join([*text, "", LEGEND])


def _fold(line: str, indent: int) -> str:
    """A line, or lines where a value is wider than the page."""
    return line if len(line) <= WIDTH else textwrap.fill(line, WIDTH, subsequent_indent=" " * indent)


LEGEND = """paper: Curia-2's, or the one named. code: DINOv2's, or the one named. ours: unpublished, or not so.
yours: from your file or --set. Change any by --set SECTION.NAME=VALUE, or in a TOML file."""


def show(value: Any) -> str:
    """A value as a reader would write it."""
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], list | tuple) and isinstance(value[0][0], list | tuple):  # shapes of crops
            return ", ".join(f"{_sides(a)}/{_sides(b)} ({show(weight)})" for a, b, weight in value)
        return ", ".join(f"({show(v)})" if isinstance(v, list | tuple) else show(v) for v in value) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value or "–"


def _sides(shape: Any) -> str:
    return f"{shape[0]}³" if len(set(shape)) == 1 else "×".join(map(str, shape))
