"""The store: one compressed int16 file per volume, one index row per volume, any slice readable without the rest.

    store.json                 version, key fingerprint, settings of `prepare`
    index/index.parquet        one row per volume (INDEX_SCHEMA), sorted by key
    volumes/xx/<key>.b2nd      Blosc2, int16, (Z, Y, X), chunks of one slice; content grid in its metadata
    ledger.parquet             what became of every input file

Stored numbers are `value = stored · slope + intercept`: exact for integers within a span of 65,535 (CT in HU, nearly
all MR), else rounded to 1/65,534 of the range; the index says which.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hilum.archive.content import GRID, Content, SliceContent, measure_content
from hilum.errors import InputError, StoreError
from hilum.records import explain_full_disk, hash_json, read_json, read_table, write_atomic, write_json, write_table
from hilum.volume import Volume

VERSION = 1

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # keyed hash of the series
        ("patient", pa.string()),  # keyed hash; "" when unknown
        ("study", pa.string()),
        ("modality", pa.string()),  # CT, MR or OT
        ("unit", pa.string()),
        ("shape", pa.list_(pa.int32(), 3)),  # Z, Y, X
        ("affine", pa.list_(pa.float64(), 16)),  # row by row, (k, j, i) → LPS mm; null when unknown
        ("slope", pa.float64()),
        ("intercept", pa.float64()),
        ("exact", pa.bool_()),
        ("threshold", pa.float32()),  # voxels at or below are background
        ("foreground", pa.list_(pa.float32())),  # per slice: share of pixels that show anatomy
        ("center", pa.list_(pa.float32())),  # per slice: y, x as fractions of the image
        ("spread", pa.list_(pa.float32())),  # per slice: standard deviation in y, x, same unit
        ("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One volume of the index; see INDEX_SCHEMA for units."""

    key: str
    patient: str
    study: str
    modality: str
    unit: str
    shape: tuple[int, int, int]
    affine: tuple[float, ...] | None
    slope: float
    intercept: float
    exact: bool
    threshold: float
    foreground: tuple[float, ...]
    center: tuple[float, ...]
    spread: tuple[float, ...]
    bytes: int


def quantise(voxels: NDArray[Any]) -> tuple[NDArray[np.int16], float, float, bool]:
    """Voxels as int16 with `value = stored · slope + intercept`.

    returns  stored, slope, intercept, exact (whether the values come back unchanged)
    """
    if voxels.dtype == np.int16:
        return voxels, 1.0, 0.0, True
    low, high = float(voxels.min()), float(voxels.max())
    whole = np.issubdtype(voxels.dtype, np.integer) or bool((voxels == np.rint(voxels)).all())
    if whole and high - low <= 65535:
        intercept = 0.0 if low >= -32768 and high <= 32767 else low + 32768
        return (voxels.astype(np.float64) - intercept).astype(np.int16), 1.0, intercept, True
    slope = (high - low) / 65534
    stored = np.rint((voxels.astype(np.float64) - low) / slope - 32767).astype(np.int16)
    return stored, slope, low + 32767 * slope, False


def write_volume(root: Path, key: str, vol: Volume, *, patient: str = "", study: str = "") -> Row:
    """Write one volume, with the content summary of its slices, atomically. Returns its index row."""
    content = measure_content(vol)
    stored, slope, intercept, exact = quantise(vol.voxels)
    z, y, x = stored.shape
    path = volume_path(root, key)
    with write_atomic(path) as temporary:
        blosc2.asarray(
            np.ascontiguousarray(stored),
            urlpath=str(temporary),
            mode="w",
            chunks=(1, y, x),
            blocks=(1, min(y, 64), x),
            cparams={"codec": blosc2.Codec.LZ4, "clevel": 5, "nthreads": 1},
            meta={"content": content.grid.tobytes()},
        )
    return Row(
        key=key,
        patient=patient,
        study=study,
        modality=vol.modality,
        unit=vol.unit,
        shape=(z, y, x),
        affine=None if vol.affine is None else tuple(vol.affine.ravel().tolist()),
        slope=slope,
        intercept=intercept,
        exact=exact,
        threshold=content.threshold,
        foreground=tuple(content.foreground.tolist()),
        center=tuple(content.center.ravel().tolist()),
        spread=tuple(content.spread.ravel().tolist()),
        bytes=path.stat().st_size,
    )


def volume_path(root: Path, key: str) -> Path:
    return root / "volumes" / key[:2] / f"{key}.b2nd"


def write_index(path: Path, rows: Sequence[Row]) -> None:
    """Write index rows, sorted by key so that equal archives give equal files."""
    ordered = [asdict(r) for r in sorted(rows, key=lambda r: r.key)]
    write_table(path, pa.Table.from_pylist(ordered, schema=INDEX_SCHEMA))


