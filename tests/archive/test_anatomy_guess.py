"""Guessed plane and region, against geometry and bodies that are known."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from hilum.archive.intake import read_scan
from hilum.archive.judge.anatomy import guess_plane, guess_region, measure_sections
from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct, scan_mr
from hilum.archive.privacy import Key
from hilum.archive.scan import find
from hilum.volume import Volume, orient

AXIAL = np.array([[0, 0, 0.7, 0], [0, 0.7, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1.0]])


def turned(axis, degrees):
    affine = AXIAL.copy()
    affine[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * np.array(axis)).as_matrix() @ affine[:3, :3]
    return affine


@pytest.mark.parametrize(("affine", "plane"), [
    (AXIAL, "axial"), (turned((1, 0, 0), 90), "coronal"), (turned((0, 1, 0), 90), "sagittal"),
    (turned((1, 0, 0), 180), "axial"), (turned((0, 0, 1), 77), "axial"),  # turned in its plane
    (turned((1, 0, 0), 19), "axial"), (turned((1, 0, 0), 21), "oblique"), (turned((1, 0, 0), 69), "oblique"),
    (turned((1, 0, 0), 71), "coronal"), (turned((0.6, 0.8, 0), 45), "oblique"), (None, ""),
])  # fmt: skip
def test_plane_follows_the_normal(affine, plane):
    assert guess_plane(affine) == plane


def test_a_tilted_gantry_does_not_change_the_plane():
    sheared = AXIAL.copy()
    sheared[:3, 0] += [0, 3 * np.tan(np.radians(30)), 0]  # the stack leans, its slices do not
    assert guess_plane(sheared) == "axial"


def ct(slices, dz=5.0, pixel_mm=2.0):
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, :3] = [[0, 0, pixel_mm], [0, pixel_mm, 0], [dz, 0, 0]]
    white = np.random.default_rng(0).normal(0, 8, (len(slices), *slices[0].shape))
    return Volume(voxels=np.rint(np.stack(slices) + white).astype(np.int16), affine=affine, modality="CT", unit="HU")


def ellipse(height_mm, width_mm, size=220, pixel_mm=2.0, at=(0, 0)):
    y, x = (np.indices((size, size)) - (size - 1) / 2) * pixel_mm
    return ((y - at[0]) / height_mm * 2) ** 2 + ((x - at[1]) / width_mm * 2) ** 2 < 1


def head():
    image = np.where(ellipse(190, 150), 30, -1000)
    return np.where(ellipse(186, 146) & ~ellipse(170, 130), 900, image)  # a skull of 8 mm


def chest():
    image = np.where(ellipse(230, 340), 40, -1000)
    for side in (-80, 80):
        image[ellipse(150, 110, at=(0, side))] = -850
    image[ellipse(35, 40, at=(75, 0))] = 400
    return image


def abdomen():
    image = np.where(ellipse(230, 340), 40, -1000)
    image[ellipse(30, 35, at=(70, 0))] = 400
    return image


def pelvis():
    image = abdomen()
    for side in (-90, 90):
        image[ellipse(55, 50, at=(10, side))] = 500  # heads of the femurs
    return image


def neck():
    image = np.where(ellipse(120, 120), 40, -1000)
    return np.where(ellipse(25, 30, at=(25, 0)), 500, image)


def shoulders():
    return np.where(ellipse(180, 420), 40, -1000)


@pytest.mark.parametrize(("parts", "region"), [
    ([(head, 20)], "head"), ([(chest, 40)], "chest"), ([(abdomen, 40)], "abdomen"),
    ([(chest, 30), (abdomen, 30)], "chest+abdomen"),
    ([(abdomen, 30), (pelvis, 16)], "abdomen+pelvis"),
    ([(head, 20), (neck, 16), (shoulders, 6), (chest, 30), (abdomen, 30), (pelvis, 16)],
     "head+neck+chest+abdomen+pelvis"),
    ([(pelvis, 16)], ""),  # without lumbar spine above it could be shoulders
    ([(neck, 16)], ""),  # could be a leg
    ([(shoulders, 20)], ""),
    ([(abdomen, 40), (chest, 6)], "abdomen"),  # 30 mm of lung base do not make a chest
])  # fmt: skip
def test_regions_of_bodies_made_of_ellipses(parts, region):
    slices = [make() for make, num in reversed(parts) for _ in range(num)]  # index 0 is the foot end
    if region == "abdomen" and len(parts) == 2:
        slices = [make() for make, num in parts for _ in range(num)]
    vol = ct(slices)
    assert guess_region(vol) == region
    assert guess_region(orient(vol, "IAR")) == region  # however the array lies
    assert guess_region(orient(vol, "LIP")) == region


def test_sections_measure_what_was_drawn():
    sections = measure_sections(ct([chest()] * 6))
    assert sections is not None
    np.testing.assert_allclose(sections.area_cm2, np.pi / 4 * 23 * 34, rtol=0.02)
    np.testing.assert_allclose(sections.lung, 2 * 150 * 110 / (230 * 340), rtol=0.05)
    np.testing.assert_allclose(sections.bone, 35 * 40 / (230 * 340), rtol=0.2)


def test_no_guess_without_a_scale_a_geometry_or_a_whole_section():
    vol = ct([chest()] * 40)
    whole = vol.voxels
    assert guess_region(Volume(voxels=whole, affine=None, modality="CT", unit="HU")) == ""
    assert guess_region(Volume(voxels=whole, affine=vol.affine, modality="MR")) == ""
    assert guess_region(Volume(voxels=whole[:, 80:150, 80:150], affine=vol.affine, modality="CT", unit="HU")) == ""


def test_synthetic_torsos_show_chest_and_abdomen():
    """The phantom reaches from the lung apices to the pelvic floor, without hip bones."""
    for n in range(4):
        anatomy = make_anatomy(sample_patient(n), 72, 128)
        assert guess_region(scan_ct(anatomy)) in ("chest+abdomen", "chest")
        assert guess_region(scan_mr(anatomy)) == ""


def test_real_scans_are_never_guessed_wrong(real_data: Path, key: Key):
    """What a guess may name, from the README of each folder; an empty guess is always allowed."""
    shown = {
        "dicom/ct_axial_j2k_siemens": {"abdomen"}, "dicom/seg_liver_ct": {"abdomen"},
        "dicom/ct_transfer_syntaxes_ge": {"chest"}, "dicom/mr_hitachi": set(), "dicom/mr_sagittal_ge_fruit": set(),
        "dicom/ct_mixed_study_philips_phantom": {"head"}, "nifti/mr_hippocampus_msd/images": set(),
        "nifti/ct_head_neck_openkbp/ct": {"head", "neck", "chest"},
    }  # fmt: skip
    for folder, allowed in shown.items():
        for path in sorted((real_data / folder).iterdir())[:30] if folder.startswith("nifti") else [real_data / folder]:
            for entry in find(path, key):
                if entry.used and "seg" not in entry.paths[0].name:
                    region = guess_region(read_scan(entry))
                    assert set(region.split("+")) - {""} <= allowed, (path.name, region)


def test_a_real_abdomen_and_pelvis(real_data: Path, key: Key):
    """Against the organs that a segmentation found: hips, sacrum and bladder below, liver and kidneys above, hardly lung."""
    folder = real_data / "nifti/ct_mr_totalsegmentator"
    labels = np.asarray(nib.load(folder / "ct_3mm_full_seg_total.nii.gz").dataobj)
    assert np.unique(labels).size > 40
    (full,) = find(folder / "ct_3mm_full.nii.gz", key)
    assert guess_region(read_scan(full)) == "abdomen+pelvis"
    (slab,) = find(folder / "ct_3mm_slab.nii.gz", key)
    assert guess_region(read_scan(slab)) == "abdomen"
