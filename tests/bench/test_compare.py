"""Two sides on common cases, against the statistics computed apart."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hilum.bench.judge.compare import compare_results
from hilum.bench.judge.pairs import compare_models
from hilum.bench.predictions import write_predictions
from hilum.errors import InputError, UsageError
from hilum.metrics import auroc
from hilum.stats import delong_test, paired_difference, permutation_test

sys.path.insert(0, str(Path(__file__).parent))
from prediction_rows import make_table

sys.path.pop(0)

FEW = {"num_resamples": 400}
NUM = 120


def binary(rng, y, signal, seeds=1):
    p = np.clip(0.5 + signal * (2 * y - 1) + 0.2 * rng.normal(size=(1, seeds, len(y))), 0, 1)
    return np.stack([1 - p, p], axis=-1)


def write(folder, table, metric=None):
    names = [table[n][0].as_py().replace(":", "--") for n in ("task", "model", "features", "head", "protocol")]
    write_predictions(folder / "predictions" / ("__".join(names) + ".parquet"), table, {"metric": metric})


@pytest.fixture
def results(tmp_path):
    """Two models on four tasks: clearly better, equal, worse (an error in years), better with an extra case."""
    rng = np.random.default_rng(0)
    y, patients = np.arange(NUM) % 2, np.arange(NUM) // 2
    age = rng.normal(60, 10, NUM)
    for model, signal, error in (("ours", 0.2, 8), ("theirs", 0.02, 2)):
        folder = tmp_path / model
        about = {"model": model, "patients": patients}
        write(folder, make_table("classification", y, binary(rng, y, signal, 3), task="s:lesion", **about))
        write(folder, make_table("classification", y, binary(rng, y, 0.05), task="s:equal", **about))
        predicted = age + error * rng.normal(size=NUM)
        write(folder, make_table("regression", age, predicted[:, None], task="s:age", **about), "mae")
        more = NUM if model == "ours" else NUM - 10
        outputs = binary(rng, y, signal)[:, :, :more]
        table = make_table("classification", y[:more], outputs, task="s:part", model=model, patients=patients[:more])
        write(folder, table, "auroc")
    write(tmp_path / "ours", make_table("regression", age, age[:, None], task="s:alone", model="ours"))
    return tmp_path


def test_the_answer_in_a_sentence_and_a_table(results):
    found = compare_results(results / "ours", results / "theirs", **FEW)
    assert [(t.task, t.better) for t in found.tasks] == [
        ("s:age", "second"),
        ("s:equal", ""),
        ("s:lesion", "first"),
        ("s:part", "first"),
    ]
    equal = next(t for t in found.tasks if t.task == "s:equal")
    ranks = 1.25 if equal.difference > 0 else 1.5
    assert found.sentence().startswith(
        "ours is better than theirs on 2 of 4 tasks after Holm (p < 0.05), worse on 1, undecided on 1; mean rank "
        f"{ranks:.2f} ("
    )
    assert found.first_rank.value + found.second_rank.value == 3
    assert (found.tasks[0].metric, found.tasks[3].only_first, found.tasks[3].num_cases) == ("mae", 10, 110)
    assert found.notes() == [
        "s:part: 10 cases only in A, 0 only in B; 110 compared",
        "left out: s:alone class linear full: only one side has it",
    ]
    table = found.table()
    assert max(map(len, table.splitlines())) <= 100
    assert table.startswith("A: ours\nB: theirs\n")
    assert "s:lesion" in table
    assert json.loads(json.dumps(found.to_dict()))["tasks"][0]["p_delong"] is None


def test_a_row_is_what_the_statistics_say(results):
    rng = np.random.default_rng(0)
    y, patients = np.arange(NUM) % 2, np.arange(NUM) // 2
    first, second = binary(rng, y, 0.1)[0, 0], binary(rng, y, 0.05)[0, 0]
    write(results / "x", make_table("classification", y, first, model="a", patients=patients))
    write(results / "x", make_table("classification", y, second, model="b", patients=patients))
    found = compare_results(results / "x", first_is={"model": "a"}, second_is={"model": "b"}, num_resamples=4000)
    row, columns = found.tasks[0], ((y, first[:, 1]), (y, second[:, 1]))
    assert row.difference == pytest.approx(auroc(*columns[0]) - auroc(*columns[1]))
    paired = paired_difference(auroc, *columns, clusters=patients, num_resamples=4000, seed=9).interval
    assert (row.low, row.high) == pytest.approx((paired.low, paired.high), abs=0.01)
    assert row.p == pytest.approx(permutation_test(auroc, *columns, clusters=patients, seed=9).p_value, abs=0.03)
    assert row.p_delong == pytest.approx(delong_test(y, first[:, 1], second[:, 1], patients).p_value)
    assert (row.p_holm, found.first, found.second) == (row.p, "a", "b")
    back = compare_results(results / "x", first_is={"model": "b"}, second_is={"model": "a"}, num_resamples=4000).tasks[
        0
    ]
    assert (back.first, back.second, back.p, back.p_delong) == (row.second, row.first, row.p, row.p_delong)
    assert (back.difference, back.low, back.high) == pytest.approx((-row.difference, -row.high, -row.low), abs=1e-12)


def test_the_interval_is_never_cut(tmp_path):
    """Long names are; and features that only tell tasks apart are no setting."""
    rng = np.random.default_rng(0)
    y = np.arange(NUM) % 2
    for task, features in (("own:a_task_with_a_long_name_of_ours", "class"), ("own:another_such_task_of_ours", "mean")):
        for model in ("a", "b"):
            outputs = binary(rng, y, 0.1)
            write(
                tmp_path,
                make_table("classification", y, outputs, task=task, model=model, features=features),
                "balanced_accuracy",
            )
    found = compare_results(tmp_path, first_is={"model": "a"}, second_is={"model": "b"}, **FEW)
    assert {t.setting for t in found.tasks} == {""}
    for row, line in zip(found.tasks, found.table().splitlines()[-2:]):
        assert f"({row.low:+.3f}, {row.high:+.3f})" in line
        assert len(line) <= 100
    assert "DeLong" not in found.table()


def test_encoders_that_pool_in_their_own_ways_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(NUM) % 2
    for model, features in (("a", "class"), ("b", "class+mean")):
        write(tmp_path, make_table("classification", y, binary(rng, y, 0.1), model=model, features=features))
    found = compare_results(tmp_path, first_is={"model": "a"}, second_is={"model": "b"}, **FEW)
    assert len(found.tasks) == 1
    assert found.notes() == ["t linear full: features class of A, class+mean of B"]
    write(tmp_path, make_table("classification", y, binary(rng, y, 0.1), model="b", features="mean"))
    with pytest.raises(UsageError, match="nothing to compare"):  # which of the two is not said
        compare_results(tmp_path, first_is={"model": "a"}, second_is={"model": "b"}, **FEW)


def test_two_heads_of_one_model(results):
    rng = np.random.default_rng(0)
    y = np.arange(NUM) % 2
    for head, features in (("linear", "class"), ("linear", "mean"), ("knn", "class"), ("knn", "mean")):
        table = make_table("classification", y, binary(rng, y, 0.1), head=head, features=features)
        write(results / "heads", table)
    found = compare_results(results / "heads", first_is={"head": "linear"}, second_is={"head": "knn"}, **FEW)
    assert [t.setting for t in found.tasks] == ["class", "mean"]
    assert "setting" in found.table()
    with pytest.raises(UsageError, match="several predictions for t m full"):
        compare_results(
            results / "heads", first_is={"head": "linear"}, second_is={"head": "knn", "features": "mean"}, **FEW
        )


def test_what_cannot_be_compared_is_said(results, tmp_path):
    with pytest.raises(UsageError, match="nothing to compare"):
        compare_results(results / "ours", **FEW)
    with pytest.raises(UsageError, match=r"no predictions with .*'model': 'x'.*there are .*model ours"):
        compare_results(results / "ours", second_is={"model": "x"}, **FEW)
    with pytest.raises(UsageError, match="unknown setting encoder"):
        compare_results(results / "ours", first_is={"encoder": "x"}, **FEW)
    with pytest.raises(InputError, match="holds no predictions"):
        compare_results(tmp_path / "nothing", results / "ours")
    y = np.arange(NUM) % 2
    rng = np.random.default_rng(0)
    write(tmp_path / "p", make_table("classification", y, binary(rng, y, 0.1)))
    write(tmp_path / "q", make_table("classification", 1 - y, binary(rng, y, 0.1)))
    write(tmp_path / "r", make_table("classification", y, binary(rng, y, 0.1), cases=[f"other{n}" for n in range(NUM)]))
    write(tmp_path / "s", make_table("classification", y, binary(rng, y, 0.1), patients=np.arange(NUM) // 3))
    with pytest.raises(InputError, match="disagree on the true values"):
        compare_results(tmp_path / "p", tmp_path / "q", **FEW)
    with pytest.raises(InputError, match="no case in common"):
        compare_results(tmp_path / "p", tmp_path / "r", **FEW)
    with pytest.raises(InputError, match="which patient a case belongs to"):
        compare_results(tmp_path / "p", tmp_path / "s", **FEW)
    for name in ("t", "u"):
        write(tmp_path / name, make_table("classification", y, binary(rng, y, 0.1), patients=np.zeros(NUM)))
    with pytest.raises(InputError, match=r"no task can be compared: t class linear full: .*at least 2 clusters"):
        compare_results(tmp_path / "t", tmp_path / "u", **FEW)


def test_three_models_each_with_each_other(tmp_path):
    """The rows are those of each pair alone; Holm, written out, over all of them; a task that one model lacks is told."""
    rng = np.random.default_rng(0)
    y = np.arange(NUM) % 2
    for model, signal in (("flat", 0.02), ("deep", 0.1), ("both", 0.25)):
        for task in ("s:one", "s:two"):
            if (task, model) == ("s:two", "flat"):
                continue
            features = "class" if model != "both" else "class|mean"
            write(
                tmp_path,
                make_table("classification", y, binary(rng, y, signal), task=task, model=model, features=features),
            )
    found = compare_models(tmp_path, ["flat", "deep", "both"], **FEW)
    assert found.pairs == (("deep", "flat"), ("both", "flat"), ("both", "deep"))
    assert [[row.task for row in rows] for rows in found.rows] == [["s:one"], ["s:one"], ["s:one", "s:two"]]
    p = [row.p for rows in found.rows for row in rows]
    order = sorted(range(4), key=p.__getitem__)
    slow, largest = [0.0] * 4, 0.0
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, p[n] * (4 - rank)))
        slow[n] = largest
    assert [row.p_holm for rows in found.rows for row in rows] == pytest.approx(slow)
    for (first, second), rows in zip(found.pairs, found.rows):
        alone = compare_results(tmp_path, first_is={"model": first}, second_is={"model": second}, **FEW).tasks
        for row, other in zip(rows, alone):
            assert (row.difference, row.low, row.high, row.p) == (other.difference, other.low, other.high, other.p)
    assert found.sentences()[1].startswith(
        "both is better than flat on 1 of 1 task, worse on 0, undecided on 0 (p < 0.05"
    )
    assert "left out: both with flat: s:two" in "\n".join(found.notes())
    table = found.table()
    assert max(map(len, table.splitlines())) <= 100
    assert "C − B" in table
    assert json.loads(json.dumps(found.to_dict()))["pairs"][0] == ["deep", "flat"]
    with pytest.raises(UsageError, match="different ones"):
        compare_models(tmp_path, ["flat", "flat"])
    with pytest.raises(UsageError, match="no predictions with"):
        compare_models(tmp_path, ["flat", "deeper"], **FEW)


def test_models_without_a_common_task_do_not_stop_the_other_pairs(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(NUM) % 2
    for model, task in (("a", "s:one"), ("b", "s:one"), ("b", "s:two"), ("c", "s:two")):
        write(tmp_path, make_table("classification", y, binary(rng, y, 0.1), task=task, model=model))
    found = compare_models(tmp_path, ["a", "b", "c"], **FEW)
    assert [[row.task for row in rows] for rows in found.rows] == [["s:one"], [], ["s:two"]]
    assert any(note.startswith("left out: c with a: nothing to compare") for note in found.notes())
    with pytest.raises(InputError, match="no pair"):
        compare_models(tmp_path, ["a", "c"], **FEW)
