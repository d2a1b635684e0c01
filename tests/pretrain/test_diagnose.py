"""Each failure is made in a real little run and named with its cause within 200 steps; healthy runs raise no alarm."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hilum.errors import TrainingDiverged
from hilum.pretrain import distill, loop
from hilum.pretrain.checkpoint import last_checkpoint
from hilum.pretrain.distill import Learner
from hilum.pretrain.loop import pretrain, read_lines
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch import rescue
from hilum.pretrain.watch.diagnose import RECENT, RULES, Diagnosis, History, diagnose
from hilum.pretrain.watch.rescue import Events


def changed(recipe: Recipe, steps: int, **parts: dict[str, Any]) -> Recipe:
    run = {"steps": steps, "checkpoint_every": 50, "health_every": 5, "probe_every": 20, **parts.pop("run", {})}
    return replace(
        recipe, run=replace(recipe.run, **run), **{n: replace(getattr(recipe, n), **v) for n, v in parts.items()}
    )


def verdicts(recipe: Recipe, store, out) -> dict[str, dict[str, Any]]:
    """Train to the end whatever happens; what was seen, by name."""
    pretrain(replace(recipe, run=replace(recipe.run, on_collapse="continue")), store, out)
    return {event["name"]: event for event in Events(out).read()}


@pytest.fixture
def spoil(monkeypatch) -> Callable[[Callable[[Any, int], Any]], None]:
    """Change the batch of each step before the model sees it."""

    def install(change: Callable[[Any, int], Any]) -> None:
        plain = loop._forward
        monkeypatch.setattr(loop, "_forward", lambda learner, batch, step: plain(learner, change(batch, step), step))

    return install


# ---- healthy


@pytest.mark.parametrize("name", ["lejepa", "lejepa, patches", "dino, sinkhorn", "dino, ema"])
def test_a_healthy_run_raises_no_alarm(small, store_path, tmp_path, name):
    found = verdicts(changed(small[name], 60), store_path, tmp_path)
    assert not found.keys() - {"data starvation"}  # that one depends on the machine's load


# ---- each failure, made


def test_projections_that_collapse_stop_the_run(small, store_path, tmp_path):
    """Invariance alone is smallest when every view has one projection."""
    recipe = changed(small["lejepa"], 120, objective={"regulariser": "none"}, optimiser={"lr": 1e-2})
    with pytest.raises(TrainingDiverged, match=r"projections collapsed \(step \d+\): .*SigReg is missing"):
        pretrain(recipe, store_path, tmp_path)
    (event,) = [e for e in Events(tmp_path).read() if e["severity"] == "fatal"]
    first = next(n["step"] for n in read_lines(tmp_path / "metrics.jsonl") if n["invariance"] < 1e-3)
    assert event["since"] <= event["step"] <= first + RECENT


def test_features_that_collapse_stop_the_run(small, store_path, tmp_path, spoil):
    """From step 20 on every slice of a batch is the same one, without drop path and masks: one point, honestly reached."""

    def all_alike(batch: Any, step: int) -> Any:
        if step < 20:
            return batch
        return replace(
            batch,
            globals=batch.globals[:1].expand_as(batch.globals),
            masks=batch.masks & False,
            hidden=batch.hidden[:0],
        )

    spoil(all_alike)
    recipe = changed(small["lejepa"], 60, model={"drop_path": 0.0})
    with pytest.raises(TrainingDiverged, match=r"features collapsed \(step 25\): .*Likely cause: every image"):
        pretrain(recipe, store_path, tmp_path)
    event = next(e for e in Events(tmp_path).read() if e["severity"] == "fatal")
    assert event["since"] == 15  # the last step measured before


def test_prototypes_that_collapse(small, store_path, tmp_path, monkeypatch):
    """A centre that favours one prototype, as when its update has the wrong sign: that one gets every target."""
    plain = distill.centred_softmax

    def one_sided(unit: torch.Tensor, prototypes: torch.Tensor, center: torch.Tensor, temperature: float) -> Any:
        wrong = torch.zeros_like(center)
        wrong[0] = -2.0
        return plain(unit, prototypes, wrong, temperature)

    monkeypatch.setattr(distill, "centred_softmax", one_sided)
    recipe = changed(small["dino, ema"], 60, objective={"regulariser": "none"}, optimiser={"lr": 5e-3})
    found = verdicts(recipe, store_path, tmp_path)
    assert found["prototypes collapsed"]["severity"] == "fatal"
    assert "1.0 prototypes in use" in found["prototypes collapsed"]["evidence"]


def test_a_head_that_stays_cold(small, store_path, tmp_path):
    """Branches that start at 1e-5 and no learning rate: every class token is the same, so the targets are uniform."""
    recipe = changed(
        small["dino, sinkhorn"], 106, optimiser={"lr": 1e-9, "warmup": 0.0}, model={"layer_scale": 1e-5},
        objective={"batch_norm": False, "regulariser": "none"}, run={"probe_every": 1000},
    )  # fmt: skip
    found = verdicts(recipe, store_path, tmp_path)
    assert found["prototypes cold"]["step"] >= 100
    assert f"ln K = {math.log(24):.3f}" in found["prototypes cold"]["evidence"]


def test_a_learning_rate_that_is_far_too_high(small, store_path, tmp_path):
    """DINO at 5,000 times its rate: the class tokens of the probe slices fall onto one point."""
    optimiser = {"lr": 10.0, "clip": 1e9, "warmup": 0.3, "layer_decay": 1.0}
    recipe = changed(small["dino, sinkhorn"], 60, optimiser=optimiser, objective={"batch_norm": False})
    with pytest.raises(
        TrainingDiverged, match=r"features collapsed .*the learning rate is too high.*Halve optimiser\.lr"
    ):
        pretrain(recipe, store_path, tmp_path)


def test_pixels_that_are_no_numbers(small, store_path, tmp_path, spoil):
    """Every third batch is broken: never ten in a row, so only the count of many steps tells."""
    spoil(lambda batch, step: replace(batch, globals=batch.globals * torch.nan) if step % 3 == 0 else batch)
    with pytest.raises(
        TrainingDiverged, match=r"non-finite steps .*: 20 of the last 58 steps were skipped.*store verify"
    ):
        pretrain(changed(small["lejepa"], 200), store_path, tmp_path)


def test_crops_of_air(small, store_path, airy_store_path, tmp_path):
    """Crops anywhere of slices that are nearly empty, without the content-aware draw."""
    views = {"min_image_foreground": 0.0, "min_crop_foreground": 0.0}
    recipe = changed(small["lejepa"], 40, views=views)
    assert (
        "is anatomy over the last 20 steps"
        in verdicts(recipe, airy_store_path, tmp_path / "air")["crops of background"]["evidence"]
    )
    assert "crops of background" not in verdicts(recipe, store_path, tmp_path / "body")


def test_equal_slices_under_koleo(small, store_path, tmp_path, spoil):
    """The first half of each batch comes twice."""

    def twice(batch: Any, _: int) -> Any:
        half = batch.globals.view(2, -1, *batch.globals.shape[1:])
        half = torch.cat([half[:, : half.shape[1] // 2]] * 2, 1)
        return replace(batch, globals=half.flatten(0, 1), masks=batch.masks & False, hidden=batch.hidden[:0])

    spoil(twice)
    recipe = changed(
        small["dino, ema"], 60, objective={"ibot_weight": 0.0}, run={"batch_size": 8}, model={"drop_path": 0.0}
    )
    found = verdicts(recipe, store_path, tmp_path)
    assert found["near-duplicates"]["step"] <= 30
    assert (
        "KoLeo 16.8 a view" in found["near-duplicates"]["evidence"]
    )  # twice the same: −ln(distance 0 + 1e-8·√16 + 1e-8)


def test_a_teacher_that_stands_still(small, store_path, tmp_path):
    recipe = changed(
        small["lejepa"], 125, optimiser={"momentum": (1.0, 1.0), "lr": 1e-2, "warmup": 0.05}, run={"probe_every": 10}
    )
    assert "teacher lags" in verdicts(recipe, store_path, tmp_path)


def test_a_batch_too_small_for_its_prototypes(small, store_path, tmp_path):
    recipe = changed(small["dino, sinkhorn"], 6, objective={"prototypes": 4096})
    assert "ln(K/B) = 6.2 of ln K = 8.3" in verdicts(recipe, store_path, tmp_path)["batch too small"]["evidence"]


# ---- rules that would take too long to provoke: their numbers, made up


def history(steps: int, **series: Callable[[int], float]) -> History:
    made = History()
    for step in range(steps):
        made.add({"step": step, **{name: value(step) for name, value in series.items()}})
    return made


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "gradient explosion",
            {"grad_backbone": lambda s: 2.0},
            {"grad_backbone": lambda s: 2.0 if s < 290 else 500.0},
        ),
        ("crops of background", {"foreground": lambda s: 0.5}, {"foreground": lambda s: 0.2}),
        ("data starvation", {"data_wait": lambda s: 0.4}, {"data_wait": lambda s: 0.6}),
        ("rank collapsed", {"probe_rank": lambda s: 80.0}, {"probe_rank": lambda s: 80.0 if s < 250 else 4.0}),
        ("dense features fade", {"probe_class_patch": lambda s: 0.3}, {"probe_class_patch": lambda s: s / 300}),
        ("SigReg without gradient", {"sigreg": lambda s: 1.2}, {"sigreg": lambda s: 0.409 * 64}),
        ("features too wide", {"sigreg": lambda s: 0.2 * 64}, {"sigreg": lambda s: 0.82 * 64}),
        ("loss diverged", {"loss": lambda s: 3 - s / 300}, {"loss": lambda s: 3 + s / 30}),
    ],
)
def test_rules_on_numbers(small, name, good, bad):
    recipe = changed(small["lejepa"], 300, run={"batch_size": 64})
    assert name not in {d.name for d in diagnose(history(300, **good), recipe)}
    assert name in {d.name for d in diagnose(history(300, **bad), recipe)}


def test_with_workers_there_is_less_patience_for_data(small):
    recipe = changed(small["lejepa"], 300, run={"num_workers": 1})
    found = [{d.name for d in diagnose(history(300, data_wait=lambda s, v=v: v), recipe)} for v in (0.1, 0.4)]
    assert [("data starvation" in names) for names in found] == [False, True]


def test_a_hand_over_is_no_divergence(small):
    """LeJEPA's loss of .2, then DINO's of 9; the same rise without a change of objective is one."""
    for part, alarm in (("dino", False), ("invariance", True)):
        made = History()
        for step in range(200):
            made.add({"step": step, "loss": 0.2 if step < 100 else 9.0, "invariance" if step < 100 else part: 1.0})
        assert ("loss diverged" in {d.name for d in diagnose(made, small["lejepa"])}) == alarm


def test_every_rule_says_what_to_do():
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.cause and rule.advice[0].isupper() and not rule.advice.endswith(".") for rule in RULES)
    assert [r.severity for r in RULES] == sorted(r.severity for r in RULES)  # fatal ones first


# ---- what is done about it


@pytest.fixture
def collapse_on_sample(monkeypatch) -> list[int]:
    """Batches of these numbers (not steps) make every feature the same from then on, as a poisonous slice would."""
    poison: list[int] = []
    plain = loop._forward

    def forward(learner: Learner, batch: Any, step: int) -> Any:
        result = plain(learner, batch, step)
        return replace(result, features=torch.ones_like(result.features)) if batch.foreground in poison else result

    monkeypatch.setattr(loop, "_forward", forward)
    return poison


def foregrounds(recipe: Recipe, store, out) -> list[float]:
    pretrain(recipe, store, out)
    return [line["foreground"] for line in read_lines(out / "metrics.jsonl")]


def test_roll_back_leaves_the_bad_slices_out_and_goes_on(small, store_path, tmp_path, collapse_on_sample):
    """Steps 30 and 35 show collapsed features. The run goes back to step 20 or 30 and meets other slices there."""
    order = foregrounds(
        changed(small["dino, sinkhorn"], 90, run={"checkpoint_every": 10}), store_path, tmp_path / "plain"
    )
    collapse_on_sample += [order[30], order[35]]
    assert len(set(order)) > 80  # a batch is known by its foreground
    recipe = changed(small["dino, sinkhorn"], 60, run={"checkpoint_every": 10, "on_collapse": "roll_back"})
    found = foregrounds(recipe, store_path, tmp_path / "run")
    events = Events(tmp_path / "run")
    rolled = [e for e in events.read() if e["kind"] == "roll_back"]
    assert [(e["step"], e["name"]) for e in rolled] == [(35, "features collapsed")]
    to = rolled[0]["to"]
    assert to in (20, 30)
    assert found[:to] == order[:to]
    assert found[to:] == order[36 : 36 + 60 - to]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(60))
    assert events.offset == 36 - to


def test_a_kill_while_rolling_back_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """What is being removed has no name that a resumed run would take up."""
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    fatal = Diagnosis("features collapsed", "fatal", 25, 15, "", "", "")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rescue._roll_back(Events(tmp_path), fatal)
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000010"


def test_a_rolled_back_run_that_is_interrupted_ends_alike(small, store_path, tmp_path, collapse_on_sample):
    order = foregrounds(changed(small["dino, sinkhorn"], 60), store_path, tmp_path / "plain")
    collapse_on_sample += [order[30], order[35]]
    recipe = changed(small["dino, sinkhorn"], 60, run={"checkpoint_every": 10, "on_collapse": "roll_back"})
    pretrain(recipe, store_path, tmp_path / "whole")

    class Stop(Exception):
        pass

    def pull_the_plug(line: Any, _: Any) -> None:
        if line["step"] == 44:
            raise Stop

    with pytest.raises(Stop):
        pretrain(recipe, store_path, tmp_path / "cut", watch=pull_the_plug)
    pretrain(recipe, store_path, tmp_path / "cut")
    ends = [(tmp_path / n / "export" / "model.safetensors").read_bytes() for n in ("whole", "cut")]
    assert ends[0] == ends[1]
    assert Events(tmp_path / "whole").read() == Events(tmp_path / "cut").read()


def test_roll_backs_that_do_not_help_end_the_run(small, store_path, tmp_path, monkeypatch):
    plain = loop._forward

    def forward(learner: Learner, batch: Any, step: int) -> Any:
        result = plain(learner, batch, step)
        return replace(result, features=torch.ones_like(result.features)) if step >= 30 else result

    monkeypatch.setattr(loop, "_forward", forward)
    recipe = changed(small["dino, sinkhorn"], 60, run={"checkpoint_every": 10, "on_collapse": "roll_back"})
    with pytest.raises(TrainingDiverged, match="or 3 roll-backs did not help"):
        pretrain(recipe, store_path, tmp_path)
    assert Events(tmp_path).num_roll_backs == 3


def test_a_cut_line_of_events_is_no_event(tmp_path):
    events = Events(tmp_path)
    (tmp_path / "events.jsonl").write_text(
        json.dumps({"kind": "roll_back", "step": 9, "skipped": 4}) + '\n{"kind": "di'
    )
    assert events.offset == 4
    assert events.num_roll_backs == 1


def test_a_term_that_a_hand_over_ended_is_forgotten():
    history = History()
    for step in range(20):
        history.add({"step": step, "loss": 1.0, "invariance": 1e-4})
    history.add({"step": 20, "loss": 9.0, "dino": 6.0})
    assert history.last("invariance", 10) == []
    assert history.last("loss", 1) == [(20, 9.0)]
