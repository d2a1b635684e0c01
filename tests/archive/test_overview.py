"""The page about a whole archive: its sums are those of the ledger, and it stays small whatever the ledger's size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hilum.archive.doctor import overview
from hilum.archive.doctor.overview import aggregate, choose, show
from hilum.archive.ledger import LEDGER_SCHEMA, Entry, count, write_entries, write_ledger
from hilum.archive.phantom import write_phantom
from hilum.archive.prepare import prepare
from hilum.archive.reasons import REASONS, flag
from hilum.archive.scan import scan
from hilum.errors import InputError


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("overview") / "phantom"
    write_phantom(out, num_patients=2, num_slices=8, matrix=32, num_workers=1)
    return out / "scans"


def words(page: Path) -> str:
    return re.sub(r'base64,[^"]+', "", page.read_text())


def entries() -> list[Entry]:
    """A ledger whose sums can be counted by hand."""
    used = [
        Entry(key=f"a{n}", patient=f"p{n % 3}", reader="dicom", modality="CT" if n % 2 else "MR", num_files=10,
              num_slices=10, spacing_mm=(2.0 + n, 0.5, 0.5), orientation="SPL" if n < 4 else "LIP", manufacturer="GE",
              repairs=(f"{n} bits cleared",) if n == 1 else (), flags=(flag("spacing_tag", f"says {n} mm"),) * (n < 2))
        for n in range(6)
    ]  # fmt: skip
    refused = [
        Entry(key="b0", reader="dicom", modality="CT", reason="irregular_spacing", detail="7 mm", num_files=28),
        Entry(key="b1", reader="dicom", modality="CT", reason="localizer", num_files=2),
        Entry(key="b2", reason="not_an_image", num_files=1),
        Entry(key="b3", reason="not_an_image", num_files=1),
    ]
    return used + refused


def test_sums_are_those_of_the_ledger(tmp_path):
    write_entries(tmp_path / "l.parquet", entries())
    result = show(tmp_path / "l.parquet", tmp_path / "page.html")
    expected = count(entries())
    for name in ("num_files", "num_used", "num_files_used", "num_slices", "num_patients"):
        assert result[name] == expected[name], name
    assert (result["num_repaired"], result["num_files_refused"], result["num_thumbnails"]) == (1, 32, 0)
    assert result["reasons"] == {"irregular_spacing": 28, "localizer": 2, "not_an_image": 2}
    text = words(tmp_path / "page.html")
    assert "60 files of used scans + 32 files not used = 92 files" in text
    for reason in result["reasons"]:
        assert REASONS[reason].sentence.replace("'", "&#x27;") in text
    assert "N bits cleared" in text
    assert "SpacingBetweenSlices disagrees" in text
    totals = aggregate(tmp_path / "l.parquet")
    assert totals.flags == {"spacing_tag": 2}
    assert totals.repairs == {"N bits cleared": 1}
    assert totals.spacings.sum() == totals.pixels.sum() == 6
    assert totals.spacings[np.searchsorted(overview.SPACING_EDGES, 2.0)] == 1
    used = totals.strata.filter(pa.compute.not_equal(totals.strata["verdict"], "refused")).to_pylist()
    assert sum(r["num_rows"] for r in used if r["plane"] == "axial") == 4
    assert sum(r["num_rows"] for r in used if r["plane"] == "sagittal") == 2


def test_batches_change_nothing(tmp_path, monkeypatch):
    write_entries(tmp_path / "l.parquet", entries())
    whole = show(tmp_path / "l.parquet", tmp_path / "a.html")
    monkeypatch.setattr(overview, "BATCH_ROWS", 3)
    assert show(tmp_path / "l.parquet", tmp_path / "b.html") == whole
    assert (tmp_path / "b.html").read_text() == (tmp_path / "a.html").read_text()


def test_thumbnails_are_taken_evenly(tmp_path):
    """Nine of one kind and one of another: both are drawn; what was set aside never is."""
    many = [Entry(key=f"a{n}", reader="dicom", modality="CT") for n in range(9)]
    rare = [Entry(key="z", reader="dicom", modality="MR")]
    aside = [Entry(key="s", reader="dicom", modality="OT", reason="secondary_capture")]
    fault = [Entry(key="f", reader="dicom", modality="CT", reason="irregular_spacing")]
    write_entries(tmp_path / "l.parquet", many + rare + aside + fault)
    totals = aggregate(tmp_path / "l.parquet")
    assert {row["key"] for row in choose(totals, 4, False)} == {"a0", "a1", "z", "f"}
    assert {row["key"] for row in choose(totals, 4, True)} == {"a0", "a1", "a2", "z"}
    assert len(choose(totals, 100, False)) == 11


def test_an_archive_gives_the_thumbnails(phantom, key, tmp_path):
    found = scan(phantom, key)
    write_ledger(tmp_path / "l.parquet", found, archive_root=phantom)
    result = show(tmp_path / "l.parquet", tmp_path / "page.html", archive=phantom, key=key)
    assert result["num_thumbnails"] == 4
    assert result["num_patients"] == 2
    text = words(tmp_path / "page.html")
    for secret in ("PHANTOM", "dcm", str(phantom), "Phantom", *(p.name for e in found for p in e.paths)):
        assert secret not in text
    assert json.dumps(result)


def test_a_store_has_its_own_thumbnails(phantom, key, tmp_path):
    prepare(phantom, tmp_path / "store", key=key, num_workers=1)
    result = show(tmp_path / "store", tmp_path / "page.html")
    assert result["num_thumbnails"] == 4
    assert "nothing is lost" in words(tmp_path / "page.html")
    header = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps({**header, "num_files": header["num_files"] + 1}))
    show(tmp_path / "store", tmp_path / "page.html")
    assert "nothing is lost" not in words(tmp_path / "page.html")
    assert "were counted in the archive: please report this" in words(tmp_path / "page.html")


def test_what_is_neither_ledger_nor_store(tmp_path):
    with pytest.raises(InputError, match="is missing; expected a ledger"):
        show(tmp_path / "absent.parquet", tmp_path / "page.html")
    with pytest.raises(InputError, match=r"a folder without store.json; expected a ledger"):
        show(tmp_path, tmp_path / "page.html")
    (tmp_path / "text").write_text("text")
    with pytest.raises(InputError, match="is no Parquet file"):
        show(tmp_path / "text", tmp_path / "page.html")
    pq.write_table(pa.table({"vector": [1.0]}), tmp_path / "features.parquet")
    with pytest.raises(InputError, match="is no ledger of this version"):
        show(tmp_path / "features.parquet", tmp_path / "page.html")
    pq.write_table(LEDGER_SCHEMA.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="has no rows"):
        show(tmp_path / "empty.parquet", tmp_path / "page.html")
    write_entries(tmp_path / "l.parquet", entries())
    with pytest.raises(InputError, match=r"says where the scans of l\.parquet lie"):
        show(tmp_path / "l.parquet", tmp_path / "page.html", archive=tmp_path)
    assert not (tmp_path / "page.html").exists()


MEASURE = """
import sys, time
from hilum.archive.doctor.overview import show
began = time.process_time()
result = show(sys.argv[1], sys.argv[2])
with open("/proc/self/status") as status:  # ru_maxrss would begin with that of the parent
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(result["num_files"], result["num_patients"], time.process_time() - began, peak / 1024)
"""


def test_a_large_ledger_stays_cheap(tmp_path):
    """300,000 rows: under 10 s of processor time, 500 MB and 1 MB of page."""
    rng = np.random.default_rng(0)
    rows = 300_000
    reasons = np.array(["", "", "", "localizer", "irregular_spacing"])[rng.integers(0, 5, rows)]
    table = {name: [""] * rows for name in LEDGER_SCHEMA.names if LEDGER_SCHEMA.field(name).type == pa.string()}
    table |= {
        "key": [f"{n:016x}" for n in range(rows)],
        "patient": [f"{n:016x}" for n in rng.integers(0, 100_000, rows)],
        "reader": ["dicom"] * rows,
        "modality": np.array(["CT", "MR"])[rng.integers(0, 2, rows)],
        "verdict": np.where(reasons == "", "used", "refused"),
        "reason": reasons,
        "repairs": [[]] * rows,
        "flags": [["spacing_tag: says 3 mm"]] * rows,
        "orientation": ["SPL"] * rows,
        "spacing_mm": pa.FixedSizeListArray.from_arrays(pa.array(rng.uniform(0.5, 6, 3 * rows)), 3),
        "num_files": np.full(rows, 100),
        "shear_deg": np.zeros(rows),
        "study_day": pa.nulls(rows, pa.int32()),
        **{name: np.full(rows, 100, np.int32) for name in ("num_slices", "rows", "columns")},
    }
    whole = pa.table({n: table.get(n, pa.nulls(rows, LEDGER_SCHEMA.field(n).type)) for n in LEDGER_SCHEMA.names})
    pq.write_table(whole.cast(LEDGER_SCHEMA), tmp_path / "l.parquet")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "l.parquet"), str(tmp_path / "page.html")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_files, num_patients, seconds, megabytes = map(float, done.stdout.split())
    used_patients = {p for p, r in zip(table["patient"], reasons) if r == ""}
    assert (num_files, num_patients) == (rows * 100, len(used_patients))
    assert seconds < 10
    assert megabytes < 500
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
