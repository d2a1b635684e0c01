"""The page of a run and the live panel: what they say is what the run did."""

import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest

from hilum.errors import InputError
from hilum.pretrain.loop import pretrain
from hilum.pretrain.presets import RECIPES
from hilum.pretrain.watch import panel
from hilum.pretrain.watch.diagnose import Diagnosis
from hilum.pretrain.watch.panel import Panel, bar, duration, sparkline
from hilum.pretrain.watch.pictures import Chart, charts, pca_over_time, query_patch, smooth
from hilum.pretrain.watch.report import show_run
from hilum.records import read_json, write_json


@pytest.fixture(scope="module")
def run_path(small, store_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = small["dino, sinkhorn"]
    recipe = replace(
        recipe, objective=replace(recipe.objective, prototypes=2048), run=replace(recipe.run, steps=8, probe_every=4)
    )
    pretrain(recipe, store_path, out)
    return out


def test_the_page_of_a_run(run_path, tmp_path):
    told = show_run(run_path, tmp_path / "page.html")
    assert told == {"status": "finished", "num_steps": 8, "num_events": 1, "num_snapshots": 3}
    page = (tmp_path / "page.html").read_text()
    assert "Pre-training small-dino: finished" in page
    assert "batch too small" in page
    assert "Lower objective.prototypes" in page
    assert read_json(run_path / "run.json")["machine"]["processor"] in page
    assert "http" not in re.sub(r'base64,[^"]+', "", page)  # one file that needs nothing else
    pictures = re.findall(r'data:image/png;base64,([^"]+)', page)
    assert len(pictures) == 6
    assert all(b64decode(p).startswith(b"\x89PNG") for p in pictures)


def test_the_page_names_what_differs_from_the_preset(run_path, tmp_path):
    """The record of a `tiny` with another learning rate, one step in."""
    record = read_json(run_path / "run.json")
    folder = tmp_path / "run"
    recipe = RECIPES["tiny"]
    from hilum.settings import to_dict

    write_json(
        folder / "run.json",
        {
            **record,
            "recipe": to_dict(replace(recipe, optimiser=replace(recipe.optimiser, lr=7e-3))),
            "status": "running",
        },
    )
    told = show_run(folder, tmp_path / "page.html")
    assert told["num_steps"] == 0
    page = (tmp_path / "page.html").read_text()
    assert "<code>optimiser.lr</code></td><td>0.002</td><td>0.007</td>" in page
    assert "optimiser.warmup" not in page


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no run folder; expected run\.json"):
        show_run(tmp_path, tmp_path / "page.html")


def test_smoothing_ignores_a_spike():
    values = np.linspace(1, 0, 500)
    values[250] = 1000
    assert np.abs(smooth(values) - np.linspace(1, 0, 500)).max() < 0.02


def test_curves_with_zeros_are_not_drawn_on_a_logarithm():
    one = np.arange(3)
    figure = charts([Chart("a", [("x", one, one * 1.0)], log=True), Chart("b", [("x", one, one + 1.0)], log=True)])
    assert [axes.get_yscale() for axes in figure.axes[:2]] == ["linear", "log"]


def test_panels_share_one_clock_and_rounding_is_no_news():
    steps = np.array([0, 9])
    figure = charts([Chart("a", [("x", steps, np.array([11.31, 11.32]))]), Chart("b", [("x", steps[:1], np.ones(1))])])
    first, second = figure.axes[:2]
    assert first.get_xlim() == second.get_xlim()
    low, high = first.get_ylim()
    assert high - low > 0.5
    assert low < 11.31 < 11.32 < high


def test_colours_follow_turned_features():
    """The same tokens, mirrored and with axes in another order, get the same colours as at the last step."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 4, 4, 8)) * [9, 6, 4, 1, 1, 1, 1, 1]
    turned = tokens[..., rng.permutation(8)] * rng.choice([-1, 1], 8)
    figure = pca_over_time(np.zeros((2, 8, 8)), np.ones((2, 4, 4), bool), [(0, turned), (5, tokens)])
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    assert np.allclose(pictures[1], pictures[2], atol=1e-6)  # slice 0: step 0 and step 5
    assert not np.allclose(pictures[1], pictures[4], atol=0.1)  # slice 1 is another


def test_a_query_lies_in_the_anatomy():
    inside = np.zeros((6, 6), bool)
    inside[2:5, 1:3] = True
    assert inside[query_patch(inside)]
    assert query_patch(np.zeros((4, 4), bool)) == (1, 1)


# ---- panel


def test_small_drawings():
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([5.0] * 100, 10) == "▁" * 10
    assert sparkline([]) == ""
    assert bar(0.5, 4) == "██░░"
    assert [duration(s) for s in (5, 65, 3700, 90000)] == ["5 s", "1 min", "1 h 1 min", "1 d 1 h"]


def test_the_panel_shows_numbers_and_verdict(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(panel.sys.stderr, "isatty", lambda: True, raising=False)
    seen = Panel()
    sick = Diagnosis("features collapsed", "fatal", 3, 1, "spread .01", "too fast", "Halve optimiser.lr")
    seen.watch({"step": 3, "loss": 2.5, "dino": 1.25, "spread": 0.01, "images_per_second": 123.4}, [sick])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(seen.render())
    console.file.close()
    text = console.export_text()
    assert "2.5000" in text
    assert "dino 1.250" in text
    assert "images/s 123.4" in text
    assert "features collapsed: spread .01. Halve optimiser.lr." in text


def test_without_a_terminal_the_panel_is_a_reporter(capsys):
    with Panel() as seen:
        seen(1, 10, "pre-training, loss 1.0")
        seen.watch({"step": 0, "loss": 1.0}, [])
    assert capsys.readouterr().err == ""
    with Panel(quiet=True) as seen:
        seen(10, 10, "pre-training, loss 1.0")
    assert not seen.live
