"""The store that encoders of volumes are trained from: each volume cut to the patient and made isotropic, once.

A derived store is a store like any other: same keys, patients and index. Its volumes are turned to one orientation, cut to
the box of the body, clipped (HU) and interpolated to cubic voxels, by the rules that scans are given later (`archive.body`,
`encode.volume_contract`). They are written in cubic chunks, so that a cube of voxels is cheap to read, and carry two more
things: `moments`, mean and standard deviation of the body box before it was resampled, and `volume`, a coarse grid of where
the anatomy is.

Chunks of 64³ in blocks of 32³, LZ4 after a byte shuffle: of a noisy CT (one core, best of three) 870 crops of 112³/s and 0.98
bytes a voxel, where a chunk a slice and a bit shuffle, the plain store's way, give 180 crops/s and 0.84 bytes; that bit shuffle
on cubes 350 crops/s and 0.81 bytes. A slice is read at 540/s instead of 5,400: train on slices from the plain store.
"""

import heapq
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from hilum.archive.body import (
    BODY_HU,
    MAX_SHEAR_DEG,
    body_box,
    body_sides,
    cut,
    isotropic_shape,
    moments,
    resize,
    resized,
    whole,
)
from hilum.archive.intake import refuse
from hilum.archive.ledger import Entry, entries_of, read_entries, write_sorted
from hilum.archive.locks import hold
from hilum.archive.parts import Done, drop_parts, drop_remains, fill, parts_of, stop_on_signals
from hilum.archive.store.content import GRID, average, find_threshold, measure_slices
from hilum.archive.store.index import Row, index_path, merge_indexes
from hilum.archive.store.store import (
    Layout,
    Store,
    check_header,
    open_for_writing,
    open_volume,
    restore,
    write_header,
    write_stored,
)
from hilum.errors import ScanRefused, StoreError, UsageError
from hilum.large import each, gather
from hilum.records import merge_tables
from hilum.settings import to_dict
from hilum.terminal import Progress
from hilum.volume import FloatArray, Volume, orient

WORK = ".work"  # in the store, until it is complete
CHUNK, BLOCK = 64, 32  # voxels per side of what is read, and decoded, at once
STEPS = 512  # stored steps within one standard deviation of a volume without HU
_AT = (np.arange(GRID) + 0.5) / GRID


@dataclass(frozen=True, kw_only=True)
class IsotropicSettings:
    """How volumes are made isotropic; the steps in their order.

    orientation     patient directions of (Z, Y, X)
    background_px   cut to the box of the body: side of the cube in which more than half must be above −800 HU; odd, 0 leaves
                    it out. Without a unit: above the threshold of the anatomy, in a cube in mm (`archive.body.body_sides`)
    clip_hu         HU are cut to this range
    min_spacing_mm  cubic voxels at the smallest spacing of the scan, but not smaller than this
    longest         most voxels along a side; what is longer gets larger voxels (VoxelFM's paper 768); 0: no limit (its code)
    """

    orientation: str = "SPL"
    background_px: int = 21
    clip_hu: tuple[float, float] = (-1000.0, 1900.0)
    min_spacing_mm: float = 0.75
    longest: int = 768

    def __post_init__(self) -> None:
        pairs = [next((pair for pair in ("LR", "PA", "SI") if letter in pair), "") for letter in self.orientation]
        if sorted(pairs) != ["LR", "PA", "SI"]:
            raise UsageError(
                f"orientation is '{self.orientation}'; expected one letter of each pair L/R, P/A, S/I, e.g. SPL"
            )
        if self.background_px < 0 or (self.background_px and self.background_px % 2 == 0):
            raise UsageError(f"background_px is {self.background_px}; expected an odd number of voxels, or 0")
        if not self.clip_hu[0] < BODY_HU < self.clip_hu[1]:
            raise UsageError(f"clip_hu {self.clip_hu} must hold {BODY_HU:g} HU, where the background ends")
        if self.min_spacing_mm <= 0 or self.longest < 0:
            raise UsageError("min_spacing_mm must be above 0 and longest at least 0")


@dataclass(frozen=True, eq=False)
class VolumeContent:
    """Where the anatomy of a volume is.

    grid  (GRID, GRID, GRID) float32: share of anatomy in each of the equal cells of the volume, along (Z, Y, X)
    """

    grid: NDArray[np.float32]

    @property
    def foreground(self) -> float:
        """Share of anatomy in the whole volume."""
        return float(self.grid.mean(dtype=np.float64))

    @cached_property
    def center(self) -> tuple[float, float, float]:
        """(z, y, x) of the anatomy, as fractions of the volume; the middle of a volume without anatomy."""
        weight = self.grid.astype(np.float64)
        total = weight.sum()
        if total == 0:
            return 0.5, 0.5, 0.5
        z, y, x = (float(weight.sum(other) @ _AT / total) for other in ((1, 2), (0, 2), (0, 1)))
        return z, y, x


