"""Boxes of the token grid: which ones a decoder is trained on, and how they tile a scan.

Organs are small: of a head-and-neck CT one voxel in a thousand is brainstem. So a third of the boxes are drawn to hold a voxel
of a class that is drawn first (nnU-Net's oversampling of foreground), each class of a scan as often as any other.
Axes in names: k j i of tokens, K J I of the decoder's finer cells.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.errors import ContractError
from hilum.probe.heads.decoders import Grid
from hilum.probe.heads.tokens import TokenSequence
from hilum.volume import FloatArray, Volume

OUTSIDE = -1  # a place of the decoder's grid that the scan does not reach
TRIES = 20  # draws of a box that holds enough labelled cells, then it is taken as it is


@dataclass(frozen=True)
class Window:
    """A box of the tokens of one case."""

    case: int
    start: Grid
    size: Grid


def finer_affine(affine: FloatArray, grid: Grid, finer: Grid) -> FloatArray:
    """Index → LPS mm of a grid that divides the same field into other cells, from that of `grid`; outer borders coincide."""
    step = np.array(grid) / np.array(finer)
    to_coarse = np.eye(4)
    to_coarse[:3, :3] = np.diag(step)
    to_coarse[:3, 3] = 0.5 * step - 0.5
    placed: FloatArray = affine @ to_coarse
    return placed


def truth_on_grid(truth: Volume, affine: FloatArray, grid: Grid) -> NDArray[np.int64]:
    """The nearest voxel of a label map at each place of a grid, (K, J, I); OUTSIDE where there is none."""
    to_voxel = np.linalg.solve(truth._affine("a label map"), affine)
    axes = np.meshgrid(*map(np.arange, grid), indexing="ij", sparse=True)
    found, inside = [], np.ones(grid, bool)
    for axis in range(3):
        at = sum(to_voxel[axis, n] * axes[n] for n in range(3)) + to_voxel[axis, 3]
        whole = np.rint(at).astype(np.int64)
        inside &= (whole >= 0) & (whole < truth.shape[axis])
        found.append(whole.clip(0, truth.shape[axis] - 1))
    labels: NDArray[np.int64] = truth.voxels[tuple(found)].astype(np.int64)
    labels[~inside] = OUTSIDE
    return labels


class Truths:
    """True labels of cases on the decoder's cells, kept in a folder: what is resident does not grow with the cases.

    y  label maps, each read once. ContractError for a class beyond `num_classes`
    """

    def __init__(self, folder: Path, X: TokenSequence, y: Sequence[Volume], upscale: Grid, num_classes: int) -> None:
        self._folder = folder
        self.upscale, self.grids, self.classes = upscale, [], []
        for n in range(len(X)):
            case = X.outline(n)
            finer = scaled(case.grid, upscale)
            labels = truth_on_grid(y[n], finer_affine(case.affine, case.grid, finer), finer)
            present = np.unique(labels)
            if present[-1] > num_classes:
                raise ContractError(f"a label map holds class {present[-1]}; the head knows 1 to {num_classes}")
            self.grids.append(case.grid)
            self.classes.append(present[present > 0])
            np.savez_compressed(folder / f"{n}.npz", labels=labels.astype(np.int16))

    def read(self, case: int) -> NDArray[np.int16]:
        with np.load(self._folder / f"{case}.npz") as stored:
            labels: NDArray[np.int16] = stored["labels"]
        return labels

    def cut(self, labels: NDArray[Any], window: Window) -> NDArray[Any]:
        """The labels of a window."""
        first, size = scaled(window.start, self.upscale), scaled(window.size, self.upscale)
        found: NDArray[Any] = labels[tuple(slice(f, f + n) for f, n in zip(first, size))]
        return found


def scaled(grid: Grid, by: Grid) -> Grid:
    return grid[0] * by[0], grid[1] * by[1], grid[2] * by[2]


def draw_window(
    rng: np.random.Generator, truths: Truths, case: int, size: Grid, oversample: float, min_labelled: float
) -> tuple[Window, NDArray[np.int16]]:
    """A box of a case and its labels.

    oversample    share of boxes that are drawn to hold a voxel of a class, which is drawn first among those of the case; the
                  others lie anywhere
    min_labelled  boxes with a smaller share of labelled cells are drawn again, up to TRIES times (VoxelFM keeps windows with
                  15 %)
    """
    labels, grid = truths.read(case), truths.grids[case]
    room = np.array(grid, np.int64) - np.array(size, np.int64)
    for _ in range(TRIES):
        start = rng.integers(room + 1)
        if len(truths.classes[case]) and rng.random() < oversample:
            wanted = truths.classes[case][rng.integers(len(truths.classes[case]))]
            places = np.flatnonzero(labels == wanted)
            cell = np.unravel_index(places[rng.integers(len(places))], labels.shape)
            token = np.array(cell) // truths.upscale
            start = (token - rng.integers(size)).clip(0, room)
        window = Window(case, _grid(start), size)
        part = truths.cut(labels, window)
        if (part > 0).mean() >= min_labelled:
            break
    return window, part


def tiles(case: int, grid: Grid, size: Grid, overlap: bool) -> Iterator[Window]:
    """Boxes that cover a grid, the last flush with its end; with `overlap` at steps of half a box, else side by side."""
    starts = []
    for n, part in zip(grid, size):
        step = max(1, part // 2) if overlap else part
        starts.append(sorted({min(first, n - part) for first in range(0, n, step)}))
    for start in itertools.product(*starts):
        yield Window(case, _grid(start), size)


def tent(size: Grid) -> NDArray[np.float32]:
    """Weights of a box where it overlaps others: highest in the middle, above 0 at the edge."""
    sides = [1 - np.abs((np.arange(n) + 0.5) / n * 2 - 1) * 0.9 for n in size]
    weights: NDArray[np.float32] = np.einsum("k,j,i->kji", *sides).astype(np.float32)
    return weights


def fitting(grid: Grid, size: Grid) -> Grid:
    """A box that is no larger than the grid."""
    return _grid(np.minimum(grid, size))


def _grid(numbers: Any) -> Grid:
    k, j, i = (int(n) for n in numbers)
    return k, j, i
