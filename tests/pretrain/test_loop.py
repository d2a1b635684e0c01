"""A run: stopped, killed, damaged and resumed, it ends where an undisturbed one does."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hilum.encode.released.doctor import check_model
from hilum.encode.zoo import open_folder
from hilum.errors import CheckpointError, DiskFull, Interrupted, StoreError, TrainingDiverged, UsageError
from hilum.pretrain import checkpoint, loop
from hilum.pretrain.distill import StepResult
from hilum.pretrain.loop import pretrain, read_lines
from hilum.pretrain.parallel import Replica
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch.health import CLOCK
from hilum.settings import to_dict


class Stop(Exception):
    """The test pulls the plug."""


def stop_after(step: int):
    def progress(done: int, total: int | None, what: str) -> None:
        if done == step:
            raise Stop

    return progress


def numbers(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_lines(out / "metrics.jsonl")]


def last_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint of a run on one rank."""
    folder = sorted((out / "checkpoints").glob("step-*"))[-1]
    return load_file(folder / "rank-00000-of-00001.safetensors")


def same_end(a: Path, b: Path) -> None:
    """Equal weights of student, teacher and optimiser, bit for bit; equal export; equal log."""
    left, right = last_tensors(a), last_tensors(b)
    assert left.keys() == right.keys()
    assert any(name.startswith("optimiser.") for name in left)
    assert all(torch.equal(left[name], right[name]) for name in left)
    exports = [load_file(out / "export" / "model.safetensors") for out in (a, b)]
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])
    assert numbers(a) == numbers(b)


# ---- resume


@pytest.mark.parametrize("name", ["lejepa", "lejepa, patches", "dino, sinkhorn", "dino, ema"])
def test_ten_and_ten_steps_are_twenty(small, store_path, tmp_path, name):
    recipe = small[name]
    pretrain(recipe, store_path, tmp_path / "whole")
    for after in (4, 13):  # before the first checkpoint, and in the middle of the second half
        with pytest.raises(Stop):
            pretrain(recipe, store_path, tmp_path / "parts", progress=stop_after(after))
    record = pretrain(recipe, store_path, tmp_path / "parts")
    assert record["status"] == "finished"
    same_end(tmp_path / "whole", tmp_path / "parts")
    assert [line["step"] for line in numbers(tmp_path / "whole")] == list(range(20))


@pytest.mark.parametrize("name", ["3d, lejepa", "3d, dino"])
def test_volumes_resume_as_exactly(small, volume_stores, tmp_path, name):
    pretrain(small[name], volume_stores / "iso", tmp_path / "whole")
    for after in (3, 7):  # before the first checkpoint, and after it
        with pytest.raises(Stop):
            pretrain(small[name], volume_stores / "iso", tmp_path / "parts", progress=stop_after(after))
    pretrain(small[name], volume_stores / "iso", tmp_path / "parts")
    same_end(tmp_path / "whole", tmp_path / "parts")
    found = numbers(tmp_path / "whole")
    assert [line["step"] for line in found] == list(range(10))
    assert ("patch_invariance" in found[0]) == (name == "3d, lejepa")
    assert "grad_ibot_head" not in found[0]  # lejepa has none, and here dino shares one


def test_bf16_resumes_as_exactly(small, store_path, tmp_path):
    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, precision="bf16", steps=8, checkpoint_every=4))
    pretrain(recipe, store_path, tmp_path / "whole")
    with pytest.raises(Stop):
        pretrain(recipe, store_path, tmp_path / "parts", progress=stop_after(6))
    pretrain(recipe, store_path, tmp_path / "parts")
    same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_is_left_alone(small, store_path, tmp_path):
    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, steps=2))
    first = pretrain(recipe, store_path, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert pretrain(recipe, store_path, tmp_path / "run") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_the_run_folder_explains_itself(small, store_path, tmp_path):
    recipe = replace(small["dino, sinkhorn"], run=replace(small["dino, sinkhorn"].run, steps=6, checkpoint_every=2))
    record = pretrain(recipe, store_path, tmp_path / "run")
    assert record == json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"] == to_dict(recipe)
    assert record["versions"]["torch"]
    assert record["machine"]["num_cores"] >= 1
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000004", "step-00000006"]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    lines = numbers(tmp_path / "run")
    assert {"loss", "dino", "ibot", "sigreg", "lr", "grad_backbone", "grad_dino_head", "rank", "foreground"} <= lines[
        0
    ].keys()
    assert "rank" not in lines[1]  # health_every
    encoder = open_folder(tmp_path / "run" / "export")
    state = last_tensors(tmp_path / "run")
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, state[f"learner.teacher.backbone.{name}"])
    assert encoder.name == "small-dino@6"
    assert encoder.contract.size_px == 32
    assert encoder.tokens(torch.randn(1, 1, 32, 32)).cls.shape == (1, 96)
    assert check_model(str(tmp_path / "run" / "export"))["checks"][-1][1:] == [
        "good",
        "identical (cosine 1.0000000, difference 0)",
    ]


