"""What to encode of a scan: slices, regions of slices, or the scan as a whole, each prepared when it is asked for."""

import threading
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from hilum.encode.contract import Contract, Statistics, check_scan, prepare_slice, volume_statistics
from hilum.encode.encoder import Encoder
from hilum.encode.grids import chosen_slices, largest_slices, region_weights
from hilum.encode.pooling import ACROSS, POOLINGS
from hilum.encode.regions import check_same_grid
from hilum.encode.volume_contract import PreparedVolume, VolumeContract, prepare_volume
from hilum.errors import ContractError, UsageError
from hilum.volume import Volume

LEVELS = ("slice", "region", "volume")
LAST: tuple[int, ...] = (-1,)


@dataclass(frozen=True, kw_only=True)
class How:
    """What is made of a scan.

    level       "slice", "region" or "volume"
    pooling     of the tokens of a slice or volume (`hilum.encode.pooling.POOLINGS`); None: as the contract says
    across      of the slices of a scan, for level volume of a slice encoder: mean, max or mean+max
    layers      blocks whose tokens count, -1 the last; their vectors and tokens stand one after the other
    max_slices  evenly spaced slices of each scan instead of all; None: all
    max_patches  of a volume in one pass, by an encoder of volumes; more go in overlapping blocks. None: what memory allows
    """

    level: str = "slice"
    pooling: str | None = None
    across: str = "mean"
    layers: tuple[int, ...] = LAST
    max_slices: int | None = None
    max_patches: int | None = None

    def __post_init__(self) -> None:
        for what, found, known in (
            ("level", self.level, LEVELS),
            ("pooling", self.pooling or POOLINGS[0], POOLINGS),
            ("across", self.across, ACROSS),
        ):
            if found not in known:
                raise UsageError(f"{what} '{found}' is unknown; expected {', '.join(known)}")
        if self.max_slices is not None and self.max_slices < 1:
            raise UsageError(f"max_slices must be at least 1; found {self.max_slices}")
        if self.max_patches is not None and (self.max_patches < 1 or self.layers != LAST):
            raise UsageError("max_patches must be at least 1, and blocks give the last layer only")
        if not self.layers:
            raise UsageError("no layer chosen; expected last, or numbers of blocks such as -1,-4")


@dataclass(frozen=True)
class Scan:
    """One volume on its way through an encoder, with hashed identifiers only; or the reason why there is none.

    content  keyed hash of what it was read from
    reason   why it is not encoded; "" when it is
    group    slices of scans of different groups never share a batch
    """

    series: str
    patient: str
    study: str
    volume: Volume | None
    mask: Volume | None = None
    content: str = ""
    reason: str = ""
    group: int = 0

    @property
    def image(self) -> Volume:
        assert self.volume is not None
        return self.volume


class Once:
    """Statistics of a scan, found once, by whichever thread needs them first."""

    def __init__(self, vol: Volume, contract: Contract) -> None:
        self._vol, self._contract, self._lock = vol, contract, threading.Lock()
        self._found: Statistics | None = None

    def __call__(self) -> Statistics | None:
        with self._lock:
            if self._found is None and self._contract.normalise == "volume":
                vol = self._vol
                self._found = volume_statistics(vol.voxels, vol.modality, vol.unit, self._contract)
        return self._found


@dataclass(frozen=True, eq=False)
class Item:
    """One thing for a slice encoder: a slice, or a region of a slice.

    weights  (N,) share of each patch that belongs to the region, or None
    notes    on the scan: labels that have no item
    """

    scan: Scan
    slice: int
    region: int | None
    weights: Tensor | None
    contract: Contract
    statistics: Callable[[], Statistics | None]
    notes: tuple[str, ...] = ()

    @property
    def image(self) -> Tensor:
        """(channels, size, size), prepared by the contract, each time anew: a scan's images are larger than the scan."""
        vol = self.scan.image
        return prepare_slice(vol.voxels[self.slice], vol.modality, vol.unit, self.contract, self.statistics())


@dataclass(frozen=True, eq=False)
class Whole3D:
    """One scan for a volume encoder."""

    scan: Scan
    encoder: Encoder

    @property
    def image(self) -> PreparedVolume:
        """Prepared by the contract, anew each time."""
        assert isinstance(self.encoder.contract, VolumeContract)
        return prepare_volume(self.scan.image, self.encoder.contract)


@dataclass(frozen=True, eq=False)
class Refused:
    """One scan that is not encoded."""

    scan: Scan
    reason: str
    image: None = None


AnyItem = Item | Whole3D | Refused


def make_items(scan: Scan, encoder: Encoder, how: How) -> Iterator[AnyItem]:
    """What to encode of one scan. ContractError when it breaks the contract.

    slice, volume  all slices, or `max_slices` evenly spaced ones
    region         for each label of the mask, the slice in which it covers most pixels (CuriaBench A1: one slice and the
                   mask of one organ). A label outside of what the network sees of that slice is left out, with a note
    """
    if scan.reason:
        yield Refused(scan, scan.reason)
        return
    vol, contract = scan.image, encoder.contract
    if vol.modality not in contract.modalities:
        raise ContractError(
            f"modality {vol.modality} is not in the contract; expected {' or '.join(contract.modalities)}"
        )
    if how.level == "region":
        if scan.mask is None:
            raise ContractError("level region needs a mask for every scan; give a table of masks with --masks")
        check_same_grid(vol, scan.mask)
    if not isinstance(contract, Contract):
        yield Whole3D(scan, encoder)
        return
    check_scan(vol.voxels, vol.modality, vol.unit, contract)
    statistics = Once(vol, contract)
    if how.level != "region":
        for z in chosen_slices(vol.shape[0], how.max_slices):
            yield Item(scan, z, None, None, contract, statistics)
        return
    assert scan.mask is not None
    regions = largest_slices(scan.mask.voxels)
    if not regions:
        raise ContractError("the mask holds no label; expected at least one voxel above 0")
    weights = {
        label: region_weights(scan.mask.voxels[z] == label, encoder.grid, contract) for label, z in regions.items()
    }
    seen = {label: regions[label] for label, share in weights.items() if bool(share.any())}
    if not seen:
        raise ContractError("the mask lies outside of what the model sees of a slice; expected a label inside")
    notes = unseen_note(regions, seen)
    for label, z in seen.items():
        yield Item(scan, z, label, weights[label], contract, statistics, notes)


def unseen_note(labels: Iterable[int], seen: Container[int]) -> tuple[str, ...]:
    """Says which labels of a mask have no vector, because the model sees no voxel of them."""
    unseen = [str(label) for label in labels if label not in seen]
    return (f"labels outside of what the model sees, left out: {', '.join(unseen)}",) if unseen else ()
