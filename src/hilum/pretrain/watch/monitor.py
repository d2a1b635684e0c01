"""Watches a run: numbers for its log, a verdict, and pictures of the same few slices as training goes on.

Every probe_every steps the teacher encodes the same slices or volumes (`samples.py`): the first of the sampler, whole, without
augmentation. So rank and spread compare over time and machines at one N, nothing has to be carried in checkpoints, and one
pass serves rank, k-NN and pictures. 256 slices cost the teacher about as much as 20 slices cost a step (ViT-B, 2 × 256 +
8 × 96 px).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hilum.encode.vit import Tokens, ViT
from hilum.pretrain.cost import flops_per_image
from hilum.pretrain.distill import Learner
from hilum.pretrain.loader import Slices
from hilum.pretrain.ranks import num_ranks, rank
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.volume_loader import Crops
from hilum.pretrain.watch.diagnose import Diagnosis, History, diagnose
from hilum.pretrain.watch.health import measure_peak, probe_health, update_ratio
from hilum.pretrain.watch.online import Labelled, probe_scores
from hilum.pretrain.watch.samples import ProbeItems, plane_of_voxels, read_probe, write_samples
from hilum.records import write_atomic

NUM_STUDENT = 32  # of the probe items, also seen by the student
NUM_PICTURES = 6
CHUNK = 32


class Monitor:
    """Call `observe` after each step and before its line is written, on every rank; then `verdict`."""

    def __init__(
        self, recipe: Recipe, learner: Learner, optimiser: torch.optim.AdamW, samples: Slices | Crops, out: Path,
        device: torch.device, labelled: Labelled | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.learner, self.optimiser, self.samples, self.out = recipe, learner, optimiser, samples, out
        self.device, self.labelled = device, labelled
        self.history = History()
        self.items: ProbeItems | None = None  # read when first needed
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
        if self.items is None:
            self.items = read_probe(self.samples, NUM_PICTURES)
            if rank() == 0:
                write_samples(self.out / "snapshots" / "samples.npz", self.samples)
        teacher = self._encode("teacher", self.items.images)
        student = self._encode("student", self.items.images[:NUM_STUDENT])
        found = probe_health(teacher, student.cls)
        if self.labelled is not None:
            found |= probe_scores(self._encode("teacher", self.labelled.images).cls.numpy(), self.labelled)
        number = step // self.recipe.run.probe_every
        if rank() == 0 and (number & (number - 1) == 0 or step == self.recipe.run.steps - 1):
            self._write_snapshot(step, teacher)
        return found

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
        assert self.items is not None
        count, patch = len(self.items.foreground), self.recipe.model.patch
        images = self.items.images[:count, 0].numpy()
        grid = [side // p for side, p in zip(images.shape[1:], patch)]
        maps = tokens.patches[:count].half().numpy().reshape(count, *grid, -1)
        if self.recipe.is_3d:
            images, maps = plane_of_voxels(images, patch[0]), maps[:, grid[0] // 2]
        with (
            write_atomic(self.out / "snapshots" / f"step-{step:08d}.npz") as temporary,
            open(temporary, "wb") as handle,
        ):
            np.savez_compressed(handle, images=images, foreground=self.items.foreground, tokens=maps)


def _backbone(learner: Learner, side: str) -> ViT:
    model = getattr(learner, side)["backbone"]
    assert isinstance(model, ViT)
    return model
