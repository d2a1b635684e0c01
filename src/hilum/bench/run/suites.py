"""Which tasks a run is about, and where their cases come from: published data sets, the phantom, a user's own TOML files."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from hilum.bench.catalogue.tasks import SUITES, TASKS, suite_tasks
from hilum.bench.datasets import dataset_folder, read_cases
from hilum.bench.own_tasks import read_own_task
from hilum.bench.phantom.tasks import PHANTOM_TASKS, read_phantom
from hilum.bench.splits import split_cases
from hilum.bench.task import Found, Task
from hilum.errors import UsageError
from hilum.terminal import Progress, few

TRACKS = {"2d": "curiabench-2d", "3d": "curiabench-3d", "voxelfm": "voxelfm", "phantom": "phantom"}


Asked = Task | Path
"""A task, or the TOML file of one's own (`hilum.bench.own_tasks`)."""


def choose_tasks(suite: str = "", ids: Sequence[str] = ()) -> tuple[Asked, ...]:
    """All tasks of a suite (or track: 2d, 3d, voxelfm, phantom), and those named. UsageError for unknown ones.

    ids  of tasks, or paths of TOML files
    """
    chosen: list[Asked] = []
    if suite:
        name = TRACKS.get(suite, suite)
        chosen += PHANTOM_TASKS if name == "phantom" else suite_tasks(name)
        if not chosen:
            known = dict.fromkeys((*TRACKS, *SUITES))
            raise UsageError(
                f"no suite '{suite}'; expected {', '.join(known)}. Their tasks: hilum bench list --suite NAME"
            )
    known_tasks = {task.id: task for task in all_tasks()}
    for name in ids:
        if name.endswith(".toml"):
            chosen.append(Path(name))
        elif name in known_tasks:
            chosen.append(known_tasks[name])
        else:
            raise UsageError(_unknown_task(name, list(known_tasks)))
    if not chosen:
        raise UsageError(f"no task chosen; expected --suite ({', '.join(TRACKS)}) or --task ID. All: hilum bench list")
    return tuple(dict.fromkeys(chosen))


def _unknown_task(name: str, known: list[str]) -> str:
    """What to say of a name that no task has: tasks that hold its last part, that resemble it, or that share its suite."""
    suite, _, last = name.lower().rpartition(":")
    suite = TRACKS.get(suite, suite)
    if TRACKS.get(last, last) in {*TRACKS.values(), *SUITES}:
        return f"no task '{name}'; that is a suite: --suite {last}"
    near = [one for one in known if last and last in one.lower()]
    near += [*get_close_matches(name, known), *(one for one in known if one.startswith(f"{suite}:"))]
    suites = ", ".join(dict.fromkeys((*TRACKS, *SUITES)))
    meant = f"did you mean {few(dict.fromkeys(near), 8)}?" if near else f"suites are {suites}."
    return f"no task '{name}'; {meant} All of them: hilum bench list"


def all_tasks() -> tuple[Task, ...]:
    """Every task that ships with hilum."""
    return (*PHANTOM_TASKS, *TASKS.values())


def read_task(
    task: Task, root: Path, *, seed: int = 0, cache: Path | None = None, progress: Progress | None = None
) -> Found:
    """The cases of a task, each with its split: the publisher's, else a seeded one by patient."""
    if task.suite == "phantom":
        return read_phantom(task, root)
    found = read_cases(root, task, progress=progress, cache=cache)
    return Found(cases=split_cases(task, found.cases, seed=seed), problems=found.problems)


def open_task(
    asked: Asked, root: Path, *, seed: int = 0, cache: Path | None = None, progress: Progress | None = None
) -> tuple[Task, Found]:
    """As `read_task`, and the task itself: of a TOML file it is known only now."""
    if not isinstance(asked, Path):
        return asked, read_task(asked, root, seed=seed, cache=cache, progress=progress)
    task, found = read_own_task(asked, root, progress=progress)
    return task, Found(cases=split_cases(task, found.cases, seed=seed), problems=found.problems)


def task_folder(task: Task, root: Path) -> Path:
    """Where the data of a task are looked for."""
    return root / "phantom" if task.suite == "phantom" else dataset_folder(root, task)
