"""Several slices at one position: which attribute tells the volumes apart (echoes, phases, b-values, dynamics, …)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hilum.archive.dicom.geometry import SMALLEST_MM, directions, stack
from hilum.archive.dicom.header import SPLIT_KEYWORDS, Header
from hilum.errors import ScanRefused

# Attributes with one value in one volume: slices of two echoes, b-values or kernels are two volumes wherever they lie.
_ONE_VALUE = ("EchoTime", "EffectiveEchoTime", "DiffusionBValue", "ConvolutionKernel", "KVP", "FlipAngle")
MAX_ATTRIBUTES = 3  # that are combined


@dataclass(frozen=True)
class Apart:
    """Volumes of one series.

    keyword   attributes that tell them apart, comma-separated
    groups    value → slices; empty when nothing tells them apart, `detail` says what was found
    by_order  only the order of InstanceNumber tells them apart
    """

    keyword: str
    groups: dict[str, list[Header]]
    by_order: bool = False
    detail: str = ""


def tell_apart(slices: Sequence[Header]) -> Apart | None:
    """Separate volumes that share positions; None when no position repeats.

    A choice of attributes is right when no position repeats within a group and there are as many groups as the fullest
    position has slices. One attribute goes before two and these before three, groups of equal size before others, and
    among equals the order of SPLIT_KEYWORDS decides. When nothing fits, the order of InstanceNumber may (`_by_number`);
    then volumes that overlap only in part are tried: more groups, each a stack of its own.
    """
    place = _places(slices)
    copies = int(np.bincount(place).max())
    if copies == 1:
        return _two_kinds(slices)
    partly: Apart | None = None
    for size in range(1, MAX_ATTRIBUTES + 1):
        uneven: Apart | None = None
        for keywords, code, num_groups in _choices(slices, size, copies):
            if len(np.unique(place * num_groups + code)) < len(slices):
                continue
            counts = np.bincount(code)
            found = Apart(",".join(keywords), _groups(slices, keywords))
            if num_groups == copies and counts.min() == counts.max():
                return found
            if num_groups == copies:
                uneven = uneven or found
            elif partly is None and counts.min() > 1 and _are_stations(slices, place, found.groups):
                partly = found
        if uneven:
            return uneven
    detail = f"up to {copies} slices at one of {place.max() + 1} positions, and no attribute tells them apart"
    return _by_number(slices, place, copies) or partly or Apart("", {}, detail=detail)


def _choices(
    slices: Sequence[Header], size: int, copies: int
) -> Iterator[tuple[tuple[str, ...], NDArray[np.int64], int]]:
    """Combinations of attributes that vary: (keywords, group number of each slice, number of groups)."""
    codes = {}
    for keyword in SPLIT_KEYWORDS:
        code, num = _codes([_value(h, keyword) for h in slices])
        if num > 1 and (size == 1 or num <= copies):
            codes[keyword] = code
    for keywords in combinations(codes, size):
        joint, num = _codes(list(zip(*(codes[k].tolist() for k in keywords))))
        if copies <= num < len(slices):
            yield keywords, joint, num


def _codes(values: Sequence[object]) -> tuple[NDArray[np.int64], int]:
    """Equal values → equal numbers 0, 1, …; and how many there are."""
    numbers: dict[object, int] = {}
    code = np.array([numbers.setdefault(v, len(numbers)) for v in values], np.int64)
    return code, len(numbers)


def _groups(slices: Sequence[Header], keywords: Sequence[str]) -> dict[str, list[Header]]:
    groups: dict[str, list[Header]] = defaultdict(list)
    for header in slices:
        groups[",".join(_value(header, k) for k in keywords)].append(header)
    return dict(groups)


def _by_number(slices: Sequence[Header], place: NDArray[np.int64], copies: int) -> Apart | None:
    """Volumes by InstanceNumber, when each position has equally many slices and the numbers run in one of two orders.

    Volume after volume (all numbers of one volume lie before those of the next), or position after position (all
    numbers of one position lie before those of the next). With two positions or more, at least one volume each.
    """
    num_places = int(place.max()) + 1
    numbers = [(h.number, h.frame) for h in slices]
    if len(slices) != num_places * copies or num_places < 2 or len(set(numbers)) < len(slices):
        return None
    order = sorted(range(len(slices)), key=lambda n: numbers[n])
    table = place[order]
    if all(len(set(part)) == num_places for part in table.reshape(copies, num_places).tolist()):
        volume = np.repeat(np.arange(copies), num_places)
    elif all(len(set(part)) == 1 for part in table.reshape(num_places, copies).tolist()):
        volume = np.tile(np.arange(copies), num_places)
    else:
        return None
    groups: dict[str, list[Header]] = defaultdict(list)
    for n, number in zip(order, volume.tolist()):
        groups[f"{number:06d}"].append(slices[n])
    return Apart("InstanceNumber", dict(groups), by_order=True)


def _two_kinds(slices: Sequence[Header]) -> Apart | None:
    """Volumes on interleaved positions: an attribute that one volume cannot have two values of takes several."""
    for keyword in _ONE_VALUE:
        groups = _groups(slices, [keyword])
        if len(groups) > 1 and min(len(g) for g in groups.values()) > 1:
            return Apart(keyword, groups)
    return None


def _are_stations(slices: Sequence[Header], place: NDArray[np.int64], groups: dict[str, list[Header]]) -> bool:
    """Whether groups are stacks that overlap at their ends: each as dense as all positions together."""
    _, first = np.unique(place, return_index=True)
    try:
        steps = [stack(group).step_mm for group in groups.values()]
        row, column = directions([slices[n] for n in first])
    except ScanRefused:
        return False
    along = np.sort(np.array([slices[n].position for n in first]) @ np.cross(row, column))
    return max(steps) <= 1.1 * float(np.median(np.diff(along)))


def _value(header: Header, keyword: str) -> str:
    """The value of an attribute; numbers that differ in writing alone are one value."""
    text = header.splits.get(keyword, "")
    try:
        return f"{float(text):.9g}"
    except ValueError:
        return text


def _places(slices: Sequence[Header]) -> NDArray[np.int64]:
    """Slices at one position → one number. Positions count as one when no coordinate differs by more than SMALLEST_MM."""
    positions = np.array([h.position for h in slices])
    code = np.zeros(len(slices), np.int64)
    for axis in range(3):  # along each coordinate, numbers without a gap between them are one
        order = np.argsort(positions[:, axis], kind="stable")
        level = np.zeros(len(slices), np.int64)
        level[order[1:]] = np.cumsum(np.diff(positions[order, axis]) > SMALLEST_MM)
        _, code = np.unique(code * (int(level.max()) + 1) + level, return_inverse=True)
    return code
