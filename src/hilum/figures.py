"""Pictures: arrays in, matplotlib figures out. Knows nothing of stores, runs or models.

Slices are drawn as radiologists see them: anterior up, the patient's right on the left of the picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

Array = NDArray[Any]
Box = tuple[float, float, float, float]

ACCEPTED, REJECTED = "#37c871", "#ff5a4f"
SERIES = ("#0b6e8a", "#d1662a", "#5f8f3e", "#8a4fa3", "#5b6675")


def window(pixels: Array, unit: str) -> tuple[float, float]:
    """Grey range of a slice: the soft-tissue window −160 to 240 HU for CT, else the 1st to 99.5th percentile."""
    if unit == "HU":
        return -160.0, 240.0
    low, high = np.percentile(pixels, [1, 99.5])
    return float(low), float(max(high, low + 1e-6))


def _grid(rows: int, columns: int, width: float = 9.6, aspect: float = 1.0) -> tuple[Figure, Array]:
    side = width / columns
    figure = Figure(figsize=(width, side * aspect * rows + 0.15), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _image(axes: Axes, pixels: Array, unit: str, title: str = "", aspect: float = 1.0) -> None:
    low, high = window(pixels, unit)
    axes.imshow(pixels, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=8)


def slice_grid(slices: Sequence[tuple[Array, str, str]], columns: int = 6) -> Figure:
    """Slices side by side; each is (pixels (Y, X), unit, title)."""
    rows = -(-len(slices) // columns)
    figure, axes = _grid(rows, columns, aspect=1.1)
    for place, (pixels, unit, title) in zip(axes.flat, slices):
        _image(place, pixels, unit, title)
    for place in axes.flat[len(slices) :]:
        place.set_axis_off()
    return figure


def crop_grid(
    examples: Sequence[tuple[Array, str, Sequence[Box], Sequence[Box], Sequence[Array]]], num_crops: int = 6
) -> Figure:
    """For each slice: boxes taken (green) and drawn again (red, dashed), then the first crops as the model sees them.

    examples   (pixels, unit, accepted boxes, rejected boxes, rendered crops); boxes (y0, x0, y1, x1) as fractions
    """
    figure, axes = _grid(len(examples), 1 + num_crops, aspect=1.05)
    for row, (pixels, unit, accepted, rejected, crops) in zip(axes, examples):
        _image(row[0], pixels, unit)
        for boxes, colour, line in ((rejected, REJECTED, "--"), (accepted, ACCEPTED, "-")):
            for box in boxes:
                _draw_box(row[0], box, pixels.shape, colour, line)
        for place, crop in zip(row[1:], crops):
            _image(place, crop, "", f"{crop.shape[0]} px")
        for place in row[1 + len(crops) :]:
            place.set_axis_off()
    return figure


def _draw_box(axes: Axes, box: Box, shape: tuple[int, ...], colour: str, line: str) -> None:
    y0, x0, y1, x1 = box
    height, width = shape[:2]
    corner = (x0 * width - 0.5, y0 * height - 0.5)
    axes.add_patch(
        Rectangle(
            corner, (x1 - x0) * width, (y1 - y0) * height, fill=False, edgecolor=colour, linestyle=line, linewidth=1
        )
    )


def mask_maps(examples: Sequence[tuple[Array, str, Array, Array]]) -> Figure:
    """Where mask blocks fall: slice, one guided mask, and how often each patch is hidden under both priors.

    examples   (pixels, unit, uniform, guided): the last two are (rows, columns) frequencies in [0, 1]
    """
    figure, axes = _grid(len(examples), 3, width=7.6)
    top = max(float(max(u.max(), g.max())) for _, _, u, g in examples)
    for row, (pixels, unit, uniform, guided) in zip(axes, examples):
        _image(row[0], pixels, unit, "slice")
        for place, frequency, name in ((row[1], uniform, "uniform prior"), (row[2], guided, "guided prior")):
            _image(place, pixels, unit, f"{name}: hidden in {frequency.mean():.0%} of draws")
            height, width = pixels.shape
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            place.imshow(frequency, cmap="magma", vmin=0, vmax=top, alpha=0.65, extent=extent, interpolation="nearest")
    return figure


def curves(panels: Sequence[tuple[str, Sequence[tuple[str, Array, Array]]]]) -> Figure:
    """Line charts side by side: (title, [(name, steps, values)])."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = _grid(rows, columns, aspect=0.72)
    for place, (title, lines) in zip(axes.flat, panels):
        for colour, (name, steps, values) in zip(SERIES, lines):
            smooth = _smooth(np.asarray(values, float))
            if len(values) > 60:
                place.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
            place.plot(steps, smooth, color=colour, linewidth=1.5, label=name)
        place.set_title(title, fontsize=9, loc="left")
        place.tick_params(labelsize=7)
        place.spines[["top", "right"]].set_visible(False)
        place.grid(axis="y", linewidth=0.4, alpha=0.5)
        if len(lines) > 1:
            place.legend(fontsize=7, frameon=False)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    return figure


