"""The tasks and data sets of the benchmark: two tables of plain data, loaded without torch."""

from hilum.bench.catalogue.curiabench import CURIABENCH, HUB_CONFIGS
from hilum.bench.catalogue.datasets import DATASETS as DATASETS
from hilum.bench.catalogue.voxelfm import VOXELFM
from hilum.bench.task import Task

TASKS: dict[str, Task] = {task.id: task for task in (*CURIABENCH, *HUB_CONFIGS, *VOXELFM)}
SUITES: tuple[str, ...] = tuple(dict.fromkeys(task.suite for task in TASKS.values()))


def suite_tasks(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite, in its publisher's order; none of an unknown one."""
    return tuple(task for task in TASKS.values() if task.suite == suite)
