"""VoxelFM's own way of reading a scan, for those who must match its published features, and what it changes.

`read_upstream` and `prepare_upstream` do what the public code at `fba41a3` does when it embeds a folder of scans, its faults
included. `hilum.encode.volume_contract.prepare_volume` is the corrected way. Where they differ:

    clip          DICOM values are cut at +1000 HU, those of other formats at +1900, a .npy file's not at all
    slices        DICOM slices are sorted by the z coordinate of their position, so a sagittal or coronal series has no order
                  (here: by file name); files of another modality are left out, and the largest series is taken
    rescale       slope and intercept of the first slice hold for all
    spacing       between slices the tag SpacingBetweenSlices, else the mean step in z, whatever the positions say
    orientation   never turned: a NIfTI array is transposed from (x, y, z) to (z, y, x), so left and right, front and back
                  depend on how the file was written; a .npy array is taken as (z, y, x) with 1 mm
    isotropic     only spacings that are equal to the last bit count as isotropic
    background    a scan of less than half the filter's cube is nothing but air to it
    refused       pixels that are not square (NIfTI, .mhd), a minimum of 800 HU or more, a maximum of −100 HU or less
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional

from hilum.archive.intake import read_scan
from hilum.archive.privacy import read_key
from hilum.archive.scan import find
from hilum.encode.encoder import Encoder
from hilum.encode.volume_contract import PreparedVolume, VolumeContract, check_range, fit_volume, prepare_volume
from hilum.errors import ContractError, HilumError, InputError, UsageError
from hilum.volume import FloatArray, Spacing, Volume, orient

_CLIP, _CLIP_DICOM = (-1000.0, 1900.0), (-1000.0, 1000.0)
_SQUARE_MM = 0.001


class Upstream(NamedTuple):
    """A scan as VoxelFM's loader gives it.

    voxels      (Z, Y, X) float32, clipped as the loader clips
    spacing_mm  along the axes, as the loader takes it
    affine      (k, j, i, 1) → LPS millimetres of that array; None when the file does not say. The loader does not look at it
    """

    voxels: NDArray[np.float32]
    spacing_mm: Spacing
    affine: FloatArray | None


def read_upstream(path: str | Path) -> Upstream:
    """A folder of DICOM files, .nii, .nii.gz, .mhd or .npy. ContractError where VoxelFM's loader fails."""
    path = Path(path)
    readers = {".nii": _read_nifti, ".gz": _read_nifti, ".mhd": _read_mhd, ".npy": _read_npy}
    if not path.is_dir() and path.suffix.lower() not in readers:
        raise UsageError(f"VoxelFM's loader reads DICOM folders, .nii, .nii.gz, .mhd and .npy; found '{path.name}'")
    if not path.exists():
        raise UsageError(f"'{path.name}' is not there")
    try:
        found = _read_dicom(path) if path.is_dir() else readers[path.suffix.lower()](path)
    except (HilumError, MemoryError):
        raise
    except Exception as error:  # pydicom, nibabel, SimpleITK and NumPy raise whatever a file brings them to
        raise ContractError(f"VoxelFM's loader fails: the scan cannot be read ({type(error).__name__})") from error
    if found.voxels.ndim != 3 or min(found.spacing_mm) <= 0:
        raise ContractError(
            f"VoxelFM's loader fails: shape {found.voxels.shape}, spacing {found.spacing_mm} mm; it needs three of each"
        )
    return found


def prepare_upstream(path: str | Path, contract: VolumeContract) -> PreparedVolume:
    """The encoder's input as VoxelFM's code makes it. The affine leads to the axes of the array in mm, not to the patient."""
    found = read_upstream(path)
    affine = np.diag([*found.spacing_mm, 1.0])
    unclipped, notes = replace(contract, clip_hu=(-np.inf, np.inf)), ["as VoxelFM's code"]
    return fit_volume(found.voxels, affine, unclipped, notes, same=0, thin=False)


