"""DeepLesion: key slices of CT with boxes around lesions."""

from hilum.bench.datasets.collect import Collector, number_of, read_rows
from hilum.bench.task import Case, Region, Source, Split

# Official part → ours. Only validation and test have types; validation of ours is drawn from the official one.
_SPLITS: dict[str, Split] = {"1": "train", "2": "train", "3": "test"}
_COLUMNS = [
    "File_name", "Patient_index", "Bounding_boxes", "Coarse_lesion_type", "Possibly_noisy", "Train_Val_Test", "Image_size",
    "Spacing_mm_px_",
]  # fmt: skip


def read_deeplesion(into: Collector) -> None:
    """Site of a lesion (O3): one case for each row of DL_info.csv that has a type."""
    table = into.folder / "DL_info.csv"
    unlabelled = noisy = 0
    for number, row in enumerate(read_rows(into, table, _COLUMNS), 1):
        if row["Coarse_lesion_type"] == "-1":
            unlabelled += 1
            continue
        if row["Possibly_noisy"] == "1":
            noisy += 1
            continue
        box = [number_of(v) for v in row["Bounding_boxes"].split(",")]
        size = [number_of(v) for v in row["Image_size"].split(",")]
        kind, split = row["Coarse_lesion_type"], _SPLITS.get(row["Train_Val_Test"])
        numbers = [v for v in (*box, *size) if v is not None]
        if len(numbers) != 6 or kind not in tuple("12345678") or split is None:
            into.miss(
                table, f"row {number} is malformed", "a box of four numbers, a size, a type 1 to 8, a part 1 to 3"
            )
            continue
        left, top, right, bottom, rows, columns = numbers
        folder, _, name = row["File_name"].rpartition("_")
        path = into.folder / "Images_png" / folder / name
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, columns - 1), min(bottom, rows - 1)
        if left > right or top > bottom:  # boxes are padded by 5 pixels, some beyond the border
            into.miss(path, f"row {number}: a box outside of the slice", f"within {rows:g}×{columns:g}")
        elif into.exists(path, "the key slice of a lesion"):
            first, last = (
                (0, round(top), round(left)),
                (0, round(bottom), round(right)),
            )
            into.cases.append(
                Case(
                    id=f"{folder}/{name.removesuffix('.png')}/{number}",
                    patient=row["Patient_index"],
                    scan=Source(path=path, form="deeplesion"),
                    modality="CT",
                    target=(int(kind) - 1,),
                    region=Region(box=(first, last)),
                    split=split,
                )
            )
    if unlabelled:
        into.miss(table, f"{unlabelled} rows without a type (-1)", "a type 1 to 8", 0)
    if noisy:
        into.miss(table, f"{noisy} rows marked Possibly_noisy", "rows without that mark", 0)
