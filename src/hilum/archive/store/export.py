"""The store in other people's formats: NIfTI files, and tar shards in the WebDataset convention for streaming readers.

Names are the keys of the store; nothing else about a patient leaves than what the index holds. An interrupted export
leaves whole files, and the same command goes on.
"""

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hilum.archive.files import nifti
from hilum.archive.store.index import Row
from hilum.archive.store.store import Store, volume_path
from hilum.archive.workers import Crashed, default_num_workers, run
from hilum.errors import StoreError, UsageError
from hilum.records import explain_full_disk, read_json, write_atomic, write_json
from hilum.terminal import Progress

Item = TypeVar("Item")


def export_nifti(
    store: str | Path,
    out: str | Path,
    *,
    gzip: bool = True,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `KEY.nii.gz` (or `KEY.nii`) for every volume: the stored int16, scaled by scl_slope and scl_inter.

    returns  num_volumes, num_files written now

    The affine is the volume's own, turned from LPS to RAS; NIfTI keeps it in single precision. Images without geometry
    get qform_code and sform_code 0.
    """
    opened, out = Store(store), Path(out)
    suffix = ".nii.gz" if gzip else ".nii"
    _begin(out, {"format": "hilum-nifti", "store": opened.hash, "suffix": suffix})
    todo = [key for key in opened.sorted_keys() if not (out / f"{key}{suffix}").exists()]
    _work(partial(_write_nifti, root=opened.root, out=out, suffix=suffix), todo, num_workers, "writing NIfTI", progress)
    return {"num_volumes": len(opened), "num_files": len(todo)}


def _write_nifti(key: str, root: Path, out: Path, suffix: str) -> None:
    store = Store(root)
    row = store.row(key)
    affine = None if row.affine is None else np.array(row.affine).reshape(4, 4)
    with write_atomic(out / f"{key}{suffix}") as temporary:
        stored = store.read_stored(key)
        nifti.write(temporary, stored, affine, row.slope, row.intercept, packed=suffix.endswith(".gz"))


def export_webdataset(
    store: str | Path,
    out: str | Path,
    *,
    shard_mb: int = 512,
    voxels: str = "npy",
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `shard-000000.tar`, …: per volume `KEY.npy` or `KEY.b2nd`, and `KEY.json` with what the index knows.

    shard_mb  a shard ends before it grows beyond this many 10⁶ bytes; one volume is never cut
    voxels    "npy": int16 as stored, `value = stored · slope + intercept`; "b2nd": the compressed file of the store
    returns   num_volumes, num_shards, num_files (shards written now)

    Which volumes a shard holds follows from the index alone, in the order of the keys, so a shard can be made again.
    Keys are in no order of patients or dates: they are hashes.
    """
    if voxels not in ("npy", "b2nd") or shard_mb < 1:
        raise UsageError(f"voxels is npy or b2nd and shard_mb at least 1; found {voxels} and {shard_mb}")
    opened, out = Store(store), Path(out)
    shards = _plan(opened, shard_mb * 1_000_000, voxels)
    record = {"store": opened.hash, "voxels": voxels, "shard_mb": shard_mb, "num_shards": len(shards)}
    _begin(out, {"format": "hilum-webdataset", **record})
    todo = [s for s in enumerate(shards) if not _shard_path(out, s[0]).exists()]
    work = partial(_write_shard, root=opened.root, out=out, voxels=voxels)
    _work(work, todo, num_workers, "writing shards", progress)
    return {"num_volumes": len(opened), "num_shards": len(shards), "num_files": len(todo)}


def _shard_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.tar"


def _plan(store: Store, limit: int, voxels: str) -> list[tuple[int, int]]:
    """First and one past the last row of each shard."""
    table = store.rows.table
    if voxels == "npy":
        sizes = 2 * table["shape"].combine_chunks().flatten().to_numpy().reshape(-1, 3).prod(1, dtype=np.int64)
    else:
        sizes = table["bytes"].to_numpy()
    shards, first, filled = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        size += 4 * tarfile.BLOCKSIZE  # two headers, the JSON, and what fills the last block
        if filled and filled + size > limit:
            shards.append((first, number))
            first, filled = number, 0
        filled += size
    return [*shards, (first, len(sizes))] if len(sizes) else []


def _write_shard(shard: tuple[int, tuple[int, int]], root: Path, out: Path, voxels: str) -> None:
    number, (first, end) = shard
    store = Store(root)
    with (
        write_atomic(_shard_path(out, number)) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for n in range(first, end):
            row = store.rows[n]
            _add(tar, f"{row.key}.json", json.dumps(_describe(row), sort_keys=True).encode())
            if voxels == "npy":
                data = io.BytesIO()
                np.save(data, store.read_stored(row.key), allow_pickle=False)
                _add(tar, f"{row.key}.npy", data.getvalue())
            else:
                _add(tar, f"{row.key}.b2nd", volume_path(root, row.key).read_bytes())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without owner and time, so that equal volumes give equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _describe(row: Row) -> dict[str, Any]:
    """What a reader needs beside the voxels; lengths in mm, axes (k, j, i), affine to LPS."""
    affine = None if row.affine is None else np.array(row.affine).reshape(4, 4)
    return {
        "key": row.key,
        "patient": row.patient,
        "study": row.study,
        "modality": row.modality,
        "unit": row.unit,
        "plane": row.plane,
        "region": row.region,
        "shape": row.shape,
        "affine": None if affine is None else affine.tolist(),
        "spacing_mm": None if affine is None else np.linalg.norm(affine[:3, :3], axis=0).tolist(),
        "slope": row.slope,
        "intercept": row.intercept,
        "exact": row.exact,
    }


def _begin(out: Path, record: dict[str, Any]) -> None:
    """Begin an export, or go on with the same one. StoreError when the folder holds anything else."""
    path = out / "export.json"
    if path.exists():
        if read_json(path) != record:
            raise StoreError(f"{out} holds an export of another store or with other settings; choose a new folder")
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        return
    if out.exists() and any(not p.name.endswith(".tmp") for p in out.iterdir()):
        raise StoreError(f"{out} is not empty and no export; choose a new folder")
    with explain_full_disk(out):
        write_json(path, record)


def _work(
    function: Callable[[Item], None], items: list[Item], num_workers: int | None, what: str, progress: Progress | None
) -> None:
    with closing(run(function, items, min(num_workers or default_num_workers(), len(items)))) as results:
        for done, (item, result) in enumerate(results, 1):
            if isinstance(result, Crashed):
                raise StoreError(f"the process died on {item}; check the store with: hilum store verify")
            if progress:
                progress(done, len(items), what)
