"""Which tasks a run is about, and where their cases come from: published data sets, the phantom, a user's own TOML files."""

from collections.abc import Sequence
from pathlib import Path

from hilum.bench.phantom import PHANTOM_TASKS, read_phantom
from hilum.bench.task import Found, Task
from hilum.errors import UsageError
from hilum.terminal import Progress


def choose_tasks(suite: str = "", ids: Sequence[str] = ()) -> tuple[Task, ...]:
    """All tasks of a suite, and those named. UsageError for unknown ones, listing the known."""
    known = {task.id: task for task in PHANTOM_TASKS}
    chosen = [task for task in known.values() if task.suite == suite]
    for name in ids:
        if name not in known:
            raise UsageError(f"no task '{name}'; known: {', '.join(known)}")
        chosen.append(known[name])
    return tuple(dict.fromkeys(chosen))


def read_task(task: Task, root: Path, progress: Progress | None = None) -> Found:
    """The cases of a task, each with its split."""
    return read_phantom(task, root)
