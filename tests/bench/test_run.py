"""hilum bench run: end to end on a small phantom, resumed, refused, and with faults planted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.archive.labels import read_labels
from hilum.bench.judge.compare import compare_results
from hilum.bench.judge.scoring import score_predictions
from hilum.bench.phantom.scans import PhantomSettings, write_phantom_scans
from hilum.bench.phantom.tasks import PHANTOM_TASKS
from hilum.bench.predictions import read_predictions
from hilum.bench.run import run as runner
from hilum.bench.run.erasing import with_eraser
from hilum.bench.run.features import CaseFeatures, FeatureCache, Vectors
from hilum.bench.run.fitting import LabelMaps, Material, Names, fit_trials
from hilum.bench.run.protocols import cross_tasks, erased_names, expand_protocols, make_trials
from hilum.bench.run.retrieval import recalls
from hilum.bench.run.run import BenchSettings, run_bench
from hilum.bench.run.scans import CaseReader
from hilum.bench.run.suites import choose_tasks, open_task
from hilum.encode.contract import Contract
from hilum.encode.encoder import pixel_encoder, write_encoder
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import ViT
from hilum.encode.volume_contract import VolumeContract
from hilum.encode.zoo import load_encoder
from hilum.errors import InputError, LabelsError, UsageError
from hilum.probe.heads.dense import SegmentationHead
from hilum.probe.saved import load_head
from hilum.records import read_json, read_table, table_metadata

SMALL = PhantomSettings(num_patients=24, num_heads=12, num_slices=10, matrix=32)
QUICK = BenchSettings(num_resamples=50, seeds=2)
ONE_A_KIND = ("organ", "age", "findings", "survival", "retrieval")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench-run")
    write_phantom_scans(root / "phantom", SMALL)
    return root


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = ViTConfig(size="48x1x2-mlp96", image=(64, 64))
    write_encoder(folder, ViT(config), Contract(size_px=64), {"recipe": "small", "step": 0})
    return folder


def tasks_of(*names: str):
    return choose_tasks(ids=[f"phantom:{name}" for name in names])


def scores_of(result: dict) -> dict:
    return {(s["task"], s["features"], s["head"], s["protocol"]): s["value"] for s in result["scores"]}


def test_a_task_of_every_kind_is_run_and_scored(tmp_path, root, encoder_folder):
    """One tiny encoder; the numbers in the table are those of the predictions files."""
    tasks = tasks_of(*ONE_A_KIND)
    result = run_bench(tasks, [str(encoder_folder)], root, tmp_path / "out", replace(QUICK, seeds=1))
    assert {s["task"] for s in result["scores"]} == {t.id for t in tasks}
    assert not result["left_out"]
    assert all(np.isfinite(s["value"]) for s in result["scores"])
    for score in result["scores"]:
        table = read_predictions(tmp_path / "out" / "predictions" / score["file"])
        if score["kind"] not in ("retrieval",):
            assert set(table["split"].to_pylist()) == {"val", "test"}
        assert "/" not in "".join(table["case"].to_pylist())
        assert "B0" not in "".join(table["patient"].to_pylist())
    record = read_json(tmp_path / "out" / "results.json")
    assert set(record["tasks"]) == {t.id for t in tasks}
    assert str(root) not in json.dumps(record)


def test_heads_on_tokens_run_and_score(tmp_path, encoder_folder, monkeypatch):
    """Localisation and segmentation; the true voxels of a class are those of the label map; heads are kept when asked for."""
    monkeypatch.setitem(SegmentationHead.__init__.__kwdefaults__, "min_steps", 40)
    write_phantom_scans(tmp_path / "phantom", replace(SMALL, num_patients=36, num_heads=1, num_slices=8))
    tasks = tasks_of("lesion-centre", "solid-organs")
    said = []
    result = run_bench(
        tasks,
        [str(encoder_folder)],
        tmp_path,
        tmp_path / "out",
        replace(QUICK, seeds=1),
        progress=lambda *a: said.append(a),
    )
    assert [s["kind"] for s in result["scores"]] == ["localisation", "segmentation"]
    steps = [(done, total) for done, total, what in said if what.startswith("segmentation head of ")]
    assert len(steps) > 10  # minutes on real scans
    assert steps[-1] == (len(steps), len(steps))
    assert not result["left_out"]
    table = read_predictions(tmp_path / "out" / "predictions" / result["scores"][1]["file"])
    (task, found) = open_task(tasks[1], tmp_path)
    expected = set()
    for case in found.cases:
        labels = read_labels(case.region.source.path, None).volume.voxels
        expected.add(tuple(float((labels == n).sum()) for n in range(1, len(task.classes) + 1)))
    assert {tuple(row) for row in table["target"].to_pylist()} <= expected
    assert not (tmp_path / "out" / "heads").exists()
    run_bench(tasks, [str(encoder_folder)], tmp_path, tmp_path / "out", replace(QUICK, seeds=1, save_heads=True))
    for task, score in zip(tasks, result["scores"]):
        saved = load_head(tmp_path / "out" / "heads" / Path(score["file"]).stem)
        assert (saved.task, saved.record["features"]["level"]) == (task.kind, task.unit)
        assert saved.classes == (tuple(task.classes) if task.kind == "segmentation" else ())
        saved.check_encoder(load_encoder(saved.record["encoder"]["loads_as"]))


def test_blocks_of_volumes_stand_beside_whole_volumes(tmp_path, root):
    """An encoder of volumes that sees 27 patches at once; one of slices has no such protocol, and says so."""
    torch.manual_seed(0)
    contract = VolumeContract(background_px=0, patch=(8, 8, 8), min_spacing_mm=8.0)
    config = ViTConfig(size="48x1x2-mlp96", patch=(8, 8, 8), image=(16, 16, 16), positions="rotary")
    write_encoder(tmp_path / "encoder", ViT(config), contract, {"recipe": "volumes", "step": 0})
    settings = replace(QUICK, seeds=1, protocols=("full", "chunked:27"), allow_missing=True)
    result = run_bench(
        tasks_of("findings", "age"), [str(tmp_path / "encoder"), "pixels"], root, tmp_path / "out", settings
    )
    left = {(row["task"], row["reason"].split(";")[0]) for row in result["left_out"] if row["model"] == "pixels"}
    assert left == {(f"phantom:{name}", "encodes slices") for name in ("findings", "age")}
    assert "phantom:age" in {row["task"] for row in result["left_out"] if row["model"] != "pixels"}  # single slices
    found = {
        s["protocol"]: s["file"]
        for s in result["scores"]
        if (s["task"], s["model"]) == ("phantom:findings", "volumes@0")
    }
    whole, blocks = (read_predictions(tmp_path / "out" / "predictions" / found[p]) for p in ("full", "chunked:27"))
    assert whole["case"].equals(blocks["case"])
    differences = np.abs(np.array(whole["output"].to_pylist()) - np.array(blocks["output"].to_pylist()))
    assert 0 < differences.max() < 1


def test_the_same_command_keeps_what_is_finished(tmp_path, root, monkeypatch):
    out = tmp_path / "out"
    first = run_bench(tasks_of("age", "haemorrhage"), ["pixels"], root, out, QUICK)
    files = {p: p.stat().st_mtime_ns for p in (out / "predictions").iterdir()}
    gone = sorted(files)[0]
    gone.unlink()  # as after a kill between two files
    (out / "scores.parquet").unlink()
    seen = []
    monkeypatch.setattr(runner, "fit_trials", lambda *a, **k: seen.append(1) or _fit(*a, **k))
    monkeypatch.setattr("hilum.bench.run.features.encode_scans", _never)
    second = run_bench(tasks_of("age", "haemorrhage"), ["pixels"], root, out, QUICK)
    assert len(seen) == 1
    assert scores_of(first) == scores_of(second)
    assert all(p.stat().st_mtime_ns == changed for p, changed in files.items() if p != gone)
    with pytest.raises(UsageError, match=r"other settings.*seeds"):
        run_bench(tasks_of("age"), ["pixels"], root, out, replace(QUICK, seeds=3))


_fit = runner.fit_trials


def _never(*_a, **_k):
    raise AssertionError("features are on disk")
    yield


def test_features_are_shared_between_tasks_and_follow_their_files(tmp_path, root):
    """Two tasks that see the same volumes; a second cache reads what the first wrote."""
    cache = FeatureCache(tmp_path, pixel_encoder())
    encoded = []
    inner = cache._encode
    cache._encode = lambda todo, **k: encoded.append(len(todo)) or inner(todo, **k)  # type: ignore[method-assign]
    ((findings, f),) = (open_task(task, root) for task in tasks_of("findings"))
    other = replace(findings, id="phantom:same-findings", kind="retrieval")
    one, two = cache.features(findings, f.cases), cache.features(other, f.cases)
    assert encoded == [24]  # nothing was left for the second
    np.testing.assert_array_equal(one.vectors("class"), two.vectors("class"))
    again = FeatureCache(tmp_path, pixel_encoder()).features(findings, f.cases)
    np.testing.assert_array_equal(one.vectors("class+max"), again.vectors("class+max"))
    with pytest.raises(UsageError, match="'middle' are unknown"):
        one.vectors("middle")


def test_vectors_are_those_of_encode(tmp_path, root, encoder_folder):
    """Against Encoder.encode on the same slice and region, one scan at a time."""
    import hilum

    encoder = hilum.load_encoder(str(encoder_folder))
    (task, found), (whole, volumes) = (open_task(task, root) for task in tasks_of("organ", "findings"))
    cache = FeatureCache(tmp_path, encoder)
    got = cache.features(task, found.cases[:5]).vectors("mean")
    for vector, case in zip(got, found.cases):
        scan = hilum.read(case.scan.path)
        labels = read_labels(case.region.source.path, scan).volume
        inside = (
            np.isin(labels.voxels, case.region.values)
            & (np.arange(len(labels.voxels)) == case.slices[0])[:, None, None]
        )
        mask = replace(labels, voxels=inside.astype(np.uint8))
        expected = encoder.encode(scan, "region", mask=mask, pooling="mean", patches=False).vectors
        np.testing.assert_allclose(vector, expected[0], rtol=2e-5, atol=2e-6)
    volume = cache.features(whole, volumes.cases[:1]).vectors("class")[0]
    expected = encoder.encode(hilum.read(volumes.cases[0].scan.path), "volume", pooling="class", patches=False).first
    np.testing.assert_allclose(volume, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fault", ["shuffled labels", "constant features", "random features"])
def test_planted_faults_score_as_chance(tmp_path, root, monkeypatch, fault):
    """Organs, which the untouched features tell well above chance."""
    (task, found) = open_task(tasks_of("organ")[0], root)
    rng = np.random.default_rng(0)
    if fault == "shuffled labels":
        targets = rng.permutation([case.target[0] for case in found.cases])
        found = replace(found, cases=tuple(replace(c, target=(t,)) for c, t in zip(found.cases, targets)))
    else:
        from hilum.bench.run.features import CaseFeatures

        draw = {"constant features": np.ones, "random features": rng.standard_normal}[fault]
        monkeypatch.setattr(CaseFeatures, "vectors", lambda self, pooling: draw((len(self.rows), 8)).astype(np.float32))
    monkeypatch.setattr(runner, "open_task", lambda *a, **k: (task, found))
    (score,) = run_bench([task], ["pixels"], root, tmp_path / "out", QUICK)["scores"]
    assert score["low"] <= 0.16
    assert score["value"] < 0.2


def test_missing_and_refused_cases_stop_the_run_unless_allowed(tmp_path, root):
    data = tmp_path / "data"
    write_phantom_scans(data / "phantom", replace(SMALL, num_patients=10, num_heads=1))
    (data / "phantom" / "body" / "B0009" / "labels.json").unlink()
    with pytest.raises(InputError, match="1 cases are missing"):
        run_bench(tasks_of("age"), ["pixels"], data, tmp_path / "out", QUICK)
    (data / "phantom" / "body" / "B0001" / "spine.nii.gz").write_bytes(b"nothing")
    allowed = replace(QUICK, allow_missing=True)
    (data / "phantom" / "body" / "B0009").rename(tmp_path / "B0009")
    facts = data / "phantom" / "phantom.json"
    facts.write_text(facts.read_text().replace('"num_patients": 10', '"num_patients": 9'))
    with pytest.raises(InputError, match="pixels refuses 1 of 9 cases"):
        run_bench(tasks_of("age"), ["pixels"], data, tmp_path / "refused", QUICK)
    result = run_bench(tasks_of("age"), ["pixels"], data, tmp_path / "allowed", allowed)
    assert [(row["cases"], row["task"]) for row in result["left_out"]] == [(1, "phantom:age")]


def test_protocols_draw_from_train_only():
    rng = np.random.default_rng(0)
    splits = ["train"] * 60 + ["val"] * 20 + ["test"] * 20
    targets = [(float(rng.integers(3)),) for _ in splits]
    patients = [f"p{n // 2}" for n in range(100)]
    few = make_trials("few-shot:5", "classification", splits, targets, patients, draws=3, seed=0)
    assert len(few) == 3
    assert not np.array_equal(few[0].train, few[1].train)
    for trial in few:
        labels = [targets[n][0] for n in trial.train]
        assert [labels.count(c) for c in (0.0, 1.0, 2.0)] == [5, 5, 5]
        assert trial.train.max() < 60
        assert len(trial.val) <= 12
        assert list(trial.test) == list(range(80, 100))
    (share, *_) = make_trials("fraction:0.5", "classification", splits, targets, patients, draws=2, seed=0)
    assert {patients[n] for n in share.train}.isdisjoint({patients[n] for n in range(60) if n not in share.train})
    assert len(share.train) == 30
    assert expand_protocols(["few-shot", "full", "full"])[-1] == "full"
    with pytest.raises(UsageError, match="'few-shot:no' is unknown"):
        expand_protocols(["few-shot:no"])


def test_crossing_two_tasks_keeps_common_classes_and_patients_apart(root):
    (ct, ct_found), (mr, mr_found) = (open_task(task, root) for task in tasks_of("organ", "organ-mr"))
    fewer = replace(mr, classes=tuple(reversed(mr.classes[3:])))
    renamed = [
        replace(c, target=(float(fewer.classes.index(mr.classes[int(c.target[0])])),))
        for c in mr_found.cases
        if c.target[0] > 2
    ]
    task, found = cross_tasks(ct, ct_found, fewer, replace(mr_found, cases=tuple(renamed)))
    assert task.id == "phantom:organ-to-organ-mr"
    assert task.classes == ct.classes[3:]
    sides = {case.modality: {c.split for c in found.cases if c.modality == case.modality} for case in found.cases}
    assert sides == {"CT": {"train", "val"}, "MR": {"test"}}
    for case in found.cases:  # B0000/CT/liver/5
        assert case.id.split("/")[3] == task.classes[int(case.target[0])]


def test_retrieval_against_a_slow_loop():
    """Every negative takes part, so that nothing is drawn: the rank is 1 + negatives that are nearer."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((30, 4)).astype(np.float32)
    labels = (rng.random((30, 2)) < 0.4).astype(float)
    patients = [f"p{n % 25}" for n in range(30)]
    found = {(one.row, one.label): one.recall for one in recalls(vectors, labels, patients, seed=0)}
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for (query, label), recall in found.items():
        hits = []
        for other in range(30):
            if labels[other, label] != 1 or patients[other] == patients[query]:
                continue
            nearer = sum(
                unit[n] @ unit[query] > unit[other] @ unit[query]
                for n in range(30)
                if labels[n, label] == 0 and patients[n] != patients[query]
            )
            hits.append([nearer + 1 <= cut for cut in (1, 5, 10)])
        np.testing.assert_allclose(recall, np.mean(hits, axis=0))
    assert len(found) == int(labels.sum())


