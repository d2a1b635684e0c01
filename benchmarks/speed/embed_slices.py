"""How fast features are made: slices a second through contract, encoder and pooling, against the encoder alone.

    python benchmarks/speed/embed_slices.py [--size base] [--px 256] >> benchmarks/results/embed_MACHINE_DATE.jsonl

The limit is the transformer itself: `encoder alone` runs the same batches with everything prepared before.
"""

import argparse

import numpy as np
import torch
from measure import print_lines, take_turns

from hilum.encode.contract import Contract, prepare_slice
from hilum.encode.encoder import Encoder
from hilum.encode.features import How, Scan
from hilum.encode.rows import feature_rows
from hilum.encode.vit import ViT, ViTConfig
from hilum.volume import Volume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--px", type=int, default=128)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    encoder = Encoder(
        ViT(ViTConfig(size=given.size, image=(given.px, given.px))),
        Contract(size_px=given.px),
        given.size,
        patch=(16, 16),
    )
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 1000, (given.slices, 512, 512)).astype(np.int16)
    scan = Scan("0" * 16, "", "", Volume(voxels=voxels, affine=np.eye(4), modality="CT", unit="HU"))
    ready = torch.stack([prepare_slice(s.astype(np.float32), "CT", "HU", encoder.contract) for s in voxels])

    def encode() -> None:
        for part in ready.split(32):
            encoder.tokens(part)

    def whole() -> None:
        list(feature_rows(encoder, [scan], How(), 32, num_threads=2, weights=""))

    for warm_up in (encode, whole):
        warm_up()
    steps = {"scan to features, slices/s": (whole, given.slices), "encoder alone, slices/s": (encode, given.slices)}
    print_lines(take_turns(steps, given.repeats), size=given.size, px=given.px, slice_shape=[512, 512])


if __name__ == "__main__":
    main()
