"""A transformer of slices as one of volumes: the same weights, and on a volume that one patch spans the same tokens.

Patch embedding: repeated along z and divided by its depth (I3D: Carreira & Zisserman 2017), so that what does not change along
z is embedded as its slice. Learned positions: repeated along z.

Rotary positions: two axes share a head's channels in 2D, three in 3D, so that an axis has P₂ = ⌊d/4⌋ and P₃ = ⌊d/6⌋ periods
100^(i/P) for a head of d channels. The rows of queries and keys are put in another order, which changes no dot product, so that
each pair of channels turns with the nearest period of its axis; the pairs left over take the places of z, which do not turn in
a volume of one patch, whose z is 0. Periods are the same where i·P₂/P₃ is a whole number: the first always, all of them where
P₂ = P₃ (heads of 6 channels). A network whose attention reads these pairs only is the same function; any other begins near it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hilum.encode.shape import SIZES, ViTConfig
from hilum.encode.vit import interpolate_positions
from hilum.errors import UsageError

_SHARED = ("size", "channels", "positions", "num_registers", "norm_eps")


def inflate(state: Mapping[str, Tensor], flat: ViTConfig, deep: ViTConfig) -> dict[str, Tensor]:
    """The weights of a 2D transformer for a 3D one. UsageError lists settings that must be equal and are not.

    state  of a `ViT` of config `flat`, (rows, columns)
    deep   (slices, rows, columns); its patch has the sides of the flat one
    """
    wrong = [name for name in _SHARED if getattr(flat, name) != getattr(deep, name)]
    if bool(flat.layer_scale) != bool(deep.layer_scale):
        wrong.append("layer_scale")
    if len(flat.patch) != 2 or len(deep.patch) != 3 or deep.patch[1:] != flat.patch:
        wrong.append("patch")
    if wrong:
        found = ", ".join(f"{name} {getattr(flat, name)} and {getattr(deep, name)}" for name in wrong)
        raise UsageError(
            f"weights of slices do not fit the transformer of volumes: {found}; expected the same (patch: in plane)"
        )
    new, depth = dict(state), deep.patch[0]
    new["patch_embed.weight"] = state["patch_embed.weight"][:, :, None].repeat(1, 1, depth, 1, 1) / depth
    if deep.positions == "learned":
        table = interpolate_positions(state["pos_embed"][:, 1:], flat, deep.grid[1:])
        new["pos_embed"] = torch.cat([state["pos_embed"][:, :1], table.repeat(1, deep.grid[0], 1)], 1)
        return new
    width, _, heads, _, _ = SIZES[flat.size]
    order = torch.tensor(channels_of_axes(width // heads))
    rows = (torch.arange(heads)[:, None] * (width // heads) + order).flatten()
    rows = torch.cat([rows, width + rows, torch.arange(2 * width, 3 * width)])  # queries, keys; values stay
    for name in state:
        if name.endswith((".qkv.weight", ".qkv.bias")):
            new[name] = state[name][rows]
    return new


def channels_of_axes(head_dim: int) -> list[int]:
    """For each channel of a 3D head the channel of the 2D head that takes its place (`hilum.encode.vit.make_rotation`)."""
    flat, deep = head_dim // 4, head_dim // 6
    pairs = [[(a * flat + i, (2 + a) * flat + i) for i in range(flat)] for a in (0, 1)]  # of y, of x
    nearest = [int(i * flat / deep + 0.5) for i in range(deep)]
    y, x = ([axis[i] for i in nearest] for axis in pairs)
    rest = [pair for axis in pairs for i, pair in enumerate(axis) if i not in nearest]
    still = list(range(4 * flat, head_dim))  # channels that no axis turns
    while len(rest) < deep:
        rest.append((still.pop(0), still.pop(0)))
    turned = [*rest[:deep], *y, *x]
    still += [channel for pair in rest[deep:] for channel in pair]
    return [first for first, _ in turned] + [second for _, second in turned] + still
