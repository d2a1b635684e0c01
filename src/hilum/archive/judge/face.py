"""A face in a head scan: is there one, and take it away.

A head CT or MR can be rendered to a face that people and programs recognise (Schwarz et al. 2019, N Engl J Med 381:1684).
Here everything is measured on a coarse grid in patient axes, so that neither storage order nor slice plane matters:

1. head: what is not air; the largest piece, without thin things such as a table;
2. cranium: an ellipsoid fitted to the skin of the upper head, with the size of human heads as prior knowledge;
3. face: rays from the centre of the cranium forwards and downwards. The nose is the place that stands out most from its
   surroundings; it shows how the head is turned. A face stands out of the ellipsoid and meets air within the field of
   view. Abdomens and fruit do not fit the ellipsoid, brains without skin do not stand out of it;
4. skull: what is round and bears a bump is a head only with a skull under its skin.

The mask is a cone of rays around the nose, cut to a layer behind the skin and kept clear of the cranium.
"""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from hilum.archive.store.content import CT_AIR_HU, foreground_threshold
from hilum.large import each, gather
from hilum.volume import FloatArray, Volume

LIKELY = 0.5  # from this score on, a face is removed
CELL_MM = 4.0  # of the coarse grid
DEPTH_MM = 30.0  # thickness of what is removed, behind the skin
MAX_CELLS = 2e7  # of the coarse grid: 1.3 m³
MAX_MM = 25.0  # larger voxels show no face
MAX_FIELD_MM = 2500.0  # a larger field is no scan of a patient
_SEMI_MM = np.array([77.0, 98.0, 92.0])  # skin of an adult cranium: to the left, posterior, superior
_NOSE_DEG = 24.0  # noses lie this far below the horizontal through the centre of the cranium
_NOSE_MM = 8.0  # that a nose stands out at least
_CONE_DEG = 41.0  # around the nose: eyes reach 33°, the brow 30°, the chin 24°
_REACH_MM = 185.0  # from the centre of the cranium to below the chin
_BONE_HU = 200.0  # of a cell of the coarse grid; skulls reach 400 and more
_KEEP = 0.90  # of the ellipsoid is never touched; scalp and skull are 12 mm thick: 0.86 of it are brain
_TOP_MM, _TRUNK_MM, _TRUNK_MM2, _TRUNK_CELL_MM = 60.0, 280.0, 50e3, 8.0  # upper end of a scan: width, cross-section
_AZIMUTHS_DEG, _ELEVATIONS_DEG = np.arange(-60.0, 61, 2), np.arange(-80.0, 31, 2)

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Coarse:
    """The scan on cubic cells along the patient axes.

    values  (Z, Y, X) averages
    head    (Z, Y, X) tissue of the head, cavities filled
    seen    (Z, Y, X) cells within the field of view
    origin  (x, y, z) mm of cell (0, 0, 0)
    air     mean value outside the head
    """

    values: NDArray[np.float32]
    head: Bools
    seen: Bools
    origin: FloatArray
    air: float


@dataclass(frozen=True)
class _Cranium:
    """An ellipsoid: center (x, y, z) mm; axes (3, 3), columns to the left, back and top of the head; semi (3,) mm."""

    center: FloatArray
    axes: FloatArray
    semi: FloatArray
    misfit_mm: float

    def radius(self, points: FloatArray) -> FloatArray:
        """Distance of points (N, 3) from the centre, as a share of the ellipsoid: 1 on its surface."""
        r: FloatArray = np.linalg.norm((points - self.center) @ self.axes / self.semi, axis=-1)
        return r


@dataclass(frozen=True)
class _Face:
    """What the rays found.

    axis     unit vector from the cranium's centre to the tip of the nose
    seen       share of the rays into the face that leave the skin within the field of view
    height_mm  of the part of the face that they meet
    filled     first quartile of skin over ellipsoid along these rays: below 0.9 under a brain without a face
    tip        skin over ellipsoid at the nose
    nose_mm    how far the nose stands out from the cheeks
    """

    axis: FloatArray
    seen: float
    height_mm: float
    filled: float
    tip: float
    nose_mm: float


