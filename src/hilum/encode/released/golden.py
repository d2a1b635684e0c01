"""Golden features: what an encoder made of a phantom when its weights were trusted, kept beside them as golden.json.

The same weights, contract and code give the same numbers on any machine, up to rounding. How far two runs are apart tells
what is behind it: the order of sums, a narrower type, or another function.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hilum.archive.phantom.body import sample_patient
from hilum.archive.phantom.scan import make_anatomy, scan_ct, scan_mr
from hilum.encode import volume_contract
from hilum.encode.contract import Contract, prepare_slice, volume_statistics
from hilum.encode.encoder import Encoder
from hilum.encode.released.weights import hash_tensors
from hilum.errors import ContractError
from hilum.records import hash_json, read_json, versions, write_json
from hilum.settings import differences, to_dict
from hilum.volume import Volume

GOLDEN = "golden.json"
NUM_SLICES, MATRIX = 24, 96  # as many slices as the search for the patient's outline of a volume contract needs
SLICES, SLICE = (3, 9, 15, 21), 15  # those that an encoder of slices is shown, and the one that stands for itself
# Of features of unit size: float32 sums in another order stay below the first number at every place (1e-5 in a ViT-B);
# bfloat16 (8 bits of mantissa, errors of 2^-9 a step) below the second as a whole (0.02 in a ViT-B, single places 0.1).
ROUNDING, NARROW = 1e-3, 0.1


@cache
def phantom_scans() -> dict[str, Volume]:
    """A CT and an MR of the same synthetic patient, (24, 96, 96); the same on every machine."""
    anatomy = make_anatomy(sample_patient(0), NUM_SLICES, MATRIX)
    return {"CT": scan_ct(anatomy), "MR": scan_mr(anatomy)}


def golden_features(encoder: Encoder, quick: bool = False) -> dict[str, NDArray[np.float32]]:
    """Class token and mean of the patch tokens, one after the other, of what the encoder may be shown.

    quick    only the first of them: one slice, or the volume of a volume encoder
    returns  "CT slice", "CT volume" (mean over four slices), "MR slice"; of a volume encoder "CT volume"
    """
    found: dict[str, NDArray[np.float32]] = {}
    for modality, volume in phantom_scans().items():
        if modality not in encoder.contract.modalities or (quick and found):
            continue
        if not isinstance(encoder.contract, Contract):
            prepared = volume_contract.prepare_volume(volume, encoder.contract)
            found[f"{modality} volume"] = _vector(encoder, prepared.image[None])
            continue
        contract, unit = encoder.contract, volume.unit
        statistics = volume_statistics(volume.voxels, modality, unit, contract)
        whole = modality == "CT" and not quick
        vectors = {
            z: _vector(encoder, prepare_slice(volume.voxels[z], modality, unit, contract, statistics)[None])
            for z in (SLICES if whole else (SLICE,))
        }
        found[f"{modality} slice"] = vectors[SLICE]
        if whole:
            found[f"{modality} volume"] = np.stack(list(vectors.values())).mean(0)
    return found


def _vector(encoder: Encoder, images: torch.Tensor) -> NDArray[np.float32]:
    tokens = encoder.tokens(images)
    vector: NDArray[np.float32] = torch.cat([tokens.cls, tokens.patches.mean(1)], 1)[0].numpy()
    return vector


def write_golden(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Keep the features of an encoder that is trusted, with the hashes of what made them; returns the record."""
    features = golden_features(encoder)
    if bad := [name for name, vector in features.items() if not np.isfinite(vector).all()]:
        raise ContractError(f"the features of {' and '.join(bad)} are not finite; such an encoder is not to be trusted")
    record = {
        "format": "hilum-golden",
        "version": 1,
        "tensors": tensor_hashes(encoder),
        "contract": to_dict(encoder.contract),
        "phantom": _phantom_hash(),
        "features": {name: [float(f"{v:.9g}") for v in vector] for name, vector in features.items()},
        "versions": versions(),
        "device": encoder.device.type,
        "threads": torch.get_num_threads(),
    }
    write_json(folder / GOLDEN, record)
    return record


def read_golden(folder: Path) -> dict[str, Any] | None:
    """The stored record; None when there is none. ContractError when it is damaged."""
    path = folder / GOLDEN
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != "hilum-golden" or record.get("version") != 1:
        raise ContractError(
            f"{path} is no record of golden features; delete it, and write it anew with a trusted encoder"
        )
    return record


def check_golden(encoder: Encoder, folder: Path) -> None:
    """The self-test of a load: one phantom image gives the stored features, under the stored contract, or ContractError.

    Without stored features, or on another phantom (another NumPy), there is nothing to compare with.
    """
    record = read_golden(folder)
    if record is None:
        return
    if changed := differences(record["contract"], to_dict(encoder.contract)):
        raise ContractError(
            f"{folder}: the contract is not the one of the golden features ({'; '.join(changed)}). {_DOCTOR}"
        )
    if record["phantom"] != _phantom_hash():
        return
    for name, vector in golden_features(encoder, quick=True).items():
        told = compare_vectors(vector, record["features"].get(name, []))
        if told["verdict"] == "another function" or (told["verdict"] == "narrow type" and is_exact(encoder, record)):
            raise ContractError(
                f"{folder}: the features of the phantom's {name} are not the stored ones (cosine {told['cosine']:.6f}, largest "
                f"difference {told['difference']:.2g} of their size). {_DOCTOR}"
            )


_DOCTOR = "hilum doctor names what changed; if the change is wanted, hilum doctor --write stores the new features"


def is_exact(encoder: Encoder, record: Mapping[str, Any]) -> bool:
    """Whether only the order of sums may differ from the stored features, which are of float32: not on a GPU, which multiplies
    in narrower types by itself."""
    return encoder.precision == "float32" and encoder.device.type == "cpu" == record["device"]


def compare_vectors(found: NDArray[np.float32], golden: Sequence[float]) -> dict[str, Any]:
    """How near two vectors are.

    returns  cosine; difference: the largest one divided by the root mean square of the golden vector; verdict: identical,
             rounding, narrow type (by the distance of the vectors divided by the golden one's length), or another function
    """
    a, b = found.astype(np.float64), np.asarray(golden, np.float32).astype(np.float64)
    if a.shape != b.shape:
        return {"verdict": "another function", "cosine": 0.0, "difference": math.inf}
    sizes = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / sizes if sizes else float(np.array_equal(a, b))
    difference = float(np.abs(a - b).max() / max(np.sqrt(np.mean(b**2)), 1e-12))
    verdict = "another function"
    if np.linalg.norm(a - b) <= NARROW * np.linalg.norm(b):
        verdict = "narrow type"
    if difference <= ROUNDING:
        verdict = "rounding" if difference else "identical"
    return {"verdict": verdict, "cosine": cosine, "difference": difference}


def changed_tensors(encoder: Encoder, hashes: Mapping[str, str]) -> list[str]:
    """Names of tensors whose values, shapes or presence are not as recorded."""
    now = tensor_hashes(encoder)
    return sorted(name for name in now.keys() | hashes.keys() if now.get(name) != hashes.get(name))


def tensor_hashes(encoder: Encoder) -> dict[str, str]:
    """A hash for each tensor of the network, under its name here."""
    return {name: hash_tensors({name: tensor}) for name, tensor in encoder.network.state_dict().items()}


def _phantom_hash() -> str:
    return hash_json({name: hash_tensors({name: torch.from_numpy(v.voxels)}) for name, v in phantom_scans().items()})
