"""Other forms of a feature table: CSV, npz, and the container form of the CVPR 2026 3D-CT competition.

In the container form each scan becomes `NAME.h5` with the dataset `y_hat`, a float32 vector, where NAME is the name of the
input file: by definition it repeats whatever the name says about the patient. Use it for data without identifiers.
"""

import contextlib
import csv
import os
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hilum.archive.privacy import Key, read_key
from hilum.archive.reasons import REASONS
from hilum.archive.workers import Crashed, run
from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder
from hilum.encode.features import encode_volume
from hilum.encode.items import How
from hilum.encode.regions import competition_vector
from hilum.encode.table.sources import Loaded, Series, content_of, load, open_source, place_masks, stem_of
from hilum.errors import ContractError, HilumError, InputError, UsageError
from hilum.records import hash_json, versions, write_atomic, write_table
from hilum.terminal import Progress
from hilum.volume import Volume

FORMS = ("parquet", "csv", "npz", "y_hat")


def form_of(out: Path, form: str | None) -> str:
    """The form by name, or by the suffix of the file."""
    found = form or out.suffix.lower().lstrip(".") or "parquet"
    if found not in FORMS:
        raise UsageError(f"the form '{found}' of {out.name} is unknown; expected {', '.join(FORMS)} (--format)")
    return found


def table_path(out: Path, form: str) -> Path:
    """The Parquet table: `out` itself, or beside it. UsageError when that is a folder, or both would have one name."""
    if form != "parquet" and out.suffix == ".parquet":
        raise UsageError(
            f"{out.name} is the name of the table that {form} is written beside; expected {out.stem}.{form}"
        )
    place = out if form == "parquet" else out.with_suffix(".parquet")
    if out.is_dir() or place.is_dir():
        raise UsageError(f"{out} is a folder; expected the name of a table in it, such as {out}/features.parquet")
    return place


