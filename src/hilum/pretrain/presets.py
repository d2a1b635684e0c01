"""Recipes by name: Curia and Curia-2 at every size, the paper's ablation ladder, volumes, and some for a CPU.

A preset is what a user's TOML file is, too: a base and the values that differ, here each with its origin (`origins.py`).
Curia-2 (arXiv 2604.01987) gives steps, batch, learning rates and what changed from row to row of its Table 2. Whatever it does
not give is DINOv2's (arXiv 2304.07193, its public code). Of DINOv2's two families of configurations the released config of
Curia has the marks of the long one (SwiGLU, drop path 0.4, chunked blocks), so values are that one's. Lengths of warm-ups, as
shares of the run, are the short one's, which has as many iterations as Curia-2.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hilum.errors import UsageError
from hilum.pretrain.origins import SETTINGS, Change
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.volume_presets import CURIA2_3D, PAPER, SMALL3D, VOXELFM
from hilum.settings import from_dict, merge, read_toml, to_dict


@dataclass(frozen=True)
class Preset:
    """What it is for, the preset it builds on ("" for the defaults of `recipe.py`), and what it changes there.

    A change to the value that is there already restates its origin.
    """

    about: str
    base: str
    changes: tuple[Change, ...]


_LONG = "DINOv2 vitl14, vitg14"

_CURIA2 = (
    Change("model.drop_path", 0.4, "code", "Curia's released config; DINOv2 vitl14, vitg14"),
    Change("optimiser.weight_decay", (0.04, 0.2), "code", _LONG),
    Change("optimiser.momentum", (0.994, 1.0), "code", _LONG),
    Change("optimiser.layer_decay", 1.0, "code", _LONG),
    Change("run.batch_size", 3840, "paper", "32 devices × 120"),
)
_LARGE = (
    Change("model.size", "large", "paper", "ViT-L"),
    Change("run.steps", 156_300, "paper", "iterations at 256 pixels"),
    Change("run.batch_size", 3072, "paper", "64 devices × 48"),
)
_GIANT = (
    Change("model.size", "giant", "paper", "ViT-g; shape of DINOv2's, 1.1 B where the paper says 1.3 B"),
    Change("objective.prototypes", 131_072, "code", "DINOv2 vitg14"),
    Change("run.steps", 156_300, "paper", "iterations at 256 pixels"),
    Change("run.batch_size", 2560, "paper", "128 devices × 20"),
)

_PLAIN = (
    Change("views.min_image_foreground", 0.0, "paper", "DINOv2 does not look at the content"),
    Change("views.min_crop_foreground", 0.0, "paper", "DINOv2 does not look at the content"),
    Change("views.mask_prior", "uniform", "paper", "DINOv2's blocks fall anywhere"),
    Change("objective.regulariser", "koleo", "paper", "DINOv2's"),
    Change("objective.regulariser_weight", 0.1, "code", "DINOv2"),
    Change("optimiser.lr", 5e-4, "paper", "before Curia-2 raised it"),
)
_AT_512 = (
    Change("model.image", (512, 512), "paper", "positions for 512 pixels"),
    Change("views.global_px", 512, "paper", "512 pixels"),
    Change("views.local_px", 192, "ours", "unpublished; the share of the global side that it has at 256"),
)


_GOES_ON = Change("needs_start", True, "paper", "goes on from a run at 256 pixels")


def _high_resolution(batch_size: int) -> tuple[Change, ...]:
    """Schedules of the stage at 512 pixels, all but its length unpublished: they begin where those at 256 ended."""
    return (
        Change("objective.teacher_temperature", (0.07, 0.07), "ours", "unpublished; where the 256 run ended (DINOv3)"),
        Change("optimiser.lr", 2.5e-4, "ours", "unpublished; a quarter, as the batch"),
        Change("optimiser.weight_decay", (0.2, 0.2), "ours", "unpublished; where the 256 run ended"),
        Change("optimiser.momentum", (0.999, 1.0), "ours", "unpublished; 0.999 is DINOv3's at this stage"),
        Change("optimiser.freeze_last_layer", 0.0, "ours", "the prototypes are warm already"),
        Change("run.steps", 20_000, "paper", "iterations at 512 pixels"),
        Change("run.batch_size", batch_size, "ours", "the paper says adjusted, 8 devices instead of 32 (B): a quarter"),
    )


_TINY = (
    Change("model.size", "micro", "ours", "in minutes, slices seen count more than width (docs/log.md)"),
    Change("model.image", (128, 128), "ours", "a quarter of the patches of 256"),
    Change("model.layer_scale", 0.0, "ours", "1e-5 starts with closed blocks; a short run has no time to open them"),
    Change("views.num_local", 4, "ours", "half the views, more slices"),
    Change("views.global_px", 128, "ours", "a quarter of the patches of 256"),
    Change("views.local_px", 48, "ours", "the share of the global side that it has at 256"),
    Change("views.global_scale", (0.3, 1.0), "ours", "near DINOv2's; not tuned"),
    Change("views.local_scale", (0.05, 0.3), "ours", "near DINOv2's; not tuned"),
    Change("views.min_image_foreground", 0.2, "ours", "head MR and phantoms fill less of the field than body CT"),
    Change("views.mask_probability", 1.0, "ours", "both global crops are masked: harder where the anatomy is"),
    Change("views.mask_ratio", (0.2, 0.6), "ours", "as in the run that was chosen (docs/log.md)"),
    Change(
        "objective.kind", "lejepa", "ours", "learns in minutes, while DINO's prototypes are still cold (docs/log.md)"
    ),
    Change("objective.hidden", 256, "ours", "twice the width of the network"),
    Change("objective.projector_dim", 64, "ours", "half the width of the network"),
    Change("objective.sigreg_slices", 256, "paper", "LeJEPA's algorithm"),
    Change("objective.patch_weight", 1.0, "ours", "stands where iBOT does; without it patches get worse (docs/log.md)"),
    Change("objective.patch_points", 32, "ours", "half of a crop's 64 patches"),
    Change("optimiser.lr", 2e-3, "ours", "best of what was tried (docs/log.md)"),
    Change("optimiser.weight_decay", (0.04, 0.04), "ours", "no time to overfit"),
    Change("optimiser.momentum", (0.98, 0.999), "ours", "the exported average must follow a run of 800 steps"),
    Change("optimiser.layer_decay", 1.0, "ours", "from scratch, all of 4 blocks must learn"),
    Change("optimiser.patch_embed_lr", 1.0, "ours", "from scratch, all of 4 blocks must learn"),
    Change("optimiser.freeze_last_layer", 0.0, "ours", "it has no prototypes"),
    Change("run.steps", 800, "ours", "some minutes on two cores"),
    Change("run.batch_size", 48, "ours", "SigReg needs dozens of samples, a CPU no more"),
    Change("run.checkpoint_every", 100, "ours", "a minute of work"),
    Change("run.num_workers", 0, "ours", "a worker takes a core from two (docs/log.md)"),
)
_SMALL = (
    Change("views.mask_probability", 0.5, "code", "DINOv2"),
    Change("views.mask_ratio", (0.1, 0.5), "code", "DINOv2"),
    Change("objective.kind", "dino", "paper", "DINO and iBOT"),
    Change("objective.prototypes", 256, "ours", "more than batches of 48 can use stay cold (docs/log.md)"),
    Change("objective.teacher_temperature", (0.04, 0.04), "ours", "short runs have no time to warm up"),
    Change("objective.hidden", 512, "ours", "four times the width of the network"),
    Change("objective.bottleneck", 64, "ours", "half the width of the network"),
    Change("objective.batch_norm", True, "ours", "without it heads need thousands of steps to leave their cold start"),
    Change("objective.regulariser_on", "bottleneck", "ours", "as in the run that learnt in minutes (docs/log.md)"),
    Change("objective.sigreg_slices", 1024, "ours", "unpublished; LeJEPA's 1024"),
    Change("objective.projector_dim", 32, "ours", "read by lejepa only"),
    Change("objective.patch_weight", 0.0, "ours", "read by lejepa only"),
    Change("objective.patch_points", 16, "ours", "read by lejepa only"),
    Change("optimiser.momentum", (0.95, 0.999), "ours", "0.994 averages too long for some thousand steps"),
    Change("optimiser.weight_decay", (0.0, 0.0), "ours", "too few steps to need it"),
    Change("optimiser.freeze_last_layer", 0.3, "ours", "prototypes that move at once fall together (docs/log.md)"),
    Change("run.steps", 6000, "ours", "an hour on two cores"),
)

_QUIETER = Change("objective.regulariser_weight", 0.05, "ours", SETTINGS["objective.regulariser_weight"].why)

PRESETS: dict[str, Preset] = {
    "tiny": Preset("minutes on a CPU: Curia-2's views, LeJEPA", "", _TINY),
    "small": Preset("an hour on a CPU: all of Curia-2", "tiny", _SMALL),
    "small3d": Preset("minutes on a CPU: volumes, LeJEPA", "tiny", SMALL3D),
    "small-curia2-3d": Preset(
        "an hour on a CPU: all of curia2-3d",
        "small3d",
        (*_SMALL[:-1], Change("run.steps", 3000, "ours", "an hour on two cores")),
    ),
    "voxelfm": Preset("VoxelFM, as its code has it", "", VOXELFM),
    "voxelfm-paper": Preset("VoxelFM, as its paper has it", "voxelfm", PAPER),
    "curia2-3d": Preset("what Curia-2 learned, on volumes", "voxelfm", CURIA2_3D),
    "curia2-b": Preset("Curia-2, first stage", "", _CURIA2),
    "curia2-l": Preset("Curia-2, first stage", "curia2-b", _LARGE),
    "curia2-g": Preset("Curia-2, first stage", "curia2-b", _GIANT),
    "curia2-b-512": Preset(
        "Curia-2, second stage, from a curia2-b run", "curia2-b", (_GOES_ON, *_AT_512, *_high_resolution(960))
    ),
    "curia2-l-512": Preset(
        "Curia-2, second stage, from a curia2-l run", "curia2-l", (_GOES_ON, *_AT_512, *_high_resolution(768))
    ),
    "curia2-g-512": Preset(
        "Curia-2, second stage, from a curia2-g run", "curia2-g", (_GOES_ON, *_AT_512, *_high_resolution(640))
    ),
    "curia-b": Preset(
        "Curia: DINOv2 at 512 pixels",
        "ablation/0",
        (
            *_AT_512,
            Change("run.steps", 475_000, "code", "name of the released checkpoint"),
            Change(
                "run.batch_size", 1024, "ours", "unpublished; DINOv2's reference, where its rule leaves the rate alone"
            ),
        ),
    ),
    "curia-l": Preset(
        "Curia: DINOv2 at 512 pixels",
        "curia-b",
        (
            Change("model.size", "large", "paper", "ViT-L"),
            Change("run.steps", 475_000, "ours", "not said for this size: as B"),
        ),
    ),
    "ablation/0": Preset("DINOv2 at 256 pixels", "curia2-b", _PLAIN),
    "ablation/1": Preset(
        "+ content-aware crops",
        "ablation/0",
        (
            Change("views.min_image_foreground", 0.5, "paper", "at most 50 % background"),
            Change("views.min_crop_foreground", 0.3, "paper", "at most 70 % background"),
        ),
    ),
    "ablation/2": Preset(
        "− KoLeo", "ablation/1", (Change("objective.regulariser", "none", "paper", "KoLeo parts neighbouring slices"),)
    ),
    "ablation/3": Preset(
        "+ SigReg",
        "ablation/2",
        (Change("objective.regulariser", "sigreg", "paper", "SigReg"), _QUIETER),
    ),
    "ablation/4": Preset("+ guided masks", "ablation/3", (Change("views.mask_prior", "guided", "paper", "anatomy"),)),
    "ablation/5": Preset(
        "+ learning rate 1e-3 (= curia2-b)", "ablation/4", (Change("optimiser.lr", 1e-3, "paper", "from 5e-4"),)
    ),
    "ablation/6": Preset(
        "at 512 by interpolated positions, untrained",
        "ablation/5",
        (_GOES_ON, *_AT_512, Change("run.steps", 0, "paper", "evaluated only")),
    ),
    "ablation/7": Preset("fine-tuned at 512 pixels (= curia2-b-512)", "ablation/6", _high_resolution(960)),
}


def apply(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    """The recipe with these values, checked when all are in place."""
    tree: dict[str, Any] = {}
    for change in changes:
        *sections, name = change.setting.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = change.value
    changed: Recipe = _replace(recipe, tree)
    return changed


def _replace(settings: Any, tree: dict[str, Any]) -> Any:
    values = {n: _replace(getattr(settings, n), v) if isinstance(v, dict) else v for n, v in tree.items()}
    return replace(settings, **values)


def _build(name: str) -> Recipe:
    preset = PRESETS[name]
    return replace(apply(_build(preset.base) if preset.base else Recipe(name=name), preset.changes), name=name)


RECIPES: dict[str, Recipe] = {name: _build(name) for name in PRESETS}


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


def find_base(name: str) -> str:
    """The preset itself, or the one that a TOML file builds on, directly or through others."""
    while name.endswith(".toml"):
        name = str(read_toml(Path(name)).get("base", "tiny"))
    return name
