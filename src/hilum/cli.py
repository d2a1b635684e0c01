"""The commands. Each function parses, calls, prints and picks the exit code; heavy libraries load when called."""

import contextlib
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from hilum.cli_bench import bench_app
from hilum.cli_embed import embed
from hilum.cli_models import doctor, export, info, models, pull
from hilum.cli_predict import erase, predict
from hilum.cli_pretrain import plan, pretrain
from hilum.cli_store import resample, store_app
from hilum.errors import EXIT_BUG, EXIT_INPUT_REFUSED, EXIT_INTERRUPTED, EXIT_SOME_LEFT_OUT, HilumError
from hilum.terminal import print_result

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="One door into foundation models for radiology: scans → store → pre-training → features → probes → report.",
    epilog="Exit codes: 0 done · 1 our bug · 2 usage · 3 input refused · 4 finished, some scans left out · "
    "5 licence · 6 weights absent offline · 7 out of memory · 130/143 interrupted, go on with the same command",
)

app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")

Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Workers = Annotated[int | None, typer.Option(help="Processes; one per core by default.")]
Engine = Annotated[str, typer.Option(help="local, or ray: a cluster whose nodes see the same files.")]
Accept = Annotated[
    list[str] | None, typer.Option(help="gap=6mm: put uneven slices on even steps when no gap is larger.")
]
Resample = Annotated[list[str] | None, typer.Option(help="tilt: make sheared scans (gantry tilt) right-angled.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def main() -> None:
    """Run the command line; turns errors into messages and exit codes."""
    try:
        app()
    except HilumError as error:
        print(f"hilum: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as ended:  # Typer makes the second of the first
        if isinstance(ended, SystemExit) and ended.code != EXIT_INTERRUPTED:
            raise
        print("hilum: interrupted; what was finished is whole. Run the same command again", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except MemoryError:
        print("hilum: out of memory; try a smaller batch (--batch-size or --set run.batch_size=)", file=sys.stderr)
        sys.exit(7)
    except BrokenPipeError:
        sys.exit(0)  # `hilum … | head` is no fault
    except PermissionError as error:
        print(
            f"hilum: '{error.filename}' may not be read or written by you; change that, or choose another",
            file=sys.stderr,
        )
        sys.exit(EXIT_INPUT_REFUSED)
    except Exception:
        traceback.print_exc()
        print("hilum: this is a bug of ours; please report the lines above", file=sys.stderr)
        sys.exit(EXIT_BUG)


@app.command()
def demo(out: Out = Path("demo"), seed: Seed = 0, as_json: Json = False, quiet: Quiet = False) -> None:
    """The whole story on a phantom archive: ends in OUT/report.html."""
    from hilum.demo import demo as run
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = run(out, seed=seed, progress=progress)
    print_result(result, as_json, f"report: {out / 'report.html'}  ({result['seconds']:.0f} s)")


@app.command()
def phantom(
    out: Out,
    num_patients: Annotated[int, typer.Option(help="Patients; each has one CT and one MR.")] = 40,
    num_slices: Annotated[int, typer.Option(help="Slices a scan.")] = 96,
    matrix: Annotated[int, typer.Option(help="Pixels per side of a slice.")] = 256,
    form: Annotated[str, typer.Option("--format", help="dicom or nifti.")] = "dicom",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a synthetic CT and MR archive with masks and labels."""
    from hilum.archive.phantom import write_phantom
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = write_phantom(
            out,
            num_patients=num_patients,
            num_slices=num_slices,
            matrix=matrix,
            seed=seed,
            form=form,
            progress=progress,
        )
    print_result(result, as_json, f"{out}: {result['num_patients']} patients, {result['num_files']:,} files")


@app.command()
def scan(
    archive: Annotated[Path, typer.Argument(help="A folder of DICOM, NIfTI, MetaImage, NRRD, NumPy, PNG, JPEG files.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Ledger (Parquet) to write.")] = None,
    pixels: Annotated[bool, typer.Option(help="Also read and judge all pixels, as prepare will.")] = False,
    accept: Accept = None,
    resample: Resample = None,
    num_workers: Workers = None,
    engine: Engine = "local",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What is in an archive, and what is wrong with it: one row per scan and refused file."""
    from hilum.archive.policy import parse_policy
    from hilum.archive.scan import scan_to
    from hilum.terminal import Reporter

    policy = parse_policy(accept=accept or (), resample=resample or ())
    with Reporter(quiet) as progress, contextlib.redirect_stdout(sys.stderr):  # Ray writes messages to stdout
        counts = scan_to(
            out, archive, pixels=pixels, policy=policy, num_workers=num_workers, engine=engine, progress=progress
        )
    print_result(counts, as_json, _ledger_text(counts))


@app.command()
def prepare(
    archive: Annotated[Path, typer.Argument(help="A folder of DICOM, NIfTI, MetaImage, NRRD, NumPy, PNG, JPEG files.")],
    out: Out,
    min_slices: Annotated[int, typer.Option(help="Leave out scans with fewer; single images are always kept.")] = 5,
    accept: Accept = None,
    resample: Resample = None,
    drop: Annotated[list[str] | None, typer.Option(help="duplicates: of scans with the same voxels keep one.")] = None,
    deface: Annotated[bool, typer.Option(help="Remove faces from head scans.")] = True,
    num_workers: Workers = None,
    engine: Engine = "local",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Archive → store. Interrupted, it goes on when the same command is run again."""
    from hilum.archive.policy import parse_policy
    from hilum.archive.prepare import prepare as run
    from hilum.terminal import Reporter

    policy = parse_policy(
        min_slices=min_slices, accept=accept or (), resample=resample or (), drop=drop or (), deface=deface
    )
    with Reporter(quiet) as progress, contextlib.redirect_stdout(sys.stderr):  # Ray writes messages to stdout
        counts = run(archive, out, policy=policy, num_workers=num_workers, engine=engine, progress=progress)
    print_result(counts, as_json, f"{_ledger_text(counts)}\n{out}: {counts['num_volumes']:,} volumes")
    if any(row["fault"] for row in counts["refused"].values()):
        raise typer.Exit(EXIT_SOME_LEFT_OUT)


app.command()(resample)
app.command()(plan)
app.command()(pretrain)


app.command()(embed)


@app.command()
def probe(
    features: Annotated[Path, typer.Argument(help="A feature table from hilum embed.")],
    target: Annotated[str, typer.Option(help="Column to predict, of the labels or of the features (region).")],
    labels: Annotated[Path | None, typer.Option(help="CSV or Parquet with file, series_uid or patient_id.")] = None,
    groups: Annotated[str | None, typer.Option(help="Column to split by; without it patients are split.")] = None,
    patients: Annotated[str | None, typer.Option(help="Column that names the patient, if the scans do not.")] = None,
    head: Annotated[str, typer.Option(help="linear, linear-sgd, mlp or knn.")] = "linear",
    task: Annotated[str, typer.Option(help="auto, classification or regression.")] = "auto",
    level: Annotated[str | None, typer.Option(help="slice, region or volume, if the table holds several.")] = None,
    pca: Annotated[int | None, typer.Option(help="Reduce features first, fitted on training patients.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Predictions (Parquet) to write.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for a head fitted on all cases, for hilum predict.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a head on features with patients kept apart, and say how good it is with 95 % intervals."""
    from hilum.probe.fit import probe as run
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = run(
            features,
            labels,
            target=target,
            groups=groups,
            patients=patients,
            head=head,
            task=task,
            level=level,
            num_components=pca,
            output=out,
            save=save,
            seed=seed,
            progress=progress,
        )
    saved = f"\n{save}: the head, fitted on all cases" if save else ""
    print_result(result.to_dict(), as_json, _probe_text(result) + saved)


app.command()(predict)
app.command()(erase)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SCAN", help="A file, a folder, or STORE:KEY.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML page with pictures to write.")] = None,
    series: Annotated[str | None, typer.Option(help="Key of one scan in a folder, or its first digits.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The doctor: what is known of a scan, whether it would be used, and if not, why and what to do."""
    from hilum.archive.doctor.inspect import inspect as run
    from hilum.archive.doctor.inspect import terminal_text
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = run(source, series=series, out=out, progress=progress)
    page = f"\n\n{out}: a page with pictures" if out else ""
    print_result(result, as_json, terminal_text(result) + page)


@app.command()
def show(
    thing: Annotated[
        Path, typer.Argument(help="Results of hilum bench, a run of hilum pretrain, a ledger, or a store.")
    ],
    out: Out,
    archive: Annotated[
        Path | None, typer.Option(help="The folder that was scanned or benchmarked, for pictures.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Of results: the model that others are compared with.")] = None,
    task: Annotated[
        list[Path] | None, typer.Option(help="Of results: the TOML file of a task of your own, for its pictures.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Of results: also all scores as CSV.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Of results: also the tables as LaTeX.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """One HTML page: about results of a benchmark, a pre-training run, or a whole archive."""
    if (thing / "run.json").is_file():
        from hilum.pretrain.watch.report import show_run

        told = show_run(thing, out)
        print_result(told, as_json, f"{out}: {told['num_steps']:,} steps, {told['num_events']:,} events")
        return
    from hilum.terminal import Reporter

    if (thing / "results.json").is_file():
        from hilum.bench.report.page import show_results

        with Reporter(quiet) as progress:
            told = show_results(
                thing, out, reference=reference, data=archive, own=task or (), csv=csv, latex=latex, progress=progress
            )
        print_result(
            told,
            as_json,
            f"{out}: {told['num_scores']:,} scores, {told['num_models']} models, {told['num_tasks']} tasks",
        )
        return
    from hilum.archive.doctor.overview import show as run

    with Reporter(quiet) as progress:
        counts = run(thing, out, archive=archive, progress=progress)
    print_result(counts, as_json, f"{out}: {counts['num_files']:,} files, {counts['num_used']:,} scans used")


app.command()(models)
app.command()(info)
app.command()(pull)
app.command()(doctor)
app.command()(export)


def _ledger_text(counts: dict[str, Any]) -> str:
    from hilum.archive.reasons import REASONS
    from hilum.terminal import format_table

    used = f"used: {counts['num_used']:,} scans in {counts['num_files_used']:,} of {counts['num_files']:,} files"
    rows = [[reason, row["files"], REASONS[reason].sentence] for reason, row in counts["refused"].items()]
    return used + ("\n" + format_table(["refused as", "files", "meaning"], rows) if rows else "")


def _probe_text(result: Any) -> str:
    from hilum.terminal import format_table

    rows = [
        [
            row["metric"],
            row["value"],
            f"{row['low']:.3f} to {row['high']:.3f}",
            "" if row["chance"] is None else row["chance"],
        ]
        for row in result.table()
    ]
    lines = [
        f"{result.target}: {result.predictions.num_rows:,} cases, head {result.head} on {result.model} ({result.level})",
        format_table(["metric", "value", "95 % interval", "chance"], rows),
        f"intervals resample {result.cluster}s",
    ]
    lines += [f"left out: {number:,} {reason}" for reason, number in result.left_out.items() if number]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


if __name__ == "__main__":
    main()
