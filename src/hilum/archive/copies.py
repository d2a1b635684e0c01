"""Scans of a store that exist twice: told once, when all are stored, from the hashes in the index."""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from hilum.archive.judge.duplicates import exact_duplicates, near_duplicates
from hilum.archive.ledger import Entry
from hilum.archive.policy import Policy
from hilum.archive.reasons import flag
from hilum.archive.store.index import Rows
from hilum.errors import UsageError

FEWEST_SLICES = 5  # 64 bits of a single slice agree too often: 1,104 flags on the 4,069 scans at hand, 3 on volumes
MOST_FLAGS = 5  # of copies, that one row of the ledger names


@dataclass(frozen=True)
class Copies:
    """What is known of scans that are not alone.

    of     key of a scan → key of the first (by key) with the same voxels
    flags  cautions for the ledger, by key
    drop   keys that the policy leaves out of the store
    """

    of: dict[str, str]
    flags: dict[str, tuple[str, ...]]
    drop: frozenset[str]

    def note(self, entry: Entry) -> Entry:
        """The entry of a stored scan, with what is known of its copies."""
        if entry.key in self.drop:
            return replace(entry, reason="duplicate", detail=f"same voxels as {self.of[entry.key]}")
        return replace(entry, flags=(*entry.flags, *self.flags.get(entry.key, ())))


def find_copies(rows: Rows, policy: Policy) -> Copies:
    """Scans with the same voxels, and scans of different patients that look alike.

    Looks alone never drop a scan: among a million scans, 64 bits agree by chance.
    """
    keys, patients, pixels = (rows.table[name].to_pylist() for name in ("key", "patient", "pixel_hash"))
    of = {key: group[0] for group in exact_duplicates(keys, pixels) for key in group[1:]}
    flags: dict[str, list[str]] = defaultdict(list)
    for key, first in of.items():
        flags[key].append(flag("duplicate", f"same voxels as {first}"))
    num_slices = [shape[0] for shape in rows.table["shape"].to_pylist()]
    alike = [n for n, key in enumerate(keys) if key not in of and num_slices[n] >= FEWEST_SLICES]
    try:
        near = near_duplicates(
            [keys[n] for n in alike],
            [patients[n] for n in alike],
            np.array(rows.table["look_hash"].to_numpy(), np.uint64)[alike],
        ).across_patients
    except UsageError:  # so many look alike that the hash says nothing about these scans
        near = ()
    for pair in near:
        flags[pair.second].append(flag("looks_like", f"{pair.first} ({pair.distance} of 64 bits differ)"))
    drop = frozenset(of) if policy.drop_duplicates else frozenset()
    return Copies(of, {key: tuple(found[:MOST_FLAGS]) for key, found in flags.items()}, drop)
