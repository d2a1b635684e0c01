"""A synthetic head with a known face: the test bed of defacing, which no real scan can be (nobody labels faces).

Smooth shapes in millimetres around the centre of the cranium: skull, brain, skin, orbits with eyes, nose, lips, chin,
ears, neck. Left, posterior and superior are positive. Sizes vary with the seed; the same anatomy gives a CT and an MR.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.volume import Volume

FACE = {"nose": 1, "eyes": 2, "mouth": 3}
_TISSUES = ("air", "skin", "muscle", "bone", "brain", "eye")
_NUMBER = {name: number for number, name in enumerate(_TISSUES)}
_HU = np.array([-1000, 10, 55, 850, 35, 12], np.float32)
_MR = np.array([4, 320, 150, 25, 230, 70], np.float32)  # T1-weighted
_LOW_MM = np.array([-104.0, -140.0, -190.0])  # corner of the field in x, y, z
_HIGH_MM = np.array([104.0, 132.0, 116.0])
_SURFACE_MM = 4.0  # a face voxel is tissue at most this deep

Bools = NDArray[np.bool_]
Grid = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def make_head(seed: int, spacing_mm: float = 2.0) -> tuple[Volume, Volume, Volume, Volume]:
    """Draw one head.

    spacing_mm  of the cubic voxels
    returns     CT in HU; MR (T1-weighted); labels of the face's surface (FACE), at most 4 mm deep; labels of the brain
                (1). All (Z, Y, X), axial, on one grid
    """
    rng = np.random.default_rng(seed)
    grow = rng.normal(1, 0.04, 3)  # of the head in x, y, z
    nose, jaw = float(rng.normal(1, 0.12)), float(rng.normal(1, 0.06))
    lines = [np.arange(low, high, spacing_mm) for low, high in zip(_LOW_MM, _HIGH_MM)]
    at: Grid = tuple(
        (line / g).astype(np.float32).reshape([-1 if axis == 2 - n else 1 for axis in range(3)])
        for n, (line, g) in enumerate(zip(lines, grow))
    )
    tissue, parts = _paint(at, nose, jaw)
    brain = tissue == _NUMBER["brain"]
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * spacing_mm
    affine[:3, 3] = _LOW_MM
    outside = _outside(tissue)
    near_air = ndimage.distance_transform_edt(~outside, sampling=spacing_mm) <= _SURFACE_MM
    face = np.zeros(tissue.shape, np.uint8)
    for name, part in parts.items():
        face[part & near_air & (tissue > 0)] = FACE[name]
    noise = rng.standard_normal((3, *tissue.shape), np.float32)
    ct = ndimage.gaussian_filter(_HU[tissue], 0.5) + 8 * noise[0]
    clean = ndimage.gaussian_filter(_MR[tissue], 0.5)
    mr = np.hypot(clean + 6 * noise[1], 6 * noise[2])  # magnitude images have Rician noise
    return (
        Volume(voxels=np.rint(ct).astype(np.int16), affine=affine, modality="CT", unit="HU"),
        Volume(voxels=np.rint(mr).astype(np.int16), affine=affine, modality="MR"),
        Volume(voxels=face, affine=affine, modality="OT", kind="label"),
        Volume(voxels=brain.astype(np.uint8), affine=affine, modality="OT", kind="label"),
    )


def _ball(at: Grid, center: Sequence[float], semi: Sequence[float]) -> Bools:
    x, y, z = (((a - c) / s) ** 2 for a, c, s in zip(at, center, semi))
    inside: Bools = x + y + z < 1
    return inside


def _pair(at: Grid, center: Sequence[float], semi: Sequence[float]) -> Bools:
    """The same on both sides of the midline."""
    return _ball(at, center, semi) | _ball(at, (-center[0], *center[1:]), semi)


def _paint(at: Grid, nose: float, jaw: float) -> tuple[NDArray[np.uint8], dict[str, Bools]]:
    """Tissues of every voxel, and the region of each part of the face."""
    x, y, z = at
    cranium = (78.0, 98.0, 90.0)
    tip = (0, -96 - 24 * nose, -63)
    nose_shape = np.logical_or.reduce([
        _ball(at, (0, -92 + t * (tip[1] + 104), -28 - 35 * t), (8 + 5 * t, 12, 12)) for t in np.linspace(0, 1, 8)
    ]) | _pair(at, (10, tip[1] + 19, -64), (8, 14, 7))  # fmt: skip
    lips = _ball(at, (0, -94 * jaw, -86), (25, 9, 6)) | _ball(at, (0, -93 * jaw, -97), (22, 9, 6))
    eyes = _pair(at, (32, -76, -32), (12.5, 12.5, 12.5))
    body = (
        _ball(at, (0, 0, 0), cranium)
        | _ball(at, (0, -38, -62), (64, 54, 66))  # cheeks and upper jaw
        | _ball(at, (0, -50 * jaw, -108), (44, 42, 30))  # lower jaw
        | _ball(at, (0, -84 * jaw, -118), (17, 13, 14))  # chin
        | (((x / 56) ** 2 + ((y - 22) / 54) ** 2 < 1) & (z < -60))  # neck
        | _pair(at, (80, 8, -38), (7, 16, 30))  # ears
    )
    body &= ~_pair(at, (33, -92, -33), (17, 14, 12))  # sockets
    body |= nose_shape | lips | eyes
    tissue = np.where(body, _NUMBER["skin"], 0).astype(np.uint8)
    deep = ndimage.binary_erosion(body, iterations=3)
    tissue[deep] = _NUMBER["muscle"]
    inner = _brain(at)
    skull = (_ball(at, (0, 0, 0), [c - 5 for c in cranium]) & ~_ball(at, (0, 0, 0), [c - 12 for c in cranium])) & deep
    skull |= ndimage.binary_dilation(inner, iterations=3) & deep  # the base follows the brain
    skull |= _ball(at, (0, -60, -75), (28, 22, 14)) & deep  # upper jaw
    tissue[skull] = _NUMBER["bone"]
    tissue[inner] = _NUMBER["brain"]
    airway = _ball(at, (0, -62, -52), (13, 34, 20)) | _ball(at, (0, -20, -95), (11, 9, 55))
    airway |= _pair(at, (27, -60, -60), (12, 13, 14)) | _ball(at, (0, -84, -16), (16, 4, 8))  # sinuses
    tissue[airway & deep & ~inner] = _NUMBER["air"]
    tissue[eyes] = _NUMBER["eye"]
    parts = {
        "nose": ndimage.binary_dilation(nose_shape, iterations=1) & (y < -80),
        "eyes": _pair(at, (32, -84, -32), (17, 14, 13)) & (y < -76),
        "mouth": ndimage.binary_dilation(lips, iterations=1) & (y < -84 * jaw),
    }
    return tissue, parts


def _brain(at: Grid) -> Bools:
    """Cerebrum above a base that climbs over the orbits, temporal lobes, cerebellum and brain stem."""
    _, y, z = at
    floor = np.where(y < -38, -16.0, -30.0)  # anterior cranial fossa; elsewhere the middle one
    cerebrum = _ball(at, (0, 0, 0), (65, 84, 77)) & (z > floor)
    temporal = _pair(at, (42, -8, -28), (19, 36, 18))
    cerebellum = _ball(at, (0, 48, -40), (46, 28, 22)) | _ball(at, (0, 18, -52), (11, 10, 26))
    return cerebrum | temporal | cerebellum


def _outside(tissue: NDArray[np.uint8]) -> Bools:
    """Air that is connected to the border of the field."""
    labels, _ = ndimage.label(tissue == 0)
    outside: Bools = labels == labels[-1, 0, 0]
    return outside
