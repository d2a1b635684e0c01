"""Long work on the scans of a store, done in parts: whatever kills it, the same command goes on and ends in the same bytes.

    index/part-NNNNNN.arrow           index rows of some scans
    index/part-NNNNNN.ledger.parquet  what became of these scans; its presence says that the part is whole

A scan counts as done when it stands in a part ledger; anything later is done again, with the same result. At the end whoever
does the work joins the parts, marks the store complete and drops them.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.parquet as pq

from hilum.archive.intake import crashed
from hilum.archive.ledger import Entry, write_entries
from hilum.archive.store.index import Row, write_index
from hilum.archive.workers import Crashed, run
from hilum.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, DiskFull, Interrupted
from hilum.records import merge_tables
from hilum.terminal import Progress

# Scans a part: few at first, then a share of what is done, so that a million scans do not make ten thousand parts and a
# crash never costs more than one hundredth of the work behind it.
FEWEST_SCANS, MOST_SCANS, PART_SHARE = 64, 1024, 1 / 128


@dataclass(frozen=True)
class Done:
    """What became of one scan: its entry, and its index row when it is in the store."""

    entry: Entry
    row: Row | None


class _Stop(BaseException):
    """Raised between two items after a signal; BaseException, so that nothing mistakes it."""


@contextlib.contextmanager
def stop_on_signals(store: Path, progress: Progress | None) -> Iterator[Progress]:
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


def fill(
    store: Path,
    work: Callable[[Entry], Done],
    entries: Iterable[Entry],
    total: int,
    what: str,
    progress: Progress,
    num_workers: int | None = None,
    engine: str = "local",
) -> None:
    """Do every scan that no part holds yet.

    work     importable; on a scan that kills its process the entry is refused
    entries  used ones, sorted by key, `total` of them
    what     is being done, for `progress`, which comes from `stop_on_signals`
    """
    part: list[Done] = []
    part_number, num_done = _num_parts(store), _num_done(store)
    if total - num_done <= 1:
        num_workers, engine = 1, "local"
    todo = _without(entries, _keys(parts_of(store)[1]))
    try:
        with closing(run(work, todo, num_workers, engine)) as results:
            for entry, result in results:
                num_done += 1
                part.append(Done(crashed(entry), None) if isinstance(result, Crashed) else result)
                if len(part) >= min(max(FEWEST_SCANS, int(num_done * PART_SHARE)), MOST_SCANS):
                    _write_part(store, part_number, part)
                    part_number, part = part_number + 1, []
                progress(num_done, total, what)
    except (_Stop, DiskFull):
        with contextlib.suppress(DiskFull):
            _write_part(store, part_number, part)
        raise
    _write_part(store, part_number, part)


def parts_of(store: Path) -> tuple[list[Path], list[Path]]:
    """Index and ledger of every whole part."""
    parts = [_part(store, n) for n in range(_num_parts(store))]
    return [index for index, _ in parts], [ledger for _, ledger in parts]


def drop_parts(store: Path) -> None:
    for path in store.glob("index/part-*"):
        path.unlink()


def drop_remains(store: Path, *patterns: str) -> None:
    """Clear away files that killed writers left."""
    for pattern in patterns:
        for path in store.glob(pattern):
            path.unlink()


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


def _part(store: Path, number: int) -> tuple[Path, Path]:
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
