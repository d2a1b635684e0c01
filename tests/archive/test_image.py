"""PNG and JPEG as slices without geometry."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hilum.archive.files import image
from hilum.archive.intake import read_scan
from hilum.archive.scan import find, scan
from hilum.errors import GeometryError, ScanRefused


@pytest.fixture
def grey():
    return np.random.default_rng(0).integers(0, 256, (30, 20)).astype(np.uint8)


def save(path, pixels, mode=None, **options):
    Image.fromarray(pixels).convert(mode or Image.fromarray(pixels).mode).save(path, **options)
    return path


def test_eight_and_sixteen_bits(tmp_path, grey):
    wide = grey.astype(np.uint16) * 257
    for pixels, name in ((grey, "a.png"), (wide, "b.png")):
        vol, notes = image.read(save(tmp_path / name, pixels))
        assert (vol.affine, vol.modality, vol.shape, vol.voxels.dtype, notes) == (
            None,
            "OT",
            (1, 30, 20),
            pixels.dtype,
            (),
        )
        np.testing.assert_array_equal(vol.voxels[0], pixels)
    with pytest.raises(GeometryError):
        _ = vol.spacing_mm


def test_jpeg(tmp_path, grey):
    smooth = np.add.outer(np.arange(30), np.arange(20)).astype(np.uint8)
    vol, _ = image.read(save(tmp_path / "a.jpg", smooth, quality=100))
    np.testing.assert_allclose(vol.voxels[0].astype(int), smooth, atol=3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_grey_saved_as_colour(tmp_path, grey, mode):
    vol, notes = image.read(save(tmp_path / "a.png", grey, mode))
    np.testing.assert_array_equal(vol.voxels[0], grey)
    assert notes == ("grey saved as colour",)


def test_colour_is_refused(tmp_path, grey, key):
    save(tmp_path / "a.png", np.stack([grey, grey[::-1], grey], 2))
    save(tmp_path / "b.jpg", np.stack([grey, grey[::-1], grey], 2))
    assert [(e.reason, e.reader) for e in scan(tmp_path, key)] == [("colour", "image")] * 2


def test_exif_rotation_is_reported_not_applied(tmp_path, grey):
    exif = Image.Exif()
    exif[0x0112] = 6
    vol, notes = image.read(save(tmp_path / "a.jpg", grey, exif=exif))
    assert vol.shape == (1, 30, 20)
    assert notes == ("EXIF orientation 6 not applied",)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_truncated(tmp_path, grey, key, kind):
    big = np.kron(grey, np.ones((8, 8), np.uint8)) ^ np.random.default_rng(1).integers(0, 64, (240, 160), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(big).save(stream, kind)
    (tmp_path / "x").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    (entry,) = scan(tmp_path, key, pixels=True)
    assert (entry.verdict, entry.reason) == ("refused", "truncated")


def test_decompression_bomb(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(ScanRefused, match="too_large"):
        image.read(tmp_path / "x.png")


def test_constant_and_one_bit_images(tmp_path, grey):
    with pytest.raises(ScanRefused, match="constant"):
        image.read(save(tmp_path / "a.png", np.full((9, 9), 3, np.uint8)))
    with pytest.raises(ScanRefused, match="label_map"):
        image.read(save(tmp_path / "b.png", grey, "1"))


def test_real_slices(real_data, key):
    for path in sorted((real_data / "slices").rglob("*.jp*g"))[::400]:
        (entry,) = find(path, key)
        vol = read_scan(entry)
        np.testing.assert_array_equal(vol.voxels[0], np.asarray(Image.open(path).convert("L")))
