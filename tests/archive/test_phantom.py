"""The phantom against anatomy, physics and statistics that are known without its code."""

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy import ndimage, stats

from hilum.archive.phantom import (
    ORGAN,
    ORGANS,
    Anatomy,
    Patient,
    make_anatomy,
    organ_mask,
    sample_patient,
    scan_ct,
    scan_mr,
    survival,
    write_phantom,
)
from hilum.archive.phantom.body import TISSUE, TISSUES, smooth_field
from hilum.archive.phantom.scan import CT_SCANNERS, MR_SCANNERS
from hilum.errors import InputError, UsageError

AVERAGE = replace(
    sample_patient(0), sex="M", age_years=45.0, scale=1.0, girth=1.0, organ_scale=dict.fromkeys(ORGANS[1:], 1.0),
    has_gallbladder=True, kidneys="two", malignant=False, num_lesions=1, enhanced=False, ct_scanner=0, mr_scanner=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def people() -> list[Anatomy]:
    return [make_anatomy(sample_patient(n), 48, 96) for n in range(12)]


@pytest.fixture(scope="module")
def average() -> Anatomy:
    return make_anatomy(AVERAGE, 64, 128)


def centre_of(anatomy: Anatomy, organ: str) -> np.ndarray:
    """Mean position in LPS millimetres."""
    indices = np.argwhere(anatomy.organ == ORGAN[organ])
    return anatomy.affine[:3] @ [*indices.mean(0), 1]


# ---- patients


def test_patients_are_drawn_one_by_one():
    assert sample_patient(3, seed=1) == sample_patient(3, seed=1)
    assert sample_patient(3, seed=1) != sample_patient(3, seed=2)
    assert len({sample_patient(n).patient_id for n in range(50)}) == 50


def test_the_population_is_varied():
    people = [sample_patient(n) for n in range(600)]
    ages = np.array([p.age_years for p in people])
    assert 25 <= ages.min() < 30
    assert 85 < ages.max() <= 90
    assert np.mean([p.sex == "F" for p in people]) == pytest.approx(0.5, abs=0.07)
    assert np.mean([p.has_gallbladder for p in people]) == pytest.approx(0.85, abs=0.05)
    assert np.mean([p.malignant for p in people]) == pytest.approx(0.5, abs=0.07)
    assert {p.kidneys for p in people} == {"two", "left", "right", "horseshoe"}
    assert {(p.ct_scanner, p.mr_scanner, p.num_lesions) for p in people} == {
        (c, m, n) for c in (0, 1) for m in (0, 1) for n in (1, 2, 3)
    }
    women, men = ([p.scale for p in people if p.sex == s] for s in "FM")
    assert np.mean(women) < np.mean(men)


# ---- anatomy


def test_equal_seeds_give_equal_voxels():
    patient = sample_patient(5)
    a, b = (make_anatomy(patient, 16, 48) for _ in range(2))
    assert np.array_equal(a.tissue, b.tissue)
    assert np.array_equal(a.organ, b.organ)
    for scan in (scan_ct, scan_mr):
        assert np.array_equal(scan(a).voxels, scan(b).voxels)
    other = make_anatomy(sample_patient(6), 16, 48)
    assert not np.array_equal(a.organ, other.organ)


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    [
        ("liver", 500, 2800),
        ("spleen", 60, 450),
        ("kidney_right", 70, 350),
        ("kidney_left", 70, 350),
        ("lung_right", 500, 3200),
        ("lung_left", 500, 3200),
        ("heart", 120, 900),
        ("aorta", 60, 450),
        ("pancreas", 30, 150),
        ("stomach", 100, 800),
        ("bladder", 80, 500),
        ("colon", 250, 1500),
        ("spine", 300, 1000),
        ("spinal_cord", 40, 200),
        ("gallbladder", 8, 60),
        ("trachea", 8, 60),
        ("lesion", 3, 200),
    ],
)
def test_organ_volumes_are_plausible(people, organ, low, high):
    """Millilitres of an adult, for every patient who has the organ."""
    volumes = []
    for anatomy in people:
        patient = anatomy.patient
        absent = organ == "gallbladder" and not patient.has_gallbladder
        absent |= organ.startswith("kidney") and patient.kidneys not in (
            "two",
            "horseshoe",
            organ.removeprefix("kidney_"),
        )
        volume = anatomy.organ_volumes_ml()[organ]
        if absent:
            assert volume == 0
        else:
            volumes.append(volume)
    assert min(volumes) > low
    assert max(volumes) < high


