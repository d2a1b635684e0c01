"""What of a feature table is already there, what is still to do, and how the pieces become one file.

    F.parquet          the table, sorted by series; the same bytes whatever was interrupted on the way
    F.inputs.parquet   beside it: stamp and content of each series, so that unchanged files need not be read again
    F.parquet.parts/   while it is being made: one file for each finished shard, and a lock
    F.patches/         patch tokens, when asked for

A shard is one scan, or several small ones that share batches. It is written whole; a killed run loses at most one shard on
each device. A table that was made with other settings counts for nothing.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hilum.archive.privacy import Key
from hilum.encode.table.sources import Series, content_of
from hilum.errors import InputError
from hilum.records import hash_json, open_table, write_atomic, write_table

SHARD_SLICES = 64

_INPUTS = pa.schema([("series", pa.string()), ("stamp", pa.string()), ("content", pa.string())])


@dataclass(frozen=True)
class Places:
    """Where everything about one table lies."""

    table: Path

    @property
    def inputs(self) -> Path:
        return self.table.with_name(f"{self.table.stem}.inputs.parquet")

    @property
    def parts(self) -> Path:
        return self.table.with_name(f"{self.table.name}.parts")

    @property
    def patches(self) -> Path:
        return self.table.with_name(f"{self.table.stem}.patches")


@dataclass(frozen=True)
class Shard:
    """Series that are encoded together; `path` appears when all are."""

    series: tuple[Series, ...]
    path: Path


@dataclass(frozen=True)
class Done:
    """Where the rows of a finished series lie, and what it was made from. stamp "": unknown."""

    path: Path
    content: str
    stamp: str


@dataclass
class Past:
    """What earlier runs with the same settings left.

    done      finished series, by key
    stamp     of the whole input that the finished table was made from; "" when there is none
    metadata  of the finished table
    """

    done: dict[str, Done] = field(default_factory=dict)
    stamp: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def read_past(places: Places, settings: str) -> Past:
    """What is there for these settings (their hash). A file that is not ours is no past, but an InputError."""
    past = Past()
    known, past.stamp = _read_inputs(places)
    if places.table.exists():
        found = _metadata(places.table)
        if found.get("format") != "hilum-features":
            raise InputError(f"{places.table} exists and is no feature table; choose another name or remove it")
        if found.get("settings") == settings:
            past.metadata = found
            for series, content in _contents(places.table):
                stamp = known.get((series, content), "")
                past.done[series] = Done(places.table, content, stamp)
    if not past.metadata:
        past.stamp = ""
    for path in sorted(places.parts.glob("*.parquet")):
        found = _metadata(path)
        if found.get("settings") == settings:
            for series, (content, stamp) in found["series"].items():
                past.done[series] = Done(path, content, stamp)
    return past


def _metadata(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(b"hilum", b"{}"))
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a feature table: {error}. Remove it and run the command again"
        ) from None
    return found


def _contents(table: Path) -> Iterator[tuple[str, str]]:
    """Series and content of a table, each once."""
    before = None
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(65536, columns=["series", "content"]):
            rows = pa.table(batch.columns, names=["series", "content"]).group_by(
                ["series", "content"], use_threads=False
            )
            for row in rows.aggregate([]).to_pylist():
                if row["series"] != before:
                    yield row["series"], row["content"]
                before = row["series"]


def _read_inputs(places: Places) -> tuple[dict[tuple[str, str], str], str]:
    """(series, content) → stamp, and the stamp of the whole input. The file only saves time: a broken one is no error."""
    with contextlib.suppress(pa.ArrowInvalid, OSError, ValueError, KeyError):
        table = pq.read_table(places.inputs)
        facts = json.loads(table.schema.metadata[b"hilum"])
        rows = zip(*(table[name].to_pylist() for name in ("series", "content", "stamp")))
        whole = facts["stamp"] if facts["table"] == _size(places.table) else ""
        return {(series, content): stamp for series, content, stamp in rows}, whole
    return {}, ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def write_inputs(places: Places, series: Sequence[Series], contents: dict[str, str], stamp: str) -> None:
    rows = [{"series": s.key, "stamp": s.stamp, "content": contents[s.key]} for s in series]
    facts = {"format": "hilum-inputs", "version": 1, "stamp": stamp, "table": _size(places.table)}
    write_table(places.inputs, pa.Table.from_pylist(rows, schema=_INPUTS), facts)


def unfinished(series: Iterable[Series], past: Past, key: Key, patches: Path | None) -> list[Series]:
    """The series that must be encoded: new ones, changed ones, and those whose patch tokens are gone."""
    todo = []
    for one in series:
        done = past.done.get(one.key)
        if done is not None and done.stamp != one.stamp and done.content != content_of(one, key):
            done = None
        if done is not None and patches is not None and not one.reason and not (patches / f"{one.key}.b2nd").exists():
            done = None if _has_vectors(done, one.key) else done
        if done is None:
            past.done.pop(one.key, None)
            todo.append(one)
    return todo


def _has_vectors(done: Done, series: str) -> bool:
    rows = _part(done.path).filter(pc.field("series") == series)
    return bool(rows.num_rows) and rows["reason"][0].as_py() is None


def plan_shards(
    series: Sequence[Series], todo: Sequence[Series], places: Places, settings: str, max_slices: int | None
) -> list[Shard]:
    """Shards of what is to do. Their borders follow from all series that the finished table lacks, so that a run that was
    interrupted fills the same batches as one that was not."""
    wanted = {one.key for one in todo}
    shards: list[Shard] = []
    waiting: list[Series] = []
    size = 0

    def close() -> None:
        left = tuple(one for one in waiting if one.key in wanted)
        if left:
            name = hash_json([settings, [(one.key, one.stamp) for one in left]])
            shards.append(Shard(left, places.parts / f"{name}.parquet"))
        waiting.clear()

    for one in series:
        waiting.append(one)
        size += min(one.num_slices, max_slices or one.num_slices)
        if size >= SHARD_SLICES:
            close()
            size = 0
    close()
    return shards


def write_shard(shard: Shard, table: pa.Table, contents: dict[str, str], settings: str) -> None:
    """The rows of a shard, whole or not at all."""
    facts = {"settings": settings, "series": {s.key: (contents[s.key], s.stamp) for s in shard.series}}
    table = table.replace_schema_metadata({b"hilum": json.dumps(facts, sort_keys=True).encode()})
    with write_atomic(shard.path) as temporary:
        pq.write_table(table, temporary)


def merge(places: Places, series: Sequence[Series], past: Past, schema: pa.Schema, metadata: dict[str, Any]) -> None:
    """All rows, sorted by series, in one table that takes the place of an older one."""
    older = _by_series(places.table) if places.table.exists() else iter(())
    with open_table(places.table, schema, metadata) as writer:
        for one in series:
            done = past.done[one.key]
            if done.path == places.table:
                rows = next(table for key, table in older if key == one.key)
            else:
                part = _part(done.path)
                rows = part.filter(pc.equal(part["series"], one.key))
            writer.add(_fitted(rows, schema))


def _fitted(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of failed scans know no width of vectors."""
    if rows.schema.field("vector").type != schema.field("vector").type:
        place = rows.schema.get_field_index("vector")
        rows = rows.set_column(place, schema.field("vector"), pa.nulls(rows.num_rows, schema.field("vector").type))
    return rows.cast(schema.remove_metadata())


def _by_series(path: Path) -> Iterator[tuple[str, pa.Table]]:
    """The rows of a table sorted by series, one series after the other."""
    waiting: list[pa.Table] = []
    before = ""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(8192):
            table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
            start = 0
            for key, same in groupby(table["series"].to_pylist()):
                count = sum(1 for _ in same)
                if waiting and key != before:
                    yield before, pa.concat_tables(waiting)
                    waiting = []
                waiting.append(table.slice(start, count))
                before, start = key, start + count
    if waiting:
        yield before, pa.concat_tables(waiting)


@lru_cache(maxsize=8)
def _part(path: Path) -> pa.Table:
    return pq.read_table(path).replace_schema_metadata(None)


def clear_away(places: Places, patches: set[str]) -> None:
    """Remove the parts, and patch tokens that no row names."""
    _part.cache_clear()
    for path in places.patches.glob("*.b2nd"):
        if path.name not in patches:
            path.unlink()
    with contextlib.suppress(OSError):
        places.patches.rmdir()
    clear_parts(places)


def clear_parts(places: Places) -> None:
    """Remove finished shards; the lock beside them stays."""
    for path in places.parts.glob("*"):
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
