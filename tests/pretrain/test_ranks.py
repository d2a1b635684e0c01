"""Several ranks do what one does: gloo processes on the CPU, forked from one server that has torch loaded."""

import json
import multiprocessing
import signal
import sys
import time
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
    context.set_forkserver_preload(["rank_scenarios", "torch.distributed.fsdp", "torch.utils.tensorboard"])

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
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(out / "metrics.jsonl")]


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
    """Losses and their parts, gradient norms, all weights and buffers, up to `tolerance`; 0 means bit for bit."""
    left, right = numbers(a), numbers(b)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right):
        assert one.keys() == other.keys()
        for key in one.keys() - {"spread", "rank", "norm"}:  # of the first rank's samples
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), f"step {one['step']}: {key}"
    tensors, others = last_tensors(a), last_tensors(b)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023
    exports = [load_file(out / "export" / "model.safetensors") for out in (a, b)]
    for name, tensor in exports[0].items():
        torch.testing.assert_close(tensor, exports[1][name], rtol=tolerance, atol=tolerance)


def make(recipe: Recipe, *, steps: int = 20, accumulate: int = 1, parallel: Any = "ddp", **objective: Any) -> Recipe:
    """Eight slices a step, no drop path, a checkpoint every four steps."""
    return replace(
        recipe,
        model=replace(recipe.model, drop_path=0.0),
        objective=replace(recipe.objective, **objective),
        run=replace(
            recipe.run, steps=steps, batch_size=8, accumulate=accumulate, parallel=parallel, checkpoint_every=4
        ),
    )


@pytest.fixture(scope="module")
def plain(small: dict[str, Recipe]) -> Recipe:
    return make(small["dino, sinkhorn"], steps=8, batch_norm=False)


# ---- the same numbers


def objectives(small: dict[str, Recipe]) -> dict[str, Recipe]:
    dino = small["dino, sinkhorn"]
    return {
        "dino, no regulariser": make(small["dino, ema"], batch_norm=False, regulariser="none"),
        "dino, sinkhorn, sigreg, BatchNorm": make(dino),
        "dino, ema, koleo, BatchNorm": make(small["dino, ema"]),
        "dino, micro-batches": make(dino, accumulate=2),
        "lejepa": make(small["lejepa"]),
        "lejepa, patches": make(small["lejepa, patches"]),
    }


NAMES = [
    "dino, no regulariser",
    "dino, sinkhorn, sigreg, BatchNorm",
    "dino, ema, koleo, BatchNorm",
    "dino, micro-batches",
    "lejepa",
    "lejepa, patches",
]


@pytest.fixture(scope="module")
def runs_of_two(spawn: Spawn, scenarios: Any, small: Any, store_path: Path, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("two")
    runs = [(recipe, out / name) for name, recipe in objectives(small).items()]
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