def test_command_line(tmp_path, root, hilum):
    out = tmp_path / "out"
    command = ["bench", "run", "--task", "phantom:age", "--model", "pixels", "--data", root, "--resamples", 50, "-q"]
    code, text, error = hilum(*command, "-o", out, "--protocol", "full")
    assert code == 0, error
    assert max(map(len, text.splitlines())) <= 100
    assert "phantom:age" in text
    assert "95 % interval" in text
    code, text, _ = hilum(*command, "-o", out, "--protocol", "full", "--json")
    assert json.loads(text)["scores"][0]["num_cases"] == 8
    for wrong, said in (
        (["--task", "phantom:soul"], "no task 'phantom:soul'"),
        (["--model", "nothing"], "no encoder 'nothing'"),
        (["--protocol", "half"], "protocol 'half' is unknown"),
    ):
        code, _, error = hilum(*command, "-o", tmp_path / "wrong", *wrong)
        assert code == 2
        assert said in error
    code, text, _ = hilum("bench", "list", "--suite", "phantom")
    assert code == 0
    assert len(text.splitlines()) == len(PHANTOM_TASKS) + 2
    code, text, _ = hilum("bench", "check", "phantom:age", "--data", root)
    assert code == 0
    assert "24 cases can be used" in text


def test_scores_file_names_its_predictions(tmp_path, root):
    run_bench(tasks_of("stenosis"), ["pixels"], root, tmp_path / "out", QUICK)
    (row,) = read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    path = tmp_path / "out" / "predictions" / row["file"]
    assert row["file"] == "phantom-stenosis__pixels__mean__linear__full.parquet"
    about = table_metadata(read_table(path))
    assert about["classes"] == ["none", "moderate", "severe"]
    assert about["metric"] == "auroc"


