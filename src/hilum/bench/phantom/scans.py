"""The scans of the phantom benchmark: small bodies and heads of which every label is known, written once to DATA/phantom.

body/B0000/ct.nii.gz, mr.nii.gz   a torso, 13.5 mm × 4 mm × 4 mm; organs.nii.gz, with the lesion; solid.nii.gz: SOLID
body/B0000/liver.nii.gz           three slices of the CT at 2 mm around the largest lesion; liver-organs.nii.gz
body/B0000/spine.nii.gz           the same around the spinal canal
body/B0000/tumour.nii.gz          as liver.nii.gz, the lesion as bright as its risk is high: what survival depends on
body/B0000/nodule.nii.gz          a piece of lung at 4 mm with one nodule somewhere in it
body/B0000/scanner.nii.gz         the torso of another study, whose scanner is known (`scanners.py`)
head/H0000/ct.nii.gz              a slab of a head, bleeding or not
*/labels.json                     what is true of it
phantom.json                      the settings, written last: the folder is whole

Findings are more frequent than in the archive's phantom, so that a test set of some dozen patients holds enough of each.
Everything differs between patients and nothing between splits: scanner, kernel, noise, calibration, contrast medium.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hilum.archive.files import nifti
from hilum.archive.phantom import ORGAN, Anatomy, Patient, make_anatomy, sample_patient, scan_ct, scan_mr
from hilum.archive.phantom.body import TISSUE
from hilum.archive.phantom.head import make_head
from hilum.archive.workers import Crashed, run
from hilum.bench.phantom.scanners import SHOWN, sample_scanner, scan_with
from hilum.errors import InputError
from hilum.records import read_json, write_atomic, write_json
from hilum.terminal import Progress
from hilum.volume import FloatArray

# Class numbers of the segmentation task, from 1: organs that belong together count as one.
SOLID = {
    "lungs": ("lung_right", "lung_left"), "liver": ("liver",), "spleen": ("spleen",),
    "kidneys": ("kidney_right", "kidney_left"), "aorta": ("aorta",), "spine": ("spine",),
}  # fmt: skip
NARROWED = (0.0, 0.2, 0.4)  # mean share by which the spinal canal is narrowed, by grade
NARROWED_SPREAD = 0.16  # between patients of one grade: grades overlap
HEAD_MM = 4.0
MAX_SHIFT = 0.14  # share of the image by which a body lies off the middle
SLAB = 6  # slices of a head that are kept
CALCIFIED_ML = 0.3
RISK_HU = 60.0  # by which a lesion is brighter for each unit of risk
NODULE_MM, NODULE_SLICES = (24.0, 44.0), 8  # diameter; slices of the crop around one
ALIKE = 0.3  # share of the differences in size and fat between bodies that is left in the scans of known scanners


@dataclass(frozen=True, kw_only=True)
class PhantomSettings:
    """What decides the scans: equal settings give equal files.

    num_patients, num_heads   of bodies (one CT and one MR each) and of heads
    num_slices, matrix        of a body; it is painted at twice the matrix
    noise_hu                  added to every CT beside its scanner's own
    offset_hu, gain           spread of the CT's calibration between patients: HU · (1 + gain·n) + offset·n
    """

    num_patients: int = 240
    num_heads: int = 240
    num_slices: int = 32
    matrix: int = 96
    noise_hu: float = 6.0
    offset_hu: float = 8.0
    gain: float = 0.04
    seed: int = 0


def write_phantom_scans(
    out: Path, settings: PhantomSettings | None = None, *, num_workers: int = 1, progress: Progress | None = None
) -> None:
    """Write what is not there yet; run it again after any interruption. InputError when `out` was made by other settings."""
    settings = settings or PhantomSettings()
    record = {"format": "hilum-bench-phantom", "version": 2, **asdict(settings)}
    begun = out / "settings.json"
    if begun.exists() and read_json(begun) != record:
        raise InputError(
            f"{out} was made with other settings ({begun.name} has them); choose another folder, or empty it"
        )
    if (out / "phantom.json").exists():
        return
    write_json(begun, record)
    jobs: list[tuple[str, int]] = [("body", n) for n in range(settings.num_patients)]
    jobs += [("head", n) for n in range(settings.num_heads)]
    for done, (job, result) in enumerate(run(partial(_write_one, out, settings), jobs, num_workers), 1):
        if isinstance(result, Crashed):
            raise InputError(f"the process that wrote phantom {job[0]} {job[1]} died; run the same command again")
        if progress:
            progress(done, len(jobs), "phantom scans")
    write_json(out / "phantom.json", record)


def _write_one(out: Path, settings: PhantomSettings, job: tuple[str, int]) -> None:
    part, number = job
    folder = out / part / f"{part[0].upper()}{number:04d}"
    if not (folder / "labels.json").exists():  # written last
        write: Callable[[Path, PhantomSettings, int], dict[str, Any]] = _write_body if part == "body" else _write_head
        write_json(folder / "labels.json", write(folder, settings, number))


def _write_body(folder: Path, settings: PhantomSettings, number: int) -> dict[str, Any]:
    rng = np.random.default_rng([settings.seed, number, 1])
    patient = _frequent(sample_patient(number, settings.seed), rng)
    anatomy = make_anatomy(patient, settings.num_slices, 2 * settings.matrix)
    grade = int(rng.integers(len(NARROWED)))
    narrowed = float(np.clip(NARROWED[grade] + NARROWED_SPREAD * rng.standard_normal(), 0, 0.85))
    ct = scan_ct(anatomy).voxels.astype(np.float32)
    clean = ct.copy()
    _narrow_canal(ct, anatomy, narrowed, rng)
    _mark_lesions(ct, anatomy, rng)
    fine = _jitter(ct, settings, rng)
    lesion = _largest_lesion(anatomy)
    spine = ndimage.center_of_mass(anatomy.organ == ORGAN["spinal_cord"])
    for name, centre in (("liver", lesion or None), ("spine", spine)):
        if centre is not None:
            box, affine = _window(anatomy, centre, settings.matrix * 5 // 8)
            _write(folder / f"{name}.nii.gz", fine[box], affine)
            _write(folder / f"{name}-organs.nii.gz", anatomy.organ[box], affine)
    more = _more_scans(folder, clean, anatomy, lesion, settings, number)
    most = round(MAX_SHIFT * settings.matrix)
    shift = rng.integers(-most, most + 1, 2)
    affine = anatomy.affine.copy()
    affine[:3, 1:3] *= 2
    affine[:3, 3] += anatomy.affine[:3, 1:3].sum(1) / 2 - affine[:3, 1:3] @ shift
    organ = _shift(anatomy.organ[:, ::2, ::2], shift, 0)
    solid = np.zeros(organ.shape, np.uint8)
    for label, organs in enumerate(SOLID.values(), 1):
        solid[np.isin(organ, [ORGAN[o] for o in organs])] = label
    mr = scan_mr(anatomy).voxels
    for name, voxels in (("ct", _shift(_halve(fine), shift, -1000)), ("mr", _shift(_halve(mr), shift, 0))):
        _write(folder / f"{name}.nii.gz", voxels, affine)
    _write(folder / "organs.nii.gz", organ, affine)
    _write(folder / "solid.nii.gz", solid, affine)
    return {
        "age": round(patient.age_years, 1),
        "malignant": int(patient.malignant),
        "stenosis": grade,
        "findings": _findings(anatomy),
        "lesion": [lesion[0], *[(lesion[n + 1] - 0.5) / 2 + float(shift[n]) for n in (0, 1)]] if lesion else [],
        "areas": {name: _areas(organ == label) for name, label in ORGAN.items() if label},
        **more,
    }


def _more_scans(
    folder: Path, ct: NDArray[np.float32], anatomy: Anatomy, lesion: list[float], settings: PhantomSettings, number: int
) -> dict[str, Any]:
    """tumour, nodule and scanner: what is true of them."""
    rng = np.random.default_rng([settings.seed, number, 4])
    risk = float(rng.standard_normal())
    days, event, hazard = _survival(risk, rng)
    if lesion:
        box, affine = _window(anatomy, lesion, settings.matrix * 5 // 8)
        tumour, inside = ct[box].copy(), anatomy.organ[box] == ORGAN["lesion"]
        tumour[inside] += np.float32(RISK_HU * risk)
        _write(folder / "tumour.nii.gz", _jitter(tumour, settings, rng), affine)
    voxels, affine, centre = _plant_nodule(_halve(ct), anatomy, settings.matrix * 3 // 8, rng)
    _write(folder / "nodule.nii.gz", _jitter(voxels, settings, rng), affine)
    scanner, finding = sample_scanner(rng), SHOWN[number % len(SHOWN)]
    average = replace(
        anatomy.patient,
        scale=1 + (anatomy.patient.scale - 1) * ALIKE,
        girth=1 + (anatomy.patient.girth - 1) * ALIKE,
    )
    other = make_anatomy(average, settings.num_slices, settings.matrix)
    _write(folder / "scanner.nii.gz", *scan_with(other, finding, scanner, rng))
    return {
        "survival": [round(days, 1), int(event)],
        "hazard_per_year": round(hazard, 5),
        "nodule": centre,
        "shown": finding,
        "scanner": scanner | {"sex": anatomy.patient.sex},
    }


def _survival(risk: float, rng: np.random.Generator) -> tuple[float, bool, float]:
    """Days to death or censoring, whether death was seen, hazard a year: exponential with 0.35 · exp(2 · risk), censored
    uniformly between 0.5 and 8 years."""
    hazard = 0.35 * float(np.exp(2 * risk))
    death, censored = rng.exponential(1 / hazard), rng.uniform(0.5, 8.0)
    return 365.25 * float(min(death, censored)), bool(death <= censored), hazard


def _plant_nodule(
    ct: NDArray[np.float32], anatomy: Anatomy, side: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], FloatArray, list[float]]:
    """A crop of `side` pixels and NODULE_SLICES slices of the halved CT that holds a nodule in a lung; (k, j, i) of its
    centre in the crop."""
    lungs = np.isin(anatomy.organ[:, ::2, ::2], (ORGAN["lung_right"], ORGAN["lung_left"]))
    affine = anatomy.affine.copy()
    affine[:3, 1:3] *= 2
    affine[:3, 3] += anatomy.affine[:3, 1:3].sum(1) / 2
    mm = np.linalg.norm(affine[:3, :3], axis=0)
    deep = ndimage.distance_transform_edt(lungs, sampling=mm)
    places = np.argwhere(deep > min(12.0, float(deep.max()) / 2))
    centre = places[rng.integers(len(places))] + rng.uniform(-0.5, 0.5, 3)
    size_mm = rng.uniform(*NODULE_MM) / 2
    axes = np.ogrid[tuple(map(slice, ct.shape))]
    away = np.sqrt(sum(((axis - c) * step) ** 2 for axis, c, step in zip(axes, centre, mm)))
    share = np.clip((size_mm - away) / mm[1] + 0.5, 0, 1).astype(np.float32)
    marked = ct * (1 - share) + np.float32(rng.uniform(30, 130)) * share
    shape = np.minimum([NODULE_SLICES, side, side], ct.shape)
    margin = np.minimum([1, 3, 3], shape // 4)
    low = np.maximum(np.ceil(centre - shape + 1 + margin), 0)
    high = np.minimum(np.floor(centre - margin), np.array(ct.shape) - shape)
    first = np.array([rng.integers(a, max(a, b) + 1) for a, b in zip(low.astype(int), high.astype(int))])
    affine[:3, 3] += affine[:3, :3] @ first
    crop = tuple(slice(f, f + n) for f, n in zip(first, shape))
    return marked[crop], affine, [round(float(c), 3) for c in centre - first]


def _narrow_canal(ct: NDArray[np.float32], anatomy: Anatomy, share: float, rng: np.random.Generator) -> None:
    """Bone grows into the spinal canal from its wall, by this share of its radius."""
    box, depth = _depth(anatomy.organ == ORGAN["spinal_cord"])
    grown = (depth > 0) & (depth <= share * depth.max((1, 2), keepdims=True))
    ct[box][grown] = np.float32(rng.uniform(250, 450))


def _mark_lesions(ct: NDArray[np.float32], anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Lesions differ in brightness; malignant ones have a rim that takes up contrast medium and a darker core as well."""
    box, depth = _depth(anatomy.organ == ORGAN["lesion"])
    ct[box][depth > 0] += np.float32(rng.normal(0, 15))
    if anatomy.patient.malignant:
        ct[box][(depth > 0) & (depth <= 2.5)] += np.float32(rng.uniform(15, 70))
        ct[box][depth > 2.5] -= np.float32(rng.uniform(0, 35))


