"""The phantom archive on disk: DICOM series as a hospital would hold them, masks and labels beside.

scans/<patient>/ct/*.dcm     one CT series; and mr/, a topogram in scout/ (or ct.nii.gz, mr.nii.gz)
scans/dose_report.dcm        a secondary capture; scans/broken.dcm, a file cut in the middle (DICOM only)
masks/<patient>.nii.gz       organ labels on the grid of both scans; organs.json names them
lesions.csv                  malignancy of each patient's lesion region
labels.csv                   one row per patient: age, organ volumes, malignancy, survival …
series.csv                   one row per series: series_uid, patient_id, modality, mask
"""

import csv
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from hilum.archive.phantom.body import ORGAN, ORGANS, Patient, sample_patient
from hilum.archive.phantom.scan import (
    CT_SCANNERS,
    MR_SCANNERS,
    CTScanner,
    MRScanner,
    make_anatomy,
    organ_mask,
    scan_ct,
    scan_mr,
    survival,
)
from hilum.errors import InputError, UsageError
from hilum.records import explain_full_disk, write_text
from hilum.terminal import Progress
from hilum.volume import Volume

_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_phantom(
    out: str | Path,
    *,
    num_patients: int = 40,
    num_slices: int = 96,
    matrix: int = 256,
    seed: int = 0,
    form: str = "dicom",
    num_workers: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a synthetic CT and MR archive with all labels known; equal arguments give equal files.

    out           a new or empty folder
    num_slices    slices per scan; 96 gives about 4.5 mm
    matrix        pixels per side of a slice
    form          "dicom" or "nifti"
    returns       counts of what was written
    """
    out = Path(out)
    if form not in ("dicom", "nifti"):
        raise UsageError(f"form '{form}' is unknown; expected dicom or nifti")
    if num_patients < 1 or num_slices < 8 or matrix < 32:
        raise UsageError("a phantom needs at least 1 patient, 8 slices and a matrix of 32")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; choose a new one")
    labels, series = [], []
    write = partial(_write_patient, out=out, num_slices=num_slices, matrix=matrix, seed=seed, form=form)
    with explain_full_disk(out), ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for done, (row, rows) in enumerate(pool.map(write, range(num_patients)), 1):
            labels.append(row)
            series += rows
            if progress:
                progress(done, num_patients, "phantom patients")
    if form == "dicom":
        _write_dose_report(out / "scans" / "dose_report.dcm")
        whole = sorted((out / "scans").rglob("ct/*.dcm"))[0].read_bytes()
        (out / "scans" / "broken.dcm").write_bytes(whole[: len(whole) // 3])
    _write_csv(out / "labels.csv", labels)
    lesion = {"region": ORGAN["lesion"]}
    _write_csv(out / "lesions.csv", [{n: r[n] for n in ("patient_id", "malignant")} | lesion for r in labels])
    _write_csv(out / "series.csv", series)
    write_text(out / "organs.json", json.dumps(dict(enumerate(ORGANS)), indent=2) + "\n")
    return {
        "num_patients": num_patients,
        "num_series": len(series),
        "num_files": sum(p.is_file() for p in out.rglob("*")),
    }


def _write_patient(
    index: int, *, out: Path, num_slices: int, matrix: int, seed: int, form: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    patient = sample_patient(index, seed)
    anatomy = make_anatomy(patient, num_slices, matrix)
    folder = out / "scans" / patient.patient_id
    rows = []
    for modality, vol, scanner in (
        ("CT", scan_ct(anatomy), CT_SCANNERS[patient.ct_scanner]),
        ("MR", scan_mr(anatomy), MR_SCANNERS[patient.mr_scanner]),
    ):
        uid = _uid(patient, modality)
        if form == "dicom":
            _write_series(folder / modality.lower(), vol, patient, scanner, uid)
        else:
            _write_nifti(folder / f"{modality.lower()}.nii.gz", vol)
        rows.append(
            {
                "series_uid": uid,
                "file": "" if form == "dicom" else f"{patient.patient_id}/{modality.lower()}.nii.gz",
                "patient_id": patient.patient_id,
                "modality": modality,
                "mask": f"masks/{patient.patient_id}.nii.gz",
            }
        )
        if form == "dicom" and modality == "CT":
            _write_topogram(folder / "scout", vol, patient)
    mask = organ_mask(anatomy)
    _write_nifti(out / "masks" / f"{patient.patient_id}.nii.gz", mask)
    volumes = anatomy.organ_volumes_ml()
    days, event, hazard = survival(patient, volumes["lesion"])
    label = {
        "patient_id": patient.patient_id,
        "sex": patient.sex,
        "age_years": round(patient.age_years, 1),
        "enhanced": int(patient.enhanced),
        "ct_scanner": CT_SCANNERS[patient.ct_scanner].model,
        "mr_scanner": MR_SCANNERS[patient.mr_scanner].model,
        "malignant": int(patient.malignant),
        "num_lesions": patient.num_lesions,
        "survival_days": round(days, 1),
        "event": int(event),
        "hazard_per_year": round(hazard, 5),
        **{f"{organ}_ml": round(ml, 2) for organ, ml in volumes.items()},
    }
    return label, rows


def _uid(patient: Patient, *parts: str) -> str:
    return str(generate_uid(entropy_srcs=[patient.patient_id, str(patient.seed), *parts]))


def _dataset(sop_class: str, patient: Patient | None, *parts: str) -> FileDataset:
    """A DICOM header with everything but the pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID = sop_class
    ds.PatientID = patient.patient_id if patient else "PHANTOM"
    ds.PatientName = f"Phantom^{ds.PatientID}"
    ds.PatientSex = patient.sex if patient else ""
    ds.PatientAge = f"{int(patient.age_years):03d}Y" if patient else ""
    seed = str(patient.seed) if patient else ""
    ds.StudyInstanceUID = str(generate_uid(entropy_srcs=[ds.PatientID, seed, "study", *parts[:1]]))
    ds.SeriesInstanceUID = str(generate_uid(entropy_srcs=[ds.PatientID, seed, *parts]))
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    return ds


def _set_pixels(ds: FileDataset, pixels: NDArray[Any], uid: str) -> None:
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()


def _write_series(folder: Path, vol: Volume, patient: Patient, scanner: CTScanner | MRScanner, uid: str) -> None:
    """One file per slice, as a scanner sends them: head first, numbered from the head down."""
    assert vol.affine is not None
    folder.mkdir(parents=True)
    ct = isinstance(scanner, CTScanner)
    ds = _dataset(CTImageStorage if ct else MRImageStorage, patient, vol.modality)
    ds.Modality, ds.SeriesInstanceUID = vol.modality, uid
    ds.Manufacturer, ds.ManufacturerModelName = scanner.manufacturer, scanner.model
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if ct else "M"]
    ds.FrameOfReferenceUID = _uid(patient, "frame")
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dz, dy, dx = vol.spacing_mm
    ds.PixelSpacing, ds.SliceThickness = [f"{dy:.10g}", f"{dx:.10g}"], f"{dz:.10g}"
    if isinstance(scanner, CTScanner):
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
        ds.ConvolutionKernel = scanner.kernel_name
    else:
        ds.ScanningSequence, ds.RepetitionTime, ds.EchoTime = "SE", str(scanner.tr_ms), str(scanner.te_ms)
    for number, k in enumerate(reversed(range(vol.shape[0])), 1):
        ds.InstanceNumber = number
        ds.ImagePositionPatient = [f"{v:.10g}" for v in vol.affine[:3] @ [k, 0, 0, 1]]
        pixels = (vol.voxels[k] + 1024).astype(np.uint16) if ct else vol.voxels[k].astype(np.uint16)
        _set_pixels(ds, pixels, _uid(patient, vol.modality, str(number)))
        pydicom.dcmwrite(folder / f"IM{number:04d}.dcm", ds, enforce_file_format=True)