# ---- signals

RUNNER = """
import sys, time
from pathlib import Path
from hilum.errors import HilumError
from hilum.pretrain.watch.health import CLOCK
from hilum.pretrain.loop import pretrain
from hilum.pretrain.recipe import Recipe
from hilum.settings import from_dict
import json

recipe = from_dict(Recipe, json.loads(sys.argv[1]))

def progress(done, total, what):
    Path(sys.argv[4]).write_text(str(done))
    time.sleep(0.03)

try:
    pretrain(recipe, sys.argv[2], sys.argv[3], progress=progress)
except HilumError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def run_until(recipe: Recipe, store: Path, out: Path, step: int, number: int, *, group: bool) -> tuple[int, str]:
    """Train in another process, send it a signal when `step` steps are done; exit code and output."""
    done = out.parent / "done"
    done.unlink(missing_ok=True)
    command = [sys.executable, "-c", RUNNER, json.dumps(to_dict(recipe)), str(store), str(out), str(done)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if done.exists() and int(done.read_text() or 0) >= step:
                (os.killpg if group else os.kill)(process.pid, number)
                break
            time.sleep(0.02)
        output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_signals_and_kill_end_where_an_undisturbed_run_does(small, store_path, tmp_path):
    """SIGTERM to the whole process group, as `timeout` and a batch system send it; then kill -9; then run again."""
    recipe = small["dino, sinkhorn"]
    recipe = replace(recipe, run=replace(recipe.run, steps=40, num_workers=1, checkpoint_every=10))
    out = tmp_path / "run"
    code, output = run_until(recipe, store_path, out, 4, signal.SIGTERM, group=True)
    assert code == 143, output
    assert "stopped by SIGTERM after step" in output
    assert "checkpoint written. Run the same command again to go on" in output
    stopped = int(output.split("after step ")[1].split()[0])
    assert checkpoint.last_checkpoint(out / "checkpoints") == out / "checkpoints" / f"step-{stopped:08d}"

    code, output = run_until(recipe, store_path, out, 25, signal.SIGKILL, group=False)
    assert code == -signal.SIGKILL, output
    assert json.loads((out / "run.json").read_text())["status"] == "running"

    pretrain(recipe, store_path, out)
    pretrain(recipe, store_path, tmp_path / "whole")
    same_end(tmp_path / "whole", out)


def test_ctrl_c_in_this_process_finishes_the_step(small, store_path, tmp_path):
    def progress(done: int, total: int | None, what: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 3 of 20; checkpoint written") as caught:
        pretrain(small["lejepa"], store_path, tmp_path / "run", progress=progress)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.last_checkpoint(tmp_path / "run" / "checkpoints") == (
        tmp_path / "run" / "checkpoints" / "step-00000003"
    )


# ---- the wrong folder


def test_another_recipe_is_refused(small, store_path, tmp_path):
    recipe = small["lejepa"]
    with pytest.raises(Stop):
        pretrain(recipe, store_path, tmp_path / "run", progress=stop_after(1))
    other = replace(recipe, optimiser=replace(recipe.optimiser, lr=7e-3))
    with pytest.raises(
        CheckpointError,
        match=r"another recipe \(optimiser\.lr: 0\.002 ≠ 0\.007: found ≠ asked for\); choose a new folder",
    ):
        pretrain(other, store_path, tmp_path / "run")


def test_a_wrong_setting_does_not_spoil_the_folder(small, store_path, tmp_path):
    """A run that ended before its first step leaves its folder to the corrected command."""
    recipe = small["lejepa"]
    with pytest.raises(UsageError, match="holds no weights that can be read"):
        pretrain(replace(recipe, start_from=str(tmp_path / "garbage")), store_path, tmp_path / "run")
    with pytest.raises(Stop):
        pretrain(recipe, store_path, tmp_path / "run", progress=stop_after(1))


def test_another_store_is_refused(small, store_path, other_store_path, tmp_path):
    with pytest.raises(Stop):
        pretrain(small["lejepa"], store_path, tmp_path / "run", progress=stop_after(1))
    with pytest.raises(CheckpointError, match="a run on another store"):
        pretrain(small["lejepa"], other_store_path, tmp_path / "run")


def test_folders_and_files_that_are_no_run(small, store_path, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("precious")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="is not empty and no run folder; choose a new one"):
            pretrain(small["lejepa"], store_path, tmp_path / name)
    with pytest.raises(StoreError, match="is missing; expected a store made by hilum prepare"):
        pretrain(small["lejepa"], tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(UsageError, match="device 'gpu9' is unknown; expected auto, cpu, cuda or cuda:N"):
        pretrain(small["lejepa"], store_path, tmp_path / "run", device="gpu9")


# ---- damaged checkpoints


@pytest.fixture
def half_run(small, store_path, tmp_path) -> Path:
    """Stopped at step 11, with a checkpoint of step 10."""
    with pytest.raises(Stop):
        pretrain(small["lejepa"], store_path, tmp_path / "run", progress=stop_after(11))
    return tmp_path / "run"


@pytest.mark.parametrize("keep_bytes", [0, 100, 50_000])
@pytest.mark.parametrize("name", ["index.json", "rank-00000-of-00001.safetensors"])
def test_a_cut_checkpoint(small, store_path, half_run, name, keep_bytes):
    path = half_run / "checkpoints" / "step-00000010"
    (path / name).write_bytes((path / name).read_bytes()[: min(keep_bytes, (path / name).stat().st_size - 9)])
    with pytest.raises(CheckpointError, match=r"step-00000010 cannot be read as a checkpoint .* Remove it to go on"):
        pretrain(small["lejepa"], store_path, half_run)
    shutil.rmtree(path)
    assert pretrain(small["lejepa"], store_path, half_run)["status"] == "finished"


def test_checkpoints_of_another_kind(small, store_path, half_run):
    path = half_run / "checkpoints" / "step-00000010"
    index, tensors = path / "index.json", path / "rank-00000-of-00001.safetensors"
    record = json.loads(index.read_text())

    def refused(changed: Any, message: str) -> None:
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            pretrain(small["lejepa"], store_path, half_run)

    refused({**record, "version": 3}, "checkpoint version 3; this hilum reads version 2")
    refused([1, 2], "checkpoint version list")
    refused({**record, "recipe_hash": "abc"}, "belongs to recipe abc, this run has")
    refused({**record, "files": ["../../run.json"]}, "cannot be read as a checkpoint .* no file of this folder")
    with safe_open(tensors, "pt") as file:
        metadata = file.metadata()
    state = load_file(tensors)
    lost = "learner.student.backbone.norm.bias"
    save_file({k: v for k, v in state.items() if k != lost}, tensors, metadata)
    refused(record, rf"step-00000010 does not fit this recipe: {lost}: expected \(96,\), found nothing")
    save_file({**state, lost: torch.zeros(95)}, tensors, metadata)
    refused(record, rf"step-00000010 does not fit this recipe: {lost}: expected \(96,\), found \(95,\)")
    shutil.rmtree(path)
    (half_run / "checkpoints" / "step-00000010.pt").write_bytes(b"")
    refused_old = "step-00000010.pt has checkpoint version 1; this hilum reads version 2"
    with pytest.raises(CheckpointError, match=refused_old):
        pretrain(small["lejepa"], store_path, half_run)


def test_a_checkpoint_runs_no_code(small, store_path, half_run, tmp_path):
    """A pickle that would open a file when loaded, in place of each file and beside them."""
    target = tmp_path / "hacked"

    class Hostile:
        def __reduce__(self):
            return open, (str(target), "w")

    path = half_run / "checkpoints" / "step-00000010"
    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    for name in ("rank-00000-of-00001.safetensors", "index.json"):
        torch.save(Hostile(), path / name)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            pretrain(small["lejepa"], store_path, half_run)
    assert not target.exists()


# ---- losses that are no numbers


@pytest.fixture
def poison(monkeypatch) -> Iterator[set[int]]:
    """Steps whose forward pass yields NaN: loss, parts and features."""
    steps: set[int] = set()
    plain = loop._forward

    def forward(replica: Replica, batch: Any, step: int) -> StepResult:
        result = plain(replica, batch, step)
        if step not in steps:
            return result
        bad = {name: value * torch.nan for name, value in result.parts.items()}
        return StepResult(result.loss * torch.nan, bad, result.features * torch.nan)

    monkeypatch.setattr(loop, "_forward", forward)
    return steps


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of student and teacher."""
    state = {name: tensor for name, tensor in last_tensors(out).items() if name.startswith("learner.")}
    return {name: tensor for name, tensor in state.items() if "running" not in name and "num_batches" not in name}


