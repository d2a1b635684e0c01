"""Sample number → volume, slice and random draws. Stateless: the order of data depends on the seed and on nothing else.

An epoch gives each volume a whole number of visits, its quota, and puts all visits in an order that a keyed permutation
decides. The visits of one volume walk through its slices in an order of its own that goes on from epoch to epoch, so
all its slices are seen equally often whatever the quota. Workers, ranks, batches and resuming cannot change any of it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hilum.archive.store.store import Store
from hilum.errors import StoreError
from hilum.pretrain.recipe import Sampling
from hilum.pretrain.volume_spec import Shape

_ROUNDS = 6
_WORD = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """64 bits that depend on every number and its place, by the finaliser of MurmurHash3 after each."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number * 0x9E3779B97F4A7C15 + 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCD) & _WORD
        mixed = ((mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53) & _WORD
        mixed ^= mixed >> 33
    return mixed


def permute(position: int, length: int, key: int) -> int:
    """The place of `position` in a keyed permutation of range(length): a Feistel network with cycle walking."""
    half = max((length - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for number in range(_ROUNDS):
            # the multiply-xorshift finaliser of MurmurHash3, keyed by round
            mixed = (right + key * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) & _WORD
            mixed = ((mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCD) & _WORD
            mixed = ((mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53) & _WORD
            left, right = right, left ^ ((mixed ^ (mixed >> 33)) & low)
        position = (left << half) | right
        if position < length:
            return position


def sample_rng(seed: int, number: int, purpose: int = 0) -> np.random.Generator:
    """The generator of one training sample (purpose 0) or one group of masks (1)."""
    return np.random.Generator(np.random.Philox(key=np.array([mix(seed, purpose), number], np.uint64)))


def draw_weighted(weights: Sequence[float], *numbers: int) -> int:
    """A place in a list of weights, decided by the numbers alone."""
    ends = np.cumsum(weights)
    place = mix(*numbers) / 2**64 * ends[-1]
    return min(int(np.searchsorted(ends, place, side="right")), len(ends) - 1)


class Sampler:
    """The endless stream of samples.

    counts   (V,) slices worth training on, of each volume; in 3D crops that it holds
    weights  (V,) weight of each volume's modality
    power    see `Sampling.volume_power`

    A volume's share of an epoch is weight · count**power. Shares are scaled so that an epoch has about as many samples as
    there are slices, or more where that takes to visit every volume, and made whole along their running sum.
    """

    def __init__(self, counts: NDArray[np.int64], weights: NDArray[np.float64], power: float, seed: int) -> None:
        shares = np.where(counts > 0, weights * counts.astype(np.float64) ** power, 0.0)
        if not shares.any():
            raise StoreError("nothing is left to train on: every volume has weight 0 (see the settings of sampling)")
        scale = max(counts[shares > 0].sum() / shares.sum(), 1 / shares[shares > 0].min())
        self.counts, self.seed = counts, seed
        self.ends = np.floor(np.cumsum(shares * scale) + 1e-6).astype(np.int64)
        self.length = int(self.ends[-1])

    @property
    def quotas(self) -> NDArray[np.int64]:
        """(V,) visits of each volume in an epoch."""
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """Volume of a sample, and which of the volume's slices worth training on."""
        epoch, position = divmod(sample, self.length)
        place = permute(position, self.length, mix(self.seed, 2, epoch))
        volume = int(np.searchsorted(self.ends, place, side="right"))
        start = int(self.ends[volume - 1]) if volume else 0
        visit = epoch * (int(self.ends[volume]) - start) + place - start
        count = int(self.counts[volume])
        turn, position = divmod(visit, count)
        return volume, permute(position, count, mix(self.seed, 3, volume, turn))


def enough_anatomy(min_foreground: float) -> NDArray[np.bool_]:
    """(256,) for each stored share of anatomy (255 = all), whether a slice is worth training on."""
    return np.asarray(np.arange(256) / 255 >= min_foreground)


def count_slices(store: Store, min_foreground: float) -> NDArray[np.int64]:
    """(V,) slices of each volume with enough anatomy. StoreError when none has."""
    enough, best = enough_anatomy(min_foreground), 0.0
    counts = np.zeros(len(store), np.int64)
    for volume, _, level in store.foreground():
        if len(volume):
            kept = volume[enough[level]]
            counts[volume[0] : volume[-1] + 1] += np.bincount(kept - volume[0], minlength=volume[-1] - volume[0] + 1)
            best = max(best, int(level.max()) / 255)
    if not counts.any():
        raise StoreError(
            f"no slice of {store.root} has {min_foreground:.0%} anatomy; the best of {len(store)} volumes has {best:.0%}. "
            "Lower it with --set views.min_image_foreground=..."
        )
    return counts


def modality_weights(store: Store, sampling: Sampling) -> NDArray[np.float64]:
    """(V,) weight of each volume's modality."""
    modality = store.rows.table["modality"].combine_chunks().dictionary_encode()
    known = {"CT": sampling.ct, "MR": sampling.mr}
    weights = np.array([known.get(name, sampling.other) for name in modality.dictionary.to_pylist()], np.float64)
    return np.asarray(weights[modality.indices.to_numpy(zero_copy_only=False)])


def fitting(sides: NDArray[np.int64], shape: Shape, min_share: float) -> NDArray[np.bool_]:
    """(V,) whether volumes (V, 3) are large enough for crops of a shape: side by side, sorted, `min_share` of it or more."""
    return np.asarray((np.sort(sides, 1) >= min_share * np.sort(shape)).all(1))
