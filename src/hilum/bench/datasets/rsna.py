"""Challenges of the Radiological Society of North America: lumbar spine 2024, abdominal trauma 2023, pulmonary embolism 2020.

Haemorrhage 2019 has its own file: it keeps three quarters of a million slices in one folder.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from hilum.archive.dicom.header import Header
from hilum.archive.dicom.slices import read_headers
from hilum.bench.datasets.collect import Collector, number_of, read_rows
from hilum.bench.datasets.forms import slice_grid
from hilum.bench.task import Case, Region, Source
from hilum.errors import ScanRefused

SQUARE_MM = 20.0  # about the point of a lumbar level
_GRADES = {"Normal/Mild": 0, "Moderate": 1, "Severe": 2}
_SERIES = {
    "subarticular_stenosis": "Axial T2",
    "neural_foraminal_narrowing": "Sagittal T1",
    "spinal_canal_stenosis": "Sagittal T2/STIR",
}


def read_lumbar(into: Collector) -> None:
    """Stenosis of a level (M1 to M3): the slice and the point of train_label_coordinates.csv, the grade of train.csv."""
    wanted = into.task.target
    places = list(
        read_rows(
            into,
            into.folder / "train_label_coordinates.csv",
            ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"],
        )
    )
    places = [row for row in places if row["condition"].lower().replace(" ", "_").endswith(wanted)]
    names = sorted({f"{row['condition']} {row['level']}".lower().replace(" ", "_").replace("/", "_") for row in places})
    grades = {row["study_id"]: row for row in read_rows(into, into.folder / "train.csv", ["study_id", *names])}
    kinds = {
        row["series_id"]: row["series_description"]
        for row in read_rows(into, into.folder / "train_series_descriptions.csv", ["series_id", "series_description"])
    }
    images = into.need(into.folder / "train_images", "the folder of DICOM studies")
    for number, row in enumerate(places, 1):
        into.progress(number, len(places), "placing levels")
        name = f"{row['condition']} {row['level']}".lower().replace(" ", "_").replace("/", "_")
        grade = _GRADES.get(grades.get(row["study_id"], {}).get(name, ""))
        x, y = number_of(row["x"]), number_of(row["y"])
        path = images / row["study_id"] / row["series_id"] / f"{row['instance_number']}.dcm"
        if x is None or y is None:
            into.miss(into.folder / "train_label_coordinates.csv", f"row {number} without a point", "x and y")
        elif grade is None:
            into.miss(into.folder / "train.csv", f"no grade of {name} in {row['study_id']}", "; ".join(_GRADES), 0)
        elif kinds.get(row["series_id"]) != _SERIES[wanted]:
            into.miss(path.parent, f"a series of {kinds.get(row['series_id'], 'unknown kind')}", _SERIES[wanted])
        elif into.exists(path, "the slice of a labelled level"):
            try:
                grid = slice_grid(path)
            except ScanRefused as refused:
                into.miss(path, str(refused), "a DICOM slice")
                continue
            stored = grid.stored_voxel(y, x)
            if not grid.holds(stored):
                into.miss(path, f"{name} lies outside of the slice", "a point within it")
                continue
            into.cases.append(
                Case(
                    id=f"{row['study_id']}/{name}",
                    patient=row["study_id"],
                    scan=Source(path=path, form="dicom-slice"),
                    modality="MR",
                    target=(grade,),
                    region=Region(box=grid.box_about(stored, (0.0, SQUARE_MM / 2, SQUARE_MM / 2))),
                )
            )


def read_trauma(into: Collector) -> None:
    """Injury of the abdomen (E2): one series for each patient; on the 2D track one slice of it."""
    injured = {}
    for row in read_rows(into, into.folder / "train.csv", ["patient_id", "any_injury"]):
        if row["any_injury"] in ("0", "1"):
            injured[row["patient_id"]] = int(row["any_injury"])
        else:
            into.miss(into.folder / "train.csv", f"any_injury is '{row['any_injury']}'", "0 or 1")
    best: dict[str, tuple[bool, float, str]] = {}
    columns = ["patient_id", "series_id", "aortic_hu", "incomplete_organ"]
    for row in read_rows(into, into.folder / "train_series_meta.csv", columns):
        patient, found = row["patient_id"], number_of(row["aortic_hu"])
        series = (row["incomplete_organ"] == "0", -1e9 if found is None else found, row["series_id"])
        best[patient] = max(best.get(patient, series), series)
    flat = into.task.suite.endswith("2d")
    listed = _listed_slices(into) if flat else {}
    for number, (patient, label) in enumerate(sorted(injured.items()), 1):
        into.progress(number, len(injured), "choosing slices" if flat else "looking for series")
        if patient not in best:
            into.miss(into.folder / "train_series_meta.csv", f"no series of patient {patient}", "one or more")
            continue
        series_id = best[patient][2]
        folder = into.folder / "train_images" / patient / series_id
        if not into.exists(folder, "the series of a patient"):
            continue
        scan = Source(path=folder)
        if flat:
            path = _one_slice(into, folder, listed.get((patient, series_id), set()) if label else set())
            if path is None:
                continue
            scan = Source(path=path, form="dicom-slice")
        into.cases.append(Case(id=f"{patient}/{series_id}", patient=patient, scan=scan, modality="CT", target=(label,)))


def _listed_slices(into: Collector) -> dict[tuple[str, str], set[str]]:
    listed = defaultdict(set)
    columns = ["patient_id", "series_id", "instance_number", "injury_name"]
    for row in read_rows(into, into.folder / "image_level_labels.csv", columns):
        listed[row["patient_id"], row["series_id"]].add(row["instance_number"])
    return listed


def _one_slice(into: Collector, folder: Path, listed: set[str]) -> Path | None:
    """The middle one, by position in the patient, of the listed slices of a series, or of all."""
    paths = sorted(folder.glob("*.dcm"))
    if missing := listed - {path.stem for path in paths}:
        into.miss(folder, f"{len(missing)} slices of image_level_labels.csv are missing", "all of them", 0)
    placed = []
    for path in paths:
        if not listed or path.stem in listed:
            header = read_header(path)
            if not header.refusal and len(header.position) == 3 and len(header.orientation) == 6:
                normal = np.cross(header.orientation[:3], header.orientation[3:])
                placed.append((float(np.dot(header.position, normal)), path))
    if not placed:
        into.miss(folder, "no slice with a position", "the slices of a series")
        return None
    return sorted(placed)[len(placed) // 2][1]


def read_header(path: Path) -> Header:
    """The header of the first slice in a file; what is wrong with it is its `refusal`."""
    try:
        with open(path, "rb") as handle:
            return read_headers(handle, path)[0]
    except OSError as error:
        return Header(path=path, size=0, refusal="unreadable", detail=type(error).__name__)


def read_embolism(into: Collector) -> None:
    """Pulmonary embolism of a study: positive when any image is; indeterminate studies have no label."""
    columns = ["StudyInstanceUID", "SeriesInstanceUID", "pe_present_on_image", "indeterminate"]
    positive: dict[tuple[str, str], bool] = {}
    unclear = set()
    for row in read_rows(into, into.folder / "train.csv", columns):
        place = row["StudyInstanceUID"], row["SeriesInstanceUID"]
        positive[place] = positive.get(place, False) or row["pe_present_on_image"] == "1"
        if row["indeterminate"] == "1":
            unclear.add(place)
    if unclear:
        into.miss(into.folder / "train.csv", f"{len(unclear)} indeterminate studies", "a label", 0)
    for (study, series), label in sorted(positive.items()):
        folder = into.folder / "train" / study / series
        if (study, series) not in unclear and into.exists(folder, "the folder of a series"):
            into.cases.append(
                Case(id=series, patient=study, scan=Source(path=folder), modality="CT", target=(int(label),))
            )
