"""VoxelFM's released checkpoint as our transformer and contract, and back (Maguado 2026, arXiv 2604.04133).

A folder holds `config.yaml` and one `.pth` file, in `checkpoints/` or wherever; the file is a pickle of plain tensors,
{"teacher": names with tensors}, with the backbone under `backbone.` and the heads of pre-training beside it.

VoxelFM turns adjacent channels (2i, 2i + 1) of three blocks of a head, one block an axis; our transformer turns channels
(i, i + R/2), as DINOv3. The rows of its query and key matrices are therefore put in our order when they are read, and back
when they are written: dot products of queries and keys do not change, and a round trip is the identity.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hilum.encode.released.weights import account, build
from hilum.encode.shape import SIZES, ViTConfig
from hilum.encode.vit import ViT
from hilum.encode.volume_contract import VolumeContract
from hilum.errors import ContractError, UsageError
from hilum.records import read_json, write_atomic, write_text
from hilum.settings import from_dict

_HEADS = ("dino_head.", "ibot_head.")
_PERIODS = "rope_embed.periods"
_BASE = 100.0  # of the rotary periods of our transformer
_NORM_EPS = 1e-5
# Their names and ours, backbone prefix removed. The second pattern of a pair undoes the first.
_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.", r"^patch_embed\.", "patch_embed.proj."),
    (r"^register_tokens$", "registers", r"^registers$", "register_tokens"),
    (r"\.mlp\.w12\.", ".mlp.fc1.", r"\.mlp\.fc1\.", ".mlp.w12."),
    (r"\.mlp\.w3\.", ".mlp.fc2.", r"\.mlp\.fc2\.", ".mlp.w3."),
)
_FIXED = {"qkv_bias": True, "proj_bias": True, "ffn_bias": True}  # what our transformer has, and theirs may leave out


def read_voxelfm(folder: Path) -> tuple[ViT, VolumeContract, dict[str, Any]]:
    """The encoder of a folder that holds config.yaml and one checkpoint; or of a download with such a folder `vitb_3d`.

    returns  transformer, contract (normalisation and range from config.yaml; all of it from contract.json in an export of
             ours), report (as `Weights.report`, and `heads`: what was left out by name)

    Raises UsageError when there is no config.yaml or not exactly one checkpoint, ContractError when the config says what is
    missing here or tensors do not fit it.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() and (folder / "vitb_3d" / "config.yaml").is_file():
        folder = folder / "vitb_3d"
    settings = _read_settings(folder / "config.yaml")
    config, contract = _config(settings), _contract(settings)
    if (folder / "contract.json").is_file():  # of `hilum export`: says what config.yaml has no place for
        contract = _whole_contract(folder / "contract.json", contract)
    path = _checkpoint(folder)
    teacher = _read_teacher(path)
    heads = sorted(name for name in teacher if name.startswith(_HEADS))
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in teacher.items() if name not in set(heads)}
    _check_periods(tensors, config, path)
    state, origins = {}, {}
    for foreign, tensor in tensors.items():
        if foreign == _PERIODS:
            continue
        name = _rename(foreign, config, back=False)
        state[name], origins[name] = tensor, foreign
    transformed = _turn_rows(state, config, back=False)
    for name in transformed:
        origins.pop(name)
    state.setdefault("registers", torch.zeros(1, 0, SIZES[config.size][0]))
    changes = {"query and key rows put in our rotary order": len(transformed), "rotary periods compared with ours": 1}
    weights = account(config, state, origins, tensors, "VoxelFM", path, changes)
    model = build(ViT, config, weights.state)
    return model, contract, {**weights.report, "heads": heads}


def write_voxelfm(model: ViT, contract: VolumeContract, folder: Path) -> None:
    """Write an encoder as VoxelFM's public code reads it: config.yaml and checkpoints/model.pth, without heads."""
    config = model.config
    _check_writable(model, contract)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _turn_rows(state, config, back=True)
    if not config.num_registers:
        del state["registers"]
    teacher = {f"backbone.{_rename(name, config, back=True)}": tensor for name, tensor in state.items()}
    teacher[f"backbone.{_PERIODS}"] = _periods(config)
    with write_atomic(folder / "checkpoints" / "model.pth") as temporary:
        torch.save({"teacher": teacher}, temporary)
    width, depth, heads, kind, hidden = SIZES[config.size]
    student = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "patch_size": config.patch[0],
        "mlp_ratio": _ratio(width, kind, hidden),
        "layerscale": config.layer_scale,
        "rope_base": _BASE,
        "ffn_layer": kind,
        **_FIXED,
        "num_register_tokens": config.num_registers,
    }
    low, high = contract.clip_hu
    dataset = {"modality": "ct", "pixel_range": {"lower": low, "upper": high}}
    dataset["norm"] = {"mean": contract.mean, "std": contract.std}
    crops = {"global_crops_size": list(config.image)}
    write_text(
        folder / "config.yaml",
        yaml.safe_dump({"student": student, "crops": crops, "datasets": [dataset]}, sort_keys=False),
    )


