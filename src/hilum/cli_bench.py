"""`hilum bench …`: compare encoders on the tasks of published benchmarks, on a phantom, or on one's own."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hilum.errors import EXIT_SOME_LEFT_OUT, UsageError
from hilum.terminal import print_result

bench_app = typer.Typer(
    no_args_is_help=True, help="Benchmarks: run encoders on tasks, compare them, check data and leaks."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Suite = Annotated[
    str, typer.Option("--suite", "--track", help="phantom, 2d or 3d (CuriaBench), voxelfm, or a suite's name.")
]
TaskIds = Annotated[
    list[str] | None,
    typer.Option("--task", help="A task's id (curiabench-2d:A1), or the TOML file of your own. May be repeated."),
]
Data = Annotated[Path, typer.Option(help="Folder of the data sets; the phantom is written there.")]
Folder = Annotated[Path, typer.Argument(metavar="RESULTS", help="What hilum bench run wrote.")]


@bench_app.command("list")
def list_tasks(suite: Suite = "", as_json: Json = False) -> None:
    """The tasks, with kind, unit, metric and chance."""
    from hilum.bench.run.suites import all_tasks, choose_tasks
    from hilum.settings import to_dict
    from hilum.terminal import format_table

    tasks = [t for t in (choose_tasks(suite) if suite else all_tasks()) if not isinstance(t, Path)]
    rows = [[t.id, t.title, t.kind, t.unit, t.metric, "" if t.chance is None else f"{t.chance:.3g}"] for t in tasks]
    table = format_table(["task", "about", "kind", "unit", "metric", "chance"], rows)
    print_result([to_dict(task) for task in tasks], as_json, table)


@bench_app.command()
def run(
    model: Annotated[
        list[str],
        typer.Option(
            help="A folder, a released encoder, pixels, random:FOLDER; LABEL=MODEL names it, LABEL=A+B joins two. Repeat it."
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; the same command goes on in it.")],
    suite: Suite = "",
    task: TaskIds = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="full, few-shot[:K], fraction[:F], curia, chunked[:N], erased[:A+B], tokens. Default: full; of the phantom "
            "few-shot:5, too."
        ),
    ] = None,
    head: Annotated[list[str] | None, typer.Option(help="Instead of the usual heads of a task. May be repeated.")] = None,
    features: Annotated[str, typer.Option(help="class, mean, max or some with +; default: as the contract says.")] = "",
    seeds: Annotated[int, typer.Option(help="Head seeds a fit.")] = 5,
    draws: Annotated[int, typer.Option(help="Draws of training cases in few-shot and fraction.")] = 5,
    max_slices: Annotated[int | None, typer.Option(help="Evenly spaced slices of a volume instead of all.")] = None,
    resamples: Annotated[int, typer.Option(help="Of patients, for the intervals.")] = 10_000,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on without missing or refused cases.")] = False,
    save_heads: Annotated[bool, typer.Option("--save-heads", help="Keep heads on patch tokens: OUT/heads.")] = False,
    batch_size: Annotated[int, typer.Option(help="Slices at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto.")] = "float32",
    num_workers: Annotated[int | None, typer.Option("--workers", help="Threads, processes; one per core by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Encode, fit heads, predict, score. Interrupted, it goes on when the same command is run again."""
    from hilum.api import bench
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        result = bench(
            model, data, out, suite=suite, tasks=task or (), protocols=tuple(protocol or ()), heads=tuple(head or ()),
            features=features, seeds=seeds, draws=draws, max_slices=max_slices, num_resamples=resamples,
            allow_missing=allow_missing, save_heads=save_heads, batch_size=batch_size, device=device, precision=precision,
            num_workers=num_workers, seed=seed, progress=progress,
        )  # fmt: skip
    print_result(result, as_json, _results_text(result))
    if not result["complete"]:
        raise typer.Exit(EXIT_SOME_LEFT_OUT)


