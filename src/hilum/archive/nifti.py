"""NIfTI files: the only place where RAS exists.

A NIfTI header does not say whether its voxels are an image or class numbers, nor whether it is CT or MR. Both are
decided by stated rules from the values (`is_label_map`, `looks_like_hu`), and the second is recorded as a guess.
"""

import gzip
import logging
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from hilum.errors import ScanRefused
from hilum.volume import FloatArray, Volume, to_slices

logging.getLogger("nibabel").setLevel(logging.CRITICAL)  # its complaints arrive as reasons

# What nibabel, gzip and numpy raise on broken files. A gzip stream that is cut off ends in EOFError or zlib.error.
_CUT_OFF = (EOFError, zlib.error, OSError)
_BROKEN = (
    ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError, struct.error, ValueError, TypeError,
    LookupError, ArithmeticError, MemoryError,
)  # fmt: skip

MAX_BYTES = 1 << 34
LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: metre, millimetre, micrometre; unknown counts as mm
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class NiftiHeader:
    """What the header says: shape (k, j, i), affine (k, j, i, 1) → LPS mm, and whether it calls itself labels."""

    shape: tuple[int, int, int]
    affine: FloatArray
    labels: bool


def looks_like_nifti(head: bytes) -> bool:
    """Whether a file that begins with these bytes (352 or more, gzip allowed) is a one-file NIfTI-1 or NIfTI-2."""
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 352)
        except zlib.error:
            return False
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def _open(path: Path) -> BinaryIO:
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        return cast(BinaryIO, gzip.open(path, "rb") if packed else open(path, "rb"))
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None


def _load(handle: BinaryIO) -> Any:
    """The nibabel image behind an open file; voxels unread. Raises what nibabel raises."""
    magic = handle.read(352)
    handle.seek(0)
    kind = nib.Nifti2Image if magic[4:8] == b"n+2\0" else nib.Nifti1Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_stream(handle)


def read_header(path: Path) -> NiftiHeader:
    """Shape and geometry, without the voxels. Raises ScanRefused."""
    with _open(path) as handle:
        try:
            return _describe(_load(handle))
        except _CUT_OFF as error:
            raise ScanRefused("truncated", f"NIfTI header ({type(error).__name__})") from None
        except _BROKEN as error:
            raise ScanRefused("corrupt", f"NIfTI header ({type(error).__name__})") from None


def _describe(image: Any) -> NiftiHeader:
    header = image.header
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape += (1,) * (3 - len(shape))
    dtype = header.get_data_dtype()
    if dtype.names:
        raise ScanRefused("colour", "RGB voxels")
    if dtype.kind == "c":
        raise ScanRefused("other_format", "complex voxels")
    if len(shape) > 3:
        raise ScanRefused("not_3d", "×".join(str(n) for n in shape))
    if min(shape) < 1:
        raise ScanRefused("corrupt", "an axis without voxels")
    if np.prod(shape, dtype=float) * dtype.itemsize > MAX_BYTES:
        raise ScanRefused("too_large", "×".join(str(n) for n in shape))
    if not int(header["qform_code"]) and not int(header["sform_code"]):
        raise ScanRefused("no_geometry", "neither qform nor sform is set")
    affine = _LPS_FROM_RAS @ np.asarray(image.affine, float)[:, [2, 1, 0, 3]]
    affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanRefused("no_geometry", "the affine is singular or not finite")
    i, j, k = shape
    return NiftiHeader((k, j, i), affine, int(header["intent_code"]) == LABEL_INTENT)


def read(path: Path) -> tuple[Volume, tuple[str, ...]]:
    """Read one NIfTI file. Raises ScanRefused, also for label maps.

    returns  a volume as `hilum.volume.to_slices` leaves it; modality "CT" with unit HU when the values prove it, else
             "OT"; no repairs

    Voxels are int16 when all values are whole and fit, else float32.
    """
    header, voxels = _read_voxels(path)
    if voxels.min() == voxels.max():
        raise ScanRefused("constant", f"all voxels {float(voxels.flat[0]):g}")
    if header.labels or is_label_map(voxels):
        raise ScanRefused("label_map", "by its intent code" if header.labels else "by its values")
    compact = _compact(voxels)
    ct = looks_like_hu(compact)
    vol = Volume(voxels=compact, affine=header.affine, modality="CT" if ct else "OT", unit="HU" if ct else "")
    return to_slices(vol), ()


def read_label(path: Path) -> Volume:
    """Read a label map: class numbers on a grid, turned as `to_slices` turns the scan it belongs to.

    Raises ScanRefused `corrupt` when the values are no whole numbers in 0…65535.
    """
    header, voxels = _read_voxels(path)
    numbers = np.ascontiguousarray(voxels, np.int32)
    if (numbers != voxels).any() or numbers.min() < 0 or numbers.max() > 65535:
        raise ScanRefused("corrupt", "expected a label map: whole numbers from 0 to 65535")
    return to_slices(Volume(voxels=numbers, affine=header.affine, modality="OT", kind="label"))


