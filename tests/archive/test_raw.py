"""Raw voxels: the same bytes from any place of a packed file, bounded time, bounded memory."""

import gzip
import io
import resource
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from hilum.archive.files import raw
from hilum.archive.files.raw import RawVoxels, read_stored
from hilum.errors import ScanRefused

SHAPE = (60, 50, 40)  # i, j, k: 120 kB of bytes


def voxels_in(path, data, *, packed=True, start=0, skip=0, volumes=None):
    sizes = SHAPE if volumes is None else (*SHAPE, volumes)
    path.write_bytes(b"x" * start + data)
    return RawVoxels(path, start, skip, packed, np.dtype("u1"), sizes, None if volumes is None else 3)


def noise(volumes):
    return np.random.default_rng(0).integers(0, 256, (volumes, *SHAPE[::-1]), np.uint8)


@pytest.mark.parametrize("order", ["forwards", "backwards", "mixed"])
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_volumes_in_any_order(tmp_path, pack, order):
    data = noise(40)  # 4.8 MB: five marks
    where = voxels_in(tmp_path / "x", pack(b"head" + data.tobytes()), start=7, skip=4, volumes=40)
    wanted = {"forwards": range(40), "backwards": range(39, -1, -1)}.get(order)
    for t in wanted or np.random.default_rng(1).permutation(40):
        np.testing.assert_array_equal(read_stored(where, int(t)), data[t])


def test_several_gzip_members_with_padding(tmp_path):
    data = noise(3)
    content = data.tobytes()
    members = [gzip.compress(content[a : a + 70_001]) for a in range(0, len(content), 70_001)]
    where = voxels_in(tmp_path / "x", (b"\0" * 11).join([*members[:2], gzip.compress(b""), *members[2:]]), volumes=3)
    for t in (2, 0, 1):
        np.testing.assert_array_equal(read_stored(where, t), data[t])


@pytest.mark.parametrize("volumes", [None, 3])
def test_a_cut_stream_and_a_wrong_checksum(tmp_path, volumes):
    """Of a file with several volumes, none is used when its end is missing or wrong."""
    content = gzip.compress(noise(volumes or 1).tobytes())
    for keep in (len(content) - 1, len(content) - 8, len(content) - 5000, len(content) // 2):
        with pytest.raises(ScanRefused, match="truncated"):
            read_stored(voxels_in(tmp_path / "x", content[:keep], volumes=volumes))
    broken = bytearray(content)
    broken[-6] ^= 1
    with pytest.raises(ScanRefused, match="corrupt"):
        read_stored(voxels_in(tmp_path / "x", bytes(broken), volumes=volumes))


def test_time_grows_with_the_number_of_volumes_not_with_its_square(tmp_path, monkeypatch):
    """Bytes unpacked while every volume is read: at most three times those in the file, in any order."""
    data = noise(100)
    where = voxels_in(tmp_path / "x", gzip.compress(data.tobytes(), 1), volumes=100)
    unpacked = 0

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def decompress(self, rest, length):
            nonlocal unpacked
            piece = self.inner.decompress(rest, length)
            unpacked += len(piece)
            return piece

        def copy(self):
            return Counting(self.inner.copy())

        def __getattr__(self, name):
            return getattr(self.inner, name)

    plain = zlib.decompressobj
    monkeypatch.setattr(raw.zlib, "decompressobj", lambda wbits: Counting(plain(wbits)))
    for t in range(100):
        read_stored(where, t)
    assert unpacked < 2.1 * data.nbytes
    unpacked = 0
    for t in np.random.default_rng(0).permutation(100):
        read_stored(where, int(t))
    assert unpacked < 7 * data.nbytes  # half a step between marks, 1 MB, and a volume of 0.12 MB, each


def test_a_bomb_is_refused_before_it_is_read(tmp_path):
    """250 kB that unpack to 270 MB: nothing behind the declared voxels is unpacked, and no more is declared than fits."""
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb") as handle:
        for _ in range(1 << 4):
            handle.write(bytes(1 << 24))
    bomb = stream.getvalue()
    tracemalloc.start()
    begin = time.process_time()
    assert not read_stored(voxels_in(tmp_path / "x", bomb)).any()
    for sizes in ((2000, 2000, 1000), (60_000, 60_000, 60_000), (1 << 40, 1, 1)):
        with pytest.raises(ScanRefused, match=r"truncated|too_large"):
            read_stored(RawVoxels(tmp_path / "x", 0, 0, True, np.dtype("u1"), sizes))
    with pytest.raises(ScanRefused, match="too_large"):
        read_stored(RawVoxels(tmp_path / "x", 0, 0, True, np.dtype("u1"), (1, 1, 1, 10_001), 3))
    assert time.process_time() - begin < 1
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 << 20  # kB


def test_more_than_the_memory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "_memory", lambda: 5 * 120_000 - 1)
    with pytest.raises(ScanRefused, match="too_large"):
        read_stored(voxels_in(tmp_path / "x", bytes(120_000), packed=False))


def test_a_file_that_changes_is_read_again(tmp_path):
    first, second = noise(6).reshape(2, 3, *SHAPE[::-1])
    for data in (first, second):
        where = voxels_in(tmp_path / "x", gzip.compress(data.tobytes()), volumes=3)
        np.testing.assert_array_equal(read_stored(where, 1), data[1])
