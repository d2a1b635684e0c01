"""The step of DINO + iBOT written the plain way, on the same weights: the oracle and opponent of `pretrain_step.py`.

One forward pass per crop size, a convolution for the patches, torch's own attention, LayerScale and drop path as factors on
whole branches, whole logits in memory, Sinkhorn-Knopp in the log domain, losses term by term, and gradients by autograd.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hilum.encode.vit import ViT
from hilum.pretrain.distill import Learner
from hilum.pretrain.heads import PrototypeHead
from hilum.pretrain.loader import Batch
from hilum.pretrain.loop import clip_gradients, momentum, set_schedules
from hilum.pretrain.losses import koleo


def encode(model: ViT, images: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens (B, 1 + R + N, D) after the final norm."""
    x = model.patch_embed(images).flatten(2).transpose(1, 2)
    if mask is not None:
        x = torch.where(mask[..., None], model.mask_token, x)
    grid = tuple(s // p for s, p in zip(images.shape[2:], model.config.patch))
    assert model.pos_embed is not None
    x, cls = x + model._positions(grid), (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, model.registers.expand(len(x), -1, -1), x], 1)
    for block in model.blocks:
        b, n, width = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).view(b, n, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = x + drop(model, block.attn.proj(out) * block.ls1.gamma)
        hidden = block.mlp.fc1(block.norm2(x))
        if block.mlp.gated:
            first, second = hidden.chunk(2, -1)
            hidden = functional.silu(first) * second
        else:
            hidden = functional.gelu(hidden)
        x = x + drop(model, block.mlp.fc2(hidden) * block.ls2.gamma)
    return model.norm(x)


def drop(model: ViT, branch: Tensor) -> Tensor:
    """Stochastic depth as in timm: whole samples are set to zero after they were computed."""
    rate = model.config.drop_path if model.training else 0.0
    if not rate:
        return branch
    keep = (torch.rand(len(branch), 1, 1, device=branch.device) >= rate).to(branch.dtype)
    return branch * keep / (1 - rate)


def logits(head: PrototypeHead, x: Tensor) -> Tensor:
    bottleneck = head.mlp(x)
    unit = functional.normalize(bottleneck.float(), dim=-1, eps=1e-6)
    return functional.linear(unit, functional.normalize(head.prototypes, dim=-1)).float()


def sinkhorn(logits_MK: Tensor, temperature: float) -> Tensor:
    scores = logits_MK / temperature
    row = torch.zeros_like(scores[:, :1])
    for _ in range(3):
        column = -torch.logsumexp(scores + row, 0, keepdim=True)
        row = -torch.logsumexp(scores + column, 1, keepdim=True)
    return torch.exp(scores + row + column)


def plain_loss(learner: Learner, batch: Batch, step: int) -> Tensor:
    """The value of `learner(batch, step).loss` for DINO + iBOT + KoLeo on the class token."""
    objective, student, teacher = learner.recipe.objective, learner.student, learner.teacher
    assert (objective.centring, objective.regulariser, objective.regulariser_on) == ("sinkhorn", "koleo", "class_token")
    num_global, prefix = learner.recipe.views.num_global, learner.student_backbone().num_prefix
    seen = encode(learner.student_backbone(), batch.globals, batch.masks)
    local = encode(learner.student_backbone(), batch.locals, None)
    with torch.no_grad():
        whole = encode(learner.teacher_backbone().eval(), batch.globals, None)
        temperature = learner.teacher_temperature(step)
        targets = sinkhorn(logits(teacher["dino_head"], whole[:, 0]), temperature)
        hidden_targets = sinkhorn(logits(teacher["ibot_head"], whole[:, prefix:][batch.masks]), temperature)
    views = logits(student["dino_head"], torch.cat([seen[:, 0], local[:, 0]])).chunk(
        num_global + learner.recipe.views.num_local
    )
    terms = [
        -(target * torch.log_softmax(view / objective.student_temperature, -1)).sum(-1).mean()
        for g, target in enumerate(targets.chunk(num_global))
        for v, view in enumerate(views)
        if v != g
    ]
    hidden = logits(student["ibot_head"], seen[:, prefix:][batch.masks])
    per_patch = -(hidden_targets * torch.log_softmax(hidden / objective.student_temperature, -1)).sum(-1)
    weight = (1 / batch.masks.sum(1).clamp(min=1))[batch.masks.nonzero()[:, 0]]
    ibot = (per_patch * weight).sum() / len(batch.masks)
    spread = sum(koleo(view) for view in seen[:, 0].chunk(num_global))
    loss: Tensor = sum(terms) / len(terms) + ibot + objective.regulariser_weight * spread
    return loss


def plain_step(learner: Learner, optimiser: torch.optim.AdamW, batch: Batch, step: int) -> float:
    """A whole step; returns the loss."""
    learner.train()
    with torch.autocast(batch.globals.device.type, torch.bfloat16, enabled=learner.recipe.run.precision == "bf16"):
        loss = plain_loss(learner, batch, step)
    set_schedules(optimiser, learner.recipe, step)
    optimiser.zero_grad()
    loss.backward()
    clip_gradients(learner.student, learner.recipe.optimiser.clip)
    optimiser.step()
    decay = momentum(learner.recipe, step)
    with torch.no_grad():
        for ours, theirs in zip(learner.teacher.parameters(), learner.student.parameters()):
            ours.mul_(decay).add_(theirs, alpha=1 - decay)
    return float(loss.detach())
