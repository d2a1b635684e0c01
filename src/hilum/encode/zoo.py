"""Encoders by name: a folder, a released model that was pulled, or a baseline. Nothing is ever fetched here."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hilum.encode.encoder import Encoder, model_name, pixel_encoder, read_model_config
from hilum.encode.released.golden import check_golden
from hilum.encode.released.models import did_you_mean, find_released, is_pulled, is_repo, model_folder
from hilum.encode.released.pull import read_pull, verify
from hilum.encode.released.weights import build, read_weights
from hilum.encode.vit import ViT
from hilum.errors import ContractError, UsageError, WeightsAbsent
from hilum.records import read_json

BASELINES = {
    "pixels": "raw pixels: 32×32 a slice, the 16×16 pixels of a patch",
    "random:MODEL": "the network of MODEL with weights drawn anew: what the architecture alone gives",
}
# How a folder is read: module and function, (folder: Path) → network, contract, report. The network has `config.patch`.
LAYOUTS = {
    "curia": ("hilum.encode.released.curia", "read_curia"),
    "voxelfm": ("hilum.encode.released.voxelfm", "read_voxelfm"),
    "natural": ("hilum.encode.released.natural", "read_natural"),
    "siglip": ("hilum.encode.released.siglip", "read_siglip"),
    "exported": ("hilum.encode.released.natural", "read_exported"),
}


def load_encoder(
    name: str, *, device: str = "cpu", seed: int = 0, revision: str | None = None, precision: str = "float32"
) -> Encoder:
    """An encoder with its contract and the report of how its weights were loaded; checked against its golden features.

    name       a folder (of hilum, or of a released model), a released model by name or Hugging Face id, or a baseline
    seed       draws the weights of "random:MODEL"
    revision   of a released model, as it was pulled
    precision  of `Encoder`

    Raises UsageError (unknown name), WeightsAbsent (not pulled), ContractError (files changed, tensors missing or left over,
    features other than those that are stored beside the weights).
    """
    if name == "pixels":
        return pixel_encoder()
    kind, colon, model = name.partition(":")
    if kind == "random" and colon:
        return _random_encoder(model, device, seed, revision, precision)
    folder = locate(name, revision)
    encoder = open_folder(folder, device, precision)
    check_golden(encoder, folder)
    return encoder


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a model by name. A folder of that name goes before a released model."""
    if Path(name).is_dir():
        if revision is not None:
            raise UsageError(f"'{name}' is a folder and has no revisions; leave --revision out")
        return Path(name)
    if name == "pixels" or name.startswith("random:"):
        raise UsageError(f"'{name}' is a baseline and has no weights to fetch or to examine; it is for hilum embed")
    if find_released(name) is None and not (is_repo(name) and not Path(name).parent.is_dir()):
        raise UsageError(
            f"no encoder '{name}'; expected a folder with an encoder, a released model ({did_you_mean(name)}), a Hugging Face "
            f"id OWNER/NAME, or one of: {', '.join(BASELINES)}"
        )
    folder = model_folder(name, revision)
    if not is_pulled(folder):
        again = f" --revision {revision}" if revision else ""
        raise WeightsAbsent(f"{name} is no folder here and was not pulled; fetch it with: hilum pull {name}{again}")
    return folder


def open_folder(folder: Path, device: str = "cpu", precision: str = "float32") -> Encoder:
    """The encoder of a folder, its files checked against pull.json when there is one."""
    verify(folder)
    layout = layout_of(folder)
    if layout == "hilum":
        config, contract = read_model_config(folder)
        _, state, report = read_weights(folder)
        network: Any = build(ViT, config, state)
        name = model_name(folder)
    else:
        module, function = LAYOUTS[layout]
        network, contract, report = getattr(importlib.import_module(module), function)(folder)
        pulled = read_pull(folder)
        name = f"{pulled['name']}@{pulled['revision'][:8]}" if pulled else f"{folder.name}@{report['hash'][:8]}"
    patch = network.config.patch
    return Encoder(network, contract, name, patch=patch, device=device, report=report, precision=precision)


def layout_of(folder: Path) -> str:
    """ "hilum", or a key of LAYOUTS: as the table says for a pulled model, else by what the folder's config says."""
    released = find_released(str(read_pull(folder).get("repo")))
    if released is not None:
        return released.layout
    if any((folder / path).is_file() for path in ("config.yaml", "vitb_3d/config.yaml")):
        return "voxelfm"
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"'{folder}' is no encoder; expected a folder with config.json and model.safetensors, as hilum pretrain writes to "
            "RUN/export and as transformers saves them, or with VoxelFM's config.yaml"
        )
    config: Any = read_json(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    kind = config.get("model_type")
    if kind is None:
        return "hilum"  # whose reader says what is wrong
    if (folder / "contract.json").is_file():
        return "exported"
    if kind == "dinov2" and config.get("num_channels") == 1:
        return "curia"
    if kind in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        return "natural"
    if kind in ("siglip", "siglip_vision_model", "gemma3"):
        return "siglip"
    raise ContractError(
        f"{folder}/config.json is of model_type '{kind}'; known are dinov2, dinov2_with_registers, dinov3_vit, siglip, "
        "siglip_vision_model and gemma3"
    )


def _random_encoder(model: str, device: str, seed: int, revision: str | None, precision: str) -> Encoder:
    folder = locate(model, revision)
    config: Any
    kind: type[nn.Module] = ViT
    if layout_of(folder) == "hilum":
        config, contract = read_model_config(folder)
        name = config.size
    else:
        trained = open_folder(folder)
        config, contract, kind, name = trained.network.config, trained.contract, type(trained.network), trained.name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(config)
    return Encoder(network, contract, f"random-{name}", patch=config.patch, device=device, precision=precision)
