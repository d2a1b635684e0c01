"""What may be done to a scan that is not plain and right: few, named, recorded. The default changes no geometry."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hilum.errors import UsageError


@dataclass(frozen=True)
class Policy:
    """Choices of the archive's owner; they are written into the store.

    min_slices       scans with fewer slices are left out, ≥ 1 (Curia-2 trains on exams of 5 or more); images without
                     geometry (PNG, JPEG) always count as one
    accept_gap_mm    uneven slices are put on even steps by linear interpolation when no gap is larger; 0: refuse them
    resample_tilt    a sheared stack (gantry tilt) is resampled into a right-angled box; else its affine stays sheared
    drop_duplicates  of scans with the same voxels, only the one with the smallest key is stored; else all are, flagged
    deface           faces in head scans are removed before the scan is stored
    """

    min_slices: int = 5
    accept_gap_mm: float = 0.0
    resample_tilt: bool = False
    drop_duplicates: bool = False
    deface: bool = True

    def __post_init__(self) -> None:
        if self.min_slices < 1 or self.accept_gap_mm < 0:
            raise UsageError(
                f"min_slices must be at least 1 and a gap at least 0 mm; found {self.min_slices} and "
                f"{self.accept_gap_mm:g} mm"
            )


AS_IS = Policy()

_GAP = re.compile(r"gap=(\d+(?:\.\d+)?)(?:mm)?")


def parse_policy(
    *,
    min_slices: int = AS_IS.min_slices,
    accept: Sequence[str] = (),
    resample: Sequence[str] = (),
    drop: Sequence[str] = (),
    deface: bool = AS_IS.deface,
) -> Policy:
    """A policy from the words of the command line. Raises UsageError.

    accept    "gap=6mm"
    resample  "tilt"
    drop      "duplicates"
    """
    gaps = [_GAP.fullmatch(word) for word in accept]
    for option, words, known in (
        ("accept", [w for w, gap in zip(accept, gaps) if not gap], "gap=6mm"),
        ("resample", [w for w in resample if w != "tilt"], "tilt"),
        ("drop", [w for w in drop if w != "duplicates"], "duplicates"),
    ):
        if words:
            raise UsageError(f"--{option} {words[0]} is unknown; expected {known}")
    return Policy(
        min_slices=min_slices,
        accept_gap_mm=max((float(gap[1]) for gap in gaps if gap), default=0.0),
        resample_tilt=bool(resample),
        drop_duplicates=bool(drop),
        deface=deface,
    )
