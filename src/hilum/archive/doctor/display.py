"""Volumes → pictures as radiologists see them: right proportions, letters at the edges, the patient's right on the left.

Pictures are drawn along the array axes: what is oblique or sheared stays so and is named, never resampled. Letters are
those of DICOM's Patient Orientation (PS3.3 C.7.6.1.1.1), with H (head) and F (feet) for superior and inferior.
"""

import numpy as np

from hilum.figures import Panel
from hilum.volume import FloatArray, Volume, orient

OBLIQUE_DEG = 20.0
_LETTERS = (("L", "R"), ("P", "A"), ("H", "F"))  # positive, negative end of the x, y, z axis
PLANE_NAMES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}
WORDS = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "S": "superior", "I": "inferior"}


def direction(vector: FloatArray) -> str:
    """The patient direction a vector (3,) points to: one letter, or two when it is more than 20° off, nearest first."""
    cosines = vector / np.linalg.norm(vector)
    nearest, second, _ = np.argsort(-np.abs(cosines), kind="stable")
    letters = _LETTERS[nearest][0 if cosines[nearest] > 0 else 1]
    if abs(cosines[nearest]) < np.cos(np.radians(OBLIQUE_DEG)):
        letters += _LETTERS[second][0 if cosines[second] > 0 else 1]
    return letters


def edge_letters(down: FloatArray, right: FloatArray) -> tuple[str, str, str, str]:
    """What lies at the (top, bottom, left, right) edge of a picture whose rows go `down` and columns go `right`."""
    return direction(-down), direction(down), direction(-right), direction(right)


def oblique_deg(affine: FloatArray) -> float:
    """Largest angle between an array axis and the patient axis it is named after; 0 for a straight scan."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(np.abs(cosines).max(0).min(), 0, 1))))


def middle_planes(vol: Volume) -> list[Panel]:
    """Axial, coronal and sagittal plane through the middle, along the array axes nearest to those planes.

    A volume of one slice, or without geometry, gives that slice alone.
    """
    if vol.affine is None:
        return slice_panels(vol, 1)
    vol = orient(vol, "SPL")
    assert vol.affine is not None
    voxels = vol.voxels
    up, back, left = vol.affine[:3, :3].T  # superior, posterior, left
    dz, dy, dx = vol.spacing_mm
    k, j, i = (n // 2 for n in vol.shape)
    cuts = (
        (0, k, voxels[k], (dy, dx), edge_letters(back, left), "axial"),
        (1, j, voxels[::-1, j], (dz, dx), edge_letters(-up, left), "coronal"),
        (2, i, voxels[::-1, :, i], (dz, dy), edge_letters(-up, back), "sagittal"),
    )
    thin = [axis for axis, n in enumerate(vol.shape) if n == 1]
    return [
        Panel(np.ascontiguousarray(pixels), pixel_mm, edges, f"{name}, {at + 1} of {vol.shape[axis]}")
        for axis, at, pixels, pixel_mm, edges, name in cuts
        if not thin or axis in thin
    ]


def slice_panels(vol: Volume, most: int) -> list[Panel]:
    """At most `most` evenly spaced slices (axis 0) of a volume as its reader turned it, the middle one when one."""
    number = min(most, len(vol.voxels))
    chosen = [int((n + 0.5) * len(vol.voxels) / number) for n in range(number)]
    pixel_mm: tuple[float, float] | None = None
    edges: tuple[str, ...] = ()
    if vol.affine is not None:
        pixel_mm = vol.spacing_mm[1:]
        edges = edge_letters(vol.affine[:3, 1], vol.affine[:3, 2])
    return [Panel(vol.voxels[k].copy(), pixel_mm, edges, str(k + 1)) for k in chosen]


def orientation_words(code: str) -> str:
    """ "SPL" as a sentence."""
    slices, rows, columns = (WORDS[letter] for letter in code)
    return f"slices go to {slices}, rows down to {rows}, columns right to {columns}"
