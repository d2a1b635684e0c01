"""Is a store still what was written? Every file is read again and compared with the index."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hilum.archive.store.content import foreground_levels, measure_slices, unpack_cells
from hilum.archive.store.index import Row
from hilum.archive.store.store import Store, hash_pixels, open_volume, orphans, restore, volume_path
from hilum.archive.workers import Crashed, default_num_workers, run
from hilum.errors import StoreError
from hilum.records import hash_file, read_table
from hilum.terminal import Progress

Finding = dict[str, str]
"""`key` of the volume, or the name of a file of the store; `what` is wrong with it."""


def verify(
    store: str | Path, *, deep: bool = False, num_workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Read a store again from end to end.

    deep         also decode all voxels, and measure pixel hash and content anew
    num_workers  processes; None: one per core
    returns      num_volumes, num_slices, bytes, findings ({"key", "what"} each, sorted)

    Checks the order of the index, missing and extra files, and of each volume: size, checksum, shape, type, geometry,
    content; and that the ledger calls exactly the volumes of the index used.
    """
    opened = Store(store)
    findings = [*_check_order(opened), *_check_files(opened), *_check_ledger(opened)]
    work = partial(check_volume, root=opened.root, deep=deep)
    total, size = len(opened), 0
    with closing(run(work, opened.rows, min(num_workers or default_num_workers(), max(total, 1)))) as results:
        for done, (row, found) in enumerate(results, 1):
            size += row.bytes
            if isinstance(found, Crashed):
                found = ["reading it ends the process"]
            findings += [{"key": row.key, "what": what} for what in found]
            if progress:
                progress(done, total, "verifying volumes")
    findings.sort(key=lambda f: (f["key"], f["what"]))
    return {"num_volumes": total, "num_slices": opened.num_slices, "bytes": size, "findings": findings}


def check_volume(row: Row, root: Path, deep: bool) -> list[str]:
    """What is wrong with one volume. Reads the whole file."""
    path = volume_path(root, row.key)
    try:
        size = path.stat().st_size
        checksum = hash_file(path)
    except FileNotFoundError:
        return ["file is missing"]
    except OSError as error:
        return [f"file cannot be read ({type(error).__name__})"]
    found = _check_row(row)
    if size != row.bytes:
        found.append(f"file has {size} bytes, expected {row.bytes}")
    elif checksum != row.checksum:
        found.append(f"checksum is {checksum}, expected {row.checksum}")
    # Bytes that are not those that were written are not decoded: nothing good can come of it.
    return found if len(found) > 0 else _check_content(row, root, deep)


def _check_row(row: Row) -> list[str]:
    found = []
    if min(row.shape) < 1 or len(row.foreground) != row.shape[0]:
        found.append(f"index: shape {row.shape} with content of {len(row.foreground)} slices")
    if not np.isfinite([row.slope, row.intercept, row.threshold]).all() or row.slope == 0:
        found.append(f"index: slope {row.slope:g}, intercept {row.intercept:g}, threshold {row.threshold:g}")
    if row.affine is not None:
        affine = np.array(row.affine).reshape(4, 4)
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            found.append("index: affine is singular or not finite")
    return found


def _check_content(row: Row, root: Path, deep: bool) -> list[str]:
    """A file with the right bytes against its row: what only a wrong index or a fault of ours can break."""
    try:
        array, packed = open_volume(root, row.key)
        if array.shape != row.shape or array.dtype != np.int16:
            return [f"file holds {array.dtype} {array.shape}, expected int16 {row.shape}"]
        cells = np.stack([unpack_cells(packed, z) for z in range(row.shape[0])])
        stored = array[:] if deep else None
    except (StoreError, RuntimeError, ValueError) as error:
        return [f"file cannot be decoded ({type(error).__name__})"]
    found = []
    if foreground_levels(cells).tobytes() != row.foreground:
        found.append("index: foreground differs from the content in the file")
    if stored is not None:
        if hash_pixels(stored, row.slope, row.intercept) != row.pixel_hash:
            found.append("pixel hash differs from the voxels")
        measured = measure_slices((restore(s, row.slope, row.intercept) for s in stored), row.unit)
        if (measured.cells != cells).any() or np.float32(measured.threshold) != np.float32(row.threshold):
            found.append("content differs from what the voxels show")
    return found


def _check_order(store: Store) -> Iterator[Finding]:
    for before, key in pairwise(store.sorted_keys()):
        if key <= before:
            yield {"key": key, "what": f"index: {'twice' if key == before else 'not in order'}"}


def _check_files(store: Store) -> Iterator[Finding]:
    for path in orphans(store):
        yield {"key": path.relative_to(store.root).as_posix(), "what": "file is in no row of the index"}


def _check_ledger(store: Store) -> Iterator[Finding]:
    ledger = read_table(store.root / "ledger.parquet", ["key", "verdict"])
    used = {k for k, v in zip(ledger["key"].to_pylist(), ledger["verdict"].to_pylist()) if v != "refused"}
    keys = set(store.sorted_keys())
    yield from ({"key": key, "what": "ledger: not used, but in the index"} for key in keys - used)
    yield from ({"key": key, "what": "ledger: used, but not in the index"} for key in used - keys)
