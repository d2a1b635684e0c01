"""What a benchmark task is, and what one case of it is: plain values, without torch.

`tasks.py` lists the tasks, `datasets/` turns a publisher's folder into cases, `predictions.py` holds what heads said of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["classification", "multilabel", "regression", "survival", "retrieval", "localisation", "segmentation"]
Unit = Literal["slice", "region", "volume"]
Split = Literal["train", "val", "test", ""]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A published collection of scans.

    name      as tasks and folders call it: --data ROOT holds ROOT/name, or ROOT is that folder itself
    licence   of the data, as its publisher states it
    layout    the files that belong there, one line each, as the publisher ships them
    """

    name: str
    title: str
    url: str
    licence: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question asked of an encoder.

    id           suite:name, e.g. "curiabench-2d:A1", "voxelfm:LUNA16", "phantom:organ"
    dataset      a name in `DATASETS`
    target       what the dataset's reader is asked for, e.g. "organ", "age"
    kind         decides heads, metrics and what `Case.target` holds
    unit         what one case is: a slice, a region of a slice or volume, a volume
    classes      names in the order of class numbers, or of the columns of a multi-label target
    metric       the published one, a name in `hilum.metrics.METRICS`
    chance       its value for a predictor that knows nothing; None where that depends on the data
    label_rule   how a label is derived, and from which field
    split_rule   whose split it is, and what is kept together
    our_choice   what the source leaves open and we decided; "" when nothing
    published    (track, task) of its rows in published.csv; None when there are none
    """

    id: str
    title: str
    dataset: str
    target: str
    kind: Kind
    unit: Unit
    modality: str
    metric: str
    label_rule: str
    split_rule: str
    classes: tuple[str, ...] = ()
    chance: float | None = None
    our_choice: str = ""
    published: tuple[str, str] | None = None

    @property
    def suite(self) -> str:
        return self.id.partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Voxels on disk.

    path    a file, or the folder of one DICOM series
    form    "scan": whatever `hilum.read` reads; other forms belong to one publisher and are read by its dataset's file
    series  which one, where a folder holds several
    files   the DICOM files of one scan, where a folder holds those of thousands
    box     only this part of it, (z, y, x) of its first and last voxel as the scan is turned: a crop that is judged by itself
    """

    path: Path
    form: str = "scan"
    series: str | None = None
    files: tuple[Path, ...] = ()
    box: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where to look: the voxels of a label map with one of `values` (None: all but zero), or a box or point in voxels of the
    scan as it is read, (z, y, x) first and last. Of a segmentation's truth `values` are the numbers of the classes, in their
    order (None: 1, 2, …)."""

    source: Source | None = None
    values: tuple[int, ...] | None = None
    box: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to judge.

    id       unique within the task, from the publisher's names: "s0011/liver/113"
    patient  the publisher's; cases of one patient never stand on both sides of a split
    scan     what is encoded
    slices   numbers along axis 0 of the scan as `hilum.read` turns it; None: all
    region   for unit "region", and the truth of segmentation
    target   classification: (class number,) · multilabel: one 0, 1 or NaN (unknown) each · regression: (value,) ·
             survival: (time, 1 for an event else 0) · localisation: (z, y, x) of the scan's voxels · segmentation: ()
             · retrieval: as multilabel
    split    the publisher's; "" when it has none and the task's seeded split decides
    nuisances  what is known of how it was imaged and of whom, (name, value): words, or numbers in mm and years; what the
             protocol `erased` takes out (`hilum.bench.nuisances`). Never a name or an identifier
    """

    id: str
    patient: str
    scan: Source
    modality: str
    target: tuple[float, ...]
    slices: tuple[int, ...] | None = None
    region: Region | None = None
    split: Split = ""
    nuisances: tuple[tuple[str, str | float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is missing or malformed in a publisher's folder. `cases` counts what it costs; 0 for what the label rule leaves out
    of a whole folder. `fatal` when no case is left."""

    path: str
    found: str
    expected: str
    cases: int = 0
    fatal: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a dataset's reader made of a folder: cases in a stable order, and everything that did not become one."""

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
