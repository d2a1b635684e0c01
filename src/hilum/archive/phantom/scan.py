"""From a patient to scans: one anatomy, imaged by a CT and by an MR scanner."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.archive.phantom.body import LENGTH_MM, ORGAN, ORGANS, TISSUES, Canvas, Floats, Patient, smooth_field
from hilum.archive.phantom.organs import paint_body
from hilum.volume import Volume


@dataclass(frozen=True)
class Anatomy:
    """One patient on one grid.

    tissue   (Z, Y, X) uint8, numbers of TISSUE
    organ    (Z, Y, X) uint8, numbers of ORGAN
    texture  (Z, Y, X) fine structure, mean 0, standard deviation 1, the same for CT and MR
    affine   index → LPS mm; axis 0 runs to the head
    """

    patient: Patient
    tissue: NDArray[np.uint8]
    organ: NDArray[np.uint8]
    texture: Floats
    affine: NDArray[np.float64]

    def organ_volumes_ml(self) -> dict[str, float]:
        voxel_ml = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        counts = np.bincount(self.organ.ravel(), minlength=len(ORGANS))
        return {name: float(counts[label]) * voxel_ml for name, label in ORGAN.items() if label}


def make_anatomy(patient: Patient, num_slices: int = 96, matrix: int = 256) -> Anatomy:
    """Paint one patient on a grid of (num_slices, matrix, matrix) voxels that fits the body."""
    rng = np.random.default_rng(patient.seed)
    half_width = 168 * patient.scale * (0.94 + 0.08 * patient.girth)
    spacing = np.array([LENGTH_MM * patient.scale / num_slices, *[2 * half_width * 1.06 / matrix] * 2])
    shape = (num_slices, matrix, matrix)
    origin = np.array(
        [-spacing[2] * (matrix - 1) / 2, -spacing[1] * (matrix - 1) / 2, -spacing[0] * (num_slices - 1) / 2]
    )
    affine = np.eye(4)
    affine[:3, :3] = [[0, 0, spacing[2]], [0, spacing[1], 0], [spacing[0], 0, 0]]
    affine[:3, 3] = origin
    # Shapes are painted in the coordinates of an average body: the scale of this one is divided out.
    lines = [
        ((origin[2 - a] + spacing[a] * np.arange(n)) / patient.scale).astype(np.float32) for a, n in enumerate(shape)
    ]
    canvas = Canvas(
        z=lines[0][:, None, None],
        y=lines[1][None, :, None],
        x=lines[2][None, None, :],
        wobble=smooth_field(rng, shape, (9, 7, 7)),
    )
    paint_body(canvas, patient, rng)
    fine = rng.standard_normal(shape, np.float32)
    for axis in (1, 2):
        fine = ndimage.correlate1d(fine, np.array([1, 3, 4, 3, 1], np.float32), axis, mode="wrap")
    return Anatomy(patient, canvas.tissue, canvas.organ, fine / fine.std(), affine)


@dataclass(frozen=True)
class CTScanner:
    """A CT model: reconstruction kernel and noise.

    kernel       5 symmetric taps in the image plane; a sharp one overshoots
    noise_hu     standard deviation in soft tissue
    """

    manufacturer: str
    model: str
    kernel_name: str
    kernel: tuple[float, ...]
    noise_hu: float


@dataclass(frozen=True)
class MRScanner:
    """An MR model: sequence, coil and noise (noise and bias relative to the brightest tissue)."""

    manufacturer: str
    model: str
    sequence: str
    tr_ms: float
    te_ms: float
    gain: float
    noise: float
    bias: float


CT_SCANNERS = (
    CTScanner("HILUM NORTH", "Phantom CT 64", "soft", (0.06, 0.24, 0.40, 0.24, 0.06), 16.0),
    CTScanner("HILUM SOUTH", "Phantom CT 128", "sharp", (-0.05, 0.10, 0.90, 0.10, -0.05), 30.0),
)
MR_SCANNERS = (
    MRScanner("HILUM NORTH", "Phantom MR 15", "T1 spin echo", 550, 12, 900, 0.018, 0.25),
    MRScanner("HILUM SOUTH", "Phantom MR 30", "T2 spin echo", 3800, 85, 420, 0.030, 0.45),
)


def _values(anatomy: Anatomy, level: Sequence[float], amount: Sequence[float]) -> Floats:
    """Mean value of each voxel's tissue plus its fine structure."""
    out = np.asarray(level, np.float32)[anatomy.tissue]
    out += np.asarray(amount, np.float32)[anatomy.tissue] * anatomy.texture
    return out


