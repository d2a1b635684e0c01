"""Slices → one box: order and spacing come from ImagePositionPatient along the slice normal alone (PS3.3 C.7.6.2.1.1)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.archive.dicom.header import Header
from hilum.archive.policy import AS_IS, Policy
from hilum.errors import ScanRefused
from hilum.large import each, gather
from hilum.volume import FloatArray

SAME_DIRECTION = 3.5e-3  # largest difference of direction cosines in one stack: 0.2°, 0.4 mm at the border of a head
UNIT_LENGTH = 1e-3  # largest departure of a direction from unit length, and of two from a right angle
SAME_SPACING = 1e-3  # largest relative difference of pixel spacings that count as equal
MAX_ORIENTATIONS = 100
MAX_SHEAR_DEG = 60.0  # gantries tilt up to 30°
ROUNDING_MM = 0.1  # positions are often rounded to a tenth of a millimetre
SMALLEST_MM = 0.01  # positions nearer than this are one position; spacings below it are no spacings


@dataclass(frozen=True)
class Stack:
    """Slices in order, as one box.

    order    index of the input header for each slice
    affine   4×4, (k, j, i, 1) → LPS mm; k runs through the slices towards Left, Posterior or Superior
    step_mm  distance of neighbouring slice planes
    at       where the slices lie, in steps from the first; () when they lie at 0, 1, 2, …
    """

    order: tuple[int, ...]
    affine: FloatArray
    step_mm: float
    at: tuple[float, ...] = ()


def stack(headers: Sequence[Header], policy: Policy = AS_IS) -> Stack:
    """Find the box that slices make up. Raises ScanRefused when they make up none.

    Gantry tilt moves each slice within its plane by a constant amount: the affine is then sheared, which is legal. One
    slice alone takes its extent from SliceThickness, the only place where that attribute is used.
    """
    row, column = directions(headers)
    spacing = headers[0].pixel_spacing
    if len(spacing) != 2 or min(spacing) < SMALLEST_MM:
        raise ScanRefused("no_geometry", "PixelSpacing missing or not above 0")
    normal = np.cross(row, column)
    normal *= np.sign(normal[np.argmax(np.abs(normal))])
    positions = np.array([h.position for h in headers])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    at: tuple[float, ...] = ()
    if len(headers) == 1:
        if headers[0].thickness < SMALLEST_MM:
            raise ScanRefused("no_geometry", "one slice without SliceThickness: its extent is unknown")
        axis = normal * headers[0].thickness
    else:
        axis, at = _slice_axis(positions[order], along[order], normal, policy)
    affine = np.eye(4)
    # PS3.3 C.7.6.2.1.1: PixelSpacing[1] is the distance between columns, walked along the row direction.
    affine[:3, :3] = np.stack([axis, column * spacing[0], row * spacing[1]], 1)
    affine[:3, 3] = positions[order[0]]
    return Stack(tuple(order.tolist()), affine, float(abs(axis @ normal)), at)


def directions(headers: Sequence[Header]) -> tuple[FloatArray, FloatArray]:
    """The common row and column direction, of unit length. Raises ScanRefused."""
    if any(len(h.orientation) != 6 or len(h.position) != 3 for h in headers):
        raise ScanRefused("no_geometry", "ImagePositionPatient or ImageOrientationPatient missing or not numeric")
    orientations = np.array([h.orientation for h in headers])
    if np.abs(orientations - orientations[0]).max() > SAME_DIRECTION:
        raise ScanRefused("mixed_orientations", f"{len(by_orientation(headers))} orientations in {len(headers)} slices")
    spread = np.ptp(orientations, axis=0).max()
    row, column = (orientations.mean(0) if spread else orientations[0]).reshape(2, 3)
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    if max(abs(length - 1) for length in lengths) > UNIT_LENGTH:
        raise ScanRefused("bad_orientation", f"direction vectors of length {lengths[0]:.4f} and {lengths[1]:.4f}")
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > UNIT_LENGTH:
        raise ScanRefused("bad_orientation", f"{np.degrees(np.arccos(row @ column)):.2f}° between rows and columns")
    return row, column


def by_orientation(headers: Sequence[Header]) -> dict[tuple[float, ...], list[Header]]:
    """Slices of equal orientation together. The result does not depend on the order of `headers`.

    Raises ScanRefused `mixed_orientations` when there are more than MAX_ORIENTATIONS.
    """
    groups: dict[tuple[float, ...], list[Header]] = {}
    for header in sorted(headers, key=lambda h: (h.orientation, h.path, h.frame)):
        if len(groups) > MAX_ORIENTATIONS:
            raise ScanRefused("mixed_orientations", f"more than {MAX_ORIENTATIONS} orientations")
        near = next((o for o in groups if _equal(o, header.orientation)), header.orientation)
        groups.setdefault(near, []).append(header)
    return groups


def by_size(headers: Sequence[Header]) -> dict[str, list[Header]]:
    """Slices of equal matrix, pixel spacing, modality and frame of reference together, as `by_orientation` does.

    Frames of reference count unless nearly every slice has its own, which is what some anonymisers make of them.
    """
    groups: dict[tuple[object, ...], list[Header]] = {}
    framed = 2 * len({h.frame_of_reference for h in headers}) <= len(headers)
    for header in sorted(headers, key=lambda h: (h.pixel_spacing, h.path, h.frame)):
        kind = header.rows, header.columns, header.modality, header.frame_of_reference if framed else ""
        near = next((k for k in groups if k[:-1] == kind and _alike(k[-1], header.pixel_spacing)), None)
        groups.setdefault(near or (*kind, header.pixel_spacing), []).append(header)
        if len(groups) > MAX_ORIENTATIONS:
            raise ScanRefused("no_geometry", f"more than {MAX_ORIENTATIONS} matrix sizes or pixel spacings")
    return {str(kind): slices for kind, slices in groups.items()}


def _alike(a: object, b: tuple[float, ...]) -> bool:
    assert isinstance(a, tuple)
    return len(a) == len(b) and all(abs(x - y) <= SAME_SPACING * max(abs(x), abs(y)) for x, y in zip(a, b))


def _equal(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= SAME_DIRECTION for x, y in zip(a, b))


def _slice_axis(
    positions: FloatArray, along: FloatArray, normal: FloatArray, policy: Policy
) -> tuple[FloatArray, tuple[float, ...]]:
    """The vector from one slice to the next, from ordered positions (N, 3) and their distance along the normal.

    returns  axis in mm; () or, when gaps are accepted, the place of each slice in steps
    """
    steps = np.diff(along)
    if steps.min() < SMALLEST_MM:
        n = int((steps < SMALLEST_MM).sum())
        raise ScanRefused("duplicate_positions", f"{n} of {len(positions)} slices share a position with another")
    step = float(np.median(steps))
    length = along[-1] - along[0]
    per_mm = (positions[-1] - positions[0]) / length
    shear = float(np.degrees(np.arccos(min(1.0, 1 / float(np.linalg.norm(per_mm))))))
    if shear > MAX_SHEAR_DEG:
        raise ScanRefused("positions_not_on_a_line", f"slices move {shear:.0f}° away from their normal")
    residual = positions - positions[0] - (along - along[0])[:, None] * per_mm
    off_line = np.linalg.norm(residual - np.outer(residual @ normal, normal), axis=1)
    even = np.arange(len(along)) * length / (len(along) - 1)
    strays = float(np.abs(along - along[0] - even).max())  # a missing slice makes half a step of it
    at: tuple[float, ...] = ()
    if strays > max(0.02 * step, min(0.2 * step, ROUNDING_MM)):
        refusal = _uneven(steps, step, strays)
        if steps.max() > policy.accept_gap_mm:
            raise refusal
        step = float(steps.min()) if refusal.reason == "missing_slices" else step
        step = length / max(round(length / step), 1)
        at = tuple(((along - along[0]) / step).round(6).tolist())
    else:
        step = length / (len(along) - 1)
    if off_line.max() > max(0.01 * step, ROUNDING_MM):
        raise ScanRefused("positions_not_on_a_line", f"slice {off_line.argmax() + 1} is {off_line.max():.2f} mm off")
    return per_mm * step, at


def _uneven(steps: FloatArray, step: float, strays: float) -> ScanRefused:
    """What kind of unevenness this is.

    Slices are missing when all steps are multiples of the smallest, at most half as many are missing as are there, and
    the long steps do not lie side by side (else it is a scan with two spacings).
    """
    multiple = steps / steps.min()
    whole = np.rint(multiple)
    missing = int((whole - 1).sum())
    long = np.flatnonzero(whole > 1)
    apart = len(long) < 2 or int(np.diff(long).max()) > 1
    off = float(np.abs(multiple - whole).max()) * steps.min()
    if 0 < missing <= len(steps) / 2 and apart and off <= max(0.02 * step, ROUNDING_MM):
        places = ", ".join(str(n + 1) for n in long[:5]) + (", …" if len(long) > 5 else "")
        return ScanRefused(
            "missing_slices",
            f"{missing} missing, after slice {places} of {len(steps) + 1}: gaps of up to {steps.max():.2f} mm, "
            f"expected {steps.min():.2f} mm",
        )
    odd = np.flatnonzero(np.abs(steps - step) > max(0.02 * step, ROUNDING_MM))
    if not odd.size:
        return ScanRefused("irregular_spacing", f"positions stray {strays:.2f} mm from even steps of {step:.3g} mm")
    more = f" ({odd.size} such steps)" if odd.size > 1 else ""
    return ScanRefused(
        "irregular_spacing",
        f"gap of {round(steps[odd[0]], 2)} mm after slice {odd[0] + 1}, expected {round(step, 2)} mm{more}, "
        f"steps from {steps.min():.2f} to {steps.max():.2f} mm",
    )


def even_slices(voxels: NDArray[Any], at: Sequence[float]) -> tuple[NDArray[Any], int]:
    """Put slices on even steps by linear interpolation between neighbours.

    voxels   (N, Y, X)
    at       where they lie, in steps from the first, rising; the last is a whole number M - 1
    returns  (M, Y, X) of the same type; how many of the M slices are no slice as it was acquired
    """
    where = np.asarray(at)
    made = []

    def even() -> Iterator[NDArray[Any]]:
        for k in range(round(where[-1]) + 1):
            right = int(np.searchsorted(where, k - 0.01))
            if abs(where[right] - k) <= 0.01:
                yield from each(voxels, [right])
                continue
            made.append(k)
            weight = (k - where[right - 1]) / (where[right] - where[right - 1])
            (before,) = (s * (1 - weight) for s in each(voxels, [right - 1]))
            (after,) = (s * weight for s in each(voxels, [right]))
            yield np.rint(before + after) if voxels.dtype.kind in "iu" else before + after

    out = gather(even(), (round(where[-1]) + 1, *voxels.shape[1:]), voxels.dtype)
    return out, len(made)
