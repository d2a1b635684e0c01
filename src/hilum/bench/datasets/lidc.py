"""The readers' XML of LIDC-IDRI: outlines of nodules, with malignancy from 1 (highly unlikely) to 5 (highly suspicious)."""

from collections import defaultdict
from dataclasses import dataclass
from xml.etree import ElementTree

from hilum.bench.datasets.collect import Collector


@dataclass(frozen=True)
class Rating:
    """What one reader said of one nodule: malignancy, and the centre of the outline (column and row of pixels, z in mm)."""

    malignancy: int
    column: float
    row: float
    z_mm: float


def read_ratings(into: Collector, wanted: set[str]) -> dict[str, list[Rating]]:
    """Ratings by series UID, of the wanted series. Files that cannot be parsed are problems."""
    folder = into.need(into.folder / "LIDC-XML-only", "the readers' XML of LIDC-IDRI")
    ratings: dict[str, list[Rating]] = defaultdict(list)
    for path in sorted(folder.rglob("*.xml")):
        try:
            root = ElementTree.parse(path).getroot()
            uid = _text(root, "ResponseHeader/SeriesInstanceUid")
            if uid in wanted:
                ratings[uid] += _of_readers(root)
        except (ElementTree.ParseError, ValueError, OSError) as error:
            into.miss(path, f"no XML of a reading ({type(error).__name__})", "LidcReadMessage", 0)
    return ratings


def _of_readers(root: ElementTree.Element) -> list[Rating]:
    found = []
    for nodule in root.iterfind("{*}readingSession/{*}unblindedReadNodule"):
        malignancy = _text(nodule, "characteristics/malignancy")
        points = []
        for outline in nodule.iterfind("{*}roi"):
            z = float(_text(outline, "imageZposition") or "nan")
            for edge in outline.iterfind("{*}edgeMap"):
                points.append((float(_text(edge, "xCoord")), float(_text(edge, "yCoord")), z))
        if malignancy and points:
            column, row, z_mm = (sum(values) / len(points) for values in zip(*points))
            found.append(Rating(int(malignancy), column, row, z_mm))
    return found


def _text(element: ElementTree.Element, place: str) -> str:
    return (element.findtext("/".join(f"{{*}}{part}" for part in place.split("/"))) or "").strip()
