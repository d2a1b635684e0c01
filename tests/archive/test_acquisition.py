"""What a DICOM header says of an acquisition, against what pydicom wrote, and on real headers."""

from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from hilum.archive.dicom.acquisition import read_acquisition, vendor_of, years_of


def write(path: Path, **values: object) -> Path:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.PatientName, data.PatientID = "Secret^Name", "12345"
    for name, value in values.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_what_is_said_is_read_and_no_one_is_named(tmp_path: Path) -> None:
    full = write(
        tmp_path / "a.dcm", Manufacturer="SIEMENS Healthineers", ConvolutionKernel=["Br60f", "3"], SliceThickness="1.5",
        PixelSpacing=["0.7", "0.7"], Rows=512, Columns=400, PatientSex="F", PatientAge="018M",
    )  # fmt: skip
    assert read_acquisition(full) == {
        "vendor": "SIEMENS", "kernel": "Br60f", "thickness": 1.5, "spacing": 0.7, "field_of_view": pytest.approx(358.4),
        "sex": "F", "age": 1.5,
    }  # fmt: skip
    assert read_acquisition(write(tmp_path / "b.dcm", Manufacturer="", PatientSex="X", PatientAge="000Y")) == {}
    (tmp_path / "c").write_bytes(b"no image")
    assert read_acquisition(tmp_path / "c") == {}


def test_words() -> None:
    assert [vendor_of(text) for text in ("GE MEDICAL SYSTEMS", "Philips, Best", "")] == ["GE", "PHILIPS", ""]
    assert [years_of(text) for text in ("036Y", "006M", "Y", "36")] == [36.0, 0.5, None, None]


def test_real_headers(real_data: Path) -> None:
    found = read_acquisition(next(p for p in sorted((real_data / "dicom/seg_liver_ct").rglob("*.dcm"))))
    assert (found["vendor"], found["kernel"], found["thickness"]) == ("GE", "STANDARD", 1.25)
    (mosaic, *_) = sorted((real_data / "dicom/mr_transfer_syntaxes_siemens_mosaic").rglob("*.dcm"))
    assert "field_of_view" not in read_acquisition(mosaic)
