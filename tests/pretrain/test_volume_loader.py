"""Crops of volumes by sample number: which volumes, which shapes, and the same batch however it is asked for."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from hilum.archive.store.isotropic import read_moments
from hilum.archive.store.store import Store
from hilum.errors import StoreError, UsageError
from hilum.pretrain.loader import batches
from hilum.pretrain.loop import contract_of, training_samples
from hilum.pretrain.sampling import fitting
from hilum.pretrain.volume_loader import Crops, middle_view, num_crops
from hilum.pretrain.watch.samples import middle_crop


@pytest.fixture(scope="module")
def recipe(small):
    return small["3d, lejepa"]


@pytest.fixture(scope="module")
def crops(recipe, volume_stores):
    return Crops(Store(volume_stores / "iso"), recipe, contract_of(recipe))


def test_which_volumes_fit_a_shape():
    """Side by side once both are sorted, whatever their order."""
    sides = np.array([[30, 26, 24], [24, 30, 26], [30, 26, 4], [7, 30, 30]])
    assert fitting(sides, (16, 16, 16), 0.5).tolist() == [True, True, False, False]
    assert fitting(sides, (16, 16, 16), 0.25).tolist() == [True, True, True, True]
    assert fitting(sides, (24, 8, 24), 0.5).tolist() == [True, True, True, True]
    assert num_crops(sides, (8, 24, 24)).tolist() == [4, 4, 1, 1]


def test_each_shape_has_the_volumes_that_fit_it(crops, recipe, volume_stores):
    """The slab is shown in long crops only; without those it is left out, by name."""
    sampled = [{s[n][0] for n in range(2 * s.length)} for s in crops.samplers]
    assert sampled == [{0, 1, 2, 3}, {0, 1, 2, 3, 4}]
    assert crops.facts == {"num_volumes": 5, "left_out": {}, "shapes_without_volume": []}
    only = replace(recipe, volumes=replace(recipe.volumes, shapes=recipe.volumes.shapes[:1]))
    fewer = Crops(crops.store, only, crops.contract)
    assert fewer.facts["left_out"] == {"04aa": [30, 26, 4]}
    assert fewer.num_volumes == 4
    huge = (((96, 96, 96), (48, 48, 48), 1.0), recipe.volumes.shapes[0])
    some = Crops(crops.store, replace(recipe, volumes=replace(recipe.volumes, shapes=huge)), crops.contract)
    assert some.facts["shapes_without_volume"] == [[(96, 96, 96), (48, 48, 48)]]
    with pytest.raises(StoreError, match="fits a shape of recipe"):
        Crops(crops.store, replace(recipe, volumes=replace(recipe.volumes, shapes=huge[:1])), crops.contract)


def test_a_modality_without_weight_is_not_trained_on(recipe, volume_stores):
    ct = replace(recipe, sampling=replace(recipe.sampling, mr=0.0))
    some = Crops(Store(volume_stores / "iso"), ct, contract_of(ct))
    assert {some.samplers[0][n][0] for n in range(some.samplers[0].length)} == {0, 2}
    assert some.contract.modalities == ("CT", "OT")
    assert some.left_out == {}
    none = replace(recipe, sampling=replace(recipe.sampling, ct=0.0, mr=0.0))
    with pytest.raises(StoreError, match=r"holds CT and MR, .* --set sampling.ct=1 --set sampling.mr=1"):
        Crops(some.store, none, contract_of(none))


def test_shapes_are_drawn_by_their_weight_and_alike_within_a_step(crops, recipe):
    size = recipe.run.batch_size
    drawn = Counter(crops.turn(sample)[0] for sample in range(0, 3000 * size, size))
    assert drawn[0] / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert all(len({crops.turn(step * size + n)[0] for n in range(size)}) == 1 for step in range(20))


def test_each_shape_visits_its_volumes_a_whole_number_of_times(crops, recipe):
    """Counted over whole epochs of each shape, whatever steps of other shapes lie between; asked out of order, the same."""
    seen = {number: [] for number in range(len(crops.shapes))}
    for sample in range(600):
        number, turn = crops.turn(sample)
        assert turn == len(seen[number])
        seen[number].append(crops.samplers[number][turn][0])
    for number, sampler in enumerate(crops.samplers):
        whole = len(seen[number]) // sampler.length * sampler.length
        visits = Counter(seen[number][:whole])
        assert whole
        assert visits == {n: q * whole // sampler.length for n, q in enumerate(sampler.quotas.tolist()) if q}
    fresh = Crops(crops.store, recipe, crops.contract)
    assert [fresh.turn(n) for n in (599, 7, 300)] == [crops.turn(n) for n in (599, 7, 300)]


def test_a_batch_is_the_same_however_it_is_cut(crops):
    """Ranks and micro-batches take parts of it; masks hide the same number of patches in every whole group."""
    for step in range(4):
        whole = crops.make_batch(4 * step, 4)
        parts = [crops.make_batch(4 * step + n, 1) for n in range(4)]
        for name, views in (("globals", 2), ("locals", 2), ("masks", 2)):
            one = getattr(whole, name).unflatten(0, (views, 4))
            assert torch.equal(one, torch.stack([getattr(p, name).unflatten(0, (views, 1))[:, 0] for p in parts], 1))
        torch.testing.assert_close(whole.points, torch.cat([p.points for p in parts], 1), equal_nan=True)
        large, small, _ = crops.shapes[crops.turn(4 * step)[0]]
        assert whole.globals.shape == (8, 1, *large)
        assert whole.locals.shape == (8, 1, *small)
        assert whole.masks.shape[1] == np.prod([n // 4 for n in large])
        assert whole.masks.flatten().nonzero()[:, 0].equal(whole.hidden)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_render_as_this_process(crops, recipe, workers):
    fed = replace(recipe, run=replace(recipe.run, num_workers=workers, steps=2, precision="bf16"))
    some = Crops(crops.store, fed, crops.contract)
    stream = batches(some, 0)
    found = [next(stream) for _ in range(2)]
    stream.close()
    for step, batch in enumerate(found):
        exact = crops.make_batch(4 * step, 4)
        assert torch.equal(batch.globals, exact.globals.bfloat16())
        assert torch.equal(batch.masks, exact.masks)


def test_the_middle_of_a_volume_by_hand(crops):
    """A box of the target's proportions; CT by the constants, MR by its own moments."""
    view = middle_view((30, 26, 24), (16, 16, 16))
    assert (view.start, view.size) == ((3, 1, 0), (24, 24, 24))
    store = crops.store
    for key in ("00aa", "01aa"):
        row, stored = store.row(key), store.read_stored(key)[3:27, 1:25].astype(np.float64)
        values = stored * row.slope + row.intercept
        mean, std = (-573.8, 461.3) if row.unit == "HU" else read_moments(store, key)
        values = values.clip(-1000, 1900) if row.unit == "HU" else values
        want = torch.nn.functional.interpolate(
            torch.from_numpy((values - mean) / std)[None, None], (16, 16, 16), mode="trilinear"
        )
        found = middle_crop(crops, key, (16, 16, 16))
        np.testing.assert_allclose(found[0].double().numpy(), want[0, 0].numpy(), atol=0.004)


