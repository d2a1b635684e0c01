"""The training loop, to be read from top to bottom.

A run folder explains itself: run.json (recipe, versions, device, store, status), metrics.jsonl (one line a step),
tensorboard/, checkpoints/, export/. The same command on the same folder goes on where it stopped.

On several ranks (docs/distributed.md) every one runs this loop in step with the others; the first alone writes, checkpoints
apart, of which each writes its share.
"""

import contextlib
import ctypes
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from torch import Tensor
from torch.optim import AdamW

from hilum.archive.store.isotropic import is_isotropic
from hilum.archive.store.store import Store
from hilum.encode.contract import Contract
from hilum.encode.encoder import AnyContract, write_encoder
from hilum.encode.released.golden import write_golden
from hilum.encode.vit import ViT
from hilum.encode.volume_contract import VolumeContract
from hilum.encode.zoo import open_folder
from hilum.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    CheckpointError,
    Interrupted,
    TrainingDiverged,
    UsageError,
)
from hilum.pretrain import ranks
from hilum.pretrain.checkpoint import CheckpointWriter, clear_unfinished, last_checkpoint, read_checkpoint
from hilum.pretrain.distill import Learner, StepResult
from hilum.pretrain.loader import Batch, Samples, Slices, batches
from hilum.pretrain.optim import clip_gradients, make_optimiser, momentum, set_schedules
from hilum.pretrain.parallel import Replica, joined
from hilum.pretrain.recipe import Recipe, Run
from hilum.pretrain.start import check_start, initialise
from hilum.pretrain.volume_loader import Crops
from hilum.pretrain.watch.diagnose import Diagnosis
from hilum.pretrain.watch.health import feature_health
from hilum.pretrain.watch.monitor import Monitor
from hilum.pretrain.watch.online import read_labelled
from hilum.pretrain.watch.rescue import Events, act
from hilum.records import explain_full_disk, machine, read_json, versions, write_json, write_text
from hilum.settings import differences, to_dict
from hilum.terminal import Progress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MAX_BAD_STEPS = 10  # consecutive non-finite losses before giving up

Watch = Callable[[dict[str, Any], Sequence[Diagnosis]], None]
"""Called after each step with its log line, and with what is wrong when that was looked at."""


def contract_of(recipe: Recipe) -> AnyContract:
    """What the exported encoder will expect: the sizes and the normalisation it was trained with."""
    if not recipe.is_3d:
        return Contract(size_px=recipe.views.global_px)
    volumes, (z, y, x) = recipe.volumes, recipe.model.patch
    weights = {"CT": recipe.sampling.ct, "MR": recipe.sampling.mr, "OT": recipe.sampling.other}
    return VolumeContract(
        modalities=tuple(name for name, weight in weights.items() if weight),
        clip_hu=volumes.clip_hu,
        min_spacing_mm=volumes.min_spacing_mm,
        max_patches=volumes.max_patches,
        patch=(z, y, x),
        mean=volumes.mean,
        std=volumes.std,
        pooling="class+mean",
    )


def training_samples(store: Store, recipe: Recipe) -> Slices | Crops:
    """What a recipe trains on. UsageError when the store is not made for it."""
    contract = contract_of(recipe)
    if isinstance(contract, VolumeContract):
        return Crops(store, recipe, contract)
    if is_isotropic(store):
        raise UsageError(
            f"recipe {recipe.name} trains on slices, and {store.root} holds volumes cut to the body and resampled: its encoder "
            "would expect slices that no scan has. Give the store that it was made of, or a recipe for volumes"
        )
    return Slices(store, recipe, contract)


