"""Tiny copies of the publishers' folders, made in their exact layout: a few scans of a few voxels each."""

import csv
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from hilum.bench.catalogue.class_names import (
    CT_RATE_18,
    MERLIN_30,
    TOTALSEGMENTATOR_104,
    TOTALSEGMENTATOR_117,
    TOTALSEGMENTATOR_MR_56,
)

SHAPE = (8, 12, 10)
SPACING = (2.0, 1.0, 1.0)


def scan(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Voxels like those of a CT: air and tissue."""
    rng = np.random.default_rng(seed)
    voxels = np.full(shape, -1000) + rng.integers(0, 20, shape)
    voxels[:, 3:9, 3:8] = rng.integers(-100, 200, (shape[0], 6, 5))
    return voxels.astype(np.int16)


def mask(
    *boxes: tuple[int, tuple[int, int], tuple[int, int], tuple[int, int]], shape: tuple[int, ...] = SHAPE
) -> np.ndarray:
    """A label map of boxes: (number, first and end in z, in y, in x)."""
    labels = np.zeros(shape, np.uint8)
    for number, z, y, x in boxes:
        labels[slice(*z), slice(*y), slice(*x)] = number
    return labels


def nifti(path: Path, voxels: np.ndarray, spacing: Sequence[float] = SPACING) -> Path:
    """(Z, Y, X), rows to the back, columns to the left, slices to the head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dz, dy, dx = spacing
    nib.save(nib.Nifti1Image(voxels.T, np.diag([-dx, -dy, dz, 1.0])), path)
    return path


def table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, delimiter=delimiter).writerows([columns, *rows])
    return path


