"""The header of an ordinary DICOM file, several times as fast as pydicom reads it, or not at all.

Reading an archive is reading millions of headers, of which a few dozen values count. This walks over the elements of a
little-endian data set (PS3.5 7.1) and keeps the wanted ones as bytes. Whatever is not plain in every respect (other
byte order, deflated, no meta header, unknown VR, tags out of order, cut off) is left to pydicom.
"""

from struct import Struct
from typing import BinaryIO, NamedTuple

_TAG = Struct("<HH")
_TAG_LENGTH = Struct("<HHI")  # implicit VR
_TAG_VR_LENGTH = Struct("<HH2sH")  # explicit VR, short form
_LONG = Struct("<I")
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT_VRS = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
     b"ST", b"TM", b"UI", b"UL", b"US")
)  # fmt: skip
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_TRANSFER_SYNTAX = 0x00020010
_IMPLICIT = b"1.2.840.10008.1.2"
# Explicit little endian: native, encapsulated (4.x), RLE. Not big endian (2.2), nor deflated (2.1.99).
_EXPLICIT = (b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.5")
_ENCAPSULATED = b"1.2.840.10008.1.2.4."
_FIRST_BYTES, _MOST_BYTES = 1 << 14, 1 << 20
_DEEPEST = 16  # nested sequences


class Element(NamedTuple):
    """One value as it lies in the file; the names are those of pydicom's raw elements."""

    value: bytes
    is_little_endian: bool = True


class Elements(NamedTuple):
    """Wanted elements of the meta header and of the data set, by tag, and where the first unread one begins."""

    meta: dict[int, bytes]
    data: dict[int, Element]
    end: int


class _NotPlain(Exception):
    """This file is one for pydicom."""


def read_elements(handle: BinaryIO, wanted: frozenset[int], last: int) -> Elements | None:
    """Read the elements of a file up to the tag `last`; None when the file is not plain.

    handle  at any place; left at any other
    wanted  tags whose values are kept
    """
    size = _FIRST_BYTES
    while size <= _MOST_BYTES:
        handle.seek(0)
        buffer = handle.read(size)
        try:
            return _walk_file(buffer, wanted, last, whole=len(buffer) < size)
        except IndexError:  # beyond what was read so far
            if len(buffer) < size:
                return None
            size *= 4
        except _NotPlain:
            return None
    return None


def _walk_file(buffer: bytes, wanted: frozenset[int], last: int, whole: bool) -> Elements:
    if buffer[128:132] != b"DICM":
        raise _NotPlain
    meta, at = _walk(buffer, 132, True, frozenset((0x00020002, 0x00020003, _TRANSFER_SYNTAX)), 0x0002FFFF, False)
    syntax = meta.get(_TRANSFER_SYNTAX, b"").strip(b" \0")
    explicit = syntax in _EXPLICIT or syntax.startswith(_ENCAPSULATED)
    if not explicit and syntax != _IMPLICIT:
        raise _NotPlain
    data, end = _walk(buffer, at, explicit, wanted, last, whole)
    return Elements(meta, {tag: Element(value) for tag, value in data.items()}, end)


def _walk(
    buffer: bytes, at: int, explicit: bool, wanted: frozenset[int], last: int, whole: bool
) -> tuple[dict[int, bytes], int]:
    """Elements from `at` up to the first tag above `last`: those wanted, and where that tag lies.

    whole  the buffer is the whole file, which may end before `last`
    """
    found: dict[int, bytes] = {}
    before = -1
    while not (whole and at == len(buffer)):
        if at + 4 > len(buffer):
            raise IndexError
        group, element = _TAG.unpack_from(buffer, at)
        if group << 16 | element > last:
            break
        tag, start, length = _element(buffer, at, explicit)
        if tag <= before:
            raise _NotPlain
        before = tag
        if length == _UNDEFINED:
            at = _skip_sequence(buffer, start, explicit, 0)
        else:
            at = start + length
            if tag in wanted:
                if at > len(buffer):
                    raise IndexError
                found[tag] = buffer[start:at]
    return found, at


def _element(buffer: bytes, at: int, explicit: bool) -> tuple[int, int, int]:
    """Tag, start of the value, its length. Raises IndexError beyond the buffer."""
    if at + 12 > len(buffer):
        raise IndexError
    if not explicit:
        group, element, length = _TAG_LENGTH.unpack_from(buffer, at)
        return group << 16 | element, at + 8, length
    group, element, vr, length = _TAG_VR_LENGTH.unpack_from(buffer, at)
    if vr in _SHORT_VRS:
        return group << 16 | element, at + 8, length
    if vr not in _LONG_VRS:
        raise _NotPlain
    (length,) = _LONG.unpack_from(buffer, at + 8)
    if length == _UNDEFINED and vr != b"SQ":
        raise _NotPlain
    return group << 16 | element, at + 12, length


def _skip_sequence(buffer: bytes, at: int, explicit: bool, depth: int) -> int:
    """The end of a sequence of undefined length whose first item begins at `at` (PS3.5 7.5)."""
    if depth > _DEEPEST:
        raise _NotPlain
    while True:
        if at + 8 > len(buffer):
            raise IndexError
        group, element, length = _TAG_LENGTH.unpack_from(buffer, at)
        tag, at = group << 16 | element, at + 8
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise _NotPlain
        at = _skip_item(buffer, at, explicit, depth) if length == _UNDEFINED else at + length


def _skip_item(buffer: bytes, at: int, explicit: bool, depth: int) -> int:
    while True:
        if at + 8 > len(buffer):
            raise IndexError
        group, element, _ = _TAG_LENGTH.unpack_from(buffer, at)
        if group << 16 | element == _ITEM_END:
            return at + 8
        _, start, length = _element(buffer, at, explicit)
        at = _skip_sequence(buffer, start, explicit, depth + 1) if length == _UNDEFINED else start + length
