"""Where tokens lie in the patient, and which of them a mask covers."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum.encode.contract import Contract
from hilum.volume import FloatArray, Volume


def chosen_slices(num_slices: int, max_slices: int | None) -> list[int]:
    """All slices, or the middles of `max_slices` equal parts."""
    if max_slices is None or max_slices >= num_slices:
        return list(range(num_slices))
    return [int((n + 0.5) * num_slices / max_slices) for n in range(max_slices)]


def largest_slices(labels: NDArray[Any]) -> dict[int, int]:
    """For each label > 0 of a (Z, Y, X) map, the slice with most of its pixels (the first of equals)."""
    top = int(labels.max())
    areas = np.stack([np.bincount(s.ravel().astype(np.int64), minlength=top + 1) for s in labels])
    return {label: int(areas[:, label].argmax()) for label in range(1, top + 1) if areas[:, label].any()}


def seen_box(rows: int, columns: int, contract: Contract) -> tuple[float, float, float, float]:
    """What the network sees of a slice, in its pixels: first row, first column, number of rows, of columns."""
    if contract.fit == "stretch":
        return 0.0, 0.0, float(rows), float(columns)
    side = contract.size_px * min(rows, columns) / contract.short_px
    return (rows - side) / 2, (columns - side) / 2, side, side


def slice_token_affine(vol: Volume, z: int, grid: tuple[int, int], contract: Contract) -> FloatArray | None:
    """Of one slice's tokens: (k, row, column, 1) of a patch centre → LPS mm, k = 0 in the slice and one step its distance.

    None when the scan has no geometry.
    """
    if vol.affine is None:
        return None
    top, left, height, width = seen_box(vol.shape[1], vol.shape[2], contract)
    dy, dx = height / grid[0], width / grid[1]
    to_voxel = np.array([[1, 0, 0, z], [0, dy, 0, top + dy / 2 - 0.5], [0, 0, dx, left + dx / 2 - 0.5], [0, 0, 0, 1.0]])
    placed: FloatArray = vol.affine @ to_voxel
    return placed


def stack_affine(affines: FloatArray | None) -> FloatArray | None:
    """One affine (k, row, column, 1) → LPS mm for slices at even steps, from theirs (M, 4, 4); None when uneven."""
    if affines is None:
        return None
    steps = np.diff(affines[:, :3, 3], axis=0)
    if len(steps) and np.abs(steps - steps[0]).max() > 1e-3:
        return None
    whole: FloatArray = affines[0].copy()
    if len(steps):
        whole[:3, 0] = steps[0]
    return whole


def region_weights(mask: NDArray[np.bool_], grid: tuple[int, int], contract: Contract | None = None) -> Tensor:
    """Share of each patch (N,) that a region (Y, X) covers, where the slice is stretched or cut as the contract says."""
    if contract is not None and contract.fit == "crop":
        top, left, height, width = (round(edge) for edge in seen_box(mask.shape[0], mask.shape[1], contract))
        mask = mask[max(top, 0) : top + height, max(left, 0) : left + width]
    share = functional.adaptive_avg_pool2d(torch.from_numpy(mask.astype(np.float32))[None], grid)
    return share.flatten()


def volume_region_weights(labels: Volume, token_affine: FloatArray, grid: tuple[int, int, int]) -> dict[int, Tensor]:
    """For each label the number of its voxels (N,) in each patch of a token grid.

    labels        (Z, Y, X) with an affine
    token_affine  (k, j, i, 1) of a patch centre → LPS mm
    returns       labels that no patch covers are absent; patches in C order
    """
    to_token = np.linalg.solve(token_affine, labels._affine("placing a mask"))
    at = np.argwhere(labels.voxels > 0)
    place = np.rint(at @ to_token[:3, :3].T + to_token[:3, 3]).astype(np.int64)
    inside = ((place >= 0) & (place < np.array(grid))).all(1)
    number = np.ravel_multi_index(tuple(place[inside].T), grid)
    label = labels.voxels[tuple(at[inside].T)]
    size = int(np.prod(grid))
    return {
        int(one): torch.from_numpy(np.bincount(number[label == one], minlength=size).astype(np.float32))
        for one in np.unique(label)
    }
