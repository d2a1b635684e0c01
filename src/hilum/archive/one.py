"""`hilum.read`: one scan from a file or a folder, as every command reads it."""

import contextlib
from pathlib import Path

from hilum.archive.dicom.header import looks_like_dicom
from hilum.archive.intake import judge_kind, read_scan
from hilum.archive.ledger import Entry
from hilum.archive.privacy import Key, read_key
from hilum.archive.scan import find
from hilum.errors import InputError
from hilum.volume import Volume


def read(path: str | Path, series: str | None = None, *, key: Key | None = None) -> Volume:
    """One scan: HU for CT, (Z, Y, X) turned so that axis 0 runs through the acquired slices (`hilum.volume.to_slices`).

    path    a file (a DICOM slice stands for its series in that folder and below), or a folder
    series  the key of one scan among several, or its first digits
    key     hashes identifiers; None: the user's own

    InputError when there is no scan, or several and none is chosen: the message names their keys. ScanRefused when the scan
    cannot be read with certainty.
    """
    path, key = Path(path), key or read_key()
    rows = [entry for entry in _entries(path, key) if entry.key.startswith(series or "")]
    used = [entry for entry in rows if entry.used]
    if len(used) > 1:  # only its voxels tell a label map
        used = [entry for entry in map(judge_kind, used) if entry.used]
    if len(used) == 1:
        return read_scan(used[0])
    if used:
        keys = ", ".join(f"{entry.key} ({entry.modality}, {entry.num_slices} slices)" for entry in used[:8])
        raise InputError(
            f"{path} holds {len(used)} scans: {keys}; choose one with series=, by the first digits of its key"
        )
    why = "; ".join(f"{entry.key}: {entry.reason}" for entry in rows[:4]) or "no file that belongs to it"
    raise InputError(f"{path} holds no scan that can be used{f' with key {series}' if series else ''} ({why}); see why with: "
                     f"hilum inspect")  # fmt: skip


def _entries(path: Path, key: Key) -> list[Entry]:
    if path.is_file():
        with contextlib.suppress(OSError), open(path, "rb") as handle:  # what cannot be opened, `find` says by name
            if looks_like_dicom(handle.read(4096)):
                return [entry for entry in find(path.parent, key) if path in entry.paths]
    return find(path, key)
