"""Sample numbers → batches of crops of volumes: what `loader.Slices` is for slices, with the same machinery around it.

Each step has one shape of crops, the same on all ranks, and takes its volumes from those that this shape fits.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.archive.store.index import Row
from hilum.archive.store.isotropic import (
    IsotropicSettings,
    is_isotropic,
    read_moments,
    read_region,
    read_volume_content,
)
from hilum.archive.store.store import Store
from hilum.encode.volume_contract import VolumeContract
from hilum.errors import StoreError, UsageError
from hilum.pretrain.loader import Batch
from hilum.pretrain.masks import sample_mask_counts
from hilum.pretrain.recipe import Recipe
from hilum.pretrain.sampling import Sampler, draw_weighted, fitting, modality_weights, sample_rng
from hilum.pretrain.volume_render import VolumeFacts, render_volume_views
from hilum.pretrain.volume_spec import Shape
from hilum.pretrain.volume_views import VolumeView, sample_volume_points, sample_volume_views
from hilum.settings import to_dict

Shapes = tuple[Shape, Shape]
CONTENTS_KEPT = 256  # content grids that a process keeps, 128 kB each


@dataclass(frozen=True)
class DrawnVolume:
    """One sample: which volume, the views drawn of it, and places that its global crops share."""

    key: str
    views: list[VolumeView]
    points: NDArray[np.float32]


@dataclass(frozen=True)
class DrawnCrops:
    """A batch before its pixels are made.

    shapes  of the global and the local crops
    """

    volumes: list[DrawnVolume]
    shapes: Shapes


class Crops:
    """The training volumes of an isotropic store, by sample number.

    shapes    (global, local, weight) that fit some volume
    samplers  one for each: the volumes that it fits
    left_out  key → shape of the volumes that should be trained on, and that no shape fits
    """

    device_renders = False

    def __init__(self, store: Store, recipe: Recipe, contract: VolumeContract) -> None:
        self.store, self.recipe, self.contract = store, recipe, contract_of_store(store, recipe, contract)
        sides = np.array(store.rows.table["shape"].to_pylist(), np.int64).reshape(-1, 3)
        weights = modality_weights(store, recipe.sampling)
        fits = [fitting(sides, large, recipe.volumes.min_share) & (weights > 0) for large, *_ in recipe.volumes.shapes]
        self.shapes = [shape for shape, some in zip(recipe.volumes.shapes, fits) if some.any()]
        if not self.shapes:
            raise StoreError(_nothing_fits(store, recipe, sides, weights))
        self.samplers = [
            Sampler(num_crops(sides, large) * some, weights, recipe.sampling.volume_power, recipe.run.seed)
            for (large, *_), some in zip(recipe.volumes.shapes, fits)
            if some.any()
        ]
        known = np.logical_or.reduce(fits)
        self.num_volumes = int(known.sum())
        keys = store.rows.table["key"].to_pylist()
        self.left_out = {keys[n]: sides[n].tolist() for n in np.flatnonzero(~known & (weights > 0))}
        self._content = lru_cache(CONTENTS_KEPT)(read_volume_content)
        self._drawn: list[int] = []  # of each step so far: its shape, and how many steps before it have drawn that one
        self._earlier: list[int] = []
        self._so_far = [0] * len(self.shapes)

    def __reduce__(self) -> tuple[Any, ...]:
        return Crops, (self.store, self.recipe, self.contract)

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json: how many volumes are trained on, and by name those that are too small for every shape."""
        unused = [list(shape[:2]) for shape in self.recipe.volumes.shapes if shape not in self.shapes]
        return {"num_volumes": self.num_volumes, "left_out": self.left_out, "shapes_without_volume": unused}

    def turn(self, sample: int) -> tuple[int, int]:
        """Which of `shapes` the step of a sample has drawn, and the number of the sample among those of that shape,
        so that each shape's sampler is walked through without gaps."""
        run, weights = self.recipe.run, [weight for *_, weight in self.shapes]
        step, place = divmod(sample, run.batch_size)
        while len(self._drawn) <= step:
            self._drawn.append(draw_weighted(weights, run.seed, 4, len(self._drawn)))
            self._earlier.append(self._so_far[self._drawn[-1]])
            self._so_far[self._drawn[-1]] += 1
        return self._drawn[step], self._earlier[step] * run.batch_size + place

    def draw(self, sample: int) -> DrawnVolume:
        """Draw the views of a sample number; no voxel is read."""
        recipe, (number, turn) = self.recipe, self.turn(sample)
        volume, _ = self.samplers[number][turn]
        row, (large, small, _) = self.store.rows[volume], self.shapes[number]
        grid = patch_grid(large, recipe)
        rng = sample_rng(recipe.run.seed, sample)
        counts = sample_mask_counts(sample, math.prod(grid), recipe.views, recipe.run.seed)
        content = self._content(self.store, row.key)
        views = sample_volume_views(
            rng, row.shape, row.unit, content, recipe.views, recipe.volumes, (large, small), grid, counts
        )
        num_points = recipe.objective.patch_points if recipe.objective.patch_weight else 0
        points = sample_volume_points(rng, content, views[: recipe.views.num_global], row.shape, num_points)
        return DrawnVolume(row.key, views, points)

    def draw_batch(self, first_sample: int, count: int) -> DrawnCrops:
        """Samples first, first + 1, … as numbers. All of them belong to one step."""
        large, small, _ = self.shapes[self.turn(first_sample)[0]]
        return DrawnCrops([self.draw(sample) for sample in range(first_sample, first_sample + count)], (large, small))

    def render_batch(self, drawn: DrawnCrops) -> Batch:
        """Read and make the pixels, on the CPU; in the precision of the run, to which the network would bring them."""
        spec, num = self.recipe.views, len(drawn.volumes)
        dtype = torch.bfloat16 if self.recipe.run.precision == "bf16" else torch.float32
        crops = [
            torch.empty(views, num, 1, *shape, dtype=dtype)
            for views, shape in zip((spec.num_global, spec.num_local), drawn.shapes)
        ]
        for b, volume in enumerate(drawn.volumes):
            for n, pixels in enumerate(self.render_alone(volume)):
                which, view = (0, n) if n < spec.num_global else (1, n - spec.num_global)
                crops[which][view, b, 0] = torch.from_numpy(pixels)
        views = [view for volume in drawn.volumes for view in volume.views]
        masks = self._masks(drawn)
        return Batch(
            globals=crops[0].flatten(0, 1),
            locals=crops[1].flatten(0, 1) if spec.num_local else None,
            masks=masks,
            hidden=masks.flatten().nonzero()[:, 0],
            points=torch.from_numpy(np.stack([volume.points for volume in drawn.volumes], 1)),
            foreground=float(np.mean([view.foreground for view in views])),
            num_rejected=float(np.mean([view.num_rejected for view in views])),
        )

    def _masks(self, drawn: DrawnCrops) -> Tensor:
        empty = np.zeros(patch_grid(drawn.shapes[0], self.recipe), bool)
        each = [volume.views[n].mask for n in range(self.recipe.views.num_global) for volume in drawn.volumes]
        return torch.from_numpy(np.stack([empty if mask is None else mask for mask in each])).flatten(1)

    def make_batch(self, first_sample: int, count: int) -> Batch:
        """Samples first, first + 1, … as pixels on the CPU."""
        return self.render_batch(self.draw_batch(first_sample, count))

    def render_alone(self, drawn: DrawnVolume) -> list[NDArray[np.float32]]:
        """The crops (Z, Y, X) of one sample."""
        return self.render_views(drawn.key, drawn.views)

    def render_views(self, key: str, views: Sequence[VolumeView]) -> list[NDArray[np.float32]]:
        """Crops of one volume, as the network is shown them."""
        row = self.store.row(key)
        facts = volume_facts(self.store, row, self.contract)
        return render_volume_views(lambda start, size: read_region(self.store, key, start, size), views, facts)


