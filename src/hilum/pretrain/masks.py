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
_LOG_LOW, _LOG_HIGH = math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1])


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
    grid: tuple[int, ...],
    count: int,
    center: tuple[float, ...] | None = None,
    sigma: float = 0.25,
) -> Mask:
    """Hide exactly `count` patches, in blocks, topped up by single patches.

    grid     patches along (Y, X) or (Z, Y, X)
    center   (y, x) or (z, y, x) in fractions of the crop around which blocks fall (Gaussian, `sigma` in the same unit); None
             places them uniformly, as DINOv2 does

    A block hides at least one and at most as many more patches as are missing; after ten that do not, single ones follow. A
    grid of volumes that is one patch thick is masked as the image it is.
    """
    num = math.prod(grid)
    if not 0 <= count <= num:
        raise ValueError(f"cannot hide {count} of {num} patches")
    if len(grid) == 3 and 1 in grid:
        thin = grid.index(1)
        rest = None if center is None else center[:thin] + center[thin + 1 :]
        return sample_block_mask(rng, grid[:thin] + grid[thin + 1 :], count, rest, sigma).reshape(grid)
    hidden, missing, failed = 0, count, 0
    axes, runs, draws = range(len(grid)), _runs(grid), _block_draws(rng, len(grid), center, sigma)
    while missing and failed < BLOCK_TRIES:
        failed += 1
        draw = next(draws)
        sides = _block_sides(grid, missing, draw)
        if not sides:
            continue
        block = 1
        for axis in axes:
            side, free, place = sides[axis], grid[axis] - sides[axis], draw[axis - len(grid)]
            guided = min(max(round(place * grid[axis] - side / 2), 0), free)
            first = guided if center else int(place * (free + 1))
            stride, bits = runs[axis]
            block = block * bits[side] << first * stride
        new = (block & ~hidden).bit_count()
        if 0 < new <= missing:
            hidden, missing, failed = hidden | block, missing - new, 0
    packed = np.frombuffer(hidden.to_bytes(-(-num // 8), "little"), np.uint8)
    mask = np.unpackbits(packed, count=num, bitorder="little").astype(bool)
    if missing:
        free_patches = np.flatnonzero(~mask)
        waiting = rng.exponential(size=len(free_patches)) / _prior(grid, free_patches, center, sigma)
        mask[free_patches[np.argpartition(waiting, missing - 1)[:missing]]] = True  # the first to ring are drawn
    return mask.reshape(grid)


def _block_sides(grid: tuple[int, ...], missing: int, draw: list[float]) -> tuple[int, ...] | None:
    """Sides of a block, or None where it does not fit.

    An image (DINOv2): an area U(4, missing), height/width log-uniform. A volume (VoxelFM): U(4, min(missing, half of all)),
    height/width and depth/width log-uniform, each side smaller than the grid's.
    """
    if len(grid) == 2:
        area = MIN_BLOCK + draw[0] * max(missing - MIN_BLOCK, 0)
        aspect = math.exp(_LOG_LOW + draw[1] * (_LOG_HIGH - _LOG_LOW))
        sides: tuple[int, ...] = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        return sides if 0 < sides[0] <= grid[0] and 0 < sides[1] <= grid[1] else None
    size = MIN_BLOCK + draw[0] * max(min(missing, math.prod(grid) / 2) - MIN_BLOCK, 0)
    tall, deep = (math.exp(_LOG_LOW + d * (_LOG_HIGH - _LOG_LOW)) for d in draw[1:3])
    width = (size / (tall * deep)) ** (1 / 3)
    sides = round(deep * width), round(tall * width), round(width)
    return sides if all(0 < side < n for side, n in zip(sides, grid)) else None


@lru_cache(maxsize=64)
def _runs(grid: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """For each axis its stride in bits and, for each length, the bits of a run along it that begins at the first patch."""
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    return [
        (stride, [sum(1 << (stride * at) for at in range(length)) for length in range(n + 1)])
        for n, stride in zip(grid, strides)
    ]


def _block_draws(
    rng: np.random.Generator, axes: int, center: tuple[float, ...] | None, sigma: float
) -> Iterator[list[float]]:
    """Endless (size, aspects, places): the first two uniform, places uniform or Gaussian about a centre. Drawn by the dozen."""
    while True:
        draws = rng.random((48, 2 * axes))
        if center is not None:
            draws[:, axes:] = rng.normal(center, sigma, (48, axes))
        yield from draws.tolist()


def _prior(
    grid: tuple[int, ...], free: NDArray[np.intp], center: tuple[float, ...] | None, sigma: float
) -> NDArray[np.float64]:
    """Weight of each free patch under the Gaussian, floored so that a far anatomy still leaves a choice."""
    if center is None:
        return np.ones(len(free))
    places = np.unravel_index(free, grid)
    squares = [((at + 0.5) / n - middle) ** 2 for at, n, middle in zip(places, grid, center)]
    return np.asarray(np.maximum(np.exp(-sum(squares[1:], squares[0]) / (2 * sigma**2)), 1e-6))
