"""Cases → voxels, for the encoder: the scan and, where there is one, the region on its grid."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from hilum.archive.labels import read_labels
from hilum.archive.one import read
from hilum.archive.privacy import Key, read_key
from hilum.bench.task import Case, Region, Source
from hilum.errors import InputError
from hilum.records import hash_json, sha256_file
from hilum.volume import Volume

KEEP = 3  # what neighbouring cases share: a scan and its label maps


class CaseReader:
    """Reads the scans of cases; the last few stay in memory, since cases of one scan follow one another."""

    def __init__(self, key: Key | None = None) -> None:
        self.key = key or read_key()
        self._last: OrderedDict[Hashable, Any] = OrderedDict()
        self._contents: dict[Source, str] = {}

    def volume(self, case: Case) -> Volume:
        """The scan of a case, with the modality that its task says."""
        vol: Volume = self._kept(case.scan, lambda: read(case.scan.path, case.scan.series, key=self.key))
        return replace(vol, modality=case.modality, unit="HU" if case.modality == "CT" else "")

    def region(self, case: Case, vol: Volume) -> Volume:
        """1 inside the region of a case, 0 outside, on the grid of its scan."""
        assert case.region is not None
        inside = np.isin(self.labels(case, vol).voxels, case.region.values) if case.region.values else None
        if inside is None:
            inside = self.labels(case, vol).voxels > 0 if case.region.source else _box(case.region, vol)
        return replace(vol, voxels=inside.astype(np.uint8), modality="OT", unit="", kind="label")

    def labels(self, case: Case, vol: Volume) -> Volume:
        """The label map of a case, all its numbers."""
        source = case.region and case.region.source
        if not source:
            raise InputError(f"case {case.id} has no label map")
        labels: Volume = self._kept(source, lambda: read_labels(source.path, vol).volume)
        return labels

    def content(self, source: Source) -> str:
        """16 hex digits of the content of a file, or of all files of a folder."""
        if source not in self._contents:
            self._contents[source] = file_hash(source)
        return self._contents[source]

    def _kept(self, source: Source, make: Callable[[], Any]) -> Any:
        if source not in self._last:
            self._last[source] = make()
            while len(self._last) > KEEP:
                self._last.popitem(last=False)
        self._last.move_to_end(source)
        return self._last[source]


def file_hash(source: Source) -> str:
    """16 hex digits of what `source` holds."""
    if source.path.is_dir():
        files = sorted(p for p in source.path.rglob("*") if p.is_file())
        return hash_json([[str(p.relative_to(source.path)), sha256_file(p)] for p in files])
    if not source.path.is_file():
        raise InputError(f"{source.path.name} is missing; hilum bench check says what else is")
    return sha256_file(source.path)[:16]


def _box(region: Region, vol: Volume) -> Any:
    if region.box is None:
        raise InputError("a region has neither a label map nor a box; expected one of them")
    inside = np.zeros(vol.shape, bool)
    (z, y, x), (z1, y1, x1) = region.box
    inside[z : z1 + 1, y : y1 + 1, x : x1 + 1] = True
    return inside
