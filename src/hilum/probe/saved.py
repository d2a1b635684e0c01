"""A trained head as a folder, with the contract it was trained under; refused under any other.

    head.json         what it answers, for which encoder, contract and form of features, how good it was; see `write_head`
    head.safetensors  its tensors
    README.md         the same for readers

Two forms hold every head that is a function of one vector; a third the heads on patch tokens. Axes: s seeds, D features, W
hidden units, O outputs.

    linear   x · weights (s, D, O) + biases (s, O)
    mlp      relu((x - mean) · inverse_scale · W1 (s, D, W) + b1) · W2 (s, W, O) + b2, then · spread + offset

followed by softmax (classification), sigmoid (multi-label) or nothing.

    tokens   the head's own tensors, each (s, …), with its settings and what it decided in `fit` (`hilum.probe.saved_tokens`)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit, logit, softmax

from hilum.encode.encoder import Encoder
from hilum.errors import ContractError, InputError, UsageError
from hilum.probe.calibration import apply_temperature
from hilum.probe.heads.head import Array, Head
from hilum.probe.heads.linear import LinearProbe
from hilum.probe.saved_tokens import TOKEN_HEADS, fitted_facts, restore, token_tensors
from hilum.records import hash_file, read_json, versions, write_atomic, write_json, write_text
from hilum.settings import differences, to_dict

FORMAT, VERSION = "hilum-head", 1
CERTAIN = 80.0  # the logit of a label that was always, or never, there
VECTOR_HEADS = ("linear", "linear-sgd", "mlp", "cox")  # a k-NN head would carry its training cases
SAVED = (*VECTOR_HEADS, *TOKEN_HEADS)
TENSORS = {"linear": ("weights", "biases"), "mlp": ("mean", "inverse_scale", "W1", "b1", "W2", "b2", "target")}
ENCODER_FACTS = ("model", "loads_as", "seed", "weights", "precision", "contract", "contract_values")
FEATURE_FACTS = ("level", "pooling", "across", "layers", "max_slices")


@dataclass(frozen=True)
class SavedHead:
    """A head read from its folder. `record` is head.json; `head` the head itself where it takes patch tokens, else None."""

    record: dict[str, Any]
    tensors: dict[str, Array]
    head: Head | None = None

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the outputs; () for numbers and risks."""
        return tuple(self.record["classes"])

    def outputs(self, X: Any) -> NDArray[np.float32]:
        """(S, N, O) as `hilum.probe.heads.head.Head.outputs`: before the temperature. X is (N, D), or a `TokenSequence`."""
        if self.head is not None:
            return self.head.outputs(X)
        X, t = np.asarray(X, dtype=np.float64), self.tensors
        if X.ndim != 2 or X.shape[1] != self.record["num_features"]:
            raise ContractError(f"the head takes {self.record['num_features']} features; found {X.shape[1:]}")
        if self.record["form"] == "linear":
            raw = np.matmul(X, t["weights"]) + t["biases"][:, None]
        else:
            hidden = np.maximum(np.matmul((X - t["mean"]) * t["inverse_scale"], t["W1"]) + t["b1"][:, None], 0)
            raw = (np.matmul(hidden, t["W2"]) + t["b2"][:, None]) * t["target"][0] + t["target"][1]
        if self.task == "classification":
            raw = softmax(raw, axis=-1)
        elif self.task == "multilabel":
            raw = expit(raw)
        return np.asarray(raw, dtype=np.float32)

    def predict(self, X: Any) -> NDArray[np.float64]:
        """(N, O): mean over seeds; probabilities at the head's temperature."""
        mean: NDArray[np.float64] = self.outputs(X).mean(axis=0, dtype=np.float64)
        if self.task not in ("classification", "multilabel"):
            return mean
        return apply_temperature(mean, self.record["temperature"], multilabel=self.task == "multilabel")

    def check_encoder(self, encoder: Encoder) -> None:
        """ContractError when the encoder has another contract or other weights than the one the head was trained on."""
        known = self.record["encoder"]
        if encoder.contract.hash != known["contract"]:
            changed = "; ".join(differences(known["contract_values"], to_dict(encoder.contract)))
            raise ContractError(
                f"the head was trained under contract {known['contract']} of {known['model']}; {encoder.name} has "
                f"{encoder.contract.hash} (head ≠ encoder: {changed}). Use the head's own encoder, or train a head for this one"
            )
        if encoder.weights_hash != known["weights"]:
            raise ContractError(
                f"the head was trained on weights {known['weights']} of {known['model']}; {encoder.name} has "
                f"{encoder.weights_hash}. Use the head's own encoder, or train a head for this one"
            )


