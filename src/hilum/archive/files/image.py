"""PNG, JPEG and TIFF: one slice each, without geometry.

Values are as stored, 0…255 for 8 bits and 0…65535 for 16: no rescale is known, so none is applied, and they are
neither Hounsfield units nor stretched to a common range. What a model makes of them stands in its contract.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from hilum.errors import ScanRefused
from hilum.volume import Volume

_EXIF_ORIENTATION = 0x0112
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
# What Pillow raises on broken files; a truncated image is an OSError, a broken PNG chunk a SyntaxError.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error, MemoryError)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes is PNG, JPEG or TIFF."""
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*"))


def read_header(source: Path | BinaryIO) -> tuple[int, int]:
    """Rows and columns, without decoding unless colour channels must be compared. Raises ScanRefused.

    source  the file, or its open handle at its begin
    """
    with _opened(source) as image:
        columns, rows = image.size
        if image.mode not in ("L", "I;16", "I;16B", "I"):
            _grey(image)
    return rows, columns


def read(path: Path) -> tuple[Volume, tuple[str, ...]]:
    """Read one image. Raises ScanRefused.

    returns  voxels (1, Y, X) uint8 or uint16, as stored: an EXIF rotation is reported, not applied; notes
    """
    with _opened(path) as image:
        pixels, notes = _grey(image)
        turned = image.getexif().get(_EXIF_ORIENTATION, 1)
    if turned != 1:
        notes = (*notes, f"EXIF orientation {int(turned)} not applied")
    if pixels.min() == pixels.max():
        raise ScanRefused("constant", f"all pixels {int(pixels.flat[0])}")
    return Volume(voxels=pixels[None], affine=None, modality="OT"), notes


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """An image whose header has been read; Pillow's errors become refusals, also those of the body."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=("PNG", "JPEG", "TIFF")) as image:
                num_frames = getattr(image, "n_frames", 1)
                if num_frames > 1:
                    raise ScanRefused("not_3d", f"{num_frames} pages or frames in one image file")
                if image.format == "TIFF":
                    _check_tiff(image)
                yield image
    except _BOMB:
        raise ScanRefused("too_large", "more pixels than a radiological image has") from None
    except (PermissionError, FileNotFoundError) as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except UnidentifiedImageError:
        raise ScanRefused("corrupt", "the header of the image cannot be parsed") from None
    except _BROKEN as error:
        raise ScanRefused("truncated", f"the image cannot be decoded ({type(error).__name__})") from None


def _check_tiff(image: Image.Image) -> None:
    """Refuse what Pillow would turn or leave inverted without saying so."""
    tags = image.getexif()
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ScanRefused("other_format", "TIFF in which white is zero")
    if tags.get(_EXIF_ORIENTATION, 1) != 1:
        raise ScanRefused("other_format", "TIFF that its orientation tag turns")


def _grey(image: Image.Image) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.uint8 | np.uint16]], tuple[str, ...]]:
    """Pixels (Y, X) of a grey image, also of one saved as colour with equal channels; and a note on that."""
    if image.mode == "1":
        raise ScanRefused("label_map", "one bit per pixel")
    if image.mode == "L":
        return np.asarray(image, np.uint8), ()
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ScanRefused("other_format", "more than 16 bits per pixel")
        return wide.astype(np.uint16), ()
    if image.mode == "F":
        raise ScanRefused("other_format", "floating point pixels")
    if image.mode not in ("P", "PA", "LA", "RGB", "RGBA"):
        raise ScanRefused("colour", f"mode {image.mode}")
    channels = np.asarray(image.convert("RGBA"))
    if (channels[..., 0] != channels[..., 1]).any() or (channels[..., 0] != channels[..., 2]).any():
        raise ScanRefused("colour", f"mode {image.mode}")
    note = "alpha channel dropped" if (channels[..., 3] != 255).any() else "grey saved as colour"
    return np.ascontiguousarray(channels[..., 0]), (note,)