def face_score(vol: Volume) -> float:
    """Whether a scan shows a face that could be rendered: 0 (surely not) to 1. A score, not a promise.

    vol      CT in HU or MR with geometry; any orientation, plane or tilt; without geometry the score is 0
    returns  the product of three shares: fit of the cranium, face within the field of view, face standing out

    Faces whose upper head lies outside the field of view are found less surely; a second head is not looked for.
    """
    found = _find(vol)
    return 0.0 if found is None else _score(*found, is_ct=vol.unit == "HU")


def deface(vol: Volume) -> tuple[Volume, float, int]:
    """Replace the face by air, when `face_score` is 0.5 or more.

    returns  the volume (unchanged, the same object, when no face was found), the score, the number of voxels replaced

    Everything in a cone around the nose is replaced, from the edge of the field to 30 mm behind the skin, except the
    inside of the cranium: skin, eyes, nose and lips go, the brain stays. CT gets -1000 HU, MR the mean of its air.
    """
    found = _find(vol)
    score = 0.0 if found is None else _score(*found, is_ct=vol.unit == "HU")
    if found is None or score < LIKELY:
        return vol, score, 0
    coarse, cranium, face = found
    assert vol.affine is not None
    mask = _mask(coarse, cranium, face).astype(np.float32)
    cells = np.argwhere(mask > 0)
    if not len(cells):
        return vol, score, 0
    # Which voxels may lie in the mask: the box around its cells, in voxel indices.
    inverse = np.linalg.inv(vol.affine)
    low, high = cells.min(0) - 1, cells.max(0) + 1
    corners = np.array(np.meshgrid(*zip(low, high))).reshape(3, -1).T[:, ::-1] * CELL_MM + coarse.origin
    index = corners @ inverse[:3, :3].T + inverse[:3, 3]
    start = np.clip(np.floor(index.min(0)), 0, np.array(vol.shape) - 1).astype(int)
    stop = np.clip(np.ceil(index.max(0)) + 1, start + 1, vol.shape).astype(int)
    matrix = vol.affine[:3, :3][::-1] / CELL_MM
    offset = ((vol.affine[:3, 3] - coarse.origin)[::-1]) / CELL_MM + matrix @ start
    inside = ndimage.affine_transform(mask, matrix, offset, tuple(stop - start), order=1, mode="constant") > 0.5
    voxels = gather(each(vol.voxels), vol.shape, vol.voxels.dtype)
    box = voxels[tuple(slice(a, b) for a, b in zip(start, stop))]
    box[inside] = -1000 if vol.unit == "HU" else np.asarray(coarse.air).astype(voxels.dtype)
    return replace(vol, voxels=voxels), score, int(inside.sum())


def _score(coarse: _Coarse, cranium: _Cranium, face: _Face, *, is_ct: bool) -> float:
    size = cranium.semi / _SEMI_MM
    if size.min() < 0.6 or size.max() > 1.3 or size.max() > 1.4 * size.min():
        return 0.0
    fit = np.clip((6.0 - cranium.misfit_mm) / 2.0, 0, 1)
    nose = np.clip((face.nose_mm - _NOSE_MM) / 6, 0, 1) * np.clip((face.tip - 1.03) / 0.08, 0, 1)
    below = np.clip((face.filled - 0.84) / 0.08, 0, 1)
    seen = np.clip((face.seen - 0.1) / 0.3, 0, 1) * np.clip((face.height_mm - 25) / 25, 0, 1)
    return float(fit * nose * below * seen * _skull(coarse, cranium, is_ct=is_ct))


