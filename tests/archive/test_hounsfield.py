"""Hounsfield sanity: bodies whose HU are known, the same with every mistake made on purpose, and real scans."""

from pathlib import Path

import numpy as np
import pytest

from hilum.archive.intake import read_scan
from hilum.archive.judge.hounsfield import check_hounsfield, thin
from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct, scan_mr
from hilum.archive.privacy import Key
from hilum.archive.scan import find


def body(noise=12.0, size=160, num_slices=6, seed=0):
    """Air −1000, a fat rim −100, muscle 45, a vertebra 500, in HU: a textbook cross-section."""
    y, x = np.indices((size, size)) / size - 0.5
    plane = np.full((size, size), -1000.0)
    plane[(y / 0.36) ** 2 + (x / 0.45) ** 2 < 1] = -100
    plane[(y / 0.30) ** 2 + (x / 0.38) ** 2 < 1] = 45
    plane[((y - 0.15) / 0.06) ** 2 + (x / 0.07) ** 2 < 1] = 500
    white = np.random.default_rng(seed).normal(0, noise, (num_slices, size, size))
    return np.rint(plane + white).astype(np.int16)


def corners(voxels, value):
    """Everything outside the inscribed circle set to one value, as scanners do."""
    y, x = (np.indices(voxels.shape[1:]) + 0.5) / voxels.shape[1] - 0.5
    return np.where(y**2 + x**2 > 0.25, value, voxels).astype(np.int16)


RIGHT = {
    "plain": lambda v: v,
    "clipped air": lambda v: np.maximum(v, -1024),
    "float": lambda v: v + np.float32(0.25),
    "padding −2000": lambda v: corners(v, -2000),
    "padding −3024": lambda v: corners(v, -3024),
    "padding −32768": lambda v: corners(v, -32768),
    "metal": lambda v: np.where((np.indices(v.shape)[1] < 20) & (np.indices(v.shape)[2] < 60), 3071, v),
    "one slice": lambda v: v[:1],
}
WRONG = {
    "rescale not applied": (lambda v: v.astype(np.int32) + 1024, -1024),
    "rescale not applied, clipped at 0": (lambda v: np.maximum(v + 1024, 0), -1024),
    "rescale applied twice": (lambda v: v - 1024, 1024),
    "rescale applied twice, clipped": (lambda v: np.maximum(v - 1024, -2048), 1024),
    "tenfold": (lambda v: v.astype(np.int32) * 10, 0),
    "a tenth": (lambda v: np.rint(v / 10).astype(np.int16), 0),
    "12 bits wrapped": (lambda v: v & 0xFFF, 0),
    "16 bits wrapped": (lambda v: v.astype(np.int32) & 0xFFFF, 0),
    "inverted": (lambda v: -v, 0),
    "8 bits of a window": (lambda v: np.clip((v + 160) / 400 * 255, 0, 255).astype(np.uint8), 0),
    "a share of 1": (lambda v: ((v + 1024.0) / 4095).astype(np.float32), 0),
}


@pytest.mark.parametrize("name", RIGHT)
def test_hounsfield_units_are_known(name):
    check = check_hounsfield(RIGHT[name](body()))
    assert check.verdict == "hu", check
    assert check.shift_hu == 0
    assert check.air_peak == pytest.approx(-1000, abs=25)
    assert check.fat_peak == pytest.approx(-100, abs=15)
    assert check.soft_peak == pytest.approx(45, abs=15)


@pytest.mark.parametrize("name", WRONG)
def test_another_scale_is_refused_and_named(name):
    spoil, shift = WRONG[name]
    check = check_hounsfield(spoil(body()))
    assert check.verdict == "not_hu", check
    assert check.shift_hu == shift


def test_shares_are_those_of_the_picture():
    voxels = body(noise=0)
    check = check_hounsfield(voxels)
    for name, low, high in (("air", -1100, -900), ("soft", -200, 200), ("bone", 201, 4000)):
        assert getattr(check, name) == pytest.approx(((voxels > low) & (voxels <= high)).mean(), abs=1e-9)
    padded = check_hounsfield(corners(voxels, -2000))
    assert padded.padding == pytest.approx(1 - np.pi / 4, abs=0.01)
    assert padded.minimum == -1000