def pretrain(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    labels: str | Path | None = None,
    target: str | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Pre-train on a store; begins, goes on, or finds the run finished.

    recipe    see `hilum.pretrain.recipe`
    data      a store made by `prepare`
    out       run folder
    device    "auto" takes a CUDA device when there is one
    labels    table whose column `target` an online probe predicts as training goes on; changes no weight
    watch     called after each step with its log line and the verdict
    returns   the record in run.json

    Raises CheckpointError when `out` holds another recipe's or store's run, TrainingDiverged when the loss stays
    non-finite or the run collapses, Interrupted after SIGINT, SIGTERM or SIGUSR1 (with a checkpoint written). What all ranks
    meet alike is raised on the first; the others raise SystemExit with its exit code.
    """
    if (labels is None) != (target is None):
        raise UsageError("an online probe needs both: labels= (a table) and target= (its column to predict)")
    store, out = Store(data), Path(out)
    with joined(device) as own_device:
        if own_device.type == "cpu":
            keep_freed_memory()
        _check_shares(recipe.run)
        record = ranks.on_first(lambda: _open_run(out, recipe, store, own_device))
        if record["status"] == "finished":
            return record
        samples = training_samples(store, recipe)
        record |= samples.facts
        labelled = None
        if labels is not None and target is not None:
            shown = samples if isinstance(samples, Crops) else samples.contract
            labelled = read_labelled(store, shown, Path(labels), target)
        rolled_back = True
        while rolled_back:
            replica, optimiser, start = _take_up(recipe, record, out, own_device)
            monitor = Monitor(recipe, replica.learner, optimiser, samples, out, own_device, labelled)
            rolled_back = _train(replica, optimiser, monitor, start, *((progress, watch) if ranks.rank() == 0 else ()))
        weights = replica.teacher_weights()
        if ranks.rank() == 0:
            record |= {"status": "finished", "contract": samples.contract.hash}
            _export(out, recipe, samples.contract, record, weights)
            write_json(out / "run.json", record)
        return record


def _take_up(recipe: Recipe, record: dict[str, Any], out: Path, device: torch.device) -> tuple[Replica, AdamW, int]:
    """The newest checkpoint, or the first weights of a new run; and the number of finished steps."""
    torch.manual_seed(recipe.run.seed)
    learner = Learner(recipe).to(device)
    found = ranks.on_first(lambda: _find_checkpoint(out))
    if found:
        check_start(recipe, record)
    else:
        record["start"] = initialise(learner, recipe)
        if ranks.rank() == 0:
            write_json(out / "run.json", record)
    replica = Replica(learner, recipe.run)
    optimiser = make_optimiser(learner.student, recipe)
    return replica, optimiser, read_checkpoint(found, learner, optimiser, recipe.hash) if found else 0


def _train(
    replica: Replica, optimiser: AdamW, monitor: Monitor, start: int, progress: Progress | None = None,
    watch: Watch | None = None,
) -> bool:  # fmt: skip
    """All steps from `start`, with checkpoints; True when an earlier checkpoint has to be taken up instead.

    Every rank runs this; only the first has a log.
    """
    recipe, out, samples = monitor.recipe, monitor.out, monitor.samples
    log = _Log(out, start) if ranks.rank() == 0 else None
    stop, events = _StopSignal(), Events(out)
    saver = CheckpointWriter(out / "checkpoints", recipe.hash)
    offset = ranks.on_first(lambda: events.resume(start))
    stream = _steps(samples, start, monitor.device, offset)
    with stop, log or contextlib.nullcontext(), saver, contextlib.closing(stream):
        monitor.restore(read_lines(out / "metrics.jsonl") if log else ())
        bad_steps, ended = 0, time.perf_counter()
        for step, parts in enumerate(stream, start):
            began = time.perf_counter()
            line = train_step(replica, optimiser, parts, step)
            seconds = time.perf_counter() - began
            bad_steps = bad_steps + 1 if "skipped" in line else 0
            line |= monitor.observe(step, line, seconds, began - ended)
            verdict = monitor.verdict()
            if log:
                log.write(line, seconds=seconds)
            if watch:
                watch(line, verdict)
            if progress:
                progress(step + 1, recipe.run.steps, f"pre-training, loss {line['loss']:.3f}")
            if bad_steps >= MAX_BAD_STEPS:
                saver.settle(wait=True)
                raise ranks.agreed(TrainingDiverged(_explain_divergence(step, replica.learner)))
            if monitor.looks(step) and act(verdict, events, recipe, saver):
                return True
            finished = step + 1
            stopped = stop.anywhere()
            saver.settle()
            if finished % recipe.run.checkpoint_every == 0 or finished == recipe.run.steps or stopped:
                if log:
                    log.flush()
                saver.save(replica.learner, optimiser, finished)
            if stopped and finished < recipe.run.steps:
                saver.settle(wait=True)
                raise ranks.agreed(Interrupted(_explain_stop(stopped, finished, recipe), _EXIT_CODES[stopped]))
            ended = time.perf_counter()
        saver.settle(wait=True)
    return False


def keep_freed_memory() -> None:
    """On Linux, let a CPU run keep what it frees. Each step asks for the same gigabytes again; given back to the system and
    fetched anew, page by page, they cost a fifth of the step (docs/log.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc's; others have none
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def train_step(replica: Replica, optimiser: AdamW, batches: Sequence[Batch], step: int) -> dict[str, Any]:
    """One whole step; returns its line of metrics.jsonl, averaged over ranks and micro-batches.

    batches  this rank's micro-batches

    A step whose loss or gradient is not finite, on any rank, changes no weight on all of them.
    """
    learner, recipe = replica.learner, replica.learner.recipe
    learner.train()
    lr = set_schedules(optimiser, recipe, step)
    optimiser.zero_grad(set_to_none=True)
    results = []
    for number, batch in enumerate(batches, 1):
        with replica.holding_back(number < len(batches)):
            result = _forward(replica, batch, step)
            # One rank's NaN becomes every rank's when gradients are averaged, so all skip the step without asking.
            scale = torch.where(result.loss.detach().isfinite(), 1 / len(batches), torch.nan)
            (result.loss * scale).backward()  # type: ignore[no-untyped-call]
            results.append(replace(result, loss=result.loss.detach()))
    norms = clip_gradients(learner.student, recipe.optimiser.clip)
    updated = all(map(math.isfinite, norms.values()))
    if updated:
        optimiser.step()
        learner.update_teacher(momentum(recipe, step), step)
    line: dict[str, Any] = {"step": step, **_averages(results, batches)}
    line |= {"lr": lr, **{f"grad_{name}": norm for name, norm in norms.items()}} if updated else {"skipped": 1}
    if updated and step % recipe.run.health_every == 0:
        line |= feature_health(torch.cat([result.features for result in results]))  # of this rank's samples
    return line


def _forward(replica: Replica, batch: Batch, step: int) -> StepResult:
    bf16 = replica.learner.recipe.run.precision == "bf16"
    with torch.autocast(batch.globals.device.type, torch.bfloat16, enabled=bf16):
        return replica.forward(batch, step)


def _averages(results: Sequence[StepResult], batches: Sequence[Batch]) -> dict[str, float]:
    """Loss, its parts and facts of the crops: means over micro-batches and ranks, all in one message."""
    rows = [{"loss": result.loss, **result.parts} for result in results]
    names = list(dict.fromkeys(name for row in rows for name in row))  # a micro-batch may lack a part, on all ranks
    learnt = torch.stack([torch.stack([row[name].double() for row in rows if name in row]).mean() for name in names])
    crops = torch.tensor([[b.foreground, b.num_rejected] for b in batches], dtype=torch.float64).mean(0)
    means = ranks.all_mean(torch.cat([learnt, crops.to(learnt.device)]))
    return dict(zip([*names, "foreground", "num_rejected"], means.tolist()))


def _check_shares(run: Run) -> None:
    share = ranks.num_ranks() * run.accumulate
    if run.batch_size % share:
        raise ranks.agreed(
            UsageError(
                f"run.batch_size {run.batch_size} cannot be shared by {ranks.num_ranks()} ranks × {run.accumulate} "
                f"micro-batches; choose a multiple of {share}"
            )
        )


def _steps(samples: Samples, start: int, device: torch.device, offset: int) -> Generator[list[Batch], None, None]:
    """This rank's micro-batches of steps start, start + 1, …, on the device; the data are `offset` steps ahead."""
    accumulate = samples.recipe.run.accumulate
    share = {"rank": ranks.rank(), "world": ranks.num_ranks(), "accumulate": accumulate}
    with contextlib.closing(batches(samples, start, device=device, offset=offset, **share)) as stream:
        while step := list(itertools.islice(stream, accumulate)):
            yield step


def _find_checkpoint(out: Path) -> Path | None:
    clear_unfinished(out / "checkpoints")
    return last_checkpoint(out / "checkpoints")


def _export(
    out: Path, recipe: Recipe, contract: AnyContract, record: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    """The teacher's backbone as an encoder."""
    facts = {"recipe": recipe.name, "step": recipe.run.steps, "recipe_hash": recipe.hash}
    facts["store_hash"] = record["store_hash"]
    if record.get("start"):
        facts["start"] = record["start"]["summary"]
    backbone = ViT(recipe.model)
    backbone.load_state_dict(weights)
    write_encoder(out / "export", backbone, contract, facts)
    write_golden(open_folder(out / "export"), out / "export")


def _explain_stop(number: signal.Signals, finished: int, recipe: Recipe) -> str:
    return (
        f"stopped by {number.name} after step {finished} of {recipe.run.steps}; checkpoint written. "
        "Run the same command again to go on"
    )


def _explain_divergence(step: int, learner: Learner) -> str:
    poisoned = [name for name, p in learner.student.named_parameters() if not bool(torch.isfinite(p).all())]
    cause = (
        f"weights of {poisoned[0]} are non-finite"
        if poisoned
        else "the weights are finite, the batch or precision is not"
    )
    return (
        f"the loss or its gradient was NaN or infinite for {MAX_BAD_STEPS} steps in a row up to step {step} ({cause}). "
        "No update was made from them. Try --set optimiser.lr= at half its value, or --set run.precision=fp32, in a new folder"
    )


def _open_run(out: Path, recipe: Recipe, store: Store, device: torch.device) -> dict[str, Any]:
    """The record of a new run, or of the one that `out` has begun when recipe and store are the same."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "run.json").is_file())):
        raise CheckpointError(f"{out} is not empty and no run folder; choose a new one")
    record = {
        "format": "hilum-run",
        "version": 1,
        "recipe": to_dict(recipe),
        "recipe_hash": recipe.hash,
        "store_hash": store.hash,
        "versions": versions(),
        "machine": machine(),
        "device": str(device),
        "status": "running",
    }
    if (out / "metrics.jsonl").is_file():  # else nothing was trained yet: a wrong setting or start has ended it
        found: dict[str, Any] = read_json(out / "run.json")
        if found.get("recipe_hash") != record["recipe_hash"]:
            changed = differences(found.get("recipe", {}), to_dict(recipe))
            raise CheckpointError(
                f"{out} holds a run of another recipe ({'; '.join(changed[:5])}: found ≠ asked for); choose a new folder"
            )
        if found.get("store_hash") != store.hash:
            raise CheckpointError(
                f"{out} holds a run on another store ({found.get('store_hash')}); choose a new folder"
            )
        return found
    write_json(out / "run.json", record)
    return record


_EXIT_CODES = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGUSR1: EXIT_TERMINATED,  # what SLURM is asked to send before the time is up
}


class _StopSignal:
    """Remembers a signal, so that the loop can stop after a whole step. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            for number in _EXIT_CODES:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def anywhere(self) -> signal.Signals | None:
        """The signal that any rank has got; all ranks ask after the same step and stop together."""
        found = int(ranks.all_max(torch.tensor(self.signal or 0, device=ranks.device())))
        return signal.Signals(found) if found else None

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


class _Log:
    """metrics.jsonl and TensorBoard; lines of steps that a killed run will do again are dropped."""

    def __init__(self, out: Path, start: int) -> None:
        self.path, self.start = out / "metrics.jsonl", start
        self.tensorboard = out / "tensorboard"

    def __enter__(self) -> "_Log":
        from torch.utils.tensorboard import SummaryWriter

        kept = [line for line in read_lines(self.path) if line["step"] < self.start]
        with explain_full_disk(self.path):
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file: IO[str] = open(self.path, "a", buffering=1, encoding="utf-8")  # line by line, for readers
            self.writer = SummaryWriter(str(self.tensorboard), purge_step=self.start)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.writer.close()

    def write(self, line: dict[str, Any], seconds: float) -> None:
        with explain_full_disk(self.path):
            strict = {name: v if math.isfinite(v) else None for name, v in line.items()}  # NaN is no JSON
            self.file.write(json.dumps({**strict, "seconds": round(seconds, 4)}) + "\n")
            for name, value in line.items():
                if name != "step":
                    self.writer.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        with explain_full_disk(self.path):
            self.file.flush()
            self.writer.flush()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; the last may be cut by a kill."""
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(text)