def dicom(path: Path, pixels: np.ndarray, position: Sequence[float], **attributes: Any) -> Path:
    """One slice; `attributes` replace, or (None) remove, those of an axial CT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    modality = attributes.get("Modality", "CT")
    values = {
        "SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{2 if modality == 'CT' else 4}",
        "SOPInstanceUID": f"1.2.826.0.1.{abs(hash(path)) % 10**9}",
        "SeriesInstanceUID": "1.2.826.0.1.0.1", "StudyInstanceUID": "1.2.826.0.1.0.2", "PatientID": "P", "Modality": modality,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "Rows": pixels.shape[0], "Columns": pixels.shape[1],
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16,
        "HighBit": 15, "PixelRepresentation": 1, "PixelSpacing": [1.0, 1.0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [float(p) for p in position], "RescaleSlope": 1, "RescaleIntercept": 0,
        "SliceThickness": 2.0, "PixelData": pixels.astype("<i2").tobytes(), **attributes,
    }  # fmt: skip
    data = Dataset()
    for name, value in values.items():
        if value is not None:
            setattr(data, name, value)
    data["PixelData"].VR = "OW"
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = values["SOPClassUID"]
    data.file_meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"]
    data.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, seed: int = 0, number: int = 4, **attributes: Any) -> Path:
    for k in range(number):
        dicom(folder / f"{k + 1}.dcm", scan(seed + k)[0], (0, 0, 2.0 * k), **attributes)
    return folder


def totalsegmentator(root: Path, names: Sequence[str] = TOTALSEGMENTATOR_104, image: str = "ct.nii.gz") -> None:
    """Three subjects; each has a liver of growing slices, one an aorta, and crumbs of a spleen."""
    folder = root / ("TotalSegmentator-MRI" if image == "mri.nii.gz" else "TotalSegmentator")
    table(
        folder / "meta.csv",
        ["image_id", "age", "split"],
        [["s1", 1, "train"], ["s2", 2, "val"], ["s3", 3, "test"]],
        ";",
    )
    (folder / "meta.csv").write_text("\ufeff" + (folder / "meta.csv").read_text())
    empty = nifti(folder / "empty.nii.gz", mask()).read_bytes()
    for n, subject in enumerate(("s1", "s2", "s3"), 1):
        nifti(folder / subject / image, scan(n))
        masks = folder / subject / "segmentations"
        masks.mkdir()
        for name in names:
            (masks / f"{name}.nii.gz").write_bytes(empty)
        nifti(masks / "liver.nii.gz", mask((1, (1, 6), (3, 6), (3, 6)), (1, (n + 1, n + 2), (3, 9), (3, 8))))
        nifti(masks / "spleen.nii.gz", mask((1, (1, 2), (3, 6), (3, 6))))
    nifti(masks / "aorta.nii.gz", mask((1, (0, 8), (6, 9), (6, 8))))


def ixi(root: Path) -> None:
    for n, hospital in ((2, "Guys"), (12, "HH"), (13, "HH"), (14, "IOP")):
        nifti(root / f"IXI/IXI-T1/IXI{n:03d}-{hospital}-0{n:03d}-T1.nii.gz", np.abs(scan(n)), (1.2, 1.0, 1.0))
    rows = [[2, 35.8], [12, 38.78], [13, 40.0], [13, 41.0], [14, ""], [99, 50]]
    table(root / "IXI/IXI.csv", ["IXI_ID", "SEX_ID", "AGE"], [[n, 1, age] for n, age in rows])


def kits23(root: Path) -> None:
    cases = []
    for n, malignant in enumerate((True, False, True)):
        name = f"case_{n:05d}"
        nifti(root / f"KiTS23/dataset/{name}/imaging.nii.gz", scan(n))
        labels = mask(
            (1, (0, 8), (3, 9), (3, 8)),
            (2, (2, 5), (4, 6), (4, 6)),
            (2, (4, 5), (3, 8), (3, 7)),
            (3, (6, 8), (3, 9), (3, 8)),
        )
        nifti(root / f"KiTS23/dataset/{name}/segmentation.nii.gz", labels)
        cases.append({"case_id": name, "malignant": malignant, "tumor_histologic_subtype": "x"})
    (root / "KiTS23/dataset/kits23.json").write_text(json.dumps(cases))


def metaimage(path: Path, voxels: np.ndarray, spacing: Sequence[float], origin: Sequence[float]) -> Path:
    """As LUNA16 ships it: (x, y, z) order, LPS, voxels in a .raw file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dz, dy, dx = spacing
    lines = [
        "ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False", "CompressedData = False",
        "TransformMatrix = 1 0 0 0 1 0 0 0 1", f"Offset = {' '.join(map(str, origin))}",
        f"ElementSpacing = {dx} {dy} {dz}", f"DimSize = {' '.join(str(n) for n in voxels.shape[::-1])}",
        "ElementType = MET_SHORT", f"ElementDataFile = {path.stem}.raw",
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".raw").write_bytes(voxels.astype("<i2").tobytes())
    return path


_XML = """<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>{uid}
</SeriesInstanceUid></ResponseHeader>{sessions}</LidcReadMessage>"""
_READING = """<readingSession><unblindedReadNodule><noduleID>1</noduleID><characteristics><malignancy>{m}</malignancy>
</characteristics><roi><imageZposition>{z}</imageZposition><inclusion>TRUE</inclusion><edgeMap><xCoord>{x0}</xCoord><yCoord>{y}
</yCoord></edgeMap><edgeMap><xCoord>{x1}</xCoord><yCoord>{y}</yCoord></edgeMap></roi></unblindedReadNodule></readingSession>"""
LUNA_ORIGIN = (-60.0, -50.0, 100.0)


