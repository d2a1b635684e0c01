"""TotalSegmentator, CT and MR: one folder for each subject, one binary mask for each structure."""

from collections import defaultdict
from pathlib import Path

from hilum.bench.datasets.collect import Collector, read_rows
from hilum.bench.datasets.forms import MASK_FOLDERS
from hilum.bench.datasets.grids import Areas, measure, on_grid
from hilum.bench.task import Case, Region, Source, Split

MIN_VOXELS = 30  # of a structure; fewer are shreds at the border of the field
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}


def read_totalsegmentator(into: Collector) -> None:
    """Organ recognition (A1, A2) and segmentation. The slice of a structure is the one in which it covers most voxels."""
    tables = sorted(into.folder.glob("meta.csv")) or sorted(into.folder.glob("*/meta.csv"))
    table = tables[0] if tables else into.need(into.folder / "meta.csv", "the table of subjects")
    image = "mri.nii.gz" if into.task.dataset == "TotalSegmentator-MRI" else "ct.nii.gz"
    subjects: dict[str, Split] = {}
    for row in read_rows(into, table, ["image_id", "split"]):
        subject = table.parent / row["image_id"]
        if row["split"] not in _SPLITS:
            into.miss(table, f"split '{row['split']}' of {row['image_id']}", "train, val or test")
        elif into.exists(subject / image, "the scan") and into.exists(subject / "segmentations", "a folder of masks"):
            subjects[row["image_id"]] = _SPLITS[row["split"]]
    if into.task.kind == "segmentation":
        _segmentation(into, table.parent, image, subjects)
    else:
        _organs(into, table.parent, image, subjects)


def _present(into: Collector, folder: Path) -> list[Path]:
    """The masks of a subject; a problem when some are missing."""
    masks = [folder / f"{name}.nii.gz" for name in into.task.classes]
    present = [mask for mask in masks if mask.exists()]
    if len(present) < len(masks):
        lost = next(mask.name for mask in masks if mask not in present)
        found = f"{len(masks) - len(present)} of {len(masks)} masks missing, first {lost}"
        into.miss(
            folder, found, f"{len(masks)} masks (versions 1 and 2 name them differently)", len(masks) - len(present)
        )
    return present


def _organs(into: Collector, root: Path, image: str, subjects: dict[str, Split]) -> None:
    wanted = [(mask, None) for name in subjects for mask in _present(into, root / name / "segmentations")]
    filled: dict[str, dict[Path, Areas]] = defaultdict(dict)
    for mask, _, found in measure(into, wanted):
        if found.volume >= MIN_VOXELS:
            filled[mask.parents[1].name][mask] = found
    for subject, masks in filled.items():
        scan = root / subject / image
        for mask in on_grid(into, scan, [(mask, found.shape) for mask, found in masks.items()]):
            organ = mask.name.removesuffix(".nii.gz")
            flat = into.task.suite.endswith("2d")
            into.cases.append(
                Case(
                    id=f"{subject}/{organ}",
                    patient=subject,
                    scan=Source(path=scan),
                    modality=into.task.modality,
                    target=(into.number(organ),),
                    slices=(masks[mask].largest,) if flat else None,
                    region=Region(source=Source(path=mask)),
                    split=subjects[subject],
                )
            )


def _segmentation(into: Collector, root: Path, image: str, subjects: dict[str, Split]) -> None:
    form = next(form for form, names in MASK_FOLDERS.items() if names == into.task.classes)
    for subject, split in subjects.items():
        folder = root / subject / "segmentations"
        if not _present(into, folder):
            continue
        into.cases.append(
            Case(
                id=subject,
                patient=subject,
                scan=Source(path=root / subject / image),
                modality=into.task.modality,
                target=(),
                region=Region(source=Source(path=folder, form=form)),
                split=split,
            )
        )
