"""Scans that are stored twice, or look as if: flagged, and dropped when the policy says so."""

import numpy as np
import pytest

from hilum.archive.ledger import count, read_ledger
from hilum.archive.policy import Policy
from hilum.archive.prepare import prepare
from hilum.archive.store.store import Store, volume_path
from hilum.archive.store.verify import verify

MR = "1.2.840.10008.5.1.4.1.1.4"


@pytest.fixture
def archive(write_series, tmp_path):
    """Patient A twice with the same voxels under two series, the same scan a little brighter as B, and another as C."""
    rng = np.random.default_rng(0)
    z, y, x = np.indices((8, 48, 40)) / 10
    one = (900 + 300 * np.sin(z + y) + 300 * np.cos(1.7 * x - y) + rng.normal(0, 3, z.shape)).astype(np.uint16)
    other = (900 + 300 * np.sin(2 * z - x) + 300 * np.cos(0.6 * x + y) + rng.normal(0, 3, z.shape)).astype(np.uint16)
    for series, patient, voxels in (("1", "A", one), ("2", "A", one), ("3", "B", one + 3), ("4", "C", other)):
        write_series(
            voxels, folder=f"archive/{series}", series=series, PatientID=patient, SOPClassUID=MR, RescaleIntercept=0
        )
    return tmp_path / "archive"


def test_copies_are_flagged(archive, tmp_path, key):
    assert prepare(archive, tmp_path / "store", key=key, num_workers=1)["num_volumes"] == 4
    entries = read_ledger(tmp_path / "store" / "ledger.parquet")
    flags = {e.key: [f for f in e.flags if "duplicate" in f or "looks_like" in f] for e in entries}
    first, second = sorted(key.hash("series", f"1.2.826.0.1.3680043.10.9999.{n}") for n in "12")
    bright, other = (key.hash("series", f"1.2.826.0.1.3680043.10.9999.{n}") for n in "34")
    assert flags[second] == [f"duplicate: same voxels as {first}"]
    assert flags[other] == []
    (note,) = flags[max(first, bright)]
    assert note.startswith(f"looks_like: {min(first, bright)} (")


def test_copies_are_dropped_on_request(archive, tmp_path, key, monkeypatch):
    policy = Policy(drop_duplicates=True)
    root = tmp_path / "store"
    assert prepare(archive, root, key=key, policy=policy, num_workers=1)["num_volumes"] == 3
    first, second = sorted(key.hash("series", f"1.2.826.0.1.3680043.10.9999.{n}") for n in "12")
    store = Store(root)
    assert first in [r.key for r in store.rows]
    assert not volume_path(root, second).exists()
    (left,) = [e for e in read_ledger(root / "ledger.parquet") if not e.used]
    assert (left.key, left.reason, left.detail) == (second, "duplicate", f"same voxels as {first}")
    assert count(read_ledger(root / "ledger.parquet"))["num_files"] == 32
    assert verify(root)["findings"] == []
