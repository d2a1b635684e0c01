"""The body plan of the phantom: what is painted where, from the skin inwards.

Coordinates are (x, y, z) = (left, posterior, superior) millimetres of an average body. Later shapes cover earlier ones.
"""

from collections.abc import Sequence

import numpy as np

from hilum.archive.phantom.body import ORGAN, TISSUE, Canvas, Patient, smooth_field


def paint_body(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Paint one whole patient on an empty canvas."""
    _paint_trunk(canvas, patient, rng)
    _paint_skeleton(canvas)
    _paint_chest(canvas, patient)
    _paint_abdomen(canvas, patient, rng)
    _paint_great_vessels(canvas, patient, rng)
    _paint_vessel_trees(canvas, rng)
    _paint_lesions(canvas, patient, rng)
    _paint_table(canvas, patient)


def _solid(
    canvas: Canvas, patient: Patient, organ: str, tissue: str, center: Sequence[float], semi: Sequence[float],
    lobes: float = 0.12, tilt_deg: float = 0.0,
) -> None:  # fmt: skip
    """One organ as an ellipsoid of this patient's organ size."""
    semi = [s * patient.organ_scale[organ] for s in semi]
    box, mask = canvas.ellipsoid(center, semi, lobes=lobes, tilt_deg=tilt_deg)
    canvas.paint(box, mask, tissue, organ)


def _paint_trunk(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Skin, fat, muscle wall, and the fat and bowel that fill the cavity."""
    z, y, x = canvas.z, canvas.y, canvas.x
    shoulders = np.clip((z - 150) / 70, 0, 1) ** 2
    waist = np.exp(-(((z + 70) / 60) ** 2))
    half_width = 166 - 8 * waist * (1.2 - patient.girth) - 34 * shoulders
    half_depth = 118 - 10 * waist * (1.6 - patient.girth) - 30 * shoulders
    girth = 0.94 + 0.08 * patient.girth
    radius = (np.abs(x) / (half_width * girth)) ** 2.4 + (np.abs(y) / (half_depth * girth)) ** 2.4
    radius += 0.03 * canvas.wobble
    everywhere = (slice(None),) * 3
    fat = 0.10 + 0.16 * patient.girth
    canvas.paint(everywhere, radius < 1, "fat")
    canvas.paint(everywhere, radius < 1 - fat, "muscle")
    cavity = (radius + 0.05 * canvas.wobble < 1 - fat - 0.22) & (z < 62 - 0.004 * (np.abs(x) - 60) ** 2 - 0.003 * y**2)
    canvas.paint(everywhere, cavity, "visceral_fat")
    box = canvas.box((0, -20, -90), (150, 55, 75))
    shape = canvas.wobble[box].shape
    loops = smooth_field(rng, shape, (8, 6, 14)) ** 2 + smooth_field(rng, shape, (8, 6, 14)) ** 2 < 0.9
    canvas.paint(box, loops & cavity[box], "bowel")
    skin = (radius < 1) & (radius > 0.965)
    canvas.paint(everywhere, skin, "muscle")


def _paint_skeleton(canvas: Canvas) -> None:
    """Spine with discs and canal, ribs as slanted hoops, iliac wings and hips."""
    box = canvas.box((0, 85, 0), (60, 50, 400))
    x, y, z = canvas.coordinates(box)
    level = np.mod(z, 27.0)
    body = (x / 22) ** 2 + ((y - 72) / 18) ** 2
    vertebra = (body < 1) & (level < 21)
    arch = ((np.abs(x) < 5) & (y > 105) & (y < 128) & (level < 14)) | (
        (np.abs(y - 100) < 5) & (np.abs(x) < 34) & (level < 9)
    )
    canvas.paint(box, (body < 1) & (level >= 21), "disc", "spine")
    canvas.paint(box, vertebra, "cortical_bone", "spine")
    canvas.paint(box, vertebra & (body < 0.8) & (level > 1.5) & (level < 19.5), "spongy_bone", "spine")
    canvas.paint(box, arch, "cortical_bone", "spine")
    canal = (x / 10) ** 2 + ((y - 99) / 8) ** 2 < 1
    canvas.paint(box, canal, "cord", "spinal_cord")

    box = canvas.box((0, 0, 100), (180, 130, 120))
    x, y, z = canvas.coordinates(box)
    narrow = 1 - 0.42 * np.clip((z - 90) / 130, 0, 1) ** 1.5
    cage = (np.abs(x) / (140 * narrow)) ** 2.2 + (np.abs(y) / (97 * narrow)) ** 2.2
    hoop = np.mod(z + 0.55 * y, 26.0) < 9
    canvas.paint(box, (cage > 0.93) & (cage < 1.07) & hoop & (z > -15), "cortical_bone")
    sternum = (np.abs(x) < 16) & (cage > 0.9) & (cage < 1.08) & (y < 0) & (z > 20)
    canvas.paint(box, sternum, "spongy_bone")

    for side in (-1, 1):
        box = canvas.box((side * 85, 40, -135), (70, 90, 70))
        x, y, z = canvas.coordinates(box)
        sheet = np.abs((side * x - 78) - 0.30 * (z + 140) + 0.012 * (y - 30) ** 2 * 0.35)
        wing = (sheet < 7) & (((y - 40) / 62) ** 2 + ((z + 130) / 52) ** 2 < 1)
        canvas.paint(box, wing, "cortical_bone")
        canvas.paint(box, wing & (sheet < 4), "spongy_bone")
        box, mask = canvas.ellipsoid((side * 92, 12, -196), (25, 25, 25), lobes=0.0)
        canvas.paint(box, mask, "cortical_bone")
        box, mask = canvas.ellipsoid((side * 92, 12, -196), (21, 21, 21), lobes=0.0)
        canvas.paint(box, mask, "spongy_bone")


def _paint_chest(canvas: Canvas, patient: Patient) -> None:
    for organ, side in (("lung_right", -1), ("lung_left", 1)):
        scale = patient.organ_scale[organ]
        center, semi = (side * 64, -2, 72), (56 * scale**0.5, 80 * scale**0.5, 128 * scale)
        box, mask = canvas.ellipsoid(center, semi, lobes=0.06)
        _, _, z = canvas.coordinates(box)
        x, y, _ = canvas.coordinates(box)
        dome = 42 - 0.006 * (x - side * 62) ** 2 - 0.006 * (y + 5) ** 2 - (10 if side > 0 else 0)
        canvas.paint(box, mask & (z > dome), "lung", organ)
    box, mask = canvas.ellipsoid((0, 10, 110), (24, 60, 85), lobes=0.15)
    canvas.paint(box, mask & (canvas.organ[box] != ORGAN["spine"]), "visceral_fat")
    canvas.organ[box][mask & (canvas.tissue[box] == TISSUE["visceral_fat"])] = 0
    _solid(canvas, patient, "heart", "heart", (22, -30, 72), (52, 42, 46), lobes=0.10, tilt_deg=30)
    for dx, dy, size in ((8, -42, 22), (36, -22, 20), (10, -8, 19)):  # chambers
        box, mask = canvas.ellipsoid((14 + dx, dy + 5, 74), (size, size * 0.8, size * 1.2), lobes=0.15)
        inside = mask & (canvas.organ[box] == ORGAN["heart"])
        canvas.paint(box, inside, "blood")
    airway = ((0, 8, 260), (0, 12, 128)), ((0, 12, 128), (-34, 14, 98)), ((0, 12, 128), (34, 14, 100))
    for points, radius in zip(airway, (9.5, 6.5, 6.0)):
        radius *= patient.organ_scale["trachea"]
        for box, mask in canvas.tube(points, (radius + 2, radius + 2)):
            canvas.paint(box, mask, "muscle")
        for box, mask in canvas.tube(points, (radius, radius)):
            canvas.paint(box, mask, "gas", "trachea")


def _paint_abdomen(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    _paint_colon(canvas, patient, rng)
    _solid(canvas, patient, "spleen", "spleen", (98, 42, 22), (24, 44, 46), lobes=0.10, tilt_deg=-35)
    _solid(canvas, patient, "liver", "liver", (-62, -4, 12), (74, 76, 64), lobes=0.10, tilt_deg=15)
    _solid(canvas, patient, "liver", "liver", (12, -48, 28), (66, 30, 30), lobes=0.12, tilt_deg=-10)
    _solid(canvas, patient, "stomach", "stomach", (58, -32, 8), (38, 42, 52), lobes=0.16, tilt_deg=20)
    box, mask = canvas.ellipsoid((58, -32, 8), (30, 34, 44), lobes=0.1)
    _, y, _ = canvas.coordinates(box)
    level = -45 + 25 * float(rng.uniform(-1, 1))  # gas collects in front of a patient who lies on the back
    canvas.paint(box, mask & (y < level) & (canvas.organ[box] == ORGAN["stomach"]), "gas")
    size = patient.organ_scale["pancreas"] * (1 - 0.003 * (patient.age_years - 50))
    course = ((-34, 2, -38), (-12, -4, -26), (20, -6, -16), (52, 14, -6), (78, 30, 6))
    for box, mask in canvas.tube(course, [r * size for r in (17, 14, 11, 12, 9)], bumps=0.08):
        free = mask & (canvas.organ[box] != ORGAN["spleen"])
        canvas.paint(box, free, "pancreas", "pancreas")
    if patient.has_gallbladder:
        _solid(canvas, patient, "gallbladder", "bile", (-46, -44, -42), (15, 17, 28), lobes=0.08)
    _paint_kidneys(canvas, patient)
    box, mask = canvas.ellipsoid((0, -28, -186), (46, 36, 30), lobes=0.06)
    canvas.paint(box, mask, "muscle", "bladder")
    box, mask = canvas.ellipsoid((0, -28, -186), (42, 32, 26), lobes=0.06)
    canvas.paint(box, mask, "urine", "bladder")
    width = 24 if patient.sex == "M" else 34  # prostate or uterus, unlabelled
    box, mask = canvas.ellipsoid((0, 18, -200 if patient.sex == "M" else -180), (width, 18, 18), lobes=0.1)
    canvas.paint(box, mask, "muscle")


def _paint_kidneys(canvas: Canvas, patient: Patient) -> None:
    for organ, side in (("kidney_right", -1), ("kidney_left", 1)):
        if patient.kidneys in ("two", "horseshoe", organ.removeprefix("kidney_")):
            center = (side * 62, 52, -48 + 6 * side)
            _solid(canvas, patient, organ, "kidney", center, (27, 29, 52), lobes=0.07, tilt_deg=side * 25)
            sinus = (side * 52, 46, center[2])
            box, mask = canvas.ellipsoid(sinus, (14, 10, 26), lobes=0.3)
            canvas.paint(box, mask & (canvas.organ[box] == ORGAN[organ]), "visceral_fat")
    if patient.kidneys == "horseshoe":
        for side, organ in ((-1, "kidney_right"), (1, "kidney_left")):
            for box, mask in canvas.tube(((side * 58, 48, -88), (0, 38, -100)), (16, 12)):
                canvas.paint(box, mask, "kidney", organ)


def _paint_colon(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    sag = float(rng.uniform(-25, 15))
    course = (
        (-88, 8, -140), (-98, 22, -90), (-94, 10, -62), (-45, -62, -70 + sag), (20, -72, -82 + sag), (80, -48, -50),
        (106, 22, -40), (106, 36, -100), (84, 20, -150), (24, 40, -165), (0, 52, -215),
    )  # fmt: skip
    radii = [r * patient.organ_scale["colon"] for r in (24, 24, 21, 19, 19, 18, 18, 17, 17, 15, 16)]
    gas = float(rng.uniform(0.2, 0.6))
    for box, mask in canvas.tube(course, radii, bumps=0.12):
        canvas.paint(box, mask, "bowel", "colon")
    for box, mask in canvas.tube(course, [r - 3.5 for r in radii], bumps=0.12):
        canvas.paint(box, mask, "stool", "colon")
        bubble = mask & (canvas.wobble[box] > 1.2 - 1.6 * gas)
        canvas.paint(box, bubble, "gas", "colon")


def _paint_great_vessels(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Aorta with arch and bifurcation, vena cava; calcified plaques come with age."""
    radius = patient.organ_scale["aorta"] * (9.5 + 0.06 * patient.age_years)
    arch = ((8, -22, 98), (2, -22, 128), (10, 4, 142), (16, 36, 130), (15, 46, 60), (8, 42, -30), (2, 44, -98))
    branches = ((2, 44, -98), (-30, 34, -145)), ((2, 44, -98), (34, 34, -145))
    share = max(patient.age_years - 50, 0) / 60
    plaques = np.asarray(rng.random(canvas.wobble.shape[0]) < share)[:, None, None]
    for points, size in ((arch, radius), (branches[0], radius * 0.6), (branches[1], radius * 0.6)):
        sizes = [size] * len(points)
        for box, mask in canvas.tube(points, sizes):
            canvas.paint(box, mask, "muscle", "aorta")
            bright = mask & plaques[box[0]] & (canvas.wobble[box] > 0.9)
            canvas.paint(box, bright, "cortical_bone", "aorta")
        for box, mask in canvas.tube(points, [s - 2.0 for s in sizes]):
            canvas.paint(box, mask, "blood", "aorta")
    for box, mask in canvas.tube(((-22, 38, 48), (-20, 40, -98)), (11, 10)):
        canvas.paint(box, mask & (canvas.organ[box] != ORGAN["spine"]), "blood")


def _paint_vessel_trees(canvas: Canvas, rng: np.random.Generator) -> None:
    """Vessels of lung and liver: where two smooth random fields are both near zero, a network of tubes runs."""
    for organs, tissue, cells, width in (
        (("lung_right", "lung_left"), "vessel", (14, 12, 12), 0.20),
        (("liver",), "vessel", (11, 10, 10), 0.15),
    ):
        inside = np.isin(canvas.organ, [ORGAN[o] for o in organs])
        spans = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {a}))) for a in range(3)]
        box = tuple(slice(int(s[0]), int(s[-1]) + 1) for s in spans)
        shape = canvas.wobble[box].shape
        tubes = smooth_field(rng, shape, cells) ** 2 + smooth_field(rng, shape, cells) ** 2 < width**2
        canvas.paint((box[0], box[1], box[2]), tubes & inside[box], tissue)


