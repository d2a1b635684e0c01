"""COVIDx CT: slices as 8-bit PNG, with official lists. Hounsfield units are lost, and so is the window."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from hilum.bench.datasets.collect import Collector, in_hashed_order, read_rows
from hilum.bench.task import Case, Source, Split

_LARGEST: dict[Split, int] = {"train": 2000, "val": 1000, "test": 1000}  # slices of a class


def read_covidx(into: Collector) -> None:
    """Pulmonary infection (I): a draw of slices from each official list and class."""
    version = next((v for v in ("2A", "3A") if (into.folder / f"train_COVIDx_CT-{v}.txt").exists()), "2A")
    images = into.need(into.folder / f"{version}_images", "the folder of slices")
    patients = _patients(into)
    owner: dict[str, Split] = {}
    for split, largest in _LARGEST.items():
        names: dict[str, list[str]] = defaultdict(list)
        for name, label in _list(into, into.folder / f"{split}_COVIDx_CT-{version}.txt"):
            names[label].append(name)
        kept: Counter[str] = Counter()
        for label, found in sorted(names.items()):
            for name in in_hashed_order(found):
                if kept[label] == largest:
                    break
                patient = patient_of(name, patients)
                if owner.setdefault(patient, split) != split:
                    into.miss(images / name, f"patient {patient} is also in {owner[patient]}", "one part for a patient")
                elif into.exists(images / name, "a slice of an official list"):
                    kept[label] += 1
                    scan = Source(path=images / name)
                    into.cases.append(
                        Case(id=name, patient=patient, scan=scan, modality="OT", target=(int(label),), split=split)
                    )


def _list(into: Collector, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(into.need(path, "an official list").read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) == 6 and words[1] in ("0", "1", "2"):
            yield words[0], words[1]
        elif words:
            into.miss(path, f"line {number} is malformed", "file class xmin ymin xmax ymax")


def _patients(into: Collector) -> frozenset[str]:
    table = into.folder / "metadata.csv"
    if not table.exists():
        return frozenset()
    return frozenset(row["patient id"] for row in read_rows(into, table, ["patient id"]))


def patient_of(name: str, known: frozenset[str]) -> str:
    """The longest beginning of a file name, in whole words, that metadata.csv lists; else all but the slice number, and but
    the scan number of the names NCP_, CP_ and Normal_ (patient, scan, slice)."""
    words = name.rpartition(".")[0].replace("-", "_").split("_")
    plain = {k.replace("-", "_"): k for k in known}
    for count in range(len(words), 0, -1):
        if (start := "_".join(words[:count])) in plain:
            return plain[start]
    return "_".join(words[:2] if words[0] in ("NCP", "CP", "Normal") else words[:-1]) or name
