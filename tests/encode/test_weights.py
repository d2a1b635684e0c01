"""Released layouts: our tokens of a grey slice are theirs of the same slice in three channels; nothing is lost or made up."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hilum.encode import vit
from hilum.encode.contract import Contract
from hilum.encode.encoder import write_encoder
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.weights import hash_tensors, read_weights
from hilum.errors import ContractError, UsageError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GATED = {"gated": (96, 3, 3, "swiglu", 256), "wide gate": (96, 3, 3, "swiglu", 384)}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    for name, size in GATED.items():
        monkeypatch.setitem(vit.SIZES, name, size)


def shake(model: torch.nn.Module) -> None:
    """Every parameter far from its initial value: a bias of zero or a scale of one hides a fault."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def hub(channels: int = 3, side: int = 4, registers: int = 0) -> dict[str, Tensor]:
    """A state dict in the hub's names, of the size "gated"."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 96), "pos_embed": (1, 1 + side**2, 96), "mask_token": (1, 96),
        "patch_embed.proj.weight": (96, channels, 8, 8), "patch_embed.proj.bias": (96,),
        "norm.weight": (96,), "norm.bias": (96,),
    }  # fmt: skip
    if registers:
        shapes["register_tokens"] = (1, registers, 96)
    for n in range(3):
        for name, (rows, columns) in {
            "attn.qkv": (288, 96),
            "attn.proj": (96, 96),
            "mlp.w12": (512, 96),
            "mlp.w3": (96, 256),
        }.items():
            shapes |= {f"blocks.{n}.{name}.weight": (rows, columns), f"blocks.{n}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{n}.{name}"] = (96,)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def save_hub(path: Path, **changes: Tensor | None) -> Path:
    state = hub() | changes
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


# ---- the same function


CASES = {
    "dinov2": ("Dinov2", {}, "nano"),
    "dinov2, swiglu, no mask token": ("Dinov2", {"use_swiglu_ffn": True, "use_mask_token": False}, "gated"),
    "dinov2, no qkv bias": ("Dinov2", {"qkv_bias": False}, "nano"),
    "registers": ("Dinov2WithRegisters", {"num_register_tokens": 4}, "nano"),
    "dinov3": ("DINOv3ViT", {"intermediate_size": 384, "num_register_tokens": 4}, "nano"),
    "dinov3, gated": (
        "DINOv3ViT",
        {"intermediate_size": 384, "use_gated_mlp": True, "hidden_act": "silu"},
        "wide gate",
    ),
    "one channel, as Curia": ("Dinov2", {"num_channels": 1, "use_swiglu_ffn": True}, "gated"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("default")  # of transformers
def test_tokens_are_those_of_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    kind, settings, size = CASES[case]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8, **settings
    )
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.config.size == size
    ours = ViT(weights.config).eval()
    ours.load_state_dict(weights.state)
    generator = torch.Generator().manual_seed(2)
    for side in ((32, 32), (64, 64), (48, 48), (16, 16)):
        grey = torch.randn(2, 1, *side, generator=generator)
        with torch.no_grad():
            expected = theirs(grey.expand(-1, config.num_channels, -1, -1)).last_hidden_state
            tokens = ours(grey)
        torch.testing.assert_close(torch.cat([tokens.cls[:, None], *tokens[1:]], 1), expected, atol=1e-5, rtol=0)
    report = weights.report
    assert report["num_tensors"] == len(load_file(tmp_path / "model.safetensors"))
    assert report["used"] + sum(report["transformed"].values()) == report["num_tensors"]
    assert report["zeros"] == []


def test_the_hub_gives_the_same_function_as_its_translation_by_hand(tmp_path):
    """A plain transformer written from the paper, straight from the hub's tensors."""
    state = hub(registers=2)
    torch.save(state, tmp_path / "dinov2.pth")
    weights = read_weights(tmp_path / "dinov2.pth")
    assert (weights.config.size, weights.config.grid, weights.config.num_registers) == ("gated", (4, 4), 2)
    assert weights.config.antialias
    model = ViT(weights.config).eval()
    model.load_state_dict(weights.state)
    grey = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    tokens = model(grey)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = torch.nn.functional.conv2d(grey.repeat(1, 3, 1, 1), state["patch_embed.proj.weight"], stride=8)
    x = (x + state["patch_embed.proj.bias"][:, None, None]).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"], x], 1) + state["pos_embed"]
    x = torch.cat([x[:, :1], state["register_tokens"], x[:, 1:]], 1)
    for n in range(3):
        q, k, v = (
            linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").view(1, -1, 3, 3, 32).permute(2, 0, 3, 1, 4)
        )
        heads = ((q @ k.transpose(-1, -2)) / 32**0.5).softmax(-1) @ v
        x = x + state[f"blocks.{n}.ls1.gamma"] * linear(heads.transpose(1, 2).flatten(2), f"blocks.{n}.attn.proj")
        a, b = linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.w12").split(256, -1)
        x = x + state[f"blocks.{n}.ls2.gamma"] * linear(a * a.sigmoid() * b, f"blocks.{n}.mlp.w3")
    x = norm(x, "norm")
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], *tokens[1:]], 1), x, atol=1e-5, rtol=1e-5)


