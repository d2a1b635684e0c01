"""A run on volumes: its page, its encoder, its commands. That it resumes exactly is seen in test_loop and test_ranks."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hilum.archive.store.store import Store
from hilum.cli import app
from hilum.encode.released.doctor import check_model
from hilum.encode.vit import Tokens
from hilum.encode.zoo import open_folder
from hilum.errors import LabelsError, UsageError
from hilum.pretrain.distill import Learner
from hilum.pretrain.loader import Batch
from hilum.pretrain.loop import pretrain, training_samples
from hilum.pretrain.losses import invariance
from hilum.pretrain.watch.online import read_labelled
from hilum.pretrain.watch.report import show_run
from hilum.pretrain.watch.samples import middle_crop, picture, read_probe
from hilum.records import read_json


@pytest.fixture(scope="module")
def runs(small, volume_stores, tmp_path_factory):
    """For each recipe an undisturbed run."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("3d, lejepa", "3d, dino"):
        pretrain(small[name], volume_stores / "iso", out / name)
    return out


def test_the_run_and_its_encoder(small, volume_stores, runs):
    """The export takes scans of any size, with the contract that the store was made by."""
    record = read_json(runs / "3d, lejepa" / "run.json")
    assert (record["num_volumes"], record["left_out"]) == (5, {})
    folder = runs / "3d, lejepa" / "export"
    encoder = open_folder(folder)
    contract = encoder.contract
    assert (contract.patch, contract.modalities, contract.background_px) == ((4, 4, 4), ("CT", "MR", "OT"), 0)
    assert check_model(str(folder))["checks"][-1][1] == "good"
    assert "for volumes of CT and MR and OT" in (folder / "README.md").read_text()
    for key in ("00aa", "01aa"):
        vol = Store(volume_stores / "plain").read_volume(key)
        features = encoder.encode(vol)
        assert np.isfinite(features.vectors).all()
        assert features.vectors.shape == (1, 2 * 96)


def test_the_page_of_a_run(runs, tmp_path):
    told = show_run(runs / "3d, dino", tmp_path / "page.html")
    assert told["num_snapshots"] == 2
    page = (tmp_path / "page.html").read_text()
    assert "learns from unlabelled volumes" in page
    assert len(re.findall(r"data:image/png;base64,", page)) == 6


def test_what_the_monitor_sees(small, volume_stores):
    """The same volumes each time; a snapshot's plane of patches is the one that its plane of voxels crosses."""
    crops = training_samples(Store(volume_stores / "iso"), small["3d, lejepa"])
    images, foreground = read_probe(crops, 3)
    assert images.shape == (4, 1, 16, 16, 16)  # the slab does not fit a cube
    assert foreground.shape == (3, 4, 4)
    assert foreground[:, 1:3, 1:3].all()
    sample = picture(crops, 0)
    assert sample.pixels.shape == (26, 24)
    y0, x0, y1, x1 = np.transpose([view["box"] for view in sample.views])
    assert (y0 >= 0).all()
    assert (y1 <= 1).all()
    assert (x0 < x1).all()
    assert [crop.ndim for crop in sample.crops] == [2] * 4


def test_places_of_volumes_are_the_tokens_there(small):
    """At the middles of patches nothing is interpolated."""
    recipe = small["3d, lejepa"]
    torch.manual_seed(0)
    learner = Learner(recipe).train()
    grid, width = (2, 6, 6), learner.student_backbone().width
    tokens = Tokens(torch.zeros(6, width), torch.zeros(6, 0, width), torch.randn(6, 72, width))
    patches = torch.randint(72, (2, 3, 5))
    z, y, x = patches // 36, patches // 6 % 6, patches % 6
    points = (torch.stack([z, y, x], -1) + 0.5) / torch.tensor(grid)
    blank = torch.zeros(6, 72, dtype=torch.bool)
    batch = Batch(torch.zeros(6, 1, 8, 24, 24), None, blank, torch.zeros(0, dtype=torch.long), points, 1.0, 0.0)
    parts: dict[str, torch.Tensor] = {}
    learner._join_places(batch, tokens, 0, parts)
    chosen = tokens.patches.view(2, 3, 72, width).gather(2, patches[..., None].expand(-1, -1, -1, width))
    projected = learner.student["patch_projector"](chosen.flatten(0, 2)).view(2, 15, -1)
    torch.testing.assert_close(parts["patch_invariance"], invariance(projected, 2))


def test_one_head_for_both(small):
    """Class tokens and patches share it; centres are two."""
    recipe = small["3d, dino"]
    learner = Learner(recipe)
    assert set(learner.student) == {"backbone", "dino_head"}
    two = Learner(replace(recipe, objective=replace(recipe.objective, shared_head=False)))
    assert set(two.student) == {"backbone", "dino_head", "ibot_head"}
    assert {n for n, _ in learner.named_buffers(recurse=False)} == {"dino_center", "ibot_center"}


def test_commands_for_volumes(volume_stores):
    run = CliRunner()
    told = run.invoke(app, ["plan", "small3d", "--gpus", "2xcpu", "--data", str(volume_stores / "iso")])
    assert told.exit_code == 0, told.output
    assert "training volumes" in told.output
    assert all(len(line) <= 100 for line in told.output.splitlines())
    told = run.invoke(
        app, ["pretrain", "small3d", "--data", str(volume_stores / "plain"), "-o", str(volume_stores / "x")]
    )
    assert isinstance(told.exception, UsageError)
    assert "Run: hilum resample" in str(told.exception)


def test_labels_of_volumes(small, volume_stores, tmp_path):
    """The middle of each labelled volume; labels of slices are refused."""
    crops = training_samples(Store(volume_stores / "iso"), small["3d, lejepa"])
    path = tmp_path / "labels.csv"
    path.write_text("series,kind\n" + "".join(f"{n:02d}aa,{'ct' if n % 2 == 0 else 'mr'}\n" for n in range(4)))
    found = read_labelled(crops.store, crops, path, "kind")
    assert found.images.shape == (4, 1, 16, 16, 16)
    assert found.y.tolist() == [0, 1, 0, 1]
    assert torch.equal(found.images[1], middle_crop(crops, "01aa", (16, 16, 16)))
    path.write_text("series,slice,kind\n00aa,3,ct\n01aa,3,mr\n")
    with pytest.raises(LabelsError, match="labels of slices"):
        read_labelled(crops.store, crops, path, "kind")
