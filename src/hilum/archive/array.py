"""NumPy .npy files: 2D or 3D numbers without geometry. Objects are never unpickled."""

from pathlib import Path

import numpy as np

from hilum.archive.raw import ImageHeader, RawVoxels, check_size
from hilum.archive.values import read_image
from hilum.errors import ScanRefused
from hilum.volume import Volume

MAGIC = b"\x93NUMPY"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_header(path: Path) -> ImageHeader:
    """Shape and type, without the numbers. Raises ScanRefused.

    Axes are taken as (Z, Y, X), a 2D array as one slice (Y, X): an .npy file names neither axes nor millimetres.
    Source: numpy.lib.format, versions 1.0 and 2.0.
    """
    try:
        with open(path, "rb") as handle:
            version = np.lib.format.read_magic(handle)
            if version not in _HEADERS:
                raise ScanRefused("other_format", f"npy version {version[0]}.{version[1]}")
            shape, fortran, dtype = _HEADERS[version](handle)
            start = handle.tell()
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except (ValueError, TypeError, LookupError, SyntaxError, EOFError, RecursionError, MemoryError) as error:
        raise ScanRefused("corrupt", f"npy header ({type(error).__name__})") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kinds = {"O": "Python objects", "b": "true or false", "c": "complex numbers", "V": "records"}
        raise ScanRefused("other_format", f"an array of {kinds.get(dtype.kind, 'no plain numbers')}")
    if len(shape) not in (2, 3):
        raise ScanRefused("not_3d", "×".join(str(n) for n in shape) or "a single number")
    shape = (1, *shape)[-3:]
    voxels = RawVoxels(path, start, 0, False, dtype, shape if fortran else shape[::-1], z_first=fortran)
    check_size(voxels)
    return ImageHeader(voxels, affine=None)


def read(path: Path) -> tuple[Volume, tuple[str, ...]]:
    """Read one array; see `hilum.archive.values.read_image`. The volume has no affine."""
    return read_image(read_header(path))
