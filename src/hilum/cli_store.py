"""`hilum store …`: check, join, extend, tidy and hand on stores; `hilum resample`: make them isotropic."""

from pathlib import Path
from typing import Annotated

import typer

from hilum.errors import EXIT_SOME_LEFT_OUT
from hilum.terminal import print_result

store_app = typer.Typer(no_args_is_help=True, help="Verify, merge, append, compact and export stores.")

StorePath = Annotated[Path, typer.Argument(help="A store.")]
MOST_SHOWN = 20  # volumes named on the screen

Workers = Annotated[int | None, typer.Option("--num-workers", help="Processes; one per core by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@store_app.command()
def verify(
    store: StorePath,
    deep: Annotated[bool, typer.Option(help="Also decode all voxels and measure their hash and content.")] = False,
    num_workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every file again and compare it with the index. Exit code 4 when something is wrong."""
    from hilum.archive.store.verify import verify as run
    from hilum.terminal import Reporter, format_table

    with Reporter(quiet) as progress:
        result = run(store, deep=deep, num_workers=num_workers, progress=progress)
    found = result["findings"]
    text = (
        f"{store}: {result['num_volumes']:,} volumes, {result['num_slices']:,} slices, {result['bytes'] / 1e9:.2f} GB"
    )
    if found:
        text += f"; {len(found):,} findings\n" + format_table(["key", "what"], [[f["key"], f["what"]] for f in found])
    print_result(result, as_json, text if found else f"{text}; all as written")
    if found:
        raise typer.Exit(EXIT_SOME_LEFT_OUT)


@store_app.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores made with one key.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new store.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Join stores into a new one, which shares their files. Interrupted, it goes on when run again."""
    from hilum.archive.store.care import merge as run
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = run(stores, out, progress=progress)
    print_result(
        result, as_json, f"{out}: {result['num_volumes']:,} volumes; {result['num_same']:,} were in several stores"
    )


@store_app.command()
def append(
    store: StorePath,
    archive: Annotated[Path, typer.Argument(help="A folder of DICOM, NIfTI, PNG and JPEG files.")],
    num_workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prepare one more archive and add it to a store. Interrupted, it goes on when run again."""
    from hilum.archive.store.care import append as run
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = run(store, archive, num_workers=num_workers, progress=progress)
    print_result(
        result,
        as_json,
        f"{store}: {result['num_volumes']:,} volumes, {result['num_new']:,} of them new; "
        f"{result['num_same']:,} were there before",
    )
    if any(row["fault"] for row in result["prepared"]["refused"].values()):
        raise typer.Exit(EXIT_SOME_LEFT_OUT)


@store_app.command()
def compact(store: StorePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Remove what the index does not name: orphaned volumes, temporary files, remains of interrupted commands."""
    from hilum.archive.store.care import compact as run
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = run(store, progress=progress)
    print_result(
        result, as_json, f"{store}: {result['num_removed']:,} files removed, {result['bytes_freed'] / 1e6:.1f} MB freed"
    )


@store_app.command()
def export(
    store: StorePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    form: Annotated[str, typer.Option("--format", help="nifti or webdataset.")] = "nifti",
    gzip: Annotated[bool, typer.Option(help="NIfTI: KEY.nii.gz rather than KEY.nii.")] = True,
    shard_mb: Annotated[int, typer.Option(help="WebDataset: size of a shard.")] = 512,
    voxels: Annotated[str, typer.Option(help="WebDataset: npy, or b2nd (compressed as in the store).")] = "npy",
    num_workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store → NIfTI files or WebDataset shards. Interrupted, it goes on when run again."""
    from hilum.archive.store.export import export_nifti, export_webdataset
    from hilum.errors import UsageError
    from hilum.terminal import Reporter

    if form not in ("nifti", "webdataset"):
        raise UsageError(f"--format is nifti or webdataset; found {form}")
    with Reporter(quiet) as progress:
        if form == "nifti":
            result = export_nifti(store, out, gzip=gzip, num_workers=num_workers, progress=progress)
        else:
            result = export_webdataset(
                store, out, shard_mb=shard_mb, voxels=voxels, num_workers=num_workers, progress=progress
            )
    print_result(result, as_json, f"{out}: {result['num_volumes']:,} volumes, {result['num_files']:,} files written")


def resample(
    store: StorePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new store.")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="min_spacing_mm, longest, background_px, orientation, clip_hu: name=value."),
    ] = None,
    num_workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store → isotropic store, for training on volumes. Interrupted, it goes on when run again.

    Each volume is turned to one orientation, cut to the box of the body and made isotropic. Exit code 4 when some are left out.
    """
    from hilum.archive.reasons import REASONS
    from hilum.archive.store.isotropic import IsotropicSettings
    from hilum.archive.store.isotropic import resample_store as run
    from hilum.settings import override
    from hilum.terminal import Reporter, format_table

    settings = override(IsotropicSettings(), sets or ())
    with Reporter(quiet) as progress:
        result = run(store, out, settings=settings, num_workers=num_workers, progress=progress)
    text = f"{out}: {result['num_volumes']:,} isotropic volumes, {result['bytes'] / 1e9:.2f} GB"
    if left := result["left_out"]:
        rows = [[row["key"], row["reason"], row["detail"]] for row in left]
        meanings = [f"{reason}: {REASONS[reason].sentence}" for reason in sorted({row["reason"] for row in left})]
        table = format_table(["left out", "reason", "detail"], rows[:MOST_SHOWN])
        more = [f"… and {len(rows) - MOST_SHOWN:,} more, in {out / 'ledger.parquet'}"] if len(rows) > MOST_SHOWN else []
        text = "\n".join([f"{text}; {len(rows):,} left out", table, *more, *meanings])
    print_result(result, as_json, text)
    if result["left_out"]:
        raise typer.Exit(EXIT_SOME_LEFT_OUT)
