"""One door to labels: whatever form a segmentation comes in, it leaves on the grid of its scan."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from hilum.archive.dicom import rtstruct, seg
from hilum.archive.dicom.header import looks_like_dicom
from hilum.archive.dicom.slices import read_headers
from hilum.archive.files import itk, nifti
from hilum.errors import ScanRefused
from hilum.volume import Volume, apart_mm, orient

_HEAD_BYTES = 4096


@dataclass(frozen=True)
class LabelMap:
    """Structures on the grid of a scan.

    volume  kind "label", the scan's shape and affine; 0 is background
    names   of the structures, by label. Free text of the file: for use in memory, never written to a ledger
    notes   what did not fit, in numbers
    """

    volume: Volume
    names: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_labels(path: Path, grid: Volume | None) -> LabelMap:
    """Read labels of any known form, told by content: NIfTI, mha, nrrd, DICOM SEG, RTSTRUCT. Raises ScanRefused.

    grid     the scan as a reader delivers it; None: the labels' own grid, turned as `to_slices` turns a scan (contours
             have none and are refused)
    returns  labels on exactly that grid

    Label maps in files of voxels are turned but never resampled: another grid is refused as `labels_off_grid`. SEG and
    RTSTRUCT are placed by patient position; see their readers for the rules.
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(_HEAD_BYTES)
            kind = read_headers(handle, path)[0].refusal if looks_like_dicom(head) else ""
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    if kind == "segmentation":
        return LabelMap(*seg.read(path, grid))
    if kind == "structure_set":
        if grid is None:
            raise ScanRefused("no_geometry", "contours have no grid of their own: give the scan")
        return LabelMap(*rtstruct.read(path, grid))
    if looks_like_dicom(head):
        raise ScanRefused("other_object", "a DICOM object without labels; expected a SEG or an RTSTRUCT")
    if nifti.looks_like_nifti(head):
        labels = nifti.read_label(path)
    elif itk.looks_like_itk(head):
        labels = itk.read_label(path)
    else:
        raise ScanRefused("other_format", "expected labels as NIfTI, mha, nrrd, DICOM SEG or RTSTRUCT")
    return LabelMap(labels if grid is None else _on_grid(labels, grid))


def _on_grid(labels: Volume, grid: Volume) -> Volume:
    """A label map turned as the scan is. Refused unless it lies there within half a voxel."""
    if grid.affine is not None:
        labels = orient(labels, grid.orientation)
    if labels.shape != grid.shape:
        raise ScanRefused("labels_off_grid", f"labels of shape {labels.shape}, a scan of {grid.shape}")
    if grid.affine is not None and (apart := apart_mm(labels, grid)) > 0.5 * min(grid.spacing_mm):
        raise ScanRefused("labels_off_grid", f"labels and scan lie {apart:.1f} mm apart")
    return replace(labels, affine=grid.affine)
