"""Released encoders as data: where they are, whose they are, and what each expects of its input. Without torch.

A model that is not here comes in by one function that reads its folder (`zoo.LAYOUTS`), and one entry with its contract.
What could not be read at its source when this table was written stands in `unverified`.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hilum.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Released:
    """One released encoder.

    name            how hilum calls it; `aliases` too
    repo            Hugging Face id
    revision        commit where the facts name one, else "main"; `hilum pull` records the commit that it got
    files           what is needed of the repository; of model.safetensors in shards, those with tensors of `part`
    part            what stands in the names of the tensors that are read, "" for all
    code_licence    of the authors' code (hilum holds none of it); `weights_licence`: of the weights
    gated           weights are handed out after a request on the repository's page, with a token
    num_parameters  of the encoder alone
    trained_on      what its authors showed it
    dimension       2: slices, 3: volumes
    layout          how its folder is read, a key of `zoo.LAYOUTS`
    contract        what it expects, as plain values: all fields of `Contract` or `VolumeContract`; what the folder says
                    itself (preprocessor_config.json, config.yaml) goes before
    windows_from    where the intensity range of CT and MR comes from
    paper           its description
    """

    name: str
    aliases: tuple[str, ...] = ()
    repo: str
    revision: str = "main"
    files: tuple[str, ...] = ("config.json", "preprocessor_config.json", "model.safetensors")
    part: str = ""
    code_licence: str
    weights_licence: str
    gated: bool
    num_parameters: int
    trained_on: str
    dimension: Literal[2, 3] = 2
    layout: str
    contract: Mapping[str, Any]
    windows_from: str
    paper: str
    notes: str = ""
    unverified: str = ""

    @property
    def page(self) -> str:
        """Where it is described, and asked for when it is gated."""
        return f"https://huggingface.co/{self.repo}"


def slice_contract(**changes: Any) -> dict[str, Any]:
    """A contract of slices as plain values: grey in three channels, normalised by constants, then what differs."""
    values: dict[str, Any] = {
        "modalities": ["CT", "MR", "OT"],
        "orientation": ["PL", "IL", "IP"],
        "rounding": "none",
        "clip_hu": None,
        "windows": [[-1024.0, 1024.0]],
        "percentiles": [0.5, 99.5],
        "normalise": "constants",
        "mean": [0.485, 0.456, 0.406],  # of ImageNet
        "std": [0.229, 0.224, 0.225],
        "eps": 1e-6,
        "normalise_last": True,
        "size_px": 224,
        "fit": "stretch",
        "short_px": 0,
        "resampling": "bicubic",
        "antialias": True,
        "channels": 3,
        "pooling": "class",
    }
    return values | changes


CURIA = slice_contract(
    rounding="int16", windows=[], percentiles=None, normalise="slice", mean=[], std=[], size_px=512, channels=1
)
VOXELFM = {
    "modalities": ["CT"],
    "orientation": "SPL",
    "clip_hu": [-1000.0, 1900.0],
    "background_px": 21,
    "min_spacing_mm": 0.75,
    "max_patches": 25_000,
    "patch": [14, 14, 14],
    "mean": -573.8,
    "std": 461.3,
    "pooling": "class",
}
_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
_SOFT, _BRAIN = [-135.0, 215.0], [0.0, 80.0]
_MEDGEMMA = {**_HALF, "windows": [[-1225.0, 1025.0], _SOFT, _BRAIN]}
_MEDGEMMA_15 = {**_HALF, "windows": [[-1024.0, 1024.0], _SOFT, _BRAIN]}
_WIDE = (
    "hilum's choice, the model never saw CT or MR: one wide CT window (the first of MedGemma 1.5's), percentiles of each "
    "slice else"
)
_REPORT = "MedGemma Technical Report §2.1.2 (CT: width/level 2250/-100, 350/40, 80/40); hilum's percentiles else"
_NOTEBOOK = "MedGemma 1.5's CT notebook (-1024 to 1024, -135 to 215, 0 to 80 HU); hilum's percentiles else"
_RAIL = "Research-only RAIL-M"
_HAI = "HAI-DEF terms of use"


def _dinov2(size: str, num_parameters: int, registers: bool) -> Released:
    name = f"dinov2-with-registers-{size}" if registers else f"dinov2-{size}"
    return Released(
        name=name,
        repo=f"facebook/{name}",
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        gated=False,
        num_parameters=num_parameters,
        trained_on="natural images",
        layout="natural",
        contract=slice_contract(fit="crop", short_px=256),
        windows_from=_WIDE,
        paper="Darcet et al. 2023, arXiv 2309.16588" if registers else "Oquab et al. 2023, arXiv 2304.07193",
        notes="the processor cuts off the edges of a slice: 256 px, the middle 224 px",
        unverified="preprocessor_config.json of this very repository" if registers else "",
    )


def _dinov3(name: str, repo: str, num_parameters: int) -> Released:
    return Released(
        name=f"dinov3-{name}",
        repo=f"facebook/dinov3-{repo}-pretrain-lvd1689m",
        code_licence="DINOv3 License",
        weights_licence="DINOv3 License",
        gated=True,
        num_parameters=num_parameters,
        trained_on="natural images",
        layout="natural",
        contract=slice_contract(resampling="bilinear"),
        windows_from=_WIDE,
        paper="Siméoni et al. 2025, arXiv 2508.10104",
    )


_ALL = (
    Released(
        name="curia",
        aliases=("curia-b",),
        repo="raidium/curia",
        revision="9657dc56276bc6c9503ef6f8d060879c8bee482f",
        code_licence="not stated",
        weights_licence=_RAIL,
        gated=True,
        num_parameters=86_072_832,
        trained_on="CT, MR",
        layout="curia",
        contract=CURIA,
        windows_from="none: raw HU (CT), stored values (MR), each slice by its own mean and deviation",
        paper="Dancette et al. 2025, Curia",
    ),
    Released(
        name="curia-2",
        aliases=("curia-2-b",),
        repo="raidium/curia-2",
        revision="645f566dd9e002505691178917cee265b491c7f7",
        code_licence="not stated",
        weights_licence=_RAIL,
        gated=True,
        num_parameters=86_072_832,
        trained_on="CT, MR",
        layout="curia",
        contract=CURIA,
        windows_from="none: raw HU (CT), stored values (MR), each slice by its own mean and deviation",
        paper="Curia-2",
        unverified="config.json and preprocessor_config.json were not seen (gated); taken to be Curia's",
    ),
    Released(
        name="voxelfm",
        repo="rmaguado/VoxelFM",
        files=("vitb_3d/config.yaml", "vitb_3d/checkpoints/99999.pth"),
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        gated=False,
        num_parameters=110_029_536,
        trained_on="CT",
        dimension=3,
        layout="voxelfm",
        contract=VOXELFM,
        windows_from="config.yaml beside the weights",
        paper="Maguado 2026, arXiv 2604.04133",
        notes="three files of its code are under the DINOv3 License; hilum uses none of them",
        unverified="gate and licence of the weights are as others report them",
    ),
    _dinov2("small", 22_056_576, False),
    _dinov2("base", 86_580_480, False),
    _dinov2("large", 304_368_640, False),
    _dinov2("giant", 1_136_480_768, False),
    _dinov2("small", 22_058_112, True),
    _dinov2("base", 86_583_552, True),
    _dinov2("large", 304_372_736, True),
    _dinov2("giant", 1_136_486_912, True),
    _dinov3("vits16", "vits16", 21_601_152),
    _dinov3("vitsplus16", "vits16plus", 28_697_472),
    _dinov3("vitb16", "vitb16", 85_669_632),
    _dinov3("vitl16", "vitl16", 303_154_176),
    _dinov3("vithplus16", "vith16plus", 840_633_600),
    Released(
        name="rad-dino",
        repo="microsoft/rad-dino",
        code_licence="not released",
        weights_licence="MSRLA (Microsoft)",
        gated=False,
        num_parameters=86_580_480,
        trained_on="chest radiographs",
        layout="natural",
        contract=slice_contract(size_px=518, fit="crop", short_px=518, mean=[0.5307] * 3, std=[0.2583] * 3),
        windows_from=_WIDE,
        paper="Pérez-García et al. 2024, arXiv 2401.10815",
        unverified="mean, std, size and crop; the folder's preprocessor_config.json goes before",
    ),
    Released(
        name="medsiglip",
        aliases=("medsiglip-448",),
        repo="google/medsiglip-448",
        part="vision_model.",
        code_licence="Apache-2.0",
        weights_licence=_HAI,
        gated=True,
        num_parameters=428_565_440,
        trained_on="medical images",
        layout="siglip",
        contract=slice_contract(**_MEDGEMMA, size_px=448),
        windows_from=_REPORT,
        paper="Sellergren et al. 2025, arXiv 2507.05201",
        unverified="that the three windows of the report's §2.1.2 were MedSigLIP's too",
    ),
    Released(
        name="medgemma",
        aliases=("medgemma-4b-it",),
        repo="google/medgemma-4b-it",
        part="vision_tower.",
        code_licence="Apache-2.0",
        weights_licence=_HAI,
        gated=True,
        num_parameters=416_866_032,
        trained_on="medical images",
        layout="siglip",
        contract=slice_contract(**_MEDGEMMA, size_px=896, resampling="bilinear", pooling="mean"),
        windows_from=_REPORT,
        paper="Sellergren et al. 2025, arXiv 2507.05201",
        notes="the vision tower alone; it has no head, so a slice is the mean of its tokens. Oblong slices were padded to "
        "squares in training; here they are stretched",
    ),
    Released(
        name="medgemma-1.5",
        aliases=("medgemma-1.5-4b-it",),
        repo="google/medgemma-1.5-4b-it",
        part="vision_tower.",
        code_licence="Apache-2.0",
        weights_licence=_HAI,
        gated=True,
        num_parameters=416_866_032,
        trained_on="medical images",
        layout="siglip",
        contract=slice_contract(**_MEDGEMMA_15, size_px=896, resampling="bilinear", pooling="mean"),
        windows_from=_NOTEBOOK,
        paper="Sellergren et al. 2025, arXiv 2507.05201",
        notes="the vision tower alone; it has no head, so a slice is the mean of its tokens. Oblong slices are stretched",
    ),
)
RECORD = "pull.json"
MODELS = {model.name: model for model in _ALL}
_NAMES = {alias: model for model in _ALL for alias in (model.name, *model.aliases, model.repo)}


def find_released(name: str) -> Released | None:
    """A released encoder by name, alias or Hugging Face id; None when there is none."""
    return _NAMES.get(name)


def is_repo(name: str) -> bool:
    """Whether a name has the form owner/repository of Hugging Face."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def did_you_mean(name: str) -> str:
    """What an error message offers."""
    near = difflib.get_close_matches(name, MODELS, n=3)
    return (f"did you mean {' or '.join(near)}? " if near else "") + "hilum models lists the known ones"


