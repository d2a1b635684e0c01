"""Draw first: which crops of a volume, how turned and changed, what masked. `volume_render.py` makes the voxels.

Crops are whole boxes of voxels of the training store, whose voxels are cubes. All randomness comes from one generator a sample.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from hilum.archive.store.isotropic import VolumeContent
from hilum.pretrain.masks import Mask, sample_block_mask
from hilum.pretrain.recipe import Range, ViewSpec
from hilum.pretrain.views import sample_intensity
from hilum.pretrain.volume_spec import Shape, VolumeSpec

Flips = tuple[bool, bool, bool]
Boxes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class VolumeView:
    """What was decided for one crop.

    start, size   box of voxels of the volume, along its own axes
    axes          axis i of the crop shows axis axes[i] of the volume
    flips         along the axes of the crop
    shape         of the crop as the network sees it
    foreground    share of anatomy in the box
    num_rejected  boxes that were drawn before and held too little anatomy
    gain, offset, gamma, noise, noise_seed   change of intensity, as in `views.View`
    window        a standard normal and a uniform number that place a window among the crop's quantiles, or None
    mask          patches to hide, on the patch grid of the crop, or None
    """

    start: Shape
    size: Shape
    axes: Shape
    flips: Flips
    shape: Shape
    foreground: float
    num_rejected: int
    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0
    noise_seed: int = 0
    window: tuple[float, float] | None = None
    mask: Mask | None = None


def sample_volume_views(
    rng: np.random.Generator,
    shape: Shape,
    unit: str,
    content: VolumeContent,
    views: ViewSpec,
    volumes: VolumeSpec,
    shapes: tuple[Shape, Shape],
    grid: Shape,
    mask_counts: list[int],
) -> list[VolumeView]:
    """All views of one volume: the global ones first.

    shape        voxels of the volume
    unit         of its values; "HU" takes the changes of `views.ct` and windows, anything else those of `views.mr`
    content      where its anatomy lies
    shapes       of a global and of a local crop
    grid         patches of a global crop
    mask_counts  for each global crop, how many patches to hide (0 = none)
    """
    num = views.num_global + views.num_local
    crops = sample_boxes(rng, shape, content, views, volumes, shapes[0], views.global_scale, views.num_global)
    crops += sample_boxes(rng, shape, content, views, volumes, shapes[1], views.local_scale, views.num_local)
    flip_draws, extra = rng.random((num, 3)), rng.integers(3, size=num).tolist()
    changes = sample_intensity(rng, views.ct if unit == "HU" else views.mr, num)
    window_draws, levels = rng.random((num, 2)), rng.standard_normal(num)
    made = []
    for number, (start, size, axes, share, rejected) in enumerate(crops):
        is_global, mask, window = number < views.num_global, None, None
        may_flip = is_global or volumes.flip_locals
        flips = [may_flip and bool(draw < volumes.flip) for draw in flip_draws[number]]
        if not volumes.mirror and mirrors(axes, flips):
            flips[extra[number]] = not flips[extra[number]]
        turned = flips[0], flips[1], flips[2]
        if is_global and mask_counts[number]:
            guided = views.mask_prior == "guided"
            center = anatomy_in_crop(content.center, shape, start, size, axes, turned) if guided else None
            mask = sample_block_mask(rng, grid, mask_counts[number], center, views.mask_sigma)
        if unit == "HU" and (number == 0 or volumes.window_views == "all") and window_draws[number, 0] < volumes.window:
            window = float(levels[number]), float(window_draws[number, 1])
        gain, offset, gamma, noise, _, noise_seed, _ = changes[number]
        target = shapes[0] if is_global else shapes[1]
        made.append(
            VolumeView(
                start, size, axes, turned, target, share, rejected, gain, offset, gamma, noise, noise_seed, window, mask
            )
        )
    return made


def sample_boxes(
    rng: np.random.Generator,
    shape: Shape,
    content: VolumeContent,
    views: ViewSpec,
    volumes: VolumeSpec,
    target: Shape,
    scale: Range,
    num: int,
) -> list[tuple[Shape, Shape, Shape, float, int]]:
    """Random boxes with enough anatomy: for each crop the first draw that has it, else the best of `views.max_tries`.

    target   shape of the crop that a box is rendered to
    scale    range of the share that `volumes.scale_of` speaks of
    returns  for each crop start, size, axes, foreground share, how many boxes were rejected before
    """
    tries = views.max_tries
    draws = rng.random((num * tries, 5))
    ways = np.array(ways_to_lay(shape, target, volumes))
    axes = ways[(draws[:, 0] * len(ways)).astype(int)]
    sides = box_sides(np.array(shape), np.array(target), axes, scale[0] + draws[:, 1] * (scale[1] - scale[0]), volumes)
    starts = (draws[:, 2:] * (np.array(shape) - sides + 1)).astype(np.int64)
    low = starts / shape
    shares = foreground_share(content.grid, low, (starts + sides) / shape).reshape(num, tries)
    enough = shares >= views.min_crop_foreground
    found = np.asarray(enough.any(1))
    picks = np.where(found, enough.argmax(1), shares.argmax(1)).tolist()
    boxes = []
    for number, (pick, good) in enumerate(zip(picks, found.tolist())):
        at = number * tries + pick
        start, size, way = (_shape(a[at]) for a in (starts, sides, axes))
        boxes.append((start, size, way, float(shares[number, pick]), pick if good else tries - 1))
    return boxes


def _shape(numbers: NDArray[np.int64]) -> Shape:
    z, y, x = numbers.tolist()
    return z, y, x


def ways_to_lay(shape: Shape, target: Shape, volumes: VolumeSpec) -> list[Shape]:
    """The permutations that `volumes.permute` allows: axis i of the crop shows axis way[i] of the volume."""
    if volumes.permute == "none":
        return [(0, 1, 2)]
    ways: list[Shape] = [(a, b, c) for a, b, c in permutations(range(3))]
    if volumes.permute == "all":
        return ways
    largest = [min(shape[axis] / side for axis, side in zip(way, target)) for way in ways]
    if volumes.permute == "needed" and largest[0] >= max(largest) / 2:
        return ways[:1]  # as they are
    return [way for way, factor in zip(ways, largest) if factor == max(largest)]


def box_sides(
    shape: NDArray[np.int64], target: NDArray[np.int64], axes: Boxes, scales: NDArray[np.float64], volumes: VolumeSpec
) -> Boxes:
    """Sides (N, 3), along the axes of the volume, of boxes with the proportions of the target.

    VoxelFM's RandomCrop3D with `scale_of` "side": with q the target laid on the volume, a box is round(α·q) voxels, where
    α = min(s·min(shape)/min(q), min(shape/q)), so a cube has the share s of the volume's shortest side. "volume": a box has the
    share s of all voxels. Either way it fits into the volume without a change of its proportions.
    """
    laid = np.empty_like(axes)
    np.put_along_axis(laid, axes, np.broadcast_to(target, axes.shape), 1)
    if volumes.scale_of == "side":
        wanted = scales * shape.min() / target.min()
    else:
        wanted = np.cbrt(scales * math.prod(shape.tolist()) / math.prod(target.tolist()))
    factor = np.minimum(wanted, (shape / laid).min(1))
    sides: Boxes = np.clip(np.rint(factor[:, None] * laid), 1, shape).astype(np.int64)
    return sides


def foreground_share(
    grid: NDArray[np.float32], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share of anatomy in boxes from low to high (N, 3), fractions of the volume; exact for a grid constant in each cell."""
    along = [cell_overlap(low[:, axis], high[:, axis], n) for axis, n in enumerate(grid.shape)]
    columns = (along[0] @ grid.reshape(len(grid), -1)).reshape(-1, *grid.shape[1:])
    total = np.einsum("nyx,ny,nx->n", columns, along[1], along[2], optimize=True)
    return np.asarray(total / (np.prod(high - low, 1) * grid.size))