def luna16(root: Path) -> None:
    """Two scans of 100 mm cubes. Nodules: one rated 4, 5, 5; one rated 3; one whose outline lies elsewhere; one outside."""
    folder = root / "LUNA16"
    for n, uid in enumerate(("1.3.1", "1.3.2")):
        metaimage(folder / f"subset{n}/{uid}.mhd", scan(n, (40, 50, 50)), (2.5, 2.0, 2.0), LUNA_ORIGIN)
    # voxel (z, y, x) = (20, 10, 30) lies at x = -60 + 60, y = -50 + 20, z = 100 + 50
    rows = [["1.3.1", 0.0, -30.0, 150.0, 8.0], ["1.3.1", 10.0, 0.0, 130.0, 6.0], ["1.3.2", 0.0, -30.0, 150.0, 24.0],
            ["1.3.2", 500.0, 0.0, 150.0, 5.0], ["1.3.9", 0.0, 0.0, 0.0, 5.0]]  # fmt: skip
    table(folder / "annotations.csv", ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"], rows)
    first = [_READING.format(m=m, z=150.0, x0=29, x1=31, y=10) for m in (4, 5, 5)]
    second = [_READING.format(m=3, z=130.0, x0=35, x1=35, y=25)]
    (folder / "LIDC-XML-only/157").mkdir(parents=True)
    (folder / "LIDC-XML-only/157/158.xml").write_text(_XML.format(uid="1.3.1", sessions="".join(first + second)))
    away = _READING.format(m=1, z=110.0, x0=3, x1=4, y=4)
    (folder / "LIDC-XML-only/157/159.xml").write_text(_XML.format(uid="1.3.2", sessions=away))


def airrc(root: Path) -> None:
    luna16(root)
    for uid in ("1.3.1", "1.3.2"):
        labels = mask((1, (0, 9), (3, 6), (3, 6)), (4, (9, 20), (3, 6), (3, 6)), shape=(40, 50, 50))
        dz, dy, dx = 2.5, 2.0, 2.0
        affine = np.diag([-dx, -dy, dz, 1.0])
        affine[:3, 3] = [60.0, 50.0, 100.0]
        (root / "AirRC/labelsTr").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(labels.T, affine), root / f"AirRC/labelsTr/{uid}.nii.gz")


DEEPLESION = [
    "File_name", "Patient_index", "Study_index", "Series_ID", "Key_slice_index", "Measurement_coordinates", "Bounding_boxes",
    "Lesion_diameters_Pixel_", "Normalized_lesion_location", "Coarse_lesion_type", "Possibly_noisy", "Slice_range",
    "Spacing_mm_px_", "Image_size", "DICOM_windows", "Patient_gender", "Patient_age", "Train_Val_Test",
]  # fmt: skip


def deeplesion(root: Path) -> None:
    rows = []
    for patient, kind, noisy, part in ((1, 3, 0, 2), (2, -1, 0, 1), (3, 5, 1, 2), (4, 8, 0, 3)):
        name = f"{patient:06d}_01_01"
        path = root / f"DeepLesion/Images_png/{name}/109.png"
        path.parent.mkdir(parents=True)
        Image.fromarray((scan(patient)[0].astype(np.int32) + 32768).astype(np.uint16)).save(path)
        rows.append(
            [f"{name}_109.png", patient, 1, 1, 109, "1, 2", "2.5, 3.2, 6.1, 8.4", "3, 2", "0.1, 0.2, 0.3", kind, noisy,
             "103, 115", "0.8, 0.7, 5", "12, 10", "-175, 275", "F", 62, part]
        )  # fmt: skip
    table(root / "DeepLesion/DL_info.csv", DEEPLESION, rows)


NBIA = ["Series UID", "Collection", "Subject ID", "Modality", "Number of Images", "File Location"]


def tcga_kirc(root: Path) -> None:
    rows, outcomes = [], []
    for n, patient in enumerate(("TCGA-B0-1", "TCGA-B0-2", "TCGA-B0-3")):
        for part, number in ((1, 3), (2, 5)):
            place = f"TCGA-KIRC/{patient}/study/{part}.000"
            series(
                root / "TCGA-KIRC" / place,
                10 * n + part,
                number,
                PatientID=patient,
                SeriesInstanceUID=f"1.2.{n}.{part}",
            )
            location = f".\\{place}".replace("/", "\\")
            rows.append([f"1.2.{n}.{part}", "TCGA-KIRC", patient, "CT", number, location])
    for patient, status, death, seen in (
        ("TCGA-B0-1", "Dead", 400, "'--"), ("TCGA-B0-2", "Alive", "'--", 900), ("TCGA-B0-3", "Alive", "'--", "'--"),
    ):  # fmt: skip
        outcomes += [[patient, status, death, seen]] * 2  # one row a treatment
    table(root / "TCGA-KIRC/metadata.csv", NBIA, rows)
    columns = ["case_submitter_id", "vital_status", "days_to_death", "days_to_last_follow_up"]
    table(root / "TCGA-KIRC/clinical.tsv", columns, outcomes, "\t")


