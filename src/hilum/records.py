"""Records on disk: JSON and Parquet written atomically, hashes, and the facts of the machine.

A reader sees either the old file or the new one, whole, whatever kills the writer. Only this module writes JSON.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hilum.errors import DiskFull, InputError

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


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet table. InputError when the file is absent or no Parquet."""
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; expected a Parquet file")
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from None


def table_metadata(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"hilum", b"{}"))
    return found


def hash_json(record: Any) -> str:
    """16 hex digits that name a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """16 hex digits of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


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
