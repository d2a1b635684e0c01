"""One DICOM file: what its header says, whether it is a plain CT or MR slice, and its pixels.

Files are recognised by content. The header is read once, with a fixed list of attributes, up to the last of them
(0028,1054): private groups, overlays and pixels are not touched. Nothing is believed that can be checked.
"""

import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

# pydicom's own messages may quote identifiers; what matters in them reaches the ledger as a reason instead.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

# What pydicom and its decoders are known to raise on broken or hostile files. OSError: seeking beyond the end.
BROKEN = (
    InvalidDicomError, BytesLengthException, struct.error, zlib.error, EOFError, OSError, ValueError, TypeError,
    LookupError, AttributeError, NotImplementedError, ArithmeticError, MemoryError, RecursionError, RuntimeError,
)  # fmt: skip

_TAGS = {
    keyword: int(tag_for_keyword(keyword) or 0)
    for keyword in (
        "ImageType", "SOPClassUID", "SOPInstanceUID", "ContentTime", "AcquisitionTime", "Modality", "Manufacturer",
        "PatientID", "SliceThickness", "EchoTime", "EchoNumbers", "SpacingBetweenSlices", "TriggerTime",
        "DiffusionBValue", "StudyInstanceUID", "SeriesInstanceUID", "AcquisitionNumber", "ImagePositionPatient",
        "ImageOrientationPatient", "TemporalPositionIdentifier", "SamplesPerPixel", "PhotometricInterpretation",
        "NumberOfFrames", "InstanceNumber", "StudyDate", "Rows", "Columns", "PixelSpacing", "BitsAllocated",
        "BitsStored", "HighBit", "PixelRepresentation", "RescaleIntercept", "RescaleSlope", "RescaleType",
    )
}  # fmt: skip
_LAST_TAG = max(_TAGS.values())
_PIXEL_DATA = 0x7FE00010
_HEADER_TAGS = [Tag(tag) for tag in _TAGS.values()]
# and: planar configuration, offset tables, pixels
SLICE_TAGS = [*_HEADER_TAGS, *map(Tag, (0x00280006, 0x7FE00001, 0x7FE00002, _PIXEL_DATA))]

