"""The index of a store: one row per volume, sorted by key, mapped from disk so that a million cost no memory."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hilum.errors import InputError
from hilum.records import write_atomic

BATCH_ROWS = 65536  # rows in one piece
MAX_OPEN = 256  # index files open at once

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # keyed hash of the series
        ("patient", pa.string()),  # keyed hash; "" when unknown
        ("study", pa.string()),
        ("modality", pa.string()),  # CT, MR or OT
        ("unit", pa.string()),
        ("plane", pa.string()),  # guessed; "" when unknown
        ("region", pa.string()),  # guessed; "" when unknown
        ("shape", pa.list_(pa.int32(), 3)),  # Z, Y, X
        ("affine", pa.list_(pa.float64(), 16)),  # row by row, (k, j, i) → LPS mm; null when unknown
        ("slope", pa.float64()),
        ("intercept", pa.float64()),
        ("exact", pa.bool_()),
        ("threshold", pa.float32()),  # voxels at or below are background
        ("foreground", pa.binary()),  # one byte per slice: share of anatomy, 255 = all
        ("look_hash", pa.uint64()),  # near-equal volumes have near-equal hashes; 0 when not computed
        ("pixel_hash", pa.string()),  # 16 hex digits of the stored voxels, shape, slope and intercept
        ("checksum", pa.string()),  # 16 hex digits of the file
        ("bytes", pa.int64()),  # of the file
    ]
)


@dataclass(frozen=True)
class Row:
    """One volume of the index; see INDEX_SCHEMA for units. What writing the volume shows is empty before."""

    key: str
    patient: str
    study: str
    modality: str
    unit: str
    plane: str
    region: str
    affine: tuple[float, ...] | None
    slope: float
    intercept: float
    exact: bool
    look_hash: int
    shape: tuple[int, int, int] = (0, 0, 0)
    threshold: float = 0.0
    foreground: bytes = b""
    pixel_hash: str = ""
    checksum: str = ""
    bytes: int = 0

    @property
    def shares(self) -> NDArray[np.float64]:
        """(Z,) share of anatomy in each slice, in steps of 1/255."""
        return np.frombuffer(self.foreground, np.uint8) / 255


def index_path(root: Path) -> Path:
    return root / "index" / "index.arrow"


class Rows(Sequence[Row]):
    """The rows of an index file, sorted by key. The file stays on disk; a row is built when it is asked for."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; expected an index of a store")
        try:
            with pa.memory_map(str(path)) as source:
                self.table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} cannot be read as Arrow IPC: {error}") from None
        if self.table.schema.names != INDEX_SCHEMA.names:
            raise InputError(f"{path} is no index of this version; prepare the archive again into another folder")
        batches = self.table.to_batches()
        self._columns = [batch.columns for batch in batches]  # fetching a column costs more than a value of it
        self._ends = np.cumsum([batch.num_rows for batch in batches]).tolist()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        columns, place = self._locate(number)
        values = {name: column[place].as_py() for name, column in zip(INDEX_SCHEMA.names, columns)}
        values["shape"] = tuple(values["shape"])
        values["affine"] = values["affine"] and tuple(values["affine"])
        return Row(**values)

    def find(self, key: str) -> int | None:
        """The number of the row with this key."""
        number = bisect.bisect_left(range(len(self)), key, key=self._key)
        return number if number < len(self) and self._key(number) == key else None

    def _key(self, number: int) -> str:
        columns, place = self._locate(number)
        key: str = columns[0][place].as_py()
        return key

    def _locate(self, number: int) -> tuple[list[Any], int]:
        number = int(number) + (len(self) if number < 0 else 0)
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        which = bisect.bisect_right(self._ends, number)
        return self._columns[which], number - (self._ends[which - 1] if which else 0)


def write_index(path: Path, rows: Sequence[Row]) -> None:
    """Write index rows, sorted by key so that equal archives give equal files."""
    ordered = [{n: getattr(r, n) for n in INDEX_SCHEMA.names} for r in sorted(rows, key=lambda r: r.key)]
    _write_tables(path, iter([pa.Table.from_pylist(ordered, schema=INDEX_SCHEMA)]))


def read_index(path: Path) -> Rows:
    """The rows of an index file. InputError when it is none."""
    return Rows(path)


def merge_indexes(target: Path, sources: Sequence[Path]) -> None:
    """Join index files, each sorted by key, into a sorted one. Of rows with one key that of the first source stays.

    Only the keys and BATCH_ROWS rows are in memory, whatever the number of slices.
    """
    if len(sources) <= MAX_OPEN:
        _write_tables(target, _merged([Rows(p).table for p in sources]))
        return
    groups = [sources[n : n + MAX_OPEN] for n in range(0, len(sources), MAX_OPEN)]
    joined = [target.with_name(f".{target.name}.{n}.tmp") for n in range(len(groups))]
    try:
        for group, path in zip(groups, joined):
            merge_indexes(path, group)
        merge_indexes(target, joined)
    finally:
        for path in joined:
            path.unlink(missing_ok=True)


def drop_rows(path: Path, keys: frozenset[str]) -> None:
    """Take rows out of an index file."""
    batches = Rows(path).table.to_batches(BATCH_ROWS)
    dropped = pa.array(sorted(keys), pa.string())
    _write_tables(path, (pa.Table.from_batches([b]).filter(pc.invert(pc.is_in(b["key"], dropped))) for b in batches))


def _merged(tables: list[Any]) -> Iterator[Any]:
    """Pieces of the merged table. Rows of one source stay in order, so each piece takes the next few of each source."""
    keys = pa.chunked_array([c for t in tables for c in t["key"].chunks], pa.string())
    source = np.repeat(np.arange(len(tables)), [t.num_rows for t in tables])[pc.sort_indices(keys).to_numpy()]
    position, last = np.zeros(len(tables), np.int64), None
    for start in range(0, len(source), BATCH_ROWS):
        counts = np.bincount(source[start : start + BATCH_ROWS], minlength=len(tables))
        piece = pa.concat_tables([t.slice(p, c) for t, p, c in zip(tables, position, counts)]).combine_chunks()
        position += counts
        piece = piece.take(pc.sort_indices(piece["key"]))
        found = piece["key"].to_pylist()
        new = [key != before for key, before in zip(found, [last, *found])]
        last = found[-1]
        yield piece.filter(pa.array(new))


def _write_tables(path: Path, tables: Iterator[Any]) -> None:
    with (
        write_atomic(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, INDEX_SCHEMA) as writer,
    ):
        waiting = INDEX_SCHEMA.empty_table()
        for table in tables:
            waiting = pa.concat_tables([waiting, table])
            while waiting.num_rows >= BATCH_ROWS:
                writer.write_table(_compact(waiting.slice(0, BATCH_ROWS)))
                waiting = waiting.slice(BATCH_ROWS)
        writer.write_table(_compact(waiting))


def _compact(table: Any) -> Any:
    """The table in one piece and copied, else a slice drags the text of its neighbours into the file."""
    return table.combine_chunks().take(pa.array(np.arange(table.num_rows)))
