"""200 identifiers in every place DICOM can hold them; none may be in anything that the commands write or print.

Each token is a random word written into one place. The whole store, the ledger (not its companion of paths, which is
documented to stay inside the hospital) and both output streams are searched byte by byte, and again after the columns of
Parquet files and the metadata and voxels of Blosc2 files have been unpacked.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from hilum.archive.ledger import Entry, write_entries

NAMES = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ResponsiblePerson",
    "ReferringPhysicianName", "ConsultingPhysicianName", "PhysiciansOfRecord", "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy", "OperatorsName", "RequestingPhysician", "ScheduledPerformingPhysicianName",
    "NamesOfIntendedRecipientsOfResults", "OrderEnteredBy", "EvaluatorName", "ContentCreatorName",
)  # fmt: skip
TEXTS = (
    "PatientID", "IssuerOfPatientID", "OtherPatientIDs", "PatientAddress", "PatientTelephoneNumbers", "Occupation",
    "MilitaryRank", "BranchOfService", "EthnicGroup", "CountryOfResidence", "RegionOfResidence", "PatientState",
    "PatientReligiousPreference", "MedicalRecordLocator", "Allergies", "MedicalAlerts", "SpecialNeeds",
    "AdditionalPatientHistory", "PatientComments", "InsurancePlanIdentification", "ReferringPhysicianAddress",
    "ReferringPhysicianTelephoneNumbers", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName",
    "StationName", "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "ProtocolName",
    "StudyDescription", "SeriesDescription", "StudyID", "AccessionNumber", "AdmissionID", "AdmittingDiagnosesDescription",
    "CurrentPatientLocation", "PatientInstitutionResidence", "VisitComments", "ImageComments", "StudyComments",
    "RequestedProcedureID", "RequestedProcedureDescription", "RequestedProcedureComments", "RequestingService",
    "ReasonForStudy", "FillerOrderNumberImagingServiceRequest", "PlacerOrderNumberImagingServiceRequest",
    "OrderCallbackPhoneNumber", "OrderEntererLocation", "PerformedProcedureStepID", "PerformedProcedureStepDescription",
    "PerformedStationName", "PerformedLocation", "CommentsOnThePerformedProcedureStep", "DerivationDescription",
    "ContrastBolusAgent", "SequenceName", "BodyPartExamined", "DetectorID", "GantryID", "PlateID", "CassetteID",
    "GeneratorID", "ConvolutionKernel", "FilterType", "CountsSource", "RescaleType", "AcquisitionComments",
    "ClinicalTrialSubjectID", "ClinicalTrialSponsorName", "ClinicalTrialSiteName", "ClinicalTrialProtocolName",
    "PatientOrientation", "ImageType", "ReceiveCoilName", "TransmitCoilName", "TriggerSourceOrType",
    "ReasonForTheRequestedProcedure", "ScheduledStationName", "ScheduledProcedureStepID", "ScheduledProcedureStepDescription",
    "ScheduledProcedureStepLocation", "InterpretationText", "ResultsComments", "Impressions", "TextComments",
    "TextString", "PixelSpacingCalibrationDescription", "LossyImageCompressionMethod", "TimezoneOffsetFromUTC",
)  # fmt: skip
UIDS = (
    "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "DeviceUID", "SynchronizationFrameOfReferenceUID",
    "IrradiationEventUID", "InstanceCreatorUID",
)  # fmt: skip
DATES = (
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "PatientBirthDate", "InstanceCreationDate",
    "PerformedProcedureStepStartDate", "AdmittingDate", "DateOfLastCalibration",
)  # fmt: skip
SEQUENCES = (
    "OtherPatientIDsSequence", "RequestAttributesSequence", "ReferringPhysicianIdentificationSequence",
    "PhysiciansOfRecordIdentificationSequence", "OperatorIdentificationSequence", "InstitutionCodeSequence",
    "ProcedureCodeSequence", "ReferencedStudySequence", "SourceImageSequence", "OriginalAttributesSequence",
    "ContributingEquipmentSequence", "DeidentificationMethodCodeSequence", "AdmittingDiagnosesCodeSequence",
)  # fmt: skip
PRIVATE_VRS = ("PN", "LO", "SH", "LT", "ST", "UT", "UC", "OB", "UN", "AE", "CS", "UI", "DA")


class Tokens:
    """Hands out identifiers, no two alike, and remembers each with the place it was meant for."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(2024)
        self.places: dict[str, str] = {}

    def word(self, place: str, length: int = 12) -> str:
        token = "Q" + "".join(self.random.choice(list("BCDFGHJKLMNPQRSTVWXZ"), length - 1))
        self.places[token] = place
        return token

    def uid(self, place: str) -> str:
        token = "2.25." + "".join(map(str, self.random.integers(1, 10, 18)))
        self.places[token] = place
        return token

    def date(self, place: str) -> str:
        """A day of a year in which this test cannot run and which no program writes by itself."""
        token = f"17{self.random.integers(10, 99)}{self.random.integers(10, 13)}{self.random.integers(10, 29)}"
        self.places[token] = place
        return token


