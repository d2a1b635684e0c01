"""Which patches of a global crop are hidden: how many, by sample number alone, and where, in blocks around the anatomy.

A mask is drawn as one whole number with a bit a patch: laying a block over it is a shift and an `or`, and counting is
one instruction a word, about 1 µs a try where an array takes 15.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hilum.pretrain.recipe import ViewSpec
from hilum.pretrain.sampling import sample_rng

Mask = NDArray[np.bool_]

MIN_BLOCK = 4  # patches; DINOv2's smallest mask block
BLOCK_ASPECT = (0.3, 1 / 0.3)  # and its range of height/width
BLOCK_TRIES = 10


def mask_counts(num_crops: int, num_patches: int, spec: ViewSpec, rng: np.random.Generator) -> list[int]:
    """How many patches to hide in each of some global crops; the sum is the same at every draw.

    ⌊num_crops · mask_probability⌋ crops are masked; the k-th of n gets ⌊N · (low + (high − low)·k/n)⌋ patches, the upper
    edge of its stratum (DINOv3), and crops are shuffled. 128 crops of 16×16 patches hide 4,941 in all.
    """
    num_masked = int(num_crops * spec.mask_probability)
    edges = np.linspace(*spec.mask_ratio, num_masked + 1)[1:]
    counts = [int(num_patches * edge) for edge in edges] + [0] * (num_crops - num_masked)
    return [int(c) for c in rng.permutation(counts)]


def sample_mask_counts(sample: int, num_patches: int, spec: ViewSpec, seed: int) -> list[int]:
    """How many patches to hide in each global crop of a sample. Dealt within its group of `mask_group` samples."""
    group, place = divmod(sample, spec.mask_group)
    return _group_counts(group, num_patches, spec, seed)[place :: spec.mask_group]


@lru_cache(maxsize=64)
def _group_counts(group: int, num_patches: int, spec: ViewSpec, seed: int) -> list[int]:
    return mask_counts(spec.mask_group * spec.num_global, num_patches, spec, sample_rng(seed, group, 1))


def sample_block_mask(
    rng: np.random.Generator,
    grid: tuple[int, int],
    count: int,
    center: tuple[float, float] | None = None,
    sigma: float = 0.25,
) -> Mask:
    """Hide exactly `count` patches, in blocks, topped up by single patches.

    grid     (rows, columns) of patches
    center   (y, x) in fractions of the crop around which blocks fall (Gaussian, `sigma` in the same unit); None places
             them uniformly, as DINOv2 does

    A block hides at least one and at most as many more patches as are missing; after ten that do not, single ones follow.
    """
    rows, columns = grid
    if not 0 <= count <= rows * columns:
        raise ValueError(f"cannot hide {count} of {rows * columns} patches")
    hidden, missing, failed = 0, count, 0
    columns_of, draws = _first_columns(rows, columns), _block_draws(rng, center, sigma)
    log_low, log_high = math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1])
    while missing and failed < BLOCK_TRIES:
        failed += 1
        a, b, y, x = next(draws)
        area = MIN_BLOCK + a * max(missing - MIN_BLOCK, 0)
        aspect = math.exp(log_low + b * (log_high - log_low))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height <= rows and 0 < width <= columns):
            continue
        if center is None:
            top, left = int(y * (rows - height + 1)), int(x * (columns - width + 1))
        else:
            top = min(max(round(y * rows - height / 2), 0), rows - height)
            left = min(max(round(x * columns - width / 2), 0), columns - width)
        block = ((1 << width) - 1) * columns_of[height] << (top * columns + left)
        new = (block & ~hidden).bit_count()
        if 0 < new <= missing:
            hidden, missing, failed = hidden | block, missing - new, 0
    packed = np.frombuffer(hidden.to_bytes(-(-rows * columns // 8), "little"), np.uint8)
    mask = np.unpackbits(packed, count=rows * columns, bitorder="little").astype(bool)
    if missing:
        free = np.flatnonzero(~mask)
        waiting = rng.exponential(size=len(free)) / _prior(grid, free, center, sigma)  # the first to ring are drawn
        mask[free[np.argpartition(waiting, missing - 1)[:missing]]] = True
    return mask.reshape(grid)


@lru_cache(maxsize=64)
def _first_columns(rows: int, columns: int) -> list[int]:
    """For each height, the bits of a block of that height and width 1 at the upper left."""
    return [sum(1 << (columns * row) for row in range(height)) for height in range(rows + 1)]


def _block_draws(
    rng: np.random.Generator, center: tuple[float, float] | None, sigma: float
) -> Iterator[tuple[float, float, float, float]]:
    """Endless (area, aspect, y, x): the first two uniform, places uniform or Gaussian about a centre. Drawn by the dozen."""
    while True:
        draws = rng.random((48, 4))
        if center is not None:
            draws[:, 2:] = rng.normal(center, sigma, (48, 2))
        yield from draws.tolist()


def _prior(
    grid: tuple[int, int], free: NDArray[np.intp], center: tuple[float, float] | None, sigma: float
) -> NDArray[np.float64]:
    """Weight of each free patch under the Gaussian, floored so that a far anatomy still leaves a choice."""
    if center is None:
        return np.ones(len(free))
    y = (free // grid[1] + 0.5) / grid[0] - center[0]
    x = (free % grid[1] + 0.5) / grid[1] - center[1]
    return np.asarray(np.maximum(np.exp(-(y**2 + x**2) / (2 * sigma**2)), 1e-6))
