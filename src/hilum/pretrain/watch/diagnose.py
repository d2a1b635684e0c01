"""What is wrong with a run: a table of rules over its log lines, each with cause, advice and the evidence.

A rule looks at numbers of metrics.jsonl only, so that a resumed run, and a reader of a finished one, come to the same verdict.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from hilum.pretrain.recipe import Recipe

Severity = Literal["fatal", "warning"]

WINDOW = 400  # values of each name that are kept
RECENT = 200  # steps within which a failure must be named
TERMS = frozenset({"dino", "invariance", "gram"})  # what tells the phases of a run apart


@dataclass(frozen=True)
class Sign:
    """What a rule saw: the numbers in words, and the first step that showed them."""

    evidence: str
    since: int


@dataclass(frozen=True)
class Diagnosis:
    """A named failure."""

    name: str
    severity: Severity
    step: int
    since: int
    evidence: str
    cause: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name} (step {self.step}): {self.evidence}. Likely cause: {self.cause}. {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class History:
    """The latest values of every number of the log, the largest and smallest so far, and the losses of the beginning.

    A run has a beginning for each set of terms that it minimises: a hand-over starts the losses anew.
    """

    def __init__(self) -> None:
        self.terms: Set[str] = frozenset()
        self.begin = 0
        self.series: dict[str, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self.highest: dict[str, float] = {}
        self.lowest: dict[str, float] = {}
        self.first_losses: list[float] = []
        self.step = -1

    def add(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; numbers that are not finite count as absent."""
        self.step = int(line["step"])
        if (terms := TERMS & line.keys()) != self.terms:
            for name in ("loss", *self.terms - terms):
                self.series.pop(name, None)
            self.terms, self.begin, self.first_losses = terms, self.step, []
        for name, value in line.items():
            if name == "step" or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            self.series[name].append((self.step, float(value)))
            self.highest[name] = max(self.highest.get(name, value), value)
            self.lowest[name] = min(self.lowest.get(name, value), value)
            if name == "loss" and len(self.first_losses) < 10:
                self.first_losses.append(value)

    def last(self, name: str, count: int) -> list[tuple[int, float]]:
        """The last `count` (step, value) of a number, oldest first; [] when there are fewer."""
        found = list(self.series[name])[-count:] if name in self.series else []
        return found if len(found) == count else []

    def within(self, name: str, steps: int) -> list[tuple[int, float]]:
        """(step, value) of the last `steps` steps."""
        return [pair for pair in self.series[name] if pair[0] > self.step - steps] if name in self.series else []


@dataclass(frozen=True)
class Rule:
    """One way to fail. `sees` gets the history and the recipe, and says what it saw, or None."""

    name: str
    severity: Severity
    sees: Callable[[History, Recipe], Sign | None]
    cause: str
    advice: str


def settled(recipe: Recipe) -> int:
    """The step from which a cold start is no excuse: 100 steps after the learning rate's warm-up."""
    return int(recipe.optimiser.warmup * recipe.run.steps) + 100


def _collapse_of(name: str, floor: float, history: History, recipe: Recipe) -> Sign | None:
    """Twice in a row below `floor`, having been five times as high, or with the warm-up over."""
    pairs = history.last(name, 2)
    if not pairs or any(value > floor for _, value in pairs):
        return None
    peak = history.highest[name]
    if peak < 5 * floor and history.step < settled(recipe):
        return None
    since = next(
        step for step, value in reversed(history.series[name]) if value > floor or step == history.series[name][0][0]
    )
    values = " and ".join(f"{value:.2g}" for _, value in pairs)
    return Sign(f"{name} {values}, highest so far {peak:.2g}, 1 would be isotropic, 0 is one point", since)


def features_collapsed(history: History, recipe: Recipe) -> Sign | None:
    return _collapse_of("spread", 0.05, history, recipe) or _collapse_of("probe_spread", 0.05, history, recipe)


def rank_collapsed(history: History, recipe: Recipe) -> Sign | None:
    """The rank of the fixed probe images, against its best since the start-up: that of random weights is often higher."""
    pairs = [pair for pair in history.series["probe_rank"] if pair[0] >= settled(recipe)]
    if len(pairs) < 2:
        return None
    peak = max(value for _, value in pairs)
    if all(value < max(2.0, 0.2 * peak) for _, value in pairs[-2:]):
        return Sign(f"effective rank of the probe images {pairs[-1][1]:.1f}, was {peak:.1f}", pairs[-2][0])
    return None


def projections_collapsed(history: History, _: Recipe) -> Sign | None:
    """LeJEPA's views agree to the last digit: at unit scale, which SigReg keeps, they never do."""
    found = history.last("invariance", 10)
    if found and history.step >= 20 and (now := median(v for _, v in found)) < 1e-3:
        first = next(step for step, value in history.series["invariance"] if value < 0.01)
        return Sign(f"distance between views {now:.1e}, at most {history.highest['invariance']:.2g} before", first)
    return None


