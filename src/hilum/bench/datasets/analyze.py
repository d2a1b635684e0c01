"""Analyze 7.5 images (.hdr and .img), the form of OASIS-1.

The format names no directions. Its orientation byte says which plane the slices are; the rest is the convention of the
program that defined it: the first voxel lies at the patient's right, posterior and inferior (Analyze 7.5 manual, Mayo
Foundation). Whether a publisher kept to it is not in the file: left and right may be swapped.
"""

import struct
from pathlib import Path

import numpy as np

from hilum.archive.files.raw import ImageHeader, RawVoxels
from hilum.archive.files.values import read_image
from hilum.errors import ScanRefused
from hilum.volume import Volume

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}
_LEFT, _ANTERIOR, _SUPERIOR = (1, 0, 0), (0, -1, 0), (0, 0, 1)
_AXES = {  # orientation byte → where k, j and i point
    0: (_SUPERIOR, _ANTERIOR, _LEFT),
    1: (_ANTERIOR, _SUPERIOR, _LEFT),
    2: (_LEFT, _SUPERIOR, _ANTERIOR),
}


def read_analyze_header(path: Path) -> ImageHeader:
    """Shape, spacing and place of the voxels. Raises ScanRefused.

    path  the .hdr or .img file; the other lies beside it
    """
    header, voxels = path.with_suffix(".hdr"), path.with_suffix(".img")
    try:
        head = header.read_bytes()[:348]
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    order = next((o for o in "<>" if head[:4] == struct.pack(f"{o}i", 348)), "")
    if len(head) < 348 or not order:
        raise ScanRefused("corrupt", "no Analyze header of 348 bytes")
    if head[344:348] in (b"ni1\0", b"n+1\0"):
        raise ScanRefused("other_format", "NIfTI; expected Analyze 7.5")
    sizes = struct.unpack(f"{order}8h", head[40:56])
    (datatype,) = struct.unpack(f"{order}h", head[70:72])
    pixdim = struct.unpack(f"{order}8f", head[76:108])
    offset, scale = struct.unpack(f"{order}2f", head[108:116])
    if sizes[0] not in (3, 4) or min(sizes[1:4]) < 1 or (sizes[0] == 4 and sizes[4] > 1):
        raise ScanRefused("not_3d", "×".join(str(n) for n in sizes[1 : sizes[0] + 1]))
    if datatype not in _TYPES or head[252] not in _AXES:
        raise ScanRefused("other_format", f"Analyze datatype {datatype}, orientation {head[252]}")
    if not all(0 < p < 1e3 for p in pixdim[1:4]):
        raise ScanRefused("no_geometry", "voxel sizes missing")
    affine = np.eye(4)
    affine[:3, :3] = np.array(_AXES[head[252]], float).T * pixdim[3:0:-1]
    raw = RawVoxels(voxels, 0, max(int(offset), 0), False, np.dtype(order + _TYPES[datatype]), sizes[1:4])
    return ImageHeader(raw, affine, slope=scale if np.isfinite(scale) and scale > 0 else 1.0)


def read_analyze(path: Path) -> Volume:
    """Read one image; see `hilum.archive.files.values.read_image`. Raises ScanRefused."""
    return read_image(read_analyze_header(path))[0]
