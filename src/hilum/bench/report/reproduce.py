"""`hilum bench reproduce`: what a paper prints for a model on a task, what we find, and why the two may differ."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hilum.bench.catalogue.published import published_scores
from hilum.bench.report.results import FULL, Entry, read_results
from hilum.bench.report.tables import cell_of, cell_of_paper, published_of, same_model
from hilum.bench.run.suites import choose_tasks
from hilum.bench.task import Task
from hilum.errors import InputError
from hilum.terminal import few, wrap_row

WIDE = 0.05  # half a width of an interval from which a test set is called small


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One published number against ours.

    inside    whether the published value lies in our interval; None when we have no interval
    reasons   why they may differ, the most likely first, each with its evidence
    """

    task: str
    model: str
    metric: str
    published_as: str
    published: float
    published_low: float
    published_high: float
    ours: float
    low: float
    high: float
    inside: bool | None
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        numbers = {k: (None if isinstance(v, float) and v != v else v) for k, v in asdict(self).items()}
        return numbers | {"reasons": list(self.reasons)}

    def text(self) -> str:
        """A few lines of at most 100 columns."""
        limits = f" ({self.low:.3f} to {self.high:.3f})" if self.inside is not None else ""
        theirs = (
            f" ({self.published_low:.3f} to {self.published_high:.3f})"
            if self.published_low == self.published_low
            else ""
        )
        verdict = {
            True: "the published value lies inside our interval",
            False: "the published value lies outside of our interval",
            None: "we have no interval, so nothing can be said",
        }[self.inside]
        lines = [
            f"{self.task}, {self.metric}",
            wrap_row(["published"], [10], f"{self.published:.3f}{theirs}  {self.published_as}"),
            wrap_row(["ours"], [10], f"{self.ours:.3f}{limits}  {self.model}"),
            wrap_row(["gap"], [10], f"{self.ours - self.published:+.3f}; {verdict}"),
        ]
        if self.reasons:
            lines.append("what may lie between them, the likeliest first:")
            lines += [wrap_row(["", f"{n}."], [0, 2], reason) for n, reason in enumerate(self.reasons, 1)]
        return "\n".join(lines)


def reproduce(results: str | Path, task: str, model: str) -> Reproduction:
    """Compare one of our results with the published one.

    results  folder of `hilum bench run`, with this task and model under the full protocol
    model    as it was run: "curia-2"

    InputError when it was not run, or when nothing is published for this model, task and metric: the message says what is.
    """
    found = read_results(Path(results))
    entries = [e for e in found.of(task) if e.model == model or same_model(e.model, model)]
    if not entries:
        have = sorted({f"{e.task} {e.model}" for e in found.entries if e.protocol == FULL})
        raise InputError(
            f"{task} of {model} is not in these results ({few(have)}); "
            f"run it: hilum bench run --task {task} --model {model}"
        )
    about = found.tasks[task]
    entry = next((e for e in entries if e.head == "linear"), entries[0])
    printed = published_of(about, entry.score.metric)
    theirs = next((p for p in printed if same_model(entry.model, p.model)), None)
    if theirs is None:
        names = ", ".join(p.model for p in printed) or "nothing"
        raise InputError(f"no paper prints {entry.score.metric} of {model} on {task}; published there: {names}")
    ours, paper = cell_of(entry), cell_of_paper(theirs)
    inside = None if ours.low != ours.low else ours.low <= paper.value <= ours.high
    return Reproduction(
        task=task, model=entry.method, metric=entry.score.metric, published_as=theirs.model, published=paper.value,
        published_low=paper.low, published_high=paper.high, ours=ours.value, low=ours.low, high=ours.high, inside=inside,
        reasons=gap_reasons(about, found.record, entry, paper_has_interval=theirs.se is not None),
    )  # fmt: skip


def check_published(task: str) -> None:
    """InputError when no paper has a number for a task, so that nobody runs it in vain; UsageError for an unknown one."""
    (about,) = choose_tasks(ids=[task])
    if isinstance(about, Path) or not published_scores(about):
        raise InputError(f"nothing is published for {task}; expected a task of 2d, 3d or voxelfm (hilum bench list)")


def gap_reasons(task: Task, record: dict[str, Any], entry: Entry, *, paper_has_interval: bool) -> tuple[str, ...]:
    """What the task, our run and the paper leave open, the likeliest cause of a gap first. Only what there is evidence for."""
    about, model = record["tasks"][task.id], record["models"].get(entry.model, {})
    left_out = [row for row in record["left_out"] if row["task"] == task.id and row["model"] in (entry.model, "")]
    reasons = []
    if model.get("random"):
        reasons.append("our weights are random: this is a control, and no reproduction")
    if lost := about["num_missing"] + sum(row["cases"] for row in left_out):
        reasons.append(f"other cases: {lost:,} of the data set's cases are missing or refused here")
    if task.our_choice:
        reasons.append(f"label or case rule unknown, our choice: {task.our_choice}")
    if not task.split_rule.startswith("official"):
        reasons.append(f"another split: the paper's is not published, ours is {task.split_rule}")
    if entry.protocol == FULL and entry.head != "linear":
        reasons.append(f"another head: {entry.head}")
    elif "curia" in task.suite:
        reasons.append(
            "another way to fit the head: ours chooses the learning rate on validation cases; the paper's is --protocol curia"
        )
    if record["settings"].get("max_slices"):
        reasons.append(f"at most {record['settings']['max_slices']} slices of a volume were encoded")
    low, high = entry.score.low, entry.score.high
    if low is not None and high is not None and high - low > 2 * WIDE:
        reasons.append(
            f"few patients: {entry.score.num_patients:,} in our test set, whose interval is {high - low:.2f} wide"
        )
    if entry.score.seed_sd is not None and entry.score.seed_sd > 0.01:
        reasons.append(f"chance in fitting: head seeds differ by {entry.score.seed_sd:.3f} (SD)")
    if not paper_has_interval:
        reasons.append("the paper prints no interval and no number of test cases, so its own uncertainty is unknown")
    return tuple(reasons)
