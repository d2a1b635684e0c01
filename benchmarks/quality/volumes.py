"""Slices against volumes on real scans: pre-train on some patients, judge on others.

    python benchmarks/quality/volumes.py DATA -o OUT [--steps recipe=N ...] [--only prepare|pretrain|bench|trivial]

DATA holds nifti/ct_head_neck_openkbp and nifti/mr_hippocampus_msd. Their patients (files) are dealt to train, validation and
test by a hash of the name, 60 : 15 : 25, once for everything: the scans of training and validation patients, unlabelled, make
the stores, and the heads of five tasks are fitted and chosen on them; what is reported is of the others. Encoders: `tiny`
(slices), `small3d` and `small-curia2-3d` (volumes), the two shapes with random weights, and raw pixels. Every step is a
hilum command, printed as it is run; each goes on where it was stopped. MSD does not say which hippocampi share a subject, so
those intervals are too narrow.
"""

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

CELLS = 48  # along each axis of averaged masks
ORGANS = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")
RECIPES = {"tiny": "store", "small3d": "volumes", "small-curia2-3d": "volumes"}
EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"
TASKS = (
    "openkbp_organs",
    "openkbp_segmentation",
    "hippocampus_volume",
    "hippocampus_place",
    "hippocampus_segmentation",
)


def side(name: str) -> str:
    """train, val or test, by the name of a patient."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if place < 0.6 else "val" if place < 0.75 else "test"


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as handle:
        table = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_tasks(data: Path, out: Path) -> None:
    """The example tasks with our split, which their tables and files then name."""
    out.mkdir(parents=True, exist_ok=True)
    organs, whole = [], []
    for row in read(data / "nifti/ct_head_neck_openkbp/cases.csv"):
        name, annotated = row["case"], row["oar_annotated"].split(";")
        case = {"scan": f"ct/{name}.nii.gz", "mask": f"oar/{name}.nii.gz", "patient": name, "side": side(name)}
        organs += [case | {"number": str(n), "organ": o} for n, o in enumerate(ORGANS, 1) if o in annotated]
        whole += [case] if set(ORGANS[:4]) <= set(annotated) else []
    write(out / "openkbp_organs.csv", organs)
    write(out / "openkbp_segmentation.csv", whole)
    hippocampi = read(data / "nifti/mr_hippocampus_msd/cases.csv")
    write(out / "cases.csv", [row | {"side": side(row["file"])} for row in hippocampi])
    for task in TASKS:
        text = (EXAMPLES / f"{task}.toml").read_text()
        (out / f"{task}.toml").write_text(f'{text.rstrip()}\nsplit = "side"\n')


def copy_training_scans(data: Path, out: Path) -> None:
    """Scans that may be seen without labels."""
    for folder, suffix in (("nifti/ct_head_neck_openkbp/ct", ".nii.gz"), ("nifti/mr_hippocampus_msd/images", "")):
        target = out / Path(folder).parent.name
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((data / folder).glob("*.nii.gz")):
            if side(path.name.removesuffix(suffix)) != "test":
                shutil.copy(path, target)


def averaged_masks(
    data: Path, tasks: Path, task: str, num_classes: int, mask_column: str, folder: str
) -> dict[str, object]:
    """What knows nothing of a scan: the training masks stretched onto each other and averaged; a voxel is the likeliest
    class where it is likelier than a share, which the validation cases choose. Mean Dice over test cases and classes."""
    rows = {part: [r for r in read(tasks) if r["side"] == part] for part in ("train", "val", "test")}

    def labels(row: dict[str, str]) -> np.ndarray:
        voxels = np.asarray(nib.load(data / folder / row[mask_column]).dataobj)
        return np.where(voxels <= num_classes, voxels, 0).astype(np.uint8)

    def stretch(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return zoom(image, [n / m for n, m in zip(shape, image.shape)], order=1, grid_mode=True, mode="nearest")

    shares = np.zeros((num_classes, *(CELLS,) * 3))
    for row in rows["train"]:
        for n in range(num_classes):
            shares[n] += stretch((labels(row) == n + 1).astype(float), (CELLS,) * 3) / len(rows["train"])

    def score(row: dict[str, str], least: float) -> float:
        truth = labels(row)
        likely = np.stack([stretch(one, truth.shape) for one in shares])
        found = np.where(likely.max(0) > least, likely.argmax(0) + 1, 0)
        each = [
            2 * np.sum((found == n) & (truth == n)) / max(np.sum(found == n) + np.sum(truth == n), 1)
            for n in range(1, num_classes + 1)
        ]
        return float(np.mean(each))

    best = max((0.05, 0.1, 0.2, 0.3, 0.4, 0.5), key=lambda least: np.mean([score(row, least) for row in rows["val"]]))
    dice = [score(row, best) for row in rows["test"]]
    return {"task": task, "least_share": best, "dice": round(float(np.mean(dice)), 3), "cases": len(dice)}


def hilum(*arguments: object) -> None:
    command = [str(a) for a in arguments]
    print("hilum", *command, flush=True)
    code = subprocess.run([sys.executable, "-m", "hilum", *command]).returncode
    if code not in (0, 4):  # 4: some items were left out, and listed
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", nargs="*", default=[], metavar="RECIPE=N")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", default=5)
    parser.add_argument("--only", choices=("prepare", "pretrain", "bench", "trivial"))
    chosen = parser.parse_args()
    out, steps = chosen.out, dict(pair.split("=") for pair in chosen.steps)
    if chosen.only in (None, "prepare"):
        write_tasks(chosen.data, out / "tasks")
        copy_training_scans(chosen.data, out / "scans")
        hilum("prepare", out / "scans", "-o", out / "store")
        hilum("resample", out / "store", "-o", out / "volumes")
    if chosen.only in (None, "pretrain"):
        for recipe in chosen.recipes:
            more = ["--set", f"run.steps={steps[recipe]}"] if recipe in steps else []
            hilum("pretrain", recipe, "--data", out / RECIPES[recipe], "-o", out / recipe, *more)
    if chosen.only in (None, "bench"):
        models = {
            "pixels": "pixels",
            "random-2d": f"random:{out / 'tiny/export'}",
            "random-3d": f"random:{out / 'small3d/export'}",
        }
        models |= {recipe: out / recipe / "export" for recipe in chosen.recipes}
        named = [part for label, model in models.items() for part in ("--model", f"{label}={model}")]
        tasks = [part for task in chosen.tasks for part in ("--task", out / "tasks" / f"{task}.toml")]
        hilum("bench", "run", *tasks, *named, "--data", chosen.data, "-o", out / "results", "--seeds", chosen.seeds)
    if chosen.only in (None, "trivial"):
        kbp, msd = "nifti/ct_head_neck_openkbp", "nifti/mr_hippocampus_msd/labels"
        for task, table, count, column, folder in (
            ("openkbp_segmentation", "openkbp_segmentation", 4, "mask", kbp),
            ("hippocampus_segmentation", "cases", 2, "file", msd),
        ):
            print(json.dumps(averaged_masks(chosen.data, out / "tasks" / f"{table}.csv", task, count, column, folder)))


if __name__ == "__main__":
    main()
