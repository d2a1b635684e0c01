"""Released encoders as weights of our transformer, every tensor accounted for.

    folder, config.json of hilum                                      an encoder that hilum exported
    folder, config.json with model_type dinov2,
    dinov2_with_registers or dinov3_vit, and model.safetensors        as transformers saves them; Curia's releases too
    file NAME.pth                                                     a state dict of DINOv2's hub

A slice has one channel: the kernels of an RGB patch embedding are summed over their channels, which is exactly what they
compute of a grey image that is shown in all three. A contract with three channels keeps them (`channels=None`).
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hilum.encode.encoder import read_model_config
from hilum.encode.released.layouts import JOINED, Layout, layout_named
from hilum.encode.released.shards import read_tensors
from hilum.encode.shape import SIZES, ViTConfig
from hilum.encode.vit import ViT
from hilum.errors import ContractError, UsageError
from hilum.records import read_json

T = TypeVar("T", bound=nn.Module)

# Settings of transformers that say which biases a model has not, and their names here.
_BIASES = {
    "qkv_bias": ("attn.q", "attn.k", "attn.v"),
    "query_bias": ("attn.q",),
    "key_bias": ("attn.k",),
    "value_bias": ("attn.v",),
    "proj_bias": ("attn.proj",),
    "mlp_bias": ("mlp.fc1", "mlp.gate", "mlp.up", "mlp.fc2"),
}


class Weights(NamedTuple):
    """What a file holds, as ours.

    config  shape of the transformer, with the image side of its position table
    state   for `ViT(config).load_state_dict`, float32
    report  layout, hash of the tensors as stored, num_tensors and num_parameters in the file, used (how many are taken as
            they are), transformed (what was done: to how many), created (tensor: why), zeros (tensors that are all zero);
            nothing is ignored, what is left over is an error
    """

    config: ViTConfig
    state: dict[str, Tensor]
    report: dict[str, Any]


class _Found(NamedTuple):
    """A file before it is understood: its tensors by their own names, and what its config says.

    heads     None: not said
    biasless  linear layers without a bias
    """

    layout: str
    tensors: dict[str, Tensor]
    names: Layout
    heads: int | None = None
    norm_eps: float = 1e-6
    image_px: int | None = None
    antialias: bool = False
    biasless: tuple[str, ...] = ()


def read_weights(path: str | Path, channels: int | None = 1) -> Weights:
    """Read an encoder in any of the layouts above.

    channels  1: the kernels of a foreign patch embedding are summed into one; None: kept as they are

    Raises UsageError when `path` is none of them, ContractError when its architecture is not ours or when tensors are
    missing, left over, of another shape or not finite; the message lists them.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".pth":
        return _translate(_read_hub(path), path, channels)
    if not (path / "config.json").is_file():
        raise UsageError(
            f"'{path}' holds no weights that can be read; expected a hilum run or encoder, a folder that transformers saved "
            "(config.json, model.safetensors), or a .pth state dict of DINOv2"
        )
    config = read_json(path / "config.json")
    if isinstance(config, dict) and config.get("format") == "hilum-encoder":
        tensors = read_tensors(path)
        shape, _ = read_model_config(path)
        return account(shape, tensors, {n: n for n in tensors}, tensors, "hilum encoder", path)
    return _translate(_read_transformers(path, config), path, channels)


def translate_dinov2(tensors: dict[str, Tensor], where: Path) -> Weights:
    """The tensors of a `Dinov2Model` that came without its config.json, as in Curia's heads. Errors as in `read_weights`.

    where  the file, for messages
    """
    return _translate(_Found("transformers dinov2", tensors, layout_named("dinov2", True)), where)


