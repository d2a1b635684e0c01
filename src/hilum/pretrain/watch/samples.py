"""What a run's monitor looks at: the same slices or volumes each time, and the first training samples as pictures.

Of a volume that is the largest box in its middle with the proportions of the first global shape. Pictures show one plane of a
crop, the middle one along its first axis: of its voxels, and of its patches.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.archive.store.isotropic import read_volume_content
from hilum.encode.contract import Contract, normalise_slice, resize
from hilum.pretrain.loader import Drawn, Slices
from hilum.pretrain.volume_loader import Crops, middle_view, patch_grid, plain_view
from hilum.pretrain.volume_spec import Shape
from hilum.records import write_atomic

NUM_PROBE = 256
NUM_PROBE_VOLUMES = 64  # a volume costs as much as several slices, and a store has fewer
NUM_SAMPLES = 4


class ProbeItems(NamedTuple):
    """What is encoded again and again.

    images      (N, 1, …) float16, as an encoder is given them
    foreground  (n, rows, columns) bool of the first n: patches of the pictured plane that are anatomy
    """

    images: Tensor
    foreground: NDArray[np.bool_]


def read_probe(samples: Slices | Crops, num_pictures: int) -> ProbeItems:
    """The first of the sampler, each whole, without augmentation."""
    return _probe_volumes(samples, num_pictures) if isinstance(samples, Crops) else _probe_slices(samples, num_pictures)


def _probe_slices(slices: Slices, num_pictures: int) -> ProbeItems:
    recipe, contract = slices.recipe, slices.contract
    side = (recipe.views.global_px,) * 2
    drawn = [slices.draw(sample) for sample in range(min(NUM_PROBE, slices.num_slices))]
    images = torch.stack([resize(whole_slice(d, contract)[None], side, contract.resampling)[0] for d in drawn]).half()
    grids = np.stack([slices.store.read_slice(d.key, d.z)[1].grid for d in drawn[:num_pictures]])
    rows, columns = (side[0] // p for p in recipe.model.patch)
    shares = resize(torch.from_numpy(grids)[:, None], (rows, columns), "bilinear")
    return ProbeItems(images, shares[:, 0].numpy() > 0.5)


def _probe_volumes(crops: Crops, num_pictures: int) -> ProbeItems:
    """Volumes that fit the first shape, each once, in the order of its sampler."""
    sampler, keys = crops.samplers[0], dict[str, None]()
    wanted = min(NUM_PROBE_VOLUMES, int((sampler.counts > 0).sum()))
    for sample in range(sampler.length):
        keys[crops.store.rows[sampler[sample][0]].key] = None
        if len(keys) == wanted:
            break
    target = crops.shapes[0][0]
    images = torch.stack([middle_crop(crops, key, target) for key in keys])
    anatomy = [_anatomy(crops, key, target) for key in list(keys)[:num_pictures]]
    return ProbeItems(images, np.stack(anatomy))


def middle_crop(crops: Crops, key: str, target: Shape) -> Tensor:
    """(1, Z, Y, X) float16: the largest box in the middle of a volume with the proportions of `target`, at its size."""
    view = middle_view(crops.store.row(key).shape, target)
    return torch.from_numpy(crops.render_views(key, [view])[0])[None].half()


def _anatomy(crops: Crops, key: str, target: Shape) -> NDArray[np.bool_]:
    """(rows, columns) whether the middle of a patch of the pictured plane of `middle_crop` lies in anatomy."""
    shape, grid = crops.store.row(key).shape, patch_grid(target, crops.recipe)
    view = middle_view(shape, target)
    places = [
        (begin + (np.arange(n) + 0.5) / n * size) / whole
        for begin, size, n, whole in zip(view.start, view.size, grid, shape)
    ]
    places[0] = places[0][grid[0] // 2, None]
    content = read_volume_content(crops.store, key).grid
    z, y, x = ((at * n).astype(int).clip(0, n - 1) for at, n in zip(places, content.shape))
    return np.asarray(content[np.ix_(z, y, x)][0] > 0.5)


def plane_of_voxels(volume: Any, patch: int) -> Any:
    """(…, Z, Y, X) → (…, Y, X): the plane in the middle of the pictured row of patches."""
    rows = volume.shape[-3] // patch
    return volume[..., rows // 2 * patch + patch // 2, :, :]


def whole_slice(drawn: Drawn, contract: Contract) -> Tensor:
    """The slice of a sample as an encoder is given it, (1, Y, X), at its own size."""
    source = drawn.source
    pixels = source.stored.astype(np.float32) * np.float32(source.slope) + np.float32(source.intercept)
    return normalise_slice(pixels, source.unit, contract)


# ---- training samples


@dataclass(frozen=True)
class Sample:
    """A training sample as the model saw it: the whole slice, its crops in float16, what was drawn of each.

    pixels  of a volume the axial plane through the middle of its first crop
    crops   of a volume a plane of each
    """

    pixels: NDArray[Any]
    crops: list[NDArray[Any]]
    views: list[dict[str, Any]] = field(default_factory=list)


def picture(samples: Slices | Crops, number: int) -> Sample:
    """A training sample for the page of a run."""
    if isinstance(samples, Crops):
        return _picture_volume(samples, number)
    drawn = samples.draw(number)
    views = [_about(v.box, v.foreground, v.rejected, v.mask) for v in drawn.views]
    pixels = whole_slice(drawn, samples.contract)[0].half().numpy()
    return Sample(pixels, [crop.astype(np.float16) for crop in samples.render_alone(drawn)], views)


def _picture_volume(crops: Crops, number: int) -> Sample:
    """Boxes as they look from above; crops whose axes were laid otherwise show a plane of another direction."""
    drawn, patch = crops.draw(number), crops.recipe.model.patch[0]
    _, y, x = crops.store.row(drawn.key).shape
    first = drawn.views[0]
    plane = plain_view((first.start[0] + first.size[0] // 2, 0, 0), (1, y, x), (1, y, x))
    views = []
    for view in drawn.views:
        (_, top, left), (_, height, width) = view.start, view.size
        box = top / y, left / x, (top + height) / y, (left + width) / x
        views.append(_about(box, view.foreground, (), None if view.mask is None else view.mask[len(view.mask) // 2]))
    pictures = [plane_of_voxels(crop, patch).astype(np.float16) for crop in crops.render_alone(drawn)]
    return Sample(crops.render_views(drawn.key, [plane])[0][0].astype(np.float16), pictures, views)


def _about(box: Any, foreground: float, rejected: Any, mask: NDArray[np.bool_] | None) -> dict[str, Any]:
    hidden = None if mask is None else mask.astype(int).tolist()
    return {"box": box, "foreground": foreground, "rejected": rejected, "mask": hidden}


def write_samples(path: Path, samples: Slices | Crops) -> None:
    """Keep the first training samples for the page of the run: the slice, its crops, boxes and masks."""
    arrays: dict[str, Any] = {}
    for number in range(NUM_SAMPLES):
        sample = picture(samples, number)
        arrays[f"{number}.pixels"] = sample.pixels
        for n, (about, crop) in enumerate(zip(sample.views, sample.crops)):
            arrays[f"{number}.crop{n:02d}"] = crop
            arrays[f"{number}.view{n:02d}"] = np.array(json.dumps(about))
    with write_atomic(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **arrays)


def read_samples(path: Path) -> list[Sample]:
    with np.load(path, allow_pickle=False) as found:
        names = sorted(found.files)
        return [
            Sample(
                found[f"{n}.pixels"],
                [found[name] for name in names if name.startswith(f"{n}.crop")],
                [json.loads(str(found[name])) for name in names if name.startswith(f"{n}.view")],
            )
            for n in range(len([name for name in names if name.endswith(".pixels")]))
        ]