def nsclc(root: Path) -> None:
    for n in (1, 2):
        patient = f"LUNG1-{n:03d}"
        series(root / f"NSCLC-Radiomics/{patient}/study/0.000-CT", n, PatientID=patient)
    rows = [
        ["LUNG1-001", 78.7, 2165, 1],
        ["LUNG1-002", 83.8, 155, 0],
        ["LUNG1-003", 68.2, 256, 1],
        ["LUNG1-004", 1, "", 1],
    ]
    table(root / "NSCLC-Radiomics/metadata.csv", ["PatientID", "age", "Survival.time", "deadstatus.event"], rows)


def mediastinal(root: Path) -> None:
    folder = root / "Mediastinal-Lymph-Node-SEG"
    rows = []
    for patient in ("case_01", "case_02"):
        series(folder / f"M/{patient}/CT", 1)
        rows.append([f"1.{patient}", "M", patient, "CT", 4, f"M/{patient}/CT"])
    dicom(folder / "M/case_01/SEG/1-1.dcm", scan(0)[0], (0, 0, 0))
    rows.append(["1.9", "M", "case_01", "SEG", 1, "M/case_01/SEG"])
    table(folder / "metadata.csv", NBIA, rows)


def lumbar(root: Path) -> None:
    folder = root / "RSNA-Lumbar"
    sagittal = {"Modality": "MR", "ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "SliceThickness": 4.0}
    for study in ("11", "22"):
        for k in range(3):
            dicom(
                folder / f"train_images/{study}/5/{k + 1}.dcm",
                np.abs(scan(k, (1, 60, 60))[0]),
                (4.0 * k, 0, 0),
                **sagittal,
            )
    levels = ("l1_l2", "l2_l3", "l3_l4", "l4_l5", "l5_s1")
    columns = [f"spinal_canal_stenosis_{v}" for v in levels]
    rows = [["11", "Normal/Mild", "Severe", "", "Moderate", "Severe"], ["22", "Moderate", "", "", "", ""]]
    table(folder / "train.csv", ["study_id", *columns], rows)
    name = "Spinal Canal Stenosis"
    places = [["11", 5, 2, name, "L1/L2", 30.0, 20.0], ["11", 5, 3, name, "L2/L3", 31.0, 40.0],
              ["22", 5, 9, name, "L1/L2", 3, 4],
              ["11", 5, 1, name, "L3/L4", 3, 4], ["11", 5, 1, "Left Neural Foraminal Narrowing", "L3/L4", 3, 4]]  # fmt: skip
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
    table(folder / "train_label_coordinates.csv", columns, places)
    rows = [["11", 5, "Sagittal T2/STIR"], ["22", 5, "Sagittal T2/STIR"]]
    table(folder / "train_series_descriptions.csv", ["study_id", "series_id", "series_description"], rows)


def kneemri(root: Path) -> None:
    rows = []
    for n, label in enumerate((0, 1, 2)):
        path = root / f"KneeMRI/vol0{n + 1}/{n}-{n}.pck"
        path.parent.mkdir(parents=True)
        path.write_bytes(pickle.dumps(np.abs(scan(n)).astype(np.uint16), protocol=2))
        rows.append([n, 1, label, 1, 2, 3, 4, 6, 5, 3, path.name])
    columns = ["examId", "seriesNo", "aclDiagnosis", "kneeLR", "roiX", "roiY", "roiZ", "roiHeight", "roiWidth", "roiDepth",
               "volumeFilename"]  # fmt: skip
    table(root / "KneeMRI/metadata.csv", columns, rows)


def ich(root: Path) -> None:
    """Two series of three slices in one folder, without SliceThickness; the first bleeds in its second slice."""
    rows = []
    for n in range(6):
        patient, k = divmod(n, 3)
        attributes = {"PatientID": f"p{patient}", "SeriesInstanceUID": f"1.2.{patient}", "SliceThickness": None}
        dicom(root / f"RSNA-ICH/stage_2_train/ID_{n}a.dcm", scan(n)[0], (0, 0, 5.0 * k), **attributes)
        rows += [[f"ID_{n}a_any", int(n == 1)], [f"ID_{n}a_subdural", int(n == 1)]]
    table(root / "RSNA-ICH/stage_2_train.csv", ["ID", "Label"], rows)


def trauma(root: Path) -> None:
    folder = root / "RSNA-Abdominal-Trauma"
    for n, (patient, series_id) in enumerate((("7", "70"), ("7", "71"), ("8", "80"))):
        for k in range(5):  # the highest number lies lowest
            path = folder / f"train_images/{patient}/{series_id}/{k}.dcm"
            dicom(path, scan(n + k)[0], (0, 0, -3.0 * k), SeriesInstanceUID=series_id, PatientID=patient)
    table(folder / "train.csv", ["patient_id", "bowel_injury", "any_injury"], [[7, 1, 1], [8, 0, 0]])
    rows = [[7, 70, 300, 1], [7, 71, 200, 0], [8, 80, 100, 0]]
    table(folder / "train_series_meta.csv", ["patient_id", "series_id", "aortic_hu", "incomplete_organ"], rows)
    listed = [[7, 71, k, "Bowel"] for k in (0, 1, 3)]
    table(folder / "image_level_labels.csv", ["patient_id", "series_id", "instance_number", "injury_name"], listed)


def embolism(root: Path) -> None:
    rows = []
    for study, positive, unclear in (("1.1", 1, 0), ("1.2", 0, 0), ("1.3", 0, 1)):
        series(root / f"RSNA-STR/train/{study}/{study}.5", 3)
        rows += [[study, f"{study}.5", f"{study}.{k}", positive * int(k == 1), unclear] for k in range(3)]
    columns = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "pe_present_on_image", "indeterminate"]
    table(root / "RSNA-STR/train.csv", columns, rows)


