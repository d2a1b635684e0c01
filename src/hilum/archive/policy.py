"""What may be done to a scan that is not plain and right: few, named, recorded. The default touches nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Choices of the archive's owner.

    min_slices     scans with fewer slices are left out, ≥ 1 (Curia-2 trains on exams of 5 or more)
    accept_gap_mm  uneven slices are put on even steps by linear interpolation when no gap is larger; 0: refuse them
    resample_tilt  a sheared stack (gantry tilt) is resampled into a right-angled box; else its affine stays sheared
    """

    min_slices: int = 5
    accept_gap_mm: float = 0.0
    resample_tilt: bool = False


AS_IS = Policy()
