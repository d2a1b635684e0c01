"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): text headers, voxels behind them or in a file beside them.

Both are parsed here, not by ITK: a header from a stranger then names no file outside its folder, claims no more bytes
than there are, and nothing depends on the file's name. The tests hold every result against SimpleITK.

Sources: itk.org/Wiki/MetaIO/Documentation; teem.sourceforge.net/nrrd/format.html.
"""

import re
from math import prod
from pathlib import Path

import numpy as np

from hilum.archive.files.raw import ImageHeader, RawVoxels, check_size
from hilum.archive.files.values import read_image, read_label_map
from hilum.errors import ScanRefused
from hilum.volume import FloatArray, Volume

MAX_HEADER = 1 << 18  # bytes; a diffusion run with a line per direction has 20 kB

_META_FIELD = re.compile(rb"\s*(ObjectType|Comment|ObjectSubType|NDims|TransformType|Name|ID)\s*=")
_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_META_MATRIX = ("TransformMatrix", "Rotation", "Orientation")  # three names of one field, and again
_META_ORIGIN = ("Offset", "Position", "Origin")

_NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t", "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t", "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t", "f4": "float", "f8": "double",
    }.items()
    for name in names.split(", ")
}  # fmt: skip
_NRRD_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
_NRRD_VOLUME_KINDS = ("time", "list")
_NRRD_COLOURS = ("rgb-color", "rgba-color", "hsv-color", "xyz-color")
_MM_PER_UNIT = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001}


def looks_like_itk(head: bytes) -> bool:
    """Whether a file that begins with these bytes (4096 or more) is NRRD or MetaImage."""
    return head.startswith(b"NRRD000") or (_META_FIELD.match(head) is not None and b"DimSize" in head)


def read_header(path: Path) -> ImageHeader:
    """Shape, geometry and place of the voxels, without reading them. Raises ScanRefused."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(MAX_HEADER)
        header = _nrrd(path, head) if head.startswith(b"NRRD") else _metaimage(path, head)
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except (ValueError, LookupError, ArithmeticError) as error:
        raise ScanRefused("corrupt", f"image header ({type(error).__name__})") from None
    affine = header.affine
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanRefused("no_geometry", "the directions are singular or not finite")
    check_size(header.voxels)
    return header


def read(path: Path, volume: int = 0) -> tuple[Volume, tuple[str, ...]]:
    """Read one volume of a MetaImage or NRRD file; see `hilum.archive.files.values.read_image`.

    volume  number along the axis that is not space
    """
    return read_image(read_header(path), volume)


def read_label(path: Path) -> Volume:
    """Read a label map; see `hilum.archive.files.values.read_label_map`."""
    return read_label_map(read_header(path))


def _metaimage(path: Path, head: bytes) -> ImageHeader:
    """MetaImage. Without a byte order little-endian counts, as ITK has it; the Modality field is not used."""
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", start)
        line, start = (head[start:], len(head)) if end < 0 else (head[start:end], end + 1)
        name, equals, value = line.decode("latin-1").partition("=")
        if not equals or name.strip() in fields:
            raise ScanRefused("truncated" if end < 0 else "corrupt", f"MetaImage header after {len(fields)} fields")
        fields[name.strip()] = value.strip()
    sizes = tuple(int(n) for n in fields["DimSize"].split())
    if len(sizes) != int(fields["NDims"]):
        raise ScanRefused("corrupt", f"{len(sizes)} sizes for another number of axes")
    _check_meta_voxels(fields)
    big = _is_true(fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")))
    dtype = np.dtype(_META_TYPES[fields["ElementType"]]).newbyteorder(">" if big else "<")
    affine = _meta_affine(fields, len(sizes))
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) not in (3, 4):
        raise ScanRefused("not_3d", "×".join(str(n) for n in sizes))
    name = fields["ElementDataFile"]
    if name not in ("LOCAL", "Local", "local"):
        path, start = _beside(path, name), 0
    packed = _is_true(fields.get("CompressedData", "False"))
    skip = int(fields.get("HeaderSize", "0"))  # from the beginning of the file; 0 says nothing
    if skip > 0:
        start, skip = skip, 0
    voxels = _placed(path, start, skip, packed, dtype, sizes, 3 if len(sizes) == 4 else None)
    return ImageHeader(voxels, affine)


def _is_true(value: str) -> bool:
    return value[:1] in ("T", "t", "1")


