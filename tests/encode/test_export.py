"""An export is loaded by the program that it is for, and says what the original says; else there is none."""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder, write_encoder
from hilum.encode.released import export as module
from hilum.encode.released.curia import curia_contract, read_curia
from hilum.encode.released.export import export, phantom_images
from hilum.encode.released.weights import read_weights
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract
from hilum.encode.zoo import load_encoder, open_folder
from hilum.errors import ContractError, UsageError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("default")  # of transformers and of torch's exporters

CASES = {
    "Curia's form": ({}, curia_contract({"crop_size": 64})),
    "registers at another size": ({"num_registers": 2}, Contract(size_px=96)),
    "rotary": ({"positions": "rotary", "norm_eps": 1e-5, "num_registers": 1}, Contract(size_px=96, modalities=("MR",))),
}


def save(folder: Path, changes: dict, contract) -> Encoder:
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{"size": "nano", "patch": (16, 16), "image": (64, 64)} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    write_encoder(folder, model, contract, {"recipe": "test", "step": 1})
    return open_folder(folder)


@pytest.fixture(params=CASES)
def encoder(request, tmp_path) -> Encoder:
    return save(tmp_path / "model", *CASES[request.param])


def some_images(encoder: Encoder, num: int) -> torch.Tensor:
    size = encoder.slice_contract.size_px
    return torch.randn(num, 1, size, size, generator=torch.Generator().manual_seed(5))


def check_record(record: dict, folder: Path, form: str) -> None:
    assert record["form"] == form
    assert record["max_difference"] <= record["tolerance"] <= 1e-4
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert record["files"] == hashes
    assert sorted(os.listdir(folder.parent)) == ["model", folder.name]  # nothing temporary
    for path in folder.iterdir():
        assert str(Path(module.__file__).parent).encode() not in path.read_bytes()


