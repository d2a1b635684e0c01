"""Every file ends in exactly one row, whatever lies in the folder."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hilum.archive import ledger, spill
from hilum.archive import scan as scanning
from hilum.archive.intake import read_scan
from hilum.archive.ledger import Entry, count, read_entries, read_ledger, vendor_family, write_ledger
from hilum.archive.reasons import REASONS
from hilum.archive.scan import find, scan, scan_to, walk
from hilum.archive.workers import run
from hilum.errors import InputError, ScanRefused


def num_files(folder: Path) -> int:
    return sum(p.is_file() for p in folder.rglob("*"))


def check_accounting(entries: list[Entry], folder: Path) -> None:
    assert sum(e.num_files for e in entries) == num_files(folder)
    paths = [place for e in entries for place in zip(e.paths, e.frames or (0,) * len(e.paths))]
    assert len(paths) == len(set(paths))
    assert len({p for p, _ in paths}) == num_files(folder)
    assert len({e.key for e in entries}) == len(entries)


def test_every_dicom_file_is_accounted_for(real_data, key):
    check_accounting(scan(real_data / "dicom", key, pixels=False), real_data / "dicom")


@pytest.mark.nightly
def test_every_real_file_is_accounted_for_and_readable(real_data, key):
    entries = scan(real_data, key, pixels=True)
    check_accounting(entries, real_data)
    assert not [e for e in entries if e.reason in ("reader_crashed", "cannot_decode", "truncated", "corrupt")]


def test_an_archive_as_they_come(write_series, voxels, tmp_path, key):
    archive = tmp_path / "archive"
    write_series(voxels, folder="archive/patient")
    (archive / "README.md").write_text("notes")
    (archive / "empty").touch()
    (archive / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + os.urandom(500))
    Image.fromarray(voxels[0].astype(np.uint8)).save(archive / "a.png")
    (archive / "link").symlink_to(archive / "a.png")
    (archive / "loop").symlink_to(archive)
    (archive / "dangling").symlink_to(archive / "nowhere")
    (archive / "x.jp2").write_bytes(b"\0\0\0\x0cjP  \r\n")
    os.mkfifo(archive / "pipe")
    entries = scan(archive, key)
    by_name = {e.paths[0].name: e.reason or e.verdict for e in entries}
    assert by_name["im000"] == "used"
    assert by_name["README.md"] == by_name["empty"] == "not_an_image"
    assert by_name["broken.dcm"] in ("corrupt", "other_object")
    assert by_name["a.png"] == by_name["link"] == "used"
    assert by_name["dangling"] == "unreadable"
    assert by_name["x.jp2"] == "other_format"
    assert sum(e.num_files for e in entries) == 6 + 7
    assert "pipe" not in by_name


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_and_folder(tmp_path, key):
    (tmp_path / "file").touch(mode=0)
    (tmp_path / "folder").mkdir(mode=0)
    assert sorted((e.reason, e.num_files) for e in scan(tmp_path, key)) == [("unreadable", 0), ("unreadable", 1)]
    (tmp_path / "folder").chmod(0o700)


def test_what_is_no_archive(tmp_path, key):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (("missing", "is missing; expected"), ("file", "is a file; expected"), ("empty", "is empty")):
        with pytest.raises(InputError, match=message):
            scan(tmp_path / name, key)


def test_ledger_on_disk_holds_no_path_and_no_identifier(write_series, voxels, tmp_path, key):
    write_series(voxels, folder="archive/Secret^Name")
    write_series(voxels, folder="archive/Secret^Name/P-001", edit=lambda k, d: setattr(d, "PixelSpacing", [k + 1, 1]))
    entries = scan(tmp_path / "archive", key)
    write_ledger(tmp_path / "out" / "l.parquet", entries, archive_root=tmp_path / "archive")
    written = repr(pq.read_table(tmp_path / "out" / "l.parquet").to_pylist())
    assert "ecret" not in written
    assert "P-001" not in written
    where = pq.read_table(tmp_path / "out" / "l.paths.parquet").to_pylist()
    assert {"key": entries[0].key, "path": entries[0].paths[0].relative_to(tmp_path / "archive").as_posix()} in where
    assert len(where) == 12
    read = read_ledger(tmp_path / "out" / "l.parquet")
    assert [(e.key, e.verdict, e.spacing_mm, e.repairs) for e in read] == [
        (e.key, e.verdict, e.spacing_mm, e.repairs) for e in entries
    ]


def test_read_ledger_refuses_other_tables(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_ledger(tmp_path / "x.parquet")


def test_the_files_of_an_archive_come_in_one_order_twice(tmp_path):
    for name in ("b/2", "b/10", "b.c/1", "a", "b/a/0", "B", "c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    listing = walk(tmp_path)
    assert list(listing.names()) == ["B", "a", "c", "b/10", "b/2", "b/a/0", "b.c/1"]
    assert listing.num_files == 7
    assert walk(tmp_path).digest == listing.digest
    (tmp_path / "a").write_text("ab")
    assert walk(tmp_path).digest != listing.digest


def test_folders_may_be_deeper_than_python_recurses(tmp_path):
    deep = str(tmp_path)
    for _ in range(1500):
        deep += "/d"
        os.mkdir(deep)
    Path(deep, "x").touch()
    try:
        assert walk(tmp_path).num_files == 1
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # deeper than shutil can follow


def test_a_ledger_written_as_a_stream_is_the_same(write_series, large, tmp_path, key, monkeypatch):
    for n in range(12):
        write_series(large[: 4 + n % 3], folder=f"archive/{n}", series=f"{n}", PatientID=f"P{n % 5}")
        (tmp_path / "archive" / f"{n}.txt").touch()
    archive, one, other = tmp_path / "archive", tmp_path / "one.parquet", tmp_path / "other.parquet"
    entries = scan(archive, key)
    assert write_ledger(one, reversed(entries), archive_root=archive) == count(entries)
    monkeypatch.setattr(spill, "LIMIT_BYTES", 3000)
    monkeypatch.setattr(scanning, "MANY_FILES", 10)
    monkeypatch.setattr(scanning, "BATCH", 5)
    assert scan_to(other, archive, key, num_workers=2) == count(entries)
    assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "one.paths.parquet").read_bytes() == (tmp_path / "other.paths.parquet").read_bytes()
    assert scan_to(None, archive, key, pixels=True, num_workers=1)["refused"] == count(entries)["refused"]
    monkeypatch.setattr(ledger, "_PORTION", 3)
    write_ledger(other, entries, archive_root=archive)
    assert one.read_bytes() == other.read_bytes()
    assert list(read_entries(other)) == read_ledger(one)
    where = pq.read_table(tmp_path / "one.paths.parquet").to_pylist()
    assert {(r["key"], r["path"]) for r in where} == {
        (e.key, p.relative_to(archive).as_posix()) for e in entries for p in e.paths
    }


def test_find_one_file(write_series, voxels, tmp_path, key):
    paths = write_series(voxels, SliceThickness=2.0)
    (entry,) = find(paths[2], key)
    np.testing.assert_array_equal(read_scan(entry).voxels[0], voxels[2].astype(int) - 1024)
    (tmp_path / "notes.txt").write_text("x")
    (entry,) = find(tmp_path / "notes.txt", key)
    assert entry.reason == "not_an_image"


def test_keys_follow_the_identifiers(write_series, voxels, tmp_path, key):
    write_series(voxels)
    (entry,) = scan(tmp_path / "archive", key)
    assert entry.key == key.hash("series", "1.2.826.0.1.3680043.10.9999.1")
    Image.fromarray(voxels[0].astype(np.uint8)).save(tmp_path / "archive" / "a.png")
    (entry,) = (e for e in scan(tmp_path / "archive", key) if e.reader == "image")
    assert entry.key == key.hash("item", "a.png")
    assert entry.patient == ""


def test_pixels_find_what_headers_hide(write_series, key, tmp_path):
    write_series(np.full((5, 4, 4), 3, np.uint16))
    assert [e.verdict for e in scan(tmp_path / "archive", key)] == ["used"]
    assert [e.reason for e in scan(tmp_path / "archive", key, pixels=True)] == ["constant"]


def test_count(write_series, voxels, tmp_path, key):
    write_series(voxels)
    (tmp_path / "archive" / "a.txt").write_text("x")
    total = count(scan(tmp_path / "archive", key))
    assert total["num_files"] == 7
    assert (total["num_used"], total["num_slices"], total["num_patients"], total["modalities"]) == (1, 6, 1, {"CT": 1})
    assert total["refused"] == {"not_an_image": {"rows": 1, "files": 1, "fault": False}}


def test_every_reason_is_a_sentence():
    assert all(r.sentence[0].isupper() and r.sentence.endswith(".") for r in REASONS.values())


@pytest.mark.parametrize(
    ("manufacturer", "family"),
    [
        ("SIEMENS", "SIEMENS"),
        ("Siemens Healthineers", "SIEMENS"),
        ("GE MEDICAL SYSTEMS", "GE"),
        ("CANON_MEC", "CANON"),
        ("Philips Medical Systems", "PHILIPS"),
        ("Gentle Imaging of Dr X", "OTHER"),
        ("", ""),
    ],
)
def test_vendor_family(manufacturer, family):
    assert vendor_family(manufacturer) == family


def test_progress_counts_files(write_series, voxels, tmp_path, key):
    write_series(voxels)
    seen = []
    scan(tmp_path / "archive", key, progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1] == (6, 6)


def test_refusals_cross_process_borders():
    with pytest.raises(ScanRefused, match="constant: all 3"):
        dict(
            run(eval, ['exec(\'from hilum.errors import ScanRefused; raise ScanRefused("constant", "all 3")\')'] * 2, 2)
        )