_CLASSES = "1.2.840.10008.5.1.4.1.1."
CT_IMAGE, MR_IMAGE = _CLASSES + "2", _CLASSES + "4"
# SOP class → reason; a trailing dot matches everything below. The first match counts (PS3.4 B.5).
_SET_ASIDE = (
    *((_CLASSES + c, "multiframe") for c in ("2.1", "2.2", "4.1", "4.3", "4.4")),
    *((_CLASSES + c, "secondary_capture") for c in ("7", "7.")),
    *((_CLASSES + c, "projection") for c in ("1", "1.", "12.", "13.")),
    *((_CLASSES + c, "ultrasound") for c in ("3", "3.", "6", "6.")),
    *((_CLASSES + c, "segmentation") for c in ("66.4", "66.5", "66.7")),
    (_CLASSES + "481.3", "structure_set"),
    *((_CLASSES + c, "report") for c in ("88.", "104.")),
    (_CLASSES + "11.", "presentation"),
    (_CLASSES + "30", "parametric_map"),
    *((_CLASSES + c, "other_modality") for c in ("4.2", "20", "77.", "128", "128.", "130", "14.", "481.1")),
    ("1.2.840.10008.1.3.10", "dicomdir"),
)
_LOCALIZERS = {"LOCALIZER", "SCOUT", "SURVEY", "TOPOGRAM"}
_MOSAICS = {"MOSAIC", "VFRAME"}  # Siemens, United Imaging
# Values of ImageType (after the first two) that say: not the acquired signal. Anything else, such as a DERIVED\PRIMARY
# \AXIAL CT, a multi-planar reformat or an average, keeps the meaning of its voxels and is used.
_MAPS = {
    "ADC", "ADC_UNSPECIFIED", "EADC", "FA", "FA_MAP", "TENSOR", "COLFA", "CBF", "CBV", "MTT", "TTP", "TMAX",
    "RCBF", "RCBV", "RMTT", "RELCBF", "RELCBV", "RELMTT", "TTEST", "T_MAP", "T1_MAP", "T2_MAP", "T2_STAR_MAP",
    "T1 MAP", "T2 MAP", "T2_STAR MAP", "R2_MAP", "R2_STAR_MAP", "B0_MAP", "B1_MAP", "FIELD_MAP", "P", "PHASE",
    "PHASE MAP", "VELOCITY MAP", "SUB", "SUBTRACTION", "MIP", "MINIP", "MIN_IP", "PROJECTION IMAGE", "VRT", "SSD",
    "CPR", "CURVED", "IODINE",
}  # fmt: skip
_MAPS_WHEN_DERIVED = {"PERFUSION", "ASL", "DIFFUSION_MAP"}
_SANE = 1e7  # no position, spacing, slope or intercept of a scan is larger; NaN fails the comparison, too
_OTHER_UNITS = {"OD", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT"}  # RescaleType, PS3.3 C.11.1.1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What one file says of itself. Identifiers in it stay in this room.

    path         of the file
    refusal      reason code when the file is no plain CT or MR slice, with its `detail`; "" when it is
    position, orientation, pixel_spacing   in mm, () when absent or unusable
    slope, intercept                       None when absent
    number       InstanceNumber, 0 when absent
    frame        of the file that this slice is; 0 in a file with one slice
    splits       values that may tell the volumes of one series apart, by keyword
    """

    path: Path
    size: int
    refusal: str = ""
    detail: str = ""
    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_uid: str = ""
    modality: str = ""
    manufacturer: str = ""
    transfer_syntax: str = ""
    rows: int = 0
    columns: int = 0
    bits_allocated: int = 0
    position: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    pixel_spacing: tuple[float, ...] = ()
    thickness: float = 0.0
    spacing_tag: float = 0.0
    slope: float | None = None
    intercept: float | None = None
    number: int = 0
    frame: int = 0
    study_date: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()


SPLIT_KEYWORDS = (
    "EchoTime", "EchoNumbers", "TemporalPositionIdentifier", "DiffusionBValue", "TriggerTime", "AcquisitionNumber",
    "ImageType", "AcquisitionTime", "ContentTime",
)  # fmt: skip


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes (132 or more) is DICOM, also without preamble and meta header.

    Without the magic word, the first element must be a short one of group 0002 or 0008, in any encoding.
    """
    if head[128:132] == b"DICM":
        return True
    if len(head) < 16:
        return False
    for order in ("<", ">"):
        group, element, length = struct.unpack(f"{order}HHI", head[:8])
        if group not in (0x0002, 0x0008) or element > 0x0070:
            continue
        explicit = head[4:6] in (b"UL", b"UI", b"CS", b"SH", b"LO", b"DA", b"TM", b"OB")
        if explicit or (order == "<" and length <= 128):
            return True
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns about odd values; each that matters is checked here by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def read_header(handle: BinaryIO, path: Path) -> Header:
    """Read one file's header from its open handle.

    returns  always a Header; what is wrong with the file is its `refusal`
    """
    size = os.fstat(handle.fileno()).st_size
    handle.seek(0)
    forced = handle.read(132)[128:] != b"DICM"
    handle.seek(0)
    try:
        with quiet():
            data = read_partial(handle, _beyond, specific_tags=_HEADER_TAGS, force=forced)
            return describe(data, path, size, forced)
    except BROKEN as error:
        return Header(path=path, size=size, refusal="corrupt", detail=f"DICOM header ({type(error).__name__})")


def _beyond(tag: int, vr: str | None, length: int) -> bool:
    return int.__gt__(tag, _LAST_TAG)  # the operator of pydicom's tag class is ten times slower


def describe(data: Dataset, path: Path, size: int, forced: bool) -> Header:
    text = _Texts(data)
    meta = data.file_meta
    repairs = ["no preamble or meta header"] if forced and "TransferSyntaxUID" not in meta else []
    sop_class = text["SOPClassUID"] or str(meta.get("MediaStorageSOPClassUID", ""))
    modality = {CT_IMAGE: "CT", MR_IMAGE: "MR"}.get(sop_class, "")
    if not sop_class and text["Modality"] in ("CT", "MR") and text["Rows"]:
        modality = text["Modality"]
        repairs.append("SOP class missing: taken from Modality")
    elif modality and not text["SOPClassUID"]:
        repairs.append("SOP class missing: taken from the meta header")
    if forced and not modality and not sop_class:
        return Header(path=path, size=size, refusal="not_an_image")
    refusal, detail = _refusal(text, sop_class, modality, size)
    syntax = UID(text.syntax)
    return Header(
        path=path,
        size=size,
        refusal=refusal,
        detail=detail,
        patient_id=_patient_id(data),
        study_uid=text["StudyInstanceUID"],
        series_uid=text["SeriesInstanceUID"],
        instance_uid=text["SOPInstanceUID"] or str(meta.get("MediaStorageSOPInstanceUID", "")),
        modality=modality or (text["Modality"] if text["Modality"] in ("CT", "MR") else "OT"),
        manufacturer=text["Manufacturer"],
        transfer_syntax=syntax.name if syntax.is_transfer_syntax and not syntax.is_private else "",
        rows=_integer(text["Rows"]),
        columns=_integer(text["Columns"]),
        bits_allocated=_integer(text["BitsAllocated"]),
        position=text.numbers("ImagePositionPatient", 3),
        orientation=text.numbers("ImageOrientationPatient", 6),
        pixel_spacing=text.numbers("PixelSpacing", 2),
        thickness=sum(text.numbers("SliceThickness", 1)),
        spacing_tag=sum(text.numbers("SpacingBetweenSlices", 1)),
        slope=next(iter(text.numbers("RescaleSlope", 1)), None),
        intercept=next(iter(text.numbers("RescaleIntercept", 1)), None),
        number=_integer(text["InstanceNumber"]),
        study_date=text["StudyDate"],
        splits={k: text[k] for k in SPLIT_KEYWORDS if text[k]},
        repairs=tuple(repairs),
    )


def _refusal(text: "_Texts", sop_class: str, modality: str, size: int) -> tuple[str, str]:
    """Why a file is no plain CT or MR slice: (reason, detail), or ("", "")."""
    if not modality:
        for prefix, reason in _SET_ASIDE:
            if sop_class == prefix or (prefix.endswith(".") and sop_class.startswith(prefix)):
                return reason, ""
        return "other_object", UID(sop_class).name if UID(sop_class).name != sop_class else "unknown SOP class"
    kinds = text["ImageType"].upper().split("\\")
    if _LOCALIZERS & set(kinds):
        return "localizer", ""
    if _MOSAICS & set(kinds):
        return "mosaic", ""
    if _integer(text["NumberOfFrames"]) > 1:
        return "multiframe", f"{_integer(text['NumberOfFrames'])} frames in a classic image"
    found = next((k for k in kinds[2:] if k in _MAPS or (kinds[0] == "DERIVED" and k in _MAPS_WHEN_DERIVED)), "")
    if found:
        return "derived", found
    if (_integer(text["SamplesPerPixel"]) or 1) != 1:
        return "colour", f"{text['SamplesPerPixel']} samples per pixel"
    if text["PhotometricInterpretation"] == "MONOCHROME1":
        return "monochrome1", ""
    if modality == "CT" and text["RescaleType"].upper() in _OTHER_UNITS:
        return "not_hu", f"RescaleType {text['RescaleType'].upper()}"
    if modality == "CT" and not (text.numbers("RescaleSlope", 1) and text.numbers("RescaleIntercept", 1)):
        return "no_rescale", ""
    rows, columns, bits = (_integer(text[k]) for k in ("Rows", "Columns", "BitsAllocated"))
    if not rows or not columns or not bits:
        return "truncated", "the header ends before it describes the pixels"
    if text.syntax in PLAIN and size < rows * columns * bits // 8:
        return "truncated", f"{size} bytes, expected at least {rows * columns * bits // 8}"
    return "", ""


PLAIN = ("", ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
# Syntaxes whose decoder hands out stored words as they are; the others hand out numbers.
WORDS = (*PLAIN, DeflatedExplicitVRLittleEndian, RLELossless)


class _Texts:
    """Attributes of a header as plain text, decoded without pydicom's (slow, warning) value conversion."""

    def __init__(self, data: Dataset) -> None:
        self.syntax = str(data.file_meta.get("TransferSyntaxUID", ""))
        self.elements: dict[int, Any] = {int(tag): element for tag, element in data.items()}

    def __getitem__(self, keyword: str) -> str:
        element = self.elements.get(_TAGS[keyword])
        if element is None:
            return ""
        value = element.value
        if not isinstance(value, bytes):
            return "" if value is None else str(value)
        if keyword in _BINARY:
            order = "little" if getattr(element, "is_little_endian", True) else "big"
            return str(int.from_bytes(value[:2], order)) if len(value) >= 2 else ""  # type: ignore[arg-type]
        if keyword == "DiffusionBValue":
            order = "<" if getattr(element, "is_little_endian", True) else ">"
            return f"{struct.unpack(order + 'd', value)[0]:g}" if len(value) == 8 else ""
        return value.decode("latin-1").strip(" \0")

    def numbers(self, keyword: str, wanted: int) -> tuple[float, ...]:
        """`wanted` sane numbers, or () when there are fewer, more, or other things."""
        try:
            values = tuple(float(v) for v in self[keyword].split("\\"))
        except ValueError:
            return ()
        return values if len(values) == wanted and all(abs(v) <= _SANE for v in values) else ()


_BINARY = {"SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"}


def _integer(text: str) -> int:
    try:
        return int(text.split("\\")[0])
    except ValueError:
        return 0


def _patient_id(data: Dataset) -> str:
    """PatientID as text; characters beyond ASCII are read in the file's own character set, as labels will have them."""
    tag = _TAGS["PatientID"]
    if tag not in data:
        return ""
    raw = data.get_item(tag).value
    if isinstance(raw, bytes) and raw.isascii():
        return raw.decode("ascii").strip(" \0")
    return str(data[tag].value or "").strip(" \0")