def patch_grid(shape: Shape, recipe: Recipe) -> Shape:
    z, y, x = (n // p for n, p in zip(shape, recipe.model.patch))
    return z, y, x


def num_crops(sides: NDArray[np.int64], shape: Shape) -> NDArray[np.int64]:
    """(V,) how many crops of a shape volumes (V, 3) hold, at least 1."""
    return np.asarray(np.maximum(np.rint(sides.prod(1) / math.prod(shape)), 1), np.int64)


def middle_view(shape: Shape, target: Shape) -> VolumeView:
    """The largest box in the middle of a volume that has the proportions of `target`, with nothing changed."""
    factor = min(n / p for n, p in zip(shape, target))
    size = [min(max(round(factor * p), 1), n) for n, p in zip(shape, target)]
    start = [(n - c) // 2 for n, c in zip(shape, size)]
    return plain_view((start[0], start[1], start[2]), (size[0], size[1], size[2]), target)


def plain_view(start: Shape, size: Shape, shape: Shape) -> VolumeView:
    """A box as it lies in the volume, with nothing changed."""
    return VolumeView(start, size, (0, 1, 2), (False, False, False), shape, foreground=1.0, num_rejected=0)


def volume_facts(store: Store, row: Row, contract: VolumeContract) -> VolumeFacts:
    """How a volume is normalised: HU by the contract's constants, others by their own mean and deviation."""
    is_hu = row.unit == "HU"
    mean, std = (contract.mean, contract.std) if is_hu else read_moments(store, row.key)
    return VolumeFacts(
        slope=row.slope,
        intercept=row.intercept,
        unit=row.unit,
        mean=mean,
        std=std or 1.0,
        clip=contract.clip_hu if is_hu else None,
    )


def contract_of_store(store: Store, recipe: Recipe, contract: VolumeContract) -> VolumeContract:
    """The contract with what the store decides: scans will be turned and cut as its volumes were.

    Raises UsageError, which says what to run, when the store is not isotropic, or was made with another clip or spacing.
    """
    plain, wanted = to_dict(IsotropicSettings()), {n: to_dict(contract)[n] for n in ("clip_hu", "min_spacing_mm")}
    if not is_isotropic(store):
        options = "".join(f" --set {n}={json.dumps(v)}".replace(", ", ",") for n, v in wanted.items() if plain[n] != v)
        raise UsageError(
            f"recipe {recipe.name} trains on volumes cut to the body, with cubic voxels; {store.root} holds scans as they were "
            f"made. Run: hilum resample {store.root} -o {store.root}-isotropic{options}, and give that store as --data"
        )
    made = store.header["derived"]
    if different := {name: value for name, value in wanted.items() if made[name] != value}:
        found = ", ".join(f"{name} {made[name]} where the recipe has {value}" for name, value in different.items())
        sets = " ".join(f"--set volumes.{n}={json.dumps(made[n])}".replace(", ", ",") for n in different)
        raise UsageError(
            f"{store.root} was made with {found}. Train with its values: {sets}; or resample its scans again"
        )
    return replace(contract, **{name: made[name] for name in ("orientation", "background_px", "longest")})


def _nothing_fits(store: Store, recipe: Recipe, sides: NDArray[np.int64], weights: NDArray[np.float64]) -> str:
    """Why there is nothing to train on."""
    if not (weights > 0).any():
        found = sorted(set(store.rows.table["modality"].to_pylist()))
        names = [name.lower() if name in ("CT", "MR") else "other" for name in found]
        return (
            f"no volume of {store.root} is left to train on: it holds {' and '.join(found) or 'none'}, to which recipe "
            f"{recipe.name} gives weight 0. Give another store, or a weight: {' '.join(f'--set sampling.{n}=1' for n in names)}"
        )
    largest = sides[weights > 0][sides[weights > 0].prod(1).argmax()]
    return (
        f"no volume of {store.root} fits a shape of recipe {recipe.name}; the largest is {'×'.join(map(str, largest))}. "
        "Give smaller or longer ones in volumes.shapes, or lower volumes.min_share"
    )
