"""Screening: images spoilt on purpose, real scans that must pass, and noise in real headers that must not."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from hilum.archive.intake import read_scan
from hilum.archive.judge.screening import neighbour_correlation, note_background, num_repeated_slices, screen
from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct, scan_mr
from hilum.archive.privacy import Key
from hilum.archive.reasons import FLAGS, REASONS
from hilum.archive.scan import find
from hilum.archive.store.content import measure_content
from hilum.errors import ScanRefused
from hilum.volume import Volume


@pytest.fixture(scope="module")
def ct() -> Volume:
    return scan_ct(make_anatomy(sample_patient(0), 48, 128))


@pytest.fixture(scope="module")
def mr() -> Volume:
    return scan_mr(make_anatomy(sample_patient(0), 48, 128))


def noise(shape, low=0, high=255):
    return np.random.default_rng(0).integers(low, high, shape).astype(np.int16)


def with_one(vol, share):
    """All voxels 0 but a share of them, in one block."""
    voxels = np.zeros_like(vol.voxels)
    rows = round(share * voxels.size / (voxels.shape[0] * 64))
    voxels[:, :rows, :64] = vol.voxels[:, 40 : 40 + rows, 32:96] + 1500
    return voxels


def test_a_good_scan_passes_whole(ct, mr):
    seen = screen(ct)
    assert seen.refusal is None
    assert seen.flags == ()
    assert (seen.plane, seen.region) == ("axial", "chest+abdomen")
    seen = screen(mr)
    assert seen.refusal is None
    assert seen.flags == ()
    assert seen.region == ""


REFUSED = {
    "small_matrix": lambda v: replace(v, voxels=v.voxels[:, 50:62, 50:65]),
    "nearly_constant": lambda v: replace(v, voxels=with_one(v, 0.0005)),
    "few_levels": lambda v: replace(v, voxels=(v.voxels // 250).astype(np.int16)),
    "noise": lambda v: replace(v, voxels=noise(v.shape)),
    "repeated_slices": lambda v: replace(v, voxels=np.repeat(v.voxels[::3], 3, 0)),
}
FLAGGED = {
    "small_matrix": lambda v: replace(v, voxels=v.voxels[:, 50:80, 30:90]),
    "few_levels": lambda v: replace(v, voxels=(v.voxels // 60).astype(np.int16)),
    "noisy": lambda v: replace(v, voxels=(v.voxels + noise(v.shape, -3000, 3000) * 0.3).astype(np.int16)),
    "repeated_slices": lambda v: replace(v, voxels=np.insert(v.voxels, 20, v.voxels[20], 0)),
    "saturated": lambda v: replace(v, voxels=np.minimum(v.voxels, int(np.percentile(v.voxels, 95)))),
    "field_size": lambda v: replace(v, affine=v.affine @ np.diag([0.01, 0.01, 0.01, 1])),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_one_should_train_on_is_refused_with_numbers(reason, mr):
    seen = screen(REFUSED[reason](mr))
    assert seen.refusal is not None
    assert seen.refusal[0] == reason
    assert reason in REASONS
    assert any(c.isdigit() for c in seen.refusal[1])


@pytest.mark.parametrize("code", FLAGGED)
def test_what_is_odd_is_flagged_with_numbers_and_used(code, mr):
    seen = screen(FLAGGED[code](mr))
    assert seen.refusal is None
    assert [f.split(": ")[0] for f in seen.flags] == [code]
    assert code in FLAGS
    assert any(c.isdigit() for c in seen.flags[0])


def test_a_ct_on_another_scale_is_refused_and_an_mr_is_not_asked(ct):
    wrong = replace(ct, voxels=ct.voxels + 1024)
    reason, detail = screen(wrong).refusal
    assert reason == "not_hu"
    assert "-1024" in detail
    assert screen(replace(wrong, modality="MR", unit="")).refusal is None
    offset = screen(replace(ct, voxels=ct.voxels + 200))
    assert offset.refusal is None
    assert offset.flags[0].startswith("hu_suspect: ")


def test_images_without_geometry_and_single_slices(ct):
    seen = screen(Volume(voxels=ct.voxels[24:25], affine=None, modality="OT"))
    assert seen.refusal is None
    assert (seen.plane, seen.region) == ("", "")
    tiny = Volume(voxels=noise((1, 1, 1)), affine=None, modality="OT")
    assert screen(tiny).refusal == ("small_matrix", "1×1×1 voxels")


def test_one_extreme_voxel_changes_no_verdict(mr):
    voxels = mr.voxels.astype(np.float32)
    voxels[0, 0, 0] = 1e30
    assert screen(replace(mr, voxels=voxels)).refusal is None


def test_correlation_of_known_processes():
    """White noise 0; noise averaged over two neighbours along a row 1/2; a ramp 1."""
    white = np.random.default_rng(0).normal(size=(4, 128, 129))
    assert neighbour_correlation(white) == pytest.approx(0, abs=0.03)
    assert neighbour_correlation(white[:, :, 1:] + white[:, :, :-1]) == pytest.approx(0.5, abs=0.03)
    assert neighbour_correlation(np.broadcast_to(np.arange(128.0), (4, 128, 128))) == pytest.approx(1, abs=0.02)
    assert neighbour_correlation(np.zeros((4, 128, 128))) is None
    assert neighbour_correlation(white[:1, :8, :8]) is None


def test_noise_is_found_under_another_scale_in_each_slice_and_lying_across():
    scaled = noise((6, 64, 64)) * np.arange(1, 7)[:, None, None] * 0.5 + 1000 * np.arange(6)[:, None, None]
    for voxels in (scaled, np.moveaxis(scaled, 0, 1), np.moveaxis(scaled, 0, 2)):
        vol = Volume(voxels=voxels.astype(np.float32), affine=None, modality="OT")
        assert screen(vol).refusal[0] == "noise"


def test_copies_count_but_blank_slices_do_not(mr):
    voxels = mr.voxels.copy()
    voxels[:6] = 0
    assert num_repeated_slices(voxels) == 0
    voxels[10] = voxels[9]
    voxels[31] = voxels[30]
    assert num_repeated_slices(voxels) == 2
    voxels[31, 3, 3] += 1  # one voxel tells them apart
    assert num_repeated_slices(voxels) == 1
    large = np.repeat(np.repeat(mr.voxels[:4], 3, 1), 3, 2)
    large[2] = large[1]
    assert num_repeated_slices(large) == 1
    large[2, 4, 4] += 1  # also one between the samples
    assert num_repeated_slices(large) == 0


def test_background_follows_the_content(ct):
    foreground = measure_content(ct).foreground
    assert note_background(foreground) == ()
    few = np.where(np.arange(48) < 4, 0.6, 0.4).astype(np.float32)
    assert note_background(few) == ("mostly_background: 4 of 48 slices at least half anatomy",)
    assert note_background(few[:4]) == ()
    assert note_background(few[-1:]) == ("mostly_background: 0 of 1 slices at least half anatomy",)


def test_noise_in_real_headers_is_refused(real_data: Path, key: Key):
    folder = real_data / "dicom/noise_pixels_real_headers"
    read = [screen(read_scan(e)) for e in find(folder, key) if e.used]
    assert len(read) >= 6
    assert {s.refusal and s.refusal[0] for s in read} == {"noise"}
    raw = 0
    for path in sorted(folder.rglob("*")):  # also what the readers refuse for other reasons
        if path.is_file() and path.suffix not in (".gz", ".md"):
            data = pydicom.dcmread(path)
            pixels = data.pixel_array
            vol = Volume(voxels=pixels.reshape(-1, *pixels.shape[-2:]), affine=None, modality=data.Modality)
            assert screen(vol).refusal[0] == "noise", path.name
            raw += 1
    assert raw > 30


def test_real_scans_pass(real_data: Path, key: Key):
    """Crops of 35 × 50 × 35 voxels, images of 64 × 64, thin and coarse series: none refused, none called noise."""
    folders = [f for f in sorted((real_data / "dicom").iterdir())
               if f.is_dir() and f.name not in ("noise_pixels_real_headers", "seg_tiny_24x38x3", "seg_encodings")]  # fmt: skip
    files = [f for pattern in ("nifti/mr_hippocampus_msd/images/*", "nifti/ct_head_neck_openkbp/ct/*",
                               "slices/ct_mr_body_part_mednist/*/*.jpeg")
             for f in sorted(real_data.glob(pattern))[::7]]  # fmt: skip
    judged = 0
    for place in [*folders, *files]:
        for entry in find(place, key):
            if entry.used and not any("seg" in p.name for p in entry.paths):
                with contextlib.suppress(ScanRefused):  # eight of the JPEG files are blank, one series is a label map
                    seen = screen(read_scan(entry))
                    judged += 1
                    assert seen.refusal is None, (place.name, seen.refusal)
                    assert not any(f.startswith("hu_suspect") for f in seen.flags), (place.name, seen.flags)
    assert judged > 300