# ---- reading


def is_isotropic(store: Store) -> bool:
    """Whether a store was made by `resample_store`."""
    return (store.header.get("derived") or {}).get("kind") == "isotropic"


def read_region(store: Store, key: str, start: tuple[int, int, int], size: tuple[int, int, int]) -> NDArray[np.int16]:
    """The stored numbers of a box that lies inside a volume, without reading the rest.

    start, size  of the box along (Z, Y, X), in voxels
    """
    array, _ = open_volume(store.root, key)
    if any(a < 0 or n < 1 or a + n > limit for a, n, limit in zip(start, size, array.shape)):
        raise StoreError(
            f"volume {key} has shape {array.shape}; found a box of {tuple(size)} at {tuple(start)} outside of it"
        )
    return store.read_stored(key, tuple(slice(a, a + n) for a, n in zip(start, size)))


def read_moments(store: Store, key: str) -> tuple[float, float]:
    """Mean and standard deviation, in the volume's unit, of the body box of the scan before it was resampled (HU after the
    clip): what volumes without HU are normalised by."""
    mean, std = np.frombuffer(_meta(store, key, "moments"), "<f8")
    return float(mean), float(std)


def read_volume_content(store: Store, key: str) -> VolumeContent:
    """Where the anatomy of a volume is."""
    cells = np.frombuffer(zlib.decompress(_meta(store, key, "volume")), np.uint8)
    return VolumeContent(cells.reshape(GRID, GRID, GRID).astype(np.float32) / np.float32(255))


def _meta(store: Store, key: str, name: str) -> bytes:
    try:
        found: bytes = open_volume(store.root, key)[0].schunk.meta[name]
    except KeyError:
        raise StoreError(
            f"{store.root} is no isotropic store; make one with: hilum resample {store.root} -o OUT"
        ) from None
    return found


# ---- one volume


@dataclass(frozen=True, eq=False)
class Isotropic:
    """One volume made isotropic: `stored · slope + intercept` is its value; `moments` of the box before it was resampled."""

    stored: NDArray[np.int16]
    affine: FloatArray
    slope: float
    intercept: float
    exact: bool
    moments: tuple[float, float]


def make_isotropic(store: Store, row: Row, settings: IsotropicSettings) -> Isotropic:
    """One volume of a plain store. ScanRefused when it has no geometry, sheared axes, or nothing but background.

    HU are rounded to whole ones, other values to 1/STEPS of their standard deviation (coarser only where 16 bits do not
    hold that); a volume that keeps its grid keeps its numbers.
    """
    vol = _oriented(store, row, settings.orientation)
    assert vol.affine is not None
    hu = row.unit == "HU"
    inside: tuple[slice, ...] = ()

    def values() -> Iterator[NDArray[Any]]:
        found = (restore(s, row.slope, row.intercept) for s in each(vol.voxels[inside]))
        return (s.clip(*settings.clip_hu) for s in found) if hu and inside else found

    if settings.background_px:
        threshold = BODY_HU if hu else find_threshold(values())
        sides = body_sides(settings.background_px, vol.affine, row.unit)
        box = body_box(values(), vol.shape, sides, threshold)
        if box is None:
            raise ScanRefused("no_body", f"no box of {'×'.join(map(str, sides))} voxels is half above {threshold:g}")
    else:
        box = whole(vol.shape)
    inside = box
    shape, affine = vol.voxels[box].shape, cut(vol.affine, [s.start for s in box])
    ends = [(s.min(), s.max()) for s in values()]
    low, high = float(min(e[0] for e in ends)), float(max(e[1] for e in ends))
    mean, std = moments(values())
    new = isotropic_shape(shape, affine, settings.min_spacing_mm, settings.longest)
    if hu:
        slope, intercept = 1.0, 0.0
    elif new == shape:
        slope, intercept = row.slope, row.intercept
    else:
        slope, intercept = max((high - low) / 65534, std / STEPS) or 1.0, (high + low) / 2
    numbers = (np.rint((s - np.float32(intercept)) / np.float32(slope)) for s in resize(values(), shape, new))
    return Isotropic(
        stored=gather(numbers, new, np.int16),
        affine=resized(affine, shape, new),
        slope=slope,
        intercept=intercept,
        exact=row.exact and new == shape,
        moments=(mean, std),
    )


def _oriented(store: Store, row: Row, orientation: str) -> Volume:
    """The stored numbers of a volume, turned. Larger ones lie in a file, not in memory."""
    if row.affine is None:
        raise ScanRefused("no_geometry", "an image without position and spacing")
    stored = gather((store.read_stored(row.key, k) for k in range(row.shape[0])), row.shape, np.int16)
    affine = np.array(row.affine).reshape(4, 4)
    vol = Volume(voxels=stored, affine=affine, modality=row.modality, unit=row.unit)
    if vol.shear_deg > MAX_SHEAR_DEG:
        raise ScanRefused("sheared", f"{vol.shear_deg:.1f}°")
    return orient(vol, orientation)


