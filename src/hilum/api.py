"""Every command as a Python function of the same name: `from hilum import api`, then `api.prepare(...)`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hilum.archive.doctor.inspect import inspect
from hilum.archive.doctor.overview import show as show_archive
from hilum.archive.phantom import write_phantom as phantom
from hilum.archive.prepare import prepare
from hilum.archive.scan import scan
from hilum.archive.store.isotropic import resample_store as resample
from hilum.archive.workers import default_num_workers
from hilum.bench.phantom.scans import write_phantom_scans
from hilum.bench.report.page import show_results
from hilum.bench.run.run import BenchSettings, run_bench
from hilum.bench.run.suites import choose_tasks
from hilum.demo import demo
from hilum.encode.released.doctor import check_model as doctor
from hilum.encode.released.export import export
from hilum.encode.released.pull import pull
from hilum.encode.table.embed import embed
from hilum.pretrain.loop import pretrain
from hilum.pretrain.plan import plan
from hilum.pretrain.watch.report import show_run
from hilum.probe.fit import probe
from hilum.probe.predict import predict
from hilum.terminal import Progress

__all__ = [
    "bench", "demo", "doctor", "embed", "export", "inspect", "phantom", "plan", "predict", "prepare", "pretrain", "probe",
    "pull", "resample", "scan", "show",
]  # fmt: skip


def bench(
    models: Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    suite: str = "",
    tasks: Sequence[str] = (),
    protocols: tuple[str, ...] = (),
    num_workers: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int = 32,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run encoders on tasks (`hilum.bench.run.run.run_bench`).

    suite, tasks  of `hilum.bench.run.suites.choose_tasks`; the scans of the phantom are written to `data` where they are not
    protocols     none: full, and for the phantom few-shot:5 of its organs, too
    settings      of `hilum.bench.run.run.BenchSettings`
    returns       results.json, and the rows of scores.parquet as "scores"
    """
    chosen = choose_tasks(suite, tasks)
    workers = num_workers or default_num_workers()
    phantom = any(not isinstance(task, Path) and task.suite == "phantom" for task in chosen)
    if phantom and not (Path(data) / "phantom" / "phantom.json").exists():
        write_phantom_scans(Path(data) / "phantom", num_workers=workers, progress=progress)
    usual = ("full", "few-shot:5") if phantom else ("full",)
    return run_bench(
        chosen,
        models,
        data,
        out,
        BenchSettings(protocols=protocols or usual, **settings),
        device=device,
        precision=precision,
        batch_size=batch_size,
        num_threads=workers,
        progress=progress,
    )


def show(thing: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """One HTML page: of a run folder (`hilum.pretrain.watch.report.show_run`), of results of a benchmark with the options of
    `hilum.bench.report.page.show_results`, or of a ledger or store with those of `hilum.archive.doctor.overview.show`."""
    if (Path(thing) / "run.json").is_file():
        return show_run(thing, out)
    if (Path(thing) / "results.json").is_file():
        return show_results(thing, out, **options)
    return show_archive(thing, out, **options)
