"""A small store of synthetic volumes, and recipes that train on it within a second or two."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.isotropic import IsotropicSettings, make_isotropic, write_isotropic
from hilum.archive.store.store import Store, open_for_writing, write_header, write_volume
from hilum.encode.vit import ViTConfig
from hilum.pretrain.recipe import Intensity, Objective, Optimiser, Recipe, Run, ViewSpec
from hilum.pretrain.volume_spec import VolumeSpec
from hilum.settings import to_dict
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


def write_isotropic_store(root: Path, num_volumes: int = 4, seed: int = 0) -> Path:
    """Balls and rods on air, CT and MR in turn, (30, 26, 24) voxels of 1 mm, and last a slab of (30, 26, 4)."""
    rng, settings = np.random.default_rng(seed), IsotropicSettings(background_px=0)
    open_for_writing(root / "plain", {"settings": {}})
    rows = []
    z, y, x = np.mgrid[-1:1:30j, -1:1:26j, -1:1:24j]
    for number in range(num_volumes + 1):
        ct = number % 2 == 0
        a, b, c = rng.uniform(0.6, 1.1, 3)
        body = (z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2 < 1
        texture = rng.normal(0, 60, body.shape) + 200 * np.sin(rng.uniform(3, 9) * x + rng.uniform(0, 6))
        voxels = np.where(body, 40 + texture, -1000 if ct else 0)
        voxels = np.rint(voxels if ct else np.clip(voxels + 300 * body, 0, None)).astype(np.int16)
        affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
        kind = {"modality": "CT" if ct else "MR", "unit": "HU" if ct else ""}
        vol = Volume(voxels=voxels[:, :, 10:14] if number == num_volumes else voxels, affine=affine, **kind)
        rows.append(write_volume(root / "plain", f"{number:02d}aa", vol, patient=f"p{number}"))
    write_index(index_path(root / "plain"), rows)
    write_header(root / "plain", {"status": "complete", "settings": {}})
    plain = Store(root / "plain")
    header = {"derived": {"kind": "isotropic", **to_dict(settings), "source_hash": plain.hash}}
    open_for_writing(root / "iso", header)
    made = [write_isotropic(root / "iso", row, make_isotropic(plain, row, settings)) for row in plain.rows]
    write_index(index_path(root / "iso"), made)
    write_header(root / "iso", {**header, "status": "complete"})
    return root


@pytest.fixture(scope="session")
def volume_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store `plain`, and `iso` that was made of it."""
    return write_isotropic_store(tmp_path_factory.mktemp("volumes"))


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


_CUBES = VolumeSpec(
    shapes=(((16, 16, 16), (8, 8, 8), 2.0), ((8, 24, 24), (4, 12, 12), 1.0)),
    permute="fitting",
    mirror=False,
    max_patches=200,
)
LEJEPA_3D = replace(
    LEJEPA,
    name="small-3d",
    model=ViTConfig(size="nano", patch=(4, 4, 4), image=(16, 16, 16), positions="rotary", layer_scale=0.0),
    views=ViewSpec(
        num_local=2,
        local_scale=(0.3, 0.6),
        ct=Intensity(gain=0.02, offset=10.0, noise=20.0),
        mr=Intensity(gain=0.2, gamma=0.1, noise=0.05),
        mask_group=2,
    ),
    volumes=_CUBES,
    objective=replace(LEJEPA.objective, patch_weight=0.5, patch_points=4),
    run=replace(LEJEPA.run, steps=10, checkpoint_every=5),
)
DINO_3D = replace(LEJEPA_3D, name="small-dino-3d", objective=replace(DINO.objective, shared_head=True, centring="ema"))
SMALL |= {"3d, lejepa": LEJEPA_3D, "3d, dino": DINO_3D}


@pytest.fixture(scope="session")
def small() -> dict[str, Recipe]:
    """Recipes by name; `replace` them at will."""
    return SMALL