def emidec(root: Path) -> None:
    for name, dead in (("Case_N006", ()), ("Case_P001", ((3, (2, 4), (4, 5), (4, 6)), (4, (3, 4), (5, 6), (4, 6))))):
        folder = root / f"EMIDEC/{name}"
        nifti(folder / f"Images/{name}.nii.gz", np.abs(scan(len(dead))), (8.0, 1.5, 1.5))
        heart = mask((2, (1, 6), (3, 9), (3, 8)), (1, (1, 6), (5, 7), (5, 7)), *dead)
        nifti(folder / f"Contours/{name}.nii.gz", heart, (8.0, 1.5, 1.5))


def atlas(root: Path) -> None:
    for n in (1, 2):
        folder = root / f"ATLAS-R2/Training/R00{n}/sub-r00{n}s001/ses-1/anat"
        stem = f"sub-r00{n}s001_ses-1_space-MNI152NLin2009aSym"
        nifti(folder / f"{stem}_T1w.nii.gz", np.abs(scan(n, (40, 12, 10))), (1.0, 1.0, 1.0))
        lesion = mask((1, (20, 24), (3, 6), (3, 6)), (1, (22, 23), (3, 9), (3, 8)), shape=(40, 12, 10))
        nifti(folder / f"{stem}_label-L_desc-T1lesion_mask.nii.gz", lesion, (1.0, 1.0, 1.0))


def covidx(root: Path) -> None:
    folder = root / "COVIDx-CT"
    (folder / "2A_images").mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for side, name, label in (
        ("train", "NCP_96_1328_0032", 2), ("train", "NCP_96_1328_0033", 2), ("train", "Normal_7_1_0001", 0),
        ("val", "CP_3_4_0007", 1), ("test", "ncovr-a_17", 2), ("test", "Normal_9_1_0002", 0),
    ):  # fmt: skip
        Image.fromarray(np.random.default_rng(label).integers(0, 255, (16, 16), np.uint8)).save(
            folder / f"2A_images/{name}.png"
        )
        lines[side].append(f"{name}.png {label} 1 2 10 12")
    for side, text in lines.items():
        (folder / f"{side}_COVIDx_CT-2A.txt").write_text("\n".join(text) + "\n")