def test_a_crop_inside_the_body_is_told_by_fat_and_muscle():
    inside = body(noise=25)[:, 64:96, 16:90]
    assert inside.min() > -250
    assert check_hounsfield(inside).verdict == "hu"


@pytest.mark.parametrize("spoil", [
    lambda v: v + 200,  # an offset as of cone-beam CT
    lambda v: v // 2,
    lambda v: body()[:, 70:90, 60:100],  # muscle and bone alone
    lambda v: np.random.default_rng(0).integers(-1024, -769, v.shape).astype(np.int16),  # noise over air
], ids=["offset", "half", "muscle only", "noise"])  # fmt: skip
def test_what_cannot_be_told_is_flagged_not_refused(spoil):
    assert check_hounsfield(spoil(body())).verdict == "unsure"


def test_a_water_phantom_is_hu():
    y, x = np.indices((128, 128)) - 64
    water = np.where(y**2 + x**2 < 50**2, 0, -1000) + np.random.default_rng(0).normal(0, 5, (4, 128, 128))
    assert check_hounsfield(np.rint(water).astype(np.int16)).verdict == "hu"


def test_a_lung_crop_is_hu():
    rng = np.random.default_rng(0)
    lung = rng.normal(-850, 60, (8, 64, 64))
    vessels = rng.random(lung.shape) < 0.1
    lung[vessels] = rng.normal(40, 20, int(vessels.sum()))
    assert check_hounsfield(np.rint(lung).astype(np.int16)).verdict == "hu"


def test_numbers_name_the_rule_and_nothing_private():
    text = check_hounsfield(body() + 1024).numbers()
    assert "1 · value -1024" in text
    assert "padding 0 %" in text


def test_synthetic_patients():
    for n in range(3):
        anatomy = make_anatomy(sample_patient(n), 24, 96)
        assert check_hounsfield(scan_ct(anatomy).voxels).verdict == "hu"
        assert (
            check_hounsfield(-scan_ct(anatomy).voxels).verdict == "not_hu"
        )  # its cortical bone then lies where air should
        assert check_hounsfield(scan_mr(anatomy).voxels).verdict != "hu"


def test_thin_keeps_small_images_whole():
    assert thin(np.zeros((3, 255, 100))).shape == (3, 255, 100)
    assert thin(np.zeros((3, 512, 384))).shape == (3, 128, 128)


def some_slices(vol):
    return vol.voxels[:: max(len(vol.voxels) // 12, 1)]


@pytest.fixture(scope="module")
def real_scans(real_data: Path, key: Key):
    """(calls itself CT, folder, voxels) of real scans in DICOM, and CT and MR in NIfTI."""
    scans = []
    folders = [*(real_data / "dicom").glob("*ct*"), *(real_data / "dicom").glob("mr_*")]
    for folder in sorted(f for f in folders if f.is_dir()):
        scans += [
            (e.modality == "CT", folder.name, some_slices(read_scan(e)))
            for e in find(folder, key)
            if e.reader == "dicom" and e.used
        ]
    images = [*sorted((real_data / "nifti/ct_head_neck_openkbp/ct").iterdir())[:40],
              *sorted((real_data / "nifti/mr_hippocampus_msd/images").iterdir())[:40],
              real_data / "nifti/ct_mr_totalsegmentator/ct_3mm_full.nii.gz",
              real_data / "nifti/ct_mr_totalsegmentator/mr_3mm_slab.nii.gz"]  # fmt: skip
    for path in images:
        scans += [
            ("ct_" in path.name or path.parent.name == "ct", path.name, some_slices(read_scan(e)))
            for e in find(path, key)
        ]
    assert sum(ct for ct, *_ in scans) >= 45
    assert sum(not ct for ct, *_ in scans) >= 50
    return scans


def test_real_ct_is_hu_and_real_mr_never_is(real_scans):
    for ct, name, voxels in real_scans:
        check = check_hounsfield(voxels)
        assert (check.verdict == "hu") == ct, (name, check)


@pytest.mark.parametrize("name", [n for n in WRONG if n != "8 bits of a window"])
def test_real_ct_with_mistakes_is_never_taken_for_hu(name, real_scans):
    spoil, _ = WRONG[name]
    verdicts = [check_hounsfield(spoil(voxels)).verdict for ct, _, voxels in real_scans if ct]
    assert "hu" not in verdicts
    assert verdicts.count("not_hu") >= 0.85 * len(verdicts)