def test_retrieval_erases_scanners_as_train_cases_teach(tmp_path):
    """Features are made by hand: the scanner is most of them, the finding little. What is erased is written down."""
    rng = np.random.default_rng(0)
    task = replace(find_phantom("retrieval"), classes=("a", "b"))
    number = 240
    finding, vendor = rng.integers(0, 2, number), rng.integers(0, 3, number)
    vectors = rng.normal(size=(number, 12)) + 4 * np.eye(12)[finding] + 30 * np.eye(12)[2 + vendor]
    rows = [Vectors({"mean": vector.astype(np.float32)}, np.zeros(0, np.float32)) for vector in vectors]
    material = Material(
        task=task, cases=[f"c{n}" for n in range(number)], patients=[f"p{n // 2}" for n in range(number)],
        splits=["train" if n < 100 else "test" for n in range(number)], targets=[(1.0 - f, float(f)) for f in finding],
        features=CaseFeatures(keys=[""] * number, rows=rows, tokens=[None] * number, contract=None),
        truth=LabelMaps(task, [], CaseReader()), contents=[""] * number,
    )  # fmt: skip
    names = Names(model="m", contract="c", features="mean", head="cosine", protocol="erased")
    known = [{"vendor": "ABC"[v], "thickness": 1.0} for v in vendor]
    erased, about = with_eraser(material, "mean", known, ())
    assert (about["nuisances"], about["rank"], about["num_cases"], about["num_patients"]) == (["vendor"], 2, 100, 50)
    assert (about["num_categories"], about["constant"]) == (
        {"vendor": 3},
        ["thickness"],
    )  # no value: it may name a hospital
    serial = [{"vendor": "ABC"[v], "serial": str(n)} for n, v in enumerate(vendor)]  # nobody's is another's
    assert with_eraser(material, "mean", serial, ())[1]["constant"] == ["serial"]
    values = []
    for one in (material, erased):
        table = fit_trials(one, [], names, seeds=1, seed=0)
        score = score_predictions(table, "recall_at_10", num_resamples=50)
        values.append(score.value)
        assert score.num_cases == 140
        assert "that lack the label, not 99" in score.notes[0]
        negatives = np.array(table["output"].to_pylist())[:, 3]
        assert score.chance == pytest.approx(
            np.mean([np.mean(10 / (negatives[finding[100:] == c] + 1)) for c in (0, 1)]), rel=0.02
        )
    assert values[0] < 0.35 < 0.8 < values[1]
    for nuisances, wanted, said in (
        (known, ("kernel",), "kernel is not known"),
        (known, ("thickness",), r"thickness \(always the same\)"),
        ([{}] * number, (), "nothing varies"),
    ):
        with pytest.raises(LabelsError, match=said):
            with_eraser(material, "mean", nuisances, wanted)
    with pytest.raises(LabelsError, match="no train case"):
        with_eraser(replace(material, splits=["test"] * number), "mean", known, ())


