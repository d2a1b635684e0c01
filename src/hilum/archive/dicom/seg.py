"""DICOM segmentations → label volumes (PS3.3 A.51, C.8.20), placed by patient position, never by frame order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from hilum.archive.dicom.geometry import SMALLEST_MM, directions, stack
from hilum.archive.dicom.header import Header
from hilum.archive.dicom.planes import frame_headers, frames, group, parsing, read_object
from hilum.errors import ScanRefused
from hilum.volume import FloatArray, Volume, to_slices

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
SAME_PLANE = 0.25  # share of the slice distance by which the corners of a frame may be off the plane of a slice
THRESHOLD = 0.5  # share of MaximumFractionalValue from which a pixel of a FRACTIONAL segment belongs to it


def read(path: Path, grid: Volume | None) -> tuple[Volume, dict[int, str], tuple[str, ...]]:
    """Read a SEG onto the grid of a scan. Raises ScanRefused, `labels_off_grid` when a frame lies on none of its slices.

    grid     the scan, in any orientation; None: the grid that the frames themselves make up, if evenly spaced
    returns  voxels are segment numbers on exactly that grid, the nearest pixel of the frame for each; names of the
             segments by number; notes

    Where segments overlap the higher number wins, which the notes count. What lies outside the grid within a matching
    plane is left out and counted. Which series the object refers to is not asked: geometry decides.
    """
    data = read_object(path, (SEGMENTATION, LABEL_MAP))
    headers = frame_headers(data, path)
    with parsing("segments"):
        background = int(data.get("PixelPaddingValue", 0))
        names = {int(s.SegmentNumber): str(s.get("SegmentLabel") or "").strip() for s in data.SegmentSequence}
        names.pop(background, None)
        labels = _labels(data, names, background, len(headers))
    grid = _own_grid(headers) if grid is None else grid
    if grid.affine is None:
        raise ScanRefused("no_geometry", "the scan has no positions, so labels cannot be placed on it")
    voxels: NDArray[Any] = np.zeros(grid.shape, np.uint8 if max(names, default=0) < 256 else np.uint16)
    overlaps = inside = outside = 0
    place: _Place | None = None
    for header, frame in zip(headers, labels):
        if place is None or place.header != header:
            place = _place(header, grid.shape, grid.affine, place)
        target = np.moveaxis(voxels, place.axis, 0)[place.slice]
        found = np.where(place.source >= 0, frame.ravel()[place.source], 0).astype(voxels.dtype)
        overlaps += int(((found > 0) & (target > 0) & (found != target)).sum())
        np.maximum(target, found, out=target)
        beyond = int(np.count_nonzero(frame[~place.covered]))
        outside += beyond
        inside += int(np.count_nonzero(frame)) - beyond
    if outside and not inside:
        raise ScanRefused("labels_off_grid", f"all {outside} pixels lie beside the scan")
    notes = [f"overlaps: {overlaps} voxels went to the higher of two segments"] if overlaps else []
    notes += [f"outside: {outside} of {outside + inside} pixels lie beside the scan"] if outside else []
    volume = replace(grid, voxels=voxels, modality="OT", unit="", kind="label")
    return volume, names, tuple(notes)


def _own_grid(headers: Sequence[Header]) -> Volume:
    """The grid that the frames make up, turned as a scan is. Only its shape and affine matter."""
    planes = {tuple(round(v / SMALLEST_MM) for v in h.position): h for h in headers}
    box = stack(list(planes.values()))
    shape = (len(planes), headers[0].rows, headers[0].columns)
    return to_slices(Volume(voxels=np.zeros(shape, bool), affine=box.affine, modality="OT", kind="label"), through=0)


def _labels(data: Dataset, names: dict[int, str], background: int, num_frames: int) -> Iterator[NDArray[Any]]:
    """Each frame as segment numbers, 0 for background."""
    kind = str(data.get("SegmentationType", ""))
    if kind == "LABELMAP":
        return _label_map(data, names, background)
    if kind not in ("BINARY", "FRACTIONAL"):
        raise ScanRefused("other_format", "a segmentation that is neither BINARY, FRACTIONAL nor LABELMAP")
    items = [group(data, n, "SegmentIdentificationSequence") for n in range(num_frames)]
    numbers = [int(item.ReferencedSegmentNumber) if item is not None else 0 for item in items]
    if unknown := sum(number < 1 or number not in names for number in numbers):
        raise ScanRefused("corrupt", f"{unknown} of {num_frames} frames name no described segment")
    least = THRESHOLD * float(data.MaximumFractionalValue) if kind == "FRACTIONAL" else 1
    if least <= 0:
        raise ScanRefused("corrupt", f"MaximumFractionalValue {least / THRESHOLD:g}")
    return (np.where(frame >= least, number, 0) for frame, number in zip(frames(data), numbers))


def _label_map(data: Dataset, names: dict[int, str], background: int) -> Iterator[NDArray[Any]]:
    """Frames whose pixels are segment numbers. Background is PixelPaddingValue, else 0 (C.8.20.2)."""
    if 0 in names:
        raise ScanRefused("other_format", "segment number 0 is a structure, where a label map has its background")
    numbers = np.zeros(65536, np.int32)
    numbers[list(names)] = list(names)
    known = numbers > 0
    known[[0, background]] = True
    for frame in frames(data):
        if frame.dtype not in (np.uint8, np.uint16):
            raise ScanRefused("corrupt", "segment numbers of more than 16 bits")
        if not known[frame].all():
            raise ScanRefused("corrupt", f"{int((~known[frame]).sum())} pixels name no described segment")
        yield numbers[frame]


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a frame lies in a grid.

    axis, slice  the grid's slice: index `slice` along `axis`
    back         2×3, index (m, n, 1) along the two other axes → (row, column) of the frame
    source       (M, N) for each voxel of the slice the nearest pixel of the flattened frame, −1 outside
    covered      (rows, columns) pixels whose centre lies in some voxel of the slice
    """

    header: Header
    axis: int
    slice: int
    back: FloatArray
    source: NDArray[np.int64]
    covered: NDArray[np.bool_]


