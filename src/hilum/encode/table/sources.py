"""Where scans come from: a store, files, a table of paths, a DICOMweb server. Each gives the same list of series.

Two marks tell whether a series is still what it was. Its `stamp` costs nothing: for files a hash of names, sizes and times
of change, for a store the content itself. Its content, a keyed hash of all bytes, is found when it is read; it is asked for
again only when the stamp has changed, so that a copied or touched file is not taken for a new one.
"""

import contextlib
import csv
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hilum.archive.files import itk, nifti
from hilum.archive.intake import read_scan
from hilum.archive.labels import read_labels
from hilum.archive.ledger import Entry
from hilum.archive.privacy import Key
from hilum.archive.reasons import REASONS
from hilum.archive.scan import Listing, examine, find, walk
from hilum.archive.spill import private_folder
from hilum.archive.store.store import Store
from hilum.archive.web import fetch, is_address, list_instances, parse_address
from hilum.errors import InputError, LabelsError, ScanRefused, UsageError
from hilum.terminal import Progress
from hilum.volume import Volume

_SUFFIXES = {
    *(".gz", ".nii", ".hdr", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy"),
    *(".dcm", ".png", ".jpg", ".jpeg", ".tif", ".tiff"),
}


@dataclass(frozen=True)
class Series:
    """One scan that can be read, or a refused one.

    read     importable and picklable: it runs in another process
    digest   what its content is, before it is hashed with the key
    stamp    changes whenever the files do
    name     of the input file or folder without its suffix: an identifier, used only where asked for
    mask     labels on its grid
    reason   why it cannot be read; "" when it can
    """

    key: str
    patient: str
    study: str
    num_slices: int
    stamp: str
    read: Callable[[], Volume]
    digest: Callable[[], str]
    name: str = ""
    mask: Path | None = None
    reason: str = ""


@dataclass
class Found:
    """The series of a source, by key, and what was set aside by design: reason → files."""

    series: list[Series] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Source:
    """An opened source.

    label  what messages call it
    stamp  changes whenever anything in it does; found without reading a scan
    list   finds the series
    """

    label: str
    stamp: str
    list: Callable[[Progress | None], Found]


@contextlib.contextmanager
def open_source(source: str | Path, key: Key) -> Iterator[Source]:
    """Any input of `hilum embed`. InputError when it is missing or empty."""
    text, path = str(source), Path(source)
    if is_address(text):
        with private_folder() as folder:
            yield _open_web(text, key, folder)
    elif (path / "store.json").is_file():
        yield _open_store(path, key)
    elif path.is_file() and path.suffix.lower() == ".csv":
        yield _open_table(path, key)
    else:
        yield _open_files(path, key)


def _open_store(path: Path, key: Key) -> Source:
    store = Store(path)

    def found(_: Progress | None) -> Found:
        series = []
        for row in store.rows:
            digest = hashlib.sha256(repr((row.pixel_hash, row.modality, row.unit, row.affine)).encode()).hexdigest()
            stamp = key.hash("item", digest)
            read = partial(store.read_volume, row.key)
            content = partial(str, digest)
            series.append(Series(row.key, row.patient, row.study, row.shape[0], stamp, read, content, row.key))
        return Found(series)

    return Source(path.name, key.hash("item", store.hash), found)


def _open_files(path: Path, key: Key) -> Source:
    if path.is_file():
        names, root = [path.name], path.parent
    else:
        listing = walk(path)
        names, root = list(listing.names()), path
    return Source(
        path.name,
        key.hash("item", stamp_of(root / name for name in names)),
        lambda progress: _series_of(find(path, key, progress=progress), key),
    )


def _open_web(text: str, key: Key, folder: Path) -> Source:
    address = parse_address(text)
    instances = list_instances(address)

    def found(progress: Progress | None) -> Found:
        files = folder / "instances"
        files.mkdir(mode=0o700)
        fetch(address, files, instances, progress)
        return _series_of(find(files, key, progress=progress), key)

    # An instance never changes under its UID (PS3.5 9), so the list of them stands for what they hold.
    return Source(f"the study on {address.host}", key.hash("item", "\n".join(instances)), found)


@dataclass(frozen=True)
class _Chosen(Listing):
    """The files that a table names."""

    files: tuple[str, ...] = ()

    def names(self) -> Iterator[str]:
        yield from self.files


def _open_table(path: Path, key: Key) -> Source:
    """A CSV with columns `path` (a file, or a folder with DICOM files) and perhaps `mask`, relative to itself."""
    rows = read_rows(path, "path")
    root = path.parent
    below: dict[str, int] = {}  # file → row
    for number, row in enumerate(rows):
        if not row["path"]:
            raise InputError(f"{path.name}: row {number + 1} names no path; expected a file or a folder")
        place = root / row["path"]
        inner = walk(place).names() if place.is_dir() else iter([""])
        for name in inner:
            relative = os.path.relpath(place / name if name else place, root)
            if below.setdefault(relative, number) != number:
                raise InputError(f"{path.name}: rows {below[relative] + 1} and {number + 1} hold the same file")
    masks: list[Path | None] = [root / row["mask"] if row.get("mask") else None for row in rows]
    for number, mask in enumerate(masks):
        if mask is not None and not mask.is_file():
            raise LabelsError(f"{path.name}: the mask of row {number + 1} is missing; expected a file of labels")

    def found(progress: Progress | None) -> Found:
        listing = _Chosen(root, len(below), "", files=tuple(sorted(below)))
        with private_folder() as folder:
            entries = sorted(examine(listing, key, nifti_voxels=False, folder=folder, progress=progress), key=_by_key)
        chosen = {e.key: masks[below[os.path.relpath(e.paths[0], root)]] for e in entries}
        series = _series_of(entries, key)
        series.series = [_masked(s, chosen[s.key], key) for s in series.series]
        return series

    every = [*(root / name for name in sorted(below)), *(mask for mask in masks if mask)]
    return Source(path.name, key.hash("item", stamp_of([path, *every])), found)


def read_rows(path: Path, *columns: str) -> list[dict[str, str]]:
    """A CSV with these columns among others. LabelsError when it cannot be read or one is missing."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = [{name or "": value or "" for name, value in row.items()} for row in csv.DictReader(handle)]
    except (OSError, UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise LabelsError(f"the table {path.name} cannot be read as CSV: {error}") from None
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise LabelsError(f"{path.name} has {len(rows)} rows and columns {sorted(rows[0]) if rows else []}; expected a "
                          f"column {', '.join(missing)}")  # fmt: skip
    return rows


def _by_key(entry: Entry) -> str:
    return entry.key


def _series_of(entries: Iterable[Entry], key: Key) -> Found:
    """Ledger entries as series. What is set aside by design is only counted."""
    found = Found()
    for entry in entries:
        if entry.reason and not REASONS[entry.reason].fault:
            found.set_aside[entry.reason] += entry.num_files
            continue
        reason = f"{entry.reason}: {entry.detail}" if entry.detail else entry.reason
        files = _files_of(entry)
        stamp = key.hash("item", stamp_of(files) + repr((entry.frames, entry.key, reason)))
        found.series.append(
            Series(
                entry.key,
                entry.patient,
                entry.study,
                max(entry.num_slices, 1),
                stamp,
                partial(read_scan, entry),
                partial(_hash_files, tuple(files), entry.frames),
                _name_of(entry),
                reason=reason,
            )
        )
    return found


def _files_of(entry: Entry) -> list[Path]:
    """Every file that a scan is read from, each once, in order."""
    files = list(dict.fromkeys(entry.paths))
    read_header = {"nifti": nifti.read_header, "itk": itk.read_header}.get(entry.reader)
    if entry.used and read_header is not None:
        with contextlib.suppress(ScanRefused):
            files = list(dict.fromkeys([*files, read_header(files[0]).voxels.path]))
    return files


def _name_of(entry: Entry) -> str:
    """The name of a file without its suffixes, or of the folder of a DICOM series."""
    if entry.reader == "dicom":
        return entry.paths[0].parent.name
    return stem_of(entry.paths[0])


def stem_of(path: Path) -> str:
    """The name of a file without the suffixes of image files: case.nii.gz → case."""
    name = path.name
    while (suffix := Path(name).suffix.lower()) in _SUFFIXES and suffix != name.lower():
        name = name[: -len(suffix)]
    return name


def stamp_of(paths: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and times of change. The last cannot be set back, so a changed file always shows."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            s = os.stat(path)
            facts = f"{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
        except OSError as error:
            facts = type(error).__name__
        digest.update(f"{path}\0{facts}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _hash_files(paths: tuple[Path, ...], frames: tuple[int, ...]) -> str:
    """SHA-256 of the bytes of all files, in order, whatever their names."""
    digest = hashlib.sha256(repr(frames).encode())
    for path in paths:
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def with_mask(series: Series, mask: Path, key: Key) -> Series:
    """The series with its mask, which counts as part of its content."""
    digest = partial(_joined, series.digest, partial(_hash_files, (mask,), ()))
    return replace(series, mask=mask, stamp=key.hash("item", series.stamp + stamp_of([mask])), digest=digest)


def _masked(series: Series, mask: Path | None, key: Key) -> Series:
    return with_mask(series, mask, key) if mask is not None else series


def _joined(first: Callable[[], str], second: Callable[[], str]) -> str:
    return f"{first()} {second()}"


def content_of(series: Series, key: Key) -> str:
    """The keyed hash of what a series is read from; "" when that cannot be read."""
    try:
        return key.hash("item", series.digest())
    except OSError:
        return ""


@dataclass(frozen=True)
class Loaded:
    """A series in memory, or the reason why not."""

    volume: Volume | None = None
    mask: Volume | None = None
    content: str = ""
    reason: str = ""


def load(series: Series, key: Key, with_labels: bool) -> Loaded:
    """Read one series and its mask. Runs in a worker; never raises for what is wrong with the files."""
    content = content_of(series, key)
    if series.reason:
        return Loaded(content=content, reason=series.reason)
    try:
        volume = series.read()
        mask = read_labels(series.mask, volume).volume if with_labels and series.mask is not None else None
    except ScanRefused as refused:
        return Loaded(content=content, reason=str(refused))
    except Exception as error:  # a fault of ours costs this scan, not the others; the row says what it was
        return Loaded(content=content, reason=f"reader_crashed: {type(error).__name__}")
    return Loaded(volume, mask, content)


def read_masks(path: Path, key: Key) -> Callable[[Series], Path | None]:
    """Which label map belongs to a series: named by a table, or in a folder by a file of the same name.

    A table has columns mask and one of series_uid, file, series. LabelsError when columns or files are missing or a scan is
    named twice.
    """
    if path.is_dir():
        by_name: dict[str, Path] = {}
        for file in sorted(p for p in path.iterdir() if p.is_file()):
            if by_name.setdefault(stem_of(file), file) != file:
                raise LabelsError(f"the folder {path.name} holds several masks of one name; expected one for each scan")
        return lambda series: by_name.get(series.name)
    table = read_mask_table(path, key)
    return lambda series: table.get(series.key)


def read_mask_table(path: Path, key: Key) -> dict[str, Path]:
    """Series key → label map."""
    rows = read_rows(path, "mask")
    columns = rows[0].keys()
    known = next((c for c in ("series_uid", "file", "series") if c in columns and any(r[c] for r in rows)), None)
    if known is None:
        raise LabelsError(
            f"the mask table {path.name} has columns {sorted(columns)}; expected mask and one of series_uid, file, series"
        )
    found: dict[str, Path] = {}
    for row in rows:
        series = (
            row[known] if known == "series" else key.hash("series" if known == "series_uid" else "item", row[known])
        )
        mask = path.parent / row["mask"]
        if series in found:
            raise LabelsError(f"the mask table {path.name} names series {series} twice")
        if not mask.is_file():
            raise LabelsError(f"a label map that {path.name} names for series {series} is missing")
        found[series] = mask
    return found


def place_masks(found: Found, masks: Path | None, key: Key, label: str, required: bool) -> None:
    """Give each series its mask. Where masks are required, those without one are set aside as "no_mask"."""
    if masks is not None:
        mask_of = read_masks(masks, key)
        found.series = [_masked(s, mask_of(s) or s.mask, key) for s in found.series]
    if not required:
        return
    if found.series and not any(s.mask for s in found.series):
        if masks is None:
            raise UsageError(
                "level region needs --masks, a CSV that names a label map for each scan, or a folder of them"
            )
        raise LabelsError(f"no mask of {masks.name} belongs to a scan of {label}; expected matching ids or names")
    found.set_aside["no_mask"] += sum(s.mask is None and not s.reason for s in found.series)
    found.series = [s for s in found.series if s.mask is not None or s.reason]
    if not found.set_aside["no_mask"]:
        del found.set_aside["no_mask"]
