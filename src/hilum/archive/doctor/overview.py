"""One page about a whole archive: what is in it, what became of every file, and what it looks like.

A ledger may have millions of rows: it is read batch by batch and only sums are kept. Thumbnails are of few scans, taken
evenly over modality, vendor, plane and verdict. The page carries keys, numbers and reason codes, no name and no path.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hilum import figures
from hilum.archive.doctor.display import PLANE_NAMES, edge_letters, slice_panels
from hilum.archive.intake import read_entry
from hilum.archive.ledger import LEDGER_SCHEMA
from hilum.archive.privacy import Key, read_key
from hilum.archive.reasons import FLAGS, REASONS
from hilum.archive.scan import find
from hilum.archive.store.store import Store, check_header
from hilum.archive.workers import Crashed, default_num_workers, run
from hilum.errors import InputError, ScanRefused
from hilum.figures import Panel
from hilum.pages import Page
from hilum.terminal import Progress

NUM_THUMBNAILS = 60
BATCH_ROWS = 1 << 16
SPACING_EDGES = np.append(np.arange(0, 10.01, 0.25), np.inf)  # mm
PIXEL_EDGES = np.append(np.arange(0, 3.01, 0.1), np.inf)
_STRATUM = ["verdict", "reason", "modality", "manufacturer", "plane", "region"]
_NEEDED = ["key", "patient", "num_files", "num_slices", "spacing_mm", "orientation", "reader", "flags", "repairs"]


@dataclass
class Totals:
    """Sums over a ledger.

    strata    one row per combination of _STRATUM: num_rows, num_files, num_slices
    patients  keys of the patients of used scans
    spacings, pixels   used scans by distance between slices and between pixels, in the bins above
    flags, repairs     code or text without its numbers → scans
    samples   rows from which thumbnails are chosen, by stratum
    """

    strata: pa.Table
    patients: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    spacings: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SPACING_EDGES) - 1, np.int64))
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(PIXEL_EDGES) - 1, np.int64))
    flags: dict[str, int] = field(default_factory=dict)
    repairs: dict[str, int] = field(default_factory=dict)
    samples: dict[tuple[str, ...], list[dict[str, Any]]] = field(default_factory=dict)

    def count(self, verdicts: Sequence[str], name: str) -> int:
        chosen = self.strata.filter(pc.is_in(self.strata["verdict"], pa.array(verdicts)))
        return int(pc.sum(chosen[name]).as_py() or 0)


def show(
    thing: str | Path,
    out: str | Path,
    *,
    archive: str | Path | None = None,
    key: Key | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one HTML page about a ledger or a store.

    thing     `ledger.parquet` of `hilum scan`, or a store folder
    archive   the folder that was scanned: with `ledger.paths.parquet` beside the ledger it gives the thumbnails; a
              store has its own
    returns   num_files, num_used, num_refused, num_patients, num_slices, num_thumbnails, and reasons: code → files

    Raises InputError when `thing` is neither.
    """
    thing = Path(thing)
    if (thing / "store.json").exists():
        check_header(thing)
        ledger, store = thing / "ledger.parquet", Store(thing)
    else:
        ledger, store = thing, None
    totals = aggregate(ledger)
    chosen = choose(totals, NUM_THUMBNAILS, store is not None)
    if store is not None:
        drawn = _from_store(store, chosen)
    elif archive is not None:
        drawn = _from_archive(ledger, Path(archive), chosen, key or read_key(), progress)
    else:
        drawn = []
    counts = _counts(totals)
    page = Page("What is in this archive", "Every file that was found, and what became of it.")
    _add_head(page, totals, counts, store.header.get("num_files") if store else None)
    _add_reasons(page, totals)
    _add_thumbnails(page, drawn, store is not None or archive is not None)
    _add_groups(page, totals)
    _add_spacings(page, totals)
    _add_cautions(page, totals)
    page.note("Keys are keyed hashes. Thumbnails are the scans' own pixels: text burned into them would show.")
    page.write(Path(out))
    return {**counts, "num_thumbnails": len(drawn)}


# ---- sums


