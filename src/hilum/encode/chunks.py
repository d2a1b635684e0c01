"""Volumes that are too large for one pass: how much memory a pass needs, and the same features from overlapping blocks.

A block is encoded with the positions that its patches have in the whole volume, so that a patch sees its neighbours as
it would there; what it does not see is what lies outside the block. Where blocks overlap, patch tokens go over linearly
from one to the next.

How near that is to one pass depends on how far a network looks. Transformers with random weights and no LayerScale, whose
attention reaches everywhere, agree in a smooth volume cut into two to eight blocks to a cosine of 0.998 in the mean patch,
0.98 in the worst, and 0.97 in the class token (`tests/encode/test_chunks.py`). With one block the result is the same.
"""

import math
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hilum.encode.attention import SHORT_SEQUENCE
from hilum.encode.encoder import Encoder
from hilum.encode.shape import SIZES, ViTConfig
from hilum.encode.vit import Tokens, ViT, Window
from hilum.encode.volume_contract import PreparedVolume
from hilum.errors import UsageError

OVERLAP = 2  # patches


class Part(NamedTuple):
    """One block along one axis: its first patch and the share of each of its patches, which add up to 1 over all blocks."""

    start: int
    shares: torch.Tensor


def encode_prepared(
    encoder: Encoder, prepared: PreparedVolume, overlap: int = OVERLAP, most: int | None = None
) -> tuple[Tokens, tuple[str, ...]]:
    """Encode a volume in as few blocks as memory allows: one, where it can. Also says what was done, when it was not one.

    most  patches at once; None: what memory allows

    The estimate is compared with the memory that is free now; when memory runs out all the same, blocks of half the size are
    tried, down to the smallest that can overlap.
    """
    num_patches, smallest = math.prod(prepared.grid), (overlap + 1) ** len(prepared.grid)
    wanted = num_patches if most is None else min(num_patches, max(most, smallest))
    budget, available, notes = wanted, available_memory(encoder.device), []
    needed = _working_bytes(encoder, wanted)
    while budget > smallest and _working_bytes(encoder, budget) > available:
        budget = max(int(budget * 0.9), smallest)
    if budget < wanted:
        notes.append(f"{needed / 2**30:.1f} GiB needed for {wanted:,} patches at once, {available / 2**30:.1f} free")
    while True:
        try:
            tokens = encode_chunks(encoder, prepared, budget, overlap)
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or budget <= smallest:
                raise
        notes.append(f"out of memory with {budget:,} patches at once")
        budget = max(budget // 2, smallest)
    if budget < num_patches:
        num_blocks = math.prod(map(len, plan_blocks(prepared.grid, budget, overlap)))
        notes.append(f"encoded in {num_blocks} blocks of up to {budget:,} patches that overlap by {overlap}")
    return tokens, tuple(notes)


def encode_chunks(encoder: Encoder, prepared: PreparedVolume, budget: int, overlap: int = OVERLAP) -> Tokens:
    """Encode a volume in overlapping blocks of at most `budget` patches; in one pass when it has no more.

    overlap  patches that neighbouring blocks share, at least
    returns  tokens of the whole volume, (1, …). Patches: blended linearly where blocks overlap. Class token and registers:
             the mean over the blocks, each counted by the patches it stands for

    Raises UsageError when blocks of this budget cannot overlap so.
    """
    grid, image = prepared.grid, prepared.image[None]
    if math.prod(grid) <= budget:
        return encoder.tokens(image)
    cls = registers = patches = torch.zeros(0)
    for block in product(*plan_blocks(grid, budget, overlap)):
        voxels = image
        for axis, (part, p) in enumerate(zip(block, encoder.patch), 2):
            voxels = voxels.narrow(axis, part.start * p, len(part.shares) * p)
        tokens = encoder.tokens(voxels, Window(tuple(part.start for part in block), grid))
        z, y, x = (part.shares for part in block)
        shares = z[:, None, None, None] * y[:, None, None] * x[:, None]
        if not len(patches):
            patches = torch.zeros(*grid, tokens.patches.shape[-1])
            cls, registers = torch.zeros_like(tokens.cls), torch.zeros_like(tokens.registers)
        (k, j, i), (d, h, w) = (part.start for part in block), shares.shape[:3]
        patches[k : k + d, j : j + h, i : i + w] += shares * tokens.patches.view(d, h, w, -1)
        counted = float(shares.sum()) / math.prod(grid)
        cls, registers = cls + counted * tokens.cls, registers + counted * tokens.registers
    return Tokens(cls, registers, patches.flatten(0, 2)[None])


def plan_blocks(grid: tuple[int, ...], budget: int, overlap: int) -> list[list[Part]]:
    """Blocks along each axis, of one size and evenly spread: the longest side is divided until a block is within the budget."""
    counts = [1] * len(grid)

    def side(axis: int, count: int) -> int:
        return -(-(grid[axis] + (count - 1) * overlap) // count)

    sides = list(grid)
    while math.prod(sides) > budget:
        able = [axis for axis in range(len(grid)) if sides[axis] > overlap + 1]
        if not able:
            least = (overlap + 1) ** len(grid)
            raise UsageError(
                f"blocks of {budget} patches cannot overlap by {overlap}; expected a budget of {least} or more"
            )
        axis = max(able, key=lambda a: sides[a])
        while side(axis, counts[axis]) >= sides[axis]:
            counts[axis] += 1
        sides[axis] = side(axis, counts[axis])
    return [_spread(n, length, count) for n, length, count in zip(grid, sides, counts)]


def _spread(whole: int, length: int, count: int) -> list[Part]:
    """`count` blocks of `length` over `whole` patches; shares rise and fall linearly over what neighbours have in common."""
    starts = [round(n * (whole - length) / max(count - 1, 1)) for n in range(count)]
    shares = np.ones((count, length))
    for n, (first, second) in enumerate(pairwise(starts)):
        common = first + length - second
        rise = np.arange(1, common + 1) / (common + 1)
        shares[n + 1, :common] *= rise
        shares[n, length - common :] *= rise[::-1]
    total = np.zeros(whole)
    for start, share in zip(starts, shares):
        total[start : start + length] += share
    return [
        Part(start, torch.tensor(share / total[start : start + length], dtype=torch.float32))
        for start, share in zip(starts, shares)
    ]


# ---- memory


def memory_estimate(config: ViTConfig, num_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that weights and one forward pass take at their highest, besides the process itself.

    num_tokens  of the volume, class token and registers included
    dtype       of the encoder's precision
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in ViT(config).parameters()) * dtype.itemsize
    return weights + pass_bytes(config, num_tokens, dtype)


def pass_bytes(config: ViTConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one forward pass without gradients: the image in float32, and the larger of the two branches of a block.

    Attention holds the tokens three times in float32 (as they are, laid end to end, normalised), queries, keys and values, and
    either the rotated ones with the result, or the rotated queries with three float32 steps of the keys' rotation. The
    feed-forward part holds the tokens a fourth time, from before attention, and its hidden layer before and after the
    activation; in half precision its first product, which is summed in float32, needs half as much again. There is no matrix
    of all tokens by all tokens, except for short sequences.
    """
    width, _, heads, kind, hidden = SIZES[config.size]
    size = dtype.itemsize
    narrowed = width * size if size < 4 else 0  # what enters a branch in half precision
    attention = 12 * width + narrowed + 3 * width * size + max(3 * width * size, width * size + 12 * width)
    hidden *= 2 if kind == "mlp" else 4  # before and after the activation
    feed_forward = 16 * width + narrowed + (hidden * 3 if size < 4 else hidden * 4)
    matrix = 2 * heads * num_tokens * size if num_tokens <= SHORT_SEQUENCE else 0
    image = math.prod(config.patch) * config.channels * 4
    return num_tokens * (image + max(attention + matrix, feed_forward))


def available_memory(device: torch.device) -> int:
    """Bytes that are free for this process: of the device, or of the machine within the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [1 << 62]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) << 10)
    free.append(_free_in_container(Path("/sys/fs/cgroup")))
    return max(min(free), 0)


def _free_in_container(group: Path) -> int:
    """Bytes below the limit of a control group (version 2). Its files in the page cache count as used, but make way when memory
    is asked for, so they are free here, as in MemAvailable."""
    if not (group / "memory.max").is_file() or (limit := (group / "memory.max").read_text().strip()) == "max":
        return 1 << 62
    lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cached = int(lines["active_file"]) + int(lines["inactive_file"])
    return int(limit) - int((group / "memory.current").read_text()) + cached


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU torch says so with a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _working_bytes(encoder: Encoder, num_patches: int) -> int:
    """Of one pass, weights apart: they are there already. 0 for a network that is not our transformer."""
    network = encoder.network
    if not isinstance(network, ViT):
        return 0
    return pass_bytes(network.config, num_patches + network.num_prefix, getattr(torch, encoder.precision))
