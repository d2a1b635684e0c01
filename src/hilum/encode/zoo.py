"""Encoders by name. A name is a folder with an exported encoder, or one of the baselines below."""

from pathlib import Path

import torch

from hilum.encode.encoder import Encoder, pixel_encoder, read_encoder, read_model_config
from hilum.encode.vit import ViT
from hilum.errors import UsageError

BASELINES = {
    "pixels": "raw pixels: 32×32 a slice, the 16×16 pixels of a patch",
    "random:FOLDER": "the transformer of FOLDER with weights drawn anew: what the architecture alone gives",
}


def load_encoder(name: str, *, device: str = "cpu", seed: int = 0) -> Encoder:
    """An encoder by folder or baseline name. UsageError lists what is known.

    seed   draws the weights of "random:FOLDER"
    """
    if name == "pixels":
        return pixel_encoder()
    kind, colon, folder = name.partition(":")
    if kind == "random" and colon:
        config, contract = read_model_config(Path(folder))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ViT(config)
        return Encoder(model, contract, f"random-{config.size}", patch=config.patch, device=device)
    if not Path(name).is_dir():
        known = ", ".join(BASELINES)
        raise UsageError(f"no encoder '{name}'; expected a folder with an exported encoder, or one of: {known}")
    return read_encoder(Path(name), device)
