"""The table of released encoders agrees with the contracts, the transformers and the page that it describes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hilum.encode.contract import Contract
from hilum.encode.released.models import MODELS, find_released, is_repo, model_folder, models_markdown
from hilum.encode.released.siglip import SiglipConfig, SiglipTower
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract
from hilum.encode.zoo import LAYOUTS
from hilum.errors import UsageError
from hilum.records import hash_json
from hilum.settings import from_dict, to_dict

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", MODELS)
def test_contracts_are_complete_and_legal(name):
    """Without torch the hash is made from the table's values: they must be all, and mean what the class makes of them."""
    model = MODELS[name]
    contract = from_dict(Contract if model.dimension == 2 else VolumeContract, dict(model.contract))
    later = {} if model.dimension == 2 else {"edges": "cut", "longest": 0}  # fields that no hash counts at these values
    assert to_dict(contract) == later | dict(model.contract)
    assert contract.hash == hash_json(model.contract)


SHAPES = {
    "curia": {"size": "base", "image": (512, 512)},
    "curia-2": {"size": "base", "image": (512, 512)},
    "rad-dino": {"size": "base-mlp", "patch": (14, 14), "image": (518, 518), "channels": 3},
    **{
        f"dinov2-{registers}{size}": {
            "size": ours, "patch": (14, 14), "image": (518, 518), "channels": 3, "num_registers": 4 * bool(registers),
        }
        for size, ours in {"small": "small", "base": "base-mlp", "large": "large-mlp", "giant": "giant"}.items()
        for registers in ("", "with-registers-")
    },
    **{
        f"dinov3-{name}": {"size": ours, "positions": "rotary", "num_registers": 4, "channels": 3}
        for name, ours in {
            "vits16": "small", "vitsplus16": "small-plus", "vitb16": "base-mlp", "vitl16": "large-mlp",
            "vithplus16": "huge-plus",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_number_of_parameters(name):
    with torch.device("meta"):
        network = ViT(ViTConfig(**SHAPES[name]))
    assert sum(p.numel() for p in network.parameters()) == MODELS[name].num_parameters
    patch, c = network.config.patch[0], MODELS[name].contract
    assert c["size_px"] % patch == 0
    assert c["channels"] == network.config.channels


@pytest.mark.parametrize(("name", "head"), [("medsiglip", True), ("medgemma", False), ("medgemma-1.5", False)])
def test_number_of_parameters_of_towers(name, head):
    side = MODELS[name].contract["size_px"]
    config = SiglipConfig(width=1152, depth=27, heads=16, hidden=4304, patch=(14, 14), image=(side, side), channels=3,
                          norm_eps=1e-6, head=head)  # fmt: skip
    with torch.device("meta"):
        assert sum(p.numel() for p in SiglipTower(config).parameters()) == MODELS[name].num_parameters


def test_names():
    names = [n for m in MODELS.values() for n in (m.name, *m.aliases, m.repo)]
    assert len(names) == len(set(names))
    assert find_released("curia-2-b") is find_released("raidium/curia-2") is MODELS["curia-2"]
    assert find_released("curia-3") is None
    assert {m.layout for m in MODELS.values()} == set(LAYOUTS) - {"exported"}
    assert all(is_repo(m.repo) for m in MODELS.values())
    assert not any(is_repo(n) for n in ("curia", "a/b/c", "../b", "a/../b", "/a", "a/", "a b/c", "a/b\n"))


def test_where_models_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HILUM_HOME", str(tmp_path))
    assert model_folder("curia-2-b").name == "curia-2@645f566dd9e002505691178917cee265b491c7f7"
    assert model_folder("owner/name", "refs/pr/1") == tmp_path / "models" / "owner--name@refs--pr--1"
    monkeypatch.delenv("HILUM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert model_folder("curia").parent == tmp_path / "cache" / "hilum" / "models"
    with pytest.raises(UsageError, match="did you mean curia-2 or curia"):
        model_folder("curia-22")


def test_the_page_is_the_table():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    assert models_markdown() in page, "docs/models.md is stale: put what `hilum models --markdown` prints into it"


@pytest.mark.parametrize(
    "command", [["models"], ["models", "--json"], ["info", "medgemma"], ["info", "curia-2", "--json"]]
)
def test_looking_at_what_is_not_here_loads_no_torch(command, tmp_path):
    code = f"""
import resource, sys
sys.argv = ["hilum", *{command}]
from hilum.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
used = resource.getrusage(resource.RUSAGE_SELF)
print("\\n" + str(used.ru_utime + used.ru_stime), "torch" in sys.modules)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HILUM_HOME": str(tmp_path)}
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        used, loaded = done.stdout.splitlines()[-1].split()
        assert loaded == "False"
        seconds.append(float(used))
        if min(seconds) < 0.5:
            break
    assert min(seconds) < 0.5
    assert max(len(line) for line in done.stdout.splitlines()) <= 100 or "--json" in command
