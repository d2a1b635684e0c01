"""Draw first: which crops of a slice, how changed, what masked. Numbers only; `render.py` makes the pixels.

Boxes are fractions (y0, x0, y1, x1) of the slice, so drawing needs the content summary of the store and no pixel. All
randomness comes from one generator a sample, keyed by (seed, sample number): any crop of any step can be drawn again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hilum.archive.store.content import SliceContent
from hilum.pretrain.recipe import ViewSpec

Box = tuple[float, float, float, float]
Mask = NDArray[np.bool_]

MIN_BLOCK = 4  # patches; DINOv2's smallest mask block
BLOCK_ASPECT = (0.3, 1 / 0.3)  # and its range of height/width
BLOCK_TRIES = 10


@dataclass(frozen=True)
class View:
    """What was decided for one crop.

    box         (y0, x0, y1, x1) as fractions of the slice
    foreground  share of anatomy in the box
    rejected    boxes that were drawn before and held too little anatomy
    flip        mirrored left-right
    gain, offset, noise, noise_seed, blur   intensity: x·gain + offset + noise·N(0, 1), Gaussian blur sigma in pixels
    size_px     side of the rendered crop
    mask        (rows, columns) of patches to hide, or None
    """

    box: Box
    foreground: float
    rejected: tuple[Box, ...]
    flip: bool
    gain: float
    offset: float
    noise: float
    noise_seed: int
    blur: float
    size_px: int
    mask: Mask | None = None


def sample_rng(seed: int, sample: int) -> np.random.Generator:
    """The generator of one training sample."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, sample], np.uint64)))


def sample_views(
    rng: np.random.Generator, content: SliceContent, spec: ViewSpec, grid: tuple[int, int], mask_counts: list[int]
) -> list[View]:
    """All views of one slice: the global ones first.

    content      foreground grid and centre of the slice
    grid         patches of a global crop
    mask_counts  for each global crop, how many patches to hide (0 = none)
    """
    integral = integrate(content.grid)
    views = []
    for number in range(spec.num_global + spec.num_local):
        is_global = number < spec.num_global
        scale = spec.global_scale if is_global else spec.local_scale
        box, share, rejected = sample_crop(rng, integral, scale, spec)
        flip = bool(rng.random() < spec.flip)
        mask = None
        if is_global and mask_counts[number]:
            center = anatomy_in_crop(content.center, box, flip) if spec.mask_prior == "guided" else None
            mask = sample_block_mask(rng, grid, mask_counts[number], center, spec.mask_sigma)
        views.append(
            View(
                box=box,
                foreground=share,
                rejected=tuple(rejected),
                flip=flip,
                gain=1 + spec.gain * float(rng.uniform(-1, 1)),
                offset=spec.offset * float(rng.uniform(-1, 1)),
                noise=spec.noise * float(rng.random()),
                noise_seed=int(rng.integers(2**31)),
                blur=float(rng.uniform(0.3, 1.2)) if rng.random() < spec.blur else 0.0,
                size_px=spec.global_px if is_global else spec.local_px,
                mask=mask,
            )
        )
    return views


def integrate(grid: NDArray[np.float32]) -> NDArray[np.float64]:
    """Integral image of the foreground grid, with a leading row and column of zeros; its last value is the mean."""
    rows, columns = grid.shape
    out = np.zeros((rows + 1, columns + 1))
    out[1:, 1:] = grid.cumsum(0, dtype=np.float64).cumsum(1) / grid.size
    return out


def foreground_share(integral: NDArray[np.float64], box: Box) -> float:
    """Share of anatomy in a box, exact for a grid that is constant in each cell."""
    y0, x0, y1, x1 = box
    total = _at(integral, y1, x1) - _at(integral, y0, x1) - _at(integral, y1, x0) + _at(integral, y0, x0)
    return total / ((y1 - y0) * (x1 - x0))


def _at(integral: NDArray[np.float64], y: float, x: float) -> float:
    """The integral at a fraction of the image, bilinear between grid corners."""
    rows, columns = integral.shape[0] - 1, integral.shape[1] - 1
    y, x = y * rows, x * columns
    j, i = min(int(y), rows - 1), min(int(x), columns - 1)
    v, u = y - j, x - i
    top = (1 - u) * integral[j, i] + u * integral[j, i + 1]
    bottom = (1 - u) * integral[j + 1, i] + u * integral[j + 1, i + 1]
    return float((1 - v) * top + v * bottom)


