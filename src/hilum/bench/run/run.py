"""`hilum bench run`: tasks × encoders × protocols → predictions and scores, in one folder that the same command goes on with.

RESULTS/results.json                settings, models, tasks, what was left out, versions: no path, no identifier
RESULTS/splits/TASK.csv             case, patient, split (keyed hashes)
RESULTS/features/…                  `hilum.bench.run.features`; they may be deleted
RESULTS/predictions/….parquet       one file for each task, model, features, head, protocol (`hilum.bench.predictions`)
RESULTS/scores.parquet              a row a file of predictions

A file of predictions is kept when nothing that it was made from has changed: voxels, cases, patients, split, labels,
metric, weights, contract, head, protocol, seeds. Another model may be added to the same folder later.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hilum.archive.privacy import Key, read_key
from hilum.bench.nuisances import Nuisances, nuisances_of
from hilum.bench.predictions import write_predictions
from hilum.bench.run.erasing import with_eraser
from hilum.bench.run.features import CaseFeatures, FeatureCache, check_unit
from hilum.bench.run.fitting import LabelMaps, Material, Names, fit_trials
from hilum.bench.run.heads import save_head
from hilum.bench.run.joined import JoinedCache, JoinedEncoder, JoinedFeatures, join_models
from hilum.bench.run.protocols import (
    TOKEN_FEATURES,
    erased_names,
    expand_protocols,
    heads_of,
    kinds_of,
    make_trials,
    patches_at_once,
    why_none,
)
from hilum.bench.run.scans import CaseReader
from hilum.bench.run.scores import write_scores
from hilum.bench.run.suites import Asked, open_task
from hilum.bench.splits import hash_case, write_split
from hilum.bench.task import Case, Found, Task
from hilum.encode.encoder import Encoder
from hilum.encode.volume_contract import VolumeContract
from hilum.encode.zoo import load_encoder
from hilum.errors import HilumError, InputError, UsageError
from hilum.records import hash_json, machine, read_json, read_table, table_metadata, versions, write_json
from hilum.settings import differences, to_dict
from hilum.terminal import Progress, few


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What decides the numbers. One folder holds results of one of these.

    protocols      as `hilum.bench.run.protocols` lists them
    heads          instead of the usual head of classification, multi-label, regression and survival
    features       what heads on vectors see: class, mean, max or some with +; "": the contract's pooling, mean for regions
    seeds          head seeds of a fit
    draws          of training cases, in few-shot and fraction
    seed           of everything random
    max_slices     evenly spaced slices of a volume instead of all; dense tasks always see all
    num_resamples  of the intervals
    allow_missing  go on when cases are missing or refused, and say so in the results; else stop
    save_heads     keep heads on patch tokens of protocol full for `hilum predict`: heads/<the name of their predictions>
    """

    protocols: tuple[str, ...] = ("full",)
    heads: tuple[str, ...] = ()
    features: str = ""
    seeds: int = 5
    draws: int = 5
    seed: int = 0
    max_slices: int | None = None
    num_resamples: int = 10_000
    allow_missing: bool = False
    save_heads: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "protocols", expand_protocols(self.protocols))
        if min(self.seeds, self.draws, self.num_resamples) < 1:
            raise UsageError("seeds, draws and resamples must be at least 1")


AnyEncoder = Encoder | JoinedEncoder
AnyCache = FeatureCache | JoinedCache
AnyFeatures = CaseFeatures | JoinedFeatures

_DENSE = ("segmentation", "localisation")

# A folder of results may grow in these: other models, tasks, protocols and heads are other files.
_MAY_GROW = ("protocols", "heads", "allow_missing", "save_heads")


