"""`hilum doctor MODEL`: is this encoder still the function that it was?"""

import time
from typing import Any

import torch

from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder
from hilum.encode.released.golden import (
    GOLDEN,
    changed_tensors,
    compare_vectors,
    golden_features,
    is_exact,
    read_golden,
    write_golden,
)
from hilum.encode.released.models import is_pulled
from hilum.encode.zoo import locate, open_folder
from hilum.errors import ContractError, InputError
from hilum.settings import differences, to_dict
from hilum.terminal import Progress, few


def check_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    write: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Examine an encoder: files, coverage of its weights, contract, features of a phantom, speed.

    name     a folder or a released model that was pulled, as for `load_encoder`
    write    store its features as the golden ones instead of comparing; for a load that is trusted
    returns  model, checks ([what, result, detail]: result is good, note or fault), faults (their number), report (of the
             weights), images_per_s. What cannot be loaded at all has one fault, and that is why
    """
    folder = locate(name, revision)
    tell = progress or (lambda *_: None)
    tell(0, 3, "examining")
    try:
        encoder = open_folder(folder, device)
        golden = None if write else read_golden(folder)
    except (ContractError, InputError) as error:
        return {
            "model": name,
            "checks": [["load", "fault", str(error)]],
            "faults": 1,
            "report": {},
            "images_per_s": None,
        }
    tell(1, 3, "examining")
    checks = [_files(is_pulled(folder)), *_coverage(encoder.report)]
    if write:
        record = write_golden(encoder, folder)
        checks.append(["golden features", "good", f"{', '.join(record['features'])} written to {GOLDEN}"])
    elif golden is None:
        checks.append(
            ["golden features", "note", "none are stored; with weights that you trust: hilum doctor MODEL --write"]
        )
    else:
        checks += _compare(encoder, golden)
    tell(2, 3, "examining")
    speed = _images_per_s(encoder)
    tell(3, 3, "examining")
    faults = sum(result == "fault" for _, result, _ in checks)
    told = {"model": encoder.name, "checks": checks, "faults": faults, "report": encoder.report, "images_per_s": speed}
    return {**told, "contract_hash": encoder.contract.hash, "device": str(encoder.device)}


def _files(pulled: bool) -> list[str]:
    if pulled:
        return ["files", "good", "every file has the hash of pull.json"]
    return ["files", "note", "not pulled by hilum: no hashes to compare with"]


def _coverage(report: dict[str, Any]) -> list[list[str]]:
    """What became of the tensors of the file."""
    changed = "; ".join(f"{how}: {count}" for how, count in report["transformed"].items())
    text = f"{report['used']} of {report['num_tensors']} tensors as they are" + (f"; {changed}" if changed else "")
    rows = [["weights", "good", f"{report['layout']}, {text}"]]
    if report["created"]:
        rows.append(["weights", "note", f"not in the file: {few(report['created'])}"])
    if report["zeros"]:
        rows.append(["weights", "note", f"all zero, as if never trained: {few(report['zeros'])}"])
    return rows


def _compare(encoder: Encoder, golden: dict[str, Any]) -> list[list[str]]:
    rows = []
    changed = differences(golden["contract"], to_dict(encoder.contract))
    same = "as when the features were stored"
    rows.append(["contract", "fault" if changed else "good", "; ".join(changed) or same])
    tensors = changed_tensors(encoder, golden["tensors"])
    rows.append(["tensors", "fault" if tensors else "good", f"changed: {few(tensors)}" if tensors else same])
    found = golden_features(encoder)
    for name, stored in golden["features"].items():
        if name not in found:
            rows.append([name, "fault", "the contract no longer allows it"])
            continue
        told = compare_vectors(found[name], stored)
        detail = f"{_MEANING[told['verdict']]} (cosine {told['cosine']:.7f}, difference {told['difference']:.2g})"
        narrow = "fault" if is_exact(encoder, golden) else "note"
        rows.append([name, {**_RESULT, "narrow type": narrow}[told["verdict"]], detail])
    if any(result == "fault" for _, result, _ in rows):
        made = golden["versions"]
        rows.append(
            [
                "stored by",
                "note",
                f"torch {made['torch']}, numpy {made['numpy']}, {golden['device']}, {golden['threads']} threads",
            ]
        )
    return rows


_MEANING = {
    "identical": "identical",
    "rounding": "the same up to rounding: threads, device or versions",
    "narrow type": "near, as in a narrower type such as bfloat16",
    "another function": "not the same function",
}
_RESULT = {"identical": "good", "rounding": "good", "another function": "fault"}


def _images_per_s(encoder: Encoder) -> float | None:
    """Slices a second one at a time, the best of three; None for encoders of volumes, whose size decides."""
    if not isinstance(encoder.contract, Contract):
        return None
    side = encoder.contract.size_px
    image = torch.zeros(1, encoder.contract.channels, side, side)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        encoder.tokens(image)
        seconds.append(time.perf_counter() - begin)
    return round(1 / min(seconds), 2)
