"""Scans that exist twice: the same pixels, or the same picture after another window, codec or crop.

Exact duplicates share a hash of their pixels. Near duplicates share most bits of a *look hash*: 64 signs of low
spatial frequencies (discrete cosine transform) of the scan as seen from afar, as in perceptual image hashes
(Zauner 2010), here in three dimensions and patient directions. Pairs within a distance are found exactly and without
comparing all with all: of m blocks of bits, d different bits leave at least m − d untouched, so two hashes within
distance d agree fully on one of the C(m, d) choices of blocks (Manku, Jain, Das Sarma 2007).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from hilum.archive.judge.hounsfield import thin
from hilum.errors import UsageError
from hilum.volume import Volume, orient

BITS = 64
SKIP = 40  # lowest frequencies left out: they say what organ it is, not whose
CELLS = 16  # per axis: the scan as seen from afar
# Of 15,880 pairs of different people (hippocampus, head and neck) the nearest are 6 bits apart; noise, JPEG and resampling
# change 4 or fewer in 96 % of these scans and more. Cropping one voxel on all sides of a 35-voxel image changes 7.
MAX_DISTANCE = 4
MAX_PAIRS = 10_000_000  # beyond, the hashes do not separate these scans, and memory would go
_LARGEST = 12  # bits; beyond, blocks are too small to separate anything

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, order=True)
class Pair:
    """Two scans that look alike: their keys in order, and the number of differing bits."""

    first: str
    second: str
    distance: int


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of different patients, and of one patient (a scan stored twice, a second reconstruction). Both sorted."""

    across_patients: tuple[Pair, ...]
    within_patient: tuple[Pair, ...]


def look_hash(vol: Volume) -> int:
    """64 bits that stay the same, or nearly, while a scan looks the same.

    vol      any intensity volume; turned to patient directions when it has a geometry
    returns  0…2^64 − 1; bit n is set when the n-th frequency is above the median of all 64

    Averages over CELLS³ cells are cut at their 2nd and 98th percentile, so neither a gain nor an offset nor metal matters.
    """
    cells = _cells(vol)
    low, high = np.percentile(cells, [2, 98])
    waves = fft.dctn(np.clip(cells, low, high), norm="ortho")
    coefficients = waves[_lowest(cells.shape)]
    # Sums in another order must not decide: what is 0 up to rounding counts as 0.
    coefficients[np.abs(coefficients) < 1e-4 * max(high - low, 1e-30)] = 0
    bits = coefficients > np.median(coefficients)
    return int(np.packbits(bits, bitorder="little").view("<u8")[0])


