"""IXI: T1 images of healthy brains, ages in a spreadsheet."""

from pathlib import Path

from hilum.bench.datasets.collect import Collector, number_of, read_rows
from hilum.bench.datasets.grids import grid_of
from hilum.bench.task import Case, Source
from hilum.errors import ScanRefused


def read_ixi(into: Collector) -> None:
    """Age (A3). A subject with several images, or whose rows give several ages, is left out."""
    ages = _ages(into)
    images: dict[int, list[Path]] = {}
    for path in sorted(into.need(into.folder / "IXI-T1", "the folder of T1 images").glob("*.nii.gz")):
        number = path.name[3:].partition("-")[0]
        if path.name.startswith("IXI") and number.isdigit() and path.name.endswith("-T1.nii.gz"):
            images.setdefault(int(number), []).append(path)
        else:
            into.miss(path, "another name", "IXInnn-<hospital>-nnnn-T1.nii.gz")
    for subject, paths in sorted(images.items()):
        found = ages.get(subject, set())
        if len(paths) > 1 or len(found) != 1:
            what = f"{len(paths)} images" if len(paths) > 1 else f"{len(found)} ages"
            into.miss(paths[0], what, "one image and one age for a subject", 0)
            continue
        try:
            middle = grid_of(paths[0]).shape[0] // 2
        except ScanRefused as refused:
            into.miss(paths[0], str(refused), "a NIfTI image")
            continue
        into.cases.append(
            Case(
                id=f"IXI{subject:03d}",
                patient=f"IXI{subject:03d}",
                scan=Source(path=paths[0]),
                modality="MR",
                target=(*found,),
                slices=(middle,) if into.task.unit == "slice" else None,
            )
        )
    for subject in sorted(ages.keys() - images.keys()):
        into.miss(into.folder / "IXI-T1" / f"IXI{subject:03d}-*-T1.nii.gz", "missing", "the T1 image of a row", 0)


def _ages(into: Collector) -> dict[int, set[float]]:
    table = next((p for p in (into.folder / "IXI.csv", into.folder / "IXI.xlsx") if p.exists()), None)
    if table is None:
        old = into.folder / "IXI.xls"
        found = "an old Excel file" if old.exists() else "missing"
        raise into.stop(old, found, "IXI.csv: open IXI.xls in a spreadsheet program and save it as CSV")
    ages: dict[int, set[float]] = {}
    for row in read_rows(into, table, ["IXI_ID", "AGE"]):
        number, age = number_of(row["IXI_ID"]), number_of(row["AGE"])
        if number is None or age is None or not 0 < age < 120:
            into.miss(table, f"age '{row['AGE']}' of subject {row['IXI_ID'] or 'unnamed'}", "an age in years", 0)
        else:
            ages.setdefault(int(number), set()).add(age)
    return ages
