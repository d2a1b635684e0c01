"""Many small networks at once: seeds × learning rates side by side, over one reading of the data.

A lane is one network: a seed (its first weights and its dropout) and a learning rate. Weights of all lanes are stacked along a
first axis, so one batch, read once, trains them all. Every lane does what it would do alone, except that lanes share the order
in which cases come, drawn from the first seed; this is what lets one stream from disk serve them all.
Axes in names: M lanes, B cases, O outputs.
"""

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hilum.errors import TrainingDiverged, UsageError
from hilum.terminal import Progress

Weights = Mapping[str, Tensor]
Array = NDArray[Any]
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
MOMENTUM = 0.9


class Draws:
    """Dropout of a batch. What is drawn depends on the lane's seed, the epoch and the case alone: not on the other cases in a
    batch, its padding, or which lanes are computed together.

    seeds  (M,) of the lanes
    cases  (B,) numbers of the cases
    """

    def __init__(self, seeds: Sequence[int], epoch: int, cases: Sequence[int], device: str = "cpu") -> None:
        self.device = device
        distinct = sorted(set(seeds))
        self._lane = torch.tensor([distinct.index(seed) for seed in seeds])
        self._streams = [[_generator(seed, epoch, case) for case in cases] for seed in distinct]

    def keep(self, shape: tuple[int, ...], rate: float) -> Tensor:
        """(M, B, *shape): 0 with probability `rate`, else 1 / (1 - rate)."""
        drawn = torch.stack([torch.stack([torch.rand(shape, generator=g) for g in row]) for row in self._streams])
        return self._scaled(drawn, rate)

    def keep_tokens(self, num: int, lengths: Sequence[int], longest: int, rate: float) -> Tensor:
        """(M, B, num, longest) the same for the tokens of each case; padding keeps nothing."""
        drawn = torch.zeros(len(self._streams), len(lengths), num, longest)
        for row, streams in zip(drawn, self._streams):
            for case, generator, length in zip(row, streams, lengths):
                case[:, :length] = torch.rand((num, length), generator=generator)
        return self._scaled(drawn, rate)

    def _scaled(self, drawn: Tensor, rate: float) -> Tensor:
        return ((drawn >= rate).float() / (1 - rate))[self._lane].to(self.device)


class Network(Protocol):
    """What lanes train."""

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """First weights of one lane."""
        ...

    def outputs(self, weights: Weights, batch: Any, draws: Draws | None) -> Any:
        """What all lanes make of a batch.

        weights  each (M, …)
        draws    for dropout; None when it is off
        returns  (M, B, …) or, for heads whose cases differ in form, what the loss takes
        """
        ...


class ModuleNetwork:
    """A torch module without dropout as a network: one call with stacked weights, by `torch.func.vmap`.

    make  builds it, drawing its first weights from torch's global generator
    call  (module, batch) → outputs of one lane
    """

    def __init__(self, make: Callable[[], nn.Module], call: Callable[[Callable[..., Any], Any], Any]) -> None:
        self._make, self._call = make, call
        with torch.random.fork_rng(devices=[]):
            self._module = copy.deepcopy(make()).to("meta")

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return {name: tensor.detach().clone() for name, tensor in self._make().named_parameters()}

    def outputs(self, weights: Weights, batch: Any, draws: Draws | None) -> Any:
        def one(part: dict[str, Tensor]) -> Any:
            return self._call(lambda *inputs: functional_call(self._module, part, inputs), batch)

        return vmap(one)(dict(weights))


