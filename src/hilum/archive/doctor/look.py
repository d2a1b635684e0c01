"""One scan, read and described: a record of everything known, and a few slices; also when it is refused.

What comes out is small and carries keys, numbers and reason codes, no name and no path.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.archive.dicom.header import Header
from hilum.archive.dicom.slices import read_headers
from hilum.archive.doctor.display import PLANE_NAMES, middle_planes, oblique_deg, orientation_words, slice_panels
from hilum.archive.files import nifti
from hilum.archive.intake import judge, note_identifiers, read_entry, refuse
from hilum.archive.ledger import LEDGER_SCHEMA, Entry
from hilum.archive.reasons import FLAGS, REASONS
from hilum.archive.store.store import Store
from hilum.errors import ScanRefused
from hilum.figures import Panel, window
from hilum.volume import Volume

MONTAGE = 24
_SAMPLE = 4_000_000  # voxels that percentiles and histogram look at
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_HU_RANGE = (-1100.0, 2000.0)
_HARMLESS = {"duplicate_instance", "too_few_slices"}  # set aside by design, but ordinary slices


@dataclass(frozen=True)
class Look:
    """One scan, looked at.

    record   what `inspect` returns for it
    planes   axial, coronal and sagittal, or what can be shown; () when nothing can
    slices   evenly spaced slices as they were acquired
    limits   grey values of black and white; None without pictures
    steps    distances between neighbouring slices of a refused stack, in mm, where headers give them
    """

    record: dict[str, Any]
    planes: tuple[Panel, ...] = ()
    slices: tuple[Panel, ...] = ()
    limits: tuple[float, float] | None = None
    steps: tuple[float, ...] = ()


def look(entry: Entry) -> Look:
    """Read one scan with all that can be shown of it. Runs in a worker."""
    if entry.used:
        try:
            vol, notes = read_entry(entry)
        except ScanRefused as refused:
            entry = refuse(entry, refused.reason, refused.detail)
        else:
            return describe(note_identifiers(judge(entry, vol, notes)[0]), vol)
    return _look_at_refused(entry)


def look_in_store(store: Store, entry: Entry) -> Look:
    """The same for one row of a store's ledger; a refused one has no voxels there."""
    return describe(entry, store.read_volume(entry.key) if entry.used else None)


def describe(entry: Entry, vol: Volume | None = None) -> Look:
    """Everything the ledger row and the voxels say.

    returns  record: the ledger's columns; sentence, fault and advice for a reason; flags with their sentences; "shape",
             "unit", "geometry" and "values" when there is a volume, else None; "remarks": what a reader should know
    """
    record: dict[str, Any] = {name: getattr(entry, name) for name in LEDGER_SCHEMA.names}
    record["repairs"] = list(entry.repairs)
    record["flags"] = [
        {"code": code, "numbers": numbers.strip(), "sentence": FLAGS[code]}
        for code, _, numbers in (f.partition(":") for f in entry.flags)
    ]
    record["spacing_mm"] = list(entry.spacing_mm) if entry.spacing_mm else None
    reason = REASONS.get(entry.reason)
    record["sentence"] = reason.sentence if reason else ""
    record["fault"] = bool(reason and reason.fault)
    record["advice"] = REASONS[entry.reason].advice if entry.reason else ""
    record |= {"shape": None, "unit": "", "geometry": None, "values": None, "remarks": []}
    if vol is None:
        return Look(record)
    sample = _sample(vol.voxels)
    limits = window(sample, vol.unit)
    record["shape"], record["unit"] = list(vol.shape), vol.unit
    record["geometry"] = geometry(vol) if vol.affine is not None else None
    record["values"] = _values(vol, sample)
    record["remarks"] = _remarks(record)
    return Look(record, tuple(middle_planes(vol)), tuple(slice_panels(vol, MONTAGE)), limits)


def geometry(vol: Volume) -> dict[str, Any]:
    """Spacing, directions and size of a volume as its reader turned it; angles in degrees, lengths in mm."""
    assert vol.affine is not None
    return {
        "spacing_mm": [round(s, 6) for s in vol.spacing_mm],
        "orientation": vol.orientation,
        "orientation_words": orientation_words(vol.orientation),
        "plane": PLANE_NAMES[vol.orientation[0]],
        "oblique_deg": round(oblique_deg(vol.affine), 2),
        "shear_deg": round(vol.shear_deg, 3),
        "field_of_view_mm": [round(n * s, 2) for n, s in zip(vol.shape, vol.spacing_mm)],
        "affine": np.round(vol.affine, 6).tolist(),
    }


def _sample(voxels: NDArray[Any]) -> NDArray[Any]:
    """At most about _SAMPLE voxels, evenly taken from all slices."""
    stride = int(np.ceil((voxels.size / _SAMPLE) ** 0.5))
    return voxels[:, ::stride, ::stride].ravel()


