"""Stores joined, extended and tidied. Each is safe to kill: the same command goes on and ends in the same bytes."""

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hilum.archive.ledger import LEDGER_SCHEMA
from hilum.archive.locks import hold
from hilum.archive.policy import Policy
from hilum.archive.prepare import prepare
from hilum.archive.privacy import Key, read_key
from hilum.archive.store.index import Row, index_path, merge_indexes
from hilum.archive.store.store import Store, check_header, open_for_writing, orphans, volume_path, write_header
from hilum.errors import StoreError, UsageError
from hilum.records import explain_full_disk, read_table, table_metadata, write_atomic, write_table
from hilum.settings import from_dict
from hilum.terminal import Progress

_SAME = ("pixel_hash", "patient", "modality", "unit", "shape", "affine", "slope", "intercept")


def merge(stores: Sequence[str | Path], out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Join stores that were made with one key into a new one, which shares their volume files (hard links).

    stores   finished stores, at least one
    out      a new folder, or one that an interrupted run of the same command left; on another disk files are copied
    returns  num_volumes, num_new (not in the first store), num_same (in several)

    A volume in several stores is kept once when pixels, geometry and patient are equal; else StoreError, before
    anything is written. Ledger rows with one key: a used one wins over a refused one, else the later store's.
    """
    if not stores:
        raise UsageError("name at least one store to merge")
    opened, out = [Store(s) for s in stores], Path(out)
    if any(out.resolve() == s.root.resolve() for s in opened):
        raise UsageError(f"{out} is one of the stores to merge; choose a new folder, or use hilum store append")
    derived = _same_making(opened)
    num_same = _check_mergeable(opened)
    header = {"key": opened[0].header.get("key"), "merged": [s.hash for s in opened], **derived}
    open_for_writing(out, header)
    if check_header(out).get("status") != "complete":
        _join(opened, out, progress)
        write_header(out, {**header, "status": "complete"})
    num_volumes = len(Store(out))
    return {"num_volumes": num_volumes, "num_new": num_volumes - len(opened[0]), "num_same": num_same}


def _same_making(stores: Sequence[Store]) -> dict[str, Any]:
    """What the header of the joined store says of how derived stores were made. StoreError when not all were made alike."""
    made = [dict(store.header.get("derived") or {}) for store in stores]
    sources = [record.pop("source_hash", None) for record in made]
    if any(record != made[0] for record in made):
        raise StoreError(
            "some of the stores are plain and others derived (hilum resample), or with other settings. Merge the plain ones "
            "and resample the result"
        )
    return {"derived": {**made[0], "source_hash": sources[0] if len(set(sources)) == 1 else sources}} if made[0] else {}


def append(
    store: str | Path,
    archive: str | Path,
    *,
    key: Key | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prepare another archive with the settings of a store and add its volumes to that store.

    archive  may overlap with what the store holds: equal volumes are kept once
    key      must be the one that the store was made with; None: the user's own
    returns  as `merge`, and "prepared": what `prepare` returned for the archive

    The archive is prepared into a hidden folder of the store, which disappears at the end. Index and ledger are then
    replaced one after the other: a reader sees the store before or after, never a volume that is not there. Copies are
    looked for within the new archive, not between it and the store.
    """
    opened, key = Store(store), key or read_key()
    if "derived" in opened.header:
        raise StoreError(
            f"{opened.root} was made from another store; append to that one and make it again (hilum resample)"
        )
    if opened.header.get("key") != key.fingerprint:
        raise StoreError(
            f"{opened.root} was made with key {opened.header.get('key')}, yours is {key.fingerprint}: the same patient "
            "would get two names. Point HILUM_KEY to the right key file"
        )
    with hold(opened.root / ".work" / "lock", f"the store {opened.root}"):
        _drop_remains(opened.root)
        new = opened.root / f".append-{key.hash('item', str(Path(archive).resolve()))[:8]}"
        prepared = prepare(
            archive,
            new,
            key=key,
            policy=from_dict(Policy, opened.header["policy"]),
            num_workers=num_workers,
            progress=progress,
        )
        added = Store(new)
        num_same = _check_mergeable([opened, added])
        before = len(opened)
        _join([opened, added], opened.root, progress)
        new.rename(new.with_name(new.name.replace("append", "remains", 1)))  # whole, or to be thrown away
        _drop_remains(opened.root)
    num_volumes = len(Store(opened.root))
    return {
        "num_volumes": num_volumes, "num_new": num_volumes - before, "num_same": num_same, "prepared": prepared
    }  # fmt: skip


def _drop_remains(root: Path) -> None:
    for folder in root.glob(".remains-*"):
        shutil.rmtree(folder)


def compact(store: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Remove what no row of the index names: volumes, temporary files, remains of interrupted commands.

    returns  num_removed (files), bytes freed (0 for a file that another store shares)

    Not to be run while another command writes to the store.
    """
    opened = Store(store)
    root = opened.root
    _drop_remains(root)
    remains = [p for folder in root.glob(".append-*") for p in folder.rglob("*") if not p.is_dir()]
    temporary = [*root.glob(".*.tmp"), *root.glob("index/.*.tmp"), *root.glob("index/part-*")]
    removed = freed = 0
    for path in (*orphans(opened), *remains, *temporary):
        facts = path.lstat()
        path.unlink()
        removed, freed = removed + 1, freed + (facts.st_size if facts.st_nlink == 1 else 0)
        if progress:
            progress(removed, None, "removing files")
    for folder in root.glob(".append-*"):
        shutil.rmtree(folder)
    for folder in root.glob("volumes/*"):
        with contextlib.suppress(OSError):  # not empty: in use
            folder.rmdir()
    return {"num_removed": removed, "bytes_freed": freed}


def _check_mergeable(stores: Sequence[Store]) -> int:
    """The number of volumes that several stores hold. StoreError when their keys or contents do not fit together."""
    keys = {s.header.get("key") for s in stores}
    if len(keys) > 1:
        raise StoreError(
            f"the stores were made with different keys ({', '.join(sorted(map(str, keys)))}): the same patient has "
            "different names in them. Prepare them again with one key"
        )
    same, different = set(), set()
    for n, store in enumerate(stores):
        for other in stores[n + 1 :]:
            wanted = pc.is_in(other.rows.table["key"], store.rows.table["key"].combine_chunks())
            for number in pc.indices_nonzero(wanted).to_pylist():
                row = other.rows[number]
                same.add(row.key)
                if _facts(row) != _facts(store.row(row.key)):
                    different.add(row.key)
    if different:
        raise StoreError(
            f"{len(different)} volumes have one key but other pixels, geometry or patient in another store, the first "
            f"{min(different)}. Loose files are named by their path in the archive: give one archive another folder name"
        )
    return len(same)


def _facts(row: Row) -> list[Any]:
    return [getattr(row, name) for name in _SAME]


def _join(stores: Sequence[Store], out: Path, progress: Progress | None) -> None:
    """Volumes first, then the index, then the ledger: whatever is named exists. Each step may be done again."""
    total, done = sum(map(len, stores)), 0
    for store in stores:
        for key in store.sorted_keys():
            if store.root != out:
                _link(volume_path(store.root, key), volume_path(out, key))
            done += 1
            if progress:
                progress(done, total, "joining volumes")
    merge_indexes(index_path(out), [index_path(s.root) for s in stores])
    _merge_ledgers([s.root / "ledger.parquet" for s in stores], out / "ledger.parquet")


def _link(source: Path, target: Path) -> None:
    """One more name for a file, or a copy where names cannot cross disks. A target that exists is whole already."""
    if target.exists():
        return
    with explain_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            with write_atomic(target) as temporary:
                shutil.copyfile(source, temporary)


def _merge_ledgers(sources: Sequence[Path], target: Path) -> None:
    """Rows of all ledgers, sorted by key, one per key: the used one, else that of the later ledger."""
    tables = [read_table(p) for p in sources]
    table = pa.concat_tables([t.select(LEDGER_SCHEMA.names).cast(LEDGER_SCHEMA) for t in tables])
    rank = pa.array([n for n, t in enumerate(tables) for _ in range(t.num_rows)], pa.int32())
    # Among used rows the first: its volume is the one that stays.
    used = pc.not_equal(table["verdict"], "refused")
    rank = pc.if_else(used, pc.subtract(rank, len(tables)), pc.subtract(len(tables), rank))
    order = pc.sort_indices(
        pa.table({"key": table["key"], "rank": rank}), [("key", "ascending"), ("rank", "ascending")]
    )
    keys = table["key"].take(order).to_pylist()
    first = pa.array([key != before for key, before in zip(keys, [None, *keys])], pa.bool_())
    write_table(target, table.take(order.filter(first)), table_metadata(tables[0]))
