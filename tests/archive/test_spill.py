"""Records through files: all of them, in order, whole groups together, in little memory, and nothing left behind."""

import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import pytest

from hilum.archive import spill as module
from hilum.archive.dicom.header import Header
from hilum.archive.ledger import Entry
from hilum.archive.spill import Spill, decode, encode, private_folder


def fill(spill: Spill, names: list[str]) -> list[tuple[str, str]]:
    records = [(name, f"[{n}]") for n, name in enumerate(names)]
    for record in records:
        spill.add(*record)
    return records


@pytest.fixture
def names() -> list[str]:
    """5,000 records under 1,000 hashes, 600 of the records under one of them."""
    draw = random.Random(0)
    hashes = [f"{draw.getrandbits(64):016x}" for _ in range(1000)]
    return draw.sample([hashes[0]] * 600 + draw.choices(hashes, k=4400), 5000)


@pytest.mark.parametrize("limit_bytes", [60, 200, 5_000, 1 << 20])
def test_every_record_once_in_order_and_groups_whole(tmp_path, names, limit_bytes):
    with Spill(tmp_path / "spill", limit_bytes) as spill:
        records = fill(spill, names)
        assert (tmp_path / "spill").exists() == (limit_bytes < 1 << 20)
        buckets = list(spill.buckets())
    assert [r for bucket in buckets for r in bucket] == sorted(records)
    groups = [{name for name, _ in bucket} for bucket in buckets]
    assert sum(map(len, groups)) == len(set(names))  # no hash in two buckets
    if limit_bytes == 5_000:
        assert max(len(b) for b in buckets if len({n for n, _ in b}) > 1) < 2000
    assert not list(tmp_path.iterdir())


def test_files_go_as_they_are_read_and_after_an_error(tmp_path, names, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1)
    with pytest.raises(KeyError), Spill(tmp_path / "spill", 5_000) as spill:  # noqa: PT012
        fill(spill, names)
        before = len(list((tmp_path / "spill").iterdir()))
        buckets = spill.buckets()
        for _ in range(100):
            next(buckets)
        assert before - 150 < len(list((tmp_path / "spill").iterdir())) < before - 50
        assert stat.S_IMODE((tmp_path / "spill").stat().st_mode) == 0o700
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_headers_and_entries_come_back_as_they_were():
    header = Header(
        path=Path("a/Müller\udcff\n\t.dcm"), size=3, position=(0.1, -1e-17, 3.0), slope=None, intercept=-1024.5,
        splits={"EchoTime": "1\t2"}, repairs=("x", "y"), patient_id="Ω\u2028",
    )  # fmt: skip
    assert decode(Header, encode(header)) == header
    assert encode(header).isascii()
    assert not {"\n", "\t"} & set(encode(header))
    entry = Entry(key="0" * 16, spacing_mm=(1.0, 0.3, 1 / 3), paths=(Path("a"), Path("b\udc80")), frames=(0, 1))
    again = decode(Entry, encode(entry))
    assert again == entry
    assert all(type(getattr(again, f.name)) is type(getattr(entry, f.name)) for f in fields(entry))


def test_a_private_folder_is_private_and_goes_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError), private_folder() as folder:  # noqa: PT012
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "x").touch()
        with private_folder() as other:  # does not clear away one that is in use
            assert other != folder
        assert (folder / "x").exists()
        raise KeyError
    assert not list(tmp_path.iterdir())


HOLD = """
import time
from hilum.archive.spill import private_folder
with private_folder() as folder:
    (folder / "identifiers").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (left / "identifiers").exists()
    stranger = tmp_path / f"hilum-{os.getuid()}-link"
    (tmp_path / "mine").mkdir()
    stranger.symlink_to(tmp_path / "mine")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with private_folder():
        assert not left.exists()
    assert stranger.exists()


MANY = """
from hilum.archive.spill import private_folder
for _ in range(150):
    with private_folder() as folder:
        (folder / "rows").mkdir()
        (folder / "rows" / "identifiers").touch()
"""


def test_runs_that_end_while_others_begin_do_not_clear_away_each_other(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", MANY], stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
        for _ in range(3)
    ]
    assert [run.communicate()[1] for run in runs] == [b""] * 3
    assert not list(tmp_path.iterdir())


FLAT = """
import resource, sys, time
from pathlib import Path
from hilum import records
from hilum.archive import dicom, ledger, spill
from hilum.archive import spill as module
from hilum.archive.dicom.header import Header
from hilum.archive.ledger import count, read_entries, write_ledger
from hilum.archive.privacy import Key
from hilum.archive.spill import Spill, decode, encode

# What is held at once: small, so that it is full in the smaller run already.
spill.LIMIT_BYTES, spill._BLOCK_BYTES, records.ROW_GROUP, ledger._PORTION = 1 << 20, 1 << 10, 256, 64
num_headers, folder, key = int(sys.argv[1]), Path(sys.argv[2]), Key(bytes(range(32)))

def header(n):
    uid, k = f"1.2.3.{n % (num_headers // 20)}", n // (num_headers // 20)
    return uid, Header(
        path=folder / "a" / uid / f"{n}.dcm", size=1, patient_id=uid, study_uid=uid, series_uid=uid,
        instance_uid=f"{uid}.{n}", modality="CT", rows=512, columns=512, bits_allocated=16, position=(0, 0, 2.0 * k),
        orientation=(1, 0, 0, 0, 1, 0), pixel_spacing=(0.7, 0.7), thickness=2.0, slope=1.0, intercept=0.0,
    )

def entries():
    with Spill(folder / "headers") as headers:
        for n in range(num_headers):
            uid, found = header(n)
            headers.add(key.hash("series", uid), encode(found))
        for bucket in headers.buckets():
            yield from dicom.entries((decode(Header, line) for _, line in bucket), folder, key)

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak_mib()
counts = write_ledger(folder / "l.parquet", entries(), archive_root=folder)
assert counts == count(read_entries(folder / "l.parquet"))
print(counts["num_files"], counts["num_used"], peak_mib() - before)
"""


def grown_mib(tmp_path: Path, num_headers: int) -> float:
    folder = tmp_path / str(num_headers)
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", FLAT, str(num_headers), str(folder)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_files, num_used, grown = done.stdout.split()
    assert (int(num_files), int(num_used)) == (num_headers, num_headers // 20)
    return float(grown)


def test_memory_does_not_grow_with_the_archive(tmp_path):
    """Headers → series → ledger, with 1 MB allowed in memory: the headers of the larger one are 8 MB as text."""
    small, large = grown_mib(tmp_path, 5_000), grown_mib(tmp_path, 20_000)
    assert large < small + 15, (small, large)


@pytest.mark.nightly
def test_memory_does_not_grow_with_a_large_archive(tmp_path):
    began = time.monotonic()
    small, large = grown_mib(tmp_path, 50_000), grown_mib(tmp_path, 200_000)
    assert large < small + 15, (small, large, time.monotonic() - began)
