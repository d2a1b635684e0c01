"""KneeMRI: volumes as pickled arrays, with a box around the ligament."""

from hilum.bench.datasets.collect import Collector, number_of, read_rows
from hilum.bench.datasets.pickles import read_array
from hilum.bench.task import Case, Region, Source
from hilum.errors import ScanRefused

_BOX = ["roiX", "roiY", "roiZ", "roiHeight", "roiWidth", "roiDepth"]


def read_kneemri(into: Collector) -> None:
    """Tear of the anterior cruciate ligament (M4). Every volume is read once, for its shape."""
    table = into.folder / "metadata.csv"
    rows = list(read_rows(into, table, ["examId", "seriesNo", "aclDiagnosis", *_BOX, "volumeFilename"]))
    places = {path.name: path for path in sorted(into.folder.glob("vol*/*.pck"))}
    for number, row in enumerate(rows, 1):
        into.progress(number, len(rows), "reading volumes")
        name, box = row["volumeFilename"], [number_of(row[c]) for c in _BOX]
        x, y, z, height, width, depth = (int(v) if v is not None else -1 for v in box)
        if row["aclDiagnosis"] not in ("0", "1", "2") or min(x, y, z) < 0 or min(height, width, depth) < 1:
            into.miss(table, f"row {number} is malformed", "aclDiagnosis 0 to 2 and a box of six whole numbers")
        elif name not in places:
            into.miss(into.folder / "vol*" / name, "missing", "the volume of a row")
        else:
            try:
                shape = read_array(places[name]).shape
            except ScanRefused as refused:
                into.miss(places[name], str(refused), "a pickled array (slices, rows, columns)")
                continue
            last = z + depth - 1, y + height - 1, x + width - 1
            if len(shape) != 3 or any(v >= n for v, n in zip(last, shape)):
                into.miss(places[name], f"an array {shape} and a box to {last}", "a box within (slices, rows, columns)")
                continue
            into.cases.append(
                Case(
                    id=f"{row['examId']}/{row['seriesNo']}",
                    patient=row["examId"],
                    scan=Source(path=places[name], form="pickle"),
                    modality="MR",
                    target=(int(row["aclDiagnosis"]),),
                    region=Region(box=((z, y, x), last)),
                )
            )
