"""Checkpoints: a folder with one safetensors file a rank, holding all that a run needs to go on bit for bit.

Data order, drop path and SigReg's directions follow from the step number, so no random state is stored. The files have the
layout of torch's distributed checkpoints in safetensors (`torch.distributed.checkpoint.HuggingFaceStorageReader` reads
them): every rank writes the rows that it holds, each file says where they belong, and any number of ranks can read them.
torch's default layout has a pickled index, which could run code when a stranger's checkpoint is read; this one has none.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hilum.errors import CheckpointError, HilumError
from hilum.pretrain import ranks
from hilum.pretrain.distill import Learner
from hilum.records import explain_full_disk, read_json, write_json

VERSION = 2
INDEX = "index.json"
OFFSETS = ("DCP_SHARDING_INFO", "saved_offsets")  # torch's names in the metadata of a file

WRITING, FAILED = 1, 2


class CheckpointWriter:
    """Writes checkpoints beside the training, at most one at a time. Use it as a context manager.

    `save` copies this rank's share to host memory, which is the only pause, and a thread writes it to a hidden folder.
    `settle`, called after every step, gives the folder its name once the shares of all ranks are on disk: whenever the run
    is killed, the checkpoints that have a name are whole. All ranks call both at the same steps.
    """

    def __init__(self, folder: Path, recipe_hash: str, keep: int = 2) -> None:
        self.folder, self.recipe_hash, self.keep = folder, recipe_hash, keep
        self._host: dict[str, Tensor] = {}  # pinned when the device is CUDA; used again by every checkpoint
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: BaseException | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread and ranks.num_ranks() == 1:
            self.settle(wait=True)  # whatever ended the run, this checkpoint is good
        elif self._thread:
            self._thread.join()

    def save(self, learner: Learner, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Begin the checkpoint `step-XXXXXXXX`; `step` counts finished steps. Waits for the one before."""
        self.settle(wait=True)
        self._step = step
        share = _share_of_rank(_named_tensors(learner, optimiser))
        self._host = {
            name: self._host[name] if name in self._host else _like_on_host(rows) for name, (rows, _) in share.items()
        }
        for name, (rows, _) in share.items():
            self._host[name].copy_(rows, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        offsets = {name: {OFFSETS[1]: [first, *[0] * rows.ndim][: rows.ndim]} for name, (rows, first) in share.items()}
        self._thread = threading.Thread(target=self._write, args=({"format": "pt", OFFSETS[0]: json.dumps(offsets)},))
        self._thread.start()

    def settle(self, wait: bool = False) -> None:
        """Finish the checkpoint under way if every rank has written its share; with `wait`, see that it is so."""
        if self._thread is None:
            return
        if wait:
            self._thread.join()
        state = WRITING if self._thread.is_alive() else FAILED if self._error else 0
        worst = int(ranks.all_max(torch.tensor(state, device=ranks.device())))
        if worst == WRITING:
            return
        self._thread.join()
        self._thread = None
        if worst == FAILED and ranks.rank() == 0:
            shutil.rmtree(self._hidden(), ignore_errors=True)
        if self._error:
            raise self._error
        if worst == FAILED:
            raise CheckpointError(f"another rank could not write its share of the checkpoint of step {self._step}")
        if ranks.rank() == 0:
            self._publish()
        if wait:
            ranks.all_max(torch.zeros((), device=ranks.device()))  # nobody goes on, or ends, before it has its name

    def _write(self, metadata: dict[str, str]) -> None:
        hidden = self._hidden()
        path = hidden / f"rank-{ranks.rank():05d}-of-{ranks.num_ranks():05d}.safetensors"
        try:
            with explain_full_disk(path):
                hidden.mkdir(parents=True, exist_ok=True)
                save_file(self._host, path, metadata)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        except BaseException as error:  # raised in the training thread by `settle`
            path.unlink(missing_ok=True)
            self._error = error

    def _publish(self) -> None:
        hidden, path = self._hidden(), self.folder / f"step-{self._step:08d}"
        files = sorted(file.name for file in hidden.glob("*.safetensors"))
        if len(files) != ranks.num_ranks():
            raise CheckpointError(
                f"{hidden} has {len(files)} files of {ranks.num_ranks()} ranks; all ranks must see one run folder"
            )
        record = {"format": "hilum-checkpoint", "version": VERSION, "step": self._step}
        write_json(hidden / INDEX, {**record, "recipe_hash": self.recipe_hash, "files": files})
        remove_checkpoint(path)
        os.replace(hidden, path)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            remove_checkpoint(old)

    def _hidden(self) -> Path:
        return self.folder / f".step-{self._step:08d}.tmp"


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run was writing or removing; only for the run that goes on, and on one rank."""
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished)


def remove_checkpoint(path: Path) -> None:
    """Hide, then delete: a kill in between leaves no half checkpoint under a good name."""
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.old")
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint."""
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def read_checkpoint(path: Path, learner: Learner, optimiser: torch.optim.Optimizer, recipe_hash: str) -> int:
    """Restore learner and optimiser, whatever the number of ranks was; returns the number of finished steps.

    Never runs code from the files. Raises CheckpointError for damaged files, another version or another recipe.
    """
    with _explain_damage(path):
        record = _read_index(path)
        if record["recipe_hash"] != recipe_hash:
            raise CheckpointError(
                f"{path} belongs to recipe {record['recipe_hash']}, this run has {recipe_hash}. Choose another output folder"
            )
        chunks = _read_chunks(path, record["files"])
        _expect_optimiser(learner, optimiser, chunks)
        wanted = _named_tensors(learner, optimiser)
        _check_fit(path, wanted, chunks)
        for name, tensor in wanted.items():
            _fill(tensor, chunks[name])
        return int(record["step"])


def read_learner(path: Path) -> tuple[dict[str, Tensor], int]:
    """Weights and buffers of a checkpoint under the names of `Learner`, whole, on the CPU; and the finished steps.

    Raises CheckpointError as `read_checkpoint`.
    """
    with _explain_damage(path):
        record = _read_index(path)
        chunks = _read_chunks(path, record["files"])
        found = {}
        for name, parts in chunks.items():
            if name.startswith("learner."):
                dtype = parts[0].file.get_tensor(name).dtype
                found[name.removeprefix("learner.")] = torch.empty(_whole_shape(parts), dtype=dtype)
                _fill(found[name.removeprefix("learner.")], parts)
        return found, int(record["step"])


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (HilumError, SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}). Remove it to go on from the one before"
        ) from error


