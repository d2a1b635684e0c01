"""A contract in words says every field of it; the notes of a scan say what is done to that scan."""

from dataclasses import fields, replace

import numpy as np
import pytest

from hilum.encode.contract import Contract
from hilum.encode.describe import in_words, notes_of
from hilum.encode.volume_contract import VolumeContract
from hilum.settings import to_dict
from hilum.volume import Volume, orient

RGB = Contract(
    clip_hu=None, windows=((-1000, 1000),), percentiles=(0.5, 99.5), normalise="constants", mean=(0.5,) * 3,
    std=(0.25,) * 3, normalise_last=True, size_px=224, fit="crop", short_px=256, channels=3,
)  # fmt: skip
PLAIN, VOLUME = Contract(), VolumeContract()
# Another value of each field; of an RGB contract those that only such a one has.
OTHERS: list[tuple[Contract | VolumeContract, dict]] = [
    (PLAIN, {
        "modalities": ("MR",), "rounding": "int16", "clip_hu": (-1, 1), "percentiles": (1, 99), "windows": ((0, 80),),
        "eps": 1e-3, "size_px": 112, "antialias": False, "resampling": "bicubic", "pooling": "mean",
    }),
    (RGB, {"mean": (0.5, 0.5, 0.4), "std": (0.5, 0.5, 0.4), "short_px": 300, "windows": ((0, 1), (0, 2), (0, 3))}),
    (VOLUME, {
        "modalities": ("MR",), "orientation": "IAR", "clip_hu": (-1000, 1), "background_px": 3, "min_spacing_mm": 2.0,
        "max_patches": 9, "patch": (2, 14, 14), "edges": "pad", "longest": 768, "mean": 1.0, "std": 2.0, "pooling": "mean",
    }),
]  # fmt: skip


@pytest.mark.parametrize(("contract", "name", "other"), [(c, n, o) for c, others in OTHERS for n, o in others.items()])
def test_every_field_is_said(contract, name, other):
    assert in_words(to_dict(replace(contract, **{name: other}))) != in_words(to_dict(contract))


def test_the_fields_without_another_value_are_the_ones_tested_here():
    chosen = {"normalise", "normalise_last", "fit", "channels", "orientation"}
    assert {f.name for f in fields(Contract)} == {*OTHERS[0][1], *OTHERS[1][1], *chosen}
    assert {f.name for f in fields(VolumeContract)} == set(OTHERS[2][1])
    words = [in_words(to_dict(c)) for c in (Contract(), Contract(normalise_last=True),
             Contract(normalise="volume", normalise_last=True), Contract(channels=3), RGB)]  # fmt: skip
    assert len(set(words)) == 5
    assert (
        "rows and columns running to: axial Posterior, Left; coronal Inferior, Left; sagittal Inferior, Posterior."
        in (words[0][1])
    )


def test_a_new_field_of_a_volume_contract_is_said_too():
    values = to_dict(VolumeContract())
    assert in_words({**values, "fill_hu": -1024})[-2] == "fill hu: -1024."


def scan(shape=(4, 32, 32), modality="CT", dtype=np.int16, affine=True):
    spacing = np.diag([1.0, 1.0, 5.0, 1.0])[:, [2, 1, 0, 3]]  # (k, j, i) → x, y, z
    return Volume(
        voxels=np.zeros(shape, dtype),
        affine=spacing if affine else None,
        modality=modality,
        unit="HU" if modality == "CT" else "",
    )


def test_notes_of_slices():
    plain = Contract(clip_hu=None)
    assert notes_of(scan(), plain) == ()
    assert notes_of(scan(), Contract()) == ("cut to -1000 to 2000 HU",)
    assert notes_of(scan(affine=False), plain) == ("plane unknown: shown as stored",)
    assert notes_of(orient(scan(), "RIP"), plain) == ("turned from RIP", "4×32 px stretched to a square")
    assert notes_of(scan(dtype=np.float32), replace(plain, rounding="int16")) == ("fractions cut off",)
    assert notes_of(scan(), RGB) == ("window -1000 to 1000 HU", "23% of each slice cut off at its edges")
    assert notes_of(scan(modality="MR"), RGB)[0] == "no HU: percentiles 0.5 to 99.5 of each slice"


def test_notes_of_volumes():
    notes = notes_of(orient(scan(), "LIP"), VolumeContract())
    assert notes == (
        "turned from LIP to SPL",
        "cut to -1000 to 1900 HU",
        "resampled from 1×5×1 mm to 1 mm or coarser",
    )