def prototypes_collapsed(history: History, recipe: Recipe) -> Sign | None:
    """Targets without Sinkhorn's balance fall onto one prototype; the loss then goes to zero with their entropy."""
    loss, entropy = history.last("dino", 10), history.last("teacher_entropy", 10)
    if not loss or not entropy:
        return None
    limit = 0.05 * math.log(recipe.objective.prototypes)
    low, flat = median(v for _, v in loss), median(v for _, v in entropy)
    if low < limit and flat < limit:
        used = history.last("prototypes_used", 1)
        count = f", {used[0][1]:.1f} prototypes in use" if used else ""
        return Sign(f"DINO loss {low:.3f} with target entropy {flat:.3f} nats{count}", loss[0][0])
    return None


def prototypes_cold(history: History, recipe: Recipe) -> Sign | None:
    loss, entropy = history.last("dino", 50), history.last("teacher_entropy", 50)
    if not loss or not entropy or history.step < max(settled(recipe), history.begin + 100):
        return None
    top = math.log(recipe.objective.prototypes)
    found, flat = median(v for _, v in loss), median(v for _, v in entropy)
    if found > 0.99 * top and flat > 0.99 * top:
        return Sign(f"DINO loss {found:.3f} and target entropy {flat:.3f} stand at ln K = {top:.3f}", loss[0][0])
    return None


def loss_diverged(history: History, _: Recipe) -> Sign | None:
    recent = history.last("loss", 10)
    if not recent or len(history.first_losses) < 10 or history.step < history.begin + 20:
        return None
    begin, now = median(history.first_losses), median(v for _, v in recent)
    if begin > 0 and now > 2 * begin:
        since = next(s for s, v in history.series["loss"] if v > 1.5 * begin)
        return Sign(f"loss {now:.3g} over the last 10 steps, {begin:.3g} over the first 10 of this objective", since)
    return None


def gradient_exploded(history: History, recipe: Recipe) -> Sign | None:
    recent = history.last("grad_backbone", 210)
    if not recent:
        return None
    before, now = median(v for _, v in recent[:200]), median(v for _, v in recent[200:])
    if now > 50 * before and now > recipe.optimiser.clip:
        return Sign(
            f"gradient norm of the backbone {now:.3g} over 10 steps, {before:.3g} over the 200 before", recent[200][0]
        )
    return None


def not_finite(history: History, _: Recipe) -> Sign | None:
    bad = history.within("skipped", RECENT)
    if len(bad) < 20:
        return None
    return Sign(f"{len(bad)} of the last {min(RECENT, history.step + 1)} steps were skipped", bad[0][0])


def background(history: History, _: Recipe) -> Sign | None:
    pairs = history.last("foreground", 20)
    if pairs and (share := sum(v for _, v in pairs) / len(pairs)) < 0.3:
        return Sign(f"{share:.0%} of the crops' area is anatomy over the last 20 steps", pairs[0][0])
    return None


def starved(history: History, recipe: Recipe) -> Sign | None:
    pairs = history.last("data_wait", 100)
    limit = 0.2 if recipe.run.num_workers else 0.5  # without workers the same core makes the views: work, not idleness
    if pairs and (share := sum(v for _, v in pairs) / len(pairs)) > limit:
        return Sign(f"{share:.0%} of the time of the last 100 steps went by waiting for data", pairs[0][0])
    return None


def batch_too_small(history: History, recipe: Recipe) -> Sign | None:
    objective, rows = recipe.objective, recipe.views.num_global * recipe.run.batch_size
    if objective.kind != "dino" or objective.centring != "sinkhorn" or history.step < 0:
        return None
    floor, top = math.log(max(objective.prototypes / rows, 1)), math.log(objective.prototypes)
    if floor > 0.5 * top:
        return Sign(
            f"{rows} crops share {objective.prototypes:,} prototypes, so Sinkhorn keeps the targets' entropy above "
            f"ln(K/B) = {floor:.1f} of ln K = {top:.1f} nats", 0
        )  # fmt: skip
    return None


def teacher_lags(history: History, recipe: Recipe) -> Sign | None:
    pairs = history.last("probe_lag", 2)
    if pairs and history.step >= settled(recipe) and all(value > 0.5 for _, value in pairs):
        return Sign(f"class tokens of student and teacher have cosine {1 - pairs[-1][1]:.2f}", pairs[0][0])
    return None


def duplicates(history: History, recipe: Recipe) -> Sign | None:
    """KoLeo far above what the spread s of the features explains: points spread evenly have about −0.3 − ln s a view."""
    values, spread = history.last("koleo", 10), history.last("spread", 1)
    if not values or not spread or history.step < 20:
        return None
    each, even = median(v for _, v in values) / recipe.views.num_global, -0.3 - math.log(max(spread[0][1], 1e-4))
    if each > even + 3:
        return Sign(f"KoLeo {each:.1f} a view; points of spread {spread[0][1]:.2f} have about {even:.1f}", values[0][0])
    return None


def _sigreg_per_sample(history: History, recipe: Recipe) -> tuple[float, float, int] | None:
    """Median of the last SigReg values, the same per sample, and the first of their steps; None while it says little."""
    values, num = history.last("sigreg", 20), recipe.run.batch_size
    if not values or num < 16 or history.step < settled(recipe):
        return None
    found = median(v for _, v in values)
    return found, found / num, values[0][0]


