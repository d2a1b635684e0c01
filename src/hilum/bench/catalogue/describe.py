"""The tasks and data sets as text: the second half of docs/tasks.md, which a test keeps equal to this."""

from hilum.bench.catalogue.tasks import DATASETS, suite_tasks
from hilum.bench.check import layout_lines
from hilum.bench.task import Dataset, Task

_TITLES = {
    "curiabench-2d": "CuriaBench, 2D track",
    "curiabench-3d": "CuriaBench, 3D track",
    "curiabench-hub": "CuriaBench, as its authors ship it",
    "voxelfm": "VoxelFM",
}


def catalogue() -> str:
    """Markdown: a table for each suite, then the rules of each task, then each data set with its layout."""
    parts = ["## The tasks"]
    for suite, title in _TITLES.items():
        rows = "\n".join(_row(task) for task in suite_tasks(suite))
        head = "| task | what | data set | kind, unit | metric | classes |\n| --- | --- | --- | --- | --- | --- |"
        parts += [f"### {title}: `{suite}`", f"{head}\n{rows}"]
    parts.append("## Labels, splits and our choices")
    for suite in ("curiabench-2d", "curiabench-3d", "voxelfm"):
        parts += [_rules(task) for task in suite_tasks(suite)]
    parts += ["## The data sets", *(_dataset(dataset) for dataset in DATASETS.values())]
    return "\n\n".join(parts) + "\n"


def _row(task: Task) -> str:
    name = task.id.partition(":")[2]
    classes = len(task.classes) or ""
    return f"| `{name}` | {task.title} | {task.dataset} | {task.kind}, {task.unit} | {task.metric} | {classes} |"


def _rules(task: Task) -> str:
    lines = [f"**`{task.id}`** {task.title}.", f"*Label:* {task.label_rule}.", f"*Split:* {task.split_rule}."]
    if task.our_choice:
        lines.append(f"*Our choice:* {task.our_choice}.")
    return "  \n".join(lines)


def _dataset(dataset: Dataset) -> str:
    layout = "\n".join(f"    {line}" for entry in layout_lines(dataset) for line in entry.splitlines())
    return f"### {dataset.name}\n\n{dataset.title}. Licence: {dataset.licence}. {dataset.url}\n\n{layout}"
