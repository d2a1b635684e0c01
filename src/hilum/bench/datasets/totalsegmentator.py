"""TotalSegmentator, CT and MR: one folder for each subject, one binary mask for each structure."""

from collections import defaultdict
from pathlib import Path

from hilum.bench.datasets.collect import Collector, read_rows
from hilum.bench.datasets.forms import MASK_FOLDERS
from hilum.bench.datasets.grids import Areas, grid_of, measure, on_grid
from hilum.bench.task import Case, Region, Source, Split
from hilum.errors import ScanRefused

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


def _present(into: Collector, root: Path, subjects: dict[str, Split]) -> dict[str, list[Path]]:
    """The masks of each subject. What no subject has is another version's; what some have is missing in the others."""
    names = [f"{name}.nii.gz" for name in into.task.classes]
    present = {subject: [n for n in names if (root / subject / "segmentations" / n).exists()] for subject in subjects}
    known = {name for here in present.values() for name in here}
    if subjects and (foreign := [name for name in names if name not in known]):
        found = f"{len(foreign)} of {len(names)} structures have no mask in any subject, first {foreign[0]}"
        into.miss(root, found, "a mask of each (versions of this data set differ in their structures)", 0)
    for subject, here in present.items():
        if lost := [name for name in names if name in known and name not in here]:
            found = f"{len(lost)} of {len(known)} masks missing, first {lost[0]}"
            cases = 0 if into.task.kind == "segmentation" else len(lost)
            into.miss(root / subject / "segmentations", found, "a mask of every structure", cases)
    return {subject: [root / subject / "segmentations" / name for name in here] for subject, here in present.items()}


def _organs(into: Collector, root: Path, image: str, subjects: dict[str, Split]) -> None:
    wanted = [(mask, None) for masks in _present(into, root, subjects).values() for mask in masks]
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


def _fits(into: Collector, scan: Path, masks: list[Path]) -> bool:
    """Whether all masks have the shape of their scan, by their headers."""
    try:
        return bool(masks) and len(on_grid(into, scan, [(mask, grid_of(mask).shape) for mask in masks])) == len(masks)
    except ScanRefused as refused:
        into.miss(masks[0].parent, str(refused), "masks that can be read")
        return False


def _segmentation(into: Collector, root: Path, image: str, subjects: dict[str, Split]) -> None:
    form = next(form for form, names in MASK_FOLDERS.items() if names == into.task.classes)
    present = _present(into, root, subjects)
    for subject, split in subjects.items():
        folder = root / subject / "segmentations"
        if len(present[subject]) < max(map(len, present.values())):
            into.miss(folder, "masks missing", "those of all subjects: a missing one would count as background")
            continue
        if not _fits(into, root / subject / image, present[subject]):
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