@dataclass(frozen=True, kw_only=True)
class LaneSettings:
    """How lanes are trained.

    seeds           one network of each for every learning rate
    learning_rates  the grid
    epochs          passes over the training cases
    batch_size      cases a step
    optimiser       "adamw" (β .9, .999; decoupled decay) or "sgd" (momentum .9; decay added to the gradient)
    weight_decay    of all weights
    schedule        "constant", or "cosine" to 0 over all steps
    clip            longest gradient of a lane, all its weights together; None: no limit
    lanes_at_once   computed together; fewer need less memory, one reading of a batch serves all in any case
    shuffle         a new order of cases each epoch
    """

    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    epochs: int
    batch_size: int
    optimiser: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = None
    lanes_at_once: int = 1_000
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.optimiser not in ("adamw", "sgd") or self.schedule not in ("constant", "cosine"):
            raise UsageError(
                f"optimiser is adamw or sgd, schedule constant or cosine; found {self.optimiser}, {self.schedule}"
            )
        counts = (len(self.seeds), len(self.learning_rates), self.epochs, self.batch_size, self.lanes_at_once)
        if min(counts) < 1:
            raise UsageError("at least one seed, learning rate, epoch, case a batch and lane at once are needed")


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Cases that lanes read.

    plan   order of cases → batches, each a list of pieces: what fits into memory at once
    read   pieces, one after the other → what the network takes
    """

    num: int
    plan: Callable[[Sequence[int], int], list[list[list[int]]]]
    read: Callable[[Sequence[Sequence[int]]], Iterator[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """The lanes that were chosen.

    weights        each (S, …): one learning rate, at one epoch
    learning_rate  the one whose mean over seeds was best on validation
    epoch          at which it was so, counted from 1
    scores         (epochs, learning rates, seeds) on validation, higher is better
    """

    weights: dict[str, Tensor]
    learning_rate: float
    epoch: int
    scores: NDArray[np.float64]


Loss = Callable[[Any, Sequence[int]], Tensor]
Score = Callable[[list[Any], list[list[int]]], Tensor]


class _Stack:
    """Some lanes with their weights and the state of their optimiser."""

    def __init__(self, network: Network, lanes: Sequence[tuple[int, int]], settings: LaneSettings, device: str) -> None:
        self.lanes, self.settings = tuple(lanes), settings
        self.seeds = [settings.seeds[n] for _, n in lanes]
        drawn = {seed: network.init(torch.Generator().manual_seed(seed)) for seed in sorted(set(self.seeds))}
        names = drawn[self.seeds[0]]
        self.weights = {
            n: torch.stack([drawn[s][n] for s in self.seeds]).to(device).requires_grad_(True) for n in names
        }
        self.rates = torch.tensor([settings.learning_rates[rate] for rate, _ in lanes], device=device)
        self.slow = [torch.zeros_like(w, requires_grad=False) for w in self.weights.values()]
        adam = settings.optimiser == "adamw"
        self.squares = [torch.zeros_like(w, requires_grad=False) for w in self.weights.values()] if adam else []
        self.steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step of every lane with its own learning rate times `factor`."""
        settings, self.steps = self.settings, self.steps + 1
        leaves = list(self.weights.values())
        grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        if settings.clip is not None:
            length = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
            scale = (settings.clip / (length + 1e-6)).clamp(max=1.0)
            grads = [g * _per_lane(scale, g) for g in grads]
        for n, (leaf, grad) in enumerate(zip(leaves, grads)):
            rate = _per_lane(self.rates * factor, leaf)
            if settings.optimiser == "adamw":
                leaf.mul_(1 - rate * settings.weight_decay)
                self.slow[n].lerp_(grad, 1 - ADAM_BETAS[0])
                self.squares[n].mul_(ADAM_BETAS[1]).addcmul_(grad, grad, value=1 - ADAM_BETAS[1])
                deep = (self.squares[n] / (1 - ADAM_BETAS[1] ** self.steps)).sqrt_().add_(ADAM_EPS)
                leaf.sub_(self.slow[n] / deep * (rate / (1 - ADAM_BETAS[0] ** self.steps)))
            else:
                self.slow[n].mul_(MOMENTUM).add_(grad + settings.weight_decay * leaf)
                leaf.sub_(self.slow[n] * rate)
            leaf.grad = None


