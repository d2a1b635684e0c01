"""DICOM series: slices → volumes, right or refused, as ledger rows.

Files are grouped by SeriesInstanceUID, never by folder or name. A series is split only when it must be: several matrix
sizes, several orientations, or several slices at one position; the attribute that tells the parts apart is recorded.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from hilum.archive.dicom.apart import tell_apart
from hilum.archive.dicom.geometry import Stack, by_orientation, by_size, directions, stack
from hilum.archive.dicom.header import Header
from hilum.archive.ledger import Entry, vendor_family
from hilum.archive.policy import AS_IS, Policy
from hilum.archive.privacy import Key
from hilum.archive.reasons import flag
from hilum.errors import ScanRefused
from hilum.volume import FloatArray, Volume

NEARLY_PARALLEL = 0.996  # cosine of 5°
_NO_PLACE = "ImagePositionPatient or ImageOrientationPatient missing or not numeric"
LOCALIZER_SLICES = 15  # a series of three planes at right angles with at most so many slices each is a localizer


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Slices of one series that stand or fall together.

    reason, detail   why they are refused; "" when they may be a volume
    split_by, value  attributes that tell them from the rest of the series, and their values; "" for a whole series
    """

    slices: list[Header]
    reason: str = ""
    detail: str = ""
    split_by: str = ""
    value: str = ""
    flags: tuple[str, ...] = ()

    def split(self, keyword: str, value: str, slices: list[Header]) -> "_Part":
        """A part of this part."""
        return replace(
            self,
            slices=slices,
            split_by=",".join(k for k in (self.split_by, keyword) if k),
            value=",".join(v for v in (self.value, value) if v),
        )


def series_name(header: Header, root: Path, *, usable: bool) -> str:
    """What files of one series share: SeriesInstanceUID.

    usable  whether anything in the file may be part of a volume

    Without that identifier, what lies in one folder belongs together, and what is refused stands alone ("item:…").
    """
    if header.series_uid:
        return header.series_uid
    where = PurePosixPath((header.path.parent if usable else header.path).relative_to(root)).as_posix()
    return f"item:{where}|{header.study_uid}|{header.patient_id}" if usable else f"item:{where}"


def entries(headers: Iterable[Header], root: Path, key: Key, policy: Policy = AS_IS) -> list[Entry]:
    """Sort the DICOM files of an archive into ledger rows: each file is counted in exactly one.

    headers  of every DICOM file, in any order
    root     of the archive; paths break ties, so the result does not depend on the order of `headers`
    """
    series: dict[str, list[Header]] = defaultdict(list)
    ordered = sorted(headers, key=lambda h: (h.path, h.frame))
    usable = {h.path for h in ordered if not h.refusal}
    for header in ordered:
        series[series_name(header, root, usable=header.path in usable)].append(header)
    rows: list[Entry] = []
    for name in sorted(series):
        counted: set[Path] = set()  # frames of one file may go to several volumes
        for part in _parts(series[name]):
            entry = _entry(name, key, part, policy)
            files = set(entry.paths) - counted
            counted |= files
            rows.append(replace(entry, num_files=len(files)))
    return rows


def _parts(headers: list[Header]) -> list[_Part]:
    """What was set aside in one series, by reason, and its volumes."""
    usable: list[Header] = []
    aside: dict[str, list[Header]] = defaultdict(list)
    instances: dict[tuple[str, int], Header] = {}
    seen: set[tuple[object, ...]] = set()
    for header in headers:
        same = instances.setdefault((header.instance_uid, header.frame), header)
        shape = header.rows, header.columns, header.pixel_spacing, header.orientation, header.position
        content = *shape, header.number, header.frame, *sorted(header.splits.items())
        again = same is not header and header.instance_uid and same.position == header.position
        if header.refusal:
            aside[header.refusal].append(header)
        elif again or (content in seen and _is_dated(header)):  # or sent under another identifier
            aside["duplicate_instance"].append(header)
        else:
            seen.add(content)
            usable.append(header)
    parts = []
    for reason in sorted(aside):
        detail = aside[reason][0].detail if len({h.detail for h in aside[reason]}) == 1 else ""
        value = reason if len(aside[reason]) < len(headers) else ""
        parts.append(_Part(slices=aside[reason], reason=reason, detail=detail, value=value))
    return parts + (_volumes(usable) if usable else [])