def _skull(coarse: _Coarse, cranium: _Cranium, *, is_ct: bool) -> float:
    """Whether the ellipsoid has a skull: 0 for knees, breasts and bottles, which may also be round and bear a bump.

    Rays upwards and around. CT: bone under the skin on most of them (84 % and more in heads with a face, 0 in others at
    hand). MR: a dark shell between scalp and brain on some (26 % and more), and a top that lies within the field, which
    that of a limb does not.
    """
    azimuth, elevation = np.meshgrid(np.radians(np.arange(0, 360, 15)), np.radians(np.arange(10, 90, 10)))
    level, weight = np.cos(elevation).ravel(), np.cos(elevation).ravel()
    rays = np.stack([level * np.sin(azimuth.ravel()), level * np.cos(azimuth.ravel()), np.sin(elevation).ravel()], 1)
    shares = np.arange(0.5, 1.08, 0.02)
    points = cranium.center + (shares[:, None, None] * rays * cranium.semi) @ cranium.axes.T
    cells = np.moveaxis((points - coarse.origin)[..., ::-1] / CELL_MM, -1, 0)
    values = ndimage.map_coordinates(coarse.values, cells, order=1, mode="nearest")
    inside = ndimage.map_coordinates(coarse.seen.astype(np.float32), cells, order=0, mode="constant")
    imaged = weight * (inside[shares >= 0.8].mean(0) > 0.9)
    if not imaged.any():
        return 0.0
    if is_ct:
        bone = values[shares > 0.75].max(0) > _BONE_HU
        return float(np.clip(((imaged * bone).sum() / imaged.sum() - 0.2) / 0.4, 0, 1))
    shell = np.flatnonzero((shares >= 0.8) & (shares < 1.0))
    darkest = values[shell].argmin(0) + shell[0]
    scalp = np.maximum.accumulate(values[::-1], 0)[::-1]  # the brightest from here outwards
    dark, ray = values[darkest, np.arange(len(rays))], np.arange(len(rays))
    brain = np.median(values[(shares >= 0.5) & (shares < 0.75)], 0)
    found = (dark < 0.7 * brain) & (dark < 0.7 * scalp[darkest, ray])
    closed = np.clip((imaged.sum() / weight.sum() - 0.3) / 0.3, 0, 1)
    return float(closed * np.clip((imaged * found).sum() / imaged.sum() / 0.2, 0, 1))


def _find(vol: Volume) -> tuple[_Coarse, _Cranium, _Face] | None:
    if vol.affine is None or vol.kind == "label" or min(vol.shape) < 3 or _ends_in_trunk(vol):
        return None
    coarse = _coarsen(vol)
    if coarse is None:
        return None
    cranium = _fit_cranium(coarse, 0.0)
    if cranium is None:
        return None
    face = _look_for_face(coarse, cranium)
    # A cranium is so round that its skin hardly shows how far the head nods; the nose does.
    nod = np.radians(-_NOSE_DEG) - np.arcsin(np.clip(face.axis[2], -1, 1))
    if face.nose_mm > _NOSE_MM and abs(nod) > np.radians(8):
        nodding = _fit_cranium(coarse, nod)
        if nodding is not None and nodding.misfit_mm < cranium.misfit_mm + 0.5:
            cranium, face = nodding, _look_for_face(coarse, nodding)
    return coarse, cranium, face


def _ends_in_trunk(vol: Volume) -> bool:
    """Whether a CT shows a trunk where a head would have its top: wider and with more tissue than any head.

    A quick look at a voxel every 8 mm that spares most CTs the search. A head with both arms beside it is 450 cm² at most;
    lungs do not count, so that some trunks pass.
    """
    if vol.affine is None or vol.unit != "HU":
        return False
    step = [max(1, min(round(_TRUNK_CELL_MM / mm), n // 3)) for mm, n in zip(vol.spacing_mm, vol.shape)]
    few = vol.voxels[:: step[0], :: step[1], :: step[2]]
    tissue = gather((plane > CT_AIR_HU / 2 for plane in each(few)), few.shape, bool)
    pieces, num = ndimage.label(ndimage.binary_opening(tissue))
    if not num:
        return False
    cells = np.argwhere(pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:])))
    points = cells * step @ vol.affine[:3, :3].T
    upper = points[points[:, 2] > points[:, 2].max() - _TOP_MM]
    area_mm2 = len(upper) * abs(np.linalg.det(vol.affine[:3, :3])) * np.prod(step) / _TOP_MM
    return bool(np.ptp(upper[:, 0]) > _TRUNK_MM and area_mm2 > _TRUNK_MM2)


