"""A volume in overlapping blocks against one pass: cosines by number of blocks and overlap, on a scan of yours.

    python benchmarks/quality/chunked_whole.py SCAN [SCAN …] --model MODEL [--spacing 1.5] [--patch 16] >> RESULTS

MODEL is an encoder of volumes, an encoder of slices (its weights are inflated: `hilum.encode.inflate`), or "random", a drawn
6-block transformer without LayerScale, whose attention reaches everywhere. VoxelFM's paper says that chunked inference is
"comparable" to whole volumes (section 2.9) and prints no number. Of each line:

    cls      cosine of the class tokens
    mean     of the means of the patch tokens
    patch    mean over patch tokens of their cosines; worst: the smallest
    rel      ‖difference of patch tokens‖ / ‖patch tokens − their mean‖: what blocks cost beside what tells patches apart
    others   cosine of the class tokens (and of the mean patches) of different scans, in one pass: what a difference means
"""

import argparse
import json
import math
import time
from itertools import combinations
from pathlib import Path

import torch
from torch.nn import functional

import hilum
from hilum.encode.chunks import encode_chunks, plan_blocks
from hilum.encode.encoder import Encoder
from hilum.encode.inflate import inflate
from hilum.encode.vit import Tokens, ViT, ViTConfig
from hilum.encode.volume_contract import PreparedVolume, VolumeContract, prepare_volume
from hilum.errors import UsageError
from hilum.records import machine, versions
from hilum.settings import to_dict

SHARES, OVERLAPS = (1.0, 0.75, 0.5, 0.25, 0.125), (0, 2, 4)


def encoder_of(model: str, side: int, spacing: float) -> tuple[Encoder, str]:
    """An encoder of volumes, and what it is."""
    patch, sides = (side,) * 3, (8 * side,) * 3
    contract = VolumeContract(patch=(side, side, side), min_spacing_mm=spacing)
    if model == "random":
        torch.manual_seed(0)
        config = ViTConfig(size="tiny", patch=patch, image=sides, positions="rotary", num_registers=4, layer_scale=1.0)
        return Encoder(ViT(config), contract, "random", patch=patch), "random"
    found = hilum.load_encoder(model)
    if isinstance(found.contract, VolumeContract):
        return found, found.name
    flat = found.network
    assert isinstance(flat, ViT)
    settings = to_dict(flat.config) | {
        "patch": (flat.config.patch[0], *flat.config.patch),
        "image": sides,
        "antialias": False,
    }
    network = ViT(ViTConfig(**settings))
    network.load_state_dict(inflate(flat.state_dict(), flat.config, network.config))
    contract = VolumeContract(patch=network.config.patch, min_spacing_mm=spacing)  # type: ignore[arg-type]
    return Encoder(network, contract, found.name, patch=network.config.patch), f"{found.name}, inflated"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(functional.cosine_similarity(a, b, dim=-1).mean())


def compare(
    encoder: Encoder, prepared: PreparedVolume, whole: Tokens, share: float, overlap: int
) -> dict[str, float] | None:
    """None where blocks of this share of the volume cannot overlap so."""
    budget = math.ceil(math.prod(prepared.grid) * share)
    try:
        blocks = math.prod(map(len, plan_blocks(prepared.grid, budget, overlap)))
    except UsageError:
        return None
    start = time.perf_counter()
    found = encode_chunks(encoder, prepared, budget, overlap)
    seconds = time.perf_counter() - start
    each = functional.cosine_similarity(found.patches, whole.patches, dim=-1)
    spread = (whole.patches - whole.patches.mean(1, keepdim=True)).norm()
    return {
        "budget": budget, "blocks": blocks, "overlap": overlap, "cls": cosine(found.cls, whole.cls),
        "mean": cosine(found.patches.mean(1), whole.patches.mean(1)), "patch": float(each.mean()), "worst": float(each.min()),
        "rel": float((found.patches - whole.patches).norm() / spread), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path, nargs="+")
    parser.add_argument("--model", default="random")
    parser.add_argument("--patch", type=int, default=8, help="of a random encoder")
    parser.add_argument("--spacing", type=float, default=1.5, help="mm, of a random or an inflated encoder")
    given = parser.parse_args()
    encoder, about = encoder_of(given.model, given.patch, given.spacing)
    assert isinstance(encoder.contract, VolumeContract)
    facts = {"what": "chunked against whole", "model": about, "date": time.strftime("%Y-%m-%d")}
    wholes = []
    for number, path in enumerate(given.scans):
        prepared = prepare_volume(hilum.read(path), encoder.contract)
        start = time.perf_counter()
        whole = encoder.tokens(prepared.image[None])
        seconds = round(time.perf_counter() - start, 3)
        wholes.append(whole)
        scan = {"scan": number, "grid": prepared.grid, "whole_seconds": seconds}
        for share in SHARES:
            for overlap in OVERLAPS if share < 1 else (0,):
                line = compare(encoder, prepared, whole, share, overlap)
                if line is not None:
                    rounded = {name: round(value, 5) for name, value in line.items()}
                    print(
                        json.dumps(facts | scan | rounded | {"machine": machine(), "versions": versions()}), flush=True
                    )
    for (i, a), (j, b) in combinations(enumerate(wholes), 2):
        others = [round(cosine(a.cls, b.cls), 5), round(cosine(a.patches.mean(1), b.patches.mean(1)), 5)]
        print(json.dumps(facts | {"scans": [i, j], "others": others}), flush=True)


if __name__ == "__main__":
    main()
