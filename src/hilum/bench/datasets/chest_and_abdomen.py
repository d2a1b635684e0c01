"""Whole CT scans with labels in one table: CT-RATE, Merlin, iCTCF, the mycobacterial set, OSIC."""

import re
from pathlib import Path

from hilum.archive.dicom.acquisition import vendor_of, years_of
from hilum.bench.datasets.collect import Collector, in_hashed_order, number_of, read_rows
from hilum.bench.task import Case, Source, Split

MAX_TRAIN = 1000  # patients of CT-RATE from whom retrieval learns what the scanner does
_METADATA = {"train": "train", "valid": "validation"}
_CT_RATE_NAME = re.compile(r"((?:train|valid)_\d+)_[a-z]+_(\d+)")
_MERLIN_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_ct_rate(into: Collector) -> None:
    """Findings, and retrieval by finding: 18 columns; the patient is the first number of a name.

    Of retrieval, train scans that are there (of at most MAX_TRAIN patients) teach what the protocol `erased` takes out.
    """
    root = into.folder / "dataset" if (into.folder / "dataset").is_dir() else into.folder
    retrieval = into.task.kind == "retrieval"
    parts: tuple[tuple[str, Split], ...] = (("train", "train"), ("valid", "test"))
    for part, split in parts:
        folders = [root / f"{part}_fixed", root / part]
        only = _train_names(folders) if retrieval and split == "train" else None
        if only == set():
            continue
        nuisances = _ct_rate_nuisances(into, root / "metadata" / f"{_METADATA[part]}_metadata.csv")
        folder = next((f for f in folders if f.is_dir()), None) or into.need(folders[0], "the folder of scans")
        images = {path.name: path for path in sorted(folder.rglob("*.nii.gz"))}
        table = root / "multi_abnormality_labels" / f"{part}_predicted_labels.csv"
        for row in read_rows(into, table, ["VolumeName", *into.task.classes]):
            name = row["VolumeName"]
            if only is not None and name not in only:
                continue
            matched = _CT_RATE_NAME.fullmatch(name.removesuffix(".nii.gz"))
            target = tuple(number_of(row[label]) for label in into.task.classes)
            if matched is None or any(value not in (0.0, 1.0) for value in target):
                into.miss(table, f"row of {name or 'nothing'} is malformed", f"{part}_N_x_n.nii.gz and 0 or 1")
            elif name not in images:
                into.miss(folder / name, "missing", "the scan of a row")
            elif not retrieval or (matched[2] == "1" and any(target)):
                values = tuple(float(v) for v in target if v is not None)
                stem = name.removesuffix(".nii.gz")
                scan = Source(path=images[name])
                into.cases.append(
                    Case(
                        id=stem, patient=matched[1], scan=scan, modality="CT", target=values, split=split,
                        nuisances=nuisances.get(name, ()),
                    )
                )  # fmt: skip


def _train_names(folders: list[Path]) -> set[str]:
    """Files of the patients that retrieval learns the scanner from; none where no train scan is there."""
    folder = next((f for f in folders if f.is_dir()), None)
    names = [path.name for path in sorted(folder.rglob("*.nii.gz"))] if folder else []
    patients = {name: "_".join(name.split("_")[:2]) for name in names}
    chosen = set(in_hashed_order(sorted(set(patients.values())))[:MAX_TRAIN])
    return {name for name in names if patients[name] in chosen}


def _ct_rate_nuisances(into: Collector, table: Path) -> dict[str, tuple[tuple[str, str | float], ...]]:
    """What the publisher's copy of the DICOM headers says, by file name; {} without that table. Spacings are in the NIfTI."""
    if not table.exists():
        return {}
    columns = ("Manufacturer", "ConvolutionKernel", "PatientSex", "PatientAge", "ReconstructionDiameter")
    found = {}
    for row in read_rows(into, table, ["VolumeName"], columns):
        kernel = row["ConvolutionKernel"].strip("[]").split(",")[0].strip(" '")
        values: dict[str, str | float | None] = {
            "vendor": vendor_of(row["Manufacturer"]), "kernel": kernel, "sex": row["PatientSex"],
            "age": years_of(row["PatientAge"]), "field_of_view": number_of(row["ReconstructionDiameter"]),
        }  # fmt: skip
        found[row["VolumeName"]] = tuple((name, v) for name, v in values.items() if v is not None and v != "")
    return found


