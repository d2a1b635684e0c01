"""Leaks that are planted are found, by their kind, and nothing else is."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.store import Store, write_header, write_volume
from hilum.bench.audit import vectors
from hilum.bench.audit.find import check_copies, check_features, check_labels, find_leaks
from hilum.bench.audit.fingerprints import ALIKE, likeness, look, nearest, unit
from hilum.bench.audit.images import Images, Scan, Slice, add_store, slice_hash
from hilum.bench.audit.run import audit
from hilum.bench.phantom.scans import PhantomSettings, write_phantom_scans
from hilum.bench.phantom.tasks import PHANTOM_TASKS
from hilum.encode.encoder import write_encoder
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import ViT
from hilum.encode.volume_contract import VolumeContract
from hilum.volume import Volume


def body(seed: int, size: int = 160) -> np.ndarray:
    """A slice of an invented patient, with an outline and an inner structure of its own, in HU."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    turn, waves = np.arctan2(y, x), rng.uniform(-0.08, 0.08, 4)
    edge = 0.75 + sum(w * np.cos((n + 2) * turn + rng.uniform(0, 6)) for n, w in enumerate(waves))
    inside = np.hypot(y / rng.uniform(0.8, 1), x) < edge
    texture = sum(
        ndimage.gaussian_filter(rng.normal(size=(size, size)), s) * s * w for s, w in ((2, 100), (4, 500), (8, 700))
    )
    return np.where(inside, 40 + texture, -1000).astype(np.float32)


