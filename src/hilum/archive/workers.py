"""Run one function over many items in processes; a process that dies costs only the item it worked on.

The result does not depend on the number of workers nor on the engine, only the order in which results arrive does.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import forkserver
from typing import Any, TypeVar

from hilum.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 3  # items per worker that are read ahead: enough to keep them busy, few enough to stay in memory
RETRIES = 3  # of an item whose Ray worker dies under it, before it is tried alone


class Crashed:
    """Stands for the result of an item on which the worker process died."""


def default_num_workers() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int | None,
    engine: str = "local",
    in_flight: int = IN_FLIGHT,
) -> Generator[tuple[Item, Result | Crashed], None, None]:
    """Yield (item, result) as they are done, or (item, Crashed()) when the process died on it.

    function     importable, its exceptions are raised here
    num_workers  None: one per core (of the cluster). 1 on the engine "local" runs in this process, where a crash
                 cannot be contained
    engine       one of ENGINES: "local", processes of this machine; "ray", the cluster at $RAY_ADDRESS, else the one
                 that this machine belongs to, else one of its own
    in_flight    items per worker that are read ahead

    Closing the generator stops the workers after the items they are at, or within them on Ray.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine '{engine}' is unknown; expected {' or '.join(ENGINES)}")
    return ENGINES[engine](function, iter(items), num_workers, in_flight)


def _run_local(
    function: Callable[[Item], Result], items: Iterator[Item], num_workers: int | None, in_flight: int
) -> Generator[tuple[Item, Result | Crashed], None, None]:
    num_workers = num_workers or default_num_workers()
    if num_workers <= 1:
        for item in items:
            yield item, function(item)
        return
    while batch := (yield from _until_crash(function, items, num_workers, in_flight)):
        # One of these items killed its process, and with it the pool. Alone, each shows whether it was the one.
        for item in batch:
            with _pool(1) as pool:
                try:
                    yield item, pool.submit(function, item).result()
                except BrokenProcessPool:
                    yield item, Crashed()


def _until_crash(
    function: Callable[[Item], Result], items: Iterator[Item], num_workers: int, in_flight: int
) -> Generator[tuple[Item, Result | Crashed], None, list[Item]]:
    """Work through `items`; returns (not yields) those in flight when the pool broke, [] when all are done."""
    pool = _pool(num_workers)
    pending: dict[Future[Result], Item] = {}
    lost: list[Item] = []
    try:
        while True:
            for item in islice(items, num_workers * in_flight - len(pending)):
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
    """Processes that start clean, leave Ctrl-C to the parent, and end when it is killed.

    They are forked from one server that has only imported what they need: importing takes a core second, forking none.
    """
    start_server()
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("forkserver"), initializer=_start_worker)


def start_server() -> None:
    """Start what workers are forked from, without waiting for its imports: called early, they cost no time later."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hilum.archive.prepare"])
    forkserver.ensure_running()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_on_ray(
    function: Callable[[Item], Result], items: Iterator[Item], num_workers: int | None, in_flight: int
) -> Generator[tuple[Item, Result | Crashed], None, None]:
    """As `_run_local`, on a Ray cluster: a task that loses its worker is started again elsewhere.

    The function and its arguments travel through Ray, so does a key that they hold; files do not: all nodes must see
    the same ones.
    """
    ray = _connect(num_workers)
    cores = int(ray.cluster_resources().get("CPU", 1))
    limit = cores * in_flight if num_workers is None or num_workers >= cores else num_workers
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
    function_ref = ray.put(function)
    died = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    lost: list[Item] = []
    pending: dict[Any, Item] = {}
    try:
        while True:
            for item in islice(items, limit - len(pending)):
                pending[task.remote(function_ref, item)] = item
            if not pending:
                break
            for done in ray.wait(list(pending), num_returns=1)[0]:
                item = pending.pop(done)
                try:
                    outcome = ray.get(done)
                except died:
                    lost.append(item)
                    continue
                yield item, _result(*outcome)
        # Tasks that wait behind one that kills its worker are lost with it. Alone, each shows whether it was the one.
        for item in lost:
            pending[alone := task.options(max_retries=1).remote(function_ref, item)] = item
            try:
                outcome = ray.get(alone)
            except died:
                outcome = Crashed(), None
            del pending[alone]
            yield item, _result(*outcome)
    finally:
        for waiting in pending:
            ray.cancel(waiting)  # raises KeyboardInterrupt in those that have begun
        while pending:  # they end before this returns, so that nothing writes on behind our back
            for done in ray.wait(list(pending), num_returns=1)[0]:
                del pending[done]


def _call(function: Callable[[Item], Result], item: Item) -> tuple[Result | None, Exception | None]:
    """The result or the exception itself: Ray would hand out an exception of a class of its own."""
    try:
        return function(item), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        return None, error


def _result(result: Any, error: Exception | None) -> Any:
    if error is not None:
        raise error
    return result


def _connect(num_workers: int | None) -> Any:
    """The ray module, connected. UsageError when Ray is not installed or the given cluster does not answer."""
    try:
        import ray
    except ImportError:
        raise UsageError("the engine 'ray' needs Ray: pip install 'hilum[cluster]'") from None
    if ray.is_initialized():
        return ray
    quiet = {"logging_level": "warning", "log_to_driver": False}
    ours = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError as error:
            if os.environ.get("RAY_ADDRESS"):
                raise UsageError(f"no Ray cluster answers at RAY_ADDRESS: {error}") from None
            ray.init(
                address="local", num_cpus=num_workers, include_dashboard=False, object_store_memory=256 << 20, **quiet
            )
    finally:
        with contextlib.suppress(ValueError):  # outside the main thread nobody may, and Ray has not
            for number, handler in ours.items():  # Ray would end us on SIGTERM before the work is put away
                signal.signal(number, handler)
    return ray


ENGINES = {"local": _run_local, "ray": _run_on_ray}