def test_a_store_that_is_not_made_for_the_recipe(crops, recipe, small, volume_stores):
    """Each mistake is answered with what to run."""
    plain = volume_stores / "plain"
    with pytest.raises(UsageError, match=rf"Run: hilum resample {plain} -o {plain}-isotropic, and"):
        training_samples(Store(plain), recipe)
    other = replace(recipe, volumes=replace(recipe.volumes, min_spacing_mm=2.0))
    with pytest.raises(
        UsageError, match=r"min_spacing_mm 0.75 where the recipe has 2.0.*--set volumes.min_spacing_mm=0.75"
    ):
        training_samples(crops.store, other)
    with pytest.raises(UsageError, match=r"-isotropic --set min_spacing_mm=2\.0, and"):
        training_samples(Store(plain), other)
    assert crops.contract.background_px == 0  # as the store was made
    with pytest.raises(UsageError, match=r"trains on slices, and .* cut to the body"):
        training_samples(crops.store, small["lejepa"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ct": {"blur": 0.3}}, "views.ct.blur must be 0 in 3D, since it is made for slices only; found 0.3"),
        ({"ct": {"window": 0.3}}, "volumes.window draws windows"),
        ({"resolutions": ((32, 16, 1.0),)}, "volumes.shapes lists their shapes"),
    ],
)
def test_what_training_on_volumes_cannot_do_is_refused(recipe, change, words):
    values = {n: replace(getattr(recipe.views, n), **v) if isinstance(v, dict) else v for n, v in change.items()}
    with pytest.raises(UsageError, match=words):
        replace(recipe, views=replace(recipe.views, **values))


def test_gram_anchoring_is_refused_in_3d(recipe):
    with pytest.raises(UsageError, match="gram_weight must be 0 in 3D"):
        replace(recipe, objective=replace(recipe.objective, gram_weight=2.0))
