"""Saved heads say what the head said; `hilum predict` says what the encoder and the head say, and refuses what does not fit."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hilum.archive.one import read
from hilum.encode.zoo import load_encoder
from hilum.errors import ContractError, InputError, UsageError
from hilum.probe.calibration import apply_temperature, fit_temperature
from hilum.probe.fit import _temperature
from hilum.probe.heads import HEADS, head_class, make_head
from hilum.probe.saved import SAVED, VECTOR_HEADS, load_head, write_head

RNG = np.random.default_rng(0)
FACTS = {"model": "m", "loads_as": "m", "seed": 0, "weights": "w", "precision": "float32", "contract": "c"}
FACTS |= {"contract_values": {"size_px": 32}, "level": "slice", "pooling": None, "across": "mean", "layers": [-1]}
FACTS |= {"max_slices": None}


def _save(folder, head, name, classes=(), **more):
    scores = {"auroc": {"value": 0.9, "low": 0.8, "high": 0.95}}
    write_head(folder, head, name=name, target="t", classes=classes, features=FACTS, scores=scores,
               training={"cases": 90}, **more)  # fmt: skip


@pytest.mark.parametrize(("name", "task"), [(n, t) for n in VECTOR_HEADS for t in head_class(n).tasks])
def test_a_saved_head_says_what_the_head_said(tmp_path, name, task):
    X = (RNG.normal(size=(90, 6)) * [1, 10, 0.1, 1, 1, 0] + 3).astype(np.float32)
    y = {
        "classification": np.arange(90) % 3,
        "multilabel": np.stack([np.arange(90) % 2, np.arange(90) % 3 == 0, np.ones(90)], 1),
        "regression": X[:, 0] * 4 + 60,
        "survival": np.stack([RNG.exponential(size=90), np.arange(90) % 2], 1),
    }[task]
    options = {"seeds": 2, "epochs": 3, "learning_rates": (0.01,), "num_components": 4 if name == "linear" else None}
    known = head_class(name)().get_params()
    head = make_head(name, task=task, **{k: v for k, v in options.items() if k in known}).fit(X, y)
    classes = ("a", "b", "c") if task in ("classification", "multilabel") else ()
    _save(tmp_path / "head", head, name, classes, temperature=2.0)
    saved = load_head(tmp_path / "head")
    expected = head.outputs(X[:20])
    if task == "survival":  # a risk is known up to a constant
        offset = expected - saved.outputs(X[:20])
        np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1], offset.shape), atol=1e-4)
    else:
        np.testing.assert_allclose(saved.outputs(X[:20]), expected, rtol=1e-4, atol=2e-5)
    if classes:
        warm = apply_temperature(expected.mean(0), 2.0, multilabel=task == "multilabel")
        np.testing.assert_allclose(saved.predict(X[:20]), warm, atol=1e-4)
    card = (tmp_path / "head/README.md").read_text()
    assert "0.900 (0.800 to 0.950)" in card
    with pytest.raises(ContractError, match="takes 6 features"):
        saved.outputs(X[:, :5])


def test_two_classes_are_one_logit_and_its_opposite(tmp_path):
    X, y = RNG.normal(size=(60, 3)), np.arange(60) % 2
    head = make_head("linear").fit(X + y[:, None], y)
    _save(tmp_path, head, "linear", ("no", "yes"))
    np.testing.assert_allclose(load_head(tmp_path).predict(X), head.predict_proba(X), atol=1e-6)


def test_every_head_is_saved_or_known_not_to_be():
    assert set(HEADS) - set(SAVED) == {"knn"}


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    head = make_head("linear").fit(RNG.normal(size=(20, 3)), np.arange(20) % 2)
    with pytest.raises(InputError, match="make it again"):
        write_head(tmp_path, head, name="linear", target="t", classes=(), features={}, scores={}, training={})
    with pytest.raises(UsageError, match="knn head has no saved form"):
        _save(tmp_path, head, "knn")
    _save(tmp_path, head, "linear", ("a", "b"))
    tensors = load_file(tmp_path / "head.safetensors")
    save_file(tensors | {"biases": tensors["biases"] + 1}, tmp_path / "head.safetensors")
    with pytest.raises(ContractError, match="not the file"):
        load_head(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"junk")
    with pytest.raises(ContractError, match="safetensors"):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text('{"format": "hilum-head", "version": 9}')
    with pytest.raises(ContractError, match="version 9; this hilum reads"):
        load_head(tmp_path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """24 MR crops, half of them with a bright corner; masks that mark it as region 1."""
    folder = tmp_path_factory.mktemp("archive")
    rows = []
    for sub in ("scans", "masks"):
        (folder / sub).mkdir()
    for n in range(24):
        voxels = np.random.default_rng(n).normal(100, 10, (20, 20, 6)).astype(np.float32)
        voxels[:8, :8] += 60 * (n % 2)
        mask = np.zeros((20, 20, 6), np.uint8)
        mask[:8, :8, 2:4] = 1
        for sub, array in (("scans", voxels), ("masks", mask)):
            nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1, 3, 1])), folder / sub / f"case{n:02}.nii.gz")
        rows.append({"file": f"case{n:02}.nii.gz", "patient": n, "corner": ["dark", "bright"][n % 2]})
    with open(folder / "labels.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["file", "patient", "corner"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize("level", ["volume", "region"])
def test_embed_probe_save_predict(hilum, archive, tmp_path, monkeypatch, level):
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    monkeypatch.chdir(tmp_path)
    masks = ["--masks", archive / "masks"] if level == "region" else []
    model = "pixels" if level == "volume" else "random:enc"
    if level == "region":
        _random_encoder(tmp_path / "enc", 32)
    code, _, err = hilum(
        "embed", archive / "scans", "--model", model, "-o", "f.parquet", "--level", level, *masks, "-q"
    )
    assert code == 0, err
    probe = [
        "probe",
        "f.parquet",
        "--labels",
        archive / "labels.csv",
        "--target",
        "corner",
        "--groups",
        "patient",
        "-q",
    ]
    code, out, err = hilum(*probe, "--save", "head")
    assert code == 0, err
    scan, mask = (
        archive / "scans/case05.nii.gz",
        ["--mask", archive / "masks/case05.nii.gz"] if level == "region" else [],
    )
    code, out, err = hilum("predict", scan, "--head", "head", *mask, "-o", "said.csv", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["rows"][0]["predicted"] == "bright"
    (row,) = csv.DictReader((tmp_path / "said.csv").read_text().splitlines())
    assert float(row["bright"]) == pytest.approx(said["rows"][0]["bright"])
    if level == "volume":
        vector = load_encoder("pixels").encode(read(scan), "volume").vectors
        assert load_head("head").predict(vector)[0, 0] == pytest.approx(said["rows"][0]["bright"], abs=1e-5)
        code, _, err = hilum("predict", scan, "--head", "head", "--mask", archive / "masks/case05.nii.gz")
        assert (code, "leave --mask out" in err) == (2, True)
        code, _, err = hilum(*probe, "--save", "other", "--head", "knn")
        assert (code, "no saved form" in err) == (2, True)
    else:
        assert said["rows"][0]["region"] == 1
        _random_encoder(tmp_path / "other", 48)
        code, _, err = hilum("predict", scan, "--head", "head", *mask, "--model", "other")
        assert (code, "size_px: 32 ≠ 48" in err) == (3, True)
        _random_encoder(tmp_path / "drawn", 32, seed=5)
        code, _, err = hilum("predict", scan, "--head", "head", *mask, "--model", "drawn")
        assert (code, "trained on weights" in err) == (3, True)
        code, _, err = hilum("predict", scan, "--head", "head")
        assert (code, "give labels" in err) == (2, True)
    code, out, _ = hilum("predict", scan, "--head", "head", *mask)
    assert "bright" in out


def _random_encoder(folder, size_px, seed=0):
    import torch

    from hilum.encode.contract import Contract
    from hilum.encode.encoder import write_encoder
    from hilum.encode.shape import ViTConfig
    from hilum.encode.vit import ViT

    torch.manual_seed(seed)
    model = ViT(ViTConfig(size="nano", patch=(8, 8), image=(size_px, size_px)))
    write_encoder(folder, model, Contract(size_px=size_px), {"recipe": folder.name, "step": seed})


def test_a_class_that_a_fold_never_saw_does_not_soften_all_others():
    """Calibrated probabilities keep temperature 1, whatever cases of unseen classes (probability 0) lie among them."""
    rng = np.random.default_rng(0)
    p = rng.random(4000)
    y = (rng.random(4000) < p).astype(int)
    proba = np.stack([1 - p, p, np.zeros(4000)], axis=1)
    y[:80] = 2
    assert _temperature(proba, y) == pytest.approx(1, abs=0.05)
    assert fit_temperature(proba, y) > 2