def build(network: Callable[[Any], T], config: Any, state: Mapping[str, Tensor]) -> T:
    """`network(config)` with copies of these tensors as its parameters (theirs may lie in a mapped file)."""
    with torch.device("meta"):
        made = network(config)
    made.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return made


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Names, shapes, types and values of tensors as 16 hexadecimal digits, whatever file they lie in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def account(
    config: ViTConfig,
    state: dict[str, Tensor],
    origins: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    layout: str,
    where: Path,
    transformed: Mapping[str, int] | None = None,
    created: Mapping[str, str] | None = None,
) -> Weights:
    """Compare tensors under our names with what the transformer wants. ContractError lists all that does not fit.

    origins  our name: its name in the file
    tensors  as they lie in the file
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in ViT(config).state_dict().items()}
    report = compare(wanted, state, origins, tensors, layout, where, transformed, created)
    return Weights(config, {name: tensor.float() for name, tensor in state.items()}, report)


def compare(
    wanted: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Tensor],
    origins: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    layout: str,
    where: Path,
    transformed: Mapping[str, int] | None = None,
    created: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The same for any network, whose tensors have the `wanted` names and shapes; returns the report of `Weights`."""
    faults = [f"{name}: missing, expected {shape}" for name, shape in wanted.items() if name not in state]
    for name, tensor in state.items():
        shown = origins.get(name, name)
        if name not in wanted:
            faults.append(f"{shown}: no place for it")
        elif tuple(tensor.shape) != wanted[name]:
            faults.append(f"{shown}: expected {wanted[name]}, found {tuple(tensor.shape)}")
        elif not bool(torch.isfinite(tensor).all()):
            faults.append(f"{shown}: holds NaN or infinite values")
    if faults:
        raise ContractError(f"{where} ({layout}): {len(faults)} tensors do not fit: {'; '.join(faults)}")
    changed, made = dict(transformed or {}), dict(created or {})
    narrow = {str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"}
    changed |= {
        f"{dtype} read as float32": sum(str(t.dtype) == f"torch.{dtype}" for t in tensors.values()) for dtype in narrow
    }
    return {
        "layout": layout,
        "hash": hash_tensors(tensors),
        "num_tensors": len(tensors),
        "num_parameters": sum(t.numel() for t in tensors.values()),
        "used": sum(name in origins for name in state),
        "transformed": changed,
        "created": made,
        "zeros": [
            n for n, t in state.items() if n not in made and n != "mask_token" and t.numel() and not bool(t.any())
        ],
    }


def _read_hub(path: Path) -> _Found:
    """A state dict of DINOv2's hub. Its models with registers interpolate positions with antialiasing."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets; the cause goes into the message
        raise ContractError(f"{path} cannot be read as a state dict ({type(error).__name__}: {error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ContractError(f"{path} is no state dict; expected names with tensors, as DINOv2's hub has them")
    return _Found("DINOv2 hub", tensors, layout_named("hub", True), antialias="register_tokens" in tensors)


def _read_transformers(folder: Path, config: Any) -> _Found:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        raise ContractError(
            f"{folder}/config.json is of model_type '{kind}'; expected dinov2, dinov2_with_registers or dinov3_vit"
        )
    gated, side = config.get("use_gated_mlp", False), config.get("image_size")
    for name, able in (("hidden_act", "silu" if gated else "gelu"), ("rope_theta", 100.0)):
        if config.get(name, able) != able:
            raise ContractError(f"{folder}/config.json has {name} {config[name]}; this transformer has {able}")
    return _Found(
        f"transformers {kind}",
        read_tensors(folder),
        layout_named(kind, gated or kind != "dinov3_vit"),
        heads=config.get("num_attention_heads"),
        norm_eps=config.get("layer_norm_eps", 1e-5 if kind == "dinov3_vit" else 1e-6),
        image_px=side if isinstance(side, int) else None,
        antialias=kind == "dinov2_with_registers",
        biasless=tuple(part for name, parts in _BIASES.items() if not config.get(name, True) for part in parts),
    )


def _translate(found: _Found, where: Path, channels: int | None = 1) -> Weights:
    """Foreign tensors under our names, joined, summed and reshaped as our transformer wants them."""
    state: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for foreign, tensor in found.tensors.items():
        name = found.names.ours(foreign)
        if name in state:
            raise ContractError(f"{where} ({found.layout}): both {origins[name]} and {foreign} would be {name}")
        state[name], origins[name] = tensor, foreign
    created = _fill_biases(state, found.biasless)
    transformed = _join(state, origins, created)
    needed = ("cls_token", "patch_embed.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    if missing := [name for name in needed if name not in state]:
        raise ContractError(f"{where} is no {found.layout} encoder: {', '.join(missing)} missing")
    config = _recognise(state, found, where)
    found_channels, width = state["patch_embed.weight"].shape[1], state["cls_token"].shape[-1]
    config = replace(config, channels=channels or found_channels)
    if channels == 1 != found_channels:
        state["patch_embed.weight"] = state["patch_embed.weight"].float().sum(1, keepdim=True)
        transformed[f"patch kernels of {found_channels} channels summed into one"] = 1
        del origins["patch_embed.weight"]
    if "mask_token" not in state:
        state["mask_token"], created["mask_token"] = torch.zeros(1, width), "the file has none"
    elif state["mask_token"].shape == (1, 1, width):
        state["mask_token"] = state["mask_token"][0]
        transformed["mask token without an axis of length one"] = 1
        del origins["mask_token"]
    state.setdefault("registers", torch.zeros(1, 0, width))
    return account(config, state, origins, found.tensors, found.layout, where, transformed, created)


def _fill_biases(state: dict[str, Tensor], biasless: Sequence[str]) -> dict[str, str]:
    """Zeros where the model has no bias; returns their names with the reason."""
    created = {}
    for name, weight in list(state.items()):
        stem = name.removesuffix(".weight")
        if stem != name and any(stem.endswith(f".{part}") for part in biasless) and f"{stem}.bias" not in state:
            state[f"{stem}.bias"] = torch.zeros(weight.shape[0])
            created[f"{stem}.bias"] = "zeros: the model has no such bias"
    return created


def _join(state: dict[str, Tensor], origins: dict[str, str], created: dict[str, str]) -> dict[str, int]:
    """Parts that are one matrix here become one; returns how many tensors of the file went into each kind."""
    transformed: dict[str, int] = {}
    for whole, parts in JOINED.items():
        for name in [n for n in state if f".{parts[0]}." in n]:
            names = [name.replace(parts[0], part) for part in parts]
            if any(n not in state for n in names):
                continue  # what is there has no place, and what is not is missing: `account` says so
            how = f"{', '.join(parts)} joined into {whole}"
            transformed[how] = transformed.get(how, 0) + sum(n in origins for n in names)
            state[name.replace(parts[0], whole)] = torch.cat([state.pop(n) for n in names])
            if all(n in created for n in names):
                created[name.replace(parts[0], whole)] = created[name]
            for n in names:
                origins.pop(n, None)
    return transformed


def _recognise(state: Mapping[str, Tensor], found: _Found, where: Path) -> ViTConfig:
    """The shape of the transformer that these tensors belong to."""
    width, hidden = state["cls_token"].shape[-1], state["blocks.0.mlp.fc2.weight"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name))
    kind = "mlp" if state["blocks.0.mlp.fc1.weight"].shape[0] == hidden else "swiglu"
    fitting = [
        name
        for name, size in SIZES.items()
        if (*size[:2], *size[3:]) == (width, depth, kind, hidden) and found.heads in (None, size[2])
    ]
    if not fitting:
        raise ContractError(
            f"{where} ({found.layout}) has width {width}, {depth} blocks, {found.heads or 'unknown'} heads and "
            f"{kind} {hidden}; known are {', '.join(f'{name} {size}' for name, size in SIZES.items())}"
        )
    patch = tuple(state["patch_embed.weight"].shape[2:])
    table = state.get("pos_embed")
    image = tuple((found.image_px or 16 * p) // p * p for p in patch)
    if table is not None:
        side = math.isqrt(table.shape[1] - 1)
        if side * side != table.shape[1] - 1:
            raise ContractError(f"{where} has positions of {table.shape[1] - 1} patches; expected a square grid")
        image = tuple(side * p for p in patch)
    return ViTConfig(
        size=fitting[0],
        patch=patch,
        image=image,
        positions="rotary" if table is None else "learned",
        antialias=found.antialias,
        num_registers=state["registers"].shape[1] if "registers" in state else 0,
        norm_eps=found.norm_eps,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
    )