def test_transformers_loads_it(encoder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    out = tmp_path / "out"
    record = export(tmp_path / "model", out, "hf")
    check_record(record, out, "hf")
    assert record["checked_with"] == f"transformers {transformers.__version__}"
    assert record["tolerance"] == 1e-5
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    images = some_images(encoder, 3)
    tokens = encoder.tokens(images)
    with torch.no_grad():
        found = theirs(images)
    torch.testing.assert_close(found.pooler_output, tokens.cls, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.last_hidden_state[:, -tokens.patches.shape[1] :], tokens.patches, atol=1e-5, rtol=0
    )


def test_only_contracts_of_curia_get_its_processor(tmp_path):
    pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    for name, (changes, contract) in CASES.items():
        save(tmp_path / name, changes, contract)
        export(tmp_path / name, tmp_path / f"{name} out")
        settings = tmp_path / f"{name} out" / "preprocessor_config.json"
        assert settings.exists() == (name == "Curia's form")
    model, contract, _ = read_curia(tmp_path / "Curia's form out")
    assert contract == CASES["Curia's form"][1]
    original = open_folder(tmp_path / "Curia's form")
    for name, tensor in original.network.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_three_channels_without_transformers(tmp_path, monkeypatch):
    save(tmp_path / "model", {"channels": 3}, Contract(size_px=64, channels=3))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert export(tmp_path / "model", tmp_path / "out", "hf")["checked_with"] == "hilum"


def test_without_transformers_our_reader_checks(tmp_path, monkeypatch):
    encoder = save(tmp_path / "model", *CASES["Curia's form"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    record = export(tmp_path / "model", tmp_path / "out")
    assert record["checked_with"] == "hilum"
    assert record["max_difference"] == 0
    assert read_weights(tmp_path / "out").config.image == encoder.network.config.image


def test_onnxruntime_runs_it(encoder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'hilum[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'hilum[onnx]'")
    out = tmp_path / "out"
    record = export(tmp_path / "model", out, "onnx")
    check_record(record, out, "onnx")
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for num in (1, 3):
        images = some_images(encoder, num)
        found = dict(zip(names, session.run(None, {"images": images.numpy()})))
        for name, part in encoder.tokens(images)._asdict().items():
            if part.shape[1]:
                np.testing.assert_allclose(found.pop(name), part.numpy(), atol=1e-4)
        assert not found


def test_torch_runs_it(encoder, tmp_path):
    out = tmp_path / "out"
    record = export(tmp_path / "model", out, "torch-export")
    check_record(record, out, "torch-export")
    again = torch.export.load(out / "model.pt2").module()
    for num in (1, 3):
        images = some_images(encoder, num)
        wanted = [part for part in encoder.tokens(images) if part.shape[1]]
        for found, part in zip(again(images), wanted, strict=True):
            torch.testing.assert_close(found, part, atol=1e-4, rtol=0)


def test_the_check_sees_scans(tmp_path):
    """Prepared slices of the phantom: of CT and MR, with content, no two alike."""
    images = phantom_images(curia_contract({"crop_size": 64}, statistics="volume"))
    assert images.shape == (4, 1, 64, 64)
    assert (images.std((1, 2, 3)) > 0.5).all()
    assert len(torch.unique(images.mean((1, 2, 3)))) == 4
    assert phantom_images(Contract(size_px=64, modalities=("MR",))).shape == (2, 1, 64, 64)
    with pytest.raises(ContractError, match="the check needs CT or MR"):
        phantom_images(Contract(modalities=("OT",)))


@pytest.mark.parametrize("fault", [1e-3, float("nan")])
def test_what_differs_is_not_written(tmp_path, monkeypatch, fault):
    save(tmp_path / "model", *CASES["Curia's form"])
    write, tolerance, packages = module.FORMS["torch-export"]

    def wrong(encoder, folder, images):
        name, load = write(encoder, folder, images)
        return name, lambda images: load(images) + fault

    monkeypatch.setitem(module.FORMS, "torch-export", (wrong, tolerance, packages))
    with pytest.raises(ContractError, match=r"gives tokens .* away from the original; expected at most 1e-04"):
        export(tmp_path / "model", tmp_path / "out", "torch-export")
    assert os.listdir(tmp_path) == ["model"]


def test_weights_that_do_not_arrive_are_noticed(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    save(tmp_path / "model", *CASES["Curia's form"])
    whole = module.write_layout

    def lossy(*arguments):
        tensors = whole(*arguments)
        del tensors["layernorm.bias"]
        return tensors

    monkeypatch.setattr(module, "write_layout", lossy)
    with pytest.raises(ContractError, match=r"transformers does not take the weights .*layernorm\.bias"):
        export(tmp_path / "model", tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    save(tmp_path / "model", *CASES["Curia's form"])
    with pytest.raises(UsageError, match="form 'tflite' is unknown; expected hf, onnx, torch-export, voxelfm"):
        export(tmp_path / "model", tmp_path / "out", "tflite")
    with pytest.raises(UsageError, match="exists; give a new folder"):
        export(tmp_path / "model", tmp_path)
    with pytest.raises(UsageError, match="pixels is no ViT of ours"):
        export("pixels", tmp_path / "out")
    with pytest.raises(UsageError, match="encodes slices, which voxelfm has no form for"):
        export(tmp_path / "model", tmp_path / "out", "voxelfm")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(
        UsageError, match=re.escape("onnx needs onnx, onnxscript, onnxruntime: pip install 'hilum[onnx]'")
    ):
        export(tmp_path / "model", tmp_path / "out", "onnx")
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_the_settings_are_those_that_curias_users_load(tmp_path):
    """AutoImageProcessor finds the class in Curia's own repository; the numbers are ours."""
    pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    save(tmp_path / "model", *CASES["Curia's form"])
    export(tmp_path / "model", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == 64
    repository, _, name = settings["auto_map"]["AutoImageProcessor"].partition("--")
    assert (repository, name) == ("raidium/curia-2", "curia_image_processor.CuriaImageProcessor")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_channels"], config["architectures"]) == ("dinov2", 1, ["Dinov2Model"])


def test_an_encoder_of_volumes_goes_out_as_voxelfm(tmp_path):
    torch.manual_seed(0)
    network = ViT(ViTConfig(size="48x2x4-mlp192", patch=(14,) * 3, image=(56,) * 3, positions="rotary",
                            num_registers=4, norm_eps=1e-5))  # fmt: skip
    write_encoder(tmp_path / "volume", network, VolumeContract(), {})
    with pytest.raises(UsageError, match="encodes volumes, which hf has no form for"):
        export(tmp_path / "volume", tmp_path / "out")
    told = export(tmp_path / "volume", tmp_path / "out", "voxelfm")
    assert told["max_difference"] < 1e-6
    assert set(told["files"]) == {"checkpoints/model.pth", "config.yaml", "contract.json"}
    x = torch.randn(1, 1, 28, 42, 56)
    for a, b in zip(load_encoder(str(tmp_path / "out")).tokens(x), load_encoder(str(tmp_path / "volume")).tokens(x)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