def find_phantom(name: str):
    return next(task for task in PHANTOM_TASKS if task.id == f"phantom:{name}")


def test_the_erased_protocol_end_to_end(tmp_path, root):
    """A finished folder goes on with it; both protocols are compared on the same cases; fit on train patients only."""
    out, tasks = tmp_path / "out", tasks_of("retrieval", "organ")
    first = run_bench(tasks[:1], ["pixels"], root, out, replace(QUICK, seeds=1))
    assert first["tasks"]["phantom:retrieval"]["num_cases"] == {"train": 10, "test": 14}
    both = replace(QUICK, seeds=1, protocols=("full", "erased:thickness", "erased:vendor", "erased:soul"))
    result = run_bench(tasks[:1], ["pixels"], root, out, both)
    assert {s["protocol"]: s["num_patients"] for s in result["scores"]} == {"full": 14, "erased:thickness": 14}
    reasons = [row["reason"] for row in result["left_out"]]
    assert "no value of 5 patients or more" in reasons[0]  # ten train patients, three vendors, three kernels
    assert reasons[1].endswith(
        "soul is not known of any train case; known: field_of_view, kernel, sex, spacing, thickness, vendor"
    )
    found = compare_results(
        out, first_is={"protocol": "erased:thickness"}, second_is={"protocol": "full"}, num_resamples=50
    )
    assert found.tasks[0].num_patients == 14
    file = next((out / "predictions").glob("*erased-thickness*"))
    assert table_metadata(read_table(file))["erased"]["num_patients"] == 10
    assert table_metadata(read_table(file))["erased"]["rank"] == 1


