"""What a slice encoder expects of its input, as data, and the one function that makes input so.

The contract travels with the weights, is hashed, and stands in every feature file. A scan that breaks it is refused
with the reason. Encoders of volumes have theirs in `volume_contract.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum import large
from hilum.errors import ContractError
from hilum.records import hash_json
from hilum.settings import to_dict
from hilum.volume import PLANES

INT16 = np.iinfo(np.int16)
Pixels = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Input and output of a slice encoder. The steps, in order: rounding, clip, windows, (normalise), fit, (normalise).

    modalities      what it may be shown; OT is an image of unknown origin
    orientation     direction of (rows, columns) for axial, coronal and sagittal slices, as in Curia's processor
    rounding        "int16": fractions are cut off and the integers divided by 32767, as Curia's processor does
    clip_hu         CT values are cut to this range; other modalities are not cut
    windows         CT: (low, high) in HU shown as 0 to 1, one for each channel, or one for all; cut to 0 to 1 after
                    resampling, too
    percentiles     what has no HU: the percentiles of the slice shown as 0 to 1, likewise
    normalise       "slice": subtract the mean of the whole slice, divide by its standard deviation (unbiased);
                    "volume": the same with those of all slices of the scan; "constants": with `mean` and `std`
    mean, std       of each channel, for "constants"
    eps             a slice whose standard deviation is below it has no content: only its mean is removed
    normalise_last  after the slice has its size (Curia, models of natural images); else at its stored size
    size_px         the network sees (size, size)
    fit             "stretch": the aspect ratio is not kept (Curia); "crop": the short side becomes `short_px`, then the
                    middle is cut out
    resampling      bilinear or bicubic; antialiased unless `antialias` is false
    channels        1, or 3 of grey (or of three windows)
    pooling         vector of a slice: class token, mean of the patch tokens, or both one after the other
    """

    modalities: tuple[str, ...] = ("CT", "MR", "OT")
    orientation: tuple[str, ...] = ("PL", "IL", "IP")
    rounding: Literal["none", "int16"] = "none"
    clip_hu: tuple[float, float] | None = (-1000.0, 2000.0)
    windows: tuple[tuple[float, float], ...] = ()
    percentiles: tuple[float, float] | None = None
    normalise: Literal["slice", "volume", "constants"] = "slice"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    eps: float = 1e-6
    normalise_last: bool = False
    size_px: int = 256
    fit: Literal["stretch", "crop"] = "stretch"
    short_px: int = 0
    resampling: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    channels: int = 1
    pooling: Literal["class", "mean", "class+mean"] = "class+mean"

    def __post_init__(self) -> None:
        """A contract that asks for what this version cannot do is refused, never bent."""
        able = tuple(PLANES[plane][1:] for plane in "SPL")
        if self.orientation != able:
            raise ContractError(f"the contract asks for orientation {self.orientation}; this hilum can do {able}")
        if self.channels not in (1, 3) or len(self.windows) not in (0, 1, self.channels):
            raise ContractError(
                f"the contract asks for {self.channels} channels and {len(self.windows)} windows; expected 1 or 3 channels "
                "and no window, one, or one for each channel"
            )
        if self.normalise == "constants" and not len(self.mean) == len(self.std) == self.channels:
            raise ContractError(f"constants for {self.channels} channels expected; found {self.mean} and {self.std}")
        if self.normalise == "constants" and min(self.std) <= 0:
            raise ContractError(f"std is {self.std}; expected numbers above 0")
        if self.normalise == "volume" and not self.normalise_last:
            raise ContractError("statistics of the volume are taken at the network's size; set normalise_last")
        if self.fit == "crop" and self.short_px < self.size_px:
            raise ContractError(f"a middle of {self.size_px} px cannot be cut from a short side of {self.short_px}")

    @property
    def hash(self) -> str:
        return hash_json(to_dict(self))


class Statistics(NamedTuple):
    """Of the voxels that a contract normalises together."""

    mean: Tensor
    std: Tensor


def prepare_slice(
    pixels: Pixels, modality: str, unit: str, contract: Contract, statistics: Statistics | None = None
) -> Tensor:
    """One slice as the encoder wants it: (Y, X) → (channels, size, size). ContractError when it breaks the contract.

    statistics  of the whole scan, from `volume_statistics`, where the contract normalises by volume
    """
    check_kind(modality, unit, contract)
    image = show_range(pixels, unit, contract)
    if not contract.normalise_last:
        image = standardise(image, contract)
    image = fit_slice(image, contract).expand(contract.channels, -1, -1)
    shown = contract.windows if unit == "HU" else contract.percentiles
    if shown and contract.normalise_last:
        image = image.clamp(0, 1)  # bicubic resampling overshoots; images of 8 bits cannot, and these stand for such
    if contract.normalise_last:
        image = standardise(image, contract, statistics)
    return image.contiguous()


def volume_statistics(slices: Pixels, modality: str, unit: str, contract: Contract) -> Statistics | None:
    """Mean and unbiased standard deviation over all slices (Z, Y, X) at the network's size; None when not asked for.

    The stack of resized slices is held, 4·Z·size² bytes, because only torch's sum over the whole of it gives the bits of
    Curia's processor; a large one lies in a file (`hilum.large`).
    """
    if contract.normalise != "volume":
        return None
    check_kind(modality, unit, contract)
    stack = large.empty((len(slices), contract.size_px, contract.size_px), np.float32)
    for image, pixels in zip(stack, slices):
        image[:] = fit_slice(show_range(pixels, unit, contract), contract)[0].numpy()
    whole = torch.from_numpy(stack)
    return Statistics(whole.mean(), whole.std())


