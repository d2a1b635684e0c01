"""Every command as a Python function of the same name: `from hilum import api`, then `api.prepare(...)`."""

from pathlib import Path
from typing import Any

from hilum.archive.doctor.inspect import inspect
from hilum.archive.doctor.overview import show as show_archive
from hilum.archive.phantom import write_phantom as phantom
from hilum.archive.prepare import prepare
from hilum.archive.scan import scan
from hilum.bench.report import show_results
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

__all__ = [
    "demo", "doctor", "embed", "export", "inspect", "phantom", "plan", "predict", "prepare", "pretrain", "probe", "pull",
    "scan", "show",
]  # fmt: skip


def show(thing: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """One HTML page: of a run folder (`hilum.pretrain.watch.report.show_run`), of results of a benchmark with the options of
    `hilum.bench.report.show_results`, or of a ledger or store with those of `hilum.archive.doctor.overview.show`."""
    if (Path(thing) / "run.json").is_file():
        return show_run(thing, out)
    if (Path(thing) / "results.json").is_file():
        return show_results(thing, out, **options)
    return show_archive(thing, out, **options)
