"""The order of data, and batches that depend on the step only."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hilum.archive.store.store import Store
from hilum.encode.contract import Contract, normalise_slice
from hilum.errors import StoreError
from hilum.pretrain.loader import Batch, Slices, batches, permute, training_slices
from hilum.pretrain.render import render


@pytest.fixture
def slices(store_path, small) -> Slices:
    return Slices(Store(store_path), small["lejepa"], Contract(size_px=32))


def equal(a: Batch, b: Batch) -> bool:
    assert a.locals is not None
    assert b.locals is not None
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("globals", "locals", "masks"))
    same = same and np.array_equal(a.points.numpy(), b.points.numpy(), equal_nan=True)
    return same and a.foreground == b.foreground and a.num_rejected == b.num_rejected


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


# ---- which slices


def test_training_slices_have_enough_anatomy(store_path):
    store = Store(store_path)
    for share in (0.0, 0.3, 0.45):
        volumes, numbers = training_slices(store, share)
        wanted = [(v, z) for v, row in enumerate(store.rows) for z, f in enumerate(row.shares) if f >= share]
        assert list(zip(volumes.tolist(), numbers.tolist())) == wanted
    assert 0 < len(training_slices(store, 0.45)[0]) < len(training_slices(store, 0.0)[0])


def test_a_store_without_anatomy_is_refused(store_path):
    message = r"no slice of .* has 99% anatomy; the best of 4 volumes has \d+%\. Lower it with --set views\.min_image"
    with pytest.raises(StoreError, match=message):
        training_slices(Store(store_path), 0.99)


def test_an_epoch_shows_every_slice_once(slices):
    num = len(slices.volume)
    orders = []
    for epoch in range(2):
        seen = []
        for sample in range(epoch * num, (epoch + 1) * num):
            image, content, key = slices.read(sample)
            seen.append((key, float(image.sum()), content.foreground))
        assert len(set(seen)) == num
        orders.append(seen)
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_slices_are_read_and_normalised_as_the_contract_says(slices):
    image, content, key = slices.read(3)
    pixels = slices.store.read_volume(key)
    row = slices.store.row(key)
    candidates = [normalise_slice(s.astype(np.float32), row.unit, slices.contract) for s in pixels.voxels]
    found = [z for z, c in enumerate(candidates) if torch.equal(c, image)]
    assert len(found) == 1
    assert content.foreground == row.shares[found[0]]


# ---- batches


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers_or_the_start(store_path, small, slices, num_workers):
    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, steps=5, num_workers=num_workers))
    other = Slices(Store(store_path), recipe, Contract(size_px=32))
    wanted = [slices[step] for step in range(5)]
    for start in (0, 3):
        found = list(batches(other, start))
        assert len(found) == 5 - start
        assert all(equal(a, b) for a, b in zip(found, wanted[start:]))
    assert not equal(wanted[0], wanted[1])


def test_layout_of_a_batch(slices):
    """All first globals, then all second ones; masks in the same order, as many hidden patches in every step."""
    batch = slices[2]
    assert batch.globals.shape == (8, 1, 32, 32)
    assert batch.locals is not None
    assert batch.locals.shape == (8, 1, 16, 16)
    assert batch.masks.shape == (8, 16)
    for place, drawn in enumerate(slices.draw(2)):
        views, crops = drawn.views, render(drawn.image, drawn.views)
        assert np.array_equal(batch.points[:, place].numpy(), drawn.points, equal_nan=True)
        for number in range(4):
            group = batch.globals if number < 2 else batch.locals
            assert torch.equal(group[(number % 2) * 4 + place], crops[number])
        for number in range(2):
            mask = views[number].mask
            wanted = np.zeros(16, bool) if mask is None else mask.ravel()
            assert np.array_equal(batch.masks[number * 4 + place].numpy(), wanted)
    assert len({int(slices[step].masks.sum()) for step in range(4)}) == 1


def test_batches_follow_the_seed(store_path, small, slices):
    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, seed=1))
    assert not equal(Slices(Store(store_path), recipe, Contract(size_px=32))[0], slices[0])


def test_without_local_crops(store_path, small):
    recipe = replace(small["lejepa"], views=replace(small["lejepa"].views, num_local=0))
    assert Slices(Store(store_path), recipe, Contract(size_px=32))[0].locals is None
