"""The store that `prepare` leaves: the same bytes however often it was interrupted and whoever did the work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from hilum.archive import prepare as module
from hilum.archive import spill
from hilum.archive.ledger import read_ledger
from hilum.archive.policy import Policy
from hilum.archive.prepare import prepare
from hilum.archive.store.store import Store
from hilum.errors import DiskFull, InputError, Interrupted, StoreError, UsageError

RUN = """
import sys, time
from pathlib import Path
from hilum.archive.prepare import prepare
from hilum.archive.privacy import Key
from hilum.errors import HilumError

def progress(done, total, what):
    if done == 10 and what == "storing scans" and len(sys.argv) > 4:
        Path(sys.argv[4], "waiting").touch()
        while not Path(sys.argv[4], "go").exists():
            time.sleep(0.01)

if __name__ == "__main__":
    try:
        prepare(sys.argv[1], sys.argv[2], key=Key(bytes(range(32))), num_workers=int(sys.argv[3]), progress=progress)
    except HilumError as error:
        print(error)
        raise SystemExit(error.exit_code)
"""


NUM_IMAGES = 120


@pytest.fixture(scope="module")
def archive(tmp_path_factory, write_series_to, large) -> Path:
    """One CT, one short MR, one label map, many small images and a text."""
    root = tmp_path_factory.mktemp("prepare") / "archive"
    write_series_to(root, large, series="1", folder="ct")
    write_series_to(root, large[:3], series="2", folder="mr", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    nib.save(nib.Nifti1Image((large > 900).astype(np.uint8), np.eye(4)), root / "labels.nii")
    rng = np.random.default_rng(0)
    for n in range(NUM_IMAGES):
        Image.fromarray(rng.integers(0, 255, (16, 16)).astype(np.uint8)).save(root / f"{n}.png")
    (root / "notes.txt").write_text("x")
    return root


@pytest.fixture(scope="module")
def whole(archive, key) -> Path:
    """The store of a run that nothing interrupted."""
    prepare(archive, archive.parent / "whole", key=key, num_workers=1)
    return archive.parent / "whole"


def content(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def test_volumes_too_large_for_memory_end_in_the_same_bytes(archive, whole, key, tmp_path, monkeypatch):
    monkeypatch.setattr("hilum.large.LIMIT_BYTES", 100)  # all but nothing
    prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(whole)


def test_what_lies_in_the_store(archive, whole, key, large):
    summary = prepare(archive, whole, key=key)
    assert (summary["num_files"], summary["num_used"], summary["num_volumes"]) == (131, 121, 121)
    assert {r: v["files"] for r, v in summary["refused"].items()} == {
        "too_few_slices": 3, "label_map": 1, "not_an_image": 1,
    }  # fmt: skip
    store = Store(whole)
    series = key.hash("series", "1.2.826.0.1.3680043.10.9999.1")
    np.testing.assert_array_equal(store.read_volume(series).voxels, large.astype(int) - 1024)
    assert store.row(series).patient == key.hash("patient", "P-001")
    assert sum(e.num_files for e in read_ledger(whole / "ledger.parquet")) == 131
    for name, data in content(whole).items():
        assert b"Secret" not in data + name.encode()
        assert b"P-001" not in data + name.encode()


def test_a_second_run_does_nothing_and_a_changed_archive_is_noticed(archive, whole, tmp_path, key, monkeypatch):
    before = content(whole)
    with monkeypatch.context() as patch:
        patch.setattr(module, "examine", lambda *args: pytest.fail("looked at the archive again"))
        prepare(archive, whole, key=key, num_workers=1)
    with pytest.raises(StoreError, match="begun with other settings"):
        prepare(archive, whole, key=key, policy=Policy(min_slices=2))
    changed = shutil.copytree(archive, tmp_path / "archive")
    (changed / "new.png").touch()
    with pytest.raises(StoreError, match=r"archive has changed .* \(131 files then, 132 now\)"):
        prepare(changed, whole, key=key)
    assert content(whole) == before


def start(archive: Path, store: Path, num_workers: int, *wait_in: Path) -> subprocess.Popen[str]:
    """A run in a process of its own; with `wait_in` it touches "waiting" there after ten scans and waits for "go"."""
    return subprocess.Popen([sys.executable, "-c", RUN, str(archive), str(store), str(num_workers), *map(str, wait_in)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def wait_for(process: subprocess.Popen[str], store: Path, pattern: str, count: int) -> None:
    while process.poll() is None and sum(1 for _ in store.glob(pattern)) < count:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize(
    ("pattern", "count"), [("index/part-*", 2), pytest.param("volumes/*/*.b2nd", 20, marks=pytest.mark.nightly)]
)
def test_killed_and_resumed_gives_the_same_bytes(archive, whole, tmp_path, key, pattern, count):
    process = start(archive, tmp_path / "store", 2)
    wait_for(process, tmp_path / "store", pattern, count)
    process.kill()
    process.communicate()
    with pytest.raises(StoreError, match="not finished"):
        Store(tmp_path / "store")
    (tmp_path / "store" / "volumes" / "ab").mkdir(exist_ok=True)
    (tmp_path / "store" / "volumes" / "ab" / ".abc.b2nd.123.tmp").touch()  # what a killed writer leaves
    prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.parametrize(("number", "code", "num_workers"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 1)])
def test_asked_to_stop(archive, whole, tmp_path, key, number, code, num_workers):
    process = start(archive, tmp_path / "store", num_workers, tmp_path)
    wait_for(process, tmp_path, "waiting", 1)
    process.send_signal(number)
    (tmp_path / "go").touch()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "stopped; 10 scans are done" in output
    assert "Run the same command again" in output
    assert list((tmp_path / "store" / "index").glob("part-*.ledger.parquet"))
    prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.parametrize("step", ["merge_indexes", "write_sorted", "write_header", "drop_parts", "drop_plan"])
def test_stopped_between_any_two_last_steps(archive, whole, tmp_path, key, monkeypatch, step):
    original = getattr(module, step)

    def stop_at_the_end(*args):
        if "part-" not in str(args[0]):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, step, stop_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        prepare(archive, tmp_path / "store", key=key, num_workers=1)
    monkeypatch.undo()
    prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(whole)


def test_full_disk_keeps_what_was_done(archive, whole, tmp_path, key, monkeypatch):
    original, calls = module.write_volume, []

    def fill(*args, **kwargs):
        calls.append(args)
        if len(calls) == 70:
            raise DiskFull("no space left")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "write_volume", fill)
    with pytest.raises(DiskFull):
        prepare(archive, tmp_path / "store", key=key, num_workers=1)
    prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert len(calls) == 121 + 1  # none of the 69 before was written again
    assert content(tmp_path / "store") == content(whole)


def test_refusals_of_the_call(archive, tmp_path, key):
    with pytest.raises(InputError, match="lies inside the archive"):
        prepare(archive, archive / "store", key=key)
    with pytest.raises(UsageError, match="min_slices"):
        prepare(archive, tmp_path / "store", key=key, policy=Policy(min_slices=0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="not empty and no store"):
        prepare(archive, tmp_path / "other", key=key)


def test_interrupted_carries_its_exit_code(archive, tmp_path, key):
    def signalled(done: int, total: int | None, what: str) -> None:
        if what == "looking at files":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="0 scans are done") as stopped:
        prepare(archive, tmp_path / "store", key=key, progress=signalled)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_in_the_last_step_is_not_lost(archive, whole, tmp_path, key, monkeypatch):
    original = module.merge_indexes

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGINT)
        original(*args)

    monkeypatch.setattr(module, "merge_indexes", signalled)
    with pytest.raises(Interrupted, match="scans are done") as stopped:
        prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert stopped.value.exit_code == 130
    monkeypatch.undo()
    prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(whole)


def test_a_second_signal_stops_at_once(archive, tmp_path, key):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start background jobs without one

    def signalled(done: int, total: int | None, what: str) -> None:
        if what == "storing scans":
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)  # to this thread, so that both are met here

    with pytest.raises(KeyboardInterrupt):
        prepare(archive, tmp_path / "store", key=key, num_workers=1, progress=signalled)


def test_a_resumed_run_reads_the_plan_and_no_header_again(archive, whole, tmp_path, key, monkeypatch):
    def full(*args, **kwargs):
        raise DiskFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_volume", full)
        with pytest.raises(DiskFull):
            prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert {p.name for p in (tmp_path / "store" / ".work").iterdir()} == {"plan.json", "plan.jsonl.gz"}
    moved = shutil.copytree(archive, tmp_path / "elsewhere")
    monkeypatch.setattr(module, "examine", lambda *args, **kwargs: pytest.fail("looked at the headers again"))
    prepare(moved, tmp_path / "store", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.parametrize("limit_bytes", [100, 2000])
def test_the_store_does_not_depend_on_what_fits_in_memory_or_in_a_part(
    archive, whole, tmp_path, key, monkeypatch, limit_bytes
):
    monkeypatch.setattr(spill, "LIMIT_BYTES", limit_bytes)
    monkeypatch.setattr("hilum.archive.parts.FEWEST_SCANS", 7)
    prepare(archive, tmp_path / "store", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(whole)


def test_an_archive_that_changes_while_it_is_read_is_refused(archive, tmp_path, key, monkeypatch):
    changing = shutil.copytree(archive, tmp_path / "archive")
    original = module.examine

    def examine(*args, **kwargs):
        (changing / "late.png").touch()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "examine", examine)
    with pytest.raises(StoreError, match=r"changed while it was read \(131 files at first, 132 then\)"):
        prepare(changing, tmp_path / "store", key=key, num_workers=1)


def test_two_runs_at_once_on_one_store(archive, whole, tmp_path, key):
    process = start(archive, tmp_path / "store", 1)
    wait_for(process, tmp_path / "store", "volumes/*/*.b2nd", 2)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match=rf"is being written by process {process.pid} on .*\. Wait for its end"):
            prepare(archive, tmp_path / "store", key=key, num_workers=1)
    finally:
        process.send_signal(signal.SIGCONT)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert content(tmp_path / "store") == content(whole)


def test_runs_that_start_together_leave_one_store_and_clear_errors(archive, whole, tmp_path):
    runs = [start(archive, tmp_path / "store", 1) for _ in range(3)]
    outputs = [(run.communicate()[0], run.returncode) for run in runs]
    assert {code for _, code in outputs} <= {0, 3}
    assert any(code == 0 for _, code in outputs), outputs
    assert all("is being written by" in text for text, code in outputs if code)
    assert content(tmp_path / "store") == content(whole)


def test_a_folder_that_is_no_store_is_left_as_it_was(archive, tmp_path, key):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="not empty and no store"):
        prepare(archive, tmp_path / "other", key=key)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["file"]
    with pytest.raises(StoreError, match="is a file"):
        prepare(archive, tmp_path / "other" / "file", key=key)