def _smooth(values: Array, width: int = 21) -> Array:
    if len(values) < 3 * width:
        return values
    padded = np.pad(values, width // 2, mode="edge")
    out: Array = np.convolve(padded, np.ones(width) / width, mode="valid")
    return out


def pca_maps(
    examples: Sequence[tuple[Array, str, str]], tokens: Sequence[Array], foreground: Sequence[Array]
) -> Figure:
    """Slices above the first three principal components of their patch tokens as red, green and blue.

    examples    (pixels, unit, title)
    tokens      for each (rows, columns, D)
    foreground  for each (rows, columns) bool: only these patches fit the components and are coloured

    One set of components serves all slices, so equal colours mean equal features, across patients and modalities.
    """
    inside = np.concatenate([t[f] for t, f in zip(tokens, foreground)])
    mean = inside.mean(0)
    _, _, axes_of = np.linalg.svd(inside - mean, full_matrices=False)
    scores = (inside - mean) @ axes_of[:3].T
    low, high = np.percentile(scores, [2, 98], axis=0)
    figure, axes = _grid(2, len(examples), aspect=1.08)
    for column, ((pixels, unit, title), token, mask) in enumerate(zip(examples, tokens, foreground)):
        _image(axes[0, column], pixels, unit, title)
        colours = np.clip(((token - mean) @ axes_of[:3].T - low) / (high - low), 0, 1)
        colours[~mask] = 0
        axes[1, column].imshow(colours, interpolation="nearest")
        axes[1, column].set_axis_off()
    return figure


def similarity_maps(
    query: tuple[Array, str, str],
    targets: Sequence[tuple[Array, str, str]],
    points: Sequence[tuple[str, float, float, Sequence[Array]]],
) -> Figure:
    """Query patches and how alike every patch of other slices is.

    query     (pixels, unit, title) of the slice that holds the queries
    targets   the same for the slices that are searched
    points    (name, y, x as fractions of the query slice, cosine similarity (rows, columns) for each target)
    """
    figure, axes = _grid(len(points), 1 + len(targets), width=8.6, aspect=1.08)
    for row, (name, y, x, similarities) in zip(axes, points):
        pixels, unit, title = query
        _image(row[0], pixels, unit, f"{name} in {title}")
        height, width = pixels.shape
        row[0].plot(
            x * width, y * height, "o", color=ACCEPTED, markersize=7, markerfacecolor="none", markeredgewidth=1.8
        )
        for place, (pixels, unit, title), similarity in zip(row[1:], targets, similarities):
            _image(place, pixels, unit, title)
            height, width = pixels.shape
            low, high = np.percentile(similarity, [50, 99.5])
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            place.imshow(
                similarity, cmap="inferno", vmin=low, vmax=high, alpha=0.6, extent=extent, interpolation="bilinear"
            )
    return figure


def intervals(rows: Sequence[tuple[str, Sequence[tuple[str, float, float, float]]]]) -> Figure:
    """Scores with their 95 % intervals, one panel a task.

    rows   (task, [(method, value, low, high)])
    """
    figure = Figure(figsize=(9.6, 0.55 + 0.24 * max(len(m) for _, m in rows) + 0.35), layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    for place, (task, methods) in zip(axes, rows):
        for number, (name, value, low, high) in enumerate(reversed(methods)):
            colour = SERIES[0] if number == len(methods) - 1 else SERIES[4]
            place.plot([low, high], [number, number], color=colour, linewidth=2.5, solid_capstyle="round", alpha=0.6)
            place.plot(value, number, "o", color=colour, markersize=5, label=name)
        place.set_yticks(
            range(len(methods)), [m[0] for m in reversed(methods)] if place is axes[0] else [""] * len(methods)
        )
        place.set_title(task, fontsize=8, loc="left")
        place.set_ylim(-0.6, len(methods) - 0.4)
        place.tick_params(labelsize=7, length=2)
        place.spines[["top", "right", "left"]].set_visible(False)
    return figure
