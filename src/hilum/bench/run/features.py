"""Cases → features of one encoder, kept on disk and shared by all tasks that look at the same pixels.

FOLDER/<model>-<weights>-<contract>/
    vectors-*.parquet   key, cls, mean, max, weights, reason: a row a case
    tokens/KEY.b2nd     patch tokens, for heads that want them (`hilum.encode.table.patches`); of volumes one file a scan

The key of a case is the hash of what was encoded: the content of its files, its slices and region, how many slices are taken.
Change a file and only its cases are encoded again. Run it again after any interruption.

A slice encoder sees a volume slice by slice; class token and mean are averaged over slices (Curia-2: slice models on 3D tasks:
"features averaged over the volume"), of the maximum the largest is kept. A region of several slices likewise, over the slices
that it touches. A volume encoder sees each scan once, whatever is asked of it: all its regions are pooled from the same tokens.
"""

import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hilum.bench.run.scans import CaseReader
from hilum.bench.task import Case, Task
from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder
from hilum.encode.features import Encoded, encode_scans, kept, save_patches
from hilum.encode.grids import chosen_slices, region_weights, volume_region_weights
from hilum.encode.items import How, Scan
from hilum.encode.pooling import pool
from hilum.encode.regions import check_same_grid
from hilum.encode.vit import Tokens
from hilum.errors import ContractError, HilumError, InputError, UsageError
from hilum.probe.heads.tokens import TokenFile, TokenSequence
from hilum.records import hash_json, read_table, write_table
from hilum.terminal import Progress
from hilum.volume import Volume

FORMAT = "hilum-bench-features"
SHARD, EVERY_S = 256, 20.0  # what an interruption costs at most: cases, seconds
PARTS = ("class", "mean", "max")
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("class", pa.list_(pa.float32())),  # () where there is none
        ("mean", pa.list_(pa.float32())),
        ("max", pa.list_(pa.float32())),
        ("weights", pa.list_(pa.float32())),  # of a region, on the tokens of the side file; () without
        ("reason", pa.string()),  # why the case was refused; "" when it was not
    ]
)
_ALL = "class+mean+max"
Vector = NDArray[np.float32]
_NOTHING: Vector = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Vectors:
    """What is known of one case."""

    parts: dict[str, Vector]
    weights: Vector
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CaseFeatures:
    """Features of some cases, in their order.

    keys    hash of what was encoded of each (`FeatureCache.key`)
    rows    what the cache holds of each
    tokens  the side file of each; None where it was not asked for
    """

    keys: list[str]
    rows: list[Vectors]
    tokens: list[Path | None]
    contract: Any

    @property
    def reasons(self) -> list[str]:
        """Why each case has no features; "" where it has."""
        return [row.reason for row in self.rows]

    def vectors(self, pooling: str) -> Vector:
        """(N, D) of cases that have features: class, mean, max or several with +."""
        names = pooling.split("+")
        if unknown := [name for name in names if name not in PARTS]:
            raise UsageError(
                f"features '{pooling}' are unknown ({', '.join(unknown)}); expected {', '.join(PARTS)} or some with +"
            )
        return np.stack([np.concatenate([row.parts[name] for name in names]) for row in self.rows])

    def sequence(self) -> TokenSequence:
        """Patch tokens, streamed from disk; of a region only those it touches."""
        items = []
        for row, path in zip(self.rows, self.tokens):
            if path is None or not path.is_file():
                raise InputError("these features were made without patch tokens; run again with heads that take tokens")
            items.append(TokenFile(path=path, weights=row.weights if len(row.weights) else None))
        return TokenSequence(items)

    def take(self, numbers: Iterable[int]) -> "CaseFeatures":
        chosen = list(numbers)
        keys, rows = [self.keys[n] for n in chosen], [self.rows[n] for n in chosen]
        return replace(self, keys=keys, rows=rows, tokens=[self.tokens[n] for n in chosen])


