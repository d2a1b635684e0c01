"""The phantom benchmark: a twin of every family of tasks of CuriaBench and VoxelFM, offline, in minutes, with known truth.

Its tasks read as any others: `PHANTOM_TASKS`, `read_phantom(task, root)`. Patients are split by number, 50 % to train, 15 % to
choose settings, 35 % to test; they are drawn independently, so that any split is as good.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hilum.archive.phantom import ORGAN, ORGANS
from hilum.bench.phantom.scanners import SHOWN
from hilum.bench.phantom.scans import SOLID, PhantomSettings
from hilum.bench.task import Case, Dataset, Found, Problem, Region, Source, Split, Task
from hilum.errors import InputError
from hilum.records import read_json
from hilum.settings import from_dict

PHANTOM = Dataset(
    name="phantom",
    title="Synthetic bodies and heads of hilum",
    url="https://hilum.invalid/none: written by hilum bench run --suite phantom",
    licence="Apache-2.0",
    layout="phantom.json\nbody/B0000/{ct,mr,organs,solid,tumour,nodule,scanner}.nii.gz, {liver,spine}{,-organs}.nii.gz,\n"
    "  labels.json\n"
    "head/H0000/ct.nii.gz, labels.json",
)

ORGAN_CLASSES = tuple(name for name in ORGANS[1:] if name != "lesion")
FINDINGS = ("no gallbladder", "single kidney", "horseshoe kidney", "calcified aorta", "contrast medium", "obesity")
REGIONS_A_PATIENT = 6
DENSE_STEP = {"segmentation": 6}  # every sixth body: heads on all tokens take long on a CPU
RETRIEVAL_TRAIN = 0.4  # of the patients teach what scanners do; enough others are judged for 99 to lack each finding
SHARE_TRAIN, SHARE_VAL = 0.50, 0.15
_SPLIT_RULE = "by number of the patient: 50 % train, 15 % val, 35 % test"


def _task(name: str, title: str, kind: Any, unit: Any, metric: str, label_rule: str, **more: Any) -> Task:
    return Task(
        id=f"phantom:{name}", title=title, dataset="phantom", target=name, kind=kind, unit=unit, metric=metric,
        label_rule=label_rule, split_rule=more.pop("split_rule", _SPLIT_RULE), modality=more.pop("modality", "CT"), **more,
    )  # fmt: skip


_ORGAN_RULE = "the painted organ; its slice is drawn from those where it covers at least 30 % of its largest area"
_ORGANS: dict[str, Any] = {"classes": ORGAN_CLASSES, "chance": 1 / len(ORGAN_CLASSES)}

PHANTOM_TASKS: tuple[Task, ...] = (
    _task("organ", "Organ of a region, CT", "classification", "region", "balanced_accuracy", _ORGAN_RULE, **_ORGANS),
    _task(
        "organ-mr", "Organ of a region, MR", "classification", "region", "balanced_accuracy", _ORGAN_RULE,
        modality="MR", **_ORGANS,
    ),
    _task(
        "organ-ct-to-mr", "Organ of a region, learnt on CT and asked on MR", "classification", "region", "balanced_accuracy",
        _ORGAN_RULE + "; train and val cases are CT, test cases MR of other patients", modality="CT, MR", **_ORGANS,
    ),
    _task(
        "age", "Age from a slice", "regression", "slice", "r2",
        "years; a slice of the spine at 2 mm: bone and muscle fade, aortas widen", chance=0.0,
    ),
    _task(
        "malignancy", "Malignancy of a liver lesion", "classification", "region", "auroc",
        "painted: malignant lesions are lobulated and uneven, with a bright rim; a slice at 2 mm",
        classes=("benign", "malignant"), chance=0.5,
    ),
    _task(
        "stenosis", "Narrowing of the spinal canal, three grades", "classification", "region", "auroc",
        "bone fills 0, 20 or 40 % ± 16 of the canal's radius; a slice at 2 mm",
        classes=("none", "moderate", "severe"), chance=0.5,
    ),
    _task(
        "haemorrhage", "Bleeding in a slice of a head", "classification", "slice", "auroc",
        "painted in every second head, 40 to 90 HU; every head has a calcification", classes=("none", "bleeding"), chance=0.5,
    ),
    _task(
        "findings", "Findings of a body", "multilabel", "volume", "macro_auroc", "of the painted anatomy",
        classes=FINDINGS, chance=0.5,
    ),
    _task(
        "survival", "Survival with a liver lesion", "survival", "region", "c_index",
        "days until death or censoring; hazard 0.35 · exp(2 · risk) a year, and the lesion is 60 HU brighter for each unit of "
        "risk, which is a standard normal number; a slice at 2 mm", chance=0.5,
    ),
    _task(
        "retrieval", "Bodies with the same finding on other scanners", "retrieval", "volume", "recall_at_10",
        "painted, one in each body; vendor, kernel, field of view and thickness are drawn independently of it and decide most "
        "of how the image looks: --protocol erased takes them out", classes=SHOWN,
        split_rule="by number of the patient: the first 40 % teach what scanners do, 60 % are judged",
    ),
    _task(
        "lesion-centre", "Centre of a lung nodule", "localisation", "volume", "mean_distance_mm",
        "as painted, in a piece of a chest that holds it somewhere; the middle of the piece is 42 mm off on average"
    ),
    _task(
        "solid-organs", "Segmentation of six organs", "segmentation", "volume", "dice", "as painted",
        classes=tuple(SOLID), chance=0.0,
    ),
)  # fmt: skip


def read_phantom(task: Task, root: Path) -> Found:
    """Cases of a phantom task. InputError when `root`/phantom was not written, or not to its end."""
    folder = root / "phantom"
    if not (folder / "phantom.json").is_file():
        raise InputError(f"{folder} holds no phantom scans; hilum bench run --suite phantom --data {root} writes them")
    record = {k: v for k, v in read_json(folder / "phantom.json").items() if k not in ("format", "version")}
    settings = from_dict(PhantomSettings, record, f"{folder}/phantom.json")
    part = "head" if task.target == "haemorrhage" else "body"
    cases: list[Case] = []
    problems: list[Problem] = []
    total = settings.num_heads if part == "head" else settings.num_patients
    for number in range(0, total, DENSE_STEP.get(task.kind, 1)):
        name = f"{part[0].upper()}{number:04d}"
        try:
            labels = read_json(folder / part / name / "labels.json")
        except InputError as error:
            problems.append(Problem(path=f"{part}/{name}", found=str(error), expected="labels.json", cases=1))
            continue
        split = _split(number, total)
        if task.kind == "retrieval":
            split = "train" if number < RETRIEVAL_TRAIN * total else "test"
        cases += _READERS[task.target](task, folder / part / name, labels, split)
    if not cases:
        problems.append(Problem(path=part, found="no case", expected="at least one", fatal=True))
    return Found(cases=tuple(cases), problems=tuple(problems))


def _split(number: int, total: int) -> Split:
    if number < SHARE_TRAIN * total:
        return "train"
    return "val" if number < (SHARE_TRAIN + SHARE_VAL) * total else "test"


def _case(
    folder: Path, split: Split, target: tuple[float, ...], *, suffix: str = "", modality: str = "CT", **more: Any
) -> Case:
    scan = Source(path=folder / f"{modality.lower()}.nii.gz")
    name = "/".join(part for part in (folder.name, suffix) if part)
    return Case(id=name, patient=folder.name, scan=scan, modality=modality, target=target, split=split, **more)


def _region(folder: Path, organ: str) -> Region:
    return Region(source=Source(path=folder / "organs.nii.gz"), values=(ORGAN[organ],))


def _organs(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    """Some organs of a patient, each in one of its slices; which ones does not depend on the modality."""
    modality = {"organ": "CT", "organ-mr": "MR"}.get(task.target) or ("MR" if split == "test" else "CT")
    rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
    present = [name for name in ORGAN_CLASSES if labels["areas"][name]]
    for name in rng.permutation(present)[:REGIONS_A_PATIENT]:
        areas = {int(z): area for z, area in labels["areas"][name].items()}
        z = int(rng.choice([z for z, area in areas.items() if area >= 0.3 * max(areas.values())]))
        target = (float(ORGAN_CLASSES.index(name)),)
        region = _region(folder, str(name))
        yield _case(
            folder, split, target, suffix=f"{modality}/{name}/{z}", modality=modality, slices=(z,), region=region
        )


def _window(folder: Path, split: Split, target: float, part: str, organ: str = "") -> Case:
    """The middle of the three slices at 2 mm."""
    region = Region(source=Source(path=folder / f"{part}-organs.nii.gz"), values=(ORGAN[organ],)) if organ else None
    scan = Source(path=folder / f"{part}.nii.gz")
    return Case(
        id=f"{folder.name}/{part}", patient=folder.name, scan=scan, modality="CT", target=(target,), slices=(1,),
        region=region, split=split,
    )  # fmt: skip


def _age(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    yield _window(folder, split, labels["age"], "spine")


def _malignancy(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    if labels["lesion"]:
        yield _window(folder, split, float(labels["malignant"]), "liver", "lesion")


def _stenosis(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    yield _window(folder, split, float(labels["stenosis"]), "spine", "spinal_cord")


def _haemorrhage(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    yield _case(folder, split, (float(labels["haemorrhage"]),), slices=(labels["slice"],))


def _findings(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    yield _case(folder, split, tuple(float(labels["findings"][name]) for name in FINDINGS))


def _retrieval(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    yield Case(
        id=folder.name, patient=folder.name, scan=Source(path=folder / "scanner.nii.gz"), modality="CT", split=split,
        target=tuple(float(labels["shown"] == name) for name in SHOWN), nuisances=tuple(labels["scanner"].items()),
    )  # fmt: skip


def _survival(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    if labels["lesion"]:
        days, event = labels["survival"]
        case = _window(folder, split, 0.0, "liver", "lesion")
        yield replace(
            case,
            id=f"{folder.name}/tumour",
            scan=Source(path=folder / "tumour.nii.gz"),
            target=(float(days), float(event)),
        )


def _lesion_centre(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    k, j, i = labels["nodule"]
    scan = Source(path=folder / "nodule.nii.gz")
    yield Case(id=folder.name, patient=folder.name, scan=scan, modality="CT", target=(k, j, i), split=split)


def _solid_organs(task: Task, folder: Path, labels: dict[str, Any], split: Split) -> Iterator[Case]:
    region = Region(source=Source(path=folder / "solid.nii.gz"))
    yield _case(folder, split, (), region=region)


_READERS: dict[str, Callable[[Task, Path, dict[str, Any], Split], Iterator[Case]]] = {
    "organ": _organs,
    "organ-mr": _organs,
    "organ-ct-to-mr": _organs,
    "age": _age,
    "malignancy": _malignancy,
    "stenosis": _stenosis,
    "haemorrhage": _haemorrhage,
    "findings": _findings,
    "survival": _survival,
    "retrieval": _retrieval,
    "lesion-centre": _lesion_centre,
    "solid-organs": _solid_organs,
}
