"""SigLIP's vision tower (Zhai et al. 2023): MedSigLIP, and the one inside MedGemma.

Against our `ViT`: no class token, learned positions of the patches, GELU by its tanh formula, no LayerScale, and a head that
pools the patches by attention of one learned query. MedGemma's tower has no head.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hilum.encode.attention import attend
from hilum.encode.contract import Contract
from hilum.encode.released.natural import check_sides, processor_contract
from hilum.encode.released.shards import read_tensors, shard_map
from hilum.encode.released.weights import build, compare
from hilum.encode.vit import Attention, LayerScale, Tokens
from hilum.errors import ContractError, UsageError
from hilum.records import read_json

# Names of transformers after the tower's prefix, and ours.
_NAMES = (
    (r"^embeddings\.patch_embedding\.", "patch_embed."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"^post_layernorm\.", "norm."),
    (r"^head\.attention\.in_proj_", "head.qkv."),
    (r"^head\.attention\.out_proj\.", "head.proj."),
    (r"^head\.layernorm\.", "head.norm."),
    (r"\.mlp\.", "."),
)
_FIRST = "embeddings.patch_embedding.weight"


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The shape of a tower.

    width, depth, heads, hidden   of the transformer and its feed-forward layers
    patch, image                  pixels along (rows, columns); positions are learned for this image alone
    head                          pools by attention
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patch: tuple[int, int]
    image: tuple[int, int]
    channels: int
    norm_eps: float
    head: bool


class SiglipBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.unscaled = LayerScale(config.width, 0.0)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x_BND: Tensor) -> Tensor:
        shape = [(x_BND.shape[0], x_BND.shape[1])]
        x_BND = x_BND + self.attn(self.norm1(x_BND).flatten(0, 1), shape, [None], self.unscaled).view_as(x_BND)
        out: Tensor = x_BND + self.fc2(functional.gelu(self.fc1(self.norm2(x_BND)), approximate="tanh"))
        return out


class SiglipHead(nn.Module):
    """One learned query attends to the patches; a feed-forward layer follows."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.probe = nn.Parameter(torch.randn(1, 1, config.width))
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x_BND: Tensor) -> Tensor:
        width = x_BND.shape[-1]
        head_dim = width // self.heads
        query = functional.linear(self.probe, self.qkv.weight[:width], self.qkv.bias[:width])
        key, value = functional.linear(x_BND, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, -1)
        parts = [part.view(*part.shape[:2], self.heads, head_dim).transpose(1, 2) for part in (query, key, value)]
        x = self.proj(attend(parts[0].expand(len(x_BND), -1, -1, -1), parts[1], parts[2]).flatten(1))
        out: Tensor = x + self.fc2(functional.gelu(self.fc1(self.norm(x)), approximate="tanh"))
        return out


class SiglipTower(nn.Module):
    """Images (B, C, Y, X) of the config's size → tokens; `cls` is the head's output, or the mean of the patches without one."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        num_patches = math.prod(i // p for i, p in zip(config.image, config.patch))
        self.pos_embed = nn.Parameter(torch.randn(num_patches, config.width) * config.width**-0.5)
        self.blocks = nn.ModuleList(SiglipBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.head = SiglipHead(config) if config.head else None

    def forward(self, images: Tensor) -> Tokens:
        if images.shape[-2:] != self.config.image:
            raise UsageError(f"this tower sees {self.config.image} px; found {tuple(images.shape[-2:])}")
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Tokens(x.mean(1) if self.head is None else self.head(x), x[:, :0], x)


def read_siglip(folder: Path) -> tuple[SiglipTower, Contract, dict[str, Any]]:
    """The tower of a folder that transformers saved (siglip, siglip_vision_model or gemma3, in one file or in shards).

    returns  network, contract, report as of `read_weights` with `not_read`: how many tensors of other parts were passed over
    """
    config = _read_config(folder / "config.json")
    names = shard_map(folder)
    firsts = [name for name in names if name.endswith(_FIRST)]
    if len(firsts) != 1:
        raise ContractError(f"{folder} holds {len(firsts)} vision towers (tensors …{_FIRST}); expected one")
    prefix = firsts[0].removesuffix(_FIRST)
    tensors = read_tensors(folder, lambda name: name.startswith(prefix))
    contract = processor_contract(folder)
    check_sides(contract, config.patch, config.channels, folder)
    if (contract.size_px, contract.size_px) != config.image:
        raise ContractError(f"{folder}: the processor gives {contract.size_px} px, the tower sees {config.image}")
    state: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for foreign, tensor in tensors.items():
        name = foreign.removeprefix(prefix)
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        if name in state:
            raise ContractError(f"{folder}: both {origins[name]} and {foreign} would be {name}")
        state[name], origins[name] = tensor, foreign
    transformed = _join(state, origins)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in SiglipTower(config).state_dict().items()}
    report = compare(wanted, state, origins, tensors, "transformers siglip", folder, transformed)
    network = build(SiglipTower, config, {name: tensor.float() for name, tensor in state.items()})
    return network, contract, {**report, "not_read": len(names) - len(tensors)}


def _join(state: dict[str, Tensor], origins: dict[str, str]) -> dict[str, int]:
    """q, k and v of a block become one matrix; returns how many tensors went into it."""
    count = 0
    for name in [n for n in state if ".attn.q." in n]:
        names = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(n in state for n in names):
            count += len(names)
            state[name.replace(".q.", ".qkv.")] = torch.cat([state.pop(n) for n in names])
            for n in names:
                del origins[n]
    return {"q, k and v joined into attn.qkv": count}


def _read_config(path: Path) -> SiglipConfig:
    """Values that config.json leaves out are transformers' defaults."""
    config = read_json(path)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("siglip", "siglip_vision_model", "gemma3"):
        raise ContractError(f"{path} is of model_type '{kind}'; expected siglip, siglip_vision_model or gemma3")
    values = config if kind == "siglip_vision_model" else config.get("vision_config", {})
    if values.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ContractError(f"{path} has hidden_act {values['hidden_act']}; this tower has gelu_pytorch_tanh")
    side, patch = values.get("image_size", 224), values.get("patch_size", 16)
    if not isinstance(side, int) or not isinstance(patch, int) or side % patch:
        raise ContractError(f"{path} has image_size {side} and patch_size {patch}; expected a multiple")
    return SiglipConfig(
        width=values.get("hidden_size", 768),
        depth=values.get("num_hidden_layers", 12),
        heads=values.get("num_attention_heads", 12),
        hidden=values.get("intermediate_size", 3072),
        patch=(patch, patch),
        image=(side, side),
        channels=values.get("num_channels", 3),
        norm_eps=values.get("layer_norm_eps", 1e-6),
        head=values.get("vision_use_head", True),
    )
