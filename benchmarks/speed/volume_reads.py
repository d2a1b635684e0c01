"""How fast volumes become isotropic, and how fast cubes come out of the derived store.

    python benchmarks/speed/volume_reads.py [--slices 300] [--repeats 5] >> benchmarks/results/volume_reads_MACHINE_DATE.jsonl

One core, processor time (which other programs on the machine do not stretch), all in turn. A synthetic 512×512 CT of 1.5 mm
slices: 12 bits, noise over smooth shapes.

Body box: ours against VoxelFM's rule as its code has it, one convolution with 21³ ones (torch), on a part of the scan that a
convolution can cope with. Crops: random cubes of stored int16 from the derived store (cubic chunks); the same volume in the
plain store's layout (a chunk a slice); memory maps of uncompressed .npy and .pt, the fastest and largest way. Resample:
volumes a second from plain store to derived store with content, moments and checksums; its peak memory is that of another
process, also for a scan three times as long.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import print_lines
from store_reads import KEY, make_ct, write_store
from torch.nn import functional

from hilum.archive.body import BODY_HU, body_box
from hilum.archive.ledger import Entry, write_entries
from hilum.archive.store.isotropic import (
    IsotropicSettings,
    make_isotropic,
    read_region,
    resample_store,
    write_isotropic,
)
from hilum.archive.store.store import Store
from hilum.volume import Volume

SIDE, NUM_CROPS = 112, 50
SIDES = (21, 21, 21)
PART = np.s_[:48, 100:292, 40:232]  # 48×192×192
RESAMPLE = """
import sys
from hilum.archive.store.isotropic import resample_store
def peak():  # of this process alone; ru_maxrss would begin with its parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
resample_store(sys.argv[1], sys.argv[2], num_workers=1)
print(before, peak())
"""


def dense_box(voxels: np.ndarray) -> tuple[slice, ...]:
    """VoxelFM's rule, written out."""
    mask = torch.from_numpy(voxels > BODY_HU).float()[None, None]
    kept = functional.conv3d(mask, torch.ones(1, 1, *SIDES), padding=10)[0, 0] > 21**3 / 2
    places = kept.nonzero().numpy()
    low, high = np.maximum(places.min(0) - 10, 0), np.minimum(places.max(0) + 11, voxels.shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high))


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def write_plain(root: Path, vol: Volume) -> Store:
    store = write_store(root, vol)
    write_entries(root / "ledger.parquet", [Entry(key=KEY, modality="CT")])
    return store


def crop_readers(folder: Path, store: Store, plain: Store) -> dict[str, Callable[[tuple[int, ...]], object]]:
    """Ways to read one cube of the same volume."""
    voxels = store.read_stored(KEY)
    np.save(folder / "raw.npy", voxels)
    torch.save(torch.from_numpy(voxels), folder / "raw.pt")
    raw = np.load(folder / "raw.npy", mmap_mode="r")
    tensor = torch.load(folder / "raw.pt", mmap=True)
    by_slice = Store(plain.root)

    def box(start: tuple[int, ...]) -> tuple[slice, ...]:
        return tuple(slice(n, n + SIDE) for n in start)

    return {
        "derived store": lambda s: read_region(store, KEY, s, (SIDE,) * 3),
        "plain layout, a chunk a slice": lambda s: read_region(by_slice, KEY, s, (SIDE,) * 3),
        "memory map of .npy": lambda s: np.array(raw[box(s)]),
        "memory map of .pt": lambda s: tensor[box(s)].clone(),
    }


def peak_mib(plain: Path, out: Path) -> tuple[float, float]:
    """Memory of a process that resamples a store: with its modules alone, and at most."""
    done = subprocess.run([sys.executable, "-c", RESAMPLE, plain, out], capture_output=True, text=True, check=True)
    before, peak = map(float, done.stdout.split())
    return before, peak


def measure(folder: Path, vol: Volume, repeats: int) -> dict[str, list[float]]:
    part = np.ascontiguousarray(vol.voxels[PART])
    assert dense_box(part) == body_box(part, part.shape, SIDES)
    plain = write_plain(folder / "plain", vol)
    made = make_isotropic(plain, plain.row(KEY), IsotropicSettings())
    resample_store(plain.root, folder / "derived", num_workers=1)
    derived = Store(folder / "derived")
    value = Volume(voxels=made.stored, affine=made.affine, modality="CT", unit="HU")
    by_slice = write_plain(folder / "by_slice", value)
    readers = crop_readers(folder, derived, by_slice)
    size = derived.row(KEY).shape
    starts = [
        tuple(s) for s in np.random.default_rng(1).integers(0, np.array(size) - SIDE + 1, (NUM_CROPS, 3)).tolist()
    ]
    results: dict[str, list[float]] = {
        "bytes a voxel, derived store": [derived.row(KEY).bytes / np.prod(size)],
        "bytes a voxel, plain layout": [by_slice.row(KEY).bytes / np.prod(size)],
    }
    for _ in range(repeats):
        dense, ours = seconds(lambda: dense_box(part)), seconds(lambda: body_box(part, part.shape, SIDES))
        results.setdefault("body box of 48×192×192: dense convolution, ms", []).append(1e3 * dense)
        results.setdefault("body box of 48×192×192: ours, ms", []).append(1e3 * ours)
        results.setdefault("body box: times as fast as dense convolution", []).append(dense / ours)
        for what, read in readers.items():
            took = seconds(lambda read=read: [read(start) for start in starts])
            results.setdefault(f"random 112³ crops/s, {what}", []).append(NUM_CROPS / took)
        took = seconds(
            lambda: write_isotropic(folder, plain.row(KEY), make_isotropic(plain, plain.row(KEY), IsotropicSettings()))
        )
        results.setdefault("volumes made isotropic/s", []).append(1 / took)
        results.setdefault("native voxels made isotropic/s, millions", []).append(vol.voxels.size / took / 1e6)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vol = make_ct(given.slices)
        results = measure(folder, vol, given.repeats)
        before, peak = peak_mib(folder / "plain", folder / "again")
        longer = Volume(voxels=np.concatenate([vol.voxels] * 3), affine=vol.affine, modality="CT", unit="HU")
        write_plain(folder / "longer", longer)
        results["resample: MiB of the modules alone"] = [before]
        results["resample: peak MiB"] = [peak]
        results["resample: peak MiB, three times the slices"] = [peak_mib(folder / "longer", folder / "long")[1]]
    print_lines(results, num_slices=given.slices)


if __name__ == "__main__":
    main()