def fit_lanes(
    network: Network,
    train: Data,
    validation: Data | None,
    settings: LaneSettings,
    *,
    loss: Loss,
    score: Score,
    couples_cases: bool = False,
    stop: int | None = None,
    summarise: Callable[[Any, list[int]], Any] = lambda outputs, cases: outputs,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Fitted:
    """Train all lanes, choose a learning rate and an epoch by the mean over seeds of `score` on validation.

    validation     None: the training cases themselves decide
    loss           (outputs, numbers of their cases) → (M,), the mean over these cases
    score          (outputs of every validation piece, their case numbers) → (M,), higher is better
    couples_cases  the loss of a case depends on the others in its batch (Cox). A batch of several pieces is then read twice:
                   once for the outputs of all, once for their gradients
    summarise      (outputs of a validation piece, its cases) → what `score` takes instead, where outputs are large
    stop           end after so many epochs of the schedule and take them, without a choice: one learning rate only
    TrainingDiverged when no learning rate leaves all its seeds finite.
    """
    rates = settings.learning_rates
    lanes = [(rate, seed) for rate in range(len(rates)) for seed in range(len(settings.seeds))]
    groups = [lanes[n : n + settings.lanes_at_once] for n in range(0, len(lanes), settings.lanes_at_once)]
    stacks = [_Stack(network, group, settings, device) for group in groups]
    rng = np.random.default_rng(settings.seeds[0])
    num_steps = math.ceil(train.num / settings.batch_size) * settings.epochs
    scores = np.full((settings.epochs if stop is None else stop, len(rates), len(settings.seeds)), -np.inf)
    kept: dict[int, dict[str, Tensor]] = {}
    done = 0
    for epoch in range(len(scores)):
        order = rng.permutation(train.num) if settings.shuffle else np.arange(train.num)
        batches = train.plan(order.tolist(), settings.batch_size)
        for _ in _epoch(network, train, batches, stacks, loss, couples_cases, epoch, device):
            factor = 0.5 * (1 + math.cos(math.pi * done / num_steps)) if settings.schedule == "cosine" else 1.0
            for stack in stacks:
                stack.step(factor)
            done += 1
            if progress:
                progress(done, num_steps, "training heads")
        if stop is None:
            scores[epoch] = _validate(network, validation or train, stacks, score, settings, summarise)
            _keep_best(scores, epoch, stacks, kept)
    if stop is not None:
        _keep_best(np.zeros((1, 1, len(settings.seeds))), 0, stacks, kept)
        return Fitted(weights=kept[0], learning_rate=rates[0], epoch=stop, scores=scores)
    best = scores.mean(2)
    if not np.isfinite(best).any():
        raise TrainingDiverged(f"no learning rate of {list(rates)} gave finite outputs; give smaller ones")
    epoch, rate = (int(n) for n in np.unravel_index(best.argmax(), best.shape))
    return Fitted(weights=kept[rate], learning_rate=rates[rate], epoch=epoch + 1, scores=scores)


def run_lanes(network: Network, weights: Weights, data: Data, batch_size: int) -> Iterator[tuple[Any, list[int]]]:
    """Outputs of chosen lanes for each piece of all cases in their order, with the numbers of its cases."""
    pieces = [piece for batch in data.plan(range(data.num), batch_size) for piece in batch]
    with torch.no_grad(), closing(_closable(data.read(pieces))) as read:
        for piece in pieces:
            yield network.outputs(weights, next(read), None), piece


def _epoch(
    network: Network,
    data: Data,
    batches: list[list[list[int]]],
    stacks: list[_Stack],
    loss: Loss,
    couples_cases: bool,
    epoch: int,
    device: str,
) -> Iterator[None]:
    """Leave the gradient of each batch in the stacks; yields once a batch."""
    twice = [couples_cases and len(pieces) > 1 for pieces in batches]
    stream = _closable(
        data.read([piece for pieces, again in zip(batches, twice) for piece in pieces * (2 if again else 1)])
    )
    with closing(stream):
        for pieces, again in zip(batches, twice):
            size = sum(len(piece) for piece in pieces)
            slopes: list[Tensor] = []
            if again:
                slopes = _slopes(network, stream, pieces, stacks, loss, epoch, device)
            start = 0
            for piece in pieces:
                batch = next(stream)
                for n, stack in enumerate(stacks):
                    out = network.outputs(stack.weights, batch, Draws(stack.seeds, epoch, piece, device))
                    if again:
                        out.backward(slopes[n][:, start : start + len(piece)])
                    else:
                        (loss(out, piece).sum() * (len(piece) / size)).backward()  # type: ignore[no-untyped-call]
                start += len(piece)
                del batch, out  # before the next is awaited
            yield


def _slopes(
    network: Network,
    stream: Iterator[Any],
    pieces: list[list[int]],
    stacks: list[_Stack],
    loss: Loss,
    epoch: int,
    device: str,
) -> list[Tensor]:
    """For each stack the gradient of a whole batch's loss by its outputs (M, B, O)."""
    outputs: list[list[Tensor]] = [[] for _ in stacks]
    for piece in pieces:
        batch = next(stream)
        with torch.no_grad():
            for stack, parts in zip(stacks, outputs):
                parts.append(network.outputs(stack.weights, batch, Draws(stack.seeds, epoch, piece, device)))
        del batch
    cases = [case for piece in pieces for case in piece]
    slopes = []
    for parts in outputs:
        whole = torch.cat(parts, 1).requires_grad_(True)
        slopes.append(torch.autograd.grad(loss(whole, cases).sum(), whole)[0])
    return slopes


def _validate(
    network: Network,
    data: Data,
    stacks: list[_Stack],
    score: Score,
    settings: LaneSettings,
    summarise: Callable[[Any, list[int]], Any],
) -> NDArray[np.float64]:
    """(learning rates, seeds): the score of every lane, all from one reading; -inf where it is not finite."""
    pieces = [piece for batch in data.plan(range(data.num), settings.batch_size) for piece in batch]
    outputs: list[list[Any]] = [[] for _ in stacks]
    found = np.full((len(settings.learning_rates), len(settings.seeds)), -np.inf)
    with torch.no_grad(), closing(_closable(data.read(pieces))) as read:
        for piece in pieces:
            batch = next(read)
            for stack, parts in zip(stacks, outputs):
                parts.append(summarise(network.outputs(stack.weights, batch, None), piece))
            del batch
        for stack, parts in zip(stacks, outputs):
            for (rate, seed), value in zip(stack.lanes, score(parts, pieces).tolist()):
                found[rate, seed] = value if math.isfinite(value) else -np.inf
    return found


def _keep_best(
    scores: NDArray[np.float64], epoch: int, stacks: list[_Stack], kept: dict[int, dict[str, Tensor]]
) -> None:
    """Copy the weights of each learning rate whose mean over seeds is its best so far, seeds in order."""
    means = scores[: epoch + 1].mean(2)
    for rate in range(scores.shape[1]):
        if not np.isfinite(means[epoch, rate]) or means[:, rate].argmax() != epoch:
            continue
        found = {seed: (stack, row) for stack in stacks for row, (r, seed) in enumerate(stack.lanes) if r == rate}
        lanes = [found[seed] for seed in range(scores.shape[2])]
        kept[rate] = {n: torch.stack([s.weights[n][row].detach() for s, row in lanes]) for n in stacks[0].weights}


def _closable(stream: Iterator[Any]) -> Any:
    """A generator over a stream: closing it ends the thread that reads ahead."""
    yield from stream


def _per_lane(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _generator(seed: int, epoch: int, case: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch} {case}".encode()))
