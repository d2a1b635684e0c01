"""`hilum embed`: any scans or a store → a feature table on disk."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hilum.archive.intake import read_scan
from hilum.archive.labels import read_labels
from hilum.archive.privacy import Key, read_key
from hilum.archive.reasons import REASONS
from hilum.archive.scan import find
from hilum.archive.store.store import Store
from hilum.encode.features import LEVELS, Scan, feature_rows, write_rows
from hilum.encode.zoo import load_encoder
from hilum.errors import ContractError, InputError, LabelsError, ScanRefused, UsageError
from hilum.records import versions, write_atomic
from hilum.terminal import Progress
from hilum.volume import Volume


@dataclass
class Outcome:
    """What became of every scan: encoded, set aside by design, or left out although it looked usable."""

    num_scans: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)  # reason → files
    left_out: list[tuple[str, str]] = field(default_factory=list)  # series key, reason

    def refuse(self, series: str, refusal: ScanRefused, num_files: int = 1) -> None:
        if REASONS[refusal.reason].fault:
            self.left_out.append((series, str(refusal)))
        else:
            self.set_aside[refusal.reason] += num_files


def embed(
    source: str | Path,
    *,
    model: str,
    out: str | Path,
    level: str = "slice",
    masks: str | Path | None = None,
    max_slices: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    seed: int = 0,
    key: Key | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode scans into one Parquet table of features.

    source      a store, a folder of scans, or one scan
    model       an exported encoder's folder, "pixels", or "random:FOLDER"
    level       "slice", "region" (needs masks) or "volume"
    masks       CSV with columns series_uid (or file, or series) and mask: label maps (NIfTI, mha, nrrd) on their scans'
                grids, DICOM SEG or RTSTRUCT, named relative to the CSV
    max_slices  evenly spaced slices of each scan instead of all
    returns     counts: rows, scans, set aside by reason, left out with series key and reason
    """
    source, out, key = Path(source), Path(out), key or read_key()
    if level not in LEVELS:
        raise UsageError(f"level '{level}' is unknown; expected {', '.join(LEVELS)}")
    if max_slices is not None and max_slices < 1:
        raise UsageError(f"max_slices must be at least 1; found {max_slices}")
    if level == "region" and masks is None:
        raise UsageError("level region needs --masks, a CSV that names a label map for each scan")
    encoder = load_encoder(model, device=device, seed=seed)
    mask_paths = read_mask_table(Path(masks), key) if masks is not None else {}
    outcome = Outcome()
    scans = _scans(source, key, level, mask_paths, outcome, encoder.contract.modalities, progress)
    metadata = {
        "format": "hilum-features",
        "version": 1,
        "model": encoder.name,
        "contract": encoder.contract.hash,
        "key": key.fingerprint,
        "level": level,
        "versions": versions(),
    }
    with write_atomic(out) as temporary:
        rows = feature_rows(encoder, scans, level, max_slices, batch_size)
        try:
            num_rows = write_rows(temporary, rows, {b"hilum": json.dumps(metadata, sort_keys=True).encode()})
        except ScanRefused:
            raise InputError(f"nothing in {source.name} could be encoded: {_summary(outcome)}") from None
    return {
        "num_rows": num_rows,
        "num_scans": outcome.num_scans,
        "set_aside": dict(outcome.set_aside),
        "left_out": [{"series": series, "reason": reason} for series, reason in outcome.left_out],
        "model": encoder.name,
        "contract": encoder.contract.hash,
    }


def _summary(outcome: Outcome) -> str:
    reasons = [f"{count} set aside as {reason}" for reason, count in outcome.set_aside.items()]
    reasons += [f"series {series}: {reason}" for series, reason in outcome.left_out[:5]]
    return "; ".join(reasons) or "no scan found"


def _scans(
    source: Path,
    key: Key,
    level: str,
    masks: dict[str, Path],
    outcome: Outcome,
    modalities: tuple[str, ...],
    progress: Progress | None,
) -> Iterator[Scan]:
    """Scans one at a time, each with its mask; what cannot be used is counted in `outcome`."""
    readers = (
        _store_readers(source) if (source / "store.json").is_file() else _file_readers(source, key, outcome, progress)
    )
    if masks and (unknown := masks.keys() - {series for series, *_ in readers}) == masks.keys():
        raise LabelsError(
            f"none of the {len(unknown)} scans of the mask table is in {source.name}; expected matching ids"
        )
    for done, (series, patient, study, read) in enumerate(readers, 1):
        try:
            mask = None
            if level == "region" and series not in masks:
                outcome.set_aside["no_mask"] += 1
                continue
            volume = read()
            if volume.modality not in modalities:
                raise ContractError(f"modality {volume.modality} is not in the model's contract")
            if level == "region":
                mask = read_labels(masks[series], volume).volume
        except ScanRefused as refusal:
            outcome.refuse(series, refusal)
        except ContractError as broken:
            outcome.left_out.append((series, str(broken)))
        else:
            outcome.num_scans += 1
            yield Scan(series, patient, study, volume, mask)
        if progress:
            progress(done, len(readers), "encoding scans")


Reader = tuple[str, str, str, Callable[[], Volume]]


def _store_readers(source: Path) -> list[Reader]:
    store = Store(source)
    return [(r.key, r.patient, r.study, lambda k=r.key: store.read_volume(k)) for r in store.rows]  # type: ignore[misc]


def _file_readers(source: Path, key: Key, outcome: Outcome, progress: Progress | None) -> list[Reader]:
    readers: list[Reader] = []
    for entry in find(source, key, progress=progress):
        if entry.used:
            readers.append((entry.key, entry.patient, entry.study, lambda e=entry: read_scan(e)))  # type: ignore[misc]
        else:
            outcome.refuse(entry.key, ScanRefused(entry.reason, entry.detail), entry.num_files)
    return readers


def read_mask_table(path: Path, key: Key) -> dict[str, Path]:
    """Series key → label map. LabelsError when columns or files are missing or a scan is named twice."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelsError(f"the mask table {path.name} cannot be read: {error}") from None
    columns = set(rows[0]) if rows else set()
    known = next((c for c in ("series_uid", "file", "series") if c in columns and any(r[c] for r in rows)), None)
    if known is None or "mask" not in columns:
        raise LabelsError(
            f"the mask table {path.name} has columns {sorted(columns)}; expected mask and one of series_uid, file, series"
        )
    found: dict[str, Path] = {}
    for row in rows:
        series = (
            row[known] if known == "series" else key.hash("series" if known == "series_uid" else "item", row[known])
        )
        mask = path.parent / row["mask"]
        if series in found:
            raise LabelsError(f"the mask table {path.name} names series {series} twice")
        if not mask.is_file():
            raise LabelsError(f"a label map that {path.name} names for series {series} is missing")
        found[series] = mask
    return found
