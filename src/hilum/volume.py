"""A scan that cannot lose its geometry: voxels, affine and meaning travel as one value.

Array axes are (Z, Y, X) with indices (k, j, i). The affine maps `(k, j, i, 1)` of a voxel centre to patient **LPS
millimetres** `(x, y, z, 1)`: +x to the patient's Left, +y to Posterior, +z to Superior (DICOM PS3.3 C.7.6.2.1.1).
An image without known geometry (a PNG) has `affine=None` and refuses every operation that needs millimetres.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum import large
from hilum.errors import GeometryError

Spacing = tuple[float, float, float]
FloatArray = NDArray[np.float64]

_LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))  # positive, negative end of the x, y, z axis


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """One 3D image.

    voxels    (Z, Y, X); HU for CT, no unit for MR, class numbers for labels
    affine    4×4, index (k, j, i, 1) → LPS millimetres; None when the geometry is unknown
    modality  "CT", "MR" or "OT" (unknown, as for a PNG)
    unit      "HU" or ""
    kind      interpolation follows it: labels take the nearest voxel, intensities are interpolated
    """

    voxels: NDArray[Any]
    affine: FloatArray | None
    modality: str
    unit: str = ""
    kind: Literal["intensity", "label"] = "intensity"

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or 0 in self.voxels.shape:
            raise GeometryError(f"a volume has three non-empty axes (Z, Y, X); found shape {self.voxels.shape}")
        if self.affine is not None:
            if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
                raise GeometryError(f"an affine is 4×4 and finite; found {self.affine!r}")
            if abs(np.linalg.det(self.affine[:3, :3])) < 1e-9:
                raise GeometryError("the affine is singular: at least one axis has no extent")

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.voxels.shape
        return z, y, x

    def _affine(self, what: str) -> FloatArray:
        if self.affine is None:
            raise GeometryError(f"{what} needs a geometry, but this image has none (PNG and JPEG carry no position)")
        return self.affine

    @property
    def spacing_mm(self) -> Spacing:
        """Distance between neighbouring voxel centres along k, j, i."""
        dz, dy, dx = np.linalg.norm(self._affine("spacing")[:3, :3], axis=0)
        return float(dz), float(dy), float(dx)

    @property
    def orientation(self) -> str:
        """Where k, j and i point, as patient directions: "SPL" is an axial stack from feet to head."""
        return orientation_of(self._affine("orientation"))

    @property
    def shear_deg(self) -> float:
        """Largest departure of two axes from a right angle; above 0 for gantry tilt."""
        axes = self._affine("shear")[:3, :3] / np.linalg.norm(self._affine("shear")[:3, :3], axis=0)
        cosines = np.abs((axes.T @ axes)[np.triu_indices(3, 1)])
        return float(np.degrees(np.arcsin(np.clip(cosines.max(), 0.0, 1.0))))


def orientation_of(affine: FloatArray) -> str:
    """Three letters: the patient direction nearest to k, j and i, each axis used once.

    The assignment is the one with the largest sum of cosines, so oblique axes never claim the same direction.
    """
    from scipy.optimize import linear_sum_assignment

    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    world, index = linear_sum_assignment(-np.abs(cosines))
    letters = [""] * 3
    for w, k in zip(world, index):
        letters[k] = _LETTERS[w][0 if cosines[w, k] > 0 else 1]
    return "".join(letters)


def apart_mm(one: Volume, other: Volume) -> float:
    """How far two grids of one shape lie apart: the largest difference of a coordinate over their corner voxels, in mm."""
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in one.shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.abs((one._affine("comparing") - other._affine("comparing")) @ corners).max())


def orient(vol: Volume, code: str) -> Volume:
    """Permute and flip the axes until k, j, i point to the letters of `code`. Exact: no voxel value changes.

    code     e.g. "SPL"; one letter of each pair L/R, P/A, S/I
    returns  the same scan; every voxel keeps its patient position
    """
    affine = vol._affine("orient")
    if sorted(_axis_of(c) for c in code) != [0, 1, 2]:
        raise GeometryError(f"'{code}' is no orientation; expected one letter of each pair L/R, P/A, S/I, e.g. SPL")
    current = [_axis_of(c) for c in vol.orientation]
    order = [current.index(_axis_of(c)) for c in code]
    voxels = vol.voxels.transpose(order)
    affine = affine[:, [*order, 3]].copy()
    for axis, (letter, wanted) in enumerate(zip((vol.orientation[k] for k in order), code)):
        if letter != wanted:
            voxels = np.flip(voxels, axis)
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
    return replace(vol, voxels=large.contiguous(voxels), affine=affine)


def _axis_of(letter: str) -> int:
    for axis, pair in enumerate(_LETTERS):
        if letter in pair:
            return axis
    raise GeometryError(f"'{letter}' is no patient direction; expected one of L R P A S I")


PLANES = {"S": "SPL", "I": "SPL", "P": "PIL", "A": "PIL", "L": "LIP", "R": "LIP"}


def to_slices(vol: Volume, through: int | None = None) -> Volume:
    """Turn a scan so that axis 0 runs through the slices it was acquired in, each slice seen as radiologists see it.

    through  the axis that runs through the slices, when it is known (0 for a stack of DICOM images). Else it is the axis
             whose two others share one spacing (within 2 %, pixels are square), the superior axis among several such,
             and without such a pair the axis with the largest spacing

    Axial slices become (P, L), coronal (I, L), sagittal (I, P): the axis convention of Curia's released processor. A
    volume without geometry comes back unchanged.
    """
    if vol.affine is None:
        return vol
    code = vol.orientation
    if through is None:
        through = _through_plane(vol.spacing_mm, code)
    return orient(vol, PLANES[code[through]])


def _through_plane(spacing_mm: Spacing, code: str) -> int:
    square = []
    for axis in range(3):
        a, b = (s for other, s in enumerate(spacing_mm) if other != axis)
        if abs(a - b) <= 0.02 * max(a, b):
            square.append(axis)
    superior = next(axis for axis, letter in enumerate(code) if letter in "SI")
    if superior in square:
        return superior
    return square[0] if square else int(np.argmax(spacing_mm))


def resample(vol: Volume, spacing_mm: Spacing) -> Volume:
    """Put a volume on a grid with another spacing along its own axes.

    spacing_mm  wanted (dz, dy, dx), each > 0
    returns     (Z', Y', X'); the centre of the field stays where it was

    Intensities are averaged (Gaussian, sigma = √(ratio² - 1) / 2 voxels for a ratio of spacings above 1, nothing at 1)
    before the grid gets coarser and then interpolated linearly; labels take the nearest voxel.
    """
    affine = vol._affine("resample")
    wanted = np.asarray(spacing_mm, float)
    if wanted.shape != (3,) or not (wanted > 0).all():
        raise GeometryError(f"spacing must be three numbers > 0 in mm; found {spacing_mm}")
    ratio = wanted / np.array(vol.spacing_mm)
    shape = np.maximum(np.round(np.array(vol.shape) / ratio), 1).astype(int)
    start = (np.array(vol.shape) - 1) / 2 - ratio * (shape - 1) / 2  # centre of field stays
    voxels = vol.voxels
    if vol.kind == "intensity":
        sigma = np.sqrt(np.maximum(ratio**2 - 1, 0)) / 2
        voxels = ndimage.gaussian_filter(voxels.astype(np.float32), sigma, mode="nearest")
    order = 1 if vol.kind == "intensity" else 0
    voxels = ndimage.affine_transform(voxels, ratio, start, tuple(shape), order=order, mode="nearest")
    out = affine.copy()
    out[:3, :3] = affine[:3, :3] * ratio
    out[:3, 3] = affine[:3, :3] @ start + affine[:3, 3]
    return replace(vol, voxels=voxels, affine=out)


def straighten(vol: Volume, fill: float) -> Volume:
    """Resample a sheared volume (gantry tilt) into a right-angled box that holds all of it.

    fill     value outside the scan, e.g. -1024 for CT
    returns  rows and columns keep direction and spacing; slices are perpendicular to them, as far apart as the planes
             were; intensities are interpolated linearly, labels take the nearest voxel
    """
    affine = vol._affine("straighten")
    slices, rows, columns = affine[:3, :3].T
    normal = np.cross(columns, rows)
    normal /= np.linalg.norm(normal) * np.sign(normal @ slices)
    axes = np.stack([normal * (normal @ slices), rows, columns], 1)
    # Corners of the old box, counted in the axes of the new one from the old origin.
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(vol.shape) - 1)
    inside = corners @ np.linalg.solve(axes, affine[:3, :3]).T
    low, high = np.floor(inside.min(0) + 1e-6), np.ceil(inside.max(0) - 1e-6)
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = axes, affine[:3, 3] + axes @ low
    step = np.linalg.solve(affine[:3, :3], axes).round(9)  # so that a voxel on the border stays inside
    order = 1 if vol.kind == "intensity" else 0
    shape = tuple((high - low + 1).astype(int).tolist())
    voxels = ndimage.affine_transform(vol.voxels, step, step @ low, shape, order=order, mode="constant", cval=fill)
    return replace(vol, voxels=voxels, affine=out)


def crop_or_pad(vol: Volume, start: tuple[int, int, int], shape: tuple[int, int, int], fill: float) -> Volume:
    """Cut the box that begins at index `start`; parts outside the scan are filled.

    start    (k, j, i) of the first voxel, may be negative
    shape    (Z', Y', X') of the box, each > 0
    fill     value outside the scan, e.g. -1024 for CT
    returns  voxels keep their patient position
    """
    out = np.full(shape, fill, vol.voxels.dtype)
    source, target = [], []
    for first, wanted, have in zip(start, shape, vol.shape):
        low, high = max(first, 0), min(first + wanted, have)
        high = max(low, high)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    out[tuple(target)] = vol.voxels[tuple(source)]
    affine = None
    if vol.affine is not None:
        affine = vol.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array(start, float)
    return replace(vol, voxels=out, affine=affine)
