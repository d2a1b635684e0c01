"""Features and labels brought together: one target, one patient, one group per case.

Labels may carry raw identifiers (file, series UID, patient id); they are hashed with the key of the features on the fly
and never written. Every case and every label that finds no partner is counted.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hilum.archive.privacy import Key, Kind, key_path, read_key
from hilum.errors import InputError, LabelsError, UsageError
from hilum.records import read_table, table_metadata

FEATURE_COLUMNS = ("item", "patient", "study", "series", "level", "slice", "region", "model", "contract", "vector")

# Columns that can identify a case, tried in this order: label column → (features column, kind of hash; None = hashed).
IDENTIFIERS: dict[str, tuple[str, Kind | None]] = {
    "item": ("item", None),
    "series": ("series", None),
    "file": ("series", "item"),
    "series_uid": ("series", "series"),
    "patient": ("patient", None),
    "patient_id": ("patient", "patient"),
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """One level of one features file.

    table    every column but the vectors, N rows
    vectors  (N, D) float32, finite
    failed   scans that gave no vector: rows with a reason instead
    """

    table: pa.Table
    vectors: NDArray[np.float32]
    level: str
    model: str
    contract: str
    key_fingerprint: str
    failed: int = 0

    def column(self, name: str) -> list[str]:
        return [_text(v) for v in self.table[name].to_pylist()]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A labels file as text; empty cells are ""."""

    columns: tuple[str, ...]
    rows: list[dict[str, str]]

    def column(self, name: str) -> list[str]:
        return [row[name] for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The cases that have a label, in the order of the features.

    index      (n,) rows of the features
    target     n label values as text, never empty
    group      n values of the groups column, or None
    patient    n values of the patients column, or None
    joined_on  label columns that identified the cases; () without a labels file
    left_out   what was counted and not used, by reason
    """

    index: NDArray[np.intp]
    target: list[str]
    group: list[str] | None
    patient: list[str] | None
    joined_on: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


def read_features(path: Path, level: str | None = None) -> Features:
    """Read a features file, or one level of it.

    level  "slice", "region" or "volume"; needed only when the file holds several

    InputError when it is no features file; LabelsError for non-finite vectors; UsageError when `level` is open.
    """
    table = read_table(path)
    missing = [c for c in FEATURE_COLUMNS if c not in table.column_names]
    if missing or not pa.types.is_fixed_size_list(table.schema.field("vector").type):
        what = f"has no column {', '.join(missing)}" if missing else "has no vectors of one length"
        raise InputError(f"{path.name} is no features file: it {what}. Make one with: hilum embed")
    present = sorted(set(table["level"].to_pylist()))
    if level is None and len(present) > 1:
        raise UsageError(f"{path.name} holds features of several levels ({', '.join(present)}); choose one with level=")
    if level is not None and level not in present:
        raise UsageError(f"{path.name} holds no features of level '{level}'; it has: {', '.join(present) or 'none'}")
    table = table.filter(pa.array([v == (level or v) for v in table["level"].to_pylist()], pa.bool_()))
    if table.num_rows == 0:
        raise LabelsError(f"{path.name} holds no features. Embed a folder that has readable scans")
    failed = table.num_rows
    if "reason" in table.column_names:  # tables of version 1 have no rows for failed scans
        table = table.filter(pc.is_null(table["reason"]))
    failed -= table.num_rows
    if table.num_rows == 0:
        raise LabelsError(
            f"{path.name} holds no features, only {failed} scans that could not be encoded; see its column reason"
        )
    models = sorted(set(table["model"].to_pylist()))
    if len(models) > 1:
        raise UsageError(
            f"{path.name} holds features of several models ({', '.join(models)}); expected one model a file"
        )
    if len(set(table["item"].to_pylist())) < table.num_rows:
        raise InputError(f"{path.name} repeats items; expected one row per item. Embed again into a new file")
    return Features(
        table=table.drop_columns(["vector"]),
        vectors=_vectors(table["vector"]),
        level=table["level"][0].as_py(),
        model=models[0],
        contract=table["contract"][0].as_py(),
        key_fingerprint=str(table_metadata(table).get("key", "")),
        failed=failed,
    )


def _vectors(column: Any) -> NDArray[np.float32]:
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    rows: NDArray[np.float32] = values.reshape(len(array) - array.null_count, -1)
    num_bad = array.null_count + int(np.count_nonzero(~np.isfinite(rows).all(axis=1)))
    if num_bad:
        raise LabelsError(
            f"{num_bad} of {len(array)} feature vectors hold NaN or infinity; expected finite numbers. Check the "
            "encoder (hilum info) and embed again"
        )
    return rows


def read_labels(path: Path) -> Labels:
    """Read CSV (comma, semicolon or tab; UTF-8) or Parquet. LabelsError when it is neither, or empty."""
    if path.suffix.lower() in (".parquet", ".pq"):
        table = read_table(path)
        rows = [{name: _text(value) for name, value in row.items()} for row in table.to_pylist()]
        labels = Labels(columns=tuple(table.column_names), rows=rows)
    else:
        labels = _read_csv(path)
    if not labels.rows:
        raise LabelsError(f"{path.name} holds no labels; expected a header and one row per case")
    return labels


def _read_csv(path: Path) -> Labels:
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            header = handle.readline()
            handle.seek(0)
            delimiter = max(",;\t", key=header.count)
            lines = [line for line in csv.reader(handle, delimiter=delimiter, strict=True) if line]
    except OSError as error:
        raise LabelsError(f"{path.name} cannot be read: {error.strerror}. Expected CSV or Parquet") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise LabelsError(f"{path.name} is no CSV in UTF-8: {error}. Expected CSV or Parquet") from None
    columns = tuple(name.strip() for name in lines[0]) if lines else ()
    if len(set(columns)) < len(columns):
        raise LabelsError(f"{path.name} repeats a column name in its header: {', '.join(columns)}")
    odd = [number for number, line in enumerate(lines, 1) if len(line) != len(columns)]
    if odd:
        raise LabelsError(
            f"{path.name}: row {odd[0]} has {len(lines[odd[0] - 1])} fields, the header has {len(columns)} "
            f"({len(odd)} such rows)"
        )
    return Labels(columns=columns, rows=[dict(zip(columns, map(_text, line))) for line in lines[1:]])


def _text(value: Any) -> str:
    """A cell as text; "" for nothing and NaN; whole floats as integers (a column with gaps turns them into floats)."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return "" if text.lower() == "nan" else text


def match_cases(
    features: Features, labels: Labels | None, *, target: str, groups: str | None, patients: str | None, key: Key | None
) -> Cases:
    """Find the label of every case.

    target, groups, patients  column names, looked up in the labels first, then in the features
    key                       hashes raw identifiers; None reads the user's key when one is needed

    A label row identifies cases by the first column of IDENTIFIERS that matches any; `slice` and `region` narrow the
    match when labels and features both have them. LabelsError says what does not fit.
    """
    wanted = [name for name in (target, groups, patients) if name is not None]
    known = (labels.columns if labels else ()) + tuple(features.table.column_names)
    for name in wanted:
        if name not in known:
            raise LabelsError(
                f"no column '{name}'. The labels have: {', '.join(labels.columns) if labels else '(none given)'}; "
                f"the features have: {', '.join(features.table.column_names)}"
            )
    count = features.table.num_rows
    joined_on: tuple[str, ...] = ()
    left_out: dict[str, int] = {}
    partner: list[int] = list(range(count))
    if labels is not None:
        partner, joined_on, left_out = _join(features, labels, [n for n in wanted if n in labels.columns], target, key)
    columns = {}
    for name in wanted:
        if labels is not None and name in labels.columns:
            values = labels.column(name)
            columns[name] = [values[p] if p >= 0 else "" for p in partner]
        else:
            columns[name] = features.column(name)
    index = np.array([i for i in range(count) if partner[i] >= 0 and columns[target][i]], dtype=np.intp)
    left_out["cases without a label"] = count - len(index)
    if features.failed:
        left_out["scans that could not be encoded"] = features.failed
    for name in wanted[1:]:
        num_empty = sum(not columns[name][i] for i in index)
        if num_empty:
            raise LabelsError(
                f"column '{name}' is empty for {num_empty} of {len(index)} cases; fill it or choose another"
            )
    picked = {name: [values[i] for i in index] for name, values in columns.items()}
    return Cases(
        index=index,
        target=picked[target],
        group=picked[groups] if groups else None,
        patient=picked[patients] if patients else None,
        joined_on=joined_on,
        left_out=left_out,
    )


def _join(
    features: Features, labels: Labels, wanted: Sequence[str], target: str, key: Key | None
) -> tuple[list[int], tuple[str, ...], dict[str, int]]:
    """For each case the row of its label, or -1; the columns used; the counts of what was left out."""
    present = [name for name in IDENTIFIERS if name in labels.columns]
    if not present:
        raise LabelsError(
            f"the labels have no identifying column; found {', '.join(labels.columns)}, expected one of "
            f"{', '.join(IDENTIFIERS)}"
        )
    narrow = [n for n in ("slice", "region") if n in labels.columns and any(features.column(n))]
    for name in present:
        column, kind = IDENTIFIERS[name]
        identifiers = labels.column(name)
        if kind is not None:
            identifiers = hash_identifiers(features, name, identifiers, kind, key)
        places = list(zip(identifiers, *[_whole_numbers(n, labels.column(n)) for n in narrow]))
        cases = list(zip(features.column(column), *[features.column(n) for n in narrow]))
        if {c for c in cases if c[0]} & set(places):
            break
    else:
        raise LabelsError(
            f"none of {len(labels.rows)} labels matches any of {features.table.num_rows} cases (tried "
            f"{', '.join([*present, *narrow])}; features made with key {features.key_fingerprint or 'unknown'}). "
            "Columns item, series and patient hold hashes; raw identifiers belong into file (path below the embedded "
            "folder), series_uid or patient_id"
        )
    empty = [target in wanted and not row[target] for row in labels.rows]
    rows, num_merged = _unique_rows(labels, places, [not e for e in empty], wanted)
    found = set(cases)
    left_out = {
        "labels without a case": sum(place not in found for place in rows),
        "labels with an empty value": sum(empty),
        "equal labels merged": num_merged,
    }
    return [rows.get(case, -1) if case[0] else -1 for case in cases], (name, *narrow), left_out


def _unique_rows(
    labels: Labels, places: Sequence[tuple[str, ...]], use: Sequence[bool], wanted: Sequence[str]
) -> tuple[dict[tuple[str, ...], int], int]:
    """One label row per place, and how many equal ones were merged. LabelsError when labels contradict each other."""
    rows: dict[tuple[str, ...], int] = {}
    conflicts = []
    num_merged = 0
    for number, place in enumerate(places):
        if not use[number]:
            continue
        first = rows.setdefault(place, number)
        if first != number:
            num_merged += 1
            if any(labels.rows[first][n] != labels.rows[number][n] for n in wanted):
                conflicts.append((first, number))
    if conflicts:
        a, b = conflicts[0]
        name = next(n for n in wanted if labels.rows[a][n] != labels.rows[b][n])
        raise LabelsError(
            f"{len(conflicts)} labels contradict an earlier one of the same case, first rows {a + 1} and {b + 1} in "
            f"column '{name}'; expected one label per case. Add a slice or region column, or remove the wrong rows"
        )
    return rows, num_merged


def hash_identifiers(features: Features, name: str, values: Sequence[str], kind: Kind, key: Key | None) -> list[str]:
    """Raw identifiers of a label column, hashed as the features are. LabelsError when the key is another one."""
    if key is None and key_path().exists():
        key = read_key()
    if key is None or key.fingerprint != features.key_fingerprint:
        raise LabelsError(
            f"column '{name}' holds raw identifiers, and the features were made with key "
            f"{features.key_fingerprint or 'unknown'}, but the key at hand is "
            f"{key.fingerprint if key else 'missing'}. Point HILUM_KEY to the key file that hilum embed used"
        )
    if name == "file":
        values = [PurePosixPath(v.replace("\\", "/")).as_posix() if v else "" for v in values]
    return [key.hash(kind, value) for value in values]


def _whole_numbers(name: str, values: Sequence[str]) -> list[str]:
    """Slice and region numbers in one spelling: "07" and "7.0" are "7"."""
    spelled = []
    for value in values:
        try:
            whole = not value or float(value).is_integer()
        except ValueError:
            whole = False
        if not whole:
            raise LabelsError(f"column '{name}' of the labels holds '{value}'; expected whole numbers")
        spelled.append(str(int(float(value))) if value else "")
    return spelled
