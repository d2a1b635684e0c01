"""How fast crops of volumes are drawn, read and rendered.

    python benchmarks/speed/volume_crops.py [--samples 8] [--repeats 5] >> benchmarks/results/volume_crops_MACHINE_DATE.jsonl

One core. A synthetic CT of 300×350×450 voxels; a sample is VoxelFM's: 2 crops of 112³ and 8 of 56³, turned, the first with a
window half the time. The plain way: the whole box to float32, permuted, `functional.interpolate`, flipped, NumPy's histogram,
each change a new array. In turn, both from memory and, ours, from an isotropic store; and 112³ cubes as they lie.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import print_lines, take_turns
from torch.nn import functional

from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.isotropic import (
    Isotropic,
    IsotropicSettings,
    VolumeContent,
    read_region,
    read_volume_content,
    write_isotropic,
)
from hilum.archive.store.store import Store, open_for_writing, write_header, write_volume
from hilum.pretrain.recipe import Intensity, ViewSpec
from hilum.pretrain.sampling import sample_rng
from hilum.pretrain.volume_render import WINDOW_QUANTILES, Read, VolumeFacts, render_volume_views
from hilum.pretrain.volume_spec import Shape, VolumeSpec
from hilum.pretrain.volume_views import VolumeView, sample_volume_views
from hilum.settings import to_dict
from hilum.volume import Volume

KEY, SHAPE = "a" * 16, (300, 350, 450)
SPEC, VOLUMES = ViewSpec(ct=Intensity(), global_scale=(0.32, 1.0)), VolumeSpec()
FACTS = VolumeFacts(slope=1.0, intercept=0.0, unit="HU", mean=VOLUMES.mean, std=VOLUMES.std, clip=VOLUMES.clip_hu)


def make_ct() -> Volume:
    rng = np.random.default_rng(0)
    y, x = np.indices(SHAPE[1:]) - np.array(SHAPE[1:])[:, None, None] / 2
    body = np.where((x / 210) ** 2 + (y / 160) ** 2 < 1, 40, -1000)
    voxels = np.stack(
        [np.rint(body + rng.normal(0, 20, body.shape)).clip(-1000, 1900).astype(np.int16) for _ in range(300)]
    )
    return Volume(voxels=voxels, affine=np.eye(4)[[2, 1, 0, 3]], modality="CT", unit="HU")


def write_store(root: Path, vol: Volume) -> Store:
    row = write_volume(root / "plain", KEY, vol)
    out = root / "isotropic"
    open_for_writing(out, {"key": "k"})
    assert vol.affine is not None
    made = Isotropic(stored=vol.voxels, affine=vol.affine, slope=1.0, intercept=0.0, exact=True, moments=(0.0, 1.0))
    write_index(index_path(out), [write_isotropic(out, row, made)])
    derived = {"kind": "isotropic", **to_dict(IsotropicSettings())}
    write_header(out, {"key": "k", "derived": derived, "status": "complete"})
    return Store(out)


def draw(sample: int, content: VolumeContent) -> list[VolumeView]:
    shapes = VOLUMES.shapes[0][:2]
    return sample_volume_views(sample_rng(0, sample), SHAPE, "HU", content, SPEC, VOLUMES, shapes, (8, 8, 8), [150, 0])


def render_plain(read: Read, views: list[VolumeView], facts: VolumeFacts) -> list[np.ndarray]:
    """As one would write it first: the box as floats, permuted, through `interpolate`, turned, NumPy's histogram."""
    crops = []
    for view in views:
        box = read(view.start, view.size).astype(np.float32)
        if (facts.slope, facts.intercept) != (1.0, 0.0):
            box = box * np.float32(facts.slope) + np.float32(facts.intercept)
        image = torch.from_numpy(box).permute(view.axes)[None, None]
        crop = functional.interpolate(image, view.shape, mode="trilinear", align_corners=False)[0, 0].numpy()
        crop = np.flip(crop, [axis for axis, flip in enumerate(view.flips) if flip]).copy()
        if view.window and facts.clip:
            counts, edges = np.histogram(crop, 512, facts.clip)
            below = np.cumsum(counts)
            low, first, median, third, high = (edges[np.searchsorted(below, q * below[-1])] for q in WINDOW_QUANTILES)
            spread = third - first if third - first >= 1 else max(high - low, 1.0)
            level, width = median + 0.2 * spread * view.window[0], max(spread * (0.5 + 1.5 * view.window[1]), 10.0)
            crop = crop.clip(level - width / 2, level + width / 2)
        crop = crop.clip(*facts.clip) if facts.clip else crop
        crops.append((crop - np.float32(facts.mean)) / np.float32(facts.std))
    return crops


def make_steps(vol: Volume, store: Store, samples: int) -> dict[str, tuple[Callable[[], object], float]]:
    content = read_volume_content(store, KEY)
    drawn = [draw(sample, content) for sample in range(samples)]
    starts = np.random.default_rng(1).integers(0, np.array(SHAPE) - 111, (20, 3)).tolist()
    cubes = [VolumeView((z, y, x), (112,) * 3, (0, 1, 2), (False,) * 3, (112,) * 3, 1.0, 0) for z, y, x in starts]

    def in_memory(start: Shape, size: Shape) -> np.ndarray:
        return vol.voxels[tuple(slice(a, a + n) for a, n in zip(start, size))]

    def stored(start: Shape, size: Shape) -> np.ndarray:
        return read_region(store, KEY, start, size)

    for one, other in zip(render_volume_views(in_memory, drawn[0], FACTS), render_plain(in_memory, drawn[0], FACTS)):
        np.testing.assert_allclose(one, other, atol=1e-4)
    return {
        "samples/s drawn": (lambda: [draw(sample, content) for sample in range(samples)], samples),
        "samples/s rendered, plain": (lambda: [render_plain(in_memory, views, FACTS) for views in drawn], samples),
        "samples/s rendered": (lambda: [render_volume_views(in_memory, views, FACTS) for views in drawn], samples),
        "samples/s read and rendered": (
            lambda: [render_volume_views(stored, views, FACTS) for views in drawn],
            samples,
        ),
        "samples/s read": (lambda: [stored(view.start, view.size) for views in drawn for view in views], samples),
        "112³ cubes/s read and normalised": (lambda: render_volume_views(stored, cubes, FACTS), len(cubes)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]  # above 0: others shared the cores
    with tempfile.TemporaryDirectory() as temporary:
        vol = make_ct()
        results = take_turns(make_steps(vol, write_store(Path(temporary), vol), given.samples), given.repeats)
    print_lines(results, num_samples=given.samples, load_before=round(load, 2))


if __name__ == "__main__":
    main()
