"""Large arrays: the same numbers as in memory, while memory stays small."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hilum import large
from hilum.volume import Volume, orient


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LIMIT_BYTES", 0)


def numbers() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (7, 33, 65)).astype(np.int16)


@pytest.mark.usefixtures("everything_is_large")
def test_slices_come_back_as_they_were_put():
    values = numbers()
    array = large.gather(iter(values), values.shape, np.int16)
    np.testing.assert_array_equal(array, values)
    order = [3, 0, 6]
    for found, k in zip(large.each(array, order), order, strict=True):
        np.testing.assert_array_equal(found, values[k])
    np.testing.assert_array_equal(np.stack([s.copy() for s in large.each(array[::-2, :, 5:])]), values[::-2, :, 5:])
    np.testing.assert_array_equal(large.gather(large.each(array), array.shape, np.float32), values.astype(np.float32))


@pytest.mark.usefixtures("everything_is_large")
def test_what_is_written_to_a_slice_stays():
    array = large.empty((3, 64, 64), np.int16)
    for k, plane in enumerate(large.each(array)):
        plane[:] = k + 1
    assert [int(s.sum()) for s in large.each(array)] == [4096, 8192, 12288]


@pytest.mark.usefixtures("everything_is_large")
def test_a_turned_volume_is_the_same():
    affine = np.array([[0, 0, -0.5, 10], [0, -0.5, 0, 20], [2.0, 0, 0, 30], [0, 0, 0, 1]])
    values = numbers()
    vol = Volume(voxels=large.gather(iter(values), values.shape, np.int16), affine=affine, modality="CT")
    np.testing.assert_array_equal(orient(vol, "SPL").voxels, values[:, ::-1, ::-1])


def test_small_arrays_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert large.empty((2, 3, 4), np.int16).base is None


@pytest.mark.usefixtures("everything_is_large")
def test_without_room_on_the_disk_memory_serves(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    values = numbers()
    np.testing.assert_array_equal(large.gather(iter(values), values.shape, np.int16), values)


@pytest.mark.usefixtures("everything_is_large")
def test_the_file_has_no_name_and_goes_with_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = large.empty((4, 64, 64), np.int16)
    maps = Path("/proc/self/maps")
    assert str(tmp_path) in maps.read_text()
    assert not list(tmp_path.iterdir())
    del array
    gc.collect()
    assert str(tmp_path) not in maps.read_text()


def test_memory_stays_small():
    """600 MiB are filled, read, converted and turned in another process that says what it ever held."""
    code = """
import numpy as np
from pathlib import Path
from hilum import large
shape = (600, 512, 1024)
array = large.gather((np.full(shape[1:], k, np.int16) for k in range(600)), shape, np.int16)
turned = large.contiguous(array[:, ::-1])
print(sum(int(s[0, 0]) for s in large.each(turned)))
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, peak_mib = done.stdout.split()
    assert int(total) == sum(range(600))
    assert int(peak_mib) < 150
