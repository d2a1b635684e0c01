"""The heads by name. A new head is one final class (`hilum.probe.heads.head.Head`) and one line in HEADS.

The suite in `tests/contract/test_heads.py` runs over all of them. Listing them loads none.
"""

import importlib
from typing import Any

from hilum.errors import UsageError
from hilum.probe.heads.head import Head

HEADS = {  # name → module:class; docs/heads.md says which for what
    "linear": "hilum.probe.heads.linear:LinearProbe",
    "knn": "hilum.probe.heads.knn:KNNProbe",
    "linear-sgd": "hilum.probe.heads.stacked:StackedLinear",
    "mlp": "hilum.probe.heads.mlp:MLPHead",
    "cox": "hilum.probe.heads.survival:CoxHead",
    "attention": "hilum.probe.heads.attention:AttentionHead",
    "cross-attention": "hilum.probe.heads.attention:QFormerHead",
    "localisation": "hilum.probe.heads.localisation:LocalisationHead",
    "segmentation": "hilum.probe.heads.dense:SegmentationHead",
}


def head_class(name: str) -> type[Head]:
    """The class of a head. UsageError for an unknown name, listing the known."""
    if name not in HEADS:
        raise UsageError(f"unknown head '{name}'; known: {', '.join(HEADS)}")
    module, _, cls = HEADS[name].partition(":")
    found: type[Head] = getattr(importlib.import_module(module), cls)
    return found


def make_head(name: str, *, seed: int = 0, **options: Any) -> Head:
    """An unfitted head by name.

    seed     goes to heads that draw; of several it is the first
    options  of the head; None keeps its default

    UsageError for an unknown name or option, listing the known ones.
    """
    cls = head_class(name)
    known = cls().get_params()
    given = {option: value for option, value in options.items() if value is not None}
    unknown = [option for option in given if option not in known]
    if unknown:
        raise UsageError(f"head '{name}' has no option {', '.join(unknown)}; known: {', '.join(known)}")
    if "seed" in known:
        given["seed"] = seed
    return cls(**given)
