"""The store: one compressed int16 file per volume, one index row per volume, any slice or 3D crop read without the rest.

    store.json                 version, key fingerprint, settings of `prepare`
    index/index.arrow          one row per volume (INDEX_SCHEMA), sorted by key; Arrow IPC, read through a memory map
    volumes/xx/<key>.b2nd      Blosc2, int16, (Z, Y, X); the content grids (`content.pack_cells`) in its metadata
    ledger.parquet             what became of every input file

Stored numbers are `value = stored · slope + intercept`: exact for integers within a span of 65,535 (CT in HU, nearly
all MR), else rounded to 1/65,534 of the range; the index says which.

A chunk is one slice, so a slice is one read of the disk; its blocks are 64×64 pixels, so a crop decodes only what it
shows. LZ4 after a bit shuffle, level 9: of a real 512×512 CT (one core, processor time, best of five) 0.85 bytes a
voxel, 3,500 slices/s and 180 crops of 112³/s. The byte shuffle with rows of 64×512 used before: 0.91 bytes, 6,200
slices, 146 crops. ZSTD 1 with a byte shuffle: 0.73 bytes, but 2,000 slices and 115 crops, no room for turning slices
into floats. Chunks of four slices change crops by 0 to +16 % and slices by 0 to −34 %.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hilum import large
from hilum.archive.store.content import Content, SliceContent, measure_slices, pack_cells, unpack_cells
from hilum.archive.store.index import Row, index_path, read_index
from hilum.errors import InputError, StoreError
from hilum.large import each, gather
from hilum.records import explain_full_disk, hash_file, read_json, write_atomic, write_json
from hilum.volume import Volume, crop_or_pad

VERSION = 2
BLOCK = 64  # pixels per side of what is decoded at once

_NAMES_CONTENT = ("key", "modality", "unit", "affine", "slope", "intercept", "checksum")


def quantise(voxels: NDArray[Any]) -> tuple[NDArray[np.int16], float, float, bool]:
    """Voxels as int16 with `value = stored · slope + intercept`.

    returns  stored, slope, intercept, exact (whether the values come back unchanged)
    """
    if voxels.dtype == np.int16:
        return voxels, 1.0, 0.0, True
    ends = [(float(s.min()), float(s.max())) for s in each(voxels)]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    whole = np.issubdtype(voxels.dtype, np.integer) or all((s == np.rint(s)).all() for s in each(voxels))
    if whole and high - low <= 65535:
        intercept = 0.0 if low >= -32768 and high <= 32767 else low + 32768
        shifted = (s.astype(np.float64) - intercept for s in each(voxels))
        return gather(shifted, voxels.shape, np.int16), 1.0, intercept, True
    slope = (high - low) / 65534
    rounded = (np.rint((s.astype(np.float64) - low) / slope - 32767) for s in each(voxels))
    return gather(rounded, voxels.shape, np.int16), slope, low + 32767 * slope, False


def restore(stored: NDArray[np.int16], slope: float, intercept: float) -> NDArray[Any]:
    """The values behind stored numbers: float32, or the same int16 when nothing is scaled."""
    if slope == 1.0 and intercept == 0.0:
        return stored
    values = stored.astype(np.float32)
    values *= np.float32(slope)
    values += np.float32(intercept)
    return values


def hash_pixels(stored: NDArray[np.int16], slope: float, intercept: float) -> str:
    """16 hex digits: equal for equal values on an equal grid, wherever the scan came from."""
    digest = hashlib.sha256(repr((stored.shape, slope, intercept)).encode())
    for plane in each(stored):
        digest.update(np.ascontiguousarray(plane, "<i2").data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Layout:
    """How voxels lie in a file: the chunks that are read at once, the blocks that are decoded at once, and Blosc2's filter."""

    chunks: tuple[int, int, int]
    blocks: tuple[int, int, int]
    filter: blosc2.Filter


