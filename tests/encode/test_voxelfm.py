"""VoxelFM's layout: its published golden numbers through the real loading path, and nothing lost on the way back."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hilum.encode.encoder import Encoder
from hilum.encode.released.voxelfm import read_voxelfm, write_voxelfm
from hilum.encode.released.weights import hash_tensors
from hilum.encode.shape import SIZES, ViTConfig
from hilum.encode.vit import ViT, make_rotation
from hilum.encode.volume_contract import VolumeContract
from hilum.errors import ContractError, UsageError
from hilum.records import write_json
from hilum.settings import to_dict

WIDTH, DEPTH, HEADS, HIDDEN, PATCH = 48, 2, 4, 192, 2
SETTINGS: dict[str, Any] = {
    "compute_precision": "fp32",
    "ibot": {"separate_head": False},
    "student": {
        "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH, "mlp_ratio": 4,
        "drop_path_rate": 0.1, "layerscale": 1e-5, "rope_base": 100.0, "rope_rescale_coords": None,
        "ffn_layer": "mlp", "qkv_bias": True, "proj_bias": True, "ffn_bias": True, "num_register_tokens": 4,
    },
    "crops": {"global_crops_size": [[112, 112, 112], [140, 112, 98]], "local_crops_number": 8},
    "datasets": [
        {"name": "a", "storage": "torch", "pixel_range": {"lower": -1000.0, "upper": 1900.0},
         "norm": {"mean": -368.0, "std": 472.0}},
    ],
}  # fmt: skip


def backbone() -> dict[str, Tensor]:
    """The golden fixture: names and shapes of the checkpoint, filled by its rule."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "register_tokens": (1, 4, WIDTH), "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 1, PATCH, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    for b in range(DEPTH):
        for name, (rows, columns) in {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (HIDDEN, WIDTH),
            "mlp.fc2": (WIDTH, HIDDEN),
        }.items():
            shapes |= {f"blocks.{b}.{name}.weight": (rows, columns), f"blocks.{b}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{b}.{name}"] = (WIDTH,)
    assert len(shapes) == 35
    state = {}
    for k, name in enumerate(sorted(shapes)):
        j = torch.arange(math.prod(shapes[name]), dtype=torch.float64)
        value = (0.05 * torch.sin(0.9 * j + 1.3 * k)).float()
        if ("norm" in name and name.endswith("weight")) or name.endswith("gamma"):
            value = value + 1
        state[name] = value.view(shapes[name])
    return {**state, "rope_embed.periods": torch.tensor([1.0, 10.0])}


