"""One vision transformer for slices and volumes.

Axes in names: B batch, N tokens, D width, H heads, T tokens of all crops of a batch laid end to end.
A token sequence is [class, registers, patches]; patches run through the grid in C order. Images of several sizes go
through the linear layers as one long matrix and through attention one size at a time, so a multi-crop batch costs one
pass. Attention is torch's own.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hilum.errors import UsageError

# name: (width, depth, heads, feed-forward kind, feed-forward width). B, L, g as in DINOv2 with Curia's SwiGLU widths
# (hidden = 8·ceil(⌊2·4D/3⌋/8)); "-mlp" as DINOv2 and DINOv3 release B and L, "-plus" as DINOv3; the small ones are ours.
SIZES: dict[str, tuple[int, int, int, Literal["mlp", "swiglu"], int]] = {
    "nano": (96, 3, 3, "mlp", 384),
    "micro": (128, 4, 2, "mlp", 512),
    "tiny": (192, 6, 3, "mlp", 768),
    "small": (384, 12, 6, "mlp", 1536),
    "base": (768, 12, 12, "swiglu", 2048),
    "large": (1024, 24, 16, "swiglu", 2736),
    "giant": (1536, 40, 24, "swiglu", 4096),
    "small-plus": (384, 12, 6, "swiglu", 1536),
    "base-mlp": (768, 12, 12, "mlp", 3072),
    "large-mlp": (1024, 24, 16, "mlp", 4096),
    "huge-plus": (1280, 32, 20, "swiglu", 5120),
}


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The shape of a transformer.

    patch, image   patch and reference image size in pixels, two numbers (2D) or three (3D)
    positions      "learned": one vector a cell of the reference grid, interpolated to other grids;
                   "rotary": axial rotary embedding of DINOv3 (base 100, coordinates in [-1, 1])
    antialias      learned positions are interpolated with antialiasing, as by DINOv2's models with registers
    norm_eps       of every LayerNorm (DINOv2: 1e-6, DINOv3: 1e-5)
    layer_scale    initial LayerScale (Touvron 2021); 0 leaves it out
    drop_path      share of samples whose residual branch is skipped in training, the same at every depth
    """

    size: str = "base"
    patch: tuple[int, ...] = (16, 16)
    image: tuple[int, ...] = (256, 256)
    channels: int = 1
    positions: Literal["learned", "rotary"] = "learned"
    antialias: bool = False
    num_registers: int = 0
    norm_eps: float = 1e-6
    layer_scale: float = 1e-5
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UsageError(f"model size '{self.size}' is unknown; known: {', '.join(SIZES)}")
        if len(self.patch) not in (2, 3) or len(self.patch) != len(self.image):
            raise UsageError(f"patch {self.patch} and image {self.image} need two axes (2D) or three (3D) each")
        if any(i % p for i, p in zip(self.image, self.patch)):
            raise UsageError(f"image {self.image} is no multiple of the patch {self.patch}")
        if self.antialias and len(self.patch) == 3:
            raise UsageError(
                "positions of a 3D transformer are interpolated without antialiasing; set antialias to false"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(i // p for i, p in zip(self.image, self.patch))


class Tokens(NamedTuple):
    """What comes out, after the final LayerNorm: cls (B, D), registers (B, R, D), patches (B, N, D)."""

    cls: Tensor
    registers: Tensor
    patches: Tensor


SHORT_SEQUENCE = 128  # tokens


def _short_attention(num_tokens: int, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """On a CPU, torch's fused kernel loses to two matrix products for short sequences: 2.4× at 65 tokens in bf16."""
    if device.type == "cpu" and num_tokens <= SHORT_SEQUENCE:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, shapes: Sequence[tuple[int, int]], rotations: Sequence[Tensor | None]) -> Tensor:
        qkv = self.qkv(x_TD)
        outs, start = [], 0
        for (b, n), rotation in zip(shapes, rotations):
            part = qkv[start : start + b * n].view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q_BHND, k_BHND, v_BHND = part.unbind(0)
            if rotation is not None:
                q_BHND, k_BHND = rotate(q_BHND, rotation), rotate(k_BHND, rotation)
            with _short_attention(n, x_TD.device):
                out = functional.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)
            outs.append(out.transpose(1, 2).reshape(b * n, -1))
            start += b * n
        projected: Tensor = self.proj(torch.cat(outs))
        return projected


class FeedForward(nn.Module):
    """An MLP with GELU, or SwiGLU: `w3(silu(a) · b)` with (a, b) the halves of one product (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, kind: Literal["mlp", "swiglu"]) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        self.fc1 = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if self.gated:
            a, b = h.chunk(2, -1)
            h = functional.silu(a) * b
        else:
            h = functional.gelu(h)
        out: Tensor = self.fc2(h)
        return out


class LayerScale(nn.Module):
    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a scaled residual that may skip samples."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, _, heads, kind, hidden = SIZES[config.size]
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, config.layer_scale) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = FeedForward(width, hidden, kind)
        self.ls2 = LayerScale(width, config.layer_scale) if config.layer_scale else nn.Identity()

    def forward(
        self, xs: list[Tensor], rotations: Sequence[Tensor | None], generator: torch.Generator | None
    ) -> list[Tensor]:
        def attention(x_TD: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
            out: Tensor = self.ls1(self.attn(self.norm1(x_TD), shapes, rotations))
            return out

        def feed_forward(x_TD: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
            out: Tensor = self.ls2(self.mlp(self.norm2(x_TD)))
            return out

        rate = self.drop_path if self.training else 0.0
        xs = add_residual(xs, attention, rate, generator)
        return add_residual(xs, feed_forward, rate, generator)


def add_residual(
    xs: list[Tensor],
    branch: "nn.Module | object",
    rate: float,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """`x + branch(x)` for crops of several sizes, the branch computed on a random subset of samples.

    xs      crops of one size each, (B, N, D)
    rate    of each B samples, max(⌊B(1 − rate)⌋, 1) are kept; their branch counts B/kept-fold, so the expectation over
            draws is the full residual (batch-subset stochastic depth, DINOv2)
    """
    assert callable(branch)
    if rate == 0.0:
        out = branch(torch.cat([x.flatten(0, 1) for x in xs]), [(x.shape[0], x.shape[1]) for x in xs])
        parts = out.split([x.shape[0] * x.shape[1] for x in xs])
        return [x + part.view_as(x) for x, part in zip(xs, parts)]
    kept = []
    for x in xs:
        num_kept = max(int(x.shape[0] * (1 - rate)), 1)
        order = torch.randperm(x.shape[0], generator=generator)
        kept.append(order[:num_kept].to(x.device))
    subset = [x[index] for x, index in zip(xs, kept)]
    out = branch(torch.cat([s.flatten(0, 1) for s in subset]), [(s.shape[0], s.shape[1]) for s in subset])
    parts = out.split([s.shape[0] * s.shape[1] for s in subset])
    return [
        x.index_add(0, index, part.view(len(index), *x.shape[1:]).to(x.dtype), alpha=x.shape[0] / len(index))
        for x, index, part in zip(xs, kept, parts)
    ]


def make_rotation(grid: Sequence[int], head_dim: int, num_prefix: int, device: torch.device) -> Tensor:
    """Cosines and sines that rotate queries and keys by their place in the grid.

    grid      patches along each axis
    returns   (2, num_prefix + N, R): R = the largest multiple of 2·axes within head_dim; prefix tokens are not turned

    DINOv3: patch centres in [-1, 1] per axis, periods 100^(2i/(R/axes)), angle 2π·x/period; kept in fp32.
    """
    periods = head_dim // (2 * len(grid))
    i = torch.arange(periods, dtype=torch.float32, device=device)
    period = 100.0 ** (i / periods)
    lines = [(torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n * 2 - 1 for n in grid]
    points = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)  # (N, axes)
    angles = (2 * torch.pi * points[:, :, None] / period).flatten(1).repeat(1, 2)
    angles = functional.pad(angles, (0, 0, num_prefix, 0))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x_BHND: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs (i, i + R/2) of the first R channels; the others pass."""
    cos, sin = rotation
    part = x_BHND[..., : cos.shape[-1]].float()
    a, b = part.chunk(2, -1)
    turned = part * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([turned.to(x_BHND.dtype), x_BHND[..., cos.shape[-1] :]], -1)


class ViT(nn.Module):
    """The transformer. Call it with one image batch, or `encode_crops` with several sizes at once."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.width, depth, heads, _, _ = SIZES[config.size]
        self.head_dim = self.width // heads
        conv = nn.Conv2d if len(config.patch) == 2 else nn.Conv3d
        self.patch_embed = conv(config.channels, self.width, config.patch, config.patch)  # type: ignore[arg-type]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.mask_token = nn.Parameter(torch.zeros(1, self.width))
        self.registers = nn.Parameter(torch.zeros(1, config.num_registers, self.width))
        num_cells = math.prod(config.grid)
        self.pos_embed = None
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_cells, self.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = nn.LayerNorm(self.width, eps=config.norm_eps)
        self.reset_parameters()

    @property
    def num_prefix(self) -> int:
        return 1 + self.config.num_registers

    def reset_parameters(self) -> None:
        """DINOv2: linear and position weights truncated normal .02, class token 1e-6, biases and mask token zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.registers, std=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tokens:
        """images (B, C, Y, X) or (B, C, Z, Y, X), sides multiples of the patch → tokens of the last layer."""
        return self.encode_crops([images], [None])[0]

    def encode_crops(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None = None,
    ) -> list[Tokens]:
        """Encode crops of several sizes in one pass.

        crops      one batch a size, (B, C, …)
        masks      for each, None or (B, N) bool: those patches are replaced by the mask token
        generator  CPU generator that draws which samples skip a branch (training with drop_path > 0)
        """
        embedded = [self._embed(images, mask) for images, mask in zip(crops, masks)]
        xs, grids = [e[0] for e in embedded], [e[1] for e in embedded]
        rotations: list[Tensor | None] = [None] * len(xs)
        if self.config.positions == "rotary":
            rotations = [make_rotation(g, self.head_dim, self.num_prefix, x.device) for g, x in zip(grids, xs)]
        for block in self.blocks:
            xs = block(xs, rotations, generator)
        out = []
        for x in xs:
            x = self.norm(x)
            out.append(Tokens(x[:, 0], x[:, 1 : self.num_prefix], x[:, self.num_prefix :]))
        return out

    def _embed(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
        if any(s % p for s, p in zip(images.shape[2:], self.config.patch)):
            raise UsageError(f"image sides {tuple(images.shape[2:])} are no multiples of the patch {self.config.patch}")
        x = self.patch_embed(images)
        grid = tuple(x.shape[2:])
        x_BND = x.flatten(2).transpose(1, 2)
        if mask is not None:
            x_BND = torch.where(mask[..., None], self.mask_token.to(x_BND.dtype), x_BND)
        cls = self.cls_token.expand(len(x_BND), -1, -1)
        if self.pos_embed is not None:
            cls = cls + self.pos_embed[:, :1]
            x_BND = x_BND + self._positions(grid)
        registers = self.registers.expand(len(x_BND), -1, -1)
        return torch.cat([cls, registers, x_BND], 1), grid

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        assert self.pos_embed is not None
        return interpolate_positions(self.pos_embed[:, 1:], self.config, grid)


def interpolate_positions(table: Tensor, config: ViTConfig, grid: Sequence[int]) -> Tensor:
    """Learned positions on another grid: bicubic in 2D as transformers' DINOv2, trilinear in 3D; fp32.

    table    (1, N, D) of the patches of `config.grid`
    returns  (1, N', D) of the patches of `grid`
    """
    if tuple(grid) == config.grid:
        return table
    maps = table.float().transpose(1, 2).reshape(1, table.shape[2], *config.grid)
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    maps = functional.interpolate(maps, tuple(grid), mode=mode, align_corners=False, antialias=config.antialias)
    return maps.flatten(2).transpose(1, 2)
