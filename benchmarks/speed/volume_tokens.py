"""Whole volumes through a network of VoxelFM's size (random weights): time a token, attention's share, peak memory.

    python benchmarks/speed/volume_tokens.py [--patches 2000 25000] [--precision float32] [--repeats 1] >> RESULTS
    python benchmarks/speed/volume_tokens.py --plain [--patches 2000] [--repeats 3] >> RESULTS

Sizes run from small to large, so that the peak memory of a line is that of its size. Attention costs the square of the number
of tokens; what is left is the same work for every token, and `ms per token, attention apart` should not grow. `--plain` takes
turns with the same network whose attention is written out as a softmax of a matrix of all tokens by all tokens, as in VoxelFM's
code; at 25,000 patches that matrix and its softmax are 60 GB. `--blocks 1` asks for memory alone, in a twelfth of the time: a
pass needs as much in one block as in twelve, and the weights of those left out are added in a line of their own.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from measure import print_lines, take_turns
from torch import Tensor

from hilum.encode import vit
from hilum.encode.chunks import memory_estimate
from hilum.encode.encoder import Encoder
from hilum.encode.shape import SIZES, ViTConfig
from hilum.encode.volume_contract import VolumeContract

CONFIG = ViTConfig(
    size="voxelfm-base", patch=(14, 14, 14), image=(112, 112, 112), positions="rotary", num_registers=4, norm_eps=1e-5
)
GRIDS = {500: (5, 10, 10), 2000: (10, 10, 20), 8000: (20, 20, 20), 25000: (25, 25, 40)}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
attend: Attend = vit.attend


def plain(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """The whole matrix (B, H, N, N)."""
    weights = torch.softmax(q_BHND @ k_BHND.mT * q_BHND.shape[-1] ** -0.5, -1)
    return weights @ v_BHND


def operations(config: ViTConfig, num_tokens: int) -> tuple[float, float]:
    """Multiplications and additions of one pass: of attention itself, of all linear layers."""
    width, depth, _, _, hidden = SIZES[config.size]
    attention = depth * 4 * num_tokens**2 * width
    linear = depth * 2 * num_tokens * (4 * width**2 + 2 * width * hidden) + 2 * num_tokens * width * 14**3
    return attention, linear


class Clock:
    """Attention with the time it took."""

    def __init__(self, work: Attend) -> None:
        self.work, self.seconds = work, 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = time.perf_counter()
        out = self.work(q, k, v)
        self.seconds += time.perf_counter() - start
        return out


def run(encoder: Encoder, image: Tensor, work: Attend) -> tuple[float, float]:
    """Seconds of one pass, and of attention in it."""
    vit.attend = clock = Clock(work)  # type: ignore[assignment]
    start = time.perf_counter()
    encoder.tokens(image)
    return time.perf_counter() - start, clock.seconds


def weights_mib(config: ViTConfig) -> float:
    with torch.device("meta"):
        return sum(4 * p.numel() for p in vit.ViT(config).parameters()) / 2**20


def measure(encoder: Encoder, num_patches: int, repeats: int) -> None:
    grid = GRIDS[num_patches]
    image = torch.randn(1, 1, *(14 * n for n in grid))
    num_tokens = num_patches + 1 + CONFIG.num_registers
    times = [run(encoder, image, attend) for _ in range(repeats)]
    config = encoder.network.config
    attention, linear = operations(config, num_tokens)
    results = {
        "s per volume": [whole for whole, _ in times],
        "ms per token": [1e3 * whole / num_tokens for whole, _ in times],
        "ms per token, attention apart": [1e3 * (whole - part) / num_tokens for whole, part in times],
        "attention, % of time": [100 * part / whole for whole, part in times],
        "attention, % of operations": [100 * attention / (attention + linear)],
        "Gflop/s of attention": [attention / part / 1e9 for _, part in times],
        "Gflop/s of the rest": [linear / (whole - part) / 1e9 for whole, part in times],
        "estimated memory MiB, process apart": [
            memory_estimate(CONFIG, num_tokens, getattr(torch, encoder.precision)) / 2**20
        ],
        "weights left out MiB": [weights_mib(CONFIG) - weights_mib(config)],
    }
    print_lines(
        results,
        blocks=len(encoder.network.blocks),
        patches=num_patches,
        precision=encoder.precision,
        threads=torch.get_num_threads(),
    )


def compare(encoder: Encoder, num_patches: int, repeats: int) -> None:
    image = torch.randn(1, 1, *(14 * n for n in GRIDS[num_patches]))
    num_tokens = num_patches + 1 + CONFIG.num_registers
    ways = {"hilum": attend, "plain": plain}
    turns = {
        f"tokens/s, {name}": (lambda work=work: run(encoder, image, work), num_tokens) for name, work in ways.items()
    }
    results = take_turns(turns, repeats)  # type: ignore[arg-type]
    pairs = zip(results["tokens/s, hilum"], results["tokens/s, plain"])
    results["times faster than plain"] = [ours / theirs for ours, theirs in pairs]
    print_lines(results, patches=num_patches, precision=encoder.precision, threads=torch.get_num_threads())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", choices=GRIDS)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--blocks", type=int, default=12)
    given = parser.parse_args()
    torch.manual_seed(0)
    width, _, heads, kind, hidden = SIZES[CONFIG.size]
    config = replace(CONFIG, size=f"{width}x{given.blocks}x{heads}-{kind}{hidden}")
    encoder = Encoder(vit.ViT(config), VolumeContract(), "voxelfm", patch=config.patch, precision=given.precision)
    run(encoder, torch.randn(1, 1, 56, 56, 56), attend)  # warm
    for num_patches in sorted(given.patches or ([2000] if given.plain else [2000, 25000])):
        (compare if given.plain else measure)(encoder, num_patches, given.repeats)


if __name__ == "__main__":
    main()
