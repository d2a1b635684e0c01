"""The first weights of a run: drawn, or taken from another run or a released encoder.

A run folder gives its teacher, the heads too where they fit; anything else (`encode/released/weights.py`) gives a backbone.
Student and teacher start equal. Learned positions are interpolated to the grid of the recipe, as the transformer itself
does when it is shown an image of that size; weights of slices are inflated for volumes (`encode/inflate.py`); every other
difference is refused, never bent.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hilum.encode.inflate import inflate
from hilum.encode.released.weights import Weights, account, read_weights
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import interpolate_positions
from hilum.errors import CheckpointError, UsageError
from hilum.pretrain.checkpoint import last_checkpoint, read_learner
from hilum.pretrain.distill import Learner
from hilum.pretrain.recipe import Recipe
from hilum.records import read_json
from hilum.settings import from_dict

# What two transformers must share, so that the weights of one mean the same in the other.
_SHARED = ("size", "patch", "channels", "positions", "antialias", "num_registers", "norm_eps")


class Start(NamedTuple):
    """Where a run begins.

    weights  of the backbone
    others   tensors of the other run's heads, and buffers such as centres, under the names of `Learner` ("teacher.…")
    step     finished steps of that run; None when it is no run
    """

    weights: Weights
    others: dict[str, Tensor]
    step: int | None


def initialise(learner: Learner, recipe: Recipe) -> dict[str, Any]:
    """Put the weights of `recipe.start_from` into student and teacher, before the learner is wrapped or sharded.

    returns  for run.json: where they came from, their hash, what was done to them, and one line about it; {} when they
             stay as they were drawn

    Raises UsageError when a recipe that needs a start has none, or when the weights do not fit the recipe's transformer.
    """
    if not recipe.start_from:
        if recipe.needs_start:
            raise UsageError(
                f"recipe {recipe.name} continues another run; say which: --from RUN, or an encoder (start_from)"
            )
        return {}
    start = read_start(recipe.start_from)
    state, changes = fit_backbone(start.weights, recipe.model)
    learner.teacher_backbone().load_state_dict(state)
    heads = _load_heads(learner, start.others)
    learner.student.load_state_dict(learner.teacher.state_dict())
    if recipe.objective.gram_weight:
        learner.gram.load_state_dict(state)
    report = start.weights.report
    summary = [f"{report['layout']} {report['hash']}", *report["transformed"], *changes]
    if heads:
        summary.append("heads: " + ", ".join(f"{name} {what}" for name, what in heads.items()))
    return {
        "from": recipe.start_from,
        "step": start.step,
        "hash": report["hash"],
        "weights": report,
        "changes": changes,
        "heads": heads,
        "summary": "; ".join(summary),
    }


def check_start(recipe: Recipe, record: dict[str, Any]) -> None:
    """Before a checkpoint is resumed: CheckpointError when the run did not begin from the recipe's weights.

    record  run.json. Weights that are no longer where they were are not asked for: the checkpoint holds all that counts.
    """
    begun = record.get("start") or {"from": "", "hash": ""}
    if recipe.start_from == begun["from"] and not Path(recipe.start_from).exists():
        return
    now = read_start(recipe.start_from).weights.report["hash"] if recipe.start_from else ""
    if now != begun["hash"]:
        raise CheckpointError(
            f"the run began from {begun['from'] or 'drawn weights'} {begun['hash']}; now it is asked to go on from "
            f"{recipe.start_from or 'drawn weights'} {now}. Give --from as at first, or choose a new folder"
        )


def read_start(path: str | Path) -> Start:
    """The weights of a run folder, or whatever `read_weights` knows."""
    path = Path(path)
    found = last_checkpoint(path / "checkpoints")
    if found is None:
        return Start(read_weights(path / "export" if (path / "run.json").is_file() else path), {}, None)
    learner, step = read_learner(found)
    where = f"{path}/run.json"
    config = from_dict(ViTConfig, read_json(path / "run.json")["recipe"]["model"], where)
    prefix = "teacher.backbone."
    backbone = {name.removeprefix(prefix): t for name, t in learner.items() if name.startswith(prefix)}
    weights = account(config, backbone, {n: n for n in backbone}, backbone, f"hilum run at step {step}", path)
    others = {n: t for n, t in learner.items() if not n.startswith((prefix, "student."))}
    return Start(weights, others, step)


def fit_backbone(weights: Weights, config: ViTConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The weights for a transformer of this config, and what was changed. UsageError lists the settings that differ."""
    given = weights.config
    if len(given.patch) < len(config.patch):
        sides = ["×".join(map(str, patch)) for patch in (given.patch, config.patch)]
        return inflate(weights.state, given, config), [f"inflated from patches of {sides[0]} to {sides[1]}"]
    wrong = [(n, getattr(given, n)) for n in _SHARED if getattr(given, n) != getattr(config, n)]
    if bool(given.layer_scale) != bool(config.layer_scale):
        wrong.append(("layer_scale", given.layer_scale))
    if wrong:
        found = ", ".join(f"{name} {value} where the recipe has {getattr(config, name)}" for name, value in wrong)
        sets = " ".join(f"--set model.{name}={_as_toml(value)}" for name, value in wrong)
        raise UsageError(
            f"the weights ({weights.report['layout']}) have {found}. Take a recipe for them: {sets} (sides of crops and image "
            "must be multiples of the patch)"
        )
    state = dict(weights.state)
    if config.positions == "rotary" or given.grid == config.grid:
        return state, []
    table = state["pos_embed"]
    state["pos_embed"] = torch.cat([table[:, :1], interpolate_positions(table[:, 1:], given, config.grid)], 1)
    sides = ["×".join(map(str, grid)) for grid in (given.grid, config.grid)]
    how = "trilinear" if len(given.grid) == 3 else "bicubic, antialiased" if given.antialias else "bicubic"
    return state, [f"positions interpolated from {sides[0]} to {sides[1]} ({how})"]


def _as_toml(value: Any) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value).lower()


def _load_heads(learner: Learner, others: dict[str, Tensor]) -> dict[str, str]:
    """Load each head whose tensors all fit, and the buffers beside them; returns "taken" or why not, for each head."""
    if not others:
        return {}
    said = {}
    for name, head in learner.teacher.items():
        if name == "backbone":
            continue
        prefix = f"teacher.{name}."
        given = {n.removeprefix(prefix): t for n, t in others.items() if n.startswith(prefix)}
        shapes = {n: t.shape for n, t in head.state_dict().items()}
        if fits := {n: t.shape for n, t in given.items()} == shapes:
            head.load_state_dict(given)
        said[name] = "taken" if fits else "drawn (other shapes)" if given else "drawn (the run has none)"
    if said and all(what == "taken" for what in said.values()):
        for name, buffer in learner.named_buffers(recurse=False):
            if name in others and others[name].shape == buffer.shape:
                buffer.copy_(others[name])
    return said
