"""Plans: figures against published arithmetic and the store itself; what limits a run, and whether the advice cures it."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from hilum.archive.store.store import Store, volume_path
from hilum.errors import UsageError
from hilum.pretrain.cost import memory
from hilum.pretrain.plan import DEVICES, USABLE, Hardware, format_plan, parse_hardware, plan
from hilum.pretrain.presets import RECIPES
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.sampling import count_slices
from hilum.settings import override


def value(made, name: str) -> float:
    return made.figures[name].value


# ---- figures


@pytest.mark.parametrize(
    ("name", "drop_path", "hours"),
    [
        ("curia2-b", 0, 399),
        ("curia2-b", 0.3, 303),
        ("curia2-l", 0.3, 1036),
        ("curia2-g", 0, 5072),
        ("curia2-g", 0.4, 3395),
    ],
)
def test_device_hours_of_the_table(name, drop_path, hours):
    """400 M images on A100 at half its peak, 4 registers and 65,536 prototypes."""
    settings = ["model.num_registers=4", "objective.prototypes=65536", f"model.drop_path={drop_path}"]
    recipe = override(RECIPES[name], [*settings, "run.batch_size=4000", "run.steps=100000"])
    made = plan(recipe, None, Hardware("A100", 32), utilisation=0.5)
    assert value(made, "images") == 400_000_000
    assert value(made, "device hours") == pytest.approx(hours, rel=0.01)
    assert value(made, "hours") * 32 == pytest.approx(value(made, "device hours"))


def test_figures_agree_with_one_another():
    recipe = RECIPES["curia2-b"]
    made = plan(recipe, None, parse_hardware("32xA100"))
    assert value(made, "FLOPs of the run") == pytest.approx(value(made, "FLOPs an image") * 480_000_000)
    assert value(made, "tokens a step") == 3840 * (2 * 257 + 8 * 37)
    parts = ["weights", "casts", "gradients", "moments", "teacher", "activations", "heads"]
    assert sum(value(made, f"  {part}") for part in parts) == pytest.approx(value(made, "memory a device"))
    assert value(made, "images a second") * value(made, "hours") * 3600 == pytest.approx(480_000_000)
    assert all(figure.why for figure in made.figures.values())
    assert value(plan(recipe, None, parse_hardware("32xH100")), "hours") < value(made, "hours") / 3
    slow = plan(override(recipe, ["run.precision=fp32"]), None, parse_hardware("32xA100"))
    assert value(slow, "hours") == pytest.approx(value(made, "hours") * 312 / 19.5)


def test_the_largest_batch_is_the_largest():
    for name, hardware in (("curia2-b", "8xA100-40GB"), ("curia2-g", "8xA100"), ("curia2-b-512", "8xH200")):
        recipe, made, hw = RECIPES[name], plan(RECIPES[name], None, parse_hardware(hardware)), parse_hardware(hardware)
        ways = {"largest batch a device": {}, "  recomputed": {"checkpoint_blocks": True}}
        ways["  and shared out"] = {"checkpoint_blocks": True, "shards": 8}
        for figure, options in ways.items():
            n = int(value(made, figure))
            assert (
                memory(recipe, n, **options).total <= USABLE * hw.device.memory < memory(recipe, n + 1, **options).total
            )


def test_what_the_store_says(store_path):
    store = Store(store_path)
    recipe = override(RECIPES["tiny"], ["views.min_image_foreground=0.45"])
    made = plan(recipe, store, parse_hardware("2xcpu"))
    assert 0 < value(made, "training slices") == count_slices(store, 0.45).sum() < store.num_slices
    assert value(made, "epochs") == pytest.approx(800 * 48 / value(made, "training slices"))
    size = sum(volume_path(store_path, key).stat().st_size for key in store.sorted_keys())
    assert value(made, "reading") == pytest.approx(value(made, "images a second") * size / store.num_slices)


def test_without_a_store_its_figures_are_left_out_and_said_so():
    made = plan(RECIPES["tiny"], None, parse_hardware("cpu"))
    assert not {"training slices", "epochs", "reading"} & made.figures.keys()
    assert "Without --data" in format_plan(made)


# ---- what limits a run


def limit(recipe: Recipe, hardware: str, store: Store | None = None) -> tuple[str, str]:
    made = plan(recipe, store, parse_hardware(hardware))
    return made.limit, "\n".join(made.advice)


def test_compute_limits_a_run_that_fits():
    sentence, advice = limit(RECIPES["curia2-b"], "32xA100")
    assert re.match(r"What limits it: compute, 16\.\d h at 30% of the peak", sentence)
    assert advice == ""


def test_an_uneven_batch_comes_out_even_by_following_the_advice():
    sentence, advice = limit(RECIPES["curia2-l"], "7xH200")
    assert sentence == "What limits it: the batch: 3,072 slices cannot be shared out evenly over 7."
    batch, devices = map(int, re.match(r"--set run\.batch_size=(\d+), or take (\d+) devices", advice).groups())  # type: ignore[union-attr]
    assert (batch % 7, 3072 % devices, abs(batch - 3072) < 7) == (0, 0, True)
    assert "the batch" not in limit(override(RECIPES["curia2-l"], [f"run.batch_size={batch}"]), "7xH200")[0]


def test_memory_is_cured_by_the_least_that_does():
    sentence, advice = limit(RECIPES["curia2-b"], "15xA100-64GB")
    assert "memory: 67.7 GB, where a device has 64 GB" in sentence
    assert advice.startswith("--set run.recompute=true")
    assert memory(RECIPES["curia2-b"], 256, checkpoint_blocks=True).total < 0.9 * 64e9
    _, advice = limit(RECIPES["curia2-g"], "16xA100-64GB")
    assert advice == "--set run.recompute=true --set run.parallel=fsdp"
    _, advice = limit(RECIPES["curia2-g"], "8xA100-64GB")
    pieces = int(re.search(r"accumulate=(\d+)", advice).group(1))  # type: ignore[union-attr]
    assert 320 % pieces == 0
    assert memory(RECIPES["curia2-g"], 320 // pieces, checkpoint_blocks=True, shards=8).total < 0.9 * 64e9
    _, advice = limit(RECIPES["curia2-g"], "L4")
    assert advice.startswith("not even one slice fits")


def test_views_limit_fast_devices_with_few_workers():
    recipe = override(RECIPES["curia2-b"], ["run.num_workers=1", "run.batch_size=800"])
    sentence, advice = limit(recipe, "8xB200")
    assert sentence.startswith("What limits it: making views: 3 cores a device")
    assert advice.startswith("--set run.num_workers=3")
    assert "compute" in limit(override(recipe, ["run.num_workers=3"]), "8xH200")[0]


def test_too_few_slices_and_too_few_steps(store_path):
    store = Store(store_path)
    found = "What limits it: too few slices"
    assert limit(RECIPES["tiny"], "2xcpu", store)[0].startswith(f"{found}: 24 for a batch of 48")
    recipe = override(RECIPES["tiny"], ["run.batch_size=8"])
    sentence, advice = limit(recipe, "2xcpu", store)
    assert sentence == f"{found}: each is seen 267 times."
    steps = int(re.search(r"run\.steps=(\d+)", advice).group(1))  # type: ignore[union-attr]
    shorter = override(recipe, [f"run.steps={steps}"])
    assert value(plan(shorter, store, parse_hardware("cpu")), "epochs") == pytest.approx(200, rel=0.01)
    assert "compute" in limit(shorter, "cpu", store)[0]
    assert (
        "too few steps: 67% of the slices are never seen" in limit(override(recipe, ["run.steps=1"]), "cpu", store)[0]
    )


def test_no_steps_cost_nothing():
    made = plan(RECIPES["ablation/6"], None, parse_hardware("8xH100"))
    assert (made.limit, made.advice, value(made, "hours")) == ("Nothing limits it: no step is trained.", (), 0)


# ---- devices, pages, command


def test_hardware_by_name():
    assert parse_hardware("32xA100") == Hardware("A100", 32)
    assert (parse_hardware("h200"), str(parse_hardware("2xCPU"))) == (Hardware("H200", 1), "2xcpu")
    assert (parse_hardware("16xcpu").ranks, parse_hardware("16xL4").ranks) == (1, 16)
    for text in ("3xfoo", "0xA100", "x", "", "2 A100", "8"):
        with pytest.raises(UsageError, match=r"expected e\.g\. 32xA100; known: A10, A100, .*H200.*, cpu"):
            parse_hardware(text)
    with pytest.raises(UsageError, match=r"utilisation must be above 0 and at most 1; found 40"):
        plan(RECIPES["tiny"], None, parse_hardware("cpu"), utilisation=40)


@pytest.mark.parametrize("device", DEVICES)
def test_every_plan_fits_its_page(device, store_path):
    for name, recipe in RECIPES.items():
        made = plan(recipe, Store(store_path), parse_hardware(f"24x{device}"))
        assert all(len(line) <= 100 for line in format_plan(made).splitlines()), name
        json.dumps(asdict(made), allow_nan=False)


def test_lejepa_has_no_teacher_to_ask():
    made = plan(RECIPES["tiny"], None, parse_hardware("cpu"))
    assert "teacher 0 FLOP" in made.figures["FLOPs an image"].why
    dino = plan(replace(RECIPES["tiny"], objective=RECIPES["small"].objective), None, parse_hardware("cpu"))
    assert value(dino, "FLOPs an image") > value(made, "FLOPs an image") * 1.2


def test_the_command_loads_no_torch(store_path):
    code = "import sys; from hilum.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "print('torch' in sys.modules)"
    arguments = ["plan", "tiny", "--gpus", "2xcpu", "--data", str(store_path), "--set", "run.steps=9", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    record, loaded = done.stdout.splitlines()
    assert loaded == "False"
    made = json.loads(record)
    assert (made["hardware"], made["figures"]["steps"]["value"]) == ("2xcpu", 9)


def test_recompute_costs_time_and_saves_memory():
    plain = plan(RECIPES["curia2-l"], None, parse_hardware("16xA100"))
    lean = plan(override(RECIPES["curia2-l"], ["run.recompute=true"]), None, parse_hardware("16xA100"))
    flops = value(plain, "hours") / value(lean, "hours")
    assert 1 / 1.27 < flops < 1 / 1.2
    assert value(lean, "memory a device") == value(plain, "  with recompute") < value(plain, "memory a device") / 2
    assert value(lean, "  without recompute") == value(plain, "memory a device")
    assert "What limits it: memory" in plain.limit
    assert "What limits it: compute" in lean.limit


def test_micro_batches_and_shared_weights_are_reckoned():
    hardware = parse_hardware("8xA100")
    whole = plan(RECIPES["curia2-b"], None, hardware)
    recipe = override(RECIPES["curia2-b"], ["run.accumulate=4", "run.parallel=fsdp"])
    shared = plan(recipe, None, hardware)
    assert value(shared, "batch a device") == value(whole, "batch a device") / 4 == 120
    assert value(shared, "  weights") == value(whole, "  weights") / 8
    assert value(shared, "memory a device") == memory(recipe, 120, shards=8).total
    sentence, _ = limit(override(RECIPES["curia2-b"], ["run.accumulate=3", "run.batch_size=3840"]), "32xA100")
    assert "evenly" not in sentence