@dataclass
class FeatureCache:
    """Features of one encoder on disk.

    max_slices   evenly spaced slices of a volume instead of all
    max_patches  of a volume encoder at once: larger volumes go in overlapping blocks; None: what memory allows
    num_threads  prepare images while the network runs
    """

    folder: Path
    encoder: Encoder
    max_slices: int | None = None
    batch_size: int = 32
    num_threads: int = 1
    reader: CaseReader = field(default_factory=CaseReader)
    max_patches: int | None = None

    def __post_init__(self) -> None:
        encoder = self.encoder
        name = "".join(c if c.isalnum() or c in "-._" else "-" for c in encoder.name)
        half = "-bf16" if encoder.precision == "bfloat16" else ""
        self.place = self.folder / f"{name}-{encoder.weights_hash[:8]}-{encoder.contract.hash[:8]}{half}"
        if self.max_patches:
            self.place = self.place.with_name(f"{self.place.name}-blocks{self.max_patches}")
        self._known: dict[str, Vectors] | None = None

    def features(
        self, task: Task, cases: Sequence[Case], *, tokens: bool = False, progress: Progress | None = None
    ) -> CaseFeatures:
        """Features of the cases of a task; what is not on disk is encoded.

        tokens  patch tokens, too
        UsageError when the encoder cannot do this unit: a volume encoder has no features of a slice.
        """
        check_unit(task, self.encoder)
        known = self._read()
        dense = task.kind in ("segmentation", "localisation")
        keys = [self.key(task, case) for case in cases]
        todo: dict[str, Case] = {}
        for key, case in zip(keys, cases):
            row = known.get(key)
            if row is None or (tokens and not row.reason and not self._token_path(key, case).is_file()):
                todo[key] = case
        what = f"features of {self.encoder.name}, {task.id}"
        shard: list[tuple[str, Vectors]] = []
        written = time.monotonic()
        for done, made in enumerate(self._encode(todo, region=not dense, tokens=tokens) if todo else (), 1):
            shard.append(made)
            if len(shard) == SHARD or done == len(todo) or time.monotonic() - written > EVERY_S:
                self._write(shard)
                known.update(shard)
                shard, written = [], time.monotonic()
            if progress:
                progress(done, len(todo), what)
        paths = [self._token_path(key, case) if tokens else None for key, case in zip(keys, cases)]
        return CaseFeatures(keys=keys, rows=[known[key] for key in keys], tokens=paths, contract=self.encoder.contract)

    def key(self, task: Task, case: Case) -> str:
        """16 hex digits of what is encoded of a case."""
        dense = task.kind in ("segmentation", "localisation")
        region = None if case.region is None or dense else case.region
        within = None
        if region is not None:
            source = region.source and (self.reader.content(region.source), region.source.form, region.source.series)
            within = [source, region.values, region.box]
        return hash_json([1, self._scan(case), case.slices, within, None if dense else self.max_slices])

    def _scan(self, case: Case) -> list[Any]:
        """What tells the voxels of a case from others."""
        return [self.reader.content(case.scan), case.scan.form, case.scan.series, case.modality]

    def _token_path(self, key: str, case: Case) -> Path:
        """Of a slice encoder the tokens of the case, of a volume encoder those of its whole scan."""
        name = key if isinstance(self.encoder.contract, Contract) else hash_json(["scan", *self._scan(case)])
        return self.place / "tokens" / f"{name}.b2nd"

    def _read(self) -> dict[str, Vectors]:
        if self._known is None:
            self._known = {}
            for path in sorted(self.place.glob("vectors-*.parquet")):
                columns = {name: column.to_pylist() for name, column in zip(_SCHEMA.names, read_table(path).columns)}
                for n, key in enumerate(columns["key"]):
                    if columns["reason"][n]:  # whatever was in the way may be gone
                        continue
                    parts = {name: np.array(columns[name][n], np.float32) for name in PARTS}
                    self._known[key] = Vectors(parts, np.array(columns["weights"][n], np.float32), columns["reason"][n])
        return self._known

    def _write(self, rows: Sequence[tuple[str, Vectors]]) -> None:
        plain = [
            {"key": key, **row.parts, "weights": row.weights, "reason": row.reason}
            for key, row in rows
        ]  # fmt: skip
        name = hash_json([key for key, _ in rows])
        about = {"format": FORMAT, "version": 1, "model": self.encoder.name, "contract": self.encoder.contract.hash}
        write_table(self.place / f"vectors-{name}.parquet", pa.Table.from_pylist(plain, schema=_SCHEMA), about)

    def _encode(self, todo: dict[str, Case], *, region: bool, tokens: bool) -> Iterator[tuple[str, Vectors]]:
        """Each case as it is done. Its scans follow one another, named by key."""
        if not isinstance(self.encoder.contract, Contract):
            yield from self._encode_volumes(todo, region=region, tokens=tokens)
            return
        how = How(
            level="region" if region and any(c.region for c in todo.values()) else "slice",
            pooling=_ALL,
        )
        weights: dict[str, list[Vector]] = {}

        def scans() -> Iterator[Scan]:
            for key, case in todo.items():
                weights[key] = []
                try:
                    yield from self._scans(key, case, region, weights[key])
                except HilumError as error:
                    yield Scan(key, "", "", None, reason=plain_reason(error, case))

        keep = np.float16 if tokens else None
        found = encode_scans(self.encoder, scans(), how, self.batch_size, num_threads=self.num_threads, keep=keep)
        for key, group in itertools.groupby(found, key=lambda one: one.scan.series):
            yield key, self._gather(key, todo[key], list(group), weights.pop(key), tokens)

    def _encode_volumes(self, todo: dict[str, Case], *, region: bool, tokens: bool) -> Iterator[tuple[str, Vectors]]:
        """Cases of a volume encoder, those of one scan together: the scan is encoded once and its tokens serve all of them."""
        scans: dict[str, dict[str, Case]] = {}
        for key, case in todo.items():
            scans.setdefault(hash_json(self._scan(case)), {})[key] = case

        def volumes() -> Iterator[Scan]:
            for name, cases in scans.items():
                case = next(iter(cases.values()))
                try:
                    yield Scan(name, "", "", self.reader.volume(case))
                except HilumError as error:
                    yield Scan(name, "", "", None, reason=plain_reason(error, case))

        pooled = region and any(case.region is not None for case in todo.values())
        how = How(level="volume", pooling=_ALL, max_patches=self.max_patches)
        keep = np.float32 if pooled else np.float16 if tokens else None
        for found in encode_scans(self.encoder, volumes(), how, 1, num_threads=self.num_threads, keep=keep):
            cases = scans[found.scan.series]
            if tokens and not found.reason:
                key, case = next(iter(cases.items()))
                self._save(key, case, found)
            for key, case in cases.items():
                inside = case.region if region else None
                yield key, self._of_volume(found, case) if inside else _row([found], _NOTHING)

    def _of_volume(self, found: Encoded, case: Case) -> Vectors:
        """The region of a case, pooled from the tokens of its scan."""
        if found.reason:
            return _refused(found.reason)
        try:
            mask = self.reader.region(case, found.scan.image)
            check_same_grid(found.scan.image, mask)
        except HilumError as error:
            return _refused(plain_reason(error, case))
        (part,), (k, j, i), affine = found.parts, found.grid, found.affine
        assert affine is not None
        assert part.patches is not None
        share = volume_region_weights(mask, affine, (k, j, i)).get(1)
        if share is None:
            return _refused("contract: the mask covers no token of the volume; expected at least one voxel inside")
        cls, patches = torch.from_numpy(part.cls)[None], torch.from_numpy(part.patches)[None]
        pooled = pool(Tokens(cls, cls[:, :0], patches), "mean+max", share[None])[0].numpy()
        mean, largest = np.split(pooled, 2)
        return Vectors({"class": part.cls, "mean": mean, "max": largest}, share.numpy())

    def _scans(self, key: str, case: Case, region: bool, weights: list[Vector]) -> Iterator[Scan]:
        """Slices of a case: without a region they are one scan, of a region a scan each."""
        vol = self.reader.volume(case)
        mask = self.reader.region(case, vol) if region and case.region is not None else None
        if mask is None:
            chosen = case.slices or chosen_slices(vol.shape[0], self.max_slices if region else None)
            yield Scan(key, "", "", take_slices(vol, chosen))
            return
        touched = [int(z) for z in np.flatnonzero(mask.voxels.any((1, 2)))]
        chosen = case.slices or [touched[n] for n in chosen_slices(len(touched), self.max_slices)]
        seen = 0
        for z in chosen:
            share = region_weights(mask.voxels[z] > 0, self.encoder.grid, self.encoder.slice_contract).numpy()
            if share.any():
                seen += 1
                weights.append(share)
                yield Scan(key, "", "", take_slices(vol, (z,)), take_slices(mask, (z,)))
        if not seen:
            raise ContractError("the region lies outside of what the model sees of its slices; expected a voxel inside")

    def _gather(self, key: str, case: Case, group: list[Encoded], weights: list[Vector], tokens: bool) -> Vectors:
        """The slices of a case as one row."""
        row = _row(group, np.concatenate(weights) if weights else _NOTHING)
        if tokens and not row.reason:
            self._save(key, case, _joined(group))
        return row

    def _save(self, key: str, case: Case, found: Encoded) -> None:
        """Patch tokens as a side file, float16 where they fit."""
        parts = [replace(part, patches=kept(np.asarray(part.patches), np.float16)) for part in found.parts]
        encoder = self.encoder
        facts = {"model": encoder.name, "contract": encoder.contract.hash, "weights": encoder.weights_hash}
        path = self._token_path(key, case)
        save_patches(path, replace(found, parts=parts), encoder, facts | {"layer": "last", "series": path.stem})


