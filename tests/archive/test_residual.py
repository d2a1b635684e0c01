"""Headers written with a known identifier in a known place."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from hilum.archive.judge.residual import residual_identifiers
from hilum.errors import ScanRefused

PIXELS = np.zeros((1, 8, 8), np.int16)


@pytest.fixture
def write_header(write_series):
    """Write one file without identifiers, changed by `edit(data)`."""

    def write(edit, **attributes) -> Path:
        plain = {"PatientID": "", "PatientName": "ANONYMOUS"} | attributes
        return write_series(PIXELS, edit=lambda k, data: edit(data), **plain)[0]

    return write


def test_a_clean_header_scores_nothing(write_header):
    path = write_header(lambda data: setattr(data, "PatientBirthDate", ""))
    assert residual_identifiers(path) == (0.0, ())


@pytest.mark.parametrize(
    ("keyword", "value", "least", "place"),
    [
        ("PatientName", "Doe^Jane", 0.9, "(0010,0010)"),
        ("PatientID", "4711-0815", 0.9, "(0010,0020)"),
        ("PatientAddress", "Elm Street 1", 0.9, "(0010,1040)"),
        ("PatientTelephoneNumbers", "0301234567", 0.7, "(0010,2154)"),
        ("PatientBirthDate", "19610203", 0.5, "(0010,0030)"),
        ("ReferringPhysicianName", "Smith^Ann", 0.3, "(0008,0090)"),
        ("OperatorsName", "Smith^Ann", 0.3, "(0008,1070)"),
        ("InstitutionName", "Mercy Hospital", 0.3, "(0008,0080)"),
        ("AccessionNumber", "A1234567", 0.3, "(0008,0050)"),
        ("StudyDate", "20240228", 0.3, "(0008,0020)"),
        ("PatientComments", "walks with a stick", 0.1, "(0010,4000)"),
        ("ImageComments", "call +49 30 1234567", 0.7, "(0020,4000)"),
        ("StudyComments", "mail jane.doe@example.org", 0.7, "(0032,4000)"),
    ],
)
def test_each_attribute_is_named_and_weighed(write_header, keyword, value, least, place):
    score, places = residual_identifiers(write_header(lambda data: setattr(data, keyword, value)))
    assert score >= least - 1e-9
    assert places == (place,)


@pytest.mark.parametrize(
    "value", ["", "ANON", "Anonymous^Patient", "REMOVED", "XXXXX", "*****", "^^^^", "unknown", "patient 001", "0000"]
)
def test_placeholders_do_not_count(write_header, value):
    path = write_header(lambda data: setattr(data, "PatientID", value), PatientName=value)
    assert residual_identifiers(path)[0] == 0.0


def private(vr: str, value) -> Callable[[Dataset], None]:
    def edit(data: Dataset) -> None:
        data.private_block(0x0029, "HILUM TEST", create=True).add_new(0x10, vr, value)

    return edit


@pytest.mark.parametrize(
    ("vr", "value"),
    [
        ("PN", "Doe^Jane"),
        ("LO", "seen on 2024-02-28"),
        ("LO", "20240228"),
        ("DA", "20240228"),
        ("LO", "case 123456789"),
        ("UN", b"\x00\x01jane.doe@example.org\x00\xff"),
        ("OB", b"\x00\x01 2024.02.28 \x00\xff"),
        ("LT", "tel (030) 123 4567"),
    ],
)
def test_private_elements_are_searched_for_patterns(write_header, vr, value):
    score, places = residual_identifiers(write_header(private(vr, value)))
    assert score >= 0.3 - 1e-9
    assert places == ("(0029,1010)",)


@pytest.mark.parametrize(
    ("vr", "value"),
    [
        ("LO", "kernel B30f"),
        ("DS", "0.12345678901"),
        ("UN", b"\x00\x01\x02\x03 12.5 \x00"),
        ("LO", "1.2.840.11350052013.4"),
        ("SL", 123456789),
    ],
)  # fmt: skip
def test_technical_private_elements_do_not_count(write_header, vr, value):
    assert residual_identifiers(write_header(private(vr, value))) == (0.0, ())


def test_the_patients_own_words_are_found_elsewhere(write_header):
    """In a comment, in a vendor's text header, in a sequence; not as a part of another word."""

    def edit(data: Dataset) -> None:
        data.SeriesDescription = "knee of quillfeather"
        data.ProtocolName = "quillfeathers"
        data.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(
            0x10, "OB", b"SV10\x04\x03\x02\x01 QUILLFEATHER\0"
        )
        item = Dataset()
        item.CodeMeaning = "for Quillfeather"
        data.AnatomicRegionSequence = Sequence([item])

    score, places = residual_identifiers(write_header(edit, PatientName="Quillfeather^J"))
    assert score > 0.95
    assert places == ("(0008,103E)", "(0008,2218)>(0008,0104)", "(0010,0010)", "(0029,1010)")