def test_an_average_liver(average):
    assert 1100 < average.organ_volumes_ml()["liver"] < 1900


def test_volumes_do_not_depend_on_the_grid():
    """The outlines' noise is drawn on coarse cells, so two grids show the same organs."""
    fine, coarse = (make_anatomy(AVERAGE, *grid).organ_volumes_ml() for grid in ((96, 160), (48, 80)))
    for organ in ("liver", "spleen", "lung_left", "heart", "kidney_right", "spine", "bladder"):
        assert coarse[organ] == pytest.approx(fine[organ], rel=0.1), organ


def test_right_is_right_and_up_is_up(people):
    """LPS: +x to the left, +y to the back, +z to the head."""
    for anatomy in people:
        at = {name: centre_of(anatomy, name) for name in ORGANS[1:] if (anatomy.organ == ORGAN[name]).any()}
        assert at["liver"][0] < 0 < at["spleen"][0]
        assert at["lung_right"][0] < at["heart"][0] < at["lung_left"][0]
        assert at["stomach"][0] > at["liver"][0]
        if {"kidney_right", "kidney_left"} <= at.keys():
            assert at["kidney_right"][0] < 0 < at["kidney_left"][0]
        if "gallbladder" in at:
            assert at["gallbladder"][0] < 0
        assert at["spine"][1] > at["aorta"][1] > at["heart"][1]
        assert at["spinal_cord"][1] > at["aorta"][1]
        assert at["bladder"][2] < at["colon"][2] < at["liver"][2] < at["heart"][2]
        assert at["trachea"][2] > at["heart"][2]


def test_topology_follows_the_patient():
    two, horseshoe, right, no_gallbladder = (
        make_anatomy(replace(AVERAGE, **changes), 48, 96)
        for changes in ({}, {"kidneys": "horseshoe"}, {"kidneys": "right"}, {"has_gallbladder": False})
    )

    def num_kidneys(anatomy: Anatomy) -> int:
        return ndimage.label(np.isin(anatomy.organ, [ORGAN["kidney_right"], ORGAN["kidney_left"]]), np.ones((3, 3, 3)))[
            1
        ]

    assert num_kidneys(two) == 2
    assert num_kidneys(horseshoe) == 1
    assert (horseshoe.organ == ORGAN["kidney_left"]).any()
    assert num_kidneys(right) == 1
    assert not (right.organ == ORGAN["kidney_left"]).any()
    assert not (no_gallbladder.organ == ORGAN["gallbladder"]).any()
    assert (two.organ == ORGAN["gallbladder"]).any()


def test_age_shows(average):
    young, old = (make_anatomy(replace(AVERAGE, age_years=age), 48, 96) for age in (30.0, 88.0))
    volumes = [a.organ_volumes_ml() for a in (young, old)]
    assert volumes[1]["aorta"] > 1.2 * volumes[0]["aorta"]
    assert volumes[1]["pancreas"] < volumes[0]["pancreas"]
    plaque = [((a.organ == ORGAN["aorta"]) & (a.tissue == TISSUE["cortical_bone"])).sum() for a in (young, old)]
    assert plaque[0] == 0 < plaque[1]
    spongy = [scan_ct(a).voxels[eroded(a, "spongy_bone", 1)].mean() for a in (young, old)]
    assert spongy[0] - spongy[1] == pytest.approx(1.8 * 58, abs=40)


def test_lesions_lie_in_the_liver(people):
    """Every lesion voxel is next to liver or lesion, and the lesion's tissue says benign or malignant."""
    for anatomy in people:
        lesion = anatomy.organ == ORGAN["lesion"]
        around = ndimage.binary_dilation(anatomy.organ == ORGAN["liver"], np.ones((3, 3, 3)), iterations=2)
        assert ndimage.binary_dilation(lesion)[around].any()
        hull = ndimage.binary_fill_holes(ndimage.binary_closing(around | lesion, iterations=2))
        assert lesion[hull].sum() == lesion.sum()
        found = {name for name, number in TISSUE.items() if (anatomy.tissue[lesion] == number).any()}
        assert found == {"lesion_rough", "lesion_core"} if anatomy.patient.malignant else found == {"lesion"}


