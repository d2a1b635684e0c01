"""Pictures: arrays in, matplotlib figures out. Knows nothing of stores, runs or models.

Slices are drawn as radiologists see them: anterior up, the patient's right on the left of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
NIGHT, LETTER, FAINT = "#0a0d11", "#ffdd85", "#94a0af"  # ground of pictures, letters on it, small print on it


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


@dataclass(frozen=True, eq=False)
class Panel:
    """One slice, with all that its picture has to say.

    pixels    (Y, X)
    pixel_mm  distance of rows and of columns (dy, dx); None when unknown: pixels are then drawn square, without scale
    edges     letters at (top, bottom, left, right); () when unknown
    """

    pixels: Array
    pixel_mm: tuple[float, float] | None = None
    edges: tuple[str, ...] = ()
    title: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Height and width in mm, or in pixels when their size is unknown."""
        dy, dx = self.pixel_mm or (1.0, 1.0)
        return self.pixels.shape[0] * dy, self.pixels.shape[1] * dx


def planes(panels: Sequence[Panel], limits: tuple[float, float]) -> Figure:
    """Up to three slices on one scale of millimetres, with letters at their edges and a scale bar.

    limits  grey values of black and white

    They stand side by side, or the first on the left and the others below one another, whichever shows them larger.
    """
    edge, head, foot = 0.34, 0.50, 0.56  # inches around each picture
    sizes = np.array([p.size for p in panels])
    row = [[n] for n in range(len(panels))]
    best: tuple[float, list[list[int]]] = (0.0, row)
    for columns in (row, [[0], list(range(1, len(panels)))]) if len(panels) > 2 else (row,):
        across = sum(sizes[c, 1].max() for c in columns)
        scale = (9.6 - 2 * edge * len(columns)) / across  # inches per mm
        for column in columns:
            scale = min(scale, (6.2 - (head + foot) * len(column)) / sizes[column, 0].sum())
        if scale > best[0]:
            best = (scale, columns)
    scale, columns = best
    height = max((head + foot) * len(c) + sizes[c, 0].sum() * scale for c in columns)
    used = sum(2 * edge + sizes[c, 1].max() * scale for c in columns)
    figure = Figure(figsize=(9.6, height), facecolor=NIGHT)
    left = (9.6 - used) / 2
    for column in columns:
        wide = 2 * edge + sizes[column, 1].max() * scale
        top = (height + (head + foot) * len(column) + sizes[column, 0].sum() * scale) / 2
        for n in column:
            tall_in, wide_in = sizes[n] * scale
            top -= head + tall_in
            box = ((left + (wide - wide_in) / 2) / 9.6, top / height, wide_in / 9.6, tall_in / height)
            axes = figure.add_axes(box)
            _draw_panel(axes, panels[n], limits)
            _letter(axes, panels[n], 1 / scale)
            top -= foot
        left += wide
    return figure


def _draw_panel(axes: Axes, panel: Panel, limits: tuple[float, float]) -> None:
    tall, wide = panel.size
    low, high = limits
    axes.imshow(panel.pixels, cmap="gray", vmin=low, vmax=high, extent=(0, wide, tall, 0), aspect="equal")
    axes.set_axis_off()


def _letter(axes: Axes, panel: Panel, inch: float) -> None:
    """Title, letters and scale bar around a picture; `inch` is how many millimetres one inch shows."""
    tall, wide = panel.size
    style: dict[str, Any] = {"color": LETTER, "fontsize": 11, "ha": "center", "va": "center", "fontweight": "light"}
    for letter, (x, y) in zip(
        panel.edges,
        ((wide / 2, -0.12 * inch), (wide / 2, tall + 0.12 * inch), (-0.13 * inch, tall / 2),
         (wide + 0.13 * inch, tall / 2)),
    ):  # fmt: skip
        axes.text(x, y, letter, **style)
    axes.text(wide / 2, -0.36 * inch, panel.title, color=FAINT, fontsize=8, ha="center", va="center")
    if panel.pixel_mm is not None:
        bar = next((b for b in (50, 20, 10, 5, 2, 1) if b <= 0.8 * wide), 1)
        y = tall + 0.40 * inch
        axes.plot([0, bar], [y, y], color=FAINT, linewidth=1.6, clip_on=False, solid_capstyle="butt")
        axes.text(bar + 0.07 * inch, y, f"{bar} mm", color=FAINT, fontsize=7.5, ha="left", va="center")
    axes.set_xlim(0, wide)
    axes.set_ylim(tall, 0)


