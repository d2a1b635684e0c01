"""What a run will cost, and what limits it, before money is spent. Loads no torch."""

import math
import textwrap
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from hilum.archive.store.store import Store
from hilum.errors import UsageError
from hilum.pretrain.cost import (
    backbone_parameters,
    checkpoint_bytes,
    crop_patches,
    crop_tokens,
    flops_per_image,
    head_parameters,
    memory,
)
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.sampling import fitting, modality_weights
from hilum.terminal import WIDTH, wrap_row

UTILISATION = 0.3
UTILISATION_WHY = "assumed; DINOv2's published runs reach 31 to 39 % of an A100, Curia-2's 8 to 19 %"
USABLE = 0.9  # of a device's memory; the rest goes to its context, chunks of logits and gaps between tensors
VIEW_S = 0.0015  # one core reads a 512×512 slice and draws its views; a GPU makes the pixels
VOXEL_S = 2.2e-8  # one core reads, draws and renders a voxel of a crop of a volume
CHECKPOINTS_KEPT = 3  # the last two, and the one being written
MANY_EPOCHS = 200  # DINOv2's short recipe on ImageNet-1k
FAST_DISK = 1e9  # bytes/s that ask for more than an ordinary network file system


@dataclass(frozen=True)
class Device:
    """Peak FLOP/s of dense matrix products, from the data sheet (H200: bf16 as measured); bytes of memory (None: the host)."""

    bf16: float
    fp32: float
    memory: float | None


DEVICES = {
    "A10": Device(125e12, 31.2e12, 24e9),
    "A100": Device(312e12, 19.5e12, 80e9),
    "A100-64GB": Device(312e12, 19.5e12, 64e9),
    "A100-40GB": Device(312e12, 19.5e12, 40e9),
    "B200": Device(2250e12, 75e12, 180e9),
    "H100": Device(989e12, 67e12, 80e9),
    "H200": Device(790e12, 67e12, 141e9),
    "L4": Device(121e12, 30.3e12, 24e9),
    "L40S": Device(362e12, 91.6e12, 48e9),
    "MI300X": Device(1307e12, 163.4e12, 192e9),
    "RTX4090": Device(165e12, 82.6e12, 24e9),
    "cpu": Device(0.2e12, 0.078e12, None),  # one core of an AMD EPYC with AVX-512 bf16, measured
}


@dataclass(frozen=True)
class Hardware:
    """So many devices of one kind; `cpu` counts cores, which together are one device to a run."""

    name: str
    count: int

    @property
    def device(self) -> Device:
        return DEVICES[self.name]

    @property
    def ranks(self) -> int:
        return 1 if self.name == "cpu" else self.count

    def __str__(self) -> str:
        return f"{self.count}x{self.name}"


def parse_hardware(text: str) -> Hardware:
    """`32xA100` → 32 devices of this kind; a name alone is one. UsageError that lists what is known."""
    count, x, name = text.partition("x") if text[:1].isdigit() else ("1", "x", text)
    known = {each.lower(): each for each in DEVICES}
    if not (count.isdigit() and int(count) > 0 and x and name.lower() in known):
        raise UsageError(f"'{text}' is no number of known devices; expected e.g. 32xA100; known: {', '.join(DEVICES)}")
    return Hardware(known[name.lower()], int(count))


@dataclass(frozen=True)
class Figure:
    """One number of a plan and, in a line, where it comes from."""

    value: float
    unit: str
    why: str


@dataclass(frozen=True)
class Plan:
    """figures by name; `limit` says in a sentence what limits the run; `advice` what to do about that and the rest."""

    recipe: str
    hardware: str
    figures: dict[str, Figure]
    limit: str
    advice: tuple[str, ...]


