"""What one DICOM slice says of itself, and whether it is a slice of CT or MR that can be used.

Attributes come as plain text (`Texts`), from the header of a classic file or from the functional groups of one frame
(`hilum.archive.dicom.frames`). Nothing is believed that can be checked.
"""

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import UID

from hilum.archive.dicom.codecs import LOSSY, MAYBE_LOSSY, PLAIN, missing_decoder, syntax_name
from hilum.archive.dicom.elements import Element, Elements
from hilum.archive.reasons import flag

# pydicom's own messages may quote identifiers; what matters in them reaches the ledger as a reason instead.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

# What pydicom and its decoders are known to raise on broken or hostile files. OSError: seeking beyond the end.
BROKEN = (
    InvalidDicomError, BytesLengthException, struct.error, zlib.error, EOFError, OSError, ValueError, TypeError,
    LookupError, AttributeError, NotImplementedError, ArithmeticError, MemoryError, RecursionError, RuntimeError,
)  # fmt: skip

# Attributes that may tell the volumes of one series or file apart, in the order in which they are tried. The last names
# the file: one mosaic is one volume, and often so is one enhanced file.
SPLIT_KEYWORDS = (
    "StackID", "EffectiveEchoTime", "EchoTime", "EchoNumbers", "TemporalPositionIndex", "TemporalPositionIdentifier",
    "DiffusionBValue", "DiffusionGradientOrientation", "DiffusionDirectionality", "NominalCardiacTriggerDelayTime",
    "TriggerTime", "TemporalPositionTimeOffset", "ASLContext", "InversionTimes", "InversionTime", "FlipAngle",
    "VelocityEncodingDirection", "MetaboliteMapDescription", "ComplexImageComponent", "KVP", "ConvolutionKernel", "FrameType",
    "FrameAcquisitionNumber", "AcquisitionNumber", "ImageType", "AcquisitionTime", "ContentTime",
    *(f"DimensionIndexValues[{n}]" for n in range(1, 10)), "SOPInstanceUID",
)  # fmt: skip
_CLASSIC_SPLITS = (
    "EchoTime", "EchoNumbers", "TemporalPositionIdentifier", "DiffusionBValue", "DiffusionGradientOrientation",
    "TriggerTime", "InversionTime", "FlipAngle", "KVP", "ConvolutionKernel", "AcquisitionNumber", "ImageType",
    "AcquisitionTime", "ContentTime",
)  # fmt: skip
# Binary attributes: format of one value (`struct`).
_BINARY = {
    **dict.fromkeys(("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
                     "PixelRepresentation", "FrameAcquisitionNumber", "PixelPaddingValue",
                     "PixelPaddingRangeLimit"), "H"),
    **dict.fromkeys(("TemporalPositionIndex", "DimensionIndexValues"), "I"),
    **dict.fromkeys(("DiffusionBValue", "DiffusionGradientOrientation", "EffectiveEchoTime", "InversionTimes",
                     "NominalCardiacTriggerDelayTime", "TemporalPositionTimeOffset", "VelocityEncodingDirection"), "d"),
}  # fmt: skip
TAGS = {
    keyword: int(tag_for_keyword(keyword) or 0)
    for keyword in (
        *_CLASSIC_SPLITS, "SOPClassUID", "SOPInstanceUID", "Modality", "Manufacturer", "PatientID", "SliceThickness",
        "SpacingBetweenSlices", "InstanceNumber", "StudyDate", "StudyInstanceUID", "SeriesInstanceUID",
        "ImagePositionPatient", "FrameOfReferenceUID",
        "ImageOrientationPatient", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
        "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleIntercept",
        "RescaleSlope", "RescaleType", "LossyImageCompression", "LossyImageCompressionRatio", "PixelPaddingValue",
        "PixelPaddingRangeLimit",
    )
}  # fmt: skip
LAST_TAG = max(TAGS.values())
HEADER_TAGS = [Tag(tag) for tag in TAGS.values()]
TAGS |= {
    keyword: int(tag_for_keyword(keyword) or 0)
    for keyword in (*SPLIT_KEYWORDS, "DimensionIndexValues", "VolumeBasedCalculationTechnique")
    if "[" not in keyword
}

