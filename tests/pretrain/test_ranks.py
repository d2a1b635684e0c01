"""Several ranks do what one does: gloo processes on the CPU, forked from one server that has torch loaded."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hilum.pretrain.loop import pretrain, read_lines
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.watch.health import CLOCK

Spawn = Callable[..., tuple[list[int | None], list[str]]]


@pytest.fixture(scope="module")
def scenarios() -> Iterator[Any]:
    sys.path.insert(0, str(Path(__file__).parent))
    import rank_scenarios

    yield rank_scenarios
    sys.path.pop(0)


@pytest.fixture(scope="module")
def spawn(scenarios: Any, tmp_path_factory: pytest.TempPathFactory) -> Spawn:
    """Run a scenario on some ranks; returns exit codes and what each rank said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hilum.pretrain.loop", "torch.distributed.fsdp", "torch.utils.tensorboard", "torch._dynamo"]
    )

    def run(world: int, scenario: Any, *arguments: Any) -> tuple[list[int | None], list[str]]:
        meeting = tmp_path_factory.mktemp("meeting") / "point"
        processes = [
            context.Process(target=scenarios.enter, args=(scenario, rank, world, meeting, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
        said = [meeting.with_suffix(f".{rank}.txt") for rank in range(world)]
        return [process.exitcode for process in processes], [p.read_text() if p.exists() else "" for p in said]

    return run


def numbers(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_lines(out / "metrics.jsonl")]


def last_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, rows put together in a slow way."""
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for file_name in sorted(sorted((out / "checkpoints").glob("step-*"))[-1].glob("*.safetensors")):
        with safe_open(file_name, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                first = offsets[name]["saved_offsets"]
                rows.setdefault(name, {})[first[0] if first else 0] = file.get_tensor(name)
    return {name: torch.cat([p for _, p in sorted(parts.items())]) if len(parts) > 1 else parts.popitem()[1]
            for name, parts in rows.items()}  # fmt: skip


def same_numbers(a: Path, b: Path, tolerance: float) -> None:
    """Losses and weights up to `tolerance`; parts, gradient norms, moments, centres up to 5 times that; 0: bit for bit."""
    left, right = numbers(a), numbers(b)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right):
        assert one.keys() == other.keys()
        for key in one.keys() - {"spread", "rank", "norm"}:  # of the first rank's samples
            near = tolerance if key == "loss" else 5 * tolerance
            assert one[key] == pytest.approx(other[key], rel=near, abs=near), f"step {one['step']}: {key}"
    tensors, others = last_tensors(a), last_tensors(b)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        if tolerance and "running_mean" in name:
            continue  # follows the bias before it
        where = led(tensors, name) if tolerance else torch.ones_like(tensor, dtype=torch.bool)
        near = tolerance if name.startswith(("learner.student", "learner.teacher")) else 5 * tolerance
        torch.testing.assert_close(
            tensor[where],
            others[name][where],
            rtol=near,
            atol=near,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )
    exports = [load_file(out / "export" / "model.safetensors") for out in (a, b)]
    for out, export in zip((tensors, others), exports):
        for name, tensor in export.items():
            assert torch.equal(tensor, out[f"learner.teacher.backbone.{name}"])


def led(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Where a weight has had a gradient. Biases before a BatchNorm and those of keys have none, and AdamW, which divides by
    the gradient's size, makes whole steps of its rounding errors."""
    parameter = name.removeprefix("learner.student.").removeprefix("learner.teacher.")
    squares = tensors.get(f"optimiser.{parameter}.exp_avg_sq")
    if squares is None:
        return torch.ones_like(tensors[name], dtype=torch.bool)
    steps = tensors[f"optimiser.{parameter}.step"]
    return (squares / (1 - 0.999**steps)).sqrt() > 1e-6


def make(recipe: Recipe, *, steps: int = 20, accumulate: int = 1, parallel: Any = "ddp", **objective: Any) -> Recipe:
    """Eight slices a step, no drop path, a checkpoint every four steps."""
    return replace(
        recipe,
        model=replace(recipe.model, drop_path=0.0),
        objective=replace(recipe.objective, **objective),
        optimiser=replace(recipe.optimiser, lr=2e-4),
        run=replace(
            recipe.run, steps=steps, batch_size=8, accumulate=accumulate, parallel=parallel, checkpoint_every=4
        ),
    )


@pytest.fixture(scope="module")
def plain(small: dict[str, Recipe]) -> Recipe:
    return make(small["dino, sinkhorn"], steps=8, batch_norm=False)


# ---- the same numbers


def test_losses_do_not_depend_on_the_number_of_ranks(spawn, scenarios, tmp_path):
    """SigReg's value and gradient, KoLeo's, and the rows of Sinkhorn-Knopp, of 16 rows on 1, 2 and 4 ranks."""
    whole = scenarios.loss_values(0, 1)
    for world in (2, 4):
        codes, said = spawn(world, scenarios.lose, tmp_path)
        assert codes == [0] * world, "\n".join(said)
        parts = [torch.load(tmp_path / f"{rank}-of-{world}.pt") for rank in range(world)]
        for name, expected in whole.items():
            if expected.ndim:
                torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected, msg=name)
            else:
                for part in parts:
                    mean = torch.stack([part[name] for part in parts]).mean()
                    torch.testing.assert_close(mean if name == "koleo" else part[name], expected, msg=name)


def objectives(small: dict[str, Recipe]) -> dict[str, Recipe]:
    dino = small["dino, sinkhorn"]
    return {
        "dino, no regulariser": make(small["dino, ema"], batch_norm=False, regulariser="none"),
        "dino, sinkhorn, sigreg, BatchNorm": make(dino),
        "dino, ema, koleo, BatchNorm": make(small["dino, ema"], regulariser_weight=0.005),
        "dino, micro-batches": make(dino, accumulate=2),
        "lejepa": make(small["lejepa"]),
        "lejepa, patches": make(small["lejepa, patches"]),
        "lejepa, then dino": make(dino, handover=0.5),
    }


NAMES = [
    "dino, no regulariser",
    "dino, sinkhorn, sigreg, BatchNorm",
    "dino, ema, koleo, BatchNorm",
    "dino, micro-batches",
    "lejepa",
    "lejepa, patches",
    "lejepa, then dino",
]


@pytest.fixture(scope="module")
def runs_of_two(spawn: Spawn, scenarios: Any, small: Any, store_path: Path, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("two")
    recipes = objectives(small)
    assert list(recipes) == NAMES
    runs = [(recipe, out / name) for name, recipe in recipes.items()]
    codes, said = spawn(2, scenarios.train, store_path, runs)
    assert codes == [0, 0], "\n".join(said)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_do_what_one_does(small, store_path, tmp_path, runs_of_two, name):
    pretrain(objectives(small)[name], store_path, tmp_path / "one")
    same_numbers(tmp_path / "one", runs_of_two / name, 1e-5)


def test_fsdp_does_what_ddp_does(plain, spawn, scenarios, store_path, tmp_path):
    recipes = {"ddp": plain, "ddp, 2": make(plain, steps=8, accumulate=2)}
    recipes |= {f"fs{name}": replace(r, run=replace(r.run, parallel="fsdp")) for name, r in recipes.items()}
    codes, said = spawn(2, scenarios.train, store_path, [(r, tmp_path / name) for name, r in recipes.items()])
    assert codes == [0, 0], "\n".join(said)
    same_numbers(tmp_path / "ddp", tmp_path / "fsddp", 1e-5)
    same_numbers(tmp_path / "ddp, 2", tmp_path / "fsddp, 2", 1e-5)


# ---- resume


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_and_resumed_bit_for_bit(plain, spawn, scenarios, store_path, tmp_path, parallel):
    recipe = replace(plain, run=replace(plain.run, parallel=parallel))
    codes, said = spawn(2, scenarios.train_and_kill, store_path, recipe, tmp_path / "parts", 6)
    assert codes == [-signal.SIGKILL, 3], "\n".join(said)
    assert "RankLost: rank 1 of 2 lost another rank" in said[1]
    codes, said = spawn(2, scenarios.train, store_path, [(recipe, tmp_path / "parts"), (recipe, tmp_path / "whole")])
    assert codes == [0, 0], "\n".join(said)
    same_numbers(tmp_path / "parts", tmp_path / "whole", 0)


def test_two_ranks_then_one(small, plain, spawn, scenarios, store_path, tmp_path):
    """Killed on two ranks with sharded weights, finished on one: the same slices, the same numbers."""
    recipe = replace(plain, run=replace(plain.run, parallel="fsdp"))
    spawn(2, scenarios.train_and_kill, store_path, recipe, tmp_path / "parts", 6)
    pretrain(recipe, store_path, tmp_path / "parts")
    pretrain(recipe, store_path, tmp_path / "whole")
    same_numbers(tmp_path / "parts", tmp_path / "whole", 1e-5)


@pytest.mark.nightly
def test_volumes_on_two_ranks(small, spawn, scenarios, volume_stores, tmp_path):
    """The same shapes, volumes and masks on one rank and on two; killed and resumed bit for bit."""
    recipe = make(small["3d, dino"], steps=8, batch_norm=False)
    store = volume_stores / "iso"
    pretrain(recipe, store, tmp_path / "one")
    codes, said = spawn(2, scenarios.train_and_kill, store, recipe, tmp_path / "parts", 6)
    assert codes == [-signal.SIGKILL, 3], "\n".join(said)
    codes, said = spawn(2, scenarios.train, store, [(recipe, tmp_path / "parts"), (recipe, tmp_path / "whole")])
    assert codes == [0, 0], "\n".join(said)
    same_numbers(tmp_path / "parts", tmp_path / "whole", 0)
    same_numbers(tmp_path / "one", tmp_path / "whole", 1e-4)


def test_killed_while_a_checkpoint_is_written(plain, spawn, scenarios, store_path, tmp_path):
    """The one before stays the newest; what was begun is cleared away."""
    codes, said = spawn(2, scenarios.train_and_kill_in_save, store_path, plain, tmp_path / "parts", 8)
    assert codes[1] == -signal.SIGKILL, "\n".join(said)
    assert codes[0] == 3
    names = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir())
    assert names == [".step-00000008.tmp", "step-00000004"]
    runs = [(plain, tmp_path / "parts"), (plain, tmp_path / "whole")]
    codes, said = spawn(2, scenarios.train, store_path, runs)
    assert codes == [0, 0], "\n".join(said)
    assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    same_numbers(tmp_path / "parts", tmp_path / "whole", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all(plain, spawn, scenarios, store_path, tmp_path, number):
    codes, said = spawn(2, scenarios.train_and_signal, store_path, plain, tmp_path / "run", 2, int(number))
    assert codes == [143, 143], "\n".join(said)
    assert said[0].startswith(f"Interrupted: stopped by {number.name} after step 3 of 8; checkpoint written.")
    assert said[1] == ""
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_torchs_own_reader_reads_our_checkpoints(plain, spawn, scenarios, store_path, tmp_path):
    from torch.distributed import checkpoint as dcp

    recipe = replace(plain, run=replace(plain.run, parallel="fsdp", steps=2))
    codes, said = spawn(2, scenarios.train, store_path, [(recipe, tmp_path / "run")])
    assert codes == [0, 0], "\n".join(said)
    ours = last_tensors(tmp_path / "run")
    theirs = {name: torch.full_like(tensor, torch.nan) for name, tensor in ours.items()}
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    with warnings.catch_warnings(action="ignore"):  # that this is one process
        dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


# ---- what goes wrong on one rank


def test_a_bad_loss_on_one_rank_is_skipped_by_all(plain, spawn, scenarios, store_path, tmp_path):
    codes, said = spawn(2, scenarios.train_with_nan, store_path, plain, tmp_path / "run", {3})
    assert codes == [0, 0], "\n".join(said)
    assert [line["step"] for line in numbers(tmp_path / "run") if line.get("skipped")] == [3]
    assert all(tensor.isfinite().all() for tensor in last_tensors(tmp_path / "run").values())


def test_ten_bad_losses_on_one_rank_end_all(plain, spawn, scenarios, store_path, tmp_path):
    recipe = make(plain, steps=16)
    codes, said = spawn(2, scenarios.train_with_nan, store_path, recipe, tmp_path / "run", set(range(3, 16)))
    assert codes == [3, 3], "\n".join(said)
    assert (
        "TrainingDiverged: the loss or its gradient was NaN or infinite for 10 steps in a row up to step 12" in said[0]
    )
    assert said[1] == ""


def test_an_error_of_one_rank_ends_all_and_says_which(plain, spawn, scenarios, store_path, tmp_path):
    codes, said = spawn(2, scenarios.train_and_fail, store_path, plain, tmp_path / "run")
    assert codes == [3, 3], "\n".join(said)
    assert said[1] == "HilumError: rank 1 of 2: the disk of this node is gone\n"
    assert said[0].startswith(
        "RankLost: rank 0 of 2 lost another rank; the message of the one that ended first says why"
    )


def test_a_batch_that_cannot_be_shared(small, spawn, scenarios, store_path, tmp_path):
    recipe = make(small["lejepa"])
    recipe = replace(recipe, run=replace(recipe.run, batch_size=9, accumulate=3))
    codes, said = spawn(2, scenarios.train, store_path, [(recipe, tmp_path / "run")])
    assert codes == [2, 2]
    assert "run.batch_size 9 cannot be shared by 2 ranks × 3 micro-batches; choose a multiple of 6" in said[0]
    assert said[1] == ""


# ---- torchrun


def test_torchrun_is_stopped_and_goes_on(store_path, tmp_path):
    """The whole command line: SIGTERM to the launcher, a checkpoint, and the same command again."""
    out = tmp_path / "run"
    (tmp_path / "mine.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hilum"]
    command += ["pretrain", str(tmp_path / "mine.toml"), "--data", str(store_path), "-o", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert output.count("hilum: stopped by SIGTERM after step") == 1, output
    stopped = int(output.split("after step ")[1].split()[0])
    assert (out / "checkpoints" / f"step-{stopped:08d}" / "index.json").is_file()
    done = subprocess.run(
        [*command, "--set", "run.num_workers=0"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encoder mine after 60 steps") == 1
    assert [line["step"] for line in numbers(out)] == list(range(60))


RECIPE = """
base = "tiny"
[model]
size = "nano"
patch = [8, 8]
image = [32, 32]
[views]
num_local = 2
global_px = 32
local_px = 16
[objective]
hidden = 32
projector_dim = 8
sigreg_slices = 32
[run]
steps = 60
batch_size = 4
precision = "fp32"
checkpoint_every = 5
"""
