"""Guesses, marked as such: the plane a scan was acquired in, and the body regions it shows.

Headers name both, but badly (BodyPartExamined is wrong in one of seven CT series, Gueld et al. 2002) and in free text. Here
geometry and voxels decide, and what they do not decide stays "".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.archive.store.content import IN_PLANE, outside
from hilum.large import each, gather
from hilum.volume import FloatArray, Volume, orient

OBLIQUE_DEG = 20.0  # from the nearest body axis
PLANES = ("sagittal", "coronal", "axial")  # normal along x, y, z
REGIONS = ("head", "neck", "chest", "abdomen", "pelvis")

PIXEL_MM, STEP_MM, MOST_SECTIONS = 4.0, 10.0, 48  # the coarse grid that regions are told on
SMALLEST_FIELD_MM = 150.0  # a smaller slice is a crop and shows no cross-section
# How much of a region a scan must show, in mm along the body, or else half of its length.
LEAST_MM = {"head": 40.0, "neck": 40.0, "chest": 80.0, "abdomen": 60.0, "pelvis": 30.0}
LEAST_SHARE = 0.5

Mask = NDArray[np.bool_]


def guess_plane(affine: FloatArray | None) -> str:
    """The plane of the slices along axis 0, from their normal.

    affine   (k, j, i, 1) → LPS mm, or None
    returns  "axial", "coronal", "sagittal", "oblique" when the normal is more than 20° off all three axes, or ""

    A sheared stack (gantry tilt) has the plane of its slices, not of the line through their corners.
    """
    if affine is None:
        return ""
    normal = np.cross(affine[:3, 1], affine[:3, 2])
    cosines = np.abs(normal) / np.linalg.norm(normal)
    nearest = int(np.argmax(cosines))
    return PLANES[nearest] if cosines[nearest] >= np.cos(np.radians(OBLIQUE_DEG)) else "oblique"


@dataclass(frozen=True)
class Sections:
    """Axial cross-sections from feet to head, each value (Z,).

    area_cm2   of the largest body part in the slice, holes filled
    lung       share of it between −950 and −500 HU
    bone       share of it above 250 HU
    enclosed   share of it that bone encloses
    lateral    share of its bone in the outer quarters, left and right, of its width
    step_mm    distance of the sections
    """

    area_cm2: FloatArray
    lung: FloatArray
    bone: FloatArray
    enclosed: FloatArray
    lateral: FloatArray
    step_mm: float


def guess_region(vol: Volume) -> str:
    """Body regions in a CT, from head to feet, joined by "+", e.g. "chest+abdomen"; "" when unsure.

    Only HU in a slice of 150 mm or more are judged, and only these regions: head, neck, chest, abdomen, pelvis. MR has no
    fixed grey values, and its fields of view fit several regions: "".
    """
    if vol.affine is None or vol.unit != "HU":
        return ""
    sections = measure_sections(vol)
    if sections is None:
        return ""
    length = len(sections.bone) * sections.step_mm
    shown = {region: int(where.sum()) * sections.step_mm for region, where in _where(sections).items()}
    found = [n for n, r in enumerate(REGIONS) if shown[r] >= LEAST_MM[r] or shown[r] >= LEAST_SHARE * length]
    if found and found[-1] - found[0] >= len(found):  # no body has a chest that ends in a pelvis: one of them is wrong
        return ""
    return "+".join(REGIONS[n] for n in found)


def measure_sections(vol: Volume) -> Sections | None:
    """Cross-sections on a coarse grid; None when the field is too small to hold one."""
    body = orient(vol, "SPL") if vol.orientation != "SPL" else vol
    spacing = np.array(body.spacing_mm)
    if min(np.array(body.shape[1:]) * spacing[1:]) < SMALLEST_FIELD_MM:
        return None
    step = np.maximum(np.rint(np.array([STEP_MM, PIXEL_MM, PIXEL_MM]) / spacing), 1).astype(int)
    step[0] = max(step[0], -(-body.shape[0] // MOST_SECTIONS))
    few = body.voxels[min(step[0], body.shape[0]) // 2 :: step[0], :: step[1], :: step[2]]
    few = gather(each(few), few.shape, few.dtype)
    pixel_cm2 = float(step[1] * spacing[1] * step[2] * spacing[2]) / 100
    inside = _largest(np.asarray(few > -300))
    bone = inside & (few > 250)
    inside = np.logical_not(outside(inside))
    area = inside.sum((1, 2)).astype(float)
    safe = np.maximum(area, 1)
    ring = ndimage.binary_closing(bone, IN_PLANE)
    columns = np.arange(few.shape[2])
    weight = inside.sum(1)
    center = (weight @ columns) / np.maximum(weight.sum(1), 1)
    first, last = (weight > 0).argmax(1), few.shape[2] - 1 - (weight[:, ::-1] > 0).argmax(1)
    far = np.abs(columns - center[:, None]) > (last - first + 1)[:, None] / 4
    num_bone = bone.sum((1, 2))
    return Sections(
        area_cm2=area * pixel_cm2,
        lung=(inside & (few > -950) & (few < -500)).sum((1, 2)) / safe,
        bone=num_bone / safe,
        enclosed=(inside & ~ring & ~outside(ring)).sum((1, 2)) / safe,
        lateral=(bone.sum(1) * far).sum(1) / np.maximum(num_bone, 1),
        step_mm=float(step[0] * spacing[0]),
    )


def _largest(mask: Mask) -> Mask:
    """The largest connected part of each slice."""
    labels, num = ndimage.label(mask, IN_PLANE)
    if not num:
        return mask
    largest = [int(np.bincount(s[s > 0]).argmax()) if s.any() else num + 1 for s in labels]
    return np.asarray(labels == np.array(largest)[:, None, None])


def _where(s: Sections) -> dict[str, Mask]:
    """The sections that surely show each region; most show none.

    head     100…350 cm², 40 % of it enclosed by bone; or, above a neck, a tenth of it bone (jaw and skull base)
    neck     60…260 cm² with such a bony section within 150 mm above and 500 cm² or more (shoulders) within 200 mm below
    chest    250 cm² or more, a fifth of it lung
    abdomen  400 cm² or more, hardly lung (3 %) and bone (0.3…3 %), the bone in the middle (the lumbar spine)
    pelvis   below such an abdomen: 400 cm² or more, no lung, 4.5 % bone and more, a third of it far from the middle
    """
    z = np.arange(len(s.bone)) * s.step_mm
    apart = z[:, None] - z  # [of, from] in mm, above 0 towards the head
    bony = (s.area_cm2 >= 120) & (s.area_cm2 <= 350) & (s.bone >= 0.1)
    below_bone = (((apart > 0) & (apart <= 150)) & bony[:, None]).any(0)
    above_shoulders = (((apart < 0) & (apart >= -200)) & (s.area_cm2 >= 500)[:, None]).any(0)
    neck = (s.area_cm2 >= 60) & (s.area_cm2 <= 260) & below_bone & above_shoulders & (s.lung < 0.1)
    trunk = (s.area_cm2 >= 400) & (s.lung < 0.03)
    abdomen = trunk & (s.bone >= 0.003) & (s.bone <= 0.03) & (s.lateral < 0.3)
    below_abdomen = z < (z[abdomen].min() if abdomen.any() else 0)
    above_neck = z > (z[neck].max() if neck.any() else np.inf)
    return {
        "head": (s.area_cm2 >= 100) & (s.area_cm2 <= 350) & ((s.enclosed >= 0.4) | (bony & above_neck)),
        "neck": neck,
        "chest": (s.area_cm2 >= 250) & (s.lung >= 0.2),
        "abdomen": abdomen,
        "pelvis": trunk & below_abdomen & (s.bone >= 0.045) & (s.lateral >= 0.33),
    }
