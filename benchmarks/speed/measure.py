"""What the speed scripts share: repeat, take turns, print one JSON line per measurement."""

import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

from hilum.records import machine, versions


def rate(work: Callable[[], object], count: float) -> float:
    """`count` things per second."""
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def take_turns(steps: dict[str, tuple[Callable[[], object], float]], repeats: int) -> dict[str, list[float]]:
    """Rates of several pieces of work; each round runs all of them, so that a noisy machine is noisy for all."""
    results: dict[str, list[float]] = {}
    for _ in range(repeats):
        for what, (work, count) in steps.items():
            results.setdefault(what, []).append(rate(work, count))
    return results


def print_lines(results: dict[str, list[float]], **facts: Any) -> None:
    """One line per measurement, with the peak memory of this process as the last one."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts |= {"commit": git.stdout.strip(), "date": time.strftime("%Y-%m-%d")}
    results["peak memory MiB"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
    for what, values in results.items():
        numbers = {"min": min(values), "median": statistics.median(values), "max": max(values)}
        line = {"what": what, "repeats": len(values)} | {name: round(v, 2) for name, v in numbers.items()}
        print(json.dumps(line | facts | {"machine": machine(), "versions": versions()}))