def montage(
    panels: Sequence[Panel], limits: Sequence[tuple[float, float]], columns: int = 6, colours: Sequence[str] = ()
) -> Figure:
    """Many small slices in reading order, each in its own proportions, with its title below.

    limits   grey values of black and white, for each
    colours  of the titles, for each; () for one discreet colour
    """
    sizes = np.array([p.size for p in panels])
    cell = 9.6 / columns
    lines = 1 + max(p.title.count("\n") for p in panels)
    foot = 0.05 + 0.125 * lines
    tall = float(np.clip((sizes[:, 0] / sizes[:, 1]).max(), 0.25, 1.25)) * (cell - 0.08)
    rows = -(-len(panels) // columns)
    height = rows * (tall + foot + 0.04) + 0.06
    figure = Figure(figsize=(9.6, height), facecolor=NIGHT)
    for n, (panel, limit) in enumerate(zip(panels, limits)):
        row, column = divmod(n, columns)
        top = 0.05 + row * (tall + foot + 0.04)
        box = ((column * cell + 0.04) / 9.6, 1 - (top + tall) / height, (cell - 0.08) / 9.6, tall / height)
        axes = figure.add_axes(box)
        _draw_panel(axes, panel, limit)
        figure.text(
            (column + 0.5) * cell / 9.6, 1 - (top + tall + 0.03) / height, panel.title, ha="center", va="top",
            fontsize=6.5, color=colours[n] if colours else FAINT, linespacing=1.15,
        )  # fmt: skip
    return figure


def histogram(
    edges: Array, counts: Array, label: str, bands: Sequence[tuple[str, float, float]] = (), log: bool = True
) -> Figure:
    """How often each value occurs; `bands` (name, low, high) are marked behind it.

    edges   (N + 1,) ascending
    counts  (N,)
    """
    figure = Figure(figsize=(9.6, 2.5), layout="constrained")
    axes = figure.subplots()
    for n, (colour, (name, low, high)) in enumerate(zip(SERIES * 3, bands)):
        low, high = max(low, float(edges[0])), min(high, float(edges[-1]))
        if low < high:
            axes.axvspan(low, high, color=colour, alpha=0.16, linewidth=0)
            axes.text((low + high) / 2, 1.02 + 0.085 * (n % 2), name, color=colour, fontsize=7.5, ha="center",
                      va="bottom", transform=axes.get_xaxis_transform())  # fmt: skip
    axes.stairs(counts, edges, fill=True, color=SERIES[4], alpha=0.85)
    if log and counts.max() > 0:
        axes.set_yscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def steps(values: Array, expected: float, label: str) -> Figure:
    """Distances in their order against the expected one; those that differ by more than 5 % are red."""
    figure = Figure(figsize=(9.6, 2.1), layout="constrained")
    axes = figure.subplots()
    at = np.arange(1, len(values) + 1)
    odd = np.abs(values - expected) > 0.05 * abs(expected)
    axes.axhline(expected, color=SERIES[4], linewidth=0.8, linestyle="--")
    for chosen, colour in ((~odd, SERIES[0]), (odd, REJECTED)):
        axes.vlines(at[chosen], 0, values[chosen], color=colour, linewidth=1.2)
        axes.plot(at[chosen], values[chosen], "o", color=colour, markersize=3)
    axes.set_ylim(0, max(float(values.max()) * 1.1, 1e-3))
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("mm", fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def bars(panels: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]) -> Figure:
    """Horizontal bars with their numbers, one panel above the other: (title, colour, [(name, number)])."""
    heights = [len(rows) for _, _, rows in panels]
    figure = Figure(figsize=(9.6, 0.22 * sum(heights) + 0.5 * len(panels)), layout="constrained")
    places = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    top = max(number for _, _, rows in panels for _, number in rows)
    for axes, (title, colour, rows) in zip(places, panels):
        names, numbers = [name for name, _ in rows], [number for _, number in rows]
        axes.barh(range(len(rows)), numbers, color=colour, height=0.66)
        for n, number in enumerate(numbers):
            axes.text(number + top * 0.006, n, f"{number:,.0f}", fontsize=7.5, va="center")
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, top * 1.1)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(length=0, labelbottom=False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
