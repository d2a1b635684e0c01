"""Heads on patch tokens that a benchmark fitted, kept for `hilum predict`."""

from pathlib import Path

from hilum.bench.run.fitting import Material, Names
from hilum.encode.encoder import Encoder
from hilum.probe.heads.head import Head
from hilum.probe.saved import write_head
from hilum.probe.saved_tokens import token_features


def save_head(
    folder: Path,
    head: Head,
    material: Material,
    names: Names,
    encoder: Encoder,
    loads_as: str,
    seed: int,
    max_slices: int | None,
) -> None:
    """Write a head that was fitted on the training cases of a task; its scores stand in the results beside it.

    loads_as  how the encoder was named
    """
    task = material.task
    classes = tuple(task.classes)
    if task.kind == "classification":
        classes = tuple(task.classes[int(c)] for c in head.classes_)
    elif task.kind not in ("multilabel", "segmentation"):
        classes = ()
    trained = [n for n, split in enumerate(material.splits) if split == "train"]
    training = {
        "task": task.id,
        "cases": len(trained),
        "patients": len({material.patients[n] for n in trained}),
        **{n: repr(v) for n, v in head.get_params().items() if n not in ("task", "device")},
    }
    dense = task.kind in ("segmentation", "localisation")
    features = token_features(encoder, loads_as, seed, task.unit, None if dense else max_slices)
    write_head(
        folder, head, name=names.head, target=task.title, classes=classes, features=features, scores={}, training=training
    )  # fmt: skip
