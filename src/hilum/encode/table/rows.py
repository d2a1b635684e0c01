"""Rows of the feature table: one for each slice, region or scan, and one with the reason for each scan that failed.

The table is Parquet (`feature_schema`); its metadata names model, contract, settings and privacy key.
"""

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hilum.encode.encoder import Encoder
from hilum.encode.features import Encoded, encode_scans, save_patches, vectors_of
from hilum.encode.items import How

_TEXT = ("item", "patient", "study", "series", "modality", "level")


def feature_schema(width: int) -> pa.Schema:
    """Columns of a feature table; `vector` has as many float32 as the encoder gives, or is null beside a `reason`."""
    return pa.schema(
        [(name, pa.string()) for name in _TEXT]
        + [("slice", pa.int32()), ("region", pa.int32()), ("model", pa.string()), ("contract", pa.string())]
        + [("weights", pa.string()), ("layer", pa.string()), ("content", pa.string()), ("notes", pa.list_(pa.string()))]
        + [("patches", pa.string()), ("reason", pa.string()), ("vector", pa.list_(pa.float32(), width))]
    )


def layer_name(layers: Iterable[int]) -> str:
    """ "last", or the numbers: "-1,-4"."""
    numbers = tuple(layers)
    return "last" if numbers == (-1,) else ",".join(map(str, numbers))


def scan_rows(
    found: Encoded, encoder: Encoder, how: How, weights: str, patches: str | None = None
) -> list[dict[str, Any]]:
    """The rows of one scan: at least one.

    weights  hash of the encoder's weights
    patches  name of the side file with its patch tokens
    """
    scan = found.scan
    common = {
        "patient": scan.patient,
        "study": scan.study,
        "series": scan.series,
        "modality": scan.volume.modality if scan.volume is not None else "",
        "level": how.level,
        "model": encoder.name,
        "contract": encoder.contract.hash,
        "weights": weights,
        "layer": layer_name(how.layers),
        "content": scan.content,
    }
    if found.reason:
        return [failed_row(common, found.reason)]
    rows = []
    for part, vector in zip(found.parts, vectors_of(found, how)):
        number = None if how.level == "volume" else part.slice
        parts = [n for n in (number, part.region) if n is not None]
        rows.append(
            common
            | {"item": "/".join([scan.series, *map(str, parts)]), "slice": number, "region": part.region}
            | {"notes": list(found.notes), "patches": patches, "reason": None, "vector": vector.astype(np.float32)}
        )
    return rows


def failed_row(common: dict[str, Any], reason: str) -> dict[str, Any]:
    """The row of a scan that gave no vector."""
    empty = dict.fromkeys(("slice", "region", "patches", "vector"))
    return common | empty | {"item": common["series"], "notes": [], "reason": reason}


def feature_rows(
    encoder: Encoder,
    scans: Iterable[Any],
    how: How,
    batch_size: int = 32,
    *,
    num_threads: int = 1,
    patches: Path | None = None,
    weights: str | None = None,
) -> Generator[list[dict[str, Any]], None, None]:
    """The rows of each scan, in order; patch tokens go to the folder `patches`."""
    weights = encoder.weights_hash if weights is None else weights
    keep = np.float16 if patches is not None else None
    for found in encode_scans(encoder, scans, how, batch_size, num_threads=num_threads, keep=keep):
        name = None
        if patches is not None and not found.reason:
            name = f"{found.scan.series}.b2nd"
            facts = {"model": encoder.name, "contract": encoder.contract.hash, "weights": weights}
            facts |= {"layer": layer_name(how.layers), "series": found.scan.series, "content": found.scan.content}
            save_patches(patches / name, found, encoder, facts)
        yield scan_rows(found, encoder, how, weights, name)


def rows_table(rows: list[dict[str, Any]], width: int | None = None) -> pa.Table:
    """Rows as a table; the width of the vectors is taken from the first that there is, else 1."""
    if width is None:
        width = next((len(row["vector"]) for row in rows if row["vector"] is not None), 1)
    return pa.Table.from_pylist(rows, schema=feature_schema(width))
