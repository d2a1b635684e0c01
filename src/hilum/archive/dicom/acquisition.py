"""How a DICOM image was made and of whom, without a name: vendor, kernel, thickness, pixels, sex, age."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom

from hilum.archive.dicom.header import BROKEN, quiet


def read_acquisition(path: Path) -> dict[str, str | float]:
    """What one DICOM file says of these, none of which identifies a person; what it does not say is left out.

    vendor         first word of Manufacturer, in capitals: SIEMENS, GE
    model          ManufacturerModelName
    kernel         ConvolutionKernel, the first
    thickness      SliceThickness, mm
    spacing        of pixels between rows, mm
    field_of_view  the larger side of the image, mm; not of a mosaic, which holds many
    sex            M, F or O
    age            years; 000Y is what de-identification leaves, and is none

    {} when the file is no DICOM or broken: whoever reads its pixels says why.
    """
    try:
        with quiet(), open(path, "rb") as handle:
            header = pydicom.dcmread(handle, stop_before_pixels=True, specific_tags=list(_KEYWORDS))
            found = {name: read(header) for name, read in _READ.items()}
    except BROKEN:
        return {}
    return {name: value for name, value in found.items() if value not in (None, "")}


_KEYWORDS = (
    "Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "SliceThickness", "PixelSpacing", "Rows", "Columns",
    "PatientSex", "PatientAge", "ImageType",
)  # fmt: skip
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def _text(header: Any, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value if isinstance(value, str) else value[0] if value else "").strip()


def vendor_of(manufacturer: str) -> str:
    """ "Siemens Healthineers" → "SIEMENS"; makers change their names, scanners stay."""
    return (manufacturer.upper().replace(",", " ").split() or [""])[0]


def years_of(age: str) -> float | None:
    """ "036Y" → 36.0 (PS3.5, value representation AS); None for anything else, and for 000Y."""
    age = age.strip().upper()
    if age == "000Y" or age[-1:] not in _YEARS or not age[:-1].isdigit():
        return None
    return int(age[:-1]) * _YEARS[age[-1]]


def _sex(header: Any) -> str:
    sex = _text(header, "PatientSex").upper()
    return sex if sex in ("M", "F", "O") else ""


def _field(header: Any) -> float | None:
    spacing = header.get("PixelSpacing")
    many = {"MOSAIC", "VFRAME"} & set(header.get("ImageType") or ())
    if many or not spacing or not header.get("Rows") or not header.get("Columns"):
        return None
    return round(max(int(header.Rows) * float(spacing[0]), int(header.Columns) * float(spacing[1])), 3)


_READ: dict[str, Callable[[Any], str | float | None]] = {
    "vendor": lambda h: vendor_of(_text(h, "Manufacturer")),
    "model": lambda h: _text(h, "ManufacturerModelName"),
    "kernel": lambda h: _text(h, "ConvolutionKernel"),
    "thickness": lambda h: float(h.SliceThickness) if h.get("SliceThickness") else None,
    "spacing": lambda h: float(h.PixelSpacing[0]) if h.get("PixelSpacing") else None,
    "field_of_view": _field,
    "sex": _sex,
    "age": lambda h: years_of(_text(h, "PatientAge")),
}
