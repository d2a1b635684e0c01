"""How fast an archive becomes a store: headers, slices read, slices stored, slices read back.

    python benchmarks/speed/read_series.py [--slices 200] [--repeats 5] >> benchmarks/results/read_MACHINE_DATE.jsonl

Works on a synthetic 512×512 CT in a temporary folder: uncompressed, 12 bits, noise over smooth shapes, so that it
compresses about as well as a scan. SimpleITK's ImageSeriesReader reads the same files in the same run, in turn with
ours. One JSON line per measurement: what, unit, repeats, minimum, median, maximum, machine, versions, commit.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import SimpleITK as sitk
from measure import print_lines, rate
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from hilum.archive.intake import read_scan
from hilum.archive.prepare import prepare
from hilum.archive.privacy import Key
from hilum.archive.scan import find
from hilum.archive.store.store import Store, volume_path

KEY = Key(bytes(32))


def write_series(folder: Path, num_slices: int, series: str = "1.2.3") -> None:
    """An axial CT with the attributes that a scanner writes, and a private block of the usual size."""
    rng = np.random.default_rng(0)
    y, x = np.indices((512, 512)) - 256
    body = np.where((x / 200) ** 2 + (y / 150) ** 2 < 1, 1064, 24)
    for k in range(num_slices):
        pixels = (body + rng.normal(0, 12, body.shape)).clip(0, 4095).astype(np.uint16)
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{series}.{k + 1}"
        data.SeriesInstanceUID, data.StudyInstanceUID, data.PatientID, data.Modality = series, "1.2", "P", "CT"
        data.ImageType, data.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "SIEMENS"
        data.InstanceNumber, data.SeriesNumber, data.AcquisitionNumber = k + 1, 1, 1
        data.StudyDate, data.StudyTime, data.SeriesDescription = "20200101", "120000", "CT"
        data.Rows = data.Columns = 512
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.PixelSpacing, data.SliceThickness = [0.75, 0.75], 1.5
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-192, -192, 1.5 * k]
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        block = data.private_block(0x0029, "BENCHMARK", create=True)
        for element in range(0x10, 0x60):
            block.add_new(element, "LO", "a private value of usual length")
        data.PixelData = pixels.tobytes()
        data["PixelData"].VR = "OW"
        data.save_as(folder / f"{k:05d}.dcm", enforce_file_format=True)


def read_with_sitk(folder: Path) -> None:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    sitk.GetArrayFromImage(reader.Execute())


def read_slices(store: Store, order: np.ndarray) -> None:
    key = store.rows[0].key
    for z in order:
        store.read_slice(key, int(z))


def read_raw(store: Store, order: np.ndarray) -> None:
    """The floor: the same slices with Blosc2 alone, opened each time as the store does."""
    path = str(volume_path(store.root, store.rows[0].key))
    for z in order:
        blosc2.open(path, mode="r")[int(z)]


def measure(num_slices: int, repeats: int) -> dict[str, list[float]]:
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "archive"
        folder.mkdir()
        write_series(folder, num_slices)
        order = np.random.default_rng(1).integers(0, num_slices, 500)
        (entry,) = find(folder, KEY)  # and warm up
        for n in range(repeats):
            root = Path(temporary) / f"store{n}"
            steps: dict[str, tuple[Callable[[], object], int]] = {
                "headers/s": (lambda: find(folder, KEY), num_slices),
                "series read slices/s": (lambda: read_scan(entry), num_slices),
                "SimpleITK series read slices/s": (lambda: read_with_sitk(folder), num_slices),
                "prepare slices/s": (lambda root=root: prepare(folder, root, key=KEY, num_workers=1), num_slices),
                "store random slices/s": (lambda root=root: read_slices(Store(root), order), len(order)),
                "raw Blosc2 random slices/s": (lambda root=root: read_raw(Store(root), order), len(order)),
            }
            for what, (work, count) in steps.items():
                results.setdefault(what, []).append(rate(work, count))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print_lines(measure(given.slices, given.repeats), num_slices=given.slices)


if __name__ == "__main__":
    main()
