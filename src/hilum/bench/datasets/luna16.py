"""LUNA16: nodules of chest CT by place and diameter; malignancy comes from the readers of LIDC-IDRI; AirRC adds vessels."""

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from hilum.bench.datasets.collect import Collector, number_of, read_rows
from hilum.bench.datasets.grids import Box, Grid, grid_of, image_header
from hilum.bench.datasets.lidc import Rating, read_ratings
from hilum.bench.task import Case, Region, Source
from hilum.errors import ScanRefused

CROPS = 6  # of each nodule
CROP_MM = (40.0, 240.0)
MIN_REACH_MM = 3.0  # of a reader's outline from the listed centre
_Placed = list[tuple[NDArray[np.float64], int]]


@dataclass(frozen=True)
class Nodule:
    """One row of annotations.csv: its number below the header, centre in LPS mm, diameter."""

    row: int
    centre_mm: tuple[float, float, float]
    diameter_mm: float


def read_luna16(into: Collector) -> None:
    """Malignancy (O2) and localisation of nodules."""
    scans = find_scans(into, into.folder)
    if not scans:
        raise into.stop(into.folder / "subset0", "no .mhd file", "subset0 … subset9 with the scans")
    nodules = _nodules(into, scans)
    ratings = read_ratings(into, set(nodules)) if into.task.kind == "classification" else {}
    for done, (uid, found) in enumerate(sorted(nodules.items()), 1):
        into.progress(done, len(nodules), "placing nodules")
        try:
            grid = grid_of(scans[uid])
            rated = _placed(scans[uid], ratings.get(uid, []))
        except ScanRefused as refused:
            into.miss(scans[uid], str(refused), "a MetaImage scan", len(found))
            continue
        for nodule in found:
            centre = grid.voxel(nodule.centre_mm)
            if not grid.holds(centre):
                into.miss(scans[uid], f"nodule {nodule.row} lies outside", "a centre inside the scan")
            elif into.task.kind == "classification":
                _malignancy(into, scans[uid], grid, nodule, rated)
            else:
                _crops(into, scans[uid], grid, nodule)


def find_scans(into: Collector, folder: Path) -> dict[str, Path]:
    """Series UID → .mhd file, whose voxels must lie beside it."""
    scans = {}
    for path in sorted({*folder.glob("*.mhd"), *folder.glob("subset*/**/*.mhd")}):
        if into.exists(path.with_suffix(".raw"), "the voxels of the .mhd beside it", 0):
            scans[path.stem] = path
    return scans


def _nodules(into: Collector, scans: dict[str, Path]) -> dict[str, list[Nodule]]:
    table = into.folder / "annotations.csv"
    nodules: dict[str, list[Nodule]] = defaultdict(list)
    lost: dict[str, int] = defaultdict(int)
    columns = ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]
    for number, row in enumerate(read_rows(into, table, columns), 1):
        values = [number_of(row[name]) for name in columns[1:]]
        x, y, z, diameter = values
        if x is None or y is None or z is None or diameter is None or diameter <= 0:
            into.miss(table, f"row {number} without a place or diameter", "four numbers")
        elif row["seriesuid"] not in scans:
            lost[row["seriesuid"]] += 1
        else:
            nodules[row["seriesuid"]].append(Nodule(number, (x, y, z), diameter))
    for uid, count in sorted(lost.items()):
        into.miss(into.folder / f"subset*/{uid}.mhd", "missing", "the scan of a row of annotations.csv", count)
    return nodules


def _placed(scan: Path, ratings: list[Rating]) -> _Placed:
    """Centre in LPS mm and malignancy of each reader's outline: columns and rows are stored voxels, z is mm."""
    affine = image_header(scan).affine
    assert affine is not None
    placed = []
    for rating in ratings:
        x, y, _ = (affine @ [0.0, rating.row, rating.column, 1.0])[:3]
        placed.append((np.array([x, y, rating.z_mm]), rating.malignancy))
    return placed


