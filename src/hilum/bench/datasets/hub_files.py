"""The files of raidium/CuriaBench: rows of Parquet or Arrow tables, or one .npy file for each image.

A source of form "hub" names the file in `path`, and the number of the row in `series` where the file is a table. Images are
(rows, columns) or (rows, columns, slices), a mask has the shape of its image; slices come first here.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hilum.bench.task import Source
from hilum.errors import ScanRefused
from hilum.volume import Volume


def read_hub_image(source: Source) -> Volume:
    """One image, without geometry. Raises ScanRefused."""
    voxels = slices_first(_array(source, "image"))
    if voxels.dtype.kind not in "iuf" or not np.isfinite(voxels).all():
        raise ScanRefused("non_finite", "an image of other than finite numbers")
    return Volume(voxels=voxels, affine=None, modality="OT")


def read_hub_mask(source: Source, scan: Volume) -> NDArray[np.int32]:
    """The mask of an image. Raises ScanRefused when it has another shape."""
    voxels = slices_first(_array(source, "mask"))
    if voxels.shape != scan.shape:
        raise ScanRefused("labels_off_grid", f"labels of shape {voxels.shape}, a scan of {scan.shape}")
    return voxels.astype(np.int32)


def slices_first(array: NDArray[Any]) -> NDArray[Any]:
    """(rows, columns[, slices]) → (slices, rows, columns). Raises ScanRefused."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ScanRefused("not_3d", "×".join(str(n) for n in array.shape) or "a single number")
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _array(source: Source, column: str) -> NDArray[Any]:
    if source.series is None:
        return read_npy(source.path)
    cell = row_of(source.path, int(source.series), column)
    if not cell.is_valid:
        raise ScanRefused("not_3d", f"row {source.series} has no {column}")
    return unnest(cell)


def read_npy(path: Path) -> NDArray[Any]:
    """An array of plain numbers or a structured one; objects are never unpickled. Raises ScanRefused."""
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except (ValueError, EOFError) as error:
        raise ScanRefused("corrupt", f"npy ({type(error).__name__})") from None


def unnest(cell: Any) -> NDArray[Any]:
    """A cell of nested lists as an array, without going through Python's numbers. Raises ScanRefused for ragged lists."""
    values, shape = cell.values, [len(cell.values)]
    while (
        pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type)
    ):
        lengths = np.unique(np.asarray(values.value_lengths().fill_null(-1) if len(values) else [0]))
        if len(lengths) != 1 or lengths[0] < 0:
            raise ScanRefused("corrupt", "nested lists of several lengths")
        shape.append(int(lengths[0]))
        values = values.flatten()
    return np.asarray(values).reshape(shape)


def table_rows(path: Path) -> int:
    """How many rows a table has. Raises ScanRefused."""
    return int(pq.read_metadata(path).num_rows if path.suffix == ".parquet" else _arrow(path).num_rows)


def table_columns(path: Path) -> list[str]:
    return list((pq.read_schema(path) if path.suffix == ".parquet" else _arrow(path).schema).names)


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """Some columns of a table, whole."""
    return pq.read_table(path, columns=columns) if path.suffix == ".parquet" else _arrow(path).select(columns)


def row_of(path: Path, row: int, column: str) -> Any:
    """One cell; of a Parquet file the group of rows around it is read, and kept until another is asked for."""
    if path.suffix != ".parquet":
        return _arrow(path)[column][row]
    group, first = _group_of(path, row)
    return _group(path, group, column)[row - first]


@lru_cache(maxsize=8)
def _starts(path: Path) -> tuple[int, ...]:
    about = pq.read_metadata(path)
    return tuple(np.cumsum([0, *(about.row_group(n).num_rows for n in range(about.num_row_groups))]).tolist())


def _group_of(path: Path, row: int) -> tuple[int, int]:
    starts = _starts(path)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return group, starts[group]


@lru_cache(maxsize=2)
def _group(path: Path, group: int, column: str) -> Any:
    return pq.ParquetFile(path).read_row_group(group, columns=[column])[column]


@lru_cache(maxsize=4)
def _arrow(path: Path) -> pa.Table:
    """A table of the Arrow stream or file format, mapped, not read."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()
