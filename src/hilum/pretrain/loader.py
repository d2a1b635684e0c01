"""Sample numbers → batches. What a batch holds depends on its sample numbers only.

Worker processes read and draw. On a CPU they render, too; for a GPU they send slices as stored and numbers, and the GPU
makes the pixels (`render.py`). Crops of volumes (`volume_loader.Crops`) are rendered by the workers everywhere: what they
show of a volume is less than the volume.
"""

import signal
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hilum.archive.store.store import Store
from hilum.encode.contract import Contract
from hilum.errors import HilumError, UsageError, WorkerDied
from hilum.pretrain.masks import sample_mask_counts
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.render import Raw, Source, pack, render
from hilum.pretrain.sampling import (
    Sampler,
    count_slices,
    draw_weighted,
    enough_anatomy,
    modality_weights,
    sample_rng,
)
from hilum.pretrain.views import View, sample_points, sample_views

CPU = torch.device("cpu")
READ_AHEAD = 2  # batches that a worker makes before they are asked for

_T = TypeVar("_T", "Batch", "DrawnBatch", Raw)


@dataclass(frozen=True)
class Batch:
    """Some samples as pixels; crops are laid out all first globals, then all second ones, and so on.

    globals   (G·B, 1, S, S), or (G·B, 1, Z, Y, X) of volumes
    locals    (L·B, 1, s, s), or of volumes, or None without local crops
    masks     (G·B, N) bool; batches of whole mask groups all hide the same number of patches
    hidden    (M,) their numbers in masks.flatten(), found on the CPU since a GPU that is asked for them has to be waited for
    points    (G, B, P, 2 or 3) places ((z,) y, x in fractions of the crop) that all global crops show; NaN without one
    foreground, num_rejected   mean share of anatomy in the crops; crops drawn again, per view
    gram      (G·B, 1, gram_px, gram_px) the global crops, intensity unchanged, for the Gram teacher; None without one
    """

    globals: Tensor
    locals: Tensor | None
    masks: Tensor
    hidden: Tensor
    points: Tensor
    foreground: float
    num_rejected: float
    gram: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return _to(self, device)

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader, so that the copy to the device does not wait."""
        return _pin(self)


@dataclass(frozen=True)
class DrawnBatch:
    """A batch before its pixels are made: slices as stored, views as numbers; the rest as in `Batch`.

    sizes      side of the global and of the local crops
    with_gram  whether its step is held to an anchor, which wants crops of its own
    """

    raw: Raw
    sizes: tuple[int, int]
    with_gram: bool
    masks: Tensor
    hidden: Tensor
    points: Tensor
    foreground: float
    num_rejected: float

    def to(self, device: torch.device) -> "DrawnBatch":
        return replace(_to(self, device), raw=_to(self.raw, device))

    def pin_memory(self) -> "DrawnBatch":
        """Called by the DataLoader, so that the copy to the device does not wait."""
        return replace(_pin(self), raw=_pin(self.raw))


def _to(record: _T, device: torch.device) -> _T:
    tensors: Any = {n: v.to(device, non_blocking=True) for n, v in vars(record).items() if isinstance(v, Tensor)}
    return replace(record, **tensors)


def _pin(record: _T) -> _T:
    tensors: Any = {n: v.pin_memory() for n, v in vars(record).items() if isinstance(v, Tensor)}
    return replace(record, **tensors)


@dataclass(frozen=True)
class Drawn:
    """One sample: which slice, its stored pixels, the views drawn of it, and places that its global crops share."""

    key: str
    z: int
    source: Source
    views: list[View]
    points: NDArray[np.float32]


class Samples(Protocol):
    """What batches are made of: `Slices`, or `volume_loader.Crops`.

    device_renders  whether a GPU makes the pixels of what is drawn; else the workers always do
    """

    recipe: Recipe
    device_renders: bool

    def draw_batch(self, first_sample: int, count: int) -> Any:
        """Samples first, first + 1, … as numbers; all of them belong to one step."""

    def render_batch(self, drawn: Any) -> Batch:
        """Their pixels."""


class Slices:
    """The training slices of a store, by sample number."""

    device_renders = True

    def __init__(self, store: Store, recipe: Recipe, contract: Contract) -> None:
        self.store, self.recipe, self.contract = store, recipe, contract
        counts = count_slices(store, recipe.views.min_image_foreground)
        weights = modality_weights(store, recipe.sampling)
        self.sampler = Sampler(counts, weights, recipe.sampling.volume_power, recipe.run.seed)
        self.num_slices = int(counts.sum())
        self._enough = enough_anatomy(recipe.views.min_image_foreground)

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {"num_slices": self.num_slices}

    def __len__(self) -> int:
        return self.recipe.run.steps

    def __getitem__(self, step: int) -> Batch:
        """The whole batch of a step."""
        size = self.recipe.run.batch_size
        return self.make_batch(step * size, size)

    def sizes(self, sample: int) -> tuple[int, int]:
        """Side of the global and of the local crops at the step that a sample belongs to."""
        spec, run = self.recipe.views, self.recipe.run
        if not spec.resolutions:
            return spec.global_px, spec.local_px
        weights = [weight for *_, weight in spec.resolutions]
        return spec.resolutions[draw_weighted(weights, run.seed, 4, sample // run.batch_size)][:2]

    def draw(self, sample: int) -> Drawn:
        """Read the slice of a sample number and draw its views."""
        volume, number = self.sampler[sample]
        row = self.store.rows[volume]
        z = int(np.flatnonzero(self._enough[np.frombuffer(row.foreground, np.uint8)])[number])
        stored, content = self.store.read_stored_slice(row.key, z)
        spec, objective, sizes = self.recipe.views, self.recipe.objective, self.sizes(sample)
        py, px = self.recipe.model.patch
        grid = sizes[0] // py, sizes[0] // px
        rng = sample_rng(self.recipe.run.seed, sample)
        counts = sample_mask_counts(sample, grid[0] * grid[1], spec, self.recipe.run.seed)
        views = sample_views(rng, content, row.unit, spec, sizes, grid, counts)
        num_points = objective.patch_points if objective.patch_weight else 0
        points = sample_points(rng, content.grid, views[: spec.num_global], num_points)
        return Drawn(row.key, z, Source(stored, row.slope, row.intercept, row.unit), views, points)

    def draw_batch(self, first_sample: int, count: int) -> DrawnBatch:
        """Samples first, first + 1, … as numbers and stored slices."""
        drawn = [self.draw(sample) for sample in range(first_sample, first_sample + count)]
        views = [view for d in drawn for view in d.views]
        sizes, step = self.sizes(first_sample), first_sample // self.recipe.run.batch_size
        empty = np.zeros((sizes[0] // self.recipe.model.patch[0], sizes[0] // self.recipe.model.patch[1]), bool)
        each = [d.views[n].mask for n in range(self.recipe.views.num_global) for d in drawn]
        masks = torch.from_numpy(np.stack([empty if m is None else m for m in each])).flatten(1)
        return DrawnBatch(
            raw=pack([d.source for d in drawn], [d.views for d in drawn], self.contract),
            sizes=sizes,
            with_gram=bool(self.recipe.objective.gram_weight) and step >= self.recipe.gram_steps[0],
            masks=masks,
            hidden=masks.flatten().nonzero()[:, 0],
            points=torch.from_numpy(np.stack([d.points for d in drawn], 1)),
            foreground=float(np.mean([view.foreground for view in views])),
            num_rejected=float(np.mean([len(view.rejected) for view in views])),
        )

    def render_batch(self, drawn: DrawnBatch) -> Batch:
        """Make the pixels, on the device where the batch lives."""
        num = self.recipe.views.num_global
        first = drawn.raw.select(slice(num))
        parts = {"globals": (first, drawn.sizes[0])}
        if self.recipe.views.num_local:
            parts["locals"] = drawn.raw.select(slice(num, None)), drawn.sizes[1]
        if drawn.with_gram:
            parts["gram"] = first.plain(), self.recipe.objective.gram_px
        crops = render(drawn.raw, list(parts.values()), self.contract)
        made = {name: c.flatten(0, 1) for name, c in zip(parts, crops)}
        return Batch(
            globals=made["globals"],
            locals=made.get("locals"),
            masks=drawn.masks,
            hidden=drawn.hidden,
            points=drawn.points,
            foreground=drawn.foreground,
            num_rejected=drawn.num_rejected,
            gram=made.get("gram"),
        )

    def make_batch(self, first_sample: int, count: int) -> Batch:
        """Samples first, first + 1, … as pixels on the CPU. All of them belong to one step."""
        return self.render_batch(self.draw_batch(first_sample, count))

    def render_alone(self, drawn: Drawn) -> list[NDArray[np.float32]]:
        """The crops (size, size) of one sample, for pictures."""
        raw = pack([drawn.source], [drawn.views], self.contract)
        parts = [(raw.select(slice(n, n + 1)), view.size_px) for n, view in enumerate(drawn.views)]
        return [crop[0, 0, 0].numpy() for crop in render(raw, parts, self.contract)]


class _MicroBatches(Dataset[Batch | DrawnBatch | HilumError]):
    """What one rank is fed, micro-batch by micro-batch. An error of ours comes back as a value, to be raised whole."""

    def __init__(self, samples: Samples, rank: int, world: int, accumulate: int, render: bool) -> None:
        self.samples, self.rank, self.world, self.accumulate, self.render = samples, rank, world, accumulate, render

    def __getitem__(self, number: int) -> Batch | DrawnBatch | HilumError:
        step, micro = divmod(number, self.accumulate)
        size = self.samples.recipe.run.batch_size
        count = size // (self.accumulate * self.world)
        first = step * size + (micro * self.world + self.rank) * count
        try:
            drawn: DrawnBatch = self.samples.draw_batch(first, count)
            return self.samples.render_batch(drawn) if self.render else drawn
        except HilumError as error:
            return error


def batches(
    samples: Samples,
    start_step: int,
    *,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    device: torch.device = CPU,
    offset: int = 0,
) -> Generator[Batch, None, None]:
    """The micro-batches of one rank from a step on, made ahead by worker processes. Close it to end them.

    rank, world  this rank takes every world-th micro-batch
    accumulate   micro-batches of a rank in a step: micro-batch a of step s is the b = B / (accumulate · world) samples
                 from s·B + (a·world + rank)·b on
    device       where the batches are wanted; a GPU makes the pixels itself
    offset       steps by which the data are ahead, after roll-backs

    Raises UsageError when B cannot be divided so, WorkerDied when a worker is ended from outside.
    """
    run = samples.recipe.run
    if run.batch_size % (world * accumulate):
        raise UsageError(
            f"run.batch_size {run.batch_size} cannot be shared by {world} ranks with {accumulate} micro-batches each; "
            f"make it a multiple of {world * accumulate}"
        )
    loader = DataLoader(
        _MicroBatches(samples, rank, world, accumulate, _rendered_by_workers(samples, device)),
        batch_size=None,
        sampler=range((start_step + offset) * accumulate, (run.steps + offset) * accumulate),
        num_workers=run.num_workers,
        prefetch_factor=READ_AHEAD if run.num_workers else None,
        worker_init_fn=_begin_worker,
        pin_memory=device.type == "cuda",
    )
    before = signal.getsignal(signal.SIGCHLD)
    stream: Any = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGCHLD, before
        )  # torch would raise wherever the program is; asking it for a batch raises, too
    try:
        while (made := _next_batch(stream)) is not None:
            if isinstance(made, HilumError):
                raise made
            yield made.to(device) if isinstance(made, Batch) else samples.render_batch(made.to(device))
    finally:  # now, not when nobody refers to them any more: an exception may do so until the program ends, and workers that
        if run.num_workers:  # ignore SIGTERM (`_begin_worker`) would never let it end
            stream._shutdown_workers()


def _next_batch(stream: Iterator[Any]) -> Batch | DrawnBatch | HilumError | None:
    """None after the last; WorkerDied when a worker was ended from outside."""
    try:
        return next(stream, None)
    except (RuntimeError, EOFError, ConnectionError) as error:  # the last two: it died while it handed a batch over
        if isinstance(error, RuntimeError) and not _tells_of_a_death(error):
            raise
        raise WorkerDied(
            f"a process that makes training data was ended from outside ({error or 'while it handed a batch over'}). Most "
            "often memory ran out: lower run.num_workers (each holds up to three batches), then run the same command "
            "again to go on"
        ) from None


def _tells_of_a_death(error: RuntimeError) -> bool:
    """Whether torch's loader says so."""
    return "exited unexpectedly" in str(error) or "is killed by signal" in str(error)


def _rendered_by_workers(samples: Samples, device: torch.device) -> bool:
    """A CPU's pixels are made by the workers; a GPU makes those of slices itself, which as stored are less to send."""
    return device.type == "cpu" or not samples.device_renders


def _begin_worker(_: int) -> None:
    """One thread: there are as many workers as cores. Ctrl-C, `timeout` and batch systems signal every process of a run, but
    only the loop acts on it: it still needs its workers, and ends them itself."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
