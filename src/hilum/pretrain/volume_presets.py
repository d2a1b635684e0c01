"""What the presets for volumes change (`presets.py`): VoxelFM's code and paper, Curia-2 in 3D, and two for a CPU.

VoxelFM is arXiv 2604.04133 with its public code. Where the two differ `voxelfm` has the code's value and `voxelfm-paper` the
paper's; "paper" and "code" are VoxelFM's here, unless another is named.
"""

from hilum.pretrain.origins import Change, Origin
from hilum.pretrain.volume_spec import Shape


def _intensity(values: dict[str, float], origin: Origin, why: str) -> tuple[Change, ...]:
    """Changes of intensity, by modality and name."""
    return tuple(Change(f"views.{name}", value, origin, why) for name, value in values.items())


_NO_CHANGE = dict.fromkeys(
    (
        "ct.gain",
        "ct.offset",
        "ct.noise",
        "ct.blur",
        "ct.window",
        "mr.gain",
        "mr.offset",
        "mr.gamma",
        "mr.noise",
        "mr.blur",
    ),
    0.0,
)
_MADE_FOR_SLICES = dict.fromkeys(("ct.blur", "ct.window", "mr.blur"), 0.0)
_AS_SLICES = {
    "ct.gain": 0.02,
    "ct.offset": 10.0,
    "ct.noise": 25.0,
    "mr.gain": 0.2,
    "mr.offset": 0.2,
    "mr.gamma": 0.15,
    "mr.noise": 0.05,
}


def _cubes(large: int, small: int) -> tuple[Shape, Shape, float]:
    return (large, large, large), (small, small, small), 1.0


VOXELFM = (
    Change("model.size", "voxelfm-base", "paper", "864 wide, 12 deep, 12 heads"),
    Change("model.patch", (14, 14, 14), "paper", "patch 14"),
    Change("model.image", (112, 112, 112), "paper", "112³ voxels"),
    Change("model.positions", "rotary", "code", "rotary positions along three axes"),
    Change("model.num_registers", 4, "code", "four"),
    Change("model.norm_eps", 1e-5, "code", "1e-5"),
    Change("model.layer_scale", 1e-5, "code", "1e-5"),
    Change("model.drop_path", 0.1, "code", "0.1"),
    Change("views.global_scale", (0.32, 1.0), "code", "linear, of the shortest side"),
    Change("views.local_scale", (0.05, 0.32), "code", "linear, of the shortest side"),
    Change("views.min_crop_foreground", 0.0, "code", "it does not look at the content"),
    *_intensity(_NO_CHANGE, "code", "windows of quantiles only"),
    Change("views.mask_group", 16, "code", "the micro-batch of a device"),
    Change("views.mask_probability", 0.5, "code", "half of the crops; the paper says half of the patches"),
    Change("views.mask_ratio", (0.1, 0.5), "code", "10 to 50 %"),
    Change("views.mask_prior", "uniform", "code", "blocks fall anywhere"),
    Change(
        "volumes.shapes",
        (
            _cubes(112, 56),
            ((56, 154, 154), (28, 84, 84), 0.25),
            ((28, 224, 224), (14, 112, 112), 0.25),
        ),
        "ours",
        "the code draws from a list, the run's is unpublished; as many patches in long shapes, for thin slabs",
    ),
    Change("sampling.mr", 0.0, "paper", "CT only"),
    Change("sampling.other", 0.0, "paper", "CT only"),
    Change("sampling.volume_power", 0.0, "code", "every volume alike"),
    Change("objective.shared_head", True, "code", "one head; the paper has two"),
    Change("objective.centring", "ema", "code", "running mean with momentum 0.9"),
    Change("objective.regulariser", "koleo", "code", "KoLeo"),
    Change("objective.regulariser_weight", 0.1, "code", "0.1"),
    Change("optimiser.lr", 1e-3, "code", "1e-3, not scaled by the batch"),
    Change("optimiser.weight_decay", (0.04, 0.2), "code", "0.04 to 0.2"),
    Change("optimiser.momentum", (0.994, 0.994), "code", "constant"),
    Change("run.steps", 100_000, "code", "100 × 1,000"),
    Change("run.batch_size", 2048, "code", "8 devices × 16, accumulated 16 times"),
    Change("run.accumulate", 16, "code", "16 micro-batches"),
    Change("run.num_workers", 14, "ours", "crops are made by the workers; hilum plan says how many it takes"),
)

