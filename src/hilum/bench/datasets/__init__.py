"""Publishers' folders → cases, and their files → volumes: one file per publisher, one table of readers.

A reader takes the folder and a task and returns every case it can vouch for and a `Problem` for everything else. It
chooses slices by content or by world coordinates, never by file order, and reads no voxels it can do without.
"""

from dataclasses import replace
from pathlib import Path

from hilum.bench.task import Case, Found, Region, Source, Task
from hilum.terminal import Progress
from hilum.volume import Volume


def read_cases(root: Path, task: Task, progress: Progress | None = None) -> Found:
    """The cases of a task in a user's folder.

    root      holds the dataset's folder under its name (`Dataset.name`), or is that folder
    progress  called while label maps or headers are read, where a task needs them
    returns   cases in a stable order, and everything that did not become one

    Raises UsageError when the task's dataset has no reader.
    """
    raise NotImplementedError


def read_scan(case: Case) -> Volume:
    """The voxels of a case, with the modality its publisher states, and HU where the file's form is known to hold them."""
    return replace(read_source(case.scan), modality=case.modality)


def read_source(source: Source) -> Volume:
    """The voxels of a source, turned as `hilum.volume.to_slices` turns a scan. Raises ScanRefused, InputError."""
    raise NotImplementedError


def read_region(region: Region, scan: Volume) -> Volume:
    """A region on exactly the grid of its scan.

    scan      as `read_source` returns it
    returns   kind "label". With `values` or a box: 1 inside, 0 outside. A map without `values`: its class numbers as stored
              (for segmentation, class k of `Task.classes` is number k + 1)

    Raises ScanRefused `labels_off_grid` when the map lies on another grid, InputError when the region is empty.
    """
    raise NotImplementedError
