"""The tasks and data sets of the benchmark: two tables of plain data, loaded without torch."""

from hilum.bench.catalogue.curiabench import CURIABENCH, HUB_CONFIGS
from hilum.bench.catalogue.datasets import DATASETS as DATASETS
from hilum.bench.catalogue.voxelfm import VOXELFM
from hilum.bench.task import Task
from hilum.errors import UsageError

TASKS: dict[str, Task] = {task.id: task for task in (*CURIABENCH, *HUB_CONFIGS, *VOXELFM)}
SUITES: tuple[str, ...] = tuple(dict.fromkeys(task.suite for task in TASKS.values()))


def find_task(name: str) -> Task:
    """A task by its id. UsageError that lists what is close to a name it does not know."""
    if name in TASKS:
        return TASKS[name]
    wanted = name.rpartition(":")[2].lower()
    near = [known for known in TASKS if wanted and wanted in known.lower()] or list(SUITES)
    raise UsageError(f"no task '{name}'; did you mean: {', '.join(near[:8])}? All of them: hilum bench list")


def suite_tasks(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite, in its publisher's order. UsageError for an unknown one."""
    found = tuple(task for task in TASKS.values() if task.suite == suite)
    if not found:
        raise UsageError(f"no suite '{suite}'; expected {', '.join(SUITES)}")
    return found