def scan_ct(anatomy: Anatomy) -> Volume:
    """The patient's CT: (Z, Y, X) int16 HU, with the kernel and noise of their scanner."""
    patient, scanner = anatomy.patient, CT_SCANNERS[anatomy.patient.ct_scanner]
    rng = np.random.default_rng([patient.seed, 1])
    uptake = float(rng.normal(1.0, 0.15)) if patient.enhanced else 0.0
    ageing = {"spongy_bone": -1.8 * (patient.age_years - 45), "muscle": -0.35 * (patient.age_years - 45)}
    ageing["liver"] = -22.0 * max(patient.girth - 1, 0)  # fatty liver
    level = [t.hu + uptake * t.uptake_hu + ageing.get(name, 0.0) for name, t in TISSUES.items()]
    image = _values(anatomy, level, [100 * t.texture for t in TISSUES.values()])
    # Noise is white before reconstruction, so the kernel shapes image and noise alike.
    white = rng.standard_normal(image.shape, np.float32)
    gain = float(np.sqrt(np.sum(np.outer(scanner.kernel, scanner.kernel) ** 2)))
    image += white * np.float32(scanner.noise_hu / gain)
    for axis in (1, 2):
        image = ndimage.correlate1d(image, np.array(scanner.kernel, np.float32), axis, mode="nearest")
    voxels = np.clip(np.rint(image), -1024, 3071).astype(np.int16)
    return Volume(voxels=voxels, affine=anatomy.affine, modality="CT", unit="HU")


def scan_mr(anatomy: Anatomy) -> Volume:
    """The patient's MR: (Z, Y, X) int16, arbitrary unit; spin echo, coil shading, Rician noise; no table in sight.

    Signal is `pd · (1 − exp(−TR/T1)) · exp(−TE/T2)`, the spin-echo equation (Hahn 1950).
    """
    patient, scanner = anatomy.patient, MR_SCANNERS[anatomy.patient.mr_scanner]
    rng = np.random.default_rng([patient.seed, 2])
    signal = [
        t.pd * (1 - np.exp(-scanner.tr_ms / t.t1_ms)) * np.exp(-scanner.te_ms / t.t2_ms) for t in TISSUES.values()
    ]
    signal = [s / max(signal) for s in signal]
    image = _values(anatomy, signal, [s * min(t.texture, 0.3) for s, t in zip(signal, TISSUES.values())])
    shading = smooth_field(rng, image.shape, (2, 2, 2))
    image *= np.exp(np.float32(scanner.bias / 2) * shading)
    soft = np.array([0.2, 0.6, 0.2], np.float32)
    for axis in (1, 2):
        image = ndimage.correlate1d(image, soft, axis, mode="nearest")
    image += rng.standard_normal(image.shape, np.float32) * np.float32(scanner.noise)
    image = np.hypot(image, rng.standard_normal(image.shape, np.float32) * np.float32(scanner.noise))
    gain = scanner.gain * float(rng.uniform(0.7, 1.4))
    voxels = np.clip(np.rint(image * np.float32(gain)), 0, 32767).astype(np.int16)
    return Volume(voxels=voxels, affine=anatomy.affine, modality="MR")


def organ_mask(anatomy: Anatomy) -> Volume:
    """The organ labels on the grid of both scans."""
    return Volume(voxels=anatomy.organ, affine=anatomy.affine, modality="OT", kind="label")


def survival(patient: Patient, lesion_volume_ml: float) -> tuple[float, bool, float]:
    """Time to death or censoring under a known hazard.

    Exponential with hazard per year `0.12 · exp(1.3·malignant + 0.5·ln(volume/10 ml) + 0.3·(age−60)/10)`, censored
    uniformly between 0.5 and 6 years.

    returns  days, whether death was seen, hazard per year
    """
    rng = np.random.default_rng([patient.seed, 3])
    log_hazard = (
        1.3 * patient.malignant + 0.5 * np.log(max(lesion_volume_ml, 0.1) / 10) + 0.03 * (patient.age_years - 60)
    )
    hazard = 0.12 * float(np.exp(log_hazard))
    death, censored = rng.exponential(1 / hazard), rng.uniform(0.5, 6.0)
    return 365.25 * float(min(death, censored)), bool(death <= censored), hazard
