"""Where things lie in a scan as `hilum.read` turns it, told from headers and label maps without reading the scan."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hilum.archive.dicom.header import looks_like_dicom
from hilum.archive.files import itk, nifti
from hilum.archive.files.raw import ImageHeader, read_stored
from hilum.archive.files.values import scaled
from hilum.archive.privacy import read_key
from hilum.bench.datasets.collect import Collector
from hilum.errors import ScanRefused
from hilum.records import read_json, write_json
from hilum.volume import FloatArray, Volume, to_slices

Shape = tuple[int, int, int]
Box = tuple[Shape, Shape]
_BATCH = 4096  # maps between two writes of the cache
_Entry = list[list[int]]  # shape, [first slice inside], areas from there to the last


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid of a scan once it is turned.

    affine  (k, j, i, 1) → LPS mm; None when the file has no geometry
    turn    stored index (k, j, i, 1) → turned index
    """

    shape: Shape
    affine: FloatArray | None
    turn: FloatArray

    def voxel(self, point_mm: Sequence[float]) -> tuple[float, float, float]:
        """The voxel (z, y, x), with fractions, of a point in LPS mm."""
        assert self.affine is not None
        z, y, x, _ = np.linalg.solve(self.affine, [*point_mm, 1.0]).tolist()
        return z, y, x

    def stored_voxel(self, row: float, column: float, k: float = 0.0) -> tuple[float, float, float]:
        """The turned voxel (z, y, x) of a place in the file, as row and column of its slice k."""
        z, y, x, _ = (self.turn @ [k, row, column, 1.0]).tolist()
        return z, y, x

    def holds(self, voxel: Sequence[float]) -> bool:
        """Whether a voxel position lies inside the scan."""
        return all(-0.5 <= v <= n - 0.5 for v, n in zip(voxel, self.shape))

    def box_about(self, voxel: Sequence[float], reach_mm: Sequence[float]) -> Box:
        """Voxels (z, y, x) first and last within so many mm of a voxel, at least that voxel, cut to the scan."""
        assert self.affine is not None
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        low = np.ceil(np.array(voxel) - np.array(reach_mm) / steps - 1e-6)
        high = np.floor(np.array(voxel) + np.array(reach_mm) / steps + 1e-6)
        nearest = np.round(voxel)
        low, high = np.minimum(low, nearest), np.maximum(high, nearest)
        top = np.array(self.shape) - 1
        first, last = np.clip(low, 0, top).astype(int).tolist(), np.clip(high, 0, top).astype(int).tolist()
        return (first[0], first[1], first[2]), (last[0], last[1], last[2])


def turned_grid(shape: Shape, affine: FloatArray | None, through: int | None = None) -> Grid:
    """The grid that `to_slices` makes of a stored one."""
    if affine is None:
        return Grid(shape=shape, affine=None, turn=np.eye(4))
    empty = Volume(voxels=np.broadcast_to(np.int8(0), shape), affine=affine, modality="OT")
    turned = to_slices(empty, through)
    assert turned.affine is not None
    turn = np.round(np.linalg.solve(turned.affine, affine), 6)
    return Grid(shape=turned.shape, affine=turned.affine, turn=turn)