def read_merlin(into: Collector) -> None:
    """30 findings; -1 (not mentioned) is unknown, or absent where the task says so. Patients are the studies: none is named."""
    images = {
        path.name.removesuffix(".nii.gz"): path
        for path in sorted(into.need(into.folder / "merlin_data", "the folder of scans").rglob("*.nii.gz"))
    }
    names = ("reports_final.xlsx", "reports_final.csv")
    reports = next((p for p in (into.folder / n for n in names) if p.exists()), into.folder / names[0])
    splits = {row["study id"]: row["Split"].lower() for row in read_rows(into, reports, ["study id", "Split"])}
    table = into.folder / "zero_shot_findings_disease_cls.csv"
    unknown = 0.0 if into.task.target == "findings-absent" else float("nan")
    for row in read_rows(into, table, ["study id", *into.task.classes]):
        study, values = row["study id"], [number_of(row[label]) for label in into.task.classes]
        if any(value not in (0.0, 1.0, -1.0) for value in values):
            into.miss(table, f"row of {study or 'nothing'} is malformed", "1, 0 or -1 for each finding")
        elif splits.get(study, "") not in _MERLIN_SPLITS:
            into.miss(reports, f"split '{splits.get(study, '')}' of {study}", "train, val or test")
        elif study not in images:
            into.miss(into.folder / "merlin_data" / f"{study}.nii.gz", "missing", "the scan of a row")
        else:
            target = tuple(unknown if value == -1 else float(value or 0) for value in values)
            scan, split = Source(path=images[study]), _MERLIN_SPLITS[splits[study]]
            into.cases.append(Case(id=study, patient=study, scan=scan, modality="CT", target=target, split=split))


def read_ictcf(into: Collector) -> None:
    """COVID-19 and its severity, by patient."""
    table = into.folder / "clinical.csv"
    column = "SARS-CoV-2 nucleic acids" if into.task.target == "covid" else "Morbidity outcome"
    for row in read_rows(into, table, ["ID", column]):
        name, value = row["ID"].replace(" ", "_"), row[column]
        if into.task.target == "covid":
            label = {"Negative": 0, "Positive": 1}.get(value)
        else:
            label = int(value in ("Severe", "Critically ill")) if value else None
        folders = [into.folder / "ct" / spelled for spelled in (name, row["ID"])]
        folder = next((f for f in folders if f.is_dir()), folders[0])
        if label is None:
            wanted = "Positive or Negative" if into.task.target == "covid" else "an entry"
            into.miss(table, f"{column} is '{value}'", wanted, 0)
        elif into.exists(folder, "the folder of a patient's slices"):
            into.cases.append(Case(id=name, patient=name, scan=Source(path=folder), modality="CT", target=(label,)))


def read_mycobacterial(into: Collector) -> None:
    """Tuberculosis or not, by folder."""
    for label, name in enumerate(("NTMNiFTi", "TBNifTI")):
        folder = into.need(into.folder / name, "the folder of a class")
        for path in sorted({*folder.glob("*.nii"), *folder.glob("*.nii.gz")}):
            case = f"{name}/{path.name.partition('.nii')[0]}"
            scan = Source(path=path, form="windowed")
            into.cases.append(Case(id=case, patient=case, scan=scan, modality="CT", target=(label,)))


def read_osic(into: Collector) -> None:
    """Forced vital capacity, by patient."""
    table = into.folder / "baselines.csv"
    for row in read_rows(into, table, ["PATIENT ID", "FVC PREDICTED"]):
        patient, value = row["PATIENT ID"], number_of(row["FVC PREDICTED"])
        path: Path = into.folder / "ct" / f"{patient}_0.nii.gz"
        if value is None:
            into.miss(table, f"FVC PREDICTED is '{row['FVC PREDICTED']}' for {patient}", "a number")
        elif into.exists(path, "the scan of a row"):
            into.cases.append(
                Case(id=f"{patient}_0", patient=patient, scan=Source(path=path), modality="CT", target=(value,))
            )
