"""Who trains and who tests: shares, strata, patients kept together, files read back and refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hilum.archive.privacy import Key
from hilum.bench.catalogue.tasks import TASKS
from hilum.bench.splits import hash_case, read_split, split_cases, split_text, write_split
from hilum.bench.task import Case, Source
from hilum.errors import InputError

TASK = TASKS["curiabench-2d:O1"]
KEY = Key(bytes(range(32)))


def make(num_patients: int, *, share: float = 0.25, per_patient: int = 3, split: str = "") -> list[Case]:
    """Patients of one class each; `share` of them positive."""
    return [
        Case(
            id=f"{p}/{n}",
            patient=f"p{p}",
            scan=Source(path=Path("x")),
            modality="CT",
            target=(int(p < share * num_patients),),
            split=split,
        )
        for p in range(num_patients)
        for n in range(per_patient)
    ]


@pytest.mark.parametrize(("num", "share"), [(100, 0.25), (40, 0.1), (333, 0.5), (7, 0.5)])
def test_shares_and_strata(num: int, share: float) -> None:
    """70/15/15 of patients to less than two, of all and of each class, and no patient twice."""
    cases = split_cases(TASK, make(num, share=share))
    sides = {case.patient: case.split for case in cases}
    assert len({(case.patient, case.split) for case in cases}) == num
    for members in (
        set(sides),
        {c.patient for c in cases if c.target == (1,)},
        {c.patient for c in cases if c.target == (0,)},
    ):
        count = Counter(sides[p] for p in members)
        for side, wanted in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
            assert abs(count[side] - wanted * len(members)) < 2


def test_a_split_depends_on_seed_and_names_only() -> None:
    """Another order of cases, or more cases of a patient, change nothing; another seed does; both tracks agree."""
    cases = make(50)
    sides = {c.patient: c.split for c in split_cases(TASK, cases)}
    assert {c.patient: c.split for c in split_cases(TASK, cases[::-1])} == sides
    assert {c.patient: c.split for c in split_cases(TASK, make(50, per_patient=1))} == sides
    assert {c.patient: c.split for c in split_cases(TASKS["curiabench-3d:O1"], cases)} == sides
    assert {c.patient: c.split for c in split_cases(TASK, cases, seed=1)} != sides


def test_an_official_split_stays_and_gets_a_validation_part() -> None:
    test = [replace(c, patient=f"t{c.patient}", id=f"t{c.id}") for c in make(20, split="test")]
    cases = split_cases(TASK, [*make(100, split="train"), *test])
    assert [c.split for c in cases if c.id.startswith("t")] == ["test"] * 60
    count = Counter({c.patient: c.split for c in cases if not c.id.startswith("t")}.values())
    assert count == {"train": 82, "val": 18}
    whole = [*make(10, split="train"), *(replace(c, patient="v", id=f"v{c.id}") for c in make(2, split="val")), *test]
    assert split_cases(TASK, whole) == tuple(whole)


def test_a_patient_on_two_sides_is_refused() -> None:
    cases = make(10, split="train")
    cases[4] = replace(cases[4], split="test")
    with pytest.raises(InputError, match=r"1 of 10 patients stand on two sides of the split .one in test and train"):
        split_cases(TASK, cases)
    cases[4] = replace(cases[4], split="", patient="new")
    with pytest.raises(InputError, match="some cases have an official split"):
        split_cases(TASK, cases)


def test_a_written_split_is_read_back_and_tells_nothing(tmp_path: Path) -> None:
    cases = split_cases(TASK, make(20))
    digest = write_split(tmp_path / "split.csv", TASK, cases, KEY)
    text = (tmp_path / "split.csv").read_text()
    assert text.startswith("case,patient,split\n")
    assert not any(case.id in text or f"{case.patient}," in text for case in cases)
    assert hash_case(TASK, cases[0], KEY) in text
    assert read_split(tmp_path / "split.csv", TASK, make(20), KEY) == cases
    assert write_split(tmp_path / "again.csv", TASK, cases[::-1], KEY) == digest
    with pytest.raises(InputError, match="lacks 60 of 60 cases"):
        read_split(tmp_path / "split.csv", TASK, make(20), Key(bytes(32)))


def test_a_users_own_split(tmp_path: Path) -> None:
    """By patient or case, by the publisher's names; whatever does not fit is refused."""
    path = tmp_path / "own.csv"

    def write(*rows: str) -> Path:
        path.write_text("\n".join(rows) + "\n")
        return path

    cases = make(3)
    done = read_split(write("patient;split", "p0;train", "p1;val", "p2;test"), TASK, cases, KEY)
    assert [c.split for c in done] == ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    for rows, message in (
        (("patient,split", "p0,train", "p1,val"), "lacks 3 of 9 cases and names 0"),
        (("patient,split", "p0,train", "p1,val", "p2,test", "p9,test"), "lacks 0 of 9 cases and names 1"),
        (("patient,split", "p0,train", "p0,val"), "row 3: two sides for one patient"),
        (("patient,split", "p0,training"), "row 2: split 'training'"),
        (("name,split", "p0,train"), "expected split, and case or patient"),
        (("case,split", *(f"{c.id},{'test' if c.id == '0/1' else 'train'}" for c in cases)), "1 of 3 patients stand"),
    ):
        with pytest.raises(InputError, match=message):
            read_split(write(*rows), TASK, cases, KEY)


def test_retrieval_trains_nothing() -> None:
    cases = make(5, split="test")
    assert split_cases(TASKS["voxelfm:CT-RATE-retrieval"], cases) == tuple(cases)
    assert split_text(TASK, cases, KEY).count("test") == 15


def test_a_rare_class_is_in_every_part():
    """Three of twenty patients: whichever seed, one each in train, val and test."""
    for seed in range(20):
        rare = {c.split for c in split_cases(TASK, make(20, share=3 / 20), seed=seed) if c.target == (1,)}
        assert rare == {"train", "val", "test"}
