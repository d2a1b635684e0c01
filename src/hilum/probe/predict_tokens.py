"""What a saved head on patch tokens says of a scan: classes, a place in the patient, or a label map on the scan's own grid."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hilum.archive.files import itk, nifti
from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder
from hilum.encode.features import Features, encode_volume
from hilum.encode.grids import chosen_slices, region_weights, volume_region_weights
from hilum.encode.items import How
from hilum.errors import ContractError
from hilum.probe.heads.dense import SegmentationHead
from hilum.probe.heads.tokens import CaseTokens, TokenSequence, features_tokens
from hilum.probe.saved import SavedHead
from hilum.records import write_atomic, write_json
from hilum.volume import Volume, apart_mm, orient, orientation_of

Place = dict[str, int | None]
PLACE_COLUMNS: tuple[str, ...] = ("x_mm", "y_mm", "z_mm", "k", "j", "i")
SEGMENT_COLUMNS: tuple[str, ...] = ("voxels", "ml")
_HEAD_BYTES = 4096
_MATCH_MM = 0.01  # of two grids that are the same


def scan_tokens(
    encoder: Encoder, volume: Volume, mask: Volume | None, form: dict[str, Any]
) -> tuple[list[Place], TokenSequence, tuple[str, ...]]:
    """The cases of a scan as the head was trained on them: where each is, their tokens, and what was done to the scan.

    form  the head's FEATURE_FACTS: level, max_slices
    """
    slices = isinstance(encoder.contract, Contract)
    how = How(level="slice", max_slices=form["max_slices"] if form["level"] != "region" else None)
    found = encode_volume(encoder, volume, how, keep=np.float16)
    if form["level"] == "region" and mask is not None:
        labels = [int(n) for n in np.unique(mask.voxels) if n > 0]
        cases = [_region(encoder, found, mask, n, form["max_slices"] if slices else None) for n in labels]
        return [{"slice": None, "region": n} for n in labels], TokenSequence(cases), found.notes
    if form["level"] == "slice":
        cases = [_slices(found, [row]) for row in range(len(found.slices))]
        return [{"slice": z, "region": None} for z in found.slices], TokenSequence(cases), found.notes
    return [{"slice": None, "region": None}], TokenSequence([features_tokens(found)]), found.notes


def _slices(found: Features, rows: list[int], weights: Any = None) -> CaseTokens:
    """Some slices of a scan as a case."""
    assert found.patches is not None
    affines = None if found.affines is None else found.affines[rows]
    some = replace(found, patches=found.patches[rows], affines=affines, slices=tuple(found.slices[r] for r in rows))
    return features_tokens(some, weights)


def _region(encoder: Encoder, found: Features, mask: Volume, label: int, max_slices: int | None) -> CaseTokens:
    """The tokens that a region touches, weighted by the share of each that it covers."""
    inside = mask.voxels == label
    if not found.slices:
        assert found.affines is not None
        k, j, i = found.grid
        only = replace(mask, voxels=inside.astype(np.uint8))
        return features_tokens(found, volume_region_weights(only, found.affines[0], (k, j, i))[1].numpy())
    touched = np.flatnonzero(inside.any((1, 2)))
    chosen = [int(touched[n]) for n in chosen_slices(len(touched), max_slices)]
    rows = [found.slices.index(z) for z in chosen]
    shares = [region_weights(inside[z], encoder.grid, encoder.slice_contract).numpy() for z in chosen]
    kept = [n for n, share in enumerate(shares) if share.any()]
    if not kept:
        raise ContractError(
            f"region {label} lies outside of what the model sees of its slices; expected a voxel inside"
        )
    return _slices(found, [rows[n] for n in kept], np.concatenate([shares[n] for n in kept]))


def place_row(point: np.ndarray[Any, Any], volume: Volume) -> dict[str, Any]:
    """A place in LPS mm, and the voxel (k, j, i) of the scan in which it lies, which may be outside."""
    k, j, i = np.rint(np.linalg.solve(volume._affine("a place in mm"), [*point, 1.0])[:3]).astype(int).tolist()
    x, y, z = (round(float(n), 3) for n in point)
    said = f"L {x:.1f}, P {y:.1f}, S {z:.1f} mm (voxel {k}, {j}, {i})"
    return {"predicted": said, "x_mm": x, "y_mm": y, "z_mm": z, "k": k, "j": j, "i": i}


def segment_scan(saved: SavedHead, X: TokenSequence, volume: Volume, scan: Path) -> tuple[Volume, list[dict[str, Any]]]:
    """The label map on the grid of the scan as its file has it, and a row with the volume of each class."""
    assert isinstance(saved.head, SegmentationHead)
    (labels,) = saved.head.segment(X, [volume])
    labels = on_file_grid(labels, scan)
    ml = float(np.prod(labels.spacing_mm)) / 1000
    counts = np.bincount(labels.voxels.ravel(), minlength=len(saved.classes) + 1)
    rows = [
        {"predicted": name, "voxels": int(counts[n]), "ml": round(float(counts[n]) * ml, 4)}
        for n, name in enumerate(saved.classes, 1)
    ]
    return labels, rows


def on_file_grid(labels: Volume, scan: Path) -> Volume:
    """Turned back to the axes of the scan's file, where it is a file with a grid of its own (NIfTI, mha, nrrd); exact.

    `hilum.read` turns scans so that axis 0 runs through the slices. Stacks of DICOM images stay as they were read.
    """
    if not scan.is_file():
        return labels
    with open(scan, "rb") as handle:
        head = handle.read(_HEAD_BYTES)
    module = nifti if nifti.looks_like_nifti(head) else itk if itk.looks_like_itk(head) else None
    header = None if module is None else module.read_header(scan)
    if header is None or header.affine is None:
        return labels
    turned = orient(labels, orientation_of(header.affine))
    apart = apart_mm(turned, replace(turned, affine=header.affine))
    if apart > _MATCH_MM:
        raise ContractError(f"the label map lies {apart:.3f} mm from the grid of its scan; expected the same grid")
    return replace(turned, affine=header.affine)


def write_segmentation(path: Path, labels: Volume, about: dict[str, Any]) -> list[Path]:
    """NIfTI with class numbers, and beside it PATH.json: which number is which class, and which head said it."""
    beside = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    with write_atomic(path) as temporary:
        nifti.write(
            temporary, labels.voxels.astype(np.int16), labels.affine, 1.0, 0.0, packed=path.name.endswith(".gz")
        )
    write_json(beside, about)
    return [path, beside]