# ---- config.yaml


class _Settings:
    """Values of a nested YAML table by dotted name; what is missing or of another type is a ContractError."""

    def __init__(self, table: Any, path: Path) -> None:
        self.table, self.path = table, path

    def get(self, name: str, default: Any = None) -> Any:
        value = self.table
        for part in name.split("."):
            if isinstance(value, list):
                value = value[int(part)] if int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def number(self, name: str, why: str) -> float:
        value = self.get(name)
        if isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
            value = float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ContractError(f"{self.path} has {name} {value!r}; expected a number: {why}")
        return float(value)


def _read_settings(path: Path) -> _Settings:
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); VoxelFM's folder holds config.yaml and checkpoints/NAME.pth"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ContractError(f"{path} is no YAML: {error}") from None
    if not isinstance(table, dict):
        raise ContractError(f"{path} holds no table of settings; expected student, datasets and more")
    return _Settings(table, path)


def _config(settings: _Settings) -> ViTConfig:
    def whole(name: str, why: str) -> int:
        return int(settings.number(f"student.{name}", why))

    width, depth, heads = (whole(name, "the shape") for name in ("embed_dim", "depth", "num_heads"))
    kind = settings.get("student.ffn_layer", "mlp")
    if kind not in ("mlp", "swiglu"):
        raise ContractError(f"{settings.path} has student.ffn_layer '{kind}'; this hilum knows mlp and swiglu")
    wanted = {**_FIXED, "rope_base": _BASE}
    if other := {
        name: value for name in wanted if (value := settings.get(f"student.{name}", wanted[name])) != wanted[name]
    }:
        raise ContractError(f"{settings.path} has student {other}; this transformer has {wanted}")
    if width % (6 * heads):
        raise ContractError(
            f"{settings.path}: width {width} is no multiple of 6·{heads} heads, which rotation in 3D needs"
        )
    hidden = round(width * settings.number("student.mlp_ratio", "the width of the feed-forward part"))
    if kind == "swiglu":
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    patch = whole("patch_size", "the side of a patch")
    return ViTConfig(
        size=SIZES.name_of((width, depth, heads, kind, hidden)),
        patch=(patch, patch, patch),
        image=_image(settings, patch),
        positions="rotary",
        num_registers=whole("num_register_tokens", "the registers"),
        norm_eps=_NORM_EPS,
        layer_scale=settings.number("student.layerscale", "0 leaves LayerScale out"),
    )


def _image(settings: _Settings, patch: int) -> tuple[int, int, int]:
    """The (first) size of a global crop; a name only, since rotary positions have no grid of reference."""
    size = settings.get("crops.global_crops_size", 8 * patch)
    while isinstance(size, list) and size and isinstance(size[0], list):
        size = size[0]
    sides = size if isinstance(size, list) else [size] * 3
    if len(sides) != 3 or any(not isinstance(side, int) or side % patch for side in sides):
        raise ContractError(f"{settings.path} has crops of {size}; expected three multiples of the patch {patch}")
    return sides[0], sides[1], sides[2]


def _contract(settings: _Settings) -> VolumeContract:
    """Upstream reads the constants of the first data set, and so do we."""
    why = (
        "the constants that the network was trained with; take config.yaml from the run or the release of this checkpoint "
        "(VoxelFM's differ between runs, so none is assumed)"
    )
    mean, std, low, high = (
        settings.number(f"datasets.0.{name}", why)
        for name in ("norm.mean", "norm.std", "pixel_range.lower", "pixel_range.upper")
    )
    patch = int(settings.number("student.patch_size", "the side of a patch"))
    return VolumeContract(clip_hu=(low, high), patch=(patch, patch, patch), mean=mean, std=std)


