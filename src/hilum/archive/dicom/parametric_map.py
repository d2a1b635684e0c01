"""DICOM parametric maps → intensity volumes (PS3.3 A.75): computed values such as ADC or T1, in real-world values."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from hilum.archive.dicom.geometry import stack
from hilum.archive.dicom.planes import frame_headers, frames, group, parsing, read_object
from hilum.errors import ScanRefused
from hilum.volume import Volume, to_slices

PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"


def read(path: Path) -> tuple[Volume, tuple[str, ...]]:
    """Read a parametric map whose frames are one regular stack. Raises ScanRefused.

    returns  a volume as `hilum.volume.to_slices` leaves it, float32, modality "OT", no unit: stored values (integer, float
             or double) after the linear real-world value mapping of each frame (C.7.6.16.2.11); notes
    """
    data = read_object(path, (PARAMETRIC_MAP,))
    headers = frame_headers(data, path)
    found = stack(headers)
    with parsing("real-world value mapping"):
        mappings = [_mapping(data, n) for n in range(len(headers))]
    voxels = np.empty((len(headers), headers[0].rows, headers[0].columns), np.float32)
    unmapped = 0
    for n, frame in enumerate(frames(data)):
        slope, intercept, first, last = mappings[n]
        with np.errstate(over="ignore", invalid="ignore"):
            values = (frame.astype(np.float64) * slope + intercept).astype(np.float32)
        if num := int((~np.isfinite(values)).sum()):
            raise ScanRefused("non_finite", f"{num} of {values.size} voxels of a frame")
        if frame.dtype.kind != "f":
            unmapped += int(((frame < first) | (frame > last)).sum())
        voxels[n] = values
    if voxels.min() == voxels.max():
        raise ScanRefused("constant", f"all voxels {float(voxels.flat[0]):g}")
    notes = (f"unmapped: {unmapped} voxels beyond the range of the mapping",) if unmapped else ()
    vol = Volume(voxels=voxels[list(found.order)], affine=found.affine, modality="OT")
    return to_slices(vol, through=0), notes


def _mapping(data: Dataset, frame: int) -> tuple[float, float, float, float]:
    """Slope, intercept and the stored values from first to last that they hold for."""
    item = group(data, frame, "RealWorldValueMappingSequence")
    if item is None:
        raise ScanRefused("corrupt", "no real-world value mapping")
    if "RealWorldValueSlope" not in item:
        raise ScanRefused("other_format", "real-world values by a table")
    slope, intercept = float(item.RealWorldValueSlope), float(item.RealWorldValueIntercept)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ScanRefused("corrupt", f"real-world slope {slope:g} and intercept {intercept:g}")
    first = item.get("RealWorldValueFirstValueMapped", -np.inf)
    last = item.get("RealWorldValueLastValueMapped", np.inf)
    return slope, intercept, float(first), float(last)
