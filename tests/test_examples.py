"""What the documentation shows, run as it stands."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from hilum.archive.phantom import write_phantom
from hilum.cli import app

PAGES = Path(__file__).parents[1] / "docs"
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::DeprecationWarning:hilum", str(example), str(tmp_path / "out")]
    env = {"HILUM_KEY": str(tmp_path / "key"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy: " in done.stdout


def blocks(page: Path) -> list[str]:
    """The indented blocks of a page."""
    found: list[list[str]] = [[]]
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    ") or (not line and found[-1]):
            found[-1].append(line[4:])
        else:
            found.append([])
    return ["\n".join(block) for block in found if any(block)]


def test_the_page_about_features_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and Python in their order, on a phantom with masks."""
    write_phantom(tmp_path / "phantom", num_patients=1, num_slices=8, matrix=32)
    (tmp_path / "phantom" / "scans").rename(tmp_path / "scans")
    (tmp_path / "masks.csv").write_text((tmp_path / "phantom" / "series.csv").read_text())
    shutil.copytree(tmp_path / "phantom" / "masks", tmp_path / "masks")
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    monkeypatch.chdir(tmp_path)
    shown = blocks(PAGES / "features.md")
    assert len(shown) >= 7
    for block in shown:
        if block.startswith("import "):
            exec(compile(block, "docs/features.md", "exec"), {})
            continue
        for line in block.splitlines():
            words = line.split()
            assert words[0] == "hilum"
            code = typer.main.get_command(app).main(words[1:], standalone_mode=False)
            assert code in (None, 0, 4), line
    names = {path.name for path in tmp_path.iterdir()}
    assert {"f.parquet", "volumes.parquet", "regions.parquet", "dense.patches", "f.npz", "f.csv"} <= names


def test_the_page_about_statistics_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(PAGES / "statistics.md"):
        exec(compile(block, "docs/statistics.md", "exec"), {})
    assert "200 patients" in capsys.readouterr().out


def test_the_page_about_heads_runs() -> None:
    """Its Python, in order, on drawn features; its commands are those of tests/probe/test_saved.py."""
    patients = np.arange(80) // 2
    y = patients % 2
    X = (np.random.default_rng(0).normal(size=(80, 8)) + y[:, None]).astype(np.float32)
    names = {"X": X, "y": y, "patients": patients, "X_new": X[:5]}
    shown = [block for block in blocks(PAGES / "heads.md") if not block.startswith("hilum ")]
    assert len(shown) == 3
    for block in shown:
        exec(compile(block, "docs/heads.md", "exec"), names)
    assert np.asarray(names["honest"]).shape == (5, 2)


def test_the_page_on_retrieval_runs() -> None:
    (block,) = [block for block in blocks(PAGES / "retrieval.md") if not block.startswith("hilum ")]
    exec(compile(block, "docs/retrieval.md", "exec"), {})
