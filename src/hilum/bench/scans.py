"""The voxels of cases; the last few scans stay in memory, since cases of one scan follow one another."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from hilum.bench.datasets import read_region, read_scan, read_truth, source_hash
from hilum.bench.task import Case, Region, Source, Task
from hilum.volume import Volume

KEEP = 3  # what neighbouring cases share: a scan and its label maps


class CaseReader:
    """Reads scans, regions and content hashes of cases."""

    def __init__(self) -> None:
        self._last: OrderedDict[Any, Any] = OrderedDict()
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
        region = case.region or Region()
        labels: Volume = self._kept((region, case.scan), lambda: read_truth(task, region, self.volume(case)))
        return labels

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

