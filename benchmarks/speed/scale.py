"""What an archive of any size costs a core, per file and per slice: the rates behind docs/scale.md.

    python benchmarks/speed/scale.py [--series 12] [--slices 60] [--repeats 3] >> benchmarks/results/scale_MACHINE_DATE.jsonl

Rates are per processor second of this process and its children, which a busy machine stretches little; the speed-up of two
workers is of wall time and means something only on a calm machine. Bytes are of headers made up with names and
identifiers of the usual length. `--long N` also stores one series of N slices and gives the peak memory of that worker.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from convert_series import KEY, core_seconds, measure_long, write_series
from measure import print_lines

from hilum.archive import dicom, spill
from hilum.archive.dicom.header import Header
from hilum.archive.ledger import Entry, write_ledger
from hilum.archive.plan import make_plan
from hilum.archive.prepare import prepare
from hilum.archive.scan import find, walk
from hilum.archive.spill import Spill, decode, encode
from hilum.archive.store.index import index_path, read_index

SLICES = 150  # of a made-up series
UID = "1.2.840.113619.2.55.3.2831868886.{}.1234567890.1{:06d}"


def core_rate(work: Callable[[], object], count: float) -> float:
    start = core_seconds()
    work()
    return count / (core_seconds() - start)


def made_up(num_series: int, root: Path) -> Iterator[Header]:
    """Headers in the order of an archive that keeps each series together."""
    for s in range(num_series):
        study, series = UID.format(1, s // 5), UID.format(2, s)
        for k in range(SLICES):
            yield Header(
                path=root / "2021" / f"PAT{s // 5:07d}" / study / series / f"{k:05d}.dcm", size=527_000,
                patient_id=f"PAT{s // 5:07d}", study_uid=study, series_uid=series, instance_uid=f"{series}.{k}",
                modality="CT", manufacturer="SIEMENS", transfer_syntax="Explicit VR Little Endian", rows=512,
                columns=512, bits_allocated=16, position=(-192.3, -192.3, 1.5 * k - 611.25),
                orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), pixel_spacing=(0.7519, 0.7519), thickness=1.5, slope=1.0,
                intercept=-1024.0, splits={"ImageType": "ORIGINAL\\PRIMARY\\AXIAL", "ContentTime": f"1015{k:06d}"},
            )  # fmt: skip


def grouped(num_series: int, folder: Path) -> Iterator[Entry]:
    with Spill(folder / "headers") as headers:
        for header in made_up(num_series, folder):
            headers.add(KEY.hash("series", header.series_uid), encode(header))
        for bucket in headers.buckets():
            yield from dicom.entries((decode(Header, line) for _, line in bucket), folder, KEY)


def measure_lists(num_series: int, results: dict[str, list[float]]) -> None:
    """Headers → series → plan → ledger, through files."""
    spill.LIMIT_BYTES = 4 << 20
    num_files = num_series * SLICES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = core_seconds()
        plan = make_plan(folder, folder, lambda private: grouped(num_series, folder))
        results["headers grouped and planned, per core s"] = [num_files / (core_seconds() - start)]
        results["plan bytes a file"] = [plan.path.stat().st_size / num_files]
        ledger = folder / "l.parquet"
        work = lambda: write_ledger(ledger, plan.entries(), archive_root=folder)  # noqa: E731
        results["files of a plan written as ledger, per core s"] = [core_rate(work, num_files)]
        results["ledger bytes a row"] = [ledger.stat().st_size / num_series]
        paths = folder / "l.paths.parquet"
        results["companion bytes a file"] = [paths.stat().st_size / num_files]


def measure_archive(num_series: int, num_slices: int, repeats: int, results: dict[str, list[float]]) -> None:
    total = num_series * num_slices
    with tempfile.TemporaryDirectory() as temporary:
        archive, store = Path(temporary) / "archive", Path(temporary) / "store"
        for s in range(num_series):
            (archive / f"{s}").mkdir(parents=True)
            write_series(archive / f"{s}", num_slices, UID.format(2, s))
        find(archive, KEY)  # warm up
        for _ in range(repeats):
            walks = core_rate(lambda: [walk(archive) for _ in range(10)], 10 * total)
            results.setdefault("files walked, per core s", []).append(walks)
            some = partial(find, archive / "0", KEY)  # few: in this process
            results.setdefault("headers, per core s", []).append(core_rate(some, num_slices))
            seconds = []
            for num_workers in (1, 2):
                shutil.rmtree(store, ignore_errors=True)
                start, cores = time.perf_counter(), core_seconds()
                prepare(archive, store, key=KEY, num_workers=num_workers)
                seconds.append(time.perf_counter() - start)
                if num_workers == 1:  # the time of forked workers is not seen from here
                    results.setdefault("prepare slices, per core s", []).append(total / (core_seconds() - cores))
                results.setdefault(f"prepare slices/s, {num_workers} worker(s)", []).append(total / seconds[-1])
            results.setdefault("prepare speed-up of two workers, wall", []).append(seconds[0] / seconds[1])
        size = sum(p.stat().st_size for p in store.glob("volumes/*/*"))
        index = index_path(store)
        foreground = sum(len(row.foreground) for row in read_index(index))
        results["store bytes a slice"] = [size / total]
        results["index bytes a slice"] = [index.stat().st_size / total]
        results["index bytes a scan, without its slices"] = [(index.stat().st_size - foreground) / num_series]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=12)
    parser.add_argument("--slices", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--made-up", type=int, default=400, help="series without files")
    parser.add_argument("--long", type=int, default=0, help="slices of one long series")
    given = parser.parse_args()
    results: dict[str, list[float]] = {}
    measure_archive(given.series, given.slices, given.repeats, results)
    measure_lists(given.made_up, results)
    if given.long:
        results |= measure_long(given.long)
    print_lines(results, num_series=given.series, num_slices=given.slices, num_made_up=given.made_up)


if __name__ == "__main__":
    main()
