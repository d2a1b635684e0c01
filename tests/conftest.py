"""Fixtures for all tests: the real data, where present, and a key."""

import os
from pathlib import Path

# Sums depend on the number of threads in their last bits: this process and those it starts use one. Set before torch loads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from hilum.archive.privacy import Key


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans: $HILUM_TEST_DATA, or shared/data beside the checkout; else the test is skipped."""
    given = os.environ.get("HILUM_TEST_DATA")
    path = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set HILUM_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def key() -> Key:
    return Key(bytes(range(32)))
