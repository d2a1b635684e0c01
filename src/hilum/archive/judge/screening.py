"""Which scans are worth training on: refusals, cautions, guesses and a look hash from the voxels of one scan.

Curia-2 (arXiv 2604.01987) leaves "low-quality series" out without saying how they are told. Ours, in this order:

    small_matrix      no two axes of 16 voxels or more        caution: a slice side below 32
    nearly_constant   one value in 99.9 % of the voxels
    few_levels        fewer than 8 different values           caution below 32
    noise             neighbours correlate less than 0.1      caution ("noisy") below 0.4
    repeated_slices   more than half copy their neighbour     caution at the first copy
    not_hu            a CT on another scale (hounsfield.py)   caution ("hu_suspect") when it cannot be told

Cautions alone: "saturated" (2 % at the highest value), "field_size" (a slice side below 30 or above 2,200 mm), and
"mostly_background" (`note_background`): Curia-2's rule leaves fewer than 5 of the slices. It needs the content that the
store measures anyway. A refused scan is refused for the first reason only.

Set from 4,059 real scans and images: of those that show something none has fewer than 52 values, one value in more than
94 % of its voxels, or neighbours that correlate less than 0.2 (clipped 64×64 thumbnails; whole scans 0.75 and more),
while noise stays below 0.03. One has a copied slice that is not blank.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.archive.judge.anatomy import guess_plane, guess_region
from hilum.archive.judge.duplicates import look_hash
from hilum.archive.judge.hounsfield import check_hounsfield, thin
from hilum.archive.reasons import flag
from hilum.volume import Volume

SMALLEST_SIDE, SMALL_SIDE = 16, 32  # voxels
ONE_VALUE = 0.999
FEWEST_LEVELS, FEW_LEVELS = 8, 32
NOISE, NOISY = 0.1, 0.4  # correlation of neighbours
ENOUGH_NEIGHBOURS = 1000  # below, a correlation proves nothing
MOST_REPEATED = 0.5
SATURATED = 0.02
FIELD_MM = (30.0, 2200.0)
LEAST_ANATOMY, LEAST_SLICES = 0.5, 5
_SAMPLES = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Screening:
    """What the voxels of one scan say about its worth.

    plane, region  guesses, "" when unsure (`anatomy`)
    flags          cautions for `Entry.flags`
    refusal        reason of REASONS and its numbers, or None
    look_hash      64 bits (`duplicates.look_hash`)
    """

    plane: str
    region: str
    flags: tuple[str, ...]
    refusal: tuple[str, str] | None
    look_hash: int


def screen(vol: Volume) -> Screening:
    """Judge one scan by its voxels; geometry is used where there is one."""
    flags: list[str] = []
    refusal = _judge(vol, flags)
    if refusal is None:
        flags += _note_field(vol)
    return Screening(
        plane=guess_plane(vol.affine),
        region=guess_region(vol) if refusal is None else "",
        flags=tuple(flags),
        refusal=refusal,
        look_hash=look_hash(vol),
    )


def _judge(vol: Volume, flags: list[str]) -> tuple[str, str] | None:
    """The first reason to refuse; adds cautions on the way."""
    detail = "×".join(str(n) for n in vol.shape) + " voxels"
    if sorted(vol.shape)[1] < SMALLEST_SIDE:  # a thin stack in a file may lie in any direction
        return "small_matrix", detail
    if min(vol.shape[1:]) < SMALL_SIDE:
        flags.append(flag("small_matrix", detail))
    levels, counts = _levels(vol.voxels)
    share = counts.max() / counts.sum()
    if share >= ONE_VALUE:
        return "nearly_constant", f"{100 * share:.2f} % at one value"
    if len(levels) < FEW_LEVELS:
        if len(levels) < FEWEST_LEVELS:
            return "few_levels", f"{len(levels)} different values"
        flags.append(flag("few_levels", f"{len(levels)} different values"))
    alike = neighbour_correlation(vol.voxels)
    if alike is not None and alike < NOISY:
        if alike < NOISE:
            return "noise", f"correlation of neighbours {alike:.2f}"
        flags.append(flag("noisy", f"correlation of neighbours {alike:.2f}"))
    copies = num_repeated_slices(vol.voxels)
    if copies:
        detail = f"{copies} of {vol.shape[0]} slices"
        if copies > MOST_REPEATED * (vol.shape[0] - 1):
            return "repeated_slices", detail
        flags.append(flag("repeated_slices", detail))
    if vol.modality == "CT":
        check = check_hounsfield(vol.voxels)
        if check.verdict == "not_hu":
            return "not_hu", check.numbers()
        if check.verdict == "unsure":
            flags.append(flag("hu_suspect", check.numbers()))
    if counts[-1] >= SATURATED * counts.sum():
        flags.append(flag("saturated", f"{100 * counts[-1] / counts.sum():.1f} % at the highest value"))
    return None


def _note_field(vol: Volume) -> list[str]:
    """A caution on the field of view, where it is known."""
    if vol.affine is None:
        return []
    _, dy, dx = vol.spacing_mm
    sides = vol.shape[1] * dy, vol.shape[2] * dx
    if FIELD_MM[0] <= min(sides) and max(sides) <= FIELD_MM[1]:
        return []
    return [flag("field_size", f"{sides[0]:.0f}×{sides[1]:.0f} mm")]


def note_background(foreground: NDArray[np.floating[Any]]) -> tuple[str, ...]:
    """The caution "mostly_background", or none.

    foreground   (Z,) share of anatomy in each slice (`content.Content.foreground`)
    """
    filled = int((foreground >= LEAST_ANATOMY).sum())
    if filled >= min(LEAST_SLICES, len(foreground)):
        return ()
    return (flag("mostly_background", f"{filled} of {len(foreground)} slices at least half anatomy"),)


def _levels(voxels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Different values in order and how often each occurs, among about 30,000 to 60,000 voxels spread over the scan."""
    few = thin(voxels)
    step = max(few.size // _SAMPLES, 1)
    while step > 1 and math.gcd(step, few.shape[1] * few.shape[2]) > 1:  # else one column of all slices
        step += 1
    return np.unique(few.reshape(-1)[::step], return_counts=True)


def neighbour_correlation(voxels: NDArray[Any]) -> float | None:
    """Correlation of voxels with their neighbours in the slice, 0 for noise, near 1 for images.

    returns  the larger one of along rows and along columns, with and without the outer 1 % of values cut; None when there
             are too few neighbours or they do not differ

    Pairs of rows from all over the image, in up to 4 slices. The mean of each slice is taken out first: another offset in
    each slice makes no image.
    """
    if min(voxels.shape[1:]) < SMALLEST_SIDE:  # a thin stack that lies across
        voxels = np.moveaxis(voxels, int(np.argmin(voxels.shape)), 0)
    depth, rows, columns = voxels.shape
    if rows < 2 or columns < 2:
        return None
    first = np.arange(0, rows - 1, max(rows // 24, 2))
    band = voxels[:: max(depth // 4, 1)][:4, np.stack([first, first + 1], 1).ravel()].astype(np.float64)
    if band.size < ENOUGH_NEIGHBOURS:
        return None
    found = []
    for image in (band, np.clip(band, *np.percentile(band, [0.5, 99.5]))):
        image = image - image.mean((1, 2), keepdims=True)
        pairs = image.reshape(len(image), -1, 2, columns)
        for one, other in ((image[..., :-1], image[..., 1:]), (pairs[:, :, 0], pairs[:, :, 1])):
            scale = np.sqrt((one**2).mean() * (other**2).mean())
            if scale > 0:
                found.append(float((one * other).mean() / scale))
    return max(found, default=None)


def num_repeated_slices(voxels: NDArray[Any]) -> int:
    """How many slices equal the one before them, blank slices apart."""
    few = thin(voxels)
    flat = few.reshape(len(few), -1)
    same = (flat[1:] == flat[:-1]).all(1) & (flat[1:] != flat[1:, :1]).any(1)
    return sum(bool((voxels[k] == voxels[k + 1]).all()) for k in np.flatnonzero(same))