@bench_app.command()
def check(
    task: Annotated[str, typer.Argument(help="A task's id.")], data: Data, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Is the data of a task there and well-formed? Exit code 3 when nothing can be used, 4 when something is missing."""
    from hilum.bench.check import describe
    from hilum.bench.run.suites import choose_tasks, open_task, task_folder
    from hilum.settings import to_dict
    from hilum.terminal import Reporter

    (asked,) = choose_tasks(ids=[task])
    with Reporter(quiet) as progress:
        chosen, cases = open_task(asked, data, progress=progress)
    found = describe(chosen, cases, task_folder(chosen, data))
    problems = [to_dict(problem) for problem in found.found.problems]
    facts = {"task": task, "num_cases": len(found.found.cases), "num_lost": found.lost, "problems": problems}
    print_result(facts, as_json, found.text)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@bench_app.command()
def compare(
    first: Folder,
    second: Annotated[
        Path | None, typer.Argument(help="Another folder; without it both sides are in the first.")
    ] = None,
    a: Annotated[
        list[str] | None, typer.Option("--a", help="What A is: model=NAME, head=…, features=…, protocol=….")
    ] = None,
    b: Annotated[list[str] | None, typer.Option("--b", help="What B is, likewise.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Several models of one folder, each with each other. Repeat it.")
    ] = None,
    resamples: Annotated[int, typer.Option(help="Of patients.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Models on the same cases: a sentence, and a table with paired intervals and tests."""
    from hilum.bench.judge.compare import compare_results
    from hilum.bench.judge.pairs import compare_models
    from hilum.terminal import Reporter, wrap_row

    if model:
        if second or a or b:
            raise UsageError("--model compares models within one folder; give it without a second folder, --a and --b")
        with Reporter(quiet) as progress:
            pairs = compare_models(first, model, num_resamples=resamples, seed=seed, progress=progress)
        told = [wrap_row([], [], line) for line in (*pairs.sentences(), *pairs.notes())]
        print_result(pairs.to_dict(), as_json, "\n".join([pairs.table(), "", *told]))
        return
    with Reporter(quiet) as progress:
        found = compare_results(
            first,
            second,
            first_is=_pairs(a),
            second_is=_pairs(b),
            num_resamples=resamples,
            seed=seed,
            progress=progress,
        )
    told = [wrap_row([], [], line) for line in (found.sentence(), *found.notes())]
    print_result(found.to_dict(), as_json, "\n".join([found.table(), "", *told]))


@bench_app.command()
def audit(
    data: Data,
    suite: Suite = "",
    task: TaskIds = None,
    store: Annotated[Path | None, typer.Option(help="The store that an encoder was pre-trained on.")] = None,
    model: Annotated[
        str | None, typer.Option(help="An encoder, to find copies and check features and labels by.")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Keeps the vectors, e.g. RESULTS/features.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Patients, scans and slices on two sides of a split, or in pre-training and test. Exit code 4 when something leaks."""
    from hilum.bench.audit.run import audit as look
    from hilum.bench.run.suites import choose_tasks
    from hilum.terminal import Reporter

    with Reporter(quiet) as progress:
        found = look(
            choose_tasks(suite, task or ()), data, store=store, model=model, features=features, progress=progress
        )
    print_result(found.to_dict(), as_json, found.text())
    if found.leaks:
        raise typer.Exit(EXIT_SOME_LEFT_OUT)


@bench_app.command()
def reproduce(
    task: Annotated[str, typer.Argument(help="A task's id.")],
    model: Annotated[str, typer.Option(help="As it is run: curia-2-b.")],
    results: Annotated[Path, typer.Option("--results", "-o", help="Folder of hilum bench run.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets: run it first, or go on with it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Published against ours, with intervals and the likely reasons of a gap."""
    from hilum.bench.report.reproduce import check_published
    from hilum.bench.report.reproduce import reproduce as beside
    from hilum.terminal import Reporter

    if data is not None:
        from hilum.api import bench

        check_published(task)
        with Reporter(quiet) as progress:
            bench([model], data, results, tasks=[task], device=device, progress=progress)
    found = beside(results, task, model)
    print_result(found.to_dict(), as_json, found.text())


def _pairs(given: list[str] | None) -> dict[str, str]:
    """["model=x"] → {"model": "x"}; a text without = is a model."""
    found = {}
    for text in given or ():
        name, equals, value = text.rpartition("=")
        if equals and not name:
            raise UsageError(f"'{text}' names nothing; expected model=NAME, head=NAME, features=NAME or protocol=NAME")
        found[name or "model"] = value
    return found


def _results_text(result: dict[str, Any]) -> str:
    """A table for each model, at most 100 columns, and all that was left out."""
    from hilum.terminal import format_table, wrap_row

    scores = result["scores"]
    lines = []
    for model in dict.fromkeys(s["model"] for s in scores):
        rows = []
        for s in (s for s in scores if s["model"] == model):
            seen = (
                f"of {s['features']}" if s["protocol"] == "tokens" else ""
            )  # class token and patch tokens side by side
            how = " ".join(part for part in (s["head"], seen, "" if s["protocol"] == "full" else s["protocol"]) if part)
            interval = "" if s["low"] is None else f"{s['low']:.3f} to {s['high']:.3f}"
            chance = "" if s["chance"] is None else f"{s['chance']:.3f}"
            rows.append([s["task"], how, s["metric"], s["value"], interval, chance])
        columns = ["task", "how", "metric", "value", "95 % interval", "chance"]
        lines += [model, format_table(columns, rows, whole=("task", "95 % interval")), ""]
    for row in result["left_out"]:
        cases = f"{row['cases']:,} cases of " if row["cases"] else ""
        text = f"left out: {cases}{row['task']} on {row['model']}: {row['reason']}"
        lines.append(wrap_row([], [], text))
    lines.append(f"{len(scores)} scores after {result['seconds']:.0f} s. A page: hilum show RESULTS -o page.html")
    return "\n".join(lines)