def compare_upstream(path: str | Path, encoder: Encoder) -> dict[str, Any]:
    """How a scan differs when VoxelFM's own code reads it, and whether that matters to the features.

    returns  corrected, upstream: shape, orientation and spacing of the array, range in HU, grid of patches, notes; upstream
             has only `refused` where that code fails;
             voxels: where both see the same voxels, once turned alike: share that differs, largest and mean difference, HU;
             cosine: of the class tokens and of the mean patch tokens
    """
    contract = encoder.contract
    if not isinstance(contract, VolumeContract):
        raise ContractError(f"{encoder.name} encodes slices; expected an encoder of volumes")
    vol = _largest(Path(path))
    right = prepare_volume(vol, contract)
    vol = orient(vol, contract.orientation)
    clipped = replace(vol, voxels=vol.voxels.astype(np.float32).clip(*contract.clip_hu))
    report: dict[str, Any] = {"corrected": _describe(clipped, right)}
    try:
        found, prepared = read_upstream(path), prepare_upstream(path, contract)
    except ContractError as refused:
        return {**report, "upstream": {"refused": str(refused)}}
    other = Volume(voxels=found.voxels, affine=found.affine, modality="CT", unit="HU")
    report["upstream"] = {**_describe(other, prepared), "spacing_mm": _rounded(found.spacing_mm)}
    if other.affine is not None:
        other = orient(other, contract.orientation)
        if other.shape == clipped.shape:
            apart = np.abs(other.voxels - clipped.voxels)
            report["voxels"] = {
                "share": float((apart > 0).mean()), "largest_hu": float(apart.max()), "mean_hu": float(apart.mean()),
            }  # fmt: skip
    ours, theirs = encoder.tokens(right.image[None]), encoder.tokens(prepared.image[None])
    vectors = {"class": (ours.cls, theirs.cls), "mean": (ours.patches.mean(1), theirs.patches.mean(1))}
    report["cosine"] = {kind: round(float(functional.cosine_similarity(*pair)), 6) for kind, pair in vectors.items()}
    return report


def _largest(path: Path) -> Volume:
    entries = [entry for entry in find(path, read_key()) if entry.used]
    if not entries:
        raise InputError(f"'{path.name}' holds no scan that can be used; hilum scan says why")
    return read_scan(max(entries, key=lambda entry: entry.num_files))


def _describe(vol: Volume, prepared: PreparedVolume) -> dict[str, Any]:
    return {
        "shape": list(vol.shape),
        "orientation": None if vol.affine is None else vol.orientation,
        "spacing_mm": None if vol.affine is None else _rounded(vol.spacing_mm),
        "range_hu": [float(vol.voxels.min()), float(vol.voxels.max())],
        "grid": list(prepared.grid),
        "notes": list(prepared.notes),
    }


def _rounded(spacing_mm: Spacing) -> list[float]:
    return [round(s, 4) for s in spacing_mm]


# ---- one reader a format


