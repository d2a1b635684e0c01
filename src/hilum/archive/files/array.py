"""NumPy .npy files: 2D or 3D numbers without geometry. Objects are never unpickled."""

import ast
import re
from operator import index
from pathlib import Path

import numpy as np

from hilum.archive.files.raw import ImageHeader, RawVoxels, check_size
from hilum.archive.files.values import read_image
from hilum.errors import ScanRefused
from hilum.volume import Volume

MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # bytes; that of an image has 118
_PLAIN = re.compile(r"[<>|=]?[iuf][1248]")
_OTHERS = {"O": "Python objects", "b": "true or false", "c": "complex numbers", "U": "text", "S": "text"}


def read_header(path: Path) -> ImageHeader:
    """Shape and type, without the numbers. Raises ScanRefused.

    Axes are taken as (Z, Y, X), a 2D array as one slice (Y, X): an .npy file names neither axes nor millimetres.
    Source: numpy.lib.format, versions 1.0 to 3.0.
    """
    try:
        with open(path, "rb") as handle:
            magic = handle.read(len(MAGIC) + 2)
            if magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
                raise ScanRefused("other_format" if len(magic) == 8 else "truncated", "npy header of unknown version")
            length = int.from_bytes(handle.read(2 if magic[6] == 1 else 4), "little")
            text = handle.read(min(length, _MAX_HEADER)).decode("latin-1")
            start = handle.tell()
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    if len(text) < length:
        raise ScanRefused("truncated", f"{len(text)} of {length} bytes of the npy header")
    try:
        fields = ast.literal_eval(text.strip())
        dtype, fortran, shape = fields["descr"], bool(fields["fortran_order"]), tuple(map(index, fields["shape"]))
    except (ValueError, TypeError, LookupError, SyntaxError, RecursionError, MemoryError) as error:
        raise ScanRefused("corrupt", f"npy header ({type(error).__name__})") from None
    if not isinstance(dtype, str) or not _PLAIN.fullmatch(dtype) or dtype.endswith("f1"):
        letter = dtype.lstrip("<>|=")[:1] if isinstance(dtype, str) else ""
        raise ScanRefused("other_format", f"an array of {_OTHERS.get(letter, 'no plain numbers')}")
    if len(shape) not in (2, 3):
        raise ScanRefused("not_3d", "×".join(str(n) for n in shape) or "a single number")
    shape = (1, *shape)[-3:]
    voxels = RawVoxels(path, start, 0, False, np.dtype(dtype), shape if fortran else shape[::-1], z_first=fortran)
    check_size(voxels)
    return ImageHeader(voxels, affine=None)


def read(path: Path) -> tuple[Volume, tuple[str, ...]]:
    """Read one array; see `hilum.archive.files.values.read_image`. The volume has no affine."""
    return read_image(read_header(path))