def analyze(path: Path, voxels: np.ndarray, spacing: Sequence[float]) -> None:
    """Big-endian, as OASIS ships it, with a fourth axis of one volume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nib.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape((*voxels.shape[::-1], 1))
    header.set_zooms((*spacing[::-1], 1.0))
    path.with_suffix(".hdr").write_bytes(header.binaryblock)
    path.with_suffix(".img").write_bytes(voxels.astype(">i2").tobytes())


def oasis(root: Path) -> None:
    rows = []
    for n, rating in ((1, ""), (2, 0), (3, 0.5), (4, 9)):
        name = f"OAS1_{n:04d}_MR1"
        place = f"OASIS-1/disc1/{name}/PROCESSED/MPRAGE/T88_111/{name}_mpr_n4_anon_111_t88_masked_gfc"
        analyze(root / f"{place}.hdr", np.abs(scan(n)), (1.0, 1.0, 1.0))
        rows += [[name, "F", 74, rating], [name.replace("MR1", "MR2"), "F", 75, rating]]
    table(root / "OASIS-1/oasis_cross-sectional.csv", ["ID", "M/F", "Age", "CDR"], rows)


def xlsx(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """A sheet with shared strings, as spreadsheet programs write it; empty cells are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = sorted({cell for row in rows for cell in row if cell})
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    cells = [
        "".join(f'<c r="{chr(65 + c)}{r}" t="s"><v>{texts.index(cell)}</v></c>' for c, cell in enumerate(row) if cell)
        for r, row in enumerate(rows, 1)
    ]
    sheet = "".join(f'<row r="{r}">{text}</row>' for r, text in enumerate(cells, 1))
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{sheet}</sheetData></worksheet>")
        strings = "".join(f"<si><t>{text}</t></si>" for text in texts)
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{strings}</sst>")


def merlin(root: Path) -> None:
    rows, reports = [], [["study id", "Findings", "Split"]]
    for n, split in enumerate(("train", "val", "test")):
        study = f"AC42{n}"
        nifti(root / f"Merlin/merlin_data/{study}.nii.gz", scan(n))
        rows.append([study, *([1, 0, -1] + [0] * 27)])
        reports.append([study, "liver, normal", split])
    table(root / "Merlin/zero_shot_findings_disease_cls.csv", ["study id", *MERLIN_30], rows)
    xlsx(root / "Merlin/reports_final.xlsx", reports)


def ct_rate(root: Path) -> None:
    for part, names in (
        ("train", ("train_1_a_1", "train_1_a_2", "train_2_a_1")),
        ("valid", ("valid_1_a_1", "valid_1_a_2", "valid_2_b_1")),
    ):
        rows = []
        for n, name in enumerate(names):
            patient = "_".join(name.split("_")[:2])
            nifti(root / f"CT-RATE/dataset/{part}_fixed/{patient}/{name[:-2]}/{name}.nii.gz", scan(n))
            rows.append([f"{name}.nii.gz", *([1, 0] if n < 2 else [0, 0]), *[0] * 16])
        table(
            root / f"CT-RATE/dataset/multi_abnormality_labels/{part}_predicted_labels.csv",
            ["VolumeName", *CT_RATE_18],
            rows,
        )
        header = {"VolumeName": f"{names[0]}.nii.gz", "Manufacturer": "Siemens Healthineers", "PatientSex": "M"}
        header |= {"PatientAge": "036Y", "ReconstructionDiameter": "350", "ConvolutionKernel": "['Br60f', '3']"}
        name = {"train": "train", "valid": "validation"}[part]
        table(root / f"CT-RATE/dataset/metadata/{name}_metadata.csv", list(header), [list(header.values())])


