"""What we write in a layout of others comes back bit for bit, loads there, and is the same function."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hilum.encode import vit
from hilum.encode.contract import Contract
from hilum.encode.encoder import write_encoder
from hilum.encode.released.layouts import transformers_config, transformers_kind, write_layout
from hilum.encode.released.weights import read_weights
from hilum.encode.vit import ViT, ViTConfig
from hilum.errors import UsageError

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    for name, hidden in {"gated": 256, "wide gate": 384}.items():
        monkeypatch.setitem(vit.SIZES, name, (96, 3, 3, "swiglu", hidden))


def drawn(**changes) -> ViT:
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{"size": "nano", "patch": (8, 8), "image": (32, 32)} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no zero and no one hides a fault
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def save(model: ViT, layout: str, folder: Path) -> Path:
    if layout == "hilum":
        write_encoder(folder, model, Contract(size_px=32), {})
        return folder
    tensors = write_layout(model.state_dict(), model.config, layout)
    if layout == "hub":
        torch.save(tensors, folder / "weights.pth")
        return folder / "weights.pth"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(transformers_config(model.config)))
    return folder


REGISTERS = {"num_registers": 3, "antialias": True}
ROTARY = {"positions": "rotary", "norm_eps": 1e-5}
CASES = {
    "hilum": ("hilum", {}),
    "hilum, registers, no LayerScale": ("hilum", {"num_registers": 2, "layer_scale": 0.0}),
    "dinov2": ("dinov2", {}),
    "dinov2, gated": ("dinov2", {"size": "gated"}),
    "dinov2, wide gate": ("dinov2", {"size": "wide gate"}),
    "with_registers": ("dinov2_with_registers", REGISTERS),
    "with_registers, gated": ("dinov2_with_registers", {"size": "gated", **REGISTERS}),
    "dinov3, plain": ("dinov3_vit", {"num_registers": 4, **ROTARY}),
    "dinov3, gated": ("dinov3_vit", {"size": "wide gate", "num_registers": 4, **ROTARY}),
    "dinov3, without registers": ("dinov3_vit", ROTARY),
    "hub": ("hub", {}),
    "hub, gated, registers": ("hub", {"size": "gated", **REGISTERS}),
    "hub, no LayerScale": ("hub", {"layer_scale": 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_is_the_identity(case, tmp_path):
    layout, changes = CASES[case]
    model = drawn(**changes)
    weights = read_weights(save(model, layout, tmp_path))
    assert weights.state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.state[name], tensor), name
    assert weights.config == model.config
    assert weights.report["created"] == {}


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith(("dinov", "with"))])
@pytest.mark.filterwarnings("default")  # of transformers
def test_transformers_loads_what_we_write(case, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    model = drawn(**CASES[case][1])
    folder = save(model, CASES[case][0], tmp_path)
    theirs, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    for x in (images, torch.nn.functional.interpolate(images, (48, 16))):
        with torch.no_grad():
            tokens, wanted = model(x), theirs.eval()(x).last_hidden_state
        torch.testing.assert_close(torch.cat([tokens.cls[:, None], *tokens[1:]], 1), wanted, atol=1e-5, rtol=0)


def test_without_layer_scale_ones_are_written(tmp_path):
    model = drawn(layer_scale=0.0)
    weights = read_weights(save(model, "dinov2", tmp_path))
    again = ViT(weights.config).eval()
    again.load_state_dict(weights.state)
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x).patches, model(x).patches)


def test_the_settings_of_curia():
    """config.json of the release, as far as it decides the function."""
    config = transformers_config(ViTConfig(size="base", image=(512, 512)))
    released = {
        "model_type": "dinov2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4,
        "hidden_act": "gelu", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "initializer_range": 0.02,
        "layer_norm_eps": 1e-6, "image_size": 512, "patch_size": 16, "num_channels": 1, "qkv_bias": True,
        "layerscale_value": 1e-5, "use_swiglu_ffn": True, "use_mask_token": True, "apply_layernorm": True,
        "reshape_hidden_states": True, "out_features": ["stage12"], "out_indices": [12],
    }  # fmt: skip
    assert {name: config[name] for name in released} == released
    shape = ViTConfig(size="base", image=(512, 512))
    with torch.device("meta"):
        state = ViT(shape).state_dict()
    tensors = write_layout({name: torch.empty(tensor.shape) for name, tensor in state.items()}, shape, "dinov2")
    assert len(tensors) == 223
    assert sum(tensor.numel() for tensor in tensors.values()) == 86_072_832


def test_what_has_no_layout_is_refused():
    volume = ViTConfig(size="nano", patch=(4, 8, 8), image=(8, 16, 16))
    flat = ViTConfig(size="nano", patch=(8, 8), image=(32, 32))
    with pytest.raises(UsageError, match="no layout for a transformer of volumes"):
        transformers_kind(volume)
    with pytest.raises(UsageError, match="has no layout dinov3_vit; expected dinov2"):
        write_layout({}, flat, "dinov3_vit")
    with pytest.raises(UsageError, match="has no layout hub; expected dinov3_vit"):
        write_layout({}, replace(flat, positions="rotary"), "hub")
    with pytest.raises(UsageError, match=r"square patches and images; found \(8, 8\) and \(32, 64\)"):
        transformers_config(replace(flat, image=(32, 64)))
