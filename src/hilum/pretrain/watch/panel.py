"""The live panel: how a run goes, on a terminal; plain lines elsewhere, as any other command; nothing when quiet."""

import itertools
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from hilum.pretrain.watch.diagnose import Diagnosis
from hilum.terminal import Reporter

BLOCKS = "▁▂▃▄▅▆▇█"
PARTS = ("dino", "ibot", "invariance", "patch_invariance", "sigreg", "patch_sigreg", "koleo", "gram")
SIGNS = {
    "rank": ("probe_rank", "{:.0f}"),
    "spread": ("probe_spread", "{:.2f}"),
    "prototypes": ("prototypes_used", "{:,.0f}"),
    "k-NN": ("knn", "{:.3f}"),
    "linear": ("linear", "{:.3f}"),
    "anatomy in crops": ("foreground", "{:.0%}"),
}
SPEED = {
    "images/s": ("images_per_second", "{:,.1f}"),
    "waiting for data": ("data_wait", "{:.1%}"),
    "of peak": ("utilisation", "{:.0%}"),
}


class Panel:
    """A `Progress` and a `watch` for `pretrain`. Use it as a context manager, so that it is put away before the end."""

    def __init__(self, quiet: bool = False) -> None:
        self.live = sys.stderr.isatty() and not quiet
        self._reporter = Reporter(quiet)
        self._display: Any = None
        self._losses: deque[float] = deque(maxlen=10_000)
        self._latest: dict[str, float] = {}
        self._verdict: Sequence[Diagnosis] = ()
        self._done, self._total, self._first = 0, 0, 0
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> "Panel":
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.update(self.render(), refresh=True)
            self._display.stop()

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if not self.live:
            self._reporter(done, total, what)
            return
        if not self._done:
            self._first = done - 1
        self._done, self._total = done, total or 0
        now = time.monotonic()
        if self._display is None:
            from rich.console import Console
            from rich.live import Live

            self._display = Live(self.render(), console=Console(stderr=True), auto_refresh=False)
            self._display.start()
        elif now - self._drawn < 0.5 and done != total:
            return
        self._drawn = now
        self._display.update(self.render(), refresh=True)

    def watch(self, line: Mapping[str, Any], verdict: Sequence[Diagnosis]) -> None:
        """Take up a log line, and what is wrong when that was looked at."""
        if line["loss"] == line["loss"]:
            self._losses.append(line["loss"])
        self._latest |= {name: value for name, value in line.items() if isinstance(value, int | float)}
        self._verdict = verdict or (() if "spread" in line else self._verdict)

    def render(self) -> Any:
        """The panel as it is now."""
        from rich.console import Group
        from rich.panel import Panel as Frame
        from rich.table import Table
        from rich.text import Text

        share = self._done / self._total if self._total else 0.0
        table = Table.grid(padding=(0, 2))
        losses = list(self._losses)
        loss = f"{losses[-1]:.4f}" if losses else "–"
        table.add_row("step", f"{self._done:,} of {self._total:,}  {bar(share)}  {self._remaining()}")
        table.add_row("loss", f"[bold]{loss}[/]  {sparkline(losses)}")
        parts = [f"{name} {self._latest[name]:.3f}" for name in PARTS if name in self._latest]
        table.add_row("parts", "  ".join(parts))
        for title, chosen in (("features", SIGNS), ("speed", SPEED)):
            cells = [
                f"{n} {form.format(self._latest[key])}" for n, (key, form) in chosen.items() if key in self._latest
            ]
            table.add_row(title, "  ".join(cells))
        lines: list[Any] = [table]
        for d in self._verdict:
            colour = "bold red" if d.severity == "fatal" else "yellow"
            lines.append(Text(f"{d.name}: {d.evidence}. {d.advice}.", style=colour))
        if not self._verdict:
            lines.append(Text("nothing wrong so far", style="green") if "spread" in self._latest else Text("looking …"))
        return Frame(Group(*lines), title="pre-training", title_align="left", width=100)

    def _remaining(self) -> str:
        done, passed = self._done - self._first, time.monotonic() - self._began
        if done < 2 or not self._total:
            return ""
        return f"{duration(passed / done * (self._total - self._done))} left"


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """Values as a line of blocks: medians of equal stretches, from the lowest to the highest of them."""
    if not values:
        return ""
    edges = [round(n * len(values) / min(width, len(values))) for n in range(min(width, len(values)) + 1)]
    middles = [sorted(values[a:b])[(b - a) // 2] for a, b in itertools.pairwise(edges)]
    low, high = min(middles), max(middles)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] for v in middles)


def bar(share: float, width: int = 24) -> str:
    """A share in [0, 1] as a bar."""
    full = round(min(max(share, 0.0), 1.0) * width)
    return "█" * full + "░" * (width - full)


def duration(seconds: float) -> str:
    """Two units that matter: "2 d 3 h", "1 h 5 min", "40 s"."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"