def read_index(path: Path) -> list[Row]:
    rows: list[dict[str, Any]] = read_table(path).to_pylist()
    for row in rows:
        row.update({k: tuple(v) for k, v in row.items() if isinstance(v, list)})
    return [Row(**row) for row in rows]


def write_header(root: Path, header: dict[str, Any]) -> None:
    write_json(root / "store.json", {"format": "hilum-store", "version": VERSION, **header})


def check_header(root: Path) -> dict[str, Any]:
    """The store's header. StoreError when it is no store, or one of another version."""
    if not root.is_dir():
        raise StoreError(
            f"{root} is {'a file' if root.exists() else 'missing'}; expected a store made by hilum prepare"
        )
    try:
        header: dict[str, Any] = read_json(root / "store.json")
    except InputError as error:
        raise StoreError(f"{root} is no store: {error}. Make one with: hilum prepare ARCHIVE -o {root}") from None
    if header.get("format") != "hilum-store" or header.get("version") != VERSION:
        raise StoreError(
            f"{root} has store version {header.get('version')}; this hilum reads version {VERSION}. "
            "Prepare the archive again into another folder"
        )
    return header


class Store:
    """A finished store, opened for reading."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.header = check_header(self.root)
        if self.header.get("status") != "complete":
            raise StoreError(f"{self.root} is not finished; run the same hilum prepare command again to complete it")
        self.rows = read_index(self.root / "index" / "index.parquet")

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def hash(self) -> str:
        """Names the content: keys, shapes and summaries of all volumes."""
        return hash_json([asdict(r) for r in self.rows])

    @cached_property
    def _by_key(self) -> dict[str, Row]:
        return {r.key: r for r in self.rows}

    def row(self, key: str) -> Row:
        if key not in self._by_key:
            raise StoreError(f"the store has no volume {key} ({len(self.rows)} volumes)")
        return self._by_key[key]

    def read_volume(self, key: str) -> Volume:
        """One whole volume; voxels (Z, Y, X) float32, or int16 when stored without scaling."""
        row = self.row(key)
        stored = self._open(key)[:]
        affine = None if row.affine is None else np.array(row.affine).reshape(4, 4)
        return Volume(voxels=_restore(stored, row), affine=affine, modality=row.modality, unit=row.unit)

    def read_slice(self, key: str, z: int) -> tuple[NDArray[np.float32], SliceContent]:
        """One slice and what is known of it, without reading the others.

        returns  pixels (Y, X) float32 in the volume's unit; its content
        """
        row = self.row(key)
        array = self._open(key)
        pixels = _restore(array[z], row).astype(np.float32, copy=False)
        cells = array.schunk.meta["content"][z * GRID**2 : (z + 1) * GRID**2]
        content = SliceContent(
            grid=Content.grid_from_bytes(cells, 1)[0],
            foreground=row.foreground[z],
            center=(row.center[2 * z], row.center[2 * z + 1]),
            spread=(row.spread[2 * z], row.spread[2 * z + 1]),
        )
        return pixels, content

    def _open(self, key: str) -> Any:
        try:
            path = volume_path(self.root, key)
            return _open_array(str(path), path.stat().st_mtime_ns)
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(f"volume {key} of {self.root} cannot be opened: {error}") from None


@lru_cache(maxsize=512)
def _open_array(path: str, _: int) -> Any:
    """An open volume, kept as long as the file's time stamp stays; opening costs more than reading a slice."""
    return blosc2.open(path, mode="r")


def _restore(stored: NDArray[np.int16], row: Row) -> NDArray[Any]:
    if row.slope == 1.0 and row.intercept == 0.0:
        return stored
    return stored.astype(np.float32) * np.float32(row.slope) + np.float32(row.intercept)


def open_for_writing(root: Path, header: dict[str, Any]) -> None:
    """Begin or continue a store. StoreError when the folder holds something else or a store made otherwise."""
    if root.exists() and (
        not root.is_dir() or (any(p.name != ".work" for p in root.iterdir()) and not (root / "store.json").exists())
    ):
        raise StoreError(f"{root} is not empty and no store; choose a new folder")
    if (root / "store.json").exists():
        found = check_header(root)
        different = {k: (found.get(k), v) for k, v in header.items() if found.get(k) != v}
        if different:
            raise StoreError(f"{root} was begun with other settings {different}; choose a new folder")
    with explain_full_disk(root):
        root.mkdir(parents=True, exist_ok=True)
    if not (root / "store.json").exists():
        write_header(root, {**header, "status": "writing"})
