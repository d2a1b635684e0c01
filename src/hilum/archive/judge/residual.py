"""Identifiers left in a DICOM header that was meant to be clean: where they may be, never what they are.

hilum copies no text from headers, so this says nothing about a store. It tells the owner of an archive how far the files
themselves are from de-identified, before they are shared with anyone else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from hilum.archive.dicom.header import BROKEN, looks_like_dicom, quiet
from hilum.errors import ScanRefused

# What each kind of finding adds: score = 1 - Π(1 - weight) over the kinds found, however often each. A patient's name or
# number alone decides; staff, places and dates only narrow a search; a pattern in unknown bytes is a suspicion.
WEIGHTS = {
    "patient": 0.9,  # name, number or address of the patient
    "repeated": 0.9,  # words of PatientName or PatientID in another place
    "contact": 0.7,  # e-mail or telephone number
    "private_name": 0.6,  # a private element of VR PN
    "birth": 0.5,
    "number": 0.3,  # order, admission or device number; 8 or more digits in private or free text
    "staff": 0.3,
    "place": 0.3,
    "date": 0.3,
    "text": 0.1,  # free text that nobody can vouch for
}
_MAX_ELEMENTS = 50_000
_MAX_DEPTH = 16
_HEAD_BYTES = 512
_MAX_BYTES = 1 << 20  # of one value; what is longer holds pixels, waveforms or curves

# PS3.15 table E.1-1 (Basic Application Level Confidentiality Profile): attributes that hold identifiers as plain text.
# Person names, dates and private elements are recognised by their VR and group.
_KEYWORDS = {
    "patient": {
        "PatientID", "OtherPatientIDs", "PatientAddress", "MedicalRecordLocator", "PatientInsurancePlanCodeSequence",
        "PersonAddress", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "PersonIdentificationCode",
        "InsurancePlanIdentification", "MilitaryRank", "Occupation",
    },
    "contact": {
        "PatientTelephoneNumbers", "PatientTelecomInformation", "PersonTelephoneNumbers", "PersonTelecomInformation",
        "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers", "OrderCallbackPhoneNumber",
        "OrderCallbackTelecomInformation",
    },
    "number": {
        "AccessionNumber", "StudyID", "AdmissionID", "ServiceEpisodeID", "RequestedProcedureID",
        "ScheduledProcedureStepID", "PerformedProcedureStepID", "FillerOrderNumberImagingServiceRequest",
        "PlacerOrderNumberImagingServiceRequest", "DeviceSerialNumber", "GantryID", "DetectorID", "PlateID",
        "CassetteID", "GeneratorID", "DeviceUID", "ConfirmationID", "InterpretationID", "ResultsID", "DigitalSignatureUID",
    },
    "place": {
        "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "CurrentPatientLocation",
        "PatientInstitutionResidence", "CountryOfResidence", "RegionOfResidence", "ScheduledStationName",
        "ScheduledStationAETitle", "PerformedStationName", "PerformedStationAETitle", "PerformedLocation",
        "ScheduledProcedureStepLocation", "RequestingService", "OrderEntererLocation", "IssuerOfPatientID",
        "IssuerOfAdmissionID", "ClinicalTrialSiteID", "ClinicalTrialSiteName", "ClinicalTrialSponsorName",
        "SourceApplicationEntityTitle", "ResponsibleOrganization", "RequestingInstitution",
    },
    "text": {
        "PatientComments", "ImageComments", "StudyComments", "AdditionalPatientHistory", "VisitComments",
        "SpecialNeeds", "PatientState", "Allergies", "MedicalAlerts", "AdmittingDiagnosesDescription",
        "RequestedProcedureComments", "ImagingServiceRequestComments", "ReasonForTheRequestedProcedure",
        "CommentsOnThePerformedProcedureStep", "CommentsOnTheScheduledProcedureStep", "DerivationDescription",
        "FrameComments", "AcquisitionComments", "IdentifyingComments", "OverlayComments", "TextValue", "UnformattedTextValue",
        "InterpretationText", "ResultsComments", "DischargeDiagnosisDescription", "ModifiedAttributesSequence",
    },
}  # fmt: skip
_KIND_OF = {keyword: kind for kind, keywords in _KEYWORDS.items() for keyword in keywords}
_TEXT_VRS = {"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
_BYTES_VRS = {"UN", "OB", "OW", "OB or OW"}
_FREE_VRS = {"LT", "ST", "UT", "UC", "UN", "OB"}  # may hold anything, also in standard attributes

_BLANK = re.compile(
    r"[\W_]*|(.)\1*|.*(anon|remov|unknown|de-?ident|redact|withheld|blank|dummy).*|n/?a|none|nil|null|no[\W_]?name|"
    r"(patient|subject|case|phantom)?[\W_]*\d{0,4}|(19|18)000101|00010101|0101",
    re.IGNORECASE | re.DOTALL,
)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{2,63})+")
_PHONE = re.compile(r"(?<![\w.])(\+\d{1,3}[ /-]?|\(?0\d{1,5}\)?[ /-])\d[\d /-]{5,13}\d(?![\w.])")
_DATE = re.compile(r"(?<![\d.])(19|20)\d\d([-/.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?![\d.])")
_NUMBER = re.compile(r"(?<![\w.+-])\d{8,}(?![\w.])")
_RUN = re.compile(rb"[\x20-\x7e]{6,}")  # readable text in unknown bytes


@dataclass(frozen=True)
class _Value:
    """One value of a header: where it is, its attribute, VR, and its text."""

    place: str
    tag: BaseTag | None
    keyword: str
    vr: str
    text: str

    @property
    def is_private(self) -> bool:
        return self.tag is not None and self.tag.is_private


def residual_identifiers(path: Path) -> tuple[float, tuple[str, ...]]:
    """Where one DICOM file's header still carries what looks like an identifier.

    returns  score in [0, 1] (WEIGHTS), and the places: "(gggg,eeee)", in sequences "(gggg,eeee)>(gggg,eeee)",
             "preamble" for the 128 bytes before the header; sorted, each once, no values

    Looked at: the attributes of PS3.15 table E.1-1, all person names and dates, e-mail addresses, telephone numbers, dates
    and long numbers in private and free text, and the words of PatientName and PatientID anywhere else. Empty and
    obvious placeholder values do not count. UIDs count only when they contain the patient's number, since a new UID and
    an old one look alike. Values over 1 MB, pixels and whatever follows them are not read.

    Raises ScanRefused when the file is no DICOM or cannot be parsed.
    """
    try:
        with open(path, "rb") as handle:
            if not looks_like_dicom(handle.read(_HEAD_BYTES)):
                raise ScanRefused("not_an_image")
        with quiet():
            data = dcmread(path, stop_before_pixels=True, force=True, defer_size=_MAX_BYTES)
            values = list(_values(data, ""))
            values += list(_values(data.file_meta, ""))
    except (PermissionError, FileNotFoundError) as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except BROKEN as error:
        raise ScanRefused("corrupt", f"DICOM header ({type(error).__name__})") from None
    if not len(data):
        raise ScanRefused("corrupt", "no element of a DICOM header can be read")
    if data.preamble:
        values.append(_Value("preamble", None, "", "OB", _readable(data.preamble)))
    own = _own_words(values)
    found: dict[str, set[str]] = {}
    for value in values:
        for kind in _kinds(value, own):
            found.setdefault(kind, set()).add(value.place)
    missing = 1.0
    for kind in found:
        missing *= 1 - WEIGHTS[kind]
    return 1 - missing, tuple(sorted(set().union(*found.values())))


def _values(data: Dataset, inside: str, depth: int = 0) -> Iterator[_Value]:
    """Every value of a dataset, sequences included, up to fixed bounds."""
    for number, tag in enumerate(sorted(data.keys())):
        raw = data.get_item(tag)
        length = getattr(raw, "length", 0)
        if number >= _MAX_ELEMENTS or (raw is not None and raw.value is None and length):
            continue  # deferred: longer than _MAX_BYTES
        place = f"{inside}({tag.group:04X},{tag.element:04X})"
        try:
            element = data[tag]
        except BROKEN:  # a value that contradicts its VR: its bytes still count
            value = getattr(raw, "value", b"")
            yield _Value(place, tag, "", "UN", _readable(value) if isinstance(value, bytes) else "")
            continue
        if element.VR == "SQ":
            if depth < _MAX_DEPTH:
                for item in element.value or ():
                    yield from _values(item, place + ">", depth + 1)
        else:
            yield _Value(place, tag, element.keyword, element.VR, _text(element))


def _text(element: DataElement) -> str:
    value = element.value
    if value is None or (element.tag.group in range(0x6000, 0x6100, 2) and element.tag.element == 0x3000):
        return ""
    if isinstance(value, bytes):
        return _readable(value) if element.VR in _BYTES_VRS else value.decode("latin-1")
    if element.VR not in _TEXT_VRS:
        return ""
    return "\n".join(map(str, value)) if element.VM > 1 else str(value)


def _readable(data: bytes) -> str:
    return "\n".join(run.decode("ascii") for run in _RUN.findall(data))


def _own_words(values: list[_Value]) -> re.Pattern[str] | None:
    """A pattern of the words that name this patient; None when the name and number are blank."""
    words = set()
    for value in values:
        if value.tag is None or ">" in value.place or value.keyword not in ("PatientName", "PatientID"):
            continue
        for word in re.findall(r"\w+", value.text.replace("_", " ")):
            long_enough = len(word) >= (6 if word.isdigit() else 3)
            if long_enough and not _BLANK.fullmatch(word):
                words.add(word)
    if not words:
        return None
    return re.compile(r"(?<![^\W_])(" + "|".join(map(re.escape, sorted(words))) + r")(?![^\W_])", re.IGNORECASE)


def _kinds(value: _Value, own: re.Pattern[str] | None) -> Iterator[str]:
    """The kinds of identifier that one value looks like."""
    text = value.text.strip(" \0\r\n\t")
    if not text:
        return
    if own and value.keyword not in ("PatientName", "PatientID") and own.search(text):
        yield "repeated"
    if _BLANK.fullmatch(text) or value.vr == "UI":
        return
    of_patient = value.tag is not None and value.tag.group == 0x0010
    if value.vr == "PN":
        yield "private_name" if value.is_private else "patient" if of_patient else "staff"
    elif value.vr in ("DA", "DT"):
        yield "birth" if of_patient else "date"
    elif value.keyword in _KIND_OF:
        yield _KIND_OF[value.keyword]
    if value.is_private or value.vr in _FREE_VRS or value.keyword in _KIND_OF:
        for kind, pattern in (("contact", _EMAIL), ("contact", _PHONE), ("date", _DATE), ("number", _NUMBER)):
            if pattern.search(text):
                yield kind
