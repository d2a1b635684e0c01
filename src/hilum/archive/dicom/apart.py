"""Several slices at one position: which attribute tells the volumes apart (echoes, phases, b-values, dynamics, …)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hilum.archive.dicom.geometry import SMALLEST_MM, stack
from hilum.archive.dicom.header import SPLIT_KEYWORDS, Header
from hilum.errors import ScanRefused

MAX_ATTRIBUTES = 3  # that are combined


@dataclass(frozen=True)
class Apart:
    """Volumes of one series.

    keyword   attributes that tell them apart, comma-separated
    groups    value → slices; empty when nothing tells them apart, `detail` says what was found
    complete  every volume should have as many slices as the largest
    by_order  only the order of InstanceNumber tells them apart
    """

    keyword: str
    groups: dict[str, list[Header]]
    complete: bool = True
    by_order: bool = False
    detail: str = ""


def tell_apart(slices: Sequence[Header]) -> Apart | None:
    """Separate volumes that share positions; None when no position repeats.

    A choice of attributes is right when no position repeats within a group and there are as many groups as the fullest
    position has slices. One attribute goes before two and these before three, groups of equal size before others, and
    among equals the order of SPLIT_KEYWORDS decides. When nothing fits, the order of InstanceNumber may (`_by_number`);
    then volumes that overlap only in part are tried: more groups, each a stack of its own.
    """
    place, _ = _codes([_place(h) for h in slices])
    copies = int(np.bincount(place).max())
    if copies == 1:
        return None
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
            elif partly is None and counts.min() > 1 and all(_is_stack(g) for g in found.groups.values()):
                partly = Apart(found.keyword, found.groups, complete=False)
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
        code, num = _codes([h.splits.get(keyword, "") for h in slices])
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
        groups[",".join(header.splits.get(k, "") for k in keywords)].append(header)
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


def _is_stack(slices: Sequence[Header]) -> bool:
    try:
        stack(slices)
    except ScanRefused:
        return False
    return True


def _place(header: Header) -> tuple[int, ...]:
    return tuple(round(v / SMALLEST_MM) for v in header.position)
