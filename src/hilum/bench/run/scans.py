"""The voxels of cases; the last few scans stay in memory, since cases of one scan follow one another."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hilum.bench.datasets import read_region, read_scan, read_truth, source_hash
from hilum.bench.task import Case, Region, Source, Task
from hilum.volume import Volume

KEEP = 3  # what neighbouring cases share
TRUTH_BYTES = 1 << 30  # label maps that stay in memory: a segmentation head asks for them in every epoch


class CaseReader:
    """Reads scans, regions and content hashes of cases."""

    def __init__(self) -> None:
        self._last: OrderedDict[Any, Any] = OrderedDict()
        self._truths: OrderedDict[Any, Volume] = OrderedDict()
        self._contents: dict[Source, str] = {}

    def volume(self, case: Case) -> Volume:
        """The scan of a case, with the modality that its task says."""
        vol: Volume = self._kept((case.scan, case.modality), lambda: read_scan(case))
        return vol

    def region(self, case: Case, vol: Volume) -> Volume:
        """1 inside the region of a case, 0 outside, on the grid of its scan."""
        assert case.region is not None
        return read_region(case.region, vol)

    def truth(self, task: Task, case: Case) -> Volume:
        """Of segmentation: the class numbers of a case on the grid of its scan, 0 for none."""
        name = (case.region, case.scan)
        if name not in self._truths:
            labels = read_truth(task, case.region or Region(), self.volume(case))
            small = np.uint8 if len(task.classes) < 256 else np.uint16
            self._truths[name] = replace(labels, voxels=labels.voxels.astype(small))
            while len(self._truths) > 1 and sum(v.voxels.nbytes for v in self._truths.values()) > TRUTH_BYTES:
                self._truths.popitem(last=False)
        return self._truths[name]

    def content(self, source: Source) -> str:
        """16 hex digits of what a source holds."""
        if source not in self._contents:
            self._contents[source] = source_hash(source)
        return self._contents[source]

    def _kept(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._last:
            self._last[name] = make()
            while len(self._last) > KEEP:
                self._last.popitem(last=False)
        self._last.move_to_end(name)
        return self._last[name]
