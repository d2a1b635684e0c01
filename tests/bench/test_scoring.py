"""Scores of prediction rows of every kind, against the metric and the interval computed apart."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from hilum.bench.judge.scoring import score_predictions
from hilum.bench.predictions import read_predictions, write_predictions
from hilum.errors import InputError, UsageError
from hilum.metrics import auroc, dice_per_case, macro_auroc
from hilum.records import read_table, write_table
from hilum.stats import bootstrap_interval, delong, hanley_mcneil_se

sys.path.insert(0, str(Path(__file__).parent))
from prediction_rows import make_table

sys.path.pop(0)

FEW = {"num_resamples": 300}


def binary(seed=0, num=80, seeds=3):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, num)
    p = np.clip(0.5 + 0.15 * (2 * y - 1) + 0.2 * rng.normal(size=(1, seeds, num)), 0, 1)
    return y, np.stack([1 - p, p], axis=-1)


def test_a_binary_score_is_the_mean_over_seeds_with_everything_beside_it(tmp_path):
    y, outputs = binary()
    patients = np.arange(80) // 2
    path = tmp_path / "p.parquet"
    write_predictions(path, make_table("classification", y, outputs, patients=patients), {})
    found = score_predictions(read_predictions(path), classes=("none", "nodule"), **FEW)
    areas = [roc_auc_score(y, o[:, 1]) for o in outputs[0]]
    assert found.metric == "auroc"
    assert found.value == pytest.approx(np.mean(areas), abs=1e-12)
    assert found.seed_sd == pytest.approx(np.std(areas, ddof=1))
    assert found.draw_sd is None
    assert (found.num_cases, found.num_patients, found.num_seeds, found.num_draws) == (80, 40, 3, 1)

    def mean_area(y, *scores):
        return float(np.mean([auroc(y, s) for s in scores]))

    names = np.array([f"p{p}" for p in patients])
    alone = bootstrap_interval(mean_area, y, *outputs[0, :, :, 1], clusters=names, **FEW)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=1e-12)
    assert found.case_se < found.total_se == pytest.approx(np.hypot(found.case_se, found.seed_sd / np.sqrt(3)))
    assert found.se["Hanley-McNeil"] == hanley_mcneil_se(found.value, y.sum(), (1 - y).sum())
    covariance = delong(y, outputs[0, :, :, 1], patients)[1]
    assert found.se["DeLong"] == pytest.approx(np.sqrt(covariance.mean()))
    assert [(c.name, c.num_present, c.value) for c in found.per_class] == [
        ("none", 80 - y.sum(), pytest.approx(found.value)),
        ("nodule", y.sum(), pytest.approx(found.value)),
    ]
    assert found.brier == pytest.approx(np.mean((outputs[..., 1] - y) ** 2))
    assert 0 < found.ece < 1
    assert found.chance == 0.5
    assert found.to_dict()["per_class"][1]["name"] == "nodule"


def test_draws_of_few_shot_cases_are_told_apart_from_seeds():
    y, outputs = binary(seeds=6)
    found = score_predictions(make_table("classification", y, outputs.reshape(3, 2, 80, 2)), **FEW)
    areas = np.reshape([auroc(y, o[:, 1]) for o in outputs[0]], (3, 2))
    assert found.seed_sd == pytest.approx(np.sqrt(areas.var(axis=1, ddof=1).mean()))
    assert found.draw_sd == pytest.approx(areas.mean(axis=1).std(ddof=1))


def test_classes_by_share_found_and_chance_of_accuracy():
    y = np.repeat([0, 1, 2], [50, 30, 20])
    proba = np.eye(4)[np.where(np.arange(100) % 5 == 0, 3, y)]
    found = score_predictions(make_table("classification", y, proba), "accuracy", **FEW)
    assert (found.value, found.chance) == (0.8, 0.5)
    assert [c.value for c in found.per_class] == [0.8, 0.8, 0.8, None]
    assert score_predictions(
        make_table("classification", y, proba), "balanced_accuracy", **FEW
    ).chance == pytest.approx(1 / 3)


def test_labels_with_unknowns_and_a_label_with_one_class():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (60, 3)).astype(float)
    y[:, 2] = 0
    score = np.clip(rng.random((60, 3)) * 0.6 + 0.4 * y, 0, 1)
    y[::7, 0] = np.nan
    found = score_predictions(make_table("multilabel", y, score), "auroc", **FEW)
    alone = bootstrap_interval(macro_auroc, y, score, clusters=np.arange(60), **FEW)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
    known = ~np.isnan(y[:, 0])
    each = [roc_auc_score(y[known, 0], score[known, 0]), roc_auc_score(y[:, 1], score[:, 1])]
    assert found.metric == "macro_auroc"
    assert found.value == pytest.approx(np.mean(each))
    assert [c.value for c in found.per_class] == [pytest.approx(each[0]), pytest.approx(each[1]), None]
    assert found.per_class[0].num_cases == known.sum()
    assert any("labels without both classes" in note and note.endswith(" 2") for note in found.notes)
    rate = score_predictions(make_table("multilabel", y, score), "macro_auroc_rate", **FEW)
    assert rate.value == pytest.approx(sum(each) / 3)


def test_a_row_of_a_table_holds_a_score_of_any_kind(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.normal(size=50)
    scores = [score_predictions(make_table("regression", y, (y + 1)[:, None]), **FEW).to_dict()]
    write_table(tmp_path / "one.parquet", pa.Table.from_pylist(scores))
    scores.append(score_predictions(make_table("classification", *binary()), **FEW).to_dict())
    write_table(tmp_path / "two.parquet", pa.Table.from_pylist(scores))
    read = read_table(tmp_path / "two.parquet").to_pylist()
    assert read[1]["se"] == scores[1]["se"]
    assert read[0]["se"] == {"DeLong": None, "Hanley-McNeil": None}
    assert len(read[1]["per_class"]) == 2


def test_quantities_times_and_places():
    rng = np.random.default_rng(0)
    y = rng.normal(60, 10, 50)
    found = score_predictions(make_table("regression", y, (y + 1)[:, None]), "mae", **FEW)
    assert found.value == pytest.approx(1.0)
    assert found.chance == pytest.approx(np.abs(y - np.median(y)).mean())
    time = rng.exponential(size=50)
    found = score_predictions(make_table("survival", np.stack([time, np.ones(50)], 1), -time[:, None]), **FEW)
    assert (found.metric, found.value, found.low, found.high) == ("c_index", 1.0, 1.0, 1.0)
    place = rng.normal(size=(50, 3))
    found = score_predictions(make_table("localisation", place, np.add(place, [3.0, 0.0, 4.0])), **FEW)
    assert (found.value, found.low) == pytest.approx((5.0, 5.0))
    assert not found.higher_is_better


def test_segmentation_leaves_absent_classes_out_and_counts_false_ones():
    true = np.array([[10, 0], [20, 0], [30, 5], [40, 0]])
    rows = np.zeros((4, 2, 4))
    rows[:, 0] = [[10, 10, 1, 0.5], [20, 10, 2, 1], [10, 10, 3, 2], [0, 0, np.nan, np.nan]]
    rows[:, 1] = [[0, 0, np.nan, np.nan], [7, 0, np.nan, np.nan], [5, 5, 0, 0], [0, 0, np.nan, np.nan]]
    found = score_predictions(make_table("segmentation", true, rows.reshape(4, 8)), classes=("liver", "cyst"), **FEW)
    per_case = dice_per_case(true, rows[..., 0], rows[..., 1])
    assert per_case[:, 0] == pytest.approx([1, 0.5, 0.5, 0])
    assert found.per_class[0].value == pytest.approx(0.5)
    assert found.per_class[1].value == pytest.approx(0.5)  # 0 where falsely found, 1 where there
    assert found.value == pytest.approx(0.5)
    assert "2 are absent and not predicted" in " ".join(found.notes)
    assert "1 absent but predicted (Dice 0; 7 voxels)" in " ".join(found.notes)
    pooled = score_predictions(make_table("segmentation", true, rows.reshape(4, 8)), "dice_pooled", **FEW)
    assert pooled.value == pytest.approx((2 * 30 / 140 + 2 * 5 / 17) / 2)
    assert score_predictions(make_table("segmentation", true, rows.reshape(4, 8)), "hd95_mm", **FEW).value == 1.0


def test_retrieval_has_a_query_once_for_each_of_its_labels():
    labels = np.repeat([0, 1], 20)
    cases = [f"c{n:02}" for n in range(20)] * 2
    recalls = np.repeat([[0.0, 0.5, 1.0, 99], [0.2, 0.2, 0.4, 49]], 20, axis=0)
    found = score_predictions(make_table("retrieval", labels, recalls, cases=cases), "recall_at_10", **FEW)
    assert (found.value, found.num_patients) == (pytest.approx(0.7), 20)
    assert [c.value for c in found.per_class] == [1.0, pytest.approx(0.4)]


def test_one_patient_has_no_interval_and_few_are_told():
    y, outputs = binary(num=20)
    found = score_predictions(make_table("classification", y, outputs, patients=np.zeros(20)), **FEW)
    assert (found.low, found.high, found.case_se, found.total_se) == (None, None, None, None)
    assert "one patient" in found.notes[0]
    found = score_predictions(make_table("classification", y, outputs), **FEW)
    assert "20 patients" in found.notes[0]


def test_a_shuffled_label_scores_at_chance():
    y, outputs = binary(num=400)
    shuffled = np.random.default_rng(1).permutation(y)
    found = score_predictions(make_table("classification", shuffled, outputs), **FEW)
    assert found.low < 0.5 < found.high


def test_a_constant_feature_scores_at_chance_and_is_named():
    y, _ = binary()
    found = score_predictions(make_table("classification", y, np.full((80, 2), 0.5)), **FEW)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert "every case has the same output" in " ".join(found.notes)
    assert "same output" not in " ".join(score_predictions(make_table("classification", *binary()), **FEW).notes)


def test_rows_that_do_not_fit_together_are_refused():
    y, outputs = binary()
    table = make_table("classification", y, outputs)
    with pytest.raises(InputError, match="no test rows"):
        score_predictions(table.slice(0, 1))
    with pytest.raises(InputError, match="do not fill 1 draw"):
        score_predictions(table.slice(0, 100))
    with pytest.raises(InputError, match="several models: a, m"):
        score_predictions(pa.concat_tables([make_table("classification", y, outputs, model="a"), table]))
    with pytest.raises(UsageError, match="r2 is no metric of a classification"):
        score_predictions(table, "r2")
    with pytest.raises(InputError, match="only one class"):
        score_predictions(make_table("classification", np.ones(80), outputs))
    with pytest.raises(InputError, match="expected 0 to 1"):
        score_predictions(make_table("classification", y + 1, outputs))
    with pytest.raises(InputError, match="1 rows have an output that is not finite"):
        score_predictions(make_table("regression", y[:2], [[np.nan], [1.0]]))
    with pytest.raises(InputError, match="probabilities between 0 and 1"):
        score_predictions(make_table("classification", y, outputs * 3))
    with pytest.raises(InputError, match="1 of 1 test rows have no patient"):
        score_predictions(table.slice(0, 2).set_column(11, "patient", pa.array(["p", None])))
    with pytest.raises(ValueError, match="at least one resample"):
        score_predictions(table, num_resamples=0)
    with pytest.raises(InputError, match="expected 2 and 1"):
        score_predictions(make_table("survival", y, outputs))
