"""`hilum embed`: any scans → a feature table on disk, resumable at any moment."""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from hilum.archive.locks import hold
from hilum.archive.privacy import Key, read_key
from hilum.archive.workers import Crashed, default_num_workers, run
from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder
from hilum.encode.items import How, Scan
from hilum.encode.table.outputs import check_writable, convert, form_of, is_aside, table_path, write_y_hat
from hilum.encode.table.resume import (
    Past,
    Places,
    Shard,
    clear_away,
    clear_parts,
    merge,
    plan_shards,
    read_past,
    unfinished,
    write_inputs,
    write_shard,
)
from hilum.encode.table.rows import feature_rows, feature_schema, rows_table
from hilum.encode.table.sources import Loaded, Series, Source, load, open_source, place_masks, read_rows, stamp_of
from hilum.encode.zoo import load_encoder
from hilum.errors import InputError, UsageError, WorkerDied
from hilum.records import hash_json, table_metadata, versions
from hilum.settings import to_dict
from hilum.terminal import Progress

MOST_READERS = 8  # processes that read scans, unless more are asked for
_AS_THE_RULE = (None, None, "mean", (-1,), None, False)  # level, pooling, across, layers, max_slices, patches
SHARDS_A_TASK = 8  # on Ray: the model is loaded once a worker, so a task may be short


@dataclass(frozen=True)
class Job:
    """What a process that encodes must know, beside its shards.

    options   of `load_encoder`, but the device
    settings  hash of all that decides the numbers
    patches   folder for patch tokens, or None
    """

    model: str
    options: dict[str, Any]
    how: How
    batch_size: int
    num_workers: int
    key: Key
    settings: str
    weights: str
    patches: Path | None
    num_threads: int | None = None


