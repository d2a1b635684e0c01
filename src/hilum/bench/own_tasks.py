"""A task of one's own: one TOML file, one table, one folder of scans.

    [task]
    title = "Type of a brain tumour"
    kind = "classification"
    unit = "slice"
    modality = "MR"
    metric = "balanced_accuracy"
    classes = ["meningioma", "glioma", "pituitary"]

    [data]
    table = "labels.csv"
    scan = "file"
    label = ["label_name"]
    patient = "run"
    split = "patient_fold"
    train = ["1"]
    val = ["2"]
    test = ["3"]

docs/tasks.md explains every line; mistakes are all named at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hilum.archive.labels import read_labels as read_label_map
from hilum.bench.datasets.collect import Collector, Unusable, no_progress, number_of, read_rows
from hilum.bench.datasets.curiabench import read_curiabench
from hilum.bench.datasets.grids import grid_of
from hilum.bench.task import Case, Found, Kind, Region, Source, Split, Task, Unit
from hilum.errors import HilumError, ScanRefused, UsageError
from hilum.metrics import METRICS
from hilum.settings import from_dict, read_toml
from hilum.terminal import Progress
from hilum.volume import Volume


@dataclass(frozen=True, kw_only=True)
class OwnTask:
    """The table [task]: what is asked. Names as in `hilum.bench.task.Task`."""

    title: str
    kind: Kind
    unit: Unit
    modality: str
    metric: str
    classes: tuple[str, ...] = ()
    licence: str = ""
    label_rule: str = ""
    split_rule: str = ""


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """The table [data]: where it lies. Everything but `table`, folders and lists is the name of a column.

    table        CSV, one row a case; looked for beside the TOML file, then in the folder
    hub          instead of a table: a configuration of raidium/CuriaBench, in folder/hub; labels and splits as shipped
    folder       of the scans, below --data, or below the TOML file's folder when no --data is given
    scan_folder  below the folder, in front of every entry of column `scan`; `mask_folder` likewise
    scan         a file, or the folder of a DICOM series
    label        one column; for multilabel and retrieval one for each class; for survival time and event; for localisation
                 x, y, z in LPS mm
    label_from   "column"; "mask volume": the volume of the mask in ml; "mask centre": where it lies
    patient      who stays on one side of the split
    id           names a case; "": scan, slice and mask value together do
    split        column; its entries are listed in train, val and test. "": seeded at run
    slice        number along axis 0 of the scan as hilum reads it, from 0; "": all slices, or for unit region the one
                 where a mask covers most. A scan of one slice needs none
    mask         a label map on the grid of its scan
    mask_value   column with the number that is inside; "": `mask_values`
    mask_values  numbers that are inside; []: all but zero. Of a segmentation the numbers of the classes, in their order
    modality     column that overrides [task] modality
    nuisances    columns that `--protocol erased` takes out: words, or numbers where every cell is one; an empty cell is missing
    """

    table: str = ""
    hub: str = ""
    folder: str = "."
    scan_folder: str = "."
    mask_folder: str = "."
    scan: str = "scan"
    label: tuple[str, ...] = ("label",)
    label_from: str = "column"
    patient: str = "patient"
    id: str = ""
    split: str = ""
    train: tuple[str, ...] = ("train",)
    val: tuple[str, ...] = ("val",)
    test: tuple[str, ...] = ("test",)
    slice: str = ""
    mask: str = ""
    mask_value: str = ""
    mask_values: tuple[int, ...] = ()
    modality: str = ""
    nuisances: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OwnFile:
    """A whole TOML file."""

    task: OwnTask
    data: OwnData


def read_own_task(path: Path, root: Path | None = None, *, progress: Progress | None = None) -> tuple[Task, Found]:
    """A user's task and its cases.

    path  the TOML file; its name, without suffix, names the task ("own:NAME")
    root  folder of the data; None: that of the TOML file

    UsageError that names every mistake of the TOML file. What is wrong in table and folder are problems of `Found`.
    """
    own = from_dict(OwnFile, read_toml(path), path.name)
    _check(own, path.name)
    task, data = _task(own.task, path.stem), own.data
    folder = (root or path.parent) / data.folder
    into = Collector(task=task, folder=folder, progress=progress or no_progress)
    beside = path.parent / data.table
    try:
        into.need(folder, f"[data] folder '{data.folder}' below the folder given by --data")
        if data.hub:
            into.task = replace(task, target=data.hub)
            read_curiabench(into)
            return task, into.found()
        _Reader(into, data, beside if beside.exists() else folder / data.table).read()
    except Unusable as unusable:
        into.problems.append(unusable.problem)
        return task, Found(cases=(), problems=tuple(into.problems))
    return task, into.found()


def _task(own: OwnTask, name: str) -> Task:
    return Task(
        id=f"own:{name}",
        title=own.title,
        dataset=name,
        target=name,
        kind=own.kind,
        unit=own.unit,
        modality=own.modality,
        metric=own.metric,
        classes=own.classes,
        chance=METRICS[own.metric].chance,
        label_rule=own.label_rule,
        split_rule=own.split_rule,
    )


_NUM_LABELS = {"classification": 1, "regression": 1, "survival": 2, "localisation": 3, "segmentation": 0}


def _check(own: OwnFile, name: str) -> None:
    """UsageError that lists what does not fit together."""
    task, data, wrong = own.task, own.data, []
    dense = task.kind in ("segmentation", "multilabel", "classification", "retrieval")
    if dense and not task.classes:
        wrong.append(f"task.classes is empty; a {task.kind} needs names")
    if task.metric not in METRICS:
        wrong.append(f"task.metric '{task.metric}' is unknown (known: {', '.join(METRICS)})")
    if task.modality not in ("CT", "MR", "OT"):
        wrong.append(f"task.modality is '{task.modality}'; expected CT (in HU), MR, or OT for images without a unit")
    if data.label_from not in ("column", "mask volume", "mask centre"):
        wrong.append(f"data.label_from is '{data.label_from}'; expected column, mask volume or mask centre")
    if bool(data.table) == bool(data.hub):
        wrong.append("expected one of data.table and data.hub")
    if data.hub:
        return _complain(name, wrong)
    needs_mask = task.kind == "segmentation" or task.unit == "region" or data.label_from != "column"
    if needs_mask and not data.mask:
        wrong.append("data.mask is missing: the column with the label maps")
    wanted = _NUM_LABELS.get(task.kind, len(task.classes))
    if data.label_from == "column" and task.kind != "segmentation" and len(data.label) != wanted:
        wrong.append(f"data.label names {len(data.label)} columns; a {task.kind} needs {wanted}")
    if task.kind == "segmentation" and data.mask_values and 1 < len(task.classes) != len(data.mask_values):
        wrong.append(f"data.mask_values has {len(data.mask_values)} numbers for {len(task.classes)} classes")
    fitting = {"mask volume": "regression", "mask centre": "localisation"}.get(data.label_from, task.kind)
    if fitting != task.kind:
        wrong.append(f"data.label_from '{data.label_from}' gives a {fitting}, task.kind is {task.kind}")
    sides = [*data.train, *data.val, *data.test]
    if len(set(sides)) < len(sides):
        wrong.append("data.train, val and test share an entry")
    _complain(name, wrong)


def _complain(name: str, wrong: list[str]) -> None:
    if wrong:
        raise UsageError(f"{name}: " + "; ".join(wrong))


class _Reader:
    """One table, row after row."""

    def __init__(self, into: Collector, data: OwnData, table: Path) -> None:
        self.into, self.data, self.table, self.task = into, data, table, into.task
        self.sides: dict[str, Split] = {}
        self.words: set[str] = set()  # nuisances that are no numbers
        for side, entries in (("train", data.train), ("val", data.val), ("test", data.test)):
            self.sides |= dict.fromkeys(entries, side)  # type: ignore[arg-type]

    def read(self) -> None:
        data = self.data
        labels = data.label if data.label_from == "column" and self.task.kind != "segmentation" else ()
        others = (data.id, data.split, data.slice, data.mask, data.mask_value, data.modality, *data.nuisances)
        columns = list(dict.fromkeys([data.scan, data.patient, *labels, *(name for name in others if name)]))
        rows = list(read_rows(self.into, self.table, columns))
        cells = {name: [row[name] for row in rows if row[name]] for name in data.nuisances}
        self.words = {name for name, texts in cells.items() if any(number_of(text) is None for text in texts)}
        for number, row in enumerate(rows, 1):
            self.into.progress(number, len(rows), "reading the table")
            try:
                self.into.cases.append(self._case(row, number))
            except _BadRow as bad:
                self.into.miss(bad.path or self.table, f"row {number}: {bad.found}", bad.expected)
            except (ScanRefused, HilumError) as error:
                self.into.miss(self.into.folder / self.data.scan_folder / row[data.scan], str(error), "a readable file")

    def _case(self, row: dict[str, str], number: int) -> Case:
        data, task = self.data, self.task
        scan = self._file(row, data.scan, data.scan_folder)
        mask = self._file(row, data.mask, data.mask_folder) if data.mask else None
        if not row[data.patient]:
            raise _BadRow(f"no {data.patient}", "who the patient is")
        split: Split = ""
        if data.split:
            if row[data.split] not in self.sides:
                raise _BadRow(f"{data.split} is '{row[data.split]}'", f"one of {', '.join(self.sides)}")
            split = self.sides[row[data.split]]
        values: tuple[int, ...] | None = data.mask_values or None
        if data.mask_value:
            values = (self._whole(row, data.mask_value),)
        labels = None
        if mask and task.kind == "segmentation":
            _check_grid(scan, grid_of(mask).shape)
        elif mask:
            labels = read_label_map(mask, None).volume
            _check_grid(scan, labels.shape)
        modality = row[data.modality] if data.modality else task.modality
        named = [row[data.scan], *(row[c] for c in (data.slice, data.mask_value) if c)]
        return Case(
            id=row[data.id] if data.id else "/".join(named),
            patient=row[data.patient],
            scan=Source(path=scan),
            modality=modality,
            target=self._target(row, scan, labels, values),
            slices=self._slices(row, labels, values),
            region=self._region(mask, values),
            split=split,
            nuisances=tuple((name, self._nuisance(name, row[name])) for name in data.nuisances if row[name]),
        )

    def _nuisance(self, name: str, text: str) -> str | float:
        value = number_of(text)
        return text if value is None or name in self.words else value

    def _file(self, row: dict[str, str], column: str, folder: str) -> Path:
        name = row[column]
        path = self.into.folder / folder / name
        if not name or not path.resolve().is_relative_to(self.into.folder.resolve()):
            raise _BadRow(f"{column} is '{name}'", "a path below the folder")
        if not path.exists():
            raise _BadRow("missing", f"what column {column} names", path)
        return path

    def _whole(self, row: dict[str, str], column: str) -> int:
        value = number_of(row[column])
        if value is None or value < 0 or value != int(value):
            raise _BadRow(f"{column} is '{row[column]}'", "a whole number from 0")
        return int(value)

    def _region(self, mask: Path | None, values: tuple[int, ...] | None) -> Region | None:
        if mask is None or (self.task.unit != "region" and self.task.kind != "segmentation"):
            return None
        return Region(source=Source(path=mask), values=values)

    def _slices(
        self, row: dict[str, str], labels: Volume | None, values: tuple[int, ...] | None
    ) -> tuple[int, ...] | None:
        if self.data.slice:
            return (self._whole(row, self.data.slice),)
        if self.task.unit != "slice" or labels is None:
            return None
        return (int(_inside(labels, values).sum(axis=(1, 2)).argmax()),)

    def _target(
        self, row: dict[str, str], scan: Path, labels: Volume | None, values: tuple[int, ...] | None
    ) -> tuple[float, ...]:
        task = self.task
        if task.kind == "segmentation":
            return ()
        if labels is not None:
            inside = _inside(labels, values)  # a region without a voxel is a problem, whatever is asked of it
            if self.data.label_from == "mask volume":
                return (float(inside.sum() * np.prod(labels.spacing_mm) / 1000),)
            if self.data.label_from == "mask centre":
                z, y, x = (float(axis.mean()) for axis in np.nonzero(inside))
                return z, y, x
        return _FROM_TEXT[task.kind](task, [row[name] for name in self.data.label], scan)


def _check_grid(scan: Path, shape: tuple[int, int, int]) -> None:
    """Raises ScanRefused when a mask has another shape than the header of its scan says; of a folder the run will tell."""
    if scan.is_file() and (wanted := grid_of(scan).shape) != shape:
        raise ScanRefused("labels_off_grid", f"labels of shape {shape}, a scan of {wanted}")


def _inside(labels: Volume, values: tuple[int, ...] | None) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    inside = labels.voxels != 0 if values is None else np.isin(labels.voxels, values)
    if not inside.any():
        raise _BadRow("the mask holds no voxel of the region", "at least one")
    return inside


class _BadRow(Exception):
    def __init__(self, found: str, expected: str, path: Path | None = None) -> None:
        super().__init__(found)
        self.found, self.expected, self.path = found, expected, path


def _class(task: Task, texts: list[str], scan: Path) -> tuple[float, ...]:
    if texts[0] not in task.classes:
        raise _BadRow(f"label '{texts[0]}'", f"one of {', '.join(task.classes)}")
    return (task.classes.index(texts[0]),)


def _labels(task: Task, texts: list[str], scan: Path) -> tuple[float, ...]:
    known = {"0": 0.0, "1": 1.0, "": float("nan"), "-1": float("nan")}
    if unknown := [text for text in texts if text not in known]:
        raise _BadRow(f"label '{unknown[0]}'", "1, 0, or nothing for unknown")
    return tuple(known[text] for text in texts)


def _numbers(task: Task, texts: list[str], scan: Path) -> tuple[float, ...]:
    values = [number_of(text) for text in texts]
    if any(value is None for value in values):
        raise _BadRow(f"label '{', '.join(texts)}'", "numbers")
    return tuple(value for value in values if value is not None)


def _survival(task: Task, texts: list[str], scan: Path) -> tuple[float, ...]:
    time, event = _numbers(task, texts, scan)
    if time <= 0 or event not in (0, 1):
        raise _BadRow(f"time {time:g}, event {event:g}", "a time above 0, and 1 for an event or 0")
    return time, event


def _place(task: Task, texts: list[str], scan: Path) -> tuple[float, ...]:
    grid = grid_of(scan)
    voxel = grid.voxel(_numbers(task, texts, scan))
    if not grid.holds(voxel):
        raise _BadRow("a place outside of the scan", "x, y, z in LPS mm")
    return voxel


_FROM_TEXT: dict[Kind, Callable[[Task, list[str], Path], tuple[float, ...]]] = {
    "classification": _class,
    "multilabel": _labels,
    "retrieval": _labels,
    "regression": _numbers,
    "survival": _survival,
    "localisation": _place,
}
