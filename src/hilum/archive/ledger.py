"""The ledger: what became of every file, one row per scan and per group of refused files, with a named reason.

`num_files` summed over all rows is the number of files in the archive. A row carries keyed hashes, technical values and
reason codes: no name, no identifier, no path. The paths of a row live in `Entry.paths` and are written only to the
companion `<stem>.paths.parquet`, which says where each row lies: keep that file inside the hospital.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hilum.archive.reasons import FLAGS, REASONS
from hilum.archive.spill import Spill, decode, encode, private_folder
from hilum.errors import InputError
from hilum.records import open_table, read_batches

LEDGER_VERSION = 2
_PORTION = 1024  # rows turned into a table at once


VENDORS = ("SIEMENS", "GE", "PHILIPS", "CANON", "TOSHIBA", "HITACHI", "FUJIFILM", "UIH", "HYPERFINE", "NEUSOFT")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the ledger, and (never written with it) where its files lie.

    key              keyed hash: of the series, or of the path below the archive
    patient, study   keyed hashes; "" when the files name none
    reader           "dicom", "nifti", "image", or "" when no reader took it
    modality         "CT", "MR", "OT" (unknown), or "" for what is no image
    reason, detail   a code of REASONS and the numbers behind it; "" when used
    repairs          what had to be set right
    flags            cautions on a used scan, "code: numbers" with a code of FLAGS
    num_slices, rows, columns   the stack as it was acquired (DICOM) or is stored (NIfTI); 0 when unknown
    spacing_mm       (between slices, between rows, between columns); None when unknown
    orientation      patient directions of slices, rows going down and columns going right, e.g. "SPL"
    shear_deg        departure from right angles, above 0 for gantry tilt
    manufacturer     vendor family of the VENDORS list, else "OTHER" or ""
    split_by         attribute that separated this volume from others in its series
    study_day        days from a secret origin of the patient to the study: intervals hold, dates do not show
    plane, region    guessed: axial, coronal, sagittal or oblique; head, neck, chest, abdomen, pelvis, …; "" when unknown
    paths            the files, in stacking order; a file with several frames stands once for each frame
    frames           for each of `paths` the frame, tile or time point in it; () when all are 0
    """

    key: str
    patient: str = ""
    study: str = ""
    reader: str = ""
    modality: str = ""
    reason: str = ""
    detail: str = ""
    repairs: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    num_files: int = 1
    num_slices: int = 0
    rows: int = 0
    columns: int = 0
    spacing_mm: tuple[float, float, float] | None = None
    orientation: str = ""
    shear_deg: float = 0.0
    manufacturer: str = ""
    transfer_syntax: str = ""
    split_by: str = ""
    study_day: int | None = None
    plane: str = ""
    region: str = ""
    paths: tuple[Path, ...] = ()
    frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert not self.reason or self.reason in REASONS, self.reason
        assert all(f.split(":")[0] in FLAGS for f in self.flags), self.flags

    @property
    def used(self) -> bool:
        return not self.reason

    @property
    def verdict(self) -> str:
        """ "used", "repaired" (used, after something was set right) or "refused"."""
        return "refused" if self.reason else "repaired" if self.repairs else "used"


LEDGER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("patient", pa.string()),
        ("study", pa.string()),
        ("reader", pa.string()),
        ("modality", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("repairs", pa.list_(pa.string())),
        ("flags", pa.list_(pa.string())),
        ("num_files", pa.int64()),
        ("num_slices", pa.int32()),
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        ("spacing_mm", pa.list_(pa.float64(), 3)),
        ("orientation", pa.string()),
        ("shear_deg", pa.float64()),
        ("manufacturer", pa.string()),
        ("transfer_syntax", pa.string()),
        ("split_by", pa.string()),
        ("study_day", pa.int32()),
        ("plane", pa.string()),
        ("region", pa.string()),
    ]
)
PATHS_SCHEMA = pa.schema([("key", pa.string()), ("path", pa.string())])


