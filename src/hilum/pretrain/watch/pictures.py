"""Figures of a run's page: curves over steps, training samples, what patch tokens say as training goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hilum.figures import ACCEPTED, LETTER, NIGHT, REJECTED, SERIES, window

Array = NDArray[Any]
WIDTH = 9.6  # inches


@dataclass(frozen=True)
class Chart:
    """One panel of curves.

    lines  (name, steps, values)
    marks  horizontal lines that values mean something at: (height, what)
    log    logarithmic values
    """

    title: str
    lines: Sequence[tuple[str, Array, Array]]
    marks: Sequence[tuple[float, str]] = ()
    log: bool = False


def charts(panels: Sequence[Chart], events: Sequence[tuple[int, str]] = ()) -> Figure:
    """Panels three in a row; `events` (step, colour) are drawn through all of them."""
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 2.25 * rows + 0.1), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False)
    last = max((int(steps.max()) for panel in panels for _, steps, _ in panel.lines if len(steps)), default=0)
    for n, (place, panel) in enumerate(zip(places.flat, panels)):
        _chart(place, panel)
        for step, colour in events:
            place.axvline(step, color=colour, linewidth=0.9, alpha=0.8)
        place.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))  # one clock for all
        place.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        if n + columns >= len(panels):  # nothing below
            place.set_xlabel("step", fontsize=8)
    for place in places.flat[len(panels) :]:
        place.set_axis_off()
    return figure


def _chart(place: Axes, panel: Chart) -> None:
    for colour, (name, steps, values) in zip(SERIES, panel.lines):
        if len(values) > 90:
            place.plot(steps, values, color=colour, linewidth=0.5, alpha=0.25)
            values = smooth(values)
        marker = "o" if len(values) <= 12 else ""
        place.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3, label=name)
    for height, what in panel.marks:
        place.axhline(height, color=SERIES[4], linewidth=0.8, linestyle="--")
        place.text(
            0.99, height, what, fontsize=7, color=SERIES[4], ha="right", va="bottom",
            transform=place.get_yaxis_transform(), bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0},
        )  # fmt: skip
    if panel.log and all((np.asarray(values) > 0).all() for _, _, values in panel.lines):
        place.set_yscale("log")
        place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        place.yaxis.set_minor_formatter(NullFormatter())
        low, high = place.get_ylim()
        if high < 30 * low:  # too few whole powers of ten to read a value by
            place.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        _widen(place)
    place.set_title(panel.title, fontsize=9, loc="left")
    place.tick_params(labelsize=7, length=2)
    place.margins(x=0.02, y=0.12)
    place.spines[["top", "right"]].set_visible(False)
    place.grid(axis="y", linewidth=0.4, alpha=0.5)
    if len(panel.lines) > 1:
        place.legend(fontsize=7, frameon=False, handlelength=1.2)


def _widen(place: Axes) -> None:
    """Let the values span at least a twentieth of their size, or 1e-3, lest rounding looks like news; plain ticks."""
    place.ticklabel_format(axis="y", useOffset=False, scilimits=(-5, 6))
    low, high = place.get_ylim()
    least = max(0.05 * max(abs(low), abs(high)), 1e-3)
    if high - low < least:
        place.set_ylim((low + high - least) / 2, (low + high + least) / 2)


def smooth(values: Array) -> Array:
    """A running median over a fiftieth of the curve: outliers do not draw a bump that never was."""
    values = np.asarray(values, float)
    half = max(len(values) // 100, 2)
    padded = np.pad(values, half, mode="reflect")
    out: Array = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)
    return out


def _night(rows: int, columns: int, head: float = 0.24) -> tuple[Figure, Array]:
    """A dark sheet with square cells of at most 1.55 inches; the first row has room for titles."""
    side = min(WIDTH / columns, 1.55)
    height = rows * side + head
    width = columns * side
    figure = Figure(figsize=(width, height), facecolor=NIGHT)
    gap = 0.025
    cells = np.empty((rows, columns), object)
    for row in range(rows):
        for column in range(columns):
            left, top = column * side + gap, head + row * side + gap
            size = side - 2 * gap
            cells[row, column] = figure.add_axes(
                (left / width, 1 - (top + size) / height, size / width, size / height), facecolor=NIGHT
            )
            cells[row, column].set_axis_off()
    return figure, cells


def _slice(place: Axes, pixels: Array, limits: tuple[float, float]) -> None:
    place.imshow(pixels, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="equal")


def _title(place: Axes, text: str) -> None:
    place.text(0.5, 1.02, text, transform=place.transAxes, color=LETTER, fontsize=7.5, ha="center", va="bottom")


def sample_sheet(
    samples: Sequence[tuple[Array, Sequence[Any], Sequence[Any], Sequence[tuple[Array, Array | None]]]], num_crops: int
) -> Figure:
    """Training samples, one a row: the slice with its crops' boxes, then the crops with hidden patches shaded.

    samples  (pixels, accepted boxes, rejected boxes, [(crop, mask of patches or None)]), two global crops first; boxes
             (y0, x0, y1, x1), fractions
    """
    figure, cells = _night(len(samples), 1 + num_crops)
    _title(cells[0, 0], "slice and boxes")
    for n in range(num_crops):
        sides = {crops[n][0].shape for _, _, _, crops in samples if n < len(crops)}
        size = f", {'×'.join(map(str, dict.fromkeys(sides.pop())))} px" if len(sides) == 1 else ""
        _title(cells[0, 1 + n], f"{'global' if n < 2 else 'local'}{size}")
    for row, (pixels, accepted, rejected, crops) in zip(cells, samples):
        limits = window(pixels, "")
        _slice(row[0], pixels, limits)
        for boxes, colour, line in ((rejected, REJECTED, ":"), (accepted, ACCEPTED, "-")):
            for box in boxes:
                _box(row[0], box, pixels.shape, colour, line)
        for place, (crop, mask) in zip(row[1:], crops):
            _slice(place, crop, limits)
            if mask is not None:
                _shade(place, np.asarray(mask, bool), crop.shape)
    return figure


def _box(place: Axes, box: Any, shape: tuple[int, ...], colour: str, line: str) -> None:
    y0, x0, y1, x1 = box
    corner = (x0 * shape[1] - 0.5, y0 * shape[0] - 0.5)
    size = ((x1 - x0) * shape[1], (y1 - y0) * shape[0])
    place.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linestyle=line, linewidth=0.9))


def _shade(place: Axes, mask: Array, shape: tuple[int, ...]) -> None:
    colours = np.zeros((*mask.shape, 4))
    colours[mask] = to_rgba(SERIES[0], 0.62)
    extent = (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)
    place.imshow(colours, extent=extent, interpolation="nearest")


def pca_over_time(images: Array, foreground: Array, snapshots: Sequence[tuple[int, Array]]) -> Figure:
    """Slices, and the first three principal components of their patch tokens as red, green and blue, step by step.

    images      (N, Y, X); foreground (N, rows, columns) bool: patches that fit the components and are coloured
    snapshots   (step, tokens (N, rows, columns, D))

    Components are those of one step over all slices; each step's are turned onto those of the last (orthogonal Procrustes),
    so that colours can be followed through time.
    """
    figure, cells = _night(len(images), 1 + len(snapshots))
    _title(cells[0, 0], "slice")
    last = _scores(snapshots[-1][1], foreground)
    low, high = np.percentile(last, [2, 98], axis=0)
    for place, pixels in zip(cells[:, 0], images):
        _slice(place, pixels, window(pixels, ""))
    for column, (step, tokens) in enumerate(snapshots, 1):
        _title(cells[0, column], f"step {step:,}")
        scores = _scores(tokens, foreground)
        u, _, v = np.linalg.svd(scores.T @ last)
        scores = scores @ (u @ v)
        colours = np.zeros((*foreground.shape, 3))
        colours[foreground] = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
        for place, picture in zip(cells[:, column], colours):
            place.imshow(picture, interpolation="nearest")
    return figure


def _scores(tokens: Array, foreground: Array) -> Array:
    """The first three principal components of the foreground's tokens, each with variance 1; 0 where there is none."""
    inside = tokens[foreground].astype(np.float64)
    inside -= inside.mean(0)
    u, sigma, _ = np.linalg.svd(inside, full_matrices=False)
    out: Array = u[:, :3] * np.sqrt(len(u)) * (sigma[:3] > 1e-6 * max(sigma[0], 1e-12))
    return np.pad(out, ((0, 0), (0, 3 - out.shape[1])))