def _whole_contract(path: Path, said: VolumeContract) -> VolumeContract:
    """The contract of contract.json, which must agree with what config.yaml says."""
    contract = from_dict(VolumeContract, read_json(path), str(path))
    both = ("clip_hu", "patch", "mean", "std")
    if other := [name for name in both if getattr(contract, name) != getattr(said, name)]:
        raise ContractError(f"{path} and config.yaml beside it differ in {', '.join(other)}; export the encoder again")
    return contract


# ---- tensors


def _checkpoint(folder: Path) -> Path:
    found = sorted(folder.rglob("*.pth"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise UsageError(
            f"'{folder}' has {len(found)} checkpoints ({names}); expected one .pth file: leave the one to be read"
        )
    return found[0]


def _read_teacher(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets; the cause goes into the message
        raise ContractError(f"{path} cannot be read as tensors ({type(error).__name__}: {error})") from error
    teacher = loaded.get("teacher") if isinstance(loaded, dict) else None
    if not isinstance(teacher, dict) or not all(isinstance(tensor, Tensor) for tensor in teacher.values()):
        found = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, dict) else type(loaded).__name__
        raise ContractError(f"{path} holds {found}; expected 'teacher' with names and tensors")
    return teacher


def _rename(name: str, config: ViTConfig, *, back: bool) -> str:
    gated = SIZES[config.size][3] == "swiglu"
    for theirs, as_ours, ours, as_theirs in _NAMES:
        if ".mlp" in as_ours and not gated:
            continue
        name = re.sub(ours, as_theirs, name) if back else re.sub(theirs, as_ours, name)
    return name


def _periods(config: ViTConfig) -> Tensor:
    """100^(2i / (head width / 3)), as many as an axis has pairs of channels in a head."""
    width, _, heads, _, _ = SIZES[config.size]
    num = width // heads // 6
    return _BASE ** (torch.arange(num, dtype=torch.float32) / num)


def _check_periods(tensors: Mapping[str, Tensor], config: ViTConfig, path: Path) -> None:
    ours, theirs = _periods(config), tensors.get(_PERIODS)
    digits = 1e-3
    if theirs is not None and theirs.is_floating_point():
        digits = max(digits, torch.finfo(theirs.dtype).eps)  # of a file in bfloat16
    if theirs is None or theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=digits, atol=0):
        found = "no" if theirs is None else theirs.tolist()
        raise ContractError(f"{path} has {found} rotary periods ({_PERIODS}); expected {ours.tolist()}")


def _rotary_order(head_dim: int) -> Tensor:
    """Their channel at each of ours: block z, y, x of adjacent pairs → all first parts, then all second parts."""
    return torch.arange(head_dim).view(-1, 2).T.flatten()


def _turn_rows(state: dict[str, Tensor], config: ViTConfig, *, back: bool) -> list[str]:
    """Reorder the rows of queries and keys in every block, in place; returns the names of what was changed."""
    width, _, heads, _, _ = SIZES[config.size]
    order = _rotary_order(width // heads)
    order = order.argsort() if back else order
    rows = (torch.arange(heads)[:, None] * (width // heads) + order).flatten()
    rows = torch.cat([rows, width + rows, torch.arange(2 * width, 3 * width)])
    names = [name for name, tensor in state.items() if ".attn.qkv." in name and len(tensor) == 3 * width]
    for name in names:
        state[name] = state[name][rows]
    return names


# ---- writing


def _ratio(width: int, kind: str, hidden: int) -> float:
    return hidden / width if kind == "mlp" else 1.5 * hidden / width


def _check_writable(model: ViT, contract: VolumeContract) -> None:
    config, state = model.config, model.state_dict()
    width, _, heads, _, _ = SIZES[config.size]
    folded = bool(config.layer_scale) and "blocks.0.ls1.gamma" not in state
    faults = {
        "a cubic 3D patch": len(config.patch) != 3 or len(set(config.patch)) != 1,
        "the patch of its contract": tuple(config.patch) != contract.patch,
        "rotary positions": config.positions != "rotary",
        "one channel": config.channels != 1,
        "weights in float32, LayerScale apart": folded or any(t.dtype != torch.float32 for t in state.values()),
        f"norm_eps {_NORM_EPS}": config.norm_eps != _NORM_EPS,
        f"a width that is a multiple of 6·{heads}": width % (6 * heads) != 0,
    }
    if any(faults.values()):
        raise ContractError(f"VoxelFM's layout needs {', '.join(name for name, broken in faults.items() if broken)}")