def _is_dated(header: Header) -> bool:
    """Whether place, number and time of a slice say which one it is, so that another one like it is a copy."""
    return bool(
        header.position and header.number and ("ContentTime" in header.splits or "AcquisitionTime" in header.splits)
    )


def _volumes(headers: list[Header]) -> list[_Part]:
    """Split the plain slices of one series into volumes."""
    lost = [h for h in headers if len(h.position) != 3 or len(h.orientation) != 6]
    if lost and len(lost) < len(headers):  # a stray image does not take the others with it
        placed = [h for h in headers if len(h.position) == 3 and len(h.orientation) == 6]
        return [_Part(slices=lost, reason="no_geometry", detail=_NO_PLACE, value="no position"), *_volumes(placed)]
    whole = _Part(slices=headers)
    if len({(h.patient_id, h.study_uid) for h in headers}) > 1:
        return [replace(whole, reason="mixed_patients")]
    try:
        sizes = _split(whole, "Rows,Columns,PixelSpacing,FrameOfReferenceUID", by_size)
    except ScanRefused as refused:
        return [replace(whole, reason=refused.reason, detail=refused.detail)]
    volumes: list[_Part] = []
    for size in sizes:
        try:
            orientations = _split(size, "ImageOrientationPatient", _by_orientation)
            reason, detail = _not_stacks(orientations)
        except ScanRefused as refused:
            orientations, reason, detail = [size], refused.reason, refused.detail
        if reason:
            volumes.append(replace(size, reason=reason, detail=detail))
            continue
        for part in orientations:
            volumes += _by_position(part)
    return volumes


def _split(part: _Part, keyword: str, group: Callable[[list[Header]], dict[str, list[Header]]]) -> list[_Part]:
    groups = group(part.slices)
    if len(groups) == 1:
        return [part]
    return [part.split(keyword, value, slices) for value, slices in sorted(groups.items())]


def _by_orientation(headers: list[Header]) -> dict[str, list[Header]]:
    return {str(orientation): slices for orientation, slices in by_orientation(headers).items()}


def _not_stacks(parts: Sequence[_Part]) -> tuple[str, str]:
    """Why slices of several orientations are no stacks: (reason, detail), or ("", "")."""
    if len(parts) == 1:
        return "", ""
    largest = max(len(p.slices) for p in parts)
    if largest == 1:
        return "mixed_orientations", f"{len(parts)} orientations in {len(parts)} slices"
    normals = np.array([np.cross(*directions(p.slices)) for p in parts])
    upright = np.abs(normals @ normals.T)[np.triu_indices(len(parts), 1)].max() < 0.5  # more than 60° apart
    for n, one in enumerate(parts):
        for m, other in enumerate(parts[:n]):
            if abs(normals[n] @ normals[m]) > NEARLY_PARALLEL and _interleave(one.slices, other.slices, normals[n]):
                return "mixed_orientations", f"{len(parts)} nearly equal orientations in turn"
    if len(parts) == 3 and upright and largest <= LOCALIZER_SLICES:
        return "localizer", f"three planes at right angles, up to {largest} slices each"
    return "", ""


def _interleave(one: Sequence[Header], other: Sequence[Header], normal: FloatArray) -> bool:
    """Whether slices of one lie between slices of the other."""
    first, second = (np.array([h.position for h in slices]) @ normal for slices in (one, other))
    return bool(first.min() < second.max() and second.min() < first.max())


