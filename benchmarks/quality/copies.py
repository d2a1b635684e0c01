"""How many planted copies `hilum bench audit --model M` finds by features, and how many others it names.

    python benchmarks/quality/copies.py --data DATA --model pixels --model EXPORT

Slices of four sets are drawn anew for each seed, two thirds of the patients stand on the first side. 40 of its slices come
again on the second, altered, under other names. Head CT and breast MR had no part in choosing the threshold.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

from hilum.bench.audit.vectors import find_copies
from hilum.encode.encoder import Encoder
from hilum.encode.features import encode_scans
from hilum.encode.items import How, Scan
from hilum.encode.zoo import load_encoder
from hilum.volume import Volume

COPIES = 40


def grey(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("L"), np.float32)


def brain(data: Path, rng: np.random.Generator) -> tuple[list[np.ndarray], list[str]]:
    """Slices and their patients, as far as they are known: those that follow one another in the data set are of one."""
    folder = data / "slices/mr_brain_tumour_cheng"
    with open(folder / "labels.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    some = [rows[n] for n in rng.permutation(len(rows))[:500]]
    return [grey(folder / row["file"]) for row in some], [row["run"] for row in some]


def small(data: Path, rng: np.random.Generator, name: str) -> tuple[list[np.ndarray], list[str]]:
    """64² slices of unknown patients, each taken for one."""
    files = sorted((data / "slices/ct_mr_body_part_mednist" / name).glob("*"))
    files = [files[n] for n in rng.permutation(len(files))[:400]]
    return [grey(file) for file in files], [file.name for file in files]


def neck(data: Path, rng: np.random.Generator) -> tuple[list[np.ndarray], list[str]]:
    """One slice a patient."""
    files = sorted((data / "nifti/ct_head_neck_openkbp/ct").glob("*.nii.gz"))
    volumes = (np.asarray(nib.load(file).dataobj, np.float32) for file in files)
    return [v[:, :, int(v.shape[2] * rng.uniform(0.3, 0.7))].T for v in volumes], [file.name for file in files]


SETS = {
    "brain MR slices": brain,
    "head CT slices, 64²": lambda data, rng: small(data, rng, "HeadCT"),
    "breast MR slices, 64²": lambda data, rng: small(data, rng, "BreastMRI"),
    "head-neck CT slices": neck,
}


def altered(pixels: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    low, high = np.percentile(pixels, [0.5, 99.5])
    step = 0.02 * pixels.shape[0], -0.02 * pixels.shape[1]
    return {
        "noise 5 %": pixels + rng.normal(0, 0.05 * (high - low), pixels.shape),
        "gain": pixels * 1.7 + 30,
        "gamma .6": 100 * np.clip((pixels - low) / max(high - low, 1e-6), 0, 1) ** 0.6,
        "turned 3°": ndimage.rotate(pixels, 3, reshape=False, order=1, mode="nearest"),
        "shifted 2 %": ndimage.shift(pixels, step, order=1, mode="nearest"),
    }


def vectors_of(encoder: Encoder, slices: list[np.ndarray]) -> np.ndarray:
    """Mean of patch tokens. The grey values are given without a unit, so that all kinds of copies reach the encoder alike."""
    scans = (
        Scan(str(n), "", "", Volume(voxels=one[None].astype(np.float32), affine=None, modality="MR", unit=""))
        for n, one in enumerate(slices)
    )
    return np.stack(
        [found.parts[0].vector for found in encode_scans(encoder, scans, How(level="slice", pooling="mean"), 32)]
    )


def measure(encoder: Encoder, data: Path, name: str, seed: int, found: Counter[str]) -> None:
    """Add to `found`: what was named of others and of copies, and how many there were ("of …")."""
    rng = np.random.default_rng(seed)
    slices, patients = SETS[name](data, rng)
    names = rng.permutation(sorted(set(patients)))
    side = np.isin(patients, names[: 2 * len(names) // 3])
    first, second = np.flatnonzero(side), np.flatnonzero(~side)
    vectors = vectors_of(encoder, slices)
    who = [[patients[n] for n in rows] for rows in (first, second)]
    found["others"] += len(find_copies(vectors[first], who[0], vectors[second], who[1]))
    found["of others"] += len(second)
    copies = [altered(slices[n], rng) for n in first[:COPIES]]
    found["of copies"] += len(copies)
    for kind in copies[0]:
        planted = vectors_of(encoder, [one[kind] for one in copies])
        there = np.concatenate([vectors[second], planted])
        pairs = find_copies(vectors[first], who[0], there, who[1] + [f"copy {n}" for n in range(len(copies))])
        found[kind] += sum(m >= len(second) and who[0][n] == who[0][m - len(second)] for n, m, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    for number, model in enumerate(args.model):
        encoder = load_encoder(model)
        for name in SETS:
            found: Counter[str] = Counter()
            for seed in range(args.seeds):
                measure(encoder, args.data, name, seed, found)
            told = [
                f"{kind} {found[kind] / found['of copies']:.2f}" for kind in altered(np.eye(9), np.random.default_rng())
            ]
            print(f"{number} {name}: others {found['others']} of {found['of others']}; {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
