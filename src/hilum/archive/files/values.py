"""What voxel values say where the file does not: no value, class numbers, or Hounsfield units.

NIfTI, MetaImage, NRRD and NumPy files do not say whether their voxels are an image or class numbers, nor whether they
are CT or MR. Both are decided by stated rules (`is_label_map`, `check_hounsfield`); the second is recorded as a guess.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.archive.files.raw import ImageHeader, read_stored
from hilum.archive.judge.hounsfield import check_hounsfield
from hilum.errors import ScanRefused
from hilum.volume import Volume, to_slices

MAX_MISSING = 0.9  # share of voxels without a value; a brain fills a quarter of its box

LARGEST = 1e30  # sums of larger values leave single precision


def read_image(header: ImageHeader, volume: int = 0) -> tuple[Volume, tuple[str, ...]]:
    """Read one volume of an image file. Raises ScanRefused, also for label maps.

    volume   number of the volume in the file
    returns  a volume as `hilum.volume.to_slices` leaves it; modality "CT" with unit HU when the values prove it, else
             "OT"; repairs

    Voxels are int16 when all values are whole and fit, else float32.
    """
    voxels, repairs = _fill_missing(scaled(header, volume))
    low, high = voxels.min(), voxels.max()
    if max(abs(float(low)), abs(float(high))) > LARGEST:
        raise ScanRefused("non_finite", f"values beyond {LARGEST:g}")
    if low == high:
        raise ScanRefused("constant", f"all voxels {float(low):g}")
    if header.labels or is_label_map(voxels):
        raise ScanRefused("label_map", "by its header" if header.labels else "by its values")
    compact = _compact(voxels)
    ct = check_hounsfield(compact).verdict == "hu"
    vol = Volume(voxels=compact, affine=header.affine, modality="CT" if ct else "OT", unit="HU" if ct else "")
    return to_slices(vol), repairs


def read_label_map(header: ImageHeader) -> Volume:
    """Read class numbers on a grid, turned as `to_slices` turns the scan they belong to.

    Raises ScanRefused `corrupt` when the values are no whole numbers in 0…65535, `not_3d` for several volumes.
    """
    if header.voxels.num_volumes > 1:
        raise ScanRefused("not_3d", f"{header.voxels.num_volumes} volumes; expected one label map")
    values = scaled(header)
    if not ((values >= 0) & (values <= 65535)).all() or (values != np.floor(values)).any():
        raise ScanRefused("corrupt", "expected a label map: whole numbers from 0 to 65535")
    numbers: NDArray[np.int32] = np.ascontiguousarray(values, np.int32)
    return to_slices(Volume(voxels=numbers, affine=header.affine, modality="OT", kind="label"))


def scaled(header: ImageHeader, volume: int = 0) -> NDArray[Any]:
    """Values (Z, Y, X) of one volume: as stored, or float32 when the header scales them. Raises ScanRefused."""
    stored = read_stored(header.voxels, volume)
    if stored.dtype == np.float16:  # compares with no number above 65504
        stored = stored.astype(np.float32)
    if (header.slope, header.intercept) == (1.0, 0.0):
        return stored
    values = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite, and is refused as such
        for into, plane in zip(values, stored):
            into[...] = plane.astype(np.float64) * header.slope + header.intercept
    return values


def _fill_missing(voxels: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """NaN marks "no value" in maps and masked images: it becomes 0, which is then the lowest value there is.

    Refused as non_finite: infinite values (a failed computation), NaN in more than 90 % of the voxels, and NaN beside
    negative values, where neither 0 nor the minimum is surely background.
    """
    if voxels.dtype.kind != "f":
        return voxels, ()
    missing = np.isnan(voxels)
    num_missing = int(missing.sum())
    num_infinite = voxels.size - int(np.isfinite(voxels).sum()) - num_missing
    numbers = f"{num_missing} NaN and {num_infinite} infinite of {voxels.size} voxels"
    if not num_missing and not num_infinite:
        return voxels, ()
    if num_infinite or num_missing > MAX_MISSING * voxels.size:
        raise ScanRefused("non_finite", numbers)
    if np.nanmin(voxels) < 0:
        raise ScanRefused("non_finite", f"{numbers}, beside negative values")
    return np.where(missing, voxels.dtype.type(0), voxels), (f"NaN set to 0 in {num_missing} of {voxels.size} voxels",)


def _compact(voxels: NDArray[Any]) -> NDArray[Any]:
    """The same values as int16 when whole and within its range, else float32; contiguous, native byte order."""
    if voxels.min() >= -32768 and voxels.max() <= 32767:
        small = np.ascontiguousarray(voxels, np.int16)
        if voxels.dtype.kind in "iub" or (small == voxels).all():
            return small
    return np.ascontiguousarray(voxels, np.float32)


def is_label_map(voxels: NDArray[Any]) -> bool:
    """Whether voxels are class numbers rather than intensities.

    They are when all are whole numbers in 0…65535, and either there are at most 8 different ones, or at most 512 and
    they form plateaus: among neighbours along any axis of which at least one is not 0, 30 % or more are equal. Label
    maps at hand reach 49 % and more (the smallest structures the least), images at most 12 %.
    """
    if voxels.min() < 0 or voxels.max() > 65535:
        return False
    seen = np.zeros(65536, bool)
    numbers = np.empty(voxels.shape, np.uint16)
    for plane, whole in zip(voxels, numbers):
        whole[...] = plane
        seen[whole] = True
        if (voxels.dtype.kind == "f" and (whole != plane).any()) or np.count_nonzero(seen) > 512:
            return False
    if np.count_nonzero(seen) <= 8:
        return True
    equal = counted = 0
    for axis in range(3):
        turned = np.moveaxis(numbers, axis, 0)
        either = (turned[1:] != 0) | (turned[:-1] != 0)
        equal += int(((turned[1:] == turned[:-1]) & either).sum())
        counted += int(either.sum())
    return equal >= 0.3 * counted
