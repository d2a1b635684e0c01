"""`hilum embed`: any scans → one feature table."""

import contextlib
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from hilum.errors import EXIT_SOME_LEFT_OUT, UsageError
from hilum.terminal import WIDTH, print_result


def embed(
    source: Annotated[
        str, typer.Argument(help="A store, a folder, one scan, a CSV with a column path, or a DICOMweb study's URL.")
    ],
    model: Annotated[str, typer.Option(help="A released encoder, an exported encoder's folder, pixels, random:FOLDER, "
                                            "or y_hat:NAME for a folder of .h5 that others made.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Table to write: .parquet, .csv or .npz; a folder for y_hat.")],
    level: Annotated[str | None, typer.Option(help="slice, region (needs masks) or volume.")] = None,
    masks: Annotated[
        Path | None, typer.Option(help="CSV: series_uid (or file), mask; or a folder of masks named as their scans.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Tokens to one vector: class, mean, max, or several with +; default: the contract's.")
    ] = None,
    across: Annotated[str, typer.Option(help="Slices to one volume: mean, max or mean+max.")] = "mean",
    layers: Annotated[str, typer.Option(help="last, or numbers of blocks: -1,-4.")] = "last",
    max_slices: Annotated[int | None, typer.Option(help="Evenly spaced slices of each scan instead of all.")] = None,
    patches: Annotated[bool, typer.Option("--patches", help="Also write patch tokens, to a folder beside the table.")] = False,
    form: Annotated[str | None, typer.Option("--format", help="parquet, csv, npz or y_hat; default: by the suffix.")] = None,
    batch_size: Annotated[int, typer.Option(help="Slices at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; several with commas: one process each.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: the faster for large models.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of a released model, as it was pulled.")] = None,
    num_workers: Annotated[
        int | None, typer.Option("--workers", "--num-workers", help="Processes that read ahead; up to 8 by default.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: a cluster whose nodes see the same files.")] = "local",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:  # fmt: skip
    """Any scans → one feature table. Run it again: what is done stays, new and changed scans are encoded."""
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress, contextlib.redirect_stdout(sys.stderr):  # Ray writes messages to stdout
        if model.startswith("y_hat:"):
            result = _take_y_hat(source, model.removeprefix("y_hat:"), out, form)
        else:
            from hilum.encode.table.embed import embed as run

            result = run(
                source, model=model, out=out, level=level, masks=masks, pooling=pooling, across=across,
                layers=parse_layers(layers), max_slices=max_slices, patches=patches, batch_size=batch_size, device=device,
                precision=precision, revision=revision,
                num_workers=num_workers, engine=engine, form=form, seed=seed, progress=progress,
            )  # fmt: skip
    print_result(result, as_json, _text(result, out))
    if result["left_out"]:
        raise typer.Exit(EXIT_SOME_LEFT_OUT)


def parse_layers(text: str) -> tuple[int, ...]:
    """ "last" or numbers with commas."""
    if text == "last":
        return (-1,)
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"layers '{text}' are no numbers; expected last, or blocks such as -1,-4") from None


def _take_y_hat(folder: str, name: str, out: Path, form: str | None) -> dict[str, Any]:
    from hilum.encode.table.outputs import import_y_hat

    return import_y_hat(folder, out, model=name, form=form)


def _text(result: dict[str, Any], out: Path) -> str:
    lines = [
        f"{out}: {result['num_rows']:,} rows of {result['num_scans']:,} scans, model {result['model']}; "
        f"{result['num_encoded']:,} new or changed"
    ]
    lines += [f"set aside: {number:,} files, {reason}" for reason, number in result["set_aside"].items()]
    lines += [
        textwrap.fill(f"left out: series {row['series']}: {row['reason']}", WIDTH, subsequent_indent="  ")
        for row in result["left_out"][:20]
    ]
    if len(result["left_out"]) > 20:
        lines.append(f"left out: {len(result['left_out']) - 20:,} more (all with --json)")
    return "\n".join(lines)
