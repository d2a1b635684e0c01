"""Work over processes: every item comes back once, whatever dies, and nothing is read far ahead."""

import os
import time

import pytest

from hilum.archive.workers import IN_FLIGHT, Crashed, run


def square(number: int) -> int:
    return number * number


def die_at_13(number: int) -> int:
    if number == 13:
        os.abort()
    return number


def wait_a_little(number: int) -> int:
    time.sleep(0.05)
    return os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_result_does_not_depend_on_the_number_of_workers(num_workers):
    assert dict(run(square, range(50), num_workers)) == {n: n * n for n in range(50)}


def test_an_item_that_kills_its_process_costs_itself_only():
    results = list(run(die_at_13, range(40), 2))
    assert sorted(item for item, _ in results) == list(range(40))
    assert [item for item, result in results if isinstance(result, Crashed)] == [13]
    assert all(item == result for item, result in results if item != 13)


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for n in range(1000):
            taken.append(n)
            yield n

    results = run(square, items(), 2)
    for _ in range(10):
        next(results)
    results.close()
    assert len(taken) <= 10 + 2 * 2 * IN_FLIGHT


def test_several_workers_share_the_work():
    assert len({pid for _, pid in run(wait_a_little, range(20), 2)}) == 2
