import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from hilum.archive.privacy import Key
from hilum.errors import InputError, LabelsError, UsageError
from hilum.metrics import METRICS
from hilum.probe.fit import choose_task, probe
from hilum.probe.labels import read_features
from hilum.probe.result import compare, score_columns
from hilum.records import hash_file, read_table, table_metadata, write_table

KEY = Key(b"k" * 32)
NUM_PATIENTS, PER_PATIENT = 30, 4
NUM = NUM_PATIENTS * PER_PATIENT


@pytest.fixture(autouse=True)
def _no_user_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "absent-key"))


def _features(path, vectors=None, *, level="slice", patient_known=True, model="tiny", **columns):
    """Four slices of 30 patients; one series each. The first column of the vectors tells the label of `_label`."""
    number = np.arange(NUM) // PER_PATIENT
    if vectors is None:
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(NUM, 8))
        vectors[:, 0] += 2 * (number % 2)
    table = {
        "item": [KEY.hash("item", str(i)) for i in range(NUM)],
        "patient": [KEY.hash("patient", f"P{n}") if patient_known else "" for n in number],
        "study": [KEY.hash("study", f"S{n}") for n in number],
        "series": [KEY.hash("series", f"1.2.{n}") for n in number],
        "level": [level] * NUM if isinstance(level, str) else level,
        "slice": pa.array([None if level == "volume" else i % PER_PATIENT for i in range(NUM)], pa.int32()),
        "region": pa.array([i % 3 + 1 if level == "region" else None for i in range(NUM)], pa.int32()),
        "model": [model] * NUM if isinstance(model, str) else model,
        "contract": ["c0ffee"] * NUM,
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(np.asarray(vectors, np.float32).ravel(), pa.float32()), np.shape(vectors)[1]
        ),
    }
    facts = {"key": KEY.fingerprint, "model": str(model), "contract": "c0ffee"}
    write_table(path, pa.table(table | columns), facts)
    return path


def _labels(path, rows):
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _label(n):
    return ["benign", "malignant"][n % 2]


def _patient_labels(path, **more):
    return _labels(
        path,
        [{"patient_id": f"P{n}", "label": _label(n)} | {k: v(n) for k, v in more.items()} for n in range(NUM_PATIENTS)],
    )


@pytest.fixture
def features(tmp_path):
    return _features(tmp_path / "f.parquet")


@pytest.fixture
def labels(tmp_path):
    return _patient_labels(tmp_path / "l.csv", fold=lambda n: n % 3, age=lambda n: 40 + n + 0.5)


def _run(features, labels, target="label", **options):
    return probe(features, labels, target=target, key=KEY, **({"num_resamples": 50, "num_folds": 2} | options))


def test_a_feature_that_tells_the_label_is_found_on_unseen_patients(features, labels):
    result = _run(features, labels)
    assert result.task == "classification"
    assert result.classes == ("benign", "malignant")
    assert result.scores["auroc"].value > 0.85
    assert result.scores["auroc"].low > 0.75
    assert (result.cluster, result.scores["auroc"].num_clusters) == ("patient", NUM_PATIENTS)
    assert result.joined_on == ("patient_id",)
    assert set(result.left_out.values()) == {0}
    assert [row["metric"] for row in result.table()] == ["auroc", "accuracy", "balanced_accuracy"]
    json.dumps(result.to_dict(), allow_nan=False)