def write_head(
    folder: Path,
    head: Head,
    *,
    name: str,
    target: str,
    classes: tuple[str, ...],
    features: dict[str, Any],
    scores: dict[str, Any],
    training: dict[str, Any],
    temperature: float = 1.0,
) -> None:
    """Write a fitted head.

    name         in HEADS
    target       what it answers
    classes      names of all outputs in the order of the head's own, of segmentation without the background; () for numbers,
                 risks and places
    features     ENCODER_FACTS and FEATURE_FACTS: the metadata of a feature table, or `token_features`
    scores       metric → value, low, high, from cases that were not trained on
    training     cases, patients, seeds and settings, free of identifiers

    UsageError for a head without a saved form (`check_saved`); InputError for a feature table that does not say what it came
    from.
    """
    check_saved(name)
    if "erased" in features:
        raise UsageError(
            "these features had nuisances erased, which hilum predict does not do to a new scan; save a head on the table of "
            "hilum embed"
        )
    missing = [fact for fact in (*ENCODER_FACTS, *FEATURE_FACTS) if fact not in features]
    if missing:
        raise InputError(
            f"the feature table does not name its {', '.join(missing)}, so a head on it could not be applied; make it again "
            "with this version: hilum embed"
        )
    form, tensors = ("tokens", token_tensors(head)) if head.sees == "tokens" else _tensors(head)
    with write_atomic(folder / "head.safetensors") as temporary:
        save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()}, temporary)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "head": name,
        "form": form,
        "task": head.task,
        "target": target,
        "classes": list(classes),
        "num_features": int(head.n_features_in_),
        "temperature": temperature,
        "tensors": hash_file(folder / "head.safetensors"),
        "encoder": {fact: features[fact] for fact in ENCODER_FACTS},
        "features": {fact: features[fact] for fact in FEATURE_FACTS},
        "scores": scores,
        "training": training,
        "versions": versions(),
    }
    if form == "tokens":
        record |= {"settings": head.get_params(), "fitted": fitted_facts(head)}
    write_text(folder / "README.md", _card(record))
    write_json(folder / "head.json", record)  # last: its presence says the folder is whole


def check_saved(name: str) -> None:
    """UsageError for a head that has no saved form."""
    if name not in SAVED:
        raise UsageError(f"a {name} head has no saved form; those that have: {', '.join(SAVED)}")


def load_head(folder: str | Path) -> SavedHead:
    """A head from its folder. ContractError when a file is damaged, changed or of another version."""
    folder = Path(folder)
    record = read_json(folder / "head.json")
    found = f"{record.get('format')} version {record.get('version')}" if isinstance(record, dict) else "no table"
    if found != f"{FORMAT} version {VERSION}" or record.get("form") not in (*TENSORS, "tokens"):
        raise ContractError(f"{folder}/head.json is {found}; this hilum reads {FORMAT} version {VERSION}")
    path = folder / "head.safetensors"
    try:
        tensors: dict[str, Array] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ContractError(f"{path} cannot be read as safetensors: {error}") from None
    form = record["form"]
    if hash_file(path) != record["tensors"] or (form in TENSORS and set(tensors) != set(TENSORS[form])):
        raise ContractError(f"{path} is not the file that head.json was written with; save the head again")
    return SavedHead(record, tensors, restore(record, tensors) if form == "tokens" else None)


def _tensors(head: Head) -> tuple[str, dict[str, Array]]:
    if isinstance(head, LinearProbe):
        weights, biases = _solved(head)
        return "linear", {"weights": weights[None], "biases": biases[None]}
    known = vars(head)
    if "weights_" in known:
        num_seeds, _, num_outputs = known["weights_"].shape
        return "linear", {
            "weights": known["weights_"],
            "biases": known.get("biases_", np.zeros((num_seeds, num_outputs))),
        }
    tensors = dict(zip(("W1", "b1", "W2", "b2"), (part.numpy() for part in known["parameters_"])))
    tensors |= {"mean": known["mean_"], "inverse_scale": 1 / known["scale_"]}
    return "mlp", tensors | {"target": np.array([known["spread_"], known["offset_"]])}


def _solved(head: LinearProbe) -> tuple[Array, Array]:
    """Weights (D, O) and biases (O,) for raw features: scaling, components and coefficients in one."""
    if head.task == "multilabel":
        columns = []
        for label in head.labels_:
            if isinstance(label, float):
                columns.append((np.zeros(head.n_features_in_), float(np.clip(logit(label), -CERTAIN, CERTAIN))))
            else:
                weights, biases = _solved(label)
                columns.append((weights[:, 1] - weights[:, 0], float(biases[1] - biases[0])))
        return np.stack([w for w, _ in columns], axis=1), np.array([b for _, b in columns])
    coefficients = np.atleast_2d(head.model_.coef_)
    biases = np.atleast_1d(head.model_.intercept_)
    if head.pca_ is not None:
        biases = biases - coefficients @ head.pca_.components_ @ head.pca_.mean_
        coefficients = coefficients @ head.pca_.components_
    coefficients = coefficients / head.scaler_.scale_
    biases = biases - coefficients @ head.scaler_.mean_
    if head.task == "classification" and len(head.classes_) == 2:  # one logit: that of the second class
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        biases = np.concatenate([[0.0], biases])
    return coefficients.T, biases


def _card(record: dict[str, Any]) -> str:
    encoder, training = record["encoder"], record["training"]
    plain = {"regression": "a number", "survival": "a risk", "localisation": "a place in LPS mm"}
    answers = ", ".join(record["classes"]) or plain[record["task"]]
    kind = "patch tokens" if record["form"] == "tokens" else f"{record['features']['level']} features"
    lines = [
        f"- {metric}: {s['value']:.3f} ({s['low']:.3f} to {s['high']:.3f})" for metric, s in record["scores"].items()
    ]
    return "\n".join(
        [
            f"# A head for {record['target']}",
            "",
            f"A {record['head']} head ({record['task']}) on {kind} of {encoder['model']}. It "
            f"answers: {answers}. Research use only.",
            "",
            f"Encoder: weights {encoder['weights']}, contract {encoder['contract']}; under any other it is refused.",
            "",
            *(["On cases that it was not trained on, with 95 % intervals:", "", *lines, ""] if lines else []),
            "Trained on " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in training.items()) + ".",
            f"Temperature {record['temperature']:.3f}.",
            "",
            "    hilum predict SCAN --head THIS_FOLDER",
            "",
        ]
    )
