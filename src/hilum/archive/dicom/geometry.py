"""Slices → one box: order and spacing come from ImagePositionPatient along the slice normal alone (PS3.3 C.7.6.2.1.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hilum.archive.dicom.header import Header
from hilum.errors import ScanRefused
from hilum.volume import FloatArray

SAME_DIRECTION = 1e-3  # largest difference of two direction cosines that count as equal
SMALLEST_MM = 0.01  # positions nearer than this are one position; spacings below it are no spacings


@dataclass(frozen=True)
class Stack:
    """Slices in order, as one box.

    order    index of the input header for each slice
    affine   4×4, (k, j, i, 1) → LPS mm; k runs through the slices towards Left, Posterior or Superior
    step_mm  distance of neighbouring slice planes
    """

    order: tuple[int, ...]
    affine: FloatArray
    step_mm: float


def stack(headers: Sequence[Header]) -> Stack:
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
    if len(headers) == 1:
        if headers[0].thickness < SMALLEST_MM:
            raise ScanRefused("no_geometry", "one slice without SliceThickness: its extent is unknown")
        axis = normal * headers[0].thickness
    else:
        axis = _slice_axis(positions[order], along[order], normal)
    affine = np.eye(4)
    # PS3.3 C.7.6.2.1.1: PixelSpacing[1] is the distance between columns, walked along the row direction.
    affine[:3, :3] = np.stack([axis, column * spacing[0], row * spacing[1]], 1)
    affine[:3, 3] = positions[order[0]]
    return Stack(tuple(order.tolist()), affine, float(abs(axis @ normal)))


def directions(headers: Sequence[Header]) -> tuple[FloatArray, FloatArray]:
    """The common row and column direction, of unit length."""
    if any(len(h.orientation) != 6 or len(h.position) != 3 for h in headers):
        raise ScanRefused("no_geometry", "ImagePositionPatient or ImageOrientationPatient missing or not numeric")
    orientations = np.array([h.orientation for h in headers])
    if np.abs(orientations - orientations[0]).max() > SAME_DIRECTION:
        count = len(np.unique(np.round(orientations, 2) + 0.0, axis=0))
        raise ScanRefused("mixed_orientations", f"{count} orientations in {len(headers)} slices")
    row, column = orientations[0].reshape(2, 3)
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    if max(abs(length - 1) for length in lengths) > SAME_DIRECTION:
        raise ScanRefused("bad_orientation", f"direction vectors of length {lengths[0]:.4f} and {lengths[1]:.4f}")
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > SAME_DIRECTION:
        raise ScanRefused("bad_orientation", f"{np.degrees(np.arccos(row @ column)):.2f}° between rows and columns")
    return row, column


def _slice_axis(positions: FloatArray, along: FloatArray, normal: FloatArray) -> FloatArray:
    """The vector from one slice to the next, from ordered positions (N, 3) and their distance along the normal."""
    steps = np.diff(along)
    step = float(np.median(steps))
    tolerance = max(0.01 * step, 0.05)
    if steps.min() < SMALLEST_MM:
        n = int((steps < SMALLEST_MM).sum())
        raise ScanRefused("duplicate_positions", f"{n} of {len(positions)} slices share a position with another")
    odd = np.flatnonzero(np.abs(steps - step) > tolerance)
    if odd.size:
        more = f" ({odd.size} such steps)" if odd.size > 1 else ""
        raise ScanRefused(
            "irregular_spacing",
            f"gap of {round(steps[odd[0]], 2)} mm after slice {odd[0] + 1}, expected {round(step, 2)} mm{more}",
        )
    axis: FloatArray = (positions[-1] - positions[0]) / (len(positions) - 1)
    residual = positions - positions[0] - np.arange(len(positions))[:, None] * axis
    off_step = np.abs(residual @ normal)
    if off_step.max() > max(0.1 * step, 0.1):  # steps that are all within tolerance may still add up
        raise ScanRefused(
            "irregular_spacing", f"positions stray {off_step.max():.2f} mm from even steps of {step:.3g} mm"
        )
    off_line = np.linalg.norm(residual - np.outer(residual @ normal, normal), axis=1)
    if off_line.max() > tolerance:
        raise ScanRefused("positions_not_on_a_line", f"slice {off_line.argmax() + 1} is {off_line.max():.2f} mm off")
    return axis
