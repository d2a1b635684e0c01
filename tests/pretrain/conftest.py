"""A small store of synthetic volumes, and recipes that train on it within a second or two."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.store import open_for_writing, write_header, write_volume
from hilum.encode.vit import ViTConfig
from hilum.pretrain.recipe import Objective, Optimiser, Recipe, Run, ViewSpec
from hilum.volume import Volume


def write_store(root: Path, num_volumes: int = 4, seed: int = 0, size: tuple[float, float] = (0.5, 0.9)) -> Path:
    """Bodies of random shape on air, `size` of the field: CT and MR in turn, (6, 48, 40)."""
    rng = np.random.default_rng(seed)
    open_for_writing(root, {"settings": {"seed": seed}})
    rows = []
    y, x = np.mgrid[-1:1:48j, -1:1:40j]
    for number in range(num_volumes):
        ct = number % 2 == 0
        a, b = rng.uniform(*size, 2)
        body = (y / a) ** 2 + (x / b) ** 2 < 1
        texture = rng.normal(0, 60, (6, 48, 40)) + 200 * np.sin(rng.uniform(3, 9) * x + rng.uniform(0, 6))
        voxels = np.where(body, 40 + texture, -1000 if ct else 0)
        voxels = voxels if ct else np.clip(voxels + 300 * body, 0, None)
        vol = Volume(
            voxels=np.rint(voxels).astype(np.int16),
            affine=np.diag([3.0, 2.0, 2.0, 1.0])[:, [2, 1, 0, 3]],
            modality="CT" if ct else "MR",
            unit="HU" if ct else "",
        )
        rows.append(write_volume(root, f"{number:02d}aa", vol, patient=f"p{number}"))
    write_index(index_path(root), rows)
    write_header(root, {"status": "complete", "settings": {"seed": seed}})
    return root


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="session")
def other_store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "other", seed=1)


@pytest.fixture(scope="session")
def airy_store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little anatomy in much air."""
    return write_store(tmp_path_factory.mktemp("data") / "airy", size=(0.05, 0.3))


LEJEPA = Recipe(
    name="small",
    model=ViTConfig(size="nano", patch=(8, 8), image=(32, 32), drop_path=0.25, layer_scale=0.0),
    views=ViewSpec(num_local=2, global_px=32, local_px=16, min_image_foreground=0.2, flip=0.5, mask_group=2),
    objective=Objective(kind="lejepa", hidden=32, projector_dim=8, sigreg_slices=32),
    optimiser=Optimiser(lr=2e-3, freeze_last_layer=0.0),
    run=Run(steps=20, batch_size=4, precision="fp32", checkpoint_every=10, health_every=5, num_workers=0),
)
DINO = replace(
    LEJEPA,
    name="small-dino",
    objective=Objective(
        prototypes=24, hidden=32, bottleneck=16, batch_norm=True, sigreg_slices=32, regulariser_on="bottleneck"
    ),
)
SMALL = {
    "lejepa": LEJEPA,
    "lejepa, patches": replace(LEJEPA, objective=replace(LEJEPA.objective, patch_weight=0.5)),
    "dino, sinkhorn": DINO,
    "dino, ema": replace(DINO, objective=replace(DINO.objective, centring="ema", regulariser="koleo")),
}


@pytest.fixture(scope="session")
def small() -> dict[str, Recipe]:
    """Recipes by name; `replace` them at will."""
    return SMALL
