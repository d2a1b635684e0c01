"""Patch tokens on disk: one compressed file a scan, read slice by slice, each token with its place in the patient.

SERIES.b2nd    Blosc2, float16 (float32 where a value is larger), (slices or k, rows or j, columns or i, D);
               a chunk is one plane of tokens; facts as JSON in its metadata
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
from numpy.typing import NDArray

from hilum.errors import InputError
from hilum.records import write_atomic

_FORMAT = {"format": "hilum-patches", "version": 1}
_LARGEST = 65504.0  # of float16
Box = tuple[slice, slice, slice]


class Patches(NamedTuple):
    """Patch tokens of one scan.

    tokens   (K, rows, columns, D), or those of the slice that was asked for
    grid     tokens along the three axes
    affine   (k, j, i, 1) of a token → LPS mm; None without geometry, or when the slices lie at uneven steps
    affines  (K, 4, 4) the same for each slice alone with k = 0; None for volume encoders and without geometry
    slices   (K,) their numbers in the scan; () for volume encoders
    facts    model, contract, weights, layer and series
    """

    tokens: NDArray[Any]
    grid: tuple[int, int, int]
    affine: NDArray[np.float64] | None
    affines: NDArray[np.float64] | None
    slices: tuple[int, ...]
    facts: dict[str, str]


def write_patches(path: Path, found: Patches) -> None:
    """Write the tokens of one scan, atomically."""
    narrow = float(np.abs(found.tokens).max()) <= _LARGEST
    tokens = np.ascontiguousarray(found.tokens, np.float16 if narrow else np.float32)
    record = _FORMAT | {
        "affine": None if found.affine is None else found.affine.tolist(),
        "affines": None if found.affines is None else found.affines.tolist(),
        "slices": list(found.slices),
        "facts": found.facts,
    }
    with write_atomic(path) as temporary:
        array = blosc2.asarray(
            tokens,
            chunks=(1, *tokens.shape[1:]),
            cparams={"codec": blosc2.Codec.ZSTD, "clevel": 3, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
        )
        array.schunk.vlmeta["hilum"] = json.dumps(record, sort_keys=True)
        array.save(str(temporary), mode="w")


def read_patches(path: str | Path, slice: int | None = None, box: Box | None = None) -> Patches:
    """The tokens of one scan as they were written, or of one slice or box alone, without decoding the others.

    slice  its number in the scan
    box    ranges along (k, j, i); an empty one reads the header alone
    """
    path = Path(path)
    try:
        array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
        record = json.loads(array.schunk.vlmeta["hilum"])
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, FileNotFoundError) as error:
        raise InputError(
            f"{path} cannot be read as patch tokens: {error}. Make them with: hilum embed --patches"
        ) from None
    if record.get("format") != _FORMAT["format"] or record.get("version") != _FORMAT["version"]:
        raise InputError(f"{path} holds no patch tokens of version 1; make them with: hilum embed --patches")
    slices = tuple(record["slices"])
    if slice is not None and slice not in slices:
        raise InputError(f"{path} holds no slice {slice}; it has {len(slices)}: {', '.join(map(str, slices[:8]))} …")
    if box is not None:
        empty = any(side.start >= side.stop for side in box)
        tokens = np.zeros((0, 0, 0, array.shape[3]), np.float16) if empty else array[box]
    else:
        tokens = array[:] if slice is None else array[slices.index(slice)][None]
    affine, affines = (None if record[n] is None else np.array(record[n]) for n in ("affine", "affines"))
    k, j, i = array.shape[:3]
    return Patches(tokens, (k, j, i), affine, affines, slices, record["facts"])
