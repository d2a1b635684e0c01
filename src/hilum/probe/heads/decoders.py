"""From a box of patch tokens to class logits on a finer grid: two light convolutional decoders."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hilum.probe.heads.tokens import CaseTokens

Grid = tuple[int, int, int]
BANDS = 2  # of sines and cosines of a place
PLACES = 3 * (1 + 2 * BANDS)  # channels of `token_places`
NORM_GROUPS = 8


class PatchDecoder(nn.Module):
    """Each token answers for the cells it covers: a linear map of the token to `upscale` cells along each axis, refined by
    residual blocks (convolution over neighbouring tokens, GroupNorm, ReLU) that begin at 0.

    All convolutions are on the grid of tokens, so that fine cells cost next to nothing. Tokens of slices are not upscaled
    across slices, but their convolutions do look at the slices beside.
    """

    def __init__(self, tokens: int, width: int, blocks: int, classes: int, upscale: Grid) -> None:
        super().__init__()
        self.upscale, self.classes = upscale, classes
        cells = classes * math.prod(upscale)
        self.linear = nn.Conv3d(tokens, cells, 1)
        self.first = nn.Conv3d(tokens, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, width, 3, padding=1), nn.GroupNorm(min(NORM_GROUPS, width), width), nn.ReLU()
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv3d(width, cells, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, k, j, i) → (B, C, k · upscale[0], …)."""
        hidden = functional.relu(self.first(x))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        found: Tensor = self.linear(x) + self.last(hidden)
        batch, (k, j, i), (a, b, c) = len(x), x.shape[2:], self.upscale
        found = found.reshape(batch, self.classes, a, b, c, k, j, i).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return found.reshape(batch, self.classes, k * a, j * b, i * c)


class ResizeDecoder(nn.Module):
    """VoxelFM's: 1×1×1 convolution to `width`; blocks of twice (convolution, GroupNorm, ReLU), each followed by a step of
    resizing towards the output grid; 1×1×1 convolution to the classes. The last block has no norm. Of slices all is done
    within the plane. Theirs: width 64, three blocks, 8³ tokens to 112³ cells: 727,094 weights for 118 classes at width 864.
    """

    def __init__(self, tokens: int, width: int, blocks: int, classes: int, upscale: Grid, planar: bool) -> None:
        super().__init__()
        self.upscale = upscale
        kernel, pad = ((1, 3, 3), (0, 1, 1)) if planar else ((3, 3, 3), (1, 1, 1))
        self.first = nn.Conv3d(tokens, width, 1)
        parts: list[nn.Module] = []
        for block in range(blocks):
            for _ in range(2):
                norm = nn.GroupNorm(min(NORM_GROUPS, width), width) if block < blocks - 1 else nn.Identity()
                parts.append(nn.Sequential(nn.Conv3d(width, width, kernel, padding=pad, bias=False), norm, nn.ReLU()))
        self.blocks = nn.ModuleList(parts)
        self.last = nn.Conv3d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, k, j, i) → (B, C, k · upscale[0], …)."""
        start = tuple(x.shape[2:])
        output = [n * up for n, up in zip(start, self.upscale)]
        x = self.first(x)
        number = len(self.blocks) // 2
        for block in range(number):
            x = self.blocks[2 * block + 1](self.blocks[2 * block](x))
            size = [round(n + (block + 1) / number * (wanted - n)) for n, wanted in zip(start, output)]
            if tuple(x.shape[2:]) != tuple(size):
                x = functional.interpolate(x, size, mode="trilinear", align_corners=False)
        found: Tensor = self.last(x)
        return found


def token_places(case: CaseTokens, start: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
    """(PLACES, k, j, i): where the tokens of a box lie in their scan.

    LPS coordinates, -1 to 1 between the outermost tokens of the scan, whatever way its axes run; then sines and cosines of
    π and 2π times these, so that a convolution of few layers can tell a place from its neighbours.
    """
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in case.grid], [1], indexing="ij")).reshape(4, -1)
    edge = (case.affine @ corners)[:3]
    low, high = edge.min(1), edge.max(1)
    axes = [np.arange(first, first + n) for first, n in zip(start, size)]
    index = np.stack([*np.meshgrid(*axes, indexing="ij"), np.ones(tuple(size))]).reshape(4, -1)
    spread = np.where(high > low, high - low, 1)[:, None]
    at = 2 * ((case.affine @ index)[:3] - low[:, None]) / spread - (high > low)[:, None]
    waves = [wave(np.pi * 2**band * at) for band in range(BANDS) for wave in (np.sin, np.cos)]
    places: NDArray[np.float32] = np.concatenate([at, *waves]).reshape(PLACES, *size).astype(np.float32)
    return places
