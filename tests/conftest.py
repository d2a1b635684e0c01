"""Fixtures for all tests: the real data, where present, and a key."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Sums depend on the number of threads in their last bits: this process and those it starts use one. Set before torch loads.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from hilum import cli
from hilum.archive.privacy import Key


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans: $HILUM_TEST_DATA, or shared/data beside the checkout; else the test is skipped."""
    given = os.environ.get("HILUM_TEST_DATA")
    path = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set HILUM_TEST_DATA")
    return path


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Python waits at its end for processes that it started, for ever if they do not listen."""
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert not left, f"processes that no test ended: {left}"


@pytest.fixture(scope="session")
def key() -> Key:
    return Key(bytes(range(32)))


@pytest.fixture
def write_ct(tmp_path: Path) -> Callable[..., Path]:
    """Write a CT as a folder of DICOM files, one an index of its first axis, in the order of the array.

    voxels, affine   (Z, Y, X) in HU, and (k, j, i, 1) → LPS mm
    attributes       what every file has besides, or (None) has not
    """

    def write(name: str, voxels: np.ndarray, affine: np.ndarray, reverse: bool = False, **attributes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        slices, rows, columns = affine[:3, :3].T
        spacing = [float(np.linalg.norm(rows)), float(np.linalg.norm(columns))]
        for k, pixels in enumerate(voxels):
            data = Dataset()
            values = {
                "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "SOPInstanceUID": f"1.2.826.0.1.{k + 1}",
                "SeriesInstanceUID": "1.2.826.0.1.0.1", "StudyInstanceUID": "1.2.826.0.1.0.2", "PatientID": "P",
                "Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "SamplesPerPixel": 1,
                "Rows": pixels.shape[0], "Columns": pixels.shape[1], "PhotometricInterpretation": "MONOCHROME2",
                "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1, "PixelSpacing": spacing,
                "ImageOrientationPatient": [*(columns / spacing[1]), *(rows / spacing[0])],
                "ImagePositionPatient": [float(p) for p in affine[:3, 3] + k * slices], "InstanceNumber": k + 1,
                "RescaleSlope": 1, "RescaleIntercept": 0, "PixelData": pixels.astype("<i2").tobytes(), **attributes,
            }  # fmt: skip
            for keyword, value in values.items():
                if value is not None:
                    setattr(data, keyword, value)
            data["PixelData"].VR = "OW"
            data.file_meta = FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            number = len(voxels) - k if reverse else k
            data.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
        return folder

    return write


@pytest.fixture
def hilum(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hilum", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        captured = capsys.readouterr()
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return run
