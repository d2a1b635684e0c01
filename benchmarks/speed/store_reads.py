"""How fast slices and 3D crops come out of a store, and an index of many volumes opens.

    python benchmarks/speed/store_reads.py [--slices 300] [--volumes 1500000] [--repeats 5] \\
        >> benchmarks/results/store_MACHINE_DATE.jsonl

One core. A synthetic 512×512 CT: 12 bits, noise over smooth shapes. Beside the store, in turn: Blosc2 alone on the same
file; np.memmap of uncompressed int16, the fastest and largest way; one slice of a .nii.gz through nibabel, the plain way.
The store's slices end in float32 with their content, those of memmap and NIfTI in float32, Blosc2 alone in int16. The
index rows are made up; `anonymous MiB` is the memory that opening costs beyond the mapped file. Peak memory counts the
pages of mapped files, once per mapping.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import pyarrow as pa
from measure import print_lines, rate, take_turns

from hilum.archive.store import index as index_module
from hilum.archive.store import store as store_module
from hilum.archive.store.export import export_nifti
from hilum.archive.store.index import INDEX_SCHEMA, index_path, merge_indexes, write_index
from hilum.archive.store.store import Store, open_for_writing, volume_path, write_header, write_volume
from hilum.volume import Volume

KEY = "a" * 16
SIDE = 112


def make_ct(num_slices: int) -> Volume:
    rng = np.random.default_rng(0)
    y, x = np.indices((512, 512)) - 256
    body = np.where((x / 200) ** 2 + (y / 150) ** 2 < 1, 40, -1000)
    noise = (rng.normal(0, 12, body.shape) for _ in range(num_slices))
    voxels = np.stack([np.rint(body + n).clip(-1024, 3071).astype(np.int16) for n in noise])
    affine = np.diag([1.5, 0.75, 0.75, 1.0])[[2, 1, 0, 3]]
    return Volume(voxels=voxels, affine=affine, modality="CT", unit="HU")


def write_store(root: Path, vol: Volume) -> Store:
    open_for_writing(root, {"key": "k"})
    write_index(index_path(root), [write_volume(root, KEY, vol)])
    write_header(root, {"key": "k", "status": "complete"})
    return Store(root)


def each(work: Callable[..., object], items: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for item in items:
            work(item)

    return run


def read_unopened(store: Store, z: int) -> None:
    store_module._open_array.cache_clear()
    store.read_slice(KEY, z)


def count_anatomy(store: Store) -> int:
    return sum(int((level > 127).sum()) for *_, level in store.foreground())


def make_steps(
    store: Store, raw: np.ndarray, packed: Path, vol: Volume
) -> dict[str, tuple[Callable[[], object], float]]:
    path = str(volume_path(store.root, KEY))
    array = blosc2.open(path, mode="r", dparams={"nthreads": 1})
    rng = np.random.default_rng(1)
    slices = rng.integers(0, len(raw), 500).tolist()
    starts = [tuple(s) for s in rng.integers(0, np.array(raw.shape) - SIDE + 1, (50, 3)).tolist()]

    def box(start: tuple[int, int, int]) -> tuple[slice, ...]:
        return tuple(slice(n, n + SIDE) for n in start)

    return {
        "random slices/s, store": (each(lambda z: store.read_slice(KEY, z), slices), 500),
        "random slices/s, raw Blosc2 kept open": (each(lambda z: array[z], slices), 500),
        "random slices/s, raw Blosc2 opened each time": (each(lambda z: blosc2.open(path, mode="r")[z], slices), 500),
        "random slices/s, store, volume not open yet": (each(lambda z: read_unopened(store, z), slices), 500),
        "random slices/s, memmap of raw int16": (each(lambda z: raw[z].astype(np.float32), slices), 500),
        "random slices/s, .nii.gz through nibabel": (
            each(lambda z: np.asarray(nib.load(packed).dataobj[..., z], np.float32), slices[:2]),
            2,
        ),
        "random 112³ crops/s, store": (each(lambda s: store.read_crop(KEY, s, (SIDE,) * 3), starts), 50),
        "random 112³ crops/s, raw Blosc2 kept open": (each(lambda s: array[box(s)], starts), 50),
        "random 112³ crops/s, memmap of raw int16": (each(lambda s: np.array(raw[box(s)]), starts), 50),
        "slices written/s, with content and checksums": (
            lambda: write_volume(store.root, "b" * 16, vol),
            float(len(raw)),
        ),
    }


def write_made_up_index(path: Path, num_volumes: int) -> None:
    """Rows as of real CTs with 20 to 283 slices; two sorted files, joined."""
    rng = np.random.default_rng(0)

    def tables(first: int) -> Iterator[pa.Table]:
        for start in range(first, num_volumes, 2 * index_module.BATCH_ROWS):
            numbers = range(start, min(start + 2 * index_module.BATCH_ROWS, num_volumes), 2)
            n, depths = len(numbers), rng.integers(20, 284, len(numbers))
            text = {name: [f"{v:016x}" for v in numbers] for name in ("patient", "study", "pixel_hash", "checksum")}
            columns = text | {
                "key": [f"{v << 32:016x}" for v in numbers],
                "modality": ["CT"] * n, "unit": ["HU"] * n, "plane": ["axial"] * n, "region": ["chest"] * n,
                "shape": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(depths, 3).astype(np.int32)), 3),
                "affine": pa.FixedSizeListArray.from_arrays(pa.array(rng.random(16 * n)), 16),
                "slope": [1.0] * n, "intercept": [0.0] * n, "exact": [True] * n, "threshold": [-600.0] * n,
                "foreground": [rng.bytes(d) for d in depths.tolist()],
                "look_hash": rng.integers(0, 1 << 63, n, np.uint64), "bytes": depths * 200_000,
            }  # fmt: skip
            arrays = [pa.array(columns[f.name], f.type) for f in INDEX_SCHEMA]
            yield pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA)

    path.parent.mkdir(parents=True, exist_ok=True)
    halves = [path.with_name(f"half{n}") for n in range(2)]
    for n, half in enumerate(halves):
        index_module._write_tables(half, tables(n))
    merge_indexes(path, halves)
    for half in halves:
        half.unlink()


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def measure_index(root: Path, num_volumes: int, repeats: int) -> dict[str, list[float]]:
    open_for_writing(root, {"key": "k"})
    write_header(root, {"key": "k", "status": "complete"})
    took = 1 / rate(lambda: write_made_up_index(index_path(root), num_volumes), 1)
    results: dict[str, list[float]] = {
        "index: seconds to make and join": [took],
        "index: MB on disk": [index_path(root).stat().st_size / 1e6],
    }
    keys = [f"{v << 32:016x}" for v in np.random.default_rng(2).integers(0, num_volumes, 1000).tolist()]
    for _ in range(repeats):
        before = anonymous_mib()
        results.setdefault("index: milliseconds to open", []).append(1e3 / rate(lambda: Store(root), 1))
        store = Store(root)
        results.setdefault("index: rows found by key/s", []).append(rate(each(store.row, keys), len(keys)))
        results.setdefault("index: anonymous MiB after that", []).append(anonymous_mib() - before)
        pass_all = each(count_anatomy, [store])
        results.setdefault("index: slices passed by their foreground/s", []).append(rate(pass_all, store.num_slices))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--volumes", type=int, default=1_500_000, help="rows of the made-up index")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    load = os.getloadavg()[0]  # above 0: others shared the cores
    with tempfile.TemporaryDirectory() as temporary:
        vol = make_ct(given.slices)
        store = write_store(Path(temporary) / "store", vol)
        vol.voxels.tofile(Path(temporary) / "raw")
        raw = np.memmap(Path(temporary) / "raw", np.int16, "r", shape=vol.voxels.shape)
        export_nifti(store.root, Path(temporary) / "nifti", num_workers=1)
        packed = Path(temporary) / "nifti" / f"{KEY}.nii.gz"
        results = {"bytes a voxel, store": [store.rows[0].bytes / vol.voxels.size]}
        results["bytes a voxel, .nii.gz level 1"] = [packed.stat().st_size / vol.voxels.size]
        results |= take_turns(make_steps(store, raw, packed, vol), given.repeats)
        results |= measure_index(Path(temporary) / "many", given.volumes, given.repeats)
    print_lines(results, num_slices=given.slices, num_volumes=given.volumes, load_before=round(load, 2))


if __name__ == "__main__":
    main()
