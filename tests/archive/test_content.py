"""Content of slices, against shapes whose place and size are known."""

import numpy as np
import pytest

from hilum.archive.store.content import GRID, foreground_threshold, measure_content, pack_cells, shrink, unpack_cells
from hilum.volume import Volume


def disc(center, radius, size=128, inside=0, outside=-1000):
    y, x = np.indices((size, size))
    return np.where((y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2, inside, outside).astype(np.int16)


@pytest.mark.parametrize(("unit", "modality"), [("HU", "CT"), ("", "MR")])
def test_place_size_and_spread_of_a_disc(unit, modality):
    slices = np.stack([disc((40, 80), 30), disc((64, 64), 50), disc((0, 0), 0)])
    content = measure_content(Volume(voxels=slices, affine=None, modality=modality, unit=unit))
    area = np.pi * np.array([30, 50, 0]) ** 2 / 128**2
    np.testing.assert_allclose(content.foreground / 255, area, atol=0.02)
    np.testing.assert_allclose(
        [content[z].center for z in range(3)], [[40 / 128, 80 / 128], [0.5, 0.5], [0.5, 0.5]], atol=0.01
    )
    np.testing.assert_allclose(
        [content[z].spread for z in range(3)], [[15 / 128] * 2, [25 / 128] * 2, [0, 0]], atol=0.01
    )


def test_enclosed_air_counts_as_anatomy():
    body = disc((64, 64), 50)
    body[disc((64, 64), 20) == 0] = -950  # a lung
    content = measure_content(Volume(voxels=body[None], affine=None, modality="CT", unit="HU"))
    assert content[0].foreground == pytest.approx(np.pi * 50**2 / 128**2, abs=0.02)
    grid = content[0].grid
    assert grid.shape == (GRID, GRID)
    assert grid[16, 16] == 1


def test_packed_grids_come_back_one_by_one():
    cells = np.random.default_rng(0).integers(0, 256, (5, GRID, GRID)).astype(np.uint8)
    cells[1:3] = 255
    data = pack_cells(cells)
    for z in range(5):
        np.testing.assert_array_equal(unpack_cells(data, z), cells[z])
    for broken in (data[:-10], data[:8], data[:-100] + bytes(100)):
        with pytest.raises(ValueError):  # noqa: PT011, several messages
            unpack_cells(broken, 4)


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (100, 77), (30, 50), (1, 1)])
def test_shrink_averages(shape):
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    small = shrink(image, 64)
    assert small.shape == (64, 64)
    rows = [image[max(a, 0) : max(b, a + 1)].mean(0) for a, b in zip(
        np.arange(64) * shape[0] // 64, np.arange(1, 65) * shape[0] // 64)]  # fmt: skip
    expected = [[r[max(a, 0) : max(b, a + 1)].mean() for a, b in zip(
        np.arange(64) * shape[1] // 64, np.arange(1, 65) * shape[1] // 64)] for r in rows]  # fmt: skip
    np.testing.assert_allclose(small, expected, rtol=1e-5)


def test_threshold_lies_between_two_peaks():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(50, 10, 5000), rng.normal(500, 80, 5000)]).astype(np.float32)
    assert 60 < foreground_threshold(values) < 300
    assert foreground_threshold(np.full(10, 3.0, np.float32)) == 3.0
