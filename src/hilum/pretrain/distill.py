"""Student and teacher: a batch in, named losses out.

Two objectives share the views, the student and the momentum teacher that is exported: DINO + iBOT against the teacher
(DINOv2, Curia-2), and LeJEPA, where the student's views predict one another and no teacher is asked. A run may begin with the
second and hand over to the first.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hilum.encode.vit import Tokens, ViT
from hilum.pretrain.heads import PrototypeHead, make_mlp
from hilum.pretrain.loader import Batch
from hilum.pretrain.losses import gram_loss, invariance, koleo, sigreg
from hilum.pretrain.prototypes import Assignments, centred_softmax, dino_loss, ibot_loss, mean_logits, sinkhorn_knopp
from hilum.pretrain.ranks import all_mean, all_sum, local, num_ranks
from hilum.pretrain.recipe import Recipe


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


class Learner(nn.Module):
    """Everything that trains: `student` (backbone and heads) and its momentum copy `teacher`; `gram`, an early teacher."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = self._make_side()
        self.teacher = self._make_side().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        if recipe.objective.gram_weight:
            self.gram = ViT(recipe.model).requires_grad_(False)
            self.gram.load_state_dict(self.student["backbone"].state_dict())
        if recipe.objective.kind == "dino":
            self.register_buffer("dino_center", torch.zeros(recipe.objective.prototypes))
            self.register_buffer("ibot_center", torch.zeros(recipe.objective.prototypes))
        self.student_backbone().recompute = recipe.run.recompute
        if recipe.run.compile:
            for block in (*self.student_backbone().blocks, *self.teacher_backbone().blocks):
                block.compile(dynamic=False)

    def _make_side(self) -> nn.ModuleDict:
        backbone, objective = ViT(self.recipe.model), self.recipe.objective
        side = nn.ModuleDict({"backbone": backbone})
        if objective.kind == "dino":
            side["dino_head"] = PrototypeHead(backbone.width, objective)
            if not objective.shared_head:
                side["ibot_head"] = PrototypeHead(backbone.width, objective)
        if objective.kind == "lejepa" or objective.handover:
            side["projector"] = make_mlp(backbone.width, objective.hidden, objective.projector_dim, True)
            if objective.patch_weight:
                side["patch_projector"] = make_mlp(backbone.width, objective.hidden, objective.projector_dim, True)
        return side

    def student_backbone(self) -> ViT:
        return cast(ViT, self.student["backbone"])

    def teacher_backbone(self) -> ViT:
        return cast(ViT, self.teacher["backbone"])

    def forward(self, batch: Batch, step: int) -> StepResult:
        """One step's losses. `step` seeds the drop path and SigReg's directions."""
        small = [] if batch.locals is None else [batch.locals]
        generator = step_generator(self.recipe.run.seed, step, 0)
        crops, masks = [batch.globals, *small], [batch.masks, *[None] * len(small)]
        tokens = self.student_backbone().encode_crops(crops, masks, generator)
        parts: dict[str, Tensor] = {}
        objective = self._distil if self.distils(step) else self._join_views
        loss = objective(batch, tokens, step, parts)
        if batch.gram is not None and self.anchors(step):
            parts["gram"] = self._anchor(batch.gram, tokens[0])
            loss = loss + self.recipe.objective.gram_weight * parts["gram"]
        features = tokens[0].cls.detach().to(torch.float32, copy=True)  # a view would keep all tokens
        return StepResult(loss, parts, features)

    def distils(self, step: int) -> bool:
        """Whether this step asks the teacher (DINO + iBOT); before the hand-over it does not."""
        return self.recipe.objective.kind == "dino" and step >= self.recipe.handover_step

    def anchors(self, step: int) -> bool:
        """Whether this step is held to the Gram matrices of an earlier teacher."""
        return bool(self.recipe.objective.gram_weight) and step >= self.recipe.gram_steps[0]

    def _distil(self, batch: Batch, tokens: list[Tokens], step: int, parts: dict[str, Tensor]) -> Tensor:
        """DINO on class tokens, iBOT on hidden patches, a regulariser on the student's global class tokens."""
        objective, num_global = self.recipe.objective, self.recipe.views.num_global
        num_slices = len(batch.globals) // num_global
        num_views = sum(len(t.cls) for t in tokens) // num_slices
        targets_GBK, hidden_targets = self._ask_teacher(batch, step)
        unit, prototypes, bottleneck = self.student["dino_head"](torch.cat([t.cls for t in tokens]))
        parts["dino"] = dino_loss(unit, prototypes, targets_GBK, num_views, objective.student_temperature)
        unit, prototypes, _ = _head(self.student, "ibot")(tokens[0].patches.flatten(0, 1)[batch.hidden])
        parts["ibot"] = ibot_loss(unit, prototypes, hidden_targets, batch.masks, objective.student_temperature)
        on = tokens[0].cls if objective.regulariser_on == "class_token" else bottleneck[: num_global * num_slices]
        with torch.no_grad():
            parts["teacher_entropy"] = -torch.xlogy(targets_GBK, targets_GBK).sum(-1).mean()
            parts["divergence"] = parts["dino"].detach() - parts["teacher_entropy"]
            mean_target = all_mean(targets_GBK.mean((0, 1)))
            parts["prototypes_used"] = torch.exp(-torch.xlogy(mean_target, mean_target).sum())
        return (
            objective.dino_weight * parts["dino"]
            + objective.ibot_weight * parts["ibot"]
            + self._regularise(on.view(num_global, num_slices, -1), step, parts)
        )

    @torch.no_grad()
    def _ask_teacher(self, batch: Batch, step: int) -> tuple[Tensor, Assignments]:
        """Targets of the unmasked global crops: (G, B, K), and those of the patches that the student does not see."""
        seen = self.teacher_backbone().eval()(batch.globals)  # its heads normalise by the batch, as the student's do
        temperature = self.teacher_temperature(step)
        cls = self._assign("dino", seen.cls, temperature).rows(slice(None))
        patches = self._assign("ibot", seen.patches.flatten(0, 1)[batch.hidden], temperature)
        return cls.view(self.recipe.views.num_global, -1, cls.shape[1]), patches

    def _assign(self, name: str, x: Tensor, temperature: float) -> Assignments:
        unit, prototypes, _ = _head(self.teacher, name)(x)
        if self.recipe.objective.centring == "sinkhorn":
            return sinkhorn_knopp(unit, prototypes, temperature)
        center = cast(Tensor, getattr(self, f"{name}_center"))
        targets = centred_softmax(unit, prototypes, center, temperature)
        mean = mean_logits(unit.float(), prototypes)
        rate = torch.where(center.any(), 0.1, 1.0)  # the first mean is taken whole
        center.lerp_(torch.where(mean.isfinite(), mean, center), rate)  # a bad batch must not outlive its skipped step
        return targets

    def _join_views(self, batch: Batch, tokens: list[Tokens], step: int, parts: dict[str, Tensor]) -> Tensor:
        """LeJEPA: all views near the mean of the global ones, each view's projections standard normal.

        Masked global crops are views like others, so the guided masks make the task harder where the anatomy is.
        """
        objective, num_global = self.recipe.objective, self.recipe.views.num_global
        projected = self.student["projector"](torch.cat([t.cls for t in tokens]))
        projected = projected.view(-1, len(batch.globals) // num_global, objective.projector_dim)
        parts["invariance"] = invariance(projected, num_global)
        weight = objective.regulariser_weight if objective.regulariser != "none" else 0.0
        loss = (1 - weight) * parts["invariance"] + self._regularise(projected, step, parts)
        if objective.patch_weight:
            loss = loss + objective.patch_weight * self._join_places(batch, tokens[0], step, parts)
        return loss

    def _join_places(self, batch: Batch, tokens: Tokens, step: int, parts: dict[str, Tensor]) -> Tensor:
        """LeJEPA on patches: one place of the body, seen by several global crops, projects to one vector.

        The crops differ in position, scale, intensity and mask, so a patch token has to say what lies there, not where in
        the crop, and a hidden patch has to guess it from its surroundings (the part that iBOT plays beside DINO).
        """
        objective = self.recipe.objective
        num_global, num_slices, num_points, _ = batch.points.shape
        shared = batch.points.isfinite().flatten(2).all(2).all(0)  # slices whose crops overlap
        num_shared = all_sum(shared.sum().to(torch.float32))
        if not bool(num_shared):
            return tokens.patches.new_zeros(())
        grid = [side // p for side, p in zip(batch.globals.shape[2:], self.recipe.model.patch)]
        maps = tokens.patches.transpose(1, 2).reshape(num_global * num_slices, -1, *grid).float()
        at = 2 * batch.points.nan_to_num(0.5).flatten(0, 1).flip(-1) - 1  # grid_sample wants (x, y[, z]) in [-1, 1]
        at = at.view(len(at), *[1] * (len(grid) - 1), num_points, len(grid))
        places = functional.grid_sample(maps, at, mode="bilinear", padding_mode="border", align_corners=False)
        places = places.flatten(2).transpose(1, 2).reshape(num_global, num_slices, num_points, -1)[:, shared]
        projected = self.student["patch_projector"](places.flatten(0, 2)).view(num_global, -1, objective.projector_dim)
        share = shared.sum() * num_ranks() / num_shared  # ranks with more shared slices count more
        parts["patch_invariance"] = (
            invariance(projected, num_global) * share if bool(shared.any()) else 0 * projected.sum()
        )
        parts["patch_sigreg"] = self._sigreg(projected, step, 2)
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
        parts["sigreg"] = self._sigreg(samples_VBD, step, 1)
        return objective.regulariser_weight * parts["sigreg"]

    def _sigreg(self, samples_VBD: Tensor, step: int, purpose: int) -> Tensor:
        """The mean over views; each view has directions of its own, which the step and the purpose decide."""
        generator = step_generator(self.recipe.run.seed, step, purpose)
        return torch.stack([sigreg(v, self.recipe.objective.sigreg_slices, generator) for v in samples_VBD]).mean()

    def _anchor(self, images: Tensor, tokens: Tokens) -> Tensor:
        """Gram anchoring: the earlier teacher sees the whole crop at its own size; its map is brought to the student's grid."""
        with torch.no_grad():
            seen = self.gram.eval()(images).patches
            theirs = [s // p for s, p in zip(images.shape[2:], self.recipe.model.patch)]
            ours = [round(side * (tokens.patches.shape[1] / seen.shape[1]) ** 0.5) for side in theirs]
            maps = seen.transpose(1, 2).reshape(len(images), -1, *theirs).float()
            maps = functional.interpolate(maps, ours, mode="bicubic", align_corners=False)
        return gram_loss(tokens.patches, maps.flatten(2).transpose(1, 2))

    def teacher_temperature(self, step: int) -> float:
        """Linear from start to end; counted from the hand-over, when the prototypes begin to learn."""
        start, end = self.recipe.objective.teacher_temperature
        begin = self.recipe.handover_step
        warmup = self.recipe.objective.teacher_warmup * (self.recipe.run.steps - begin)
        return start + (end - start) * min((step - begin) / warmup, 1.0) if warmup else end

    @torch.no_grad()
    def update_teacher(self, momentum: float, step: int) -> None:
        """teacher ← m·teacher + (1 − m)·student, after the optimiser's step, with the updated student (DINO)."""
        torch._foreach_lerp_(local(self.teacher.parameters()), local(self.student.parameters()), 1 - momentum)
        if self.recipe.objective.gram_weight and step + 1 in self.recipe.gram_steps:
            self.gram.load_state_dict(self.teacher_backbone().state_dict())


def _head(side: nn.Module, name: str) -> nn.Module:
    """The head of "dino" or "ibot"; the same where one serves both."""
    heads = cast(nn.ModuleDict, side)
    return heads[f"{name}_head"] if f"{name}_head" in heads else heads["dino_head"]