def repo_of(name: str) -> str:
    """Hugging Face id of a name of the table, or of an id itself. UsageError when it is neither."""
    released = find_released(name)
    if released is None and not is_repo(name):
        raise UsageError(f"no model '{name}'; {did_you_mean(name)}, others have a Hugging Face id OWNER/NAME")
    return released.repo if released else name


def home() -> Path:
    """Where pulled models are: $HILUM_HOME, or hilum in the user's cache."""
    given = os.environ.get("HILUM_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "hilum"


def model_folder(name: str, revision: str | None = None) -> Path:
    """Where `hilum pull` puts a model, and `load_encoder` looks for it. UsageError for an unknown name."""
    released, repo = find_released(name), repo_of(name)
    chosen = revision or (released.revision if released else "main")
    short = released.name if released else repo.replace("/", "--")
    return home() / "models" / f"{short}@{chosen.replace('/', '--')}"


def is_pulled(folder: Path) -> bool:
    """Whether `hilum pull` made this folder, whole."""
    return (folder / RECORD).is_file()


def record_of(released: Released) -> dict[str, Any]:
    """An entry as plain JSON values, with its page."""
    return {**asdict(released), "page": released.page}


def models_markdown() -> str:
    """The tables of docs/models.md: model → licence → gate → contract."""
    lines = ["| model | encodes | parameters | trained on | code | weights | gate |", "|---|---|---|---|---|---|---|"]
    contracts = ["| model | size | CT | other | normalised by | vector |", "|---|---|---|---|---|---|"]
    notes: dict[str, list[str]] = {}  # text: names
    for m in MODELS.values():
        c, kind = m.contract, "slices" if m.dimension == 2 else "volumes"
        gate = f"[on request]({m.page})" if m.gated else f"[open]({m.page})"
        number = f"{m.num_parameters / 1e6:,.0f} M"
        lines.append(
            f"| `{m.name}` | {kind} | {number} | {m.trained_on} | {m.code_licence} | {m.weights_licence} | {gate} |"
        )
        contracts.append(f"| `{m.name}` | {' | '.join(_contract_cells(c))} |")
        unverified = f"not verified: {m.unverified}" if m.unverified else ""
        for text in (f"intensities: {m.windows_from}", m.notes, unverified):
            notes.setdefault(text, []).append(f"`{m.name}`")
    told = [f"- {', '.join(names)}: {text}" for text, names in notes.items() if text]
    return "\n".join([*lines, "", *contracts, "", *told])


def _contract_cells(c: Mapping[str, Any]) -> list[str]:
    if "background_px" in c:
        size = f"isotropic, ≥ {c['min_spacing_mm']} mm, ≤ {c['max_patches']:,} patches of {c['patch'][0]}³"
        low, high = c["clip_hu"]
        return [size, f"{low:g} to {high:g} HU", "refused", f"{c['mean']}, {c['std']} HU", c["pooling"]]
    size = f"{c['size_px']}² {c['resampling']}" + (f", cut from {c['short_px']}" if c["fit"] == "crop" else "")
    ct = ", ".join(f"{low:g} to {high:g}" for low, high in c["windows"]) + " HU" if c["windows"] else "as it is"
    other = "percentiles {:g} to {:g}".format(*c["percentiles"]) if c["percentiles"] else "as it is"
    by = f"the {c['normalise']}" if c["normalise"] != "constants" else "constants of its training"
    return [size, ct, other, by, c["pooling"]]
