"""The protocol `erased`: nuisances are taken out of the vectors before any head sees them, as train cases teach it."""

from dataclasses import replace
from typing import Any

import numpy as np

from hilum.bench.nuisances import Nuisances
from hilum.bench.run.fitting import Material
from hilum.errors import LabelsError
from hilum.probe.erasure import ConceptEraser, learn_nuisances, why_constant


def with_eraser(
    material: Material, pooling: str, nuisances: list[Nuisances], wanted: tuple[str, ...]
) -> tuple[Material, dict[str, Any]]:
    """The material with an eraser fitted on its train cases, and what a reader must know of it.

    nuisances  of each case
    wanted     names; () for all that vary among train cases (others are told as `constant`), but what the task asks for

    LabelsError when there is nothing to erase, a name is unknown, or there are too few patients.
    """
    task = material.task
    train = np.flatnonzero(np.array(material.splits) == "train")
    if not len(train):
        raise LabelsError(
            "no train case to learn from what is to be erased; expected some, beside those that are judged"
        )
    cases = [nuisances[n] for n in train]
    patients = [material.patients[n] for n in train]
    known = sorted({name for case in cases for name in case})
    constant = {name for name in known if why_constant([case.get(name) for case in cases], patients)}
    names = wanted or tuple(name for name in known if name not in constant and name != task.target)
    if not names or set(names) - set(known):
        asked = (
            f"{', '.join(sorted(set(names) - set(known)))} is not known of any" if names else "nothing varies among the"
        )
        raise LabelsError(f"{asked} train case; known: {', '.join(known) or 'nothing'}")
    if task.target in names:
        raise LabelsError(f"{task.target} is what {task.id} asks for; erase something else")
    coder = learn_nuisances(cases, names, patients)
    eraser = ConceptEraser().fit(material.features.vectors(pooling)[train], coder.columns(cases), patients)
    about = {
        "nuisances": list(coder.names),
        "constant": sorted(constant - set(names)),
        "num_categories": {
            name: len(values) for name, values in coder.categories.items()
        },  # a value may name a hospital
        "missing": {name: sum(case.get(name) is None for case in cases) for name in coder.names},
        "rank": eraser.rank_,
        "shrinkage": eraser.shrinkage_,
        "num_cases": eraser.num_rows_,
        "num_patients": eraser.num_patients_,
    }
    return replace(material, eraser=eraser), about