def _read_index(path: Path) -> dict[str, Any]:
    found: Any = {"version": 1} if path.is_file() else read_json(path / INDEX)  # version 1 was one file
    version = found.get("version") if isinstance(found, dict) else type(found).__name__
    if version != VERSION:
        raise CheckpointError(f"{path} has checkpoint version {version}; this hilum reads version {VERSION}")
    assert isinstance(found, dict)
    return found


# ---- what is stored, and where its rows belong


def _named_tensors(learner: Learner, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments by name; under FSDP a DTensor stands for the rows that each rank has of it."""
    tensors: dict[str, Tensor] = {f"learner.{name}": tensor for name, tensor in learner.state_dict().items()}
    for name, parameter in learner.student.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{name}.{key}"] = value
    return tensors


def _share_of_rank(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """What this rank writes, and the number of its first row: its rows of sharded tensors, and of the copies that all ranks
    have about an equal part."""
    share: dict[str, tuple[Tensor, int]] = {}
    load = [0] * ranks.num_ranks()
    for name, tensor in sorted(tensors.items()):
        rows, first = ranks.local_rows(tensor)
        if ranks.is_sharded(tensor):
            mine = len(rows) > 0
        else:
            writer = load.index(min(load))
            load[writer] += max(tensor.nbytes, 1)
            mine = writer == ranks.rank()
        if mine:
            share[name] = rows.detach(), first
    return share


def _like_on_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)


class _Chunk(NamedTuple):
    """Rows first … first + shape[0] of a tensor, in a file."""

    file: Any
    name: str
    first: int
    shape: tuple[int, ...]


def _read_chunks(path: Path, files: list[str]) -> dict[str, list[_Chunk]]:
    chunks: dict[str, list[_Chunk]] = {}
    for file_name in files:
        if Path(file_name).name != file_name:
            raise ValueError(f"'{file_name}' is no file of this folder")
        file: Any = safe_open(path / file_name, framework="pt")
        offsets = json.loads(file.metadata()[OFFSETS[0]])
        for name in file.keys():  # noqa: SIM118
            shape = tuple(file.get_slice(name).get_shape())
            first = int(offsets[name][OFFSETS[1]][0]) if shape else 0
            chunks.setdefault(name, []).append(_Chunk(file, name, first, shape))
    return chunks


def _expect_optimiser(learner: Learner, optimiser: torch.optim.Optimizer, chunks: dict[str, list[_Chunk]]) -> None:
    """Give the optimiser empty moments for the parameters that have some in the checkpoint."""
    optimiser.state.clear()
    for name, parameter in learner.student.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"optimiser.{name}.{key}" in chunks:
                empty = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                optimiser.state[parameter][key] = empty.detach()


def _check_fit(path: Path, wanted: dict[str, Tensor], chunks: dict[str, list[_Chunk]]) -> None:
    found = {name: _whole_shape(parts) for name, parts in chunks.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    wrong = [
        f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise CheckpointError(f"{path} does not fit this recipe: {'; '.join(wrong[:5])}")


def _whole_shape(parts: list[_Chunk]) -> tuple[int, ...]:
    """The shape of the tensor that the chunks make. ValueError when rows are missing or there twice."""
    rows = 0
    for part in sorted(parts, key=lambda p: p.first):
        if part.first != rows:
            raise ValueError(
                f"rows {min(rows, part.first)} to {max(rows, part.first)} of {part.name} are not there once"
            )
        rows += part.shape[0] if part.shape else 1
    return (rows, *parts[0].shape[1:]) if parts[0].shape else ()


@torch.no_grad()
def _fill(tensor: Tensor, parts: list[_Chunk]) -> None:
    """Copy the rows that this rank holds."""
    local, first = ranks.local_rows(tensor)
    if not local.ndim:
        local.copy_(parts[0].file.get_tensor(parts[0].name))
        return
    for part, begin, end in _overlaps(parts, first, first + len(local)):
        local[begin - first : end - first] = part.file.get_slice(part.name)[begin - part.first : end - part.first]


def _overlaps(parts: list[_Chunk], first: int, last: int) -> Iterator[tuple[_Chunk, int, int]]:
    for part in parts:
        begin, end = max(first, part.first), min(last, part.first + part.shape[0])
        if begin < end:
            yield part, begin, end
