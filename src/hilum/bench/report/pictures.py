"""Pictures of the benchmark: arrays in, matplotlib figures out, in forms that clinical papers use.

Colours are those of Okabe and Ito (*Color Universal Design*, 2008), which people with any form of colour vision tell
apart; each comes with a marker of its own, so that a figure printed in grey can still be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[Any]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6675", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#5b6675"
WIDTH = 9.6  # inches
CHARACTERS_AN_INCH = 16  # of a title


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a forest plot.

    value, low, high  the estimate and its 95 % limits; NaN limits are not drawn
    published         another value for the same thing, drawn as an open diamond; None when there is none
    strong            drawn filled; else open
    """

    name: str
    value: float
    low: float
    high: float
    published: float | None = None
    strong: bool = True


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve with a band: `at`, `value`, `low`, `high` of one length; NaN limits leave the band out there."""

    name: str
    at: Array
    value: Array
    low: Array
    high: Array


def forest(panels: Sequence[tuple[str, str, float | None, Sequence[Line]]], columns: int = 2) -> Figure:
    """Estimates with their intervals, one panel a task: (title, axis label, line of no effect, rows)."""
    columns = min(columns, len(panels))
    groups = [panels[n : n + columns] for n in range(0, len(panels), columns)]
    heights = [max(len(p[3]) for p in group) + 2.2 for group in groups]
    figure = Figure(figsize=(WIDTH, 0.23 * sum(heights) + 0.1), layout="constrained")
    places = figure.subplots(len(groups), columns, squeeze=False, height_ratios=heights)
    for row, group in zip(places, groups):
        for place, panel in zip(row, group):
            _forest_panel(place, *panel)
        for place in row[len(group) :]:
            place.set_axis_off()
    return figure


def _forest_panel(axes: Axes, title: str, label: str, nothing: float | None, lines: Sequence[Line]) -> None:
    if nothing is not None:
        axes.axvline(nothing, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    for at, line in enumerate(lines):
        axes.plot([line.low, line.high], [at, at], color=COLOURS[0], linewidth=1.8, solid_capstyle="butt")
        face = COLOURS[0] if line.strong else "white"
        axes.plot(line.value, at, "s", color=COLOURS[0], markerfacecolor=face, markersize=5)
        if line.published is not None:
            axes.plot(line.published, at, "D", color=COLOURS[1], markerfacecolor="none", markersize=5.5)
        limits = f" ({_short(line.low)} to {_short(line.high)})" if np.isfinite(line.low) else ""
        axes.text(1.01, at, _short(line.value) + limits, transform=axes.get_yaxis_transform(), fontsize=6.5,
                  va="center", ha="left")  # fmt: skip
    axes.set_yticks(range(len(lines)), [_cut(line.name, 26) for line in lines], fontsize=7)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    _title(axes, title)
    axes.set_xlabel(label, fontsize=7)
    _plain(axes, sides=("top", "right", "left"))


def learning_curves(panels: Sequence[tuple[str, str, str, float | None, Sequence[Curve]]]) -> Figure:
    """Curves over the amount of training data, on a logarithmic axis, with bands; one panel a task.

    panels   (title, name of the horizontal axis, of the vertical axis, chance or None, curves)
    """
    columns = min(max(len(panels), 2), 3)
    rows = -(-len(panels) // columns)
    figure, places = _panels(rows, columns, WIDTH / columns * 0.75)
    for place, (title, across, up, chance, curves) in zip(places.flat, panels):
        if chance is not None:
            place.axhline(chance, color=GREY, linewidth=0.9, linestyle="--")
        for n, curve in enumerate(curves):
            colour, marker = COLOURS[n % 8], MARKERS[n % 8]
            place.fill_between(curve.at, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
            place.plot(
                curve.at, curve.value, marker=marker, color=colour, linewidth=1.5, markersize=4, label=curve.name
            )
        ticks = sorted({float(x) for curve in curves for x in curve.at})
        place.set_xscale("log")
        place.set_xticks(ticks, [f"{x:g}" for x in ticks])
        place.minorticks_off()
        _name_axes(place, title, across, up)
        place.legend(fontsize=6.5, frameon=False)
    return figure


@dataclass(frozen=True, eq=False)
class Reliability:
    """Bins of a reliability diagram: mean predicted probability, observed share with 95 % limits, number of cases; `ece` is
    NaN where none is defined."""

    name: str
    predicted: Array
    observed: Array
    low: Array
    high: Array
    counts: Array
    ece: float


def reliability(panels: Sequence[Reliability], label: str) -> Figure:
    """Observed share against predicted probability; the diagonal is perfect, below it is over-confident."""
    columns = min(max(len(panels), 3), 4)
    rows = -(-len(panels) // columns)
    figure, places = _panels(rows, columns, WIDTH / columns + 0.25)
    for place, panel in zip(places.flat, panels):
        place.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle="--")
        size = 8 + 60 * panel.counts / max(panel.counts.max(), 1)
        place.vlines(panel.predicted, panel.low, panel.high, color=COLOURS[0], linewidth=1.4)
        place.scatter(panel.predicted, panel.observed, s=size, color=COLOURS[0], zorder=3)
        place.set_xlim(-0.04, 1.04)
        place.set_ylim(-0.04, 1.04)
        place.set_aspect("equal")
        known = f"\nECE {panel.ece:.3f}" if np.isfinite(panel.ece) else ""
        _name_axes(place, _cut(panel.name, 30) + known, "predicted probability", label)
    return figure


def confusion(counts: Array, classes: Sequence[str], title: str = "") -> Figure:
    """True classes down, predicted across; shade and number are the share of the true class, so rare rows count as much.

    counts   (C, C) cases
    """
    totals = counts.sum(1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = float(np.clip(0.42 * len(classes), 2.2, 8.2))
    figure = Figure(figsize=(min(side + 2.6, WIDTH), side + 1.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 24:
        for (row, column), value in np.ndenumerate(share):
            if counts[row, column] > 0:
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 0.55 else "black")  # fmt: skip
    names = [_cut(name, 24) for name in classes]
    small = 7 if len(classes) <= 40 else 5
    axes.set_xticks(range(len(classes)), names, rotation=90 if len(classes) > 4 else 0, fontsize=small)
    axes.set_yticks(range(len(classes)), [f"{n} ({c:,.0f})" for n, c in zip(names, totals[:, 0])], fontsize=small)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true (cases)", fontsize=8)
    axes.set_title(title, fontsize=8, loc="left")
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    bar.ax.tick_params(labelsize=6)
    bar.set_label("share of the true class", fontsize=7)
    return figure


def roc(title: str, curves: Sequence[tuple[str, Array, Array]]) -> Figure:
    """Receiver operating characteristics: (name, 1 − specificity, sensitivity)."""
    figure, places = _panels(1, 1, 4.4, width=4.6)
    axes = places[0, 0]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle="--")
    styles = ("-", "--", "-.", ":")
    for n, (name, across, up) in enumerate(curves):
        axes.plot(across, up, color=COLOURS[n % 8], linestyle=styles[n % 4], linewidth=1.6, label=_cut(name, 30))
    axes.set_aspect("equal")
    _name_axes(axes, title, "1 − specificity", "sensitivity")
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def survival(panels: Sequence[tuple[str, Sequence[tuple[str, Array, Array, Array]]]]) -> Figure:
    """Kaplan–Meier curves of risk groups, one panel a model: (title, [(group, times, surviving share, censored at)])."""
    columns = min(max(len(panels), 2), 3)
    figure, places = _panels(-(-len(panels) // columns), columns, 2.9)
    for place, (title, groups) in zip(places.flat, panels):
        for n, (name, times, share, censored) in enumerate(groups):
            place.step(times, share, where="post", color=COLOURS[n], linewidth=1.6, label=name)
            at = np.searchsorted(times, censored, side="right") - 1
            place.plot(censored, share[at], "|", color=COLOURS[n], markersize=5)
        place.set_ylim(0, 1.03)
        _name_axes(place, _cut(title, 40), "time", "surviving")
        place.legend(fontsize=6.5, frameon=False, loc="lower left")
    return figure


def agreement(panels: Sequence[tuple[str, Array, Array]]) -> Figure:
    """Bland–Altman plots (*Lancet* 1986), one panel a model: (title, true, predicted), the bias and ± 1.96 SD drawn."""
    columns = min(max(len(panels), 2), 3)
    figure, places = _panels(-(-len(panels) // columns), columns, 2.9)
    for place, (title, true, predicted) in zip(places.flat, panels):
        mean, difference = (true + predicted) / 2, predicted - true
        bias, spread = float(difference.mean()), 1.96 * float(difference.std())
        place.scatter(mean, difference, s=7, color=COLOURS[0], alpha=0.5, linewidth=0)
        place.axhline(0, color=GREY, linewidth=0.8)
        for height, line in ((bias, "-"), (bias - spread, "--"), (bias + spread, "--")):
            place.axhline(height, color=COLOURS[1], linewidth=1.1, linestyle=line)
            place.text(1.01, height, f"{height:.3g}", transform=place.get_yaxis_transform(), fontsize=6.5, va="center")
        _name_axes(place, _cut(title, 40), "mean of true and predicted", "predicted − true")
    return figure


def spread(panels: Sequence[tuple[str, str, Sequence[tuple[str, Array]]]]) -> Figure:
    """Every case as a dot, with median and quartiles: (title, axis label, [(row, values)]); NaN values are left out."""
    rows = max(len(p[2]) for p in panels)
    columns = min(len(panels), 2)
    down = -(-len(panels) // columns)
    figure, places = _panels(down, columns, 0.24 * rows + 0.7)
    for place, (title, label, groups) in zip(places.flat, panels):
        for at, (_, values) in enumerate(groups):
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            shift = 0.28 * np.sin(12.9898 * np.arange(len(values)))  # spread evenly, the same each time
            place.plot(values, at + shift, ".", color=COLOURS[0], alpha=0.35, markersize=3, markeredgewidth=0)
            low, middle, high = np.percentile(values, [25, 50, 75])
            place.plot([low, high], [at, at], color=COLOURS[1], linewidth=2.2)
            place.plot(middle, at, "D", color=COLOURS[1], markersize=4.5)
        place.set_yticks(range(len(groups)), [_cut(name, 26) for name, _ in groups])
        place.set_ylim(len(groups) - 0.4, -0.6)
        _name_axes(place, title, label, "")
    return figure


def _panels(rows: int, columns: int, height: float, width: float = WIDTH) -> tuple[Figure, Array]:
    """Axes in a grid; those that stay unused are blank."""
    figure = Figure(figsize=(width, height * rows + 0.1), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False)
    for place in places.flat:
        place.set_visible(False)
    return figure, places


def _name_axes(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_visible(True)
    _title(axes, title)
    axes.set_xlabel(across, fontsize=7)
    axes.set_ylabel(up, fontsize=7)
    _plain(axes)


def _title(axes: Axes, title: str) -> None:
    """Over the left end, in lines that end where the panel does."""
    place, figure = axes.get_subplotspec(), axes.get_figure(root=True)
    assert place is not None
    assert figure is not None
    width = figure.get_figwidth() / place.get_gridspec().ncols - 0.6  # inches, without the names of the axis
    lines = [fill(line, max(12, int(width * CHARACTERS_AN_INCH))) for line in title.splitlines()]
    axes.set_title("\n".join(lines), fontsize=8, loc="left")


def _plain(axes: Axes, sides: Sequence[str] = ("top", "right")) -> None:
    axes.tick_params(labelsize=7, length=2)
    axes.spines[list(sides)].set_visible(False)


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
