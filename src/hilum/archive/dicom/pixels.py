"""DICOM pixels: the stored pixels of slices, and the volume that several slices make up."""

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from hilum.archive.dicom.codecs import PIXEL_DATA, PLAIN, WORDS, check_inflation, decode, stored_dtype, syntax_name
from hilum.archive.dicom.geometry import SMALLEST_MM, even_slices, stack
from hilum.archive.dicom.header import BROKEN, HEADER_TAGS, Header, Texts, describe, integer, quiet
from hilum.archive.dicom.slices import quick, slices
from hilum.archive.policy import AS_IS, Policy
from hilum.errors import ScanRefused
from hilum.large import each, empty, gather
from hilum.volume import Volume, straighten, to_slices

SMALLEST_TILT_DEG = 0.1  # below, the sheared affine is a rounding of positions
# and: planar configuration, offset tables, pixels
_SLICE_TAGS = [*HEADER_TAGS, *map(Tag, (0x00280006, 0x7FE00001, 0x7FE00002, PIXEL_DATA))]
_WIDER = [np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.float32)]  # each holds the values of those before
MAX_VOXELS = 1 << 32  # a CT of 2048 × 2048 × 1024; small files may unpack to any size
_AIR_HU, _TISSUE_HU = -1024, (-950, 3071)


def read(paths: Sequence[Path], frames: Sequence[int] = (), policy: Policy = AS_IS) -> tuple[Volume, tuple[str, ...]]:
    """Read the slices of one volume, in any order. Raises ScanRefused.

    frames   for each path the frame in it; () when every file is one slice
    returns  a volume as `hilum.volume.to_slices` leaves it (CT in HU, MR as stored or rescaled per slice); the repairs
             that the pixels needed

    Voxels are int16 when every slice has slope 1 and whole values that fit (CT nearly always), else float32. Each file
    is opened once. Of the three kinds of values of a Philips MR (stored; displayed, by RescaleSlope; precise, by private
    attributes) these are the displayed ones.
    """
    places: dict[Path, dict[int, int]] = {}  # of each file: frame → slice of the volume
    for n, path in enumerate(paths):
        places.setdefault(path, {})[frames[n] if frames else 0] = n
    headers: dict[int, Header] = {}
    voxels: NDArray[Any] | None = None
    notes: set[str] = set()
    num_padded = 0
    for path, wanted in places.items():
        with closing(_read_file(path, sorted(wanted))) as found:
            for header, pixels, note, padded in found:
                _check_alike(header, next(iter(headers.values()), header), len(paths))
                n = wanted[header.frame]
                headers[n] = header
                notes |= {note} if note else set()
                num_padded += int(padded.sum()) if padded is not None else 0
                voxels = _put(voxels, n, _rescale(pixels, header, padded), len(paths))
    if voxels is None or len(headers) < len(paths):
        raise ScanRefused("no_geometry", f"{len(headers)} of {len(paths)} slices found")
    if num_padded:
        notes.add(f"{num_padded} padding pixels set to {_AIR_HU} HU")
    vol, repairs = _volume([headers[n] for n in range(len(paths))], voxels, policy)
    return vol, tuple(sorted(notes | repairs))


def read_lone(path: Path) -> Volume:
    """One slice alone, as a volume (1, Y, X) turned as `read` does. Raises ScanRefused.

    Where the file states no SliceThickness the affine takes 1 mm, which within the slice changes nothing.
    """
    with closing(_read_file(path, [0])) as found:
        header, pixels, _, padded = next(found)
    header = with_thickness(header)
    return _volume([header], _rescale(pixels, header, padded)[None], AS_IS)[0]


def with_thickness(header: Header) -> Header:
    """The header of a lone slice; 1 mm where it states no SliceThickness."""
    return header if header.thickness >= SMALLEST_MM else replace(header, thickness=1.0)


