"""Mosaics: a whole MR volume tiled into one classic image, by Siemens (MOSAIC) and United Imaging (VFRAME).

Tiles run along the rows. A Siemens file states the place of tile 0 only, through the corner that the mosaic as a whole
would have around the same centre, and the direction of the others in its private CSA header (NEMA has no standard for
it; nibabel.nicom describes it). A United Imaging file has one private item
per tile with the tile's own ImagePositionPatient. Whatever of this is missing is named in the refusal.
"""

import math
import struct
from dataclasses import replace

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from hilum.archive.dicom.header import Header, Texts, integer
from hilum.errors import ScanRefused
from hilum.volume import FloatArray

MAX_TILES = 1024
_CSA_ELEMENTS, _CSA_VALUES = 1024, 4096  # real headers have about 100 elements of up to 6 values


def is_mosaic(text: Texts) -> bool:
    return bool({"MOSAIC", "VFRAME"} & set(text["ImageType"].upper().split("\\")))


def tiles(header: Header, data: Dataset) -> list[Header]:
    """One Header per tile. Raises ScanRefused("mosaic") naming what is missing.

    header  of the mosaic as a whole
    data    everything in the file before the pixels
    """
    row, column = _directions(header)
    if "VFRAME" in header.splits.get("ImageType", "").upper().split("\\"):
        positions = _united_imaging(data)
        shape = _grid_by_aspect(header, data, len(positions))
    else:
        side, positions = _siemens(header, data, row, column)
        shape = side, side
    if header.rows % shape[0] or header.columns % shape[1]:
        raise ScanRefused("mosaic", f"{header.rows}×{header.columns} pixels are no {shape[0]}×{shape[1]} tiles")
    rows, columns = header.rows // shape[0], header.columns // shape[1]
    splits = header.splits | {"SOPInstanceUID": header.instance_uid}
    return [
        replace(
            header, frame=n, rows=rows, columns=columns, position=tuple(position.tolist()), splits=splits,
            corner=(n // shape[1] * rows, n % shape[1] * columns),
        )
        for n, position in enumerate(positions)
    ]  # fmt: skip


def _directions(header: Header) -> FloatArray:
    if len(header.orientation) != 6 or len(header.pixel_spacing) != 2:
        raise ScanRefused("mosaic", "no ImageOrientationPatient or PixelSpacing")
    return np.reshape(header.orientation, (2, 3))


def _siemens(header: Header, data: Dataset, row: FloatArray, column: FloatArray) -> tuple[int, FloatArray]:
    """Tiles per side, and the position (N, 3) of each."""
    csa = read_csa(_private(data, 0x0029, "SIEMENS CSA HEADER", 0x10))
    number = _private(data, 0x0019, "SIEMENS MR HEADER", 0x0A)
    if isinstance(number, bytes):  # implicit encoding, and a creator that pydicom does not know
        number = int.from_bytes(number[:2], "little")
    stated = _numbers(csa, "NumberOfImagesInMosaic", 1)
    count = int(stated[0]) if stated else number if isinstance(number, int) else 0
    if not 0 < count <= MAX_TILES:
        raise ScanRefused("mosaic", f"number of tiles {count}" if count else "the number of tiles is not stated")
    if isinstance(number, int) and number and number != count:
        raise ScanRefused("mosaic", f"{number} or {count} tiles: the header contradicts itself")
    normal = np.array(_numbers(csa, "SliceNormalVector", 3))
    if not len(normal):
        raise ScanRefused("mosaic", "no SliceNormalVector in the CSA header: the order of the tiles is unknown")
    across = np.cross(row, column)
    if abs(abs(normal @ across) - 1) > 0.01:
        raise ScanRefused("mosaic", "SliceNormalVector is not at right angles to the image")
    step = header.spacing_tag or next(iter(_numbers(csa, "SpacingBetweenSlices", 1)), 0.0)
    if not step > 0:
        raise ScanRefused("mosaic", "no SpacingBetweenSlices")
    if len(header.position) != 3:
        raise ScanRefused("mosaic", "no ImagePositionPatient")
    side = math.ceil(math.sqrt(count))
    # The centre of tile and mosaic coincide; both corners are half their own size away from it.
    wider = header.columns - header.columns // side, header.rows - header.rows // side
    first = np.array(header.position)
    first = first + row * (header.pixel_spacing[1] * wider[0] / 2) + column * (header.pixel_spacing[0] * wider[1] / 2)
    return side, first + np.arange(count)[:, None] * step * np.sign(normal @ across) * across


def _united_imaging(data: Dataset) -> FloatArray:
    """The position (N, 3) of each tile, from the private item that each has."""
    number = _private(data, 0x0065, "Image Private Header", 0x50)
    items = _private(data, 0x0065, "Image Private Header", 0x51)
    if not isinstance(items, Sequence) or not 0 < len(items) <= MAX_TILES:
        raise ScanRefused("mosaic", "no readable private sequence (0065,xx51) with the positions of the tiles")
    if integer(str(number)) != len(items):
        raise ScanRefused("mosaic", f"{len(items)} tiles with a position, another number stated")
    positions = [item.get("ImagePositionPatient") or () for item in items]
    if any(len(p) != 3 for p in positions):
        raise ScanRefused("mosaic", "tiles without ImagePositionPatient")
    return np.array([[float(v) for v in p] for p in positions])


def _grid_by_aspect(header: Header, data: Dataset, count: int) -> tuple[int, int]:
    """Tiles in a column and in a row of a mosaic that need not be square; the matrix of one tile is stated as text."""
    stated = _private(data, 0x0065, "Image Private Header", 0x04)
    try:
        rows, columns = (int(v) for v in str(stated).split("*"))
    except ValueError:
        raise ScanRefused("mosaic", "the size of a tile is not stated") from None
    if rows <= 0 or columns <= 0 or (header.rows // rows) * (header.columns // columns) < count:
        raise ScanRefused("mosaic", f"{count} tiles of {rows}×{columns} in {header.rows}×{header.columns} pixels")
    return header.rows // rows, header.columns // columns


def _private(data: Dataset, group: int, creator: str, element: int) -> object:
    """The value of a private element, None when absent."""
    try:
        return data.private_block(group, creator)[element].value
    except KeyError:
        return None


def _numbers(csa: dict[str, list[str]], name: str, wanted: int) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in csa.get(name, ()) if v)
    except ValueError:
        return ()
    return values if len(values) == wanted and all(math.isfinite(v) for v in values) else ()


def read_csa(content: object) -> dict[str, list[str]]:
    """The elements of a Siemens CSA header by name, each with its values as text; {} when it is none.

    Both layouts are little endian: a count, then per element name (64 bytes), multiplicity, VR, type, number of values,
    a mark, and the values, each after four integers and padded to four bytes. The newer one begins with "SV10" and
    states the length of a value in the second integer; the older in the first, less the number of values of element 0.
    """
    if not isinstance(content, bytes):
        return {}
    newer = content[:4] == b"SV10"
    elements: dict[str, list[str]] = {}
    try:
        at = 8 if newer else 0
        (count,) = struct.unpack_from("<I", content, at)
        at += 8
        base = 0
        for number in range(min(count, _CSA_ELEMENTS)):
            name, num_values = struct.unpack_from("<64s8x4xI4x", content, at)
            at += 84
            if not number:
                base = num_values
            values = []
            for _ in range(min(num_values, _CSA_VALUES)):
                lengths = struct.unpack_from("<4I", content, at)
                length = lengths[1] if newer else lengths[0] - base
                at += 16
                if length < 0 or at + length > len(content):
                    return elements
                values.append(_text(content[at : at + length]))
                at += (length + 3) // 4 * 4
            elements[_text(name)] = values
    except struct.error:  # cut short: what was read before stands
        pass
    return elements


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("latin-1").strip()