def test_lesion_kinds_differ_in_texture_more_than_in_brightness():
    """What the malignancy task asks: not solvable by mean HU."""
    kinds: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for number in range(12):
        for malignant in (True, False):
            patient = replace(sample_patient(number), malignant=malignant, enhanced=False)
            anatomy = make_anatomy(patient, 48, 128)
            kinds[malignant].append(scan_ct(anatomy).voxels[anatomy.organ == ORGAN["lesion"]].astype(float))
    means = {kind: np.array([v.mean() for v in values]) for kind, values in kinds.items()}
    spreads = {kind: np.array([v.std() for v in values]) for kind, values in kinds.items()}
    assert abs(means[True].mean() - means[False].mean()) < 10
    assert spreads[True].mean() > 1.15 * spreads[False].mean()


def test_the_smallest_grid_is_painted():
    for number in range(30):
        make_anatomy(sample_patient(number), 8, 32)


def test_smooth_fields_have_unit_spread_and_are_smooth():
    out = smooth_field(np.random.default_rng(0), (20, 30, 40), (3, 3, 3))
    assert out.shape == (20, 30, 40)
    assert float(out.std()) == pytest.approx(1, abs=1e-4)
    assert np.abs(np.diff(out, axis=2)).max() < 0.6


# ---- physics


def eroded(anatomy: Anatomy, tissue: str, reach: int = 2) -> np.ndarray:
    """Voxels whose neighbours within the kernel's reach, in the slice, are of the same tissue."""
    return ndimage.binary_erosion(anatomy.tissue == TISSUE[tissue], np.ones((1, 2 * reach + 1, 2 * reach + 1)))


def test_kernels_keep_the_mean():
    for scanner in CT_SCANNERS:
        assert sum(scanner.kernel) == pytest.approx(1)
        assert scanner.kernel == scanner.kernel[::-1]


@pytest.mark.parametrize("scanner", [0, 1])
def test_ct_shows_the_hounsfield_units_of_each_tissue(scanner):
    """An unenhanced patient of 45 with average fat: nothing is added to the table."""
    anatomy = make_anatomy(replace(AVERAGE, ct_scanner=scanner), 64, 128)
    vol = scan_ct(anatomy)
    assert (vol.modality, vol.unit, vol.voxels.dtype) == ("CT", "HU", np.int16)
    tested = 0
    for name, tissue in TISSUES.items():
        values = vol.voxels[eroded(anatomy, name)].astype(float)
        if len(values) < 300 or tissue.hu < -940:  # air is cut at -1024
            continue
        assert values.mean() == pytest.approx(tissue.hu, abs=5 + 12 * tissue.texture), name
        tested += 1
    assert tested >= 10
    air = vol.voxels[eroded(anatomy, "air")]
    assert np.median(air) == pytest.approx(-1000, abs=8)


def test_ct_noise_is_as_the_scanner_says():
    """In urine, which has next to no texture."""
    for number, scanner in enumerate(CT_SCANNERS):
        anatomy = make_anatomy(replace(AVERAGE, ct_scanner=number), 64, 128)
        values = scan_ct(anatomy).voxels[eroded(anatomy, "urine")]
        assert values.std() == pytest.approx(scanner.noise_hu, rel=0.1)


def test_contrast_medium_brightens_what_it_should(average):
    plain, enhanced = (scan_ct(replace(average, patient=replace(AVERAGE, enhanced=e))).voxels for e in (False, True))
    gain = {
        name: (enhanced[m].mean() - plain[m].mean()) for name in TISSUES if (m := eroded(average, name)).sum() > 200
    }
    assert gain["blood"] > gain["kidney"] - 60 > gain["liver"] - 60 > gain["muscle"] - 60
    assert gain["blood"] > 60
    assert abs(gain["fat"]) < 3
    ratio = gain["liver"] / TISSUES["liver"].uptake_hu  # one dose for the whole patient
    assert gain["spleen"] / TISSUES["spleen"].uptake_hu == pytest.approx(ratio, abs=0.1)


