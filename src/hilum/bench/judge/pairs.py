"""Several models of one folder, each with each other: paired differences, corrected for all tasks and pairs at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from hilum.bench.judge.compare import ALPHA, TaskComparison, compare_results, correct_together, find_predictions, p_text
from hilum.errors import InputError, UsageError
from hilum.stats import NUM_RESAMPLES
from hilum.terminal import Progress, few, format_table


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of every pair of models; `p_holm` and `better` of a row are corrected for all rows of all pairs.

    pairs     first and second model; in the order given, the later is the first: what a step added is what its row says
    rows      of each pair
    left_out  what could not be compared, with the reason
    """

    models: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    rows: tuple[tuple[TaskComparison, ...], ...]
    left_out: tuple[str, ...]
    num_resamples: int

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.rows))

    def sentences(self) -> list[str]:
        """One a pair: who is better on how many tasks."""
        told = []
        for (first, second), rows in zip(self.pairs, self.rows):
            won, lost = (sum(row.better == side for row in rows) for side in ("first", "second"))
            tasks = "task" if len(rows) == 1 else "tasks"
            told.append(
                f"{first} is better than {second} on {won} of {len(rows)} {tasks}, worse on {lost}, undecided on "
                f"{len(rows) - won - lost} (p < {ALPHA:g} after Holm over {self.num_rows} comparisons)."
            )
        return told

    def table(self) -> str:
        """A line for each task and pair, tasks together, at most 100 columns."""
        letter = dict(zip(self.models, ascii_uppercase))
        setting = any(row.setting for rows in self.rows for row in rows)
        lines = []
        for (first, second), rows in zip(self.pairs, self.rows):
            for row in rows:
                difference = f"{row.difference:+.3f} ({row.low:+.3f}, {row.high:+.3f})"
                pair = f"{letter[first]} − {letter[second]}"
                tests = [p_text(row.p), p_text(row.p_holm), row.num_cases]
                lines.append(
                    [row.task, *[row.setting] * setting, row.metric, pair, row.first, row.second, difference, *tests]
                )
        lines.sort(key=lambda line: (line[0], line[1] if setting else ""))  # pairs keep their order
        columns = [
            "task",
            *["setting"] * setting,
            "metric",
            "pair",
            "first",
            "second",
            "difference (95 %)",
            "p",
            "Holm",
        ]
        table = format_table([*columns, "cases"], lines, whole=("pair", "difference (95 %)", "p", "Holm"))
        return "\n".join([*(f"{letter[model]}: {model}" for model in self.models), "", table])

    def notes(self) -> list[str]:
        return [f"left out: {text}" for text in self.left_out]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"sentences": self.sentences(), "notes": self.notes()}


def compare_models(
    results: Path,
    models: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pairs:
    """Each model of a RESULTS folder with each other, on the cases that both have, by `compare_results`.

    models  at least two, in the order of the story: a later one is judged against the earlier ones
    UsageError for unknown or doubled names; InputError when no pair shares a task.
    """
    if len(models) < 2 or len(set(models)) < len(models) or len(models) > len(ascii_uppercase):
        raise UsageError(f"models {few(models)}; expected two to {len(ascii_uppercase)} different ones")
    for model in models:
        find_predictions(results, {"model": model})
    pairs = tuple((second, first) for first, second in combinations(models, 2))
    rows: list[tuple[TaskComparison, ...]] = []
    left_out: list[str] = []
    for done, (first, second) in enumerate(pairs, 1):
        try:
            found = compare_results(
                results, first_is={"model": first}, second_is={"model": second}, num_resamples=num_resamples, seed=seed
            )
        except (InputError, UsageError) as error:  # no common task, head or protocol: the other pairs go on
            rows.append(())
            left_out.append(f"{first} with {second}: {error}")
            continue
        rows.append(found.tasks)
        left_out += [f"{first} with {second}: {note}".replace(": left out: ", ": ") for note in found.notes()]
        if progress:
            progress(done, len(pairs), "comparing")
    if not any(rows):
        raise InputError(f"no pair of these models can be compared: {few(left_out)}")
    corrected = iter(correct_together([row for some in rows for row in some]))
    return Pairs(
        models=tuple(models),
        pairs=pairs,
        rows=tuple(tuple(next(corrected) for _ in some) for some in rows),
        left_out=tuple(left_out),
        num_resamples=num_resamples,
    )
