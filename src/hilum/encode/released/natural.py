"""Encoders of natural images (DINOv2, DINOv3, RAD-DINO) as transformers saves them, with a contract of their own for CT and MR.

The image processor of such a model says size, crop, resampling and constants, for images of 8 bits in three channels. What
it cannot say is how CT and MR become such an image: that is stated in `models.py`, with its source.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hilum.encode.contract import Contract
from hilum.encode.released.models import find_released, slice_contract
from hilum.encode.released.pull import read_pull
from hilum.encode.released.weights import build, read_weights
from hilum.encode.vit import ViT
from hilum.errors import ContractError
from hilum.records import read_json
from hilum.settings import from_dict

PROCESSORS = (
    "BitImageProcessor",
    "ViTImageProcessor",
    "DINOv3ViTImageProcessor",
    "SiglipImageProcessor",
    "Gemma3ImageProcessor",
)
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # numbers of Pillow


def read_natural(folder: Path) -> tuple[ViT, Contract, dict[str, Any]]:
    """Network, contract and report (`Weights.report`) of a folder with config.json, model.safetensors and
    preprocessor_config.json. The RGB kernels of the patch embedding are kept, since each channel has constants of its own.
    """
    weights = read_weights(folder, channels=None)
    contract = processor_contract(folder)
    check_sides(contract, weights.config.patch, weights.config.channels, folder)
    return build(ViT, weights.config, weights.state), contract, weights.report


def read_exported(folder: Path) -> tuple[ViT, Contract, dict[str, Any]]:
    """An encoder of ours in the layout of transformers (`hilum export`): its contract lies beside it as contract.json."""
    weights = read_weights(folder, channels=None)
    contract = from_dict(Contract, read_json(folder / "contract.json"), f"{folder}/contract.json")
    check_sides(contract, weights.config.patch, weights.config.channels, folder)
    return build(ViT, weights.config, weights.state), contract, weights.report


def check_sides(contract: Contract, patch: tuple[int, ...], channels: int, folder: Path) -> None:
    """ContractError when a contract and a network do not fit each other."""
    if any(contract.size_px % p for p in patch) or contract.channels != channels:
        raise ContractError(
            f"{folder}: the contract gives {contract.channels} channels of {contract.size_px} px; the network takes "
            f"{channels} channels in patches of {patch}"
        )


def processor_contract(folder: Path) -> Contract:
    """The contract of a folder: intensities by the table of models when `hilum pull` made the folder, else one wide CT window
    and percentiles; size, crop, resampling and constants by preprocessor_config.json, or by the table when it is not there.

    ContractError when the folder does not say what images are to be made.
    """
    path, values = folder / "preprocessor_config.json", slice_contract()
    released = None
    if pulled := read_pull(folder):
        released = find_released(str(pulled.get("repo")))
    if released is not None:
        values = dict(released.contract)
    if path.is_file():
        values |= read_processor(read_json(path), str(path))
    elif released is None:
        raise ContractError(f"{path} is missing, and without it nobody knows what images this model expects; add it")
    return from_dict(Contract, values, str(path))


def read_processor(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a contract that an image processor of transformers decides. ContractError lists what cannot be followed."""
    if not isinstance(config, Mapping):
        raise ContractError(f"{where} holds no table of settings; expected those of an image processor")
    faults = []
    kind = str(config.get("image_processor_type", config.get("feature_extractor_type"))).removesuffix("Fast")
    if kind not in PROCESSORS:
        faults.append(f"its type is {kind}; known are {', '.join(PROCESSORS)}")
    for name, wanted in (("do_resize", True), ("do_rescale", True), ("do_pad", False), ("do_pan_and_scan", False)):
        if bool(config.get(name, wanted) or False) != wanted:
            faults.append(f"{name} is {config[name]}")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(255 * factor - 1) > 1e-4:
        faults.append(f"rescale_factor is {factor}; expected 1/255")
    if config.get("resample") not in _RESAMPLING:
        faults.append(f"resample is {config.get('resample')}; expected 2 (bilinear) or 3 (bicubic)")
    mean, std = config.get("image_mean"), config.get("image_std")
    if config.get("do_normalize", True) is False:
        mean, std = [0.0] * 3, [1.0] * 3
    if not all(isinstance(v, list) and len(v) == 3 for v in (mean, std)):
        faults.append(f"image_mean is {mean}, image_std {std}; expected three numbers each")
    sized = _sized(config)
    if sized is None:
        faults.append(f"size {config.get('size')} with crop_size {config.get('crop_size')} gives no square of one size")
    if faults or sized is None:
        raise ContractError(f"{where} cannot be followed: {'; '.join(faults)}")
    return {**sized, "mean": mean, "std": std, "resampling": _RESAMPLING[config["resample"]], "channels": 3}


def _sized(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Stretch to a square, or short side and middle cut out; None for anything else."""
    size, crop = config.get("size"), config.get("crop_size") if config.get("do_center_crop") else None
    size = {"height": size, "width": size} if isinstance(size, int) else size or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {}
    if not isinstance(size, Mapping) or not isinstance(crop, Mapping):
        return None
    side = crop.get("height")
    if "shortest_edge" in size:
        square = side is not None and side == crop.get("width") and side <= size["shortest_edge"]
        return {"fit": "crop", "short_px": size["shortest_edge"], "size_px": side} if square else None
    square = size.get("height") is not None and size.get("height") == size.get("width")
    return {"fit": "stretch", "short_px": 0, "size_px": size["height"]} if square and crop in ({}, size) else None