@pytest.mark.parametrize("number", [0, 1])
def test_mr_follows_the_spin_echo_equation(number):
    """Hahn 1950: pd · (1 − exp(−TR/T1)) · exp(−TE/T2), in the order of tissues; shading and noise do not change it."""
    scanner = MR_SCANNERS[number]
    anatomy = make_anatomy(replace(AVERAGE, mr_scanner=number), 64, 128)
    vol = scan_mr(anatomy)
    assert (vol.modality, vol.unit) == ("MR", "")
    wanted, found = {}, {}
    for name, tissue in TISSUES.items():
        inside = eroded(anatomy, name)
        if inside.sum() > 150:
            wanted[name] = (
                tissue.pd * (1 - np.exp(-scanner.tr_ms / tissue.t1_ms)) * np.exp(-scanner.te_ms / tissue.t2_ms)
            )
            found[name] = float(np.median(vol.voxels[inside]))
    assert len(wanted) >= 10
    assert stats.spearmanr([*wanted.values()], [*found.values()]).statistic > 0.9
    order = ("fat", "liver", "spleen", "urine") if number == 0 else ("urine", "spleen", "muscle", "air")
    signals = [found[name] for name in order]
    assert signals == sorted(signals, reverse=True)
    assert found["air"] < 0.15 * max(found.values())
    assert vol.voxels.min() >= 0


def test_the_table_is_seen_by_ct_only(average):
    table = average.tissue == TISSUE["table"]
    assert table.sum() > 100
    assert scan_ct(average).voxels[table].mean() > -800
    assert np.median(scan_mr(average).voxels[table]) < 0.15 * np.percentile(scan_mr(average).voxels, 99)


def test_ct_and_mr_and_mask_share_one_grid(average):
    ct, mr, mask = scan_ct(average), scan_mr(average), organ_mask(average)
    assert np.array_equal(ct.affine, mr.affine)
    assert np.array_equal(ct.affine, mask.affine)
    assert ct.shape == mr.shape == mask.shape
    assert mask.kind == "label"
    assert ct.orientation == "SPL"


# ---- survival


def test_survival_follows_its_hazard():
    """Events per year at risk, over many patients alike, estimate the hazard of an exponential, whatever the censoring."""
    for malignant, volume, age in ((True, 40.0, 70.0), (False, 10.0, 60.0)):
        patient: Patient = replace(AVERAGE, malignant=malignant, age_years=age)
        wanted = 0.12 * np.exp(1.3 * malignant + 0.5 * np.log(volume / 10) + 0.3 * (age - 60) / 10)
        drawn = [survival(replace(patient, seed=n), volume) for n in range(3000)]
        assert all(hazard == pytest.approx(wanted) for _, _, hazard in drawn)
        years, events = sum(d for d, _, _ in drawn) / 365.25, sum(e for _, e, _ in drawn)
        assert events / years == pytest.approx(wanted, rel=4 / np.sqrt(events))
        censored = np.array([d for d, e, _ in drawn if not e]) / 365.25
        assert censored.min() >= 0.5
        assert censored.max() <= 6


# ---- files


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "a"
    counts = write_phantom(out, num_patients=2, num_slices=12, matrix=48, num_workers=1)
    assert counts["num_patients"] == 2
    assert counts["num_series"] == 4
    assert counts["num_files"] == sum(p.is_file() for p in out.rglob("*"))
    return out


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_equal_arguments_give_equal_files(archive, tmp_path):
    write_phantom(tmp_path / "b", num_patients=2, num_slices=12, matrix=48, num_workers=2)
    assert digests(tmp_path / "b") == digests(archive)


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_dicom_series_are_read_by_others_as_they_were_made(archive, modality):
    """SimpleITK sorts, scales and places them; positions agree within 1e-4 mm."""
    anatomy = make_anatomy(sample_patient(0), 12, 48)
    vol = scan_ct(anatomy) if modality == "ct" else scan_mr(anatomy)
    reader = sitk.ImageSeriesReader()
    folder = str(archive / "scans" / "PHANTOM0000" / modality)
    (uid,) = reader.GetGDCMSeriesIDs(folder)
    assert uid in {row["series_uid"] for row in read_csv(archive / "series.csv")}
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder, uid))
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image), vol.voxels)
    assert vol.affine is not None
    for k, j, i in ((0, 0, 0), (11, 0, 0), (0, 47, 0), (5, 10, 47)):
        wanted = vol.affine[:3] @ [k, j, i, 1]
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((i, j, k)), wanted, atol=1e-4)


