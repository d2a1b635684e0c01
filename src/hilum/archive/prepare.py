"""Archive → store, resumable: whatever kills it, the same command goes on and ends in the same bytes.

    store.json            written first with status "writing", last with status "complete"
    .work/                while it is being written: a lock, and the plan (what is to be stored, with paths)
    volumes/xx/<key>.b2nd each written atomically
    index/part-NNNNNN.*   index rows (.arrow) and what became of the scans (.ledger.parquet)
    index/index.arrow     all rows, sorted; the parts are then removed
    ledger.parquet        all entries, sorted

A scan counts as done when it stands in a part ledger; anything later is done again, with the same result. Nothing here
holds the archive in memory: headers, plan, parts and ledger are read and written as streams.
"""

import contextlib
import heapq
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.parquet as pq

from hilum.archive.copies import find_copies
from hilum.archive.intake import crashed, refuse, take_in
from hilum.archive.judge.screening import note_background
from hilum.archive.ledger import Entry, count, entries_of, read_entries, write_entries, write_sorted
from hilum.archive.locks import hold
from hilum.archive.plan import Plan, drop_plan, make_plan, read_plan
from hilum.archive.policy import AS_IS, Policy
from hilum.archive.privacy import Key, read_key
from hilum.archive.scan import MANY_FILES, Listing, examine, walk
from hilum.archive.store.index import Row, drop_rows, index_path, merge_indexes, read_index, write_index
from hilum.archive.store.store import check_header, open_for_writing, volume_path, write_header, write_volume
from hilum.archive.workers import Crashed, default_num_workers, run, start_server
from hilum.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DiskFull,
    InputError,
    Interrupted,
    StoreError,
)
from hilum.records import merge_tables
from hilum.settings import to_dict
from hilum.terminal import Progress

WORK = ".work"  # in the store, until it is complete

# Scans a part: few at first, then a share of what is done, so that a million scans do not make ten thousand parts and a
# crash never costs more than one hundredth of the work behind it.
FEWEST_SCANS, MOST_SCANS, PART_SHARE = 64, 1024, 1 / 128


@dataclass(frozen=True)
class Done:
    """What became of one scan: its entry, and its index row when it is in the store."""

    entry: Entry
    row: Row | None


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
                with _stop_on_signals(store, progress) as go_on:
                    plan = read_plan(work, archive) or _make_plan(
                        store, listing, key, policy, num_workers, engine, go_on
                    )
                    _fill(plan, store, policy, num_workers, engine, go_on)
                    _finish(plan, store, header, policy)
            _drop_parts(store)
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


class _Stop(BaseException):
    """Raised between two items after a signal; BaseException, so that nothing mistakes it."""


@contextlib.contextmanager
def _stop_on_signals(store: Path, progress: Progress | None) -> Iterator[Progress]:
    """Ctrl-C and SIGTERM become Interrupted at the next item; a second one is met as if there were no run.

    yields  `progress`, which also stops the run when it was asked to. The handler itself only remembers: an exception
            that it raised could land in a destructor, which swallows it, or between two locks of the process pool

    Only in the main thread, where Python allows handlers.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def remember(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        signal.signal(signum, before[signum])

    def go_on(done: int, total: int | None, what: str) -> None:
        if progress:
            progress(done, total, what)
        if asked:
            raise _Stop

    if threading.current_thread() is threading.main_thread():
        before |= {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for signum in before:
            signal.signal(signum, remember)
        yield go_on
        if asked:  # after the last item: whoever runs this was asked to stop as well
            raise _Stop
    except _Stop:
        raise Interrupted(
            f"stopped; {_num_done(store)} scans are done in {store}. Run the same command again to go on from here",
            EXIT_TERMINATED if asked[0] == signal.SIGTERM else EXIT_INTERRUPTED,
        ) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _open(store: Path, header: dict[str, Any]) -> None:
    """Begin or continue a store that is locked, and clear away what killed writers left."""
    for leftover in store.glob(".store.json.*.tmp"):  # of a run killed in its first moment
        leftover.unlink()
    open_for_writing(store, header)
    for pattern in (".*.tmp", "index/.*.tmp", "volumes/*/.*.tmp", f"{WORK}/.*.tmp"):
        for leftover in store.glob(pattern):
            leftover.unlink()


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


def _fill(plan: Plan, store: Path, policy: Policy, num_workers: int | None, engine: str, progress: Progress) -> None:
    """Read and store every scan of the plan that no part holds yet."""
    part: list[Done] = []
    part_number, num_done = _num_parts(store), _num_done(store)
    if plan.num_used - num_done <= 1:
        num_workers, engine = 1, "local"
    todo = _without((e for e in plan.entries() if e.used), _keys([_part(store, n)[1] for n in range(part_number)]))
    work = partial(_store_scan, store=store, policy=policy)
    try:
        with closing(run(work, todo, num_workers, engine)) as results:
            for entry, result in results:
                num_done += 1
                part.append(Done(crashed(entry), None) if isinstance(result, Crashed) else result)
                if len(part) >= min(max(FEWEST_SCANS, int(num_done * PART_SHARE)), MOST_SCANS):
                    _write_part(store, part_number, part)
                    part_number, part = part_number + 1, []
                progress(num_done, plan.num_used, "storing scans")
    except (_Stop, DiskFull):
        with contextlib.suppress(DiskFull):
            _write_part(store, part_number, part)
        raise
    _write_part(store, part_number, part)


def _without(entries: Iterable[Entry], keys: Iterator[str]) -> Iterator[Entry]:
    """Entries whose key is not among `keys`; both come in order."""
    key = next(keys, "")
    for entry in entries:
        while key and key < entry.key:
            key = next(keys, "")
        if entry.key != key:
            yield entry


def _keys(ledgers: Sequence[Path]) -> Iterator[str]:
    return (key.as_py() for table in merge_tables(ledgers, ["key"]) for key in table["key"])


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


def _part(store: Path, number: int) -> tuple[Path, Path]:
    """The index rows of a part, and its ledger, whose presence says that the part is whole."""
    folder = store / "index"
    return folder / f"part-{number:06d}.arrow", folder / f"part-{number:06d}.ledger.parquet"


def _num_parts(store: Path) -> int:
    return sum(1 for _ in store.glob("index/part-*.ledger.parquet"))


def _write_part(store: Path, number: int, done: Sequence[Done]) -> None:
    if done:
        index, ledger = _part(store, number)
        write_index(index, [d.row for d in done if d.row is not None])
        write_entries(ledger, [d.entry for d in done])


def _num_done(store: Path) -> int:
    return sum(int(pq.read_metadata(_part(store, n)[1]).num_rows) for n in range(_num_parts(store)))


def _finish(plan: Plan, store: Path, header: dict[str, Any], policy: Policy) -> None:
    """Join the parts, then say "complete"; the parts go last: a kill between any two steps loses nothing."""
    parts = [_part(store, n) for n in range(_num_parts(store))]
    merge_indexes(index_path(store), [index for index, _ in parts])
    copies = find_copies(read_index(index_path(store)), policy)
    if copies.drop:
        drop_rows(index_path(store), copies.drop)
        for key in copies.drop:
            volume_path(store, key).unlink(missing_ok=True)
    done = (copies.note(e) for table in merge_tables([ledger for _, ledger in parts]) for e in entries_of(table))
    aside = (entry for entry in plan.entries() if not entry.used)
    write_sorted(store / "ledger.parquet", heapq.merge(aside, done, key=lambda e: e.key))
    write_header(store, {**header, "status": "complete"})


def _drop_parts(store: Path) -> None:
    for path in store.glob("index/part-*"):
        path.unlink()
