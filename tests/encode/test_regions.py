"""Regions to patches, and the competition's vector, against slow and obvious versions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hilum.encode.contract import prepare_slice
from hilum.encode.encoder import Encoder
from hilum.encode.regions import check_same_grid, competition_vector, curia_cells, roi_crop
from hilum.encode.released.curia import curia_contract
from hilum.encode.vit import ViT, ViTConfig
from hilum.errors import ContractError, GeometryError
from hilum.volume import Volume, orient

RNG = np.random.default_rng(0)
AFFINE = np.array([[0, 0, 1.0, 5], [0, 2.0, 0, 6], [3.0, 0, 0, 7], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    model = ViT(ViTConfig(size="nano", patch=(16, 16), image=(64, 64)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return Encoder(model, curia_contract({"crop_size": 64}), "curia", patch=(16, 16))


def slow_cells(mask: np.ndarray, size: int) -> np.ndarray:
    """Curia's rule word by word, the whole resized stack at once."""
    stack = mask[None] if mask.ndim == 2 else mask
    x = torch.from_numpy((stack > 0).astype(np.float32))[None]
    x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    inside = x > 0.5
    if inside.sum() == 0:
        inside = x > 0.5 * x.max()
    cells = np.zeros((len(stack), size // 16, size // 16), bool)
    for z in range(len(stack)):
        for row in range(size // 16):
            for column in range(size // 16):
                cells[z, row, column] = inside[z, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].any()
    return cells.reshape(*mask.shape[:-2], -1)


def blobs(shape: tuple[int, ...], share: float) -> np.ndarray:
    coarse = RNG.random((*shape[:-2], 9, 9)) < share
    rows, columns = (np.arange(n) * 9 // n for n in shape[-2:])
    return coarse[..., rows[:, None], columns].astype(np.uint16)


@pytest.mark.parametrize("shape", [(512, 512), (300, 411), (700, 900), (5, 200, 90), (3, 600, 600)])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_cells_are_those_of_the_rule(shape, share):
    mask = blobs(shape, share)
    for size in (512, 64):
        np.testing.assert_array_equal(curia_cells(mask, size).numpy(), slow_cells(mask, size))


def test_a_speck_survives_by_the_lower_threshold():
    mask = np.zeros((900, 900), np.uint8)
    mask[333, 700] = 7
    found = curia_cells(mask, 64)
    assert found.nonzero().tolist() == [[333 * 4 // 900 * 4 + 700 * 4 // 900]]
    np.testing.assert_array_equal(found.numpy(), slow_cells(mask, 64))


def test_specks_of_every_size():
    """Between them lie all values around half of the largest."""
    for _ in range(40):
        mask = np.zeros((2, 400, 300), bool)
        for y, x in RNG.integers(0, 290, (6, 2)):
            mask[int(RNG.integers(2)), y : y + int(RNG.integers(1, 4)), x : x + int(RNG.integers(1, 4))] = True
        np.testing.assert_array_equal(curia_cells(mask, 32).numpy(), slow_cells(mask, 32))


def test_in_a_stack_a_large_region_elsewhere_loses_the_speck():
    """The threshold is lowered for the whole stack or not at all."""
    mask = np.zeros((2, 900, 900), bool)
    mask[0, 333, 700] = True
    assert curia_cells(mask, 64)[0].any()
    mask[1, 100:500, 100:500] = True
    found = curia_cells(mask, 64)
    np.testing.assert_array_equal(found.numpy(), slow_cells(mask, 64))
    assert not found[0].any()
    assert found[1].any()


def test_what_is_no_mask():
    with pytest.raises(ContractError, match="the mask is empty; leave it out"):
        curia_cells(np.zeros((2, 30, 30), np.uint8))
    with pytest.raises(ContractError, match=r"a mask is \(Y, X\) or \(S, Y, X\); found shape \(4,\)"):
        curia_cells(np.zeros(4))


# ---- the competition's rule


def slow_box(mask: np.ndarray, least: int) -> tuple[int, int, int, int]:
    pixels = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    ys, xs = [p[0] for p in pixels], [p[1] for p in pixels]
    side = max(least, max(ys) - min(ys) + 1, max(xs) - min(xs) + 1)
    ends = []
    for middle, have in ((int(sum(ys) / len(ys)), mask.shape[0]), (int(sum(xs) / len(xs)), mask.shape[1])):
        start = middle - side // 2
        if start < 0:
            start = 0
        if start + side > have:
            start = have - side
        if start < 0:
            start = 0
        ends += [start, min(start + side, have)]
    return tuple(ends)


@pytest.mark.parametrize("least", [16, 40, 128])
@pytest.mark.parametrize("shape", [(60, 60), (50, 200), (130, 90)])
def test_crops_are_those_of_the_rule(shape, least):
    for _ in range(20):
        mask = np.zeros(shape, bool)
        for _ in range(int(RNG.integers(1, 6))):
            mask[int(RNG.integers(shape[0])), int(RNG.integers(shape[1]))] = True
        rows, columns = roi_crop(mask, least)
        assert (rows.start, rows.stop, columns.start, columns.stop) == slow_box(mask, least)
        assert mask[rows, columns].any()


def test_an_empty_slice_has_no_crop():
    with pytest.raises(ContractError, match="expected at least one pixel to crop around"):
        roi_crop(np.zeros((20, 20)))


def make_scan(shape=(5, 150, 140)) -> Volume:
    voxels = RNG.normal(-100, 300, shape).astype(np.int16)
    return Volume(voxels=voxels, affine=AFFINE, modality="CT", unit="HU")


def make_mask(scan: Volume) -> Volume:
    voxels = np.zeros(scan.shape, np.uint8)
    voxels[1, 20:40, 100:130] = 1
    voxels[2, 0, 0] = 3
    voxels[4, 5:149, 60:70] = 1
    return replace(scan, voxels=voxels, kind="label", modality="OT", unit="")


def tokens_of(encoder: Encoder, pixels: np.ndarray):
    return encoder.tokens(prepare_slice(pixels, "CT", "HU", encoder.slice_contract)[None])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_vector_of_a_region(encoder, batch_size):
    scan = make_scan()
    mask = make_mask(scan)
    vectors = []
    for z in range(5):
        if not mask.voxels[z].any():
            continue
        top, bottom, left, right = slow_box(mask.voxels[z], 128)
        tokens = tokens_of(encoder, scan.voxels[z, top:bottom, left:right])
        part = mask.voxels[z, top:bottom, left:right] > 0
        touched = set()
        for y in range(64):  # nearest: the pixel at ⌊y · have / 64⌋
            for x in range(64):
                if part[y * part.shape[0] // 64, x * part.shape[1] // 64]:
                    touched.add(y // 16 * 4 + x // 16)
        zero = torch.zeros(96)
        vectors.append(sum((tokens.patches[0, n] for n in touched), zero) / max(len(touched), 1))
    wanted = sum(vectors) / 3
    found = competition_vector(encoder, scan, mask, batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_a_region_that_the_nearest_pixel_misses_counts_as_zeros(encoder):
    scan = make_scan((2, 150, 140))
    voxels = np.zeros(scan.shape, np.uint8)
    voxels[0, 40:60, 40:60] = 1
    alone = competition_vector(encoder, scan, replace(scan, voxels=voxels), 2)
    voxels[1, 61, 61] = 1  # row 61 of a crop of 128 that starts at 0 lies between the rows 0, 2, 4, … that are kept
    both = competition_vector(encoder, scan, replace(scan, voxels=voxels), 2)
    np.testing.assert_allclose(both, alone / 2, atol=1e-6)


def test_without_a_region(encoder):
    scan = make_scan()
    each = [tokens_of(encoder, pixels) for pixels in scan.voxels]
    found = competition_vector(encoder, scan, None, 2)
    np.testing.assert_allclose(found, torch.stack([t.cls[0] for t in each]).mean(0).numpy(), atol=1e-5)
    empty = replace(make_mask(scan), voxels=np.zeros(scan.shape, np.uint8))
    found = competition_vector(encoder, scan, empty, 2)
    np.testing.assert_allclose(found, torch.stack([t.patches[0].mean(0) for t in each]).mean(0).numpy(), atol=1e-5)


def test_orientation_does_not_matter(encoder):
    scan = make_scan()
    mask = make_mask(scan)
    wanted = competition_vector(encoder, scan, mask)
    for code in ("IAR", "LPS"):
        found = competition_vector(encoder, orient(scan, code), orient(mask, "PIL"))
        np.testing.assert_array_equal(found, wanted)


def test_what_does_not_fit_is_refused(encoder):
    scan = make_scan()
    with pytest.raises(ContractError, match="the mask has shape"):
        competition_vector(encoder, scan, make_mask(make_scan((5, 150, 141))))
    mask = make_mask(scan)
    moved = AFFINE.copy()
    moved[0, 3] += 2
    with pytest.raises(ContractError, match=r"mask and scan lie 2\.0 mm apart"):
        check_same_grid(scan, replace(mask, affine=moved))
    with pytest.raises(GeometryError, match="orient needs a geometry"):
        competition_vector(encoder, replace(scan, affine=None))
    by_volume = Encoder(encoder.network, curia_contract({"crop_size": 64}, statistics="volume"), "v", patch=(16, 16))
    with pytest.raises(ContractError, match="normalises by volume"):
        competition_vector(by_volume, scan)
