"""hilum bench run in a folder that has results: what changed is computed again, and nothing of it names a path or a person."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from hilum.bench.phantom.scans import PhantomSettings, write_phantom_scans
from hilum.bench.run import run as runner
from hilum.bench.run.features import FeatureCache
from hilum.bench.run.run import BenchSettings, run_bench, split_label
from hilum.bench.run.suites import choose_tasks, open_task
from hilum.bench.task import Source
from hilum.encode.contract import Contract
from hilum.encode.encoder import pixel_encoder, write_encoder
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import ViT
from hilum.errors import InputError, UsageError
from hilum.records import read_json

SMALL = PhantomSettings(num_patients=12, num_heads=1, num_slices=4, matrix=32)
QUICK = BenchSettings(num_resamples=20, seeds=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_phantom_scans(tmp_path / "data" / "phantom", SMALL)
    return tmp_path / "data"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    inner = runner.fit_trials
    monkeypatch.setattr(runner, "fit_trials", lambda *a, **k: seen.append(1) or inner(*a, **k))
    return seen


def offer(monkeypatch: pytest.MonkeyPatch, task, found) -> None:
    monkeypatch.setattr(runner, "open_task", lambda *a, **k: (task, found))


def encoder(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    write_encoder(
        folder,
        ViT(ViTConfig(size="48x1x2-mlp96", image=(64, 64))),
        Contract(size_px=64),
        {"recipe": "small", "step": 0},
    )
    return str(folder)


def test_changed_pixels_are_judged_anew(tmp_path, root, fits):
    (task,) = choose_tasks(ids=["phantom:age"])
    (first,) = run_bench([task], ["pixels"], root, tmp_path / "out", QUICK)["scores"]
    for case in open_task(task, root)[1].cases:
        image = nib.load(case.scan.path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1] // 2, image.affine, image.header), case.scan.path)
    (second,) = run_bench([task], ["pixels"], root, tmp_path / "out", QUICK)["scores"]
    assert len(fits) == 2
    assert first["value"] != second["value"]


def test_another_metric_or_patient_is_seen(tmp_path, root, fits, monkeypatch):
    task, found = open_task(choose_tasks(ids=["phantom:age"])[0], root)
    run = lambda: run_bench([task], ["pixels"], root, tmp_path / "out", QUICK)["scores"][0]  # noqa: E731
    offer(monkeypatch, task, found)
    assert run()["num_patients"] > 1
    task = replace(task, metric="mae")
    offer(monkeypatch, task, found)
    assert run()["metric"] == "mae"
    test = [case.split == "test" for case in found.cases]
    joined = [replace(case, patient="one") if here else case for here, case in zip(test, found.cases)]
    offer(monkeypatch, task, replace(found, cases=tuple(joined)))
    assert run()["num_patients"] == 1
    run()
    assert len(fits) == 3


def test_what_can_no_longer_be_learnt_has_no_score(tmp_path, root, monkeypatch):
    task, found = open_task(choose_tasks(ids=["phantom:survival"])[0], root)
    offer(monkeypatch, task, found)
    assert run_bench([task], ["pixels"], root, tmp_path / "out", QUICK)["scores"]
    censored = [replace(case, target=(case.target[0], 0.0)) for case in found.cases]
    offer(monkeypatch, task, replace(found, cases=tuple(censored)))
    result = run_bench([task], ["pixels"], root, tmp_path / "out", QUICK)
    (row,) = result["left_out"]
    assert "had an event" in row["reason"]
    assert row["cases"] == 0  # none is missing
    assert not result["scores"]


def test_what_another_run_left_out_makes_no_later_run_incomplete(tmp_path, root, monkeypatch):
    survival, age = (open_task(task, root) for task in choose_tasks(ids=["phantom:survival", "phantom:age"]))
    censored = [replace(case, target=(case.target[0], 0.0)) for case in survival[1].cases]
    offer(monkeypatch, survival[0], replace(survival[1], cases=tuple(censored)))
    assert not run_bench([survival[0]], ["pixels"], root, tmp_path / "out", QUICK)["complete"]
    offer(monkeypatch, *age)
    result = run_bench([age[0]], ["pixels"], root, tmp_path / "out", QUICK)
    assert result["complete"]
    assert [row["task"] for row in result["left_out"]] == ["phantom:survival"]  # still told
    offer(monkeypatch, *survival)
    result = run_bench([survival[0]], ["pixels"], root, tmp_path / "out", QUICK)
    assert result["complete"]
    assert not result["left_out"]


def test_a_folder_is_bound_by_its_first_predictions(tmp_path, root):
    tasks = choose_tasks(ids=["phantom:age"])
    with pytest.raises(UsageError):
        run_bench(tasks, ["no-such-model"], root, tmp_path / "out", replace(QUICK, seed=3))
    assert (tmp_path / "out" / "results.json").is_file()
    assert run_bench(tasks, ["pixels"], root, tmp_path / "out", QUICK)["complete"]
    with pytest.raises(UsageError, match="other settings"):
        run_bench(tasks, ["pixels"], root, tmp_path / "out", replace(QUICK, seed=3))
    (tmp_path / "begun" / "features" / "labels").mkdir(parents=True)  # stopped while it read labels
    assert run_bench(tasks, ["pixels"], root, tmp_path / "begun", QUICK)["complete"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UsageError, match="is not empty"):
        run_bench(tasks, ["pixels"], root, tmp_path / "photos", QUICK)


def test_two_models_of_one_name_are_refused_until_one_is_named(tmp_path, root):
    one, two = encoder(tmp_path / "a", 0), encoder(tmp_path / "b", 1)
    (task,) = choose_tasks(ids=["phantom:age"])
    with pytest.raises(UsageError, match="small@0 with other weights"):
        run_bench([task], [one, two], root, tmp_path / "out", QUICK)
    run_bench([task], [one], root, tmp_path / "next", QUICK)
    with pytest.raises(UsageError, match="small@0 with other weights"):
        run_bench([task], [two], root, tmp_path / "next", QUICK)
    result = run_bench([task], [f"second={two}"], root, tmp_path / "next", QUICK)
    assert {score["model"] for score in result["scores"]} == {"small@0", "second"}
    (tmp_path / "a=b").mkdir()
    assert split_label(str(tmp_path / "a=b")) == ("", str(tmp_path / "a=b"))


def test_reasons_name_no_path_and_no_person(tmp_path, root, monkeypatch):
    (task, found) = open_task(choose_tasks(ids=["phantom:age"])[0], root)
    folder = tmp_path / "Doe^Jane"
    folder.mkdir()
    cases = list(found.cases)
    for n, name in enumerate(("DOE-JANE.nii.gz", "DOE-JANE.pck", "DOE-JANE.dcm", "DOE-JANE")):
        path = folder / name
        if name == "DOE-JANE":
            path.mkdir()
        else:
            path.write_bytes(b"nothing")
        cases[n] = replace(cases[n], scan=Source(path=path, form="pickle" if name.endswith("pck") else "scan"))
    offer(monkeypatch, task, replace(found, cases=tuple(cases)))
    result = run_bench([task], ["pixels"], root, tmp_path / "out", replace(QUICK, allow_missing=True))
    assert sum(row["cases"] for row in result["left_out"]) == 4
    written = json.dumps(read_json(tmp_path / "out" / "results.json"))
    assert "JANE" not in written.upper()
    assert str(tmp_path) not in written


def test_what_could_not_be_read_is_tried_again(tmp_path, root):
    task, found = open_task(choose_tasks(ids=["phantom:age"])[0], root)
    cache = FeatureCache(tmp_path / "features", pixel_encoder())
    read, cache.reader.volume = cache.reader.volume, _unreachable  # type: ignore[method-assign]
    assert all(cache.features(task, found.cases).reasons)
    cache.reader.volume = read  # type: ignore[method-assign]
    assert not any(FeatureCache(tmp_path / "features", pixel_encoder()).features(task, found.cases).reasons)


def _unreachable(case):
    raise InputError("the disk is away")


def test_a_class_that_training_lacks_is_still_counted(tmp_path, root, monkeypatch):
    """Few training cases may lack a structure that test cases have: its Dice is 0, and the run goes on."""
    write_phantom_scans(tmp_path / "few" / "phantom", replace(SMALL, num_patients=8))
    task, found = open_task(choose_tasks(ids=["phantom:solid-organs"])[0], tmp_path / "few")
    numbers = (*range(1, len(task.classes)), 99)  # the last class is nowhere
    cases = [replace(c, region=replace(c.region, values=numbers)) if c.split != "test" else c for c in found.cases]
    offer(monkeypatch, task, replace(found, cases=tuple(cases)))
    result = run_bench([task], [encoder(tmp_path / "model", 0)], root, tmp_path / "out", QUICK)
    (score,) = result["scores"]
    assert not result["left_out"]
    assert [c["name"] for c in score["per_class"]] == list(task.classes)
    assert score["per_class"][-1]["num_present"] == score["num_cases"]


def test_a_task_without_a_value_does_not_take_the_scores_of_others(tmp_path, root, monkeypatch):
    """All test cases of one class: an AUROC has no value there."""
    organ, age = (open_task(task, root) for task in choose_tasks(ids=["phantom:organ", "phantom:age"]))
    task, found = replace(organ[0], metric="auroc"), organ[1]
    one = [c if c.split != "test" else replace(c, target=(0.0,)) for c in found.cases]
    offered = {task.id: (task, replace(found, cases=tuple(one))), age[0].id: age}
    monkeypatch.setattr(runner, "open_task", lambda asked, *a, **k: offered[asked.id])
    for _ in range(2):
        result = run_bench([task, age[0]], ["pixels"], root, tmp_path / "out", QUICK)
        assert [s["task"] for s in result["scores"]] == ["phantom:age"]
        (row,) = result["left_out"]
        assert (row["task"], row["model"]) == ("phantom:organ", "pixels")
        assert "only one class is present" in row["reason"]


def test_models_are_not_scored_side_by_side_on_different_labels(tmp_path, root, monkeypatch):
    task, found = open_task(choose_tasks(ids=["phantom:age"])[0], root)
    run = lambda model: run_bench([task], [model], root, tmp_path / "out", QUICK)  # noqa: E731
    offer(monkeypatch, task, found)
    run("pixels")
    corrected = [replace(case, target=(case.target[0] + n,)) for n, case in enumerate(found.cases)]
    offer(monkeypatch, task, replace(found, cases=tuple(corrected)))
    other = encoder(tmp_path / "model", 0)
    result = run(other)
    assert [s["model"] for s in result["scores"]] == ["small@0"]
    assert [(row["model"], row["cases"]) for row in result["left_out"]] == [("pixels", 0)]
    result = run("pixels")
    assert sorted(s["model"] for s in result["scores"]) == ["pixels", "small@0"]
    assert not result["left_out"]
