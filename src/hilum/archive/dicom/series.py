"""DICOM series: files → volumes, right or refused.

Files are grouped by SeriesInstanceUID, never by folder or name. A series is split only when it must be (several matrix
sizes, or several slices at one position), by an attribute that is recorded. Order and spacing come from
ImagePositionPatient along the slice normal alone; SliceThickness and SpacingBetweenSlices are never trusted for them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from hilum.archive.dicom.geometry import SMALLEST_MM, Stack, directions, stack
from hilum.archive.dicom.header import SPLIT_KEYWORDS, Header
from hilum.archive.ledger import Entry, flag, vendor_family
from hilum.archive.privacy import Key
from hilum.errors import ScanRefused
from hilum.volume import Volume


def entries(headers: Iterable[Header], root: Path, key: Key) -> list[Entry]:
    """Sort the DICOM files of an archive into ledger rows: each file in exactly one.

    headers  of every DICOM file, in any order
    root     of the archive; paths break ties, so the result does not depend on the order of `headers`
    """
    series: dict[str, list[Header]] = defaultdict(list)
    for header in sorted(headers, key=lambda h: (h.path, h.frame)):
        name = header.series_uid
        if not name:  # no identifier: what lies in one folder belongs together, what is refused stands alone
            where = PurePosixPath((header.path if header.refusal else header.path.parent).relative_to(root)).as_posix()
            name = f"item:{where}" if header.refusal else f"item:{where}|{header.study_uid}|{header.patient_id}"
        series[name].append(header)
    rows: list[Entry] = []
    for name in sorted(series):
        rows += _series_entries(name, series[name], key)
    return rows


def _series_entries(name: str, headers: list[Header], key: Key) -> list[Entry]:
    """The rows of one series: its volumes, and what in it was set aside."""
    parts: list[tuple[str, str, str, str, list[Header]]] = []  # reason, detail, split_by, suffix of the key, files
    usable: list[Header] = []
    aside: dict[str, list[Header]] = defaultdict(list)
    seen: set[tuple[str, int]] = set()
    for header in headers:
        if header.refusal:
            aside[header.refusal].append(header)
        elif header.instance_uid and (header.instance_uid, header.frame) in seen:
            aside["duplicate_instance"].append(header)
        else:
            seen.add((header.instance_uid, header.frame))
            usable.append(header)
    for reason in sorted(aside):
        detail = aside[reason][0].detail if len({h.detail for h in aside[reason]}) == 1 else ""
        parts.append((reason, detail, "", reason if len(aside[reason]) < len(headers) else "", aside[reason]))
    if usable:
        parts += [(r, d, by, value, files) for r, d, by, value, files in _volumes(usable)]
    return [_entry(name, key, *part) for part in parts]


def _volumes(headers: list[Header]) -> list[tuple[str, str, str, str, list[Header]]]:
    """Split plain slices of one series into volumes: (reason, detail, split_by, split value, files)."""
    if len({(h.patient_id, h.study_uid) for h in headers}) > 1:
        return [("mixed_patients", "", "", "", headers)]
    try:
        directions(headers)
    except ScanRefused as refused:
        return [(refused.reason, refused.detail, "", "", headers)]
    volumes = []
    sizes = _group(headers, lambda h: f"{h.rows}x{h.columns} {h.pixel_spacing} {h.modality}")
    for size, same_size in sizes.items():
        by_size = ("Rows,Columns,PixelSpacing", size) if len(sizes) > 1 else ("", "")
        for keyword, value, files, reason, detail in _split_positions(same_size):
            split_by = ",".join(k for k in (by_size[0], keyword) if k)
            suffix = ",".join(v for v in (by_size[1], value) if v)
            volumes.append((reason, detail, split_by, suffix, files))
    return volumes


def _group(headers: Iterable[Header], value: Callable[[Header], str]) -> dict[str, list[Header]]:
    groups: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        groups[value(header)].append(header)
    return dict(sorted(groups.items()))


def _split_positions(headers: list[Header]) -> list[tuple[str, str, list[Header], str, str]]:
    """Tell apart volumes that share positions: (keyword, value, files, reason, detail) of each.

    The first attribute of SPLIT_KEYWORDS decides under which no position repeats, and which makes as many groups as the
    fullest position has slices; one with groups of equal size goes before one without. A group with fewer slices than
    the largest is refused as incomplete.
    """
    places = Counter(_place(h) for h in headers)
    copies = max(places.values())
    if copies == 1:
        return [("", "", headers, "", "")]
    best: tuple[str, dict[str, list[Header]]] | None = None
    for keyword in SPLIT_KEYWORDS:
        groups = _group(headers, lambda h, k=keyword: h.splits.get(k, ""))  # type: ignore[misc]
        unique = all(len({_place(h) for h in files}) == len(files) for files in groups.values())
        if len(groups) != copies or not unique or len(groups) == len(headers):
            continue
        if len({len(files) for files in groups.values()}) == 1:
            best = keyword, groups
            break
        best = best or (keyword, groups)
    if best is None:
        detail = f"up to {copies} slices at one of {len(places)} positions, and no attribute tells them apart"
        return [("", "", headers, "duplicate_positions", detail)]
    full = max(len(files) for files in best[1].values())
    return [
        (best[0], value, files, "incomplete_volume" if len(files) < full else "",
         f"{len(files)} of {full} slices" if len(files) < full else "")
        for value, files in best[1].items()
    ]  # fmt: skip


def _place(header: Header) -> tuple[int, ...]:
    return tuple(round(v / SMALLEST_MM) for v in header.position)


def _entry(name: str, key: Key, reason: str, detail: str, split_by: str, suffix: str, files: list[Header]) -> Entry:
    first = files[0]
    box = None
    if not reason:
        try:
            box = stack(files)
        except ScanRefused as refused:
            reason, detail = refused.reason, refused.detail
    kind, name = ("item", name.removeprefix("item:")) if name.startswith("item:") else ("series", name)
    cautions = [*(f for h in files for f in h.flags), *(_flags(box, first) if box else ())]
    ordered = [files[i] for i in box.order] if box else files
    geometry = Volume(voxels=np.zeros((1, 1, 1)), affine=box.affine, modality="OT") if box else None
    repairs = sorted({r for h in files for r in h.repairs} | ({"no SeriesInstanceUID: grouped by folder"} - {""}
                     if kind == "item" and not reason else set()))  # fmt: skip
    return Entry(
        key=key.hash("item" if kind == "item" else "series", name + ("|" + suffix if suffix else "")),
        patient=key.hash("patient", first.patient_id),
        study=key.hash("study", first.study_uid),
        reader="dicom",
        modality=first.modality,
        reason=reason,
        detail=detail,
        repairs=tuple(repairs),
        flags=tuple({f.split(":")[0]: f for f in cautions}.values()),  # one of each kind
        num_files=len({h.path for h in files}),
        num_slices=len(files) if first.modality in ("CT", "MR") else 0,
        rows=first.rows,
        columns=first.columns,
        spacing_mm=geometry.spacing_mm if geometry else None,
        orientation=geometry.orientation if geometry else "",
        shear_deg=round(geometry.shear_deg, 3) if geometry else 0.0,
        manufacturer=vendor_family(first.manufacturer),
        transfer_syntax=first.transfer_syntax if len({h.transfer_syntax for h in files}) == 1 else "several",
        split_by=split_by,
        paths=tuple(h.path for h in ordered),
        frames=tuple(h.frame for h in ordered) if any(h.frame for h in files) else (),
    )


def _flags(box: Stack, header: Header) -> tuple[str, ...]:
    """Where the spacing attributes disagree with the positions, which are what counts."""
    if len(box.order) < 2:
        return ()
    found = []
    if 0 < header.thickness < 0.5 * box.step_mm:
        found.append(flag("gaps_between", f"slices {header.thickness:.3g} mm thick every {box.step_mm:.3g} mm"))
    if header.spacing_tag > 0 and abs(header.spacing_tag - box.step_mm) > 0.05 * box.step_mm:
        found.append(flag("spacing_tag", f"says {header.spacing_tag:.3g} mm, positions say {box.step_mm:.3g} mm"))
    return tuple(found)
