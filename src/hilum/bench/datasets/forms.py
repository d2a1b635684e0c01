"""The forms in which publishers store scans and regions, each read into a `Volume` turned as every other."""

import csv
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hilum.archive import dicom
from hilum.archive.dicom.geometry import stack
from hilum.archive.dicom.pixels import read_lone, with_thickness
from hilum.archive.dicom.slices import read_headers
from hilum.archive.files import image
from hilum.archive.files.values import scaled
from hilum.archive.labels import read_labels
from hilum.archive.one import read
from hilum.bench.catalogue.class_names import TOTALSEGMENTATOR_104, TOTALSEGMENTATOR_117, TOTALSEGMENTATOR_MR_56
from hilum.bench.datasets.analyze import read_analyze
from hilum.bench.datasets.grids import Grid, image_header, turned_grid
from hilum.bench.datasets.hub_files import read_hub_image, read_hub_mask
from hilum.bench.datasets.pickles import read_array
from hilum.bench.task import Case, Region, Source, Task
from hilum.errors import InputError, ScanRefused
from hilum.records import hash_file, hash_json
from hilum.volume import Volume, crop_or_pad, to_slices

# What a folder of binary masks, one for each structure, is numbered by.
MASK_FOLDERS = {
    "masks-104": TOTALSEGMENTATOR_104,
    "masks-117": TOTALSEGMENTATOR_117,
    "masks-mr-56": TOTALSEGMENTATOR_MR_56,
}


def _scan(source: Source) -> Volume:
    return dicom.read(source.files)[0] if source.files else read(source.path, source.series)


def _deeplesion(source: Source) -> Volume:
    """16-bit PNG, HU = value - 32768. The patient lies on the back, rows run to the back, columns to the left; where the
    slice lies is not told, so the origin is 0. Spacing is that of DL_info.csv, two folders up."""
    stored, _ = image.read(source.path)
    if stored.voxels.dtype != np.uint16:
        raise ScanRefused("other_format", "a PNG of 8 bits; DeepLesion has 16")
    spacing = _deeplesion_spacing(source.path.parents[2] / "DL_info.csv")
    x, y, z = spacing[f"{source.path.parent.name}_{source.path.name}"]
    voxels = (stored.voxels.astype(np.int32) - 32768).astype(np.int16)
    return Volume(voxels=voxels, affine=np.array(_LPS) * [z, y, x, 1.0], modality="CT", unit="HU")


_LPS = ((0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1))  # k to the head, j to the back, i to the left


@lru_cache(maxsize=2)
def _deeplesion_spacing(table: Path) -> dict[str, tuple[float, ...]]:
    with open(table, encoding="utf-8-sig", newline="") as handle:
        rows = csv.DictReader(handle)
        return {row["File_name"]: tuple(float(v) for v in row["Spacing_mm_px_"].split(",")) for row in rows}


def _pickle(source: Source) -> Volume:
    """An array (Z, Y, X) without geometry."""
    found = read_array(source.path)
    if found.ndim != 3 or 0 in found.shape:
        raise ScanRefused("not_3d", "×".join(str(n) for n in found.shape))
    return Volume(voxels=np.ascontiguousarray(found), affine=None, modality="MR")


def _windowed(source: Source) -> Volume:
    """CT that its publisher clipped to -1350 … 150 HU and scaled to 0 … 1."""
    header = image_header(source.path)
    values = scaled(header).astype(np.float32)
    if values.min() < -0.01 or values.max() > 1.01:
        raise ScanRefused("other_format", f"values {values.min():g} to {values.max():g}; expected 0 to 1")
    vol = Volume(voxels=np.clip(values, 0, 1) * 1500 - 1350, affine=header.affine, modality="CT", unit="HU")
    return to_slices(vol)


FORMS: dict[str, Callable[[Source], Volume]] = {
    "scan": _scan,
    "dicom-slice": lambda source: read_lone(source.path),
    "deeplesion": _deeplesion,
    "pickle": _pickle,
    "analyze": lambda source: read_analyze(source.path),
    "windowed": _windowed,
    "hub": read_hub_image,
}


def read_source(source: Source) -> Volume:
    """The voxels of a source, turned as `hilum.volume.to_slices` turns a scan. Raises ScanRefused, InputError."""
    try:
        vol = FORMS[source.form](source)
        if source.box is None:
            return vol
        first, last = source.box
        shape = last[0] - first[0] + 1, last[1] - first[1] + 1, last[2] - first[2] + 1
        return crop_or_pad(vol, first, shape, fill=0.0)
    except (OSError, LookupError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{source.path.name} cannot be read as {source.form}: {type(error).__name__} {error}"
        ) from None