def test_what_a_protocol_is_not_for_is_told(tmp_path, root):
    """Neither nothing without a word, nor another head than the one that was asked for."""
    settings = replace(QUICK, seeds=1, protocols=("erased",), heads=("attention",))
    result = run_bench(tasks_of("solid-organs", "organ", "findings"), ["pixels"], root, tmp_path / "out", settings)
    assert (result["scores"], result["complete"]) == ([], False)
    said = {row["task"].partition(":")[2]: row["reason"] for row in result["left_out"]}
    assert said["solid-organs"] == (
        "erased is for classification, regression, multilabel, survival, retrieval; this task is segmentation"
    )
    assert said["organ"] == said["findings"] == "attention, erased: a head on patch tokens; only vectors are erased"
    assert not list((tmp_path / "out" / "features").rglob("*.parquet"))  # nothing was encoded for nothing


def test_protocols_that_erase():
    assert expand_protocols(["erased", "erased:vendor+kernel"]) == ("erased", "erased:vendor+kernel")
    assert erased_names("erased:vendor+kernel") == ("vendor", "kernel")
    assert (erased_names("erased"), erased_names("full")) == ((), None)
    for wrong in ("erased:", "erased:a+"):
        with pytest.raises(UsageError, match="unknown"):
            expand_protocols([wrong])
