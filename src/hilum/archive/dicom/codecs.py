"""Transfer syntaxes (PS3.5 annex A): their names, which lose information, what decodes them, and the decoding itself."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from hilum.errors import ScanRefused

PIXEL_DATA = 0x7FE00010
MAX_INFLATED = 1 << 30
PLAIN = ("", ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_BOXED = "1.2.840.10008.1.2.1.98"  # encapsulated, yet uncompressed
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
# Syntaxes whose decoder hands out stored words as they are; the others hand out numbers.
WORDS = (*PLAIN, DeflatedExplicitVRLittleEndian, RLELossless, _BOXED, _DEFLATED_FRAMES)

_JPEG = "1.2.840.10008.1.2.4."
LOSSY = frozenset(_JPEG + n for n in ("50", "51", "81", "111", "112"))
MAYBE_LOSSY = frozenset(_JPEG + n for n in ("91", "93", "203"))  # JPEG 2000 without the promise to be lossless
_NAMES = {_DEFLATED_FRAMES: "Deflated Image Frame Compression", **{_JPEG + f"11{n}": "JPEG XL" for n in range(3)}}
_PACKAGES = {
    **dict.fromkeys((_JPEG + n for n in ("50", "51", "57", "70")), "python-gdcm"),
    **dict.fromkeys((_JPEG + n for n in ("80", "81")), "pyjpegls"),
    **dict.fromkeys((_JPEG + n for n in ("90", "91", "201", "202", "203")), "pylibjpeg-openjpeg"),
    RLELossless: "pylibjpeg-rle",
}
_FIRST_CHOICE = {  # faster than gdcm, which pydicom tries first, and strict with streams that are cut short
    **dict.fromkeys((_JPEG + n for n in ("80", "81")), "pyjpegls"),
    **dict.fromkeys((_JPEG + n for n in ("90", "91")), "pylibjpeg"),
}


@cache
def syntax_name(syntax: str) -> str:
    """The registered name of a transfer syntax. Text that is none never passes."""
    if syntax in _NAMES:
        return _NAMES[syntax]
    known = UID(syntax, validation_mode=0) if syntax.replace(".", "").isdigit() else UID("")
    is_known = known.is_valid and not known.is_private and known.is_transfer_syntax
    return known.name if is_known else "unknown transfer syntax"


@cache
def missing_decoder(syntax: str, bits: int) -> str:
    """Why a transfer syntax cannot be decoded here, with the package that would do it; "" when it can.

    bits  BitsStored; pydicom trusts no permissive decoder with JPEG Extended beyond 8
    """
    if syntax in PLAIN or syntax in (_BOXED, _DEFLATED_FRAMES):
        return ""
    if syntax == _JPEG + "51" and bits > 8:
        return f"{syntax_name(syntax)}: no permissive decoder is known for {bits} bits"
    try:
        if get_decoder(syntax).is_available:
            return ""
    except NotImplementedError:
        return f"{syntax_name(syntax)}: no decoder is known for it"
    return f"{syntax_name(syntax)}: needs the package {_PACKAGES.get(syntax, 'of a decoder for it')}"


def decode(data: Dataset, syntax: str, frames: Sequence[int], num_frames: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Decode frames of one file, in the order in which they are stored.

    frames      numbers from 0, ascending, without repeats
    num_frames  in the file
    returns     (frame, stored pixels (Y, X)) in the depth and sign that the file states

    Raises ScanRefused, or what the decoders raise. Without an offset table, every frame is found by going through all
    fragments before it: when more than half of the frames are wanted, all are decoded in one pass instead.
    """
    if missing := missing_decoder(syntax, int(data.get("BitsStored") or 0)):
        raise ScanRefused("cannot_decode", missing)
    if syntax in (_BOXED, _DEFLATED_FRAMES):
        yield from _decode_boxed(data, syntax, frames, num_frames)
        return
    if syntax.startswith(_JPEG):
        _check_streams(data, syntax, num_frames)
    decoder = get_decoder(syntax)
    in_one_pass = decoder.is_encapsulated and num_frames > 1 and len(frames) > num_frames // 2
    choice = _FIRST_CHOICE.get(syntax, "")
    decoded = decoder.iter_array(
        data,
        indices=None if in_one_pass else list(frames),
        raw=True,
        decoding_plugin=choice if choice in decoder.available_plugins else "",
        view_only=True,
        correct_unused_bits=False,
    )
    dtype = stored_dtype(data)
    for frame, (pixels, _) in zip(range(num_frames) if in_one_pass else frames, decoded):
        if not in_one_pass or frame in frames:
            # A decoder may hand out 8 bits where 16 are allocated.
            yield frame, pixels.astype(dtype) if pixels.dtype.itemsize < dtype.itemsize else pixels


