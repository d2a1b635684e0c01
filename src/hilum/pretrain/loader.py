"""Sample number → slice, views, pixels. Stateless: the order of data depends on the seed and on nothing else.

Sample n of a run is slice π(n mod N) of epoch ⌊n/N⌋, where π is a keyed permutation of the N training slices. Workers,
restarts and batch composition cannot change it, and resuming needs one integer.
"""

import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hilum.archive.store.content import SliceContent
from hilum.archive.store.store import Store
from hilum.encode.contract import Contract, normalise_slice
from hilum.errors import StoreError
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.render import render
from hilum.pretrain.views import View, mask_counts, sample_points, sample_rng, sample_views

_ROUNDS = 6


def permute(position: int, length: int, key: int) -> int:
    """The place of `position` in a keyed permutation of range(length): a Feistel network with cycle walking."""
    half = max((length - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for number in range(_ROUNDS):
            # the multiply-xorshift finaliser of MurmurHash3, keyed by round
            mixed = (right + key * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCD) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 33)) & low)
        position = (left << half) | right
        if position < length:
            return position


@dataclass(frozen=True)
class Batch:
    """One step's input; crops are laid out all first globals, then all second ones, and so on.

    globals   (G·B, 1, S, S)
    locals    (L·B, 1, s, s), or None without local crops
    masks     (G·B, N) bool; the number of hidden patches is the same in every batch
    points    (G, B, P, 2) places (y, x in fractions of the crop) that all global crops of a slice show; NaN without one
    gram      (G·B, 1, P, P) the global crops without change of intensity for Gram anchoring, or None
    foreground, num_rejected   mean share of anatomy in the crops; crops drawn again, per view
    """

    globals: Tensor
    locals: Tensor | None
    masks: Tensor
    points: Tensor
    foreground: float
    num_rejected: float
    gram: Tensor | None = None

    @property
    def num_slices(self) -> int:
        return self.points.shape[1]

    def to(self, device: torch.device) -> "Batch":
        tensors = {n: v.to(device, non_blocking=True) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Drawn:
    """One slice of a batch: pixels (1, Y, X), the views drawn of it, and places that its global crops share."""

    image: Tensor
    views: list[View]
    points: NDArray[np.float32]


class Slices(Dataset[Batch]):
    """The training slices of a store; item `step` is the whole batch of that step."""

    def __init__(self, store: Store, recipe: Recipe, contract: Contract) -> None:
        self.store, self.recipe, self.contract = store, recipe, contract
        self.volume, self.slice = training_slices(store, recipe.views.min_image_foreground)
        py, px = recipe.model.patch
        self.grid = (recipe.views.global_px // py, recipe.views.global_px // px)

    def __len__(self) -> int:
        return self.recipe.run.steps

    def read(self, sample: int) -> tuple[Tensor, SliceContent, str]:
        """Slice of a sample number: normalised pixels (1, Y, X), content, key of its volume."""
        epoch, position = divmod(sample, len(self.volume))
        index = permute(position, len(self.volume), self.recipe.run.seed * 1_000_003 + epoch)
        row = self.store.rows[self.volume[index]]
        pixels, content = self.store.read_slice(row.key, int(self.slice[index]))
        return normalise_slice(pixels, row.unit, self.contract), content, row.key

    def draw(self, step: int) -> Iterator[Drawn]:
        """The slices of a step and what is drawn of each."""
        spec, run = self.recipe.views, self.recipe.run
        counts = mask_counts(
            spec.num_global * run.batch_size, self.grid[0] * self.grid[1], spec, sample_rng(run.seed + 1, step)
        )
        for place in range(run.batch_size):
            sample = step * run.batch_size + place
            image, content, _ = self.read(sample)
            rng = sample_rng(run.seed, sample)
            views = sample_views(rng, content, spec, self.grid, counts[place :: run.batch_size])
            points = sample_points(rng, content.grid, views[: spec.num_global], self.recipe.objective.patch_points)
            yield Drawn(image, views, points)

    def __getitem__(self, step: int) -> Batch:
        drawn = list(self.draw(step))
        crops = [render(d.image, d.views, self.contract.resampling) for d in drawn]
        num_global, num_views = self.recipe.views.num_global, len(crops[0])
        empty = np.zeros(self.grid, bool)
        masks = [d.views[n].mask for n in range(num_global) for d in drawn]
        views = [view for d in drawn for view in d.views]
        return Batch(
            globals=torch.stack([c[n] for n in range(num_global) for c in crops]),
            locals=torch.stack([c[n] for n in range(num_global, num_views) for c in crops])
            if num_views > num_global
            else None,
            masks=torch.from_numpy(np.stack([empty if m is None else m for m in masks])).flatten(1),
            points=torch.from_numpy(np.stack([d.points for d in drawn], 1)),
            foreground=float(np.mean([view.foreground for view in views])),
            num_rejected=float(np.mean([len(view.rejected) for view in views])),
        )


def training_slices(store: Store, min_foreground: float) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Volume number and slice number of every slice with enough anatomy. StoreError when none has."""
    volumes, slices = [], []
    enough = np.arange(256) / 255 >= min_foreground
    best = 0.0
    for volume, number, level in store.foreground():
        keep = enough[level]
        volumes.append(volume[keep])
        slices.append(number[keep])
        best = max(best, int(level.max()) / 255)
    if not any(map(len, slices)):
        raise StoreError(
            f"no slice of {store.root} has {min_foreground:.0%} anatomy; the best of {len(store)} volumes has {best:.0%}. "
            "Lower it with --set views.min_image_foreground=..."
        )
    return np.concatenate(volumes), np.concatenate(slices)


def batches(slices: Slices, start: int) -> Generator[Batch, None, None]:
    """The batches of steps start, start + 1, …, made ahead by worker processes. Close it to end them."""
    loader = DataLoader(
        slices,
        batch_size=None,
        sampler=range(start, len(slices)),
        num_workers=slices.recipe.run.num_workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


def _ignore_signals(_: int) -> None:
    """Ctrl-C, `timeout` and batch systems signal every process of a run. Only the loop acts on it: it still needs these
    workers, and ends them itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
