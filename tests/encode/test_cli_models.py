"""The commands about models, from a hub to features, as a user runs them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hilum.encode.encoder import write_encoder
from hilum.encode.released.doctor import check_model
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract


@pytest.fixture
def dinov2(hub, tmp_path):
    """A small DINOv2 on the hub."""
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "origin")
    processor = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True, "do_rescale": True,
        "resample": 3, "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (tmp_path / "origin" / "preprocessor_config.json").write_text(json.dumps(processor))
    hub.files = {p.name: p.read_bytes() for p in (tmp_path / "origin").iterdir()}
    return hub


def test_from_the_hub_to_features(dinov2, hilum, tmp_path, monkeypatch):
    assert hilum("phantom", "-o", tmp_path / "p", "--num-patients", 1, "--num-slices", 8, "--matrix", 48, "-q")[0] == 0
    scan = tmp_path / "p" / "scans" / "PHANTOM0000"
    code, _, err = hilum("embed", scan, "--model", "dinov2-small", "-o", tmp_path / "f.parquet", "-q")
    assert (code, "fetch it with: hilum pull dinov2-small" in err) == (6, True)
    code, out, _ = hilum("pull", "dinov2-small", "-q")
    assert code == 0
    assert "dinov2-small@main: 3 files, 1.4 MB, commit cccccccccccc, fetched" in out
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # from here on without a network
    assert "was here, every hash is right" in hilum("pull", "dinov2-small", "-q")[1]
    code, out, _ = hilum("info", "dinov2-small")
    assert code == 0
    for part in ("Apache-2.0; open", "transformers dinov2, hash", "c" * 40, "Of each channel 0.485 / 0.456"):
        assert part in out
    assert hilum("models")[1].count("yes") == 1
    assert hilum("doctor", "dinov2-small", "--write", "-q")[0] == 0
    code, out, _ = hilum("doctor", "dinov2-small", "-q")
    assert (code, out.splitlines()[-1]) == (0, "no faults")
    assert hilum("embed", scan, "--model", "dinov2-small", "-o", tmp_path / "f.parquet", "-q")[0] == 0
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["model"][0].as_py() == "dinov2-small@cccccccc"
    assert np.isfinite(np.array(table["vector"].to_pylist())).all()


def test_gate_and_licence(dinov2, hilum):
    dinov2.repo, dinov2.gated = "raidium/curia", True
    dinov2.files["x"] = b""
    code, out, err = hilum("pull", "curia", "--revision", "main")
    assert code == 5
    assert out.startswith("curia: Research-only RAIL-M, on request at https://huggingface.co/raidium/curia")
    assert "set HF_TOKEN" in err


def test_doctor_ends_with_3_and_names_what_is_broken(export, hilum):
    assert hilum("doctor", export, "--write", "-q")[0] == 0
    (export / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:-8])
    code, out, _ = hilum("doctor", export, "-q")
    assert (code, "cannot be read as safetensors" in out, out.splitlines()[-1]) == (3, True, "1 faults")
    code, out, _ = hilum("doctor", export, "--json", "-q")
    assert (code, json.loads(out)["faults"]) == (3, 1)


def test_info_of_our_own(export, hilum):
    code, out, _ = hilum("info", export)
    assert code == 0
    assert "hilum encoder, hash" in out
    assert "CT values are cut to -1000 to 2000 HU." in out
    record = json.loads(hilum("info", export, "--json")[1])
    assert record["model"]["size"] == "nano"
    assert record["num_parameters"] == sum(p.numel() for p in ViT(ViTConfig(**_shape(record))).parameters())
    assert record["coverage"]["zeros"] == check_model(str(export))["report"]["zeros"]


def _shape(record):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record["model"].items()}


def test_export(export, hilum, tmp_path):
    code, out, err = hilum("export", export, "--to", "torch-export", "-o", tmp_path / "other")
    assert code == 0, err
    assert "model.pt2; loaded with torch " in out
    code, _, err = hilum("export", export, "--to", "torch-export", "-o", tmp_path / "other")
    assert (code, "exists; give a new folder" in err) == (2, True)
    code, _, err = hilum("export", export, "--to", "tflite", "-o", tmp_path / "another")
    assert (code, "expected hf, onnx, torch-export" in err) == (2, True)


def test_what_voxelfm_itself_would_see(hilum, export, tmp_path, write_ct):
    """A bright voxel is cut at +1000 HU by VoxelFM's DICOM loader, and at +1900 by the contract."""
    torch.manual_seed(0)
    shape = ViTConfig(size="48x2x4-mlp192", patch=(14,) * 3, image=(28,) * 3, positions="rotary")
    write_encoder(tmp_path / "volume", ViT(shape), VolumeContract(), {})
    voxels = np.full((30, 30, 30), 40, np.int16)
    voxels[15, 15, 15] = 1500
    voxels[:3] = -1000
    scan = write_ct("ct", voxels, np.array([[0, 0, 1.0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]))
    code, out, err = hilum("doctor", tmp_path / "volume", "--scan", scan)
    assert code == 0, err
    assert "[-1000.0, 1500.0]" in out
    assert "[-1000.0, 1000.0]" in out
    assert "by up to 500 HU" in out
    assert hilum("doctor", export, "--scan", scan)[0] == 3


def test_models_as_json(hilum, tmp_path, monkeypatch):
    monkeypatch.setenv("HILUM_HOME", str(tmp_path))
    found = {m["name"]: m for m in json.loads(hilum("models", "--json")[1])["models"]}
    assert found["curia-2"]["gated"]
    assert found["voxelfm"]["contract"]["patch"] == [14, 14, 14]
    assert not any(m["pulled"] for m in found.values())


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["info", "dinov9-base"], 2, "did you mean dinov2-base"),
        (["info", "nowhere/model"], 6, "hilum pull nowhere/model"),
        (["pull", "dinov9-base"], 2, "did you mean"),
        (["info", "pixels"], 2, "is a baseline and has no weights"),
        (["doctor", "random:curia"], 2, "is a baseline and has no weights"),
        (["doctor", "curia"], 6, "hilum pull curia"),
        (["doctor", "/"], 2, "is no encoder"),
    ],
)
def test_what_is_not_known_or_not_here(command, code, message, hilum, tmp_path, monkeypatch):
    monkeypatch.setenv("HILUM_HOME", str(tmp_path))
    ended, _, err = hilum(*command)
    assert (ended, message in err) == (code, True), err