def check_writable(folder: Path) -> None:
    """InputError when nothing can be written there, said before anything is encoded."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, so that nothing can be written to {folder}; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} is not writable for this user; choose another --out, or change its permissions")


def convert(table: Path, out: Path, form: str) -> None:
    """A feature table as CSV or npz."""
    {"csv": _write_csv, "npz": _write_npz}[form](table, out)


def _write_csv(table: Path, out: Path) -> None:
    """One line a row, the vector in columns v0, v1, …, empty where there is a reason instead."""
    with pq.ParquetFile(table) as file, write_atomic(out) as temporary, open(temporary, "w", newline="") as handle:
        width = file.schema_arrow.field("vector").type.list_size
        names = [name for name in file.schema_arrow.names if name != "vector"]
        writer = csv.writer(handle)
        writer.writerow([*names, *(f"v{n}" for n in range(width))])
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                vector = row["vector"] or [""] * width
                row["notes"] = "; ".join(row["notes"] or ())
                writer.writerow(
                    [
                        *("" if row[n] is None else row[n] for n in names),
                        *(np.float32(v) if v != "" else v for v in vector),
                    ]
                )


def _write_npz(table: Path, out: Path) -> None:
    """`vectors` (N, D) float32 and a text or number array (N,) for each column; failed scans in `failed`, (F, 2) series and
    reason. Read it with `numpy.load(path)`: nothing in it is pickled."""
    rows = pq.read_table(table)
    good = rows.filter(pc.is_valid(rows["vector"]))
    bad = rows.filter(pc.is_null(rows["vector"]))
    vectors = good["vector"].combine_chunks().flatten().to_numpy().reshape(good.num_rows, -1)
    arrays: dict[str, NDArray[Any]] = {"vectors": vectors.astype(np.float32)}
    for name in (field.name for field in rows.schema if field.type == pa.string() and field.name != "reason"):
        arrays[name] = np.array([value or "" for value in good[name].to_pylist()], dtype=np.str_)
    arrays["notes"] = np.array(["; ".join(notes or ()) for notes in good["notes"].to_pylist()], dtype=np.str_)
    for name in ("slice", "region"):
        arrays[name] = np.array([-1 if v is None else v for v in good[name].to_pylist()], np.int32)
    arrays["failed"] = np.array(
        [[r["series"], r["reason"]] for r in bad.select(["series", "reason"]).to_pylist()], np.str_
    ).reshape(-1, 2)
    with write_atomic(out) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **arrays)  # type: ignore[arg-type]


def write_y_hat(
    source: str | Path,
    out: Path,
    encoder: Encoder,
    *,
    masks: Path | None,
    batch_size: int,
    num_workers: int,
    key: Key,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The container form: `out`/NAME.h5 for each scan; a file that was made from the same scan, mask and model stays.

    masks    a folder of masks named as their scans; None: $MASKS_DIR, where it is set. A scan without a mask is encoded whole
    returns  as `hilum.encode.table.embed.embed`
    """
    given = os.environ.get("MASKS_DIR")
    masks = masks or (Path(given) if given else None)
    if masks is not None and not masks.exists():
        raise UsageError(f"the folder of masks {masks} is missing; check --masks or MASKS_DIR")
    check_writable(out)
    settings = hash_json([encoder.name, encoder.contract.hash, encoder.weights_hash, encoder.precision])
    with open_source(source, key) as opened:
        found = opened.list(progress)
        place_masks(found, masks, key, opened.label, required=False)
        _check_names(found.series)
        todo = [s for s in found.series if not _is_made(out / f"{s.name}.h5", settings, s, key)]
        num_kept, left_out = len(found.series) - len(todo), []
        work = partial(load, key=key, with_labels=True)
        with closing(run(work, todo, 1 if len(todo) == 1 else num_workers, in_flight=1)) as results:
            for done, (series, loaded) in enumerate(results, num_kept + 1):
                reason = _write_one(out / f"{series.name}.h5", encoder, loaded, settings, batch_size)
                if reason:
                    _forget(out / f"{series.name}.h5")
                if reason and not is_aside(reason):
                    left_out.append({"series": series.key, "reason": reason})
                elif reason:
                    found.set_aside[reason.partition(":")[0]] += 1
                else:
                    num_kept += 1
                if progress:
                    progress(done, len(found.series), "encoding scans")
    if not num_kept:
        why = [f"{count} set aside as {reason}" for reason, count in found.set_aside.items()]
        why += [f"series {row['series']}: {row['reason']}" for row in left_out[:5]]
        raise InputError(f"nothing in {opened.label} could be encoded: {'; '.join(why) or 'no scan found'}")
    counts = {"num_rows": num_kept, "num_scans": num_kept, "num_encoded": len(todo)}
    lists = {"set_aside": dict(found.set_aside), "left_out": sorted(left_out, key=lambda row: row["series"])}
    return {**counts, **lists, "model": encoder.name, "contract": encoder.contract.hash}


def _write_one(path: Path, encoder: Encoder, loaded: Loaded | Crashed, settings: str, batch_size: int) -> str:
    """Write one vector; returns the reason why not, or ""."""
    if isinstance(loaded, Crashed):
        return "reader_crashed"
    if loaded.volume is None:
        return loaded.reason
    try:
        vector = _y_hat(encoder, loaded.volume, loaded.mask, batch_size)
    except HilumError as broken:
        return f"contract: {broken}"
    with write_atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("y_hat", data=vector.astype(np.float32))
        file.attrs["hilum"] = hash_json([settings, loaded.content])
    return ""


def _forget(path: Path) -> None:
    """Remove the vector that an earlier run made of a scan that is refused now; the files of others stay."""
    with contextlib.suppress(OSError):
        with h5py.File(path, "r") as file:
            ours = "hilum" in file.attrs
        if ours:
            path.unlink()


def is_aside(reason: str) -> bool:
    """Whether a scan was set aside by design, as a label map is: no fault of anyone."""
    code = reason.partition(":")[0]
    return code in REASONS and not REASONS[code].fault


def _is_made(path: Path, settings: str, series: Series, key: Key) -> bool:
    """Whether this file was made from this scan with these settings."""
    try:
        with h5py.File(path, "r") as file:
            mark = str(file.attrs.get("hilum", ""))
    except OSError:
        return False
    return mark == hash_json([settings, content_of(series, key)])


