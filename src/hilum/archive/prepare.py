"""Archive → store, resumable: whatever kills it, the same command goes on and ends in the same bytes.

    store.json            written first with status "writing", last with status "complete"
    volumes/xx/<key>.b2nd each written atomically
    index/part-NNNNNN.*   every PART_SCANS scans: index rows (.arrow) and what became of the scans (.ledger.parquet)
    index/index.arrow   all rows, sorted; the parts are then removed
    ledger.parquet        all entries, sorted

A scan counts as done when it stands in a part ledger; anything later is done again, with the same result.
"""

import contextlib
import hashlib
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from hilum.archive.ledger import Entry, count, read_ledger, write_entries
from hilum.archive.privacy import Key, read_key
from hilum.archive.scan import Listing, crashed, examine, read_entry, refuse, walk, with_volume
from hilum.archive.store import (
    Row,
    check_header,
    index_path,
    merge_indexes,
    open_for_writing,
    write_header,
    write_index,
    write_volume,
)
from hilum.archive.workers import Crashed, default_num_workers, run
from hilum.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DiskFull,
    InputError,
    Interrupted,
    ScanRefused,
    StoreError,
    UsageError,
)
from hilum.terminal import Progress

PART_SCANS = 64


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
    num_workers: int | None = None,
    min_slices: int = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every usable scan of an archive into a store.

    store        a new folder, or one that an interrupted run of the same command left
    key          hashes identifiers; None: the user's own (`hilum.archive.privacy.read_key`)
    num_workers  processes; None: one per core. The result does not depend on it
    min_slices   scans with fewer slices are left out, ≥ 1; images without geometry (PNG, JPEG) always count as one
    returns      the counts of `hilum.archive.ledger.count`, and "num_volumes"

    Raises Interrupted after Ctrl-C or SIGTERM, once everything finished so far is on disk.
    """
    archive, store, key = Path(archive), Path(store), key or read_key()
    if min_slices < 1:
        raise UsageError(f"min_slices must be at least 1; found {min_slices}")
    if store.resolve().is_relative_to(archive.resolve()):
        raise InputError(f"the store {store} lies inside the archive {archive}; choose a folder outside it")
    listing = walk(archive)
    header = {
        "key": key.fingerprint,
        "min_slices": min_slices,
        "archive": fingerprint(listing, key),
        "num_files": len(listing.files),
    }
    if not _is_complete(store, header):
        for leftover in store.glob(".store.json.*.tmp"):  # of a run killed in its first moment
            leftover.unlink()
        open_for_writing(store, header)
        for leftover in (*store.glob(".*.tmp"), *store.glob("index/.*.tmp"), *store.glob("volumes/*/.*.tmp")):
            leftover.unlink()
        with _stop_on_signals():
            try:
                _fill(listing, store, header, key, num_workers or default_num_workers(), progress)
            except _Stop as stop:
                raise Interrupted(
                    f"stopped; {len(_read_part_ledgers(store))} scans are done in {store}. "
                    "Run the same command again to go on from here",
                    EXIT_TERMINATED if stop.signum == signal.SIGTERM else EXIT_INTERRUPTED,
                ) from None
    _drop_parts(store)  # of a run killed in its last moment
    entries = read_ledger(store / "ledger.parquet")
    return {**count(entries), "num_volumes": sum(e.used for e in entries)}


def fingerprint(listing: Listing, key: Key) -> str:
    """A keyed hash of all relative paths and file sizes: tells whether an archive has changed."""
    digest = hashlib.sha256()
    for name, size in listing.files:
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return key.hash("item", digest.hexdigest())


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
    """Raised where the main thread is when a signal asks to stop; BaseException, so that nothing mistakes it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise _Stop; in the main thread only, where Python allows handlers."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Stop(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _fill(
    listing: Listing, store: Path, header: dict[str, Any], key: Key, num_workers: int, progress: Progress | None
) -> None:
    """Everything between an opened store and a complete one."""
    min_slices = header["min_slices"]
    entries = {e.key: _set_aside_short(e, min_slices) for e in examine(listing, key, False, progress=progress)}
    done = _read_part_ledgers(store)
    todo = [e for e in entries.values() if e.used and e.key not in done]
    part: list[Done] = []
    part_number = _num_parts(store)
    work = partial(_store_scan, store=store, min_slices=min_slices)
    try:
        with closing(run(work, todo, min(num_workers, len(todo)))) as results:
            for finished, (entry, result) in enumerate(results, len(done) + 1):
                part.append(Done(crashed(entry), None) if isinstance(result, Crashed) else result)
                if len(part) == PART_SCANS:
                    _write_part(store, part_number, part)
                    part_number, part = part_number + 1, []
                if progress:
                    progress(finished, len(done) + len(todo), "storing scans")
    except (_Stop, DiskFull):
        with contextlib.suppress(DiskFull):
            _write_part(store, part_number, part)
        raise
    _write_part(store, part_number, part)
    _finish(store, header, entries)


def _set_aside_short(entry: Entry, min_slices: int) -> Entry:
    if entry.used and entry.reader == "dicom" and entry.num_slices < min_slices:
        return refuse(entry, "too_few_slices", f"{entry.num_slices} of {min_slices}")
    return entry


def _store_scan(entry: Entry, store: Path, min_slices: int) -> Done:
    """Read one scan and write it into the store. Runs in a worker."""
    try:
        vol, notes = read_entry(entry)
    except ScanRefused as refused:
        return Done(refuse(entry, refused.reason, refused.detail), None)
    if entry.reader == "nifti" and vol.shape[0] < min_slices:
        return Done(refuse(entry, "too_few_slices", f"{vol.shape[0]} of {min_slices}"), None)
    row = write_volume(store, entry.key, vol, patient=entry.patient, study=entry.study)
    return Done(with_volume(entry, vol, notes), row)


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


def _read_part_ledgers(store: Path) -> dict[str, Entry]:
    return {e.key: e for n in range(_num_parts(store)) for e in read_ledger(_part(store, n)[1])}


def _finish(store: Path, header: dict[str, Any], entries: dict[str, Entry]) -> None:
    """Join the parts, then say "complete", then drop them: a kill between any two steps loses nothing."""
    merge_indexes(index_path(store), [_part(store, n)[0] for n in range(_num_parts(store))])
    write_entries(store / "ledger.parquet", (entries | _read_part_ledgers(store)).values())
    write_header(store, {**header, "status": "complete"})
    _drop_parts(store)


def _drop_parts(store: Path) -> None:
    for path in store.glob("index/part-*"):
        path.unlink()