@pytest.mark.parametrize("name", ["lejepa", "dino, ema"])
def test_a_step_with_a_nan_loss_changes_no_weight(small, store_path, tmp_path, poison, name):
    """A run whose step 0 and 5 (health is measured there too) are bad; the weights after step 5 are those after 4."""
    recipe = replace(small[name], run=replace(small[name].run, steps=6, checkpoint_every=1))
    poison.update({0, 5})
    pretrain(recipe, store_path, tmp_path / "run")
    lines = numbers(tmp_path / "run")
    assert [line["step"] for line in lines if line.get("skipped")] == [0, 5]
    assert "lr" not in lines[5]
    assert lines[4]["lr"] > 0
    after = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    before = weights(tmp_path / "run")
    for key, tensor in before.items():
        if "center" not in key:
            assert torch.equal(tensor, after[key])


def test_a_nan_gradient_changes_no_weight(small, store_path, tmp_path, monkeypatch):
    """A finite loss whose gradient is not: the root of zero."""
    plain = loop._forward

    def forward(replica: Replica, batch: Any, step: int) -> StepResult:
        result = plain(replica, batch, step)
        if step != 3:
            return result
        zero = sum((p * 0).sum() for p in replica.learner.student.parameters())
        return StepResult(result.loss + zero.sqrt(), result.parts, result.features)

    monkeypatch.setattr(loop, "_forward", forward)
    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, steps=6))
    pretrain(recipe, store_path, tmp_path / "run")
    assert [line["step"] for line in numbers(tmp_path / "run") if line.get("skipped")] == [3]
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_a_bad_batch_does_not_poison_the_centre(small, store_path, tmp_path, monkeypatch):
    """With running-mean centring the teacher's logits of a bad batch must not live on in the centre."""
    recipe = replace(small["dino, ema"], run=replace(small["dino, ema"].run, steps=4))
    plain = loop._forward

    def forward(replica: Replica, batch: Any, step: int) -> StepResult:
        return plain(replica, replace(batch, globals=batch.globals * torch.nan) if step == 1 else batch, step)

    monkeypatch.setattr(loop, "_forward", forward)
    pretrain(recipe, store_path, tmp_path / "run")
    assert [line["step"] for line in numbers(tmp_path / "run") if line.get("skipped")] == [1]
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_ten_bad_steps_in_a_row_end_the_run(small, store_path, tmp_path, poison):
    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, steps=40, checkpoint_every=2))
    poison.update({1, 2, 3, *range(5, 40)})
    with pytest.raises(
        TrainingDiverged, match=r"for 10 steps in a row up to step 14 .* optimiser\.lr= at half"
    ) as caught:
        pretrain(recipe, store_path, tmp_path / "run")
    assert "the weights are finite" in str(caught.value)
    assert len(numbers(tmp_path / "run")) == 15


# ---- a full disk


def test_a_full_disk(small, store_path, tmp_path, monkeypatch):
    """The checkpoint before stays whole, nothing half-written is left, and the same command goes on."""
    recipe = replace(small["lejepa"], run=replace(small["lejepa"].run, steps=6, checkpoint_every=2))
    plain = checkpoint.save_file

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        if "00000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save)
        with pytest.raises(DiskFull, match="free some space and run the same command again"):
            pretrain(recipe, store_path, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    pretrain(recipe, store_path, tmp_path / "run")
    pretrain(recipe, store_path, tmp_path / "whole")
    same_end(tmp_path / "whole", tmp_path / "run")
