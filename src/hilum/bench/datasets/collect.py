"""What a reader of a publisher's folder gathers: cases, problems, and the rows of its tables."""

import csv
import hashlib
import math
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from hilum.bench.task import Case, Found, Problem, Task
from hilum.terminal import Progress

_MAX_SHEET = 1 << 30  # bytes of an unpacked sheet; Merlin's 25,494 reports have 60 MB
_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


class Unusable(Exception):
    """Nothing of a folder can be used; carries the problem that says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.found)
        self.problem = problem


def no_progress(done: int, total: int | None, what: str) -> None:
    """A `Progress` that is not shown."""


@dataclass
class Collector:
    """Cases and problems of one task in one folder, while it is read.

    cache  a folder of the user's own that keeps what was learnt from label maps; None: nothing is kept
    """

    task: Task
    folder: Path
    progress: Progress = no_progress
    cache: Path | None = None
    cases: list[Case] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """A path as problems name it: below the folder of the data set."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.as_posix()

    def miss(self, path: Path, found: str, expected: str, cases: int = 1) -> None:
        """Note what did not become a case; `cases` is 0 for what costs none."""
        self.problems.append(Problem(path=self.name(path), found=found, expected=expected, cases=cases))

    def stop(self, path: Path, found: str, expected: str) -> Unusable:
        """The error to raise when nothing can be used."""
        return Unusable(Problem(path=self.name(path), found=found, expected=expected, fatal=True))

    def exists(self, path: Path, what: str, cases: int = 1) -> bool:
        """Whether a file or folder is there; a problem else."""
        if path.exists():
            return True
        self.miss(path, "missing", what, cases)
        return False

    def need(self, path: Path, what: str) -> Path:
        """A path without which nothing can be read."""
        if not path.exists():
            raise self.stop(path, "missing", what)
        return path

    def number(self, label: str) -> int:
        return self.task.classes.index(label)

    def found(self) -> Found:
        """Everything gathered, in order of the cases' ids; a fatal problem when there is no case. Doubled ids are problems."""
        ordered, seen = [], set()
        for case in sorted(self.cases, key=lambda case: case.id):
            if case.id in seen:
                self.miss(case.scan.path, f"{case.id} again", "each case once")
            else:
                ordered.append(case)
            seen.add(case.id)
        if not ordered and not any(p.fatal for p in self.problems):
            self.problems.append(
                Problem(path=".", found="no case of this task", expected="the layout of the data set", fatal=True)
            )
        return Found(cases=tuple(ordered), problems=tuple(self.problems))


def number_of(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def in_hashed_order(names: Sequence[str]) -> list[str]:
    """Names in an order that is arbitrary and always the same, to draw a subset that nobody chose."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def read_rows(
    into: Collector, path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, str]]:
    """Rows of a table, with the named columns only; a cell that is not there is "".

    path      CSV (comma, semicolon or tab; UTF-8) or .xlsx
    columns   names as the publisher writes them; capitals, blanks and underscores do not matter

    Raises Unusable when the file is missing, no table, or lacks a column. A row with too many or too few fields is a problem.
    """
    into.need(path, f"a table with the columns {', '.join(columns)}")
    try:
        lines = _sheet(path) if path.suffix.lower() == ".xlsx" else _lines(path)
        header = [_plain(name) for name in next(lines, [])]
        places = {name: header.index(_plain(name)) for name in (*columns, *optional) if _plain(name) in header}
        if lost := [name for name in columns if name not in places]:
            raise into.stop(path, f"no column {', '.join(lost)}", f"the columns {', '.join(columns)}")
        for number, line in enumerate(lines, 2):
            if len(line) != len(header):
                into.miss(path, f"row {number} has {len(line)} fields", f"{len(header)} fields, as the header")
            else:
                yield {name: line[places[name]].strip() if name in places else "" for name in (*columns, *optional)}
    except (OSError, ValueError, csv.Error, LookupError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise into.stop(path, f"no table that can be read ({type(error).__name__})", "CSV in UTF-8, or .xlsx") from None


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _lines(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(min(sys.maxsize, 1 << 24))  # reports are long
    with open(path, encoding="utf-8-sig", newline="") as handle:
        header = handle.readline()
        handle.seek(0)
        yield from (line for line in csv.reader(handle, delimiter=max(",;\t", key=header.count), strict=True) if line)


def _sheet(path: Path) -> Iterator[list[str]]:
    """Rows of the first sheet of an .xlsx file (ECMA-376): a zip of XML, with texts in a table of their own."""
    with zipfile.ZipFile(path) as book:
        names = sorted(name for name in book.namelist() if name.startswith("xl/worksheets/") and name.endswith(".xml"))
        for part in (names[0], *({"xl/sharedStrings.xml"} & set(book.namelist()))):
            if book.getinfo(part).file_size > _MAX_SHEET:
                raise ValueError("a sheet that large")
        texts: list[str] = []
        if "xl/sharedStrings.xml" in book.namelist():
            root = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))
            texts = ["".join(t.text or "" for t in entry.iter(f"{_SHEET}t")) for entry in root.iter(f"{_SHEET}si")]
        width = 0
        for row in ElementTree.fromstring(book.read(names[0])).iter(f"{_SHEET}row"):
            cells = {_column(cell.get("r", "")): _value(cell, texts) for cell in row.iter(f"{_SHEET}c")}
            width = width or max(cells, default=-1) + 1
            line = [cells.get(n, "") for n in range(max(width, max(cells, default=-1) + 1))]
            if any(line):
                yield line


def _column(place: str) -> int:
    """B7 is in column 1."""
    number = 0
    for letter in place.rstrip("0123456789"):
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1


def _value(cell: ElementTree.Element, texts: Sequence[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(t.text or "" for t in cell.iter(f"{_SHEET}t"))
    value = cell.findtext(f"{_SHEET}v") or ""
    return texts[int(value)] if cell.get("t") == "s" else value
