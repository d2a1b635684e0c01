"""The demo's report: one page that shows what each stage did, with pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hilum import figures
from hilum.archive.files.nifti import read_label
from hilum.archive.ledger import Entry, count
from hilum.archive.phantom import ORGAN
from hilum.archive.privacy import Key
from hilum.archive.reasons import REASONS
from hilum.archive.store.store import Store
from hilum.encode.contract import normalise_slice, prepare_slice
from hilum.encode.encoder import Encoder
from hilum.encode.table.sources import read_mask_table
from hilum.encode.zoo import open_folder
from hilum.pages import Page
from hilum.pretrain.loader import Slices
from hilum.pretrain.loop import read_lines, training_samples
from hilum.pretrain.masks import sample_block_mask
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.sampling import sample_rng
from hilum.pretrain.views import Box

MAP_PX = 256  # maps are drawn at twice the training size: positions are interpolated
METRIC_NAMES = {"accuracy": "accuracy", "auroc": "AUROC", "r2": "R²", "balanced_accuracy": "balanced accuracy"}


@dataclass(frozen=True)
class Task:
    """One comparison of the report.

    level, target, task   as for `hilum probe`; both targets are columns of the features themselves
    metric                the score that is reported
    """

    name: str
    question: str
    level: str
    target: str
    task: str
    metric: str


def write_report(
    path: Path,
    out: Path,
    archive: Path,
    key: Key,
    entries: Sequence[Entry],
    recipe: Recipe,
    tasks: Sequence[Task],
    scores: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Write `report.html` from what the demo's stages left in `out`."""
    store = Store(out / "store")
    page = Page(
        "hilum: the whole way, once",
        "A phantom archive of CT and MR became a clean store; a small vision transformer was pre-trained on it without "
        "labels, with Curia-2's crops, masks and SigReg; frozen, it is judged against the same network untrained and "
        "against raw pixels.",
    )
    _add_scores(page, tasks, scores)
    _add_ledger(page, entries)
    examples = _examples(store, archive, key)
    _add_slices(page, examples)
    _add_views(page, store, recipe)
    _add_masks(page, examples, recipe)
    _add_curves(page, out)
    encoder = open_folder(out / "run" / "export")
    _add_maps(page, encoder, examples)
    _add_record(page, recipe, encoder, record)
    page.write(path)


def _add_scores(page: Page, tasks: Sequence[Task], scores: dict[str, Any]) -> None:
    page.section(
        "Does pre-training pay?",
        "Linear heads on frozen features, five folds, no patient on both sides. Intervals: 95 %, whole patients resampled.",
    )
    methods = list(next(iter(scores.values()))["methods"])
    rows, best = [], []
    for number, task in enumerate(tasks):
        found = scores[task.name]
        values = [found["methods"][m] for m in methods]
        top = max(range(len(values)), key=lambda n, v=values: v[n]["value"])  # type: ignore[misc]
        best.append((number, 2 + top))
        cells = [f"{v['value']:.3f} ({v['low']:.3f}–{v['high']:.3f})" for v in values]
        rows.append([task.question, METRIC_NAMES[task.metric], *cells, f"{found['num_cases']:,}"])
    page.table(["task", "score", *methods, "cases"], rows, best)
    panels = [
        (
            f"{task.name} · {METRIC_NAMES[task.metric]}",
            [(m, v["value"], v["low"], v["high"]) for m, v in scores[task.name]["methods"].items()],
        )
        for task in tasks
    ]
    page.figure(
        figures.intervals(panels), "Scores with their 95 % intervals. Intervals that do not overlap: a clear gain."
    )
    gains = [
        f"{task.name}: {d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}) against {other}"
        for task in tasks
        for other, d in scores[task.name]["differences"].items()
    ]
    page.note("Paired differences, pre-trained minus the other, same patients: " + "; ".join(gains) + ".")


def _add_ledger(page: Page, entries: Sequence[Entry]) -> None:
    counts = count(entries)
    page.section(
        "The archive's ledger",
        f"{counts['num_files']:,} files. {counts['num_used']:,} scans of {counts['num_patients']} patients are used "
        f"({counts['num_files_used']:,} files, {counts['num_slices']:,} slices); every other file is refused by name.",
    )
    rows = [["used", f"{n:,} scans", modality, ""] for modality, n in counts["modalities"].items()]
    for reason, row in counts["refused"].items():
        rows.append(["refused", f"{row['files']:,} file{'s' * (row['files'] != 1)}", reason, REASONS[reason].sentence])
    page.table(["verdict", "how many", "what", "why"], rows)