def sigreg_at_zero(history: History, recipe: Recipe) -> Sign | None:
    seen = _sigreg_per_sample(history, recipe)
    if seen is None or not 0.36 < seen[1] < 0.43:
        return None
    return Sign(f"SigReg {seen[0]:.1f} = {seen[1]:.2f}·N; .409·N means all points at zero", seen[2])


def over_dispersed(history: History, recipe: Recipe) -> Sign | None:
    seen = _sigreg_per_sample(history, recipe)
    if seen is None or seen[1] <= 0.6:
        return None
    return Sign(f"SigReg {seen[0]:.1f} = {seen[1]:.2f}·N; above .6·N the points are far too wide", seen[2])


def dense_fading(history: History, recipe: Recipe) -> Sign | None:
    pairs = history.last("probe_class_patch", 2)
    if not pairs or history.step < settled(recipe):
        return None
    low = history.lowest["probe_class_patch"]
    if all(value > 0.7 and value > low + 0.3 for _, value in pairs):
        return Sign(f"cosine of class and patch tokens {pairs[-1][1]:.2f}, was {low:.2f}", pairs[0][0])
    return None


RULES: tuple[Rule, ...] = (
    Rule("features collapsed", "fatal", features_collapsed,
         "every image gets the same features: the learning rate is too high, nothing keeps features apart, or the crops "
         "hold too little anatomy",
         "Halve optimiser.lr, choose objective.regulariser=sigreg, or raise views.min_crop_foreground"),
    Rule("projections collapsed", "fatal", projections_collapsed,
         "all views of all images are projected onto one point: SigReg is missing, too weak, or outrun by the learning rate",
         "Set objective.regulariser=sigreg or raise its weight, or halve optimiser.lr"),
    Rule("prototypes collapsed", "fatal", prototypes_collapsed,
         "the teacher gives every crop the same one-hot target, so centring does not balance them",
         "Set objective.centring=sinkhorn, or raise the teacher's temperature"),
    Rule("loss diverged", "fatal", loss_diverged,
         "the learning rate is too high for this batch, or the clip is too loose",
         "Halve optimiser.lr or lengthen optimiser.warmup, in a new folder"),
    Rule("non-finite steps", "fatal", not_finite,
         "broken pixels in the store, or numbers that overflow",
         "Check the store (hilum store verify); if it is whole, halve optimiser.lr or set run.precision=fp32"),
    Rule("gradient explosion", "warning", gradient_exploded,
         "a jump of the learning rate or of the data that the clip only just holds",
         "Halve optimiser.lr if the loss rises too"),
    Rule("rank collapsed", "warning", rank_collapsed,
         "features keep few directions",
         "Raise objective.regulariser_weight, or lower optimiser.lr"),
    Rule("teacher lags", "warning", teacher_lags,
         "the teacher moves too slowly for the student: momentum too near 1 for the learning rate",
         "Lower optimiser.momentum or optimiser.lr"),
    Rule("near-duplicates", "warning", duplicates,
         "images that are all but equal in one batch: KoLeo pushes them apart without bound",
         "Set objective.regulariser=sigreg, or prepare with --drop duplicates"),
    Rule("crops of background", "warning", background,
         "slices or volumes hold little anatomy, or content-aware cropping is off",
         "Raise views.min_crop_foreground, and for slices views.min_image_foreground"),
    Rule("data starvation", "warning", starved,
         "pixels are made more slowly than the device trains on them",
         "Raise run.num_workers, or put the store on a faster disk"),
    Rule("batch too small", "warning", batch_too_small,
         "far more prototypes than crops in a batch",
         "Lower objective.prototypes or raise run.batch_size"),
    Rule("prototypes cold", "warning", prototypes_cold,
         "the head's outputs are almost constant, so the targets are uniform: normal in the first thousands of steps, "
         "not after",
         "In short runs set objective.batch_norm=true or objective.kind=lejepa"),
    Rule("SigReg without gradient", "warning", sigreg_at_zero,
         "what SigReg sees has shrunk to zero, where its gradient vanishes",
         "Put it where unit scale is in reach: objective.regulariser_on=class_token"),
    Rule("features too wide", "warning", over_dispersed,
         "what SigReg sees is so spread that its gradient points nowhere",
         "Raise objective.regulariser_weight or lower optimiser.lr"),
    Rule("dense features fade", "warning", dense_fading,
         "patch tokens take over what the class token says, as in long runs of large models",
         "Stop at an earlier checkpoint, or raise objective.ibot_weight"),
)  # fmt: skip


def diagnose(history: History, recipe: Recipe) -> list[Diagnosis]:
    """Every rule that applies now, fatal ones first."""
    found = []
    for rule in RULES:
        if sign := rule.sees(history, recipe):
            found.append(
                Diagnosis(rule.name, rule.severity, history.step, sign.since, sign.evidence, rule.cause, rule.advice)
            )
    return found
