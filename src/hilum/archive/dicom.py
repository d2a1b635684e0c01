"""DICOM series: files → volumes, right or refused.

Files are grouped by SeriesInstanceUID, never by folder or name. A series is split only when it must be (several matrix
sizes, or several slices at one position), by an attribute that is recorded. Order and spacing come from
ImagePositionPatient along the slice normal alone; SliceThickness and SpacingBetweenSlices are never trusted for them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.archive.dicom_file import SPLIT_KEYWORDS, Header, read_slice
from hilum.archive.ledger import Entry, vendor_family
from hilum.archive.privacy import Key
from hilum.errors import ScanRefused
from hilum.volume import FloatArray, Volume, to_slices

SAME_DIRECTION = 1e-3  # largest difference of two direction cosines that count as equal
_WIDER = [np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.float32)]  # each holds the values of those before
SMALLEST_MM = 0.01  # positions nearer than this are one position; spacings below it are no spacings


@dataclass(frozen=True)
class Stack:
    """Slices in order, as one box.

    order    index of the input header for each slice
    affine   4×4, (k, j, i, 1) → LPS mm; k runs through the slices towards Left, Posterior or Superior
    step_mm  distance of neighbouring slice planes
    """

    order: tuple[int, ...]
    affine: FloatArray
    step_mm: float


def stack(headers: Sequence[Header]) -> Stack:
    """Find the box that slices make up. Raises ScanRefused when they make up none.

    Gantry tilt moves each slice within its plane by a constant amount: the affine is then sheared, which is legal. One
    slice alone takes its extent from SliceThickness, the only place where that attribute is used.
    """
    row, column = _directions(headers)
    spacing = headers[0].pixel_spacing
    if len(spacing) != 2 or min(spacing) < SMALLEST_MM:
        raise ScanRefused("no_geometry", "PixelSpacing missing or not above 0")
    normal = np.cross(row, column)
    normal *= np.sign(normal[np.argmax(np.abs(normal))])
    positions = np.array([h.position for h in headers])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    if len(headers) == 1:
        if headers[0].thickness < SMALLEST_MM:
            raise ScanRefused("no_geometry", "one slice without SliceThickness: its extent is unknown")
        axis = normal * headers[0].thickness
    else:
        axis = _slice_axis(positions[order], along[order], normal)
    affine = np.eye(4)
    # PS3.3 C.7.6.2.1.1: PixelSpacing[1] is the distance between columns, walked along the row direction.
    affine[:3, :3] = np.stack([axis, column * spacing[0], row * spacing[1]], 1)
    affine[:3, 3] = positions[order[0]]
    return Stack(tuple(order.tolist()), affine, float(abs(axis @ normal)))


def _directions(headers: Sequence[Header]) -> tuple[FloatArray, FloatArray]:
    """The common row and column direction, of unit length."""
    if any(len(h.orientation) != 6 or len(h.position) != 3 for h in headers):
        raise ScanRefused("no_geometry", "ImagePositionPatient or ImageOrientationPatient missing or not numeric")
    orientations = np.array([h.orientation for h in headers])
    if np.abs(orientations - orientations[0]).max() > SAME_DIRECTION:
        count = len(np.unique(np.round(orientations, 2) + 0.0, axis=0))
        raise ScanRefused("mixed_orientations", f"{count} orientations in {len(headers)} slices")
    row, column = orientations[0].reshape(2, 3)
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    if max(abs(length - 1) for length in lengths) > SAME_DIRECTION:
        raise ScanRefused("bad_orientation", f"direction vectors of length {lengths[0]:.4f} and {lengths[1]:.4f}")
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > SAME_DIRECTION:
        raise ScanRefused("bad_orientation", f"{np.degrees(np.arccos(row @ column)):.2f}° between rows and columns")
    return row, column


def _slice_axis(positions: FloatArray, along: FloatArray, normal: FloatArray) -> FloatArray:
    """The vector from one slice to the next, from ordered positions (N, 3) and their distance along the normal."""
    steps = np.diff(along)
    step = float(np.median(steps))
    tolerance = max(0.01 * step, 0.05)
    if steps.min() < SMALLEST_MM:
        n = int((steps < SMALLEST_MM).sum())
        raise ScanRefused("duplicate_positions", f"{n} of {len(positions)} slices share a position with another")
    odd = np.flatnonzero(np.abs(steps - step) > tolerance)
    if odd.size:
        more = f" ({odd.size} such steps)" if odd.size > 1 else ""
        raise ScanRefused(
            "irregular_spacing",
            f"gap of {round(steps[odd[0]], 2)} mm after slice {odd[0] + 1}, expected {round(step, 2)} mm{more}",
        )
    axis: FloatArray = (positions[-1] - positions[0]) / (len(positions) - 1)
    residual = positions - positions[0] - np.arange(len(positions))[:, None] * axis
    off_step = np.abs(residual @ normal)
    if off_step.max() > max(0.1 * step, 0.1):  # steps that are all within tolerance may still add up
        raise ScanRefused(
            "irregular_spacing", f"positions stray {off_step.max():.2f} mm from even steps of {step:.3g} mm"
        )
    off_line = np.linalg.norm(residual - np.outer(residual @ normal, normal), axis=1)
    if off_line.max() > tolerance:
        raise ScanRefused("positions_not_on_a_line", f"slice {off_line.argmax() + 1} is {off_line.max():.2f} mm off")
    return axis


def read(paths: Sequence[Path]) -> tuple[Volume, tuple[str, ...]]:
    """Read the files of one volume, in any order. Raises ScanRefused.

    returns  a volume as `hilum.volume.to_slices` leaves it (CT in HU, MR as stored or rescaled per slice); the repairs
             that the pixels needed

    Voxels are int16 when every slice has slope 1 and whole values that fit (CT nearly always), else float32.
    """
    headers: list[Header] = []
    voxels: NDArray[Any] | None = None
    notes: set[str] = set()
    for n, path in enumerate(paths):
        header, pixels, note = read_slice(path)
        if headers and (header.rows, header.columns, header.modality) != (
            headers[0].rows, headers[0].columns, headers[0].modality
        ):  # fmt: skip
            raise ScanRefused("no_geometry", "slices of several sizes or modalities")
        headers.append(header)
        notes |= {note} if note else set()
        plane = _rescale(pixels, header)
        if voxels is None:
            voxels = np.empty((len(paths), *plane.shape), plane.dtype)
        elif _WIDER.index(plane.dtype) > _WIDER.index(voxels.dtype):
            voxels = voxels.astype(plane.dtype)
        voxels[n] = plane
    if voxels is None:
        raise ScanRefused("no_geometry", "no files")
    found = stack(headers)
    if found.order != tuple(range(len(headers))):
        voxels = voxels[list(found.order)]
    low, high = voxels.min(), voxels.max()
    if low == high:
        raise ScanRefused("constant", f"all voxels {float(low):g}")
    if voxels.dtype == np.int32:
        voxels = voxels.astype(np.int16 if low >= -32768 and high <= 32767 else np.float32)
    modality = headers[0].modality
    vol = Volume(voxels=voxels, affine=found.affine, modality=modality, unit="HU" if modality == "CT" else "")
    return to_slices(vol, through=0), tuple(sorted(notes))


def _rescale(pixels: NDArray[Any], header: Header) -> NDArray[Any]:
    """Stored pixels → values, by the slope and intercept of this slice; int16, int32 or float32."""
    slope = 1.0 if header.slope is None else header.slope
    intercept = header.intercept or 0.0
    if slope != 1.0 or intercept != round(intercept) or abs(intercept) > 1 << 30 or pixels.dtype.itemsize > 2:
        return (pixels * slope + intercept).astype(np.float32)
    shift = int(intercept)
    fits = int(pixels.min()) + shift >= -32768 and int(pixels.max()) + shift <= 32767
    return (pixels.astype(np.int32) + shift).astype(np.int16 if fits else np.int32)


def entries(headers: Iterable[Header], root: Path, key: Key) -> list[Entry]:
    """Sort the DICOM files of an archive into ledger rows: each file in exactly one.

    headers  of every DICOM file, in any order
    root     of the archive; paths break ties, so the result does not depend on the order of `headers`
    """
    series: dict[str, list[Header]] = defaultdict(list)
    for header in sorted(headers, key=lambda h: h.path):
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
    seen: set[str] = set()
    for header in headers:
        if header.refusal:
            aside[header.refusal].append(header)
        elif header.instance_uid and header.instance_uid in seen:
            aside["duplicate_instance"].append(header)
        else:
            seen.add(header.instance_uid)
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
        _directions(headers)
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
    geometry = Volume(voxels=np.zeros((1, 1, 1)), affine=box.affine, modality="OT") if box else None
    repairs = sorted({r for h in files for r in h.repairs} | ({"no SeriesInstanceUID: grouped by folder"} - {""}
                     if kind == "item" and not reason else set()))  # fmt: skip
    return Entry(
        key=key.hash("item" if kind == "item" else "series", name + ("|" + suffix if suffix else "")),
        patient=key.hash("patient", first.patient_id),
        study=key.hash("study", first.study_uid),
        reader="dicom",
        modality=first.modality,
        verdict="refused" if reason else "used",
        reason=reason,
        detail=detail if box is None else _remark(box, first),
        repairs=tuple(repairs),
        num_files=len(files),
        num_slices=len(files) if first.modality in ("CT", "MR") else 0,
        rows=first.rows,
        columns=first.columns,
        spacing_mm=geometry.spacing_mm if geometry else None,
        orientation=geometry.orientation if geometry else "",
        shear_deg=round(geometry.shear_deg, 3) if geometry else 0.0,
        manufacturer=vendor_family(first.manufacturer),
        transfer_syntax=first.transfer_syntax if len({h.transfer_syntax for h in files}) == 1 else "several",
        split_by=split_by,
        paths=tuple(files[i].path for i in box.order) if box else tuple(h.path for h in files),
    )


def _remark(box: Stack, header: Header) -> str:
    """Where the spacing attributes disagree with the positions, which are what counts."""
    if len(box.order) > 1 and header.thickness > 0 and box.step_mm > 2 * header.thickness:
        return f"slices {header.thickness:.3g} mm thick every {box.step_mm:.3g} mm"
    if len(box.order) > 1 and header.spacing_tag > 0 and abs(header.spacing_tag - box.step_mm) > 0.05 * box.step_mm:
        return f"SpacingBetweenSlices says {header.spacing_tag:.3g} mm, positions say {box.step_mm:.3g} mm"
    return ""
