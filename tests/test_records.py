import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow as pa
import pytest

from hilum import records
from hilum.errors import DiskFull, InputError
from hilum.records import (
    hash_file,
    hash_json,
    read_json,
    read_table,
    table_metadata,
    write_atomic,
    write_json,
    write_table,
    write_text,
)


def test_json_and_text_come_back_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "run.json"
    write_json(path, {"b": [1, 2.5, None], "a": "µm"})
    assert read_json(path) == {"a": "µm", "b": [1, 2.5, None]}
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, 1)

    def write_half():
        with write_atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    with pytest.raises(TypeError):
        write_json(path, {"not json": object()})
    assert read_json(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_kill_in_the_middle_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, "old")
    script = (
        "import sys, time; from pathlib import Path; from hilum.records import write_atomic\n"
        "with write_atomic(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout.readline() == b"ready\n"
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert read_json(path) == "old"
    write_json(path, "new")
    assert read_json(path) == "new"


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, ["a" * 100_000])
    script = (
        "import sys; from pathlib import Path; from hilum.records import write_json\n"
        "while True:\n    for c in 'abc': write_json(Path(sys.argv[1]), [c * 100_000])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as writer:
        try:
            seen, until = set(), time.monotonic() + 10
            while len(seen) < 3 and time.monotonic() < until:
                (text,) = read_json(path)
                assert len(text) == 100_000
                assert len(set(text)) == 1
                seen.add(text[0])
        finally:
            writer.kill()
    assert seen == set("abc")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_where_and_what_to_do(tmp_path, monkeypatch, number):
    write_json(tmp_path / "x.json", "old")

    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(records.os, "fsync", fail)
    with pytest.raises(DiskFull, match=r"no space left .*free some space and run the same command again"):
        write_json(tmp_path / "x.json", "new")
    assert read_json(tmp_path / "x.json") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_other_errors_of_the_disk_pass_unchanged(tmp_path, monkeypatch):
    def refuse(handle):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(records.os, "fsync", refuse)
    with pytest.raises(PermissionError):
        write_json(tmp_path / "x.json", 1)


@pytest.mark.parametrize(("free", "expected"), [(10, DiskFull), (1 << 30, RuntimeError)])
def test_a_library_that_hides_the_cause_is_judged_by_the_free_space(tmp_path, monkeypatch, free, expected):
    monkeypatch.setattr(records.os, "statvfs", lambda p: SimpleNamespace(f_bavail=free, f_frsize=1))

    def write():
        with write_atomic(tmp_path / "x"):
            raise RuntimeError("write failed")

    with pytest.raises(expected):
        write()


def test_tables_carry_their_metadata(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"item": ["a", "b"], "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))})
    write_table(path, table, {"key": "12", "n": 1})
    found = read_table(path)
    assert found.to_pydict() == table.to_pydict()
    assert table_metadata(found) == {"key": "12", "n": 1}
    assert read_table(path, ["item"]).column_names == ["item"]
    write_table(path, table)
    assert table_metadata(read_table(path)) == {}


def test_unreadable_records_are_input_errors(tmp_path):
    (tmp_path / "x").write_text("{no json")
    for read, message in ((read_json, "cannot be read as JSON"), (read_table, "cannot be read as Parquet")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "x")
        with pytest.raises(InputError, match="is missing"):
            read(tmp_path / "absent")
    with pytest.raises(InputError, match="is a folder; expected a Parquet file"):
        read_table(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)


def test_hashes_name_content_and_nothing_else(tmp_path):
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(b"hilum")
    assert hash_file(tmp_path / "x") == hash_file(tmp_path / "y") == hashlib.sha256(b"hilum").hexdigest()[:16]


def test_versions_and_machine_are_plain_facts(monkeypatch):
    assert set(records.versions()) >= {"python", "hilum", "numpy", "torch"}
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/hilum", "scan", "/secret/archive"])
    found = records.machine()
    assert found["num_cores"] >= 1
    assert found["memory_gib"] > 0
    assert not any("secret" in str(value) for value in found.values())
