"""More records than fit in memory, grouped and put in order by a hash, through files that nobody else may read.

A record is one line of JSON under a hash of 16 hex digits. A few megabytes of them stay in memory. More go to 256 files
by the first two digits, and a file that is itself too large goes to 256 others by the next two: memory stays at one
file's worth, whatever the number of records (partitioned hashing as databases do it, Graefe 1993).
"""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import stat
import tempfile
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hilum.archive.locks import take
from hilum.records import explain_full_disk

Record = TypeVar("Record")

LIMIT_BYTES = 32 << 20  # held in memory: about 50,000 DICOM headers
_BLOCK_BYTES = 64 << 10  # per file, before it is compressed and written
_DIGITS, _HASH_DIGITS = 2, 16


class Spill:
    """Records under hashes: added in any order, handed out once, in order of hash. A context manager.

    folder       for its files; made when the first is needed, removed at the end
    limit_bytes  of records to keep in memory
    depth        of this one, when it holds what was too large in another
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None, *, depth: int = 0) -> None:
        self._folder = folder
        self._limit_bytes = LIMIT_BYTES if limit_bytes is None else limit_bytes
        self._digits = slice(depth * _DIGITS, (depth + 1) * _DIGITS)
        self._depth = depth
        self._records: list[tuple[str, str]] = []
        self._num_bytes = 0
        self._blocks: dict[str, list[str]] = {}  # not yet written, by digits; a name stays once it has a file
        self._block_bytes: dict[str, int] = {}

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def add(self, name: str, line: str) -> None:
        """Keep one record. `name` is its hash, `line` one line of text."""
        if self._blocks:
            self._append(name, line)
            return
        self._records.append((name, line))
        self._num_bytes += len(line)
        # All records under one hash belong together, however many: then there is nothing left to divide by.
        if self._num_bytes > self._limit_bytes and (self._depth + 1) * _DIGITS <= _HASH_DIGITS:
            with explain_full_disk(self._folder):
                self._folder.mkdir(mode=0o700, parents=True)
            records, self._records = self._records, []
            for record in records:
                self._append(*record)

    def buckets(self) -> Iterator[list[tuple[str, str]]]:
        """Lists of (hash, line) in order; equal hashes stand in one list. Each record is handed out once."""
        if not self._blocks:
            records, self._records = sorted(self._records), []
            if records:
                yield records
            return
        for digits in sorted(self._blocks):
            self._flush(digits)
            with Spill(self._folder / digits, self._limit_bytes, depth=self._depth + 1) as inner:
                path = self._path(digits)
                with gzip.open(path, "rt", encoding="ascii") as lines:
                    for text in lines:
                        name, _, line = text.rstrip("\n").partition("\t")
                        inner.add(name, line)
                path.unlink()
                yield from inner.buckets()

    def _append(self, name: str, line: str) -> None:
        digits = name[self._digits]
        self._blocks.setdefault(digits, []).append(f"{name}\t{line}\n")
        self._block_bytes[digits] = self._block_bytes.get(digits, 0) + len(line)
        if self._block_bytes[digits] >= _BLOCK_BYTES:
            self._flush(digits)

    def _flush(self, digits: str) -> None:
        block = "".join(self._blocks[digits]).encode("ascii")
        self._blocks[digits], self._block_bytes[digits] = [], 0
        with explain_full_disk(self._folder), open(self._path(digits), "ab") as handle:
            handle.write(gzip.compress(block, 1))

    def _path(self, digits: str) -> Path:
        return self._folder / f"{digits}.gz"


def encode(record: Any) -> str:
    """A dataclass of plain values, tuples and paths as one line of ASCII."""
    values = [getattr(record, field.name) for field in dataclasses.fields(record)]
    return json.dumps(values, separators=(",", ":"), default=os.fspath)


def decode(cls: type[Record], line: str) -> Record:
    """What `encode` made a line of, field by field of the same class."""
    return cls(
        **{name: convert(value) for (name, convert), value in zip(_fields(typing.cast(Any, cls)), json.loads(line))}
    )


@cache
def _fields(cls: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    kinds = typing.get_type_hints(cls)
    special: dict[Any, Callable[[Any], Any]] = {Path: Path, tuple[Path, ...]: lambda paths: tuple(map(Path, paths))}
    return [(field.name, special.get(kinds[field.name], _tuples)) for field in dataclasses.fields(cls)]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of $TMPDIR that only this user may enter, removed at the end; also removes those of runs that were killed.

    A living run holds a lock in its folder, which ends with the process, however that ends.
    """
    parent, owner = Path(tempfile.gettempdir()), os.getuid()
    for left in parent.glob(f"hilum-{owner}-*"):
        _remove_if_abandoned(left, owner)
    made = Path(tempfile.mkdtemp(prefix="hilum-new-"))  # no name that others clear away, until it is locked
    folder = made.with_name(made.name.replace("new", str(owner), 1))
    lock = take(made / "lock")
    try:
        made.rename(folder)
        yield folder
    finally:
        _clear_away(folder)
        if lock is not None:
            os.close(lock)


def _remove_if_abandoned(folder: Path, owner: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # another run clears it away, too
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != owner:
            return
        lock = take(folder / "lock")
        if lock is not None:
            _clear_away(folder)
            os.close(lock)


def _clear_away(folder: Path) -> None:
    """Remove a folder whose lock this process holds.

    What it holds goes first and its name next: once the lock is gone, another run would take the folder for abandoned.
    """
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name != "lock":
            item.unlink()
    aside = tempfile.mkdtemp(prefix="hilum-new-")
    folder.rename(aside)
    shutil.rmtree(aside)
