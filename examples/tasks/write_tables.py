"""Write the tables that two of these tasks need beside them: python examples/tasks/write_tables.py DATA

DATA holds nifti/ct_head_neck_openkbp, nifti/ct_mr_totalsegmentator and slices/ct_mr_body_part_mednist. The other tasks take
the tables that lie in their folders.
"""

import csv
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

HERE = Path(__file__).parent
ORGANS = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")


def write(name: str, columns: list[str], rows: list[list[str]]) -> None:
    with open(HERE / name, "w", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows([columns, *rows])
    print(f"{name}: {len(rows)} rows")


def body_part(folder: Path) -> None:
    """MedNIST names no patients: every file counts as one, which is why this task proves nothing."""
    paths = sorted(folder.glob("*/*.jpeg"))
    rows = [[f"{p.parent.name}/{p.name}", p.parent.name] for p in paths]
    write("body_part.csv", ["file", "part"], rows)


def openkbp(folder: Path) -> None:
    """One row for each annotated organ; and the patients in whom all organs of a segmentation are annotated."""
    organs, whole = [], []
    with open(folder / "cases.csv", newline="") as handle:
        for row in csv.DictReader(handle):
            annotated = row["oar_annotated"].split(";")
            scan, mask = f"ct/{row['case']}.nii.gz", f"oar/{row['case']}.nii.gz"
            organs += [
                [scan, mask, str(n), organ, row["case"]] for n, organ in enumerate(ORGANS, 1) if organ in annotated
            ]
            if set(ORGANS[:4]) <= set(annotated):
                whole.append([scan, mask, row["case"]])
    write("openkbp_organs.csv", ["scan", "mask", "number", "organ", "patient"], organs)
    write("openkbp_segmentation.csv", ["scan", "mask", "patient"], whole)


def slabs(folder: Path) -> None:
    """Organs that the CT and the MR slab share: trained on one patient's CT, tested on another's MR."""
    names = json.loads((folder / "labels.json").read_text())
    scans = [
        ("ct_3mm_slab", "ct_3mm_slab_seg_total", "total", "CT"),
        ("mr_3mm_slab", "mr_3mm_slab_seg_total_mr", "total_mr", "MR"),
    ]
    found = {}
    for scan, mask, kind, _ in scans:
        present = {int(v) for v in np.unique(np.asarray(nib.load(folder / f"{mask}.nii.gz").dataobj)) if v}
        found[scan] = {names[kind][str(v)]: v for v in sorted(present)}
    shared = sorted(set.intersection(*(set(f) for f in found.values())))
    print("shared organs:", json.dumps(shared))
    rows = [
        [f"{scan}.nii.gz", f"{mask}.nii.gz", str(found[scan][organ]), organ, modality, modality]
        for scan, mask, _, modality in scans
        for organ in shared
    ]
    write("slab_organs.csv", ["scan", "mask", "number", "organ", "patient", "modality"], rows)


if __name__ == "__main__":
    data = Path(sys.argv[1])
    body_part(data / "slices" / "ct_mr_body_part_mednist")
    openkbp(data / "nifti" / "ct_head_neck_openkbp")
    slabs(data / "nifti" / "ct_mr_totalsegmentator")