def _shrink(vol: Volume) -> Volume:
    """Average whole numbers of voxels, so that none is larger than a cell unless it was before."""
    assert vol.affine is not None
    step = [max(1, min(int(CELL_MM / mm), n)) for mm, n in zip(vol.spacing_mm, vol.shape)]
    a, b, c = (n // s for n, s in zip(vol.shape, step))
    out = np.zeros((a, b, c), np.float32)
    slices = each(vol.voxels[:, : b * step[1], : c * step[2]])
    for k in range(a):
        cells = np.zeros((b, c * step[2]), np.float32)
        for rows in (s.reshape(b, step[1], -1) for s in islice(slices, step[0])):
            for row in range(step[1]):
                cells += rows[:, row]
        for column in range(step[2]):
            out[k] += cells[:, column :: step[2]]
    out /= np.float32(np.prod(step))
    affine = vol.affine.copy()
    affine[:3, :3] *= step
    affine[:3, 3] += vol.affine[:3, :3] @ ((np.array(step) - 1) / 2)
    return replace(vol, voxels=out, affine=affine)


def _coarsen(vol: Volume) -> _Coarse | None:
    """The scan on the coarse grid; None when there is nothing of a head's size."""
    small = _shrink(vol)
    assert small.affine is not None
    ends = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in small.shape])).reshape(3, -1).T
    corners = ends @ small.affine[:3, :3].T + small.affine[:3, 3]
    low, high = corners.min(0) - CELL_MM, corners.max(0) + CELL_MM
    if (
        (high - low).max() > MAX_FIELD_MM
        or np.prod((high - low) / CELL_MM) > MAX_CELLS
        or max(small.spacing_mm) > MAX_MM
    ):
        return None
    shape = tuple(np.ceil((high - low) / CELL_MM).astype(int)[::-1])
    inverse = np.linalg.inv(small.affine)
    matrix, offset = inverse[:3, :3][:, ::-1] * CELL_MM, inverse[:3, :3] @ low + inverse[:3, 3]
    values = ndimage.affine_transform(small.voxels, matrix, offset, shape, order=1, mode="nearest")
    lines = [np.arange(n).reshape([-1 if a == b else 1 for b in range(3)]) for a, n in enumerate(shape)]
    seen = np.ones(shape, bool)
    for row, first, n in zip(matrix, offset, small.shape):
        at = first + sum(m * line for m, line in zip(row, lines))
        seen &= (at > -0.5) & (at < n - 0.5)
    threshold = CT_AIR_HU / 2 if vol.unit == "HU" else foreground_threshold(small.voxels.ravel())
    head = _largest_piece((values > threshold) & seen, skull_is_dark=vol.unit != "HU")
    if head is None:
        return None
    around = seen & ~head
    return _Coarse(values, head, seen, low, float(values[around].mean()) if around.any() else float(values.min()))


def _largest_piece(tissue: Bools, *, skull_is_dark: bool) -> Bools | None:
    """The head without thin things that touch it, cavities filled; None when there is nothing of a head's size.

    skull_is_dark  in MR the skull parts skin from brain: cavities are filled before anything thin is dropped
    """
    if skull_is_dark:
        tissue = _fill(tissue)
    pieces, num = ndimage.label(ndimage.binary_opening(tissue, iterations=2))
    if not num:
        return None
    largest = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    head = _fill(ndimage.binary_dilation(largest, iterations=7, mask=tissue))  # noses and ears come back
    return head if head.sum() * CELL_MM**3 > 5e5 else None  # half a litre