def write_isotropic(root: Path, row: Row, made: Isotropic) -> Row:
    """Write it under the key of the volume it was made of; returns its index row."""
    content = measure_slices((restore(s, made.slope, made.intercept) for s in each(made.stored)), row.unit)
    coarse = np.rint(average(content.cells.astype(np.float32), 0, GRID)).astype(np.uint8)
    meta = {"moments": np.array(made.moments, "<f8").tobytes(), "volume": zlib.compress(coarse.tobytes(), 6)}
    affine = tuple(made.affine.ravel().tolist())
    row = replace(row, affine=affine, slope=made.slope, intercept=made.intercept, exact=made.exact)
    z, y, x = (min(n, CHUNK) for n in made.stored.shape)
    layout = Layout((z, y, x), (min(z, BLOCK), min(y, BLOCK), min(x, BLOCK)), blosc2.Filter.SHUFFLE)
    return write_stored(root, row, made.stored, content, layout, meta)


# ---- a whole store


def resample_store(
    store: str | Path,
    out: str | Path,
    *,
    settings: IsotropicSettings | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the store that encoders of volumes are trained from.

    store        a plain store
    out          a new folder, or one that an interrupted run of the same command left
    num_workers  processes; None: one per core. The result does not depend on it
    returns      num_volumes, num_slices, bytes of the files, left_out (key, reason and detail each, by key)

    The ledger is that of the plain store; volumes that cannot be isotropic stand in it as refused, with the reason. Raises
    Interrupted as `prepare` does.
    """
    source, out, settings = Store(store), Path(out), settings or IsotropicSettings()
    if is_isotropic(source):
        raise StoreError(f"{source.root} is isotropic already; resample the store it was made of")
    if out.resolve().is_relative_to(source.root.resolve()):
        raise StoreError(f"{out} lies inside the store {source.root}; choose a folder outside it")
    derived = {"kind": "isotropic", **to_dict(settings), "source_hash": source.hash}
    header = {"key": source.header.get("key"), "derived": derived}
    if not _is_complete(out, header) or (out / WORK).exists():
        with hold(out / WORK / "lock", f"the store {out}"):
            if not _is_complete(out, header):
                drop_remains(out, ".store.json.*.tmp")
                open_for_writing(out, header)
                drop_remains(out, ".*.tmp", "index/.*.tmp", "volumes/*/.*.tmp")
                ledger = source.root / "ledger.parquet"
                work = partial(_resample_one, store=source, out=out, settings=settings)
                with stop_on_signals(out, progress) as go_on:
                    used = (entry for entry in read_entries(ledger) if entry.used)
                    fill(out, work, used, len(source), "resampling volumes", go_on, num_workers)
                    _finish(ledger, out, header)
            drop_parts(out)
    made = Store(out)
    refused = (e for e in read_entries(out / "ledger.parquet") if not e.used and source.rows.find(e.key) is not None)
    left_out = [{"key": e.key, "reason": e.reason, "detail": e.detail} for e in refused]
    num_bytes = pc.sum(made.rows.table["bytes"]).as_py() or 0
    return {"num_volumes": len(made), "num_slices": made.num_slices, "bytes": num_bytes, "left_out": left_out}


def _is_complete(out: Path, header: dict[str, Any]) -> bool:
    """Whether there is nothing left to do. StoreError when the store was made otherwise."""
    if not (out / "store.json").exists():
        return False
    found = check_header(out)
    if any(found.get(name) != value for name, value in header.items()):
        raise StoreError(f"{out} was begun from another store or with other settings; choose a new folder")
    return found.get("status") == "complete"


def _finish(ledger: Path, out: Path, header: dict[str, Any]) -> None:
    """Join the parts, then say "complete": a kill between any two steps loses nothing."""
    indexes, ledgers = parts_of(out)
    merge_indexes(index_path(out), indexes)
    aside = (entry for entry in read_entries(ledger) if not entry.used)
    done = (entry for table in merge_tables(ledgers) for entry in entries_of(table))
    write_sorted(out / "ledger.parquet", heapq.merge(aside, done, key=lambda e: e.key))
    write_header(out, {**header, "status": "complete"})


def _resample_one(entry: Entry, store: Store, out: Path, settings: IsotropicSettings) -> Done:
    row = store.row(entry.key)
    try:
        return Done(entry, write_isotropic(out, row, make_isotropic(store, row, settings)))
    except ScanRefused as refused:
        return Done(refuse(entry, refused.reason, refused.detail), None)
    except MemoryError:
        return Done(refuse(entry, "too_large", "more than the memory of this machine"), None)
