"""A scan and a trained head → what the head says of each slice, region, or the scan."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from hilum.archive.labels import read_labels
from hilum.archive.one import read
from hilum.encode.encoder import Encoder
from hilum.encode.features import encode_volume
from hilum.encode.items import How
from hilum.encode.zoo import load_encoder
from hilum.errors import UsageError
from hilum.probe.heads.curia import read_head
from hilum.probe.predict_tokens import PLACE_COLUMNS, SEGMENT_COLUMNS, place_row, scan_tokens, segment_scan
from hilum.probe.saved import SavedHead, load_head
from hilum.records import read_json
from hilum.volume import Volume


@dataclass(frozen=True)
class Predicted:
    """What a head said.

    columns  names of the numbers: classes, or "value", or "risk"; of a place its LPS mm and voxel, of a segmentation the
             voxels and ml of a class
    rows     slice and region (None where they do not apply), predicted (a class, labels above 1/2, or a number) and `columns`
    labels   of a segmentation the class numbers on the scan's own grid; None else
    """

    task: str
    target: str
    model: str
    level: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = field(default=())
    labels: Volume | None = None


def predict(
    scan: str | Path,
    head: str | Path,
    *,
    model: str | None = None,
    mask: str | Path | None = None,
    series: str | None = None,
    device: str = "auto",
) -> Predicted:
    """Apply a saved head, or a head that Raidium released with Curia.

    scan    as `hilum.read` takes it; a folder with several series needs `series`
    head    a folder of `hilum.probe.saved.write_head`, or with Curia's config.json
    model   where the encoder is; None: as it was named when the features were made
    mask    labels on the scan's grid, for heads on regions

    ContractError when the encoder is not the head's own, or the scan breaks its contract.
    """
    folder = Path(head)
    curia = not (folder / "head.json").exists() and (folder / "config.json").exists()
    if not curia and not (folder / "head.json").exists():
        raise UsageError(
            f"'{folder}' is no head; expected a folder with head.json (hilum probe --save) or Curia's config.json"
        )
    volume = read(scan, series=series)
    labels = None if mask is None else read_labels(Path(mask), volume).volume
    if curia:
        return _predict_curia(folder, volume, labels, model, device)
    saved = load_head(folder)
    known, form = saved.record["encoder"], saved.record["features"]
    if form["level"] == "region" and labels is None:
        raise UsageError("this head judges regions; give labels on the grid of the scan with --mask")
    if form["level"] != "region" and labels is not None:
        raise UsageError(f"this head judges a {form['level']}, not regions; leave --mask out")
    options = {"seed": known["seed"], "precision": known["precision"], "device": device}
    encoder = load_encoder(model or known["loads_as"], **options)
    saved.check_encoder(encoder)
    if saved.head is not None:
        return _predict_tokens(saved, encoder, volume, labels, Path(scan))
    how = How(**(form | {"layers": tuple(form["layers"])}))
    features = encode_volume(encoder, volume, how, mask=labels, keep=None)
    number = features.slices if form["level"] != "volume" and features.slices else (None,) * len(features.vectors)
    region = features.regions or (None,) * len(features.vectors)
    columns, rows = _rows(saved, saved.predict(features.vectors), volume)
    places = [{"slice": z, "region": label} for z, label in zip(number, region)]
    return Predicted(
        saved.task,
        saved.record["target"],
        encoder.name,
        form["level"],
        columns,
        [place | row for place, row in zip(places, rows)],
        features.notes,
    )


def _predict_tokens(saved: SavedHead, encoder: Encoder, volume: Volume, mask: Volume | None, scan: Path) -> Predicted:
    """A head on patch tokens."""
    form = saved.record["features"]
    places, X, notes = scan_tokens(encoder, volume, mask, form)
    labels, columns = None, SEGMENT_COLUMNS
    if saved.task == "segmentation":
        labels, rows = segment_scan(saved, X, volume, scan)
        places = places * len(rows)
    else:
        columns, rows = _rows(saved, saved.predict(X), volume)
    rows = [place | row for place, row in zip(places, rows)]
    return Predicted(saved.task, saved.record["target"], encoder.name, form["level"], columns, rows, notes, labels)


def _rows(saved: SavedHead, outputs: Any, volume: Volume) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    if saved.task == "localisation":
        return PLACE_COLUMNS, [place_row(point, volume) for point in outputs]
    if not saved.classes:
        name = "risk" if saved.task == "survival" else "value"
        return (name,), [{"predicted": float(row[0]), name: float(row[0])} for row in outputs]
    if saved.task == "multilabel":
        said = ["; ".join(c for c, p in zip(saved.classes, row) if p >= 0.5) for row in outputs]
    else:
        said = [saved.classes[int(row.argmax())] for row in outputs]
    return saved.classes, [{"predicted": s} | dict(zip(saved.classes, row.tolist())) for s, row in zip(said, outputs)]


def _predict_curia(folder: Path, volume: Volume, mask: Volume | None, model: str | None, device: str) -> Predicted:
    """A released head carries its own encoder; its config names no classes unless it has id2label."""
    if model is not None:
        raise UsageError("a released head of Curia holds its own encoder; leave --model out")
    head = read_head(folder, device=device)
    said = head.predict(volume, mask)
    places: list[int | None] = [None] if head.settings.of_volumes else list(said.slices)
    level = "volume" if head.settings.of_volumes else "slice"
    if head.settings.regression:
        rows: list[dict[str, Any]] = [{"predicted": float(v[0]), "value": float(v[0])} for v in said.logits]
        columns: tuple[str, ...] = ("value",)
    else:
        names = read_json(folder / "config.json").get("id2label") or {}
        columns = tuple(str(names.get(str(c), f"class {c}")) for c in range(said.logits.shape[1]))
        proba = softmax(said.logits.astype(np.float64), axis=1)
        rows = [{"predicted": columns[int(p.argmax())]} | dict(zip(columns, p.tolist())) for p in proba]
    task = "regression" if head.settings.regression else "classification"
    rows = [{"slice": place, "region": None} | row for place, row in zip(places, rows)]
    return Predicted(
        task, folder.name, head.encoder.name, level, columns, rows, ("probabilities as released, not calibrated",)
    )