_CLASSES = "1.2.840.10008.5.1.4.1.1."
_CLASSIC = {_CLASSES + "2": "CT", _CLASSES + "4": "MR"}
# Enhanced and legacy converted enhanced CT and MR (PS3.3 A.38, A.36, A.70, A.71).
ENHANCED = {_CLASSES + "2.1": "CT", _CLASSES + "2.2": "CT", _CLASSES + "4.1": "MR", _CLASSES + "4.4": "MR"}
# SOP class → reason; a trailing dot matches everything below. The first match counts (PS3.4 B.5).
_SET_ASIDE = (
    (_CLASSES + "4.3", "multiframe"),
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
# Values of ImageType (after the first two) that say: not the acquired signal. Anything else, such as a DERIVED\PRIMARY
# \AXIAL CT, a multi-planar reformat or an average, keeps the meaning of its voxels and is used.
_MAPS = {
    "ADC", "ADC_UNSPECIFIED", "EADC", "FA", "FA_MAP", "TENSOR", "COLFA", "CBF", "CBV", "MTT", "TTP", "TMAX",
    "RCBF", "RCBV", "RMTT", "RELCBF", "RELCBV", "RELMTT", "TTEST", "T_MAP", "T1_MAP", "T2_MAP", "T2_STAR_MAP",
    "T1 MAP", "T2 MAP", "T2_STAR MAP", "R2_MAP", "R2_STAR_MAP", "B0_MAP", "B1_MAP", "FIELD_MAP", "P", "PHASE",
    "PHASE MAP", "VELOCITY MAP", "SUB", "SUBTRACTION", "MIP", "MINIP", "MIN_IP", "PROJECTION IMAGE", "VRT", "SSD",
    "CPR", "CURVED", "IODINE",
}  # fmt: skip
_PARTS = {"I", "IMAGINARY"}  # of complex MR signals; real parts are images (phase-sensitive inversion recovery)
_MAPS_WHEN_DERIVED = {"PERFUSION", "ASL", "DIFFUSION_MAP"}
# VolumeBasedCalculationTechnique, PS3.3 C.8.16.2.1.4
PROJECTIONS = {"MAX_IP", "MIN_IP", "VOLUME_RENDER", "SURFACE_RENDER", "CURVED_MPR"}
_SANE = 1e7  # no position, spacing, slope or intercept of a scan is larger; NaN fails the comparison, too
_OTHER_UNITS = {"OD", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT"}  # RescaleType, PS3.3 C.11.1.1.2


MAX_PIXELS = 1 << 26  # 8192 × 8192 in one slice: four times each side of the largest CT matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What one slice says of itself. Identifiers in it stay in this room.

    path, frame  the file, and the frame or tile in it, from 0
    refusal      reason code when the slice is no plain CT or MR slice, with its `detail`; "" when it is
    position, orientation, pixel_spacing   in mm, () when absent or unusable
    slope, intercept                       None when absent
    number       InstanceNumber, 0 when absent
    corner       row and column of the slice's first pixel in its mosaic; () when the slice is a whole stored frame
    splits       values that may tell the volumes of one series apart, by keyword
    flags        cautions as `hilum.archive.reasons.flag` writes them
    """

    path: Path
    size: int
    frame: int = 0
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
    study_date: str = ""
    frame_of_reference: str = ""
    corner: tuple[int, ...] = ()
    splits: dict[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


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


_META = {
    "MediaStorageSOPClassUID": 0x00020002,
    "MediaStorageSOPInstanceUID": 0x00020003,
    "TransferSyntaxUID": 0x00020010,
}


class Texts:
    """Attributes of one slice as plain text, decoded without pydicom's (slow, warning) value conversion."""

    def __init__(self, data: Dataset) -> None:
        self.meta = {k: str(data.file_meta.get(k, "")) for k in _META}
        self.syntax = self.meta["TransferSyntaxUID"]
        self.elements: dict[int, Any] = {int(tag): element for tag, element in data.items()}
        self.patient_id = _patient_id(data)

    @staticmethod
    def of_plain(found: Elements) -> "Texts | None":
        """From the quick reader; None when a patient's name for the file needs a character set to be read."""
        patient_id = found.data.get(TAGS["PatientID"], Element(b"")).value
        if not patient_id.isascii():
            return None
        text = Texts.__new__(Texts)
        text.meta = {k: found.meta.get(tag, b"").decode("latin-1").strip(" \0") for k, tag in _META.items()}
        text.syntax = text.meta["TransferSyntaxUID"]
        text.elements = dict(found.data)
        text.patient_id = patient_id.decode("ascii").strip(" \0")
        return text

    def with_elements(self, elements: Mapping[int, Any]) -> "Texts":
        """The same file with other attributes."""
        other = copy(self)
        other.elements = dict(elements)
        return other

    def __getitem__(self, keyword: str) -> str:
        element = self.elements.get(TAGS[keyword])
        if element is None:
            return ""
        value = element.value
        if not isinstance(value, bytes):
            return "" if value is None else _plain(value)
        if code := _BINARY.get(keyword):
            order = "<" if getattr(element, "is_little_endian", True) else ">"
            size = struct.calcsize(code)
            values = struct.unpack(f"{order}{len(value) // size}{code}", value[: len(value) // size * size])
            return "\\".join(f"{v:g}" if code == "d" else str(v) for v in values)
        return value.decode("latin-1").strip(" \0")

    def numbers(self, keyword: str, wanted: int) -> tuple[float, ...]:
        """`wanted` sane numbers, or () when there are fewer, more, or other things."""
        try:
            values = tuple(float(v) for v in self[keyword].split("\\"))
        except ValueError:
            return ()
        return values if len(values) == wanted and all(abs(v) <= _SANE for v in values) else ()

    @property
    def sop_class(self) -> str:
        return self["SOPClassUID"] or self.meta["MediaStorageSOPClassUID"]


def _plain(value: Any) -> str:
    """A value that pydicom has converted already, written as in the file."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return str(value)
    return "\\".join(str(v) for v in value)


def integer(text: str) -> int:
    """The first value as a whole number; 0 when it is none."""
    try:
        return int(text.split("\\")[0])
    except ValueError:
        return 0


def describe(text: Texts, path: Path, size: int, forced: bool, frame: int = 0, num_frames: int = 1) -> Header:
    """One slice from its attributes.

    size        of the file, in bytes
    forced      the file has no preamble
    frame       number of the slice in a file of `num_frames`; classic files have one
    """
    repairs = ["no preamble or meta header"] if forced and not text.syntax else []
    sop_class = text.sop_class
    modality = _CLASSIC.get(sop_class, "") or ENHANCED.get(sop_class, "")
    if not sop_class and text["Modality"] in ("CT", "MR") and text["Rows"]:
        modality = text["Modality"]
        repairs.append("SOP class missing: taken from Modality")
    elif modality and not text["SOPClassUID"]:
        repairs.append("SOP class missing: taken from the meta header")
    if forced and not modality and not sop_class:
        return Header(path=path, size=size, refusal="not_an_image")
    refusal, detail = _refusal(text, sop_class, modality, size, num_frames)
    if modality and text["PhotometricInterpretation"] == "MONOCHROME1":
        repairs.append("MONOCHROME1: inverted" if modality == "MR" else "MONOCHROME1: values kept, they are HU")
    slope = next(iter(text.numbers("RescaleSlope", 1)), None)
    return Header(
        path=path,
        frame=frame,
        size=size,
        refusal=refusal,
        detail=detail,
        patient_id=text.patient_id,
        study_uid=text["StudyInstanceUID"],
        series_uid=text["SeriesInstanceUID"],
        instance_uid=text["SOPInstanceUID"] or text.meta["MediaStorageSOPInstanceUID"],
        modality=modality or (text["Modality"] if text["Modality"] in ("CT", "MR") else "OT"),
        manufacturer=text["Manufacturer"],
        transfer_syntax=syntax_name(text.syntax) if text.syntax else "",
        rows=integer(text["Rows"]),
        columns=integer(text["Columns"]),
        bits_allocated=integer(text["BitsAllocated"]),
        position=text.numbers("ImagePositionPatient", 3),
        orientation=text.numbers("ImageOrientationPatient", 6),
        pixel_spacing=text.numbers("PixelSpacing", 2),
        thickness=sum(text.numbers("SliceThickness", 1)),
        spacing_tag=sum(text.numbers("SpacingBetweenSlices", 1)),
        slope=slope,
        intercept=next(iter(text.numbers("RescaleIntercept", 1)), None),
        number=integer(text["InstanceNumber"]),
        study_date=text["StudyDate"],
        frame_of_reference=text["FrameOfReferenceUID"],
        splits={k: value for k in _CLASSIC_SPLITS if (value := text[k])},
        repairs=tuple(repairs),
        flags=_flags(text, modality, slope),
    )


def _refusal(text: Texts, sop_class: str, modality: str, size: int, num_frames: int) -> tuple[str, str]:
    """Why a slice is no plain CT or MR slice: (reason, detail), or ("", "")."""
    if not modality:
        for prefix, reason in _SET_ASIDE:
            if sop_class == prefix or (prefix.endswith(".") and sop_class.startswith(prefix)):
                return reason, ""
        return "other_object", UID(sop_class).name if UID(sop_class).name != sop_class else "unknown SOP class"
    kinds = text["ImageType"].upper().split("\\")
    if _LOCALIZERS & set(kinds):
        return "localizer", ""
    if sop_class not in ENHANCED and integer(text["NumberOfFrames"]) > 1:
        return "multiframe", f"{integer(text['NumberOfFrames'])} frames in a classic image"
    words = {*kinds[2:], *(k.split()[-1] for k in kinds[2:] if " " in k)}  # "CSA MIP", "CT_SOM5 MIP"
    maps = _MAPS | (_MAPS_WHEN_DERIVED if kinds[0] == "DERIVED" else set()) | (_PARTS if modality == "MR" else set())
    found = min(words & maps, default="")
    if found:
        return "derived", found
    if (integer(text["SamplesPerPixel"]) or 1) != 1:
        return "colour", f"{text['SamplesPerPixel']} samples per pixel"
    if modality == "CT" and text["RescaleType"].upper() in _OTHER_UNITS:
        return "not_hu", f"RescaleType {text['RescaleType'].upper()}"
    if modality == "CT" and not (text.numbers("RescaleSlope", 1) and text.numbers("RescaleIntercept", 1)):
        return "no_rescale", ""
    if text.numbers("RescaleSlope", 1) == (0.0,):
        return "no_rescale", "RescaleSlope 0"
    rows, columns, bits = (integer(text[k]) for k in ("Rows", "Columns", "BitsAllocated"))
    if not rows or not columns or not bits:
        return "truncated", "the header ends before it describes the pixels"
    if rows * columns > MAX_PIXELS:
        return "too_large", f"{rows}×{columns}"
    expected = rows * columns * bits // 8 * num_frames
    if text.syntax in PLAIN and size < expected:
        return "truncated", f"{size} bytes, expected at least {expected}"
    missing = missing_decoder(text.syntax, integer(text["BitsStored"] or "0"))
    return ("cannot_decode", missing) if missing else ("", "")


def _flags(text: Texts, modality: str, slope: float | None) -> tuple[str, ...]:
    """Cautions on the values of a slice (PS3.3 C.7.6.1.1.5 for lossy compression)."""
    found = []
    stated = text["LossyImageCompression"]
    if stated == "01" or text.syntax in LOSSY or (text.syntax in MAYBE_LOSSY and stated != "00"):
        ratios = text.numbers("LossyImageCompressionRatio", text["LossyImageCompressionRatio"].count("\\") + 1)
        found.append(flag("lossy", " and ".join(f"{r:.3g}:1" for r in ratios)))
    if modality == "MR" and slope not in (None, 1.0) and "PHILIPS" in text["Manufacturer"].upper():
        found.append(flag("philips_scaling"))
    return tuple(found)


def _patient_id(data: Dataset) -> str:
    """PatientID as text; characters beyond ASCII are read in the file's own character set, as labels will have them."""
    tag = TAGS["PatientID"]
    if tag not in data:
        return ""
    raw = data.get_item(tag).value
    if isinstance(raw, bytes) and raw.isascii():
        return raw.decode("ascii").strip(" \0")
    return str(data[tag].value or "").strip(" \0")
