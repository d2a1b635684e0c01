"""Encoders: slices or volumes in, tokens out, with a contract. One final class, whatever the network."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from hilum.encode.contract import Contract
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import Block, Tokens, ViT, Window
from hilum.encode.volume_contract import VolumeContract
from hilum.errors import ContractError, UsageError
from hilum.records import read_json, versions, write_atomic, write_json, write_text
from hilum.settings import from_dict, to_dict
from hilum.volume import Volume

if TYPE_CHECKING:
    from hilum.encode.features import Features

PRECISIONS = ("auto", "float32", "bfloat16")
GAINS_FROM = 20_000_000  # parameters; a smaller network is quick in either

CPU_PATCHES = 2048  # at once: activations of more leave the cache (ViT-B at 512: 1.4 slices/s, in batches of 24 1.0)

AnyContract = Contract | VolumeContract


class Encoder:
    """A frozen network with its contract. Slices or volumes, ours or released: all encoders are this class.

    network   (B, C, …) prepared by the contract → Tokens; a transformer of ours, or any module that gives the same
    contract  what it expects; `tokens` trusts that its input was prepared by it
    patch     pixels of a patch along (rows, columns) or (slices, rows, columns)
    report    how its weights were loaded (`hilum.encode.released.weights.Weights.report`); empty when they were drawn
    precision "float32"; "bfloat16": matrix products in half precision, residuals and norms in float32; "auto": bfloat16 where
              the device is faster at it and the network is large enough to gain, else float32
    """

    def __init__(
        self,
        network: nn.Module,
        contract: AnyContract,
        name: str,
        *,
        patch: tuple[int, ...],
        device: str = "cpu",
        report: dict[str, Any] | None = None,
        precision: str = "float32",
    ) -> None:
        self.name, self.contract, self.patch, self.report = name, contract, patch, report or {}
        self.device = pick_device(device)
        self.precision = pick_precision(precision, network, self.device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        if self.precision == "bfloat16":
            _halve(self.network)

    @property
    def slice_contract(self) -> Contract:
        """The contract of an encoder of slices. ContractError when it encodes volumes."""
        if not isinstance(self.contract, Contract):
            raise ContractError(f"{self.name} encodes volumes; expected an encoder of slices")
        return self.contract

    @property
    def grid(self) -> tuple[int, int]:
        """Patch tokens of a slice along (rows, columns). A volume's grid follows from the volume."""
        rows, columns = (self.slice_contract.size_px // p for p in self.patch)
        return rows, columns

    def tokens(self, images: Tensor, window: Window | None = None) -> Tokens:
        """images (B, C, size, size) or (B, C, Z, Y, X), prepared by the contract → tokens, float32, on the CPU.

        window  the images are this block of larger ones (`hilum.encode.chunks`)
        """
        place = () if window is None else (window,)
        return self._run(images, lambda part: [self.network(part, *place)])[0]

    def layers(self, images: Tensor, numbers: Sequence[int]) -> list[Tokens]:
        """The same after chosen blocks, -1 the last, each through the final LayerNorm. UsageError where there is none."""
        if tuple(numbers) == (-1,):
            return [self.tokens(images)]
        choose: Any = getattr(self.network, "layers", None)
        if choose is None:
            raise UsageError(f"{self.name} has no layers to choose from; expected last")
        return self._run(images, lambda part: choose(part, numbers))

    def _run(self, images: Tensor, network: Callable[[Tensor], Sequence[Tokens]]) -> list[Tokens]:
        """`network`, which gives one or several `Tokens`, in the encoder's precision; on a CPU a few images at a time."""
        half, few = self.precision == "bfloat16", len(images)
        if self.device.type == "cpu":
            few = max(1, CPU_PATCHES * math.prod(self.patch) // math.prod(images.shape[2:]))
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            passes = [network(part.to(self.device)) for part in images.split(few)]  # type: ignore[no-untyped-call]
            return [Tokens(*(torch.cat(parts).float().cpu() for parts in zip(*some))) for some in zip(*passes)]

    def encode(
        self,
        volume: Volume,
        level: str = "volume",
        *,
        mask: Volume | None = None,
        max_slices: int | None = None,
        batch_size: int = 32,
        layers: Sequence[int] = (-1,),
        pooling: str | None = None,
        across: str = "mean",
        patches: bool = True,
    ) -> "Features":
        """A scan → its features (`hilum.encode.features.Features`). ContractError when it breaks the contract.

        volume   as `hilum.read` gives it
        mask     labels on the grid of the volume, for level region
        patches  return the patch tokens, too: 3 MB a slice for a ViT-B at 512
        others   `hilum.encode.features.How`
        """
        from hilum.encode.features import encode_volume
        from hilum.encode.items import How

        how = How(level=level, pooling=pooling, across=across, layers=tuple(layers), max_slices=max_slices)
        keep = np.float32 if patches else None
        return encode_volume(self, volume, how, mask=mask, batch_size=batch_size, keep=keep)

    @property
    def weights_hash(self) -> str:
        """16 hex digits of the weights: as stored, when they were loaded, else of the tensors."""
        from hilum.encode.released.weights import hash_tensors

        return str(self.report.get("hash") or hash_tensors(self.network.state_dict()))


class PixelNetwork(nn.Module):
    """The baseline without a network: what a linear head sees in the raw pixels.

    The class token is the whole slice at 32×32; patch tokens are the pixels of the patch itself. Reduce them by PCA
    inside the head (`--pca`), fitted on training patients only.
    """

    def __init__(self, patch_px: int) -> None:
        super().__init__()
        self.patch_px = patch_px

    def forward(self, images: Tensor) -> Tokens:
        whole = functional.adaptive_avg_pool2d(images, 32).flatten(1)
        patches = functional.unfold(images, self.patch_px, stride=self.patch_px).transpose(1, 2)
        return Tokens(whole, whole.new_zeros(len(whole), 0, self.patch_px**2), patches.contiguous())


def pixel_encoder(size_px: int = 128, patch_px: int = 16) -> Encoder:
    contract = Contract(size_px=size_px, pooling="class")
    return Encoder(PixelNetwork(patch_px), contract, "pixels", patch=(patch_px, patch_px))


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is a CUDA device when there is one, else the CPU. UsageError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device '{name}' is unknown; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' is none that hilum runs on; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UsageError(f"device '{name}' is not there; torch sees {count}, cuda:0 to cuda:{count - 1}")
    return device


def pick_precision(name: str, network: nn.Module, device: torch.device) -> str:
    """float32 or bfloat16 for "auto"; UsageError for an unknown name."""
    if name not in PRECISIONS:
        raise UsageError(f"precision '{name}' is unknown; expected {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if sum(p.numel() for p in network.parameters()) < GAINS_FROM:
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cpu" and fast else "float32"


def _halve(network: nn.Module) -> None:
    """Weights of linear layers in bfloat16, once instead of at every call; a LayerScale goes into its layer before that."""
    for module in network.modules():
        if isinstance(module, Block):
            module.fold_layer_scale()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def write_encoder(folder: Path, model: ViT, contract: AnyContract, facts: dict[str, Any]) -> None:
    """Export: model.safetensors, config.json, contract.json and a model card. `facts` go into config and card."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with write_atomic(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(folder / "contract.json", to_dict(contract))
    write_text(folder / "README.md", _card(model, contract, facts))
    record = {"format": "hilum-encoder", "version": 1, "vit": to_dict(model.config), "versions": versions(), **facts}
    write_json(folder / "config.json", record)  # last: its presence says the export is whole


def read_model_config(folder: Path) -> tuple[ViTConfig, AnyContract]:
    """The shape and the contract of an exported encoder, without its weights."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"'{folder}' is no encoder; expected a folder with config.json, contract.json and model.safetensors, "
            "as hilum pretrain writes to RUN/export"
        )
    record = read_json(folder / "config.json")
    found = f"{record.get('format')} version {record.get('version')}" if isinstance(record, dict) else "no table"
    if found != "hilum-encoder version 1":
        raise ContractError(f"{folder}/config.json is {found}; this hilum reads hilum-encoder version 1")
    config = from_dict(ViTConfig, record.get("vit"), f"{folder}/config.json")
    kind: type[AnyContract] = Contract if len(config.patch) == 2 else VolumeContract
    contract = from_dict(kind, read_json(folder / "contract.json"), f"{folder}/contract.json")
    return config, contract


def model_name(folder: Path) -> str:
    record = read_json(folder / "config.json")
    return f"{record.get('recipe', folder.name)}@{record.get('step', 0)}"


def _card(model: ViT, contract: AnyContract, facts: dict[str, Any]) -> str:
    num_parameters = sum(p.numel() for p in model.parameters())
    kinds = " and ".join(contract.modalities)
    shown = "slices" if isinstance(contract, Contract) else "volumes"
    lines = [f"- {name}: {value}" for name, value in {**to_dict(contract), **facts}.items()]
    return "\n".join(
        [
            f"# hilum encoder {facts.get('recipe', '')}",
            "",
            f"A vision transformer of {num_parameters / 1e6:.1f} M parameters for {shown} of {kinds}. Research use only.",
            "",
            f"Contract {contract.hash}:",
            "",
            *lines,
            "",
            "Load it with `hilum embed SCANS --model THIS_FOLDER -o features.parquet`.",
            "",
        ]
    )
