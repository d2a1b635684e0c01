"""Recipes by name, as Python values: Curia and Curia-2 at every size, the paper's ablation ladder, and two for a CPU.

Curia-2 (arXiv 2604.01987) gives steps, batch, learning rates and what changed from row to row of its Table 2; whatever it does
not give is DINOv2's (arXiv 2304.07193, its public code) or ours. `hilum pretrain --show RECIPE` says which is which.
"""

from dataclasses import replace
from pathlib import Path

from hilum.encode.vit import ViTConfig
from hilum.errors import UsageError
from hilum.pretrain.recipe import Objective, Optimiser, Recipe, Run, ViewSpec
from hilum.settings import from_dict, merge, read_toml, to_dict

# Curia-2: global batch and iterations at 256 px. Drop path and prototypes: DINOv2's short recipe (B, L)
# and long recipe (g). The 512 px stage has the paper's 20,000 iterations and 8 of 32 devices, so a quarter of the batch (ours).
_SIZES = {
    "b": ("base", 3840, 125_000, 0.3, 65_536),
    "l": ("large", 3072, 156_300, 0.3, 65_536),
    "g": ("giant", 2560, 156_300, 0.4, 131_072),
}


def _curia2(letter: str, name: str) -> Recipe:
    size, batch_size, steps, drop_path, prototypes = _SIZES[letter]
    return Recipe(
        name=name,
        model=ViTConfig(size=size, image=(256, 256), drop_path=drop_path),
        objective=Objective(prototypes=prototypes),
        run=Run(steps=steps, batch_size=batch_size),
    )


def _curia(letter: str, name: str) -> Recipe:
    """Curia's first recipe: DINOv2 at 512 px, KoLeo, uniform masks, no look at the content. B ran 475,000 iterations."""
    recipe = _plain_dinov2(_curia2(letter, name))
    return replace(
        _at_512(recipe, name), run=replace(recipe.run, steps=475_000, batch_size=1024), optimiser=recipe.optimiser
    )


def _plain_dinov2(recipe: Recipe) -> Recipe:
    """Row 0 of Curia-2's ablation."""
    return replace(
        recipe,
        views=replace(recipe.views, min_image_foreground=0.0, min_crop_foreground=0.0, mask_prior="uniform"),
        objective=replace(recipe.objective, regulariser="koleo", regulariser_weight=0.1),
        optimiser=replace(recipe.optimiser, lr=5e-4),
    )


def _at_512(recipe: Recipe, name: str) -> Recipe:
    """The same at twice the side; local crops keep their share of the global side."""
    return replace(
        recipe,
        name=name,
        model=replace(recipe.model, image=(512, 512)),
        views=replace(recipe.views, global_px=512, local_px=192),
    )


def _high_resolution(recipe: Recipe, name: str) -> Recipe:
    """Curia-2's stage at 512 px: 20,000 iterations from a 256 px run on 8 devices instead of 32; schedules run anew."""
    return replace(
        _at_512(recipe, name),
        needs_start=True,
        optimiser=replace(
            recipe.optimiser,
            lr=recipe.optimiser.lr / 4,
            weight_decay=(recipe.optimiser.weight_decay[1],) * 2,
            momentum=(0.999, 1.0),
            freeze_last_layer=0.0,
        ),
        objective=replace(recipe.objective, teacher_temperature=(recipe.objective.teacher_temperature[1],) * 2),
        run=replace(recipe.run, steps=20_000, batch_size=recipe.run.batch_size // 4),
    )


def _ladder(base: Recipe) -> dict[str, Recipe]:
    """Table 2 of Curia-2 row by row; each step keeps the ones before."""
    plain = _plain_dinov2(base)
    views, optimiser = plain.views, plain.optimiser
    cropped = replace(views, min_image_foreground=0.5, min_crop_foreground=0.3)
    guided = replace(cropped, mask_prior="guided")
    without = replace(plain.objective, regulariser="none")
    sigreg = replace(plain.objective, regulariser="sigreg", regulariser_weight=base.objective.regulariser_weight)
    rows = [
        plain,
        replace(plain, views=cropped),
        replace(plain, views=cropped, objective=without),
        replace(plain, views=cropped, objective=sigreg),
        replace(plain, views=guided, objective=sigreg),
        replace(plain, views=guided, objective=sigreg, optimiser=replace(optimiser, lr=1e-3)),
    ]
    rows.append(
        replace(_high_resolution(rows[5], ""), run=replace(rows[5].run, steps=0))
    )  # positions interpolated, no training
    rows.append(_high_resolution(rows[5], ""))
    return {f"ablation/{n}": replace(row, name=f"ablation/{n}") for n, row in enumerate(rows)}


# Minutes on two cores. At this length DINO's prototypes stay cold while LeJEPA's invariance + SigReg learns from the first
# steps, and a small network that sees more slices beats a larger one (docs/log.md). Filters, views, masks and SigReg are
# Curia-2's; the same objective on patches stands where iBOT does.
_TINY = Recipe(
    name="tiny",
    model=ViTConfig(size="micro", image=(128, 128), layer_scale=0.0),
    views=ViewSpec(
        num_local=4,
        global_px=128,
        local_px=48,
        global_scale=(0.3, 1.0),
        local_scale=(0.05, 0.3),
        min_image_foreground=0.2,  # head MR and phantoms fill less of the field than the body CT of the paper
        mask_probability=1.0,
        mask_ratio=(0.2, 0.6),
    ),
    objective=Objective(
        kind="lejepa", hidden=256, projector_dim=64, sigreg_slices=256, patch_weight=1.0, patch_points=32
    ),
    optimiser=Optimiser(
        lr=2e-3,
        weight_decay=(0.04, 0.04),
        momentum=(0.98, 0.999),
        layer_decay=1.0,
        patch_embed_lr=1.0,
        freeze_last_layer=0.0,
    ),
    run=Run(steps=800, batch_size=48, checkpoint_every=100, num_workers=0),  # a worker takes a core from two
)

# An hour on two cores: the whole of Curia-2's recipe, teacher, prototypes and all, at the size of `tiny`.
_SMALL = replace(
    _TINY,
    name="small",
    views=replace(_TINY.views, mask_probability=0.5, mask_ratio=(0.1, 0.5)),
    objective=Objective(
        kind="dino", prototypes=1024, hidden=512, bottleneck=64, batch_norm=True, regulariser_on="bottleneck"
    ),
    optimiser=replace(_TINY.optimiser, lr=1e-3),
    run=replace(_TINY.run, steps=6000),
)

RECIPES: dict[str, Recipe] = {
    "tiny": _TINY,
    "small": _SMALL,
    **{f"curia-{n}": _curia(n, f"curia-{n}") for n in "bl"},
    **{f"curia2-{n}": _curia2(n, f"curia2-{n}") for n in "blg"},
    **{f"curia2-{n}-512": _high_resolution(_curia2(n, ""), f"curia2-{n}-512") for n in "blg"},
    **_ladder(_curia2("b", "")),
}


def load_recipe(name: str) -> Recipe:
    """A preset by name, or a TOML file: `base = "tiny"` and the settings that differ, e.g. `[run]` `steps = 100`.

    Raises UsageError that lists what is known.
    """
    if not name.endswith(".toml"):
        if name not in RECIPES:
            raise UsageError(f"no recipe '{name}'; known: {', '.join(RECIPES)}, or a TOML file")
        return RECIPES[name]
    values = read_toml(Path(name))
    base = to_dict(load_recipe(str(values.pop("base", "tiny"))))
    base["name"] = Path(name).stem
    return from_dict(Recipe, merge(base, values), name)
