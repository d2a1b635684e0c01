"""`hilum predict`: a scan and a trained head → classes with probabilities, or numbers. `hilum erase`: features → features."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hilum.terminal import print_result

if TYPE_CHECKING:
    from hilum.probe.predict import Predicted

MOST_ROWS = 40  # shown


def predict(
    scan: Annotated[str, typer.Argument(metavar="SCAN", help="A file or a folder with one scan.")],
    head: Annotated[Path, typer.Option(help="A folder of hilum probe --save, or a head released with Curia.")],
    model: Annotated[str | None, typer.Option(help="Where its encoder is; default: as the head names it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Labels on the grid of the scan, for heads on regions.")] = None,
    series: Annotated[str | None, typer.Option(help="Key of one scan in a folder, or its first digits.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="CSV with all numbers to write; of a segmentation SEG.nii.gz (or .nii)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """What a trained head says of a scan. Refused with another encoder or contract than it was trained under."""
    from dataclasses import asdict, replace

    from hilum.errors import UsageError
    from hilum.probe.predict import predict as run
    from hilum.records import write_text

    found = run(scan, head, model=model, mask=mask, series=series, device=device)
    image = out is not None and out.name.endswith((".nii", ".nii.gz"))
    if out is not None and image != (found.labels is not None):
        wanted = "a NIfTI, -o SEG.nii.gz" if found.labels is not None else "a CSV, -o SAID.csv"
        raise UsageError(f"{out.name} is no file for a {found.task} head; it writes {wanted}")
    if out is not None and found.labels is not None:
        _write_labels(out, found, head)
    elif out is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(found.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found.rows)
        write_text(out, text.getvalue())
    print_result(asdict(replace(found, labels=None)), as_json, _text(found, out))


def _write_labels(out: Path, found: "Predicted", head: Path) -> None:
    from hilum.probe.predict_tokens import write_segmentation
    from hilum.records import read_json

    record = read_json(head / "head.json")
    classes = {str(n): row["predicted"] for n, row in enumerate(found.rows, 1)}
    about = {"format": "hilum-segmentation", "version": 1, "classes": {"0": "background", **classes}}
    about |= {"target": found.target, "model": found.model, "contract": record["encoder"]["contract"]}
    about |= {"head": record["head"], "tensors": record["tensors"], "volumes": found.rows}
    assert found.labels is not None
    write_segmentation(out, found.labels, about)


def erase(
    features: Annotated[Path, typer.Argument(metavar="FEATURES", help="A feature table of hilum embed.")],
    nuisances: Annotated[Path, typer.Option(help="CSV or Parquet that names cases as labels do (docs/start.md).")],
    columns: Annotated[str, typer.Option(help="Of that table, with commas: vendor,kernel,thickness.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Feature table to write.")],
    train: Annotated[
        str, typer.Option(help="COLUMN=VALUE: cases to learn from, e.g. split=train; default: all named.")
    ] = "",
    level: Annotated[str | None, typer.Option(help="slice, region or volume, where the table holds several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Features without what a linear probe could tell of scanner and protocol (least-squares concept erasure)."""
    from hilum.probe.erase_table import erase_table

    names = tuple(dict.fromkeys(name.strip() for name in columns.split(",") if name.strip()))
    told = erase_table(features, nuisances, names, out, train=train, level=level)
    text = (
        f"{out}: {told['num_rows']:,} rows without {', '.join(told['nuisances'])}; {told['rank']} directions, learnt from "
        f"{told['num_cases']:,} cases of {told['num_patients']:,} patients (shrinkage {told['shrinkage']:.3f})"
    )
    notes = [f"{name}: {number:,} cases without a value" for name, number in told["missing"].items() if number]
    notes += ["learnt from all cases: a test on them knows their scanners; --train split=train"] if not train else []
    notes += [f"{told['failed']:,} rows of scans that could not be encoded are not in it"] if told["failed"] else []
    print_result(told, as_json, "\n".join([text, *notes]))


def _text(found: "Predicted", out: Path | None) -> str:
    from hilum.terminal import format_table

    places = [name for name in ("slice", "region") if found.rows[0][name] is not None]
    segments = found.task == "segmentation"
    numbers = len(found.columns) == 1 or found.task == "localisation"
    titles = [*places, "predicted"] + ([] if numbers else ["probability", "next", "probability"])
    if segments:
        titles = ["class", *found.columns]
    lines = []
    for row in found.rows[:MOST_ROWS]:
        cells: list[Any] = [row[name] for name in places]
        if segments:
            cells = [row[name] for name in ("predicted", *found.columns)]
        elif numbers:
            cells.append(row["predicted"])
        else:
            first, second = sorted(found.columns, key=lambda name: -row[name])[:2]
            said = row["predicted"] if found.task == "multilabel" else first
            cells += [said or "none", row[first], second, row[second]]
        lines.append(cells)
    text = [f"{found.target} by a {found.task} head on {found.model} ({found.level})", format_table(titles, lines, 100)]
    if len(found.rows) > MOST_ROWS:
        text.append(f"{len(found.rows) - MOST_ROWS:,} more (all with --json or -o)")
    text += [f"note: {note}" for note in found.notes]
    written = f"{out}: class numbers on the grid of the scan" if segments else f"{out}: {len(found.rows):,} rows"
    return "\n".join([*text, *([written] if out else [])])
