"""One scan on its way into the store: read, judged by its voxels, made private. `hilum scan --pixels` does the same."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hilum.archive import dicom
from hilum.archive.files import array, image, itk, nifti
from hilum.archive.judge.burned_in import burned_in_score
from hilum.archive.judge.face import deface, face_score
from hilum.archive.judge.residual import residual_identifiers
from hilum.archive.judge.screening import screen
from hilum.archive.ledger import Entry
from hilum.archive.policy import AS_IS, Policy
from hilum.archive.reasons import flag
from hilum.errors import GeometryError, ScanRefused
from hilum.volume import Volume

LIKELY = 0.5  # from this score on, burned-in text, residual identifiers or a face become a caution
MOST_PLACES = 8  # of residual identifiers that a ledger row names

Reader = Callable[[Entry, Policy], tuple[Volume, tuple[str, ...]]]
"""The voxels of one used entry, and the repairs they needed. Raises ScanRefused."""

READERS: dict[str, Reader] = {
    "dicom": lambda entry, policy: dicom.read(entry.paths, entry.frames, policy),
    "nifti": lambda entry, policy: nifti.read(entry.paths[0], entry.frames[0] if entry.frames else 0),
    "itk": lambda entry, policy: itk.read(entry.paths[0], entry.frames[0] if entry.frames else 0),
    "array": lambda entry, policy: array.read(entry.paths[0]),
    "image": lambda entry, policy: image.read(entry.paths[0]),
}


@dataclass(frozen=True)
class Intake:
    """What became of one scan.

    entry      with all that its voxels showed; used, or refused
    volume     what may enter the store; None when refused
    look_hash  64 bits (`hilum.archive.judge.duplicates.look_hash`)
    """

    entry: Entry
    volume: Volume | None = None
    look_hash: int = 0


def take_in(entry: Entry, policy: Policy = AS_IS) -> Intake:
    """Read a used entry, judge its voxels and remove a face. Never raises: the entry tells."""
    try:
        return _take_in(entry, policy)
    except ScanRefused as refused:
        return Intake(refuse(entry, refused.reason, refused.detail))
    except MemoryError:
        return Intake(refuse(entry, "too_large", "more than the memory of this machine"))
    except Exception as error:  # a fault of ours costs this scan, not the archive; the row says where it is
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
        return Intake(refuse(entry, "reader_crashed", where))


def _take_in(entry: Entry, policy: Policy) -> Intake:
    vol, repairs = read_entry(entry, policy)
    entry, look_hash = judge(entry, vol, repairs)
    if not entry.used:
        return Intake(entry)
    if not policy.deface:
        return Intake(_note_face(entry, face_score(vol)), vol, look_hash)
    vol, face, num_replaced = deface(vol)
    if num_replaced:
        entry = replace(entry, repairs=(*entry.repairs, f"defaced: {num_replaced} voxels replaced"))
    return Intake(_note_face(entry, face), vol, look_hash)


def judge(entry: Entry, vol: Volume, repairs: Sequence[str]) -> tuple[Entry, int]:
    """What the voxels of a scan say: its entry, used or refused, and its look hash."""
    seen = screen(vol)
    entry = replace(with_volume(entry, vol, repairs), plane=seen.plane, region=seen.region)
    flags = [*entry.flags, *seen.flags]
    if (text := burned_in_score(vol)) >= LIKELY:
        flags.append(flag("burned_in", f"{text:.2f}"))
    entry = replace(entry, flags=tuple(dict.fromkeys(flags)))
    return (refuse(entry, *seen.refusal) if seen.refusal else entry), seen.look_hash


def _note_face(entry: Entry, score: float) -> Entry:
    return entry if score < LIKELY else replace(entry, flags=(*entry.flags, flag("face", f"{score:.2f}")))


def note_identifiers(entry: Entry) -> Entry:
    """An entry with the caution "residual_identifiers", if the header of its first DICOM file still holds some."""
    if entry.reader != "dicom":
        return entry
    score, places = residual_identifiers(entry.paths[0])
    if score < LIKELY:
        return entry
    more = f" and {len(places) - MOST_PLACES} more" if len(places) > MOST_PLACES else ""
    found = flag("residual_identifiers", f"{score:.2f} {' '.join(places[:MOST_PLACES])}{more}")
    return replace(entry, flags=(*entry.flags, found))


def check(entry: Entry, policy: Policy = AS_IS) -> Entry:
    """A used entry with all that its files show: what `take_in` sees, and identifiers left in a DICOM header."""
    entry = take_in(entry, policy).entry
    return note_identifiers(entry) if entry.used else entry


def judge_kind(entry: Entry) -> Entry:
    """A used entry after its voxels have been read for one thing: whether they are an image, and CT or not."""
    try:
        vol, repairs = read_entry(entry)
    except ScanRefused as refused:
        return refuse(entry, refused.reason, refused.detail)
    return with_volume(entry, vol, repairs)


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
