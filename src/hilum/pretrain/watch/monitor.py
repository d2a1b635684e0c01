"""Watches a run: numbers for its log, a verdict, and pictures of the same few slices as training goes on.

Every probe_every steps the teacher encodes the same slices: the first of the sampler, whole, without augmentation. So rank and
spread compare over time and machines at one N, nothing has to be carried in checkpoints, and one pass serves rank, k-NN
and pictures. 256 slices cost the teacher about as much as 20 slices cost a step (ViT-B, 2 × 256 + 8 × 96 px).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.encode.contract import Contract, normalise_slice, resize
from hilum.encode.vit import Tokens, ViT
from hilum.pretrain.cost import flops_per_image
from hilum.pretrain.distill import Learner
from hilum.pretrain.loader import Drawn, Slices
from hilum.pretrain.ranks import num_ranks, rank
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch.diagnose import Diagnosis, History, diagnose
from hilum.pretrain.watch.health import measure_peak, probe_health, update_ratio
from hilum.pretrain.watch.online import Labelled, probe_scores
from hilum.records import write_atomic

NUM_PROBE = 256
NUM_STUDENT = 32  # of them, also seen by the student
NUM_PICTURES = 6
NUM_SAMPLES = 4
CHUNK = 32


class Monitor:
    """Call `observe` after each step and before its line is written, on every rank; then `verdict`."""

    def __init__(
        self, recipe: Recipe, learner: Learner, optimiser: torch.optim.AdamW, slices: Slices, out: Path,
        device: torch.device, labelled: Labelled | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.learner, self.optimiser, self.slices, self.out = recipe, learner, optimiser, slices, out
        self.device, self.labelled = device, labelled
        self.history = History()
        self.images: Tensor | None = None  # of the probe slices, read when first needed
        self.grids: list[NDArray[np.float32]] = []  # where the anatomy lies in those that are pictured
        blocks: Any = _backbone(learner, "student").blocks
        self.watched: torch.nn.Parameter = blocks[len(blocks) // 2].attn.qkv.weight

    def restore(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up the lines that the run has written before."""
        for line in lines:
            self.history.add(line)

    def observe(self, step: int, line: Mapping[str, Any], seconds: float, data_seconds: float) -> dict[str, float]:
        """Numbers to add to the line of a step.

        line          what is known already; "skipped" when the step changed no weight
        seconds, data_seconds   time of the step without data, and time spent waiting for its batch
        """
        run, extra = self.recipe.run, self._clock(seconds, data_seconds)
        if step % run.health_every == 0 and "skipped" not in line:
            ratio = update_ratio(self.optimiser, self.watched)
            extra |= {} if ratio is None else {"update_ratio": ratio}
        if step % run.probe_every == 0 or step == run.steps - 1:
            extra |= self._probe(step)
        self.history.add({**line, **extra})
        return extra

    def looks(self, step: int) -> bool:
        """Whether this step has a verdict: where health is measured, and after skipped ones."""
        return step % self.recipe.run.health_every == 0 or bool(self.history.within("skipped", 1))

    def verdict(self) -> list[Diagnosis]:
        """What is wrong now, at steps that are looked at; [] when all is well."""
        return diagnose(self.history, self.recipe) if self.looks(self.history.step) else []

    def _clock(self, seconds: float, data_seconds: float) -> dict[str, float]:
        whole = max(seconds + data_seconds, 1e-9)
        rate = self.recipe.run.batch_size / whole
        peak = measure_peak(str(self.device), self.recipe.run.precision) * num_ranks()
        return {
            "data_wait": round(data_seconds / whole, 4),
            "images_per_second": round(rate, 2),
            "utilisation": round(rate * flops_per_image(self.recipe).total / peak, 4),
        }

    @torch.no_grad()
    def _probe(self, step: int) -> dict[str, float]:
        """Encode the probe slices. Every rank does, since weights may be sharded; they would wait for this one anyway."""
        if self.images is None:
            self.images = self._read_probe()
        teacher = self._encode("teacher", self.images)
        student = self._encode("student", self.images[:NUM_STUDENT])
        found = probe_health(teacher, student.cls)
        if self.labelled is not None:
            found |= probe_scores(self._encode("teacher", self.labelled.images).cls.numpy(), self.labelled)
        number = step // self.recipe.run.probe_every
        if rank() == 0 and (number & (number - 1) == 0 or step == self.recipe.run.steps - 1):
            self._write_snapshot(step, teacher)
        return found

    def _read_probe(self) -> Tensor:
        side = (self.recipe.views.global_px,) * 2
        if rank() == 0:
            write_samples(self.out / "snapshots" / "samples.npz", self.slices)
        drawn = [self.slices.draw(sample) for sample in range(min(NUM_PROBE, self.slices.num_slices))]
        self.grids = [self.slices.store.read_slice(d.key, d.z)[1].grid for d in drawn[:NUM_PICTURES]]
        contract = self.slices.contract
        return torch.stack([resize(whole_slice(d, contract)[None], side, contract.resampling)[0] for d in drawn]).half()

    def _encode(self, side: str, images: Tensor) -> Tokens:
        model = _backbone(self.learner, side)
        training = model.training
        model.eval()
        bf16 = self.recipe.run.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            chunks = [images[n : n + CHUNK] for n in range(0, len(images), CHUNK)]
            parts = [model(chunk.to(self.device).float()) for chunk in chunks]
        model.train(training)
        return Tokens(*(torch.cat([p[n].float().cpu() for p in parts]) for n in range(3)))

    def _write_snapshot(self, step: int, tokens: Tokens) -> None:
        assert self.images is not None
        count = len(self.grids)
        grid = tuple(self.recipe.views.global_px // side for side in self.recipe.model.patch)
        shares = torch.from_numpy(np.stack(self.grids))[:, None]
        with (
            write_atomic(self.out / "snapshots" / f"step-{step:08d}.npz") as temporary,
            open(temporary, "wb") as handle,
        ):
            np.savez_compressed(
                handle,
                images=self.images[:count, 0].numpy(),
                foreground=resize(shares, (grid[0], grid[1]), "bilinear")[:, 0].numpy() > 0.5,
                tokens=tokens.patches[:count].half().numpy().reshape(count, *grid, -1),
            )


def _backbone(learner: Learner, side: str) -> ViT:
    model = getattr(learner, side)["backbone"]
    assert isinstance(model, ViT)
    return model


def whole_slice(drawn: Drawn, contract: Contract) -> Tensor:
    """The slice of a sample as an encoder is given it, (1, Y, X), at its own size."""
    source = drawn.source
    pixels = source.stored.astype(np.float32) * np.float32(source.slope) + np.float32(source.intercept)
    return normalise_slice(pixels, source.unit, contract)


@dataclass(frozen=True)
class Sample:
    """A training sample as the model saw it: the whole slice, its crops in float16, what was drawn of each."""

    pixels: np.ndarray[Any, Any]
    crops: list[np.ndarray[Any, Any]]
    views: list[dict[str, Any]] = field(default_factory=list)


def write_samples(path: Path, slices: Slices) -> None:
    """Keep the first training samples for the page of the run: the slice, its crops, boxes and masks."""
    arrays: dict[str, Any] = {}
    for number in range(NUM_SAMPLES):
        drawn = slices.draw(number)
        arrays[f"{number}.pixels"] = whole_slice(drawn, slices.contract)[0].half().numpy()
        for n, (view, crop) in enumerate(zip(drawn.views, slices.render_alone(drawn))):
            about = {
                "box": view.box,
                "foreground": view.foreground,
                "rejected": view.rejected,
                "mask": None if view.mask is None else view.mask.astype(int).tolist(),
            }
            arrays[f"{number}.crop{n:02d}"] = crop.astype(np.float16)
            arrays[f"{number}.view{n:02d}"] = np.array(json.dumps(about))
    with write_atomic(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **arrays)


def read_samples(path: Path) -> list[Sample]:
    with np.load(path, allow_pickle=False) as found:
        names = sorted(found.files)
        return [
            Sample(
                found[f"{n}.pixels"],
                [found[name] for name in names if name.startswith(f"{n}.crop")],
                [json.loads(str(found[name])) for name in names if name.startswith(f"{n}.view")],
            )
            for n in range(len([name for name in names if name.endswith(".pixels")]))
        ]