def fill(data: Dataset, tokens: Tokens) -> None:
    """Write a token into every place of one header."""
    for keyword in NAMES:
        setattr(data, keyword, f"{tokens.word(keyword)}^{tokens.word(keyword)}")
    for keyword in TEXTS:
        value = tokens.word(keyword, 10)
        setattr(data, keyword, ["ORIGINAL", "PRIMARY", value] if keyword == "ImageType" else value)
    for keyword in UIDS:
        setattr(data, keyword, tokens.uid(keyword))
    for keyword in DATES:
        setattr(data, keyword, tokens.date(keyword))
    for keyword in SEQUENCES:
        inner, item = Dataset(), Dataset()
        inner.PatientID, inner.PersonName = tokens.word(f"{keyword} nested"), tokens.word(f"{keyword} nested")
        item.PatientID, item.InstitutionName = tokens.word(keyword), tokens.word(keyword)
        item.ReferencedSOPInstanceUID = tokens.uid(keyword)
        item.add_new(0x00081110, "SQ", Sequence([inner]))
        setattr(data, keyword, Sequence([item]))
    for group in (0x0009, 0x0029, 0x7FDF):
        block = data.private_block(group, tokens.word(f"creator {group:04x}"), create=True)
        for number, vr in enumerate(PRIVATE_VRS):
            place = f"private {group:04x} {vr}"
            value = tokens.uid(place) if vr == "UI" else tokens.date(place) if vr == "DA" else tokens.word(place)
            block.add_new(number + 1, vr, value.encode() if vr in ("OB", "UN") else value)
        item = Dataset()
        item.PatientName = tokens.word(f"private {group:04x} SQ")
        block.add_new(0x50, "SQ", Sequence([item]))
    overlay = np.packbits(np.eye(16, dtype=np.uint8), bitorder="little").tobytes()
    for element, vr, value in (
        (0x0010, "US", 16), (0x0011, "US", 16), (0x0040, "CS", "G"), (0x0050, "SS", [1, 1]), (0x0100, "US", 1),
        (0x0102, "US", 0), (0x0022, "LO", tokens.word("overlay description")), (0x1500, "LO", tokens.word("overlay label")),
        (0x4000, "LT", tokens.word("overlay comments")), (0x3000, "OW", overlay),
    ):  # fmt: skip
        data.add_new((0x6000, element), vr, value)
    data.add_new(0xFFFCFFFC, "OB", tokens.word("trailing padding").encode())
    data.preamble = tokens.word("preamble", 100).encode().ljust(128, b"\0")
    meta = data.file_meta
    meta.ImplementationVersionName, meta.SourceApplicationEntityTitle = (
        tokens.word("meta version"),
        tokens.word("meta AE"),
    )
    meta.PrivateInformationCreatorUID = tokens.uid("meta creator")
    meta.PrivateInformation = tokens.word("meta private").encode()


