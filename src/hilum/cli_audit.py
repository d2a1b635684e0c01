"""`hilum bench audit` and `hilum bench reproduce`: is a benchmark clean, and does it agree with the paper?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from hilum.errors import EXIT_SOME_LEFT_OUT

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def audit(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")],
    suite: Annotated[str, typer.Option("--suite", "--track", help="phantom, 2d, 3d, voxelfm, or a suite's name.")] = "",
    task: Annotated[list[str] | None, typer.Option(help="A task's id. May be repeated.")] = None,
    store: Annotated[Path | None, typer.Option(help="Store that an encoder was pre-trained on.")] = None,
    model: Annotated[str | None, typer.Option(help="An encoder: check its features and the labels, too.")] = None,
    features: Annotated[Path | None, typer.Option(help="Folder that keeps its vectors: RESULTS/features.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits that no publisher made, as in hilum bench run.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Patients, scans and slices on two sides of a split, or in a store; exit code 4 when some are."""
    from hilum.bench.audit_run import audit as run
    from hilum.bench.suites import choose_tasks
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        found = run(
            choose_tasks(suite, task or ()),
            data,
            store=store,
            model=model,
            features=features,
            seed=seed,
            progress=progress,
        )
    print(json.dumps(found.to_dict(), sort_keys=True) if as_json else found.text())
    if found.leaks:
        raise typer.Exit(EXIT_SOME_LEFT_OUT)


def reproduce(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="What hilum bench run wrote.")],
    task: Annotated[str, typer.Argument(help="A task's id, e.g. curiabench-2d:A1.")],
    model: Annotated[str, typer.Option(help="As it was run: curia-2.")],
    as_json: Json = False,
) -> None:
    """Published against ours: the gap, whether our interval holds it, and what may lie between them."""
    from hilum.bench.reproduce import reproduce as run

    found = run(results, task, model)
    print(json.dumps(found.to_dict(), sort_keys=True) if as_json else found.text())