def check_kind(modality: str, unit: str, contract: Contract) -> None:
    """ContractError when the encoder may not be shown this modality or unit."""
    if modality not in contract.modalities:
        raise ContractError(f"modality {modality} is not in the contract; expected {' or '.join(contract.modalities)}")
    if modality == "CT" and unit != "HU":
        raise ContractError(f"CT comes in HU; found unit '{unit}'")


def check_scan(voxels: Pixels, modality: str, unit: str, contract: Contract) -> None:
    """ContractError when the encoder may not be shown this scan (Z, Y, X): as `check_kind`, or because rounding destroys it.

    That is a scan without a unit, most often scaled to [0, 1] or [-1, 1], in which a tenth of the voxels have a fraction and at
    most three grey levels would be left. A dark slice of another scan is none.
    """
    check_kind(modality, unit, contract)
    if contract.rounding == "none" or unit == "HU" or voxels.dtype.kind != "f":
        return
    low, high = (float(np.trunc(found(voxels))) for found in (np.min, np.max))
    if high - low <= 2 and sum(np.count_nonzero(np.trunc(s) != s) for s in voxels) * 10 >= voxels.size:
        raise ContractError(
            f"the scan holds {float(voxels.min()):.3g} to {float(voxels.max()):.3g} and this encoder cuts fractions off, "
            "which would leave next to nothing; give it stored intensities, or multiply by 1000"
        )


def normalise_slice(pixels: Pixels, unit: str, contract: Contract) -> Tensor:
    """Clip and standardise one slice at its stored size: (Y, X) in its unit → (1, Y, X) float32 without unit."""
    return standardise(show_range(pixels, unit, contract), contract)


def show_range(pixels: Pixels, unit: str, contract: Contract) -> Tensor:
    """Rounding, clip and windows: (Y, X) in its unit → (1 or channels, Y, X) float32."""
    if pixels.ndim != 2 or min(pixels.shape) < 2:
        raise ContractError(f"a slice is (Y, X) with at least 2 pixels a side; found shape {pixels.shape}")
    if not np.isfinite(pixels).all():
        raise ContractError("the slice holds NaN or infinite values; expected finite numbers")
    if contract.rounding == "int16":
        image = torch.from_numpy(round_to_int16(pixels).astype(np.float32)) / INT16.max
    else:
        image = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    if unit == "HU" and contract.clip_hu is not None:
        image = image.clamp(*contract.clip_hu)
    if unit == "HU" and contract.windows:
        return torch.stack([((image - low) / (high - low)).clamp(0, 1) for low, high in contract.windows])
    if unit != "HU" and contract.percentiles is not None:
        low, high = np.percentile(pixels, contract.percentiles)
        image = ((image - float(low)) / max(float(high - low), contract.eps)).clamp(0, 1)
    return image[None]


def round_to_int16(pixels: Pixels) -> NDArray[np.int16]:
    """Fractions cut off, towards zero. ContractError for values that int16 has not."""
    whole = np.trunc(pixels)
    low, high = float(whole.min()), float(whole.max())
    if low < INT16.min or high > INT16.max:
        raise ContractError(
            f"the slice holds {low:.0f} to {high:.0f}; this encoder wants whole numbers from {INT16.min} to {INT16.max}"
        )
    return whole.astype(np.int16)


def standardise(image: Tensor, contract: Contract, statistics: Statistics | None = None) -> Tensor:
    """Remove mean and spread of (C, Y, X) as the contract says; `statistics` of the scan where it says "volume"."""
    if contract.normalise == "constants":
        mean, std = (torch.tensor(values)[:, None, None] for values in (contract.mean, contract.std))
        return (image - mean) / std
    if contract.normalise == "volume" and statistics is None:
        raise ContractError("the contract normalises by volume; a slice alone has no statistics of its volume")
    mean, std = statistics or Statistics(image.mean(), image.std())
    image = image - mean.to(image.dtype)
    return image / std.to(image.dtype) if std >= contract.eps else image


def fit_slice(image: Tensor, contract: Contract) -> Tensor:
    """(C, Y, X) at the size of the network."""
    size = (contract.size_px, contract.size_px)
    if contract.fit == "stretch":
        return resize(image[None], size, contract.resampling, contract.antialias)[0]
    rows, columns = image.shape[-2:]
    short = min(rows, columns)
    whole = (rows * contract.short_px // short, columns * contract.short_px // short)
    image = resize(image[None], whole, contract.resampling, contract.antialias)[0]
    top, left = ((have - want) // 2 for have, want in zip(whole, size))
    return image[:, top : top + size[0], left : left + size[1]]


def resize(images: Tensor, size: tuple[int, int], mode: str, antialias: bool = True) -> Tensor:
    """Resize (B, C, Y, X), half-pixel centres; the same on every device up to rounding."""
    if images.shape[-2:] == size:
        return images
    return functional.interpolate(images, size, mode=mode, antialias=antialias, align_corners=False)