def similarity_over_time(images: Array, foreground: Array, snapshots: Sequence[tuple[int, Array]]) -> Figure:
    """One patch of each slice (ring) and how alike its token is to all others of that slice, step by step."""
    figure, cells = _night(len(images), 1 + len(snapshots))
    _title(cells[0, 0], "slice and patch")
    rows, columns = foreground.shape[1:]
    for n, (pixels, inside) in enumerate(zip(images, foreground)):
        limits, (height, width) = window(pixels, ""), pixels.shape
        j, i = query_patch(inside)
        _slice(cells[n, 0], pixels, limits)
        ring = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": LETTER, "markeredgewidth": 1.4}
        cells[n, 0].plot((i + 0.5) / columns * width - 0.5, (j + 0.5) / rows * height - 0.5, "o", **ring)
        for place, (step, tokens) in zip(cells[n, 1:], snapshots):
            if n == 0:
                _title(place, f"step {step:,}")
            unit = tokens[n] / np.maximum(np.linalg.norm(tokens[n], axis=-1, keepdims=True), 1e-12)
            alike = unit @ unit[j, i]
            _slice(place, pixels, limits)
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            place.imshow(alike, cmap="inferno", vmin=0, vmax=1, alpha=0.72, extent=extent, interpolation="nearest")
    return figure


def query_patch(foreground: Array) -> tuple[int, int]:
    """The patch of the anatomy nearest to a third of its height and width: rarely the middle, where a slice is alike."""
    at = np.argwhere(foreground) if foreground.any() else np.argwhere(np.ones_like(foreground))
    goal = at.min(0) + (at.max(0) - at.min(0)) / 3
    j, i = at[np.square(at - goal).sum(1).argmin()]
    return int(j), int(i)
