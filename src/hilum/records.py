"""Records on disk: JSON and Parquet written atomically, hashes, and the facts of the machine.

A reader sees either the old file or the new one, whole, whatever kills the writer. Only this module writes JSON.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hilum.errors import DiskFull, InputError
from hilum.settings import hash_json as hash_json

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says where and what to do; other errors pass."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Blosc2 and torch report a failed write as RuntimeError; the free space tells what happened.
        full = error.errno in _DISK_FULL if isinstance(error, OSError) else _free_bytes(path) < 1 << 20
        if not full:
            raise
        raise DiskFull(
            f"no space left on the disk of {path.parent} ({_free_bytes(path) / 1e6:.0f} MB free). What was finished "
            "before is whole: free some space and run the same command again"
        ) from error


def _free_bytes(path: Path) -> int:
    parent = next(p for p in [path, *path.resolve().parents] if p.exists())
    stats = os.statvfs(parent)
    return stats.f_bavail * stats.f_frsize


@contextlib.contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_full_disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: Any) -> None:
    write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON record. InputError when it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None


def write_table(path: Path, table: pa.Table, metadata: dict[str, Any] | None = None) -> None:
    """Write a Parquet table; `metadata` is kept as JSON under the key "hilum"."""
    if metadata is not None:
        table = table.replace_schema_metadata({b"hilum": json.dumps(metadata, sort_keys=True).encode()})
    with write_atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


ROW_GROUP = 8192  # rows


class TableWriter:
    """A Parquet file written as a stream: the same rows give the same bytes, in whatever portions they come."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.Table] = []
        self._num_rows = 0

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(table)
        self._num_rows += table.num_rows
        if self._num_rows >= ROW_GROUP:
            self.flush(ROW_GROUP)

    def flush(self, num_rows: int) -> None:
        """Write row groups of `num_rows` as long as there are that many."""
        rows = pa.concat_tables(self._waiting)
        while num_rows and rows.num_rows >= num_rows:
            self._writer.write_table(rows.slice(0, num_rows).combine_chunks(), num_rows)
            rows = rows.slice(num_rows)
        self._waiting, self._num_rows = [rows], rows.num_rows

    def close(self) -> None:
        if self._waiting:
            self.flush(self._num_rows)


@contextlib.contextmanager
def open_table(path: Path, schema: pa.Schema, metadata: dict[str, Any] | None = None) -> Iterator[TableWriter]:
    """Write a Parquet table larger than memory, atomically; `metadata` as in `write_table`."""
    if metadata is not None:
        schema = schema.with_metadata({b"hilum": json.dumps(metadata, sort_keys=True).encode()})
    with write_atomic(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as parquet:
        writer = TableWriter(parquet)
        yield writer
        writer.close()


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet table. InputError when the file is absent or no Parquet."""
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; expected a Parquet file")
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from None


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A Parquet table piece by piece; an empty one is one empty piece. InputError as in `read_table`."""
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; expected a Parquet file")
    try:
        with pq.ParquetFile(path) as file:
            yield pa.RecordBatch.from_pylist([], schema=file.schema_arrow)
            yield from file.iter_batches(1024)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from None


def merge_tables(paths: Iterable[Path], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Parquet files, each sorted by its column "key", as one sorted sequence of tables.

    A file is read when its first key is due and kept until its rows are: files whose ranges hardly overlap, as parts
    written one after another do, never meet in memory.
    """
    firsts = ((pq.read_table(path, columns=["key"])["key"], path) for path in paths)
    runs = sorted((keys[0].as_py(), path) for keys, path in firsts if len(keys))
    waiting: pa.Table | None = None
    for number, (_, path) in enumerate(runs, 1):
        table = pq.read_table(path, columns=columns)
        waiting = table if waiting is None else pa.concat_tables([waiting, table]).sort_by("key")
        due = waiting.num_rows
        if number < len(runs):
            due = pc.sum(pc.less(waiting["key"], runs[number][0])).as_py() or 0
        yield waiting.slice(0, due)
        waiting = waiting.slice(due)


def table_metadata(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"hilum", b"{}"))
    return found


def hash_file(path: Path) -> str:
    """16 hex digits of a file's content."""
    return sha256_file(path)[:16]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits, as others publish it."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in ("hilum", "torch", "numpy", "scipy", "pydicom", "scikit-learn", "blosc2"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What a measured number must name: processor, cores, memory, system."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    memory = 0.0
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
