"""Run one function over many items in processes; a process that dies costs only the item it worked on.

The result does not depend on the number of workers, only the order in which results arrive does.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 3  # items per worker that are read ahead: enough to keep them busy, few enough to stay in memory


class Crashed:
    """Stands for the result of an item on which the worker process died."""


def default_num_workers() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[tuple[Item, Result | Crashed], None, None]:
    """Yield (item, result) as they are done, or (item, Crashed()) when the process died on it.

    function     importable, its exceptions are raised here
    num_workers  1 runs in this process, where a crash cannot be contained

    Closing the generator stops the workers after the items they are at.
    """
    items = iter(items)
    if num_workers <= 1:
        for item in items:
            yield item, function(item)
        return
    while batch := (yield from _until_crash(function, items, num_workers)):
        # One of these items killed its process, and with it the pool. Alone, each shows whether it was the one.
        for item in batch:
            with _pool(1) as pool:
                try:
                    yield item, pool.submit(function, item).result()
                except BrokenProcessPool:
                    yield item, Crashed()


def _until_crash(
    function: Callable[[Item], Result], items: Iterator[Item], num_workers: int
) -> Generator[tuple[Item, Result | Crashed], None, list[Item]]:
    """Work through `items`; returns (not yields) those in flight when the pool broke, [] when all are done."""
    pool = _pool(num_workers)
    pending: dict[Future[Result], Item] = {}
    lost: list[Item] = []
    try:
        while True:
            for item in islice(items, num_workers * IN_FLIGHT - len(pending)):
                try:
                    pending[pool.submit(function, item)] = item
                except BrokenProcessPool:
                    return [item, *pending.values()]
            if not pending:
                return []
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                item = pending.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    lost.append(item)
                    continue
                yield item, result
            if lost:
                return lost + list(pending.values())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes that start clean (spawn), leave Ctrl-C to the parent, and end when it is killed."""
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