def stored_dtype(data: Dataset) -> np.dtype[Any]:
    """The type of stored pixels, by BitsAllocated and PixelRepresentation. Raises ScanRefused."""
    bits, signed = int(data.BitsAllocated), int(data.get("PixelRepresentation") or 0) == 1
    if bits not in (8, 16, 32):
        raise ScanRefused("cannot_decode", f"BitsAllocated {bits}, expected 8, 16 or 32")
    return np.dtype(f"<{'i' if signed else 'u'}{bits // 8}")


def _check_streams(data: Dataset, syntax: str, num_frames: int) -> None:
    """Refuse streams that state another size than the header: decoders reserve whatever memory the stream asks for."""
    wanted = int(data.Rows), int(data.Columns)
    for _, frame in zip(range(num_frames), generate_frames(data.PixelData, number_of_frames=num_frames)):
        found = stream_size(frame)
        if found and found != wanted:
            detail = f"{found[0]}×{found[1]} pixels in the stream, {wanted[0]}×{wanted[1]} in the header"
            raise ScanRefused("cannot_decode", f"{syntax_name(syntax)}: {detail}")


def stream_size(stream: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream states (ISO 10918-1 B.2.2, 15444-1 A.5.1)."""
    try:
        if (at := stream.find(b"\xff\x4f\xff\x51", 0, 4096)) >= 0:
            right, bottom, left, top = struct.unpack_from(">4I", stream, at + 8)
            return bottom - top, right - left
        at = 2 if stream[:2] == b"\xff\xd8" else len(stream)
        while True:
            mark, kind, length = struct.unpack_from(">BBH", stream, at)
            if mark != 0xFF:
                return None
            if kind == 0xF7 or (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)):
                rows, columns = struct.unpack_from(">HH", stream, at + 5)
                return rows, columns
            at += 1 if kind == 0xFF else 2 if 0xD0 <= kind <= 0xD7 or kind == 1 else 2 + length
    except struct.error:  # the stream ends before it states a size; the decoder will say so
        return None


def check_inflation(handle: BinaryIO) -> bytes:
    """Refuse a deflated file (PS3.5 A.5) that unpacks to more than MAX_INFLATED bytes.

    handle   moved to its begin
    returns  the first 1024 bytes
    """
    handle.seek(0)
    head = handle.read(1024)
    handle.seek(0)
    if head[128:132] != b"DICM" or DeflatedExplicitVRLittleEndian.encode() not in head:
        return head
    handle.seek(144 + int.from_bytes(head[140:144], "little"))  # the meta header states its own length
    unpack, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while (packed := unpack.unconsumed_tail or handle.read(1 << 16)) and not unpack.eof:
        total += len(unpack.decompress(packed, 1 << 20))
        if total > MAX_INFLATED:
            raise ScanRefused("too_large", f"more than {MAX_INFLATED} bytes when unpacked")
    handle.seek(0)
    return head


def _decode_boxed(
    data: Dataset, syntax: str, frames: Sequence[int], num_frames: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Frames that lie in fragments, uncompressed (PS3.5 A.4.11) or deflated one by one (PS3.5 A.4.13)."""
    dtype = stored_dtype(data)
    shape = int(data.Rows), int(data.Columns)
    length = shape[0] * shape[1] * dtype.itemsize
    for frame, boxed in enumerate(generate_frames(data.PixelData, number_of_frames=num_frames)):
        if frame in frames:
            content = boxed
            if syntax == _DEFLATED_FRAMES:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(boxed, length)
            if len(content) < length:
                raise ScanRefused("truncated", f"{len(content)} of {length} bytes of pixel data")
            yield frame, np.frombuffer(content[:length], dtype).reshape(shape)
