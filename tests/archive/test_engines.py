"""The same work on a Ray cluster: same bytes, and a worker that dies loses nothing. Skipped where Ray is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hilum.archive.prepare import prepare
from hilum.archive.workers import run
from hilum.errors import UsageError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

# The first scan that a worker stores kills it; so does the first batch of headers.
PREPARE = """
import os, signal, sys
from hilum.archive import prepare as module, scan
from hilum.archive.privacy import Key
original, look, marks = module._store_scan, scan._look_at_batch, sys.argv[3]

def die_once(name):
    try:
        os.close(os.open(f"{marks}-{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

def store_or_die(entry, **kwargs):
    die_once("store")
    return original(entry, **kwargs)

def look_or_die(names, **kwargs):
    die_once("look")
    return look(names, **kwargs)

module._store_scan, scan._look_at_batch, scan.MANY_FILES = store_or_die, look_or_die, 1
print(module.prepare(sys.argv[1], sys.argv[2], key=Key(bytes(range(32))), num_workers=2, engine="ray"))
"""

RUN = """
import json
from hilum.archive.workers import Crashed, run
items = ["1 + 1", "__import__('os').abort()", *[f"{n} * 1" for n in range(10)]]
results = {i: "crashed" if isinstance(r, Crashed) else r for i, r in run(eval, items, 2, "ray")}
refusal = "exec('from hilum.errors import ScanRefused as R; raise R(*[str(5), str(3)])')"
try:
    list(run(eval, [refusal], 2, "ray"))
except Exception as error:
    results["error"] = [type(error).__name__, error.reason, error.detail]
stopped = run(eval, ["2 + 2", *["[__import__('time').sleep(0.01) for _ in range(9000)]"] * 4], 2, "ray")
results["first"] = next(stopped)[1]
stopped.close()
print("\\n" + json.dumps(results))
"""


def run_alone(code: str, *arguments: object) -> str:
    """In a process of its own, which starts a small cluster and takes it down when it ends."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_ray
@pytest.mark.nightly
def test_a_store_made_on_ray_while_workers_die(tmp_path, key, write_series_to, voxels):
    archive = tmp_path / "archive"
    write_series_to(archive, voxels, series="1", folder="ct")
    rng = np.random.default_rng(0)
    for n in range(150):
        Image.fromarray(rng.integers(0, 255, (16, 16)).astype(np.uint8)).save(archive / f"{n}.png")
    prepare(archive, tmp_path / "local", key=key, num_workers=1)
    run_alone(PREPARE, archive, tmp_path / "ray", tmp_path / "died")
    assert sorted(p.name for p in tmp_path.glob("died-*")) == ["died-look", "died-store"]
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def content(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in store.rglob("*") if p.is_file()}


@needs_ray
@pytest.mark.nightly
def test_an_item_that_kills_its_ray_worker_every_time_costs_itself_only():
    printed = run_alone(RUN).splitlines()
    results = json.loads(next(line for line in printed if line.startswith("{")))  # Ray prints of the deaths
    assert results.pop("__import__('os').abort()") == "crashed"
    assert results.pop("error") == ["ScanRefused", "5", "3"]
    assert results.pop("first") == 4
    assert results == {"1 + 1": 2, **{f"{n} * 1": n for n in range(10)}}


def test_an_unknown_engine_is_refused():
    with pytest.raises(UsageError, match="engine 'spark' is unknown; expected local or ray"):
        run(str, [1], 1, "spark")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install():
    with pytest.raises(UsageError, match=r"pip install 'hilum\[cluster\]'"):
        list(run(str, [1], 2, "ray"))