PAPER = (
    Change("views.global_scale", (0.3, 1.0), "paper", "30 to 100 % of the volume"),
    Change("views.local_scale", (0.05, 0.3), "paper", "5 to 30 % of the volume"),
    Change("views.mask_probability", 1.0, "paper", "half of the patches of every crop"),
    Change("views.mask_ratio", (0.5, 0.5), "paper", "half of the patches of every crop"),
    Change("volumes.shapes", (_cubes(112, 56),), "paper", "its table of settings has one pair"),
    Change("volumes.scale_of", "volume", "paper", "shares of the volume"),
    Change("volumes.flip_locals", True, "paper", "every view is flipped"),
    Change("volumes.window_views", "all", "paper", "every view is windowed"),
    Change("objective.shared_head", False, "paper", "two projection heads"),
    Change("objective.teacher_temperature", (0.07, 0.07), "paper", "constant 0.07"),
)

_LOOKS_AT_CONTENT = (
    Change("views.min_crop_foreground", 0.3, "paper", "Curia-2: at most 70 % background"),
    Change("views.mask_prior", "guided", "paper", "Curia-2: around the anatomy"),
    *_intensity(_AS_SLICES, "ours", "as Curia-2's slices here"),
    Change("sampling.mr", 1.0, "paper", "Curia-2: CT and MR"),
    Change("sampling.other", 1.0, "ours", "whatever else there is, as in slices"),
    Change("volumes.mirror", False, "ours", "left and right are different organs; rotations stay"),
)

CURIA2_3D = (
    *_LOOKS_AT_CONTENT,
    Change("volumes.permute", "fitting", "ours", "long shapes along the long axes of slabs and stacks"),
    Change("volumes.window", 0.2, "ours", "as slices here; half of them flatten too much"),
    Change("volumes.window_views", "all", "ours", "either global crop may be the teacher's"),
    Change("objective.shared_head", False, "code", "DINOv2's long recipes, which Curia has: two heads"),
    Change("objective.centring", "sinkhorn", "code", "DINOv2's long recipes, which Curia has"),
    Change("objective.regulariser", "sigreg", "paper", "Curia-2: SigReg instead of KoLeo"),
    Change("objective.regulariser_weight", 0.05, "ours", "unpublished; LeJEPA's .05, with its factor N"),
)

SMALL3D = (
    Change("model.patch", (8, 8, 8), "ours", "small volumes have few patches of 14"),
    Change("model.image", (48, 48, 48), "ours", "216 patches"),
    Change("model.positions", "rotary", "code", "VoxelFM: scans are encoded at any size"),
    Change("views.global_scale", (0.4, 1.0), "ours", "of the shortest side; small volumes lose detail below"),
    Change("views.local_scale", (0.2, 0.5), "ours", "of the shortest side; small volumes lose detail below"),
    *_intensity(_MADE_FOR_SLICES, "ours", "made for slices only"),
    Change(
        "volumes.shapes",
        (
            ((48, 48, 48), (24, 24, 24), 0.75),
            ((16, 80, 80), (8, 40, 40), 0.25),
        ),
        "ours",
        "about 200 patches; the long shape is for thin slabs and few slices",
    ),
    Change(
        "volumes.permute",
        "needed",
        "ours",
        "scans lie alike; some hundred steps have no time for 24 ways to turn them",
    ),
    Change("volumes.flip", 0.0, "ours", "left and right are different organs, as in slices"),
    Change("volumes.mirror", False, "ours", "left and right are different organs; rotations stay"),
    Change("volumes.window", 0.2, "ours", "as slices here; half of them flatten too much"),
    Change("volumes.window_views", "all", "ours", "LeJEPA's views have no order"),
    Change("volumes.max_patches", 4096, "ours", "what a CPU encodes in seconds"),
    Change("sampling.volume_power", 0.0, "code", "VoxelFM: every volume alike"),
    Change("optimiser.lr", 2e-3, "ours", "as tiny"),
    Change("run.steps", 500, "ours", "some ten minutes on two cores"),
)
