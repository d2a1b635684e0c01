"""Encoders for other programs: transformers, ONNX, torch.export, VoxelFM's code. Nothing counts as written before it was
loaded again and gave the tokens of the original on the phantom.

    hf            config.json, model.safetensors as `AutoModel.from_pretrained` takes them; preprocessor_config.json where
                  Curia's processor does what the contract says (no other processor of transformers can)
    onnx          model.onnx and model.onnx.data (the weights), any batch size, slices of the contract's size
    torch-export  model.pt2 of `torch.export`, the same
    voxelfm       an encoder of volumes: config.yaml and checkpoints/model.pth, as VoxelFM's code reads them

contract.json lies beside in all of them.
"""

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hilum.encode.contract import Contract, prepare_slice, volume_statistics
from hilum.encode.encoder import AnyContract, Encoder
from hilum.encode.released.curia import write_curia_settings
from hilum.encode.released.golden import SLICE, phantom_scans
from hilum.encode.released.layouts import transformers_config, transformers_kind, write_layout
from hilum.encode.released.voxelfm import read_voxelfm, write_voxelfm
from hilum.encode.released.weights import read_weights
from hilum.encode.vit import ViT, interpolate_positions
from hilum.encode.volume_contract import VolumeContract, prepare_volume
from hilum.encode.zoo import load_encoder
from hilum.errors import ContractError, UsageError
from hilum.records import explain_full_disk, sha256_file, write_json
from hilum.settings import to_dict

Loaded = tuple[str, Callable[[Tensor], Tensor]]  # what it was loaded with, and images → tokens in one sequence
OPSET = 18  # ONNX: the first with antialiased resizing