def _values(vol: Volume, sample: NDArray[Any]) -> dict[str, Any]:
    low, high = float(vol.voxels.min()), float(vol.voxels.max())
    left, right = (max(low, _HU_RANGE[0]), min(high, _HU_RANGE[1])) if vol.unit == "HU" else (low, high)
    if vol.unit != "HU":
        right = max(float(np.percentile(sample, 99.9)), left + 1e-6)  # a few bright voxels would hide the rest
    bins = 128
    if np.issubdtype(vol.voxels.dtype, np.integer):  # every bin takes the same number of whole values
        width = max(1, int(np.ceil((right - left + 1) / bins)))
        edges = left - 0.5 + width * np.arange(int(np.ceil((right - left + 1) / width)) + 1)
    else:
        edges = np.linspace(left, right, bins + 1)
    counts, _ = np.histogram(sample, edges)
    return {
        "min": low,
        "max": high,
        "mean": round(float(sample.mean(dtype=np.float64)), 4),
        "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, np.percentile(sample, PERCENTILES))},
        "dtype": str(vol.voxels.dtype),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist(), "num_voxels": int(sample.size)},
    }


def _remarks(record: dict[str, Any]) -> list[str]:
    """What is not wrong but should be known, as sentences."""
    found = record["geometry"]
    if found is None:
        return ["No geometry: millimetres, left and right are unknown. Pixels are drawn square, without letters."]
    dz, dy, dx = found["spacing_mm"]
    remarks = []
    if found["shear_deg"] > 0.5:
        remarks.append(
            f"Sheared by {found['shear_deg']:.1f}° (gantry tilt): the axes are not at right angles. Pictures are drawn "
            "along the array axes, so they show the anatomy leaning by that angle."
        )
    if found["oblique_deg"] > 1:
        remarks.append(
            f"Oblique: the axes lie {found['oblique_deg']:.1f}° off the patient's; pictures follow the axes."
        )
    if max(dz, dy, dx) > 3 * min(dz, dy, dx):
        remarks.append(
            f"Anisotropic: voxels are {max(dz, dy, dx) / min(dz, dy, dx):.1f} times as long as wide. Planes across the "
            "slices look coarse, because they are."
        )
    if record["shape"][0] == 1:
        remarks.append("One slice: there is no volume to cut through.")
    return remarks


def _look_at_refused(entry: Entry) -> Look:
    """What can be shown of a scan that is refused: single slices that its reader accepts, and their distances.

    What was set aside by its kind (a screenshot, a report) is never drawn: such pictures carry names.
    """
    shown = describe(entry)
    if entry.reason == "label_map" and entry.reader == "nifti":
        return _label_map(entry, shown)
    drawable = REASONS[entry.reason].fault or entry.reason in _HARMLESS
    if not drawable or entry.reader != "dicom" or entry.modality not in ("CT", "MR"):
        return shown
    order, steps = _order(entry)
    number = min(MONTAGE, len(order))
    chosen = [order[int((n + 0.5) * len(order) / number)] for n in range(number)]
    panels, pooled, unit = [], [], ""
    for at in chosen:
        alone = replace(
            entry, reason="", detail="", paths=(entry.paths[at],), frames=entry.frames[at : at + 1], num_slices=1
        )
        try:
            vol, _ = read_entry(alone)
        except ScanRefused:
            continue  # this slice cannot be shown; the verdict of the scan stands above
        panels.append(replace(slice_panels(vol, 1)[0], title=str(order.index(at) + 1)))
        pooled.append(_sample(vol.voxels))
        unit = vol.unit
    if steps:
        shown.record["steps_mm"] = {
            "median": round(float(np.median(steps)), 3),
            "min": round(min(steps), 3),
            "max": round(max(steps), 3),
        }
    if not panels:
        return replace(shown, steps=steps)
    shown.record["unit"] = unit
    if len(panels) > 1:
        shown.record["remarks"].append("No volume: slices are shown one by one, in the order of their positions.")
    return replace(shown, slices=tuple(panels), limits=window(np.concatenate(pooled), unit), steps=steps)


def _label_map(entry: Entry, shown: Look) -> Look:
    try:
        labels = nifti.read_label(entry.paths[0])
    except (ScanRefused, MemoryError):
        return shown  # labels that are no whole numbers: the verdict stands, there is nothing to draw
    shown.record["shape"], shown.record["geometry"] = list(labels.shape), geometry(labels)
    return replace(
        shown,
        planes=tuple(middle_planes(labels)),
        slices=tuple(slice_panels(labels, MONTAGE)),
        limits=(0.0, max(float(labels.voxels.max()), 1.0)),
    )


def _order(entry: Entry) -> tuple[list[int], tuple[float, ...]]:
    """Slices in the order of their position along the first one's normal, and the distances between them in mm.

    Slices without a position, or seen from another direction, keep the order they have and give no distances.
    """
    as_listed = list(range(len(entry.paths)))
    try:
        headers = {path: _headers(path) for path in dict.fromkeys(entry.paths)}
    except OSError:
        return as_listed, ()
    found = [headers[path][frame] for path, frame in zip(entry.paths, entry.frames or [0] * len(entry.paths))]
    if any(len(h.position) != 3 or len(h.orientation) != 6 for h in found):
        return as_listed, ()
    normals = np.array([np.cross(h.orientation[:3], h.orientation[3:]) for h in found])
    normal = normals[0] * np.sign(normals[0][np.argmax(np.abs(normals[0]))])
    if np.abs(np.abs(normals @ normal) - 1).max() > 1e-3:
        return as_listed, ()
    places = np.array([h.position for h in found]) @ normal
    order = np.argsort(places, kind="stable")
    return order.tolist(), tuple(np.diff(places[order]).tolist())


def _headers(path: Path) -> list[Header]:
    """The headers of all slices in one file."""
    with open(path, "rb") as handle:
        return read_headers(handle, path)
