"""Signals against closed forms and the numbers of the literature; the monitor on a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hilum.encode.vit import Tokens
from hilum.pretrain.loop import pretrain, read_lines
from hilum.pretrain.watch.health import (
    CLOCK,
    effective_rank,
    feature_health,
    feature_spread,
    measure_peak,
    probe_health,
    update_ratio,
)  # fmt: skip
from hilum.pretrain.watch.samples import read_samples


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_of_normal_rows():
    """Measured for iid Gaussian rows of width 768 in facts on RankMe: 458 at N = 512."""
    assert effective_rank(normal(512, 768)) == pytest.approx(458, abs=2)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_effective_rank_of_k_equal_directions_is_k(k):
    q, _ = torch.linalg.qr(normal(16, 16).double())
    rows = torch.cat([q[:k], -q[:k]]).float()  # centred, k equal singular values
    assert effective_rank(rows) == pytest.approx(k, rel=1e-4)


def test_spread_is_one_for_isotropic_and_zero_for_one_point():
    assert feature_spread(normal(4096, 64)) == pytest.approx(1, abs=0.02)
    assert feature_spread(torch.ones(8, 64)) == pytest.approx(0, abs=1e-6)
    assert feature_health(torch.ones(8, 64))["norm"] == pytest.approx(8)


def test_probe_numbers_of_made_up_tokens():
    cls = normal(64, 32)
    patches = cls[:, None].expand(-1, 5, -1) * 2
    found = probe_health(Tokens(cls, patches[:, :0], patches), -cls[:8])
    assert found["probe_class_patch"] == pytest.approx(1, abs=1e-5)
    assert found["probe_lag"] == pytest.approx(2, abs=1e-5)
    assert found["probe_patch_norm"] == pytest.approx(2 * found["probe_norm"], rel=1e-5)
    assert 0.7 < found["probe_sigreg"] < 1.6  # 1.06 expected of a Gaussian
    zero = probe_health(Tokens(cls * 0, patches[:, :0], patches), cls[:8])
    assert zero["probe_sigreg"] == pytest.approx(0.409 * 64, rel=0.01)


def test_tokens_that_are_not_finite_have_no_rank():
    """A run that blew up is named by its verdict, not by an error of linear algebra."""
    bad = torch.full((8, 4), torch.nan)
    assert math.isnan(effective_rank(bad))
    tokens = Tokens(bad, bad[:, None], bad[:, None])
    assert all(math.isnan(value) for value in probe_health(tokens, bad).values())


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_update_ratio_is_what_a_copy_would_say(decay):
    weight = nn.Parameter(normal(6, 4))
    optimiser = torch.optim.AdamW([{"params": [weight]}], lr=0.01, weight_decay=decay)
    assert update_ratio(optimiser, weight) is None
    for seed in range(3):
        before = weight.detach().clone()
        weight.grad = normal(6, 4, seed)
        optimiser.step()
        expected = float((weight.detach() - before).norm() / before.norm())
        assert update_ratio(optimiser, weight) == pytest.approx(expected, rel=1e-4)


def test_the_peak_is_a_rate_of_this_machine_and_measured_once():
    assert 1e8 < measure_peak("cpu", "fp32") < 1e15
    assert measure_peak("cpu", "fp32") == measure_peak("cpu", "fp32")


@pytest.mark.parametrize("name", ["lejepa", "dino, sinkhorn"])
def test_a_run_is_measured_and_pictured(small, store_path, tmp_path, name):
    recipe = replace(small[name], run=replace(small[name].run, steps=12, health_every=4, probe_every=3))
    seen = []
    pretrain(recipe, store_path, tmp_path, watch=lambda line, verdict: seen.append((line["step"], verdict)))
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines if "probe_rank" in line] == [0, 3, 6, 9, 11]
    assert [line["step"] for line in lines if "spread" in line] == [0, 4, 8]
    assert all(line[name] >= 0 for line in lines for name in CLOCK)
    assert all(0 <= line["data_wait"] <= 1 for line in lines)
    assert [step for step, _ in seen] == list(range(12))
    assert not any(d.severity == "fatal" for _, verdict in seen for d in verdict)
    # pictures at probes 0, 1, 2 and at the end; 3 is no power of two
    found = sorted(p.stem for p in (tmp_path / "snapshots").glob("step-*.npz"))
    assert found == [f"step-{n:08d}" for n in (0, 3, 6, 11)]
    with np.load(tmp_path / "snapshots" / f"{found[0]}.npz") as snapshot:
        assert snapshot["images"].shape == (6, 32, 32)
        assert snapshot["tokens"].shape == (6, 4, 4, 96)
        assert snapshot["foreground"].any(axis=(1, 2)).all()
    samples = read_samples(tmp_path / "snapshots" / "samples.npz")
    assert len(samples) == 4
    assert [len(crop) for crop in samples[0].crops] == [32, 32, 16, 16]


def test_watching_changes_no_weight(small, store_path, tmp_path):
    recipe = small["dino, sinkhorn"]
    ends = []
    for every in (1, 1000):
        run = replace(recipe.run, health_every=every, probe_every=every)
        pretrain(replace(recipe, run=run), store_path, tmp_path / str(every))
        ends.append((tmp_path / str(every) / "export" / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]
    assert math.isfinite(next(read_lines(tmp_path / "1" / "metrics.jsonl"))["probe_rank"])
