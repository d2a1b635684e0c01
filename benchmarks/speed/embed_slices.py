"""How fast features are made: slices a second from files to table, against the encoder alone.

    python benchmarks/speed/embed_slices.py [--size base] [--px 256] >> benchmarks/results/embed_MACHINE_DATE.jsonl

The limit is the transformer itself: `encoder alone` runs the same batches with everything prepared before. `files to table`
is `hilum embed` on compressed NIfTI files of 512×512, with reading, preparing and writing (goal: within 5 %); `scan to
features` leaves files out.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from measure import print_lines, take_turns

from hilum.archive.privacy import Key
from hilum.encode.contract import Contract, prepare_slice
from hilum.encode.encoder import Encoder
from hilum.encode.items import How, Scan
from hilum.encode.table import embed as module
from hilum.encode.table.rows import feature_rows
from hilum.encode.vit import ViT, ViTConfig
from hilum.volume import Volume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--px", type=int, default=128)
    parser.add_argument("--slices", type=int, default=64, help="of each of three scans")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    vit = ViT(ViTConfig(size=given.size, image=(given.px, given.px)))
    encoder = Encoder(vit, Contract(size_px=given.px), given.size, patch=(16, 16), precision=given.precision)
    module.load_encoder = lambda *_, **__: encoder  # the same one for all three
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "scans").mkdir()
        for n in range(3):
            voxels = np.clip(rng.normal(0, 200, (512, 512, given.slices)), -1024, 2000).astype(np.int16)
            voxels[:100] = -1024
            nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 3.0, 1.0])), Path(place) / "scans" / f"{n}.nii.gz")
        stack = np.ascontiguousarray(voxels.transpose(2, 1, 0))
        scans = [Scan(str(n), "", "", Volume(voxels=stack, affine=None, modality="CT", unit="HU")) for n in range(3)]
        ready = torch.stack([prepare_slice(s.astype(np.float32), "CT", "HU", encoder.contract) for s in stack])
        number = itertools.count()

        def encode() -> None:
            for part in [*ready.split(32)] * 3:
                encoder.tokens(part)

        def in_memory() -> None:
            list(feature_rows(encoder, scans, How(), 32, num_threads=2, weights=""))

        def files() -> None:
            out = Path(place) / f"{next(number)}.parquet"
            module.embed(Path(place) / "scans", model="", out=out, key=Key(bytes(32)))

        for warm_up in (encode, files):
            warm_up()
        count = 3 * given.slices
        steps = {
            "files to table, slices/s": (files, count),
            "scan to features, slices/s": (in_memory, count),
            "encoder alone, slices/s": (encode, count),
        }
        facts = {"size": given.size, "px": given.px, "precision": encoder.precision, "slice_shape": [512, 512]}
        print_lines(take_turns(steps, given.repeats), **facts)


if __name__ == "__main__":
    main()