def _by_position(part: _Part) -> list[_Part]:
    """Tell apart volumes that share positions. A group with fewer slices than the largest is incomplete."""
    if any(len(h.position) != 3 for h in part.slices):
        return [part]  # its geometry will be refused
    found = tell_apart(part.slices)
    if found is None:
        return [part]
    if not found.groups:
        return [replace(part, reason="duplicate_positions", detail=found.detail)]
    largest = max(found.groups.values(), key=len)
    full, places = len(largest), {h.position for h in largest}
    volumes = []
    for value, slices in sorted(found.groups.items()):
        volume = part.split(found.keyword, value, slices)
        if found.by_order:
            volume = replace(volume, flags=(flag("split_by_order", f"{len(found.groups)} volumes"),))
        if len(slices) < full and all(h.position in places for h in slices):  # one that reaches further is a station
            volume = replace(volume, reason="incomplete_volume", detail=f"{len(slices)} of {full} slices")
        volumes.append(volume)
    return volumes


def _entry(name: str, key: Key, part: _Part, policy: Policy) -> Entry:
    files, first, reason, detail = part.slices, part.slices[0], part.reason, part.detail
    box = None
    if not reason:
        try:
            box = stack(files, policy)
        except ScanRefused as refused:
            reason, detail = refused.reason, refused.detail
    kind, name = ("item", name.removeprefix("item:")) if name.startswith("item:") else ("series", name)
    geometry = Volume(voxels=np.zeros((1, 1, 1)), affine=box.affine, modality="OT") if box else None
    repairs = {r for h in files for r in h.repairs}
    if kind == "item" and not reason:
        repairs.add("no SeriesInstanceUID: grouped by folder")
    if box and box.at:
        repairs.add(f"uneven slices put on even steps of {box.step_mm:.3g} mm")
    order = box.order if box else range(len(files))
    frames = tuple(files[i].frame for i in order)
    patient = key.hash("patient", first.patient_id)
    return Entry(
        key=key.hash("item" if kind == "item" else "series", name + ("|" + part.value if part.value else "")),
        patient=patient,
        study=key.hash("study", first.study_uid),
        reader="dicom",
        modality=first.modality,
        reason=reason,
        detail=detail,
        repairs=tuple(sorted(repairs)),
        flags=_flags(part, box),
        num_slices=len(files) if first.modality in ("CT", "MR") else 0,
        rows=first.rows,
        columns=first.columns,
        spacing_mm=geometry.spacing_mm if geometry else None,
        orientation=geometry.orientation if geometry else "",
        shear_deg=round(geometry.shear_deg, 3) if geometry else 0.0,
        manufacturer=vendor_family(first.manufacturer),
        transfer_syntax=_common(h.transfer_syntax for h in files),
        split_by=part.split_by,
        study_day=key.study_day(first.patient_id, first.study_date),
        paths=tuple(files[i].path for i in order),
        frames=frames if any(frames) else (),
    )


def _common(values: Iterable[str]) -> str:
    found = Counter(values)
    return next(iter(found)) if len(found) == 1 else "several"


def _flags(part: _Part, box: Stack | None) -> tuple[str, ...]:
    """Cautions of the part and of its slices, one of each code; and where spacing attributes disagree with positions."""
    found = [*part.flags, *(f for h in part.slices for f in h.flags)]
    header = part.slices[0]
    if box and len(box.order) > 1:
        if 0 < header.thickness < 0.5 * box.step_mm:
            found.append(flag("gaps_between", f"slices {header.thickness:.3g} mm thick every {box.step_mm:.3g} mm"))
        if header.spacing_tag > 0 and abs(header.spacing_tag - box.step_mm) > 0.05 * box.step_mm:
            found.append(flag("spacing_tag", f"says {header.spacing_tag:.3g} mm, positions say {box.step_mm:.3g} mm"))
    return tuple({f.split(":")[0]: f for f in found}.values())