def _paint_lesions(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Liver lesions. Benign: round, smooth, even. Malignant: lobulated, uneven, with a dead core."""
    liver = np.argwhere(canvas.organ == ORGAN["liver"])
    for _ in range(patient.num_lesions):
        k, j, i = liver[rng.integers(len(liver))]
        center = (float(canvas.x[0, 0, i]), float(canvas.y[0, j, 0]), float(canvas.z[k, 0, 0]))
        size = float(rng.uniform(11, 24))
        semi = (size, size * float(rng.uniform(0.85, 1.15)), size)
        box, mask = canvas.ellipsoid(center, semi, lobes=0.0)
        if patient.malignant:
            lumps = smooth_field(rng, mask.shape, (4, 4, 4))
            x, y, z = canvas.coordinates(box)
            radius = (
                ((x - center[0]) / semi[0]) ** 2 + ((y - center[1]) / semi[1]) ** 2 + ((z - center[2]) / semi[2]) ** 2
            )
            mask = radius + 0.35 * lumps < 1
        inside = mask & np.isin(canvas.organ[box], (ORGAN["liver"], ORGAN["lesion"]))
        canvas.paint(box, inside, "lesion_rough" if patient.malignant else "lesion", "lesion")
        if patient.malignant:
            canvas.paint(box, inside & (radius < 0.25) & (lumps > -0.3), "lesion_core", "lesion")


def _paint_table(canvas: Canvas, patient: Patient) -> None:
    """A thin curved board under the patient; it has no protons, so only CT shows it."""
    x, y = canvas.x, canvas.y
    board = np.abs(y - (122 * (0.94 + 0.08 * patient.girth) - 0.0012 * x**2)) < 3
    board = board & (np.abs(x) < 150) & (canvas.tissue == TISSUE["air"])
    canvas.tissue[board] = TISSUE["table"]