def altered(pixels: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The copies that an audit has to find."""
    low, high = np.percentile(pixels, [0.5, 99.5])
    span = high - low
    eight = (np.clip((pixels - low) / span, 0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(eight).save(file, "JPEG", quality=50)
    return {
        "noise": pixels + rng.normal(0, 0.05 * span, pixels.shape),
        "shift": ndimage.shift(pixels, (0.02 * pixels.shape[0], -0.02 * pixels.shape[1]), order=1, mode="nearest"),
        "gain": pixels * 1.7 + 30,
        "gamma": np.clip((pixels - low) / span, 0, 1) ** 0.6,
        "jpeg": np.array(Image.open(file)).astype(np.float32),
    }


def add(images: Images, side: str, owner: str, patient: str, pixels: np.ndarray, scan: str | None = None) -> None:
    named = {"side": side, "owner": owner, "patient": patient, "modality": "CT"}
    images.scans.append(Scan(content=slice_hash(pixels), look_hash=0, **named))
    images.add(Slice(scan=scan or owner, content=slice_hash(pixels), **named), pixels)


@pytest.fixture
def clean() -> Iterator[Images]:
    with Images() as images:
        for n in range(45):
            side = ("train", "val", "test")[n % 3]
            add(images, side, f"case{n}", f"patient{n}", body(n))
        yield images


def kinds(images: Images) -> dict[tuple[str, str], int]:
    return {(f.kind, f.where): f.affected for f in find_leaks(images, "t")}


def test_nothing_is_found_where_nothing_is(clean):
    assert find_leaks(clean, "t") == []


def test_a_patient_on_two_sides(clean):
    add(clean, "test", "another", "patient0", body(1000))
    (found,) = find_leaks(clean, "t")
    assert (found.kind, found.where, found.affected, found.of, found.leak) == ("patient", "train / test", 1, 16, True)
    assert found.examples == ("case0 (train) = another (test)",)


def test_the_same_pixels_under_another_name_and_type(clean):
    pixels = body(0).round()
    add(clean, "train", "whole", "p-a", pixels.astype(np.int16))
    add(clean, "test", "copy", "p-b", pixels.astype(np.float64))
    assert kinds(clean) == {("same scan", "train / test"): 1}


def test_altered_copies_are_found_and_only_they(clean):
    for name, pixels in altered(body(0), np.random.default_rng(0)).items():
        add(clean, "test", name, f"new-{name}", pixels)
    (found,) = find_leaks(clean, "t")
    assert (found.kind, found.where, found.affected) == ("looks alike", "train / test", 5)
    assert all("case0 (train)" in example for example in found.examples)


def test_slices_of_one_scan_and_of_one_patient_are_no_copies(clean):
    add(clean, "train", "upper", "", body(500), scan="one")
    add(clean, "test", "lower", "", body(500) + 1, scan="one")
    add(clean, "train", "first", "same", body(501))
    add(clean, "test", "second", "same", body(501) + 1)
    assert kinds(clean) == {("patient", "train / test"): 1}


def test_blank_slices_all_look_alike_and_are_left_out(clean):
    air = np.full((64, 64), -1000.0)
    air[3, 3] = 40
    add(clean, "train", "air", "a", air)
    add(clean, "test", "other air", "b", air * 1.1)
    for side in ("train", "test"):
        add(clean, side, f"padding {side}", f"c {side}", np.full((64, 64), -1024, np.int16))
    assert look(air) is None
    assert find_leaks(clean, "t") == []


def test_bodies_that_all_look_alike_are_no_copies_and_a_copy_among_them_is():
    """One body with a little of its own in each patient."""
    with Images() as images:
        for n in range(60):
            add(images, ("train", "test")[n % 2], f"case{n}", f"patient{n}", body(7) + 0.2 * (body(100 + n) + 1000))
        assert find_leaks(images, "t") == []
        pixels = body(7) + 0.2 * (body(100) + 1000)
        add(images, "test", "copy", "other", pixels + np.random.default_rng(0).normal(0, 2, pixels.shape))
        (found,) = find_leaks(images, "t")
        assert found.examples == ("case0 (train) = copy (test)",)


def test_a_store_that_has_seen_a_test_scan(tmp_path, clean):
    rows = []
    for n, voxels in enumerate((np.stack([body(s) for s in (900, 901, 902, 903)]), np.stack([body(2)] * 3))):
        vol = Volume(voxels=voxels.round().astype(np.int16), affine=None, modality="CT", unit="HU")
        rows.append(write_volume(tmp_path, f"{n:016x}", vol, patient="" if n else "patient5"))
    write_index(index_path(tmp_path), rows)
    write_header(tmp_path, {"status": "complete", "key": "k"})
    with Images() as stored:
        add_store(stored, Store(tmp_path), every_slice=True)
        found = {(f.kind, f.where): f for f in find_leaks(clean, "t", stored)}
    assert set(found) == {
        ("patient", "store / test"),
        ("looks alike", "store / test"),
    }  # patient5 and case2 are test cases
    assert found["looks alike", "store / test"].examples == ("0000000000000001 (store) = case2 (test)",)


def test_nearest_is_the_brute_force_answer_whatever_the_block():
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(70, 8)).astype(np.float32)
    asked, offered = np.arange(0, 50, 2), np.arange(1, 70, 3)
    mean = references[offered].mean(0)
    a, b = queries[asked] - mean, references[offered] - mean
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    wanted = offered[np.argsort(-cosine, axis=1)[:, :4]]
    for block in (7, 1000):
        parts = list(nearest(queries, asked, references, offered, 4, block))
        sample = len(offered) <= block
        got = np.concatenate([found for _, found, _ in parts])
        if sample:  # with small blocks the mean is that of a sample
            np.testing.assert_array_equal(got, wanted)
        assert got.shape == wanted.shape
        assert np.isin(got, offered).all()
        np.testing.assert_array_equal(np.concatenate([rows for rows, _, _ in parts]), asked)


def test_likeness_is_the_correlation_at_the_best_shift():
    one = look(body(3))
    moved = np.roll(one, (5, -7), (0, 1))
    far = np.roll(one, (40, 0), (0, 1))
    assert likeness(one[None], moved[None])[0] == pytest.approx(1, abs=1e-3)
    assert likeness(one[None], far[None])[0] < 0.5
    other = look(body(4))
    slow = max(
        float((one.astype(float) * np.roll(other, (dy, dx), (0, 1))).sum())
        for dy in range(-12, 13) for dx in range(-12, 13)
    ) / (np.linalg.norm(one.astype(float)) * np.linalg.norm(other.astype(float)))  # fmt: skip
    assert slow - 1e-5 <= likeness(one[None], other[None])[0] < slow + 0.05  # ours also tries half cells


def test_constant_features_are_found():
    vectors = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    assert check_features("t", vectors) == []
    vectors[:, 2] = 7
    vectors[3, 4] = np.nan
    (found,) = check_features("t", vectors)
    assert (found.kind, found.affected, found.of, found.leak) == ("features", 2, 6, False)
    (found,) = check_features("t", np.ones((20, 6), np.float32))
    assert found.where == "all cases have one vector"


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
@pytest.mark.parametrize("by_patient", [True, False])
def test_shuffled_labels_are_found_and_true_ones_are_not(kind, by_patient):
    rng = np.random.default_rng(1)
    patients = [f"p{n // 3}" for n in range(180)]
    hidden = np.repeat(rng.normal(size=60), 3) if by_patient else rng.normal(size=180)
    vectors = np.column_stack([hidden, 0.5 * rng.normal(size=(180, 3))]).astype(np.float32)
    targets = np.column_stack([hidden > 0, -hidden > 0.3]).astype(float) if kind == "multilabel" else hidden[:, None]
    if kind == "classification":
        targets = (hidden[:, None] > 0).astype(float)
    assert check_labels("t", kind, vectors, targets, patients) == []
    flagged = []
    for _ in range(20):  # one in twenty passes by chance: the test is at 5 %
        order = np.repeat(rng.permutation(60), 3) * 3 if by_patient else rng.permutation(180)
        flagged += check_labels("t", kind, vectors, targets[order], patients)
    assert len(flagged) >= 16
    assert {(f.kind, f.leak) for f in flagged} == {("labels", False)}


@pytest.mark.nightly
def test_planted_copies_of_real_slices(real_data):
    """At least 99 % of altered copies reach ALIKE, and almost no slices of two patients do."""
    folder = real_data / "slices" / "mr_brain_tumour_cheng"
    files = sorted(folder.rglob("*.jpg"))[::6]
    pixels = [np.array(Image.open(f).convert("L"), np.float32) for f in files]
    rng = np.random.default_rng(0)
    looks = np.stack([look(p) for p in pixels])
    for name in ("noise", "shift", "gain", "gamma", "jpeg"):
        copies = np.stack([look(altered(p, rng)[name]) for p in pixels[:100]])
        assert np.mean(likeness(looks[:100], copies) >= ALIKE) >= 0.99, name


def test_the_nearest_of_another_patient_against_a_slow_loop(monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK", 7)
    rng = np.random.default_rng(0)
    queries, references = (unit(rng.normal(size=(n, 5)).astype(np.float32)) for n in (20, 31))
    asking, owners = rng.integers(0, 4, 20), rng.integers(0, 4, 31)
    found, cosine = vectors.nearest_of_others(queries, asking, references, owners)
    for n, query in enumerate(queries):
        others = [m for m in range(31) if owners[m] != asking[n]]
        best = max(others, key=lambda m: float(query @ references[m]))
        assert (found[n], cosine[n]) == (best, pytest.approx(float(query @ references[best])))
    alone = vectors.nearest_of_others(queries[:1], np.array([0]), references, np.zeros(31, np.intp))
    assert alone[1][0] == -np.inf


def test_copies_are_found_by_features_and_only_they():
    """Patients with two cases each: a common part, one of the patient and one of the case; a copy has a tenth of the last."""
    rng = np.random.default_rng(1)
    person = rng.normal(size=(150, 32)) * np.geomspace(30, 1, 32)
    cases = (person[:, None] + 0.3 * rng.normal(size=(150, 2, 32)) * np.geomspace(30, 1, 32)).reshape(300, 32) + 100
    patients = [f"p{n // 2}" for n in range(300)]
    sides = ["train"] * 200 + ["test"] * 100
    owners = [f"c{n}" for n in range(300)]
    named = check_copies("t", cases.astype(np.float32), sides, owners, patients)
    assert sum(found.affected for found in named) <= 2
    copies = cases[:5] + 0.03 * rng.normal(size=(5, 32)) * np.geomspace(30, 1, 32)
    with_copies = np.concatenate([cases, copies]).astype(np.float32)
    (found,) = check_copies("t", with_copies, [*sides, *["test"] * 5], [*owners, *"abcde"], [*patients, *"vwxyz"])
    assert (found.kind, found.where, found.of, found.leak) == ("alike features", "train / test", 105, False)
    assert {"c0 (train) ~ a (test)", "c4 (train) ~ e (test)"} <= set(found.examples)
    assert 5 <= found.affected <= 7
    same = check_copies("t", with_copies, [*sides, *["test"] * 5], [*owners, *"abcde"], [*patients, *patients[:5]])
    assert sum(found.affected for found in same) <= 2  # cases of one patient are no findings


def test_what_an_encoder_cannot_check_is_told(tmp_path):
    """Few patients, an encoder of volumes on slices: notes, and the other checks stand."""
    write_phantom_scans(tmp_path / "phantom", PhantomSettings(num_patients=8, num_heads=4, num_slices=8, matrix=32))
    tasks = [task for task in PHANTOM_TASKS if task.id == "phantom:age"]
    found = audit(tasks, tmp_path, model="pixels")
    assert any("phantom:age: too few train cases" in note for note in found.notes)
    assert any("phantom:age:" in note and "too few to check labels" in note for note in found.notes)
    torch.manual_seed(0)
    config = ViTConfig(size="48x1x2-mlp96", patch=(8, 8, 8), image=(16, 16, 16), positions="rotary")
    contract = VolumeContract(background_px=0, patch=(8, 8, 8), min_spacing_mm=8.0)
    write_encoder(tmp_path / "encoder", ViT(config), contract, {"recipe": "volumes", "step": 0})
    found = audit(tasks, tmp_path, model=str(tmp_path / "encoder"))
    assert found.slices
    assert "encodes volumes" in "\n".join(found.notes)
