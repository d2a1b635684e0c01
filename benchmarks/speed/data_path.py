"""How fast slices of a store become training crops.

    python benchmarks/speed/data_path.py [--slices 64] [--repeats 7] >> benchmarks/results/data_MACHINE_DATE.jsonl

One core, a synthetic 512×512 CT, `curia2-b` with local crops of 112: 2×256 + 8×112 a slice. In turn, so that a noisy machine
is noisy for all: crops of a slice in memory as the package makes them, and the plain way (one crop after the other:
`functional.interpolate` and a convolution, torch's normal noise; normalisation included in both); whole batches, and batches
for a GPU to render, whose pixels are not made. A batch is small, since what it holds is fresh memory: what that costs
is the machine's. The last lines are ratios within a round.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from measure import print_lines, take_turns
from store_reads import make_ct, write_store
from torch import Tensor
from torch.nn import functional

from hilum.encode.contract import Contract, normalise_slice
from hilum.pretrain.loader import Drawn, Slices
from hilum.pretrain.loop import contract_of
from hilum.pretrain.presets import load_recipe
from hilum.pretrain.render import pixel_box
from hilum.pretrain.views import View

BATCH = 8


def render_plainly(drawn: Drawn, contract: Contract) -> list[Tensor]:
    """The same crops as the first version of this package made them; gain, offset and noise in standard deviations."""
    image = normalise_slice(drawn.source.stored.astype(np.float32), drawn.source.unit, contract)
    return [_crop_plainly(image, view) for view in drawn.views]


def _crop_plainly(image: Tensor, view: View) -> Tensor:
    top, left, bottom, right = pixel_box(view, *image.shape[1:])
    size = view.size_px, view.size_px
    crop = functional.interpolate(image[None, :, top:bottom, left:right], size, mode="bilinear", antialias=True)
    if view.flip:
        crop = crop.flip(-1)
    if view.blur:
        reach = max(int(3 * view.blur + 0.5), 1)
        kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * view.blur**2))
        padded = functional.pad(crop, [reach] * 4, mode="reflect")
        rows = functional.conv2d(padded, (kernel / kernel.sum())[None, None, :, None])
        crop = functional.conv2d(rows, (kernel / kernel.sum())[None, None, None, :])
    noise = torch.randn(crop.shape, generator=torch.Generator().manual_seed(view.noise_seed))
    return (crop * view.gain + view.offset / 400 + view.noise / 400 * noise)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]  # above 0: others shared the cores
    recipe = load_recipe("curia2-b")
    views = replace(recipe.views, local_px=112, min_image_foreground=0.2)
    recipe = replace(recipe, views=views, run=replace(recipe.run, batch_size=BATCH))
    with tempfile.TemporaryDirectory() as temporary:
        store = write_store(Path(temporary), make_ct(given.slices))
        slices = Slices(store, recipe, contract_of(recipe))
        drawn = [slices.draw(n) for n in range(40)]
        alone = [slices.draw_batch(n, 1) for n in range(40)]
        numbers: Iterator[int] = count(0, BATCH)

        def each(work: Callable[[int], object], times: int) -> Callable[[], None]:
            def run() -> None:
                for n in range(times):
                    work(n)

            return run

        steps: dict[str, tuple[Callable[[], object], float]] = {
            "slices/s, read": (each(lambda n: store.read_stored_slice(store.rows[0].key, n % given.slices), 40), 40),
            "slices/s, read and drawn, nothing rendered": (
                each(lambda _: slices.draw_batch(next(numbers), BATCH), 5),
                5 * BATCH,
            ),
            "slices/s, read, drawn and rendered": (
                each(lambda _: slices.make_batch(next(numbers), BATCH), 3),
                3 * BATCH,
            ),
            "slices/s, rendered": (each(lambda n: slices.render_batch(alone[n]), 40), 40),
            "slices/s, rendered the plain way": (each(lambda n: render_plainly(drawn[n], slices.contract), 20), 20),
        }
        for work, _ in steps.values():
            work()
        results = take_turns(steps, given.repeats)
    fast, plain = results["slices/s, rendered"], results["slices/s, rendered the plain way"]
    results["ms for 10 crops"] = [1000 / rate for rate in fast]
    results["ms for 10 crops, the plain way"] = [1000 / rate for rate in plain]
    results["rendered over the plain way"] = [a / b for a, b in zip(fast, plain)]
    sent = sum(t.nbytes for t in vars(alone[0].raw).values()) + alone[0].masks.nbytes
    drawn_rate = results["slices/s, read and drawn, nothing rendered"]
    results["MB/s to a GPU that renders"] = [rate * sent / 1e6 for rate in drawn_rate]
    print_lines(results, batch_size=BATCH, load_before=round(load, 2), bytes_a_slice=sent)


if __name__ == "__main__":
    main()
