"""What a run does about a verdict: note it, stop, or go back to the checkpoint before it went wrong.

events.jsonl keeps what log lines cannot: verdicts and roll-backs. A roll-back removes the checkpoints since the first sign
and skips the slices trained on since; steps, schedules and all else repeat. The skipped slices follow from events.jsonl
alone, so a run that is stopped after a roll-back goes on as it would have.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hilum.errors import TrainingDiverged
from hilum.pretrain import ranks
from hilum.pretrain.checkpoint import CheckpointWriter, remove_checkpoint
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch.diagnose import Diagnosis
from hilum.records import write_text

MAX_ROLL_BACKS = 3


class Events:
    """RUN/events.jsonl: {"kind": "diagnosis" | "roll_back", "step", …}, one a line."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "events.jsonl"

    def read(self) -> list[dict[str, Any]]:
        found = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut by a kill
                    found.append(json.loads(text))
        return found

    def resume(self, start: int) -> int:
        """Drop verdicts of steps that will be done again; those that led to a roll-back stay. Returns `offset`."""
        kept = [e for e in self.read() if e["kind"] == "roll_back" or e["step"] < start or e.get("rolled_back")]
        if self.path.is_file():
            self._write(kept)
        return self.offset

    def note(self, found: Sequence[Diagnosis]) -> None:
        """Write verdicts that are new since the run began or was rolled back."""
        known = {e["name"] for e in self.read() if e["kind"] == "diagnosis" and not e.get("rolled_back")}
        new = [{"kind": "diagnosis", **d.to_dict()} for d in found if d.name not in known]
        if new:
            self._write([*self.read(), *new])

    def roll_back(self, to: int, why: Diagnosis) -> None:
        events = [{**e, "rolled_back": True} if e["kind"] == "diagnosis" else e for e in self.read()]
        record = {"kind": "roll_back", "step": why.step, "to": to, "name": why.name, "skipped": why.step + 1 - to}
        self._write([*events, record])

    @property
    def num_roll_backs(self) -> int:
        return sum(e["kind"] == "roll_back" for e in self.read())

    @property
    def offset(self) -> int:
        """By how many batches the data is ahead of the steps."""
        return sum(e["skipped"] for e in self.read() if e["kind"] == "roll_back")

    def _write(self, events: Sequence[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(event) + "\n" for event in events))


def act(found: Sequence[Diagnosis], events: Events, recipe: Recipe, saver: CheckpointWriter) -> bool:
    """Note verdicts, and stop or roll back when one is fatal. All ranks call it at the same steps; the first one decides.

    saver    finishes a checkpoint under way before one is chosen
    returns  whether the run has to be taken up again at the checkpoint that is now the newest

    Raises TrainingDiverged.
    """
    fatal = ranks.on_first(lambda: _note(found, events))
    if fatal is None or recipe.run.on_collapse == "continue":
        return False
    saver.settle(wait=True)
    if recipe.run.on_collapse == "roll_back" and ranks.on_first(lambda: _roll_back(events, fatal)):
        return True
    raise ranks.agreed(TrainingDiverged(_explain(fatal, recipe)))


def _note(found: Sequence[Diagnosis], events: Events) -> Diagnosis | None:
    events.note(found)
    return next((d for d in found if d.severity == "fatal"), None)


def _roll_back(events: Events, fatal: Diagnosis) -> bool:
    """Remove the checkpoints since the first sign and write it down. False when none is from before, or after three."""
    target = _checkpoint_before(events, fatal)
    if target is None:
        return False
    for path in (events.out / "checkpoints").glob("step-*"):
        if _step(path) > target:
            remove_checkpoint(path)
    events.roll_back(target, fatal)
    return True


def _checkpoint_before(events: Events, fatal: Diagnosis) -> int | None:
    """The newest checkpoint without the first sign; None when there is none, or after three roll-backs."""
    steps = [_step(path) for path in (events.out / "checkpoints").glob("step-*")]
    good = [step for step in steps if step <= fatal.since]
    return max(good) if good and events.num_roll_backs < MAX_ROLL_BACKS else None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _explain(fatal: Diagnosis, recipe: Recipe) -> str:
    tried = ""
    if recipe.run.on_collapse == "roll_back":
        tried = f" No checkpoint from before step {fatal.since} is left, or {MAX_ROLL_BACKS} roll-backs did not help."
    return (
        f"{fatal}.{tried} The run was stopped; its checkpoints are kept. To go on all the same, run the same command with "
        "--set run.on_collapse=continue"
    )