def _depth(inside: NDArray[np.bool_]) -> tuple[Any, NDArray[np.float64]]:
    """The box of a structure, and how many pixels each of its voxels lies from its edge within the slice; 0 outside."""
    box = ndimage.find_objects(np.pad(inside, 1).astype(np.uint8))[0] if inside.any() else (slice(1, 2),) * 3
    box = tuple(slice(max(part.start - 2, 0), part.stop) for part in box)
    depth: NDArray[np.float64] = ndimage.distance_transform_edt(inside[box], sampling=(1e6, 1, 1))
    return box, depth


def _halve(voxels: NDArray[Any]) -> NDArray[np.float32]:
    """Means of 2 × 2 pixels."""
    z, y, x = voxels.shape
    means: NDArray[np.float32] = voxels.reshape(z, y // 2, 2, x // 2, 2).mean((2, 4), dtype=np.float32)
    return means


def _shift(voxels: NDArray[Any], shift: NDArray[Any], fill: int) -> NDArray[Any]:
    """The body off the middle by (rows, columns)."""
    moved = np.full_like(voxels, fill)
    (to_y, from_y), (to_x, from_x) = (
        (slice(max(s, 0), n + min(s, 0)), slice(max(-s, 0), n - max(s, 0)))
        for s, n in zip(shift.tolist(), voxels.shape[1:])
    )
    moved[:, to_y, to_x] = voxels[:, from_y, from_x]
    return moved


def _window(anatomy: Anatomy, centre: Any, side: int) -> tuple[Any, FloatArray]:
    """Three slices of `side` pixels around a point, within the grid, and their affine."""
    first = [
        min(max(round(c) - size // 2, 0), n - size) for c, size, n in zip(centre, (3, side, side), anatomy.organ.shape)
    ]
    affine = anatomy.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    return tuple(slice(f, f + size) for f, size in zip(first, (3, side, side))), affine


def _frequent(patient: Patient, rng: np.random.Generator) -> Patient:
    """The same patient with variants of anatomy as frequent as the tasks need them."""
    return replace(
        patient,
        has_gallbladder=bool(rng.random() > 0.4),
        kidneys=str(rng.choice(["two", "right", "left", "horseshoe"], p=[0.4, 0.2, 0.2, 0.2])),
    )


def _findings(anatomy: Anatomy) -> dict[str, int]:
    patient = anatomy.patient
    voxel_ml = abs(float(np.linalg.det(anatomy.affine[:3, :3]))) / 1000
    plaque = (anatomy.organ == ORGAN["aorta"]) & (anatomy.tissue == TISSUE["cortical_bone"])
    return {
        "no gallbladder": int(not patient.has_gallbladder),
        "single kidney": int(patient.kidneys in ("right", "left")),
        "horseshoe kidney": int(patient.kidneys == "horseshoe"),
        "calcified aorta": int(np.count_nonzero(plaque) * voxel_ml > CALCIFIED_ML),
        "contrast medium": int(patient.enhanced),
        "obesity": int(patient.girth > 1.2),
    }


def _largest_lesion(anatomy: Anatomy) -> list[float]:
    """(k, j, i) of the centre of the largest lesion; [] when later organs cover it."""
    labels, count = ndimage.label(anatomy.organ == ORGAN["lesion"])
    if not count:
        return []
    largest = int(np.bincount(labels.ravel())[1:].argmax()) + 1
    return [round(float(c), 3) for c in ndimage.center_of_mass(labels == largest)]


def _areas(inside: NDArray[np.bool_]) -> dict[str, int]:
    """Pixels of a structure in each slice that has some."""
    areas = inside.sum((1, 2))
    return {str(z): int(areas[z]) for z in np.flatnonzero(areas)}


def _write_head(folder: Path, settings: PhantomSettings, number: int) -> dict[str, Any]:
    """A slab of a brain, cut to its box; half of the heads bleed, and every head has a calcification that is no bleeding."""
    rng = np.random.default_rng([settings.seed, number, 2])
    ct, _, _, brain = make_head(int(rng.integers(2**31)), HEAD_MM)
    image, inside = ct.voxels.astype(np.float32), brain.voxels > 0
    areas = inside.sum((1, 2))
    centre = int(rng.choice(np.flatnonzero(areas > 0.85 * areas.max())))
    bleeds = bool(number % 2)
    if bleeds:
        blood = _blob(inside, centre, float(rng.uniform(12, 26)), rng)
        image += ndimage.gaussian_filter(blood.astype(np.float32), 0.6) * np.float32(rng.uniform(40, 90))
    calcified = _blob(inside, centre, float(rng.uniform(3, 5)), rng)
    image[calcified] += np.float32(rng.uniform(20, 60))
    image += 8 * ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), 2) * 8  # uneven tissue
    jittered = _jitter(image, replace(settings, noise_hu=settings.noise_hu / 2), rng)
    first = min(max(centre - SLAB // 2, 0), len(image) - SLAB)
    assert ct.affine is not None
    affine = ct.affine.copy()
    affine[:3, 3] += affine[:3, 0] * first
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in ((0, 2), (0, 1)))
    box = np.s_[first : first + SLAB, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    affine[:3, 3] += affine[:3, 1] * rows[0] + affine[:3, 2] * columns[0]
    _write(folder / "ct.nii.gz", jittered[box], affine)
    return {"haemorrhage": int(bleeds), "slice": centre - first}


def _blob(inside: NDArray[np.bool_], z: int, size_mm: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """An ellipsoid within `inside` around a voxel of slice z."""
    at = np.argwhere(inside[z])
    j, i = at[rng.integers(len(at))]
    semi = size_mm * rng.uniform(0.7, 1.4, 3) / HEAD_MM
    k = np.ogrid[tuple(slice(0, n) for n in inside.shape)]
    blob: NDArray[np.bool_] = sum(((axis - c) / s) ** 2 for axis, c, s in zip(k, (z, j, i), semi)) < 1
    return blob & inside


def _jitter(image: NDArray[np.float32], settings: PhantomSettings, rng: np.random.Generator) -> NDArray[np.int16]:
    gain, offset = rng.standard_normal(2) * (settings.gain, settings.offset_hu)
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(settings.noise_hu)
    jittered = image * np.float32(1 + gain) + np.float32(offset) + noise
    return np.clip(np.rint(jittered), -1024, 3071).astype(np.int16)


def _write(path: Path, voxels: NDArray[Any], affine: FloatArray) -> None:
    with write_atomic(path) as temporary:
        nifti.write(temporary, voxels.astype(np.int16), affine, 1.0, 0.0, packed=True)
