"""The phantom benchmark: what it writes, that it resumes, and that planted faults score as chance."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import hilum
from hilum.archive.labels import read_labels
from hilum.archive.phantom import make_anatomy, sample_patient
from hilum.bench.nuisances import nuisances_of
from hilum.bench.phantom.scanners import MATRIX, sample_scanner, scan_with
from hilum.bench.phantom.scans import SOLID, PhantomSettings, write_phantom_scans
from hilum.bench.phantom.tasks import FINDINGS, ORGAN_CLASSES, PHANTOM_TASKS, read_phantom
from hilum.bench.run.scans import CaseReader
from hilum.errors import InputError
from hilum.records import read_json, sha256_file

SMALL = PhantomSettings(num_patients=8, num_heads=4, num_slices=16, matrix=48)


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    write_phantom_scans(root / "phantom", SMALL)
    return root


def cases_of(name: str, root: Path):
    task = next(t for t in PHANTOM_TASKS if t.id == f"phantom:{name}")
    return task, read_phantom(task, root).cases


def test_every_kind_of_task_has_a_twin():
    assert {t.kind for t in PHANTOM_TASKS} == {
        "classification", "multilabel", "regression", "survival", "retrieval", "localisation", "segmentation"
    }  # fmt: skip
    assert {t.unit for t in PHANTOM_TASKS} == {"slice", "region", "volume"}


def test_patients_keep_to_one_side_and_no_problem_is_found(phantom_root):
    for task in PHANTOM_TASKS:
        found = read_phantom(task, phantom_root)
        assert found.cases
        assert not found.problems
        sides = {}
        for case in found.cases:
            sides.setdefault(case.patient, set()).add(case.split)
        assert all(len(s) == 1 for s in sides.values())
        assert len({case.id for case in found.cases}) == len(found.cases)


def test_an_organ_case_points_at_that_organ(phantom_root):
    """Independent of the reader of regions: the label map as another reader gives it, by its published numbers."""
    names = read_json_names()
    _, cases = cases_of("organ", phantom_root)
    for case in cases[:12]:
        scan = hilum.read(case.scan.path)
        labels = read_labels(case.region.source.path, scan).volume.voxels
        (number,) = case.region.values
        assert names[number] == ORGAN_CLASSES[int(case.target[0])]
        assert (labels[case.slices[0]] == number).any()


def read_json_names():
    from hilum.archive.phantom import ORGANS

    return dict(enumerate(ORGANS))


def test_segmentation_has_its_classes(phantom_root):
    reader = CaseReader()
    task, solid = cases_of("solid-organs", phantom_root)
    for truth_case in solid:
        labels = reader.truth(task, truth_case).voxels
        assert set(np.unique(labels)) <= set(range(len(SOLID) + 1))
        assert (labels == 2).any()


def test_a_nodule_lies_where_its_label_says(phantom_root):
    """An oracle without a model: soft tissue at the centre, and the crop holds it."""
    _, cases = cases_of("lesion-centre", phantom_root)
    for case in cases:
        vol = hilum.read(case.scan.path)
        at = tuple(np.round(case.target).astype(int))
        assert all(0 <= place < size for place, size in zip(at, vol.shape))
        assert vol.voxels[at] > -100  # lung is at -850
    places = np.array([case.target for case in cases])
    assert places[:, 1:].std(0).min() > 1


def test_the_brightness_of_a_tumour_orders_deaths(phantom_root):
    """What the survival task asks for can be seen: HU of lesion minus liver follows the hazard that was drawn."""
    _, cases = cases_of("survival", phantom_root)
    contrast, hazard = [], []
    for case in cases:
        vol, organ = hilum.read(case.scan.path), read_labels(case.region.source.path, None).volume.voxels
        contrast.append(vol.voxels[organ == 17].mean() - np.median(vol.voxels[organ == 6]))
        hazard.append(read_json(case.scan.path.with_name("labels.json"))["hazard_per_year"])
    assert stats.spearmanr(contrast, hazard)[0] > 0.9


def test_scanners_are_known_and_say_nothing_of_findings(phantom_root):
    _, cases = cases_of("retrieval", phantom_root)
    assert [sum(case.target) for case in cases] == [1.0] * len(cases)
    assert {case.split for case in cases} == {"train", "test"}
    for case, told in zip(cases, nuisances_of(cases)):
        vol = hilum.read(case.scan.path)
        assert vol.shape[1:] == (MATRIX, MATRIX)
        assert set(told) == {"vendor", "kernel", "thickness", "field_of_view", "spacing", "sex"}
        assert vol.spacing_mm == pytest.approx((told["thickness"], told["spacing"], told["spacing"]), abs=1e-3)
    drawn = [sample_scanner(np.random.default_rng(n)) for n in range(600)]
    shares = np.unique([one["vendor"] + one["kernel"] for one in drawn], return_counts=True)[1] / 600
    assert shares == pytest.approx(np.full(9, 1 / 9), abs=0.05)


def test_kernels_and_findings_look_as_they_should():
    """The same body: a sharp kernel is noisier than a soft one, an effusion fills lung with fluid; nothing else moves."""
    anatomy = make_anatomy(sample_patient(0), 12, 48)
    scanner = sample_scanner(np.random.default_rng(0))

    def scan(finding: str, **other: str):
        return scan_with(anatomy, finding, scanner | other, np.random.default_rng(1))[0].astype(float)

    def roughness(kernel: str) -> float:
        return float(np.abs(np.diff(scan("ileus", kernel=kernel), axis=2)).mean())

    assert roughness("soft") < roughness("standard") < roughness("sharp")
    filled = scan("pleural effusion", kernel="soft", vendor="HILUM NORTH")
    without = scan("subcutaneous emphysema", kernel="soft", vendor="HILUM NORTH")
    changed = np.abs(filled - without) > 300
    assert 0.02 < changed.mean() < 0.4
    lung = (without < -600) & (filled > -200)
    assert lung.sum() > 50


def test_the_window_around_a_lesion_shows_the_same_patient_place(phantom_root):
    """A lesion voxel of the window lies, in mm, within the body map's lesion, but for the body's shift in the image."""
    folder = phantom_root / "phantom" / "body" / "B0000"
    window = read_labels(folder / "liver-organs.nii.gz", None).volume
    scan = hilum.read(folder / "liver.nii.gz")
    assert window.shape == scan.shape == (3, 30, 30)
    assert (window.voxels == 17).any()
    whole = read_labels(folder / "organs.nii.gz", None).volume
    here = np.argwhere(window.voxels == 17).mean(0)
    there = np.argwhere(whole.voxels == 17)
    at = (window.affine @ [*here, 1])[:3]
    points = (whole.affine @ np.c_[there, np.ones(len(there))].T)[:3].T
    assert np.linalg.norm(points - at, axis=1).min() < 30


def test_it_resumes_and_refuses_other_settings(tmp_path, phantom_root):
    other = tmp_path / "phantom"
    few = replace(SMALL, num_patients=2, num_heads=1)
    write_phantom_scans(other, few)
    first = sha256_file(other / "body" / "B0001" / "ct.nii.gz")
    assert first == sha256_file(phantom_root / "phantom" / "body" / "B0001" / "ct.nii.gz")
    (other / "phantom.json").unlink()  # interrupted
    (other / "body" / "B0001" / "labels.json").unlink()
    kept = (other / "body" / "B0000" / "ct.nii.gz").stat().st_mtime_ns
    write_phantom_scans(other, few)
    assert sha256_file(other / "body" / "B0001" / "ct.nii.gz") == first
    assert (other / "body" / "B0000" / "ct.nii.gz").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match="other settings"):
        write_phantom_scans(other, replace(few, seed=1))


def test_a_missing_patient_is_told(tmp_path):
    write_phantom_scans(tmp_path / "phantom", replace(SMALL, num_patients=3, num_heads=1, num_slices=8, matrix=32))
    (tmp_path / "phantom" / "body" / "B0002" / "labels.json").unlink()
    task = next(t for t in PHANTOM_TASKS if t.id == "phantom:findings")
    found = read_phantom(task, tmp_path)
    assert [p.path for p in found.problems] == ["body/B0002"]
    assert found.problems[0].cases == 1
    assert len(found.cases) == 2
    assert len(found.cases[0].target) == len(FINDINGS)
    with pytest.raises(InputError, match="holds no phantom scans"):
        read_phantom(task, tmp_path / "nowhere")


def test_findings_are_what_was_painted(phantom_root):
    """A removed gallbladder leaves no voxel of it; a single kidney leaves one label."""
    _, cases = cases_of("findings", phantom_root)
    for case in cases:
        areas = read_json(case.scan.path.with_name("labels.json"))["areas"]
        truth = dict(zip(FINDINGS, case.target))
        assert truth["no gallbladder"] == (not areas["gallbladder"])
        assert truth["single kidney"] == (not areas["kidney_left"] or not areas["kidney_right"])
