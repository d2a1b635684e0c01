"""Are these voxels Hounsfield units? Decided by where air, fat and soft tissue lie, never by the header.

HU are fixed at two points: air −1000, water 0 (PS3.3 C.8.2.1.1.2, C.11.1.1.2). A body in air therefore has two narrow
peaks about 1,040 apart, and hardly anything between −500 and −200 or below −1,100. Lungs lie between −950 and −500, fat at
−110 ± 40, soft tissue and fluids between 0 and 80, bone above. Values outside the field (−1500, −2000, −3024, …) stand
as one single value and are set apart as padding.

The verdict is "not_hu" only when another scale explains the values (a forgotten, doubled or tenfold rescale, wrapped
numbers) or when they are impossible for a scanned body. Everything else that does not prove itself is "unsure".
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hilum.large import each, gather

Values = NDArray[np.float64]

SIDE = 128  # at most about this many samples per axis of a slice
_BLOCK = 1 << 20  # samples counted at once
LOWEST_AIR = -1100.0  # noise and overshoot around −1000 end here

# (slope, shift) → HU, for what goes wrong on the way: rescale forgotten, applied twice, tenfold, inverted.
MISTAKES = ((1.0, -1024.0), (1.0, -1000.0), (1.0, 1024.0), (1.0, 1000.0), (0.1, 0.0), (0.1, -1024.0), (10.0, 0.0),
            (-1.0, 0.0))  # fmt: skip
WRAPS = (4096, 65536)  # 12 and 16 bits: negative values that came out as large positive ones


@dataclass(frozen=True, kw_only=True)
class HounsfieldCheck:
    """What the values say.

    verdict      "hu": surely; "not_hu": surely not; "unsure": use with a flag
    why          the rule that decided, with its numbers; no text from any header
    minimum, maximum  of the sampled values without padding
    padding      share of voxels set apart as padding, among all; the shares below are of the rest
    air, lung, between, soft, bone, below
                 shares in −1100…−900, −900…−500, −500…−200, −200…200, above 200, below −1100
    air_peak, fat_peak, soft_peak
                 most frequent value in −1100…−900, −160…−50 and −30…120; None when there is no peak
    shift_hu     what must be added to the values to make them HU, where a shift explains them; else 0
    """

    verdict: Literal["hu", "unsure", "not_hu"]
    why: str
    minimum: float
    maximum: float
    padding: float
    air: float
    lung: float
    between: float
    soft: float
    bone: float
    below: float
    air_peak: float | None
    fat_peak: float | None
    soft_peak: float | None
    shift_hu: float = 0.0

    def numbers(self) -> str:
        """For a ledger row: verdict, rule, shares in per cent and peaks."""
        shares = ", ".join(f"{n} {100 * getattr(self, n):.0f} %" for n in ("air", "lung", "soft", "bone", "padding"))
        at = (("air", self.air_peak), ("fat", self.fat_peak), ("soft", self.soft_peak))
        peaks = "".join(f", {name} at {value:.0f}" for name, value in at if value is not None)
        return f"{self.why}; {self.minimum:.0f}…{self.maximum:.0f}, {shares}{peaks}"


def thin(voxels: NDArray[Any]) -> NDArray[Any]:
    """Every n-th row and column (copied), so that about SIDE…2·SIDE samples per axis of a slice remain."""
    _, rows, columns = voxels.shape
    few = voxels[:, :: max(rows // SIDE, 1), :: max(columns // SIDE, 1)]
    return gather(each(few), few.shape, few.dtype)


def check_hounsfield(voxels: NDArray[Any]) -> HounsfieldCheck:
    """Look at the distribution of a volume that calls itself CT.

    voxels   (Z, Y, X), any real type
    """
    values, counts = _histogram(voxels)
    values, counts, padding = _without_padding(values, counts)
    below, air, lung, between, soft, bone = _shares(values, counts)
    verdict, why, shift = _judge(values, counts, below, bone)
    return HounsfieldCheck(
        verdict=verdict, why=why, shift_hu=shift, padding=padding, minimum=float(values[0]), maximum=float(values[-1]),
        air=air, lung=lung, between=between, soft=soft, bone=bone, below=below,
        air_peak=_peak(values, counts, LOWEST_AIR, -900), fat_peak=_peak(values, counts, -160, -50),
        soft_peak=_peak(values, counts, -30, 120),
    )  # fmt: skip


def _histogram(voxels: NDArray[Any]) -> tuple[Values, Values]:
    """Different values in order, rounded to whole numbers, and how often each was sampled."""
    few = thin(voxels)
    if few.dtype != np.int16:
        # ±10^6 keeps room for unsigned 16 bits and for tenfold slopes.
        few = np.rint(np.clip(few.astype(np.float64), -1e6, 1e6))
        if few.min() < -32768 or few.max() > 32767:
            found, times = np.unique(few, return_counts=True)
            return found, times.astype(np.float64)
        few = few.astype(np.int16)
    flat = few.view(np.uint16).ravel()
    blocks = (flat[n : n + _BLOCK] for n in range(0, len(flat), _BLOCK))  # counting needs 8 bytes a sample
    often = np.roll(sum(np.bincount(block, minlength=65536) for block in blocks), 32768)
    found = np.flatnonzero(often)
    return found.astype(np.float64) - 32768, often[found].astype(np.float64)


def _without_padding(values: Values, counts: Values) -> tuple[Values, Values, float]:
    """Set apart the lowest value when it stands alone far below the others: a fill outside the field of view.

    It does when it lies below −1,100, is ten times as frequent as the next 50 values together, and is not all there is.
    """
    padding, total = 0.0, counts.sum()
    while len(values) > 1 and values[0] < LOWEST_AIR:
        near = (values > values[0]) & (values <= values[0] + 50)
        if counts[0] < 10 * counts[near].sum():
            break
        padding += counts[0]
        values, counts = values[1:], counts[1:]
    return values, counts, float(padding / total)


def _shares(values: Values, counts: Values) -> tuple[float, float, float, float, float, float]:
    """Shares below −1100, to −900 (air), to −500 (lung), to −200, to 200 (soft tissue and fat), above (bone)."""
    running = np.concatenate([[0.0], np.cumsum(counts)])
    at = running[np.searchsorted(values, [LOWEST_AIR, -900, -500, -200, 200], "right")] / running[-1]
    below, air, lung, between, soft, bone = np.diff(at, prepend=0.0, append=1.0).tolist()
    return below, air, lung, between, soft, bone


def _peak(values: Values, counts: Values, low: float, high: float) -> float | None:
    """Where a curve smoothed over 25 values is highest between two values; None when it is highest at either end."""
    line = np.zeros(int(high - low) + 61)
    inside = (values > low - 31) & (values < high + 31)
    np.add.at(line, (values[inside] - low + 30).astype(int), counts[inside])
    smooth = np.convolve(line, np.ones(25) / 25, "same")[30:-30]
    top = int(np.argmax(smooth))
    return float(low + top) if 0 < top < len(smooth) - 1 and smooth[top] > 0 else None


def _body_in_air(values: Values, counts: Values, least_air: float) -> bool:
    """Whether air and tissue lie where HU put them.

    Air and lung together at least `least_air`, most frequent at −1040…−930, or spread around −930…−700 (lung without air
    around: within 30 of its peak less than 0.4 of it); tissue (−200…200) at least 2 %, half as much again as lies between
    lung and tissue, and a quarter of all that is no air; less than 2 % below −1,100; less at 900…1100, where inverted air
    would be, than of air and lung.
    """
    below, air, lung, between, soft, bone = _shares(values, counts)
    gas = air + lung
    mirrored = counts[(values >= 900) & (values <= 1100)].sum() / counts.sum()
    if mirrored >= gas:
        return False
    if gas < least_air or below > 0.02 or soft < 0.02 or soft < 1.5 * between or soft < 0.25 * (between + soft + bone):
        return False
    peak = _peak(values, counts, LOWEST_AIR, -450)
    if peak is None or not -1040 <= peak <= -700:
        return False
    narrow = counts[np.abs(values - peak) <= 30].sum() / (gas * counts.sum())
    return bool(peak <= -930 or narrow < 0.4)


def _judge(
    values: Values, counts: Values, below: float, bone: float
) -> tuple[Literal["hu", "unsure", "not_hu"], str, float]:
    """Verdict, rule, shift."""
    low, high = values[0], values[-1]
    if _body_in_air(values, counts, 0.01):
        return "hu", "air and tissue in place", 0.0
    if _body_without_air(values, counts):
        return "hu", "fat and soft tissue in place, no air", 0.0
    for slope, shift in MISTAKES:
        mapped = np.rint(slope * values) + shift
        if _body_in_air(*((mapped, counts) if slope > 0 else (mapped[::-1], counts[::-1])), 0.05):
            return "not_hu", f"would be HU as {slope:g} · value {shift:+g}", shift if slope == 1 else 0.0
    for wrap in WRAPS:
        if high >= wrap - 1100:
            unwrapped = np.where(values >= wrap // 2, values - wrap, values)
            order = np.argsort(unwrapped, kind="stable")
            if _body_in_air(unwrapped[order], counts[order], 0.05):
                return "not_hu", f"would be HU if values from {wrap // 2} were less by {wrap}", 0.0
    if low >= 0 and bone >= 0.05:
        return "not_hu", f"nothing below 0, {100 * bone:.0f} % above 200", 0.0
    if high - low <= 10:
        return "not_hu", f"all values between {low:.0f} and {high:.0f}", 0.0
    ends = (counts[0] + counts[-1]) / counts.sum()
    if low == 0 and high == 255 and ends >= 0.05:
        return "not_hu", f"8 bits, {100 * ends:.0f} % at 0 or 255", 0.0
    if below >= 0.2:
        return "not_hu", f"{100 * below:.0f} % below −1100", 0.0
    return "unsure", "air, fat and soft tissue are not where they should be", 0.0


def _body_without_air(values: Values, counts: Values) -> bool:
    """A crop inside the body: fat (−160…−50) at least 3 %, soft tissue (−20…120) 10 %, both 60 %, something below −130."""
    total = counts.sum()
    fat = counts[(values >= -160) & (values <= -50)].sum() / total
    soft = counts[(values >= -20) & (values <= 120)].sum() / total
    low = counts[values < -130].sum() / total
    bone = counts[values > 200].sum() / total
    return bool(
        fat >= 0.03 and soft >= 0.1 and fat + soft >= 0.6 and 0.001 <= low <= 0.2 and bone <= 0.3
        and values[0] >= LOWEST_AIR and _peak(values, counts, -160, -50) is not None
    )  # fmt: skip
