"""What a segmentation head finds in a scan, and what the patch tokens under it look like.

    python benchmarks/quality/volumes_picture.py -o out.png SCAN:MASK:HEAD [SCAN:MASK:HEAD ...]

HEAD is a folder of `hilum bench run --save-heads` (RESULTS/heads/…). For each scan, in the plane of the masks' centre along
each axis: the scan with the experts' outlines (green) and the head's (orange), and the first three principal components of the
tokens of the head's encoder as red, green and blue, each drawn at its own place in the patient.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import map_coordinates

import hilum
from hilum.archive.labels import read_labels
from hilum.encode.zoo import load_encoder
from hilum.figures import window
from hilum.probe.predict import predict
from hilum.probe.saved import load_head
from hilum.volume import orient

AXES = "SPL"  # rows run down the body, or to the back
PLANES = ("axial", "coronal", "sagittal")


def components(patches: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The first three principal components of tokens (…, D) inside, from 0 to 1 between their 2nd and 98th percentile."""
    fitted = patches[inside].astype(np.float64)
    mean = fitted.mean(0)
    _, _, vectors = np.linalg.svd(fitted - mean, full_matrices=False)
    scores = (patches - mean) @ vectors[:3].T
    low, high = np.percentile(scores[inside], [2, 98], axis=0)
    return np.clip((scores - low) / (high - low), 0, 1)


def token_colours(scan: Any, model: str) -> np.ndarray:
    """(Z, Y, X, 3) the colour of the token over each voxel, black where none is."""
    found = load_encoder(model).encode(scan)
    assert found.patches is not None
    at = (
        np.stack(np.meshgrid(*map(np.arange, scan.shape), indexing="ij"), -1) @ scan.affine[:3, :3].T
        + scan.affine[:3, 3]
    )
    if not found.slices:
        grid, affine = found.patches, found.affines[0]
    else:  # the tokens of neighbouring slices, one after the other
        grid, affine = found.patches, found.affines[0].copy()
        affine[:3, 0] = (found.affines[-1] - found.affines[0])[:3, 3] / max(len(grid) - 1, 1)
    index = (at - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    colours = components(grid.astype(np.float32), np.ones(grid.shape[:3], bool))
    places = np.moveaxis(index, -1, 0)
    return np.stack([map_coordinates(colours[..., n], places, order=0, mode="nearest") for n in range(3)], -1)


def draw(place: Any, labels: np.ndarray, colour: str) -> None:
    for label in np.unique(labels[labels > 0]):
        place.contour(labels == label, levels=[0.5], colors=colour, linewidths=1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    chosen = parser.parse_args()
    figure = Figure(figsize=(12, 2.15 * len(chosen.cases)), layout="constrained")
    places = figure.subplots(len(chosen.cases), 6, squeeze=False)
    for row, case in zip(places, chosen.cases):
        path, mask, head = case.split(":")
        found = predict(path, head, mask=None)
        assert found.labels is not None
        scan = hilum.read(path)
        truth, ours = (orient(v, AXES) for v in (read_labels(Path(mask), scan).volume, found.labels))
        known = load_head(Path(head)).record
        classes = len(known["classes"])
        expert = np.where(truth.voxels <= classes, truth.voxels, 0)
        scan = orient(scan, AXES)
        colours = token_colours(scan, known["encoder"]["loads_as"])
        centre = np.rint(np.argwhere(expert > 0).mean(0)).astype(int)
        spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
        for axis, plane in enumerate(PLANES):
            down, across = (n for n in range(3) if n != axis)
            pixels, low_high = np.take(scan.voxels, centre[axis], axis), window(scan.voxels, scan.unit)
            options = {"aspect": spacing[down] / spacing[across], "origin": "upper" if plane == "axial" else "lower"}
            row[2 * axis].imshow(pixels, cmap="gray", vmin=low_high[0], vmax=low_high[1], **options)
            draw(row[2 * axis], np.take(expert, centre[axis], axis), "#35c46a")
            draw(row[2 * axis], np.take(ours.voxels, centre[axis], axis), "#ff9d2e")
            row[2 * axis + 1].imshow(np.take(colours, centre[axis], axis), **options)
            row[2 * axis].set_title(plane, fontsize=8)
            row[2 * axis + 1].set_title("patch tokens", fontsize=8)
        for place in row:
            place.set_axis_off()
    figure.savefig(chosen.out, dpi=110)


if __name__ == "__main__":
    main()
