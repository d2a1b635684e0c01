"""NIfTI-1 and NIfTI-2 files, in one file or two (.hdr and .img): the only place where RAS exists.

A file with a fourth axis (time, echoes, b-values) holds several volumes, each a scan of its own.
"""

import gzip
import logging
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from hilum.archive.files.raw import ImageHeader, RawVoxels, check_size
from hilum.archive.files.values import read_image, read_label_map
from hilum.archive.reasons import flag
from hilum.errors import ScanRefused
from hilum.volume import FloatArray, Volume

logging.getLogger("nibabel").setLevel(logging.CRITICAL)  # its complaints arrive as reasons

# What nibabel and numpy raise on broken headers.
_BROKEN = (
    HeaderDataError, HeaderTypeError, WrapStructError, struct.error, ValueError, TypeError, LookupError, ArithmeticError,
)  # fmt: skip

HEAD_BYTES = 540  # the NIfTI-2 header; that of NIfTI-1 has 348
LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL
# Several numbers per voxel: NIFTI_INTENT_GENMATRIX, SYMMATRIX, DISPVECT, VECTOR, POINTSET, TRIANGLE, QUATERNION, and
# RGB_VECTOR, RGBA_VECTOR
_VECTOR_INTENTS = (1004, 1005, 1006, 1007, 1008, 1009, 1010, 2003, 2004)
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: metre, millimetre, micrometre; unknown counts as mm
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_APART_MM, _MAX_APART_DEG = 1.0, 1.0  # between sform and qform
_MAX_PIXDIM_ERROR = 0.01  # share of the voxel size


def unpack(head: bytes) -> bytes:
    """The beginning of a file's content: the same bytes, or the first HEAD_BYTES of a gzip stream."""
    if head[:2] != b"\x1f\x8b":
        return head
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def looks_like_nifti(head: bytes) -> bool:
    """Whether a file that begins with these bytes (540 or more, gzip allowed) is NIfTI, or the .hdr of a pair."""
    return _kind(unpack(head)) is not None


def _kind(head: bytes) -> Any:
    """nibabel's class of headers that begin with these bytes; None when they are no NIfTI."""
    ones = {b"n+1\0": Nifti1Header, b"ni1\0": Nifti1PairHeader}
    twos = {b"n+2\0": Nifti2Header, b"ni2\0": Nifti2PairHeader}
    return ones.get(head[344:348]) or twos.get(head[4:8])


def read_header(path: Path) -> ImageHeader:
    """Shape, geometry and place of the voxels, without reading them. Raises ScanRefused."""
    try:
        with open(path, "rb") as handle:
            start = handle.read(1 << 14)
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    head = unpack(start)
    kind = _kind(head)
    if kind is None:
        raise ScanRefused("corrupt", "no NIfTI header")
    length = kind.template_dtype.itemsize
    if len(head) < length:
        raise ScanRefused("truncated", f"{len(head)} of {length} bytes of the NIfTI header")
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            header = kind(head[:length], check=False)
            pixdim = np.abs(np.array(header["pixdim"][1:4], float))
            header.check_fix()
            found = _describe(header, pixdim, path, start[:2] == b"\x1f\x8b")
    except _BROKEN as error:
        raise ScanRefused("corrupt", f"NIfTI header ({type(error).__name__})") from None
    check_size(found.voxels)
    return found


def _describe(header: Any, pixdim: FloatArray, path: Path, packed: bool) -> ImageHeader:
    """What a checked header says; `pixdim` as stored, since nibabel's check replaces zeros by ones."""
    dtype = header.get_data_dtype()
    sizes = _sizes(header, dtype)
    offset = int(header["vox_offset"])
    if header.is_single:
        if offset < header.single_vox_offset:
            raise ScanRefused("corrupt", f"the voxels begin at byte {offset}, inside the header")
    else:
        path, packed = _image_of(path)
        offset = max(offset, 0)
    affine, flags = _geometry(header, pixdim, sizes)
    slope, intercept = header.get_slope_inter()  # None when the slope is 0 or not finite: unscaled by the standard
    return ImageHeader(
        voxels=RawVoxels(path, 0, offset, packed, dtype, sizes, apart=3 if len(sizes) == 4 else None),
        affine=affine,
        labels=int(header["intent_code"]) == LABEL_INTENT,
        slope=1.0 if slope is None else slope,
        intercept=0.0 if slope is None else intercept,
        flags=flags,
    )