def _write_topogram(folder: Path, vol: Volume, patient: Patient) -> None:
    """The localizer of a CT: the attenuation of the whole body seen from the front."""
    assert vol.affine is not None
    folder.mkdir(parents=True)
    view = np.clip(vol.voxels + 1000, 0, None).mean(1)[::-1]
    ds = _dataset(CTImageStorage, patient, "CT", "scout")
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    ds.ImagePositionPatient = [f"{v:.10g}" for v in vol.affine[:3] @ [vol.shape[0] - 1, vol.shape[1] / 2, 0, 1]]
    ds.PixelSpacing = [f"{vol.spacing_mm[0]:.10g}", f"{vol.spacing_mm[2]:.10g}"]
    ds.RescaleIntercept, ds.RescaleSlope = "-1024", "1"
    ds.InstanceNumber = 1
    _set_pixels(ds, (view + 24).astype(np.uint16), _uid(patient, "scout", "1"))
    pydicom.dcmwrite(folder / "IM0001.dcm", ds, enforce_file_format=True)


def _write_dose_report(path: Path) -> None:
    """A secondary capture: text as pixels, the thing that must not end up in training."""
    page = Image.new("L", (256, 128))
    ImageDraw.Draw(page).text((12, 20), "PHANTOM DOSE REPORT\n\nCTDIvol  9.8 mGy\nDLP    421 mGy cm", fill=255)
    ds = _dataset(SecondaryCaptureImageStorage, None, "report")
    ds.Modality, ds.ConversionType, ds.ImageType = "CT", "WSD", ["DERIVED", "SECONDARY"]
    ds.InstanceNumber = 1
    _set_pixels(ds, np.asarray(page, np.uint8), str(generate_uid(entropy_srcs=["report", "1"])))
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def _write_nifti(path: Path, vol: Volume) -> None:
    """NIfTI wants axes (i, j, k) and RAS millimetres; the file's time stamp is left out, so equal scans are equal bytes."""
    assert vol.affine is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = _RAS @ vol.affine[:, [2, 1, 0, 3]]
    nib.save(nib.Nifti1Image(vol.voxels.transpose(2, 1, 0), affine), path)


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
