"""Multi-frame objects that are no scans (SEG, parametric map): where each frame lies, and its stored pixels."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from hilum.archive.dicom.codecs import PLAIN
from hilum.archive.dicom.header import BROKEN, Header, quiet
from hilum.errors import ScanRefused

MAX_VOXELS = 1 << 30  # of one object; compressed frames of one value make this cheap to claim
_LITTLE_ENDIAN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
_SANE = 1e7  # no position or spacing is larger; NaN fails the comparison, too


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Whatever a broken file makes pydicom raise becomes a refusal."""
    try:
        with quiet():
            yield
    except (PermissionError, FileNotFoundError) as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except BROKEN as error:
        raise ScanRefused("corrupt", f"{what} ({type(error).__name__})") from None


def read_object(path: Path, sop_classes: tuple[str, ...]) -> Dataset:
    """A whole DICOM object of one of these SOP classes. Raises ScanRefused."""
    with parsing("DICOM object"):
        data: Dataset = dcmread(path, force=True)
        sop_class = UID(str(data.get("SOPClassUID", "")))
    if sop_class not in sop_classes:
        raise ScanRefused("other_object", sop_class.name if sop_class.name != sop_class else "unknown SOP class")
    return data


def group(data: Dataset, frame: int, keyword: str) -> Dataset | None:
    """The only item of a functional group for a frame: its own, else the shared one (PS3.3 C.7.6.16.1)."""
    for groups in (data.PerFrameFunctionalGroupsSequence[frame], *data.get("SharedFunctionalGroupsSequence", [])[:1]):
        if items := groups.get(keyword):
            if len(items) > 1:
                raise ScanRefused("other_format", f"{len(items)} items in {keyword}")
            item: Dataset = items[0]
            return item
    return None


def frame_headers(data: Dataset, path: Path) -> list[Header]:
    """Each frame as a slice of its own, in the order of the file, with position, orientation and spacing.

    Raises ScanRefused when a frame does not say where it lies: the order of frames never does.
    """
    with parsing("functional groups"):
        rows, columns = int(data.Rows), int(data.Columns)
        num_frames = int(data.get("NumberOfFrames", 1) or 1)
        described = len(data.get("PerFrameFunctionalGroupsSequence", []))
        if num_frames != described:
            raise ScanRefused("corrupt", f"{num_frames} frames, {described} of them described")
        if min(rows, columns) < 1:
            raise ScanRefused("corrupt", "frames without pixels")
        if num_frames * rows * columns > MAX_VOXELS:
            raise ScanRefused("too_large", f"{num_frames}×{rows}×{columns}")
        return [
            Header(
                path=path,
                size=0,
                rows=rows,
                columns=columns,
                position=_numbers(data, n, "PlanePositionSequence", "ImagePositionPatient", 3),
                orientation=_numbers(data, n, "PlaneOrientationSequence", "ImageOrientationPatient", 6),
                pixel_spacing=_numbers(data, n, "PixelMeasuresSequence", "PixelSpacing", 2),
                thickness=sum(_numbers(data, n, "PixelMeasuresSequence", "SliceThickness", 1)),
            )
            for n in range(num_frames)
        ]


def _numbers(data: Dataset, frame: int, sequence: str, keyword: str, wanted: int) -> tuple[float, ...]:
    """`wanted` sane numbers, or ()."""
    item = group(data, frame, sequence)
    value = item.get(keyword) if item is not None else None
    if value is None:
        return ()
    values = tuple(float(v) for v in (value if wanted > 1 else [value]))
    return values if len(values) == wanted and all(abs(v) <= _SANE for v in values) else ()