def _row(group: list[Encoded], weights: Vector) -> Vectors:
    """Scans or slices of a case as one row."""
    if reason := next((one.reason for one in group if one.reason), ""):
        return _refused(reason)
    parts = [part for one in group for part in one.parts]
    cls = np.stack([part.cls for part in parts])
    rest = np.stack([part.vector for part in parts])
    rest = rest[:, cls.shape[1] if parts[0].region is None else 0 :]
    mean, largest = np.split(rest, 2, axis=1)
    made = {
        "class": cls.mean(0, dtype=np.float64), "mean": mean.mean(0, dtype=np.float64), "max": largest.max(0)
    }  # fmt: skip
    return Vectors({name: vector.astype(np.float32) for name, vector in made.items()}, weights)


def _refused(reason: str) -> Vectors:
    return Vectors(dict.fromkeys(PARTS, _NOTHING), _NOTHING, reason)


def plain_reason(error: HilumError, case: Case) -> str:
    """What an error says, without the names of files, which may name a person: reasons stand in results."""
    text = str(error)
    sources = [case.scan] + ([case.region.source] if case.region and case.region.source else [])
    for path in [path for source in sources for path in (*source.files, source.path)]:
        text = re.sub(rf"{re.escape(str(path))}\S*", "the file", text)
        text = re.sub(rf"(?<!\w){re.escape(path.name)}(?!\w)", "the file", text)
    return text


