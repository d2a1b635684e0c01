"""How fast a DICOM series becomes a store, beside the tools that make NIfTI of it; and what it takes.

    python benchmarks/speed/convert_series.py [--slices 300] [--repeats 5] [--workers] [--long 1000] \\
        >> benchmarks/results/convert_MACHINE_DATE.jsonl

One core (the process pins itself to it), except where two workers are named. A synthetic 512×512 CT: uncompressed, 12
bits, noise over smooth shapes, so that it compresses about as well as a scan. All tools take turns on the same files, warm
in the page cache: ours with everything that `prepare` does by default (headers, screening, face, checksums, fsync), the
others write uncompressed NIfTI. Rates are of wall time; "per core s" of processor time, children included, which a busy
machine stretches little. `limit:` lines are what the machine allows. Headers are of 6,000 files whose pixels are a hole.

    --workers  24 series of 100 slices with one worker and with two, and what two processes of plain arithmetic gain
    --long N   peak memory (VmHWM) of a worker that stores one series of N slices
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import print_lines, take_turns
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless

from hilum.archive.files import nifti
from hilum.archive.intake import read_scan
from hilum.archive.ledger import Entry
from hilum.archive.policy import AS_IS
from hilum.archive.prepare import _store_scan, prepare
from hilum.archive.privacy import Key
from hilum.archive.scan import find, scan_to
from hilum.archive.workers import Crashed, run

KEY = Key(bytes(32))
NUM_HEADERS = 6000
MIB = 1 << 20


def write_series(folder: Path, num_slices: int, series: str = "1.2.3", *, syntax: str = ExplicitVRLittleEndian) -> None:
    """An axial CT with the attributes that a scanner writes, and a private block of the usual size."""
    rng = np.random.default_rng(0)
    y, x = np.indices((512, 512)) - 256
    body = np.where((x / 200) ** 2 + (y / 150) ** 2 < 1, 1064, 24)
    for k in range(num_slices):
        data = make_slice(k, series)
        data.PixelData = (body + rng.normal(0, 12, body.shape)).clip(0, 4095).astype(np.uint16).tobytes()
        data["PixelData"].VR = "OW"
        if syntax == JPEG2000Lossless:
            data.compress(syntax, generate_instance_uid=False)
        data.save_as(folder / f"{k:05d}.dcm", enforce_file_format=True)


def write_headers(folder: Path, num_files: int, per_series: int = 200) -> None:
    """The same files without pixels: a hole of their size follows the header."""
    for n in range(num_files):
        path = folder / f"{n // per_series}" / f"{n % per_series:05d}.dcm"
        path.parent.mkdir(exist_ok=True)
        make_slice(n % per_series, f"1.2.3.{n // per_series}").save_as(path, enforce_file_format=True)
        os.truncate(path, path.stat().st_size + 512 * 512 * 2)


def make_slice(k: int, series: str) -> Dataset:
    """A slice without pixels."""
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
    return data


def with_hilum(folder: Path, out: Path) -> None:
    """The same work as the other tools do: headers, series, pixels, one uncompressed NIfTI."""
    (entry,) = find(folder, KEY)
    vol = read_scan(entry)
    assert vol.voxels.dtype == np.int16
    nifti.write(out / "hilum.nii", vol.voxels, vol.affine, 1.0, 0.0, packed=False)


def with_sitk(folder: Path, out: Path) -> None:
    import SimpleITK as sitk  # here, so that workers of this script hold only what ours import

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    sitk.WriteImage(reader.Execute(), str(out / "sitk.nii"), useCompression=False)


def with_dicom2nifti(folder: Path, out: Path) -> None:
    import dicom2nifti

    dicom2nifti.dicom_series_to_nifti(str(folder), str(out / "dicom2nifti.nii"), reorient_nifti=False)


def with_dcm2niix(folder: Path, out: Path) -> None:
    program = shutil.which("dcm2niix", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install dcm2niix"
    given = [program, "-z", "n", "-b", "n", "-f", "dcm2niix", "-w", "1", "-o", str(out), str(folder)]
    subprocess.run(given, check=True, capture_output=True)


def prepare_anew(archive: Path, store: Path, num_workers: int = 1) -> None:
    shutil.rmtree(store, ignore_errors=True)
    counts = prepare(archive, store, key=KEY, num_workers=num_workers)
    assert counts["num_volumes"], counts


def core_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def per_core(work: Callable[[], object], count: float, results: list[float]) -> None:
    start = core_seconds()
    work()
    results.append(count / (core_seconds() - start))


def measure_tools(num_slices: int, repeats: int) -> dict[str, list[float]]:
    """Series → store or NIfTI, in turn; ratios of each round."""
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        archive, out, store = (Path(temporary) / name for name in ("archive", "out", "store"))
        archive.mkdir()
        out.mkdir()
        write_series(archive, num_slices)
        (entry,) = find(archive, KEY)
        block, pixels = bytearray(64 * MIB), num_slices * 512 * 512 * 2
        work: dict[str, Callable[[], object]] = {
            "prepare slices": lambda: prepare_anew(archive, store),
            "read alone slices": lambda: read_scan(entry),
            "hilum to NIfTI slices": lambda: with_hilum(archive, out),
            "dicom2nifti slices": lambda: with_dicom2nifti(archive, out),
            "SimpleITK slices": lambda: with_sitk(archive, out),
            "dcm2niix slices": lambda: with_dcm2niix(archive, out),
            "limit: files read slices": lambda: [path.read_bytes() for path in archive.iterdir()],
            "limit: pixels copied in memory slices": lambda: [bytes(block) for _ in range(-(-pixels // len(block)))],
        }
        cores: dict[str, list[float]] = {what: [] for what in work}
        steps = {f"{what}/s": (partial(per_core, do, num_slices, cores[what]), num_slices) for what, do in work.items()}
        take_turns(steps, 1)  # warm up
        for found in cores.values():
            found.clear()
        results |= take_turns(steps, repeats) | {f"{what}, per core s": found for what, found in cores.items()}
    for form in ("{}/s", "{}, per core s"):
        for name, ours in (("prepare", "prepare slices"), ("to NIfTI", "hilum to NIfTI slices")):
            for tool in ("dicom2nifti", "SimpleITK", "dcm2niix"):
                theirs = results[form.format(f"{tool} slices")]
                what = f"{name} over {tool}" + (", per core s" if "core" in form else "")
                results[what] = [a / b for a, b in zip(results[form.format(ours)], theirs)]
    return results


def measure_jpeg_2000(num_slices: int, repeats: int) -> dict[str, list[float]]:
    """The share of reading a JPEG 2000 series that the decoder alone takes for the same streams, in processor time."""
    import openjpeg

    shares: list[float] = []
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        write_series(Path(temporary), num_slices, syntax=JPEG2000Lossless)
        (entry,) = find(Path(temporary), KEY)
        streams = [next(generate_frames(dcmread(p).PixelData, number_of_frames=1)) for p in entry.paths]
        for n in range(repeats + 1):
            read: list[float] = []
            bare: list[float] = []
            per_core(lambda: read_scan(entry), num_slices, read)
            per_core(lambda: [openjpeg.decode_pixel_data(s, version=2) for s in streams], num_slices, bare)
            if n:  # the first warms up
                rates += read
                shares.append(100 * read[0] / bare[0])
    return {"JPEG 2000 read slices, per core s": rates, "JPEG 2000 reading time in the decoder, %": shares}


def measure_headers(repeats: int) -> dict[str, list[float]]:
    everything = os.sched_getaffinity(0)
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        write_headers(Path(temporary), NUM_HEADERS)
        for num_workers, cores in ((1, {min(everything)}), (2, everything)):
            os.sched_setaffinity(0, cores)
            work = partial(scan_to, None, Path(temporary), KEY, num_workers=num_workers)
            work()
            what = f"headers/s, {num_workers} worker(s), start included"
            results |= take_turns({what: (work, NUM_HEADERS)}, repeats)
    os.sched_setaffinity(0, everything)
    return results


def measure_workers(repeats: int, num_series: int = 24, num_slices: int = 100) -> dict[str, list[float]]:
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        archive, store = Path(temporary) / "archive", Path(temporary) / "store"
        (archive / "0").mkdir(parents=True)
        write_series(archive / "0", num_slices, "1.2.3.0")
        for s in range(1, num_series):
            (archive / f"{s}").mkdir()
            write_series(archive / f"{s}", num_slices, f"1.2.3.{s}")
        steps: dict[str, tuple[Callable[[], object], float]] = {}
        for n in (1, 2):
            steps[f"prepare slices/s, {n} worker(s)"] = (
                partial(prepare_anew, archive, store, n),
                num_series * num_slices,
            )
            steps[f"limit: sums/s, {n} process(es)"] = partial(_sum_in, n), n
        results = take_turns(steps, repeats)
    for what in ("prepare slices/s, {} worker(s)", "limit: sums/s, {} process(es)"):
        pairs = zip(results[what.format(1)], results[what.format(2)])
        results[f"two over one: {what.split('/')[0]}"] = [two / one for one, two in pairs]
    return results


def _sum_in(num_processes: int) -> None:
    code = "for _ in range(40): sum(range(3_000_000))"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(num_processes)]
    assert not any(process.wait() for process in running)


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def store_and_tell(entry: Entry, store: Path) -> tuple[float, float]:
    """Peak memory of a worker before and after it has stored a scan."""
    begun = peak_mib()
    done = _store_scan(entry, store=store, policy=AS_IS)
    assert done.row is not None, done.entry.reason
    return begun, peak_mib()


def measure_long(num_slices: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / "archive"
        archive.mkdir()
        write_series(archive, num_slices)
        start = time.perf_counter()
        ((_, found),) = run(partial(store_and_tell, store=Path(temporary) / "store"), find(archive, KEY), 2)
        assert not isinstance(found, Crashed)
        seconds = time.perf_counter() - start
    return {
        "worker MiB before its first scan": [found[0]],
        f"worker peak MiB, {num_slices} slices": [found[1]],
        f"one series of {num_slices} slices/s, start included": [num_slices / seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--long", type=int, default=0)
    given = parser.parse_args()
    facts: dict[str, Any] = {"num_slices": given.slices, "load": round(os.getloadavg()[0], 2)}
    everything = os.sched_getaffinity(0)
    results = measure_headers(given.repeats)
    os.sched_setaffinity(0, {min(everything)})
    results |= measure_tools(given.slices, given.repeats)
    results |= measure_jpeg_2000(min(given.slices, 40), given.repeats)
    os.sched_setaffinity(0, everything)
    if given.workers:
        results |= measure_workers(given.repeats)
    if given.long:
        results |= measure_long(given.long)
    print_lines(results, **facts)


if __name__ == "__main__":
    main()