def _put(voxels: NDArray[Any] | None, n: int, plane: NDArray[Any], num_slices: int) -> NDArray[Any]:
    """Voxels with slice `n` filled in: made with the first slice, made anew when one needs a wider type."""
    if voxels is None:
        voxels = empty((num_slices, *plane.shape), plane.dtype)
    elif _WIDER.index(plane.dtype) > _WIDER.index(voxels.dtype):
        voxels = gather(each(voxels), voxels.shape, plane.dtype)
    for place in each(voxels, [n]):
        place[:] = plane
    return voxels


def _check_alike(header: Header, first: Header, num_slices: int) -> None:
    if (header.rows, header.columns, header.modality) != (first.rows, first.columns, first.modality):
        raise ScanRefused("no_geometry", "slices of several sizes or modalities")
    if header.rows * header.columns * num_slices > MAX_VOXELS:
        raise ScanRefused("too_large", f"{num_slices}×{header.rows}×{header.columns}")


def _volume(headers: list[Header], voxels: NDArray[Any], policy: Policy) -> tuple[Volume, set[str]]:
    """Slices (Z, Y, X) in the order of their headers, as one box; and what had to be done for it."""
    repairs = set()
    found = stack(headers, policy)
    if found.order != tuple(range(len(headers))):
        voxels = gather(each(voxels, found.order), voxels.shape, voxels.dtype)
    if found.at:
        voxels, made = even_slices(voxels, found.at)
        repairs.add(f"{made} of {len(voxels)} slices interpolated")
    ends = [(plane.min(), plane.max()) for plane in each(voxels)]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    if low == high:
        raise ScanRefused("constant", f"all voxels {float(low):g}")
    if voxels.dtype == np.int32:
        fitting = np.int16 if low >= -32768 and high <= 32767 else np.float32
        voxels = gather(each(voxels), voxels.shape, fitting)
    modality = headers[0].modality
    vol = Volume(voxels=voxels, affine=found.affine, modality=modality, unit="HU" if modality == "CT" else "")
    if policy.resample_tilt and vol.shear_deg > SMALLEST_TILT_DEG:
        repairs.add(f"tilt of {vol.shear_deg:.2f} degrees resampled to a right-angled box")
        vol = straighten(vol, fill=_AIR_HU if vol.unit == "HU" else float(vol.voxels.min()))
    return to_slices(vol, through=0), repairs