def _fill(mask: Bools) -> Bools:
    """Fill what is enclosed in an axial plane: airways and, in MR, the skull."""
    out = mask.copy()
    for plane in out:
        plane |= ndimage.binary_fill_holes(ndimage.binary_closing(plane))
    return out


def _fit_cranium(coarse: _Coarse, nod: float) -> _Cranium | None:
    """The ellipsoid that fits the skin best, from several guesses of how much of the head's top was not imaged.

    nod  how far the chin is expected to be down, in radians
    """
    turn = Rotation.from_rotvec([nod, 0, 0]).as_matrix()
    skin = coarse.head & ndimage.binary_dilation(coarse.seen & ~coarse.head)
    points = np.argwhere(skin)[:, ::-1] * CELL_MM + coarse.origin
    if not len(points):
        return None
    top = points[:, 2].max()
    upper = points[points[:, 2] > top - 60]
    middle = (upper.min(0) + upper.max(0)) / 2
    best: _Cranium | None = None
    for below_top in (92, 60, 25):
        guess = _Cranium(np.array([middle[0], middle[1], top - below_top]), turn, _SEMI_MM, np.inf)
        for _ in range(3):
            offset = points - guess.center
            front = -offset[:, 1] * 0.8 - offset[:, 2] * 0.6 > 0.6 * np.linalg.norm(offset, axis=1)
            used = points[(offset[:, 2] > -35) & ~front & (guess.radius(points) < 1.4)]
            if len(used) < 300:
                break
            guess = _fit_ellipsoid(used[:: len(used) // 600 + 1], guess, nod)
        if guess.misfit_mm < (best.misfit_mm if best else np.inf):
            best = guess
    return best


def _fit_ellipsoid(points: FloatArray, start: _Cranium, nod: float) -> _Cranium:
    """Least squares with priors: heads differ by 12 % in size, 6 % in proportions, and are turned by some 12°."""

    def unpack(p: FloatArray) -> _Cranium:
        return _Cranium(p[:3], Rotation.from_rotvec(p[6:]).as_matrix(), _SEMI_MM * np.exp(p[3:6]), np.inf)

    def distance(ellipsoid: _Cranium) -> FloatArray:
        """First-order distance of the points from the surface, in mm."""
        offset = (points - ellipsoid.center) @ ellipsoid.axes
        r = np.linalg.norm(offset / ellipsoid.semi, axis=1)
        slope = np.linalg.norm(offset / ellipsoid.semi**2, axis=1) / np.maximum(r, 1e-6)
        d: FloatArray = (r - 1) / np.maximum(slope, 1e-6)
        return d

    weight = 0.5 * np.sqrt(len(points))

    def residuals(p: FloatArray) -> FloatArray:
        size = p[3:6].mean()
        prior = np.concatenate([[size / 0.12], (p[3:6] - size) / 0.06, (p[6:] - [nod, 0, 0]) / np.radians(12)])
        return np.concatenate([distance(unpack(p)) / CELL_MM, weight * prior])

    first = np.concatenate([start.center, np.log(start.semi / _SEMI_MM), Rotation.from_matrix(start.axes).as_rotvec()])
    fitted = unpack(least_squares(residuals, first, loss="soft_l1", max_nfev=25).x)
    return replace(fitted, misfit_mm=float(np.mean(np.abs(distance(fitted)))))


def _look_for_face(coarse: _Coarse, cranium: _Cranium) -> _Face:
    """Send rays to the front and measure where they leave the skin."""
    azimuth, elevation = np.meshgrid(np.radians(_AZIMUTHS_DEG), np.radians(_ELEVATIONS_DEG))
    rays = np.stack(
        [np.cos(elevation) * np.sin(azimuth), -np.cos(elevation) * np.cos(azimuth), np.sin(elevation)], -1
    ) @ cranium.axes.T  # fmt: skip
    skin, met = _leave(coarse, cranium.center, rays)
    relief = skin - ndimage.grey_opening(skin, (1, 19))  # against the cheeks: a forehead has none, a chin little
    nose = np.where(met, ndimage.uniform_filter(relief, 3), 0)[:, np.abs(_AZIMUTHS_DEG) <= 30]
    across = nose.max(1)
    likely = across * np.exp(-(((_ELEVATIONS_DEG + _NOSE_DEG) / 24) ** 2) / 2)
    # Chins stand out, too: the nose is the uppermost of the strong peaks.
    peaks = np.flatnonzero((likely >= 0.65 * likely.max()) & (across == ndimage.maximum_filter1d(across, 5)))
    row = int(peaks.max()) if peaks.size else int(np.argmax(likely))
    nose_mm = float(across[row])
    column = int(np.argmax(nose[row])) + int(np.argmax(np.abs(_AZIMUTHS_DEG) <= 30))
    expected = np.array([0, -np.cos(np.radians(_NOSE_DEG)), -np.sin(np.radians(_NOSE_DEG))]) @ cranium.axes.T
    axis = rays[row, column] if nose_mm > 4 else expected
    within = rays @ axis > np.cos(np.radians(28))
    ratio = skin / (1 / cranium.radius(cranium.center + rays))
    both = within & met
    if not both.any():
        return _Face(axis, 0.0, 0.0, 0.0, 0.0, nose_mm)
    return _Face(
        axis=axis,
        seen=float(met[within].mean()),
        height_mm=float(np.ptp((rays[both] * skin[both][:, None]) @ cranium.axes[:, 2])),
        filled=float(np.percentile(ratio[both], 25)),
        tip=float(ratio[row, column]),
        nose_mm=nose_mm,
    )


def _leave(coarse: _Coarse, center: FloatArray, rays: FloatArray) -> tuple[FloatArray, Bools]:
    """Where rays (..., 3) leave the head: distance in mm (0 when they never are in it), and whether air was seen there."""
    steps = np.arange(20.0, _REACH_MM + 20, 2.0)
    at = (center + rays[..., None, :] * steps[:, None] - coarse.origin) / CELL_MM
    index = np.rint(at).astype(int)[..., ::-1]
    shape = np.array(coarse.head.shape)
    inside = ((index >= 0) & (index < shape)).all(-1)
    clipped = tuple(np.moveaxis(np.clip(index, 0, shape - 1), -1, 0))
    tissue, seen = coarse.head[clipped] & inside, coarse.seen[clipped] & inside
    last = tissue.shape[-1] - 1 - np.argmax(tissue[..., ::-1], -1)
    hit = tissue.any(-1)
    after = np.minimum(last + 4, len(steps) - 1)
    air = np.take_along_axis(seen, after[..., None], -1)[..., 0] & (last + 4 < len(steps))
    return np.where(hit, steps[last], 0.0), hit & air


def _mask(coarse: _Coarse, cranium: _Cranium, face: _Face) -> Bools:
    """Cells (Z, Y, X) to be replaced."""
    shape = coarse.head.shape
    closed = ndimage.binary_closing(coarse.head, iterations=3)  # nostrils and lips
    depth = ndimage.distance_transform_edt(closed, sampling=CELL_MM)
    cells = np.indices(shape).reshape(3, -1).T[:, ::-1] * CELL_MM + coarse.origin
    offset = cells - cranium.center
    reach = np.linalg.norm(offset, axis=1)
    cone = offset @ face.axis > reach * np.cos(np.radians(_CONE_DEG))
    mask = cone & (reach < _REACH_MM) & (cranium.radius(cells) > _KEEP)
    found: Bools = mask.reshape(shape) & (depth <= DEPTH_MM)
    return found
