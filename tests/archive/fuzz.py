"""Break files on purpose and read them: `python fuzz.py SAMPLES FIRST COUNT` prints one JSON line per finding.

Mutant n is made from sample n mod N with random numbers of seed n, so that any finding can be made again. A mutant may
be refused by name or read; anything else (an exception that is no refusal, more than LIMIT_S of processor time, a shape
that its header does not say, pixels that are not there) is a finding. A crash ends the process, which the test sees.
"""

import json
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
from pydicom import dcmread

from hilum.archive.dicom import parametric_map
from hilum.archive.dicom.header import BROKEN
from hilum.archive.intake import read_scan
from hilum.archive.labels import read_labels
from hilum.archive.ledger import Entry
from hilum.archive.privacy import Key
from hilum.archive.scan import find
from hilum.errors import HilumError
from hilum.volume import Volume

LIMIT_S = 2.0
MEMORY = 8 << 30
HEADER = 4096  # most changes hit the first bytes, where headers are
GRID = Volume(
    voxels=np.zeros((6, 36, 42), np.int16),
    affine=np.array([[0, 0, 0.5, -50], [0, 0.8, 0, -40], [2.0, 0, 0, 10], [0, 0, 0, 1]]),
    modality="CT",
)
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")


def mutate(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """One to four changes of the kinds that disks, networks and programs make."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not out:
            break
        end = min(len(out), HEADER) if rng.random() < 0.7 else len(out)
        at = int(rng.integers(0, end))
        length = int(rng.integers(1, 64))
        kind = rng.integers(0, 8)
        if kind == 0:
            out[at] = int(rng.integers(256))
        elif kind == 1:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = rng.bytes(length)
        elif kind == 4:
            out[at : at + length] = bytes(min(length, len(out) - at))
        elif kind == 5:
            out[at : at + 4] = [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\1\0"][rng.integers(4)]
        elif kind == 6:
            del out[at:]
        else:
            start = int(rng.integers(0, max(len(other) - length, 1)))
            out[at : at + length] = other[start : start + length]
    return bytes(out)


def examine(path: Path) -> None:
    """Read one file as `prepare` would; assertion errors and unexpected exceptions are findings."""
    for entry in find(path, Key(bytes(32))):
        if not entry.used:
            examine_aside(entry, path)
            continue
        try:
            vol = read_scan(entry)
        except HilumError:
            continue
        assert sorted(vol.shape) == sorted((entry.num_slices, entry.rows, entry.columns)), (vol.shape, entry)
        assert np.isfinite(vol.voxels).all(), "voxels are not finite"
        if entry.reader == "dicom":
            assert_pixels_are_there(path)


def examine_aside(entry: Entry, path: Path) -> None:
    """Read what is set aside in a scan, but has a reader of its own."""
    try:
        if entry.reason == "segmentation":
            labels = read_labels(path, None).volume.voxels
            assert labels.ndim == 3, labels.shape
            assert labels.dtype.kind == "u", labels.dtype
            assert read_labels(path, GRID).volume.shape == GRID.shape
        elif entry.reason == "structure_set":
            assert read_labels(path, GRID).volume.shape == GRID.shape
        elif entry.reason == "parametric_map":
            values = parametric_map.read(path)[0].voxels
            assert np.isfinite(values).all(), "values are not finite"
    except HilumError:
        return


def assert_pixels_are_there(path: Path) -> None:
    """Uncompressed pixels are as many as the header says, by pydicom's own account.

    Where pydicom stumbles over damage between header and pixels, the file must still be long enough for them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = dcmread(path, force=True)
        except BROKEN:
            return
        if str(data.file_meta.get("TransferSyntaxUID", NATIVE[0])) not in NATIVE:
            return
        frames = int(data.get("NumberOfFrames", 1) or 1)
        expected = data.Rows * data.Columns * frames * data.BitsAllocated // 8
        found = len(data.PixelData) if "PixelData" in data else min(path.stat().st_size, expected)
    assert found in (expected, expected + expected % 2), f"{found} bytes of pixels, {expected} expected"


def main(samples: Path, first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    files = sorted(p for p in samples.iterdir() if p.is_file())
    with tempfile.TemporaryDirectory() as folder:
        for n in range(first, first + count):
            rng = np.random.default_rng(n)
            source, other = files[n % len(files)], files[rng.integers(len(files))]
            path = Path(folder) / source.name
            path.write_bytes(mutate(source.read_bytes(), rng, other.read_bytes()))
            print(json.dumps({"at": n}), flush=True)
            start, found = time.process_time(), ""
            try:
                examine(path)
            except Exception:
                found = traceback.format_exc()
            seconds = time.process_time() - start
            if seconds > LIMIT_S:
                found += f"took {seconds:.1f} s"
            if found:
                print(json.dumps({"mutant": n, "sample": source.name, "found": found}), flush=True)
            path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
