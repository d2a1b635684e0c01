"""Walk a folder and say what becomes of every file in it: one ledger row per scan and per group of refused files.

Files are recognised by content, never by name. Each is opened once; DICOM verdicts come from headers. NIfTI voxels are
read, because its header tells neither label maps nor CT from other images.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from hilum.archive import dicom
from hilum.archive.dicom.header import Header
from hilum.archive.intake import check, crashed, judge_kind
from hilum.archive.ledger import Entry, count, write_ledger
from hilum.archive.policy import AS_IS, Policy
from hilum.archive.privacy import Key, read_key
from hilum.archive.recognise import look_at, loose
from hilum.archive.spill import Spill, decode, encode, private_folder
from hilum.archive.workers import Crashed, default_num_workers, run
from hilum.errors import InputError
from hilum.terminal import Progress

MANY_FILES = 2000  # starting a process pays from twice as many on, one for each so many
BATCH = 64


@dataclass(frozen=True)
class Listing:
    """What lies in an archive: counted, not held.

    root       paths are relative to it
    num_files  regular files, and links that lead nowhere
    digest     SHA-256 of all paths and sizes, in order
    closed     folders that could not be entered
    only       the one file that was asked for; "" for a whole folder
    """

    root: Path
    num_files: int
    digest: str
    closed: tuple[str, ...] = ()
    only: str = ""

    def names(self) -> Iterator[str]:
        """The paths, in order, read from the folder once more: an archive may hold more than memory does."""
        if self.only:
            yield self.only
        else:
            yield from (name for name, found in _walk(self.root) if found is not None)


def walk(archive: Path, progress: Progress | None = None) -> Listing:
    """Count every regular file below a folder. Linked files count, linked folders are not entered.

    Raises InputError when the folder is missing, a file, unreadable or empty.
    """
    if not archive.exists():
        raise InputError(f"{archive} is missing; expected a folder with scans. Check the path")
    if not archive.is_dir():
        raise InputError(f"{archive} is a file; expected a folder with scans. Give the folder that holds it")
    closed: list[str] = []
    digest, num_files = hashlib.sha256(), 0
    for name, found in _walk(archive):
        if found is None:
            closed.append(name or ".")
            continue
        num_files += 1
        digest.update(f"{name}\0{_size(found)}\0".encode("utf-8", "surrogateescape"))
        if progress and num_files % MANY_FILES == 0:
            progress(num_files, None, "listing files")
    if "." in closed:
        raise InputError(f"{archive} cannot be read (no permission); expected a folder with scans. Check its owner")
    if not num_files and not closed:
        raise InputError(f"{archive} is empty; expected a folder with scans. Check the path")
    return Listing(archive, num_files, digest.hexdigest(), tuple(closed))


def _walk(root: Path) -> Iterator[tuple[str, "os.DirEntry[str] | None"]]:
    """(path below the root, its folder entry) of each file, in an order that depends on names only.

    A folder that cannot be entered comes with None. Holds one folder, and the names of those still to visit.
    """
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(root / below) as found:
                here = sorted(found, key=lambda e: e.name)
        except OSError:
            yield below, None
            continue
        folders = []
        for entry in here:
            name = f"{below}/{entry.name}" if below else entry.name
            if _is_folder(entry):
                folders.append(name)
            elif _is_file(entry):
                yield name, entry
        waiting += reversed(folders)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # a file system that does not tell, and no permission to look
        return False


def _is_file(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a regular file, a link to one, or cannot be looked at; a pipe would block, a device has no end."""
    try:
        if not entry.is_file():
            if entry.is_symlink():
                entry.stat()  # fails when it leads nowhere
            return False
    except OSError:
        pass
    return True


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # a broken link, or no permission


def scan(
    archive: str | Path,
    key: Key | None = None,
    *,
    pixels: bool = False,
    policy: Policy = AS_IS,
    progress: Progress | None = None,
) -> list[Entry]:
    """What is in a folder: one entry per scan and per group of refused files, sorted by key.

    key       hashes identifiers; None: the user's own (`hilum.archive.privacy.read_key`)
    pixels    also read every voxel of every scan, so that what cannot be decoded is known now
    policy    what may be done to scans that are read
    progress  called as (files done, files in all, what is being done)
    returns   entries whose `num_files` add up to the number of regular files in the folder

    For a folder whose entries do not fit in memory (about 2 kB a scan and 100 bytes a file), see `scan_to`.
    """
    listing, key = walk(Path(archive), progress), key or read_key()
    with private_folder() as folder:
        entries = examine(listing, key, nifti_voxels=True, folder=folder, policy=policy, progress=progress)
        if pixels:
            entries = _checked(entries, policy, folder, None, "local", progress)
        return sorted(entries, key=lambda e: e.key)


