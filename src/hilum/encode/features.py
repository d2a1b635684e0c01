"""Scans → one feature table: a row a slice, a region or a volume.

The table is Parquet (FEATURE_SCHEMA plus a fixed-size `vector`); its metadata names model, contract, privacy key and
input. Rows are written as they come, so memory does not grow with the archive.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum.encode.contract import prepare_slice
from hilum.encode.encoder import Encoder, pool
from hilum.errors import ContractError, ScanRefused
from hilum.volume import Volume, apart_mm

LEVELS = ("slice", "region", "volume")


@dataclass(frozen=True)
class Scan:
    """One volume on its way through an encoder, with hashed identifiers only."""

    series: str
    patient: str
    study: str
    volume: Volume
    mask: Volume | None = None


@dataclass(frozen=True)
class Item:
    """One thing to encode: a slice, or a region of a slice.

    image    (1, size, size), prepared by the contract
    weights  (N,) share of each patch that belongs to the region, or None
    """

    scan: Scan
    slice: int
    region: int | None
    image: Tensor
    weights: Tensor | None


def make_items(scan: Scan, encoder: Encoder, level: str, max_slices: int | None) -> Iterator[Item]:
    """What to encode of one scan.

    slice, volume  all slices, or `max_slices` evenly spaced ones
    region         for each label of the mask, the slice in which it covers most pixels (CuriaBench A1: one slice and the
                   mask of one organ)
    """
    vol = scan.volume

    def image_of(z: int) -> Tensor:
        return prepare_slice(
            vol.voxels[z].astype(np.float32, copy=False), vol.modality, vol.unit, encoder.slice_contract
        )

    if level != "region":
        for z in chosen_slices(vol.shape[0], max_slices):
            yield Item(scan, z, None, image_of(z), None)
        return
    if scan.mask is None:
        raise ContractError("level region needs a mask for every scan; give a table of masks with --masks")
    check_same_grid(vol, scan.mask)
    for label, z in largest_slices(scan.mask.voxels).items():
        weights = region_weights(scan.mask.voxels[z] == label, encoder.grid)
        yield Item(scan, z, label, image_of(z), weights)


def chosen_slices(num_slices: int, max_slices: int | None) -> list[int]:
    """All slices, or the middles of `max_slices` equal parts."""
    if max_slices is None or max_slices >= num_slices:
        return list(range(num_slices))
    return [int((n + 0.5) * num_slices / max_slices) for n in range(max_slices)]


def largest_slices(labels: NDArray[Any]) -> dict[int, int]:
    """For each label > 0 of a (Z, Y, X) map, the slice with most of its pixels (the first of equals)."""
    top = int(labels.max())
    areas = np.stack([np.bincount(s.ravel().astype(np.int64), minlength=top + 1) for s in labels])
    return {label: int(areas[:, label].argmax()) for label in range(1, top + 1) if areas[:, label].any()}


def region_weights(mask: NDArray[np.bool_], grid: tuple[int, int]) -> Tensor:
    """Share of each patch (N,) that a region (Y, X) covers, after the same stretch to the square as the slice."""
    share = functional.adaptive_avg_pool2d(torch.from_numpy(mask.astype(np.float32))[None], grid)
    return share.flatten()


def check_same_grid(vol: Volume, mask: Volume) -> None:
    """A mask must lie on its scan's grid. ContractError else: it is never resampled silently."""
    if vol.shape != mask.shape:
        raise ContractError(f"the mask has shape {mask.shape}, its scan {vol.shape}; expected the same grid")
    if vol.affine is not None and mask.affine is not None:
        apart = apart_mm(vol, mask)
        if apart > 0.5 * min(vol.spacing_mm):
            raise ContractError(f"mask and scan lie {apart:.1f} mm apart; expected the same grid")


def encode_items(
    encoder: Encoder, items: Iterable[Item], batch_size: int
) -> Iterator[tuple[Item, NDArray[np.float32]]]:
    """Items in, one vector each, batch by batch in the order they came."""
    stream = iter(items)
    while batch := list(islice(stream, batch_size)):
        tokens = encoder.tokens(torch.stack([item.image for item in batch]))
        if batch[0].weights is None:
            vectors = pool(tokens, encoder.contract.pooling)
        else:
            weights = [item.weights for item in batch if item.weights is not None]
            vectors = pool(tokens, encoder.contract.pooling, torch.stack(weights))
        if not bool(torch.isfinite(vectors).all()):
            raise ContractError("the encoder returned NaN or infinite features; its weights are damaged")
        yield from zip(batch, vectors.numpy())


def feature_rows(
    encoder: Encoder, scans: Iterable[Scan], level: str, max_slices: int | None, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Rows of the feature table. A volume's vector is the mean over its slices (CuriaBench's 3D track for 2D models)."""
    items = (item for scan in scans for item in make_items(scan, encoder, level, max_slices))
    encoded = encode_items(encoder, items, batch_size)
    if level != "volume":
        for item, vector in encoded:
            yield _row(item, encoder, level, vector)
        return
    total: NDArray[np.float64] | None = None
    count, last = 0, None
    for item, vector in encoded:
        if last is not None and item.scan is not last.scan and total is not None:
            yield _row(last, encoder, level, total / count)
            total, count = None, 0
        total = vector.astype(np.float64) if total is None else total + vector
        count, last = count + 1, replace(item, image=item.image[:0])
    if last is not None and total is not None:
        yield _row(last, encoder, level, total / count)


def _row(item: Item, encoder: Encoder, level: str, vector: NDArray[Any]) -> dict[str, Any]:
    parts = {"volume": (), "slice": (item.slice,), "region": (item.slice, item.region)}[level]
    return {
        "item": "/".join([item.scan.series, *map(str, parts)]),
        "patient": item.scan.patient,
        "study": item.scan.study,
        "series": item.scan.series,
        "modality": item.scan.volume.modality,
        "level": level,
        "slice": None if level == "volume" else item.slice,
        "region": item.region,
        "model": encoder.name,
        "contract": encoder.contract.hash,
        "vector": vector.astype(np.float32),
    }


def feature_schema(width: int, metadata: dict[bytes, bytes]) -> pa.Schema:
    """Columns of a feature table; `vector` has as many float32 as the encoder gives."""
    text = ("item", "patient", "study", "series", "modality", "level")
    return pa.schema(
        [(name, pa.string()) for name in text]
        + [("slice", pa.int32()), ("region", pa.int32()), ("model", pa.string()), ("contract", pa.string())]
        + [("vector", pa.list_(pa.float32(), width))],
        metadata=metadata,
    )


def write_rows(path: Path, rows: Iterator[dict[str, Any]], metadata: dict[bytes, bytes], row_group: int = 2048) -> int:
    """Stream rows into a Parquet file at `path`; returns their number. ScanRefused when there is none."""
    first = list(islice(rows, row_group))
    if not first:
        raise ScanRefused("nothing_to_encode", "no scan gave a row")
    schema = feature_schema(len(first[0]["vector"]), metadata)
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        chunk = first
        while chunk:
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
            count += len(chunk)
            chunk = list(islice(rows, row_group))
    return count
