"""The quick header reader agrees with pydicom byte for byte, or leaves the file to pydicom."""

import io
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from hilum.archive.dicom.elements import read_elements

WANTED = frozenset((0x00080018, 0x00080060, 0x00100020, 0x0020000E, 0x00200032, 0x00280010, 0x00280030, 0x00281053))
LAST = max(WANTED)


def read(data: bytes):
    return read_elements(io.BytesIO(data), WANTED, LAST)


def assert_as_pydicom(data: bytes) -> None:
    found = read(data)
    assert found is not None
    reference = dcmread(io.BytesIO(data), stop_before_pixels=True)
    wanted = {tag: reference.get_item(tag).value or b"" for tag in WANTED if tag in reference}
    assert {tag: e.value for tag, e in found.data.items()} == wanted
    assert found.meta[0x00020010].strip(b"\0 ").decode() == reference.file_meta.TransferSyntaxUID


def nested(depth: int) -> Dataset:
    item = Dataset()
    item.SeriesInstanceUID = "9.9.9"  # not the one of the file
    item.PatientID = "inner"
    if depth:
        item.ReferencedSeriesSequence = Sequence([nested(depth - 1), nested(0)])
        item["ReferencedSeriesSequence"].is_undefined_length = True
        item.is_undefined_length_sequence_item = True
    return item


@pytest.fixture
def with_sequences(write_series, voxels):
    def edit(k, data):
        data.ReferencedImageSequence = Sequence([nested(2), nested(0)])
        data["ReferencedImageSequence"].is_undefined_length = k % 2 == 0
        data.private_block(0x0019, "TEST", create=True).add_new(1, "OB", b"x" * 20_000)  # longer than the first read

    return write_series(voxels[:2], edit=edit)


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
def test_equals_pydicom(with_sequences, syntax):
    for path in with_sequences:
        data = dcmread(path)
        buffer = io.BytesIO()
        if syntax:
            data.file_meta.TransferSyntaxUID = syntax
            data = data.copy()
            data.save_as(buffer, enforce_file_format=True, implicit_vr=True, little_endian=True)
        else:
            data.save_as(buffer, enforce_file_format=True)
        assert_as_pydicom(buffer.getvalue())


def test_leaves_other_encodings_to_pydicom(write_series, voxels):
    (path, *_) = write_series(voxels[:1])
    plain = path.read_bytes()
    assert read(plain) is not None
    assert read(plain[132:]) is None  # no preamble
    data = dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    assert read(buffer.getvalue()) is None
    assert read(plain.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0")) is None  # says it is big-endian


def test_never_differs_on_broken_files(with_sequences):
    """Every cut, and many changed bytes: nothing but None, or what pydicom reads from the same bytes."""
    data = with_sequences[0].read_bytes()
    rng = np.random.default_rng(0)
    for end in range(0, 1500, 7):
        found = read(data[:end])
        if found is not None:
            assert_as_pydicom(data[:end])
    for _ in range(300):
        changed = bytearray(data[:3000])
        changed[rng.integers(128, 1200)] = rng.integers(256)
        read(bytes(changed))  # no exception, no endless loop


def test_equals_pydicom_on_real_files(real_data):
    plain = 0
    for path in sorted((real_data / "dicom").rglob("*")):
        if path.is_file() and path.read_bytes()[128:132] == b"DICM":
            found = read(path.read_bytes())
            plain += found is not None
            if found is not None:
                assert_as_header(path, found.data)
    assert plain > 390


def assert_as_header(path: Path, found) -> None:
    reference = dcmread(path, stop_before_pixels=True, specific_tags=[hex(t)[2:].zfill(8) for t in WANTED])
    for tag in WANTED:
        value = reference.get_item(tag).value or b"" if tag in reference else None
        assert (found[tag].value if tag in found else None) == value, (path, hex(tag))