def _sizes(header: Any, dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Sizes of the axes: three, or four when there are several volumes. Refuses what is no image in space and time."""
    sizes = tuple(int(n) for n in header.get_data_shape())
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    sizes += (1,) * (3 - len(sizes))
    if dtype.names:
        raise ScanRefused("colour", "RGB voxels")
    if dtype.kind == "c":
        raise ScanRefused("other_format", "complex voxels")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanRefused("other_format", f"voxels of {dtype.itemsize} bytes")
    intent = int(header["intent_code"])
    if len(sizes) > 4 or (len(sizes) == 4 and intent in _VECTOR_INTENTS):
        numbers = "×".join(str(n) for n in sizes)
        raise ScanRefused("not_3d", f"{numbers}, intent code {intent}" if intent else numbers)
    return sizes


def _image_of(path: Path) -> tuple[Path, bool]:
    """The .img file of a header in two files, and whether it is packed. Raises ScanRefused when it is absent."""
    stem = path.with_suffix("") if path.suffix == ".gz" else path
    for suffix in (".img", ".IMG", ".img.gz"):
        image = stem.with_suffix(suffix)
        if stem.suffix and image.is_file():
            return image, suffix == ".img.gz"
    raise ScanRefused("detached_voxels", "no .img file beside the header")


def _geometry(header: Any, pixdim: FloatArray, sizes: tuple[int, ...]) -> tuple[FloatArray, tuple[str, ...]]:
    """The affine to LPS mm and cautions about it. The sform counts when its code is above 0, else the qform."""
    sform, qform = header.get_sform(coded=True)[0], _qform(header, pixdim)
    best = sform if sform is not None else qform
    if best is None:
        codes = f"sform code {int(header['sform_code'])}, qform code {int(header['qform_code'])}"
        raise ScanRefused(
            "no_geometry", f"no usable sform and no usable qform ({codes}): voxel sizes without directions"
        )
    scale = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    affine = _affine(best, scale)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanRefused("no_geometry", "the affine is singular or not finite")
    flags = []
    if sform is not None and qform is not None:
        apart_mm, apart_deg = _apart(affine, _affine(qform, scale), sizes[2::-1])
        if not (apart_mm <= _MAX_APART_MM and apart_deg <= _MAX_APART_DEG):
            flags.append(flag("sform_qform", f"{apart_mm:.1f} mm, {apart_deg:.1f}°"))
    spacing = np.linalg.norm(affine[:3, 2::-1], axis=0)
    if not (np.abs(pixdim * scale - spacing) <= _MAX_PIXDIM_ERROR * spacing).all():
        numbers = ", ".join(f"{a:g} for {b:g}" for a, b in zip(np.round(pixdim * scale, 4), np.round(spacing, 4)))
        flags.append(flag("pixdim", f"{numbers} mm"))
    return affine, tuple(flags)


def _qform(header: Any, pixdim: FloatArray) -> FloatArray | None:
    """The affine of the qform; None when its code is 0, its voxel sizes are none, or its quaternion is no rotation."""
    if not (np.isfinite(pixdim) & (pixdim > 0)).all():
        return None
    try:
        qform: FloatArray | None = header.get_qform(coded=True)[0]
    except (HeaderDataError, ValueError):
        return None
    return qform if qform is None or np.isfinite(qform).all() else None


def _affine(ras: FloatArray, scale: float) -> FloatArray:
    """(i, j, k, 1) → RAS in the file's unit, as (k, j, i, 1) → LPS mm."""
    affine: FloatArray = _LPS_FROM_RAS @ np.asarray(ras, float)[:, [2, 1, 0, 3]]
    affine[:3] *= scale
    return affine


def _apart(a: FloatArray, b: FloatArray, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far apart two affines put the corners of a volume (mm), and by how much they turn its axes (degrees)."""
    corners = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)], float) * [*(n - 1 for n in shape), 1]
    directions = [m[:3, :3] / np.linalg.norm(m[:3, :3], axis=0) for m in (a, b)]
    cosines = np.clip((directions[0] * directions[1]).sum(0), -1, 1)
    return float(np.linalg.norm((a - b) @ corners.T, axis=0).max()), float(np.degrees(np.arccos(cosines.min())))


def read(path: Path, volume: int = 0) -> tuple[Volume, tuple[str, ...]]:
    """Read one volume of a NIfTI file; see `hilum.archive.files.values.read_image`.

    volume  number along the fourth axis
    """
    return read_image(read_header(path), volume)


def read_label(path: Path) -> Volume:
    """Read a label map; see `hilum.archive.files.values.read_label_map`."""
    return read_label_map(read_header(path))


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
