"""Archive → store, resumable: whatever kills it, the same command goes on and ends in the same bytes.

    store.json            written first with status "writing", last with status "complete"
    .work/                while it is being written: a lock, and the plan (what is to be stored, with paths)
    volumes/xx/<key>.b2nd each written atomically
    index/part-NNNNNN.*   index rows and what became of the scans (`archive.parts`)
    index/index.arrow     all rows, sorted; the parts are then removed
    ledger.parquet        all entries, sorted

Nothing here holds the archive in memory: headers, plan, parts and ledger are read and written as streams.
"""

import heapq
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hilum.archive.copies import find_copies
from hilum.archive.intake import refuse, take_in
from hilum.archive.judge.screening import note_background
from hilum.archive.ledger import Entry, count, entries_of, read_entries, write_sorted
from hilum.archive.locks import hold
from hilum.archive.parts import Done, drop_parts, drop_remains, fill, parts_of, stop_on_signals
from hilum.archive.plan import Plan, drop_plan, make_plan, read_plan
from hilum.archive.policy import AS_IS, Policy
from hilum.archive.privacy import Key, read_key
from hilum.archive.scan import MANY_FILES, Listing, examine, walk
from hilum.archive.store.index import drop_rows, index_path, merge_indexes, read_index
from hilum.archive.store.store import check_header, open_for_writing, volume_path, write_header, write_volume
from hilum.archive.workers import default_num_workers, start_server
from hilum.errors import InputError, StoreError
from hilum.records import merge_tables
from hilum.settings import to_dict
from hilum.terminal import Progress

WORK = ".work"  # in the store, until it is complete


def prepare(
    archive: str | Path,
    store: str | Path,
    *,
    key: Key | None = None,
    policy: Policy = AS_IS,
    num_workers: int | None = None,
    engine: str = "local",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every usable scan of an archive into a store.

    store        a new folder, or one that an interrupted run of the same command left
    key          hashes identifiers; None: the user's own (`hilum.archive.privacy.read_key`)
    policy       what is left out and what may be done to a scan; images without geometry (PNG, JPEG) always count as one
    num_workers  processes; None: one per core. The result does not depend on it
    engine       "local", or "ray": the same work on a cluster whose nodes all see archive and store
    returns      the counts of `hilum.archive.ledger.count`, and "num_volumes"

    Raises Interrupted after Ctrl-C or SIGTERM, once everything finished so far is on disk; StoreError when another run
    is writing the same store.
    """
    archive, store, key = Path(archive), Path(store), key or read_key()
    if store.resolve().is_relative_to(archive.resolve()):
        raise InputError(f"the store {store} lies inside the archive {archive}; choose a folder outside it")
    listing = walk(archive, progress)
    header = {
        "key": key.fingerprint,
        "policy": to_dict(policy),
        "archive": key.hash("item", listing.digest),
        "num_files": listing.num_files,
    }
    if store.exists() and not store.is_dir():
        raise StoreError(f"{store} is a file; choose a new folder")
    work = store / WORK
    if engine == "local" and (num_workers or default_num_workers()) > 1 and listing.num_files > MANY_FILES:
        start_server()  # it imports while this process reads headers
    if not _is_complete(store, header) or work.exists():
        with hold(work / "lock", f"the store {store}"):
            if not _is_complete(store, header):
                _open(store, header)
                with stop_on_signals(store, progress) as go_on:
                    plan = read_plan(work, archive) or _make_plan(
                        store, listing, key, policy, num_workers, engine, go_on
                    )
                    used = (entry for entry in plan.entries() if entry.used)
                    work_on = partial(_store_scan, store=store, policy=policy)
                    fill(store, work_on, used, plan.num_used, "storing scans", go_on, num_workers, engine)
                    _finish(plan, store, header, policy)
            drop_parts(store)
            drop_plan(work)
    counts = count(read_entries(store / "ledger.parquet"))
    return {**counts, "num_volumes": counts["num_used"]}


def _is_complete(store: Path, header: dict[str, Any]) -> bool:
    """Whether there is nothing left to do. StoreError when the store was made from a now different archive."""
    if not (store / "store.json").exists():
        return False
    found = check_header(store)
    if found.get("archive") != header["archive"] and found.get("key") == header["key"]:
        raise StoreError(
            f"the archive has changed since {store} was begun ({found.get('num_files')} files then, "
            f"{header['num_files']} now). Prepare it into a new folder, or undo the change"
        )
    different = [k for k in header if found.get(k) != header[k]]
    return found.get("status") == "complete" and not different


def _open(store: Path, header: dict[str, Any]) -> None:
    """Begin or continue a store that is locked, and clear away what killed writers left."""
    drop_remains(store, ".store.json.*.tmp")  # of a run killed in its first moment
    open_for_writing(store, header)
    drop_remains(store, ".*.tmp", "index/.*.tmp", "volumes/*/.*.tmp", f"{WORK}/.*.tmp")


def _make_plan(
    store: Path,
    listing: Listing,
    key: Key,
    policy: Policy,
    num_workers: int | None,
    engine: str,
    progress: Progress,
) -> Plan:
    """Look at all headers once. StoreError when files came or went meanwhile."""

    def entries(folder: Path) -> Iterator[Entry]:
        found = examine(
            listing, key, False, folder=folder, policy=policy, num_workers=num_workers, engine=engine, progress=progress
        )
        return (_set_aside_short(entry, policy.min_slices) for entry in found)

    plan = make_plan(store / WORK, listing.root, entries)
    if plan.num_files != listing.num_files:
        raise StoreError(
            f"the archive has changed while it was read ({listing.num_files} files at first, {plan.num_files} then). "
            "Prepare it into a new folder once nothing writes to it"
        )
    return plan


def _set_aside_short(entry: Entry, min_slices: int) -> Entry:
    if entry.used and entry.reader == "dicom" and entry.num_slices < min_slices:
        return refuse(entry, "too_few_slices", f"{entry.num_slices} of {min_slices}")
    return entry


def _store_scan(entry: Entry, store: Path, policy: Policy) -> Done:
    """Read one scan and write it into the store. Runs in a worker."""
    taken = take_in(entry, policy)
    entry = taken.entry
    if taken.volume is None:
        return Done(entry, None)
    if entry.reader in ("nifti", "itk") and taken.volume.shape[0] < policy.min_slices:
        return Done(refuse(entry, "too_few_slices", f"{taken.volume.shape[0]} of {policy.min_slices}"), None)
    row = write_volume(
        store,
        entry.key,
        taken.volume,
        patient=entry.patient,
        study=entry.study,
        plane=entry.plane,
        region=entry.region,
        look_hash=taken.look_hash,
    )
    return Done(replace(entry, flags=(*entry.flags, *note_background(row.shares))), row)


def _finish(plan: Plan, store: Path, header: dict[str, Any], policy: Policy) -> None:
    """Join the parts, then say "complete"; the parts go last: a kill between any two steps loses nothing."""
    indexes, ledgers = parts_of(store)
    merge_indexes(index_path(store), indexes)
    copies = find_copies(read_index(index_path(store)), policy)
    if copies.drop:
        drop_rows(index_path(store), copies.drop)
        for key in copies.drop:
            volume_path(store, key).unlink(missing_ok=True)
    done = (copies.note(e) for table in merge_tables(ledgers) for e in entries_of(table))
    aside = (entry for entry in plan.entries() if not entry.used)
    write_sorted(store / "ledger.parquet", heapq.merge(aside, done, key=lambda e: e.key))
    write_header(store, {**header, "status": "complete"})