def image_header(path: Path) -> ImageHeader:
    """The header of a NIfTI, MetaImage or NRRD file. Raises ScanRefused."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(4096)
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    if looks_like_dicom(head):
        raise ScanRefused("other_format", "a DICOM file; expected NIfTI, MetaImage or NRRD")
    return itk.read_header(path) if itk.looks_like_itk(head) else nifti.read_header(path)


def grid_of(path: Path) -> Grid:
    """The grid of an image file, from its header. Raises ScanRefused."""
    header = image_header(path)
    return turned_grid(header.voxels.shape, header.affine)


@dataclass(frozen=True, kw_only=True)
class Areas:
    """How a label lies in its map, slice after slice of the turned map.

    shape   of the turned map
    areas   (Z,) voxels inside, in each slice
    """

    shape: Shape
    areas: NDArray[np.int64]

    @property
    def volume(self) -> int:
        return int(self.areas.sum())

    @property
    def largest(self) -> int:
        """The slice with most voxels, the first of equals."""
        return int(self.areas.argmax())


def label_areas(path: Path, values: tuple[int, ...] | None) -> Areas:
    """Read one label map and count. Raises ScanRefused.

    values  the numbers that are inside; None: all but zero
    """
    header = image_header(path)
    if header.voxels.num_volumes > 1:
        raise ScanRefused("not_3d", f"{header.voxels.num_volumes} volumes; expected one label map")
    plain = values is None and header.intercept == 0.0
    stored = read_stored(header.voxels) if plain else scaled(header)
    inside = stored != 0 if values is None else np.isin(stored, values)
    grid = turned_grid(header.voxels.shape, header.affine)
    axis = int(np.abs(grid.turn[0, :3]).argmax())
    other = tuple(n for n in range(3) if n != axis)
    areas = np.count_nonzero(inside, axis=other).astype(np.int64)
    return Areas(shape=grid.shape, areas=areas if grid.turn[0, axis] > 0 else areas[::-1])


def measure(
    into: Collector, wanted: Sequence[tuple[Path, tuple[int, ...] | None]]
) -> Iterator[tuple[Path, tuple[int, ...] | None, Areas]]:
    """`label_areas` of many maps, in order, on several threads; those that cannot be read become problems.

    What was found is kept in `into.cache`, by keyed hashes of path, size and time of the file.
    """
    store = into.cache / f"label_areas_{into.task.dataset}.json" if into.cache else None
    known: dict[str, _Entry] = read_json(store) if store and store.exists() else {}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(wanted), _BATCH):
            batch = wanted[start : start + _BATCH]
            keys = [_key(path, values) if store else "" for path, values in batch]
            results = pool.map(partial(_measure_one, known), keys, batch)
            new = {}
            for number, (key, (path, values), found) in enumerate(zip(keys, batch, results), start + 1):
                into.progress(number, len(wanted), "reading label maps")
                if isinstance(found, ScanRefused):
                    into.miss(path, str(found), "a label map")
                    continue
                new[key] = _pack(found)
                yield path, values, found
            if store and new.keys() - known.keys():
                known |= new
                write_json(store, known)


def _key(path: Path, values: tuple[int, ...] | None) -> str:
    try:
        found = path.stat()
    except OSError:
        return ""
    return read_key().hash("item", json.dumps([str(path.absolute()), values, found.st_size, found.st_mtime_ns]))


def _pack(found: Areas) -> _Entry:
    inside = np.flatnonzero(found.areas)
    first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, -1)
    return [list(found.shape), [first], found.areas[first : last + 1].tolist()]


def _measure_one(
    known: dict[str, _Entry], key: str, wanted: tuple[Path, tuple[int, ...] | None]
) -> Areas | ScanRefused:
    if key in known and key:
        (z, y, x), (first,), inside = known[key]
        areas = np.zeros(z, np.int64)
        areas[first : first + len(inside)] = inside
        return Areas(shape=(z, y, x), areas=areas)
    try:
        return label_areas(*wanted)
    except ScanRefused as refused:
        return refused


def on_grid(into: Collector, scan: Path, masks: Iterable[tuple[Path, Shape]]) -> list[Path]:
    """Those of some label maps that have the shape of their scan; a problem for each other, or for the scan."""
    try:
        shape = grid_of(scan).shape
    except ScanRefused as refused:
        paths = list(masks)
        into.miss(scan, str(refused), "a scan", cases=len(paths))
        return []
    fitting = []
    for path, found in masks:
        if found == shape:
            fitting.append(path)
        else:
            into.miss(path, f"a mask of {_spell(found)} voxels", f"the {_spell(shape)} of its scan")
    return fitting


def _spell(shape: Shape) -> str:
    return "×".join(str(n) for n in shape)
