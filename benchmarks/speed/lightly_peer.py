"""How fast LightlyTrain's dinov2 method is on this machine: the peer of `pretrain_step.py`.

    python benchmarks/speed/lightly_peer.py --python PYTHON [--steps 6] [--batch 16] [--num-workers 1]

PYTHON is an interpreter with lightly-train of its own (nothing of it belongs to this project). On a CPU: `pip install torch`,
`pip install torchvision --no-deps`, `pip install lightly-train`. Without --model it is ViT-S/14 with four registers, 2 crops
of 224 px and 8 of 98 px: as many tokens as ViT-S/16 has at 256 and 112 px. Images are 512×512 PNG, loading them included.
Time is taken between the ends of steps, so start-up and the first step do not count. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hilum.records import machine

WORKER = Path(__file__).with_name("lightly_steps.py")


def write_images(folder: Path, count: int, side: int = 512) -> None:
    """Smooth blobs with noise as 8-bit grey PNG, about as hard to decode as a slice."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 200, (12, 12), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + rng.integers(0, 20, (side, side))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.png")


def run_peer(python: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What the peer's process found: see `lightly_steps.py`. RuntimeError with its last words when it failed."""
    environment = os.environ | {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "OMP_NUM_THREADS": str(asked["threads"])}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, str(WORKER), json.dumps(asked)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{python} {WORKER.name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Images/s: median, slowest and fastest of the steps after the first, by wall clock and by the tool's own timer."""
    with tempfile.TemporaryDirectory() as temporary:
        write_images(Path(temporary) / "images", given.steps * given.batch)
        asked = {"data": f"{temporary}/images", "out": f"{temporary}/out", "batch_size": given.batch}
        asked |= {name: getattr(given, name) for name in ("model", "num_workers", "accelerator", "threads")}
        found = run_peer(given.python, asked)
    seconds = np.diff(found["ends"]).tolist()
    if len(seconds) < 2:
        raise RuntimeError(f"expected at least 3 steps, found {len(found['ends'])}; raise --steps")
    timers = found["own"][2:]  # read at the end of a step, they tell of the step before
    own = [timer["batch_time"] for timer in timers if "batch_time" in timer]
    waits = [timer["data_time"] for timer in timers if "data_time" in timer]
    line: dict[str, Any] = {"what": "LightlyTrain dinov2, images/s", "repeats": len(seconds)}
    line |= {
        n: round(given.batch / f(seconds), 3) for n, f in (("min", max), ("median", statistics.median), ("max", min))
    }
    line["seconds_a_step"] = [round(s, 2) for s in seconds]
    if own:
        line |= {"own_timer_seconds": statistics.median(own), "own_timer_data_seconds": statistics.median(waits)}
    return line | {"versions": found["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--model", default="dinov2/vits14-notpretrained")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    facts = {name: getattr(given, name) for name in ("model", "num_workers", "accelerator", "threads")}
    print(json.dumps(measure(given) | facts | {"batch_size": given.batch, "machine": machine()}))


if __name__ == "__main__":
    main()