def test_predictions_are_one_row_per_case_with_patients_apart(features, labels, tmp_path):
    result = _run(features, labels, output=tmp_path / "p.parquet", seed=3, num_folds=5)
    rows = read_table(tmp_path / "p.parquet")
    assert rows.equals(result.predictions)
    assert rows.column_names == [
        *("item", "patient", "fold", "split", "seed", "target", "y_true", "y_pred"),
        *("proba_benign", "proba_malignant", "head", "model", "contract"),
    ]
    assert rows["item"].to_pylist() == [KEY.hash("item", str(i)) for i in range(NUM)]
    folds = {(p, f) for p, f in zip(rows["patient"].to_pylist(), rows["fold"].to_pylist())}
    assert len(folds) == NUM_PATIENTS
    assert set(rows["fold"].to_pylist()) == set(range(5))
    assert rows["y_true"].to_pylist() == [_label(i // PER_PATIENT) for i in range(NUM)]
    about = table_metadata(rows)
    assert about["inputs"] == {"features": hash_file(features), "labels": hash_file(labels)}
    assert (about["seed"], about["key"], about["target"]) == (3, KEY.fingerprint, "label")
    expected = roc_auc_score(np.array(rows["y_true"].to_pylist()) == "malignant", rows["proba_malignant"].to_numpy())
    assert result.scores["auroc"].value == pytest.approx(expected)


def test_raw_identifiers_are_never_written(features, tmp_path):
    labels = _patient_labels(tmp_path / "l.csv", ward=lambda n: f"Smith {n % 3}", who=lambda n: f"Jones {n}")
    result = _run(features, labels, output=tmp_path / "p.parquet", groups="ward", patients="who")
    table = read_table(tmp_path / "p.parquet")
    written = str(table.to_pydict()) + str(table.schema.metadata) + json.dumps(result.to_dict() | {"per_fold": []})
    for raw in ("P1", "Jones"):
        assert raw not in written
    assert result.predictions["patient"][4].as_py() == KEY.hash("patient", "Jones 1")
    by_identifier = _run(_features(tmp_path / "g.parquet", patient_known=False), _file_labels(tmp_path), groups="file")
    assert "scan" not in json.dumps(by_identifier.to_dict())


@pytest.mark.parametrize("head", ["linear", "knn"])
def test_a_feature_that_only_names_the_patient_is_worth_nothing(tmp_path, head):
    rng = np.random.default_rng(1)
    values = []
    for trial in range(6):
        vectors = rng.normal(size=(NUM_PATIENTS, 40))[np.arange(NUM) // PER_PATIENT]
        path = _features(tmp_path / f"{trial}.parquet", vectors + 0.01 * rng.normal(size=vectors.shape))
        sick = rng.permutation(NUM_PATIENTS) % 2
        labels = _labels(
            tmp_path / "l.csv", [{"patient_id": f"P{n}", "label": int(sick[n])} for n in range(NUM_PATIENTS)]
        )
        values.append(_run(path, labels, head=head, num_resamples=1).scores["auroc"].value)
    assert np.mean(values) < 0.6


def _file_labels(tmp_path):
    """Labels of single images, named by their path below the embedded folder; `_features` with series = file."""
    series = [KEY.hash("item", f"scan/{i}.png") for i in range(NUM)]
    _features(tmp_path / "g.parquet", patient_known=False, series=series)
    rows = [{"file": f"./scan/{i}.png", "label": _label(i // PER_PATIENT), "run": i // 4} for i in range(NUM)]
    return _labels(tmp_path / "files.csv", rows)


def test_labels_join_by_every_identifier(features, tmp_path):
    expected = [_label(i // PER_PATIENT) for i in range(NUM)]
    hashed = {
        "item": [KEY.hash("item", str(i)) for i in range(NUM)],
        "series": [KEY.hash("series", f"1.2.{n}") for n in range(NUM_PATIENTS)],
        "series_uid": [f"1.2.{n}" for n in range(NUM_PATIENTS)],
        "patient": [KEY.hash("patient", f"P{n}") for n in range(NUM_PATIENTS)],
    }
    for name, values in hashed.items():
        every = NUM // len(values)
        rows = [{name: v, "label": _label(i * every // PER_PATIENT)} for i, v in enumerate(values)]
        result = _run(features, _labels(tmp_path / "l.csv", rows), num_resamples=2)
        assert result.joined_on == (name,)
        assert result.predictions["y_true"].to_pylist() == expected
    result = _run(tmp_path / "g.parquet", _file_labels(tmp_path), groups="run", num_resamples=2)
    assert result.joined_on == ("file",)
    assert result.predictions["y_true"].to_pylist() == expected


def test_slice_narrows_the_join_and_parquet_labels_serve_too(features, tmp_path):
    table = {
        "series_uid": [f"1.2.{i // PER_PATIENT}" for i in range(NUM)],
        "slice": pa.array([float(i % PER_PATIENT) for i in range(NUM)]),
        "region": pa.array([9] * NUM),  # slices have no region: plays no part
        "half": pa.array([i % PER_PATIENT // 2 for i in range(NUM)]),
    }
    write_table(tmp_path / "l.parquet", pa.table(table))
    result = _run(features, tmp_path / "l.parquet", target="half")
    assert result.joined_on == ("series_uid", "slice")
    assert result.predictions["y_true"].to_pylist() == [str(i % PER_PATIENT // 2) for i in range(NUM)]


def test_a_column_of_the_features_can_be_the_target(tmp_path):
    region = np.arange(NUM) % 3
    vectors = np.eye(3)[region] + 0.1 * np.random.default_rng(0).normal(size=(NUM, 3))
    result = _run(_features(tmp_path / "f.parquet", vectors, level="region"), None, target="region")
    assert result.classes == ("1", "2", "3")
    assert result.scores["auroc"].value > 0.99
    assert result.joined_on == ()


def test_what_is_left_out_is_counted(features, tmp_path):
    rows = [{"patient_id": f"P{n}", "label": _label(n)} for n in range(28)]
    rows[3]["label"] = ""
    rows[4]["label"] = "nan"
    rows += [rows[0], rows[1], {"patient_id": "P999", "label": "benign"}, {"patient_id": "", "label": "benign"}]
    result = _run(features, _labels(tmp_path / "l.csv", rows))
    assert result.left_out == {
        "labels without a case": 2,
        "labels with an empty value": 2,
        "equal labels merged": 2,
        "cases without a label": 4 * PER_PATIENT,
    }
    assert result.predictions.num_rows == NUM - 4 * PER_PATIENT


def test_an_unknown_patient_is_not_joined_to_an_empty_identifier(tmp_path):
    number = np.arange(NUM) // PER_PATIENT
    features = _features(tmp_path / "f.parquet", patient=[KEY.hash("patient", f"P{n}" if n else "") for n in number])
    rows = [{"patient_id": f"P{n}" if n else "", "label": _label(n)} for n in range(NUM_PATIENTS)]
    result = _run(features, _labels(tmp_path / "l.csv", rows), num_resamples=2)
    assert result.left_out["cases without a label"] == PER_PATIENT
    assert "" not in result.predictions["patient"].to_pylist()


def test_few_groups_are_left_out_one_by_one_and_many_are_dealt(features, labels, tmp_path):
    result = _run(features, labels, groups="fold")
    assert [row["held_out"] for row in result.per_fold] == ["0", "1", "2"]
    assert result.predictions["fold"].to_pylist() == [i // PER_PATIENT % 3 for i in range(NUM)]
    assert result.per_fold[0]["num_cases"] == 40
    assert 0 <= result.per_fold[0]["auroc"] <= 1
    many = _run(features, _patient_labels(tmp_path / "m.csv", site=lambda n: n // 2), groups="site", num_folds=4)
    assert [row["held_out"] for row in many.per_fold] == [None] * 4
    site = np.array([i // PER_PATIENT // 2 for i in range(NUM)])
    for name in range(15):
        assert len(set(many.predictions["fold"].to_numpy()[site == name])) == 1


def test_a_metric_without_a_value_in_one_fold_is_left_empty_there(features, tmp_path):
    fold = {n: "odd" if n == 1 or n == 3 else n % 2 + n // 2 % 2 for n in range(NUM_PATIENTS)}
    result = _run(features, _patient_labels(tmp_path / "l.csv", fold=fold.get), groups="fold")
    alone = next(row for row in result.per_fold if row["held_out"] == "odd")
    assert alone["auroc"] is None
    assert 0 <= alone["accuracy"] <= 1


def test_intervals_resample_patients_then_groups_then_items(tmp_path):
    unknown = _features(tmp_path / "f.parquet", patient_known=False)
    series = [{"series_uid": f"1.2.{n}", "label": _label(n), "run": n, "fold": n % 3} for n in range(NUM_PATIENTS)]
    labels = _labels(tmp_path / "l.csv", series)
    assert _run(unknown, labels, groups="run").cluster == "group"
    assert _run(unknown, labels, patients="run").cluster == "patient"
    result = _run(unknown, labels, groups="fold")
    assert result.cluster == "item"
    assert result.scores["auroc"].num_clusters == NUM
    assert any("patients unknown" in note and "too narrow" in note for note in result.notes)
    named = _run(unknown, labels, groups="fold", patients="run")
    assert (named.cluster, named.scores["auroc"].num_clusters) == ("patient", NUM_PATIENTS)
    assert not any("patients unknown" in note for note in named.notes)


def test_regression_with_interval_and_without_classes(features, labels):
    rng = np.random.default_rng(0)
    age = 40 + np.arange(NUM) // PER_PATIENT + 0.5
    _features(features, np.stack([age + rng.normal(size=NUM), rng.normal(size=NUM)], axis=1))
    result = _run(features, labels, target="age")
    assert result.task == "regression"
    assert result.scores["r2"].value > 0.9
    assert result.predictions["y_true"].to_pylist() == age.tolist()
    assert not any(name.startswith("proba_") for name in result.predictions.column_names)
    assert _run(features, labels, target="age", head="knn").task == "regression"


def test_same_seed_same_result_and_row_order_does_not_matter(features, labels, tmp_path):
    first = _run(features, labels)
    assert _run(features, labels).to_dict() == first.to_dict()
    assert _run(features, labels, seed=1).predictions["fold"] != first.predictions["fold"]
    table = read_table(features)
    order = np.random.default_rng(0).permutation(NUM)
    write_table(tmp_path / "s.parquet", table.take(order), table_metadata(table))
    shuffled = _run(tmp_path / "s.parquet", labels)
    assert shuffled.scores["auroc"].value == pytest.approx(first.scores["auroc"].value, abs=2e-3)
    assert shuffled.predictions["fold"].to_pylist() == first.predictions["fold"].take(order).to_pylist()


def test_task_follows_the_values():
    assert choose_task(["a", "b"], own_column=False)[0] == "classification"
    assert choose_task([str(n) for n in range(12)], own_column=False)[0] == "classification"
    assert choose_task([str(n) for n in range(40)], own_column=False)[0] == "regression"
    assert choose_task([str(n) for n in range(40)], own_column=True)[0] == "classification"
    assert choose_task([f"{n}.5" for n in range(12)], own_column=False)[0] == "regression"
    assert choose_task(["0.5", "1.5"] * 9, own_column=False)[0] == "classification"
    assert choose_task(["inf", *map(str, range(40))], own_column=False)[0] == "classification"


def test_classes_are_sorted_as_numbers_and_rare_ones_are_noted(features, tmp_path):
    rows = [{"patient_id": f"P{n}", "grade": [10, 9, 2][n % 3] if n else 11} for n in range(NUM_PATIENTS)]
    result = _run(features, _labels(tmp_path / "l.csv", rows), target="grade")
    assert result.classes == ("2", "9", "10", "11")
    assert any("1 of 4 classes occur in one group only" in note for note in result.notes)
    only = np.array(result.predictions["y_true"].to_pylist()) == "11"
    assert (result.predictions["proba_11"].to_numpy()[only] == 0).all()


def test_compare_pairs_two_models_on_common_cases(features, labels, tmp_path):
    noise = np.random.default_rng(5).normal(size=(NUM, 8))
    a, b = _run(features, labels), _run(_features(tmp_path / "n.parquet", noise, model="random"), labels)
    found = {c.metric: c for c in compare([a, b], num_resamples=200)}
    assert (found["auroc"].first, found["auroc"].second) == ("tiny · linear", "random · linear")
    expected = a.scores["auroc"].value - b.scores["auroc"].value
    assert found["auroc"].difference.interval.value == pytest.approx(expected)
    assert found["auroc"].difference.interval.low > 0
    assert found["auroc"].difference.p_value < 0.05
    json.dumps([c.to_dict() for c in found.values()], allow_nan=False)
    rows = [{"patient_id": f"P{n}", "slice": 2, "label": _label(n)} for n in range(5, 15)]
    (few, *_) = compare([a, _run(features, _labels(tmp_path / "h.csv", rows))], num_resamples=20)
    assert few.num_cases == few.difference.interval.num_clusters == 10
    y_true, proba = score_columns(a.predictions, METRICS["auroc"])
    assert y_true.shape == proba.shape == (NUM,)
    with pytest.raises(UsageError, match="two or more results"):
        compare([a])
    with pytest.raises(UsageError, match="same target"):
        compare([a, _run(features, labels, target="fold")])


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "grade"}, LabelsError, "no column 'grade'. The labels have: patient_id, label, fold, age"),
        ({"groups": "site"}, LabelsError, "no column 'site'"),
        ({"head": "svm"}, UsageError, "unknown head 'svm'; known: linear, knn"),
        ({"head": "knn", "num_components": 3}, UsageError, "has no option num_components"),
        ({"task": "survival"}, UsageError, "known: auto, classification, regression"),
        ({"task": "regression"}, LabelsError, "no finite numbers"),
        ({"level": "volume"}, UsageError, "no features of level 'volume'; it has: slice"),
        ({"num_folds": 1}, UsageError, "num_folds ≥ 2"),
        ({"key": Key(b"z" * 32)}, LabelsError, f"made with key {KEY.fingerprint}.*Point HILUM_KEY"),
        ({"key": None}, LabelsError, "key at hand is missing"),
        ({"groups": "item"}, LabelsError, "30 of 30 known patients on both sides"),
    ],
)
def test_wrong_calls_are_explained(features, labels, options, error, message):
    with pytest.raises(error, match=message):
        probe(features, labels, **({"target": "label", "key": KEY, "num_resamples": 5} | options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no labels"),
        ("patient_id,label\n", "holds no labels"),
        ("name,label\nx,1\n", "no identifying column; found name, label, expected one of item"),
        ("patient_id,label\nQ1,1\nQ2,2\n", r"none of 2 labels matches any of 120 cases \(tried patient_id;.*key"),
        ("patient,label\nP1,1\nP2,2\n", "raw identifiers belong into"),
        ("patient_id,label\nP1,a\nP2,b\nP1,b\n", "1 labels contradict.*rows 1 and 3 in column 'label'"),
        ("patient_id,label\nP1,a\nP2,a\n", "all 8 labels are 'a'"),
        ("patient_id,label\nP1,\nP2,\n", "no case has a label"),
        ("patient_id,label\nP1,a\n", "nothing to tell apart"),
        ("patient_id,label\nP1,a\nP2,b\n", "each of the 2 classes stays within one group"),
        ("patient_id,label,label\nP1,a,b\n", "repeats a column name"),
        ("patient_id,label\nP1,a,b\n", "row 2 has 3 fields, the header has 2"),
        ("patient_id,slice,label\nP1,first,a\n", "'slice' of the labels holds 'first'; expected whole numbers"),
        ('patient_id,label\n"P1,a\n', "is no CSV"),
    ],
)
def test_wrong_labels_are_explained(features, tmp_path, text, message):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(LabelsError, match=message):
        _run(features, tmp_path / "l.csv")


def test_labels_of_other_encodings_and_separators(features, tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("patient_id;label\n" + "".join(f"P{n};{_label(n)}\n" for n in range(30)), encoding="utf-8-sig")
    assert _run(features, path, num_resamples=2).predictions.num_rows == NUM
    path.write_bytes("patient_id,label\nP1,bösartig\n".encode("latin-1"))
    with pytest.raises(LabelsError, match="no CSV in UTF-8"):
        _run(features, path)
    with pytest.raises(LabelsError, match="cannot be read"):
        _run(features, tmp_path / "absent.csv")


def test_unknown_patients_ask_for_groups(tmp_path, labels):
    rows = [{"series_uid": f"1.2.{n}", "label": _label(n), "site": n % 3 if n else ""} for n in range(NUM_PATIENTS)]
    unknown, by_series = _features(tmp_path / "u.parquet", patient_known=False), _labels(tmp_path / "s.csv", rows)
    with pytest.raises(LabelsError, match=r"patient of 120 of 120 cases is unknown.*--groups COLUMN"):
        _run(unknown, by_series)
    with pytest.raises(LabelsError, match="column 'site' is empty for 4 of 120 cases"):
        _run(unknown, by_series, groups="site")


def test_groups_that_cannot_be_split(features, tmp_path):
    labels = _patient_labels(tmp_path / "l.csv", one=lambda n: "x", pure=lambda n: n % 2 if n else 2)
    with pytest.raises(LabelsError, match="belong to one group; expected at least two"):
        _run(features, labels, groups="one")
    labels = _patient_labels(tmp_path / "l.csv", pure=lambda n: "ab"[n % 2] if n else "b")
    with pytest.raises(LabelsError, match=r"held out, the remaining .* are all of class"):
        _run(features, labels, groups="pure")
    one = _labels(tmp_path / "o.csv", [{"patient_id": "P1", "slice": s, "label": s % 2} for s in range(4)])
    with pytest.raises(LabelsError, match="belong to one patient"):
        _run(features, one)


def test_features_that_cannot_serve(features, labels, tmp_path):
    broken = np.ones((NUM, 3))
    broken[5, 1], broken[7, 0] = np.nan, np.inf
    with pytest.raises(LabelsError, match="2 of 120 feature vectors hold NaN or infinity"):
        _run(_features(tmp_path / "n.parquet", broken), labels)
    with pytest.raises(InputError, match="repeats items"):
        _run(_features(tmp_path / "r.parquet", item=["x"] * NUM), labels)
    with pytest.raises(UsageError, match="several models"):
        _run(_features(tmp_path / "m.parquet", model=["a", "b"] * 60), labels)
    write_table(tmp_path / "c.parquet", read_table(features).drop_columns(["contract"]))
    with pytest.raises(InputError, match="has no column contract"):
        _run(tmp_path / "c.parquet", labels)
    with pytest.raises(InputError, match="missing"):
        _run(tmp_path / "absent.parquet", labels)
    write_table(tmp_path / "e.parquet", read_table(features).slice(0, 0))
    with pytest.raises(LabelsError, match="holds no features"):
        _run(tmp_path / "e.parquet", labels)


def test_several_levels_need_a_choice(tmp_path, labels):
    mixed = _features(tmp_path / "f.parquet", level=["slice", "volume"] * 60)
    with pytest.raises(UsageError, match=r"several levels \(slice, volume\); choose one"):
        _run(mixed, labels)
    one = read_features(mixed, "volume")
    assert one.table.num_rows == len(one.vectors) == 60
    np.testing.assert_array_equal(one.vectors, read_features(_features(tmp_path / "g.parquet")).vectors[1::2])


def test_a_table_is_erased_and_keeps_its_columns(tmp_path, hilum):
    """Learnt from the training patients alone; a probe of the vendor falls to chance there; the head cannot be saved."""
    rng = np.random.default_rng(0)
    vendor = np.arange(NUM_PATIENTS) % 3 == 0
    vectors = rng.normal(size=(NUM, 8)) + 3 * vendor[np.arange(NUM) // PER_PATIENT, None]
    path = _features(tmp_path / "f.parquet", vectors)
    rows = [
        {"patient": KEY.hash("patient", f"P{n}"), "vendor": "AB"[int(vendor[n])], "part": "train" if n < 20 else "test"}
        for n in range(NUM_PATIENTS - 1)  # the last one is in no table
    ]
    labels = _labels(tmp_path / "n.csv", rows)
    command = ["erase", path, "--nuisances", labels, "--columns", "vendor", "-o", tmp_path / "g.parquet"]
    code, text, error = hilum(*command, "--train", "part=train")
    assert code == 0, error
    assert "80 cases of 20 patients" in text
    before, after = read_features(path), read_features(tmp_path / "g.parquet")
    assert after.table.equals(before.table)
    z = np.repeat(vendor, PER_PATIENT)[:80].astype(float)
    left = (after.vectors[:80] - after.vectors[:80].mean(0)).T @ (z - z.mean()) / 80
    assert np.abs(left).max() < 1e-6  # float32
    assert np.abs(after.vectors - before.vectors)[-PER_PATIENT:].max() > 0.1  # unnamed rows, too
    about = table_metadata(read_table(tmp_path / "g.parquet"))
    assert about["contract"] == "c0ffee"
    assert (about["erased"]["nuisances"], about["erased"]["num_patients"]) == (["vendor"], 20)
    for wrong, said in (
        (["--train", "part=none"], "no case has part=none"),
        (["--columns", "kernel"], "no column 'kernel'"),
        (["-o", path], "would replace"),
    ):
        code, _, error = hilum(*command, *wrong)
        assert code != 0
        assert said in error
    code, _, error = hilum("erase", tmp_path / "g.parquet", *command[2:6], "-o", tmp_path / "h.parquet")
    assert code == 2
    assert "erased before" in error
