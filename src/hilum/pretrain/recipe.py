"""What decides a pre-training run, as frozen values. The presets are in `presets.py`.

Where Curia-2 (arXiv 2604.01987) gives no number, the value is DINOv2's (arXiv 2304.07193, its public code) or ours, and
the comment says so.
"""

from dataclasses import dataclass, field
from typing import Literal

from hilum.encode.shape import ViTConfig
from hilum.errors import UsageError
from hilum.pretrain.volume_spec import VolumeSpec
from hilum.settings import to_dict

Range = tuple[float, float]
LEAST_TEMPERATURE = 0.025  # exp of the range of cosines, 2 / temperature, must stay within fp32


def expect(ok: bool, name: str, found: object, wanted: str) -> None:
    """UsageError unless a setting is as it must be."""
    if not ok:
        raise UsageError(f"{name} must be {wanted}; found {found}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How often each scan is shown.

    ct, mr, other   weight of a modality; 1 = its natural share, 0 = never
    volume_power    a volume with n slices worth training on counts n**power: 1 = every slice alike, 0 = every volume alike,
                    so that a CT of 1,000 slices does not drown an MR of 20; in 3D n is how many global crops it holds
    """

    ct: float = 1.0
    mr: float = 1.0
    other: float = 1.0
    volume_power: float = 1.0

    def __post_init__(self) -> None:
        weights = self.ct, self.mr, self.other
        expect(min(weights) >= 0 and max(weights) > 0, "sampling.ct, mr, other", weights, "at least 0 and not all 0")
        expect(0 <= self.volume_power <= 1, "sampling.volume_power", self.volume_power, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """How much the values of a crop may change; the unit is 1 HU in CT, else the standard deviation of the slice.

    gain     factor 1 ± gain: in CT about −1000 HU, where nothing attenuates (calibration), else about the slice's mean
    offset   shift ± offset
    gamma    exponent exp(± gamma) between the slice's darkest value and its mean, which both stay; not in CT
    noise    white noise with a standard deviation up to this
    blur     probability of a Gaussian blur with sigma .3-1.2 pixels of the crop
    window   probability that values are cut to one of `windows_hu`; CT only
    windows_hu  (level, width) of display windows: soft tissue, lung, bone; the level varies by a tenth of the width, the
                width by a fifth
    """

    gain: float = 0.0
    offset: float = 0.0
    gamma: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    window: float = 0.0
    windows_hu: tuple[Range, ...] = ((40.0, 400.0), (-600.0, 1500.0), (400.0, 1800.0))

    def __post_init__(self) -> None:
        if not 0 <= self.gain < 1 or min(self.offset, self.gamma, self.noise) < 0:
            raise UsageError(f"intensity changes are at least 0, gain below 1; found {self}")
        if self.window and not (self.windows_hu and all(width > 0 for _, width in self.windows_hu)):
            raise UsageError(f"windows_hu must be pairs of level and width > 0; found {self.windows_hu}")


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
    ct, mr                    changes of intensity, by modality; `mr` is for all that has no physical unit. A scanner's
                              calibration, noise and windows for CT; colour jitter's meaning for one channel else
    resolutions               (global_px, local_px, weight): each step draws one of them, the same on all ranks, as DINOv3's
                              high-resolution stage does; empty = the two sizes above at every step
    mask_group                slices among which the shares of hidden patches are dealt: a batch of whole groups hides the
                              same number of patches at every step (ours; DINOv3 deals within the batch of a device)
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
    ct: Intensity = Intensity(gain=0.02, offset=10.0, noise=25.0, blur=0.3, window=0.2)
    mr: Intensity = Intensity(gain=0.2, offset=0.2, gamma=0.15, noise=0.05, blur=0.3)
    resolutions: tuple[tuple[int, int, float], ...] = ()
    mask_group: int = 8
    mask_probability: float = 0.5
    mask_ratio: Range = (0.1, 0.5)
    mask_prior: Literal["guided", "uniform"] = "guided"
    mask_sigma: float = 0.25

    def __post_init__(self) -> None:
        expect(self.num_global >= 2, "views.num_global", self.num_global, "at least 2")
        expect(self.num_local >= 0, "views.num_local", self.num_local, "at least 0")
        expect(self.max_tries >= 1, "views.max_tries", self.max_tries, "at least 1")
        for name in ("flip", "min_image_foreground", "min_crop_foreground", "mask_probability"):
            expect(0 <= getattr(self, name) <= 1, f"views.{name}", getattr(self, name), "between 0 and 1")
        expect(self.mask_sigma > 0, "views.mask_sigma", self.mask_sigma, "above 0")
        expect(self.mask_group >= 1, "views.mask_group", self.mask_group, "at least 1")
        expect(not self.ct.gamma, "views.ct.gamma", self.ct.gamma, "0, since it would bend Hounsfield units")
        expect(not self.mr.window, "views.mr.window", self.mr.window, "0, since windows are in Hounsfield units")
        expect(all(w > 0 for *_, w in self.resolutions), "views.resolutions", self.resolutions, "of weights above 0")
        shares = ("global_scale", "local_scale", "mask_ratio")
        for name in (*shares, "aspect"):
            low, high = getattr(self, name)
            limit = ", at most 1" if name in shares else ""
            ok = 0 < low <= high and not (limit and high > 1)
            expect(ok, f"views.{name}", f"{low}, {high}", f"two rising numbers > 0{limit}")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised.

    kind                 "dino": class-token DINO and masked-patch iBOT against a momentum teacher (DINOv2, Curia-2);
                         "lejepa": every view predicts the mean of the global views, no teacher (arXiv 2511.08544)
    prototypes, hidden, bottleneck   size of the DINO and iBOT heads
    shared_head          one head for class token and patches (VoxelFM's code) instead of two (DINOv2's long recipes)
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
    shared_head: bool = False
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
            expect(
                0 <= getattr(self, name) < 1,
                f"objective.{name}",
                getattr(self, name),
                "a share of the run, 0 to below 1",
            )
        for name in ("prototypes", "hidden", "bottleneck", "sigreg_slices", "projector_dim", "patch_points", "gram_px"):
            expect(getattr(self, name) >= 1, f"objective.{name}", getattr(self, name), "at least 1")
        for name in ("dino_weight", "ibot_weight", "regulariser_weight", "patch_weight", "gram_weight"):
            expect(getattr(self, name) >= 0, f"objective.{name}", getattr(self, name), "at least 0")
        coldest = min(self.student_temperature, *self.teacher_temperature)
        expect(
            coldest >= LEAST_TEMPERATURE, "temperatures", coldest, f"at least {LEAST_TEMPERATURE}, or they leave fp32"
        )
        expect(
            0 <= self.teacher_warmup <= 1, "objective.teacher_warmup", self.teacher_warmup, "a share of the run, 0 to 1"
        )
        if self.kind == "lejepa":  # its loss is (1 − weight)·invariance + weight·SigReg
            expect(self.regulariser_weight <= 1, "objective.regulariser_weight", self.regulariser_weight, "at most 1")


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

    def __post_init__(self) -> None:
        for name in ("lr", "final_lr", "layer_decay", "patch_embed_lr", "clip"):
            expect(getattr(self, name) > 0, f"optimiser.{name}", getattr(self, name), "above 0")
        for name in ("warmup", "freeze_last_layer"):
            expect(
                0 <= getattr(self, name) <= 1, f"optimiser.{name}", getattr(self, name), "a share of the run, 0 to 1"
            )
        expect(min(self.weight_decay) >= 0, "optimiser.weight_decay", self.weight_decay, "two numbers, at least 0")
        expect(all(0 <= b < 1 for b in self.betas), "optimiser.betas", self.betas, "two numbers, 0 to below 1")
        expect(all(0 <= m <= 1 for m in self.momentum), "optimiser.momentum", self.momentum, "two numbers, 0 to 1")


HOW = ("parallel", "recompute", "compile", "num_workers", "checkpoint_every")  # settings of `Run` that change no number


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
    health_every       steps between measures of the batch and verdicts
    probe_every        steps between encodings of 256 fixed slices: rank, k-NN, pictures; below 1 % of the work at 100
    on_collapse        when the run collapses or diverges: "continue", "stop", or "roll_back" to the checkpoint before it and
                       skip the slices since, at most three times
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
    probe_every: int = 100
    on_collapse: Literal["continue", "stop", "roll_back"] = "stop"
    num_workers: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "seed", "num_workers"):  # no step at all: the encoder is exported as it begins
            expect(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "at least 0")
        for name in ("batch_size", "accumulate", "checkpoint_every", "health_every", "probe_every"):
            expect(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        shared = self.batch_size % max(self.accumulate, 1) == 0
        expect(shared, "run.batch_size", self.batch_size, f"a multiple of run.accumulate, {self.accumulate}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pre-training run.

    start_from   where the first weights come from: a hilum run or encoder folder, or a released encoder (`start.py`);
                 "" draws them
    needs_start  a stage that continues another run, and is refused without `start_from`
    volumes      read by models with a patch of three sides only, which are trained on crops of volumes
    """

    name: str
    start_from: str = ""
    needs_start: bool = False
    model: ViTConfig = field(default_factory=ViTConfig)
    views: ViewSpec = field(default_factory=ViewSpec)
    volumes: VolumeSpec = field(default_factory=VolumeSpec)
    sampling: Sampling = field(default_factory=Sampling)
    objective: Objective = field(default_factory=Objective)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        masked = int(self.views.mask_group * self.views.num_global * self.views.mask_probability)
        if self.objective.kind == "dino" and self.objective.ibot_weight and not masked:
            raise UsageError(
                f"recipe {self.name}: iBOT needs a masked crop in each mask_group; raise views.mask_probability or "
                "views.mask_group, or set ibot_weight to 0"
            )
        if self.objective.regulariser == "koleo" and self.run.batch_size == self.run.accumulate:
            raise UsageError(f"recipe {self.name}: KoLeo needs at least two slices in a micro-batch; found 1")
        if self.is_3d:
            self._check_volumes()
            return
        sizes = [("views.global_px", self.views.global_px), ("views.local_px", self.views.local_px)]
        sizes += [("views.resolutions", px) for pair in self.views.resolutions for px in pair[:2]]
        sizes += [("objective.gram_px", self.objective.gram_px)] if self.objective.gram_weight else []
        for name, px in sizes:
            if any(px % p for p in self.model.patch):
                raise UsageError(f"{name} {px} is no multiple of the patch {self.model.patch}")

    def _check_volumes(self) -> None:
        """UsageError for what training on volumes cannot do."""
        self.volumes.check_patch(self.model.patch)
        views = self.views
        absent = {
            "views.ct.blur": views.ct.blur,
            "views.mr.blur": views.mr.blur,
            "views.ct.window": views.ct.window,
            "views.resolutions": views.resolutions,
            "objective.gram_weight": self.objective.gram_weight,
        }
        instead = {
            "views.ct.window": "volumes.window draws windows of crops of volumes",
            "views.resolutions": "volumes.shapes lists their shapes",
        }
        for name, value in absent.items():
            if value:
                empty = "empty" if name == "views.resolutions" else "0"
                why = instead.get(name, "it is made for slices only")
                raise UsageError(f"recipe {self.name}: {name} must be {empty} in 3D, since {why}; found {value}")

    @property
    def is_3d(self) -> bool:
        """Whether the model is trained on crops of volumes, else on slices."""
        return len(self.model.patch) == 3

    @property
    def crop_shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
        """(global shape, local shape, weight) of crops in pixels; each step draws one of them."""
        if self.is_3d:
            return list(self.volumes.shapes)
        sizes = self.views.resolutions or ((self.views.global_px, self.views.local_px, 1.0),)
        return [((a, a), (b, b), weight) for a, b, weight in sizes]

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
        from hilum.records import hash_json  # loads pyarrow, which looking at a recipe does not need

        values = to_dict(self)
        del values["start_from"], values["needs_start"]
        if not self.is_3d:
            del values["volumes"]
        if not self.objective.shared_head:  # the hash of runs from before there was a choice
            del values["objective"]["shared_head"]
        for name in (*HOW, "health_every", "probe_every", "on_collapse"):
            del values["run"][name]
        return hash_json(values)
