"""EMIDEC (heart), ATLAS (stroke) and OASIS-1 (ageing brain): one small folder of MR images each."""

from pathlib import Path

import numpy as np

from hilum.bench.datasets.analyze import read_analyze_header
from hilum.bench.datasets.collect import Collector, number_of, read_rows
from hilum.bench.datasets.grids import Areas, grid_of, measure, on_grid
from hilum.bench.task import Case, Region, Source
from hilum.errors import ScanRefused

_HEART, _MYOCARDIUM, _DEAD = (1, 2, 3, 4), (2, 3, 4), (3, 4)
FREE_MM = 10.0  # of a lesion-free slice from the nearest lesion


def read_emidec(into: Collector) -> None:
    """Infarction (E3): every slice with myocardium (2D), or the scan (3D)."""
    root = next((p for p in sorted(into.folder.glob("emidec-dataset*")) if p.is_dir()), into.folder)
    scans = {}
    for folder in sorted(p for p in root.glob("Case_*") if p.is_dir()):
        scan = folder / "Images" / f"{folder.name}.nii.gz"
        mask = folder / "Contours" / f"{folder.name}.nii.gz"
        if not mask.parent.exists():
            into.miss(mask.parent, "missing", "contours, which test cases have not", 0)
        elif into.exists(scan, "the image of a case") and into.exists(mask, "its contours"):
            scans[mask] = scan
    found: dict[Path, dict[tuple[int, ...], Areas]] = {}
    for mask, values, areas in measure(into, [(mask, v) for mask in scans for v in (_MYOCARDIUM, _DEAD)]):
        found.setdefault(mask, {})[values or ()] = areas
    for mask, areas_of in found.items():
        muscle, dead = areas_of.get(_MYOCARDIUM), areas_of.get(_DEAD)
        if muscle is None or dead is None or not on_grid(into, scans[mask], [(mask, muscle.shape)]):
            continue
        if not muscle.volume:
            into.miss(mask, "no myocardium", "labels 1 to 4")
            continue
        name = scans[mask].name.removesuffix(".nii.gz")
        region = Region(source=Source(path=mask), values=_HEART)
        slices: list[int | None] = [None]
        if into.task.suite.endswith("2d"):
            slices = [int(z) for z in np.flatnonzero(muscle.areas)]
        for z in slices:
            into.cases.append(
                Case(
                    id=name if z is None else f"{name}/{z}",
                    patient=name,
                    scan=Source(path=scans[mask]),
                    modality="MR",
                    target=(int(dead.volume > 0 if z is None else dead.areas[z] > 0),),
                    slices=None if z is None else (z,),
                    region=region,
                )
            )


def read_atlas(into: Collector) -> None:
    """Stroke (E4): the slice with the largest lesion, and a lesion-free one, of each subject."""
    root = next((p for p in (into.folder / "Training", into.folder / "ATLAS_2" / "Training") if p.is_dir()), None)
    if root is None:
        raise into.stop(into.folder / "Training", "missing", "the training part, with lesion masks")
    scans = {}
    for scan in sorted(root.glob("R*/sub-*/ses-1/anat/*_T1w.nii.gz")):
        masks = sorted(scan.parent.glob("*_label-L_desc-T1lesion_mask.nii.gz"))
        if len(masks) == 1:
            scans[masks[0]] = scan
        else:
            into.miss(scan.parent, f"{len(masks)} lesion masks", "one")
    for mask, _, areas in measure(into, [(mask, None) for mask in scans]):
        scan = scans[mask]
        if not on_grid(into, scan, [(mask, areas.shape)]):
            continue
        if not areas.volume:
            into.miss(mask, "no lesion", "at least one voxel")
            continue
        affine = grid_of(scan).affine
        assert affine is not None
        free = _free_slice(areas, float(np.linalg.norm(affine[:3, 0])))
        if free is None:
            into.miss(mask, f"no slice {FREE_MM:g} mm away from the lesion", "one that is free of it", 0)
        subject = next(part for part in scan.parts if part.startswith("sub-"))
        for z, label in ((areas.largest, 1), (free, 0)):
            if z is not None:
                into.cases.append(
                    Case(
                        id=f"{subject}/{z}",
                        patient=subject,
                        scan=Source(path=scan),
                        modality="MR",
                        target=(label,),
                        slices=(z,),
                    )
                )


def _free_slice(areas: Areas, step_mm: float) -> int | None:
    """The slice nearest to the middle that is at least FREE_MM from every slice with a lesion."""
    lesions = np.flatnonzero(areas.areas)
    apart = np.abs(np.arange(len(areas.areas))[:, None] - lesions).min(axis=1) * step_mm
    free = np.flatnonzero(apart >= FREE_MM)
    if not len(free):
        return None
    return int(free[np.abs(free - (len(areas.areas) - 1) / 2).argmin()])


def read_oasis(into: Collector) -> None:
    """Dementia (N): first visits, the skull-stripped image in Talairach space; never rated counts as not demented."""
    names = ("oasis_cross-sectional.csv", "oasis_cross-sectional.xlsx")
    table = next((p for p in (into.folder / n for n in names) if p.exists()), into.folder / names[0])
    for row in read_rows(into, table, ["ID", "CDR"]):
        name = row["ID"]
        if not name.endswith("_MR1"):
            continue  # a second visit of a subject that is here already
        rating = 0.0 if row["CDR"] in ("", "N/A") else number_of(row["CDR"])
        if rating not in (0.0, 0.5, 1.0, 2.0, 3.0):
            into.miss(table, f"CDR is '{row['CDR']}' for {name}", "0, 0.5, 1, 2, 3 or nothing")
            continue
        place = "PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr"
        images = sorted({*into.folder.glob(f"{name}/{place}"), *into.folder.glob(f"disc*/{name}/{place}")})
        if len(images) != 1:
            into.miss(into.folder / "disc*" / name / place, f"{len(images)} images", "one")
            continue
        try:
            header = read_analyze_header(images[0])
            if not header.voxels.path.exists():
                raise ScanRefused("detached_voxels", "no .img file beside the header")
        except ScanRefused as refused:
            into.miss(images[0], str(refused), "an Analyze image")
            continue
        scan = Source(path=images[0], form="analyze")
        patient = name.removesuffix("_MR1")
        into.cases.append(Case(id=name, patient=patient, scan=scan, modality="MR", target=(int(rating > 0),)))