def _check_meta_voxels(fields: dict[str, str]) -> None:
    """Refuse voxels that are no single stored number each."""
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    if channels != 1:
        colour = channels in (3, 4) and fields["ElementType"] == "MET_UCHAR"
        raise ScanRefused("colour" if colour else "not_3d", f"{channels} numbers per voxel")
    if fields["ElementType"] not in _META_TYPES:
        raise ScanRefused("other_format", "MetaImage with another element type than numbers")
    if not _is_true(fields.get("BinaryData", "True")):
        raise ScanRefused("other_format", "MetaImage with voxels as text")
    scale = (fields.get("ElementToIntensityFunctionSlope", "1"), fields.get("ElementToIntensityFunctionOffset", "0"))
    if (float(scale[0]), float(scale[1])) != (1.0, 0.0):
        raise ScanRefused("other_format", "MetaImage with an intensity function, which readers do not agree on")


def _meta_affine(fields: dict[str, str], num_axes: int) -> FloatArray:
    """Each group of numbers in TransformMatrix is the direction of one axis, of length 1; space is LPS."""
    matrix = next((fields[n] for n in _META_MATRIX if n in fields), None)
    origin = next((fields[n] for n in _META_ORIGIN if n in fields), None)
    spacing = fields.get("ElementSpacing")
    missing = [n for n, v in (("directions", matrix), ("origin", origin), ("spacing", spacing)) if v is None]
    if matrix is None or origin is None or spacing is None or num_axes < 3:
        raise ScanRefused("no_geometry", f"no {', no '.join(missing)}" if missing else f"{num_axes} axes")
    directions = np.array([float(v) for v in matrix.split()]).reshape(num_axes, num_axes)
    if directions[:3, 3:].any() or directions[3:, :3].any():
        raise ScanRefused("no_geometry", "space and time axes are mixed")
    length = np.linalg.norm(directions[:3, :3], axis=1)
    if not (np.abs(length - 1) < 1e-3).all():
        raise ScanRefused("bad_orientation", "lengths of the directions: " + ", ".join(f"{n:.4f}" for n in length))
    steps = np.array([float(v) for v in spacing.split()])
    if len(steps) != num_axes or not (steps[:3] > 0).all():
        raise ScanRefused("no_geometry", f"{len(steps)} voxel sizes, some not above 0")
    return _affine(directions[:3, :3] * steps[:3, None], [float(v) for v in origin.split()][:3])


def _affine(steps_ijk: FloatArray, origin: list[float]) -> FloatArray:
    """The affine of index (k, j, i, 1) from one LPS step a row, for i, j, k, and the centre of the first voxel."""
    affine = np.eye(4)
    affine[:3, :3] = steps_ijk[::-1].T
    affine[:3, 3] = origin
    return affine


def _placed(
    path: Path, start: int, skip: int, packed: bool, dtype: np.dtype[np.generic], sizes: tuple[int, ...],
    apart: int | None,
) -> RawVoxels:  # fmt: skip
    """Raw voxels `skip` bytes behind `start`; −1 when they end the file."""
    if skip == -1 and not packed:
        start, skip = path.stat().st_size - prod(sizes) * dtype.itemsize, 0
    if skip < 0:
        raise ScanRefused("corrupt", "the voxels begin at a negative byte")
    return RawVoxels(path, start, skip, packed, dtype, sizes, apart)


def _beside(header: Path, name: str) -> Path:
    """The voxel file that a header names. Refused unless it is one file that lies in the header's own folder."""
    if name.upper().startswith("LIST") or "%" in name:
        raise ScanRefused("detached_voxels", "several files")
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ScanRefused("detached_voxels", "a path, not a file in the folder of the header")
    path = header.parent / name
    if not path.is_file():  # a pipe would block
        raise ScanRefused("detached_voxels", "the file that it names is missing")
    return path