def export(model: str | Path, out: str | Path, to: str = "hf") -> dict[str, Any]:
    """Write an encoder in another form, into a new folder.

    model    as `load_encoder` takes it
    out      the folder; must not exist
    returns  form, files (name: SHA-256), max_difference (largest over all tokens of the phantom's slices, in units of the
             largest token value where that is above one), tolerance, checked_with

    Raises UsageError for an unknown form, an encoder that has no such form, or missing packages; ContractError when what was
    written gives other tokens. In any error nothing is left at `out`.
    """
    out = Path(out)
    if to not in FORMS:
        raise UsageError(f"form '{to}' is unknown; expected {', '.join(FORMS)}")
    if out.exists():
        raise UsageError(f"'{out}' exists; give a new folder")
    write, tolerance, packages = FORMS[to]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{to} needs {', '.join(missing)}: pip install 'hilum[onnx]'")
    encoder = load_encoder(str(model))
    if not isinstance(encoder.network, ViT):
        raise UsageError(
            f"{encoder.name} is no ViT of ours; only those are exported. Its weights are in their own layout already"
        )
    if isinstance(encoder.contract, Contract) == (to == "voxelfm"):
        raise UsageError(f"{encoder.name} encodes {'slices' if to == 'voxelfm' else 'volumes'}, which {to} has no form for; "
                         "expected voxelfm for volumes, another form for slices")  # fmt: skip
    if encoder.precision != "float32":  # its weights are rounded and its LayerScale folded away
        raise UsageError(f"{encoder.name} was loaded in {encoder.precision}; an export is made of float32 weights")
    images = phantom_images(encoder.contract)
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with explain_full_disk(out):
        try:
            folder.mkdir(parents=True)
            checked_with, load = write(encoder, folder, images)
            difference = compare(encoder, load, images)
            if not difference <= tolerance:  # NaN, too
                raise ContractError(
                    f"{to} of {encoder.name}, loaded with {checked_with}, gives tokens {difference:.1e} away from the "
                    f"original; expected at most {tolerance:.0e}. Nothing was written"
                )
            write_json(folder / "contract.json", to_dict(encoder.contract))
            files = {
                path.relative_to(folder).as_posix(): sha256_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            os.replace(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "form": to,
        "files": files,
        "max_difference": difference,
        "tolerance": tolerance,
        "checked_with": checked_with,
    }


def phantom_images(contract: AnyContract) -> Tensor:
    """Two slices of each of the phantom's CT and MR that the encoder may be shown, prepared: (2 or 4, channels, Y, X). For an
    encoder of volumes the CT, (1, 1, Z, Y, X)."""
    if not isinstance(contract, Contract):
        return prepare_volume(phantom_scans()["CT"], contract).image[None]
    images = []
    for scan in phantom_scans().values():
        if scan.modality in contract.modalities:
            statistics = volume_statistics(scan.voxels, scan.modality, scan.unit, contract)
            images += [
                prepare_slice(p, scan.modality, scan.unit, contract, statistics) for p in scan.voxels[SLICE : SLICE + 2]
            ]
    if not images:
        raise ContractError(f"the contract takes {', '.join(contract.modalities)}; the check needs CT or MR")
    return torch.stack(images)


def compare(encoder: Encoder, load: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Largest difference of a token's number, over all images at once and over one alone."""
    tokens = encoder.tokens(images)
    wanted = in_sequence(tokens)
    scale = max(1.0, float(wanted.abs().max()))
    with torch.inference_mode():
        different = [float((load(images[:n]) - wanted[:n]).abs().max()) for n in (len(images), 1)]
    return max(different) / scale


def _write_hf(encoder: Encoder, folder: Path, images: Tensor) -> Loaded:
    """In transformers' layout; loaded with transformers, or without it with our own reader."""
    model = encoder.network
    assert isinstance(model, ViT)
    kind = transformers_kind(model.config)
    if kind != "dinov3_vit" and (kind == "dinov2_with_registers") != model.config.antialias:
        model = at_size(
            model, encoder.slice_contract.size_px
        )  # transformers would interpolate positions in another way
    save_file(
        write_layout(model.state_dict(), model.config, kind), folder / "model.safetensors", metadata={"format": "pt"}
    )
    write_json(folder / "config.json", transformers_config(model.config))
    settings = write_curia_settings(encoder.slice_contract)
    if settings is not None:
        write_json(folder / "preprocessor_config.json", settings)
    if importlib.util.find_spec("transformers") is None:
        weights = read_weights(folder, channels=None)
        again = ViT(weights.config).eval()
        again.load_state_dict(weights.state)
        return "hilum", lambda images: in_sequence(again(images))
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    faults = [f"{what}: {names}" for what, names in info.items() if names]
    if faults:
        raise ContractError(f"transformers does not take the weights of {encoder.name}: {'; '.join(faults)}")

    theirs.eval()
    return f"transformers {transformers.__version__}", lambda images: theirs(images).last_hidden_state


def _write_onnx(encoder: Encoder, folder: Path, images: Tensor) -> Loaded:
    import onnxruntime

    program, names = _trace(encoder, images)
    logging.disable(logging.WARNING)  # the exporter speaks of operators of torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself; its result is compared
            torch.onnx.export(
                program,
                f=folder / "model.onnx",
                input_names=["images"],
                output_names=names,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def load(images: Tensor) -> Tensor:
        return in_sequence([torch.from_numpy(part) for part in session.run(None, {"images": images.numpy()})])

    return f"onnxruntime {onnxruntime.__version__}", load


def _write_torch(encoder: Encoder, folder: Path, images: Tensor) -> Loaded:
    torch.export.save(_trace(encoder, images)[0], folder / "model.pt2")
    again = torch.export.load(folder / "model.pt2").module()
    return f"torch {torch.__version__}", lambda images: in_sequence(again(images))


def _write_voxelfm(encoder: Encoder, folder: Path, images: Tensor) -> Loaded:
    """As VoxelFM's public code reads it, loaded again with our reader of that layout."""
    assert isinstance(encoder.network, ViT)
    assert isinstance(encoder.contract, VolumeContract)
    write_voxelfm(encoder.network, encoder.contract, folder)
    again, _, _ = read_voxelfm(folder)
    return "hilum", lambda images: in_sequence(again.eval()(images))


FORMS: dict[str, tuple[Callable[[Encoder, Path, Tensor], Loaded], float, tuple[str, ...]]] = {
    "hf": (_write_hf, 1e-5, ()),
    "onnx": (_write_onnx, 1e-4, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": (_write_torch, 1e-4, ()),
    "voxelfm": (_write_voxelfm, 1e-5, ()),
}


class _Parts(nn.Module):
    """Images → class, register (when there are any) and patch tokens, as plain outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for part in self.network(images) if part.shape[1])


def _trace(encoder: Encoder, images: Tensor) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The network as a graph for any number of images of the contract's size, and the names of its outputs. The places in
    our files that torch notes beside each step are left out: they name folders of this machine."""
    network = encoder.network
    if isinstance(network, ViT):
        network = at_size(network, encoder.slice_contract.size_px)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(_Parts(network), (images[:2],), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    tokens = encoder.tokens(images[:1])
    return program, [name for name, part in zip(("cls", "registers", "patches"), tokens) if part.shape[1]]


def at_size(model: ViT, size_px: int) -> ViT:
    """The same function of square images of this size, whose position table is that of their grid."""
    grid = tuple(size_px // p for p in model.config.patch)
    if model.pos_embed is None or grid == model.config.grid:
        return model
    state = model.state_dict()
    patches = interpolate_positions(state["pos_embed"][:, 1:], model.config, grid)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], patches], 1)
    fixed = ViT(replace(model.config, image=(size_px, size_px)))
    fixed.load_state_dict(state)
    return fixed.eval().requires_grad_(False)


def in_sequence(parts: Sequence[Tensor]) -> Tensor:
    """Class token (B, D) and others (B, N, D) as one sequence, as transformers has them."""
    return torch.cat([parts[0][:, None], *parts[1:]], 1)
