"""The data of `ablation.py`: one store to pre-train on, three to judge on, with labels that say who is held out.

Faces stay in (public, de-identified data), so that masks of the jaw lie on what they name.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hilum.archive.phantom import write_phantom
from hilum.archive.policy import Policy
from hilum.archive.prepare import prepare
from hilum.archive.privacy import read_key
from hilum.records import write_text

DATA_SETS = ("tumour", "openkbp", "phantom")
HELD_OUT_FOLD = "3"  # of the tumour slices
HELD_OUT_EVERY = 4  # OpenKBP patients
NUM_PHANTOMS, NUM_HELD_OUT_PHANTOMS = 32, 12


@dataclass(frozen=True)
class Image:
    """A scan to link: path in its archive, the real file, who it shows, whether held out, label and mask if any."""

    file: str
    path: Path
    person: str
    held_out: bool
    label: str = ""
    mask: Path | None = None


def make_stores(data: Path, out: Path) -> None:
    """OUT/stores/{train,tumour,openkbp,phantom} and OUT/tables; does nothing when they are there."""
    if (out / "tables" / "done").exists():
        return
    key, policy = read_key(), Policy(deface=False)
    if not (out / "phantom" / "organs.json").exists():
        write_phantom(out / "phantom", num_patients=NUM_PHANTOMS, num_slices=40, matrix=128, form="nifti")
    sources = {
        "tumour": list(tumour(data / "slices" / "mr_brain_tumour_cheng")),
        "openkbp": list(openkbp(data / "nifti" / "ct_head_neck_openkbp")),
        "phantom": list(phantom(out / "phantom")),
    }
    for name, images in sources.items():
        for image in images:
            link(image.path, out / "scans" / name / image.file)
            if not image.held_out:
                link(image.path, out / "scans" / "train" / name / image.file)
        prepare(out / "scans" / name, out / "stores" / name, policy=policy)
        rows = [
            {
                "series": key.hash("item", image.file),
                "person": image.person,
                "split": "test" if image.held_out else "fit",
                "label": image.label,
            }
            for image in images
        ]
        write_rows(out / "tables" / f"{name}.csv", rows)
        masks = [{"file": i.file, "mask": str(i.mask.resolve())} for i in images if i.mask]
        if masks:
            write_rows(out / "tables" / f"{name}-masks.csv", masks)
    prepare(out / "scans" / "train", out / "stores" / "train", policy=policy)
    write_text(out / "tables" / "done", "")


def tumour(folder: Path) -> Iterator[Image]:
    """Slices; a run of consecutive ones stands for a patient, whom the set does not name."""
    with open(folder / "labels.csv", newline="") as handle:
        for row in csv.DictReader(handle):
            held_out = row["patient_fold"] == HELD_OUT_FOLD
            yield Image(row["file"], folder / row["file"], row["run"], held_out, row["label_name"])


def openkbp(folder: Path) -> Iterator[Image]:
    with open(folder / "cases.csv", newline="") as handle:
        for number, row in enumerate(csv.DictReader(handle)):
            name = f"{row['case']}.nii.gz"
            held_out = number % HELD_OUT_EVERY == 0
            yield Image(name, folder / "ct" / name, row["case"], held_out, mask=folder / "oar" / name)


def phantom(folder: Path) -> Iterator[Image]:
    with open(folder / "series.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    people = sorted({row["patient_id"] for row in rows})
    for row in rows:
        held_out = row["patient_id"] in people[-NUM_HELD_OUT_PHANTOMS:]
        path, mask = folder / "scans" / row["file"], folder / row["mask"]
        yield Image(row["file"], path, row["patient_id"], held_out, mask=mask)


def link(file: Path, at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    if not at.is_symlink():
        at.symlink_to(file.resolve())


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