def write(
    path: Path, stored: NDArray[np.int16], affine: FloatArray | None, slope: float, intercept: float, *, packed: bool
) -> None:
    """Write stored numbers as a NIfTI; equal voxels give equal bytes.

    stored   (Z, Y, X); slope and intercept of `value = stored · slope + intercept` go into scl_slope and scl_inter
    affine   (k, j, i, 1) → LPS mm; None leaves both qform_code and sform_code 0
    packed   gzip, level 1

    NIfTI-1 keeps the affine in single precision, in RAS; the qform is left out when it cannot say the same (shear). An
    axis above 32,767 voxels makes it NIfTI-2.
    """
    kind = nib.Nifti1Image if max(stored.shape) < 1 << 15 else nib.Nifti2Image
    ras = np.eye(4) if affine is None else _LPS_FROM_RAS @ affine[:, [2, 1, 0, 3]]
    image = kind(stored.T, ras)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, intercept)
    image.set_sform(ras, 0 if affine is None else 1)
    image.set_qform(ras, 0 if affine is None else 1, strip_shears=True)
    if not np.allclose(image.get_qform(), ras, rtol=1e-4, atol=1e-3):
        image.set_qform(None, 0)
    with open(path, "wb") as plain:
        if not packed:
            image.to_stream(plain)
            return
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=plain, mtime=0) as stream:
            image.to_stream(stream)


def _read_voxels(path: Path) -> tuple[NiftiHeader, NDArray[Any]]:
    """Header and voxels (Z, Y, X), all finite."""
    with _open(path) as handle:
        try:
            image = _load(handle)
            header = _describe(image)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                voxels = np.asanyarray(image.dataobj).reshape(header.shape[::-1]).T
        except _CUT_OFF as error:
            raise ScanRefused("truncated", f"NIfTI voxels ({type(error).__name__})") from None
        except _BROKEN as error:
            raise ScanRefused("corrupt", f"NIfTI voxels ({type(error).__name__})") from None
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ScanRefused("non_finite", f"{int((~np.isfinite(voxels)).sum())} of {voxels.size} voxels")
    if max(abs(float(voxels.min())), abs(float(voxels.max()))) > float(np.finfo(np.float32).max):
        raise ScanRefused("non_finite", "values beyond single precision")
    return header, voxels


def _compact(voxels: NDArray[Any]) -> NDArray[Any]:
    """The same values as int16 when whole and within its range, else float32; contiguous, native byte order."""
    if voxels.min() >= -32768 and voxels.max() <= 32767:
        small = np.ascontiguousarray(voxels, np.int16)
        if voxels.dtype.kind in "iub" or (small == voxels).all():
            return small
    return np.ascontiguousarray(voxels, np.float32)


def is_label_map(voxels: NDArray[Any]) -> bool:
    """Whether voxels are class numbers rather than intensities.

    They are when all are whole numbers in 0…65535, and either there are at most 8 different ones, or at most 512 and
    they form plateaus: among neighbours along any axis of which at least one is not 0, 30 % or more are equal. Label
    maps at hand reach 49 % and more (the smallest structures the least), images at most 12 %.
    """
    if voxels.min() < 0 or voxels.max() > 65535:
        return False
    seen = np.zeros(65536, bool)
    numbers = np.empty(voxels.shape, np.uint16)
    for plane, whole in zip(voxels, numbers):
        whole[...] = plane
        seen[whole] = True
        if (voxels.dtype.kind == "f" and (whole != plane).any()) or np.count_nonzero(seen) > 512:
            return False
    if np.count_nonzero(seen) <= 8:
        return True
    equal = counted = 0
    for axis in range(3):
        turned = np.moveaxis(numbers, axis, 0)
        either = (turned[1:] != 0) | (turned[:-1] != 0)
        equal += int(((turned[1:] == turned[:-1]) & either).sum())
        counted += int(either.sum())
    return equal >= 0.3 * counted


def looks_like_hu(voxels: NDArray[Any]) -> bool:
    """Whether voxels are surely Hounsfield units: whole numbers, air and soft tissue both present, little else.

    Air is at or below −900, soft tissue, fat and water within ±200: each must make up 5 % of the voxels and both
    together 60 %. An MR with negative values (phase, difference) has no such two peaks.
    """
    if voxels.dtype.kind not in "iu" or voxels.min() > -900:
        return False
    air = float((voxels <= -900).mean())
    tissue = float((np.abs(voxels) <= 200).mean())
    return min(air, tissue) >= 0.05 and air + tissue >= 0.6
