"""What one file is: decided by its content, never by its name.

A file of voxels without a header (.raw, .img) has no content to be known by: it is set aside, and read with the header
file beside it that names it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hilum.archive.dicom.header import Header, looks_like_dicom
from hilum.archive.dicom.slices import read_headers
from hilum.archive.files import array, image, itk, nifti
from hilum.archive.files.raw import ImageHeader
from hilum.archive.ledger import Entry
from hilum.archive.privacy import Key
from hilum.errors import ScanRefused
from hilum.volume import Volume

_HEAD_BYTES = 4096
# Image formats that are known but not read, by their first bytes.
_OTHER_FORMATS = ((b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"II+\0", "BigTIFF"), (b"MM\0+", "BigTIFF"))
_ANALYZE = (b"\x5c\1\0\0", b"\0\0\1\x5c")  # a header of 348 bytes, in either byte order
_VOXEL_SUFFIXES = {".raw", ".zraw", ".img", ".bin", ".dat", ".gz"}
_HEADERS: dict[str, Callable[[Path], ImageHeader]] = {
    ".hdr": nifti.read_header, ".hdr.gz": nifti.read_header, ".mhd": itk.read_header, ".nhdr": itk.read_header,
}  # fmt: skip


def look_at(name: str, root: Path, key: Key, check: Callable[[Entry], Entry] | None) -> list[Header | Entry]:
    """What one file is: the header of a DICOM file, or the finished rows of anything else, one for each volume in it.

    name     of the file below `root`, with slashes
    check    what a used entry becomes once its voxels are read (`hilum.archive.intake.judge_kind`): the header of a NIfTI,
             MetaImage, NRRD or NumPy file tells neither label maps nor CT from other images. None: headers only
    returns  rows whose `num_files` add up to 1
    """
    path = root / name
    try:
        with open(path, "rb") as handle:
            head = handle.read(_HEAD_BYTES)
            if looks_like_dicom(head):
                headers = read_headers(handle, path)
                return [h if h.refusal != "not_an_image" else loose(name, root, key, "not_an_image") for h in headers]
            if image.looks_like_image(head):
                handle.seek(0)
                return [_slice(name, root, key, handle)]
    except OSError as error:
        return [loose(name, root, key, "unreadable", type(error).__name__)]
    for reader, is_one, read in (
        ("nifti", nifti.looks_like_nifti(head), nifti.read_header),
        ("itk", itk.looks_like_itk(head), itk.read_header),
        ("array", head.startswith(array.MAGIC), array.read_header),
    ):
        if is_one:
            rows = _volumes(name, root, key, reader, read)
            return [check(row) if check and row.used else row for row in rows]
    known = next((kind for magic, kind in _OTHER_FORMATS if head.startswith(magic)), "")
    if head.startswith(_ANALYZE) and len(head) >= 348:
        known = "Analyze 7.5, which has no directions"
    if known:
        return [loose(name, root, key, "other_format", known)]
    detail = "voxels of the header file beside it" if _belongs_to_header(path) else "" if head else "empty file"
    return [loose(name, root, key, "not_an_image", detail)]


def loose(name: str, root: Path, key: Key, reason: str, detail: str = "", reader: str = "") -> Entry:
    """The row of a file that is refused."""
    return Entry(key=key.hash("item", name), reader=reader, reason=reason, detail=detail, paths=(root / name,))


def _slice(name: str, root: Path, key: Key, handle: BinaryIO) -> Entry:
    """The row of a PNG, JPEG or TIFF."""
    try:
        rows, columns = image.read_header(handle)
    except ScanRefused as refused:
        return loose(name, root, key, refused.reason, refused.detail, "image")
    return Entry(
        key=key.hash("item", name), reader="image", modality="OT", num_slices=1, rows=rows, columns=columns,
        paths=(root / name,),
    )  # fmt: skip


def _volumes(name: str, root: Path, key: Key, reader: str, read_header: Callable[[Path], ImageHeader]) -> list[Entry]:
    """One row for each volume in a file; the file counts with the first."""
    try:
        header = read_header(root / name)
    except ScanRefused as refused:
        return [loose(name, root, key, refused.reason, refused.detail, reader)]
    grid = Volume(voxels=np.zeros((1, 1, 1), np.int8), affine=header.affine, modality="OT")
    known = header.affine is not None
    apart = header.voxels.apart
    num_slices, rows, columns = header.voxels.shape
    return [
        Entry(
            key=key.hash("item", name if apart is None else f"{name}|{volume}"),
            reader=reader,
            modality="OT",
            flags=header.flags,
            num_files=1 if volume == 0 else 0,
            num_slices=num_slices,
            rows=rows,
            columns=columns,
            spacing_mm=grid.spacing_mm if known else None,
            orientation=grid.orientation if known else "",
            shear_deg=round(grid.shear_deg, 3) if known else 0.0,
            split_by="" if apart is None else f"axis {apart + 1}",
            paths=(root / name,),
            frames=() if apart is None else (volume,),
        )
        for volume in range(header.voxels.num_volumes)
    ]


def _belongs_to_header(path: Path) -> bool:
    """Whether a header of the same stem, beside the file, names it as the place of its voxels."""
    if path.suffix.lower() not in _VOXEL_SUFFIXES:
        return False
    stem = path.with_suffix("") if path.suffix == ".gz" else path
    for suffix, read in _HEADERS.items():
        header = stem.with_suffix(suffix)
        if stem.suffix and header.is_file():
            try:
                return read(header).voxels.path == path
            except ScanRefused:
                return False
    return False
