"""Pictures of cases for the page, drawn from the data sets when they are at hand."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.archive.privacy import Key, read_key
from hilum.bench.run.scans import CaseReader
from hilum.bench.run.suites import open_task
from hilum.bench.splits import hash_case
from hilum.bench.task import Case, Task
from hilum.errors import HilumError


def data_pictures(
    tasks: dict[str, Task], data: Path, key: Key | None = None, own: Sequence[Path] = ()
) -> Callable[[str, str], tuple[NDArray[Any], str] | None]:
    """What `show_results` takes as `image_of`: the slice of a case that its task names, the slice where its region is
    largest, or else the middle one. None for cases that the folder does not hold under this key.

    data   folder of the data sets, as for `hilum bench run`
    own    TOML files of tasks of one's own: results hold no path, so without its file such a task has no pictures
    """
    key = key or read_key()
    reader = CaseReader()
    known: dict[str, dict[str, Case]] = {}
    files = {f"own:{path.stem}": path for path in own}

    def image_of(task: str, case: str) -> tuple[NDArray[Any], str] | None:
        if task not in known:
            known[task] = {}
            with contextlib.suppress(HilumError):  # a page does without pictures
                cases = open_task(files.get(task, tasks[task]), data)[1].cases
                known[task] = {hash_case(tasks[task], c, key): c for c in cases}
        found = known[task].get(case)
        if found is None:
            return None
        try:
            vol = reader.volume(found)
            z = vol.shape[0] // 2
            if found.slices:
                z = found.slices[len(found.slices) // 2]
            elif found.region is not None:
                z = int((reader.region(found, vol).voxels > 0).sum((1, 2)).argmax())
        except HilumError:
            return None
        return np.asarray(vol.voxels[z], np.float32), vol.unit

    return image_of
