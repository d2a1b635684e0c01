"""Student and teacher: a batch in, named losses out.

Two objectives share the views, the student and the momentum teacher that is exported: DINO + iBOT against the teacher
(DINOv2, Curia-2), and LeJEPA, where the student's views predict one another and no teacher is asked.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hilum.encode.vit import Tokens, ViT
from hilum.pretrain import ranks
from hilum.pretrain.loader import Batch
from hilum.pretrain.losses import centred_softmax, dino_loss, ibot_loss, invariance, koleo, sigreg, sinkhorn_knopp
from hilum.pretrain.recipe import Objective, Recipe


@dataclass(frozen=True)
class StepResult:
    """What one forward pass yields.

    loss      the sum that is minimised
    parts     its terms and other numbers to log, before weighting
    features  (G·B, D) class tokens of the student's global crops, detached, for health
    """

    loss: Tensor
    parts: dict[str, Tensor]
    features: Tensor


def step_generator(seed: int, step: int, purpose: int) -> torch.Generator:
    """A CPU generator that depends on the step only, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 8 + purpose)


class PrototypeHead(nn.Module):
    """Three linear layers, unit length, then cosine with K prototypes (DINO).

    The prototypes are kept at unit length: DINO's norm_last_layer, which DINOv2's trained weight norm approximates.
    """

    def __init__(self, width: int, objective: Objective) -> None:
        super().__init__()
        self.mlp = make_mlp(width, objective.hidden, objective.bottleneck, objective.batch_norm)
        self.prototypes = nn.Parameter(torch.empty(objective.prototypes, objective.bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, D) → logits (…, K) and the bottleneck (…, d) before it is normalised."""
        bottleneck = self.mlp(x)
        unit = functional.normalize(bottleneck.float(), dim=-1, eps=1e-6)
        logits = functional.linear(unit, functional.normalize(self.prototypes, dim=-1))
        return logits, bottleneck


def make_mlp(width: int, hidden: int, out: int, batch_norm: bool) -> nn.Sequential:
    """Linear-GELU-Linear-GELU-Linear; with BatchNorm it keeps torch's initialisation, else DINOv2's (.02)."""
    layers: list[nn.Module] = []
    for a, b in ((width, hidden), (hidden, hidden)):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if batch_norm else []), nn.GELU()]
    layers.append(nn.Linear(hidden, out))
    if not batch_norm:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Learner(nn.Module):
    """Everything that trains: `student` (backbone and heads) and its momentum copy `teacher`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = self._make_side()
        self.teacher = self._make_side().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        if recipe.objective.kind == "dino":
            k = recipe.objective.prototypes
            self.register_buffer("dino_center", torch.zeros(k))
            self.register_buffer("ibot_center", torch.zeros(k))

    def _make_side(self) -> nn.ModuleDict:
        backbone, objective = ViT(self.recipe.model), self.recipe.objective
        if objective.kind == "dino":
            heads = {name: PrototypeHead(backbone.width, objective) for name in ("dino_head", "ibot_head")}
            return nn.ModuleDict({"backbone": backbone, **heads})
        side = nn.ModuleDict({"backbone": backbone})
        side["projector"] = make_mlp(backbone.width, objective.hidden, objective.projector_dim, True)
        if objective.patch_weight:
            side["patch_projector"] = make_mlp(backbone.width, objective.hidden, objective.projector_dim, True)
        return side

    def teacher_backbone(self) -> ViT:
        backbone = self.teacher["backbone"]
        assert isinstance(backbone, ViT)
        return backbone

    def forward(self, batch: Batch, step: int) -> StepResult:
        """One step's losses. `step` seeds the drop path and SigReg's directions."""
        if self.recipe.objective.kind == "dino":
            return self._distil(batch, step)
        return self._join_views(batch, step)

    def _encode(self, side: nn.ModuleDict, batch: Batch, step: int, masks: Tensor | None) -> list[Tokens]:
        backbone = side["backbone"]
        assert isinstance(backbone, ViT)
        local = [] if batch.locals is None else [batch.locals]
        generator = step_generator(self.recipe.run.seed, step, 0)
        return backbone.encode_crops([batch.globals, *local], [masks, *[None] * len(local)], generator)

    def _distil(self, batch: Batch, step: int) -> StepResult:
        """DINO on class tokens, iBOT on hidden patches, a regulariser on the student's global class tokens."""
        objective, num_slices = self.recipe.objective, batch.num_slices
        num_global = self.recipe.views.num_global
        tokens = self._encode(self.student, batch, step, batch.masks)
        logits, bottleneck = self.student["dino_head"](torch.cat([t.cls for t in tokens]))
        hidden_logits, _ = self.student["ibot_head"](tokens[0].patches[batch.masks])
        with torch.no_grad():
            self.teacher["backbone"].eval()
            seen = self.teacher_backbone()(batch.globals)
            teacher_logits, _ = self.teacher["dino_head"](seen.cls)
            teacher_hidden, _ = self.teacher["ibot_head"](seen.patches[batch.masks])
            temperature = self.teacher_temperature(step)
            targets = self._targets(teacher_logits, temperature, "dino_center")
            hidden_targets = self._targets(teacher_hidden, temperature, "ibot_center")
        k = objective.prototypes
        parts = {
            "dino": dino_loss(
                logits.view(-1, num_slices, k), targets.view(num_global, num_slices, k), objective.student_temperature
            ),
            "ibot": ibot_loss(hidden_logits, hidden_targets, batch.masks, objective.student_temperature),
        }
        loss = objective.dino_weight * parts["dino"] + objective.ibot_weight * parts["ibot"]
        on = tokens[0].cls if objective.regulariser_on == "class_token" else bottleneck[: num_global * num_slices]
        loss = loss + self._regularise(on.view(num_global, num_slices, -1), step, parts)
        with torch.no_grad():
            parts["teacher_entropy"] = -(targets * targets.clamp_min(1e-12).log()).sum(-1).mean()
            mean_target = targets.mean(0)
            parts["prototypes_used"] = torch.exp(-(mean_target * mean_target.clamp_min(1e-12).log()).sum())
        return StepResult(loss, parts, tokens[0].cls.detach().float())

    def _join_views(self, batch: Batch, step: int) -> StepResult:
        """LeJEPA: all views near the mean of the global ones, each global view's projections standard normal.

        Masked global crops are views like others, so the guided masks make the task harder where the anatomy is.
        """
        objective, num_slices = self.recipe.objective, batch.num_slices
        num_global = self.recipe.views.num_global
        tokens = self._encode(self.student, batch, step, batch.masks)
        projected = self.student["projector"](torch.cat([t.cls for t in tokens])).view(
            -1, num_slices, objective.projector_dim
        )
        parts = {"invariance": invariance(projected, num_global)}
        weight = objective.regulariser_weight if objective.regulariser != "none" else 0.0
        loss = (1 - weight) * parts["invariance"] + self._regularise(projected, step, parts)
        if objective.patch_weight:
            loss = loss + objective.patch_weight * self._join_places(batch, tokens[0], step, parts)
        return StepResult(loss, parts, tokens[0].cls.detach().float())

    def _join_places(self, batch: Batch, tokens: Tokens, step: int, parts: dict[str, Tensor]) -> Tensor:
        """LeJEPA on patches: one place of the body, seen by several global crops, projects to one vector.

        The crops differ in position, scale, intensity and mask, so a patch token has to say what lies there, not where in
        the crop, and a hidden patch has to guess it from its surroundings (the part that iBOT plays beside DINO).
        """
        objective, px = self.recipe.objective, self.recipe.views.global_px
        num_global, num_slices, num_points, _ = batch.points.shape
        shared = batch.points.isfinite().flatten(2).all(2).all(0)  # slices whose crops overlap
        if not bool(shared.any()):
            return tokens.patches.new_zeros(())
        rows, columns = (px // side for side in self.recipe.model.patch)
        maps = tokens.patches.transpose(1, 2).reshape(num_global * num_slices, -1, rows, columns).float()
        at = 2 * batch.points.nan_to_num(0.5).flatten(0, 1)[:, None].flip(-1) - 1  # grid_sample wants (x, y) in [-1, 1]
        places = functional.grid_sample(maps, at, mode="bilinear", padding_mode="border", align_corners=False)
        places = places[:, :, 0].transpose(1, 2).reshape(num_global, num_slices, num_points, -1)[:, shared]
        projected = self.student["patch_projector"](places.flatten(0, 2)).view(num_global, -1, objective.projector_dim)
        parts["patch_invariance"] = invariance(projected, num_global)
        generator = step_generator(self.recipe.run.seed, step, 2)
        values = [sigreg(view, objective.sigreg_slices, generator) for view in projected]
        parts["patch_sigreg"] = torch.stack(values).mean()
        weight = objective.regulariser_weight
        return (1 - weight) * parts["patch_invariance"] + weight * parts["patch_sigreg"]

    def _regularise(self, samples_VBD: Tensor, step: int, parts: dict[str, Tensor]) -> Tensor:
        """The chosen regulariser, one value a view: KoLeo summed over views as DINOv2, SigReg averaged as LeJEPA."""
        objective = self.recipe.objective
        if objective.regulariser == "none":
            return samples_VBD.new_zeros(())
        if objective.regulariser == "koleo":
            parts["koleo"] = torch.stack([koleo(view) for view in samples_VBD]).sum()
            return objective.regulariser_weight * parts["koleo"]
        generator = step_generator(self.recipe.run.seed, step, 1)
        values = [sigreg(view, objective.sigreg_slices, generator) for view in samples_VBD]
        parts["sigreg"] = torch.stack(values).mean()
        return objective.regulariser_weight * parts["sigreg"]

    def _targets(self, logits: Tensor, temperature: float, center_name: str) -> Tensor:
        if self.recipe.objective.centring == "sinkhorn":
            return sinkhorn_knopp(logits, temperature)
        center: Any = getattr(self, center_name)
        targets = centred_softmax(logits, center, temperature)
        mean = logits.float().mean(0)
        center.lerp_(torch.where(mean.isfinite(), mean, center), 0.1)  # a bad batch must not outlive its skipped step
        return targets

    def teacher_temperature(self, step: int) -> float:
        start, end = self.recipe.objective.teacher_temperature
        warmup = self.recipe.objective.teacher_warmup * self.recipe.run.steps
        return start + (end - start) * min(step / warmup, 1.0) if warmup else end

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher ← m·teacher + (1 − m)·student, after the optimiser's step, with the updated student (DINO)."""
        torch._foreach_lerp_(
            ranks.local(self.teacher.parameters()), ranks.local(self.student.parameters()), 1 - momentum
        )