def _rescale(pixels: NDArray[Any], header: Header, padded: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Stored pixels → values, by the slope and intercept of this slice; int16, int32 or float32. Padding becomes air."""
    slope = 1.0 if header.slope is None else header.slope
    intercept = header.intercept or 0.0
    short = padded is None and pixels.dtype.itemsize == 2 and slope == 1.0 and intercept == round(intercept)
    if short and _within(pixels, -32768 - int(intercept), 32767 - int(intercept)):
        # The sums fit, so those of 16 bits are right whatever overflows on the way.
        bits = pixels.astype(pixels.dtype.newbyteorder("="), copy=False).view(np.uint16)
        return (bits + np.uint16(int(intercept) & 0xFFFF)).view(np.int16)
    if slope != 1.0 or intercept != round(intercept) or abs(intercept) > 1 << 30 or pixels.dtype.itemsize > 2:
        values: NDArray[Any] = (pixels * slope + intercept).astype(np.float32)
    else:
        values = pixels.astype(np.int32) + int(intercept)
    if padded is not None:
        values[padded] = _AIR_HU
    if values.dtype == np.int32 and values.min() >= -32768 and values.max() <= 32767:
        return values.astype(np.int16)
    return values


def _within(pixels: NDArray[Any], low: int, high: int) -> bool:
    return low <= int(pixels.min()) and int(pixels.max()) <= high


def read_slice(path: Path, frame: int = 0) -> tuple[Header, NDArray[Any], str]:
    """One slice: its header and its stored pixels, before rescaling. Raises ScanRefused.

    frame    number of the frame or tile in the file
    returns  header; (Y, X) integers of the file's own depth and sign; a note when unused high bits had to be cleared

    Bits outside BitsStored may hold an old overlay (PS3.5 8.1.1) and are cleared.
    """
    with closing(_read_file(path, [frame])) as found:
        header, pixels, note, _ = next(found)
    return header, pixels, note


_Slice = tuple[Header, NDArray[Any], str, NDArray[np.bool_] | None]


def _read_file(path: Path, wanted: Sequence[int]) -> Generator[_Slice, None, None]:
    """Slices of one file, by number (ascending): header, stored pixels, note, where padding lies (None: nowhere)."""
    name = "unknown transfer syntax"
    try:
        with quiet(), open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if list(wanted) == [0] and (plain := _read_plain(handle, path, size)) is not None:
                yield plain
                return
            check_inflation(handle)
            data = dcmread(handle, specific_tags=_SLICE_TAGS, force=True)
            found = {h.frame: h for h in slices(data, handle, path, size, forced=not data.preamble)}
            headers = [found.get(n) or found[0] for n in wanted]
            if refused := next((h for h in headers if h.refusal), None):
                raise ScanRefused(refused.refusal, refused.detail)
            if [h.frame for h in headers] != list(wanted):
                raise ScanRefused("no_geometry", f"{len(found)} slices in the file, number {max(wanted) + 1} asked for")
            if PIXEL_DATA not in data:
                raise ScanRefused("truncated", "no pixel data")
            syntax = data.file_meta.get("TransferSyntaxUID") or _guess_syntax(data)
            name = syntax_name(syntax)
            yield from _cut_out(data, syntax, headers)
    except (PermissionError, FileNotFoundError) as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except BROKEN as error:
        raise ScanRefused("cannot_decode", f"{name} ({type(error).__name__})") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of decoders written in Rust; it is no Exception
            raise
        raise ScanRefused("cannot_decode", f"{name} (the decoder gave up)") from None


def _read_plain(handle: BinaryIO, path: Path, size: int) -> _Slice | None:
    """An uncompressed slice whose pixels are the last element of its file; None for any other.

    Whether they are is seen from the element's own tag and length, which must lie just before the last bytes.
    """
    text = quick(handle)
    if text is None or text.syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        return None
    header = describe(text, path, size, forced=False)
    if header.refusal or header.bits_allocated not in (8, 16):
        return None
    dtype = np.dtype(f"<{'i' if text['PixelRepresentation'] == '1' else 'u'}{header.bits_allocated // 8}")
    length = header.rows * header.columns * dtype.itemsize
    begin = size - length - length % 2
    explicit = text.syntax == ExplicitVRLittleEndian
    handle.seek(max(begin - (12 if explicit else 8), 0))
    buffer = handle.read()
    starts = [b"\xe0\x7f\x10\0" + vr for vr in ((b"OW\0\0", b"OB\0\0") if explicit else (b"",))]
    start = 12 if explicit else 8
    if not any(buffer[:start] == s + (length + length % 2).to_bytes(4, "little") for s in starts):
        return None
    stored = np.frombuffer(buffer, dtype, header.rows * header.columns, start).reshape(header.rows, header.columns)
    return _finish(stored, header, text, words=True)


def _cut_out(data: Dataset, syntax: str, headers: list[Header]) -> Generator[_Slice, None, None]:
    """Decode the frames that slices are, or are tiles of."""
    text = Texts(data)
    num_frames = integer(text["NumberOfFrames"] or "1")
    _check_length(data, syntax, num_frames)
    by_frame = {0: headers} if headers[0].corner else {h.frame: [h] for h in headers}
    shape = int(data.Rows), int(data.Columns)
    for frame, stored in decode(data, syntax, list(by_frame), num_frames):
        if stored.shape != shape:
            raise ScanRefused("cannot_decode", f"{stored.ndim} axes decoded, expected rows and columns")
        first, pixels, note, padded = _finish(stored, by_frame[frame][0], text, words=syntax in WORDS)
        if not first.corner:
            yield first, pixels, note, padded
            continue
        for header in by_frame[frame]:
            top, left = header.corner
            yield header, pixels[top : top + header.rows, left : left + header.columns], note, None


def _finish(stored: NDArray[Any], header: Header, text: Texts, *, words: bool) -> _Slice:
    """Decoded pixels (Y, X) → pixels that can be rescaled."""
    padded = _padding(stored, header, text)  # before bits are cleared: padding may use all of them
    pixels, note = _clear_unused_bits(stored, text, words=words)
    if header.modality == "MR" and text["PhotometricInterpretation"] == "MONOCHROME1":
        pixels = _invert(pixels, integer(text["BitsStored"]))
    return header, pixels, note, padded


def _padding(pixels: NDArray[Any], header: Header, text: Texts) -> NDArray[np.bool_] | None:
    """Where a CT has no image (PS3.3 C.7.5.1.1.2), from stored pixels; None when nowhere.

    A padding value that would be tissue in HU hides nothing that could be told apart, and is left alone.
    """
    given = [text[k] for k in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if header.modality != "CT" or not given[0]:
        return None
    # The sign that these attributes claim is often wrong; their bits are right.
    values = [int(np.uint16(integer(v) & 0xFFFF).astype(pixels.dtype)) for v in given if v]
    ends = sorted((header.slope or 1.0) * v + (header.intercept or 0.0) for v in (min(values), max(values)))
    if ends[0] <= _TISSUE_HU[1] and ends[1] >= _TISSUE_HU[0]:
        return None
    padded = pixels == values[0] if len(values) == 1 else (pixels >= min(values)) & (pixels <= max(values))
    return padded if padded.any() else None


def _invert(pixels: NDArray[Any], stored: int) -> NDArray[Any]:
    """The highest value that BitsStored can hold becomes the lowest, and so on."""
    signed = np.issubdtype(pixels.dtype, np.signedinteger)
    inverted: NDArray[Any] = ~pixels if signed else pixels.dtype.type((1 << stored) - 1) - pixels
    return inverted


def _guess_syntax(data: Dataset) -> UID:
    """A file without meta header is in one of the three plain syntaxes; pydicom has found out which."""
    implicit, little = data.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _check_length(data: Dataset, syntax: str, num_frames: int) -> None:
    if syntax not in PLAIN:
        return
    expected = int(data.Rows) * int(data.Columns) * stored_dtype(data).itemsize * num_frames
    found = len(data.get_item(PIXEL_DATA).value or b"")
    if found < expected:
        raise ScanRefused("truncated", f"{found} of {expected} bytes of pixel data")
    if found > expected + expected % 2:
        raise ScanRefused("corrupt", f"{found} bytes of pixel data, expected {expected} by rows and columns")


def _clear_unused_bits(pixels: NDArray[Any], text: Texts, *, words: bool) -> tuple[NDArray[Any], str]:
    """Keep the BitsStored bits that end at HighBit, with their sign.

    words  the decoder hands out stored words as they are; else it hands out numbers, which must fit already
    """
    allocated, stored = pixels.dtype.itemsize * 8, integer(text["BitsStored"])
    high = integer(text["HighBit"]) if text["HighBit"] else stored - 1
    if not 0 < stored <= high + 1 <= allocated:
        raise ScanRefused("cannot_decode", f"BitsStored {stored}, HighBit {high}, {allocated} bits decoded")
    if stored == allocated:
        return pixels, ""
    low = -(1 << (stored - 1)) if np.issubdtype(pixels.dtype, np.signedinteger) else 0
    fits = _within(pixels, low, low + (1 << stored) - 1)
    if not words and not fits:
        raise ScanRefused("cannot_decode", f"decoded values exceed BitsStored {stored}")
    if not words or (fits and high == stored - 1):
        return pixels, ""
    cleared: NDArray[Any] = (pixels << (allocated - 1 - high)) >> (allocated - stored)
    changed = high == stored - 1 and bool((cleared != pixels).any())
    return cleared, "bits outside BitsStored cleared" if changed else ""
