"""Where every setting comes from: its unit, its meaning in short, and who says that its value is right.

To add a setting: the field in `recipe.py` (or in `ViTConfig`), the line that reads it, and one line in SETTINGS under the
dotted name that `--set` takes. A preset that gives it another value says so by a `Change` in `presets.py`. Tests see to it.

    "views.flip": Setting("probability", "left-right mirror image", "ours", "left and right are different organs"),

origin   "paper": the paper on the method gives the value (Curia-2, arXiv 2604.01987, or the one that is named);
         "code": the paper is silent, and public code or a released configuration has it (DINOv2's, or the one that is named);
         "ours": nobody published it, or we depart from what was published
why      where it is to be found; for "ours" the reason
"""

from dataclasses import dataclass
from typing import Any, Literal

Origin = Literal["paper", "code", "ours"]


@dataclass(frozen=True)
class Setting:
    """What is known of a setting, and of its default value. `unit` is "choice", "name" or "yes/no" for what has none."""

    unit: str
    meaning: str
    origin: Origin
    why: str


@dataclass(frozen=True)
class Change:
    """A value of a preset that differs from the preset it builds on."""

    setting: str
    value: Any
    origin: Origin
    why: str


_SHORT = "DINOv2 vitl16_short, as many iterations"

SETTINGS: dict[str, Setting] = {
    "start_from": Setting("name", "run or encoder that gives the first weights", "ours", "none: drawn at random"),
    "needs_start": Setting("yes/no", "refused without start_from", "ours", "a first stage begins by itself"),
    "model.size": Setting(
        "name", "width, depth, heads, feed-forward", "paper", "ViT-B, L, g; SwiGLU widths of the release"
    ),
    "model.patch": Setting("pixels", "sides of a patch", "paper", "patch 16"),
    "model.image": Setting(
        "pixels", "sides that the learned positions are made for", "paper", "256 instead of Curia's 512"
    ),
    "model.channels": Setting("count", "channels of an image", "paper", "one: CT and MR are grey"),
    "model.positions": Setting("choice", "learned or rotary positions", "code", "Curia's released config: learned"),
    "model.antialias": Setting(
        "yes/no", "positions interpolated with antialiasing", "code", "DINOv2 without registers: no"
    ),
    "model.num_registers": Setting("count", "register tokens", "code", "Curia's released config: none"),
    "model.norm_eps": Setting("number", "epsilon of every LayerNorm", "code", "DINOv2; Curia's released config"),
    "model.layer_scale": Setting(
        "factor", "LayerScale at the start; 0 leaves it out", "code", "DINOv2; Curia's released config"
    ),
    "model.drop_path": Setting(
        "share", "samples that skip a branch in training", "ours", "0 until a preset asks for it"
    ),
    "model.rope_rescale": Setting(
        "factor", "rotary coordinates times 1/this to this", "code", "DINOv2 and Curia: none, learned positions"
    ),
    "views.num_global": Setting("crops", "global crops of a slice or volume", "paper", "2 global and 8 local"),
    "views.num_local": Setting("crops", "local crops of a slice or volume", "paper", "2 global and 8 local"),
    "views.global_px": Setting("pixels", "side of a global crop", "paper", "256 instead of Curia's 512"),
    "views.local_px": Setting("pixels", "side of a local crop", "code", "DINOv2 has 96 beside 224; Curia-2 gives none"),
    "views.global_scale": Setting("share", "a global crop: of the area; 3D: volumes.scale_of", "code", "DINOv2"),
    "views.local_scale": Setting("share", "a local crop: of the area; 3D: volumes.scale_of", "code", "DINOv2"),
    "views.aspect": Setting("ratio", "width/height of a crop, log-uniform", "code", "DINOv2, torchvision"),
    "views.flip": Setting(
        "probability", "left-right mirror image", "ours", "left and right are different organs; DINOv2 has .5"
    ),
    "views.min_image_foreground": Setting("share", "anatomy that a slice needs", "paper", "at most 50 % background"),
    "views.min_crop_foreground": Setting("share", "anatomy that a crop needs", "paper", "at most 70 % background"),
    "views.max_tries": Setting(
        "draws", "before the best crop so far is taken", "ours", "unpublished; no slice is given up"
    ),
    "views.ct.gain": Setting("factor", "about -1000 HU, 1 ± this", "ours", "calibration of scanners"),
    "views.ct.offset": Setting("HU", "largest shift", "ours", "calibration of scanners"),
    "views.ct.gamma": Setting("exponent", "none in CT", "ours", "it would bend Hounsfield units"),
    "views.ct.noise": Setting("HU", "largest noise added", "ours", "dose changes noise; DINOv2 has none"),
    "views.ct.blur": Setting(
        "probability", "Gaussian blur, sigma .3 to 1.2 pixels", "ours", "reconstruction kernels differ"
    ),
    "views.ct.window": Setting("probability", "cut to a display window", "ours", "as readers see it"),
    "views.ct.windows_hu": Setting("HU", "level and width of each window", "ours", "soft tissue, lung, bone"),
    "views.mr.gain": Setting(
        "factor", "largest change of contrast, 1 ± this", "ours", "DINOv2's .4 in RGB halved: grey has a meaning"
    ),
    "views.mr.offset": Setting("deviations", "largest shift of intensity", "ours", "as gain; of the slice or volume"),
    "views.mr.gamma": Setting("exponent", "bend between darkest and mean", "ours", "sequences differ in contrast"),
    "views.mr.noise": Setting("deviations", "largest noise added", "ours", "coils change noise; DINOv2 has none"),
    "views.mr.blur": Setting(
        "probability",
        "Gaussian blur, sigma .3 to 1.2 pixels",
        "ours",
        "DINOv2's sigma reaches 2, the size of a small vessel",
    ),
    "views.mr.window": Setting("probability", "none without Hounsfield units", "ours", "windows are in HU"),
    "views.mr.windows_hu": Setting("HU", "not used without Hounsfield units", "ours", "windows are in HU"),
    "views.resolutions": Setting(
        "pixels", "(global, local, weight), one drawn a step", "ours", "empty: one size, as Curia-2; DINOv3 mixes"
    ),
    "views.mask_group": Setting(
        "samples",
        "that deal out the shares of hidden patches",
        "ours",
        "the same count at every step and on every rank",
    ),
    "views.mask_probability": Setting("share", "global crops that are masked", "code", "DINOv2"),
    "views.mask_ratio": Setting("share", "patches hidden in a masked crop", "code", "DINOv2; Curia-2 gives none"),
    "views.mask_prior": Setting("choice", "where blocks fall", "paper", "guided: Gaussian around the anatomy"),
    "views.mask_sigma": Setting(
        "share of side", "width of the guided prior", "ours", "unpublished; two sigma reach the crop's rim"
    ),
    "volumes.shapes": Setting("voxels", "(global, local, weight), one drawn a step", "paper", "VoxelFM: 112³ with 56³"),
    "volumes.min_share": Setting(
        "share", "sides of a volume against a global crop's, sorted", "code", "VoxelFM: half of its side"
    ),
    "volumes.scale_of": Setting(
        "choice", "crops are shares of the shortest side or of the volume", "code", "VoxelFM: of the side"
    ),
    "volumes.permute": Setting("choice", "how axes of a crop are laid on the volume's", "code", "VoxelFM: at random"),
    "volumes.flip": Setting("probability", "of a flip along each axis", "code", "VoxelFM"),
    "volumes.mirror": Setting("yes/no", "a patient may become his mirror image", "code", "VoxelFM: yes"),
    "volumes.flip_locals": Setting("yes/no", "local crops are flipped, too", "code", "VoxelFM: global ones only"),
    "volumes.window": Setting("probability", "CT cut to a window of its quantiles", "code", "VoxelFM"),
    "volumes.window_views": Setting("choice", "crops that this may happen to", "code", "VoxelFM: the first"),
    "volumes.clip_hu": Setting("HU", "values are cut to", "code", "VoxelFM"),
    "volumes.mean": Setting("HU", "subtracted from CT", "code", "VoxelFM's default; its released run may have another"),
    "volumes.std": Setting("HU", "CT is divided by it", "code", "VoxelFM's default; its released run may have another"),
    "volumes.min_spacing_mm": Setting("mm", "smallest side of an isotropic voxel", "code", "VoxelFM, when it encodes"),
    "volumes.max_patches": Setting("patches", "of a scan at once, when it is encoded", "code", "VoxelFM"),
    "sampling.ct": Setting("weight", "of CT", "ours", "unpublished; 1 = its natural share"),
    "sampling.mr": Setting("weight", "of MR", "ours", "unpublished; 1 = its natural share"),
    "sampling.other": Setting("weight", "of the rest", "ours", "unpublished; 1 = its natural share"),
    "sampling.volume_power": Setting(
        "exponent", "a volume of n slices (3D: crops) counts n**this", "ours", "unpublished; 1 = every slice alike"
    ),
    "objective.kind": Setting("choice", "dino (with teacher) or lejepa (without)", "paper", "DINO and iBOT"),
    "objective.prototypes": Setting(
        "count", "outputs of each head", "code", "DINOv2's default; 131,072 would outweigh ViT-B"
    ),
    "objective.hidden": Setting("width", "hidden layers of the heads", "code", "DINOv2 vitl14, vitg14"),
    "objective.bottleneck": Setting(
        "width", "last layer before the prototypes", "code", "DINOv2's default, for both heads"
    ),
    "objective.shared_head": Setting("yes/no", "one head for class token and patches", "code", "DINOv2: two heads"),
    "objective.batch_norm": Setting("yes/no", "BatchNorm in the heads", "code", "DINOv2: none"),
    "objective.student_temperature": Setting("temperature", "softmax of the student", "code", "DINOv2"),
    "objective.teacher_temperature": Setting("temperature", "softmax of the teacher, start and end", "code", "DINOv2"),
    "objective.teacher_warmup": Setting(
        "share of run", "from the first to the second", "code", f"{_SHORT}: 37.5k of 125k"
    ),
    "objective.centring": Setting("choice", "how targets are evened out", "code", "DINOv2 vitl14, vitg14: Sinkhorn"),
    "objective.dino_weight": Setting("weight", "of the class-token loss", "code", "DINOv2"),
    "objective.ibot_weight": Setting("weight", "of the masked-patch loss", "code", "DINOv2"),
    "objective.regulariser": Setting("choice", "what spreads the features", "paper", "SigReg instead of KoLeo"),
    "objective.regulariser_weight": Setting(
        "weight", "of the regulariser", "ours", "unpublished; LeJEPA's .05, with its factor N"
    ),
    "objective.regulariser_on": Setting(
        "choice", "what it is taken of", "ours", "unpublished; unit scale is in reach there"
    ),
    "objective.sigreg_slices": Setting("count", "random directions a step", "ours", "unpublished; LeJEPA's 1024"),
    "objective.projector_dim": Setting(
        "width", "LeJEPA's projection", "ours", "read by lejepa only; 32 learnt in minutes (docs/log.md)"
    ),
    "objective.patch_weight": Setting("weight", "LeJEPA's loss on patch tokens", "ours", "read by lejepa only; off"),
    "objective.patch_points": Setting(
        "places", "of a sample that patch tokens are compared at", "ours", "read by lejepa only"
    ),
    "objective.handover": Setting(
        "share of run", "LeJEPA learns first, then DINO", "ours", "0 leaves it out, as Curia-2"
    ),
    "objective.gram_weight": Setting("weight", "of Gram anchoring", "paper", "none; DINOv3 has 2"),
    "objective.gram_start": Setting(
        "share of run", "when the teacher of then becomes the anchor", "ours", "DINOv3: 1 M of 1.2 M steps"
    ),
    "objective.gram_refresh": Setting(
        "share of run", "between renewals of the anchor", "ours", "0 keeps the first; DINOv3: 10,000 steps"
    ),
    "objective.gram_px": Setting("pixels", "side of the anchor's crops", "paper", "DINOv3: twice the student's"),
    "optimiser.lr": Setting(
        "rate", "peak, as applied: not scaled by the batch", "paper", "1e-3; base or applied is not said"
    ),
    "optimiser.warmup": Setting("share of run", "rising learning rate", "code", f"{_SHORT}: 12.5k of 125k"),
    "optimiser.final_lr": Setting("rate", "at the end of the cosine", "code", "DINOv2"),
    "optimiser.weight_decay": Setting("rate", "start and end, cosine", "code", "DINOv2 vitl16_short"),
    "optimiser.betas": Setting("factor", "AdamW's two", "code", "DINOv2"),
    "optimiser.momentum": Setting("factor", "of the teacher, start and end, cosine", "code", "DINOv2 vitl16_short"),
    "optimiser.layer_decay": Setting("factor", "on the rate, a block downwards", "code", "DINOv2 vitl16_short"),
    "optimiser.patch_embed_lr": Setting("factor", "on the rate of the patch embedding", "code", "DINOv2"),
    "optimiser.clip": Setting("norm", "largest gradient of each module", "code", "DINOv2"),
    "optimiser.freeze_last_layer": Setting("share of run", "prototypes at rest", "code", f"{_SHORT}: 1,250 of 125k"),
    "run.steps": Setting("steps", "updates of the weights", "paper", "125,000 iterations of ViT-B"),
    "run.batch_size": Setting(
        "samples", "a step, over all devices", "ours", "what one device holds; every preset has its own"
    ),
    "run.seed": Setting("number", "of everything random", "ours", "any will do"),
    "run.precision": Setting(
        "choice", "of the matrix products; losses are fp32", "ours", "bf16 needs no loss scaling; papers: fp16"
    ),
    "run.accumulate": Setting(
        "micro-batches", "a step", "ours", "1 couples the whole batch, as the paper's devices do"
    ),
    "run.parallel": Setting("choice", "ddp: whole model each; fsdp: shared out", "ours", "B and L fit one device"),
    "run.recompute": Setting(
        "yes/no", "keep only the inputs of blocks (activation checkpointing)", "ours", "the batches fit without"
    ),
    "run.compile": Setting("yes/no", "torch.compile of each block", "ours", "takes minutes once; not for short runs"),
    "run.checkpoint_every": Setting("steps", "lost to a kill at most", "ours", "lost work against time to write"),
    "run.health_every": Setting("steps", "between looks at the features", "ours", "a collapse shows within 200 steps"),
    "run.probe_every": Setting(
        "steps", "between encodings of the same samples", "ours", "below 1 % of the work at 100"
    ),
    "run.on_collapse": Setting("choice", "what to do when the run collapses", "ours", "stopped, it costs less"),
    "run.num_workers": Setting(
        "processes", "that draw and render views", "ours", "spare cores differ; hilum plan says how many it takes"
    ),
}