def aggregate(ledger: Path) -> Totals:
    """Sum up a ledger of any size, batch by batch."""
    parts: list[pa.Table] = []
    totals = Totals(LEDGER_SCHEMA.empty_table())
    sums: list[tuple[str, str]] = [("num_rows", "sum"), ("num_files", "sum"), ("num_slices", "sum")]
    for batch in _batches(ledger):
        batch = batch.append_column("num_rows", pa.array(np.ones(len(batch), np.int64)))
        parts.append(_renamed(batch.group_by(_STRATUM).aggregate(sums)))
        used = batch.filter(pc.not_equal(batch["verdict"], "refused"))
        patients = pc.unique(used["patient"]).filter(pc.not_equal(pc.unique(used["patient"]), ""))
        totals.patients = pc.unique(pa.concat_arrays([totals.patients, _whole(patients)]))
        totals.spacings += _histogram(used, 0, SPACING_EDGES)
        totals.pixels += _histogram(used, 1, PIXEL_EDGES)
        _tally(totals.flags, batch["flags"], r":.*$", "")
        _tally(totals.repairs, used["repairs"], r"[0-9][0-9.,]*", "N")
        _sample(totals, batch)
    if not parts:
        raise InputError(f"{ledger} has no rows; an archive has at least one file")
    totals.strata = _renamed(pa.concat_tables(parts).group_by(_STRATUM).aggregate(sums))
    return totals


def _batches(ledger: Path) -> Any:
    if not ledger.is_file():
        what = "a folder without store.json" if ledger.is_dir() else "missing"
        raise InputError(
            f"{ledger} is {what}; expected a ledger (made by hilum scan), a store, or for hilum show a run folder"
        )
    try:
        file = pq.ParquetFile(ledger)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{ledger} is no Parquet file, so neither ledger nor store: {error}") from None
    with file:
        missing = sorted({*_STRATUM, *_NEEDED} - set(file.schema_arrow.names))
        if missing:
            raise InputError(
                f"{ledger} is no ledger of this version (without {', '.join(missing[:4])}); make one with: "
                "hilum scan ARCHIVE -o ledger.parquet"
            )
        for batch in file.iter_batches(BATCH_ROWS, columns=[*_STRATUM, *_NEEDED]):
            yield _with_plane(pa.table(batch))


def _with_plane(table: pa.Table) -> pa.Table:
    """Where the ledger guesses no plane, that of a DICOM stack follows from the direction of its slices."""
    first = pc.utf8_slice_codeunits(table["orientation"], 0, 1)
    unknown = pc.and_(pc.equal(table["plane"], ""), pc.equal(table["reader"], "dicom"))
    plane = table["plane"]
    for letter, name in PLANE_NAMES.items():
        plane = pc.if_else(pc.and_(unknown, pc.equal(first, letter)), name, plane)
    return table.set_column(table.column_names.index("plane"), "plane", plane)


