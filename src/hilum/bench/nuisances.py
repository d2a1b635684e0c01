"""Nuisances of cases: what the data set says of them, and what the headers of their scans say.

From a header: thickness (of DICOM the slice's, else the distance of slices), spacing and field_of_view in mm; of DICOM also
vendor, model, kernel, sex, age (`hilum.archive.dicom.acquisition`). What the data set says goes before the header.
"""

from collections.abc import Sequence

import numpy as np

from hilum.archive.dicom.acquisition import read_acquisition
from hilum.bench.datasets.grids import grid_of
from hilum.bench.task import Case, Source
from hilum.errors import ScanRefused

Nuisances = dict[str, str | float]


def nuisances_of(cases: Sequence[Case]) -> list[Nuisances]:
    """Of each case; each header is read once. A value that nobody states is not there."""
    headers: dict[Source, Nuisances] = {}
    for case in cases:
        if case.scan not in headers:
            headers[case.scan] = _header(case.scan)
    return [headers[case.scan] | dict(case.nuisances) for case in cases]


def _header(source: Source) -> Nuisances:
    """{} for forms of one publisher, which carry no header, for crops, whose grid is not the scanner's, and broken files."""
    if source.form != "scan" or source.box is not None:
        return {}
    if source.files or source.path.is_dir():
        files = source.files or sorted(path for path in source.path.iterdir() if path.is_file())
        return next((found for found in map(read_acquisition, files) if found), {})
    try:
        grid = grid_of(source.path)
    except ScanRefused:  # a DICOM file, an image without geometry, or what the run refuses with its reason
        return read_acquisition(source.path)
    if grid.affine is None:
        return {}
    thickness, *pixels = np.linalg.norm(grid.affine[:3, :3], axis=0).round(4).tolist()
    sides = [number * step for number, step in zip(grid.shape[1:], pixels)]
    found: Nuisances = {"spacing": pixels[0], "field_of_view": max(sides)}
    return found | ({"thickness": thickness} if grid.shape[0] > 1 else {})