def embed(
    source: str | Path,
    *,
    model: str,
    out: str | Path,
    level: str | None = None,
    masks: str | Path | None = None,
    pooling: str | None = None,
    across: str = "mean",
    layers: Sequence[int] = (-1,),
    max_slices: int | None = None,
    patches: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
    revision: str | None = None,
    num_workers: int | None = None,
    engine: str = "local",
    form: str | None = None,
    seed: int = 0,
    key: Key | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode scans into one table of features. The same command goes on after an interruption, and encodes only what is
    new or changed when the table is there.

    source       a store, a folder of scans, one scan, a CSV with a column path, or the address of a DICOMweb study or series
    model        as `hilum.encode.zoo.load_encoder` knows it
    out          .parquet; .csv or .npz are written beside a table of that name
    level        "slice", "region" (needs masks) or "volume"; None: what the encoder sees
    masks        CSV with columns series_uid (or file, or series) and mask, or a folder of masks named as their scans: label
                 maps (NIfTI, mha, nrrd) on their scans' grids, DICOM SEG or RTSTRUCT
    pooling, across, layers, max_slices   `hilum.encode.features.How`
    patches      also write patch tokens, to <stem>.patches/
    precision    float32, bfloat16 or auto (`hilum.encode.encoder.Encoder`)
    revision     of a released model
    device       auto, cpu, cuda:0; several with commas: one process on each
    num_workers  processes that read ahead
    engine       "local", or "ray": shards are encoded on the CPUs of a cluster
    form         parquet, csv, npz, or y_hat: one .h5 a scan in the folder `out`; None: by the suffix of `out`
    returns      counts: rows, scans, scans encoded now, set aside by reason, left out with series key and reason
    """
    out, key = Path(out), key or read_key()
    form = form_of(out, form)
    if form == "y_hat" and (level, pooling, across, tuple(layers), max_slices, patches) != _AS_THE_RULE:
        raise UsageError("the form y_hat follows the rule of the competition; leave --level, --pooling, --across, --layers, "
                         "--max-slices and --patches out")  # fmt: skip
    devices = _check_numbers(batch_size, num_workers, device)
    options: dict[str, Any] = {"seed": seed, "precision": precision, "revision": revision}
    encoder = load_encoder(model, device=devices[0], **options)
    options["precision"] = encoder.precision  # on every device the same
    how = _make_how(encoder, level, pooling, across, tuple(layers), max_slices)
    num_workers = num_workers or min(default_num_workers(), MOST_READERS)
    masks = Path(masks) if masks is not None else None
    if form == "y_hat":
        return write_y_hat(
            source,
            out,
            encoder,
            masks=masks,
            batch_size=batch_size,
            num_workers=num_workers,
            key=key,
            progress=progress,
        )
    if masks is not None and how.level != "region":
        raise UsageError(
            f"masks are for level region, the level is {how.level}; add --level region, or leave --masks out"
        )
    places = Places(table_path(out, form))
    weights = encoder.weights_hash
    about = _about(encoder, how, weights, patches, key)
    settings = hash_json(about)
    job = Job(model, options, how, batch_size, num_workers, key, settings, weights, places.patches if patches else None)
    with open_source(source, key) as opened:
        num_encoded = _update(opened, masks, places, encoder, job, about, devices, engine, progress)
    if form != "parquet":
        convert(places.table, out, form)
    return _report(places, num_encoded)


def _check_numbers(batch_size: int, num_workers: int | None, device: str) -> list[str]:
    """UsageError for what means nothing; returns the devices."""
    if batch_size < 1 or (num_workers is not None and num_workers < 1):
        raise UsageError(f"batch_size {batch_size}, num_workers {num_workers}: expected at least 1")
    devices = [one.strip() for one in device.split(",")]
    if not all(devices):
        raise UsageError(
            f"device '{device}' names an empty device; expected auto, cpu, cuda or cuda:N, several with commas"
        )
    return devices


def _update(
    opened: Source,
    masks: Path | None,
    places: Places,
    encoder: Encoder,
    job: Job,
    about: dict[str, Any],
    devices: Sequence[str],
    engine: str,
    progress: Progress | None,
) -> int:
    """Bring the table up to date with its source; returns how many series had to be encoded."""
    key = job.key
    stamp = key.hash("item", opened.stamp + _stamp_of_masks(masks))
    past = read_past(places, job.settings)
    if past.stamp == stamp and not places.parts.exists() and _patches_there(places, job.patches is not None):
        return 0
    check_writable(places.table.parent)
    with hold(places.parts / "lock", f"the table {places.table}"):
        found = opened.list(progress)
        place_masks(found, masks, key, opened.label, job.how.level == "region")
        series = sorted(found.series, key=lambda s: s.key)
        num_encoded = _encode_missing(encoder, series, past, places, job, devices, engine, progress)
        if not any(_width(path) > 1 for path in {done.path for done in past.done.values()}):
            why = _why(past, series, found.set_aside)
            clear_parts(places)
            raise InputError(f"nothing in {opened.label} could be encoded: {why}")
        metadata = about | {"settings": job.settings, "set_aside": dict(sorted(found.set_aside.items()))}
        # What a head on these features needs to be applied again (hilum.probe.saved).
        metadata |= {"contract_values": to_dict(encoder.contract), "loads_as": job.model, "seed": job.options["seed"]}
        _finish(places, series, past, metadata, stamp)
    return num_encoded


def _make_how(
    encoder: Encoder,
    level: str | None,
    pooling: str | None,
    across: str,
    layers: tuple[int, ...],
    max_slices: int | None,
) -> How:
    """UsageError when the encoder cannot do it."""
    sees_slices = isinstance(encoder.contract, Contract)
    level = level or ("slice" if sees_slices else "volume")
    if level == "slice" and not sees_slices:
        raise UsageError(f"{encoder.name} encodes volumes; expected level volume or region")
    return How(level=level, pooling=pooling, across=across, layers=layers, max_slices=max_slices)


def _about(encoder: Encoder, how: How, weights: str, patches: bool, key: Key) -> dict[str, Any]:
    """All that decides the numbers: tables with the same are one and the same."""
    return {
        "format": "hilum-features",
        "version": 2,
        "model": encoder.name,
        "contract": encoder.contract.hash,
        "weights": weights,
        "precision": encoder.precision,
        "patches": patches,
        "key": key.fingerprint,
        "hilum": version("hilum"),
        **to_dict(how),
    }


def _stamp_of_masks(masks: Path | None) -> str:
    """Changes with the table of masks or the files in a folder of them, and with those that a table names."""
    if masks is None:
        return ""
    if masks.is_dir():
        return stamp_of(sorted(masks.iterdir()))
    return stamp_of([masks, *(masks.parent / row["mask"] for row in read_rows(masks, "mask"))])


def _patches_there(places: Places, wanted: bool) -> bool:
    return not wanted or all((places.patches / name).exists() for name in _names_of_patches(places.table))


def _names_of_patches(table: Path) -> set[str]:
    names: set[str] = set()
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(65536, columns=["patches"]):
            names.update(name for name in pc.unique(batch.column(0)).to_pylist() if name)
    return names


def _encode_missing(
    encoder: Encoder,
    series: Sequence[Series],
    past: Past,
    places: Places,
    job: Job,
    devices: Sequence[str],
    engine: str,
    progress: Progress | None,
) -> int:
    """Encode what earlier runs have not. Afterwards `past.done` holds every series."""
    keys = {one.key for one in series}
    past.done = {key: done for key, done in past.done.items() if key in keys}
    todo = unfinished(series, past, job.key, job.patches)
    fresh = [s for s in series if s.key not in past.done or past.done[s.key].path != places.table]
    shards = plan_shards(fresh, todo, places, job.settings, job.how.max_slices)
    if len(todo) == 1:
        job = replace(job, num_workers=1)
    done = len(series) - len(todo)
    if engine == "local" and len(devices) == 1:
        for shard in encode_shards(encoder, shards, job):
            done += len(shard.series)
            if progress:
                progress(done, len(series), "encoding scans")
    else:
        for group in _spread(shards, job, devices, engine):
            done += sum(len(shard.series) for shard in group)
            if progress:
                progress(done, len(series), "encoding scans")
    wanted = {shard.path for shard in shards}
    for path, found in read_past(places, job.settings).done.items():
        if found.path in wanted:
            past.done[path] = found
    return len(todo)


def _spread(shards: list[Shard], job: Job, devices: Sequence[str], engine: str) -> Iterator[tuple[Shard, ...]]:
    """Shards in other processes: one on each device, or tasks on Ray. WorkerDied when one of them is killed."""
    if engine == "local":
        cores = max(1, default_num_workers() // len(devices))
        job = replace(job, num_workers=max(1, job.num_workers // len(devices)), num_threads=cores)
        tasks = [(device, tuple(shards[n :: len(devices)])) for n, device in enumerate(devices)]
        num_workers: int | None = len(devices)
    else:
        job = replace(job, num_workers=1)
        tasks = [("cpu", tuple(shards[n : n + SHARDS_A_TASK])) for n in range(0, len(shards), SHARDS_A_TASK)]
        num_workers = None
    tasks = [task for task in tasks if task[1]]
    with closing(run(partial(_encode_on, job=job), tasks, num_workers, engine, 1)) as results:
        for (device, group), result in results:
            if isinstance(result, Crashed):
                raise WorkerDied(f"the process on {device} was ended from outside, perhaps for want of memory; what was "
                                 "finished is kept. Run the same command again")  # fmt: skip
            yield group


def _encode_on(task: tuple[str, tuple[Shard, ...]], job: Job) -> int:
    """Encode shards on one device. Runs in a worker."""
    device, shards = task
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    encoder = load_encoder(job.model, device=device, **job.options)
    return sum(1 for _ in encode_shards(encoder, [shard for shard in shards if not shard.path.exists()], job))


def encode_shards(encoder: Encoder, shards: Sequence[Shard], job: Job) -> Iterator[Shard]:
    """Write one shard after the other, each handed on when it is on disk."""
    contents: dict[str, str] = {}
    scans = _scans(shards, job, contents)
    rows = feature_rows(
        encoder, scans, job.how, job.batch_size, num_threads=job.num_workers, patches=job.patches, weights=job.weights
    )
    with closing(scans), closing(rows):
        for shard in shards:
            table = rows_table([row for _ in shard.series for row in next(rows)])
            write_shard(shard, table, contents, job.settings)
            yield shard


def _scans(shards: Sequence[Shard], job: Job, contents: dict[str, str]) -> Generator[Scan, None, None]:
    """Scans in the order of the shards, read ahead by other processes; what each was read from goes to `contents`."""
    todo = [(number, group, one) for number, (group, one) in enumerate(_flat(shards))]
    work = partial(_load, key=job.key, with_labels=job.how.level == "region")
    waiting: dict[int, Loaded] = {}
    due = 0
    with closing(run(work, todo, job.num_workers, in_flight=1)) as results:
        for (number, _, _), result in results:
            waiting[number] = Loaded(reason="reader_crashed") if isinstance(result, Crashed) else result
            while due in waiting:
                found = waiting.pop(due)
                _, group, one = todo[due]
                contents[one.key] = found.content
                due += 1
                yield Scan(
                    one.key, one.patient, one.study, found.volume, found.mask, found.content, found.reason, group
                )


def _flat(shards: Sequence[Shard]) -> Iterator[tuple[int, Series]]:
    return ((group, one) for group, shard in enumerate(shards) for one in shard.series)


def _load(item: tuple[int, int, Series], key: Key, with_labels: bool) -> Loaded:
    return load(item[2], key, with_labels)


def _width(path: Path) -> int:
    return int(pq.read_schema(path).field("vector").type.list_size)


def _finish(places: Places, series: Sequence[Series], past: Past, metadata: dict[str, Any], stamp: str) -> None:
    """Join the parts, then note what they were made from; the parts go last: a kill between any two steps loses nothing."""
    width = max(_width(path) for path in {done.path for done in past.done.values()})
    contents = {key: done.content for key, done in past.done.items()}
    merge(places, series, past, feature_schema(width), metadata | {"versions": versions()})
    write_inputs(places, series, contents, stamp)
    clear_away(places, _names_of_patches(places.table))


def _why(past: Past, series: Sequence[Series], set_aside: Counter[str]) -> str:
    reasons = [f"{count} set aside as {reason}" for reason, count in set_aside.items()]
    for path in sorted({done.path for done in past.done.values()}):
        rows = pq.read_table(path, columns=["series", "reason"]).to_pylist()
        reasons += [f"series {row['series']}: {row['reason']}" for row in rows[:5]]
    return "; ".join(reasons[:8]) or "no scan found"


def _report(places: Places, num_encoded: int) -> dict[str, Any]:
    """What the table holds, in numbers."""
    table = pq.read_table(places.table, columns=["series", "reason"])
    metadata = table_metadata(table)
    good = table.filter(pc.is_null(table["reason"]))
    bad = table.filter(pc.is_valid(table["reason"])).to_pylist()
    aside = Counter(metadata["set_aside"])
    left_out = []
    for row in bad:
        if is_aside(row["reason"]):
            aside[row["reason"].partition(":")[0]] += 1
        else:
            left_out.append(row)
    return {
        "num_rows": good.num_rows,
        "num_scans": pc.count_distinct(good["series"]).as_py(),
        "num_encoded": num_encoded,
        "set_aside": dict(aside),
        "left_out": left_out,
        "model": metadata["model"],
        "contract": metadata["contract"],
    }