def write_volume(
    root: Path,
    key: str,
    vol: Volume,
    *,
    patient: str = "",
    study: str = "",
    plane: str = "",
    region: str = "",
    look_hash: int = 0,
) -> Row:
    """Write one volume, with the content summary of its slices, atomically. Returns its index row.

    The content is measured on the stored numbers, so that it can be checked later.
    """
    stored, slope, intercept, exact = quantise(vol.voxels)
    _, y, x = stored.shape
    affine = None if vol.affine is None else tuple(vol.affine.ravel().tolist())
    row = Row(key=key, patient=patient, study=study, modality=vol.modality, unit=vol.unit, plane=plane, region=region,
              affine=affine, slope=slope, intercept=intercept, exact=exact, look_hash=look_hash)  # fmt: skip
    content = measure_slices((restore(s, slope, intercept) for s in each(stored)), vol.unit)
    layout = Layout((1, y, x), (1, min(y, BLOCK), min(x, BLOCK)), blosc2.Filter.BITSHUFFLE)
    return write_stored(root, row, stored, content, layout)


def write_stored(
    root: Path,
    row: Row,
    stored: NDArray[np.int16],
    content: Content,
    layout: Layout,
    meta: Mapping[str, bytes] | None = None,
) -> Row:
    """Write the stored numbers (Z, Y, X) of one volume atomically.

    row      what is known of it; shape, threshold, foreground, hashes and size are filled in
    content  of its slices
    meta     more that is kept with the volume
    returns  the whole row
    """
    path = volume_path(root, row.key)
    with write_atomic(path) as temporary:
        # Each slice that is added to a file costs a dozen calls of the system: compressed in memory, it is one at the end.
        at_once = stored.nbytes <= 2 * large.LIMIT_BYTES  # half of that, compressed
        array = blosc2.empty(
            stored.shape,
            np.int16,
            urlpath=None if at_once else str(temporary),
            mode="w",
            chunks=layout.chunks,
            blocks=layout.blocks,
            cparams={"codec": blosc2.Codec.LZ4, "clevel": 9, "filters": [layout.filter], "nthreads": 1},
            meta={"content": pack_cells(content.cells), **(meta or {})},
        )
        source, depth = each(stored), layout.chunks[0]
        for k in range(0, len(stored), depth):
            array[k : k + depth] = np.stack([np.array(s) for s in islice(source, depth)])
        if at_once:
            array.save(str(temporary), mode="w")
    z, y, x = stored.shape
    return replace(
        row,
        shape=(z, y, x),
        threshold=float(np.float32(content.threshold)),
        foreground=content.foreground.tobytes(),
        pixel_hash=hash_pixels(stored, row.slope, row.intercept),
        checksum=hash_file(path),
        bytes=path.stat().st_size,
    )