def check_unit(task: Task, encoder: Encoder) -> None:
    """UsageError when an encoder has no features of the unit of a task."""
    if task.unit == "slice" and not isinstance(encoder.contract, Contract):
        raise UsageError(
            f"{encoder.name} encodes volumes, and {task.id} asks about single slices; choose the 3D track, or an encoder of "
            "slices"
        )
    have = set(encoder.contract.modalities)
    wanted = {name.strip() for name in task.modality.split(",")}
    if wanted <= {"CT", "MR"} and not wanted <= have:
        raise UsageError(f"{encoder.name} sees {' and '.join(sorted(have))}; {task.id} is {task.modality}")


def take_slices(vol: Volume, chosen: Sequence[int]) -> Volume:
    """Some slices of a volume. Its affine stays right when they are evenly spaced; of others it is that of the first."""
    chosen = list(chosen)
    if chosen and not -1 < min(chosen) <= max(chosen) < vol.shape[0]:
        raise ContractError(f"slices {min(chosen)} to {max(chosen)} were asked for; the scan has {vol.shape[0]}")
    if len(chosen) == vol.shape[0]:
        return vol
    affine = vol.affine
    if affine is not None:
        step = (chosen[-1] - chosen[0]) / (len(chosen) - 1) if len(chosen) > 1 else 1.0
        affine = affine.copy()
        affine[:3, 3] += affine[:3, 0] * chosen[0]
        affine[:3, 0] *= step
    return replace(vol, voxels=vol.voxels[chosen], affine=affine)


def _joined(group: list[Encoded]) -> Encoded:
    """The slices of a case, encoded one by one, as one scan for the side file."""
    if len(group) == 1:
        return group[0]
    first = group[0]
    parts = [replace(one.parts[0], slice=n) for n, one in enumerate(group)]
    volumes = [one.scan.image for one in group]
    affine = volumes[0].affine
    if affine is not None and volumes[-1].affine is not None:
        affine = affine.copy()
        affine[:3, 0] = (volumes[-1].affine[:3, 3] - affine[:3, 3]) / (len(volumes) - 1)
    whole = replace(volumes[0], voxels=np.concatenate([vol.voxels for vol in volumes]), affine=affine)
    return replace(first, scan=replace(first.scan, volume=whole, mask=None), parts=parts)
