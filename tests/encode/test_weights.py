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
from hilum.encode.released.weights import hash_tensors, read_weights
from hilum.encode.vit import ViT, ViTConfig
from hilum.errors import ContractError, UsageError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GATED = {
    "gated": (96, 3, 3, "swiglu", 256),
    "wide gate": (96, 3, 3, "swiglu", 384),
    "two blocks of Curia": (768, 2, 12, "swiglu", 2048),
}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    for name, size in GATED.items():
        monkeypatch.setitem(vit.SIZES, name, size)


def shake(model: torch.nn.Module, width: int) -> None:
    """Every parameter far from its initial value: a bias of zero or a scale of one hides a fault. Wide models less: at 0.1 and
    width 768, transformers' own float32 is 2.4e-5 away from its float64 (ours 1.9e-5)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 * (96 / width) ** 0.5)


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
    "dinov2, six blocks, patch 14": (
        "Dinov2",
        {"hidden_size": 192, "num_hidden_layers": 6, "patch_size": 14, "image_size": 98},
        "tiny",
    ),
    "registers, two wide heads, patch 4": (
        "Dinov2WithRegisters",
        {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4, "image_size": 20},
        "micro",
    ),
    "dinov3, two wide heads, patch 16": (
        "DINOv3ViT",
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "patch_size": 16,
            "intermediate_size": 512,
        },
        "micro",
    ),
    "dinov3, six blocks": (
        "DINOv3ViT",
        {"hidden_size": 192, "num_hidden_layers": 6, "intermediate_size": 768, "num_register_tokens": 1},
        "tiny",
    ),
    "width, heads, gate and grid of Curia at 512": (
        "Dinov2",
        {
            "hidden_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "num_channels": 1,
            "use_swiglu_ffn": True,
        }
        | {"image_size": 512, "patch_size": 16, "layerscale_value": 1e-5, "drop_path_rate": 0.4},
        "two blocks of Curia",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("default")  # of transformers
def test_tokens_are_those_of_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    kind, settings, size = CASES[case]
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(**shape | settings)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    shake(theirs, config.hidden_size)
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.config.size == size
    ours = ViT(weights.config).eval()
    ours.load_state_dict(weights.state)
    generator = torch.Generator().manual_seed(2)
    own = config.image_size // config.patch_size
    for grid in ((own, own), (8, 8), (6, 6), (2, 2), (3, 7), (9, 4)):  # the grid of the position table, and others
        grey = torch.randn(2, 1, *(n * config.patch_size for n in grid), generator=generator)
        with torch.no_grad():
            expected = theirs(grey.expand(-1, config.num_channels, -1, -1)).last_hidden_state
            tokens = ours(grey)
        torch.testing.assert_close(torch.cat([tokens.cls[:, None], *tokens[1:]], 1), expected, atol=1e-5, rtol=0)
    report = weights.report
    assert report["num_tensors"] == len(load_file(tmp_path / "model.safetensors"))
    assert report["used"] + sum(report["transformed"].values()) == report["num_tensors"]
    assert report["zeros"] == []


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")  # of transformers
def test_tokens_of_curia_at_512(tmp_path):
    """All of Curia's size, with the settings of its release."""
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    config = transformers.Dinov2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16, num_channels=1,
        use_swiglu_ffn=True, layerscale_value=1e-5, drop_path_rate=0.4, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.Dinov2Model(config).eval()
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert (weights.config.size, weights.report["num_tensors"]) == ("base", 223)
    assert weights.report["num_parameters"] == 86_072_832
    ours = ViT(weights.config).eval()
    ours.load_state_dict(weights.state)
    image = torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, expected = ours(image), theirs(image).last_hidden_state
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], tokens.patches], 1), expected, atol=1e-5, rtol=0)


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