def texts(path: Path) -> Iterator[bytes]:
    """What a file holds: its bytes, and what they unpack to."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield repr(table.schema.metadata).encode()
        yield repr(table.to_pylist()).encode()
    elif path.suffix == ".arrow":
        with pa.ipc.open_file(path) as rows:
            yield repr(rows.schema.metadata).encode()
            yield repr(rows.read_all().to_pylist()).encode()
    elif path.suffix == ".b2nd":
        array = blosc2.open(path, mode="r")
        yield array[:].tobytes()
        for layer in (array.schunk.meta, array.schunk.vlmeta):
            for name in layer:
                value = layer[name]
                yield name.encode() + (value if isinstance(value, bytes) else repr(value).encode())


def leaks(tokens: Tokens, paths: list[Path], streams: dict[str, bytes]) -> list[str]:
    """Where which token shows: as text, in UTF-16, in any case; also in file names below the store."""
    found: set[str] = set()
    contents = [(p.name, text) for p in paths for text in texts(p)] + [(p.name, str(p).encode()) for p in paths]
    for where, content in [*contents, *streams.items()]:
        lower = content.lower()
        for token, place in tokens.places.items():
            small = token.lower()
            if small.encode() in lower or small.encode("utf-16-le") in lower:
                found.add(f"{place} in {where}")
    return sorted(found)


def command(*arguments: str | Path, key: Path) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "HILUM_KEY": str(key), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hilum", *map(str, arguments)], capture_output=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, write_series_to):
    """An archive full of tokens, and everything that scan and prepare make of it."""
    root, tokens = tmp_path_factory.mktemp("identifiers"), Tokens()
    y, x = np.indices((32, 32)) - 15.5
    body = np.where((y / 10) ** 2 + (x / 14) ** 2 < 1, 1064, 24) + np.random.default_rng(0).normal(0, 9, (6, 32, 32))
    voxels = body.astype(np.uint16)
    folder = f"archive/{tokens.word('folder name')}/{tokens.word('folder name')}"
    stack: dict[str, dict[str, str]] = {}

    def same_for_all(k: int, data: Dataset) -> None:
        """One patient, study and series, with tokens of their own in each further place of each slice."""
        fill(data, tokens)
        first = stack.setdefault("first", {n: data.get(n) for n in ("PatientID", *UIDS[:2])})
        for name, value in first.items():
            setattr(data, name, value)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = tokens.uid("SOPInstanceUID")
        data.RescaleType = "HU"

    good = write_series_to(root, voxels, edit=same_for_all, folder=folder, prefix=tokens.word("file name"))
    (root / folder / f"{tokens.word('broken file name')}.dcm").write_bytes(good[0].read_bytes()[:900])
    whole = good[1].read_bytes()
    (root / folder / f"{tokens.word('cut file name')}.dcm").write_bytes(whole[: len(whole) - 600])
    (root / folder / f"{tokens.word('damaged file name')}").write_bytes(whole[:700] + b"\xff" * 40 + whole[740:])
    (root / folder / f"{tokens.word('note name')}.txt").write_text(tokens.word("note"))
    write_series_to(
        root, voxels, edit=lambda k, d: fill(d, tokens), folder=f"{folder}/refused", series="7"
    )  # all apart
    archive, ledger, store, key = root / "archive", root / "ledger.parquet", root / "store", root / "key"
    runs = [
        command("scan", archive, "-o", ledger, "--pixels", key=key),
        command("scan", archive, "--json", key=key),
        command("prepare", archive, "-o", store, "--num-workers", "1", key=key),
        command(
            "prepare", archive, "-o", root / "other", "--min-slices", "9", "--num-workers", "1", "--quiet", key=key
        ),
        command("scan", archive / "missing", key=key),
        command("inspect", archive, "-o", root / "inspect.html", key=key),
        command("show", ledger, "--archive", archive, "-o", root / "show.html", key=key),
        command("embed", archive, "--model", root / "no model", "-o", root / "f.parquet", key=key),
    ]
    streams = {f"{run.args[3]} stdout": run.stdout for run in runs} | {
        f"{run.args[3]} stderr {n}": run.stderr for n, run in enumerate(runs)
    }
    written = [
        ledger,
        root / "inspect.html",
        root / "show.html",
        *(p for p in [*store.rglob("*"), *(root / "other").rglob("*")] if p.is_file()),
    ]
    return tokens, runs, written, streams


def test_enough_identifiers_in_enough_places(outcome):
    tokens, runs, written, _ = outcome
    assert len(tokens.places) >= 200
    assert len(set(tokens.places.values())) >= 150
    assert [run.returncode for run in runs[:3]] == [0, 0, 4]  # read, read, and stored but for the broken ones
    assert sum(p.suffix == ".b2nd" for p in written) >= 1
    names = sorted(p.name for p in written if p.suffix in (".parquet", ".arrow"))
    assert names == ["index.arrow"] * 2 + ["ledger.parquet"] * 3
    assert [p.stat().st_size > 10_000 for p in written if p.suffix == ".html"] == [True, True]


def test_nothing_that_is_written_or_printed_holds_an_identifier(outcome):
    tokens, _, written, streams = outcome
    # A path that the user typed may come back in an error about it; this one holds no token.
    assert leaks(tokens, written, streams) == []


def test_the_search_sees_what_would_leak(tmp_path):
    """The same search finds a name in any field of an entry, in a stream, in the metadata and in the voxels of a volume."""
    tokens = Tokens()
    for field in (
        "key",
        "patient",
        "study",
        "modality",
        "detail",
        "manufacturer",
        "transfer_syntax",
        "split_by",
        "plane",
        "region",
    ):
        path = tmp_path / f"{field}.parquet"
        write_entries(path, [Entry(**{"key": "0", field: tokens.word(field)})])
        assert leaks(tokens, [path], {}) == [f"{field} in {path.name}"]
    write_entries(tmp_path / "r.parquet", [Entry(key="0", repairs=(tokens.word("repairs"),))])
    assert leaks(tokens, [tmp_path / "r.parquet"], {}) == ["repairs in r.parquet"]
    name = tokens.word("metadata").encode()
    voxels = np.frombuffer(tokens.word("voxels").encode(), np.int16)
    blosc2.asarray(voxels.copy(), urlpath=str(tmp_path / "v.b2nd"), mode="w", meta={"content": name})
    assert set(leaks(tokens, [tmp_path / "v.b2nd"], {})) == {"metadata in v.b2nd", "voxels in v.b2nd"}
    assert leaks(tokens, [], {"stderr": b"error: " + tokens.word("stream").encode()}) == ["stream in stderr"]
