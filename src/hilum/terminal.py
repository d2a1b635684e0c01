"""What the user sees while waiting and at the end: progress and tables, on a terminal or in a log file."""

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Progress = Callable[[int, int | None, str], None]
"""Called as (done, total or None, what is being done)."""

PLAIN_EVERY_S = 5.0
WIDTH = 100


class Reporter:
    """A `Progress`: a bar of rich on a terminal, a line every five seconds elsewhere, nothing when quiet.

    Use it as a context manager, so that the bar is put away before anything else is printed.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._last, self._began = 0.0, time.monotonic()
        self._topic = ""

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._draw(done, total, what)
        else:
            self._print(done, total, what)

    def _draw(self, done: int, total: int | None, what: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            self._bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
        topic = what.split(",")[0]  # "pre-training, loss 1.2" is one topic whose text changes
        if topic not in self._tasks:
            self._tasks[topic] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[topic], completed=done, total=total, description=what)

    def _print(self, done: int, total: int | None, what: str) -> None:
        now, topic = time.monotonic(), what.split(",")[0]
        if topic != self._topic:
            self._topic, self._began, self._last = topic, now, now
            return
        if now - self._last >= PLAIN_EVERY_S or (done == total and now - self._began >= PLAIN_EVERY_S):
            self._last = now
            count = f"{done:,}/{total:,}" if total else f"{done:,}"
            print(f"{what}: {count} after {now - self._began:.0f} s", file=sys.stderr, flush=True)


def print_result(result: Any, as_json: bool, text: str) -> None:
    """What a command found, on stdout: one JSON object, or the text."""
    print(json.dumps(result, sort_keys=True) if as_json else text)


def format_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = WIDTH, *, whole: Sequence[str] = ()
) -> str:
    """A plain table of at most `width` columns; numbers to the right, the widest text is cut to fit.

    whole  columns that are not cut while others have six letters left, such as intervals
    """
    cells = [[str(c) for c in columns], *[[_text(v) for v in row] for row in rows]]
    widths = [max(len(row[n]) for row in cells) for n in range(len(columns))]
    gaps = 2 * (len(columns) - 1)
    while sum(widths) + gaps > width:
        free = [n for n, name in enumerate(columns) if name not in whole and widths[n] > 6] or range(len(widths))
        widths[max(free, key=lambda n: widths[n])] -= 1
    right = [all(isinstance(row[n], int | float) for row in rows) and bool(rows) for n in range(len(columns))]
    lines = []
    for row in cells:
        fitted = [c if len(c) <= w else c[: max(w - 1, 0)] + "…" for c, w in zip(row, widths)]
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(fitted, widths, right)).rstrip())
    lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(lines)


def wrap_row(cells: Sequence[str], widths: Sequence[int], text: str, width: int = WIDTH) -> str:
    """A row of cells in columns of these widths, then text that wraps within what is left of `width`.

    A cell wider than its column is not cut: the text then begins on the next line.
    """
    indent = sum(w + 2 for w in widths)
    head = "".join(cell.ljust(w) + "  " for cell, w in zip(cells, widths))
    lines = [" " * indent + part for part in textwrap.wrap(text, width - indent)]
    if len(head) == indent and lines:
        lines[0] = head + lines[0].lstrip()
        return "\n".join(lines)
    return "\n".join([head.rstrip(), *lines])


def few(names: Iterable[str], number: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - number:,} more" if len(listed) > number else ""
    return ", ".join(listed[:number]) + more


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
