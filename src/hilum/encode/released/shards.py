"""Tensors of a folder in safetensors: one file, or several with an index, of which only the needed parts are read."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hilum.errors import ContractError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors with a wanted name of model.safetensors, or of the shards that model.safetensors.index.json lists.

    ContractError when a file is missing or damaged, or when the index names a tensor that its shard has not.
    """
    places = {name: folder / file for name, file in shard_map(folder).items() if wanted(name)}
    tensors = {}
    for path in sorted(set(places.values())):
        try:
            with safe_open(path, framework="pt") as shard:
                tensors.update({name: shard.get_tensor(name) for name, place in places.items() if place == path})
        except (OSError, SafetensorError) as error:
            raise ContractError(f"{path} cannot be read as safetensors: {error}") from None
    return tensors


def shard_map(folder: Path) -> dict[str, str]:
    """Name of each tensor and of the file in the folder that holds it."""
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        try:
            with safe_open(folder / WHOLE, framework="pt") as whole:
                return dict.fromkeys(whole.keys(), WHOLE)
        except (OSError, SafetensorError) as error:
            raise ContractError(f"{folder / WHOLE} cannot be read as safetensors: {error}") from None
    return read_index((folder / INDEX).read_bytes(), str(folder / INDEX))


def read_index(content: bytes, where: str) -> dict[str, str]:
    """The weight map of an index. ContractError when it is none, or when it leaves its folder."""
    try:
        places = json.loads(content)["weight_map"]
        good = all(isinstance(n, str) and isinstance(f, str) and Path(f).name == f != ".." for n, f in places.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good or not places:
        raise ContractError(f"{where} is no index of shards; expected a weight_map from tensors to files beside it")
    return dict(places)
