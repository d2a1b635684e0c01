"""DICOM: `header` (one file), `geometry` (slices → box), `series` (files → ledger rows), `pixels` (files → voxels)."""

from hilum.archive.dicom.pixels import read
from hilum.archive.dicom.series import entries

__all__ = ["entries", "read"]
