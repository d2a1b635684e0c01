"""What a recipe costs in matrix products and in memory, from its shapes alone. Loads no torch.

FLOPs are those of matrix products (linear layers, QKᵀ, AV, patch embedding, heads), 2 per multiply-add; backward counts twice
forward, recomputation not at all: the numerator of model FLOP utilisation. Samples that skip a branch (drop path) are not
computed, so they do not count.
"""

import math
from dataclasses import dataclass

from hilum.encode.shape import SIZES, ViTConfig
from hilum.pretrain.recipe import Recipe

WIDE = 4  # bytes of fp32: weights, gradients, moments, the residual stream, logits in the losses
PATCH_TARGET_BYTES = 4  # of one patch for one prototype: the kernel, of which targets are made in chunks
CLASS_TARGET_BYTES = 12  # of one class token: kernel, targets, their sum over views


@dataclass(frozen=True)
class Flops:
    """Of one slice or volume with all its views: student forward and backward, teacher forward, heads of both."""

    student: float
    teacher: float
    heads: float

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.heads


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the end of a forward pass.

    weights, gradients, moments, teacher   fp32; the teacher is the momentum copy
    casts                                  the bf16 weights that autocast keeps for a step
    activations                            of the student's blocks, kept for the backward pass
    heads                                  what the heads keep: hidden layers, the teacher's assignments
    """

    weights: float
    gradients: float
    moments: float
    teacher: float
    casts: float
    activations: float
    heads: float

    @property
    def state(self) -> float:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.moments + self.teacher + self.casts

    @property
    def total(self) -> float:
        return self.state + self.activations + self.heads


def crop_patches(recipe: Recipe) -> tuple[float, float]:
    """Patches of a global and of a local crop; in 3D the mean over the shapes that steps draw."""
    if recipe.is_3d:
        patch = recipe.model.patch
        return recipe.volumes.mean_patches(patch, 0), recipe.volumes.mean_patches(patch, 1)
    return num_patches(recipe, recipe.views.global_px), num_patches(recipe, recipe.views.local_px)


def num_patches(recipe: Recipe, px: int) -> int:
    """Of a square crop of a slice."""
    return math.prod(px // side for side in recipe.model.patch)


def crop_tokens(recipe: Recipe) -> list[tuple[int, float]]:
    """(crops of one slice or volume, tokens of each): the global ones, then the local ones."""
    prefix, views = 1 + recipe.model.num_registers, recipe.views
    large, small = crop_patches(recipe)
    return [(views.num_global, large + prefix), (views.num_local, small + prefix)]


def hidden_patches(recipe: Recipe) -> float:
    """Masked patches of one slice or volume: crops × share masked × mean share of their patches."""
    views = recipe.views
    return views.num_global * views.mask_probability * sum(views.mask_ratio) / 2 * crop_patches(recipe)[0]


def block_parameters(config: ViTConfig) -> int:
    """Weights of the linear layers of all blocks."""
    width, depth, _, kind, hidden = SIZES[config.size]
    return depth * (4 * width**2 + (3 if kind == "swiglu" else 2) * width * hidden)


def backbone_parameters(config: ViTConfig) -> int:
    """All numbers of `vit.ViT`."""
    width, depth, _, kind, hidden = SIZES[config.size]
    biases = 4 * width + (2 * hidden if kind == "swiglu" else hidden) + width
    norms = 4 * width + (2 * width if config.layer_scale else 0)
    positions = 1 + math.prod(config.grid) if config.positions == "learned" else 0
    patch = config.channels * math.prod(config.patch) + 1
    tokens = 2 + config.num_registers + positions  # class and mask token
    return block_parameters(config) + depth * (biases + norms) + (patch + tokens + 2) * width


def head_parameters(recipe: Recipe) -> int:
    """All numbers of the heads of `distill.Learner`, on one side."""
    objective, width = recipe.objective, SIZES[recipe.model.size][0]

    def mlp(out: int, batch_norm: bool) -> int:
        h = objective.hidden
        return (width + 1) * h + (h + 1) * h + (h + 1) * out + (4 * h if batch_norm else 0)

    if objective.kind == "lejepa":
        return mlp(objective.projector_dim, True) * (2 if objective.patch_weight else 1)
    head = mlp(objective.bottleneck, objective.batch_norm) + objective.prototypes * objective.bottleneck
    return head if objective.shared_head else 2 * head


def head_rows(recipe: Recipe) -> tuple[float, float]:
    """Tokens of one slice that go through the student's heads, and through the teacher's."""
    views, objective = recipe.views, recipe.objective
    num_views = views.num_global + views.num_local
    if objective.kind == "lejepa":
        return num_views + (views.num_global * objective.patch_points if objective.patch_weight else 0), 0
    return num_views + hidden_patches(recipe), views.num_global + hidden_patches(recipe)


def flops_per_image(recipe: Recipe) -> Flops:
    """Matrix products of one slice or volume in one step: the mean over the run of the teachers, heads as after a hand-over."""
    config, objective, views = recipe.model, recipe.objective, recipe.views
    width = SIZES[config.size][0]
    (blocks, embedding), (local_blocks, local_embedding) = (forward_flops(recipe, n) for n in crop_patches(recipe))
    all_blocks = views.num_global * blocks + views.num_local * local_blocks
    all_embedding = views.num_global * embedding + views.num_local * local_embedding
    teacher = views.num_global * (blocks + embedding) * (1 - objective.handover) if objective.kind == "dino" else 0.0
    if objective.gram_weight:
        anchor = forward_flops(recipe, num_patches(recipe, objective.gram_px))
        teacher += views.num_global * sum(anchor) * (1 - objective.gram_start)
    h, out = objective.hidden, objective.bottleneck if objective.kind == "dino" else objective.projector_dim
    last = out * objective.prototypes if objective.kind == "dino" else 0
    learnt, taught = head_rows(recipe)
    return Flops(
        student=3 * ((1 - config.drop_path) * all_blocks + all_embedding),
        teacher=teacher,
        heads=(3 * learnt + taught) * 2 * (width * h + h * h + h * out + last),
    )


def forward_flops(recipe: Recipe, patches: float) -> tuple[float, float]:
    """Of one crop with so many patches: all blocks, and the patch embedding."""
    config = recipe.model
    width, depth, *_ = SIZES[config.size]
    tokens = patches + 1 + config.num_registers
    blocks = 2 * block_parameters(config) * tokens + 4 * tokens**2 * width * depth
    return blocks, 2 * patches * math.prod(config.patch) * config.channels * width


def activation_bytes(recipe: Recipe, checkpoint_blocks: bool) -> float:
    """What the student's blocks keep for the backward pass of one slice.

    checkpoint_blocks  keep the input of each block only and compute the rest again, one block at a time

    Of each token that a branch works on, in fp32 the inputs of both norms (and the results of both branches, if drop path
    adds them to a part of the batch); in the precision of the run the norms' outputs, queries, keys, values, attention's output
    before and after crops are joined, and the insides of the feed-forward layer.
    """
    width, depth, _, kind, hidden = SIZES[recipe.model.size]
    narrow = 2 if recipe.run.precision == "bf16" else WIDE
    wide_copies = 4 if recipe.model.drop_path else 2
    inside = (4 if kind == "swiglu" else 2) * hidden
    tokens = sum(count * each for count, each in crop_tokens(recipe))
    a_block = tokens * (1 - recipe.model.drop_path) * (wide_copies * WIDE * width + narrow * (7 * width + inside))
    return tokens * depth * WIDE * width + a_block if checkpoint_blocks else depth * a_block


def head_bytes(recipe: Recipe) -> float:
    """What the heads keep for one slice: the student's hidden layers (before and after GELU) and the teacher's assignments.

    The student's logits live a chunk at a time (`prototypes.CHUNK_BYTES`) and are not counted.
    """
    objective, (learnt, _) = recipe.objective, head_rows(recipe)
    narrow = 2 if recipe.run.precision == "bf16" else WIDE
    insides = learnt * narrow * (SIZES[recipe.model.size][0] + 4 * objective.hidden)
    if objective.kind == "lejepa":
        return insides
    targets = CLASS_TARGET_BYTES * recipe.views.num_global + PATCH_TARGET_BYTES * hidden_patches(recipe)
    return insides + objective.prototypes * targets


def memory(recipe: Recipe, batch: int, *, checkpoint_blocks: bool = False, shards: int = 1) -> Memory:
    """Bytes on one device that works on `batch` slices at a time.

    shards  devices that share weights, gradients, moments and teacher out (FSDP); 1 = each has all (DDP)
    """
    num = backbone_parameters(recipe.model) + head_parameters(recipe)
    return Memory(
        weights=WIDE * num / shards,
        gradients=WIDE * num / shards,
        moments=2 * WIDE * num / shards,
        teacher=WIDE * num / shards,
        casts=2 * num if recipe.run.precision == "bf16" else 0,
        activations=batch * activation_bytes(recipe, checkpoint_blocks),
        heads=batch * head_bytes(recipe),
    )


def checkpoint_bytes(recipe: Recipe) -> int:
    """One checkpoint: student, teacher and Adam's two moments in fp32."""
    return 4 * WIDE * (backbone_parameters(recipe.model) + head_parameters(recipe))