def test_a_hilum_encoder_comes_back_as_it_was(tmp_path):
    model = ViT(ViTConfig(size="nano", patch=(8, 8), image=(32, 32)))
    write_encoder(tmp_path, model, Contract(size_px=32), {})
    weights = read_weights(tmp_path)
    assert weights.config == model.config
    assert all(torch.equal(weights.state[name], tensor) for name, tensor in model.state_dict().items())
    assert weights.report["hash"] == hash_tensors(model.state_dict())
    assert weights.report["transformed"] == weights.report["created"] == {}


# ---- the account


def test_what_is_done_to_the_tensors_is_said(tmp_path):
    path = save_hub(
        tmp_path / "a.pth", norm=None, **{"norm.bias": torch.zeros(96), "norm.weight": torch.ones(96).half()}
    )
    report = read_weights(path).report
    assert report["transformed"] == {"patch kernels of 3 channels summed into one": 1, "float16 read as float32": 1}
    assert report["zeros"] == ["norm.bias"]
    assert (report["num_tensors"], report["used"]) == (len(hub()), len(hub()) - 1)
    assert report["num_parameters"] == sum(t.numel() for t in hub().values())
    other = read_weights(save_hub(tmp_path / "b.pth", **{"norm.bias": torch.full((96,), 1e-6)})).report
    assert other["hash"] != report["hash"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.norm1.bias": None}, r"1 tensors .*blocks\.1\.norm1\.bias: missing, expected \(96,\)"),
        ({"head.weight": torch.zeros(2, 96)}, r"head\.weight: no place for it"),
        ({"blocks.0.mlp.w3.bias": torch.zeros(95)}, r"blocks\.0\.mlp\.w3\.bias: expected \(96,\), found \(95,\)"),
        ({"norm.weight": torch.full((96,), torch.nan)}, r"norm\.weight: holds NaN"),
        ({"pos_embed": torch.zeros(1, 18, 96)}, "positions of 17 patches; expected a square grid"),
        ({"cls_token": None}, "no DINOv2 hub encoder: cls_token missing"),
        ({"norm.weight": None, "norm.bias": None}, r"2 tensors .*norm\.weight: missing.*norm\.bias: missing"),
        ({f"blocks.2.{n}": None for n in ("ls1.gamma",)}, r"blocks\.2\.ls1\.gamma: missing"),
        ({"patch_embed.weight": torch.zeros(96, 3, 8, 8)}, "both patch_embed.proj.weight and patch_embed.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed(tmp_path, changes, message):
    with pytest.raises(ContractError, match=message):
        read_weights(save_hub(tmp_path / "a.pth", **changes))


def test_no_code_is_run_from_a_file(tmp_path):
    torch.save({"model": ViT(ViTConfig(size="nano"))}, tmp_path / "a.pth")
    with pytest.raises(ContractError, match="cannot be read as a state dict"):
        read_weights(tmp_path / "a.pth")


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no weights"):
        read_weights(tmp_path)
    for config, message in (
        ({"model_type": "vit"}, "model_type 'vit'; expected dinov2"),
        ({"model_type": "dinov3_vit", "rope_theta": 10000.0}, "rope_theta 10000.0; this transformer has 100.0"),
        ({"model_type": "dinov3_vit", "use_gated_mlp": True, "hidden_act": "gelu"}, "hidden_act gelu; .* has silu"),
        ({"model_type": "dinov2"}, "cannot be read as safetensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ContractError, match=message):
            read_weights(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ContractError, match="no transformers dinov2 encoder: cls_token"):
        read_weights(tmp_path)


def test_an_unknown_size_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(vit.SIZES, "gated")
    with pytest.raises(ContractError, match=r"width 96, 3 blocks, unknown heads and swiglu 256; known are nano"):
        read_weights(save_hub(tmp_path / "a.pth"))


def test_released_sizes_have_the_published_number_of_parameters():
    """Of the models' cards and papers, in millions: DINOv2 B and L, Curia B, DINOv3 S+, B, L and H+."""
    published = {"base-mlp": 86, "large-mlp": 300, "base": 86, "small-plus": 29, "huge-plus": 840}
    for size, millions in published.items():
        with torch.device("meta"):
            model = ViT(replace(ViTConfig(), size=size))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02), size
