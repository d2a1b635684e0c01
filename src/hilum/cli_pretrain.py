"""`hilum pretrain` and `hilum plan`: recipes shown, reckoned and run."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hilum.errors import UsageError
from hilum.terminal import print_result

if TYPE_CHECKING:
    from hilum.pretrain.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: a.b=value. May be repeated.")]


def _choose(name: str, sets: list[str] | None, seed: int | None = None, start_from: str | None = None) -> "Recipe":
    """A recipe by name or file with what the command line changes."""
    from hilum.pretrain.describe import check_read
    from hilum.pretrain.presets import load_recipe
    from hilum.settings import override

    chosen = override(load_recipe(name), [*(sets or []), *([f"run.seed={seed}"] if seed is not None else [])])
    check_read(chosen, name)
    return chosen if start_from is None else replace(chosen, start_from=start_from)


def pretrain(
    recipe: Annotated[str | None, typer.Argument(help="A recipe by name (tiny, curia2-b, …) or a TOML file.")] = None,
    data: Annotated[Path | None, typer.Option(help="A store.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.")] = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set run.seed=N.")] = None,
    start_from: Annotated[
        str | None, typer.Option("--from", help="First weights: a run, an encoder, DINOv2 or DINOv3 (start_from).")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels of an online probe: CSV or Parquet, as for probe.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column of the labels that the online probe predicts.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes instead.")] = False,
    show: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Show every value of a recipe, with unit and origin, instead."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Self-supervised pre-training. Interrupted, it goes on when the same command is run again."""
    from hilum.pretrain import describe

    if list_recipes:
        print_result({"recipes": describe.list_recipes()}, as_json, describe.format_list())
        return
    if show is not None:
        chosen = _choose(show, sets, seed, start_from)
        print_result(describe.recipe_record(chosen, show), as_json, describe.format_recipe(chosen, show))
        return
    if recipe is None or data is None or out is None:
        raise UsageError(
            "pretrain needs a recipe, --data STORE and --out FOLDER; hilum pretrain --list names the recipes"
        )
    chosen = _choose(recipe, sets, seed, start_from)
    from hilum.pretrain.loop import pretrain as run
    from hilum.pretrain.watch.panel import Panel

    with Panel(quiet) as panel:
        record = run(chosen, data, out, device=device, labels=labels, target=target, progress=panel, watch=panel.watch)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        print_result(record, as_json, f"{out / 'export'}: encoder {chosen.name} after {chosen.run.steps:,} steps")


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe by name (tiny, curia2-b, …) or a TOML file.")],
    gpus: Annotated[str, typer.Option(help="Devices, e.g. 32xA100, 1xH200, 8xcpu (cores).")],
    data: Annotated[
        Path | None, typer.Option(help="A store; without it, what depends on the data is left out.")
    ] = None,
    sets: Sets = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the devices' peak, as measured; 0.3 is assumed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run would take: steps, FLOPs, memory, hours, disk, reading, and what limits it."""
    from hilum.archive.store.store import Store
    from hilum.pretrain.plan import format_plan, parse_hardware
    from hilum.pretrain.plan import plan as run

    hardware, chosen = parse_hardware(gpus), _choose(recipe, sets)
    made = run(chosen, None if data is None else Store(data), hardware, utilisation=utilisation)
    print_result(asdict(made), as_json, format_plan(made))
