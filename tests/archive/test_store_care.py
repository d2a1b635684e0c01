"""A store is checked, joined, extended and tidied; every kind of damage is found, and no kill leaves a mess."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hilum import cli
from hilum.archive.ledger import Entry, read_ledger, write_entries
from hilum.archive.prepare import prepare
from hilum.archive.store import care as module
from hilum.archive.store import verify as verify_module
from hilum.archive.store.care import append, compact, merge
from hilum.archive.store.index import INDEX_SCHEMA, index_path, write_index
from hilum.archive.store.store import Store, volume_path
from hilum.archive.store.verify import verify
from hilum.archive.workers import Crashed
from hilum.errors import StoreError, UsageError
from hilum.volume import Volume

KEYS = [f"{n:02x}{n:014x}" for n in (17, 18, 40, 41, 250)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_store, make_volume) -> Path:
    """Five volumes, one without geometry and one with scaled voxels, and a refused file in the ledger."""
    volumes = {key: make_volume(n, (3, 30, 40)) for n, key in enumerate(KEYS)}
    volumes[KEYS[1]] = Volume(voxels=volumes[KEYS[1]].voxels * np.float32(0.1), affine=None, modality="MR")
    refused = [Entry(key="77" * 8, reason="corrupt", num_files=3)]
    return write_store(tmp_path_factory.mktemp("care") / "store", volumes, refused=refused)


@pytest.fixture
def store(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def findings(store: Path, **options: bool) -> dict[str, str]:
    return {f["key"]: f["what"] for f in verify(store, num_workers=1, **options)["findings"]}


def content(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in store.rglob("*") if p.is_file()}


# ---- verify


@pytest.mark.parametrize(("num_workers", "deep"), [(1, False), (1, True), (2, True)])
def test_nothing_is_found_in_a_good_store(whole, num_workers, deep):
    result = verify(whole, deep=deep, num_workers=num_workers)
    assert result["findings"] == []
    assert (result["num_volumes"], result["num_slices"]) == (5, 15)
    assert result["bytes"] == sum(p.stat().st_size for p in whole.glob("volumes/*/*"))


def test_every_single_flipped_byte_is_found(store):
    path = volume_path(store, KEYS[2])
    data = path.read_bytes()
    for at in np.linspace(0, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        assert list(findings(store)) == [KEYS[2]]
        assert "checksum" in findings(store)[KEYS[2]]


def test_a_truncated_a_missing_and_an_extra_file(store):
    path = volume_path(store, KEYS[0])
    path.write_bytes(path.read_bytes()[:-1])
    volume_path(store, KEYS[1]).unlink()
    extra = volume_path(store, "ab" * 8)
    extra.parent.mkdir()
    extra.touch()
    misplaced = store / "volumes" / "00" / f"{KEYS[2]}.b2nd"
    misplaced.parent.mkdir()
    misplaced.touch()
    found = findings(store)
    size = path.stat().st_size
    assert found == {
        KEYS[0]: f"file has {size} bytes, expected {size + 1}",
        KEYS[1]: "file is missing",
        f"volumes/ab/{'ab' * 8}.b2nd": "file is in no row of the index",
        f"volumes/00/{KEYS[2]}.b2nd": "file is in no row of the index",
    }


def rewrite(store: Path, edit) -> None:
    """Change the rows of an index behind its back: in the given order, unsorted."""
    rows = edit(list(Store(store).rows))
    table = pa.Table.from_pylist([{n: getattr(r, n) for n in INDEX_SCHEMA.names} for r in rows], schema=INDEX_SCHEMA)
    with pa.OSFile(str(index_path(store)), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(table)


def test_rows_in_wrong_order_or_twice(store):
    rewrite(store, lambda rows: [rows[0], rows[2], rows[1], rows[3], rows[3], rows[4]])
    assert findings(store) == {KEYS[1]: "index: not in order", KEYS[3]: "index: twice"}


def test_two_rows_that_swapped_their_content(store):
    rewrite(
        store,
        lambda rows: [replace(rows[2], key=rows[0].key), *rows[1:2], replace(rows[0], key=rows[2].key), *rows[3:]],
    )
    assert set(findings(store)) == {KEYS[0], KEYS[2]}


BAD_AFFINE = tuple(np.array([[0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]).ravel())


@pytest.mark.parametrize(
    ("change", "what", "deep"),
    [
        ({"affine": BAD_AFFINE}, "affine is singular", False),
        ({"affine": (float("nan"),) * 16}, "affine is singular or not finite", False),
        ({"slope": 0.0}, "slope 0", False),
        ({"shape": (3, 40, 30)}, r"file holds int16 (3, 30, 40), expected int16 (3, 40, 30)", False),
        ({"shape": (4, 30, 40)}, "content of 3 slices", False),
        ({"foreground": bytes(3)}, "foreground differs", False),
        ({"pixel_hash": "0" * 16}, "pixel hash differs", True),
        ({"intercept": 5.0}, "pixel hash differs", True),
        ({"threshold": 7.0}, "content differs", True),
    ],
)
def test_a_row_that_does_not_fit_its_file(store, change, what, deep):
    rewrite(store, lambda rows: [*rows[:3], replace(rows[3], **change), rows[4]])
    found = findings(store, deep=deep)
    assert list(found) == [KEYS[3]]
    assert what in found[KEYS[3]] or what == "content differs"
    if deep:
        assert findings(store) == {}


def test_a_ledger_of_another_store(store):
    entries = read_ledger(store / "ledger.parquet")
    write_entries(store / "ledger.parquet", [e for e in entries if e.key != KEYS[4]] + [Entry(key="zz")])
    assert findings(store) == {
        KEYS[4]: "ledger: not used, but in the index",
        "zz": "ledger: used, but not in the index",
    }


def test_a_file_that_kills_its_reader_is_a_finding(whole, monkeypatch):
    def run(function, rows, num_workers):
        yield from ((row, Crashed() if row.key == KEYS[3] else function(row)) for row in rows)

    monkeypatch.setattr(verify_module, "run", run)
    assert findings(whole) == {KEYS[3]: "reading it ends the process"}


# ---- merge


@pytest.fixture(scope="module")
def parts(tmp_path_factory, write_store, make_volume) -> list[Path]:
    """The volumes of `whole` in two stores; KEYS[2] in both. Each refused what the other used, or a file of its own."""
    root = tmp_path_factory.mktemp("parts")
    volumes = {key: make_volume(n, (3, 30, 40)) for n, key in enumerate(KEYS)}
    volumes[KEYS[1]] = Volume(voxels=volumes[KEYS[1]].voxels * np.float32(0.1), affine=None, modality="MR")
    chosen = [[KEYS[0], KEYS[2], KEYS[4]], [KEYS[1], KEYS[2], KEYS[3]]]
    refused = [
        [Entry(key=KEYS[1], reason="truncated"), Entry(key="77" * 8, reason="truncated")],
        [Entry(key=KEYS[0], reason="truncated"), Entry(key="77" * 8, reason="corrupt", num_files=3)],
    ]
    return [
        write_store(root / f"part{n}", {k: volumes[k] for k in keys}, refused=r)
        for n, (keys, r) in enumerate(zip(chosen, refused))
    ]


def test_merged_is_the_same_as_made_in_one_go(whole, parts, tmp_path):
    assert merge(parts, tmp_path / "out") == {"num_volumes": 5, "num_new": 2, "num_same": 1}
    found, wanted = content(tmp_path / "out"), content(whole)
    del found["store.json"], wanted["store.json"]
    assert found == wanted
    assert volume_path(tmp_path / "out", KEYS[0]).stat().st_nlink > 1  # shared, not copied
    assert verify(tmp_path / "out", deep=True, num_workers=1)["findings"] == []
    assert Store(tmp_path / "out").hash == Store(whole).hash


def test_merging_across_disks_copies(parts, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module.os, "link", refuse)
    merge(parts, tmp_path / "out")
    assert volume_path(tmp_path / "out", KEYS[0]).stat().st_nlink == 1
    assert verify(tmp_path / "out", num_workers=1)["findings"] == []


def test_of_equal_volumes_file_and_row_of_the_first_stay(parts, tmp_path, write_store, make_volume, monkeypatch):
    """Another version of the compressor writes other bytes for the same voxels."""
    monkeypatch.setattr("hilum.archive.store.store.BLOCK", 16)
    other = write_store(tmp_path / "other", {KEYS[2]: make_volume(2, (3, 30, 40))})
    checksums = [Store(s).row(KEYS[2]).checksum for s in (parts[0], other)]
    assert checksums[0] != checksums[1]
    for number, stores in enumerate([[parts[0], other], [other, parts[0]]]):
        merge(stores, tmp_path / f"out{number}")
        assert Store(tmp_path / f"out{number}").row(KEYS[2]).checksum == checksums[number]
        assert verify(tmp_path / f"out{number}", deep=True, num_workers=1)["findings"] == []


@pytest.mark.parametrize("step", ["_link", "merge_indexes", "_merge_ledgers", "write_header"])
def test_a_merge_stopped_anywhere_goes_on(parts, tmp_path, monkeypatch, step):
    merge(parts, tmp_path / "wanted")
    calls = []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == (4 if step == "_link" else 1):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = getattr(module, step)
    with monkeypatch.context() as patch:
        patch.setattr(module, step, stop)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, tmp_path / "out")
    with pytest.raises(StoreError, match="not finished"):
        Store(tmp_path / "out")
    merge(parts, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
    merge(parts, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "wanted")


def test_what_cannot_be_merged(parts, tmp_path, write_store, make_volume):
    other = write_store(tmp_path / "other", {KEYS[2]: make_volume(9, (3, 30, 40))})
    with pytest.raises(StoreError, match=f"1 volumes have one key but other pixels.*{KEYS[2]}"):
        merge([*parts, other], tmp_path / "out")
    moved = make_volume(2, (3, 30, 40))
    moved = replace(moved, affine=moved.affine + np.eye(4)[3] * np.array([[1.0], [0], [0], [0]]))
    with pytest.raises(StoreError, match="other pixels, geometry"):
        merge([parts[0], write_store(tmp_path / "moved", {KEYS[2]: moved})], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    header = json.loads((other / "store.json").read_text())
    (other / "store.json").write_text(json.dumps(header | {"key": "another"}))
    with pytest.raises(StoreError, match=r"different keys \(another, k\)"):
        merge([parts[0], other], tmp_path / "out")
    with pytest.raises(UsageError, match="is one of the stores"):
        merge(parts, parts[0])
    merge(parts, tmp_path / "out")
    with pytest.raises(StoreError, match="other settings"):
        merge(parts[:1], tmp_path / "out")


# ---- append


def write_images(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        pixels = np.random.default_rng(n).integers(0, 255, (16, 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:03d}.png")
    return folder


def test_append_is_prepare_of_both(tmp_path, key):
    write_images(tmp_path / "a", range(6))
    write_images(tmp_path / "b", range(4, 10))
    (tmp_path / "b" / "notes.txt").write_text("x")
    write_images(tmp_path / "both", range(10))
    (tmp_path / "both" / "notes.txt").write_text("x")
    prepare(tmp_path / "a", tmp_path / "store", key=key, num_workers=1)
    prepare(tmp_path / "both", tmp_path / "wanted", key=key, num_workers=1)
    result = append(tmp_path / "store", tmp_path / "b", key=key, num_workers=1)
    assert (result["num_volumes"], result["num_new"], result["num_same"]) == (10, 4, 2)
    found, wanted = content(tmp_path / "store"), content(tmp_path / "wanted")
    del found["store.json"], wanted["store.json"]
    assert found == wanted
    assert prepare(tmp_path / "a", tmp_path / "store", key=key, num_workers=1)["num_used"] == 10
    with pytest.raises(StoreError, match="made with key"):
        append(tmp_path / "store", tmp_path / "b", key=type(key)(b"another key, long enough"), num_workers=1)


@pytest.mark.parametrize("step", ["prepare", "_link", "merge_indexes", "_merge_ledgers"])
def test_an_append_stopped_anywhere_goes_on(tmp_path, key, monkeypatch, step):
    write_images(tmp_path / "a", range(4))
    write_images(tmp_path / "b", range(3, 7))
    prepare(tmp_path / "a", tmp_path / "store", key=key, num_workers=1)
    before = Store(tmp_path / "store").hash
    wanted = shutil.copytree(tmp_path / "store", tmp_path / "wanted")
    append(wanted, tmp_path / "b", key=key, num_workers=1)
    original = getattr(module, step)

    def stop(*args, **kwargs):
        original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, stop)
        with pytest.raises(KeyboardInterrupt):
            append(tmp_path / "store", tmp_path / "b", key=key, num_workers=1)
    assert (Store(tmp_path / "store").hash == before) == (step in ("prepare", "_link"))
    append(tmp_path / "store", tmp_path / "b", key=key, num_workers=1)
    assert content(tmp_path / "store") == content(wanted)


# ---- compact


def test_compact_removes_what_no_row_names(store):
    before = content(store)
    (store / "volumes" / "ab").mkdir()
    (store / "volumes" / "ab" / f"{'ab' * 8}.b2nd").write_bytes(bytes(1000))
    (store / "volumes" / KEYS[0][:2] / ".x.b2nd.1.tmp").write_bytes(bytes(200))
    (store / "index" / "part-000001.arrow").write_bytes(bytes(30))
    (store / ".append-12345678" / "volumes").mkdir(parents=True)
    (store / ".append-12345678" / "volumes" / "x").write_bytes(bytes(4))
    os.link(volume_path(store, KEYS[0]), store / "volumes" / "ab" / "shared")
    assert compact(store) == {"num_removed": 5, "bytes_freed": 1234}
    assert content(store) == before
    assert not (store / "volumes" / "ab").exists()
    assert not list(store.glob(".append-*"))
    assert compact(store) == {"num_removed": 0, "bytes_freed": 0}


def test_a_volume_taken_out_of_the_index_goes_with_compact(store):
    rows = list(Store(store).rows)
    write_index(index_path(store), rows[1:])
    assert compact(store) == {"num_removed": 1, "bytes_freed": rows[0].bytes}
    assert not volume_path(store, KEYS[0]).exists()


# ---- the command line


def hilum(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["hilum", "store", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().out


def test_commands(store, parts, tmp_path, monkeypatch, capsys):
    code, out = hilum(monkeypatch, capsys, "verify", store, "--num-workers", 1)
    assert (code, out.split("; ")[-1]) == (0, "all as written\n")
    volume_path(store, KEYS[1]).unlink()
    code, out = hilum(monkeypatch, capsys, "verify", store, "--json", "--num-workers", 1)
    assert (code, json.loads(out)["findings"]) == (4, [{"key": KEYS[1], "what": "file is missing"}])
    code, out = hilum(monkeypatch, capsys, "merge", *parts, "-o", tmp_path / "out", "--json")
    assert (code, json.loads(out)["num_volumes"]) == (0, 5)
    code, out = hilum(monkeypatch, capsys, "compact", tmp_path / "out")
    assert code == 0
    assert "0 files removed" in out
    assert hilum(monkeypatch, capsys, "merge", store, "-o", store)[0] == 2


def test_killed_merge_by_signal(parts, tmp_path):
    """A real kill, at whatever moment it hits."""
    merge(parts, tmp_path / "wanted")
    code = "import sys; from hilum.archive.store.care import merge; merge(sys.argv[1:3], sys.argv[3])"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, parts), str(tmp_path / "out")])
    while process.poll() is None and not list(tmp_path.glob("out/volumes/*/*.b2nd")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    merge(parts, tmp_path / "out")
    compact(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