def run_bench(
    tasks: Sequence[Asked],
    models: Sequence[str],
    data: str | Path,
    out: str | Path,
    settings: BenchSettings | None = None,
    *,
    device: str = "cpu",
    precision: str = "float32",
    batch_size: int = 32,
    num_threads: int = 1,
    key: Key | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode, fit, predict and score; what is finished is kept. Returns results.json with the scores as rows.

    tasks    from `hilum.bench.run.suites.choose_tasks`
    models   names that `hilum.encode.zoo.load_encoder` takes: folders, released models, pixels, random:FOLDER; LABEL=NAME
             calls it LABEL in files and tables; A+B joins the vectors of two labels (`hilum.bench.run.joined`)
    data     folder of the data sets

    The result also has "complete": whether nothing was left out of these tasks on these models; results.json keeps what
    earlier runs in the folder left out of others.

    InputError when cases are missing or refused and `allow_missing` is off: nothing is left out silently.
    """
    began = time.monotonic()
    bench = _Bench(Path(data), Path(out), settings or BenchSettings(), key or read_key(), progress)
    opened = [bench.open_task(asked) for asked in tasks]
    opened.sort(key=lambda pair: pair[0].kind not in _DENSE)  # their tokens give the vectors of others, too
    names = set()
    caches: dict[str, FeatureCache] = {}
    for name in sorted(models, key=lambda name: "+" in split_label(name)[1]):  # what joins others comes after them
        label, source = split_label(name)
        if joined := join_models(label, source, caches):
            bench.note_model(source, joined.encoder)
            names.add(joined.encoder.name)
            for task, found in opened:
                bench.run_task(task, found, joined, str(joined.encoder.device))
            continue
        encoder = load_encoder(source, device=device, precision=precision, seed=bench.settings.seed)
        encoder.name = label or encoder.name
        cache = FeatureCache(
            bench.out / "features", encoder, bench.settings.max_slices, batch_size, num_threads, bench.reader
        )
        caches[encoder.name] = cache
        bench.note_model(source, encoder)
        names.add(encoder.name)
        for task, found in opened:
            bench.run_task(task, found, cache, str(encoder.device))
    bench.record["left_out"] = [row for row in bench.record["left_out"] if not row.get("unscored")]
    scores = write_scores(
        bench.out, num_resamples=bench.settings.num_resamples, seed=bench.settings.seed, progress=progress,
        data={task: str(about["data_hash"]) for task, about in bench.record["tasks"].items()},
        left_out=bench.leave_unscored,
    )  # fmt: skip
    bench.record["seconds"] = round(time.monotonic() - began, 1)
    bench.write_record()
    ours = {(task.id, name) for task, _ in opened for name in names}
    complete = not any((row["task"], row["model"]) in ours for row in bench.record["left_out"])
    return {**bench.record, "scores": scores, "complete": complete}


def split_label(name: str) -> tuple[str, str]:
    """ "mine=run/export" → ("mine", "run/export"); without a label ("", name)."""
    label, mark, source = name.partition("=")
    return (label, source) if mark and label and "/" not in label and not Path(name).exists() else ("", name)


class _Bench:
    """One run in one folder."""

    def __init__(self, data: Path, out: Path, settings: BenchSettings, key: Key, progress: Progress | None) -> None:
        self.data, self.out, self.settings, self.key, self.progress = data, out, settings, key, progress
        self.reader = CaseReader()
        self.sources: dict[str, str] = {}  # how each model was named
        self.record = _open_record(out, settings, key)

    def write_record(self) -> None:
        write_json(self.out / "results.json", self.record)

    def open_task(self, asked: Asked) -> tuple[Task, Found]:
        """A task and its cases with their split, written and hashed. InputError when some are missing."""
        cache = self.out / "features" / "labels"
        task, found = open_task(asked, self.data, seed=self.settings.seed, cache=cache, progress=self.progress)
        lost = sum(problem.cases for problem in found.problems)
        check = f"hilum bench check {asked if isinstance(asked, Path) else task.id}"
        if not found.cases:
            said = "; ".join(f"{p.path}: {p.found}, expected {p.expected}" for p in found.problems[:3])
            raise InputError(f"{task.id} has no case in this folder ({said}); see: {check}")
        if lost and not self.settings.allow_missing:
            said = few((f"{p.path}: {p.found}" for p in found.problems), 3)
            raise InputError(
                f"{task.id}: {lost} cases are missing or malformed ({said}). See all: {check}; "
                "or go on without them: --allow-missing"
            )
        split_hash = write_split(self.out / "splits" / f"{_slug(task.id)}.csv", task, found.cases, self.key)
        self.record["tasks"][task.id] = to_dict(task) | {
            "num_cases": dict(Counter(case.split for case in found.cases)),
            "num_patients": len({case.patient for case in found.cases}),
            "split_hash": split_hash,
            "data_hash": _data_hash(task, found, split_hash, self.key),
            "num_missing": lost,
        }
        self.write_record()
        return task, found

    def note_model(self, name: str, encoder: AnyEncoder) -> None:
        """UsageError when results of another encoder bear this name: files, tables and figures know models by name."""
        self.sources[encoder.name] = name
        now = {"weights": encoder.weights_hash, "contract": encoder.contract.hash, "precision": encoder.precision}
        known = self.record["models"].get(encoder.name, now)
        if changed := [fact for fact, value in now.items() if known[fact] != value]:
            raise UsageError(
                f"{self.out.name} holds results of a model {encoder.name} with other {' and '.join(changed)}; give this "
                "one another name, --model LABEL=MODEL, or choose a new folder"
            )
        self.record["models"][encoder.name] = {
            "weights": encoder.weights_hash,
            "contract": encoder.contract.hash,
            "contract_is": to_dict(encoder.contract),
            "precision": encoder.precision,
            "random": self._is_random(name, encoder),
        }
        self.write_record()

    def _is_random(self, name: str, encoder: AnyEncoder) -> bool:
        """Of models that are joined: all of them."""
        if isinstance(encoder, Encoder):
            return name.startswith("random:")
        return all(self.record["models"][part.name]["random"] for part in encoder.parts)

    def run_task(self, task: Task, found: Found, cache: AnyCache, device: str) -> None:
        """All protocols and heads of one task on one encoder."""
        encoder = cache.encoder
        self.record["left_out"] = [
            row for row in self.record["left_out"] if (row["task"], row["model"]) != (task.id, encoder.name)
        ]
        joined = isinstance(encoder, JoinedEncoder)
        try:
            for part in encoder.parts if isinstance(encoder, JoinedEncoder) else (encoder,):
                check_unit(task, part)
        except UsageError as error:
            self._leave_out(task, encoder, str(error), len(found.cases))
            return
        wanted = [
            (protocol, features, head)
            for protocol in self.settings.protocols
            if task.kind in kinds_of(protocol)
            for features, head in heads_of(protocol, task, self.settings.heads)
        ]
        if reason := why_none(self.settings.protocols, task):
            self._leave_out(task, encoder, reason, 0)
        for one in [one for one in wanted if one[1] == TOKEN_FEATURES]:
            protocol, _, head = one
            if joined or erased_names(protocol) is not None:
                why = "joined models have vectors only" if joined else "only vectors are erased"
                self._leave_out(task, encoder, f"{head}, {protocol}: a head on patch tokens; {why}", 0)
                wanted.remove(one)
        for most in dict.fromkeys(patches_at_once(protocol) for protocol, _, _ in wanted):
            if most and not isinstance(encoder.contract, VolumeContract):
                what = "joins models" if joined else "encodes slices"
                self._leave_out(task, encoder, f"{what}; the protocol chunked is of encoders of volumes", 0)
                continue
            some = [one for one in wanted if patches_at_once(one[0]) == most]
            in_blocks = replace(cache, max_patches=most) if most and isinstance(cache, FeatureCache) else cache
            self._run_heads(task, found, in_blocks, some, device)

    def _run_heads(
        self, task: Task, found: Found, cache: AnyCache, wanted: Sequence[tuple[str, str, str]], device: str
    ) -> None:
        """(protocol, features, head) of one task, on one cache."""
        encoder = cache.encoder
        tokens = any(features == TOKEN_FEATURES for _, features, _ in wanted)
        erased = any(erased_names(protocol) is not None for protocol, _, _ in wanted)
        if task.kind == "retrieval" and not erased:  # train cases only teach what is to be erased
            found = replace(found, cases=tuple(case for case in found.cases if case.split == "test"))
        features = cache.features(task, found.cases, tokens=tokens, progress=self.progress)
        material, cases = self._material(task, found, features, encoder)
        nuisances = nuisances_of(cases) if erased else []
        for protocol, pooled, head in wanted:
            names = Names(
                model=encoder.name, contract=encoder.contract.hash, features=pooled or self._pooling(task, encoder), head=head,
                protocol=protocol,
            )  # fmt: skip
            self._predict(material, names, encoder, device, nuisances)

    def _pooling(self, task: Task, encoder: AnyEncoder) -> str:
        if self.settings.features:
            return self.settings.features
        return "mean" if task.unit == "region" else encoder.contract.pooling

    def _leave_out(self, task: Task, encoder: AnyEncoder, reason: str, cases: int) -> None:
        self.record["left_out"].append({"task": task.id, "model": encoder.name, "cases": cases, "reason": reason})
        self.write_record()

    def leave_unscored(self, about: dict[str, Any], reason: str) -> None:
        """Predictions without a score; found anew each time."""
        reason = f"{about['head']}, {about['protocol']}: {reason}"
        row = {"task": about["task"], "model": about["model"], "cases": 0, "reason": reason}
        self.record["left_out"].append(row | {"unscored": True})

    def _material(
        self, task: Task, found: Found, features: AnyFeatures, encoder: AnyEncoder
    ) -> tuple[Material, list[Case]]:
        """Cases that have features. InputError when some were refused, unless that is allowed."""
        refused = Counter(reason for reason in features.reasons if reason)
        for reason, number in refused.items():
            self._leave_out(task, encoder, reason, number)
        if refused and not self.settings.allow_missing:
            reason, number = refused.most_common(1)[0]
            raise InputError(
                f"{encoder.name} refuses {refused.total()} of {len(found.cases)} cases of {task.id}; {number} of them: "
                f"{reason}. Two models compare only on the same cases; go on without these by --allow-missing"
            )
        kept = [n for n, reason in enumerate(features.reasons) if not reason]
        cases = [found.cases[n] for n in kept]
        material = Material(
            task=task,
            cases=[hash_case(task, case, self.key) for case in cases],
            patients=[self.key.hash("patient", case.patient) for case in cases],
            splits=[str(case.split) for case in cases],
            targets=[self._target(task, case) for case in cases],
            features=features.take(kept),
            truth=LabelMaps(task, cases, self.reader),
            contents=[self._content(task, case, features.keys[n]) for n, case in zip(kept, cases)],
        )
        return material, cases

    def _content(self, task: Task, case: Case, encoded: str) -> str:
        if task.kind != "segmentation" or case.region is None or case.region.source is None:
            return encoded
        return hash_json([encoded, self.reader.content(case.region.source), case.region.values])

    def _target(self, task: Task, case: Case) -> tuple[float, ...]:
        """Of localisation in LPS mm, of segmentation the true voxels of each class; else as the case has it."""
        if task.kind == "segmentation":
            labels = self.reader.truth(task, case).voxels
            counts = np.bincount(labels.ravel(), minlength=len(task.classes) + 1)
            return tuple(float(n) for n in counts[1 : len(task.classes) + 1])
        if task.kind != "localisation":
            return case.target
        affine = self.reader.volume(case).affine
        if affine is None:
            raise InputError(f"{task.id}: a scan has no geometry, and a place in mm is asked for")
        x, y, z = (affine @ [*case.target, 1.0])[:3]
        return float(x), float(y), float(z)

    def _predict(
        self, material: Material, names: Names, encoder: AnyEncoder, device: str, nuisances: list[Nuisances]
    ) -> None:
        """Fit one head by one protocol, unless its predictions are there. `nuisances` of each case, for `erased`."""
        task, settings = material.task, self.settings
        path = self.out / "predictions" / f"{prediction_name(task.id, names)}.parquet"
        data = self.record["tasks"][task.id]["data_hash"]
        to_erase = erased_names(names.protocol)
        inputs = hash_json(
            [material.hash, data, encoder.weights_hash, encoder.precision, vars(names), settings.seeds, settings.draws,
             settings.seed, settings.max_slices, *([] if to_erase is None else [nuisances])]
        )  # fmt: skip
        save = None
        kept = (names.features, names.protocol) == (TOKEN_FEATURES, "full")
        if settings.save_heads and kept and isinstance(encoder, Encoder):
            folder, slices = self.out / "heads" / path.stem, settings.max_slices
            save = partial(save_head, folder, material=material, names=names, encoder=encoder,
                           loads_as=self.sources[encoder.name], seed=settings.seed, max_slices=slices)  # fmt: skip
        there = path.is_file() and table_metadata(read_table(path, ["task"])).get("inputs") == inputs
        if there and (save is None or (folder / "head.json").exists()):
            return
        taken: dict[str, Any] = {}
        try:
            if to_erase is not None:
                material, taken = with_eraser(material, names.features, nuisances, to_erase)
            trials = make_trials(
                names.protocol, task.kind, material.splits, material.targets, material.patients,
                draws=settings.draws, seed=settings.seed,
            )  # fmt: skip
            rows = fit_trials(
                material,
                trials,
                names,
                seeds=settings.seeds,
                seed=settings.seed,
                device=device,
                progress=self.progress,
                keep=save,
            )
        except (ValueError, HilumError) as error:  # too few cases of a class, no event: what cannot be learnt from
            path.unlink(missing_ok=True)  # predictions of other cases or labels
            self._leave_out(task, encoder, f"{names.head}, {names.protocol}: {error}", 0)  # cases are all there
            return
        about = {
            "inputs": inputs,
            "data": data,
            "classes": list(task.classes),
            "metric": task.metric,
            "versions": versions(),
            **({"erased": taken} if taken else {}),
        }
        write_predictions(path, rows, about)


def _data_hash(task: Task, found: Found, split_hash: str, key: Key) -> str:
    """What all models of a task share: question, cases, split, labels."""
    labels = sorted([hash_case(task, case, key), *map(str, case.target)] for case in found.cases)
    return hash_json([task.kind, task.metric, task.classes, split_hash, labels])


def prediction_name(task: str, names: Names) -> str:
    """The name of a file of predictions."""
    return "__".join(_slug(part) for part in (task, names.model, names.features, names.head, names.protocol))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-.+@" else "-" for c in name)


def _open_record(out: Path, settings: BenchSettings, key: Key) -> dict[str, Any]:
    """results.json of a new folder, or of one that goes on. UsageError when it has predictions by other settings or another
    key; a run that stopped before its first prediction binds nobody."""
    now = {
        "format": "hilum-bench-results",
        "version": 1,
        "settings": to_dict(settings),
        "key": key.fingerprint,
        "models": {},
        "tasks": {},
        "left_out": [],
        "versions": versions(),
        "machine": machine(),
    }
    if not (out / "results.json").exists():
        if out.exists() and {path.name for path in out.iterdir()} - {"features", "splits"}:
            raise UsageError(f"{out} is not empty and holds no results; choose a new folder")
        return now
    old = read_json(out / "results.json")
    if not isinstance(old, dict) or old.get("format") != "hilum-bench-results" or old.get("version") != 1:
        raise InputError(f"{out}/results.json is none of this hilum's; choose another folder")
    if changed := differences(_fixed(old), _fixed(now)):
        if not any((out / "predictions").glob("*.parquet")):
            return now
        raise UsageError(
            f"{out} was made with other settings ({'; '.join(changed)}); choose a new folder, or give the same"
        )
    return now | {name: old[name] for name in ("models", "tasks", "left_out")}


def _fixed(record: dict[str, Any]) -> dict[str, Any]:
    """What all results of one folder share."""
    settings = {name: value for name, value in record["settings"].items() if name not in _MAY_GROW}
    return settings | {"key": record["key"]}