def _place(header: Header, shape: tuple[int, int, int], affine: FloatArray, last: _Place | None) -> _Place:
    """Find the slice of the grid in whose plane a frame lies; the map within the plane is that of `last` if the same."""
    row, column = directions([header])
    if len(header.pixel_spacing) != 2 or min(header.pixel_spacing) < SMALLEST_MM:
        raise ScanRefused("no_geometry", "PixelSpacing missing or not above 0")
    inverse = np.linalg.inv(affine)
    # PS3.3 C.7.6.2.1.1: PixelSpacing[0] is the distance between rows, walked along the column direction.
    steps = inverse[:3, :3] @ np.stack([column * header.pixel_spacing[0], row * header.pixel_spacing[1]], 1)
    origin = inverse @ np.array([*header.position, 1.0])
    axis = int(np.argmax(np.abs(np.cross(steps[:, 0], steps[:, 1]))))
    bottom, right = header.rows - 1, header.columns - 1
    corners = origin[axis] + np.array([[0, 0], [bottom, 0], [0, right], [bottom, right]]) @ steps[axis]
    nearest = int(np.floor(corners.mean() + 0.5))
    off = float(np.abs(corners - nearest).max())
    if not 0 <= nearest < shape[axis]:
        raise ScanRefused("labels_off_grid", f"a frame at slice {nearest + 1} of a scan of {shape[axis]}")
    if off > SAME_PLANE:
        raise ScanRefused("labels_off_grid", f"a frame {off:.2f} slice steps off the nearest slice")
    others = [a for a in range(3) if a != axis]
    inplane = steps[others]
    back = np.linalg.inv(inplane)
    back = np.column_stack([back, -back @ origin[others]])
    if last is not None and axis == last.axis and np.abs(back - last.back).max() < 1e-6:
        return replace(last, header=header, slice=nearest)
    size = header.rows, header.columns
    source, held = _nearest(back, (shape[others[0]], shape[others[1]]), size)
    _, covered = _nearest(np.column_stack([inplane, origin[others]]), size, (shape[others[0]], shape[others[1]]))
    return _Place(header, axis, nearest, back, np.where(held, source, -1), covered)


def _nearest(
    change: FloatArray, shape: tuple[int, int], target: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each index (y, x) of `shape` the nearest index of `target` (flattened), and whether it lies in it at all.

    change  2×3, (y, x, 1) → index in `target`
    """
    y, x = np.ogrid[: shape[0], : shape[1]]
    # 1e-6 keeps ties (a grid off by exactly half a pixel) on one side.
    down, right = (np.floor(change[a, 0] * y + change[a, 1] * x + change[a, 2] + 0.5 + 1e-6) for a in (0, 1))
    inside = (down >= 0) & (down < target[0]) & (right >= 0) & (right < target[1])
    return np.where(inside, down * target[1] + right, 0).astype(np.int64), inside
