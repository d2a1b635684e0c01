"""Draw first: which crops of a slice, how changed, what masked. Numbers only; `render.py` makes the pixels.

Boxes are fractions (y0, x0, y1, x1) of the slice, so drawing needs the content summary of the store and no pixel. All
randomness comes from one generator a sample, keyed by (seed, sample number): any crop of any step can be drawn again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hilum.archive.store.content import SliceContent
from hilum.pretrain.masks import Mask, sample_block_mask
from hilum.pretrain.recipe import Intensity, Range, ViewSpec

Box = tuple[float, float, float, float]
Boxes = NDArray[np.float64]

SHAPE_TRIES = 10  # torchvision's RandomResizedCrop
BLUR_SIGMA = (0.3, 1.2)  # pixels of the crop


@dataclass(frozen=True, slots=True)
class View:
    """What was decided for one crop.

    box         (y0, x0, y1, x1) as fractions of the slice
    foreground  share of anatomy in the box
    rejected    boxes that were drawn before and held too little anatomy
    flip        mirrored left-right
    size_px     side of the rendered crop
    gain, offset, gamma, noise, blur   change of intensity, see `Intensity`; noise is its standard deviation, blur the
                sigma in pixels, gamma the exponent
    noise_seed  decides the noise
    window_hu   (lowest, highest) value that is told apart, or None
    mask        (rows, columns) of patches to hide, or None
    """

    box: Box
    foreground: float
    rejected: tuple[Box, ...]
    flip: bool
    size_px: int
    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0
    blur: float = 0.0
    noise_seed: int = 0
    window_hu: Range | None = None
    mask: Mask | None = None


def sample_views(
    rng: np.random.Generator,
    content: SliceContent,
    unit: str,
    spec: ViewSpec,
    sizes: tuple[int, int],
    grid: tuple[int, int],
    mask_counts: list[int],
) -> list[View]:
    """All views of one slice: the global ones first.

    content      foreground grid and centre of the slice
    unit         of its values; "HU" takes the changes of `spec.ct`, anything else those of `spec.mr`
    sizes        side of a global and of a local crop
    grid         patches of a global crop
    mask_counts  for each global crop, how many patches to hide (0 = none)
    """
    num = spec.num_global + spec.num_local
    scales = np.array([spec.global_scale] * spec.num_global + [spec.local_scale] * spec.num_local)
    crops = sample_crops(rng, content.grid, scales, spec)
    flips = (rng.random(num) < spec.flip).tolist()
    changes = sample_intensity(rng, spec.ct if unit == "HU" else spec.mr, num)
    views = []
    for number, ((box, share, rejected), flip, change) in enumerate(zip(crops, flips, changes)):
        is_global, mask = number < spec.num_global, None
        if is_global and mask_counts[number]:
            center = anatomy_in_crop(content.center, box, flip) if spec.mask_prior == "guided" else None
            mask = sample_block_mask(rng, grid, mask_counts[number], center, spec.mask_sigma)
        gain, offset, gamma, noise, blur, noise_seed, window_hu = change
        size_px = sizes[0] if is_global else sizes[1]
        views.append(
            View(box, share, rejected, flip, size_px, gain, offset, gamma, noise, blur, noise_seed, window_hu, mask)
        )
    return views


def foreground_share(grid: NDArray[np.float32], boxes: Boxes) -> NDArray[np.float64]:
    """Share of anatomy in boxes (N, 4), exact for a foreground grid that is constant in each cell."""
    rows, columns = grid.shape
    in_rows = _overlap(boxes[:, 0], boxes[:, 2], rows)
    in_columns = _overlap(boxes[:, 1], boxes[:, 3], columns)
    total = ((in_rows @ grid) * in_columns).sum(1) / (rows * columns)
    return np.asarray(total / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))


def _overlap(low: NDArray[np.float64], high: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """(N, cells) share of each cell that lies between two fractions of an axis."""
    at = np.arange(cells)
    return np.clip(high[:, None] * cells - at, 0, 1) - np.clip(low[:, None] * cells - at, 0, 1)


def sample_crops(
    rng: np.random.Generator, grid: NDArray[np.float32], scales: NDArray[np.float64], spec: ViewSpec
) -> list[tuple[Box, float, tuple[Box, ...]]]:
    """Random crops with enough anatomy: for each the first draw that has it, else the best of `max_tries`.

    grid     foreground grid of the slice
    scales   (V, 2) range of the area of each crop
    returns  for each crop its box, foreground share, the boxes rejected before
    """
    num, tries = len(scales), spec.max_tries
    boxes = sample_boxes(rng, np.repeat(scales, tries, 0), spec.aspect)
    shares = foreground_share(grid, boxes).reshape(num, tries)
    enough = shares >= spec.min_crop_foreground
    found = enough.any(1)
    chosen = np.where(found, enough.argmax(1), shares.argmax(1))
    tuples = [tuple(box) for box in boxes.tolist()]
    crops = []
    for number, (pick, good) in enumerate(zip(chosen.tolist(), np.asarray(found).tolist())):
        drawn = tuples[number * tries : (number + 1) * tries]
        rejected = drawn[:pick] if good else drawn[:pick] + drawn[pick + 1 :]
        crops.append((drawn[pick], float(shares[number, pick]), tuple(rejected)))
    return crops


def sample_boxes(rng: np.random.Generator, scales: NDArray[np.float64], aspect: Range) -> Boxes:
    """Boxes (N, 4) of random area and shape at random places (the draw of RandomResizedCrop).

    scales  (N, 2) range of the area; area and shape are drawn together up to ten times until the box fits
    """
    draws = rng.random((len(scales), SHAPE_TRIES, 2))
    log_area = np.log(scales[:, :1] + draws[..., 0] * (scales[:, 1:] - scales[:, :1]))
    log_low, log_high = np.log(aspect)
    log_ratio = log_low + draws[..., 1] * (log_high - log_low)
    fits = np.abs(log_ratio) <= -log_area
    row, first = np.arange(len(scales)), fits.argmax(1)
    any_fits = fits[row, first]
    log_area = np.where(any_fits, log_area[row, first], np.log(scales[:, 1]))
    log_ratio = np.where(any_fits, log_ratio[row, first], 0.0)
    sides = np.minimum(np.exp(np.stack([log_area - log_ratio, log_area + log_ratio], 1) / 2), 1.0)
    corner = rng.random((len(scales), 2)) * (1 - sides)
    return np.concatenate([corner, corner + sides], 1)


def sample_intensity(
    rng: np.random.Generator, intensity: Intensity, num: int
) -> list[tuple[float, float, float, float, float, int, Range | None]]:
    """Changes of `num` crops: gain, offset, gamma, noise, blur, seed of the noise, window."""
    draws = rng.random((num, 9))
    gain, offset = 1 + intensity.gain * (2 * draws[:, 0] - 1), intensity.offset * (2 * draws[:, 1] - 1)
    gamma, noise = np.exp(intensity.gamma * (2 * draws[:, 2] - 1)), intensity.noise * draws[:, 3]
    sigma = BLUR_SIGMA[0] + draws[:, 5] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])
    blur = np.where(draws[:, 4] < intensity.blur, sigma, 0.0)
    windows: list[Range | None] = [None] * num
    for number in np.flatnonzero(draws[:, 6] < intensity.window).tolist():
        level, width = intensity.windows_hu[int(rng.integers(len(intensity.windows_hu)))]
        level, width = level + width * 0.1 * (2 * draws[number, 7] - 1), width * (0.8 + 0.4 * draws[number, 8])
        windows[number] = float(level - width / 2), float(level + width / 2)
    seeds = rng.integers(2**31, size=num)
    return list(zip(*(a.tolist() for a in (gain, offset, gamma, noise, blur, seeds)), windows))


def anatomy_in_crop(center: tuple[float, float], box: Box, flip: bool) -> tuple[float, float]:
    """The anatomy's centre in fractions of the crop: shifted by the crop's offset, as Curia-2 says; may lie outside."""
    y0, x0, y1, x1 = box
    y, x = (center[0] - y0) / (y1 - y0), (center[1] - x0) / (x1 - x0)
    return y, 1 - x if flip else x


def sample_points(
    rng: np.random.Generator, grid: NDArray[np.float32], views: list[View], count: int
) -> NDArray[np.float32]:
    """Places of the anatomy that several crops show, in the coordinates of each crop.

    grid     foreground grid of the slice
    views    the crops
    returns  (len(views), count, 2): (y, x) in fractions of each crop; NaN when the crops share no place

    Cells of the foreground grid are drawn by their share of anatomy within the crops' common box, places within a cell
    uniformly.
    """
    boxes = np.array([view.box for view in views])
    low, high = boxes[:, :2].max(0), boxes[:, 2:].min(0)
    rows, columns = grid.shape
    points = np.full((len(views), count, 2), np.nan, np.float32)
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    inside = np.outer((y > low[0]) & (y < high[0]), (x > low[1]) & (x < high[1]))
    weight = (grid * inside).ravel().astype(np.float64)
    if count == 0 or weight.sum() == 0:
        return points
    cells = rng.choice(grid.size, count, p=weight / weight.sum())
    place = np.stack([cells // columns, cells % columns], 1) + rng.random((count, 2))
    place = np.clip(place / [rows, columns], low, high)
    for out, view in zip(points, views):
        y0, x0, y1, x1 = view.box
        out[:] = (place - [y0, x0]) / [y1 - y0, x1 - x0]
        if view.flip:
            out[:, 1] = 1 - out[:, 1]
    return points