def vendor_family(manufacturer: str) -> str:
    """The vendor family named in a Manufacturer attribute. Free text never passes: unknown vendors become "OTHER"."""
    words = manufacturer.upper().replace("_", " ").replace("-", " ").split()
    if not words:
        return ""
    return next((v for v in VENDORS if any(w == v or (len(v) > 3 and w.startswith(v)) for w in words)), "OTHER")


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Write a ledger, sorted by key, without any path: safe to hand on. Holds all entries: for parts of a run."""
    write_sorted(path, sorted(entries, key=lambda e: e.key))


def write_sorted(path: Path, entries: Iterable[Entry], watch: Callable[[Entry], None] | None = None) -> None:
    """Write a ledger of any length from entries that come in order of key; `watch` sees each on its way."""
    with open_table(path, LEDGER_SCHEMA, {"format": "hilum-ledger", "version": LEDGER_VERSION}) as ledger:
        rows: list[dict[str, Any]] = []
        for entry in entries:
            rows.append({name: getattr(entry, name) for name in LEDGER_SCHEMA.names})
            if watch:
                watch(entry)
            if len(rows) == _PORTION:
                ledger.add(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA))
                rows = []
        ledger.add(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA))


def write_ledger(path: Path, entries: Iterable[Entry], *, archive_root: Path) -> dict[str, Any]:
    """Write a ledger and, beside it, `<stem>.paths.parquet` with the files behind each row; any number of entries.

    path          of the ledger, which holds no path and no identifier
    entries       in any order
    archive_root  paths are written relative to it
    returns       what `count` says of them

    The companion file says which file became which row. Paths often carry names: keep it inside the hospital.
    """
    tally, rows = Tally(), []
    with private_folder() as folder, Spill(folder / "rows") as spill:
        for entry in entries:
            spill.add(entry.key, encode(entry))
        with open_table(path.with_name(f"{path.stem}.paths.parquet"), PATHS_SCHEMA) as companion:

            def watch(entry: Entry) -> None:
                tally.add(entry)
                for where in dict.fromkeys(entry.paths):
                    text = where.relative_to(archive_root).as_posix().encode("utf-8", "backslashreplace").decode()
                    rows.append({"key": entry.key, "path": text})
                if len(rows) >= _PORTION:
                    companion.add(pa.Table.from_pylist(rows, schema=PATHS_SCHEMA))
                    rows.clear()

            write_sorted(path, (decode(Entry, line) for bucket in spill.buckets() for _, line in bucket), watch)
            companion.add(pa.Table.from_pylist(rows, schema=PATHS_SCHEMA))
    return tally.counts()


def read_ledger(path: Path) -> list[Entry]:
    """The rows of a ledger; without paths. InputError when it is no ledger of this version."""
    return list(read_entries(path))


def read_entries(path: Path) -> Iterator[Entry]:
    """The rows of a ledger one at a time, however many there are; else as `read_ledger`."""
    for table in read_batches(path):
        if not set(LEDGER_SCHEMA.names) <= set(table.schema.names):
            raise InputError(f"{path} is no ledger of this version; make one with: hilum scan ARCHIVE -o {path}")
        yield from entries_of(table)


def entries_of(table: pa.Table | pa.RecordBatch) -> Iterator[Entry]:
    """Rows of LEDGER_SCHEMA as entries."""
    for row in table.select(LEDGER_SCHEMA.names).to_pylist():
        del row["verdict"]
        row["repairs"], row["flags"] = tuple(row["repairs"]), tuple(row["flags"])
        row["spacing_mm"] = row["spacing_mm"] and tuple(row["spacing_mm"])
        yield Entry(**row)


class Tally:
    """The totals of a ledger, entry by entry."""

    def __init__(self) -> None:
        self._files: Counter[str] = Counter()  # by reason, "" for used
        self._rows: Counter[str] = Counter()
        self._modalities: Counter[str] = Counter()
        self._patients: set[str] = set()
        self._num_slices = 0

    def add(self, entry: Entry) -> None:
        self._files[entry.reason] += entry.num_files
        self._rows[entry.reason] += 1
        if entry.used:
            self._modalities[entry.modality] += 1
            self._num_slices += entry.num_slices
            if entry.patient:
                self._patients.add(entry.patient)

    def counts(self) -> dict[str, Any]:
        refused = [item for item in self._files.items() if item[0]]
        return {
            "num_files": self._files.total(),
            "num_files_used": self._files[""],
            "num_used": self._rows[""],
            "num_slices": self._num_slices,
            "num_patients": len(self._patients),
            "modalities": dict(sorted(self._modalities.items())),
            "refused": {
                reason: {"rows": self._rows[reason], "files": num, "fault": REASONS[reason].fault}
                for reason, num in sorted(refused, key=lambda item: (-item[1], item[0]))
            },
        }


def count(entries: Iterable[Entry]) -> dict[str, Any]:
    """What the ledger says in total.

    returns  num_files, num_used (scans), num_slices and num_patients among the used, modalities (scans each),
             refused: reason → {"rows", "files", "fault"}, most files first
    """
    tally = Tally()
    for entry in entries:
        tally.add(entry)
    return tally.counts()