def sample_crop(
    rng: np.random.Generator, integral: NDArray[np.float64], scale: tuple[float, float], spec: ViewSpec
) -> tuple[Box, float, list[Box]]:
    """A random crop with enough anatomy: the first that has it, else the best of `max_tries`.

    returns  box, its foreground share, the boxes rejected before
    """
    best, best_share = (0.0, 0.0, 1.0, 1.0), -1.0
    rejected: list[Box] = []
    for _ in range(spec.max_tries):
        box = sample_box(rng, scale, spec.aspect)
        share = foreground_share(integral, box)
        if share >= spec.min_crop_foreground:
            return box, share, rejected
        rejected.append(box)
        if share > best_share:
            best, best_share = box, share
    rejected.remove(best)
    return best, best_share, rejected


def sample_box(rng: np.random.Generator, scale: tuple[float, float], aspect: tuple[float, float]) -> Box:
    """A box of random area and shape at a random place (the draw of RandomResizedCrop)."""
    for _ in range(10):
        area, ratio = rng.uniform(*scale), np.exp(rng.uniform(*np.log(aspect)))
        height, width = float(np.sqrt(area / ratio)), float(np.sqrt(area * ratio))
        if height <= 1 and width <= 1:
            break
    else:
        height = width = float(np.sqrt(scale[1]))
    y0, x0 = float(rng.uniform(0, 1 - height)), float(rng.uniform(0, 1 - width))
    return y0, x0, y0 + height, x0 + width


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
    if weight.sum() == 0:
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


def mask_counts(num_crops: int, num_patches: int, spec: ViewSpec, rng: np.random.Generator) -> list[int]:
    """How many patches to hide in each global crop of a batch; the sum is the same at every step.

    ⌊num_crops · mask_probability⌋ crops are masked; the k-th of n gets ⌊N · (low + (high − low)·k/n)⌋ patches, the upper
    edge of its stratum (DINOv3), and crops are shuffled. 128 crops of 16×16 patches hide 4,941 in all.
    """
    num_masked = int(num_crops * spec.mask_probability)
    edges = np.linspace(*spec.mask_ratio, num_masked + 1)[1:]
    counts = [int(num_patches * edge) for edge in edges] + [0] * (num_crops - num_masked)
    return [int(c) for c in rng.permutation(counts)]


def sample_block_mask(
    rng: np.random.Generator,
    grid: tuple[int, int],
    count: int,
    center: tuple[float, float] | None = None,
    sigma: float = 0.25,
) -> Mask:
    """Hide exactly `count` patches, in blocks, topped up by single patches.

    grid     (rows, columns) of patches
    center   (y, x) in fractions of the crop around which blocks fall (Gaussian, `sigma` in the same unit); None places
             them uniformly, as DINOv2 does
    """
    rows, columns = grid
    if not 0 <= count <= rows * columns:
        raise ValueError(f"cannot hide {count} of {rows * columns} patches")
    mask = np.zeros(grid, bool)
    while (left := count - int(mask.sum())) > 0:
        block = _find_block(rng, mask, left, center, sigma)
        if block is None:
            break
        mask[block] = True
    missing = count - int(mask.sum())
    if missing:
        free = np.flatnonzero(~mask)
        chosen = rng.choice(free, missing, replace=False, p=_prior(grid, free, center, sigma))
        mask.flat[chosen] = True
    return mask


def _find_block(
    rng: np.random.Generator, mask: Mask, left: int, center: tuple[float, float] | None, sigma: float
) -> tuple[slice, slice] | None:
    """A block that hides at least one and at most `left` more patches, or None after ten tries."""
    rows, columns = mask.shape
    for _ in range(BLOCK_TRIES):
        area = rng.uniform(MIN_BLOCK, max(left, MIN_BLOCK))
        aspect = np.exp(rng.uniform(*np.log(BLOCK_ASPECT)))
        height, width = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if not (0 < height <= rows and 0 < width <= columns):
            continue
        if center is None:
            top, start = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        else:
            y, x = rng.normal(center, sigma)
            top = int(np.clip(round(y * rows - height / 2), 0, rows - height))
            start = int(np.clip(round(x * columns - width / 2), 0, columns - width))
        block = slice(top, top + height), slice(start, start + width)
        if 0 < height * width - int(mask[block].sum()) <= left:
            return block
    return None


def _prior(
    grid: tuple[int, int], free: NDArray[np.intp], center: tuple[float, float] | None, sigma: float
) -> NDArray[np.float64] | None:
    """Chance of each free patch under the Gaussian, floored so that a far anatomy still leaves a choice."""
    if center is None:
        return None
    y = (free // grid[1] + 0.5) / grid[0] - center[0]
    x = (free % grid[1] + 0.5) / grid[1] - center[1]
    weight = np.maximum(np.exp(-(y**2 + x**2) / (2 * sigma**2)), 1e-6)
    out: NDArray[np.float64] = weight / weight.sum()
    return out
