"""The whole way on a small phantom: what the demo and a user's commands leave behind, and that it agrees."""

import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hilum.archive.ledger import count, read_ledger
from hilum.archive.store.store import Store
from hilum.demo import TASKS, demo
from hilum.encode.vit import ViTConfig
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.records import read_json, read_table, table_metadata


def small_recipe() -> Recipe:
    tiny = load_recipe("tiny")
    return replace(
        tiny,
        model=ViTConfig(size="nano", image=(64, 64), patch=(16, 16), layer_scale=0.0),
        views=replace(tiny.views, global_px=64, local_px=32, num_local=2),
        objective=replace(tiny.objective, hidden=32, projector_dim=8, sigreg_slices=16),
        run=replace(tiny.run, steps=4, batch_size=8, num_workers=0, checkpoint_every=2),
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("story") / "demo"
    record = demo(out, num_patients=10, num_slices=16, matrix=64, recipe=small_recipe())
    return out, record


def test_every_file_of_the_archive_is_in_the_ledger(story: tuple[Path, dict]) -> None:
    out, _ = story
    counts = count(read_ledger(out / "ledger.parquet"))
    assert counts["num_files"] == sum(p.is_file() for p in (out / "phantom" / "scans").rglob("*"))
    assert counts["num_used"] == 20
    assert counts["modalities"] == {"CT": 10, "MR": 10}
    refused = {reason: row["files"] for reason, row in counts["refused"].items()}
    assert refused == {"localizer": 10, "secondary_capture": 1, "truncated": 1}


def test_scan_and_prepare_agree(story: tuple[Path, dict]) -> None:
    out, _ = story
    scanned, prepared = (read_ledger(out / name / "ledger.parquet") for name in (".", "store"))
    assert {e.plane for e in prepared if e.used} == {"axial"}  # what only voxels show
    assert [replace(e, flags=()) for e in scanned] == [replace(e, flags=(), plane="", region="") for e in prepared]


def test_no_identifier_leaves_the_archive_room(story: tuple[Path, dict]) -> None:
    out, _ = story
    series = (out / "phantom" / "series.csv").read_text()
    secrets = [b"PHANTOM0003", b"Phantom^", *[u.encode() for u in re.findall(r"1\.2\.826[\d.]+", series)[:4]]]
    written = [p for p in out.rglob("*") if p.is_file() and "phantom" not in p.relative_to(out).parts]
    assert len(written) > 20
    for path in written:
        if path.name == "ledger.paths.parquet":
            continue  # the companion that stays inside the hospital
        data = path.read_bytes()
        assert not any(secret in data for secret in secrets), path


def test_features_name_their_model_and_contract(story: tuple[Path, dict]) -> None:
    out, _ = story
    contract = read_json(out / "run" / "run.json")["contract"]
    table = read_table(out / "features" / "pre-trained-region.parquet")
    assert table_metadata(table)["contract"] == contract
    assert set(table["contract"].to_pylist()) == {contract}
    assert len(set(table["item"].to_pylist())) == table.num_rows
    assert set(table["modality"].to_pylist()) == {"CT", "MR"}


def test_scores_come_from_the_prediction_rows(story: tuple[Path, dict]) -> None:
    out, record = story
    rows = read_table(out / "predictions" / "organ-pre-trained.parquet").to_pylist()
    accuracy = np.mean([r["y_true"] == r["y_pred"] for r in rows])
    assert record["scores"]["organ"]["methods"]["pre-trained"]["value"] == pytest.approx(accuracy)
    folds = {r["patient"]: r["fold"] for r in rows}
    assert all(folds[r["patient"]] == r["fold"] for r in rows)


def test_the_report_is_one_file_with_all_its_parts(story: tuple[Path, dict]) -> None:
    out, _ = story
    page = html.unescape((out / "report.html").read_text())
    assert page.count("data:image/png;base64,") >= 7
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    for task in TASKS:
        assert task.question in page


def test_the_demo_goes_on_where_it_stopped(story: tuple[Path, dict]) -> None:
    out, record = story
    before = (out / "run" / "export" / "model.safetensors").read_bytes()
    again = demo(out, num_patients=10, num_slices=16, matrix=64, recipe=small_recipe())
    assert (out / "run" / "export" / "model.safetensors").read_bytes() == before
    assert again["scores"] == record["scores"]


def test_the_commands_of_the_readme_on_a_store(story: tuple[Path, dict], tmp_path: Path) -> None:
    out, record = story
    env = {"HILUM_KEY": str(out / "key"), "PATH": "/usr/bin:/bin"}

    def hilum(*words: str) -> str:
        command = [sys.executable, "-m", "hilum", *words]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    features = tmp_path / "f.parquet"
    hilum("embed", str(out / "store"), "--model", str(out / "run" / "export"), "-o", str(features), "--level", "region",
          "--masks", str(out / "phantom" / "series.csv"), "--quiet")  # fmt: skip
    found = json.loads(hilum("probe", str(features), "--target", "region", "--json"))
    expected = record["scores"]["organ"]["methods"]["pre-trained"]["value"]
    assert found["scores"]["accuracy"]["value"] == pytest.approx(expected)
    assert "contract" in hilum("info", str(out / "run" / "export"))
    assert len(Store(out / "store")) == 20
