"""The training loop, to be read from top to bottom.

A run folder explains itself: run.json (recipe, versions, device, store, status), metrics.jsonl (one line a step),
tensorboard/, checkpoints/, export/. The same command on the same folder goes on where it stopped.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from hilum.archive.store.store import Store
from hilum.encode.contract import Contract
from hilum.encode.encoder import pick_device, write_encoder
from hilum.errors import CheckpointError, Interrupted, TrainingDiverged
from hilum.pretrain.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from hilum.pretrain.distill import Learner, StepResult
from hilum.pretrain.health import feature_health
from hilum.pretrain.loader import Batch, Slices, batches
from hilum.pretrain.optim import clip_gradients, make_optimiser, momentum, set_schedules
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.start import check_start, initialise
from hilum.records import explain_full_disk, machine, read_json, versions, write_json, write_text
from hilum.settings import differences, to_dict
from hilum.terminal import Progress

MAX_BAD_STEPS = 10  # consecutive non-finite losses before giving up


def contract_of(recipe: Recipe) -> Contract:
    """What the exported encoder will expect: the sizes and the normalisation it was trained with."""
    return Contract(size_px=recipe.views.global_px)


def pretrain(
    recipe: Recipe, data: str | Path, out: str | Path, *, device: str = "auto", progress: Progress | None = None
) -> dict[str, Any]:
    """Pre-train on a store; begins, goes on, or finds the run finished.

    recipe    see `hilum.pretrain.recipe`
    data      a store made by `prepare`
    out       run folder
    device    "auto" takes a CUDA device when there is one
    returns   the record in run.json

    Raises CheckpointError when `out` holds another recipe's or store's run, TrainingDiverged when the loss stays
    non-finite, Interrupted after SIGINT or SIGTERM (with a checkpoint written).
    """
    store, out = Store(data), Path(out)
    torch_device = pick_device(device)
    record = _open_run(out, recipe, store, torch_device)
    if record["status"] == "finished":
        return record
    contract = contract_of(recipe)
    slices = Slices(store, recipe, contract)
    torch.manual_seed(recipe.run.seed)
    learner = Learner(recipe).to(torch_device)
    optimiser = make_optimiser(learner.student, recipe)
    recipe_hash, start = record["recipe_hash"], 0
    if found := last_checkpoint(out / "checkpoints"):
        check_start(recipe, record)
        start = read_checkpoint(found, learner, optimiser, recipe_hash)
    else:
        record["start"] = initialise(learner, recipe)
        write_json(out / "run.json", record)

    stop = _StopSignal()
    with stop, _Log(out, start) as log, contextlib.closing(batches(slices, start, device=torch_device)) as stream:
        bad_steps = 0
        for step, batch in enumerate(stream, start):
            began = time.perf_counter()
            line = train_step(learner, optimiser, batch, step)
            bad_steps = bad_steps + 1 if "skipped" in line else 0
            log.write(line, seconds=time.perf_counter() - began)
            if progress:
                progress(step + 1, recipe.run.steps, f"pre-training, loss {line['loss']:.3f}")
            if bad_steps >= MAX_BAD_STEPS:
                raise TrainingDiverged(_explain_divergence(step, learner))
            finished = step + 1
            if finished % recipe.run.checkpoint_every == 0 or finished == recipe.run.steps or stop.signal:
                log.flush()
                write_checkpoint(out / "checkpoints", learner, optimiser, finished, recipe_hash)
            if stop.signal and finished < recipe.run.steps:
                raise Interrupted(_explain_stop(stop.signal, finished, recipe), 128 + stop.signal)
    facts = {"recipe": recipe.name, "step": recipe.run.steps, "recipe_hash": recipe_hash, "store_hash": store.hash}
    if record.get("start"):
        facts["start"] = record["start"]["summary"]
    write_encoder(out / "export", learner.teacher_backbone(), contract, facts)
    record |= {"status": "finished", "contract": contract.hash, "num_slices": slices.num_slices}
    write_json(out / "run.json", record)
    return record


def train_step(learner: Learner, optimiser: torch.optim.AdamW, batch: Batch, step: int) -> dict[str, Any]:
    """One whole step; returns its line of metrics.jsonl. A step whose numbers are not finite changes no weight."""
    result = _forward(learner, batch, step)
    updated = _update(learner, optimiser, learner.recipe, result, step)
    line: dict[str, Any] = {"step": step, "loss": float(result.loss.detach())}
    line |= updated or {"skipped": 1}
    line |= {name: float(value.detach()) for name, value in result.parts.items()}
    line |= {"foreground": batch.foreground, "num_rejected": batch.num_rejected}
    if updated and step % learner.recipe.run.health_every == 0:
        line |= feature_health(result.features)
    return line


def _forward(learner: Learner, batch: Batch, step: int) -> StepResult:
    learner.train()
    bf16 = learner.recipe.run.precision == "bf16"
    with torch.autocast(batch.globals.device.type, torch.bfloat16, enabled=bf16):
        result: StepResult = learner(batch, step)
    return result


def _update(
    learner: Learner, optimiser: torch.optim.AdamW, recipe: Recipe, result: StepResult, step: int
) -> dict[str, float] | None:
    """Backward, clip, step, teacher. Returns what is worth a line in the log.

    When the loss or a gradient is not finite, nothing is updated and None comes back.
    """
    if not bool(torch.isfinite(result.loss)):
        return None
    lr = set_schedules(optimiser, recipe, step)
    optimiser.zero_grad(set_to_none=True)
    result.loss.backward()  # type: ignore[no-untyped-call]
    norms = clip_gradients(learner.student, recipe.optimiser.clip)
    if not all(bool(torch.isfinite(norm)) for norm in norms.values()):
        return None
    optimiser.step()
    learner.update_teacher(momentum(recipe, step), step)
    return {"lr": lr, **{f"grad_{name}": float(norm) for name, norm in norms.items()}}


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
    """The record of a new run, or of the one that `out` holds when recipe and store are the same."""
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
    if (out / "run.json").is_file():
        found: dict[str, Any] = read_json(out / "run.json")
        if found.get("recipe_hash") != record["recipe_hash"]:
            changed = differences(found.get("recipe", {}), to_dict(recipe))
            raise CheckpointError(
                f"{out} holds a run of another recipe ({'; '.join(changed[:5])}); choose a new folder"
            )
        if found.get("store_hash") != store.hash:
            raise CheckpointError(
                f"{out} holds a run on another store ({found.get('store_hash')}); choose a new folder"
            )
        return found
    write_json(out / "run.json", record)
    return record


class _StopSignal:
    """Remembers SIGINT or SIGTERM, so that the loop can stop after a whole step. A second one stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
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
            self.file: IO[str] = open(self.path, "a", encoding="utf-8")
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
