"""Checkpoints: one file, written atomically, holding all that a run needs to go on bit for bit.

Data order, drop path and SigReg's directions follow from the step number, so no random state is stored.
"""

from pathlib import Path
from typing import Any

import torch

from hilum.errors import CheckpointError
from hilum.pretrain.distill import Learner
from hilum.records import write_atomic

VERSION = 1


def write_checkpoint(
    folder: Path, learner: Learner, optimiser: torch.optim.Optimizer, step: int, recipe_hash: str, keep: int = 2
) -> Path:
    """Write `step-XXXXXXXX.pt` and remove all but the newest `keep`. `step` counts finished steps."""
    path = folder / f"step-{step:08d}.pt"
    record = {
        "version": VERSION,
        "step": step,
        "recipe": recipe_hash,
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    with write_atomic(path) as temporary:
        torch.save(record, temporary)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def last_checkpoint(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*.pt"))
    return found[-1] if found else None


def read_checkpoint(path: Path, learner: Learner, optimiser: torch.optim.Optimizer, recipe_hash: str) -> int:
    """Restore learner and optimiser; returns the number of finished steps. Never runs code from the file.

    Raises CheckpointError for a damaged file, another version or another recipe.
    """
    try:
        record: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets; the cause goes into the message
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}). Remove it to go on from the one before"
        ) from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        found = record.get("version") if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(f"{path} has checkpoint version {found}; this hilum reads version {VERSION}")
    if record["recipe"] != recipe_hash:
        raise CheckpointError(
            f"{path} belongs to recipe {record['recipe']}, this run has {recipe_hash}. Choose another output folder"
        )
    try:
        learner.load_state_dict(record["learner"])
        optimiser.load_state_dict(record["optimiser"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit this recipe: {error}") from None
    return int(record["step"])
