"""The plan of a `prepare`: all entries of an archive in order of key, with the paths behind them.

    .work/plan.jsonl.gz   one entry a line, paths relative to the archive
    .work/plan.json       how many; written last, so that its presence says that the plan is whole

It is made once, from a pass over all headers, and read by every run that goes on with the same store.
"""

import gzip
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hilum.archive.ledger import Entry
from hilum.archive.spill import Spill, decode, encode
from hilum.records import read_json, write_atomic, write_json

_SPILL = "spill"


@dataclass(frozen=True)
class Plan:
    """What is to be done with an archive.

    num_files  that its entries account for
    num_used   entries to be read and stored
    """

    path: Path
    archive: Path
    num_files: int
    num_used: int

    def entries(self) -> Iterator[Entry]:
        """All entries, in order of key, read from disk as they are taken."""
        with gzip.open(self.path, "rt", encoding="ascii") as lines:
            for line in lines:
                entry = decode(Entry, line)
                yield replace(entry, paths=tuple(self.archive / p for p in entry.paths))


def read_plan(work: Path, archive: Path) -> Plan | None:
    """The plan that an earlier run has made, or None."""
    if not (work / "plan.json").exists():
        return None
    return Plan(work / "plan.jsonl.gz", archive, **read_json(work / "plan.json"))


def make_plan(work: Path, archive: Path, examine: Callable[[Path], Iterable[Entry]]) -> Plan:
    """Look at all files and write the plan.

    examine  given a private folder, yields the entries in any order
    """
    drop_plan(work)  # of a run that was killed
    folder = work / _SPILL
    folder.mkdir(mode=0o700)
    num_files = num_used = 0
    with Spill(folder / "entries") as spill:
        for entry in examine(folder):
            num_files += entry.num_files
            num_used += entry.used
            spill.add(entry.key, encode(replace(entry, paths=tuple(p.relative_to(archive) for p in entry.paths))))
        plan = Plan(work / "plan.jsonl.gz", archive, num_files, num_used)
        with write_atomic(plan.path) as temporary, gzip.open(temporary, "wt", 1, encoding="ascii") as lines:
            for bucket in spill.buckets():
                lines.writelines(f"{line}\n" for _, line in bucket)
    write_json(work / "plan.json", {"num_files": num_files, "num_used": num_used})
    shutil.rmtree(folder)
    return plan


def drop_plan(work: Path) -> None:
    """Remove a plan, whole or not, and what was spilled while it was made."""
    for left in work.glob("plan.*"):
        left.unlink()
    if (work / _SPILL).exists():
        shutil.rmtree(work / _SPILL)
