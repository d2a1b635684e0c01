"""One vision transformer for slices and volumes.

Axes in names: B batch, N tokens, D width, H heads, T tokens of all crops of a batch laid end to end.
A token sequence is [class, registers, patches]; patches run through the grid in C order. Images of several sizes go
through the linear layers as one long matrix and through attention one size at a time, so a multi-crop batch costs one
pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hilum.encode.attention import attend
from hilum.encode.shape import SIZES, ViTConfig
from hilum.errors import UsageError


class Tokens(NamedTuple):
    """What comes out, after the final LayerNorm: cls (B, D), registers (B, R, D), patches (B, N, D)."""

    cls: Tensor
    registers: Tensor
    patches: Tensor


class Window(NamedTuple):
    """A block of a larger image: its first patch, and the patches of the whole, along each axis."""

    start: tuple[int, ...]
    whole: tuple[int, ...]


Shapes = Sequence[tuple[int, int]]  # (samples, tokens) of each crop size in a packed (T, D)
Kept = list[Tensor] | None  # sample numbers of each crop size


class LayerScale(nn.Module):
    """A factor for each channel of a branch (Touvron 2021), folded into the branch's last linear layer: one pass over the
    tokens less, forward and backward. Without an initial value it is the identity and has no parameter."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial)) if initial else None

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """gamma · layer(x)"""
        if self.gamma is None:
            out: Tensor = layer(x)
            return out
        return functional.linear(x, layer.weight * self.gamma[:, None], layer.bias * self.gamma)

    @torch.no_grad()
    def fold(self, layer: nn.Linear) -> None:
        """Put gamma into `layer` for good: the same function without this module's parameter."""
        if self.gamma is not None:
            layer.weight.mul_(self.gamma[:, None])
            layer.bias.mul_(self.gamma)
            self.gamma = None


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, shapes: Shapes, rotations: Sequence[Tensor | None], scale: LayerScale) -> Tensor:
        qkv = self.qkv(x_TD)
        outs, start = [], 0
        for (b, n), rotation in zip(shapes, rotations):
            part = qkv[start : start + b * n].view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q_BHND, k_BHND, v_BHND = part.unbind(0)
            if rotation is not None:
                q_BHND, k_BHND = rotate(q_BHND, rotation), rotate(k_BHND, rotation)
            out = attend(q_BHND, k_BHND, v_BHND)
            outs.append(out.transpose(1, 2).reshape(b * n, -1))
            start += b * n
        return scale.linear(joined(outs), self.proj)


class FeedForward(nn.Module):
    """An MLP with GELU, or SwiGLU: `w3(silu(a) · b)` with (a, b) the halves of one product (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, kind: Literal["mlp", "swiglu"]) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        self.fc1 = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, scale: LayerScale) -> Tensor:
        half = self.fc1.weight.dtype == torch.bfloat16
        if self.gated and half and not torch.is_grad_enabled():  # two products and no copies: a tenth faster on a CPU
            x = x.to(torch.bfloat16)
            halves = zip(self.fc1.weight.chunk(2), self.fc1.bias.chunk(2))
            gate, h = (functional.linear(x, weight, bias) for weight, bias in halves)
            h = functional.silu(gate, inplace=True).mul_(h)
        elif self.gated:
            a, b = self.fc1(x).chunk(2, -1)
            h = functional.silu(a) * b
        else:
            h = functional.gelu(self.fc1(x))
        return scale.linear(h, self.fc2)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a scaled residual that may skip samples."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, _, heads, kind, hidden = SIZES[config.size]
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, config.layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = FeedForward(width, hidden, kind)
        self.ls2 = LayerScale(width, config.layer_scale)

    def forward(self, xs: list[Tensor], rotations: Sequence[Tensor | None], kept: Kept, kept_mlp: Kept) -> list[Tensor]:
        """xs: crops of one size each, (B, N, D); kept, kept_mlp: which samples of each enter a branch, None for all."""
        xs = add_residual(xs, lambda x, shapes: self.attn(self.norm1(x), shapes, rotations, self.ls1), kept)
        return add_residual(xs, lambda x, _: self.mlp(self.norm2(x), self.ls2), kept_mlp)

    def fold_layer_scale(self) -> None:
        """For inference; `state_dict` has no LayerScale afterwards."""
        self.ls1.fold(self.attn.proj)
        self.ls2.fold(self.mlp.fc2)


def joined(parts: list[Tensor]) -> Tensor:
    """End to end; one alone is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def add_residual(xs: list[Tensor], branch: Callable[[Tensor, Shapes], Tensor], kept: Kept) -> list[Tensor]:
    """`x + branch(x)` for crops of several sizes laid end to end, the branch computed on some samples only.

    xs       crops of one size each, (B, N, D)
    branch   (T, D) and the (B, N) of each size → (T, D)
    kept     samples of each size that enter; their branch counts B/kept-fold, so that over random subsets the expectation is
             the full residual (batch-subset stochastic depth, DINOv2). None: all of them
    """
    inputs = xs if kept is None else [x[index] for x, index in zip(xs, kept)]
    shapes = [(x.shape[0], x.shape[1]) for x in inputs]
    out = branch(joined([x.flatten(0, 1) for x in inputs]), shapes)
    if not torch.is_grad_enabled() and kept is None and len(xs) == 1:
        return [xs[0].add_(out.view_as(xs[0]))]
    parts = [p.view(b, n, -1) for p, (b, n) in zip(out.split_with_sizes([b * n for b, n in shapes]), shapes)]
    if kept is None:
        return [x + part for x, part in zip(xs, parts)]
    return [
        x.index_add(0, index, part.to(x.dtype), alpha=len(x) / len(index)) for x, index, part in zip(xs, kept, parts)
    ]


