"""What an audit looks at: slices of test and training cases and of a store, with hashes of patient and content, and looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hilum.archive.judge.duplicates import look_hash
from hilum.archive.privacy import Key
from hilum.archive.store.store import Store, hash_pixels, quantise
from hilum.bench.audit.fingerprints import CELLS, WAVE_NUMBERS, Rows, look, wave_vectors
from hilum.bench.run.scans import CaseReader
from hilum.bench.splits import hash_case
from hilum.bench.task import Case, Task
from hilum.errors import HilumError
from hilum.terminal import Progress
from hilum.volume import Volume

QUANTILES = (0.3, 0.5, 0.7)  # slices looked at where a case is a whole volume
FEWEST_SLICES = 5  # from here on a scan also has a look hash of its own (`archive.copies`)

STORE = "store"


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice.

    side     train, val or test of a task, or store
    owner    keyed hash of the case, or key of the volume
    patient  keyed hash; "" when unknown
    scan     what tells scans apart: slices of one scan resemble each other and are no copies
    content  hash of its pixel values; "" without any to tell it by (`slice_hash`)
    """

    side: str
    owner: str
    patient: str
    scan: str
    modality: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One whole scan: hash of its voxels, and 64 bits of its look (0: too few slices to have one)."""

    side: str
    owner: str
    patient: str
    modality: str
    content: str
    look_hash: int


class Images:
    """Slices and scans; looks of slices and their waves lie in files until this context ends: memory stays small."""

    def __init__(self) -> None:
        self.slices: list[Slice] = []
        self.scans: list[Scan] = []
        self.refused = 0
        self._blank: list[bool] = []
        self._looks, self._waves = TemporaryFile(), TemporaryFile()  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> "Images":
        return self

    def __exit__(self, *_: object) -> None:
        self._looks.close()
        self._waves.close()

    def add(self, one: Slice, pixels: NDArray[Any]) -> None:
        """Add a slice with its pixels (Y, X)."""
        picture = look(pixels)
        self.slices.append(one)
        self._blank.append(picture is None)
        if picture is None:
            picture = np.zeros((CELLS, CELLS), np.int8)
        self._looks.write(picture.tobytes())
        self._waves.write(wave_vectors(picture[None]).tobytes())

    def select(self, side: str, modality: str) -> Rows:
        """Rows of the slices of a side that have a look."""
        return np.array(
            [n for n, s in enumerate(self.slices) if s.side == side and s.modality == modality and not self._blank[n]],
            np.intp,
        )

    @property
    def looks(self) -> NDArray[np.int8]:
        """(N, CELLS, CELLS), in a file."""
        return self._map(self._looks, np.int8, (CELLS, CELLS))

    @property
    def waves(self) -> NDArray[np.float32]:
        """(N, WAVE_NUMBERS), in a file."""
        return self._map(self._waves, np.float32, (WAVE_NUMBERS,))

    def _map(self, file: IO[bytes], kind: type, shape: tuple[int, ...]) -> NDArray[Any]:
        file.flush()
        shape = (len(self.slices), *shape)
        return np.memmap(file, kind, "r", shape=shape) if self.slices else np.zeros(shape, kind)


def add_cases(
    images: Images, task: Task, cases: Sequence[Case], reader: CaseReader, key: Key, progress: Progress | None = None
) -> None:
    """Add the slices of cases, each slice of a scan once for each side; cases whose scan cannot be read are counted."""
    seen: set[tuple[Any, ...]] = set()
    scans: set[tuple[Any, ...]] = set()
    for done, case in enumerate(cases, 1):
        if progress:
            progress(done, len(cases), f"looking at {task.id}")
        try:
            vol = reader.volume(case)
        except HilumError:
            images.refused += 1
            continue
        named = {"side": str(case.split), "owner": hash_case(task, case, key), "patient": key.hash("patient", case.patient),
                 "modality": case.modality}  # fmt: skip
        whole = (case.split, case.scan)
        if whole not in scans:
            scans.add(whole)
            images.scans.append(_scan(vol, named))
        scan = key.hash("item", f"{case.scan.path}:{case.scan.series}")
        for z in case.slices or quantile_slices(vol.shape[0]):
            if (whole, z) not in seen and z < vol.shape[0]:
                seen.add((whole, z))
                pixels = np.asarray(vol.voxels[z])
                images.add(Slice(scan=scan, content=slice_hash(pixels), **named), pixels)


def add_store(images: Images, store: Store, *, every_slice: bool, progress: Progress | None = None) -> None:
    """Add the volumes of a store; voxels are read slice by slice.

    every_slice  look at all slices, not only at those of QUANTILES: needed when test cases are single slices
    """
    for done, row in enumerate(store.rows, 1):
        if progress:
            progress(done, len(store), "looking at the store")
        named = {"side": STORE, "owner": row.key, "patient": row.patient, "modality": row.modality}
        images.scans.append(
            Scan(content=row.pixel_hash, look_hash=row.look_hash if row.shape[0] >= FEWEST_SLICES else 0, **named)
        )
        for z in range(row.shape[0]) if every_slice else quantile_slices(row.shape[0]):
            pixels, _ = store.read_slice(row.key, z)
            images.add(Slice(scan=row.key, content=slice_hash(pixels), **named), pixels)


def quantile_slices(num_slices: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(q * num_slices) for q in QUANTILES))


def slice_hash(pixels: NDArray[Any]) -> str:
    """16 hex digits of the values of a slice, whatever type holds them; "" for one of at most two values: padding, or air
    within a circle, which is the same in all patients."""
    if ((pixels == pixels.min()) | (pixels == pixels.max())).all():
        return ""
    stored, slope, intercept, _ = quantise(np.asarray(pixels)[None])
    return hash_pixels(stored, slope, intercept)


def _scan(vol: Volume, named: dict[str, Any]) -> Scan:
    stored, slope, intercept, _ = quantise(vol.voxels)
    bits = look_hash(vol) if vol.shape[0] >= FEWEST_SLICES else 0
    return Scan(content=hash_pixels(stored, slope, intercept), look_hash=bits, **named)
