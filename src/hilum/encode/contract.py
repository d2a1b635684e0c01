"""What an encoder expects of its input, as data, and the one function that makes input so.

The contract travels with the weights, is hashed, and stands in every feature file. A scan that breaks it is refused
with the reason.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum.errors import ContractError
from hilum.records import hash_json
from hilum.settings import to_dict
from hilum.volume import PLANES


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Input and output of a slice encoder.

    modalities      what it may be shown; OT is an image of unknown origin
    orientation     direction of (rows, columns) for axial, coronal and sagittal slices, as in Curia's processor
    clip_hu         CT values are cut to this range first; other modalities are not cut
    normalise       "slice": subtract the mean of the whole slice, divide by its standard deviation
    eps             a slice whose standard deviation is below it has no content: only its mean is removed
    size_px         the slice is stretched to (size, size); the aspect ratio is not kept (Curia)
    resampling      bilinear or bicubic, with antialiasing
    pooling         vector of a slice: class token, mean of the patch tokens, or both one after the other
    """

    modalities: tuple[str, ...] = ("CT", "MR", "OT")
    orientation: tuple[str, ...] = ("PL", "IL", "IP")
    clip_hu: tuple[float, float] = (-1000.0, 2000.0)
    normalise: Literal["slice"] = "slice"
    eps: float = 1e-6
    size_px: int = 256
    resampling: Literal["bilinear", "bicubic"] = "bilinear"
    channels: int = 1
    pooling: Literal["class", "mean", "class+mean"] = "class+mean"

    def __post_init__(self) -> None:
        """A contract that asks for what this version cannot do is refused, never bent."""
        able = tuple(PLANES[plane][1:] for plane in "SPL"), "slice", 1
        if (self.orientation, self.normalise, self.channels) != able:
            raise ContractError(
                f"the contract asks for orientation {self.orientation}, normalisation '{self.normalise}' and "
                f"{self.channels} channels; this hilum can do {able[0]}, '{able[1]}' and {able[2]}"
            )

    @property
    def hash(self) -> str:
        return hash_json(to_dict(self))


def normalise_slice(pixels: NDArray[np.float32], unit: str, contract: Contract) -> Tensor:
    """Clip and standardise one slice: (Y, X) in its unit → (1, Y, X) float32 without unit."""
    if pixels.ndim != 2 or min(pixels.shape) < 2:
        raise ContractError(f"a slice is (Y, X) with at least 2 pixels a side; found shape {pixels.shape}")
    image = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    if not torch.isfinite(image).all():
        raise ContractError("the slice holds NaN or infinite values; expected finite numbers")
    if unit == "HU":
        image = image.clamp(*contract.clip_hu)
    std, mean = torch.std_mean(image)
    image = image - mean
    return (image / std if std >= contract.eps else image)[None]


def resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Antialiased resize of (B, C, Y, X), half-pixel centres; the same on every device up to rounding."""
    if images.shape[-2:] == size:
        return images
    return functional.interpolate(images, size, mode=mode, antialias=True, align_corners=False)


def prepare_slice(pixels: NDArray[np.float32], modality: str, unit: str, contract: Contract) -> Tensor:
    """One slice as the encoder wants it: (Y, X) → (1, size, size). ContractError when it breaks the contract."""
    if modality not in contract.modalities:
        raise ContractError(f"modality {modality} is not in the contract; expected {' or '.join(contract.modalities)}")
    if modality == "CT" and unit != "HU":
        raise ContractError(f"CT comes in HU; found unit '{unit}'")
    image = normalise_slice(pixels, unit, contract)
    return resize(image[None], (contract.size_px, contract.size_px), contract.resampling)[0]