def _nrrd(path: Path, head: bytes) -> ImageHeader:
    fields, start = _nrrd_fields(path, head)
    sizes = tuple(int(n) for n in fields["sizes"].split())
    if len(sizes) != int(fields["dimension"]):
        raise ScanRefused("corrupt", f"{len(sizes)} sizes for another number of axes")
    if fields["type"] not in _NRRD_TYPES:
        raise ScanRefused("other_format", "NRRD with another type than numbers")
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ScanRefused("other_format", "NRRD in another encoding than raw or gzip")
    dtype = np.dtype(_NRRD_TYPES[fields["type"]])
    if dtype.itemsize > 1:
        dtype = {"little": dtype.newbyteorder("<"), "big": dtype.newbyteorder(">")}[fields["endian"].lower()]
    affine, sizes, apart = _nrrd_axes(fields, sizes)
    if int(fields.get("line skip", fields.get("lineskip", "0"))):
        raise ScanRefused("other_format", "NRRD that skips lines")
    name = fields.get("data file", fields.get("datafile"))
    if name is not None:
        path, start = _beside(path, name), 0
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    return ImageHeader(_placed(path, start, skip, encoding != "raw", dtype, sizes, apart), affine)


def _nrrd_fields(path: Path, head: bytes) -> tuple[dict[str, str], int]:
    """The fields of a NRRD header, and the byte where its voxels begin."""
    fields: dict[str, str] = {}
    start = head.find(b"\n") + 1
    while start and start < len(head):
        end = head.find(b"\n", start)
        line, start = (head[start:], len(head)) if end < 0 else (head[start:end], end + 1)
        text = line.decode("latin-1").strip()
        if not text:
            return fields, start
        name, colon, value = text.partition(":")
        if text.startswith("#") or value.startswith("="):  # a comment, or a pair that describes the scan
            continue
        if not colon or name.strip().lower() in fields:
            raise ScanRefused("corrupt", f"NRRD header after {len(fields)} fields")
        fields[name.strip().lower()] = value.strip()
    if "data file" not in fields and "datafile" not in fields:
        raise ScanRefused("truncated", f"NRRD header after {len(fields)} fields")
    return fields, start


def _nrrd_axes(fields: dict[str, str], sizes: tuple[int, ...]) -> tuple[FloatArray, tuple[int, ...], int | None]:
    """The affine, the sizes without empty axes, and the axis that separates volumes.

    An axis with a space direction is space. Another one holds volumes when its kind is time or list, and is refused
    when it has no kind: it might as well be the components of a vector.
    """
    sign = _NRRD_SPACES.get(fields.get("space", "").lower())
    if sign is None:
        raise ScanRefused("no_geometry", "the space is not LPS, RAS or LAS")
    vectors = re.findall(r"none|\([^)]*\)", fields["space directions"]) if "space directions" in fields else []
    if len(vectors) != len(sizes) or "space origin" not in fields:
        raise ScanRefused("no_geometry", f"{len(vectors)} space directions for {len(sizes)} axes, or no origin")
    kinds = fields.get("kinds", "???").lower().split() or ["???"]
    kinds += ["???"] * (len(sizes) - len(kinds))
    axes = [axis for axis, n in enumerate(sizes) if vectors[axis] != "none" or n != 1]
    space = [axis for axis in axes if vectors[axis] != "none"]
    others = [axis for axis in axes if vectors[axis] == "none"]
    if any(kinds[axis] in _NRRD_COLOURS for axis in others):
        raise ScanRefused("colour", f"{sizes[others[0]]} numbers per voxel")
    numbers = "×".join(str(n) for n in sizes)
    if len(space) != 3 or len(others) > 1 or any(kinds[axis] not in _NRRD_VOLUME_KINDS for axis in others):
        raise ScanRefused("not_3d", f"{numbers}, {len(space)} axes of space")
    scale = np.array(sign) * _nrrd_units(fields)
    steps = np.array([_vector(vectors[axis]) for axis in space]) * scale
    affine = _affine(steps, list(np.array(_vector(fields["space origin"])) * scale))
    return affine, tuple(sizes[axis] for axis in axes), axes.index(others[0]) if others else None


def _vector(text: str) -> list[float]:
    numbers = [float(v) for v in text.strip().strip("()").split(",")]
    if len(numbers) != 3:
        raise ScanRefused("no_geometry", f"a direction of {len(numbers)} numbers")
    return numbers


def _nrrd_units(fields: dict[str, str]) -> FloatArray:
    """Millimetres per unit of each space axis; without units they are millimetres, as everywhere in radiology."""
    names = re.findall(r'"([^"]*)"', fields.get("space units", '"mm" "mm" "mm"'))
    if len(names) != 3 or any(name not in _MM_PER_UNIT for name in names):
        raise ScanRefused("no_geometry", "the unit of length is unknown")
    return np.array([_MM_PER_UNIT[name] for name in names])
