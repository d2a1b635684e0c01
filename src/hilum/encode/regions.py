"""Which patch tokens belong to a region, by the rules of others: Curia's own, and its entry to the CVPR 2026 3D-CT
competition, which crops the region first.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum.encode.contract import check_scan, prepare_slice, resize
from hilum.encode.encoder import Encoder
from hilum.encode.vit import Tokens
from hilum.errors import ContractError
from hilum.volume import Volume, apart_mm, orient

MIN_CROP_PX = 128


def check_same_grid(vol: Volume, mask: Volume) -> None:
    """A mask must lie on its scan's grid. ContractError else: it is never resampled silently."""
    if vol.shape != mask.shape:
        raise ContractError(f"the mask has shape {mask.shape}, its scan {vol.shape}; expected the same grid")
    if vol.affine is not None and mask.affine is not None:
        apart = apart_mm(vol, mask)
        if apart > 0.5 * min(vol.spacing_mm):
            raise ContractError(f"mask and scan lie {apart:.1f} mm apart; expected the same grid")


def curia_cells(mask: NDArray[Any], size_px: int = 512, patch_px: int = 16) -> Tensor:
    """The patches that a region touches, by Curia's rule.

    mask     (Y, X) or (S, Y, X); every number but zero is inside
    returns  (…, N) bool, N = (size_px / patch_px)². Of a stack single slices may come out empty

    The mask is resized (bilinear, antialiased) and cut at 0.5, or, when nothing of the whole mask is left, at half of its
    largest value; a patch with one pixel inside is touched. ContractError when the mask is empty.
    """
    if mask.ndim not in (2, 3):
        raise ContractError(f"a mask is (Y, X) or (S, Y, X); found shape {mask.shape}")
    planes = mask[None] if mask.ndim == 2 else mask
    # The largest value of each patch decides at any threshold, so that the resized stack need not be held.
    peaks = torch.stack([_peaks(plane, size_px, patch_px) for plane in planes])
    threshold = 0.5 if bool((peaks > 0.5).any()) else 0.5 * float(peaks.max())
    cells = peaks > threshold
    if not bool(cells.any()):
        raise ContractError("the mask is empty; leave it out, or give one with at least one voxel inside the scan")
    return cells[0] if mask.ndim == 2 else cells


def _peaks(plane: NDArray[Any], size_px: int, patch_px: int) -> Tensor:
    inside = torch.from_numpy((plane != 0).astype(np.float32))[None, None]
    return functional.max_pool2d(resize(inside, (size_px, size_px), "bilinear"), patch_px).flatten()


def roi_crop(mask: NDArray[Any], min_px: int = MIN_CROP_PX) -> tuple[slice, slice]:
    """The square that the competition's rule cuts out around a region: rows, columns.

    mask   (Y, X), not empty
    Its side is the longer side of the region's box, at least `min_px`; its centre the mean of the region's pixels, cut to
    whole ones. It is pushed back into the image; where the image is smaller, that axis is whole.
    """
    inside = np.nonzero(mask)
    if not len(inside[0]):
        raise ContractError("the mask of this slice is empty; expected at least one pixel to crop around")
    side = max(min_px, *(int(np.ptp(axis)) + 1 for axis in inside))
    starts = [max(0, min(max(0, int(axis.mean()) - side // 2), have - side)) for axis, have in zip(inside, mask.shape)]
    rows, columns = (slice(start, min(start + side, have)) for start, have in zip(starts, mask.shape))
    return rows, columns


def competition_vector(
    encoder: Encoder, volume: Volume, mask: Volume | None = None, batch_size: int = 32
) -> NDArray[np.float32]:
    """One vector (D,) of a CT for the CVPR 2026 3D-CT competition, as Curia's entry makes it from axial slices.

    no mask         mean of the class tokens of all slices
    mask            each slice that the region meets is cropped (`roi_crop`); mean of the patch tokens that the region touches,
                    then mean over slices. The cropped mask is resized to the nearest pixel; a slice whose region is lost by
                    that counts as zeros
    an empty mask   mean of all patch tokens of all slices

    Raises GeometryError for a scan without geometry, ContractError when mask and scan lie on different grids or the encoder
    normalises by volume (a crop has no volume).
    """
    vol = orient(volume, "SPL")
    inside = None
    if mask is not None:
        mask = orient(mask, "SPL")
        check_same_grid(vol, mask)
        inside = mask.voxels != 0
    parts = []
    if inside is None or not inside.any():
        for tokens in _encode(encoder, vol, iter(vol.voxels), batch_size):
            parts.append(tokens.cls if inside is None else tokens.patches.mean(1))
    else:
        boxes = {z: roi_crop(inside[z]) for z in range(len(inside)) if inside[z].any()}
        touched = (_nearest_cells(inside[z][box], encoder) for z, box in boxes.items())
        for tokens in _encode(encoder, vol, (vol.voxels[z][box] for z, box in boxes.items()), batch_size):
            cells = torch.stack(list(islice(touched, len(tokens.cls))))
            sums = torch.einsum("bn,bnd->bd", cells, tokens.patches)
            parts.append(sums / cells.sum(1, keepdim=True).clamp(min=1))
    vector: NDArray[np.float32] = torch.cat(parts).mean(0).numpy()
    return vector


def _encode(encoder: Encoder, vol: Volume, planes: Iterator[NDArray[Any]], batch_size: int) -> Iterator[Tokens]:
    contract = encoder.slice_contract
    check_scan(vol.voxels, vol.modality, vol.unit, contract)
    while batch := [prepare_slice(p, vol.modality, vol.unit, contract) for p in islice(planes, batch_size)]:
        yield encoder.tokens(torch.stack(batch))


def _nearest_cells(inside: NDArray[np.bool_], encoder: Encoder) -> Tensor:
    """(N,) ones for the patches that a cropped region touches once it is resized to the nearest pixel."""
    size = encoder.slice_contract.size_px
    sized = functional.interpolate(
        torch.from_numpy(inside.astype(np.float32))[None, None], (size, size), mode="nearest"
    )
    return functional.max_pool2d(sized, encoder.patch).flatten()
