"""The order of data: quotas, permutations, and nothing that depends on workers."""

from collections import Counter

import numpy as np
import pytest

from hilum.archive.store.store import Store
from hilum.errors import StoreError, UsageError
from hilum.pretrain.recipe import Sampling
from hilum.pretrain.sampling import Sampler, count_slices, mix, modality_weights, permute, sample_rng


def make_sampler(counts: list[int], weights: list[float] | None = None, power: float = 1.0, seed: int = 0) -> Sampler:
    return Sampler(np.array(counts, np.int64), np.array(weights or [1.0] * len(counts)), power, seed)


# ---- the permutation


def test_permute_is_a_bijection():
    for length in (*range(1, 40), 63, 64, 65, 100, 255, 257, 1000, 4096, 4097):
        for key in (0, 1, 77, 12_345_678_901):
            assert sorted(permute(n, length, key) for n in range(length)) == list(range(length))


def test_permute_shuffles():
    """Other keys give other orders; neighbours do not stay neighbours; no place is preferred."""
    orders = np.array([[permute(n, 500, key) for n in range(500)] for key in range(20)])
    assert len({tuple(o) for o in orders}) == 20
    assert (np.abs(np.diff(orders, axis=1)) == 1).mean() < 0.02
    assert np.abs([np.corrcoef(np.arange(500), o)[0, 1] for o in orders]).max() < 0.2
    assert orders[:, 0].std() > 80  # a uniform place has 144


def test_mix_tells_numbers_and_their_order_apart():
    assert len({mix(a, b) for a in range(40) for b in range(40)}) == 1600
    bits = np.array([[mix(3, n) >> k & 1 for k in range(64)] for n in range(2000)])
    assert bits.mean(0) == pytest.approx(np.full(64, 0.5), abs=0.06)


def test_generators_of_seeds_samples_and_purposes_differ():
    first = [sample_rng(s, n, p).random() for s in (0, 1) for n in (0, 1) for p in (0, 1)]
    assert len(set(first)) == 8
    assert sample_rng(0, 1).random() == sample_rng(0, 1).random()


# ---- by default every slice once


def test_an_epoch_shows_every_slice_once():
    counts = [3, 0, 7, 1, 12]
    sampler = make_sampler(counts)
    assert sampler.length == 23
    assert sampler.quotas.tolist() == counts
    orders = []
    for epoch in range(3):
        seen = [sampler[n] for n in range(epoch * 23, (epoch + 1) * 23)]
        assert sorted(seen) == [(v, z) for v, n in enumerate(counts) for z in range(n)]
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    assert [make_sampler(counts, seed=1)[n] for n in range(23)] != orders[0]


# ---- other shares


@pytest.mark.parametrize("power", [0.0, 0.5, 0.8])
def test_quotas_are_the_shares_to_within_rounding(power):
    counts = [1000, 20, 20, 300, 1]
    quotas = make_sampler(counts, power=power).quotas
    shares = np.array(counts, float) ** power
    wanted = shares / shares.sum() * quotas.sum()
    assert np.abs(quotas - wanted).max() < 1 + 1e-6
    assert quotas.min() >= 1
    assert quotas.sum() == pytest.approx(sum(counts), abs=1)


def test_weights_multiply_the_share_and_zero_leaves_out():
    counts, weights = [400, 300, 100], [0.25, 1.0, 0.0]
    sampler = make_sampler(counts, weights)
    seen = Counter(sampler[n][0] for n in range(sampler.length))
    assert seen[0] / seen[1] == pytest.approx(1 / 3, rel=0.02)
    assert seen[2] == 0
    assert sampler.length == pytest.approx(700, abs=1)


def test_a_small_share_lengthens_the_epoch_so_that_no_volume_is_left_out():
    sampler = make_sampler([1, 1, 50], [0.01, 0.01, 1.0])
    assert sampler.quotas.min() >= 1
    assert sampler.quotas[2] / sampler.quotas[0] == pytest.approx(5000, rel=0.01)


def test_slices_of_a_volume_are_seen_equally_often_across_epochs():
    """Quota 4 of 20 slices a volume an epoch: five epochs show each once, none twice before all were seen."""
    sampler = make_sampler([20, 2], power=0.0)
    assert sampler.quotas.tolist() == [11, 11]
    for volume, count in ((0, 20), (1, 2)):
        seen = []
        for epoch in range(20):
            span = range(epoch * sampler.length, (epoch + 1) * sampler.length)
            seen += [z for v, z in map(sampler.__getitem__, span) if v == volume]
            times = Counter(seen)
            assert max(times.values()) - min(times[z] for z in range(count)) <= 2
        assert set(Counter(seen).values()) == {220 // count}


def test_nothing_to_train_on():
    with pytest.raises(StoreError, match="every volume has weight 0"):
        make_sampler([3, 4], [0.0, 0.0])
    for changes in ({"ct": -1.0}, {"ct": 0.0, "mr": 0.0, "other": 0.0}):
        with pytest.raises(UsageError, match="must be at least 0 and not all 0"):
            Sampling(**changes)
    with pytest.raises(UsageError, match="volume_power must be between 0 and 1; found 2"):
        Sampling(volume_power=2.0)


def test_a_million_volumes():
    """Set up without a loop over volumes; a sample is a search and two permutations."""
    counts = np.random.default_rng(0).integers(1, 200, 1_000_000)
    sampler = Sampler(counts, np.ones(len(counts)), 0.5, 0)
    assert len({sampler[n] for n in range(1000)}) > 990
    assert sampler.ends.nbytes + sampler.counts.nbytes <= 16_000_000


# ---- what is worth training on


def test_counted_slices_have_enough_anatomy(store_path):
    store = Store(store_path)
    for share in (0.0, 0.3, 0.45):
        assert count_slices(store, share).tolist() == [int((row.shares >= share).sum()) for row in store.rows]
    assert 0 < count_slices(store, 0.45).sum() < count_slices(store, 0.0).sum()


def test_a_store_without_anatomy_is_refused(store_path):
    message = r"no slice of .* has 99% anatomy; the best of 4 volumes has \d+%\. Lower it with --set views\.min_image"
    with pytest.raises(StoreError, match=message):
        count_slices(Store(store_path), 0.99)


def test_weights_by_modality(store_path):
    store = Store(store_path)
    wanted = [{"CT": 2.0, "MR": 0.5}[row.modality] for row in store.rows]
    assert modality_weights(store, Sampling(ct=2.0, mr=0.5)).tolist() == wanted
