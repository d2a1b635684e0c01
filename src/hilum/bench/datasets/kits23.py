"""KiTS23: kidney tumours in CT, with a table of what they were."""

import json
from pathlib import Path

from hilum.bench.datasets.collect import Collector
from hilum.bench.datasets.grids import measure, on_grid
from hilum.bench.task import Case, Region, Source

TUMOUR = 2


def read_kits23(into: Collector) -> None:
    """Malignancy of the tumour (O1), by the field `malignant` of the case."""
    root = into.folder / "dataset" if (into.folder / "dataset").is_dir() else into.folder
    table = into.need(root / "kits23.json", "the table of cases")
    try:
        rows = json.loads(table.read_text(encoding="utf-8"))
        malignant = {str(row["case_id"]): row["malignant"] for row in rows}
    except (ValueError, LookupError, TypeError) as error:
        raise into.stop(
            table, f"no table ({type(error).__name__})", "a list of cases with case_id, malignant"
        ) from None
    masks: dict[Path, bool] = {}
    for name, value in sorted(malignant.items()):
        folder = root / name
        if not isinstance(value, bool):
            into.miss(table, f"malignant is {value!r} for {name}", "true or false")
        elif into.exists(folder / "imaging.nii.gz", "the scan") and into.exists(
            folder / "segmentation.nii.gz", "its label map"
        ):
            masks[folder / "segmentation.nii.gz"] = value
    for mask, _, found in measure(into, [(mask, (TUMOUR,)) for mask in masks]):
        scan = mask.parent / "imaging.nii.gz"
        if not found.volume:
            into.miss(mask, "no tumour (label 2)", "at least one voxel")
        elif on_grid(into, scan, [(mask, found.shape)]):
            into.cases.append(
                Case(
                    id=mask.parent.name,
                    patient=mask.parent.name,
                    scan=Source(path=scan),
                    modality="CT",
                    target=(int(masks[mask]),),
                    slices=(found.largest,) if into.task.suite.endswith("2d") else None,
                    region=Region(source=Source(path=mask), values=(TUMOUR,)),
                )
            )
