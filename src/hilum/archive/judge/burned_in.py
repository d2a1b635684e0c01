"""Text burned into pixels: names and dates that no header shows.

Rendered text is unlike anatomy: small pieces of one brightness and similar height with sharp edges, side by side on one
line. No characters are read, so no language matters. Text that is faint, rotated, handwritten, larger than 40 pixels, or
written over noise or over anatomy as bright as itself is not found: a score, not a promise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.volume import Volume

MIN_HEIGHT, MAX_HEIGHT = 5, 40  # of a glyph, in pixels
NUM_SLICES = 5
_STROKE = 14  # a horizontal stroke is no longer than this, in pixels
_CONTRAST = 0.28  # of the image's range, that a glyph stands out on both sides
_SAME_PEAK = 0.15  # of their height above the background, by which the brightest pixels of neighbours may differ
_MAX_GLYPHS = 600

Image = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Glyphs:
    """Boxes of pieces that may be characters: first and last row and column (N,), and brightest value (N,)."""

    top: Ints
    bottom: Ints
    left: Ints
    right: Ints
    peak: NDArray[np.float32]


def text_score(pixels: NDArray[np.generic]) -> float:
    """How much an image looks as if it held a line of rendered text: 0 (not at all) to 1.

    pixels   (Y, X), any numeric type; bright text on dark, dark text on bright
    returns  0.5 for five characters in a row, 0.8 for nine, 0 for fewer than three
    """
    image = np.asarray(pixels, np.float32)
    if image.ndim != 2 or min(image.shape) < 2 * MIN_HEIGHT:
        return 0.0
    sample = image[::3, ::3]
    low, high = np.percentile(sample, [1, 99.5])
    contrast = _CONTRAST * float(high - low)
    if not contrast > 0:  # one value nearly everywhere: what little there is stands out of it
        contrast = _CONTRAST * float(image.max() - image.min())
    if not contrast > 0:
        return 0.0
    longest = max(
        _longest_line(_find_glyphs(turned, contrast), float(np.percentile(sign * sample, 1)))
        for sign, turned in ((1, image), (-1, -image))
    )
    return float(1 - np.exp(-(longest - 2) / 4)) if longest >= 3 else 0.0


def burned_in_score(vol: Volume) -> float:
    """The largest `text_score` of a few slices along axis 0: both ends and evenly between. Text is on most or all."""
    at = np.unique(np.linspace(0, vol.shape[0] - 1, NUM_SLICES).round().astype(int))
    return max(text_score(vol.voxels[k]) for k in at)


def _find_glyphs(image: Image, contrast: float) -> _Glyphs:
    """Pieces that stand out from what lies to their left and right, of a character's size and shape."""
    padded = np.pad(image, ((0, 0), (_STROKE, _STROKE)), mode="edge")
    width = 1
    while width < _STROKE:  # minimum over _STROKE pixels by doubling
        step = min(width, _STROKE - width)
        padded = np.minimum(padded[:, :-step], padded[:, step:])
        width += step
    left, right = padded[:, : image.shape[1]], padded[:, _STROKE + 1 :]
    stands_out = image - np.maximum(left, right) > contrast
    labels, num = ndimage.label(stands_out, np.ones((3, 3), int))
    if not num:
        empty = np.zeros(0, np.int64)
        return _Glyphs(empty, empty, empty, empty, np.zeros(0, np.float32))
    rows, columns = np.nonzero(stands_out)
    number = labels[rows, columns]
    order = np.argsort(number, kind="stable")
    rows, columns, values = rows[order], columns[order], image[rows, columns][order]
    first = np.searchsorted(number[order], np.arange(1, num + 1))
    top, bottom = rows[first], np.maximum.reduceat(rows, first)
    begin, end = np.minimum.reduceat(columns, first), np.maximum.reduceat(columns, first)
    height, breadth = bottom - top + 1, end - begin + 1
    area = np.diff(np.append(first, len(rows)))
    good = (
        (height >= MIN_HEIGHT) & (height <= MAX_HEIGHT) & (breadth <= 1.8 * height) & (area >= 0.15 * height * breadth)
    )
    chosen = np.flatnonzero(good)
    peak = np.maximum.reduceat(values, first)
    if len(chosen) > _MAX_GLYPHS:  # text is as bright as anything in the image
        chosen = np.sort(chosen[np.argsort(-peak[chosen], kind="stable")[:_MAX_GLYPHS]])
    return _Glyphs(top[chosen], bottom[chosen], begin[chosen], end[chosen], peak[chosen])


def _longest_line(g: _Glyphs, background: float) -> int:
    """The number of glyphs in the longest line, each beside the last at one height, size and brightness."""
    order = np.argsort(g.left, kind="stable")
    top, bottom, left, right, peak = (a[order] for a in (g.top, g.bottom, g.left, g.right, g.peak))
    height = bottom - top + 1
    gap = left[None, :] - right[:, None]
    tall = np.maximum(height[:, None], height[None, :])
    small = np.minimum(height[:, None], height[None, :])
    follows = (
        (gap >= 0)
        & (gap <= 0.9 * tall + 1)
        & (tall <= 1.5 * small + 1)
        & (np.abs(bottom[:, None] - bottom[None, :]) <= 0.12 * tall + 0.6)
        & (
            np.abs(peak[:, None] - peak[None, :])
            <= _SAME_PEAK * (np.maximum(peak[:, None], peak[None, :]) - background)
        )
    )
    longest = np.ones(len(order), np.int64)
    for n in np.flatnonzero(follows.any(0)):  # left to right: those before it are done
        longest[n] = 1 + longest[follows[:, n]].max()
    return int(longest.max(initial=0))