def plan(recipe: Recipe, store: Store | None, hardware: Hardware, *, utilisation: float | None = None) -> Plan:
    """Reckon a run from its recipe, the index of its store and its devices; nothing is measured, no pixel is read.

    store        None leaves out what depends on the data
    utilisation  share of the devices' peak that the matrix products reach, above 0 to 1; as measured, or None for 0.3
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UsageError(f"utilisation must be above 0 and at most 1; found {utilisation}")
    figures = _work(recipe) | _time(recipe, hardware, utilisation) | _space(recipe, hardware)
    if store is not None:
        figures |= _data(recipe, store, figures["images a second"].value)
    limit, advice = _judge(recipe, hardware, figures)
    return Plan(recipe.name, str(hardware), figures, limit, tuple(advice))


def _work(recipe: Recipe) -> dict[str, Figure]:
    run, flops = recipe.run, flops_per_image(recipe)
    tokens = [round(count * each) for count, each in crop_tokens(recipe)]
    images = run.steps * run.batch_size
    parts = ", ".join(f"{n} {_scale(getattr(flops, n), 'FLOP')}" for n in ("student", "teacher", "heads"))
    return {
        "steps": Figure(run.steps, "", "run.steps"),
        "images": Figure(images, _what(recipe), f"{run.steps:,} steps × {run.batch_size:,}, repetitions counted"),
        "tokens a step": Figure(
            run.batch_size * sum(tokens),
            "",
            f"{tokens[0]:,} global + {tokens[1]:,} local a {_what(recipe, 1)}, student's",
        ),
        "FLOPs an image": Figure(flops.total, "FLOP", f"matrix products: {parts}"),
        "FLOPs of the run": Figure(flops.total * images, "FLOP", "the product of the two"),
    }


def _time(recipe: Recipe, hardware: Hardware, utilisation: float | None) -> dict[str, Figure]:
    precision = recipe.run.precision
    peak = hardware.device.bf16 if precision == "bf16" else hardware.device.fp32
    share = utilisation or UTILISATION
    work = flops_per_image(recipe).total * (1 + _again(recipe) if recipe.run.recompute else 1)
    rate = hardware.count * peak * share / work
    hours = recipe.run.steps * recipe.run.batch_size / rate / 3600
    again = f", less {_again(recipe):.0%} work done twice" if recipe.run.recompute else ""
    return {
        "utilisation": Figure(share, "of peak", UTILISATION_WHY if utilisation is None else "as given"),
        "images a second": Figure(
            rate, f"{_what(recipe)}/s", f"{hardware} at {peak / 1e12:g} TFLOP/s {precision}, times utilisation{again}"
        ),
        "hours": Figure(hours, "h", "images / images a second"),
        "device hours": Figure(hours * hardware.count, "h", f"hours × {hardware.count:,}"),
    }


def _space(recipe: Recipe, hardware: Hardware) -> dict[str, Figure]:
    shares = hardware.ranks * recipe.run.accumulate
    batch = math.ceil(recipe.run.batch_size / shares)
    recompute, shards = recipe.run.recompute, _shards(recipe, hardware)
    held, other = (memory(recipe, batch, checkpoint_blocks=flag, shards=shards) for flag in (recompute, not recompute))
    backbone, heads = backbone_parameters(recipe.model) / 1e6, head_parameters(recipe) / 1e6
    kept = "only the blocks' inputs kept" if recompute else "all activations kept"
    pieces = f" and {recipe.run.accumulate} micro-batches" if recipe.run.accumulate > 1 else ""
    model = "whole model on each" if shards == 1 else f"model shared out over {shards}"
    return {
        "batch a device": Figure(
            batch, _what(recipe), f"at once: {recipe.run.batch_size:,} over {hardware.ranks:,} devices{pieces}"
        ),
        "memory a device": Figure(held.total, "B", f"{model}, {kept}; the sum of:"),
        "  weights": Figure(held.weights, "B", f"fp32; {backbone:.1f} M in the backbone, {heads:.1f} M in the heads"),
        "  casts": Figure(held.casts, "B", "weights in bf16, kept by autocast"),
        "  gradients": Figure(held.gradients, "B", "fp32"),
        "  moments": Figure(held.moments, "B", "Adam's two, fp32"),
        "  teacher": Figure(held.teacher, "B", "fp32, the momentum copy"),
        "  activations": Figure(held.activations, "B", "kept by the student's blocks for the backward pass"),
        "  heads": Figure(held.heads, "B", "hidden layers, and the teacher's assignments to prototypes"),
        f"  {'without' if recompute else 'with'} recompute": Figure(
            other.total,
            "B",
            f"in all; run.recompute keeps only the blocks' inputs, for {_again(recipe):.0%} more FLOPs",
        ),
        **_room(recipe, hardware),
        "disk": Figure(
            CHECKPOINTS_KEPT * checkpoint_bytes(recipe),
            "B",
            f"{CHECKPOINTS_KEPT} checkpoints: two kept, one being written",
        ),
    }


def _what(recipe: Recipe, count: int = 2) -> str:
    """What a recipe trains on, as a word."""
    return ("volume" if recipe.is_3d else "slice") + ("s" if count > 1 else "")


def _shards(recipe: Recipe, hardware: Hardware) -> int:
    return hardware.ranks if recipe.run.parallel == "fsdp" else 1


def _again(recipe: Recipe) -> float:
    """FLOPs that recompute adds: the student's forward pass once more, as a share of all."""
    flops = flops_per_image(recipe)
    return flops.student / 3 / flops.total