def ictcf(root: Path) -> None:
    rows = [["Patient 1", "Positive", "Severe"], ["Patient 2", "Negative", "Control"], ["Patient 3", "", "Regular"]]
    for n in (1, 2, 3):
        series(root / f"iCTCF/ct/Patient_{n}", n, PatientID=str(n))
    table(root / "iCTCF/clinical.csv", ["ID", "SARS-CoV-2 nucleic acids", "Morbidity outcome"], rows)


def mycobacterial(root: Path) -> None:
    for folder, n in (("NTMNiFTi", 1), ("TBNifTI", 2)):
        voxels = (np.clip(scan(n), -1350, 150) + 1350) / 1500
        nifti(root / f"Mycobacterial/{folder}/{n}.nii", voxels.astype(np.float32))


def osic(root: Path) -> None:
    for n in (1, 2):
        nifti(root / f"OSIC/ct/{n}_0.nii.gz", scan(n))
    table(root / "OSIC/baselines.csv", ["PATIENT ID", "FVC PREDICTED"], [[1, 71.5], [2, 93], [3, 88]])


def hub_tables(root: Path) -> None:
    """Configuration kits as Parquet; the test part in two row groups, its second row without a mask."""
    folder = root / "CuriaBench/kits"
    folder.mkdir(parents=True)
    for side, size in (("train", 3), ("validation", 1), ("test", 2)):
        images = [scan(n)[0].astype(np.float32).tolist() for n in range(size)]
        masks: list[Any] = [mask((1, (0, 1), (3, 6), (4, 7)))[0].tolist() for _ in range(size)]
        if side == "test":
            masks[1] = None
        columns = {
            "image": images,
            "mask": masks,
            "target": [n % 2 for n in range(size)],
            "series_id": [f"{side}{n // 2}" for n in range(size)],
        }
        pq.write_table(pa.table(columns), folder / f"{side}-00000-of-00001.parquet", row_group_size=1)


def hub_folders(root: Path) -> None:
    """Configuration luna16-3D as it was uploaded from: volumes (rows, columns, slices) with masks."""
    for side in ("train", "val", "test"):
        folder = root / f"CuriaBench/luna16-3D/{side}"
        (folder / "images").mkdir(parents=True)
        names = np.array([("a.npy", 0), ("b.npy", 1)], dtype=[("filename", "U16"), ("target", "i8")])
        np.save(folder / "extra_data.npy", names)
        for n, name in enumerate(("a", "b")):
            np.save(folder / f"images/{name}.npy", scan(n).transpose(1, 2, 0).astype(np.float32))
            np.save(folder / f"images/{name}.mask.npy", mask((1, (2, 5), (3, 6), (4, 7))).transpose(1, 2, 0))


MAKERS: dict[str, Callable[[Path], None]] = {
    "TotalSegmentator": totalsegmentator, "IXI": ixi, "KiTS23": kits23, "LUNA16": luna16, "DeepLesion": deeplesion,
    "TotalSegmentator-MRI": lambda root: totalsegmentator(root, TOTALSEGMENTATOR_MR_56, "mri.nii.gz"),
    "TotalSegmentator-2": lambda root: totalsegmentator(root, TOTALSEGMENTATOR_117),
    "TCGA-KIRC": tcga_kirc, "RSNA-Lumbar": lumbar, "KneeMRI": kneemri, "RSNA-ICH": ich, "RSNA-Abdominal-Trauma": trauma,
    "EMIDEC": emidec, "ATLAS-R2": atlas, "COVIDx-CT": covidx, "OASIS-1": oasis, "Merlin": merlin, "CT-RATE": ct_rate,
    "RSNA-STR": embolism, "iCTCF": ictcf, "Mycobacterial": mycobacterial, "OSIC": osic, "NSCLC-Radiomics": nsclc,
    "Mediastinal-Lymph-Node-SEG": mediastinal, "AirRC": airrc, "CuriaBench-tables": hub_tables,
    "CuriaBench-folders": hub_folders,
}  # fmt: skip