def sample_kept(
    sizes: Sequence[int], rate: float, num_branches: int, generator: torch.Generator | None, device: torch.device
) -> list[list[Tensor]]:
    """For each branch and each crop size of B samples, max(⌊B(1 − rate)⌋, 1) of them at random."""
    counts = [max(int(size * (1 - rate)), 1) for size in sizes]
    drawn = [
        torch.randperm(size, generator=generator)[:count]
        for _ in range(num_branches)
        for size, count in zip(sizes, counts)
    ]
    flat = torch.cat(drawn).to(device, non_blocking=True)  # one transfer
    parts = flat.split_with_sizes(counts * num_branches)
    return [list(parts[n * len(sizes) : (n + 1) * len(sizes)]) for n in range(num_branches)]


def make_rotation(
    grid: Sequence[int],
    head_dim: int,
    num_prefix: int,
    device: torch.device,
    rescale: float = 1.0,
    window: Window | None = None,
) -> Tensor:
    """Cosines and sines that rotate queries and keys by their place in the grid.

    grid      patches along each axis
    rescale   factor on all coordinates
    window    where the grid lies in a larger one, whose coordinates it then has
    returns   (2, num_prefix + N, R): R = the largest multiple of 2·axes within head_dim; prefix tokens are not turned

    DINOv3: patch centres in [-1, 1] per axis, periods 100^(2i/(R/axes)), angle 2π·x/period; kept in fp32.
    """
    periods = head_dim // (2 * len(grid))
    i = torch.arange(periods, dtype=torch.float32, device=device)
    period = 100.0 ** (i / periods)
    starts, wholes = window or ((0,) * len(grid), grid)
    lines = [
        rescale * ((torch.arange(start, start + n, dtype=torch.float32, device=device) + 0.5) / whole * 2 - 1)
        for start, n, whole in zip(starts, grid, wholes)
    ]
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
    """The transformer. Call it with one image batch, or `encode_crops` with several sizes at once.

    recompute   in training, keep only the input of each block and compute the rest again in the backward pass
    """

    recompute = False

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
        if not self.cls_token.is_meta:  # where there is nothing to draw, and torch would load its compiler to do so
            self.reset_parameters()

    @property
    def num_prefix(self) -> int:
        return 1 + self.config.num_registers

    def reset_parameters(self) -> None:
        """DINOv2: linear and position weights truncated normal .02, class token 1e-6, biases and mask token zero.

        Rotary positions add nothing to the class, register and mask tokens, and the first LayerNorm divides by their deviation:
        near zero their gradient drowns all others. So they begin at .02 there (DINOv3: class token and registers).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        std = 1e-6 if self.config.positions == "learned" else 0.02
        nn.init.normal_(self.cls_token, std=std)
        nn.init.normal_(self.registers, std=std)
        if self.config.positions == "rotary":
            nn.init.normal_(self.mask_token, std=std)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, window: Window | None = None) -> Tokens:
        """images (B, C, Y, X) or (B, C, Z, Y, X), sides multiples of the patch → tokens of the last layer.

        window  the images are this block of larger ones: their patches have the positions that they have there
        """
        return self.encode_crops([images], [None], window=window)[0]

    def encode_crops(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None = None,
        window: Window | None = None,
    ) -> list[Tokens]:
        """Encode crops of several sizes in one pass.

        crops      one batch a size, (B, C, …)
        masks      for each, None or (B, N) bool: those patches are replaced by the mask token
        generator  CPU generator of what training draws: samples that skip a branch, scale of rotary coordinates
        window     where all crops lie in larger images
        """
        embedded = [self._embed(images, mask, window) for images, mask in zip(crops, masks)]
        xs, grids = [e[0] for e in embedded], [e[1] for e in embedded]
        rotations = self._rotations(grids, xs[0].device, generator, window)
        rate = self.config.drop_path if self.training else 0.0
        kept: Sequence[Kept] = [None] * (2 * len(self.blocks))
        if rate:
            kept = sample_kept([len(x) for x in xs], rate, 2 * len(self.blocks), generator, xs[0].device)
        for number, block in enumerate(self.blocks):
            arguments = (xs, rotations, *kept[2 * number : 2 * number + 2])
            recompute = self.recompute and self.training
            xs = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        return [self._tokens(x) for x in xs]

    def layers(self, images: Tensor, numbers: Sequence[int]) -> list[Tokens]:
        """Tokens after chosen blocks, each through the final LayerNorm (as DINOv2's get_intermediate_layers does).

        numbers  of blocks, from 0 or, below 0, from the end; UsageError when there is no such block
        """
        depth = len(self.blocks)
        if wrong := [n for n in numbers if not -depth <= n < depth]:
            raise UsageError(f"no layer {wrong[0]}; this encoder has {depth}, numbered -{depth} to {depth - 1}")
        x, grid = self._embed(images, None)
        rotations = self._rotations([grid], x.device, None)
        found = {}
        for number, block in enumerate(self.blocks):
            (x,) = block([x], rotations, None, None)
            if number in numbers or number - depth in numbers:
                found[number] = self._tokens(x)
        return [found[number % depth] for number in numbers]

    def _tokens(self, x: Tensor) -> Tokens:
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, 1 : self.num_prefix], x[:, self.num_prefix :])

    def _rotations(
        self,
        grids: Sequence[tuple[int, ...]],
        device: torch.device,
        generator: torch.Generator | None,
        window: Window | None = None,
    ) -> list[Tensor | None]:
        if self.config.positions != "rotary":
            return [None] * len(grids)
        rescale = 1.0
        if self.training and self.config.rope_rescale > 1:
            rescale = self.config.rope_rescale ** (2 * float(torch.rand((), generator=generator)) - 1)
        return [make_rotation(grid, self.head_dim, self.num_prefix, device, rescale, window) for grid in grids]

    def _embed(
        self, images: Tensor, mask: Tensor | None, window: Window | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        if any(s % p for s, p in zip(images.shape[2:], self.config.patch)):
            raise UsageError(f"image sides {tuple(images.shape[2:])} are no multiples of the patch {self.config.patch}")
        grid = tuple(s // p for s, p in zip(images.shape[2:], self.config.patch))
        x_BND = self._project(images, grid)
        if mask is not None:
            x_BND = torch.where(mask[..., None], self.mask_token.to(x_BND.dtype), x_BND)
        cls = self.cls_token.expand(x_BND.shape[0], -1, -1)  # len() would fix the batch size in an export
        if self.pos_embed is not None:
            cls = cls + self.pos_embed[:, :1]
            x_BND = x_BND + self._positions(grid, window)
        registers = self.registers.expand(x_BND.shape[0], -1, -1)
        return torch.cat([cls, registers, x_BND], 1), grid

    def _project(self, images: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The patch embedding, (B, N, D): a convolution whose kernels do not overlap is a matrix product, which is faster."""
        sides = [number for pair in zip(grid, self.config.patch) for number in pair]
        axes = len(grid)
        images = images.to(self.patch_embed.weight.dtype)  # a network in bf16 takes images in fp32
        x = images.reshape(*images.shape[:2], *sides)  # (B, C, rows, py, columns, px)
        x = x.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)).flatten(1 + axes).flatten(1, axes)
        return functional.linear(x, self.patch_embed.weight.flatten(1), self.patch_embed.bias)

    def _positions(self, grid: tuple[int, ...], window: Window | None = None) -> Tensor:
        assert self.pos_embed is not None
        if window is None:
            return interpolate_positions(self.pos_embed[:, 1:], self.config, grid)
        table = interpolate_positions(self.pos_embed[:, 1:], self.config, window.whole)
        table = table.view(*window.whole, -1)
        for axis, (start, n) in enumerate(zip(window.start, grid)):
            table = table.narrow(axis, start, n)
        return table.flatten(0, -2)[None]


def interpolate_positions(table: Tensor, config: ViTConfig, grid: Sequence[int]) -> Tensor:
    """Learned positions on another grid: bicubic in 2D as transformers' DINOv2, trilinear in 3D, computed in fp32.

    table    (1, N, D) of the patches of `config.grid`
    returns  (1, N', D) of the patches of `grid`
    """
    if tuple(grid) == config.grid:
        return table
    maps = table.float().transpose(1, 2).reshape(1, table.shape[2], *config.grid)
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    maps = functional.interpolate(maps, tuple(grid), mode=mode, align_corners=False, antialias=config.antialias)
    return maps.flatten(2).transpose(1, 2).to(table.dtype)