def cell_overlap(low: NDArray[np.float64], high: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """(N, cells) share of each cell that lies between two fractions of an axis."""
    at = np.arange(cells)
    return np.clip(high[:, None] * cells - at, 0, 1) - np.clip(low[:, None] * cells - at, 0, 1)


def mirrors(axes: Shape, flips: list[bool] | Flips) -> bool:
    """Whether a permutation and flips together turn left into right: the determinant is −1."""
    swaps = sum(axes[i] > axes[j] for i in range(3) for j in range(i + 1, 3))
    return bool((swaps + sum(flips)) % 2)


def anatomy_in_crop(
    center: tuple[float, ...], shape: Shape, start: Shape, size: Shape, axes: Shape, flips: Flips
) -> tuple[float, ...]:
    """The anatomy's centre in fractions of the crop, along the axes of the crop; may lie outside."""
    at = [(center[axis] * shape[axis] - start[axis]) / size[axis] for axis in axes]
    return tuple(1 - a if flip else a for a, flip in zip(at, flips))


def sample_volume_points(
    rng: np.random.Generator, content: VolumeContent, views: list[VolumeView], shape: Shape, count: int
) -> NDArray[np.float32]:
    """Places of the anatomy that several crops show, in the coordinates of each crop.

    shape    voxels of the volume
    returns  (len(views), count, 3): fractions of each crop along its axes; NaN when the crops share no anatomy

    Uniform over the anatomy in the crops' common box: cells of the foreground grid are drawn by what they hold of it.
    """
    points = np.full((len(views), count, 3), np.nan, np.float32)
    start, size = (np.array([getattr(v, name) for v in views], float) for name in ("start", "size"))
    low, high = (start / shape).max(0), ((start + size) / shape).min(0)
    grid = content.grid
    if count == 0 or (low >= high).any():
        return points
    z, y, x = (cell_overlap(low[axis, None], high[axis, None], n)[0] for axis, n in enumerate(grid.shape))
    weight = (grid * z[:, None, None] * y[:, None] * x).ravel()
    if weight.sum() == 0:
        return points
    cells = np.stack(np.unravel_index(rng.choice(grid.size, count, p=weight / weight.sum()), grid.shape), 1)
    first, last = np.maximum(cells / grid.shape, low), np.minimum((cells + 1) / grid.shape, high)
    places = (first + rng.random((count, 3)) * (last - first)) * shape
    for out, view, begin, extent in zip(points, views, start, size):
        own = ((places - begin) / extent)[:, view.axes]
        out[:] = np.where(view.flips, 1 - own, own)
    return points


def view_affine(view: VolumeView, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """4×4 from an index of the crop to LPS mm.

    affine  of the volume: index (k, j, i) → LPS mm
    """
    own = np.zeros((4, 4))
    own[3, 3] = 1
    for crop_axis, (axis, flip) in enumerate(zip(view.axes, view.flips)):
        step = view.size[axis] / view.shape[crop_axis]
        own[axis, crop_axis] = -step if flip else step
        own[axis, 3] = view.start[axis] + (view.size[axis] - step / 2 if flip else step / 2) - 0.5
    return affine @ own
