"""Collections of The Cancer Imaging Archive: DICOM series, and tables of what became of the patients."""

from pathlib import Path

from hilum.bench.datasets.collect import Collector, number_of, read_rows
from hilum.bench.task import Case, Region, Source

_COLUMNS = ["Series UID", "Subject ID", "Modality", "File Location"]


def read_tcga_kirc(into: Collector) -> None:
    """Survival (O4): of each patient the CT series with most images, and the GDC's clinical table."""
    best: dict[str, tuple[float, str, Path]] = {}
    for row in read_rows(into, into.folder / "metadata.csv", _COLUMNS, ["Number of Images"]):
        if row["Modality"] == "CT":
            size = number_of(row["Number of Images"]) or 0.0
            series = (size, row["Series UID"], _place(into, row["File Location"]))
            best[row["Subject ID"]] = max(best.get(row["Subject ID"], series), series)
    outcomes = _gdc(into)
    for patient, (_, _, folder) in sorted(best.items()):
        if patient not in outcomes:
            into.miss(into.folder / "clinical.tsv", f"no usable outcome of {patient}", "vital_status and days", 0)
        elif _has_dicom(into, folder):
            into.cases.append(
                Case(id=patient, patient=patient, scan=Source(path=folder), modality="CT", target=outcomes[patient])
            )
    for patient in sorted(outcomes.keys() - best.keys()):
        into.miss(into.folder / "metadata.csv", f"no CT series of {patient}", "one for each patient of clinical.tsv", 0)


def _gdc(into: Collector) -> dict[str, tuple[float, float]]:
    """Patient → (days, 1 for death else 0). Rows of one patient repeat (one for each treatment)."""
    outcomes = {}
    columns = ["case_submitter_id", "vital_status", "days_to_death", "days_to_last_follow_up"]
    for row in read_rows(into, into.folder / "clinical.tsv", columns):
        dead = row["vital_status"] == "Dead"
        days = number_of(row["days_to_death" if dead else "days_to_last_follow_up"])
        if row["vital_status"] in ("Dead", "Alive") and days is not None and days > 0:
            outcomes[row["case_submitter_id"]] = (days, float(dead))
    return outcomes


def read_nsclc_radiomics(into: Collector) -> None:
    """Survival: one CT for each patient; the folder's other series (RTSTRUCT, SEG) are no scans."""
    tables = [into.folder / "metadata.csv", *sorted(into.folder.glob("NSCLC-Radiomics-Lung1*.csv"))]
    table = next((t for t in tables if t.exists()), tables[0])
    root = into.folder / "NSCLC-Radiomics" if (into.folder / "NSCLC-Radiomics").is_dir() else into.folder
    for row in read_rows(into, table, ["PatientID", "Survival.time", "deadstatus.event"]):
        days, event = number_of(row["Survival.time"]), row["deadstatus.event"]
        if days is None or days <= 0 or event not in ("0", "1"):
            into.miss(table, f"no usable outcome of {row['PatientID']}", "days above 0, and 0 or 1")
        elif _has_dicom(into, folder := root / row["PatientID"]):
            scan = Source(path=folder)
            target = (days, float(event))
            into.cases.append(
                Case(id=row["PatientID"], patient=row["PatientID"], scan=scan, modality="CT", target=target)
            )


def read_mediastinal(into: Collector) -> None:
    """Segmentation of lymph nodes: the first CT and the first SEG of each subject."""
    first: dict[str, dict[str, Path]] = {}
    table = into.folder / "metadata.csv"
    for row in read_rows(into, table, _COLUMNS):
        place = _place(into, row["File Location"])
        first.setdefault(row["Subject ID"], {}).setdefault(row["Modality"], place)
    for patient, series in sorted(first.items()):
        if not {"CT", "SEG"} <= series.keys():
            into.miss(table, f"{patient} has no {' and no '.join({'CT', 'SEG'} - series.keys())}", "a CT and a SEG")
            continue
        if not (_has_dicom(into, series["CT"]) and _has_dicom(into, series["SEG"])):
            continue
        labels = sorted(series["SEG"].glob("*.dcm"))
        if len(labels) > 1:
            into.miss(series["SEG"], f"{len(labels)} files", "one SEG; the first is used", 0)
        into.cases.append(
            Case(
                id=patient,
                patient=patient,
                scan=Source(path=series["CT"]),
                modality="CT",
                target=(),
                region=Region(source=Source(path=labels[0]), values=tuple(range(1, 256))),
            )
        )


def _place(into: Collector, location: str) -> Path:
    """A folder as the NBIA downloader writes it: below the table, with either slash."""
    return into.folder / location.replace("\\", "/").removeprefix("./")


def _has_dicom(into: Collector, folder: Path) -> bool:
    if not into.exists(folder, "the folder of a series"):
        return False
    if next(folder.rglob("*.dcm"), None) is None:
        into.miss(folder, "no .dcm file", "the slices of a series")
        return False
    return True
