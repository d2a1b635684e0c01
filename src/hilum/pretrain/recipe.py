"""What decides a pre-training run, as frozen values. The presets are in `presets.py`.

Where Curia-2 (arXiv 2604.01987) gives no number, the value is DINOv2's (arXiv 2304.07193, its public code) or ours, and
the comment says so.
"""

from dataclasses import dataclass, field
from typing import Literal

from hilum.encode.vit import ViTConfig
from hilum.errors import UsageError
from hilum.records import hash_json
from hilum.settings import to_dict

Range = tuple[float, float]
LEAST_TEMPERATURE = 0.025  # exp of the range of cosines, 2 / temperature, must stay within fp32


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """What may be drawn from one slice.

    global_px, local_px       side of the crops
    global_scale, local_scale area of a crop as a share of the slice (DINOv2: .32-1 and .05-.32)
    aspect                    log-uniform range of a crop's width/height
    flip                      probability of a left-right flip; 0 because left and right are different organs
    min_image_foreground      slices with less anatomy are not trained on (Curia-2: at most 50 % background)
    min_crop_foreground       crops with less anatomy are drawn again (Curia-2: at most 70 % background)
    max_tries                 draws before the best crop so far is taken
    gain, offset, noise       largest intensity change: factor 1 ± gain, shift ± offset, noise up to this (in standard
                              deviations of the slice); colour jitter's meaning for one physical channel
    blur                      probability of a Gaussian blur with sigma .3-1.2 pixels
    mask_probability          share of global crops that are masked
    mask_ratio                range of the share of masked patches
    mask_prior                where blocks fall: "guided" around the anatomy (Curia-2) or "uniform" (DINOv2)
    mask_sigma                width of the guided prior as a share of the crop; unpublished, ours
    """

    num_global: int = 2
    num_local: int = 8
    global_px: int = 256
    local_px: int = 96
    global_scale: Range = (0.32, 1.0)
    local_scale: Range = (0.05, 0.32)
    aspect: Range = (0.75, 4 / 3)
    flip: float = 0.0
    min_image_foreground: float = 0.5
    min_crop_foreground: float = 0.3
    max_tries: int = 20
    gain: float = 0.2
    offset: float = 0.2
    noise: float = 0.05
    blur: float = 0.3
    mask_probability: float = 0.5
    mask_ratio: Range = (0.1, 0.5)
    mask_prior: Literal["guided", "uniform"] = "guided"
    mask_sigma: float = 0.25

    def __post_init__(self) -> None:
        if self.num_global < 2:
            raise UsageError(f"views.num_global must be at least 2; found {self.num_global}")
        if self.max_tries < 1:
            raise UsageError(f"views.max_tries must be at least 1; found {self.max_tries}")
        shares = ("global_scale", "local_scale", "mask_ratio")
        for name in (*shares, "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name in shares and high > 1):
                limit = ", at most 1" if name in shares else ""
                raise UsageError(f"views.{name} must be two rising numbers > 0{limit}; found {low}, {high}")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised.

    kind                 "dino": class-token DINO and masked-patch iBOT against a momentum teacher (DINOv2, Curia-2);
                         "lejepa": every view predicts the mean of the global views, no teacher (arXiv 2511.08544)
    prototypes, hidden, bottleneck   size of the DINO and iBOT heads (separate, as in DINOv2's long recipes)
    batch_norm           BatchNorm in the heads; without it they need thousands of steps to leave their cold start
    student_temperature  softmax temperature of the student
    teacher_temperature  start and end of the teacher's, linear over teacher_warmup (share of the run)
    centring             "sinkhorn" (three Sinkhorn-Knopp rounds) or "ema" (running mean of the teacher's logits)
    dino_weight, ibot_weight   weights of the two terms
    regulariser          "sigreg" (Curia-2), "koleo" (DINOv2) or "none"
    regulariser_weight   for SigReg it multiplies N·∫ (1.06 for a perfect Gaussian whatever the batch)
    regulariser_on       class token after the final norm, where unit scale is in reach, or the head's bottleneck
    sigreg_slices        random directions, redrawn every step
    projector_dim        width of LeJEPA's projection
    patch_weight         LeJEPA only: weight of the same objective on patch tokens at places that all global crops show
    patch_points         places drawn of each slice for it
    handover             "dino" only: share of the run that LeJEPA learns first, where prototypes would still be cold
    gram_weight          weight of Gram anchoring (DINOv3); 0 leaves it out. DINOv3: 2
    gram_start           share of the run at which the teacher of that moment becomes the anchor
    gram_refresh         share of the run between renewals of the anchor, at most three; 0 keeps the first
    gram_px              side of the anchor's crops; DINOv3 shows it twice the student's
    """

    kind: Literal["dino", "lejepa"] = "dino"
    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    batch_norm: bool = False
    student_temperature: float = 0.1
    teacher_temperature: Range = (0.04, 0.07)
    teacher_warmup: float = 0.3
    centring: Literal["sinkhorn", "ema"] = "sinkhorn"
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    regulariser: Literal["sigreg", "koleo", "none"] = "sigreg"
    regulariser_weight: float = 0.05
    regulariser_on: Literal["class_token", "bottleneck"] = "class_token"
    sigreg_slices: int = 1024
    projector_dim: int = 32
    patch_weight: float = 0.0
    patch_points: int = 16
    handover: float = 0.0
    gram_weight: float = 0.0
    gram_start: float = 0.8
    gram_refresh: float = 0.0
    gram_px: int = 512

    def __post_init__(self) -> None:
        if self.handover and self.kind != "dino":
            raise UsageError(f"objective.handover goes from LeJEPA to dino; found kind '{self.kind}'")
        for name in ("handover", "gram_start", "gram_refresh"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"objective.{name} is a share of the run, from 0 to below 1; found {getattr(self, name)}"
                )
        coldest = min(self.student_temperature, *self.teacher_temperature)
        if coldest < LEAST_TEMPERATURE:
            raise UsageError(f"temperatures below {LEAST_TEMPERATURE} leave fp32; found {coldest}")


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW and its schedules.

    lr                 peak learning rate, as applied (no hidden scaling with the batch)
    warmup             share of the run with rising learning rate
    final_lr           at the end of the cosine
    weight_decay       start and end, cosine; not on biases, norms and LayerScale
    momentum           of the teacher, start and end, cosine
    layer_decay        factor on the learning rate per block below the top
    patch_embed_lr     further factor on the patch embedding
    clip               largest gradient norm of each module (backbone, each head) on its own, as DINOv2's code does
    freeze_last_layer  share of the run in which the prototypes' learning rate is 0
    """

    lr: float = 1e-3
    warmup: float = 0.1
    final_lr: float = 1e-6
    weight_decay: Range = (0.04, 0.4)
    betas: Range = (0.9, 0.999)
    momentum: Range = (0.992, 1.0)
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    clip: float = 3.0
    freeze_last_layer: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long and how.

    batch_size         slices a step, over all ranks and micro-batches
    accumulate         micro-batches a step. What couples samples (Sinkhorn, SigReg, KoLeo, BatchNorm) couples those of one
                       micro-batch on all ranks, so the number of ranks changes no result and this setting does
    parallel           "ddp": every rank has the whole model; "fsdp": weights, gradients and moments are shared out
    precision          "bf16": autocast with fp32 weights, losses in fp32; "fp32"
    recompute          activation checkpointing: less memory for one more student forward pass
    compile            torch.compile of each block; minutes of compiling, once
    checkpoint_every   steps between checkpoints; at most so many are lost to a kill
    num_workers        processes that draw and render views; 0 does it in the training process
    """

    steps: int = 125_000
    batch_size: int = 64
    accumulate: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = False
    compile: bool = False
    checkpoint_every: int = 500
    health_every: int = 25
    num_workers: int = 4

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise UsageError(
                f"run.batch_size {self.batch_size} must be a multiple of run.accumulate; found {self.accumulate}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pre-training run.

    start_from   where the first weights come from: a hilum run or encoder folder, or a released encoder (`start.py`);
                 "" draws them
    needs_start  a stage that continues another run, and is refused without `start_from`
    """

    name: str
    start_from: str = ""
    needs_start: bool = False
    model: ViTConfig = field(default_factory=ViTConfig)
    views: ViewSpec = field(default_factory=ViewSpec)
    objective: Objective = field(default_factory=Objective)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if len(self.model.patch) != 2:
            raise UsageError(f"recipe {self.name}: views are 2D, so the patch has two sides; found {self.model.patch}")
        if self.objective.kind == "dino" and self.objective.ibot_weight and not self.views.mask_probability:
            raise UsageError(
                f"recipe {self.name}: iBOT needs masks; raise views.mask_probability or set ibot_weight to 0"
            )
        for name, px in (("global_px", self.views.global_px), ("local_px", self.views.local_px)):
            if any(px % p for p in self.model.patch):
                raise UsageError(f"views.{name} {px} is no multiple of the patch {self.model.patch}")

    @property
    def handover_step(self) -> int:
        """The first step of DINO + iBOT."""
        return round(self.objective.handover * self.run.steps)

    @property
    def gram_steps(self) -> list[int]:
        """Steps before which the anchor is taken from the teacher: the first, and its renewals."""
        start, every = (
            round(share * self.run.steps) for share in (self.objective.gram_start, self.objective.gram_refresh)
        )
        return [start + n * every for n in range(4 if every else 1)]

    @property
    def hash(self) -> str:
        """Names what the run yields; settings of `run` that only say how the work is done are left out.

        So is the place of the first weights: run.json holds the hash of the weights themselves.
        """
        values = to_dict(self)
        del values["start_from"], values["needs_start"]
        for name in ("parallel", "recompute", "compile", "num_workers", "checkpoint_every", "health_every"):
            del values["run"][name]
        return hash_json(values)
