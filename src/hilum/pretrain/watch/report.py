"""The page of a run: how it goes, what it was told to do, curves, training samples, what its features see, events."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.errors import InputError
from hilum.figures import REJECTED, SERIES
from hilum.pages import Page
from hilum.pretrain.loop import read_lines
from hilum.pretrain.presets import RECIPES
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch.diagnose import RULES
from hilum.pretrain.watch.pictures import Chart, charts, pca_over_time, sample_sheet, similarity_over_time
from hilum.pretrain.watch.rescue import Events
from hilum.pretrain.watch.samples import read_samples
from hilum.records import read_json
from hilum.settings import differences, from_dict, to_dict

MAX_COLUMNS = 6  # moments that are pictured
MAX_POINTS = 2000  # of one curve


@dataclass(frozen=True)
class Story:
    """All that a run folder says.

    lines   of metrics.jsonl
    events  of events.jsonl
    """

    folder: Path
    record: dict[str, Any]
    recipe: Recipe
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def curve(self, name: str, label: str | None = None) -> tuple[str, NDArray[Any], NDArray[Any]]:
        """(label, steps, values) of a number, where it was logged; thinned to 2,000 points."""
        pairs = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        pairs = pairs[:: -(-len(pairs) // MAX_POINTS) or 1]
        return label or name, np.array([s for s, _ in pairs]), np.array([v for _, v in pairs], float)

    def last(self, name: str, count: int = 1) -> float | None:
        """Median of the last `count` values."""
        values = self.curve(name)[2][-count:]
        return float(np.median(values)) if len(values) else None


def read_story(folder: Path) -> Story:
    """InputError when the folder is no run."""
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder} is no run folder; expected run.json, as hilum pretrain writes")
    record = read_json(folder / "run.json")
    if record.get("format") != "hilum-run":
        raise InputError(f"{folder}/run.json is {record.get('format')}; expected hilum-run")
    recipe = from_dict(Recipe, record["recipe"], f"{folder}/run.json")
    return Story(folder, record, recipe, list(read_lines(folder / "metrics.jsonl")), Events(folder).read())


def show_run(folder: str | Path, out: str | Path) -> dict[str, Any]:
    """Write one self-contained HTML page about a run, finished or not.

    returns  status, num_steps, num_events, num_snapshots
    """
    story = read_story(Path(folder))
    done = story.lines[-1]["step"] + 1 if story.lines else 0
    status = "finished" if story.record["status"] == "finished" else f"at step {done:,} of {story.recipe.run.steps:,}"
    page = Page(f"Pre-training {story.recipe.name}: {status}", _lead(story))
    _add_verdict(page, story)
    if story.lines:
        _add_curves(page, story)
    _add_samples(page, story)
    num_snapshots = _add_features(page, story)
    _add_events(page, story)
    _add_recipe(page, story)
    page.write(Path(out))
    return {
        "status": story.record["status"], "num_steps": done, "num_events": len(story.events),
        "num_snapshots": num_snapshots,
    }  # fmt: skip


def _lead(story: Story) -> str:
    model, run = story.recipe.model, story.recipe.run
    what = "volumes" if story.recipe.is_3d else "slices"
    too_small = len(story.record.get("left_out", ()))
    left_out = (
        f" {too_small:,} more fit no shape of a crop and were left out; run.json names them." if too_small else ""
    )
    return (
        f"A {model.size} vision transformer that learns from unlabelled {what}: {run.steps:,} steps of {run.batch_size:,} "
        f"{what}.{left_out} Store {story.record['store_hash']}, recipe {story.record['recipe_hash']}."
    )


def _add_verdict(page: Page, story: Story) -> None:
    page.section("Is it working?")
    open_ones = [e for e in story.events if e["kind"] == "diagnosis" and not e.get("rolled_back")]
    for event in open_ones:
        page.callout(
            f"Step {event['step']:,}: {event['name']}.\nSeen: {event['evidence']}.\nLikely cause: {event['cause']}.\n"
            f"What to do: {event['advice']}.", "bad" if event["severity"] == "fatal" else ""
        )  # fmt: skip
    if not open_ones:
        page.callout("No sign of collapse, divergence or starvation in any step so far.", "good")
    shown = [
        ("loss", story.last("loss", 20), "{:.3f}"),
        ("effective rank", story.last("probe_rank"), "{:.0f}"),
        ("spread of features", story.last("probe_spread"), "{:.2f}"),
        ("k-NN", story.last("knn"), "{:.3f}"),
        ("linear probe", story.last("linear"), "{:.3f}"),
        ("images/s", story.last("images_per_second", 100), "{:,.0f}"),
        ("of the device's peak", story.last("utilisation", 100), "{:.0%}"),
        ("waiting for data", story.last("data_wait", 100), "{:.1%}"),
        ("skipped steps", float(sum("skipped" in line for line in story.lines)), "{:.0f}"),
    ]
    page.numbers([(name, form.format(value)) for name, value, form in shown if value is not None])


def _panel(
    story: Story, title: str, names: Sequence[str | tuple[str, str]], *, log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart | None:  # fmt: skip
    """A chart of those numbers that the run has logged, or None."""
    wanted = [(n, n) if isinstance(n, str) else n for n in names]
    lines = [line for line in (story.curve(name, label) for name, label in wanted) if len(line[1])]
    return Chart(title, lines, marks, log) if lines else None


def _add_curves(page: Page, story: Story) -> None:
    objective, what = story.recipe.objective, "volumes" if story.recipe.is_3d else "slices"
    events = [(e["step"], REJECTED if e["severity"] == "fatal" else SERIES[1])
              for e in story.events if e["kind"] == "diagnosis"]  # fmt: skip
    events += [(e["to"], SERIES[3]) for e in story.events if e["kind"] == "roll_back"]
    cold = [(math.log(objective.prototypes), "ln K: knows nothing yet")] if objective.kind == "dino" else []
    normal, usual = [(1.06, "a perfect Gaussian")], [(1e-3, "usual")]
    gradients = sorted(
        {name for line in story.lines[:50] + story.lines[-50:] for name in line if name.startswith("grad_")}
    )
    page.section("What is minimised")
    _figure(page, [
        _panel(story, "loss", ["loss"]),
        _panel(story, "cross-entropies", ["dino", "ibot"], marks=cold),
        _panel(story, "distance between views", [("invariance", "images"), ("patch_invariance", "places")]),
        _panel(story, "SigReg", [("sigreg", "batch"), ("patch_sigreg", "places")], marks=normal, log=True),
        _panel(story, "KoLeo", ["koleo"]),
        _panel(story, "distance to the anchor's Gram matrices", ["gram"]),
        _panel(story, "learning rate", ["lr"]),
        _panel(story, "gradient norm, before clipping", [(n, n.removeprefix("grad_")) for n in gradients], log=True),
        _panel(story, "relative change of the weights a step", ["update_ratio"], log=True, marks=usual),
    ], events, "Thin: each step; thick: running median. Upright: verdicts (red: fatal), roll-backs (violet)." + (
        " At ln K of K prototypes DINO's loss says nothing; iBOT's is lower when crops without a mask count as 0."
        if cold else ""))  # fmt: skip
    page.section("Do the features live?", f"Measured on the same {what} throughout, so the numbers compare over time.")
    _figure(page, [
        _panel(story, "effective rank (RankMe)", [("probe_rank", f"fixed {what}"), ("rank", "batch")]),
        _panel(story, "spread of features", [("probe_spread", f"fixed {what}"), ("spread", "batch")],
               marks=[(0.05, "collapse")]),
        _panel(story, "online probe (AUC or R²)", [("knn", "k-NN"), ("linear", "linear")]),
        _panel(story, "class token against its patches, cosine", ["probe_class_patch"]),
        _panel(story, "student against teacher, 1 − cosine", ["probe_lag"]),
        _panel(story, "length of tokens", [("probe_norm", "class"), ("probe_patch_norm", "patch")]),
        _panel(story, "entropy of the teacher's targets", ["teacher_entropy"], marks=cold),
        _panel(story, "KL(teacher ‖ student)", ["divergence"]),
        _panel(story, "prototypes in use", ["prototypes_used"]),
    ], events, "Random weights may begin high: rank and spread should settle; falling to nothing is collapse. Class "
       "tokens that grow alike to all of their patches mean that fine detail fades. The online probe guesses labels "
       "of patients that its head has not seen (area under the ROC curve, .5 is chance; R² for quantities).")  # fmt: skip
    page.section("Data and speed")
    _figure(page, [
        _panel(story, "anatomy in the crops", ["foreground"], marks=[(0.3, "too little")]),
        _panel(story, "draws thrown away, a crop", ["num_rejected"]),
        _panel(story, "images/s", ["images_per_second"]),
        _panel(story, "share of the device's measured peak speed", ["utilisation"]),
        _panel(story, "share of time waiting for data", ["data_wait"]),
    ], events, "")  # fmt: skip


def _figure(page: Page, panels: Sequence[Chart | None], events: Sequence[tuple[int, str]], caption: str) -> None:
    drawn = [panel for panel in panels if panel is not None]
    if drawn:
        page.figure(charts(drawn, events), caption, alt=", ".join(panel.title for panel in drawn))


def _add_samples(page: Page, story: Story) -> None:
    path = story.folder / "snapshots" / "samples.npz"
    if not path.is_file():
        return
    rows: list[tuple[Any, list[Any], list[Any], list[Any]]] = []
    num_crops = 0
    for sample in read_samples(path):
        shown = [0, 1, *range(story.recipe.views.num_global, len(sample.crops))][:7]
        boxes = [sample.views[n]["box"] for n in shown]
        rejected = [box for n in shown for box in sample.views[n]["rejected"][:3]]
        crops = [(sample.crops[n].astype(np.float32), sample.views[n]["mask"]) for n in shown]
        rows.append((sample.pixels.astype(np.float32), boxes, rejected, crops))
        num_crops = max(num_crops, len(crops))
    page.section("What the model is shown")
    page.figure(
        sample_sheet(rows, num_crops),
        _VOLUME_SAMPLES if story.recipe.is_3d else _SLICE_SAMPLES,
    )


_SLICE_SAMPLES = (
    "The first samples of the run. Green: boxes of the crops shown; red, dotted: boxes drawn before that held too little "
    "anatomy. Blue patches are hidden from the student, which has to guess them. Grey where a slice is black, or flat: a "
    "display window drawn as augmentation."
)
_VOLUME_SAMPLES = (
    "The first samples of the run: an axial plane through the middle of the first crop, in green the boxes of all crops shown "
    "as they look from above, and the middle plane of each crop, whose axes may have been laid otherwise and flipped. Blue "
    "patches are hidden from the student, which has to guess them. Flat where a window was drawn as augmentation."
)


def _add_features(page: Page, story: Story) -> int:
    paths = sorted((story.folder / "snapshots").glob("step-*.npz"))
    if not paths:
        return 0
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MAX_COLUMNS)).round().astype(int))
    snapshots = []
    for number in chosen:
        with np.load(paths[number], allow_pickle=False) as found:
            images, foreground = found["images"].astype(np.float32), found["foreground"]
            snapshots.append((int(paths[number].stem.removeprefix("step-")), found["tokens"].astype(np.float32)))
    page.section(
        "What the features see",
        "Patch tokens of the teacher, the encoder that is exported, on the same slices, or in "
        "the middle plane of the same volumes.",
    )
    page.figure(
        pca_over_time(images, foreground, snapshots),
        "The three main directions of the patch tokens as red, green and blue: equal colours are equal features, across "
        "images and patients. Organs should come to have colours of their own.",
    )
    page.figure(
        similarity_over_time(images[:4], foreground[:4], [(s, t[:4]) for s, t in snapshots]),
        "How alike the marked patch is to every other: cosine of their tokens, 0 or less dark, 1 bright. It should come "
        "to light up its own tissue or organ, and nothing else.",
    )
    return len(paths)


def _add_events(page: Page, story: Story) -> None:
    page.section("Events")
    rows: list[list[str]] = []
    for event in story.events:
        if event["kind"] == "roll_back":
            text = f"back to step {event['to']:,}, {event['skipped']:,} batches left out, because of: {event['name']}"
            rows.append([f"{event['step']:,}", "roll-back", text])
        else:
            undone = " (rolled back)" if event.get("rolled_back") else ""
            rows.append([f"{event['step']:,}", event["severity"], f"{event['name']}{undone}: {event['evidence']}"])
    skipped = [line["step"] for line in story.lines if "skipped" in line]
    if skipped:
        shown = ", ".join(f"{step:,}" for step in skipped[:12]) + (" …" if len(skipped) > 12 else "")
        rows.append([shown, "skipped", f"{len(skipped)} steps changed no weight: loss or gradient was not finite"])
    if rows:
        page.table(["step", "kind", "what"], rows)
    else:
        page.text("None.")
    page.note(f"Watched for: {', '.join(rule.name for rule in RULES)}.")


def _add_recipe(page: Page, story: Story) -> None:
    page.section("How it was made")
    preset = RECIPES.get(story.recipe.name)
    changed = [] if preset is None else differences(to_dict(preset), to_dict(story.recipe))
    if preset is None:
        page.text(f"`{story.recipe.name}` is no preset; its settings:")
        page.table(["setting", "value"], [[f"`{name}`", value] for name, value in _flat(to_dict(story.recipe))])
    elif changed:
        page.text(f"The preset `{preset.name}` with changes:")
        rows = [[f"`{name}`", *values.split(" ≠ ", 1)] for name, values in (text.split(": ", 1) for text in changed)]
        page.table(["setting", "preset", "this run"], rows)
    else:
        page.text(f"The preset `{preset.name}`, unchanged.")
    facts = {**story.record["machine"], "device": story.record["device"], **story.record["versions"]}
    page.table(["machine and versions", ""], [[name.replace("_", " "), value] for name, value in facts.items()])


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found
