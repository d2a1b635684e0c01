"""Curia and Curia-2 (Raidium): vision transformers for slices of CT and MR, as transformers saves DINOv2.

A release is a folder with config.json (model_type dinov2, one channel), model.safetensors and preprocessor_config.json of
its processor, `CuriaImageProcessor`. The processor's code is not needed: what it does to a NumPy slice is a contract of
ours, bit for bit. No windowing; CT in Hounsfield units, MR as stored.
"""

from pathlib import Path
from typing import Any, Literal

from hilum.encode.contract import Contract
from hilum.encode.released.weights import build, read_weights
from hilum.encode.vit import ViT
from hilum.errors import ContractError
from hilum.records import read_json

PROCESSOR = "CuriaImageProcessor"

# Settings of the processor with their defaults. Two of them do nothing to a NumPy slice: `clip_below_air` cuts at -1000 after
# the division by 32767, and `do_normalize` is never read, the slice is always normalised.
_SETTINGS: dict[str, Any] = {
    "crop_size": 512,
    "clip_below_air": False,
    "eps": 1e-6,
    "do_resize": True,
    "do_normalize": True,
}
_NAMES = ("auto_map", "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class")


def curia_contract(
    preprocessor_config: dict[str, Any], *, statistics: Literal["slice", "volume"] = "slice"
) -> Contract:
    """What the released processor does, as a contract.

    preprocessor_config  content of preprocessor_config.json; {} takes the processor's defaults
    statistics           "slice": each slice by its own mean and deviation, as for a list of slices (feature extraction);
                         "volume": all slices of a scan by one, as for an (H, W, S) array (CuriaBench's 3D tasks). The
                         features differ.

    ContractError names settings that are unknown, of another processor, or that this contract cannot keep.
    """
    if not isinstance(preprocessor_config, dict):
        raise ContractError("preprocessor_config.json holds no table of settings; expected those of a Curia release")
    config = _SETTINGS | preprocessor_config
    faults = [f"unknown setting {name}" for name in sorted(config.keys() - _SETTINGS.keys() - set(_NAMES))]
    kind = config.get("image_processor_type", PROCESSOR)
    if kind != PROCESSOR:
        faults.append(f"image_processor_type is {kind}, expected {PROCESSOR}")
    size, eps = config["crop_size"], config["eps"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        faults.append(f"crop_size is {size!r}, expected a whole number of pixels")
    if not isinstance(eps, int | float) or isinstance(eps, bool) or eps < 0:
        faults.append(f"eps is {eps!r}, expected a number")
    if config["do_resize"] is not True:
        faults.append("do_resize is off, but slices must have one size")
    if faults:
        raise ContractError(f"preprocessor_config.json is not that of a Curia release: {'; '.join(faults)}")
    return Contract(
        rounding="int16",
        clip_hu=None,
        normalise=statistics,
        eps=float(eps),
        normalise_last=True,
        size_px=size,
        resampling="bicubic",
        pooling="class",
    )


def write_curia_settings(contract: Contract) -> dict[str, Any] | None:
    """preprocessor_config.json of a contract that is Curia's; None for any other, which that processor cannot keep.

    The processor's code stays with its owner: `auto_map` points to the release.
    """
    settings = {**_SETTINGS, "crop_size": contract.size_px, "eps": contract.eps}
    statistics: Literal["slice", "volume"] = "volume" if contract.normalise == "volume" else "slice"
    wanted = curia_contract(settings, statistics=statistics)
    same = ("rounding", "clip_hu", "windows", "percentiles", "normalise", "normalise_last", "fit", "resampling")
    if any(getattr(contract, name) != getattr(wanted, name) for name in (*same, "antialias", "channels")):
        return None
    source = f"raidium/curia-2--curia_image_processor.{PROCESSOR}"
    return {**settings, "image_processor_type": PROCESSOR, "auto_map": {"AutoImageProcessor": source}}


def read_curia(folder: str | Path) -> tuple[ViT, Contract, dict[str, Any]]:
    """A released Curia: its transformer, its contract and the report of `read_weights`.

    Raises UsageError when the folder holds no model, ContractError when it is no Curia or tensors do not fit, InputError when
    preprocessor_config.json is missing.
    """
    folder = Path(folder)
    config, state, report = read_weights(folder)
    settings = read_json(folder / "config.json")
    found = (settings.get("model_type"), settings.get("num_channels"))
    if found != ("dinov2", 1):
        raise ContractError(
            f"{folder}/config.json has model_type {found[0]} and {found[1] or 3} channels; Curia is dinov2 with one channel"
        )
    contract = curia_contract(read_json(folder / "preprocessor_config.json"))
    if any(contract.size_px % p for p in config.patch):
        raise ContractError(f"{folder}: crop_size {contract.size_px} is no multiple of the patch {config.patch}")
    return build(ViT, config, state).eval(), contract, report
