"""Walk a folder and say what becomes of every file in it: one ledger row per scan and per group of refused files.

Files are recognised by content, never by name. Each is opened once; DICOM verdicts come from headers. NIfTI voxels are
read, because its header tells neither label maps nor CT from other images.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hilum.archive import array, dicom, image, itk, nifti
from hilum.archive.dicom.header import Header
from hilum.archive.ledger import Entry, flag
from hilum.archive.policy import AS_IS, Policy
from hilum.archive.privacy import Key, read_key
from hilum.archive.recognise import look_at, loose
from hilum.archive.workers import Crashed, default_num_workers, run
from hilum.errors import GeometryError, InputError, ScanRefused
from hilum.terminal import Progress
from hilum.volume import Volume

Reader = Callable[[Entry, Policy], tuple[Volume, tuple[str, ...]]]
"""The voxels of one used entry, and the repairs they needed. Raises ScanRefused."""

READERS: dict[str, Reader] = {
    "dicom": lambda entry, policy: dicom.read(entry.paths, entry.frames, policy),
    "nifti": lambda entry, policy: nifti.read(entry.paths[0], entry.frames[0] if entry.frames else 0),
    "itk": lambda entry, policy: itk.read(entry.paths[0], entry.frames[0] if entry.frames else 0),
    "array": lambda entry, policy: array.read(entry.paths[0]),
    "image": lambda entry, policy: image.read(entry.paths[0]),
}

MANY_FILES = 2000  # from here on, starting processes pays
BATCH = 64


@dataclass(frozen=True)
class Listing:
    """The files of an archive: (path below the root, bytes) in order, and folders that could not be entered."""

    root: Path
    files: tuple[tuple[str, int], ...]
    closed: tuple[str, ...]


def walk(archive: Path) -> Listing:
    """List every regular file below a folder. Linked files count, linked folders are not entered.

    Raises InputError when the folder is missing, a file, unreadable or empty.
    """
    if not archive.exists():
        raise InputError(f"{archive} is missing; expected a folder with scans. Check the path")
    if not archive.is_dir():
        raise InputError(f"{archive} is a file; expected a folder with scans. Give the folder that holds it")
    closed: list[str] = []
    files: list[tuple[str, int]] = []

    def note(error: OSError) -> None:
        closed.append(Path(error.filename).relative_to(archive).as_posix())

    for folder, folders, names in os.walk(archive, onerror=note):
        folders.sort()
        below = Path(folder).relative_to(archive)
        for name in names:
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:
                files.append(((below / name).as_posix(), -1))  # a broken link, or no permission
                continue
            if stat.S_ISREG(status.st_mode):  # a pipe would block, a device has no end
                files.append(((below / name).as_posix(), status.st_size))
    if "." in closed:
        raise InputError(f"{archive} cannot be read (no permission); expected a folder with scans. Check its owner")
    if not files and not closed:
        raise InputError(f"{archive} is empty; expected a folder with DICOM, NIfTI, PNG or JPEG files. Check the path")
    return Listing(archive, tuple(sorted(files)), tuple(sorted(closed)))


def scan(
    archive: str | Path, key: Key | None = None, *, pixels: bool = False, progress: Progress | None = None
) -> list[Entry]:
    """What is in a folder: one entry per scan and per group of refused files, sorted by key.

    key       hashes identifiers; None: the user's own (`hilum.archive.privacy.read_key`)
    pixels    also read every voxel of every scan, so that what cannot be decoded is known now
    progress  called as (files done, files in all, what is being done)
    returns   entries whose `num_files` add up to the number of regular files in the folder
    """
    entries = examine(walk(Path(archive)), key or read_key(), nifti_voxels=True, progress=progress)
    if not pixels:
        return entries
    used = [e for e in entries if e.used]
    checked = [e for e in entries if not e.used]
    with closing(run(check, used, default_num_workers() if len(used) > 1 else 1)) as results:
        for done, (entry, result) in enumerate(results, 1):
            checked.append(crashed(entry) if isinstance(result, Crashed) else result)
            if progress:
                progress(done, len(used), "reading scans")
    return sorted(checked, key=lambda e: e.key)


def find(path: str | Path, key: Key, *, policy: Policy = AS_IS, progress: Progress | None = None) -> list[Entry]:
    """The scans in a folder or one file, from headers alone; label maps in NIfTI show only when read."""
    path = Path(path)
    one = path.is_file()
    listing = Listing(path.parent, ((path.name, path.stat().st_size),), ()) if one else walk(path)
    return examine(listing, key, nifti_voxels=False, policy=policy, progress=progress)


def read_scan(entry: Entry) -> Volume:
    """The voxels of a used entry. Raises ScanRefused, also for what only the voxels show."""
    return read_entry(entry)[0]


def read_entry(entry: Entry, policy: Policy = AS_IS) -> tuple[Volume, tuple[str, ...]]:
    """The voxels of a used entry, and what had to be repaired in them. Raises ScanRefused."""
    try:
        return READERS[entry.reader](entry, policy)
    except GeometryError as error:
        raise ScanRefused("no_geometry", str(error)) from None
    except MemoryError:
        raise ScanRefused("too_large", "more than the memory of this machine") from None


def check(entry: Entry) -> Entry:
    """A used entry after its voxels have been read: with what that showed, or refused."""
    try:
        vol, notes = read_entry(entry)
    except ScanRefused as refused:
        return refuse(entry, refused.reason, refused.detail)
    return with_volume(entry, vol, notes)


def with_volume(entry: Entry, vol: Volume, repairs: Sequence[str]) -> Entry:
    """An entry that knows what reading its voxels showed."""
    guessed = (flag("modality_guessed", vol.modality),) if vol.modality != entry.modality else ()
    return replace(
        entry,
        modality=vol.modality,
        repairs=tuple(dict.fromkeys((*entry.repairs, *repairs))),
        flags=tuple(dict.fromkeys((*entry.flags, *guessed))),
    )


def refuse(entry: Entry, reason: str, detail: str = "") -> Entry:
    return replace(entry, reason=reason, detail=detail)


def crashed(entry: Entry) -> Entry:
    return refuse(entry, "reader_crashed", entry.transfer_syntax)


def examine(
    listing: Listing, key: Key, nifti_voxels: bool, policy: Policy = AS_IS, progress: Progress | None = None
) -> list[Entry]:
    """Classify every file of a listing and group the DICOM files into series.

    nifti_voxels  read NIfTI voxels for their verdict; without, label maps count as scans until they are read
    """
    look = partial(_look_at_all, root=listing.root, key=key, nifti_voxels=nifti_voxels)
    names = [name for name, _ in listing.files]
    num_workers = min(default_num_workers(), 2) if len(names) >= MANY_FILES else 1
    headers: list[Header] = []
    entries = [
        Entry(key=key.hash("item", c), reason="unreadable", detail="a closed folder", num_files=0,
              paths=(listing.root / c,))
        for c in listing.closed
    ]  # fmt: skip
    done = 0
    with closing(run(look, _batches(names), num_workers)) as results:
        for batch, found in results:
            if isinstance(found, Crashed):
                found = [loose(n, listing.root, key, "reader_crashed") for n in batch]
            headers += [f for f in found if isinstance(f, Header)]
            entries += [f for f in found if isinstance(f, Entry)]
            done += len(batch)
            if progress:
                progress(done, len(names), "looking at files")
    entries += dicom.entries(headers, listing.root, key, policy)
    return sorted(entries, key=lambda e: e.key)


def _batches(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for first in range(0, len(names), BATCH):
        yield tuple(names[first : first + BATCH])


def _look_at_all(names: Sequence[str], root: Path, key: Key, nifti_voxels: bool) -> list[Header | Entry]:
    return [found for name in names for found in look_at(name, root, key, check if nifti_voxels else None)]