def _whole(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _renamed(table: pa.Table) -> pa.Table:
    return table.rename_columns([name.removesuffix("_sum") for name in table.column_names])


def _histogram(table: pa.Table, axis: int, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    known = table["spacing_mm"].drop_null()
    values = pc.list_element(known, axis).to_numpy()
    found: NDArray[np.int64] = np.histogram(values, edges)[0].astype(np.int64)
    return found


def _tally(counts: dict[str, int], lists: pa.ChunkedArray, pattern: str, replacement: str) -> None:
    texts = pc.replace_substring_regex(pc.list_flatten(lists), pattern, replacement)
    for row in pc.value_counts(texts).to_pylist():
        counts[row["values"]] = counts.get(row["values"], 0) + row["counts"]


def _sample(totals: Totals, batch: pa.Table) -> None:
    """Keep the first rows of every stratum: keys are hashes, so the first are as good as drawn."""
    batch = batch.filter(pc.not_equal(batch["reader"], ""))
    names = ["verdict", "modality", "manufacturer", "plane"]
    stratum = pc.binary_join_element_wise(*(batch[name] for name in names), "|")
    for joined in pc.unique(stratum).to_pylist():
        kept = totals.samples.setdefault(tuple(joined.split("|")), [])
        if len(kept) < NUM_THUMBNAILS:
            rows = batch.filter(pc.equal(stratum, joined)).slice(0, NUM_THUMBNAILS - len(kept))
            kept += rows.select(["key", "verdict", "reason", "modality", "spacing_mm"]).to_pylist()


def _counts(totals: Totals) -> dict[str, Any]:
    used = ("used", "repaired")
    return {
        "num_files": totals.count(("refused", *used), "num_files"),
        "num_used": totals.count(used, "num_rows"),
        "num_repaired": totals.count(("repaired",), "num_rows"),
        "num_files_used": totals.count(used, "num_files"),
        "num_files_refused": totals.count(("refused",), "num_files"),
        "num_slices": totals.count(used, "num_slices"),
        "num_patients": len(totals.patients),
        "reasons": {r["reason"]: r["num_files"] for r in _grouped(totals, ["reason"]) if r["reason"]},
    }


def _grouped(totals: Totals, names: list[str], used_only: bool = False) -> list[dict[str, Any]]:
    """Sums by some columns, most rows first."""
    table = totals.strata
    if used_only:
        table = table.filter(pc.not_equal(table["verdict"], "refused"))
    sums = [("num_rows", "sum"), ("num_files", "sum"), ("num_slices", "sum")]
    rows: list[dict[str, Any]] = _renamed(table.group_by(names).aggregate(sums)).to_pylist()
    return sorted(rows, key=lambda r: (-r["num_rows"], *(r[n] for n in names)))


# ---- thumbnails


def choose(totals: Totals, most: int, used_only: bool) -> list[dict[str, Any]]:
    """Rows to draw: one of each stratum in turn until there are enough; what was set aside by design is never drawn."""
    queues = [
        [r for r in rows if not r["reason"] or (REASONS[r["reason"]].fault and not used_only)]
        for _, rows in sorted(totals.samples.items())
    ]
    chosen: list[dict[str, Any]] = []
    for turn in range(most):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
        if len(chosen) >= most:
            break
    return chosen[:most]


Drawn = tuple[dict[str, Any], Panel, str]
"""A ledger row, its middle slice and the unit of its values."""


def _from_store(store: Store, chosen: Sequence[dict[str, Any]]) -> list[Drawn]:
    drawn = []
    for row in chosen:
        volume = store.row(row["key"])
        pixels, _ = store.read_slice(row["key"], volume.shape[0] // 2)
        panel = Panel(pixels)
        if volume.affine is not None:
            axes = np.array(volume.affine).reshape(4, 4)[:3, :3]
            _, dy, dx = np.linalg.norm(axes, axis=0)
            panel = Panel(pixels, (float(dy), float(dx)), edge_letters(axes[:, 1], axes[:, 2]))
        drawn.append((row, panel, volume.unit))
    return drawn


def _from_archive(
    ledger: Path, archive: Path, chosen: Sequence[dict[str, Any]], key: Key, progress: Progress | None
) -> list[Drawn]:
    """Thumbnails of the chosen rows that can be read, each in a worker."""
    companion = ledger.with_name(f"{ledger.stem}.paths.parquet")
    if not companion.is_file():
        raise InputError(f"{companion} is missing; it says where the scans of {ledger.name} lie. Leave out --archive")
    if not archive.is_dir():
        raise InputError(f"{archive} is no folder; expected the archive that {ledger.name} was made from")
    keys = pa.array([row["key"] for row in chosen])
    table = pq.read_table(companion, filters=pc.is_in(pc.field("key"), keys))
    files: dict[str, list[str]] = {}
    for name, path in zip(table["key"].to_pylist(), table["path"].to_pylist()):
        files.setdefault(name, []).append(path)
    middle = {name: archive / paths[len(paths) // 2] for name, paths in files.items()}
    todo = [(row["key"], middle[row["key"]]) for row in chosen if row["key"] in middle]
    panels: dict[str, tuple[Panel, str]] = {}
    with closing(run(partial(_thumbnail, key=key), todo, max(2, default_num_workers()))) as results:
        for done, ((name, _), found) in enumerate(results, 1):
            if found is not None and not isinstance(found, Crashed):
                panels[name] = found
            if progress:
                progress(done, len(todo), "drawing thumbnails")
    return [(row, *panels[row["key"]]) for row in chosen if row["key"] in panels]


def _thumbnail(item: tuple[str, Path], key: Key) -> tuple[Panel, str] | None:
    """The middle slice of one file, None when it cannot be shown alone. Runs in a worker."""
    _, path = item
    try:
        entry = next((e for e in find(path, key) if e.used), None)
        if entry is None:
            return None
        vol, _ = read_entry(entry)
    except (InputError, ScanRefused, OSError):
        return None  # the page says how many could be drawn
    return slice_panels(vol, 1)[0], vol.unit


# ---- the page


def _add_head(page: Page, totals: Totals, counts: dict[str, Any], expected: int | None) -> None:
    page.section("In short")
    page.numbers(
        [
            ("files", f"{counts['num_files']:,}"),
            ("scans used", f"{counts['num_used']:,}"),
            ("of them repaired", f"{counts['num_repaired']:,}"),
            ("patients", f"{counts['num_patients']:,}"),
            ("slices", f"{counts['num_slices']:,}"),
            ("files not used", f"{counts['num_files_refused']:,}"),
        ]
    )
    sum_text = (
        f"{counts['num_files_used']:,} files of used scans + {counts['num_files_refused']:,} files not used "
        f"= {counts['num_files']:,}"
    )
    if expected is None:
        page.callout(f"{sum_text} files in the ledger: each file of the archive stands in exactly one row.")
    elif expected == counts["num_files"]:
        page.callout(f"{sum_text} files, as many as were counted in the archive: nothing is lost.", "good")
    else:
        page.callout(f"{sum_text} files, but {expected:,} were counted in the archive: please report this.", "bad")
    if not counts["num_patients"]:
        page.note("No used scan names its patient (images and NIfTI files do not): patients cannot be counted.")


def _add_reasons(page: Page, totals: Totals) -> None:
    rows = sorted((r for r in _grouped(totals, ["reason"]) if r["reason"]), key=lambda r: -r["num_files"])
    if not rows:
        return
    page.section(
        "Why files were not used",
        "Faults looked like usable scans, and somebody may want to repair them. The others were set aside by design.",
    )
    faults = [r for r in rows if REASONS[r["reason"]].fault]
    aside = [r for r in rows if not REASONS[r["reason"]].fault]
    panels = [
        (title, colour, [(r["reason"].replace("_", " "), float(r["num_files"])) for r in part])
        for title, colour, part in (
            ("Faults, files", figures.REJECTED, faults),
            ("Set aside by design, files", figures.SERIES[4], aside),
        )
        if part
    ]
    page.figure(figures.bars(panels), "Files by reason.")
    for kind, part in (("fault", faults), ("set aside", aside)):
        if part:
            page.table(
                [kind, "files", "rows", "meaning", "what to do"],
                [
                    [f"`{r['reason']}`", f"{r['num_files']:,}", f"{r['num_rows']:,}", REASONS[r["reason"]].sentence,
                     REASONS[r["reason"]].advice]
                    for r in part
                ],
            )  # fmt: skip


def _add_thumbnails(page: Page, drawn: Sequence[Drawn], asked: bool) -> None:
    page.section("What the scans look like")
    if not drawn:
        page.text(
            "No scan could be drawn." if asked else "Say where the archive is, and they are drawn: `--archive FOLDER`."
        )
        return
    panels, colours = [], []
    for row, panel, _ in drawn:
        spacing = row["spacing_mm"]
        size = " × ".join(f"{s:.2g}" for s in spacing) + " mm" if spacing else "no geometry"
        title = f"{row['key'][:6]}  {row['modality']}\n{size}\n{row['reason'] or row['verdict']}"
        panels.append(Panel(panel.pixels, panel.pixel_mm, panel.edges, title.replace("_", " ")))
        colours.append(figures.REJECTED if row["reason"] else figures.FAINT)
    limits = [figures.window(panel.pixels, unit) for _, panel, unit in drawn]
    page.figure(
        figures.montage(panels, limits, 8, colours),
        f"The middle slice of {len(drawn)} scans, taken evenly over verdict, modality, vendor and plane. First digits of "
        "the key, modality, spacing (slices, rows, columns), verdict; red: not used. CT from −160 to 240 HU.",
    )


def _add_groups(page: Page, totals: Totals, most: int = 30) -> None:
    page.section("What is used")
    for names in (["modality", "manufacturer", "plane"], ["region"]):
        rows = _grouped(totals, names, used_only=True)
        if len(rows) == 1 and names == ["region"] and not rows[0]["region"]:
            continue
        shown = [
            [*(r[n] or "unknown" for n in names), f"{r['num_rows']:,}", f"{r['num_slices']:,}"] for r in rows[:most]
        ]
        if rows[most:]:
            rest = [f"{sum(r[n] for r in rows[most:]):,}" for n in ("num_rows", "num_slices")]
            shown.append([f"{len(rows) - most} more", *[""] * (len(names) - 1), *rest])
        page.table([*("vendor" if n == "manufacturer" else n for n in names), "scans", "slices"], shown)


def _add_spacings(page: Page, totals: Totals) -> None:
    if not totals.spacings.any():
        return
    page.section("How finely they were scanned", "Used scans with a geometry; positions count, not header attributes.")
    for counts, edges, what in (
        (totals.spacings, SPACING_EDGES, "distance between slices"),
        (totals.pixels, PIXEL_EDGES, "distance between rows"),
    ):
        drawn = np.append(edges[:-1], 2 * edges[-2] - edges[-3])
        top = f"; the last bar holds everything above {edges[-2]:g} mm" if counts[-1] else ""
        page.figure(figures.histogram(drawn, counts, f"{what}, mm", log=False), f"Scans by {what}{top}.")


def _add_cautions(page: Page, totals: Totals) -> None:
    rows = [["caution", f"`{code}`", f"{n:,}", FLAGS[code]] for code, n in _most(totals.flags)]
    rows += [["repair", "", f"{n:,}", text] for text, n in _most(totals.repairs)]
    if rows:
        page.section("Repairs and cautions", "What was set right, and what a user of these scans should know.")
        page.table(["", "code", "scans", "meaning"], rows)


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