def save(folder: Path, changes: dict[str, Tensor | None] | None = None, settings: Any = None) -> Path:
    """A folder as VoxelFM's release has it, heads included."""
    teacher = {f"backbone.{name}": tensor for name, tensor in backbone().items()}
    teacher |= {"dino_head.mlp.0.weight": torch.ones(8, WIDTH), "dino_head.last_layer.bias": torch.ones(3)}
    for name, tensor in (changes or {}).items():
        if tensor is None:
            del teacher[name]
        else:
            teacher[name] = tensor
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save({"teacher": teacher}, folder / "checkpoints" / "99999.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or SETTINGS))
    return folder


def encode(model: ViT, mask: Tensor | None) -> Any:
    images = torch.sin(0.11 * torch.arange(2 * 4 * 6 * 8, dtype=torch.float32)).view(2, 1, 4, 6, 8)
    before: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    with torch.no_grad():
        tokens = model.encode_crops([images], [mask])[0]
    hook.remove()
    return tokens, before[0]


GOLDEN = {
    "plain": {
        "cls0": [-0.798818, 1.504377, 0.098745, 1.422317, -0.948856],
        "cls1": [-0.746622, 1.523241, 0.130163],
        "first": [0.288718, 1.196856, -0.559233],
        "last": [-1.131535, 1.253025, -0.262786],
        "spread": 0.985855,
        "before": 0.271672,
    },
    "masked": {
        "cls0": [-0.627942, 1.554754, 0.076630, 1.260982, -1.079919],
        "first": [-0.029637, 1.528043, -0.303191],
        "last": [-1.074394, 1.270539, -0.298240],
        "spread": 0.987628,
        "before": 0.288189,
    },
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_numbers(case, tmp_path):
    model, _, _ = read_voxelfm(save(tmp_path))
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, ::3] = True
    tokens, before = encode(model.eval(), mask if case == "masked" else None)
    golden = GOLDEN[case]
    found = {
        "cls0": tokens.cls[0, :5], "cls1": tokens.cls[1, :3], "first": tokens.patches[0, 0, :3],
        "last": tokens.patches[0, 23, :3], "spread": tokens.patches.std(), "before": before.abs().mean(),
    }  # fmt: skip
    for name, expected in golden.items():
        torch.testing.assert_close(found[name], torch.tensor(expected), atol=1.5e-6, rtol=0)


def test_turns_of_the_released_size():
    """864 wide, 12 heads, 8³ patches: first patch, z axis, first four pairs."""
    width, _, heads, _, _ = SIZES["voxelfm-base"]
    cos, sin = make_rotation((8, 8, 8), width // heads, 5, torch.device("cpu"))
    assert cos.shape == (5 + 512, 72)
    torch.testing.assert_close(sin[5, :4], torch.tensor([0.7071, 0.5679, -0.5561, -0.9860]), atol=5e-5, rtol=0)
    torch.testing.assert_close(cos[5, :4], torch.tensor([0.7071, -0.8231, -0.8311, -0.1670]), atol=5e-5, rtol=0)
    assert torch.equal(cos[:5], torch.ones(5, 72))
    assert not sin[:5].any()


def test_the_released_size_has_the_tensors_of_the_release():
    with torch.device("meta"):
        model = ViT(
            ViTConfig(size="voxelfm-base", patch=(14,) * 3, image=(112,) * 3, positions="rotary", num_registers=4)
        )
    state = model.state_dict()
    assert len(state) == 176 - 1  # without the periods
    assert sum(tensor.numel() for tensor in state.values()) == 110_029_536


def test_report_and_contract(tmp_path):
    model, contract, report = read_voxelfm(save(tmp_path))
    assert model.config == ViTConfig(
        size="48x2x4-mlp192", patch=(2, 2, 2), image=(112, 112, 112), positions="rotary", num_registers=4, norm_eps=1e-5
    )
    assert contract == VolumeContract(mean=-368.0, std=472.0, patch=(2, 2, 2))
    assert report["heads"] == ["dino_head.last_layer.bias", "dino_head.mlp.0.weight"]
    assert report["num_tensors"] == 36
    assert report["used"] + sum(report["transformed"].values()) == 36
    assert report["zeros"] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_a_narrow_type(dtype, tmp_path):
    """VoxelFM's own periods, not rounded to a power of ten as in the fixture: 100^(i/12)."""
    config = ViTConfig(size="864x1x12-mlp864", patch=(2, 2, 2), image=(4, 4, 4), positions="rotary", norm_eps=1e-5)
    write_voxelfm(ViT(config), VolumeContract(patch=(2, 2, 2)), tmp_path)
    path = tmp_path / "checkpoints" / "model.pth"
    teacher = torch.load(path)["teacher"]
    torch.save({"teacher": {name: tensor.to(dtype) for name, tensor in teacher.items()}}, path)
    model, _, report = read_voxelfm(tmp_path)
    assert report["transformed"][f"{dtype} read as float32".removeprefix("torch.")] == len(teacher)
    assert torch.equal(model.norm.weight, teacher["backbone.norm.weight"].to(dtype).float())


def test_a_contract_beside_says_what_config_yaml_cannot(tmp_path):
    contract = VolumeContract(patch=(2, 2, 2), max_patches=99, pooling="mean")
    config = ViTConfig(size="48x1x2-mlp96", patch=(2, 2, 2), image=(4, 4, 4), positions="rotary", norm_eps=1e-5)
    write_voxelfm(ViT(config), contract, tmp_path)
    assert read_voxelfm(tmp_path)[1] == VolumeContract(patch=(2, 2, 2))
    write_json(tmp_path / "contract.json", to_dict(contract))
    assert read_voxelfm(tmp_path)[1] == contract
    write_json(tmp_path / "contract.json", to_dict(contract) | {"mean": 0.0, "clip_hu": [-1000.0, 900.0]})
    with pytest.raises(ContractError, match=r"config\.yaml beside it differ in clip_hu, mean"):
        read_voxelfm(tmp_path)


def test_a_download_with_the_folder_inside(tmp_path):
    save(tmp_path / "vitb_3d")
    assert read_voxelfm(tmp_path)[1].std == 472.0


@pytest.mark.parametrize("registers", [0, 4])
def test_round_trip_is_the_identity(registers, tmp_path):
    torch.manual_seed(1)
    config = ViTConfig(
        size="72x2x2-mlp144", patch=(2, 2, 2), image=(8, 8, 8), positions="rotary", num_registers=registers,
        norm_eps=1e-5, layer_scale=0.1,
    )  # fmt: skip
    model, contract = ViT(config), VolumeContract(patch=(2, 2, 2), mean=-1.5, std=3e-6, clip_hu=(-900.0, 1000.0))
    write_voxelfm(model, contract, tmp_path)
    again, same, _ = read_voxelfm(tmp_path)
    assert again.config == config
    assert same == contract
    assert hash_tensors(again.state_dict()) == hash_tensors(model.state_dict())


def test_their_file_comes_back_bit_by_bit(tmp_path):
    model, contract, _ = read_voxelfm(save(tmp_path / "a"))
    write_voxelfm(model, contract, tmp_path / "b")
    written = torch.load(tmp_path / "b" / "checkpoints" / "model.pth", weights_only=True)["teacher"]
    original = {f"backbone.{name}": tensor for name, tensor in backbone().items()}
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name


def test_swiglu_names(tmp_path):
    config = ViTConfig(size="48x1x4-swiglu128", patch=(2, 2, 2), image=(8, 8, 8), positions="rotary", norm_eps=1e-5)
    model = ViT(config)
    write_voxelfm(model, VolumeContract(patch=(2, 2, 2)), tmp_path)
    names = torch.load(tmp_path / "checkpoints" / "model.pth", weights_only=True)["teacher"]
    assert names["backbone.blocks.0.mlp.w12.weight"].shape == (256, 48)
    assert hash_tensors(read_voxelfm(tmp_path)[0].state_dict()) == hash_tensors(model.state_dict())


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.norm.bias": None}, "norm.bias: missing"),
        ({"backbone.extra.weight": torch.ones(2)}, "extra.weight: no place"),
        ({"backbone.register_tokens": torch.ones(1, 3, WIDTH)}, r"register_tokens: expected \(1, 4, 48\), found \(1, 3, 48\)"),
        ({"backbone.blocks.1.attn.qkv.weight": torch.ones(96, WIDTH)}, "qkv.weight: expected"),
        ({"backbone.norm.weight": torch.full((WIDTH,), math.nan)}, "norm.weight: holds NaN"),
        ({"backbone.rope_embed.periods": torch.tensor([1.0, 100.0])}, "rotary periods"),
        ({"backbone.rope_embed.periods": None}, "no rotary periods"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(ContractError, match=message):
        read_voxelfm(save(tmp_path, changes))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("datasets",), [{"pixel_range": {"lower": -1000, "upper": 1900}}], r"datasets.0.norm.mean None.*take config.yaml"),
        (("datasets",), [], "norm.mean None"),
        (("datasets", 0, "norm", "std"), "wide", "norm.std 'wide'"),
        (("student", "qkv_bias"), False, "'qkv_bias': False"),
        (("student", "rope_base"), 10000.0, "'rope_base': 10000"),
        (("student", "ffn_layer"), "moe", "ffn_layer 'moe'"),
        (("student", "num_heads"), 16, "no multiple of 6·16"),
        (("student", "embed_dim"), None, "embed_dim None"),
        (("student", "depth"), 3, "blocks.2.norm1.weight: missing"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(place, value, message, tmp_path):
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    table: Any = settings
    for part in place[:-1]:
        table = table[part]
    table[place[-1]] = value
    with pytest.raises(ContractError, match=message):
        read_voxelfm(save(tmp_path, settings=settings))


def test_several_checkpoints_or_none(tmp_path):
    save(tmp_path)
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"2 checkpoints \(checkpoints/99999.pth, other.pth\)"):
        read_voxelfm(tmp_path)
    for path in tmp_path.rglob("*.pth"):
        path.unlink()
    with pytest.raises(UsageError, match=r"0 checkpoints \(none\)"):
        read_voxelfm(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"config.yaml cannot be read"):
        read_voxelfm(tmp_path)


def test_files_that_are_something_else(tmp_path):
    save(tmp_path)
    path = tmp_path / "checkpoints" / "99999.pth"
    torch.save({"student": {}}, path)
    with pytest.raises(ContractError, match="holds student; expected 'teacher'"):
        read_voxelfm(tmp_path)
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that would run a program
    with pytest.raises(ContractError, match="cannot be read as tensors"):
        read_voxelfm(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ContractError, match="no YAML"):
        read_voxelfm(tmp_path)


def test_what_the_layout_cannot_hold(tmp_path):
    model = ViT(ViTConfig(size="nano", patch=(4, 4, 2), image=(8, 8, 8)))
    with pytest.raises(ContractError, match=r"cubic 3D patch, .*rotary positions, norm_eps 1e-05, .* 6·3"):
        write_voxelfm(model, VolumeContract(), tmp_path)
    model, contract, _ = read_voxelfm(save(tmp_path / "theirs"))
    Encoder(model, contract, "half", patch=contract.patch, precision="bfloat16")  # makes its weights ready for that
    with pytest.raises(ContractError, match=r"layout needs weights in float32, LayerScale apart$"):
        write_voxelfm(model, contract, tmp_path)
