"""Scans of which the scanner is known: for retrieval, and for taking the scanner out of features.

One torso, imaged by one of three vendors with one of three kernels, a field of view and a slice thickness of its own. These
four decide most of how the image looks, as VoxelFM found of real CT; the findings, drawn independently of them, are plain to
see all the same: fluid in the chest or belly, airless lung, pale liver.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.archive.phantom import ORGAN, Anatomy
from hilum.archive.phantom.body import TISSUE, TISSUES
from hilum.volume import FloatArray

Pixels = NDArray[np.float32]

SHOWN = ("pleural effusion", "collapsed lung", "ileus", "subcutaneous emphysema")
MATRIX = 80  # pixels of a side, whatever the field of view
FIELD_MM, THICKNESS_MM = (415.0, 465.0), (18.0, 36.0)
RANGE_MM = (-70.0, 110.0)  # of the torso, feet to head


class Vendor(NamedTuple):
    """How a make of scanner differs: HU · gain + offset, the grain of its noise in pixels, its table (how far behind the
    isocentre and how thick, mm; curvature per mm; HU)."""

    gain: float
    offset_hu: float
    grain_px: float
    table_mm: float
    thick_mm: float
    curvature: float
    table_hu: float


VENDORS = {
    "HILUM NORTH": Vendor(1.0, 0.0, 0.3, 130.0, 8.0, 0.0012, -150.0),
    "HILUM EAST": Vendor(0.92, 18.0, 0.9, 160.0, 40.0, 0.0, 300.0),
    "HILUM SOUTH": Vendor(1.06, -14.0, 1.6, 170.0, 25.0, 0.0050, 700.0),
}
# Width of the blur in pixels, negative: edges are raised by so much; noise in HU.
KERNELS = {"soft": (1.8, 6.0), "standard": (0.5, 25.0), "sharp": (-1.5, 90.0)}


def sample_scanner(rng: np.random.Generator) -> dict[str, Any]:
    """Vendor, kernel, field of view (and so the pixel's spacing) and thickness in mm, independent of one another and of the
    patient."""
    vendor, kernel = str(rng.choice(list(VENDORS))), str(rng.choice(list(KERNELS)))
    field, thickness = (round(float(rng.uniform(*limits)), 1) for limits in (FIELD_MM, THICKNESS_MM))
    return {
        "vendor": vendor, "kernel": kernel, "field_of_view": field, "spacing": field / MATRIX, "thickness": thickness
    }  # fmt: skip


def scan_with(
    anatomy: Anatomy, finding: str, scanner: Mapping[str, Any], rng: np.random.Generator
) -> tuple[NDArray[np.int16], FloatArray]:
    """HU (Z, MATRIX, MATRIX) and the affine of a body with these findings on this scanner."""
    image = _with_finding(anatomy, finding, rng)
    voxels, affine = _resampled(image, anatomy.affine, scanner["field_of_view"], scanner["thickness"])
    vendor = VENDORS[scanner["vendor"]]
    _lay_on_table(voxels, affine, vendor)
    blur, noise_hu = KERNELS[scanner["kernel"]]
    noise = ndimage.gaussian_filter(
        rng.standard_normal(voxels.shape, np.float32), (0, vendor.grain_px, vendor.grain_px)
    )
    smooth = ndimage.gaussian_filter(voxels, (0, abs(blur), abs(blur)))
    voxels = smooth if blur > 0 else voxels - blur * (voxels - smooth)
    voxels += noise * np.float32(noise_hu / noise.std())
    voxels = voxels * np.float32(vendor.gain) + np.float32(vendor.offset_hu)
    return np.clip(np.rint(voxels), -1024, 3071).astype(np.int16), affine


def _with_finding(anatomy: Anatomy, finding: str, rng: np.random.Generator) -> Pixels:
    """The body in HU without a scanner's doing."""
    hu = np.array([t.hu for t in TISSUES.values()], np.float32)
    texture = np.array([100 * t.texture for t in TISSUES.values()], np.float32)
    tissue = np.where(anatomy.tissue == TISSUE["table"], TISSUE["air"], anatomy.tissue)
    image: Pixels = hu[tissue] + texture[tissue] * anatomy.texture
    lungs = [anatomy.organ == ORGAN[name] for name in ("lung_right", "lung_left")]
    if finding == "pleural effusion":
        y = np.arange(image.shape[1])[None, :, None]
        for lung in lungs:
            image[lung & (y > np.quantile(np.nonzero(lung)[1], rng.uniform(0.3, 0.5)))] = 12
    elif finding == "collapsed lung":
        image[lungs[0]] = np.float32(rng.uniform(10, 50))
    elif finding == "ileus":
        bowel = np.isin(anatomy.tissue, (TISSUE["bowel"], TISSUE["stool"], TISSUE["visceral_fat"]))
        image[bowel & (np.arange(image.shape[1])[None, :, None] < image.shape[1] // 2)] = -940
    else:
        fat = anatomy.tissue == TISSUE["fat"]
        image[fat] -= np.float32(rng.uniform(450, 600))
    return image


def _resampled(image: Pixels, affine: FloatArray, field_mm: float, thickness_mm: float) -> tuple[Pixels, FloatArray]:
    """The part of the torso in `RANGE_MM`, in slices as thick as their distance, on MATRIX² pixels about its middle."""
    step_z, step = float(affine[2, 0]), float(affine[1, 1])
    if thickness_mm > step_z:
        image = ndimage.gaussian_filter1d(image, (thickness_mm / step_z - 1) / 2.355, axis=0)
    image = ndimage.gaussian_filter(image, (0, 0.8, 0.8))
    spacing = field_mm / MATRIX
    number = int((RANGE_MM[1] - RANGE_MM[0]) // thickness_mm)
    first = (RANGE_MM[0] - affine[2, 3]) / step_z
    middle = (np.array(image.shape[1:]) - 1) / 2 - (MATRIX - 1) / 2 * spacing / step
    voxels: Pixels = ndimage.affine_transform(
        image, [thickness_mm / step_z, spacing / step, spacing / step], [first, *middle], (number, MATRIX, MATRIX),
        order=1, mode="constant", cval=-1000,
    )  # fmt: skip
    made = np.eye(4)
    made[:3, :3] = [[0, 0, spacing], [0, spacing, 0], [thickness_mm, 0, 0]]
    made[:3, 3] = (affine @ [first, *middle, 1])[:3]
    return voxels, made


def _lay_on_table(voxels: Pixels, affine: FloatArray, vendor: Vendor) -> None:
    """The vendor's board behind the back, in every slice."""
    side = np.arange(MATRIX)
    x, y = affine[0, 2] * side + affine[0, 3], (affine[1, 1] * side + affine[1, 3])[:, None]
    board = (np.abs(y - (vendor.table_mm - vendor.curvature * x**2)) < vendor.thick_mm / 2) & (np.abs(x) < 190)
    voxels[board & (voxels < -500)] = np.float32(vendor.table_hu)