def test_sequences_meta_header_and_preamble_are_searched(write_header):
    def edit(data: Dataset) -> None:
        item = Dataset()
        item.PatientID = "4711-0815"
        item.IssuerOfPatientID = "Mercy"
        data.OtherPatientIDsSequence = Sequence([item])
        data.file_meta.PrivateInformationCreatorUID = "1.2.3"
        data.file_meta.PrivateInformation = b"jane.doe@example.org"
        data.preamble = b"jane.doe@example.org".ljust(128, b"\0")

    _, places = residual_identifiers(write_header(edit))
    assert places == (
        "(0002,0102)", "(0010,1002)>(0010,0020)", "(0010,1002)>(0010,0021)", "preamble",
    )  # fmt: skip


def test_places_never_quote_a_value(write_header):
    def edit(data: Dataset) -> None:
        private("PN", "Quillfeather^J")(data)
        data.InstitutionName = "Quillfeather Clinic"

    _, places = residual_identifiers(write_header(edit, PatientName="Quillfeather^J"))
    assert len(places) == 3
    assert "quill" not in " ".join(places).lower()


def test_more_kinds_score_higher_and_the_number_of_places_does_not_matter(write_header):
    one = residual_identifiers(write_header(lambda d: setattr(d, "StudyDate", "20240228")))[0]
    same = residual_identifiers(write_header(lambda d: d.update({"StudyDate": "20240228", "SeriesDate": "20240228"})))[
        0
    ]

    def both(data: Dataset) -> None:
        data.StudyDate, data.InstitutionName = "20240228", "Mercy Hospital"

    assert one == same < residual_identifiers(write_header(both))[0] < 1


def test_broken_files_are_refused(tmp_path, write_header):
    whole = write_header(private("LO", "x")).read_bytes()
    path = tmp_path / "broken"
    for content, reason in ((b"", "not_an_image"), (b"a letter", "not_an_image"), (whole[:140], "corrupt"),
                            (whole[:132] + b"\xff" * 400, "corrupt")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ScanRefused, match=reason):
            residual_identifiers(path)
    with pytest.raises(ScanRefused, match="unreadable"):
        residual_identifiers(tmp_path / "missing")


def test_every_real_file_can_be_looked_at(real_data):
    """The headers at hand were blanked of staff and institutions, not of everything: scores differ, nothing raises."""
    seen = {}
    for path in sorted(
        p for p in (real_data / "dicom").rglob("*") if p.is_file() and p.suffix not in (".md", ".gz", ".nii")
    ):
        if path.read_bytes()[128:132] == b"DICM" and path.parent not in seen:
            seen[path.parent] = residual_identifiers(path)
    assert len(seen) > 20
    named = real_data / "dicom" / "ct_mixed_study_philips_phantom" / "S2010_I10"
    assert pydicom.dcmread(named, stop_before_pixels=True).PatientName
    score, places = residual_identifiers(named)
    assert score > 0.9
    assert "(0010,0010)" in places
