"""Twenty steps of each family of presets, shrunk to a second, against the curve that is stored.

A change that should not alter the maths reproduces them; other processors differ by rounding. One that should: delete the file,
run this twice (the first time it writes and fails), say why in docs/log.md.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hilum.pretrain.loop import pretrain, read_lines
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.recipe import Recipe
from hilum.settings import override

GOLDEN = Path(__file__).parent / "golden_losses.json"
SHRUNK = [
    *("model.size=nano", "model.patch=[8, 8]", "model.image=[32, 32]", "model.drop_path=0.25"),
    *("views.global_px=32", "views.local_px=16", "views.num_local=2", "views.min_image_foreground=0.2"),
    *("objective.prototypes=24", "objective.hidden=32", "objective.bottleneck=16", "objective.projector_dim=8"),
    *("objective.sigreg_slices=32", "run.steps=20", "run.batch_size=4", "run.precision=fp32", "run.num_workers=0"),
]
BEYOND = [
    *("objective.handover=0.5", "objective.gram_weight=2", "objective.gram_start=0.5", "objective.gram_px=64"),
    *("objective.patch_weight=0.5", "model.positions=rotary", "model.rope_rescale=2", "model.num_registers=4"),
    *("views.resolutions=[[32, 16, 0.5], [48, 24, 0.5]]", "sampling.mr=2", "sampling.volume_power=0.5"),
]
FAMILIES = {
    "tiny": ("tiny", []),
    "small": ("small", []),
    "curia": ("curia-b", []),
    "curia2": ("curia2-b", []),
    "curia2 at 512": ("curia2-b-512", []),
    "ablation, SigReg": ("ablation/3", []),
    "running mean": ("curia2-b", ["objective.centring=ema"]),
    "beyond the paper": ("small", BEYOND),
}


def shrink(name: str, changes: list[str]) -> Recipe:
    return replace(override(load_recipe(name), [*SHRUNK, *changes]), needs_start=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_curve(store_path, tmp_path, family):
    pretrain(shrink(*FAMILIES[family]), store_path, tmp_path / "run")
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    names = [n for n in ("loss", "dino", "ibot", "gram", "invariance", "grad_backbone") if any(n in x for x in lines)]
    found = {name: [round(line[name], 6) for line in lines if name in line] for name in names}
    assert len(found["loss"]) == 20
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if family not in stored:
        GOLDEN.write_text(json.dumps({**stored, family: found}, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"no stored curve for '{family}'; it was written now, look at it and run again")
    assert found.keys() == stored[family].keys()
    for name, values in stored[family].items():
        assert found[name] == pytest.approx(values, rel=2e-2, abs=1e-3), name
