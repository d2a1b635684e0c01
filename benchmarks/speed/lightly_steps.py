"""A few steps of LightlyTrain's dinov2 method, timed; run by `lightly_peer.py` with an interpreter that has lightly-train.

    PYTHON lightly_steps.py '{"data": FOLDER, "out": FOLDER, "steps": 6, "batch_size": 16, ...}'

The last line on stdout is JSON: the moments at which steps ended (s), the tool's own step timer (s), versions.
"""

import importlib.metadata
import json
import sys
import time
from typing import Any

import torch

if (
    "+cpu" in torch.__version__
):  # torchvision's wheels are built for CUDA: their operators do not load beside a CPU torch,
    operators = torch.library.Library("torchvision", "DEF")  # and are not used here, but looked for at import
    for signature in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor",
    ):
        operators.define(signature)

import lightly_train
from pytorch_lightning import Callback, Trainer


class Clock(Callback):  # type: ignore[misc]
    """Moments at which steps ended, and what the tool's own timers said then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.own: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        timers = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("profiling/")}
        self.own.append({n.removeprefix("profiling/"): round(v, 3) for n, v in timers.items()})


def add_to_every_trainer(clock: Clock) -> None:
    """`lightly_train.pretrain` makes the trainer itself and takes no callback objects."""
    make = Trainer.__init__

    def make_with_clock(self: Trainer, *given: Any, **named: Any) -> None:
        make(self, *given, **named)
        self.callbacks.append(clock)

    Trainer.__init__ = make_with_clock


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    clock = Clock()
    add_to_every_trainer(clock)
    lightly_train.pretrain(
        out=asked["out"],
        data=asked["data"],
        model=asked["model"],
        method="dinov2",
        epochs=1,  # the folder holds as many images as the steps need
        batch_size=asked["batch_size"],
        num_workers=asked["num_workers"],
        accelerator=asked["accelerator"],
        devices=1,
        precision="bf16-mixed",
        trainer_args={"log_every_n_steps": 1},
        loggers={"tensorboard": None},
    )
    names = ("lightly-train", "torch", "torchvision", "pytorch-lightning")
    found = {"ends": clock.ends, "own": clock.own, "versions": {n: importlib.metadata.version(n) for n in names}}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