def volume_path(root: Path, key: str) -> Path:
    return root / "volumes" / key[:2] / f"{key}.b2nd"


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
            command = "resample" if "derived" in self.header else "prepare"
            raise StoreError(f"{self.root} is not finished; run the same hilum {command} command again to complete it")
        self.rows = read_index(index_path(self.root))
        self.row = lru_cache(maxsize=4096)(self._find)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.root,)  # another process maps the index itself instead of getting a copy

    def __len__(self) -> int:
        return len(self.rows)

    def sorted_keys(self) -> Iterator[str]:
        """The keys of all volumes."""
        for chunk in self.rows.table["key"].chunks:
            yield from chunk.to_pylist()

    @property
    def num_slices(self) -> int:
        return int(pc.sum(pc.binary_length(self.rows.table["foreground"])).as_py() or 0)

    @cached_property
    def hash(self) -> str:
        """Names the content: keys, files and geometry of all volumes."""
        digest = hashlib.sha256()
        for name in _NAMES_CONTENT:
            chunks = self.rows.table[name].chunks
            for chunk in chunks:
                digest.update(chunk.is_valid().to_numpy(zero_copy_only=False).tobytes())
            for chunk in chunks:
                if pa.types.is_string(chunk.type):
                    digest.update("".join(f"{v}\n" for v in chunk.to_pylist()).encode())
                else:
                    numbers = pc.list_flatten(chunk) if pa.types.is_fixed_size_list(chunk.type) else chunk
                    digest.update(np.ascontiguousarray(numbers.to_numpy(zero_copy_only=False)).data)
        return digest.hexdigest()[:16]

    def _find(self, key: str) -> Row:
        number = self.rows.find(key)
        if number is None:
            raise StoreError(f"the store has no volume {key} ({len(self.rows)} volumes)")
        return self.rows[number]

    def foreground(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]]:
        """Volume number, slice number and share of anatomy (255 = all) of every slice, BATCH_ROWS volumes at a time."""
        first = 0
        for chunk in self.rows.table["foreground"].chunks:
            _, starts, data = chunk.buffers()
            ends = np.frombuffer(starts, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            levels = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]]
            lengths = np.diff(ends)
            volume = np.repeat(np.arange(first, first + len(chunk), dtype=np.int32), lengths)
            number = np.arange(len(levels), dtype=np.int32) - np.repeat(ends[:-1] - ends[0], lengths)
            yield volume, number, levels
            first += len(chunk)

    def read_volume(self, key: str) -> Volume:
        """One whole volume; voxels (Z, Y, X) float32, or int16 when stored without scaling."""
        return self._volume(self.row(key), (0, 0, 0), self.read_stored(key))

    def read_crop(self, key: str, start: tuple[int, int, int], shape: tuple[int, int, int]) -> Volume:
        """One box of a volume, without reading the rest.

        start    (k, j, i) of its first voxel, may be negative
        shape    (Z', Y', X'), each > 0
        returns  as `read_volume`, with the affine of the box; parts outside the scan are −1024 in HU, else 0
        """
        row = self.row(key)
        inside = [(min(max(a, 0), n - 1), max(min(a + m, n), 1)) for a, m, n in zip(start, shape, row.shape)]
        inside = [(low, max(high, low + 1)) for low, high in inside]
        (k, k_end), (j, j_end), (i, i_end) = inside
        vol = self._volume(row, (k, j, i), self.read_stored(key, np.s_[k:k_end, j:j_end, i:i_end]))
        if (k, j, i) == tuple(start) and vol.shape == tuple(shape):
            return vol
        at = (start[0] - k, start[1] - j, start[2] - i)
        return crop_or_pad(vol, at, shape, -1024 if row.unit == "HU" else 0)

    def read_slice(self, key: str, z: int) -> tuple[NDArray[np.float32], SliceContent]:
        """One slice and what is known of it, without reading the others.

        returns  pixels (Y, X) float32 in the volume's unit; its content
        """
        row = self.row(key)
        stored, content = self.read_stored_slice(key, z)
        return restore(stored, row.slope, row.intercept).astype(np.float32, copy=False), content

    def read_stored_slice(self, key: str, z: int) -> tuple[NDArray[np.int16], SliceContent]:
        """The stored numbers (Y, X) of one slice, and what is known of it."""
        return self.read_stored(key, z), SliceContent(unpack_cells(open_volume(self.root, key)[1], z))

    def read_stored(self, key: str, where: Any = ()) -> NDArray[np.int16]:
        """The stored numbers of one volume, (Z, Y, X), or what an index of it picks. StoreError when they cannot be read."""
        array, _ = open_volume(self.root, key)
        try:
            stored: NDArray[np.int16] = array[where]
        except RuntimeError as error:
            raise StoreError(f"volume {key} of {self.root} is broken ({error}); see hilum store verify") from None
        return stored

    def _volume(self, row: Row, start: tuple[int, int, int], stored: NDArray[np.int16]) -> Volume:
        affine = None
        if row.affine is not None:
            affine = np.array(row.affine).reshape(4, 4)
            affine[:3, 3] += affine[:3, :3] @ np.array(start, float)
        voxels = restore(stored, row.slope, row.intercept)
        return Volume(voxels=voxels, affine=affine, modality=row.modality, unit=row.unit)


def open_volume(root: Path, key: str) -> tuple[Any, bytes]:
    """The Blosc2 array of one volume, voxels unread, and its packed content. StoreError when it is missing or broken."""
    try:
        path = _path(root, key)
        return _open_array(path, os.stat(path).st_mtime_ns)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise StoreError(f"volume {key} of {root} cannot be opened: {error}") from None


@lru_cache(maxsize=4096)
def _path(root: Path, key: str) -> str:
    return str(volume_path(root, key))


@lru_cache(maxsize=512)
def _open_array(path: str, _: int) -> tuple[Any, bytes]:
    """Kept as long as the file's time stamp stays: opening costs half a slice."""
    array = blosc2.open(path, mode="r", dparams={"nthreads": 1})
    return array, array.schunk.meta["content"]


def orphans(store: Store) -> Iterator[Path]:
    """Files under `volumes/` that no row of the index names."""
    keys = set(store.sorted_keys())
    for folder, folders, names in os.walk(store.root / "volumes"):
        folders.sort()
        for path in (Path(folder) / name for name in sorted(names)):
            if path.stem not in keys or path != volume_path(store.root, path.stem):
                yield path


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
