"""`hilum bench check`: what of a task's data is there, what is missing or malformed, and where to get it."""

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hilum.bench.catalogue.published import published_scores
from hilum.bench.catalogue.tasks import DATASETS
from hilum.bench.datasets import dataset_folder, read_cases
from hilum.bench.task import Case, Dataset, Found, Problem, Task
from hilum.errors import EXIT_DONE, EXIT_INPUT_REFUSED, EXIT_SOME_LEFT_OUT
from hilum.terminal import WIDTH, Progress, format_table, wrap_row

_NAME_WIDTH = 44
_KINDS_SHOWN, _PATHS_SHOWN, _CLASSES_SHOWN = 12, 3, 12


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found, and how it is told.

    text       lines of at most 100 columns
    exit_code  0 all is there, 3 nothing can be used, 4 some can
    """

    task: Task
    found: Found
    text: str
    exit_code: int

    @property
    def lost(self) -> int:
        """Cases that something costs."""
        return sum(problem.cases for problem in self.found.problems)


def check_task(task: Task, data_root: Path, *, progress: Progress | None = None, cache: Path | None = None) -> Check:
    """Read a user's folder as a run would, without encoding anything; see `hilum.bench.datasets.read_cases`."""
    return describe(task, read_cases(data_root, task, progress=progress, cache=cache), dataset_folder(data_root, task))


def describe(task: Task, found: Found, folder: Path) -> Check:
    """The report on what was found, also for a user's own task."""
    lost = sum(problem.cases for problem in found.problems)
    if not found.cases:
        code, verdict = EXIT_INPUT_REFUSED, "Nothing can be used."
    elif lost:
        code, verdict = (
            EXIT_SOME_LEFT_OUT,
            f"{_cases(len(found.cases))} can be used, {lost:,} missing or malformed.",
        )
    else:
        code, verdict = EXIT_DONE, f"All {len(found.cases):,} cases can be used."
    parts = [_head(task), f"Folder: {folder}", verdict]
    if found.cases:
        parts.append(_counts(task, found.cases))
    if found.problems:
        parts.append("Problems, and what the rules leave out\n" + "\n".join(_problems(found.problems)))
    if task.dataset in DATASETS and code != EXIT_DONE:
        parts.append(_where_from(task))
    return Check(task=task, found=found, text="\n\n".join(parts) + "\n", exit_code=code)


def _head(task: Task) -> str:
    lines = [_wrap(f"{task.id}: {task.title} ({task.kind} of a {task.unit}, {task.modality}, by {task.metric})", 0)]
    rules = [("label", task.label_rule), ("split", task.split_rule), ("our choice", task.our_choice)]
    lines += [_wrap(f"{name}: {rule}", 2) for name, rule in rules if rule]
    best = {}
    for row in published_scores(task):
        best[row.model] = f"{row.model} {row.score:.3f}"
    if best:
        lines.append(_wrap("published: " + ", ".join(best.values()), 2))
    return "\n".join(lines)


def _counts(task: Task, cases: Sequence[Case]) -> str:
    """Cases and patients of each side, and how many of each class."""
    sides = [side for side in ("train", "val", "test", "") if any(case.split == side for case in cases)]
    rows = []
    for side in sides:
        here = [case for case in cases if case.split == side]
        rows.append([side or "no split (seeded at run)", len(here), len({case.patient for case in here})])
    text = format_table(["side", "cases", "patients"], rows)
    counts: dict[str, Counter[str]] = {side: Counter() for side in sides}
    for case in cases:
        counts[case.split].update(_labels(task, case))
    names = [name for name in (*task.classes, "event", "censored") if any(c[name] for c in counts.values())]
    if not names:
        return text
    shown = (
        sorted(names, key=lambda n: sum(c[n] for c in counts.values()))[:_CLASSES_SHOWN] if len(names) > 16 else names
    )
    table = format_table(
        ["class", *(side or "cases" for side in sides)], [[n, *(counts[s][n] for s in sides)] for n in shown]
    )
    absent = len(task.classes) - len([n for n in names if n in task.classes])
    more = [f"{len(names) - len(shown)} more classes have more cases."] if len(shown) < len(names) else []
    more += [f"{absent} of {len(task.classes)} classes have no case."] if absent > 0 else []
    return "\n\n".join([text, "\n".join([table, *more])])


def _labels(task: Task, case: Case) -> list[str]:
    if task.kind == "classification" and task.classes:
        return [task.classes[int(case.target[0])]]
    if task.kind in ("multilabel", "retrieval"):
        return [name for name, value in zip(task.classes, case.target) if value == 1]
    if task.kind == "survival":
        return ["event" if case.target[1] else "censored"]
    return []


def _problems(problems: Sequence[Problem]) -> list[str]:
    """Like problems together, the costliest first, with the first few paths of each."""
    alike: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        alike[_without_numbers(problem.found), problem.expected].append(problem)
    groups = sorted(alike.values(), key=lambda group: (-group[0].fatal, -sum(p.cases for p in group)))
    lines = []
    for group in groups[:_KINDS_SHOWN]:
        cost = sum(p.cases for p in group)
        count = f"{len(group):,} × " if len(group) > 1 else ""
        said = f", costs {_cases(cost)}" if cost else ""
        lines.append(_wrap(f"{count}{group[0].found}; expected {group[0].expected}{said}", 2))
        lines += [f"      {_short(p.path)}" for p in group[:_PATHS_SHOWN]]
        if len(group) > _PATHS_SHOWN:
            lines.append(f"      and {len(group) - _PATHS_SHOWN:,} more")
    if len(groups) > _KINDS_SHOWN:
        lines.append(f"  and {len(groups) - _KINDS_SHOWN} more kinds of problems")
    return lines


def _cases(number: int) -> str:
    return f"{number:,} case" if number == 1 else f"{number:,} cases"


def _without_numbers(text: str) -> str:
    return "".join(c for c in text if not c.isdigit())


def _short(path: str) -> str:
    room = WIDTH - 6
    return path if len(path) <= room else "…" + path[-room + 1 :]


def _where_from(task: Task) -> str:
    dataset = DATASETS[task.dataset]
    lines = [
        _wrap(f"{dataset.title}", 0),
        _wrap(f"Get it: {dataset.url}", 0),
        _wrap(f"Licence: {dataset.licence}", 0),
        f"Layout of {dataset.name}/, below the folder given by --data, or that folder itself:",
        *layout_lines(dataset),
    ]
    return "\n".join(lines)


def layout_lines(dataset: Dataset) -> list[str]:
    """The files of a data set, one a line, with what they are beside them."""
    lines: list[str] = []
    text = re.sub(r"\n {20,}", " ", textwrap.dedent(dataset.layout).strip())  # a line that goes on
    for line in text.splitlines():
        name, _, what = line.partition("   ")
        lines.append(wrap_row([f"  {name}"], [_NAME_WIDTH], what.strip()))
    return lines


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4), break_on_hyphens=False
    )
