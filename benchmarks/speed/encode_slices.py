"""How fast slices are encoded, beside transformers running the same weights.

    python benchmarks/speed/encode_slices.py [--px 512] [--layer-scale 1] >> benchmarks/results/encode_MACHINE_DATE.jsonl

A transformer of Curia's size (ViT-B/16, SwiGLU, one channel) with random weights is saved by transformers and read by us. Each
round runs: transformers as it loads (float32), transformers in bfloat16, ours in both. The limit is the rate of one large
bfloat16 matrix product, measured in the same rounds; the share of it counts linear layers and attention.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from measure import print_lines, take_turns
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder
from hilum.encode.released.weights import read_weights
from hilum.encode.vit import ViT

FEW = 4  # slices whose features are compared


def make_peers(folder: Path, px: int, layer_scale: float) -> dict[str, Dinov2Model]:
    """transformers' model in both precisions, saved for us."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, image_size=px, patch_size=16,
        num_channels=1, use_swiglu_ffn=True, layerscale_value=layer_scale,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder)
    return {
        "transformers float32": Dinov2Model.from_pretrained(folder).eval(),
        "transformers bfloat16": Dinov2Model.from_pretrained(folder, dtype=torch.bfloat16).eval(),
    }


def make_ours(folder: Path, px: int, precision: str) -> Encoder:
    weights = read_weights(folder)
    network = ViT(weights.config)
    network.load_state_dict(weights.state)
    return Encoder(network, Contract(size_px=px), precision, patch=(16, 16), precision=precision)


def multiply(a: torch.Tensor, b: torch.Tensor) -> None:
    with torch.inference_mode():
        functional.linear(a, b)


def run_peer(model: Dinov2Model, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images).last_hidden_state.float()


def agreement(tokens_BND: torch.Tensor, exact_BND: torch.Tensor) -> dict[str, float]:
    """Smallest cosine over tokens, and over vectors of slices: class token, mean of the patch tokens."""
    pairs = {
        "tokens": (tokens_BND, exact_BND),
        "class token": (tokens_BND[:, 0], exact_BND[:, 0]),
        "mean patch token": (tokens_BND[:, 1:].mean(1), exact_BND[:, 1:].mean(1)),
    }
    found = {
        f"cosine, {n}": round(float(functional.cosine_similarity(*pair, -1).min()), 6) for n, pair in pairs.items()
    }
    return found | {"largest difference": float((tokens_BND - exact_BND).abs().max())}


def flops(px: int) -> float:
    """Of one slice: linear layers (twice their weights a token) and attention."""
    tokens, width, hidden, depth = (px // 16) ** 2 + 1, 768, 2048, 12
    return depth * (2 * tokens * (4 * width**2 + 3 * width * hidden) + 4 * tokens**2 * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layer-scale", type=float, default=1.0, help="1: rounding of every block counts in full")
    given = parser.parse_args()
    images = torch.randn(max(given.batch, FEW), 1, given.px, given.px)
    batch = images[: given.batch]
    with tempfile.TemporaryDirectory() as folder:
        peers = make_peers(Path(folder), given.px, given.layer_scale)
        ours = {name: make_ours(Path(folder), given.px, name) for name in ("float32", "bfloat16")}
    exact = run_peer(peers["transformers float32"], images[:FEW])
    half = run_peer(peers["transformers bfloat16"], images[:FEW].bfloat16())
    found = {name: encoder.tokens(images[:FEW]) for name, encoder in ours.items()}
    tokens = {f"ours {name}": torch.cat([t.cls[:, None], t.patches], 1) for name, t in found.items()}
    for name, value in (tokens | {"transformers bfloat16": half}).items():
        print(
            json.dumps(
                agreement(value, exact)
                | {"what": f"{name} against transformers float32", "layer scale": given.layer_scale}
            )
        )
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    steps = {
        f"{name}, slices/s": (partial(run_peer, model, batch.to(model.dtype)), given.batch)
        for name, model in peers.items()
    }
    steps |= {f"ours {name}, slices/s": (partial(encoder.tokens, batch), given.batch) for name, encoder in ours.items()}
    steps["bfloat16 product, TFLOP/s"] = (partial(multiply, a, b), 2 * 2048**3 / 1e12)
    take_turns(steps, 1)  # warm up
    rates = take_turns(steps, given.repeats)
    fast, default, half = (
        rates[f"{n}, slices/s"] for n in ("ours bfloat16", "transformers float32", "transformers bfloat16")
    )
    rates["ours bfloat16 / transformers float32"] = [x / y for x, y in zip(fast, default)]
    rates["ours bfloat16 / transformers bfloat16"] = [x / y for x, y in zip(fast, half)]
    limit = max(rates["bfloat16 product, TFLOP/s"])
    rates["ours bfloat16, share of the product's rate"] = [x * flops(given.px) / 1e12 / limit for x in fast]
    print_lines(rates, px=given.px, batch=given.batch, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
