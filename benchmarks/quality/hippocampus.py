"""Hippocampus on T1 MR (Medical Segmentation Decathlon, task 4): segmentation and the place of its centre, from patch tokens.

    python benchmarks/quality/hippocampus.py FOLDER --model MODEL [--cases 80] [--seeds 3]

FOLDER holds images/ and labels/ (NIfTI, 1 = anterior, 2 = posterior). A fifth of the cases is the test, another fifth
decides. Beside the heads stand what knows nothing of the scan: the most frequent class at each place of the crop (as a share of
its extent), and the mean place. MSD does not say which files share a subject, so intervals over cases are too narrow; the file
number splits. The crops are centred on the hippocampus, which is why the mean place is hard to beat. Prints one JSON line each.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

import hilum
from hilum.archive.labels import read_labels
from hilum.metrics import dice, hd95_mm
from hilum.probe.heads.dense import SegmentationHead, count_classes
from hilum.probe.heads.localisation import LocalisationHead
from hilum.probe.heads.tokens import TokenSequence, features_tokens
from hilum.stats import bootstrap_interval
from hilum.volume import Volume

CELLS = 24  # along each axis of the map of most frequent classes


def majority_map(maps: list[Volume]) -> np.ndarray:
    """The most frequent class at each place, all crops stretched to one size."""
    votes = np.zeros((3, CELLS, CELLS, CELLS))
    for one in maps:
        small = ndimage.zoom(one.voxels, [CELLS / n for n in one.shape], order=0, grid_mode=True, mode="nearest")
        for label in range(3):
            votes[label] += small == label
    return votes.argmax(0)


def stretch(labels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    return ndimage.zoom(labels, [n / CELLS for n in shape], order=0, grid_mode=True, mode="nearest")


def centre_mm(one: Volume) -> np.ndarray:
    assert one.affine is not None
    return (one.affine @ [*ndimage.center_of_mass(one.voxels > 0), 1])[:3]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cases", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    chosen = parser.parse_args()
    encoder = hilum.load_encoder(chosen.model)
    names = sorted(path.name for path in (chosen.folder / "images").glob("*.nii.gz"))[: chosen.cases]
    start = time.perf_counter()
    tokens, maps = [], []
    for name in names:
        scan = hilum.read(chosen.folder / "images" / name)
        truth = read_labels(chosen.folder / "labels" / name, scan).volume
        tokens.append(features_tokens(encoder.encode(scan)))
        maps.append(Volume(voxels=truth.voxels.astype(np.uint8), affine=truth.affine, modality="MR", kind="label"))
    X, points = TokenSequence(tokens), np.array([centre_mm(one) for one in maps])
    rows = np.arange(len(names))
    test, val = rows % 5 == 0, rows % 5 == 1
    train = ~test & ~val
    some = {
        part: [maps[n] for n in np.flatnonzero(mask)] for part, mask in (("test", test), ("val", val), ("train", train))
    }
    encoded = time.perf_counter() - start

    start = time.perf_counter()
    head = SegmentationHead(seeds=chosen.seeds, epochs=chosen.epochs, num_classes=2)
    head.fit(X[train], some["train"], validation=(X[val], some["val"]))
    found = head.outputs(X[test], some["test"]).reshape(chosen.seeds, -1, 2, 4)
    seg_s = time.perf_counter() - start
    known = majority_map(some["train"])
    plain = np.array([count_classes(one, stretch(known, one.shape), 2) for one in some["test"]]).reshape(1, -1, 2, 4)
    true = np.array([[(one.voxels == label).sum() for label in (1, 2)] for one in some["test"]])

    start = time.perf_counter()
    where = LocalisationHead(seeds=chosen.seeds).fit(X[train], points[train], validation=(X[val], points[val]))
    error = np.linalg.norm(where.outputs(X[test]) - points[test], axis=2)
    loc_s = time.perf_counter() - start
    middle = np.array([one.positions_mm().mean(0) for one in X])
    offset = (points - middle)[train].mean(0)
    trivial = np.linalg.norm(middle + offset - points, axis=1)[None, test]

    facts = {"model": encoder.name, "train": int(train.sum()), "test": int(test.sum()), "encode_s": round(encoded, 1)}
    for what, counts, seconds in (("decoder", found, seg_s), ("majority map", plain, 0.0)):
        scores = np.array([dice(true, one) for one in counts])
        far = np.mean([hd95_mm(true, one) for one in counts])
        line = {"task": "segmentation", "head": what, "dice": round(float(scores.mean()), 3)}
        line |= {"dice_sd_of_seeds": round(float(scores.std()), 3), "hd95_mm": round(float(far), 2)}
        print(json.dumps(line | {"seconds": round(seconds, 1)} | facts), flush=True)
    for what, errors, seconds in (("light", error, loc_s), ("mean place", trivial, 0.0)):
        by_case = errors.mean(0)
        interval = bootstrap_interval(
            lambda y, p: float(p.mean()),
            np.zeros(len(by_case)),
            by_case,
            clusters=np.arange(len(by_case)),
            num_resamples=2000,
            seed=0,
        )
        line = {"task": "localisation", "head": what, "error_mm": round(float(by_case.mean()), 2)}
        line |= {"low": round(interval.low, 2), "high": round(interval.high, 2), "seconds": round(seconds, 1)}
        print(json.dumps(line | facts), flush=True)


if __name__ == "__main__":
    main()