def _room(recipe: Recipe, hardware: Hardware) -> dict[str, Figure]:
    """The largest batches that fit, where the memory is known."""
    size = hardware.device.memory
    if size is None:
        return {}

    def largest(checkpoint_blocks: bool, shards: int) -> int:
        empty, one = (memory(recipe, n, checkpoint_blocks=checkpoint_blocks, shards=shards).total for n in (0, 1))
        return max(int((USABLE * size - empty) / (one - empty)), 0)

    ways = {
        "largest batch a device": Figure(
            largest(False, _shards(recipe, hardware)), _what(recipe), f"at once, in {USABLE:.0%} of {size / 1e9:g} GB"
        ),
        "  recomputed": Figure(largest(True, _shards(recipe, hardware)), _what(recipe), "with run.recompute"),
    }
    if hardware.ranks > 1 and recipe.run.parallel == "ddp":
        shared = largest(True, hardware.ranks)
        ways["  and shared out"] = Figure(shared, _what(recipe), f"and run.parallel=fsdp over {hardware.ranks}")
    return ways


def _data(recipe: Recipe, store: Store, rate: float) -> dict[str, Figure]:
    images = recipe.run.steps * recipe.run.batch_size
    if recipe.is_3d:
        return _volume_data(recipe, store, rate, images)
    least = recipe.views.min_image_foreground
    training = sum(int((levels >= least * 255).sum()) for _, _, levels in store.foreground())
    a_slice = int(pc.sum(store.rows.table["bytes"]).as_py() or 0) / max(store.num_slices, 1)
    return {
        "training slices": Figure(
            training, "", f"of {store.num_slices:,} in {len(store):,} volumes, with {least:.0%} anatomy or more"
        ),
        "epochs": Figure(images / max(training, 1), "", "images / training slices"),
        "reading": Figure(rate * a_slice, "B/s", f"images a second × {a_slice / 1e3:.0f} kB a slice in the store"),
    }


def _volume_data(recipe: Recipe, store: Store, rate: float, images: int) -> dict[str, Figure]:
    """Volumes that fit a shape; of each the crops are read, as a whole at most."""
    volumes, weights = recipe.volumes, modality_weights(store, recipe.sampling)
    sides = np.array(store.rows.table["shape"].to_pylist(), np.int64).reshape(-1, 3)
    fits = np.logical_or.reduce([fitting(sides, large, volumes.min_share) for large, *_ in volumes.shapes])
    training, wanted = int((fits & (weights > 0)).sum()), int((weights > 0).sum())
    a_volume = int(pc.sum(store.rows.table["bytes"]).as_py() or 0) / max(len(store), 1)
    return {
        "training volumes": Figure(training, "", f"of {wanted:,} of the modalities asked for; the others fit no shape"),
        "epochs": Figure(images / max(training, 1), "", "images / training volumes"),
        "reading": Figure(
            rate * a_volume, "B/s", f"at most: images a second × {a_volume / 1e6:.1f} MB a volume in the store"
        ),
    }


def _judge(recipe: Recipe, hardware: Hardware, figures: dict[str, Figure]) -> tuple[str, list[str]]:
    """What limits the run, the first that holds of: batch, memory, views, slices, compute. And advice on all of them."""
    if not recipe.run.steps:
        return "Nothing limits it: no step is trained.", []
    found: list[tuple[str, str]] = []
    batch, ranks, pieces = recipe.run.batch_size, hardware.ranks, recipe.run.accumulate
    if batch % (ranks * pieces):
        shares = f"{ranks}" if pieces == 1 else f"{ranks} × {pieces} micro-batches"
        found.append(
            (
                f"the batch: {batch:,} {_what(recipe)} cannot be shared out evenly over {shares}",
                _split(batch, ranks * pieces),
            )
        )
    found += _judge_memory(recipe, hardware, figures)
    view_s = _view_seconds(recipe)
    workers = math.ceil(figures["images a second"].value / ranks * view_s)
    if recipe.run.num_workers and workers > recipe.run.num_workers:
        found.append(
            (
                f"making views: {workers} cores a device at {view_s * 1e3:.3g} ms a {_what(recipe, 1)}, and run.num_workers is "
                f"{recipe.run.num_workers}",
                f"--set run.num_workers={workers}, if there are so many cores for each device",
            )
        )
    if "epochs" in figures:
        found += _judge_data(recipe, figures)
    if not found:
        hours, share = figures["hours"].value, figures["utilisation"].value
        time = _text(Figure(hours, "h", ""))
        found.append((f"compute, {time} at {share:.0%} of the peak; nothing else stands in the way", ""))
    return f"What limits it: {found[0][0]}.", [advice for _, advice in found if advice]


