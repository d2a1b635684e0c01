"""Duplicates: pairs against comparing all with all, and look hashes against what must not and what must change them."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from hilum.archive.intake import read_scan
from hilum.archive.judge import duplicates
from hilum.archive.judge.duplicates import MAX_DISTANCE, Pair, exact_duplicates, look_hash, near_duplicates
from hilum.archive.phantom import make_anatomy, sample_patient, scan_ct
from hilum.archive.privacy import Key
from hilum.archive.scan import find
from hilum.errors import UsageError
from hilum.volume import Volume, orient


def differing_bits(a: int, b: int) -> int:
    return bin(a ^ b).count("1")


def planted(rng, num, most):
    """Random hashes, a third of them an earlier one with a few bits turned."""
    hashes = rng.integers(0, 2**64, num, dtype=np.uint64)
    for i in range(num // 3, 2 * num // 3):
        source = hashes[rng.integers(0, i)]
        for bit in rng.choice(64, rng.integers(0, most + 3), replace=False):
            source ^= np.uint64(1) << np.uint64(bit)
        hashes[i] = source
    return hashes


@pytest.mark.parametrize("max_distance", [0, 1, 2, 4, 6, 9, 12])
def test_pairs_are_those_of_comparing_all_with_all(max_distance):
    rng = np.random.default_rng(max_distance)
    hashes = planted(rng, 240, max_distance)
    keys = [f"k{n:03d}" for n in rng.permutation(240)]
    patients = [f"p{n}" if n else "" for n in rng.integers(0, 4, 240)]
    across, within = set(), set()
    for i in range(240):
        for j in range(i):
            distance = differing_bits(int(hashes[i]), int(hashes[j]))
            if distance <= max_distance:
                same = patients[i] == patients[j] != ""
                (within if same else across).add(Pair(*sorted((keys[i], keys[j])), distance))
    found = near_duplicates(keys, patients, hashes, max_distance)
    assert len(across) > 20
    assert within
    assert set(found.across_patients) == across
    assert len(found.across_patients) == len(across)
    assert set(found.within_patient) == within
    assert len(found.within_patient) == len(within)
    assert list(found.across_patients) == sorted(found.across_patients)


def test_hashes_that_crowd_together_are_compared_too():
    """All alike in most bits, as scans of one organ are."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**9, 200, dtype=np.uint64) << np.uint64(20)
    expected = sum(differing_bits(int(a), int(b)) <= 2 for n, a in enumerate(hashes) for b in hashes[:n])
    found = near_duplicates([str(n) for n in range(200)], [""] * 200, hashes, 2)
    assert len(found.across_patients) == expected


def test_too_many_pairs_and_odd_distances_are_refused(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 1000)
    same = np.zeros(200, np.uint64)
    with pytest.raises(UsageError, match="more than 1000 pairs within 2 bits among 200 scans"):
        near_duplicates(["k"] * 200, ["p"] * 200, same, 2)
    with pytest.raises(UsageError, match="0 to 12"):
        near_duplicates(["k"], ["p"], same[:1], 13)


@pytest.mark.parametrize("num", [0, 1])
def test_nothing_to_compare(num):
    found = near_duplicates(["k"] * num, ["p"] * num, np.zeros(num, np.uint64))
    assert not found.across_patients
    assert not found.within_patient


def test_exact_duplicates():
    groups = exact_duplicates(["d", "a", "c", "b", "e"], ["x", "y", "x", "y", "z"])
    assert groups == (("a", "b"), ("c", "d"))


@pytest.fixture(scope="module")
def torso() -> Volume:
    return scan_ct(make_anatomy(sample_patient(0), 48, 128))


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(np.clip((image + 1024.0) / 10, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer))


SAME_LOOK = {
    "the same": lambda v: v,
    "gain and offset": lambda v: replace(v, voxels=v.voxels * np.float32(3.7) + 500),
    "turned with its affine": lambda v: orient(v, "IAR"),
    "noise": lambda v: replace(v, voxels=v.voxels + np.random.default_rng(0).normal(0, 60, v.shape).astype(np.float32)),
    "JPEG": lambda v: replace(v, voxels=np.stack([jpeg(s) for s in v.voxels])),
    "metal": lambda v: replace(v, voxels=np.where(np.indices(v.shape).sum(0) % 997 == 0, 30000, v.voxels)),
    "finer pixels": lambda v: replace(v, voxels=ndimage.zoom(v.voxels, (1, 1.1, 1.1), order=1), affine=None),
}


@pytest.mark.parametrize("name", SAME_LOOK)
def test_what_does_not_change_the_look(name, torso):
    other = SAME_LOOK[name](torso)
    assert differing_bits(look_hash(torso), look_hash(other)) <= MAX_DISTANCE


def test_one_voxel_less_is_still_near(torso):
    less = replace(torso, voxels=torso.voxels[1:-1, 1:-1, 1:-1])
    assert differing_bits(look_hash(torso), look_hash(less)) <= 6


def test_other_patients_look_otherwise(torso):
    for n in range(1, 5):
        other = scan_ct(make_anatomy(sample_patient(n), 48, 128))
        assert differing_bits(look_hash(torso), look_hash(other)) > MAX_DISTANCE


def test_images_of_any_shape_have_a_hash():
    rng = np.random.default_rng(0)
    for shape in [(1, 64, 64), (1, 1, 2), (2, 3, 5), (300, 20, 17)]:
        vol = Volume(voxels=rng.integers(0, 255, shape).astype(np.uint8), affine=None, modality="OT")
        assert 0 <= look_hash(vol) < 2**64
        assert look_hash(vol) == look_hash(vol)


def hashes_of(folder: Path, key: Key) -> np.ndarray:
    paths = sorted(folder.glob("*.nii.gz"))
    return np.array([look_hash(read_scan(e)) for p in paths for e in find(p, key)], np.uint64)


@pytest.mark.parametrize("folder", ["nifti/ct_head_neck_openkbp/ct", "nifti/mr_hippocampus_msd/images"])
def test_real_patients_are_apart(folder, real_data: Path, key: Key):
    """80 heads and necks, 160 hippocampi of different people: no false pair."""
    hashes = hashes_of(real_data / folder, key)
    assert len(hashes) in (80, 160)
    found = near_duplicates([str(n) for n in range(len(hashes))], [str(n) for n in range(len(hashes))], hashes)
    assert found.across_patients == ()


def test_one_slice_through_two_codecs(real_data: Path, key: Key):
    """Lossless and lossy JPEG of the same two sagittal slices."""
    entries = [e for e in find(real_data / "dicom/mr_sagittal_jpeg_variants", key) if e.used]
    hashes = np.array([look_hash(read_scan(e)) for e in entries], np.uint64)
    assert len(hashes) == 2
    found = near_duplicates(["a", "b"], ["p", "p"], hashes)
    assert len(found.within_patient) == 1
    assert not found.across_patients
