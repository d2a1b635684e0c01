"""raidium/CuriaBench from a local copy: tables of rows, or the folders it was uploaded from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hilum.bench.datasets.collect import Collector, number_of
from hilum.bench.datasets.hub_files import read_columns, read_npy, table_columns, unnest
from hilum.bench.task import Case, Region, Source, Split
from hilum.errors import ScanRefused

_PATIENT = ("patient", "patient_id", "subject", "case_id", "study_id", "series_id")
_SPLITS: tuple[tuple[Split, tuple[str, ...]], ...] = (
    ("train", ("train",)),
    ("val", ("validation", "val", "valid")),
    ("test", ("test",)),
)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row, before it is judged. Shapes are None where there is no array that could be read."""

    name: str
    patient: str
    target: str
    image: Source
    image_shape: tuple[int, ...] | None
    mask: Source | None
    mask_shape: tuple[int, ...] | None


def read_curiabench(into: Collector) -> None:
    """One configuration, `Task.target`: every row is a case with the target it was shipped with."""
    root = into.need(into.folder / into.task.target, "the folder of this configuration")
    for split, names in _SPLITS:
        rows = _rows(into, root, names)
        if rows is None:
            into.miss(root / names[0], "missing", "a table or folder for each of train, validation, test", 0)
            continue
        for row in rows:
            if case := _case(into, root, split, row):
                into.cases.append(case)


def _rows(into: Collector, root: Path, names: tuple[str, ...]) -> Iterator[_Row] | None:
    for name in names:
        if (root / name / "extra_data.npy").exists():
            return _of_folder(into, root / name)
        found = [*root.rglob(f"{name}*.parquet"), *root.glob(f"{name}/**/*.parquet"), *root.glob(f"{name}/**/*.arrow")]
        if found or (found := list(root.glob(f"**/*{name}*.arrow"))):
            return _of_tables(into, name, sorted(set(found)))
    return None


def _of_folder(into: Collector, folder: Path) -> Iterator[_Row]:
    try:
        table = read_npy(folder / "extra_data.npy")
    except ScanRefused as refused:
        raise into.stop(folder / "extra_data.npy", str(refused), "a structured array without objects") from None
    columns = table.dtype.names or ()
    if not {"filename", "target"} <= set(columns):
        raise into.stop(folder / "extra_data.npy", f"fields {', '.join(columns) or 'none'}", "filename, target, …")
    owner = next((c for c in _PATIENT if c in columns), None)
    for entry in table:
        name = _plain(entry["filename"])
        image = folder / "images" / (name if name.endswith(".npy") else f"{name}.npy")
        mask = image.with_name(f"{image.stem}.mask.npy")
        if not into.exists(image, "the image of a row"):
            continue
        has_mask = mask.exists()
        yield _Row(
            name=f"{folder.name}/{image.stem}",
            patient=_plain(entry[owner]) if owner else f"{folder.name}/{image.stem}",
            target=_plain(entry["target"]),
            image=Source(path=image, form="hub"),
            image_shape=_npy_shape(into, image),
            mask=Source(path=mask, form="hub") if has_mask else None,
            mask_shape=_npy_shape(into, mask) if has_mask else None,
        )


def _npy_shape(into: Collector, path: Path) -> tuple[int, ...] | None:
    try:
        return tuple(np.load(path, mmap_mode="r", allow_pickle=False).shape)
    except (OSError, ValueError, EOFError) as error:
        into.miss(path, f"no array ({type(error).__name__})", "numbers, (rows, columns) or with slices last", 0)
        return None


def _of_tables(into: Collector, split: str, paths: list[Path]) -> Iterator[_Row]:
    total = 0
    for path in paths:
        try:
            columns = table_columns(path)
            if not {"image", "target"} <= set(columns):
                raise into.stop(path, f"columns {', '.join(columns)}", "image, mask, target, …")
            owner = next((c for c in _PATIENT if c in columns), None)
            small = read_columns(path, [c for c in ("target", owner) if c])
            targets, owners = small["target"].to_pylist(), small[owner].to_pylist() if owner else []
            for number, (image, mask) in enumerate(_cells(path, "mask" in columns)):
                into.progress(total + number, None, "reading rows")
                name = f"{split}/{total + number}"
                source = Source(path=path, form="hub", series=str(number))
                yield _Row(
                    name=name,
                    patient=_plain(owners[number]) if owner else name,
                    target=_plain(targets[number]),
                    image=source,
                    image_shape=_cell_shape(image),
                    mask=source if mask is not None and mask.is_valid else None,
                    mask_shape=_cell_shape(mask) if mask is not None and mask.is_valid else None,
                )
            total += len(targets)
        except (pa.ArrowInvalid, OSError) as error:
            into.miss(path, f"no table that can be read ({type(error).__name__})", "Parquet or Arrow", 0)


def _cells(path: Path, has_mask: bool) -> Iterator[tuple[Any, Any]]:
    """Image and mask of each row, a few rows in memory at a time."""
    names = ["image", "mask"] if has_mask else ["image"]
    batches: Iterable[Any]
    if path.suffix == ".parquet":
        batches = pq.ParquetFile(path).iter_batches(16, columns=names)
    else:
        batches = read_columns(path, names).to_batches(16)
    for batch in batches:
        for n in range(batch.num_rows):
            yield batch["image"][n], batch["mask"][n] if has_mask else None


def _cell_shape(cell: Any) -> tuple[int, ...] | None:
    try:
        return unnest(cell).shape if cell.is_valid else None
    except ScanRefused:
        return None


def _case(into: Collector, root: Path, split: Split, row: _Row) -> Case | None:
    task, path = into.task, root / row.name
    target = number_of(row.target)
    if target is None or (task.classes and target not in range(len(task.classes))):
        wanted = f"0 to {len(task.classes) - 1}" if task.classes else "a number"
        into.miss(path, f"target is '{row.target}'", wanted)
    elif row.image_shape is None or len(row.image_shape) not in (2, 3):
        into.miss(path, f"an image of shape {row.image_shape}", "(rows, columns) or (rows, columns, slices)")
    elif task.unit == "region" and row.mask is None:
        into.miss(path, "no mask", "the mask of the region")
    elif row.mask is not None and row.mask_shape != row.image_shape:
        into.miss(path, f"a mask of shape {row.mask_shape}", f"the {row.image_shape} of its image")
    else:
        return Case(
            id=row.name,
            patient=row.patient,
            scan=row.image,
            modality=task.modality,
            target=(target,),
            region=Region(source=row.mask) if task.unit == "region" else None,
            split=split,
        )
    return None


def _plain(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
