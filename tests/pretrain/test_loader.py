"""Batches that depend on their sample numbers only."""

import contextlib
import multiprocessing
import multiprocessing.resource_sharer
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.store import Store, open_for_writing, restore, write_header, write_volume
from hilum.encode.contract import Contract
from hilum.errors import StoreError, UsageError, WorkerDied
from hilum.pretrain import loader
from hilum.pretrain.loader import Batch, Slices, batches
from hilum.pretrain.recipe import Recipe, Sampling
from hilum.volume import Volume


def make_slices(store_path: Path, recipe: Recipe) -> Slices:
    return Slices(Store(store_path), recipe, Contract(size_px=32))


@pytest.fixture
def slices(store_path, small) -> Slices:
    return make_slices(store_path, small["lejepa, patches"])


def with_run(recipe: Recipe, **changes) -> Recipe:
    return replace(recipe, run=replace(recipe.run, **changes))


def equal(a: Batch, b: Batch) -> bool:
    assert a.locals is not None
    assert b.locals is not None
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("globals", "locals", "masks"))
    same = same and np.array_equal(a.points.numpy(), b.points.numpy(), equal_nan=True)
    return same and a.foreground == b.foreground and a.num_rejected == b.num_rejected


def join(parts: list[Batch], num_global: int = 2) -> dict[str, torch.Tensor]:
    """Batches of consecutive samples as one, in the layout of one."""
    groups = {"globals": [p.globals for p in parts], "masks": [p.masks for p in parts]}
    groups["locals"] = [p.locals for p in parts if p.locals is not None]
    views = {"globals": num_global, "masks": num_global, "locals": 2}
    return {n: torch.cat([t.unflatten(0, (views[n], -1)) for t in g], 1).flatten(0, 1) for n, g in groups.items()}


# ---- which slices


def test_samples_are_slices_with_enough_anatomy_as_stored(slices):
    seen = set()
    for sample in range(slices.num_slices):
        drawn = slices.draw(sample)
        row = slices.store.row(drawn.key)
        assert row.shares[drawn.z] >= 0.2
        assert np.array_equal(drawn.source.stored, slices.store.read_stored(drawn.key)[drawn.z])
        assert (drawn.source.slope, drawn.source.unit) == (row.slope, row.unit)
        pixels, content = slices.store.read_slice(drawn.key, drawn.z)
        assert np.array_equal(restore(drawn.source.stored, row.slope, row.intercept), pixels)
        assert content.foreground == pytest.approx(row.shares[drawn.z])
        seen.add((drawn.key, drawn.z))
    assert len(seen) == slices.num_slices == sum(int((row.shares >= 0.2).sum()) for row in slices.store.rows)


def test_sampling_settings_are_used(store_path, small):
    recipe = replace(small["lejepa"], sampling=Sampling(ct=0.0))
    slices = make_slices(store_path, recipe)
    assert all(slices.draw(n).source.unit == "" for n in range(20))


# ---- batches


def test_layout_of_a_batch(slices):
    """All first globals, then all second ones; masks in the same order, as many hidden patches in every step."""
    batch = slices[2]
    assert batch.globals.shape == (8, 1, 32, 32)
    assert batch.locals is not None
    assert batch.locals.shape == (8, 1, 16, 16)
    assert batch.masks.shape == (8, 16)
    assert batch.gram is None
    for place in range(4):
        drawn = slices.draw(8 + place)
        crops = slices.render_alone(drawn)
        assert np.array_equal(batch.points[:, place].numpy(), drawn.points, equal_nan=True)
        for number in range(4):
            group = batch.globals if number < 2 else batch.locals
            np.testing.assert_allclose(group[(number % 2) * 4 + place, 0].numpy(), crops[number], atol=1e-6)
        for number in range(2):
            mask = drawn.views[number].mask
            wanted = np.zeros(16, bool) if mask is None else mask.ravel()
            assert np.array_equal(batch.masks[number * 4 + place].numpy(), wanted)
    assert len({int(slices[step].masks.sum()) for step in range(4)}) == 1


