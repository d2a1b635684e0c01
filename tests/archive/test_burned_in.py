"""Text rendered by Pillow onto real and synthetic slices must be found; clean slices must not look like text."""

import time

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont

from hilum.archive.intake import read_scan
from hilum.archive.judge.burned_in import burned_in_score, text_score
from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct, scan_mr
from hilum.archive.phantom.files import write_phantom
from hilum.archive.scan import find
from hilum.errors import ScanRefused
from hilum.volume import Volume

TEXT = "DOE^JANE 1961-02-03"


def write_text(pixels: np.ndarray, where: tuple[int, int], size: int, value: float) -> np.ndarray:
    page = Image.new("L", pixels.shape[::-1])
    ImageDraw.Draw(page).text(where, TEXT, fill=255, font=ImageFont.load_default(size=size))
    share = np.asarray(page) / 255.0
    return (pixels * (1 - share) + value * share).astype(pixels.dtype)


@pytest.fixture(scope="module")
def slices():
    anatomy = make_anatomy(sample_patient(0), 24, 320)
    return {"CT": scan_ct(anatomy).voxels[12], "MR": scan_mr(anatomy).voxels[12]}


@pytest.mark.parametrize("size", [11, 14, 18, 26])
@pytest.mark.parametrize("where", ["top left", "bottom right", "on the anatomy"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_text_is_found(slices, modality, size, where):
    pixels = slices[modality]
    wide, tall = ImageFont.load_default(size=size).getbbox(TEXT)[2:]
    side = pixels.shape[0]
    x, y = {
        "top left": (3, 3),
        "bottom right": (max(side - wide - 3, 2), side - tall - 4),
        "on the anatomy": ((side - wide) // 2, side // 2),
    }[where]
    value = 3071 if modality == "CT" else 1.5 * float(pixels.max())  # what is no brighter than anatomy may hide in it
    assert text_score(pixels) < 0.5
    assert text_score(write_text(pixels, (x, y), size, value)) >= 0.5


def test_dark_text_on_a_bright_page_is_found():
    page = np.full((200, 300), 240, np.uint8)
    assert text_score(page) == 0.0
    assert text_score(write_text(page, (20, 60), 14, 10)) >= 0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_any_pixel_type_gives_the_same_score(dtype):
    page = write_text(np.zeros((80, 250), np.uint8), (5, 20), 14, 200)
    assert text_score(page.astype(dtype)) == text_score(page) >= 0.5


def test_a_page_made_by_a_scanner_is_text(tmp_path):
    write_phantom(tmp_path / "p", num_patients=1, num_slices=8, matrix=64, num_workers=1)
    assert text_score(pydicom.dcmread(tmp_path / "p" / "scans" / "dose_report.dcm").pixel_array) >= 0.5


def test_one_slice_of_a_volume_is_enough(slices):
    voxels = np.stack([slices["CT"]] * 9)
    vol = Volume(voxels=voxels, affine=None, modality="CT", unit="HU")
    assert burned_in_score(vol) == text_score(slices["CT"])
    for k in (0, 4, 8):
        marked = voxels.copy()
        marked[k] = write_text(voxels[k], (3, 3), 14, 3071)
        assert burned_in_score(Volume(voxels=marked, affine=None, modality="CT", unit="HU")) >= 0.5


def test_things_that_are_no_text():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    for pixels in (
        rng.normal(0, 100, (256, 256)),
        ((x // 16 + y // 16) % 2) * 1000.0,  # a chequered phantom
        (x % 8 < 4) * 1000.0,  # stripes
        np.hypot(x - 128, y - 128),
        np.zeros((256, 256)),
        np.ones((4, 4)),
        np.arange(10.0)[None],
    ):
        assert text_score(pixels) < 0.5


def test_clean_real_slices_score_low_and_fast(real_data, key):
    """Every readable scan at hand, a few slices of each; and a sample of the single slices."""
    false: dict[str, float] = {}
    seconds = []
    folders = sorted(p for p in (*(real_data / "dicom").iterdir(), *(real_data / "nifti").iterdir()) if p.is_dir())
    for folder in folders:
        several = folder.name in ("ct_head_neck_openkbp", "mr_hippocampus_msd")  # hundreds of alike ones
        used = [e for e in find(folder, key) if e.used]
        for number, entry in enumerate(used[:: 25 if several else 1]):
            try:
                vol = read_scan(entry)
            except ScanRefused:
                continue
            score = burned_in_score(vol)
            if score >= 0.5:
                false[f"{folder.name} {number}"] = score
            if vol.shape[1:] == (512, 512):
                before = time.process_time()
                text_score(vol.voxels[0])
                seconds.append(time.process_time() - before)
    for path in [*sorted(real_data.glob("slices/*/*/*.jp*g"))[::60]]:
        score = text_score(np.asarray(Image.open(path).convert("L")))
        if score >= 0.5:
            false[f"{path.parent.name} {path.name}"] = score
    assert not false
    assert min(seconds) < 0.010


def test_marked_real_slices_score_high(real_data, key):
    """The same scans with a name in a corner. A corner that is as bright as text, or pure noise, may hide it."""
    scores = []
    for folder in (
        "ct_axial_j2k_siemens",
        "mr_mixed_series_one_folder",
        "mr_sagittal_patient_position",
        "seg_liver_ct",
    ):
        for entry in find(real_data / "dicom" / folder, key):
            if entry.reader == "dicom" and entry.used:
                pixels = read_scan(entry).voxels[0]
                scores += [text_score(write_text(pixels, (4, 4), s, float(pixels.max()))) for s in (10, 12, 16, 24)]
    assert len(scores) >= 16
    assert min(scores) >= 0.5


def test_survey_pages_hold_no_text_in_their_pixels(real_data):
    """The Philips survey pages carry their numbers in an overlay plane, not in the pixels."""
    for name in ("S4010_I10", "S4010_I20"):
        data = pydicom.dcmread(real_data / "dicom" / "ct_mixed_study_philips_phantom" / name)
        assert text_score(data.pixel_array) < 0.5