def read_scan(case: Case) -> Volume:
    """The scan of a case with the modality its publisher states; CT of publishers is in HU, whatever range it has been cut to.

    Raises ScanRefused, InputError.
    """
    return replace(read_source(case.scan), modality=case.modality, unit="HU" if case.modality == "CT" else "")


def read_region(region: Region, scan: Volume) -> Volume:
    """A region on exactly the grid of its scan.

    scan      as `read_source` returns it
    returns   kind "label", 1 inside, 0 outside

    Raises ScanRefused `labels_off_grid` when the map lies on another grid, InputError when the region holds no voxel.
    """
    numbers = np.zeros(scan.shape, np.uint8)
    if region.source is not None:
        stored = _numbers(region.source, scan)
        numbers[stored != 0 if region.values is None else np.isin(stored, region.values)] = 1
    elif region.box is not None:
        numbers[tuple(slice(first, last + 1) for first, last in zip(*region.box))] = 1
    if not numbers.any():
        raise InputError("the region holds no voxel of its scan; expected at least one")
    return Volume(voxels=numbers, affine=scan.affine, modality="OT", kind="label")


def read_truth(task: Task, region: Region, scan: Volume) -> Volume:
    """The truth of a segmentation, on the grid of its scan: class k of `Task.classes` is number k + 1, all else 0.

    `Region.values` are the stored numbers of the classes, in their order; several for a task of one class. None: the numbers of
    the map are those of the classes. Raises ScanRefused `labels_off_grid`, InputError when a region has no label map.
    """
    if region.source is None:
        raise InputError("a segmentation needs a label map; found a region without one")
    stored = _numbers(region.source, scan)
    classes = len(task.classes)
    if region.values is None:
        numbers = np.where(stored <= classes, stored, 0).astype(np.int32)
    elif classes == 1:
        numbers = np.isin(stored, region.values).astype(np.int32)
    else:
        numbers = np.zeros(scan.shape, np.int32)
        for number, value in enumerate(region.values, 1):
            numbers[stored == value] = number
    return Volume(voxels=numbers, affine=scan.affine, modality="OT", kind="label")


def source_hash(source: Source) -> str:
    """16 hex digits of what a source holds: the content of its files, and which part of it. InputError when it is missing."""
    paths = list(source.files) or [source.path]
    if source.path.is_dir() and not source.files:
        paths = sorted(path for path in source.path.rglob("*") if path.is_file())
    if beside := [path.with_suffix(s) for path in paths for s in _VOXELS.get(path.suffix, ())]:
        paths += [path for path in beside if path.is_file()]
    if lost := [path for path in paths if not path.is_file()]:
        raise InputError(f"{lost[0].name} is missing; hilum bench check says what else is")
    row = [source.series, source.form, source.box]
    return hash_json([row, *([path.name, _file_hash(path, path.stat().st_mtime_ns)] for path in paths)])


_VOXELS = {".mhd": (".raw", ".zraw"), ".hdr": (".img",)}  # files beside a header that hold its voxels


@lru_cache(maxsize=1 << 16)
def _file_hash(path: Path, changed: int) -> str:
    return hash_file(path)


def _numbers(source: Source, scan: Volume) -> NDArray[Any]:
    if source.form == "hub":
        return read_hub_mask(source, scan)
    if source.form not in MASK_FOLDERS:
        return read_labels(source.path, scan).volume.voxels
    numbers = np.zeros(scan.shape, np.int32)
    for number, name in enumerate(MASK_FOLDERS[source.form], 1):
        path = source.path / f"{name}.nii.gz"
        if path.exists():
            numbers[read_labels(path, scan).volume.voxels != 0] = number
    return numbers


def slice_grid(path: Path) -> Grid:
    """The grid of one DICOM slice, as "dicom-slice" reads it, from its header. Raises ScanRefused."""
    try:
        with open(path, "rb") as handle:
            header = read_headers(handle, path)[0]
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    if header.refusal:
        raise ScanRefused(header.refusal, header.detail)
    return turned_grid((1, header.rows, header.columns), stack([with_thickness(header)]).affine, through=0)
