"""One DICOM file → its slices: itself, the frames of an enhanced file, or the tiles of a mosaic.

The header is read once, with a fixed list of attributes, up to the last of them: private groups, overlays and pixels
are not touched. Only for enhanced files and mosaics the rest before the pixels is read, too, from the same handle.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.filereader import read_partial

from hilum.archive.dicom.codecs import PIXEL_DATA, check_inflation
from hilum.archive.dicom.elements import read_elements
from hilum.archive.dicom.frames import MORE_TAGS, describe_frames
from hilum.archive.dicom.header import BROKEN, ENHANCED, HEADER_TAGS, LAST_TAG, Header, Texts, describe, quiet
from hilum.archive.dicom.mosaic import is_mosaic, tiles
from hilum.errors import ScanRefused

_WANTED = frozenset(int(tag) for tag in HEADER_TAGS)


def read_headers(handle: BinaryIO, path: Path) -> list[Header]:
    """Read the headers of all slices in one file from its open handle.

    returns  at least one; what is wrong with the file or a slice is the `refusal` there
    """
    size = os.fstat(handle.fileno()).st_size
    try:
        with quiet():
            if (text := quick(handle)) is not None:
                return [describe(text, path, size, forced=False)]
            forced = check_inflation(handle)[128:132] != b"DICM"
            data = read_partial(handle, _beyond, specific_tags=HEADER_TAGS, force=forced)
            return slices(data, handle, path, size, forced)
    except ScanRefused as refused:
        return [Header(path=path, size=size, refusal=refused.reason, detail=refused.detail)]
    except BROKEN as error:
        return [Header(path=path, size=size, refusal="corrupt", detail=f"DICOM header ({type(error).__name__})")]


def quick(handle: BinaryIO) -> Texts | None:
    """The attributes of an ordinary file with one slice; None for any other."""
    found = read_elements(handle, _WANTED, LAST_TAG)
    text = Texts.of_plain(found) if found else None
    return None if text is None or text.sop_class in ENHANCED or is_mosaic(text) else text


def slices(data: Dataset, handle: BinaryIO, path: Path, size: int, forced: bool) -> list[Header]:
    """The slices of a file whose plain attributes are read already; `handle` serves for the others."""
    text = Texts(data)
    if text.sop_class in ENHANCED:
        handle.seek(0)
        data = read_partial(handle, _at_pixels, specific_tags=[*HEADER_TAGS, *MORE_TAGS], force=forced)
        return describe_frames(data, path, size, forced)
    header = describe(text, path, size, forced)
    if header.refusal or not is_mosaic(text):
        return [header]
    handle.seek(0)
    try:
        return tiles(header, read_partial(handle, _at_pixels, force=forced))
    except ScanRefused as refused:
        return [replace(header, refusal=refused.reason, detail=refused.detail)]


def _beyond(tag: int, vr: str | None, length: int) -> bool:
    return int.__gt__(tag, LAST_TAG)  # the operator of pydicom's tag class is ten times slower


def _at_pixels(tag: int, vr: str | None, length: int) -> bool:
    return int.__ge__(tag, PIXEL_DATA - 0x10)