def _malignancy(into: Collector, scan: Path, grid: Grid, nodule: Nodule, rated: _Placed) -> None:
    reach = max(nodule.diameter_mm / 2, MIN_REACH_MM)
    near = [value for place, value in rated if np.linalg.norm(place - np.array(nodule.centre_mm)) <= reach]
    if not near or median(near) == 3:
        what = "a median rating of 3" if near else "no reader's outline near it"
        into.miss(scan, f"nodule {nodule.row}: {what}", "a median below or above 3 (LIDC-XML-only)", int(not near))
        return
    centre = grid.voxel(nodule.centre_mm)
    radius = nodule.diameter_mm / 2
    into.cases.append(
        Case(
            id=f"{scan.stem}/{nodule.row}",
            patient=scan.stem,
            scan=Source(path=scan),
            modality="CT",
            target=(int(median(near) > 3),),
            slices=(round(centre[0]),) if into.task.suite.endswith("2d") else None,
            region=Region(box=grid.box_about(centre, (radius,) * 3)),
        )
    )


def _crops(into: Collector, scan: Path, grid: Grid, nodule: Nodule) -> None:
    """Cubes that hold the whole nodule, drawn alike on every machine."""
    centre = grid.voxel(nodule.centre_mm)
    draw = random.Random(f"{scan.stem}/{nodule.row}")
    for number in range(1, CROPS + 1):
        box = _crop(grid, centre, nodule.diameter_mm, draw)
        if box is None:
            into.miss(scan, f"nodule {nodule.row}: no room for crop {number}", f"a cube of {CROP_MM[0]:g} mm or more")
            continue
        into.cases.append(
            Case(
                id=f"{scan.stem}/{nodule.row}_{number}",
                patient=scan.stem,
                scan=Source(path=scan, box=box),
                modality="CT",
                target=tuple(place - first for place, first in zip(centre, box[0])),
            )
        )


def _crop(grid: Grid, centre: tuple[float, float, float], diameter_mm: float, draw: random.Random) -> Box | None:
    assert grid.affine is not None
    steps = np.linalg.norm(grid.affine[:3, :3], axis=0)
    sizes = np.array(grid.shape) * steps
    low, high = max(CROP_MM[0], 2 * diameter_mm), min(CROP_MM[1], float(sizes.min()))
    if low > high:
        return None
    side = draw.uniform(low, high)
    first, last = [], []
    for place, step, size, count in zip(centre, steps, sizes, grid.shape):
        at = (place + 0.5) * step  # mm from the border of the scan
        start = draw.uniform(max(0.0, at - side + diameter_mm), min(size - side, at - diameter_mm))
        start = min(max(start, 0.0), size - side)  # a nodule at the border of the scan
        first.append(min(max(round(start / step), 0), count - 1))
        last.append(min(max(round((start + side) / step) - 1, first[-1]), count - 1))
    return (first[0], first[1], first[2]), (last[0], last[1], last[2])


def read_airrc(into: Collector) -> None:
    """Segmentation of airways and vessels: label maps named like the LUNA16 scans they belong to."""
    scans = find_scans(into, into.folder)
    for folder in (into.folder / "LUNA16", into.folder.parent / "LUNA16"):
        scans = find_scans(into, folder) | scans if folder.is_dir() else scans
    for mask in sorted(into.need(into.folder / "labelsTr", "the folder of label maps").glob("*.nii.gz")):
        uid = mask.name.removesuffix(".nii.gz")
        if uid not in scans:
            into.miss(into.folder / f"subset*/{uid}.mhd", "missing", "the LUNA16 scan of a label map")
            continue
        try:
            shapes = grid_of(mask).shape, grid_of(scans[uid]).shape
        except ScanRefused as refused:
            into.miss(mask, str(refused), "a label map and its scan")
            continue
        if shapes[0] != shapes[1]:
            into.miss(mask, f"a mask of {shapes[0]} voxels", f"the {shapes[1]} of its scan")
            continue
        into.cases.append(
            Case(
                id=uid,
                patient=uid,
                scan=Source(path=scans[uid]),
                modality="CT",
                target=(),
                region=Region(source=Source(path=mask)),
            )
        )