def test_any_split_of_the_samples_gives_the_same(slices):
    whole = slices.make_batch(4, 6)
    for sizes in ((1, 5), (2, 2, 2), (3, 3)):
        starts = np.cumsum([4, *sizes[:-1]])
        parts = join([slices.make_batch(int(first), size) for first, size in zip(starts, sizes)])
        assert all(torch.equal(parts[name], getattr(whole, name)) for name in parts)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers_or_the_start(store_path, small, slices, num_workers):
    other = make_slices(store_path, with_run(small["lejepa, patches"], steps=5, num_workers=num_workers))
    wanted = [slices[step] for step in range(5)]
    for start in (0, 3):
        found = list(batches(other, start))
        assert len(found) == 5 - start
        assert all(equal(a, b) for a, b in zip(found, wanted[start:]))
    assert not equal(wanted[0], wanted[1])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_the_batch(store_path, small, slices, world, accumulate):
    """Micro-batch by micro-batch, rank by rank, the samples come in order; the same masks are hidden in all."""
    other = make_slices(store_path, with_run(small["lejepa, patches"], steps=3))
    streams = [list(batches(other, 1, rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    assert [len(s) for s in streams] == [2 * accumulate] * world
    for step in range(2):
        parts = [streams[r][step * accumulate + a] for a in range(accumulate) for r in range(world)]
        found = join(parts)
        assert all(torch.equal(found[name], getattr(slices[1 + step], name)) for name in found)
        if world * accumulate == 2:
            assert len({int(part.masks.sum()) for part in parts}) == 1  # two slices are one group


def test_a_batch_that_cannot_be_shared_is_refused(slices):
    with pytest.raises(UsageError, match=r"batch_size 4 cannot be shared by 3 ranks with 2 .* make it a multiple of 6"):
        next(batches(slices, 0, world=3, accumulate=2))


def test_batches_follow_the_seed(store_path, small, slices):
    assert not equal(make_slices(store_path, with_run(small["lejepa, patches"], seed=1))[0], slices[0])


def test_without_local_crops(store_path, small):
    recipe = replace(small["lejepa"], views=replace(small["lejepa"].views, num_local=0))
    assert make_slices(store_path, recipe)[0].locals is None


def test_points_are_drawn_where_they_are_used(store_path, small, slices):
    assert slices[0].points.shape == (2, 4, 16, 2)
    assert make_slices(store_path, small["lejepa"])[0].points.shape == (2, 4, 0, 2)


def test_slices_of_several_sizes_in_a_batch(tmp_path, small):
    rng = np.random.default_rng(0)
    open_for_writing(tmp_path, {"settings": {}})
    rows = []
    for n, shape in enumerate([(3, 40, 56), (3, 64, 48)]):
        voxels = rng.integers(-900, 900, shape).astype(np.int16)
        rows.append(write_volume(tmp_path, f"{n:02d}", Volume(voxels=voxels, affine=None, modality="CT", unit="HU")))
    write_index(index_path(tmp_path), rows)
    write_header(tmp_path, {"status": "complete", "settings": {}})
    slices = make_slices(tmp_path, small["lejepa"])
    batch, parts = slices.make_batch(0, 4), join([slices.make_batch(n, 1) for n in range(4)])
    assert {tuple(slices.draw(n).source.stored.shape) for n in range(4)} == {(40, 56), (64, 48)}
    assert all(torch.equal(parts[name], getattr(batch, name)) for name in parts)


# ---- sizes that change, and Gram crops


def test_one_resolution_a_step(store_path, small):
    sizes = ((32, 16, 3.0), (64, 32, 1.0))
    recipe = small["dino, sinkhorn"]
    recipe = with_run(replace(recipe, views=replace(recipe.views, resolutions=sizes)), steps=400)
    slices = make_slices(store_path, recipe)
    by_step = [{slices.sizes(4 * step + n) for n in range(4)} for step in range(400)]
    assert all(len(one) == 1 for one in by_step)
    drawn = [one.pop() for one in by_step]
    assert np.mean([one == (64, 32) for one in drawn]) == pytest.approx(0.25, abs=0.07)
    for px, local_px in ((32, 16), (64, 32)):
        steps = [n for n, one in enumerate(drawn) if one == (px, local_px)][:2]
        found = [slices[step] for step in steps]
        assert all(b.globals.shape == (8, 1, px, px) for b in found)
        assert all(b.locals is not None and b.locals.shape == (8, 1, local_px, local_px) for b in found)
        assert all(b.masks.shape == (8, (px // 8) ** 2) for b in found)
        assert len({int(b.masks.sum()) for b in found}) == 1
        assert not torch.equal(found[0].globals, found[1].globals)


def test_resolutions_fit_the_patch(small):
    with pytest.raises(UsageError, match=r"views.resolutions 20 is no multiple of the patch"):
        replace(small["lejepa"], views=replace(small["lejepa"].views, resolutions=((32, 20, 1.0),)))


def test_gram_crops_are_the_global_ones_unchanged(store_path, small):
    recipe = small["dino, sinkhorn"]
    quiet = replace(recipe.views, ct=type(recipe.views.ct)(), mr=type(recipe.views.mr)())
    recipe = replace(recipe, objective=replace(recipe.objective, gram_weight=1.0, gram_start=0.5, gram_px=32))
    slices = make_slices(store_path, recipe)
    assert slices[9].gram is None
    loud, plain = slices[10], make_slices(store_path, replace(recipe, views=quiet))[10]
    assert loud.gram is not None
    assert loud.gram.shape == (8, 1, 32, 32)
    assert not torch.allclose(loud.globals, plain.globals, atol=1e-2)
    torch.testing.assert_close(loud.gram, plain.globals, atol=1e-5, rtol=1e-5)


# ---- made elsewhere


def test_a_device_is_sent_slices_and_numbers_and_makes_the_same_pixels(store_path, small, slices, monkeypatch):
    """With the workers told to leave the pixels to the device, which is this processor."""
    monkeypatch.setattr(loader, "_rendered_by_workers", lambda *_: False)
    other = make_slices(store_path, with_run(small["lejepa, patches"], steps=3, num_workers=1))
    assert all(equal(a, slices[step]) for step, a in enumerate(batches(other, 0)))


def test_errors_of_a_worker_come_through_whole(store_path, small, tmp_path):
    slices = make_slices(store_path, with_run(small["lejepa"], num_workers=1))
    slices.store.root = tmp_path
    before = multiprocessing.active_children()
    with pytest.raises(StoreError, match=r"^volume \w+ of") as raised:
        next(batches(slices, 0))
    assert raised.traceback  # which refers to the loader; yet its workers are gone
    assert multiprocessing.active_children() == before


@pytest.fixture
def stream(store_path, small) -> Iterator[Iterator[Batch]]:
    recipe = with_run(small["lejepa"], num_workers=1, steps=10_000)
    with contextlib.closing(batches(make_slices(store_path, recipe), 0)) as stream:
        yield stream


def children() -> set[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children")
    if not found.exists():
        pytest.skip("needs Linux")
    return set(map(int, found.read_text().split()))


def test_the_death_of_a_worker_is_told(stream):
    """Killed from outside, as by a machine without memory; not where the program happens to be, but at the next batch."""
    before = children()
    next(stream)
    for worker in children() - before:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"ended from outside .* lower run\.num_workers .* run the same command again"):
        list(islice(stream, 10))


@pytest.mark.parametrize("what", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_death_while_a_batch_is_handed_over_is_told(stream, monkeypatch, what):
    """What the connection to the dead worker raises: it takes the right moment to see it for real."""
    next(stream)

    def broken(self: object) -> None:
        raise what

    monkeypatch.setattr(multiprocessing.resource_sharer.DupFd, "detach", broken)
    with pytest.raises(WorkerDied, match="ended from outside"):
        list(islice(stream, 10))
