"""The voxels of cases; the last few scans stay in memory, since cases of one scan follow one another."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hilum.bench.datasets import read_region, read_scan, source_hash
from hilum.bench.task import Case, Region, Source
from hilum.errors import InputError
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
        """1 inside the region of a case, 0 outside, on the grid of its scan; of segmentation the class numbers."""
        assert case.region is not None
        region = case.region
        if region.source is None or region.values is None:
            return read_region(region, vol)
        whole = Region(source=region.source)
        labels: Volume = self._kept((whole, case.scan), lambda: read_region(whole, vol))
        return chosen_labels(labels, region.values)

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


def chosen_labels(labels: Volume, values: tuple[int, ...]) -> Volume:
    """1 where a label map has one of these numbers. InputError when it has none of them."""
    inside = np.isin(labels.voxels, values)
    if not inside.any():
        raise InputError("the region holds no voxel of its scan; expected at least one")
    return replace(labels, voxels=inside.astype(np.uint8))
