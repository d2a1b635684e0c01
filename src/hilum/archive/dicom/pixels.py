"""DICOM pixels: one stored image, and the volume that several make up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from hilum.archive.dicom.geometry import even_slices, stack
from hilum.archive.dicom.header import BROKEN, PLAIN, SLICE_TAGS, WORDS, Header, describe, quiet
from hilum.archive.policy import AS_IS, Policy
from hilum.errors import ScanRefused
from hilum.volume import Volume, straighten, to_slices

_PIXEL_DATA = 0x7FE00010
SMALLEST_TILT_DEG = 0.1  # below, the sheared affine is a rounding of positions
_WIDER = [np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.float32)]  # each holds the values of those before


def read(paths: Sequence[Path], frames: Sequence[int] = (), policy: Policy = AS_IS) -> tuple[Volume, tuple[str, ...]]:
    """Read the slices of one volume, in any order. Raises ScanRefused.

    frames   for each path the frame in it; () when every file is one slice
    returns  a volume as `hilum.volume.to_slices` leaves it (CT in HU, MR as stored or rescaled per slice); the repairs
             that the pixels needed

    Voxels are int16 when every slice has slope 1 and whole values that fit (CT nearly always), else float32.
    """
    headers: list[Header] = []
    voxels: NDArray[Any] | None = None
    notes: set[str] = set()
    for n, path in enumerate(paths):
        header, pixels, note = read_slice(path)
        if headers and (header.rows, header.columns, header.modality) != (
            headers[0].rows, headers[0].columns, headers[0].modality
        ):  # fmt: skip
            raise ScanRefused("no_geometry", "slices of several sizes or modalities")
        headers.append(header)
        notes |= {note} if note else set()
        plane = _rescale(pixels, header)
        if voxels is None:
            voxels = np.empty((len(paths), *plane.shape), plane.dtype)
        elif _WIDER.index(plane.dtype) > _WIDER.index(voxels.dtype):
            voxels = voxels.astype(plane.dtype)
        voxels[n] = plane
    if voxels is None:
        raise ScanRefused("no_geometry", "no files")
    found = stack(headers, policy)
    if found.order != tuple(range(len(headers))):
        voxels = voxels[list(found.order)]
    if found.at:
        voxels, made = even_slices(voxels, found.at)
        notes.add(f"{made} of {len(voxels)} slices interpolated")
    low, high = voxels.min(), voxels.max()
    if low == high:
        raise ScanRefused("constant", f"all voxels {float(low):g}")
    if voxels.dtype == np.int32:
        voxels = voxels.astype(np.int16 if low >= -32768 and high <= 32767 else np.float32)
    modality = headers[0].modality
    vol = Volume(voxels=voxels, affine=found.affine, modality=modality, unit="HU" if modality == "CT" else "")
    if policy.resample_tilt and vol.shear_deg > SMALLEST_TILT_DEG:
        notes.add(f"tilt of {vol.shear_deg:.2f} degrees resampled to a right-angled box")
        vol = straighten(vol, fill=-1024.0 if vol.unit == "HU" else float(vol.voxels.min()))
    return to_slices(vol, through=0), tuple(sorted(notes))


def _rescale(pixels: NDArray[Any], header: Header) -> NDArray[Any]:
    """Stored pixels → values, by the slope and intercept of this slice; int16, int32 or float32."""
    slope = 1.0 if header.slope is None else header.slope
    intercept = header.intercept or 0.0
    if slope != 1.0 or intercept != round(intercept) or abs(intercept) > 1 << 30 or pixels.dtype.itemsize > 2:
        return (pixels * slope + intercept).astype(np.float32)
    shift = int(intercept)
    fits = int(pixels.min()) + shift >= -32768 and int(pixels.max()) + shift <= 32767
    return (pixels.astype(np.int32) + shift).astype(np.int16 if fits else np.int32)


def read_slice(path: Path) -> tuple[Header, NDArray[Any], str]:
    """One slice: its header and its stored pixels, before rescaling. Raises ScanRefused.

    returns  header; (Y, X) integers of the file's own depth and sign; a note when unused high bits had to be cleared

    Bits outside BitsStored may hold an old overlay (PS3.5 8.1.1) and are cleared.
    """
    name = "unknown transfer syntax"
    try:
        with quiet():
            data = dcmread(path, specific_tags=SLICE_TAGS, force=True)
            header = describe(data, path, path.stat().st_size, forced=not data.preamble)
            if header.refusal:
                raise ScanRefused(header.refusal, header.detail)
            if _PIXEL_DATA not in data:
                raise ScanRefused("truncated", "no pixel data")
            syntax = data.file_meta.get("TransferSyntaxUID") or _guess_syntax(data)
            name = UID(syntax).name
            _check_length(data, syntax)
            pixels, _ = get_decoder(syntax).as_array(data, raw=True, view_only=True, correct_unused_bits=False)
    except (PermissionError, FileNotFoundError) as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except BROKEN as error:
        raise ScanRefused("cannot_decode", f"{name} ({type(error).__name__})") from None
    if pixels.ndim != 2:
        raise ScanRefused("cannot_decode", f"{name}: {pixels.ndim} axes decoded, expected rows and columns")
    return header, *_clear_unused_bits(pixels, data, words=syntax in WORDS)


def _guess_syntax(data: Dataset) -> UID:
    """A file without meta header is in one of the three plain syntaxes; pydicom has found out which."""
    implicit, little = data.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _check_length(data: Dataset, syntax: str) -> None:
    if syntax not in PLAIN:
        return
    expected = int(data.Rows) * int(data.Columns) * int(data.BitsAllocated) // 8
    found = len(data.get_item(_PIXEL_DATA).value or b"")
    if found < expected:
        raise ScanRefused("truncated", f"{found} of {expected} bytes of pixel data")


def _clear_unused_bits(pixels: NDArray[Any], data: Dataset, *, words: bool) -> tuple[NDArray[Any], str]:
    """Keep the BitsStored bits that end at HighBit, with their sign.

    words  the decoder hands out stored words as they are; else it hands out numbers, which must fit already
    """
    allocated, stored = pixels.dtype.itemsize * 8, int(data.BitsStored)
    high = int(data.get("HighBit", stored - 1))
    if not 0 < stored <= high + 1 <= allocated:
        raise ScanRefused("cannot_decode", f"BitsStored {stored}, HighBit {high}, {allocated} bits decoded")
    if stored == allocated:
        return pixels, ""
    if not words:
        low = -(1 << (stored - 1)) if np.issubdtype(pixels.dtype, np.signedinteger) else 0
        if pixels.min() < low or pixels.max() >= low + (1 << stored):
            raise ScanRefused("cannot_decode", f"decoded values exceed BitsStored {stored}")
        return pixels, ""
    cleared = (pixels << (allocated - 1 - high)) >> (allocated - stored)
    changed = high == stored - 1 and bool((cleared != pixels).any())
    return cleared, "bits outside BitsStored cleared" if changed else ""