class Example:
    """One slice of the store with its organ labels, for pictures."""

    def __init__(self, store: Store, series: str, organs: NDArray[Any], z: int, title: str) -> None:
        self.row = store.row(series)
        self.pixels, self.content = store.read_slice(series, z)
        self.organs, self.title = organs[z], title

    @property
    def picture(self) -> tuple[NDArray[np.float32], str, str]:
        return self.pixels, self.row.unit, self.title

    def center_of(self, organ: str) -> tuple[float, float] | None:
        """The pixel of an organ nearest to its centroid, as fractions (y, x); None when it is not in the slice."""
        points = np.argwhere(self.organs == ORGAN[organ])
        if len(points) < 12:
            return None
        y, x = points[np.abs(points - points.mean(0)).sum(1).argmin()]
        return (y + 0.5) / self.organs.shape[0], (x + 0.5) / self.organs.shape[1]


def _examples(store: Store, archive: Path, key: Key, num_patients: int = 3) -> list[Example]:
    """CT and MR of a few patients at the level of the upper abdomen and the chest."""
    masks = read_mask_table(archive / "series.csv", key)
    by_patient: dict[Path, list[str]] = {}
    for series, mask in masks.items():
        by_patient.setdefault(mask, []).append(series)
    examples = []
    for number, (mask, series_of) in enumerate(sorted(by_patient.items())[:num_patients], 1):
        organs = read_label(mask).voxels
        kidney = int(np.isin(organs, (ORGAN["kidney_left"], ORGAN["kidney_right"])).sum((1, 2)).argmax())
        heart = int((organs == ORGAN["heart"]).sum((1, 2)).argmax())
        for series in sorted(series_of, key=lambda s: store.row(s).modality):
            for place, z in (("abdomen", (kidney + heart) // 2), ("chest", heart)):
                title = f"patient {number}, {store.row(series).modality}, {place}"
                examples.append(Example(store, series, organs, z, title))
    return examples


def _add_slices(page: Page, examples: Sequence[Example]) -> None:
    page.section(
        "What is in the store",
        "CT and MR of the same anatomy: CT from Hounsfield values of each tissue, MR from its proton density and relaxation "
        "times. The patient's right is on the left of the picture.",
    )
    ct = [e.picture for e in examples if e.row.modality == "CT"]
    mr = [e.picture for e in examples if e.row.modality == "MR"]
    page.figure(figures.slice_grid(ct + mr), "Soft-tissue window for CT (−160 to 240 HU), percentiles for MR.")


def _add_views(page: Page, store: Store, recipe: Recipe) -> None:
    spec = recipe.views
    slices = training_samples(store, recipe)
    assert isinstance(slices, Slices)
    shown: list[tuple[NDArray[Any], str, list[Box], list[Box], list[NDArray[Any]]]] = []
    for sample in range(recipe.run.batch_size):
        drawn = slices.draw(sample)
        rejected = [box for view in drawn.views for box in view.rejected]
        if rejected or not shown:
            pixels, _ = store.read_slice(drawn.key, drawn.z)
            image = normalise_slice(pixels, drawn.source.unit, slices.contract)[0].numpy()
            shown.append((image, "", [v.box for v in drawn.views], rejected, slices.render_alone(drawn)))
        if len(shown) == 4:
            break
    page.section(
        "Content-aware crops",
        f"Slices with less than {spec.min_image_foreground:.0%} anatomy are not trained on, and crops with less than "
        f"{spec.min_crop_foreground:.0%} are drawn again. {slices.num_slices:,} of "
        f"{store.num_slices:,} slices remain.",
    )
    page.figure(
        figures.crop_grid(shown),
        f"Left: the {spec.num_global} global and {spec.num_local} local boxes taken (green) and those drawn again (red, "
        "dashed). Right: the crops as the network sees them, first the global ones.",
    )


def _add_masks(page: Page, examples: Sequence[Example], recipe: Recipe) -> None:
    spec = recipe.views
    side = spec.global_px // recipe.model.patch[0]
    num_patches = int(side**2 * sum(spec.mask_ratio) / 2)
    shown: list[tuple[NDArray[Any], str, NDArray[Any], NDArray[Any]]] = []
    for example in (examples[0], examples[2]):
        frequencies = []
        for center in (None, example.content.center):
            rng = sample_rng(recipe.run.seed, 1)
            masks = [sample_block_mask(rng, (side, side), num_patches, center, spec.mask_sigma) for _ in range(600)]
            frequencies.append(np.mean(masks, 0))
        shown.append((example.pixels, example.row.unit, frequencies[0], frequencies[1]))
    page.section(
        "Where masks fall",
        "The same number of patches is hidden either way. Uniform blocks spend part of it on air; guided blocks are "
        f"drawn around the centre of the anatomy (Gaussian, sigma {spec.mask_sigma:.2f} of the crop).",
    )
    page.figure(
        figures.mask_maps(shown), "How often each patch of a crop of the whole slice is hidden, over 600 draws."
    )


def _add_curves(page: Page, out: Path) -> None:
    lines = list(read_lines(out / "run" / "metrics.jsonl"))

    def series(name: str) -> tuple[str, NDArray[Any], NDArray[Any]]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return name.replace("_", " "), steps, values

    known = set().union(*lines)
    terms = [n for n in ("invariance", "patch_invariance", "dino", "ibot") if n in known]
    panels: list[tuple[str, list[Any]]] = [
        ("objective", [series(n) for n in terms]),
        ("SigReg, N·∫ (1.06 = Gaussian)", [series(n) for n in ("sigreg", "koleo") if n in known]),
        ("learning rate", [series("lr")]),
        ("feature spread (0 = collapse, 1 = isotropic)", [series("spread")]),
        ("effective rank of a batch (RankMe)", [series("rank")]),
        ("anatomy in the crops", [series("foreground")]),
    ]
    page.section(
        "Loss and health", "Nothing is labelled here: these curves say whether the network learns or collapses."
    )
    page.figure(figures.curves([p for p in panels if p[1]]), "Thin: every step; thick: mean of 21 steps.")


def _token_map(encoder: Encoder, example: Example) -> NDArray[np.float32]:
    """Patch tokens (rows, columns, D) of a slice shown at MAP_PX."""
    contract = replace(encoder.slice_contract, size_px=MAP_PX)
    image = prepare_slice(example.pixels, example.row.modality, example.row.unit, contract)
    tokens = encoder.tokens(image[None]).patches[0]
    side = MAP_PX // encoder.patch[0]
    found: NDArray[np.float32] = tokens.view(side, side, -1).numpy()
    return found


def _foreground(example: Example, side: int) -> NDArray[np.bool_]:
    grid = torch.from_numpy(example.content.grid.copy())[None]
    inside: NDArray[np.bool_] = (functional.adaptive_avg_pool2d(grid, side)[0] > 0.5).numpy()
    return inside


def _add_maps(page: Page, encoder: Encoder, examples: Sequence[Example]) -> None:
    tokens = [_token_map(encoder, e) for e in examples]
    side = tokens[0].shape[0]
    page.section(
        "What the patches know",
        "No label was used. One colour map serves all slices, so colours can be compared across patients and across CT and "
        "MR: where they agree, the network finds the same thing.",
    )
    chosen = [n for n, e in enumerate(examples) if "abdomen" in e.title]
    page.figure(
        figures.pca_maps(
            [examples[n].picture for n in chosen],
            [tokens[n] for n in chosen],
            [_foreground(examples[n], side) for n in chosen],
        ),
        "First three principal components of the patch tokens as red, green and blue.",
    )
    query = chosen[0]
    targets = chosen[1:4]
    points: list[tuple[str, float, float, list[NDArray[np.float32]]]] = []
    for organ in ("liver", "spine", "spleen", "kidney_left", "aorta", "stomach"):
        at = examples[query].center_of(organ)
        if at is None or len(points) == 3:
            continue
        vector = tokens[query][int(at[0] * side), int(at[1] * side)]
        maps = [_cosine(tokens[n], vector) for n in targets]
        points.append((organ.replace("_", " "), at[0], at[1], maps))
    page.figure(
        figures.similarity_maps(examples[query].picture, [examples[n].picture for n in targets], points),
        "Cosine similarity of every patch to the marked one (bright = alike), in MR of the same patient and in another's "
        "CT and MR.",
    )


def _cosine(tokens: NDArray[np.float32], vector: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(vector)
    out: NDArray[np.float32] = tokens @ vector / np.maximum(norms, 1e-12)
    return out


def _add_record(page: Page, recipe: Recipe, encoder: Encoder, record: dict[str, Any]) -> None:
    page.section(
        "How to repeat it",
        f"Recipe `{recipe.name}`: {recipe.run.steps:,} steps of {recipe.run.batch_size} slices, objective "
        f"`{recipe.objective.kind}`; contract `{encoder.contract.hash}`.",
    )
    page.code(
        "hilum phantom  -o phantom\nhilum scan     phantom/scans -o ledger.parquet\nhilum prepare  phantom/scans -o store\n"
        "hilum pretrain tiny --data store -o run\n"
        "hilum embed    store --model run/export --level region --masks phantom/series.csv -o organs.parquet\n"
        "hilum probe    organs.parquet --target region"
    )
    stages = [[name, f"{s:.0f} s"] for name, s in record["seconds"].items()]
    page.table(["stage", "time"], stages)
    machine, versions = record["machine"], record["versions"]
    page.note(
        f"{machine['processor']}, {machine['num_cores']} cores, {machine['memory_gib']} GiB; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
