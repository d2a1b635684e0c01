"""Encoders of volumes in the benchmark: each scan once, beside encoders of slices, and both together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hilum
from hilum.archive.labels import read_labels
from hilum.bench.phantom.scans import PhantomSettings, write_phantom_scans
from hilum.bench.run.features import FeatureCache
from hilum.bench.run.suites import choose_tasks, open_task
from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder, write_encoder
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import ViT
from hilum.encode.volume_contract import VolumeContract
from hilum.records import read_table


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("volumes")
    write_phantom_scans(root / "phantom", PhantomSettings(num_patients=16, num_heads=1, num_slices=10, matrix=32))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An encoder of slices and one of volumes, both tiny and drawn."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write_encoder(folder / "flat", ViT(ViTConfig(size="48x1x2-mlp96", image=(64, 64))), Contract(size_px=64), {})
    contract = VolumeContract(background_px=0, patch=(8, 8, 8), min_spacing_mm=6.0)
    config = ViTConfig(size="48x1x2-mlp96", patch=(8, 8, 8), image=(16, 16, 16), positions="rotary")
    write_encoder(folder / "deep", ViT(config), contract, {})
    return {name: str(folder / name) for name in ("flat", "deep")}


def tasks_of(*names: str):
    return choose_tasks(ids=[f"phantom:{name}" for name in names])


# ---- each scan once


def test_all_regions_of_a_scan_come_from_one_pass(tmp_path, root, models, monkeypatch):
    """As many passes as scans; the vectors are those of each region encoded alone, whatever order the cases have."""
    encoder = hilum.load_encoder(models["deep"])
    task, found = open_task(tasks_of("organ")[0], root)
    order = np.random.default_rng(0).permutation(len(found.cases))
    cases = [found.cases[n] for n in order][:40]
    passes = []
    plain = Encoder.tokens
    monkeypatch.setattr(Encoder, "tokens", lambda self, *a: passes.append(1) or plain(self, *a))
    cache = FeatureCache(tmp_path, encoder)
    got = cache.features(task, cases, tokens=True)
    assert len(passes) == len({case.scan.path for case in cases}) < len(cases)
    assert len(set(got.tokens)) == len(passes)
    kept = [n for n, reason in enumerate(got.reasons) if not reason]
    assert len(kept) > 30
    seen = got.take(kept)
    for n, case in enumerate([cases[n] for n in kept[:6]]):
        scan = hilum.read(case.scan.path)
        labels = read_labels(case.region.source.path, scan).volume
        mask = replace(labels, voxels=np.isin(labels.voxels, case.region.values).astype(np.uint8))
        alone = encoder.encode(scan, "region", mask=mask, pooling="mean+max")
        np.testing.assert_allclose(seen.vectors("mean+max")[n], alone.vectors[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(seen.vectors("class")[n], alone.cls[0], rtol=1e-5, atol=1e-6)
        one = seen.sequence()[n]
        inside = alone.patches.reshape(-1, alone.patches.shape[-1])[one.place]
        np.testing.assert_allclose(one.tokens, inside, atol=2e-3)  # float16
        mean = np.average(inside, axis=0, weights=one.weights)
        np.testing.assert_allclose(mean, alone.vectors[0][: len(mean)], atol=1e-4)
    for n in set(range(len(cases))) - set(kept):  # at an edge that is no whole patch
        assert got.reasons[n] == "contract: the mask covers no token of the volume; expected at least one voxel inside"


def test_a_region_that_cannot_be_pooled_costs_no_other(tmp_path, root, models):
    """One without a voxel, one whose labels are damaged; and a killed run goes on with what is left."""
    encoder = hilum.load_encoder(models["deep"])
    task, found = open_task(tasks_of("organ")[0], root)
    first = [case for case in found.cases if case.patient == found.cases[0].patient]
    empty = replace(first[0], region=replace(first[0].region, values=(250,)))
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    source = replace(first[1].region.source, path=tmp_path / "broken.nii.gz")
    gone = replace(first[1], region=replace(first[1].region, source=source))
    cache = FeatureCache(tmp_path, encoder)
    got = cache.features(task, [empty, gone, *first[2:]])
    assert [bool(reason) for reason in got.reasons] == [True, True] + [False] * len(first[2:])
    assert "broken" not in "".join(got.reasons)
    written = sum(read_table(path).num_rows for path in cache.place.glob("vectors-*.parquet"))
    assert written == len(first)
    again = FeatureCache(tmp_path, encoder).features(task, first).take(range(2, len(first)))
    np.testing.assert_array_equal(again.vectors("mean"), got.take(range(2, len(first))).vectors("mean"))