def scan_to(
    out: Path | None,
    archive: Path,
    key: Key | None = None,
    *,
    pixels: bool = False,
    policy: Policy = AS_IS,
    num_workers: int | None = None,
    engine: str = "local",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`scan` of an archive of any size: the ledger is written to `out` as a stream, its companion beside it.

    out      None: only count
    returns  the counts of `hilum.archive.ledger.count`
    """
    listing, key = walk(archive, progress), key or read_key()
    with private_folder() as folder:
        entries = examine(
            listing, key, True, folder=folder, policy=policy, num_workers=num_workers, engine=engine, progress=progress
        )
        if pixels:
            entries = _checked(entries, policy, folder, num_workers, engine, progress)
        return count(entries) if out is None else write_ledger(out, entries, archive_root=archive)


def _checked(
    entries: Iterable[Entry],
    policy: Policy,
    folder: Path,
    num_workers: int | None,
    engine: str,
    progress: Progress | None,
) -> Iterator[Entry]:
    """Entries after the voxels of the used ones have been read."""
    num_used = 0
    with Spill(folder / "used") as used:
        for entry in entries:
            if entry.used:
                used.add(entry.key, encode(entry))
                num_used += 1
            else:
                yield entry
        todo = (decode(Entry, line) for bucket in used.buckets() for _, line in bucket)
        work = partial(check, policy=policy)
        with closing(run(work, todo, 1 if num_used <= 1 else num_workers, engine)) as results:
            for done, (entry, result) in enumerate(results, 1):
                yield crashed(entry) if isinstance(result, Crashed) else result
                if progress:
                    progress(done, num_used, "reading scans")


def find(path: str | Path, key: Key, *, policy: Policy = AS_IS, progress: Progress | None = None) -> list[Entry]:
    """The scans in a folder or one file, from headers alone; label maps in NIfTI show only when read."""
    path = Path(path)
    listing = Listing(path.parent, 1, "", only=path.name) if path.is_file() else walk(path)
    with private_folder() as folder:
        entries = examine(listing, key, nifti_voxels=False, folder=folder, policy=policy, progress=progress)
        return sorted(entries, key=lambda e: e.key)


def examine(
    listing: Listing,
    key: Key,
    nifti_voxels: bool,
    *,
    folder: Path,
    policy: Policy = AS_IS,
    num_workers: int | None = None,
    engine: str = "local",
    progress: Progress | None = None,
) -> Iterator[Entry]:
    """Classify every file of a listing and group the DICOM files into series; entries come in no order.

    nifti_voxels  read NIfTI voxels for their verdict; without, label maps count as scans until they are read
    folder        private, for what does not fit in memory
    """
    look = partial(_look_at_batch, root=listing.root, key=key, nifti_voxels=nifti_voxels)
    for name in listing.closed:
        yield Entry(key=key.hash("item", name), reason="unreadable", detail="a closed folder", num_files=0,
                    paths=(listing.root / name,))  # fmt: skip
    done = 0
    most = listing.num_files // MANY_FILES
    if most <= 1:
        engine = "local"
    num_workers = num_workers if engine != "local" else max(1, min(num_workers or default_num_workers(), most))
    with Spill(folder / "headers") as headers:
        with closing(run(look, _batches(listing.names()), num_workers, engine)) as results:
            for batch, found in results:
                if isinstance(found, Crashed):
                    found = [], [loose(n, listing.root, key, "reader_crashed") for n in batch]
                for name, line in found[0]:
                    headers.add(name, line)
                yield from found[1]
                done += len(batch)
                if progress:
                    progress(done, listing.num_files, "looking at files")
        for bucket in headers.buckets():
            yield from dicom.entries((decode(Header, line) for _, line in bucket), listing.root, key, policy)


def _batches(names: Iterator[str]) -> Iterator[tuple[str, ...]]:
    while batch := tuple(islice(names, BATCH)):
        yield batch


def _look_at_batch(
    names: Sequence[str], root: Path, key: Key, nifti_voxels: bool
) -> tuple[list[tuple[str, str]], list[Entry]]:
    """DICOM headers as records for a `Spill`, and the finished entries of other files. Runs in a worker.

    What may end in one row stands under one hash: a series, or without an identifier the folder.
    """
    headers: list[tuple[str, str]] = []
    entries: list[Entry] = []
    for found in _look_at_all(names, root, key, nifti_voxels):
        if isinstance(found, Header):
            headers.append((key.hash("series", found.series_uid or f"item:{found.path.parent}"), encode(found)))
        else:
            entries.append(found)
    return headers, entries


def _look_at_all(names: Sequence[str], root: Path, key: Key, nifti_voxels: bool) -> list[Header | Entry]:
    return [found for name in names for found in look_at(name, root, key, judge_kind if nifti_voxels else None)]
