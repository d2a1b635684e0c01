"""Layouts of released vision transformers: what a tensor of ours is called and how it lies there, in both directions.

hub                    state dicts of DINOv2's hub
dinov2                 transformers' Dinov2Model; Curia
dinov2_with_registers  transformers' Dinov2WithRegistersModel
dinov3_vit             transformers' DINOv3ViTModel
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hilum.encode.shape import SIZES, ViTConfig
from hilum.errors import UsageError

Names = Mapping[str, str]


class Layout(NamedTuple):
    """Names of a layout.

    blocks  what stands before the number of a block; ours is "blocks."
    names   ours: theirs, of a module or parameter, within its block, without .weight and .bias; others are called the same.
            Parts of one matrix of ours are named attn.q, attn.k, attn.v, mlp.gate, mlp.up
    """

    blocks: str
    names: Names

    def ours(self, name: str) -> str:
        """The name here of a tensor that they call `name`; unknown names come back as they are."""
        return _rename(name, self.blocks, "blocks.", {theirs: ours for ours, theirs in self.names.items()})

    def theirs(self, name: str) -> str:
        """The name there of a tensor of ours."""
        return _rename(name, "blocks.", self.blocks, self.names)


_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "registers": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_HUB = {"patch_embed": "patch_embed.proj", "registers": "register_tokens"}
_DINOV2 = {
    **_EMBEDDINGS,
    "patch_embed": "embeddings.patch_embeddings.projection",
    **{f"attn.{part[0]}": f"attention.attention.{part}" for part in ("query", "key", "value")},
    "attn.proj": "attention.output.dense",
    "norm": "layernorm",
}
_DINOV3 = {
    **_EMBEDDINGS,
    "patch_embed": "embeddings.patch_embeddings",
    **{f"attn.{part}": f"attention.{part}_proj" for part in "qkv"},
    "attn.proj": "attention.o_proj",
    "mlp.fc2": "mlp.down_proj",
}
_PLAIN = {
    "hub": Layout("blocks.", _HUB),
    "dinov2": Layout("encoder.layer.", _DINOV2),
    "dinov2_with_registers": Layout("encoder.layer.", _DINOV2),
    "dinov3_vit": Layout("layer.", {**_DINOV3, "mlp.fc1": "mlp.up_proj"}),
}
_GATED = {
    "hub": {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"},
    "dinov2": {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"},
    "dinov2_with_registers": {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"},
    "dinov3_vit": {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj"},
}
JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}


def layout_named(kind: str, gated: bool) -> Layout:
    """Names of a layout for a transformer with or without gated feed-forward (SwiGLU)."""
    plain = _PLAIN[kind]
    if not gated:
        return plain
    kept = {ours: theirs for ours, theirs in plain.names.items() if ours != "mlp.fc1"}
    return Layout(plain.blocks, kept | _GATED[kind])


def transformers_kind(config: ViTConfig) -> str:
    """The class of transformers that computes what our transformer of this shape does. UsageError for volumes."""
    if len(config.patch) != 2:
        raise UsageError("transformers has no layout for a transformer of volumes; expected one of slices")
    if config.positions == "rotary":
        return "dinov3_vit"
    return "dinov2_with_registers" if config.num_registers else "dinov2"


def write_layout(state: Mapping[str, Tensor], config: ViTConfig, layout: str) -> dict[str, Tensor]:
    """Our tensors under the names of a layout, split and reshaped as it wants them; `read_weights` is the inverse.

    layout  "hilum" (nothing changes), "hub", or what `transformers_kind` says

    Where transformers has a LayerScale and ours has none, ones are written: the same function.
    """
    if layout == "hilum":
        return dict(state)
    expected = transformers_kind(config)
    if layout not in (expected, "hub") or (layout == "hub" and config.positions == "rotary"):
        raise UsageError(
            f"a transformer with these positions and registers has no layout {layout}; expected {expected}"
        )
    gated = SIZES[config.size][3] == "swiglu"
    names = layout_named(layout, gated)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "registers" and not config.num_registers and layout != "dinov3_vit":
            continue
        whole = next((w for w, parts in JOINED.items() if f".{w}." in name and parts[0] in names.names), None)
        if whole is None:
            out[names.theirs(name)] = tensor[None] if (name, layout) == ("mask_token", "dinov3_vit") else tensor
        else:
            for part, piece in zip(JOINED[whole], tensor.chunk(len(JOINED[whole]))):
                out[names.theirs(name.replace(whole, part))] = piece
    if not config.layer_scale and layout != "hub":
        ones = torch.ones(SIZES[config.size][0])
        blocks = range(SIZES[config.size][1])
        out |= {names.theirs(f"blocks.{n}.ls{k}.gamma"): ones.clone() for n in blocks for k in (1, 2)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in out.items()}


def transformers_config(config: ViTConfig) -> dict[str, Any]:
    """config.json of the transformer in its layout; for "dinov2" the keys that Curia's releases have.

    UsageError when patch or position table is not square, or no setting of transformers gives this feed-forward.
    """
    kind = transformers_kind(config)
    width, depth, heads, feed_forward, hidden = SIZES[config.size]
    if config.patch[0] != config.patch[1] or config.image[0] != config.image[1]:
        raise UsageError(f"transformers has square patches and images; found {config.patch} and {config.image}")
    gated = feed_forward == "swiglu"
    record: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image[0],
        "patch_size": config.patch[0],
        "num_channels": config.channels,
        "layerscale_value": config.layer_scale or 1.0,
        "drop_path_rate": config.drop_path,
        "dtype": "float32",
    }
    if kind != "dinov2":
        record["num_register_tokens"] = config.num_registers
    if kind == "dinov3_vit":
        biases = dict.fromkeys(("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"), True)
        act = {"hidden_act": "silu" if gated else "gelu", "use_gated_mlp": gated, "intermediate_size": hidden}
        return {
            **record,
            **biases,
            **act,
            "architectures": ["DINOv3ViTModel"],
            "rope_theta": 100.0,
            "attention_dropout": 0.0,
        }
    return {
        **record,
        "architectures": ["Dinov2Model" if kind == "dinov2" else "Dinov2WithRegistersModel"],
        "mlp_ratio": _mlp_ratio(width, gated, hidden),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
        "use_swiglu_ffn": gated,
        **({"use_mask_token": True} if kind == "dinov2" else {}),
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "out_features": [f"stage{depth}"],
        "out_indices": [depth],
    }


def _mlp_ratio(width: int, gated: bool, hidden: int) -> int:
    """The setting from which transformers' DINOv2 derives this hidden width; SwiGLU takes two thirds, in steps of 8."""
    for ratio in range(1, 9):
        if hidden == ((int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio):
            return ratio
    raise UsageError(f"transformers' DINOv2 has no feed-forward of {hidden} for width {width}")


def _rename(name: str, blocks: str, other_blocks: str, names: Names) -> str:
    prefix, rest = "", name
    if name.startswith(blocks):
        number, _, rest = name.removeprefix(blocks).partition(".")
        prefix = f"{other_blocks}{number}."
    stem, dot, kind = rest.rpartition(".")
    if kind not in ("weight", "bias"):
        stem, dot, kind = rest, "", ""
    return f"{prefix}{names.get(stem, stem)}{dot}{kind}"
