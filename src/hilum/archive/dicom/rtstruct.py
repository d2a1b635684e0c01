"""DICOM structure sets → label volumes: contours in patient millimetres, filled on a scan's slices (PS3.3 C.8.8.6)."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from hilum.archive.dicom.planes import parsing, read_object
from hilum.errors import ScanRefused
from hilum.volume import FloatArray, Volume

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
FLAT = 0.5  # slice steps over which one contour may extend and still count as drawn on a slice
_SAME_PLANE = 0.02  # slice steps within which contours lie in one plane
_MOST_MM = 1e7
_CONTOUR_DATA = Tag(0x30060050)
_EDGES_AT_ONCE = 4096  # keeps memory flat, whatever a file holds

Contour = tuple[int, float, FloatArray]
"""ROI label, slice position in steps, corners (N, 2) as indices within the slice."""


def read(path: Path, grid: Volume) -> tuple[Volume, dict[int, str], tuple[str, ...]]:
    """Fill the closed contours of a structure set on the grid of a scan. Raises ScanRefused.

    grid     the scan, in any orientation, also sheared or oblique
    returns  voxels are ROI numbers on exactly that grid (1…n in the order of the ROI numbers when one of them is no number
             from 1 to 65535); names of all ROIs by label; notes

    A voxel belongs to a ROI when its centre lies inside an odd number of the ROI's contours on its slice, so inner
    contours and keyholes are holes. A contour belongs to the slice nearest to its plane, at most half a step away; when
    several planes of a ROI fall on one slice, the nearest plane counts. Slices between contours stay empty. Where ROIs
    overlap the later number wins. Contours off the grid are counted; `labels_off_grid` when all are.
    """
    if grid.affine is None:
        raise ScanRefused("no_geometry", "the scan has no positions, so contours cannot be placed on it")
    data = read_object(path, (STRUCTURE_SET,))
    notes: Counter[str] = Counter()
    with parsing("contours"):
        names, labels = _structures(data)
        loops = [(label, points) for label, points in _loops(data, labels, notes)]
    if not loops:
        raise ScanRefused("labels_off_grid", f"no closed contour in {len(names)} structures")
    axis, contours = _on_slices(loops, grid, notes)
    voxels = np.zeros(grid.shape, np.uint8 if max(names) < 256 else np.uint16)
    slices = np.moveaxis(voxels, axis, 0)
    planes = _planes(contours, notes)
    for label, number in sorted(planes):
        inside = fill(planes[label, number], slices.shape[1:])
        notes["overlaps: {} voxels went to the later of two structures"] += int((inside & (slices[number] > 0)).sum())
        slices[number][inside] = label
    _note_gaps(planes, notes)
    volume = replace(grid, voxels=voxels, modality="OT", unit="", kind="label")
    return volume, names, tuple(text.format(count) for text, count in notes.items() if count)


def _structures(data: Dataset) -> tuple[dict[int, str], dict[int, int]]:
    """Names by label, and labels by ROI number."""
    found = {int(roi.ROINumber): str(roi.get("ROIName") or "").strip() for roi in data.StructureSetROISequence}
    if not found:
        raise ScanRefused("corrupt", "no structures")
    numbers = sorted(found)
    labels = {n: n if numbers[0] > 0 and numbers[-1] < 65536 else rank for rank, n in enumerate(numbers, 1)}
    if len(numbers) > 65535:
        raise ScanRefused("too_large", f"{len(numbers)} structures")
    return {labels[n]: found[n] for n in numbers}, labels


def _loops(data: Dataset, labels: dict[int, int], notes: Counter[str]) -> Iterator[tuple[int, FloatArray]]:
    """The closed contours: label and corners (N, 3) in LPS mm."""
    for roi in data.get("ROIContourSequence", None) or []:
        number = int(roi.ReferencedROINumber)
        if number not in labels:
            raise ScanRefused("corrupt", "contours of a structure that is not described")
        for contour in roi.get("ContourSequence", None) or []:
            if str(contour.get("ContourGeometricType", "")) not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
                notes["no area: {} points or open contours left out"] += 1
                continue
            points = _corners(contour)
            if len(points) < 3:
                notes["no area: {} closed contours of less than 3 points left out"] += 1
                continue
            yield labels[number], points


def _corners(contour: Dataset) -> FloatArray:
    raw: Any = contour.get_item(_CONTOUR_DATA)
    value = raw.value if raw is not None else None
    # Millions of numbers: as bytes they are read at once, pydicom would make an object of each.
    texts = value.split(b"\\") if isinstance(value, bytes) else list(value or ())
    points = np.array(texts).astype(float)
    if points.size % 3 or not (np.abs(points) <= _MOST_MM).all():
        raise ScanRefused("corrupt", "contour points that are no positions")
    return points.reshape(-1, 3)


def _on_slices(
    loops: list[tuple[int, FloatArray]], grid: Volume, notes: Counter[str]
) -> tuple[int, dict[tuple[int, int], list[Contour]]]:
    """Contours by label and slice, and the axis of the grid that runs through the slices."""
    assert grid.affine is not None
    inverse = np.linalg.inv(grid.affine)
    places = [(label, points @ inverse[:3, :3].T + inverse[:3, 3]) for label, points in loops]
    axis = int(np.argmin(np.median([np.ptp(points, 0) for _, points in places], 0)))
    others = [a for a in range(3) if a != axis]
    contours: dict[tuple[int, int], list[Contour]] = defaultdict(list)
    for label, points in places:
        through = points[:, axis]
        position = float(through.mean())
        nearest = int(np.floor(position + 0.5))
        if np.ptp(through) > FLAT:
            notes["tilted: {} contours lie across the slices and were left out"] += 1
        elif not 0 <= nearest < grid.shape[axis]:
            notes["outside: {} contours lie on no slice of the scan"] += 1
        else:
            contours[label, nearest].append((label, position, points[:, others]))
    if not contours:
        raise ScanRefused("labels_off_grid", f"none of {len(loops)} closed contours lies on a slice of the scan")
    return axis, contours


def _planes(
    contours: dict[tuple[int, int], list[Contour]], notes: Counter[str]
) -> dict[tuple[int, int], list[FloatArray]]:
    """The corners of the contours that count on each slice: those of the plane nearest to it."""
    planes = {}
    for (label, number), found in contours.items():
        nearest = min((position for _, position, _ in found), key=lambda p: (abs(p - number), p))
        kept = [corners for _, position, corners in found if abs(position - nearest) <= _SAME_PLANE]
        notes["between: {} contours lie between slices, where a nearer plane counts"] += len(found) - len(kept)
        planes[label, number] = kept
    return planes


def _note_gaps(planes: dict[tuple[int, int], list[FloatArray]], notes: Counter[str]) -> None:
    numbers: dict[int, list[int]] = defaultdict(list)
    for label, number in planes:
        numbers[label].append(number)
    empty = sum(max(n) - min(n) + 1 - len(n) for n in numbers.values())
    notes["gaps: {} slices between contours of one structure are empty"] += empty


def fill(loops: list[FloatArray], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which voxel centres lie inside an odd number of closed polygons.

    loops    corners (N, 2) of each as indices (y, x); may reach beyond the image
    returns  (Y, X); a centre on an edge counts as inside on the low side only, so that neighbours share no voxel

    Each edge toggles, in every row that it crosses, the first voxel at or beyond the crossing; a running parity fills.
    """
    height, width = shape
    toggles = np.zeros((height, width + 1), np.uint8)
    for corners in loops:
        for first in range(0, len(corners), _EDGES_AT_ONCE):
            index = np.arange(first, min(first + _EDGES_AT_ONCE, len(corners)))
            (y0, x0), (y1, x1) = corners[index].T, corners[(index + 1) % len(corners)].T
            low = np.clip(np.ceil(np.minimum(y0, y1)), 0, height).astype(int)
            high = np.clip(np.ceil(np.maximum(y0, y1)), 0, height).astype(int)
            edge = np.repeat(np.arange(len(index)), high - low)
            rows = np.arange(len(edge)) - np.repeat(np.cumsum(high - low) - high + low, high - low) + low[edge]
            share = (rows - y0[edge]) / (y1 - y0)[edge]
            crossing = x0[edge] + share * (x1 - x0)[edge]
            columns = np.clip(np.ceil(crossing), 0, width).astype(int)
            np.bitwise_xor.at(toggles, (rows, columns), 1)
    inside = np.zeros((height, width), bool)
    crossed = toggles.any(1)
    inside[crossed] = np.bitwise_xor.accumulate(toggles[crossed], axis=1)[:, :-1]
    return inside
