"""One door to labels: whatever form a segmentation comes in, it leaves on the grid of its scan."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from hilum.archive import nifti
from hilum.archive.dicom import rtstruct, seg
from hilum.archive.dicom.header import looks_like_dicom, read_header
from hilum.archive.dicom.planes import MAX_VOXELS
from hilum.errors import GeometryError, ScanRefused
from hilum.volume import Volume, apart_mm, orient, to_slices

_HEAD_BYTES = 4096
_ITK_FORMATS = ((b"NRRD000", "NrrdImageIO"), (b"ObjectType", "MetaImageIO"))
_MOST_PER_BYTE = 1100  # voxels that a byte of a file can hold: deflate packs 1032 into one

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's messages quote paths


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
            kind = read_header(handle, path).refusal if looks_like_dicom(head) else ""
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
    elif reader := next((io for magic, io in _ITK_FORMATS if head.startswith(magic)), ""):
        labels = _read_itk(path, head, reader)
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


def _read_itk(path: Path, head: bytes, image_io: str) -> Volume:
    """A label map in one mha or nrrd file; ITK's axes are LPS already."""
    if not _holds_its_voxels(head, image_io):
        raise ScanRefused("other_format", "a header without voxels: they lie in another file")
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = reader.GetSize()
        if len(size) != 3 or reader.GetNumberOfComponents() != 1:
            raise ScanRefused("not_3d", f"{len(size)} axes, {reader.GetNumberOfComponents()} components")
        if np.prod(size, dtype=float) > min(MAX_VOXELS, _MOST_PER_BYTE * path.stat().st_size):
            raise ScanRefused("too_large", "×".join(map(str, size)))
        image = reader.Execute()
    except RuntimeError as error:
        raise ScanRefused("corrupt", f"mha or nrrd ({type(error).__name__})") from None
    voxels = sitk.GetArrayFromImage(image)
    if (voxels.dtype.kind == "f" and not np.isfinite(voxels).all()) or voxels.min() < 0 or voxels.max() > 65535:
        raise ScanRefused("corrupt", "expected a label map: whole numbers from 0 to 65535")
    numbers = voxels.astype(np.int32)
    if (numbers != voxels).any():
        raise ScanRefused("corrupt", "expected a label map: whole numbers from 0 to 65535")
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing()))[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    try:
        return to_slices(Volume(voxels=numbers, affine=affine, modality="OT", kind="label"))
    except GeometryError as error:
        raise ScanRefused("no_geometry", str(error)) from None


def _holds_its_voxels(head: bytes, image_io: str) -> bool:
    """Whether a header ends within `head` and sends the reader to no other file, which might be any file."""
    lines = [line.strip().lower().replace(b" ", b"") for line in head.split(b"\n")[:-1]]  # the last may be cut
    if image_io == "MetaImageIO":
        return next((line for line in lines if line.startswith(b"elementdatafile")), b"") == b"elementdatafile=local"
    return b"" in lines and not any(line.startswith(b"datafile:") for line in lines[: lines.index(b"")])
