"""The probe beside training: labels meet slices, and scores are those of heads fitted by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from hilum.archive.store.store import Store
from hilum.encode.contract import Contract
from hilum.errors import LabelsError, UsageError
from hilum.metrics import r2
from hilum.pretrain.loop import pretrain, read_lines
from hilum.pretrain.watch.online import RIDGE, Labelled, probe_scores, read_labelled


@pytest.fixture
def labels_path(tmp_path) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("series,kind\n00aa,ct\n01aa,mr\n02aa,ct\n03aa,mr\n")
    return path


def test_labels_meet_the_slice_with_most_anatomy(store_path, labels_path):
    found = read_labelled(Store(store_path), Contract(size_px=32), labels_path, "kind")
    assert found.task == "classification"
    assert found.images.shape == (4, 1, 32, 32)
    assert found.y.tolist() == [0, 1, 0, 1]
    assert sorted(found.half[found.y == 0]) == [0, 1]
    assert sorted(found.half[found.y == 1]) == [0, 1]


def test_labels_of_single_slices(store_path, tmp_path):
    path = tmp_path / "labels.csv"
    rows = [f"{v:02d}aa,{z},{v + z / 10}" for v in range(4) for z in range(6)]
    path.write_text("\n".join(["series,slice,height", *rows]) + "\n")
    found = read_labelled(Store(store_path), Contract(size_px=32), path, "height")
    assert found.task == "regression"
    assert len(found.y) == 24
    patients = (found.y + 1e-9).astype(int)
    assert all(len(set(found.half[patients == p])) == 1 for p in range(4))  # a patient is on one side


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("series,kind\n00aa,ct\n01aa,ct\n", "two of each"),
        ("series,kind\n00aa,ct\n", "the labels fit 1 patients"),
        ("series,kind\nffff,ct\n", "none of 1 labels matches"),
    ],
)
def test_labels_that_cannot_serve(store_path, tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(LabelsError, match=message):
        read_labelled(Store(store_path), Contract(size_px=32), path, "kind")


def labelled(y: np.ndarray, task: str) -> Labelled:
    return Labelled("t", task, torch.zeros(len(y), 1, 2, 2), y, np.arange(len(y)) // 2 % 2)  # type: ignore[arg-type]


def test_classes_that_lie_apart_are_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    noise = rng.normal(size=(200, 8)).astype(np.float32)
    good = probe_scores(noise + 6 * y[:, None].astype(np.float32), labelled(y, "classification"))
    assert good["knn"] > 0.95
    assert good["linear"] > 0.99
    bad = probe_scores(noise, labelled(y, "classification"))
    assert all(0.35 < value < 0.65 for value in bad.values())


def test_features_that_are_not_finite_have_no_score():
    y = np.arange(8) % 2
    found = probe_scores(np.full((8, 3), np.nan, np.float32), labelled(y, "classification"))
    assert np.isnan([found["knn"], found["linear"]]).all()


def test_the_linear_score_is_that_of_a_ridge():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(120, 5)).astype(np.float32)
    y = x @ [1, 2, 0, 0, -1] + rng.normal(size=120)
    target = labelled(y, "regression")
    predicted = np.zeros(120)
    for side in (0, 1):
        fit, test = target.half != side, target.half == side
        scaler = StandardScaler().fit(x[fit])
        predicted[test] = Ridge(RIDGE).fit(scaler.transform(x[fit]), y[fit]).predict(scaler.transform(x[test]))
    assert probe_scores(x, target)["linear"] == pytest.approx(r2(y, predicted), abs=1e-5)


def test_a_run_with_labels_ends_at_the_same_weights(small, store_path, labels_path, tmp_path):
    from dataclasses import replace

    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, steps=4, probe_every=2))
    pretrain(recipe, store_path, tmp_path / "plain")
    pretrain(recipe, store_path, tmp_path / "probed", labels=labels_path, target="kind")
    ends = [(tmp_path / n / "export" / "model.safetensors").read_bytes() for n in ("plain", "probed")]
    assert ends[0] == ends[1]
    lines = list(read_lines(tmp_path / "probed" / "metrics.jsonl"))
    assert [line["step"] for line in lines if "knn" in line] == [0, 2, 3]
    with pytest.raises(UsageError, match="needs both"):
        pretrain(recipe, store_path, tmp_path / "half", labels=labels_path)
