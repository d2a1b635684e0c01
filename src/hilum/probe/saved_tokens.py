"""What of a head on patch tokens is written to a folder, and how a head is made of it again (`hilum.probe.saved`)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hilum.encode.encoder import Encoder
from hilum.errors import ContractError, HilumError
from hilum.probe.heads import make_head
from hilum.probe.heads.dense import SegmentationHead
from hilum.probe.heads.head import Head
from hilum.probe.heads.token_head import TokenHead
from hilum.settings import to_dict

Array = NDArray[Any]

TOKEN_HEADS = ("attention", "cross-attention", "localisation", "segmentation")
FITTED = ("n_features_in_", "num_outputs_", "planar_", "pooled_", "whole_batches_", "num_classes_", "upscale_")
MOMENTS = ("centre_", "spread_")  # of the tokens, in segmentation


def token_features(
    encoder: Encoder, loads_as: str, seed: int, level: str, max_slices: int | None = None
) -> dict[str, Any]:
    """The `features` of `hilum.probe.saved.write_head` for a head on the patch tokens of an encoder.

    loads_as  the name that `hilum.encode.zoo.load_encoder` took, with its `seed`
    level     what a case was: "volume", "region" or "slice"
    """
    return {
        "model": encoder.name,
        "loads_as": loads_as,
        "seed": seed,
        "weights": encoder.weights_hash,
        "precision": encoder.precision,
        "contract": encoder.contract.hash,
        "contract_values": to_dict(encoder.contract),
        "level": level,
        "pooling": None,
        "across": "mean",
        "layers": [-1],
        "max_slices": max_slices,
    }


def fitted_facts(head: Head) -> dict[str, Any]:
    """What a head decided in `fit` beside its weights."""
    known = vars(head)
    return {name: known[name] for name in FITTED if name in known}


def token_tensors(head: Head) -> dict[str, Array]:
    """Weights, each (seeds, …), and moments."""
    known = vars(head)
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in known["weights_"].items()}
    return weights | {name: known[name] for name in MOMENTS if name in known}


def restore(record: dict[str, Any], tensors: dict[str, Array]) -> Head:
    """A fitted head from head.json and its tensors, computed on the CPU. ContractError when they do not fit together."""
    try:
        settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in record["settings"].items()}
        head = make_head(str(record["head"]), **(settings | {"device": "cpu"}))
        for name, value in record["fitted"].items():
            if name not in FITTED or not isinstance(value, int):
                raise ContractError(f"head.json says {name} = {value!r}, which no head has")
            setattr(head, name, value)
        for name in MOMENTS:
            if name in tensors:
                setattr(head, name, tensors[name])
        weights = {name: torch.from_numpy(values) for name, values in tensors.items() if name not in MOMENTS}
        setattr(head, "weights_", weights)  # noqa: B010 - each head declares its own
        wanted = _shapes(head)
    except (KeyError, TypeError, AttributeError, HilumError) as error:
        raise ContractError(f"head.json does not describe a {record.get('head')} head: {error}") from None
    found = {name: tuple(tensor.shape[1:]) for name, tensor in weights.items()}
    if found != wanted or {len(tensor) for tensor in weights.values()} != {vars(head)["seeds"]}:
        raise ContractError(f"the tensors are not those of a {record['head']} head with the settings of head.json")
    if head.task == "classification":
        head.classes_ = np.arange(len(record["classes"]))
    return head


def _shapes(head: Head) -> dict[str, tuple[int, ...]]:
    """Of the tensors of one seed."""
    if isinstance(head, SegmentationHead):
        network: Any = head._network()
    elif isinstance(head, TokenHead):
        network = head._network(vars(head)["n_features_in_"], vars(head)["num_outputs_"])
    else:
        raise ContractError("this head takes no patch tokens")
    return {name: tuple(tensor.shape) for name, tensor in network.init(torch.Generator()).items()}
