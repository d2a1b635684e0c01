"""Who is painted and with what: patients, tissues, organs, and the canvas they are painted on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

LENGTH_MM = 432.0  # from the lung apices to the pelvic floor
MAX_BODY_AGE = 90.0

ORGANS = (
    "background", "lung_right", "lung_left", "heart", "aorta", "trachea", "liver", "gallbladder", "stomach", "spleen",
    "pancreas", "kidney_right", "kidney_left", "colon", "bladder", "spine", "spinal_cord", "lesion",
)  # fmt: skip
ORGAN = {name: label for label, name in enumerate(ORGANS)}


@dataclass(frozen=True)
class Tissue:
    """What a scanner sees of one tissue.

    hu, uptake_hu  unenhanced attenuation, and what contrast medium adds to it
    pd, t1_ms, t2_ms  proton density in [0, 1] and relaxation times at 1.5 T
    texture        standard deviation of its fine structure, as a share of 100 HU or of its MR signal
    """

    hu: float
    uptake_hu: float
    pd: float
    t1_ms: float
    t2_ms: float
    texture: float = 0.03


# Textbook-range values; fine structure is ours.
TISSUES = {
    "air": Tissue(-1000, 0, 0.0, 1, 1, 0.0),
    "gas": Tissue(-950, 0, 0.0, 1, 1, 0.0),
    "lung": Tissue(-850, 10, 0.12, 1000, 40, 0.35),
    "fat": Tissue(-105, 0, 0.9, 280, 70, 0.06),
    "visceral_fat": Tissue(-95, 2, 0.9, 300, 68, 0.07),
    "muscle": Tissue(55, 10, 0.8, 950, 42, 0.10),
    "bowel": Tissue(35, 25, 0.8, 900, 75, 0.18),
    "blood": Tissue(42, 130, 0.35, 1500, 120, 0.02),
    "heart": Tissue(45, 95, 0.75, 950, 50, 0.10),
    "liver": Tissue(58, 50, 0.75, 580, 46, 0.05),
    "vessel": Tissue(45, 110, 0.45, 1400, 100, 0.02),
    "bile": Tissue(8, 0, 1.0, 2400, 500, 0.01),
    "stomach": Tissue(38, 15, 0.85, 1000, 90, 0.22),
    "spleen": Tissue(50, 62, 0.85, 1050, 72, 0.08),
    "pancreas": Tissue(42, 48, 0.78, 620, 50, 0.20),
    "kidney": Tissue(34, 115, 0.85, 850, 82, 0.07),
    "stool": Tissue(25, 0, 0.6, 800, 60, 0.45),
    "urine": Tissue(4, 5, 1.0, 3200, 900, 0.01),
    "spongy_bone": Tissue(190, 10, 0.55, 480, 62, 0.35),
    "cortical_bone": Tissue(750, 0, 0.05, 400, 5, 0.30),
    "disc": Tissue(85, 0, 0.75, 950, 70, 0.05),
    "cord": Tissue(34, 4, 0.8, 900, 88, 0.02),
    "lesion": Tissue(32, 22, 0.82, 950, 80, 0.03),
    "lesion_core": Tissue(14, 4, 0.95, 1600, 160, 0.06),
    "lesion_rough": Tissue(38, 27, 0.80, 850, 70, 0.30),
    "table": Tissue(-350, 0, 0.0, 1, 1, 0.05),
}
TISSUE = {name: number for number, name in enumerate(TISSUES)}


@dataclass(frozen=True)
class Patient:
    """Everything about a synthetic patient that is drawn before any voxel exists.

    age_years, sex ("F" or "M"); scale is the linear size of the body (1 = average), girth that of its fat
    organ_scale  linear size of each organ relative to the body
    """

    patient_id: str
    seed: int
    sex: str
    age_years: float
    scale: float
    girth: float
    organ_scale: dict[str, float]
    has_gallbladder: bool
    kidneys: str  # "two", "right", "left" or "horseshoe"
    malignant: bool
    num_lesions: int
    enhanced: bool  # contrast medium was given for the CT
    ct_scanner: int  # index into CT_SCANNERS
    mr_scanner: int


def sample_patient(index: int, seed: int = 0) -> Patient:
    """Draw one patient; equal (index, seed) give the same patient whatever else is drawn."""
    rng = np.random.default_rng([seed, index])
    sex = "FM"[int(rng.integers(2))]
    age = float(rng.uniform(25, MAX_BODY_AGE))
    scale = float(np.clip(rng.normal(1.0 if sex == "M" else 0.93, 0.05), 0.8, 1.15))
    return Patient(
        patient_id=f"PHANTOM{index:04d}",
        seed=int(rng.integers(2**31)),
        sex=sex,
        age_years=age,
        scale=scale,
        girth=float(np.clip(rng.normal(1.0, 0.35), 0.4, 1.8)),
        organ_scale={name: float(np.clip(rng.normal(1, 0.09), 0.75, 1.3)) for name in ORGANS[1:]},
        has_gallbladder=bool(rng.random() > 0.15),
        kidneys=str(rng.choice(["two", "right", "left", "horseshoe"], p=[0.84, 0.04, 0.04, 0.08])),
        malignant=bool(rng.random() < 0.5),
        num_lesions=int(rng.integers(1, 4)),
        enhanced=bool(rng.random() < 0.6),
        ct_scanner=int(rng.integers(2)),
        mr_scanner=int(rng.integers(2)),
    )


def smooth_field(rng: np.random.Generator, shape: Sequence[int], cells: Sequence[int]) -> Floats:
    """A smooth random field: normal numbers on a coarse grid, interpolated by cubic B-splines, scaled to unit spread.

    shape    (Z, Y, X) of the field
    cells    coarse intervals along each axis; the field turns over about once per cell
    """
    out: NDArray[np.float32] = rng.standard_normal([c + 3 for c in cells], np.float32)
    for axis, (length, count) in enumerate(zip(shape, cells)):
        at = np.linspace(0, count, length, endpoint=False) + 0.5 * count / length
        distance = np.abs(at[:, None] - (np.arange(count + 3) - 1)[None, :])
        inner, outer = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
        basis = np.where(distance < 1, inner, outer).astype(np.float32)
        out = np.moveaxis(np.tensordot(basis, out, (1, axis)), 0, axis)
    return np.ascontiguousarray(out / out.std())


@dataclass
class Canvas:
    """The grid on which a patient is painted; later strokes cover earlier ones."""

    z: Floats  # (Z, 1, 1) mm
    y: Floats  # (1, Y, 1) mm
    x: Floats  # (1, 1, X) mm
    wobble: Floats  # (Z, Y, X) smooth noise that makes every outline individual
    tissue: NDArray[np.uint8] = field(init=False)
    organ: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.tissue = np.zeros(self.wobble.shape, np.uint8)
        self.organ = np.zeros(self.wobble.shape, np.uint8)

    def box(self, center: Sequence[float], reach: Sequence[float]) -> Box:
        """Index box around a point (x, y, z) that extends `reach` mm to both sides."""
        found = []
        for axis, c, r in zip((self.z, self.y, self.x), reversed(center), reversed(reach)):
            line = axis.ravel()
            low, high = np.searchsorted(line, [c - r, c + r])
            found.append(slice(int(low), int(max(low, high))))
        return found[0], found[1], found[2]

    def coordinates(self, box: Box) -> tuple[Floats, Floats, Floats]:
        return self.x[:, :, box[2]], self.y[:, box[1]], self.z[box[0]]

    def paint(self, box: Box, mask: Bools, tissue: str, organ: str | None = None) -> None:
        """Fill `mask` (within `box`) with a tissue, and with an organ label when one is named."""
        mask = np.broadcast_to(mask, self.tissue[box].shape)
        self.tissue[box][mask] = TISSUE[tissue]
        if organ is not None:
            self.organ[box][mask] = ORGAN[organ]

    def ellipsoid(
        self, center: Sequence[float], semi: Sequence[float], *, lobes: float = 0.12, tilt_deg: float = 0.0
    ) -> tuple[Box, Bools]:
        """An ellipsoid with an individual outline.

        center, semi  (x, y, z) mm
        lobes         strength of the outline's noise; 0 is a perfect ellipsoid
        tilt_deg      rotation in the x-y plane, positive from left towards posterior
        """
        reach = [max(semi[0], semi[1]) * 1.35] * 2 + [semi[2] * 1.35]
        box = self.box(center, reach)
        x, y, z = self.coordinates(box)
        dx, dy = x - center[0], y - center[1]
        c, s = np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg))
        radius = (
            ((c * dx + s * dy) / semi[0]) ** 2 + ((c * dy - s * dx) / semi[1]) ** 2 + ((z - center[2]) / semi[2]) ** 2
        )
        return box, radius + np.float32(lobes) * self.wobble[box] < 1

    def tube(
        self, points: Sequence[Sequence[float]], radii: Sequence[float], bumps: float = 0.0
    ) -> list[tuple[Box, Bools]]:
        """A chain of rounded segments through points (x, y, z) mm with a radius at each; `bumps` are haustra."""
        pieces = []
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
            start, along = np.array(a, np.float32), np.subtract(b, a).astype(np.float32)
            middle, thick = (np.array(a) + np.array(b)) / 2, max(ra, rb) * 1.3
            box = self.box(middle.tolist(), (np.abs(along) / 2 + thick).tolist())
            x, y, z = self.coordinates(box)
            dx, dy, dz = x - start[0], y - start[1], z - start[2]
            t = np.clip((dx * along[0] + dy * along[1] + dz * along[2]) / float(along @ along), 0, 1)
            distance = (dx - t * along[0]) ** 2 + (dy - t * along[1]) ** 2 + (dz - t * along[2]) ** 2
            radius = ra + (rb - ra) * t
            if bumps:
                radius = radius * (1 + bumps * np.sin(t * np.linalg.norm(along) / 6))
            pieces.append((box, distance < radius**2))
        return pieces
