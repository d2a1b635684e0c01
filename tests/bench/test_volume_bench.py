"""Encoders of volumes in the benchmark: each scan once, beside encoders of slices, and both together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hilum as package
from hilum.archive.labels import read_labels
from hilum.bench.phantom.scans import PhantomSettings, write_phantom_scans
from hilum.bench.run import run as runner
from hilum.bench.run.features import FeatureCache
from hilum.bench.run.joined import JoinedFeatures
from hilum.bench.run.run import BenchSettings, run_bench
from hilum.bench.run.suites import choose_tasks, open_task
from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder, write_encoder
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import ViT
from hilum.encode.volume_contract import VolumeContract
from hilum.errors import UsageError
from hilum.probe.heads import make_head
from hilum.records import read_json, read_table


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
    encoder = package.load_encoder(models["deep"])
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
        scan = package.read(case.scan.path)
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
    encoder = package.load_encoder(models["deep"])
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


# ---- two encoders as one


class Table:
    """Features of cases as `CaseFeatures` has them, of known numbers."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.keys, self.reasons = x, [str(n) for n in range(len(x))], [""] * len(x)

    def vectors(self, pooling: str) -> np.ndarray:
        return self.x if pooling == "class" else -self.x

    def take(self, numbers):
        return Table(self.x[list(numbers)])


def test_parts_are_equally_long_whatever_their_scale_and_width():
    """Cosines of the joined rows are the mean of the parts' cosines where rows of a part are equally long; test cases have no
    say in the scale; a head that scales columns sees what it would see of the plain columns."""
    rng = np.random.default_rng(0)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(40, 3)), rng.normal(size=(40, 11)))]
    small, large = unit[0] * 1e-3, unit[1] * 1e3
    learnt = [n < 30 for n in range(40)]
    joined = JoinedFeatures(parts=(Table(small), Table(large)), learnt=learnt)
    found = joined.vectors("class")
    length = np.linalg.norm(found, axis=1)
    cosines = found @ found.T / np.outer(length, length)
    np.testing.assert_allclose(cosines, (unit[0] @ unit[0].T + unit[1] @ unit[1].T) / 2, atol=1e-6)
    assert (found**2).mean() == pytest.approx(1, rel=1e-5)
    wild = large.copy()
    wild[30:] *= 50
    again = JoinedFeatures(parts=(Table(small), Table(wild)), learnt=learnt).vectors("class")
    np.testing.assert_allclose(again[:30], found[:30], rtol=1e-6)
    np.testing.assert_allclose(joined.vectors("class|mean")[:, 3:], -found[:, 3:], rtol=1e-6)
    y = (unit[0][:, 0] + unit[1][:, 0] > 0).astype(int)
    plain = np.hstack([small, large])
    heads = [make_head("linear").fit(x[:30], y[:30]).outputs(x[30:]) for x in (plain, found)]
    np.testing.assert_allclose(heads[0], heads[1], atol=1e-3)
    some = joined.take([35, 2])
    assert some.learnt == [False, True]
    assert joined.take([35, 36]).learnt == [True, True]


def _refuse(task):
    if task.kind == "localisation":
        raise UsageError("not now")


def test_a_joined_model_stands_beside_its_parts(tmp_path, root, models, hilum, monkeypatch):
    """Run, compared and shown. Findings: all three; age asks about slices; a lesion's centre needs tokens; organs of MR are
    left out by the encoder that knows CT only."""
    chosen = ["both=flat+deep", f"flat={models['flat']}", f"deep={models['deep']}"]
    out, names = tmp_path / "out", ("findings", "retrieval", "age", "organ-mr", "lesion-centre")
    settings = BenchSettings(num_resamples=100, seeds=1, allow_missing=True)
    plain = runner.fit_trials  # heads on tokens take their time, and are tried elsewhere
    monkeypatch.setattr(runner, "fit_trials", lambda m, *a, **k: _refuse(m.task) or plain(m, *a, **k))
    result = run_bench(tasks_of(*names), chosen, root, out, settings)
    scored = {(s["task"].partition(":")[2], s["model"]) for s in result["scores"]}
    for name in ("findings", "retrieval"):
        assert {model for task, model in scored if task == name} == {"flat", "deep", "both"}
    left = {(row["task"].partition(":")[2], row["model"]): row["reason"] for row in result["left_out"]}
    assert left["age", "both"] == left["age", "deep"]
    assert "encodes volumes" in left["age", "both"]
    assert "deep sees CT; phantom:organ-mr is MR" in left["organ-mr", "both"]
    assert (
        left["lesion-centre", "both"] == "localisation, full: a head on patch tokens; joined models have vectors only"
    )
    about = read_json(out / "results.json")["models"]["both"]
    assert set(about["contract_is"]["joined"]) == {"flat", "deep"}
    before = {path: path.stat().st_mtime_ns for path in (out / "predictions").iterdir()}
    run_bench(tasks_of(*names), chosen, root, out, settings)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "predictions").iterdir()}

    command = ["bench", "compare", out, "--model", "flat", "--model", "deep", "--model", "both", "--resamples", 100]
    code, text, error = hilum(*command)
    assert code == 0, error
    assert max(map(len, text.splitlines())) <= 100
    assert "deep is better than flat on" in " ".join(text.split())


@pytest.mark.parametrize(
    ("joined", "said"),
    [
        ("both=flat+other", "other is none of them"),
        ("both=flat+flat", "joins a model with itself"),
        ("a+b", "no encoder 'a"),
    ],
)
def test_what_cannot_be_joined_is_said(tmp_path, root, models, joined, said):
    with pytest.raises(UsageError, match=said):
        run_bench(tasks_of("findings"), [f"flat={models['flat']}", joined], root, tmp_path / "out")
