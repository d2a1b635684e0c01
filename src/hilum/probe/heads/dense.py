"""Segmentation from patch tokens: a light decoder over boxes of tokens, its class map put onto the scan's own grid.

Trained on boxes that are drawn around the organs (`hilum.probe.heads.windows`), applied to overlapping boxes of the same size.
Axes in names: M lanes, B boxes, C classes with the background first, k j i of tokens, K J I of the decoder's cells.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional

from hilum.errors import ContractError, UsageError
from hilum.metrics.masks import surface_distances
from hilum.probe.heads.decoders import PLACES, Grid, PatchDecoder, ResizeDecoder, token_places
from hilum.probe.heads.head import Array, Head, Task, Validation, check_task, hold_out
from hilum.probe.heads.lanes import Data, LaneSettings, ModuleNetwork, fit_lanes
from hilum.probe.heads.tokens import TokenSequence
from hilum.probe.heads.windows import Truths, Window, draw_window, finer_affine, fitting, scaled, tent, tiles
from hilum.volume import FloatArray, Volume

SLAB = 2_000_000  # voxels × channels that are resampled at once
WINDOWS: dict[bool, Grid] = {False: (8, 8, 8), True: (8, 16, 16)}  # tokens of a box in 3D, and of slices
MOST_UPSCALE = 8
MOST_OUTPUTS = 16_384  # classes × cells of one token
MOMENT_CASES = 64  # training cases from which mean and deviation of tokens are taken
COUNTS = 4  # of each class: predicted voxels, shared voxels, 95 % Hausdorff distance, mean surface distance


@dataclass(frozen=True, eq=False)
class Boxes:
    """Some boxes of one size: tokens (B, D, k, j, i) with their places, and labels (B, K, J, I)."""

    tokens: Tensor
    truth: Tensor


def on_scan(maps_MCKJI: Tensor, affine: FloatArray, scan: Volume) -> Iterator[tuple[slice, Tensor]]:
    """Maps at the voxels of a scan, some planes at a time: (planes, (M, C, z, Y, X)).

    Linear between cells, beyond the grid as at its edge.
    """
    lanes, classes, *grid = maps_MCKJI.shape
    to_grid = np.linalg.solve(affine, scan._affine("a scan to segment"))
    planes = max(1, SLAB // (lanes * classes * scan.shape[1] * scan.shape[2]))
    flat = maps_MCKJI.reshape(1, lanes * classes, *grid)
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
    """A class map on the grid of the scan. y is a sequence of label `Volume`s, each read once; 0 is the background.

    seed … clip, max_floats, device  as in `TokenHead`, except that a case is a box of tokens
    epochs        times that the head is judged on validation. In each every case gives one box, or more until
    min_steps     so many steps are done over all epochs, however few cases there are
    num_classes   without the background; None: the largest label of the training cases
    decoder       "patch" (`PatchDecoder`) or "resize" (`ResizeDecoder`, VoxelFM's)
    width, num_blocks  of the decoder
    upscale       cells along each axis of a token (of slices: within the plane); None: as many as the token has voxels,
                  at most 8
    window        tokens of a box along each axis; None: 8 × 8 × 8, of slices 8 × 16 × 16
    oversample, min_labelled  which boxes are drawn (`draw_window`)
    positions     add where a token lies in its scan to what the decoder sees (`token_places`)
    standardise   tokens minus their mean, by their deviation, both of training cases
    loss          "ce", or "ce+dice": soft Dice of the classes that a step's boxes hold is added, which small organs need

    VoxelFM's head: decoder="resize", width=64, num_blocks=3, upscale=14, oversample=0, min_labelled=.15, positions=False,
    standardise=False, loss="ce"; 727,094 weights for 118 outputs at token width 864.
    """

    sees: ClassVar[Literal["vectors", "tokens"]] = "tokens"
    tasks: ClassVar[tuple[Task, ...]] = ("segmentation",)

    def __init__(
        self,
        task: Task = "segmentation",
        *,
        seed: int = 0,
        seeds: int = 5,
        learning_rates: tuple[float, ...] = (5e-3, 1.5e-2),
        epochs: int = 8,
        min_steps: int = 800,
        batch_size: int = 2,
        optimiser: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 0.01,
        schedule: Literal["constant", "cosine"] = "cosine",
        clip: float | None = None,
        num_classes: int | None = None,
        decoder: Literal["patch", "resize"] = "patch",
        width: int = 32,
        num_blocks: int = 2,
        upscale: int | None = None,
        window: tuple[int, int, int] | None = None,
        oversample: float = 1 / 3,
        min_labelled: float = 0.0,
        positions: bool = True,
        standardise: bool = True,
        loss: Literal["ce", "ce+dice"] = "ce+dice",
        max_floats: int = 64_000_000,
        device: str = "cpu",
    ) -> None:
        self.task, self.seed, self.seeds, self.learning_rates = task, seed, seeds, learning_rates
        self.epochs, self.min_steps, self.batch_size = epochs, min_steps, batch_size
        self.optimiser, self.weight_decay, self.schedule, self.clip = optimiser, weight_decay, schedule, clip
        self.num_classes, self.decoder, self.width, self.num_blocks = num_classes, decoder, width, num_blocks
        self.upscale, self.window, self.oversample, self.min_labelled = upscale, window, oversample, min_labelled
        self.positions, self.standardise, self.loss = positions, standardise, loss
        self.max_floats, self.device = max_floats, device

    def fit(
        self,
        X: TokenSequence,
        y: Sequence[Volume],
        groups: Array | None = None,
        validation: Validation | None = None,
    ) -> Self:
        self._check(X, y)
        self.n_features_in_, self.planar_ = X.width, bool(X.outline(0).planar)
        self.num_classes_ = self.num_classes or max(int(one.voxels.max()) for one in y)
        if self.num_classes_ < 1:
            raise ValueError("segmentation needs at least one labelled voxel in the training cases; found none")
        self.upscale_ = self.upscale or self._voxels_of_a_token(X, y)
        self.centre_, self.spread_ = self._moments(X)
        train, refit = np.arange(len(X)), False
        X_val, y_val = (X, y) if validation is None else validation
        if validation is None:
            train, held = hold_out(np.zeros(len(X)), "regression", groups, self.seed)
            if len(held):
                X_val, y_val, refit = X[held], [y[int(n)] for n in held], True
        network = self._network()
        with tempfile.TemporaryDirectory(prefix="hilum-truth-") as folder:
            own, judge = self._truths(folder, "train", X, y), self._truths(folder, "validation", X_val, y_val)
            held_data = self._held_data(X_val, judge)
            fitted = self._fit_lanes(network, self._drawn(X, own, train), held_data, tuple(self.learning_rates), None)
            self.learning_rate_, self.epoch_, self.scores_ = fitted.learning_rate, fitted.epoch, fitted.scores
            if refit:
                data = self._drawn(X, own, np.arange(len(X)))
                fitted = self._fit_lanes(network, data, None, (fitted.learning_rate,), fitted.epoch)
        self.weights_ = fitted.weights
        return self

    def _check(self, X: TokenSequence, y: Sequence[Volume]) -> None:
        check_task(self)
        known = self.loss in ("ce", "ce+dice") and self.decoder in ("patch", "resize")
        if len(y) != len(X) or not known or not len(X):
            raise UsageError(
                f"expected a label map for each of {len(X)} cases (at least one), loss ce or ce+dice, decoder patch or "
                f"resize; found {len(y)}, {self.loss}, {self.decoder}"
            )

    def _truths(self, folder: str, name: str, X: TokenSequence, y: Sequence[Volume]) -> Truths:
        place = Path(folder) / name
        place.mkdir()
        return Truths(place, X, y, self._finer, self.num_classes_)

    def _fit_lanes(
        self, network: ModuleNetwork, data: Data, held: "_Held | None", rates: tuple[float, ...], stop: int | None
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
            lanes_at_once=self._lanes_at_once(),
        )
        return fit_lanes(
            network,
            data,
            None if held is None else held.data,
            settings,
            loss=lambda out, _: self._loss(*out),
            summarise=lambda out, _: _overlaps(*out),
            score=lambda parts, pieces: torch.zeros(0) if held is None else held.score(parts, pieces),
            stop=stop,
            device=self.device,
            progress=self.progress,
        )

    def _loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """(M,) of some boxes: logits (M, B, C, K, J, I), truth (B, K, J, I)."""
        inside, wanted = truth >= 0, truth.clamp(min=0)
        logs = functional.log_softmax(logits, 2)
        losses = -logs.gather(2, wanted[None, :, None].expand(len(logits), -1, 1, -1, -1, -1))[:, :, 0]
        loss = (losses * inside).sum((1, 2, 3, 4)) / inside.sum().clamp(min=1)
        if self.loss == "ce":
            return loss
        shares = logs.exp()[:, :, 1:] * inside[:, None]
        one_hot = functional.one_hot(wanted, logits.shape[2]).permute(0, 4, 1, 2, 3)[:, 1:] * inside[:, None]
        both, true = (shares * one_hot).sum((1, 3, 4, 5)), one_hot.sum((0, 2, 3, 4))
        dice = (2 * both + 1) / (shares.sum((1, 3, 4, 5)) + true + 1)
        return loss + ((1 - dice) * (true > 0)).sum(1) / (true > 0).sum().clamp(min=1)

    @property
    def _finer(self) -> Grid:
        return (1 if self.planar_ else self.upscale_, self.upscale_, self.upscale_)

    @property
    def _window(self) -> Grid:
        return self.window or WINDOWS[self.planar_]

    def _voxels_of_a_token(self, X: TokenSequence, y: Sequence[Volume]) -> int:
        """Median over axes and some training cases, at most what the decoder can put out for one token."""
        found = []
        for n in np.unique(np.linspace(0, len(X) - 1, 8).astype(int)):
            steps = np.linalg.solve(y[int(n)]._affine("a label map")[:3, :3], X.outline(int(n)).affine[:3, :3])
            found += np.linalg.norm(steps, axis=0)[1 if self.planar_ else 0 :].tolist()
        room = (MOST_OUTPUTS / (self.num_classes_ + 1)) ** (1 / (2 if self.planar_ else 3))
        return int(np.clip(round(float(np.median(found))), 1, max(1, min(int(room), MOST_UPSCALE))))

    def _moments(self, X: TokenSequence) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and deviation (D,) of the tokens of up to MOMENT_CASES training cases, one case in memory at a time."""
        if not self.standardise:
            return np.zeros(X.width, np.float32), np.ones(X.width, np.float32)
        count, total, squares = 0, np.zeros(X.width), np.zeros(X.width)
        for n in np.unique(np.linspace(0, len(X) - 1, MOMENT_CASES).astype(int)):
            tokens = X[int(n)].tokens.astype(np.float32)
            count += len(tokens)
            total += tokens.sum(0, dtype=np.float64)
            squares += np.einsum("ld,ld->d", tokens, tokens, dtype=np.float64)
        mean = total / count
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return mean.astype(np.float32), np.where(spread > 1e-6, spread, 1).astype(np.float32)

    def _network(self) -> ModuleNetwork:
        channels = self.n_features_in_ + (PLACES if self.positions else 0)
        sizes = (channels, self.width, self.num_blocks, self.num_classes_ + 1, self._finer)
        make = (
            (lambda: PatchDecoder(*sizes)) if self.decoder == "patch" else (lambda: ResizeDecoder(*sizes, self.planar_))
        )
        return _WithTruth(make, lambda module, batch: module(batch.tokens))

    def _lanes_at_once(self) -> int:
        """So that what one lane makes of a step fits: some six copies of its finest maps."""
        cells = self.batch_size * math.prod(scaled(self._window, self._finer))
        channels = self.num_classes_ + 1 + (0 if self.decoder == "patch" else self.width)
        return int(np.clip(self.max_floats / (6 * cells * channels), 1, self.seeds * len(self.learning_rates)))

    def _drawn(self, X: TokenSequence, truths: Truths, cases: NDArray[Any]) -> Data:
        """Boxes that are drawn anew in each epoch; number n is of case n mod cases."""
        steps = max(math.ceil(len(cases) / self.batch_size), math.ceil(self.min_steps / self.epochs))
        num, epochs = steps * self.batch_size, iter(range(self.epochs))

        def size_of(number: int) -> Grid:
            return fitting(truths.grids[cases[number % len(cases)]], self._window)

        def plan(order: Sequence[int], batch_size: int) -> list[list[list[int]]]:
            first = next(epochs) * num
            batches = [[first + n for n in order[start : start + batch_size]] for start in range(0, num, batch_size)]
            return [_same_size(batch, lambda n: size_of(n - first)) for batch in batches]

        def box(number: int) -> tuple[Window, NDArray[Any]]:
            rng = np.random.default_rng((self.seed, number))
            case = int(cases[number % num % len(cases)])
            return draw_window(rng, truths, case, size_of(number % num), self.oversample, self.min_labelled)

        return Data(num=num, plan=plan, read=lambda pieces: self._read(X, pieces, box))

    def _held_data(self, X: TokenSequence, truths: Truths) -> "_Held":
        """Boxes side by side that cover each case."""
        windows = [w for n, g in enumerate(truths.grids) for w in tiles(n, g, fitting(g, self._window), overlap=False)]

        def plan(order: Sequence[int], batch_size: int) -> list[list[list[int]]]:
            batches = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
            return [_same_size(batch, lambda n: windows[n].size) for batch in batches]

        def box(number: int) -> tuple[Window, NDArray[Any]]:
            return windows[number], truths.cut(truths.read(windows[number].case), windows[number])

        data = Data(num=len(windows), plan=plan, read=lambda pieces: self._read(X, pieces, box))
        return _Held(data, [w.case for w in windows])

    def _read(self, X: TokenSequence, pieces: Sequence[Sequence[int]], box: Any) -> Iterator[Boxes]:
        """The next boxes are read while these are used."""

        def one(piece: Sequence[int]) -> Boxes:
            found = [box(n) for n in piece]
            truth = torch.from_numpy(np.stack([labels for _, labels in found]).astype(np.int64))
            return Boxes(self._tokens(X, [window for window, _ in found]), truth.to(self.device))

        with ThreadPoolExecutor(1, thread_name_prefix="boxes") as reader:
            coming = reader.submit(one, pieces[0])
            for following in range(1, len(pieces) + 1):
                boxes = coming.result()
                if following < len(pieces):
                    coming = reader.submit(one, pieces[following])
                yield boxes

    def _tokens(self, X: TokenSequence, windows: Sequence[Window]) -> Tensor:
        """(B, D, k, j, i) of boxes of one size: what the decoder sees."""
        parts = []
        for window in windows:
            tokens = (X.box(window.case, window.start, window.size).astype(np.float32) - self.centre_) / self.spread_
            channels = [np.moveaxis(tokens, -1, 0)]
            if self.positions:
                channels.append(token_places(X.outline(window.case), window.start, window.size))
            parts.append(np.concatenate(channels))
        return torch.from_numpy(np.stack(parts)).to(self.device)

    def _maps(self, X: TokenSequence, number: int) -> Iterator[Tensor]:
        """Logits of a case (s, C, K, J, I), some seeds at a time: means over overlapping boxes, weighted by a tent."""
        network, grid = self._network(), X.outline(number).grid
        finer, size = scaled(grid, self._finer), fitting(grid, self._window)
        weights = torch.from_numpy(tent(scaled(size, self._finer))).to(self.device)
        classes = self.num_classes_ + 1
        together = int(np.clip(self.max_floats / (math.prod(finer) * classes), 1, self.seeds))
        windows = list(tiles(number, grid, size, overlap=True))
        for first in range(0, self.seeds, together):
            lanes = {n: w[first : first + together].to(self.device) for n, w in self.weights_.items()}
            count = min(together, self.seeds - first)
            total = torch.zeros(count, classes, *finer, device=self.device)
            share = torch.zeros(finer, device=self.device)
            for start in range(0, len(windows), self.batch_size):
                some = windows[start : start + self.batch_size]
                boxes = Boxes(self._tokens(X, some), weights)
                with torch.no_grad():
                    logits = network.outputs(lanes, boxes, None)[0]
                for n, window in enumerate(some):
                    k, j, i = (slice(f, f + d) for f, d in zip(scaled(window.start, self._finer), weights.shape))
                    total[..., k, j, i] += logits[:, n] * weights
                    share[k, j, i] += weights
            yield total / share

    def _cells(self, X: TokenSequence) -> Iterator[tuple[Iterator[Tensor], FloatArray]]:
        """`_maps` of each case, and the affine of their grid."""
        check_is_fitted(self)
        for number in range(len(X)):
            case = X.outline(number)
            if X.width != self.n_features_in_ or bool(case.planar) != self.planar_:
                raise ContractError("these tokens are of another width or kind than the head was fitted on")
            yield self._maps(X, number), finer_affine(case.affine, case.grid, scaled(case.grid, self._finer))

    def segment(self, X: TokenSequence, scans: Sequence[Volume]) -> Iterator[Volume]:
        """One label map for each case on the grid of its scan: the class of the largest mean probability over seeds."""
        for (maps, affine), scan in zip(self._cells(X), scans, strict=True):
            mean = sum((part.softmax(1).sum(0, keepdim=True) for part in maps), start=torch.zeros(()))
            labels = np.zeros(scan.shape, np.uint8 if self.num_classes_ < 256 else np.uint16)
            for planes, part in on_scan(mean, affine, scan):
                labels[planes] = part[0].argmax(0).cpu().numpy()
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
        for (maps, affine), truth in zip(self._cells(X), y, strict=True):
            counts = []
            for logits in maps:
                labels = np.zeros((len(logits), *truth.shape), np.uint16)
                for planes, part in on_scan(logits, affine, truth):
                    labels[:, planes] = part.argmax(1).cpu().numpy()
                counts += [count_classes(truth, found, self.num_classes_) for found in labels]
            rows.append(counts)
        return np.array(rows, np.float64).transpose(1, 0, 2)

    def _outputs(self, X: Any) -> Array:
        return self.outputs(X)

    def predict(self, X: TokenSequence) -> Any:
        """UsageError: a class map needs the grid of its scan."""
        raise UsageError("a class map needs the grid of its scan; call segment(X, scans)")


class _WithTruth(ModuleNetwork):
    """Outputs go with the labels of their boxes."""

    def outputs(self, weights: Any, batch: Boxes, draws: Any) -> tuple[Tensor, Tensor]:
        return super().outputs(weights, batch, draws), batch.truth


@dataclass(frozen=True, eq=False)
class _Held:
    """Validation boxes, and the case of each."""

    data: Data
    cases: list[int]

    def score(self, parts: list[Any], pieces: list[list[int]]) -> Tensor:
        """(M,) Dice of the overlaps (M, B, classes, 3) per case and class that is there or predicted, averaged."""
        found = torch.cat(parts, 1).double()
        case = torch.tensor([self.cases[n] for piece in pieces for n in piece], device=found.device)
        sums = found.new_zeros(len(found), max(self.cases) + 1, *found.shape[2:]).index_add(1, case, found)
        true, here, both = sums.unbind(-1)
        defined = (true + here) > 0
        dice = 2 * both / (true + here).clamp(min=1)
        return (dice * defined).sum((1, 2)) / defined.sum((1, 2)).clamp(min=1)


def _same_size(numbers: Sequence[int], size_of: Any) -> list[list[int]]:
    """Boxes of one size side by side: the pieces of a step."""
    found: dict[Grid, list[int]] = {}
    for n in numbers:
        found.setdefault(size_of(n), []).append(n)
    return list(found.values())


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
    """(M, B, classes, 3): true, predicted and shared cells of each box, without the background."""
    lanes, boxes, classes = logits.shape[:3]
    found, inside = logits.argmax(2), truth >= 0
    cell = truth.clamp(min=0) * classes + found
    first = torch.arange(lanes * boxes, device=logits.device).reshape(lanes, boxes, 1, 1, 1) * classes**2
    flat = (cell + first)[inside.expand_as(found)]
    pairs = torch.bincount(flat, minlength=lanes * boxes * classes**2).reshape(lanes, boxes, classes, classes)
    both = pairs.diagonal(dim1=2, dim2=3)
    return torch.stack([pairs.sum(3), pairs.sum(2), both], -1)[:, :, 1:]