def _read_dicom(folder: Path) -> Upstream:
    from pydicom import dcmread

    series: dict[str, list[Any]] = {}
    for name in sorted(os.listdir(folder)):
        if not (folder / name).is_file():
            continue
        try:
            data = dcmread(folder / name)
        except Exception:  # VoxelFM's loader passes over whatever pydicom cannot read
            continue
        if getattr(data, "Modality", None) in (None, "", "CT"):
            series.setdefault(getattr(data, "SeriesInstanceUID", ""), []).append(data)
    known = [slices for uid, slices in series.items() if uid]
    slices = max(known, key=len) if known else series.get("", [])
    if not slices:
        raise ContractError("VoxelFM's loader fails: no CT slices in the folder")
    positions = [d.ImagePositionPatient for d in slices if hasattr(d, "ImagePositionPatient")]
    if hasattr(slices[0], "ImagePositionPatient"):
        if len(positions) < len(slices):
            raise ContractError("VoxelFM's loader fails: a slice has no position to sort it by")
        slices.sort(key=lambda d: float(d.ImagePositionPatient[2]))
    elif all(hasattr(d, "InstanceNumber") for d in slices):
        slices.sort(key=lambda d: int(d.InstanceNumber))
    else:
        raise ContractError("VoxelFM's loader fails: the slices have neither positions nor numbers")
    first = slices[0]
    voxels = np.stack([d.pixel_array for d in slices]).astype(np.float32)
    voxels = voxels * float(getattr(first, "RescaleSlope", 1)) + float(getattr(first, "RescaleIntercept", 0))
    heights = [float(d.ImagePositionPatient[2]) for d in slices] if positions else []
    if hasattr(first, "SpacingBetweenSlices"):
        between = abs(float(first.SpacingBetweenSlices))
    elif len(heights) > 1:
        between = abs(float(np.mean(np.diff(heights))))
    else:
        raise ContractError("VoxelFM's loader fails: it cannot tell the distance of the slices")
    if not hasattr(first, "PixelSpacing"):
        raise ContractError("VoxelFM's loader fails: no PixelSpacing")
    spacing = (between, float(first.PixelSpacing[0]), float(first.PixelSpacing[1]))
    return Upstream(_hounsfield(voxels, _CLIP_DICOM), spacing, _dicom_affine(slices))


def _dicom_affine(slices: list[Any]) -> FloatArray | None:
    """Where the array lies in the patient, from the first and last position; None when these do not say."""
    if len(slices) < 2 or not all(hasattr(slices[n], "ImagePositionPatient") for n in (0, -1)):
        return None
    begin, end = (np.array(slices[n].ImagePositionPatient, float) for n in (0, -1))
    row, column = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    affine = np.eye(4)
    affine[:3, 0] = (end - begin) / (len(slices) - 1)
    affine[:3, 1], affine[:3, 2] = column * slices[0].PixelSpacing[0], row * slices[0].PixelSpacing[1]
    affine[:3, 3] = begin
    return affine if abs(np.linalg.det(affine)) > 1e-9 else None


def _read_nifti(path: Path) -> Upstream:
    import nibabel

    image = nibabel.load(path)
    sx, sy, sz = (float(s) for s in np.sqrt((image.affine[:3, :3] ** 2).sum(axis=0)))
    _check_square(sx, sy)
    voxels = np.asarray(image.get_fdata(), np.float32)
    if voxels.ndim != 3:
        raise ContractError(f"VoxelFM's loader fails: the file has {voxels.ndim} axes; it needs 3")
    affine = np.diag([-1.0, -1, 1, 1]) @ image.affine[:, [2, 1, 0, 3]]
    return Upstream(_hounsfield(np.ascontiguousarray(voxels.T), _CLIP), (sz, sy, sx), affine)


def _read_mhd(path: Path) -> Upstream:
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    voxels = np.asarray(sitk.GetArrayFromImage(image), np.float32)
    spacing = image.GetSpacing()
    if len(spacing) != 3:
        raise ContractError(f"VoxelFM's loader fails: the file has {len(spacing)} axes; it needs 3")
    sx, sy, sz = spacing
    _check_square(sx, sy)
    affine = np.eye(4)
    affine[:3, :3] = (np.reshape(image.GetDirection(), (3, 3)) * spacing)[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return Upstream(_hounsfield(voxels, _CLIP), (sz, sy, sx), affine)


def _read_npy(path: Path) -> Upstream:
    return Upstream(np.load(path, allow_pickle=False).astype(np.float32), (1.0, 1.0, 1.0), None)


def _check_square(sx: float, sy: float) -> None:
    if abs(sx - sy) >= _SQUARE_MM:
        raise ContractError(f"VoxelFM's loader fails: pixels of {sy:g}×{sx:g} mm; it needs square ones")


def _hounsfield(voxels: NDArray[np.float32], clip: tuple[float, float]) -> NDArray[np.float32]:
    voxels = voxels.clip(*clip)
    check_range(float(voxels.min()), float(voxels.max()))
    return voxels