def _cells(vol: Volume) -> NDArray[np.float64]:
    """Averages of the scan over a coarse grid: at most CELLS, in patient directions.

    Cells may cut a voxel: it then counts in parts, in whole 1/16, so that sums of whole numbers are exact in any order.
    """
    few = thin(vol.voxels[:: max(vol.shape[0] // 64, 1)])
    cells = np.asarray(few, np.float64)
    for axis in (2, 1, 0):
        weights = _overlap(cells.shape[axis], min(CELLS, cells.shape[axis]))
        cells = np.moveaxis(np.moveaxis(cells, axis, 2) @ weights.T, 2, axis)
    cells /= 16**3
    if vol.affine is None:
        return cells
    upright = orient(Volume(voxels=cells, affine=vol.affine, modality=vol.modality), "SPL")
    return np.asarray(upright.voxels, np.float64)


def _overlap(num_voxels: int, num_cells: int) -> NDArray[np.float64]:
    """(cells, voxels): how much of each voxel lies in each cell, over the width of a cell, in whole 1/16."""
    edges = np.arange(num_cells + 1) * num_voxels / num_cells
    at = np.arange(num_voxels)
    inside = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return np.asarray(np.rint(16 * np.clip(inside, 0, 1)), np.float64)


def _lowest(shape: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    """Indices of 64 low frequencies of a grid, by the product of (k + 1), after the SKIP lowest; fewer repeat."""
    k = np.indices(shape).reshape(len(shape), -1)
    order = np.lexsort((*k, k.sum(0), (k + 1).prod(0)))[1 + SKIP :]
    return tuple(k[:, np.resize(order, BITS)])


def exact_duplicates(keys: Sequence[str], pixel_hashes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more keys whose pixels have one hash, keys and groups sorted."""
    groups: dict[str, list[str]] = {}
    for key, pixel_hash in zip(keys, pixel_hashes, strict=True):
        groups.setdefault(pixel_hash, []).append(key)
    return tuple(sorted(tuple(sorted(g)) for g in groups.values() if len(g) > 1))


def near_duplicates(
    keys: Sequence[str], patients: Sequence[str], hashes: Hashes, max_distance: int = MAX_DISTANCE
) -> NearDuplicates:
    """All pairs of scans whose look hashes differ in few bits, exactly.

    patients      keyed hashes, one a scan; "" is unknown, and then another patient than any
    hashes        (N,) of `look_hash`
    max_distance  bits, 0…12

    Raises UsageError for another distance, and when there are more than MAX_PAIRS pairs. Memory grows with N, not with
    the number of comparisons.
    """
    if not 0 <= max_distance <= _LARGEST:
        raise UsageError(f"max_distance is 0 to {_LARGEST} of {BITS} bits; found {max_distance}")
    assert len(keys) == len(patients) == len(hashes)
    across: list[Pair] = []
    within: list[Pair] = []
    for i, j in _close(np.asarray(hashes, np.uint64), max_distance):
        first, second = sorted((keys[i], keys[j]))
        pair = Pair(first, second, int(np.bitwise_count(hashes[i] ^ hashes[j])))
        (within if patients[i] and patients[i] == patients[j] else across).append(pair)
    return NearDuplicates(tuple(sorted(across)), tuple(sorted(within)))


def _close(hashes: Hashes, max_distance: int) -> list[tuple[int, int]]:
    """Index pairs i < j within a distance, each once."""
    codes: list[NDArray[np.int64]] = []  # i · N + j
    num, size = len(hashes), 0
    for mask in _masks(num, max_distance):
        for i, j in _agreeing(hashes & mask):
            near = np.bitwise_count(hashes[i] ^ hashes[j]) <= max_distance
            codes.append(np.minimum(i, j)[near] * num + np.maximum(i, j)[near])
            size += len(codes[-1])
            if size > 2 * MAX_PAIRS:
                codes = [np.unique(np.concatenate(codes))]
                size = len(codes[0])
                if size > MAX_PAIRS:
                    raise UsageError(
                        f"more than {MAX_PAIRS} pairs within {max_distance} bits among {num} scans: "
                        "the look hash does not separate them. Use a smaller distance"
                    )
    found = np.unique(np.concatenate(codes)) if codes else np.zeros(0, np.int64)
    first, second = np.divmod(found, max(num, 1))
    return list(zip(first.tolist(), second.tolist()))


def _masks(num: int, max_distance: int) -> Iterator[np.uint64]:
    """Choices of bits of which two hashes within the distance agree on at least one, at the least expected work."""

    def cost(num_blocks: int) -> float:
        """Sorting, about 30 steps a hash, and the pairs that agree by chance."""
        bits = BITS * (num_blocks - max_distance) // num_blocks
        return comb(num_blocks, max_distance) * (30.0 * num + num**2 / 2.0 ** (bits + 1))

    num_blocks = min(range(max_distance + 1, max_distance + 9), key=cost)
    edges = [BITS * n // num_blocks for n in range(num_blocks + 1)]
    blocks = [(1 << b) - (1 << a) for a, b in pairwise(edges)]
    for kept in combinations(blocks, num_blocks - max_distance):
        yield np.uint64(sum(kept))


def _agreeing(parts: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Index pairs of equal values: neighbours in sorted order, then those two apart, and so on."""
    order = np.argsort(parts, kind="stable")
    parts = parts[order]
    at = np.arange(len(parts) - 1)
    step = 1
    while len(at := at[at + step < len(parts)]):
        at = at[parts[at] == parts[at + step]]
        yield order[at], order[at + step]
        step += 1
