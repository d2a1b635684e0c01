"""The doctor: what is known of one scan and whether it would be used, in the terminal and as a page.

A scan is read in a process of its own, so that a decoder that dies costs only its verdict.
"""

import contextlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from hilum import figures
from hilum.archive.dicom.header import looks_like_dicom
from hilum.archive.doctor.look import Look, describe, look, look_in_store
from hilum.archive.intake import crashed
from hilum.archive.ledger import Entry, read_ledger
from hilum.archive.privacy import Key, read_key
from hilum.archive.reasons import REASONS
from hilum.archive.scan import find
from hilum.archive.store.store import Store
from hilum.archive.workers import Crashed, run
from hilum.errors import InputError, UsageError
from hilum.pages import Page
from hilum.terminal import WIDTH, Progress, format_table

MAX_SCANS = 8
# Ranges of Hounsfield units that every radiologist knows; fat, water and soft tissue overlap in real scans.
HU_BANDS = (
    ("air", -1100.0, -900.0),
    ("fat", -120.0, -60.0),
    ("water", -10.0, 15.0),
    ("soft tissue", 25.0, 80.0),
    ("bone", 250.0, 2000.0),
)
_BLOCKS = "▁▂▃▄▅▆▇█"


def inspect(
    source: str | Path,
    *,
    series: str | None = None,
    out: str | Path | None = None,
    key: Key | None = None,
    max_scans: int = MAX_SCANS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What is known of a scan and whether it would be used.

    source     a file (a DICOM slice stands for its series in that folder and below), a folder, or "STORE:KEY"
    series     the key of one scan in a folder, or its first digits; None: the first `max_scans` are looked at
    out        one HTML page with pictures; None: no page
    key        hashes identifiers; None: the user's own
    progress   called as (scans done, scans, what is being done)
    returns    {"num_rows", "rows": verdict of every ledger row, "scans": full records of those looked at}

    A refused scan is an answer, not an error. Raises InputError when there is nothing to look at: a missing path, an
    empty folder, no such series.
    """
    store, _, wanted = str(source).rpartition(":")
    if store and not Path(source).exists() and (Path(store) / "store.json").exists():
        rows = _pick(read_ledger(Path(store) / "ledger.parquet"), wanted)
        looks = [look_in_store(Store(store), entry) for entry in rows]
    else:
        rows = _rows(Path(source), key or read_key(), progress)
        rows = _pick(rows, series) if series else sorted(rows, key=_interest)
        looks = _look_at_all(([entry for entry in rows if entry.reader] or rows)[:max_scans], progress)
    looked = {seen.record["key"]: {name: seen.record[name] for name in _ROW} for seen in looks}
    result = {
        "num_rows": len(rows),
        "rows": [looked.get(entry.key) or {name: getattr(entry, name) for name in _ROW} for entry in rows],
        "scans": [seen.record for seen in looks],
    }
    if out is not None:
        write_page(Path(out), looks, result)
    return result


_ROW = ("key", "verdict", "reason", "modality", "num_files", "num_slices", "rows", "columns", "spacing_mm")


def _rows(source: Path, key: Key, progress: Progress | None) -> list[Entry]:
    """The ledger rows of a folder, or those that a file belongs to."""
    if (source / "store.json").exists():
        raise UsageError(f"{source} is a store; name one scan as {source}:KEY, or see all with: hilum show {source}")
    if not source.exists():
        raise InputError(f"{source} is missing; expected a file, a folder, or STORE:KEY")
    if source.is_file():
        with contextlib.suppress(OSError), open(source, "rb") as handle:  # what cannot be opened, `find` says by name
            if looks_like_dicom(handle.read(4096)):
                return [e for e in find(source.parent, key, progress=progress) if source in e.paths]
    return find(source, key, progress=progress)


def _pick(rows: Sequence[Entry], wanted: str) -> list[Entry]:
    found = [entry for entry in rows if entry.key.startswith(wanted)] if wanted else []
    if len(found) == 1:
        return found
    some = ", ".join(entry.key for entry in sorted(found or rows, key=_interest)[:8])
    raise InputError(
        f"{'several scans begin' if found else 'no scan begins'} with the key {wanted!r} ({len(rows):,} rows); "
        f"for example: {some}"
    )


def _interest(entry: Entry) -> tuple[bool, bool, bool, str]:
    """Order of looking: scans that are used, faults, what was set aside, what is no image."""
    fault = bool(entry.reason) and REASONS[entry.reason].fault
    return not entry.used and not fault, not entry.used, not entry.reader, entry.key


def _look_at_all(entries: Sequence[Entry], progress: Progress | None) -> list[Look]:
    """Looks in the order of the entries. Two workers, so that none of them is this process."""
    looks: dict[str, Look] = {}
    with closing(run(look, entries, 2)) as results:
        for entry, found in results:
            looks[entry.key] = describe(crashed(entry)) if isinstance(found, Crashed) else found
            if progress:
                progress(len(looks), len(entries), "looking at scans")
    return [looks[entry.key] for entry in entries]


def verdict_lines(record: dict[str, Any]) -> list[str]:
    """The verdict in words: what was decided, why, and what to do."""
    if record["verdict"] == "refused":
        numbers = f" Found: {record['detail']}." if record["detail"] else ""
        head = "REFUSED" if record["fault"] else "SET ASIDE"
        return [f"{head} ({record['reason']}). {record['sentence']}{numbers}", f"What to do: {record['advice']}"]
    if record["verdict"] == "repaired":
        return [f"USED, after {len(record['repairs'])} repair{'s' * (len(record['repairs']) != 1)}."]
    return ["USED. Nothing had to be repaired."]


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of all that is known, in the order of reading."""
    modality = {"": "none", "OT": "OT (unknown)"}.get(record["modality"], record["modality"])
    rows = [("modality", f"{modality}, unit {record['unit']}" if record["unit"] else modality)]
    if record["reader"]:
        rows.append(("read as", f"{record['reader']}, {record['num_files']:,} file{'s' * (record['num_files'] != 1)}"))
    if record["shape"]:
        rows.append(("voxels", " × ".join(f"{n:,}" for n in record["shape"]) + " (slices, rows, columns)"))
    elif record["rows"]:
        sizes = (record["num_slices"], record["rows"], record["columns"])
        rows.append(("images", " × ".join(f"{n:,}" for n in sizes) + " (slices, rows, columns)"))
    found = record["geometry"]
    if found:
        oblique = f", oblique by {found['oblique_deg']:.1f}°" if found["oblique_deg"] > 1 else ""
        sheared = f"{found['shear_deg']:.2f}°" if found["shear_deg"] else "none"
        rows += [
            ("spacing", " × ".join(f"{s:.4g}" for s in found["spacing_mm"]) + " mm"),
            ("field of view", " × ".join(f"{s:.4g}" for s in found["field_of_view_mm"]) + " mm"),
            ("plane", f"{found['plane']}{oblique}"),
            ("orientation", f"{found['orientation']}: {found['orientation_words']}"),
            ("shear", sheared),
        ]
    elif record["spacing_mm"]:
        rows.append(("spacing", " × ".join(f"{s:.4g}" for s in record["spacing_mm"]) + " mm"))
    if "steps_mm" in record:
        steps = record["steps_mm"]
        rows.append(("slice distance", f"median {steps['median']:g} mm, {steps['min']:g} to {steps['max']:g} mm"))
    known = ("region", "manufacturer", "transfer_syntax", "split_by", "study_day")
    rows += [(name.replace("_", " "), str(record[name])) for name in known if record[name] not in ("", None)]
    return rows


def terminal_text(result: dict[str, Any]) -> str:
    """The answer for a terminal, at most 100 columns wide."""
    parts = [_scan_text(record) for record in result["scans"]]
    if result["num_rows"] > len(result["scans"]):
        rows = [
            [row["key"], row["verdict"], row["reason"] or "", row["modality"], row["num_slices"], row["num_files"]]
            for row in result["rows"][:40]
        ]
        more = result["num_rows"] - len(rows)
        parts.insert(0, f"{result['num_rows']:,} scans and other finds; {len(result['scans'])} of them below. "
                     "One alone: --series KEY\n\n"
                     + format_table(["key", "verdict", "reason", "modality", "slices", "files"], rows)
                     + (f"\n… and {more:,} more (all with --json)" if more else ""))  # fmt: skip
    return "\n\n".join(parts)


def _scan_text(record: dict[str, Any]) -> str:
    lines = [f"── scan {record['key']} " + "─" * (WIDTH - 9 - len(record["key"]) - 1)]
    for line in verdict_lines(record):
        lines += wrap(line, WIDTH)
    lines += _indented(facts(record))
    lines += _indented([("repaired", repair) for repair in record["repairs"]])
    lines += _indented([("caution", f"{f['sentence']} {f['numbers']}".strip()) for f in record["flags"]])
    lines += _indented([("note", remark) for remark in record["remarks"]])
    values = record["values"]
    if values:
        unit = f" {record['unit']}" if record["unit"] else ""
        percentiles = " · ".join(f"{p} % {v:.4g}" for p, v in values["percentiles"].items())
        edges = values["histogram"]["edges"]
        lines += _indented(
            [
                ("values", f"{values['min']:g} to {values['max']:g}{unit}, mean {values['mean']:.4g}"),
                ("percentiles", percentiles),
                ("histogram", f"{edges[0]:.4g} {sparkline(values['histogram']['counts'])} {edges[-1]:.4g}{unit}"),
            ]
        )
    return "\n".join(lines)


def _indented(rows: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for name, text in rows:
        first, *rest = wrap(text, WIDTH - 18) or [""]
        lines += [f"  {name:<15} {first}", *(f"{'':<18}{line}" for line in rest)]
    return lines


def sparkline(counts: Sequence[int], width: int = 48) -> str:
    """Counts as a row of blocks, their height by the logarithm; an empty bin is a space."""
    groups = np.array_split(np.asarray(counts, float), min(width, len(counts)))
    heights = np.log1p([group.sum() for group in groups])
    scaled = np.ceil(heights / max(float(heights.max()), 1e-9) * len(_BLOCKS)).astype(int)
    return "".join(" " if level == 0 else _BLOCKS[level - 1] for level in scaled)


def write_page(path: Path, looks: Sequence[Look], result: dict[str, Any]) -> None:
    """Write one self-contained page about the scans that were looked at."""
    many = result["num_rows"] > 1
    page = Page(
        "What hilum sees in this " + ("folder" if many else "scan"),
        "Planes are drawn in millimetres as radiologists see them: the patient's right on the left of the picture. "
        "R L A P H F: right, left, anterior, posterior, head, feet.",
    )
    if many:
        _add_rows(page, result)
    for number, seen in enumerate(looks, 1):
        _add_scan(page, seen, number if many else 0)
    page.note("Keys are keyed hashes. The pictures are the scan's own pixels: text burned into them would show.")
    page.write(path)


def _add_rows(page: Page, result: dict[str, Any]) -> None:
    page.section("Overview", f"{result['num_rows']:,} scans and other finds, {len(result['scans'])} of them below.")
    page.table(
        ["key", "verdict", "reason", "modality", "slices", "files"],
        [
            [f"`{r['key']}`", r["verdict"], r["reason"], r["modality"], f"{r['num_slices']:,}", f"{r['num_files']:,}"]
            for r in result["rows"][:40]
        ],
    )
    if result["num_rows"] > 40:
        page.note(f"{result['num_rows'] - 40:,} more rows are left out here; `hilum scan` lists all.")


def _add_scan(page: Page, seen: Look, number: int) -> None:
    record = seen.record
    page.section(f"{number}. {_title(record)}" if number else _title(record))
    colour = {"used": "good", "repaired": "good"}.get(record["verdict"], "bad" if record["fault"] else "")
    page.callout("\n".join(verdict_lines(record)), colour)
    if seen.limits is not None:
        _add_pictures(page, seen)
    page.table(["", ""], [("scan", f"`{record['key']}`"), *facts(record)])
    items = [("repaired", repair) for repair in record["repairs"]]
    items += [("caution", f"{flag['sentence']} {flag['numbers']}") for flag in record["flags"]]
    items += [("note", remark) for remark in record["remarks"]]
    if items:
        page.table(["", "what to know"], items)
    median = float(np.median(seen.steps)) if seen.steps else 0.0
    if any(abs(step - median) > 0.01 * median for step in seen.steps):
        page.figure(
            figures.steps(np.array(seen.steps), median, "after slice"),
            f"Distance from each slice to the next along the slice normal; dashed: the median, "
            f"{median:.3g} mm; red: more than 5 % off.",
        )
    if record["values"]:
        _add_values(page, record)


def _title(record: dict[str, Any]) -> str:
    plane = record["geometry"]["plane"] if record["geometry"] else record["plane"]
    parts = [record["modality"] or "no image", plane, record["verdict"]]
    return ", ".join(part for part in parts if part)


def _add_pictures(page: Page, seen: Look) -> None:
    assert seen.limits is not None
    low, high = seen.limits
    unit = f" {seen.record['unit']}" if seen.record["unit"] else ""
    grey = f"Black to white: {low:.4g} to {high:.4g}{unit}.".replace("-", "−")
    if seen.planes:
        lettered = "" if seen.planes[0].edges else " No geometry: no letters, no scale."
        page.figure(figures.planes(seen.planes, seen.limits), f"{grey}{lettered}", alt="middle planes")
    if len(seen.slices) > 1 or not seen.planes:
        edges = seen.slices[0].edges
        sides = f" Top {edges[0]}, bottom {edges[1]}, left {edges[2]}, right {edges[3]}." if edges else ""
        page.figure(
            figures.montage(seen.slices, [seen.limits] * len(seen.slices)),
            f"{len(seen.slices)} slices, evenly spaced.{sides} {grey}",
        )


def _add_values(page: Page, record: dict[str, Any]) -> None:
    values = record["values"]
    edges, counts = (np.array(values["histogram"][name]) for name in ("edges", "counts"))
    hounsfield = record["unit"] == "HU"
    page.figure(
        figures.histogram(edges, counts, "HU" if hounsfield else "value", HU_BANDS if hounsfield else ()),
        f"How often each value occurs (logarithmic), among {values['histogram']['num_voxels']:,} voxels. "
        f"All values: {values['min']:g} to {values['max']:g}, mean {values['mean']:.4g}.",
    )
    page.table([f"{p} %" for p in values["percentiles"]], [[f"{v:.4g}" for v in values["percentiles"].values()]])
