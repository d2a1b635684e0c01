"""Segmentation from patch tokens: a light convolutional decoder, its class map put onto the scan's own grid.

Tokens of a 3D encoder are decoded in 3D, those of slices slice by slice (kernels and upsampling within the plane). Cases
differ in their grids, so each is decoded by itself.
Axes in names: M lanes, C classes with the background first, K J I of a grid.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional

from hilum.errors import ContractError, UsageError
from hilum.metrics.masks import surface_distances
from hilum.probe.heads.head import Array, Head, Task, Validation, check_task, hold_out
from hilum.probe.heads.lanes import Data, LaneSettings, ModuleNetwork, fit_lanes, run_lanes
from hilum.probe.heads.tokens import CaseTokens, TokenBatch, TokenSequence
from hilum.volume import FloatArray, Volume

Grid = tuple[int, int, int]
OUTSIDE = -1  # a place of the decoder's grid that the scan does not reach
SLAB = 2_000_000  # voxels × channels that are resampled at once
COUNTS = 4  # of each class: predicted voxels, shared voxels, 95 % Hausdorff distance, mean surface distance


class Decoder(nn.Module):
    """1×1×1 convolution to `width`; blocks of twice (convolution, GroupNorm, ReLU), each followed by a step of resizing towards
    the output grid; 1×1×1 convolution to the classes. The last block has no norm. VoxelFM's: width 64, three blocks, 112³.

    kernel  (3, 3, 3), or (1, 3, 3) for slices
    linear  add a linear map of each token to the classes, resized; the convolutions then begin at 0 and refine it
    """

    def __init__(self, tokens: int, width: int, blocks: int, classes: int, kernel: Grid, linear: bool = False) -> None:
        super().__init__()
        self.linear = nn.Conv3d(tokens, classes, 1) if linear else None
        self.first = nn.Conv3d(tokens, width, 1)
        pad = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        parts: list[nn.Module] = []
        for block in range(blocks):
            for _ in range(2):
                norm = nn.GroupNorm(min(8, width), width) if block < blocks - 1 else nn.Identity()
                parts.append(nn.Sequential(nn.Conv3d(width, width, kernel, padding=pad, bias=False), norm, nn.ReLU()))
        self.blocks = nn.ModuleList(parts)
        self.last = nn.Conv3d(width, classes, 1)
        if linear:
            nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, output: Grid) -> Tensor:
        """(1, D, k, j, i) → (1, C, *output)."""
        start, tokens = x.shape[2:], x
        x = self.first(x)
        number = len(self.blocks) // 2
        for block in range(number):
            x = self.blocks[2 * block + 1](self.blocks[2 * block](x))
            size = [round(n + (block + 1) / number * (wanted - n)) for n, wanted in zip(start, output)]
            if tuple(x.shape[2:]) != tuple(size):
                x = functional.interpolate(x, size, mode="trilinear", align_corners=False)
        found: Tensor = self.last(x)
        if self.linear is not None:
            found = found + functional.interpolate(self.linear(tokens), output, mode="trilinear", align_corners=False)
        return found


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


def on_scan(logits_MCKJI: Tensor, affine: FloatArray, scan: Volume) -> Iterator[tuple[slice, Tensor]]:
    """Logits at the voxels of a scan, some planes at a time: (planes, (M, C, z, Y, X)).

    Linear between cells, beyond the grid as at its edge.
    """
    lanes, classes, *grid = logits_MCKJI.shape
    to_grid = np.linalg.solve(affine, scan._affine("a scan to segment"))
    planes = max(1, SLAB // (lanes * classes * scan.shape[1] * scan.shape[2]))
    flat = logits_MCKJI.reshape(1, lanes * classes, *grid)
    for first in range(0, scan.shape[0], planes):
        part = slice(first, min(first + planes, scan.shape[0]))
        axes = np.meshgrid(
            np.arange(part.start, part.stop), *map(np.arange, scan.shape[1:]), indexing="ij", sparse=True
        )
        at = [sum(to_grid[a, n] * axes[n] for n in range(3)) + to_grid[a, 3] for a in range(3)]
        unit = [2 * a / max(n - 1, 1) - 1 if n > 1 else 0 * a for a, n in zip(at, grid)]
        where = torch.from_numpy(np.stack(np.broadcast_arrays(*unit[::-1]), -1).astype(np.float32))[None]
        found = functional.grid_sample(flat, where.to(flat.device), padding_mode="border", align_corners=True)
        yield part, found.reshape(lanes, classes, *found.shape[2:])


class SegmentationHead(Head):
    """A class map on the grid of the scan. y is a sequence of label `Volume`s, read as they are asked for; 0 is the background.

    seed … max_floats of lanes as in `TokenHead`, except that a case is a piece
    num_classes  without the background; None: the largest label of the training cases
    width, num_blocks, linear  of the decoder (`Decoder`)
    output       cells along each axis of its output; None: `upscale` times the tokens (of slices: within the plane)
    loss         "ce", or "ce+dice": mean soft Dice of the classes of a case is added

    VoxelFM's head: width 64, num_blocks 3, linear False, output 112, loss "ce"; 727,094 weights for 118 outputs at token
    width 864.
    """

    sees: ClassVar[Literal["vectors", "tokens"]] = "tokens"
    tasks: ClassVar[tuple[Task, ...]] = ("segmentation",)

    def __init__(
        self,
        task: Task = "segmentation",
        *,
        seed: int = 0,
        seeds: int = 5,
        learning_rates: tuple[float, ...] = (1e-3, 5e-3),
        epochs: int = 20,
        batch_size: int = 1,
        optimiser: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 0.01,
        schedule: Literal["constant", "cosine"] = "cosine",
        clip: float | None = None,
        num_classes: int | None = None,
        width: int = 16,
        num_blocks: int = 2,
        output: int | None = None,
        upscale: int = 4,
        linear: bool = True,
        loss: Literal["ce", "ce+dice"] = "ce+dice",
        max_floats: int = 64_000_000,
        device: str = "cpu",
    ) -> None:
        self.task, self.seed, self.seeds, self.learning_rates = task, seed, seeds, learning_rates
        self.epochs, self.batch_size, self.optimiser, self.weight_decay = epochs, batch_size, optimiser, weight_decay
        self.schedule, self.clip, self.num_classes, self.width = schedule, clip, num_classes, width
        self.num_blocks, self.output, self.upscale = num_blocks, output, upscale
        self.linear, self.loss = linear, loss
        self.max_floats, self.device = max_floats, device

    def fit(
        self,
        X: TokenSequence,
        y: Sequence[Volume],
        groups: Array | None = None,
        validation: Validation | None = None,
    ) -> Self:
        check_task(self)
        if len(y) != len(X) or self.loss not in ("ce", "ce+dice"):
            raise UsageError(
                f"expected a label map for each of {len(X)} cases and loss ce or ce+dice; found {len(y)}, {self.loss}"
            )
        if self.num_classes is None:
            self.num_classes_ = max(int(one.voxels.max()) for one in y)
        else:
            self.num_classes_ = self.num_classes
        if self.num_classes_ < 1:
            raise ValueError("segmentation needs at least one labelled voxel in the training cases; found none")
        self.n_features_in_, self.planar_ = X.width, bool(X[0].planar)
        train, refit = np.arange(len(X)), False
        X_val, y_val = (X, y) if validation is None else validation
        if validation is None:
            train, held = hold_out(np.zeros(len(X)), "regression", groups, self.seed)
            if len(held):
                X_val, y_val, refit = X[held], [y[int(n)] for n in held], True
        network, lanes = self._network(), self._lanes_at_once(X)
        rates = tuple(self.learning_rates)
        fitted = self._fit_lanes(network, X[train], [y[int(n)] for n in train], X_val, y_val, lanes, rates, None)
        self.learning_rate_, self.epoch_, self.scores_ = fitted.learning_rate, fitted.epoch, fitted.scores
        if refit:
            fitted = self._fit_lanes(network, X, y, None, None, lanes, (fitted.learning_rate,), fitted.epoch)
        self.weights_ = fitted.weights
        return self

    def _fit_lanes(
        self,
        network: ModuleNetwork,
        X: TokenSequence,
        y: Sequence[Volume],
        X_val: TokenSequence | None,
        y_val: Any,
        lanes: int,
        rates: tuple[float, ...],
        stop: int | None,
    ) -> Any:
        settings = LaneSettings(
            seeds=tuple(range(self.seed, self.seed + self.seeds)),
            learning_rates=rates,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimiser=self.optimiser,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            clip=self.clip,
            lanes_at_once=lanes,
        )
        return fit_lanes(
            network,
            self._data(X),
            None if X_val is None else self._data(X_val),
            settings,
            loss=lambda out, cases: self._loss(out[0], self._truth(out[1], y[cases[0]])),
            summarise=lambda out, cases: _overlaps(out[0], self._truth(out[1], y_val[cases[0]])),
            score=lambda parts, pieces: _mean_dice(torch.stack(parts, 1)),
            stop=stop,
            device=self.device,
            progress=self.progress,
        )

    def _loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """(M,) of one case."""
        inside = truth >= 0
        wanted = truth.clamp(min=0)
        logs = functional.log_softmax(logits, 1)
        losses = -logs.gather(1, wanted.expand(len(logs), 1, *wanted.shape))[:, 0]
        loss = (losses * inside).sum((1, 2, 3)) / inside.sum().clamp(min=1)
        if self.loss == "ce":
            return loss
        shares = logs.exp()[:, 1:] * inside
        one_hot = functional.one_hot(wanted, logits.shape[1]).permute(3, 0, 1, 2)[1:] * inside
        both, sums = (shares * one_hot).sum((2, 3, 4)), shares.sum((2, 3, 4)) + one_hot.sum((1, 2, 3))
        there = one_hot.sum((1, 2, 3)) > 0
        dice = (2 * both + 1) / (sums + 1)
        return loss + 1 - (dice * there).sum(1) / there.sum().clamp(min=1)

    def _truth(self, case: CaseTokens, truth: Volume) -> Tensor:
        finer = self._finer(case.grid)
        labels = truth_on_grid(truth, finer_affine(case.affine, case.grid, finer), finer)
        if labels.max() > self.num_classes_:
            raise ContractError(f"a label map holds class {labels.max()}; the head knows 1 to {self.num_classes_}")
        return torch.from_numpy(labels).to(self.device)

    def _finer(self, grid: Grid) -> Grid:
        """The decoder's output grid."""
        k, j, i = (self.output or n * self.upscale for n in grid)
        return (grid[0], j, i) if self.planar_ else (k, j, i)

    def _network(self) -> ModuleNetwork:
        kernel = (1, 3, 3) if self.planar_ else (3, 3, 3)
        classes = self.num_classes_ + 1

        def call(module: Any, batch: TokenBatch) -> Any:
            case = batch.cases[0]
            x = batch.tokens[0].T.reshape(1, -1, *case.grid)
            return module(x, self._finer(case.grid))[0]

        sizes = (self.n_features_in_, self.width, self.num_blocks, classes, kernel, self.linear)
        return _WithCase(lambda: Decoder(*sizes), call)

    def _lanes_at_once(self, X: TokenSequence) -> int:
        """So that what one lane makes of the largest case fits: about six copies of its finest maps."""
        cells = self.output**3 if self.output else int(X.lengths.max()) * self.upscale ** (2 if self.planar_ else 3)
        one = cells * (6 * self.width + 4 * (self.num_classes_ + 1))
        return int(np.clip(self.max_floats / one, 1, self.seeds * len(self.learning_rates)))

    def _data(self, X: TokenSequence) -> Data:
        def plan(order: Sequence[int], batch_size: int) -> list[list[list[int]]]:
            return [[[int(n)] for n in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]

        def read(pieces: Sequence[Sequence[int]]) -> Iterator[TokenBatch]:
            for batch in X.batches(pieces):
                case = batch.cases[0]
                if len(case.tokens) != math.prod(case.grid):
                    raise UsageError("segmentation needs the tokens of whole scans; these are of a region")
                yield batch.to(self.device)

        return Data(num=len(X), plan=plan, read=read)

    def _logits(self, X: TokenSequence) -> Iterator[tuple[Tensor, FloatArray]]:
        """Of each case (S, C, K, J, I), and the affine of that grid."""
        check_is_fitted(self)
        if X.width != self.n_features_in_ or bool(X[0].planar) != self.planar_:
            raise ContractError("these tokens are of another width or kind than the head was fitted on")
        for (logits, case), _ in run_lanes(self._network(), self.weights_, self._data(X), self.batch_size):
            yield logits, finer_affine(case.affine, case.grid, self._finer(case.grid))

    def segment(self, X: TokenSequence, scans: Sequence[Volume]) -> Iterator[Volume]:
        """One label map for each case on the grid of its scan: the class of the largest mean probability over seeds."""
        for (logits, affine), scan in zip(self._logits(X), scans, strict=True):
            labels = np.zeros(scan.shape, np.uint8 if self.num_classes_ < 256 else np.uint16)
            for planes, part in on_scan(logits, affine, scan):
                labels[planes] = part.softmax(1).mean(0).argmax(0).cpu().numpy()
            yield Volume(voxels=labels, affine=scan.affine, modality=scan.modality, kind="label")

    def outputs(self, X: TokenSequence, y: Sequence[Volume] | None = None) -> Array:
        """(S, N, 4 · classes) for each head seed: class after class predicted and shared voxels, 95 % Hausdorff and mean
        surface distance in mm (NaN where the class is absent from truth or prediction), on the grid of the truth. In
        float64: float32 does not count beyond 2²⁴ voxels.

        y  the true label maps, against which is counted; UsageError without
        """
        if y is None:
            raise UsageError(
                "counts of a segmentation need the true label maps; call outputs(X, y), or segment(X, scans)"
            )
        rows = []
        for (logits, affine), truth in zip(self._logits(X), y, strict=True):
            labels = np.zeros((len(logits), *truth.shape), np.uint16)
            for planes, part in on_scan(logits, affine, truth):
                labels[:, planes] = part.argmax(1).cpu().numpy()
            rows.append([count_classes(truth, found, self.num_classes_) for found in labels])
        return np.array(rows, np.float64).transpose(1, 0, 2)

    def _outputs(self, X: Any) -> Array:
        return self.outputs(X)

    def predict(self, X: TokenSequence) -> Any:
        """UsageError: a class map needs the grid of its scan."""
        raise UsageError("a class map needs the grid of its scan; call segment(X, scans)")


class _WithCase(ModuleNetwork):
    """Outputs go with their case, which knows their grid."""

    def outputs(self, weights: Any, batch: TokenBatch, draws: Any) -> tuple[Tensor, CaseTokens]:
        return super().outputs(weights, batch, draws), batch.cases[0]


def count_classes(truth: Volume, found: NDArray[Any], num_classes: int) -> list[float]:
    """The `output` of a segmentation row (`hilum.bench.predictions`), for classes 1 … num_classes."""
    counts: list[float] = []
    for label in range(1, num_classes + 1):
        true, here = truth.voxels == label, found == label
        distances = [math.nan, math.nan]
        if true.any() and here.any():
            apart = surface_distances(true, here, truth.spacing_mm)
            distances = [apart.hd95_mm, apart.mean_mm]
        counts += [float(here.sum()), float((true & here).sum()), *distances]
    return counts


def _overlaps(logits: Tensor, truth: Tensor) -> Tensor:
    """(M, classes, 3): true, predicted and shared cells of one case, without the background."""
    found = logits.argmax(1)
    counts = []
    for label in range(1, logits.shape[1]):
        true, here = truth == label, (found == label) & (truth >= 0)
        sums = [true.sum().expand(len(found)), here.sum((1, 2, 3)), (here & true).sum((1, 2, 3))]
        counts.append(torch.stack(sums, 1))
    return torch.stack(counts, 1)


def _mean_dice(overlaps: Tensor) -> Tensor:
    """(M, cases, classes, 3) → (M,): Dice per case and class that is there or predicted, averaged."""
    true, here, both = overlaps.double().unbind(-1)
    defined = (true + here) > 0
    dice = 2 * both / (true + here).clamp(min=1)
    return (dice * defined).sum((1, 2)) / defined.sum((1, 2)).clamp(min=1)
