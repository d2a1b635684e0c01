"""RSNA 2019, intracranial haemorrhage: single CT slices, all in one folder; patient and series stand in their headers."""

from collections import defaultdict
from pathlib import Path

from hilum.bench.datasets.collect import Collector, in_hashed_order, read_rows
from hilum.bench.datasets.rsna import read_header
from hilum.bench.task import Case, Source

PER_CLASS = 10_000


def read_ich(into: Collector) -> None:
    """Haemorrhage (E1): a balanced draw of slices on the 2D track, whole series on the 3D track."""
    table = into.folder / "stage_2_train.csv"
    label: dict[str, int] = {}
    for row in read_rows(into, table, ["ID", "Label"]):
        name, _, kind = row["ID"].rpartition("_")
        if kind == "any":
            if row["Label"] not in ("0", "1"):
                into.miss(table, f"Label is '{row['Label']}' for {name}", "0 or 1")
            else:
                label[name] = int(row["Label"])
    into.need(into.folder / "stage_2_train", "the folder of slices")
    if into.task.suite.endswith("2d"):
        chosen = [n for c in (0, 1) for n in in_hashed_order([n for n, v in label.items() if v == c])[:PER_CLASS]]
    else:
        chosen = sorted(label)
    series: dict[tuple[str, str], list[tuple[Path, int]]] = defaultdict(list)
    for number, name in enumerate(chosen, 1):
        into.progress(number, len(chosen), "reading headers")
        path = into.folder / "stage_2_train" / f"{name}.dcm"
        if not into.exists(path, "a slice of stage_2_train.csv"):
            continue
        header = read_header(path)
        if header.refusal or not header.patient_id or not header.series_uid:
            into.miss(
                path, f"{header.refusal or 'no patient or series'} {header.detail}".strip(), "a DICOM slice of CT"
            )
            continue
        series[header.patient_id, header.series_uid].append((path, label[name]))
    for (patient, uid), slices in sorted(series.items()):
        if into.task.suite.endswith("2d"):
            for path, value in slices:
                scan = Source(path=path, form="dicom-slice")
                into.cases.append(Case(id=path.stem, patient=patient, scan=scan, modality="CT", target=(value,)))
        else:
            scan = Source(path=into.folder / "stage_2_train", files=tuple(path for path, _ in slices))
            value = max(value for _, value in slices)
            into.cases.append(Case(id=uid, patient=patient, scan=scan, modality="CT", target=(value,)))