def _check_names(series: list[Series]) -> None:
    names = [one.name for one in series if not one.reason]
    if len(set(names)) < len(names):
        raise UsageError("several scans have one file name, so that one .h5 would overwrite another; expected a name for "
                         "each scan. Use the Parquet form")  # fmt: skip


def _y_hat(encoder: Encoder, vol: Volume, mask: Volume | None, batch_size: int) -> NDArray[np.float32]:
    """Slice encoders follow the rule of Curia's container; volume encoders give their vector, or that of the region."""
    if vol.modality not in encoder.contract.modalities:
        raise ContractError(f"modality {vol.modality} is not in the contract of {encoder.name}")
    if isinstance(encoder.contract, Contract):
        return competition_vector(encoder, vol, mask, batch_size)
    if mask is None or not bool((mask.voxels > 0).any()):
        return encode_volume(encoder, vol, How(level="volume"), keep=None).first
    region = replace(mask, voxels=(mask.voxels > 0).astype(np.uint8))
    return encode_volume(encoder, vol, How(level="region"), mask=region, keep=None).first


def read_y_hat(folder: str | Path, *, model: str, key: Key) -> pa.Table:
    """Features of others in the container form → a feature table of level volume.

    folder  with NAME.h5 files, dataset `y_hat` of one length
    model   what to call the encoder that made them
    returns rows whose series is the hash of NAME: labels join by a column `file` that holds the same names

    InputError when a file has no such vector or lengths differ.
    """
    from hilum.encode.table.rows import failed_row, feature_schema

    paths = sorted(Path(folder).glob("*.h5"))
    if not paths:
        raise InputError(f"{folder} holds no .h5 file; expected one a scan, with the dataset y_hat")
    rows = []
    for path in paths:
        try:
            with h5py.File(path, "r") as file:
                vector = np.asarray(file["y_hat"], np.float32).ravel()
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{path.name} holds no vector y_hat ({type(error).__name__}); expected float numbers"
            ) from None
        series = key.hash("item", stem_of(path.with_suffix("")))
        common = {"patient": "", "study": "", "series": series, "modality": "", "level": "volume", "model": model}
        common |= {"contract": "", "weights": "", "layer": "", "content": ""}
        reason = "" if np.isfinite(vector).all() and len(vector) else "non_finite: the vector holds NaN or infinity"
        row = failed_row(common, reason)
        rows.append(row if reason else row | {"vector": vector, "reason": None})
    widths = {len(row["vector"]) for row in rows if row["vector"] is not None}
    if len(widths) != 1:
        raise InputError(f"the vectors in {Path(folder).name} have lengths {sorted(widths)}; expected one")
    rows.sort(key=lambda row: row["series"])
    return pa.Table.from_pylist(rows, schema=feature_schema(widths.pop()))


def import_y_hat(
    folder: str | Path, out: Path, *, model: str, form: str | None = None, key: Key | None = None
) -> dict[str, Any]:
    """`read_y_hat` into a feature table on disk; returns the counts of `hilum.encode.table.embed.embed`.

    out  .parquet; .csv or .npz are written beside a table of that name
    """
    key, form = key or read_key(), form_of(out, form)
    if form == "y_hat":
        raise UsageError("a folder in the form y_hat becomes a table; expected --out with .parquet, .csv or .npz")
    place = table_path(out, form)
    check_writable(place.parent)
    table = read_y_hat(folder, model=model, key=key)
    about = {"format": "hilum-features", "version": 2, "model": model, "contract": "", "level": "volume"}
    write_table(place, table, about | {"key": key.fingerprint, "set_aside": {}, "versions": versions()})
    if form != "parquet":
        convert(place, out, form)
    bad = table.filter(pc.is_valid(table["reason"])).select(["series", "reason"]).to_pylist()
    num_good = table.num_rows - len(bad)
    counts = {"num_rows": num_good, "num_scans": num_good, "num_encoded": 0, "set_aside": {}}
    return counts | {"left_out": bad, "model": model, "contract": ""}