def _view_seconds(recipe: Recipe) -> float:
    """One core's time to make what the workers make of a sample for a GPU."""
    if not recipe.is_3d:
        return VIEW_S
    large, small = crop_patches(recipe)
    views = recipe.views
    return (views.num_global * large + views.num_local * small) * math.prod(recipe.model.patch) * VOXEL_S


def _split(batch: int, ranks: int) -> str:
    """The nearest batch, and the nearest smaller number of devices, that come out even."""
    near = max(round(batch / ranks), 1) * ranks
    fewer = max(n for n in range(1, ranks) if batch % n == 0)
    return f"--set run.batch_size={near}, or take {fewer} devices"


def _judge_memory(recipe: Recipe, hardware: Hardware, figures: dict[str, Figure]) -> list[tuple[str, str]]:
    size, batch = hardware.device.memory, figures["batch a device"].value
    as_set = "  recomputed" if recipe.run.recompute else "largest batch a device"
    if size is None or batch <= figures[as_set].value:
        return []
    need = f"memory: {_text(figures['memory a device'])}, where a device has {size / 1e9:g} GB"
    ways = {
        "--set run.recompute=true": "  recomputed",
        "--set run.recompute=true --set run.parallel=fsdp": "  and shared out",
    }
    room = 0.0
    for way, name in ways.items():
        if name in figures:
            room = max(room, figures[name].value)
            if batch <= room:
                return [(need, way)]
    if not room:
        return [
            (
                need,
                f"not even one {_what(recipe, 1)} fits: take devices with more memory, or more of them with --set "
                "run.parallel=fsdp",
            )
        ]
    pieces = next(n for n in range(math.ceil(batch / room), int(batch) + 1) if n == batch or batch % n == 0)
    more = f"--set run.accumulate={recipe.run.accumulate * pieces}, or {math.ceil(batch / room)} times the devices"
    return [(need, f"--set run.recompute=true --set run.parallel=fsdp, and {more}")]


def _judge_data(recipe: Recipe, figures: dict[str, Figure]) -> list[tuple[str, str]]:
    what = _what(recipe)
    training, epochs, reading = (figures[n].value for n in (f"training {what}", "epochs", "reading"))
    found = []
    if reading > FAST_DISK:
        found.append((f"reading: {_text(figures['reading'])} from the store", "copy the store to disks of the nodes"))
    if training < recipe.run.batch_size:
        lower = "volumes.min_share" if recipe.is_3d else "views.min_image_foreground"
        advice = f"bring more scans, take a smaller batch, or lower {lower}"
        found.append((f"too few {what}: {training:,.0f} for a batch of {recipe.run.batch_size:,}", advice))
    elif epochs > MANY_EPOCHS:
        steps = int(MANY_EPOCHS * training / recipe.run.batch_size)
        advice = f"bring more scans, or --set run.steps={steps} for {MANY_EPOCHS} epochs, DINOv2's on ImageNet-1k"
        found.append((f"too few {what}: each is seen {epochs:,.0f} times", advice))
    elif epochs < 1:
        found.append(
            (f"too few steps: {1 - epochs:.0%} of the {what} are never seen", "raise run.steps if they matter")
        )
    return found


def format_plan(plan: Plan) -> str:
    """The plan on a page of at most 100 columns."""
    names, values = list(plan.figures), [_text(figure) for figure in plan.figures.values()]
    widths = [max(map(len, names)), max(map(len, values))]
    rows = [
        wrap_row([name, value.rjust(widths[1])], widths, figure.why)
        for name, value, figure in zip(names, values, plan.figures.values())
    ]
    notes = [f"· {advice}" for advice in plan.advice]
    if "epochs" not in plan.figures:
        notes.append("· Without --data, epochs and the rate of reading are left out.")
    paragraphs = [
        textwrap.fill(text, WIDTH, subsequent_indent="  " * text.startswith("·")) for text in [plan.limit, *notes]
    ]
    return "\n".join([f"{plan.recipe} on {plan.hardware}", "", *rows, "", *paragraphs])


_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _text(figure: Figure) -> str:
    """The value with its unit, to three or four digits; counts whole."""
    value, unit = figure.value, figure.unit
    if unit in ("B", "B/s", "FLOP"):
        return _scale(value, unit)
    if unit == "h" and 0 < value < 1:
        value, unit = value * 60, "min"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{number} {unit}".rstrip()


def _scale(value: float, unit: str) -> str:
    scale, prefix = next(((s, p) for s, p in _PREFIXES if value >= s), (1.0, ""))
    return f"{value / scale:{'.3g' if value / scale < 999.5 else '.0f'}} {prefix}{unit}"