def test_dicom_headers(archive):
    path = sorted((archive / "scans" / "PHANTOM0001" / "ct").iterdir())[0]
    ds = pydicom.dcmread(path)
    patient = sample_patient(1)
    assert (ds.PatientID, ds.PatientSex, ds.Modality) == ("PHANTOM0001", patient.sex, "CT")
    assert ds.InstanceNumber == 1
    heads = [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted(path.parent.iterdir())]
    assert len({h.SOPInstanceUID for h in heads}) == 12
    assert [float(h.ImagePositionPatient[2]) for h in heads] == sorted(
        (float(h.ImagePositionPatient[2]) for h in heads), reverse=True
    )  # head first
    mr = pydicom.dcmread(sorted((archive / "scans" / "PHANTOM0001" / "mr").iterdir())[0], stop_before_pixels=True)
    assert mr.FrameOfReferenceUID == ds.FrameOfReferenceUID
    assert float(mr.RepetitionTime) == MR_SCANNERS[patient.mr_scanner].tr_ms


def test_the_archive_has_what_archives_have(archive):
    scout = pydicom.dcmread(archive / "scans" / "PHANTOM0000" / "scout" / "IM0001.dcm")
    assert "LOCALIZER" in scout.ImageType
    assert scout.pixel_array.shape == (12, 48)
    report = pydicom.dcmread(archive / "scans" / "dose_report.dcm")
    assert report.SOPClassUID.name == "Secondary Capture Image Storage"
    broken = pydicom.dcmread(archive / "scans" / "broken.dcm", force=True)
    with pytest.raises((AttributeError, ValueError)):
        _ = broken.pixel_array


def test_masks_and_labels_agree(archive):
    """Voxels of each organ in the mask file, times the voxel's volume, are the label table's millilitres."""
    names = json.loads((archive / "organs.json").read_text())
    assert [names[str(n)] for n in range(len(ORGANS))] == list(ORGANS)
    rows = read_csv(archive / "labels.csv")
    assert [r["patient_id"] for r in rows] == ["PHANTOM0000", "PHANTOM0001"]
    for row in rows:
        image = nib.load(archive / "masks" / f"{row['patient_id']}.nii.gz")
        data = np.asarray(image.dataobj)
        voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        for organ, label in ORGAN.items():
            if label:
                assert float(row[f"{organ}_ml"]) == pytest.approx((data == label).sum() * voxel_ml, abs=0.01), organ
        patient = sample_patient(int(row["patient_id"][-4:]))
        days, event, hazard = survival(patient, float(row["lesion_ml"]))
        assert float(row["hazard_per_year"]) == pytest.approx(hazard, rel=1e-3)
        assert int(row["event"]) == event
        assert float(row["survival_days"]) == pytest.approx(days, rel=0.01)
        assert (row["sex"], int(row["malignant"])) == (patient.sex, patient.malignant)
    lesions = read_csv(archive / "lesions.csv")
    assert [(r["patient_id"], r["malignant"]) for r in lesions] == [(r["patient_id"], r["malignant"]) for r in rows]
    assert {int(r["region"]) for r in lesions} == {ORGAN["lesion"]}


def test_masks_lie_where_the_scans_lie(archive):
    """NIfTI in RAS against DICOM in LPS: the liver's centre is the same point of the patient."""
    image = nib.load(archive / "masks" / "PHANTOM0000.nii.gz")
    voxels = np.argwhere(np.asarray(image.dataobj) == ORGAN["liver"])
    ras = image.affine[:3] @ [*voxels.mean(0), 1]
    lps = centre_of(make_anatomy(sample_patient(0), 12, 48), "liver")
    np.testing.assert_allclose(ras * [-1, -1, 1], lps, atol=1e-3)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")


def test_nifti_archives(tmp_path):
    write_phantom(tmp_path / "n", num_patients=1, num_slices=12, matrix=48, form="nifti", num_workers=1)
    image = nib.load(tmp_path / "n" / "scans" / "PHANTOM0000" / "ct.nii.gz")
    vol = scan_ct(make_anatomy(sample_patient(0), 12, 48))
    assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), vol.voxels)
    assert [r["file"] for r in read_csv(tmp_path / "n" / "series.csv")] == [
        "PHANTOM0000/ct.nii.gz",
        "PHANTOM0000/mr.nii.gz",
    ]
    assert not list((tmp_path / "n").rglob("*.dcm"))


def test_bad_arguments(tmp_path, archive):
    with pytest.raises(InputError, match="is not an empty folder"):
        write_phantom(archive)
    with pytest.raises(UsageError, match="form 'png' is unknown; expected dicom or nifti"):
        write_phantom(tmp_path / "x", form="png")
    with pytest.raises(UsageError, match="at least 1 patient, 8 slices and a matrix of 32"):
        write_phantom(tmp_path / "x", num_slices=4)
    assert not (tmp_path / "x").exists()