def frames(data: Dataset) -> Iterator[NDArray[Any]]:
    """The stored pixels of each frame (rows, columns), in the order of the file. Raises ScanRefused.

    Only one frame is decoded at a time. One bit per pixel becomes 0 and 1.
    """
    with parsing("pixel description"):
        syntax = UID(str(data.file_meta.get("TransferSyntaxUID", "")))
        name = syntax.name if syntax.is_transfer_syntax and not syntax.is_private else "unknown transfer syntax"
        shape = int(data.Rows), int(data.Columns)
        _check_length(data, syntax)
        stream = _decode(data, syntax)
    for _ in range(int(data.get("NumberOfFrames", 1) or 1)):
        try:
            with quiet():
                frame = next(stream, None)
        except BROKEN as error:
            raise ScanRefused("cannot_decode", f"{name} ({type(error).__name__})") from None
        if frame is None or frame.shape != shape:
            raise ScanRefused("cannot_decode", f"{name}: fewer or other frames than described")
        yield frame


def _check_length(data: Dataset, syntax: UID) -> None:
    """Uncompressed pixels must be there, all of them."""
    keyword = next((k for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if k in data), "")
    if not keyword:
        raise ScanRefused("truncated", "no pixel data")
    bits = int(data.get("NumberOfFrames", 1) or 1) * int(data.Rows) * int(data.Columns) * int(data.BitsAllocated)
    found = len(data[keyword].value or b"")
    if syntax in (*PLAIN, DeflatedExplicitVRLittleEndian) and found < -(-bits // 8):
        raise ScanRefused("truncated", f"{found} of {-(-bits // 8)} bytes of pixel data")


def _decode(data: Dataset, syntax: UID) -> Iterator[NDArray[Any]]:
    rows, columns, one_bit = int(data.Rows), int(data.Columns), int(data.BitsAllocated) == 1
    num_frames = int(data.get("NumberOfFrames", 1) or 1)
    if one_bit and syntax in _LITTLE_ENDIAN:
        # pydicom 3.0.2 fails on some frames that begin within a byte (an odd number of pixels) when it goes through them.
        for first in range(0, num_frames * rows * columns, rows * columns):
            yield packed_bits(data.PixelData, first, rows * columns).reshape(rows, columns)
    elif one_bit and syntax == RLELossless:
        # pydicom and pylibjpeg refuse this combination, and gdcm ends the whole process.
        for packed in generate_frames(data.PixelData, number_of_frames=num_frames):
            yield rle_bits(packed, rows * columns).reshape(rows, columns)
    else:
        for frame, _ in get_decoder(syntax).iter_array(data, raw=True):
            yield frame


def packed_bits(pixels: bytes, first: int, num_pixels: int) -> NDArray[np.uint8]:
    """One bit per pixel → 0 and 1 (num_pixels,), from pixel `first` on; the first pixel is the lowest bit (PS3.5 8.1.1)."""
    part = np.frombuffer(pixels, np.uint8)[first // 8 : -(-(first + num_pixels) // 8)]
    return np.unpackbits(part, bitorder="little")[first % 8 : first % 8 + num_pixels]


def rle_bits(frame: bytes, num_pixels: int) -> NDArray[np.uint8]:
    """One RLE frame with one bit per pixel → 0 and 1 (num_pixels,). Raises ValueError when it is no such frame.

    The bits are packed as in `packed_bits` and then run-length encoded as bytes (PS3.5 8.2.2, G.3).
    Older writers spent one byte per pixel; the decoded length tells which.
    """
    num_segments, start = struct.unpack("<2L", frame[:8])
    if num_segments != 1 or start < 64:
        raise ValueError("expected one segment")
    out = bytearray()
    at = start
    while at + 1 < len(frame) and len(out) < num_pixels:
        control = frame[at]
        if control < 128:
            out += frame[at + 1 : at + 2 + control]
            at += 2 + control
        elif control > 128:
            out += frame[at + 1 : at + 2] * (257 - control)
            at += 2
        else:
            at += 1
    decoded = np.frombuffer(bytes(out[:num_pixels]), np.uint8)
    if len(decoded) < num_pixels:
        if len(decoded) < -(-num_pixels // 8):
            raise ValueError("the segment ends before its frame does")
        return packed_bits(decoded.tobytes(), 0, num_pixels)
    if decoded.max() > 1:
        raise ValueError("values above 1 in one bit")
    return decoded
