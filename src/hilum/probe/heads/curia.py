"""The heads that Raidium released with Curia: one folder each, config.json and model.safetensors with the whole model.

    dino.*              the encoder, in the layout of transformers' Dinov2Model
    attention_module.*  pooling over the tokens of a volume, in some
    classifier.*        the last linear layer

Nothing of theirs is executed. Three of its quirks change what a head says and are kept only with `match_upstream`:
zero padding that is attended to, in a batch of volumes with unequal numbers of tokens; chosen slices that wrap round from the
first slice to the last; a choice that runs beyond the last slice, which is an error there.
Axes in names: L tokens, D width, S slices, N patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from hilum.encode.contract import check_scan, prepare_slice, volume_statistics
from hilum.encode.encoder import Encoder
from hilum.encode.regions import check_same_grid, curia_cells
from hilum.encode.released.curia import curia_contract
from hilum.encode.released.weights import translate_dinov2
from hilum.encode.vit import ViT
from hilum.errors import ContractError, UsageError
from hilum.probe.heads.attention import block_part, cross_block, self_block, slice_codes
from hilum.records import read_json
from hilum.settings import from_dict
from hilum.volume import Volume

BATCH = 8  # slices that go through the encoder at once


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What config.json of a head says.

    num_classes              outputs; 1 for regression
    num_slices               of a volume, around its middle or that of its mask; None: all
    kernel_size              without a mask, patch tokens are averaged over squares of so many; None: they are not
    use_class_token          the class token of each slice stands before its patch tokens
    use_avgpool_per_slice    one mean token a slice
    use_avgpool_on_the_volume  one mean of all tokens: the volume's vector
    blocks                   of attention pooling, "self" and "cross" in order; empty without
    num_queries              learned queries of a cross block
    regression               the output is a number, not a class's logit
    """

    num_classes: int = 2
    num_slices: int | None = None
    kernel_size: int | None = None
    use_class_token: bool = False
    use_avgpool_per_slice: bool = False
    use_avgpool_on_the_volume: bool = False
    blocks: tuple[str, ...] = ()
    num_queries: int = 1
    regression: bool = False

    @property
    def of_volumes(self) -> bool:
        """Whether the head judges a volume as one; else each slice."""
        return bool(self.blocks) or self.use_avgpool_on_the_volume


class Prediction(NamedTuple):
    """What a head says of a scan.

    logits  (rows, num_classes), before any softmax; in regression the number itself. A head of volumes gives one row, a head
            of slices one a slice
    slices  those it was computed from; of a head of slices, those of the rows
    """

    logits: NDArray[np.float32]
    slices: tuple[int, ...]


class CuriaHead:
    """A released head with its encoder. Read it with `read_head`.

    encoder   the head's own copy, with Curia's contract: heads of slices normalise by slice, heads of volumes by volume, as
              they were trained
    tensors   classifier.* and attention_module.*, float32
    """

    def __init__(self, encoder: Encoder, settings: HeadSettings, tensors: dict[str, Tensor]) -> None:
        self.encoder, self.settings, self.tensors = encoder, settings, tensors

    def predict(self, scan: Volume, mask: Volume | None = None, *, match_upstream: bool = False) -> Prediction:
        """Logits of one scan, its slices along axis 0 as `hilum.read` gives them.

        mask  on the scan's grid; every number but zero is the region. A head of slices then judges the slices that it meets
        """
        check_scan(scan.voxels, scan.modality, scan.unit, self.encoder.slice_contract)
        if self.settings.of_volumes:
            tokens, slices = self._volume_tokens(scan, mask, match_upstream)
            return Prediction(self._judge([tokens], match_upstream), tuple(slices))
        if mask is not None:
            check_same_grid(scan, mask)
        slices = [z for z in range(len(scan.voxels)) if mask is None or mask.voxels[z].any()]
        if not slices:
            raise ContractError("the mask is empty; leave it out, or give one with at least one voxel inside the scan")
        return Prediction(self._judge_slices(scan, mask, slices), tuple(slices))

    def predict_volumes(
        self, scans: Sequence[Volume], masks: Sequence[Volume] | None = None, *, match_upstream: bool = False
    ) -> NDArray[np.float32]:
        """Logits (scans, num_classes) of a head of volumes; UsageError for a head of slices. As one batch, which decides only
        with `match_upstream`."""
        if not self.settings.of_volumes:
            raise UsageError("this head judges slices; use predict")
        marks: Sequence[Volume | None] = masks or [None] * len(scans)
        tokens = [self._volume_tokens(scan, mask, match_upstream)[0] for scan, mask in zip(scans, marks)]
        return self._judge(tokens, match_upstream)

    def _judge_slices(self, scan: Volume, mask: Volume | None, slices: Sequence[int]) -> NDArray[np.float32]:
        contract, features = self.encoder.slice_contract, []
        for start in range(0, len(slices), BATCH):
            batch = slices[start : start + BATCH]
            images = [prepare_slice(scan.voxels[z], scan.modality, scan.unit, contract) for z in batch]
            tokens = self.encoder.tokens(torch.stack(images))
            if mask is None:
                features.append(tokens.cls)
            else:
                inside = torch.stack([self._cells(mask.voxels[z]) for z in batch]).float()
                features.append(torch.einsum("bn,bnd->bd", inside, tokens.patches) / inside.sum(1, keepdim=True))
        return self._classify(torch.cat(features))

    def _volume_tokens(self, scan: Volume, mask: Volume | None, match_upstream: bool) -> tuple[Tensor, list[int]]:
        """(L, D) tokens of a volume before the final LayerNorm, in one sequence, and the slices they come from."""
        cells = None
        if mask is not None:
            check_same_grid(scan, mask)
            cells = self._cells(mask.voxels)
        slices = choose_slices(len(scan.voxels), cells, self.settings.num_slices, match_upstream)
        contract = self.encoder.slice_contract
        statistics = volume_statistics(scan.voxels, scan.modality, scan.unit, contract)
        parts: list[Tensor] = []
        for start in range(0, len(slices), BATCH):
            batch = slices[start : start + BATCH]
            images = [prepare_slice(scan.voxels[z], scan.modality, scan.unit, contract, statistics) for z in batch]
            parts += tokens_before_norm(self.encoder, torch.stack(images))
        patches = [self._patch_tokens(part[1:], None if cells is None else cells[z]) for part, z in zip(parts, slices)]
        if self.settings.use_avgpool_on_the_volume:
            return torch.cat(patches).mean(0, keepdim=True), slices
        if self.settings.use_avgpool_per_slice:
            patches = [part.mean(0, keepdim=True) for part in patches]
        if self.settings.use_class_token:
            patches = [torch.cat([part[:1], chosen]) for part, chosen in zip(parts, patches)]
        codes = slice_codes(len(slices), parts[0].shape[1])
        return torch.cat([part + code for part, code in zip(patches, codes)]), slices

    def _patch_tokens(self, patches_ND: Tensor, inside: Tensor | None) -> Tensor:
        """Of one slice: those of the region, all, or means over squares."""
        if inside is not None:
            return patches_ND[inside]
        kernel = self.settings.kernel_size
        if kernel is None or self.settings.use_avgpool_per_slice or self.settings.use_avgpool_on_the_volume:
            return patches_ND
        maps = patches_ND.T.reshape(1, -1, *self.encoder.grid)
        return functional.avg_pool2d(maps, kernel)[0].flatten(1).T

    def _cells(self, mask: NDArray[Any]) -> Tensor:
        return curia_cells(mask, self.encoder.slice_contract.size_px, self.encoder.patch[0])

    def _judge(self, sequences: list[Tensor], match_upstream: bool) -> NDArray[np.float32]:
        if not self.settings.blocks:
            return self._classify(torch.cat(sequences))
        longest = max(len(tokens) for tokens in sequences)
        pooled = [self._attend(tokens, longest - len(tokens) if match_upstream else 0) for tokens in sequences]
        return self._classify(torch.stack(pooled))

    def _classify(self, features: Tensor) -> NDArray[np.float32]:
        logits = functional.linear(features, self.tensors["classifier.weight"], self.tensors["classifier.bias"])
        array: NDArray[np.float32] = logits.numpy()
        return array

    def _attend(self, tokens_LD: Tensor, padding: int) -> Tensor:
        """Attention pooling of one volume, (D,).

        padding  zero tokens behind the others. A self block keeps the two apart, and no padding is zero after it, so what
                 follows takes it for tokens. A cross block leaves out padding that is still zero
        """
        stacked = {name: tensor[None] for name, tensor in self.tensors.items()}  # one lane
        for block in self.settings.blocks:
            part = block_part(stacked, block)
            if block == "self":
                after = [self_block(part, tokens_LD[None], None)[0, 0]]
                if padding:
                    zeros = tokens_LD.new_zeros(padding, tokens_LD.shape[1])
                    after.append(self_block(part, zeros[None], None)[0, 0])
                tokens_LD = torch.cat(after)
            else:
                queries = stacked["attention_module.cross_attention.learned_queries"][:, None]
                tokens_LD = cross_block(part, queries, tokens_LD[None], None)[0, 0]
            padding = 0
        return tokens_LD.mean(0)


def tokens_before_norm(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, 1 + N, D): class and patch tokens of our transformer after its last block, not yet normalised."""
    caught: list[Tensor] = []
    assert isinstance(encoder.network, ViT)
    hook = encoder.network.norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        encoder.tokens(images)
    finally:
        hook.remove()
    return caught[0].float().cpu()


def choose_slices(num: int, cells: Tensor | None, wanted: int | None, match_upstream: bool = False) -> list[int]:
    """Slices of a volume that a head looks at.

    num      slices of the volume
    cells    (S, N) patches of the region; slices without one are left out
    wanted   how many around the middle, which is num // 2 or element (m - 1) // 2 of the m slices with the region;
             None: all
    match_upstream  numbers below zero count from the end, and those beyond it are an error; else both are left out
    """
    picked = range(num)
    if wanted is not None:
        full = range(num) if cells is None else cells.any(1).nonzero()[:, 0].tolist()
        start = (num // 2 if cells is None else full[(len(full) - 1) // 2]) - wanted // 2
        picked = range(start, start + wanted)
    if match_upstream and (picked.stop > num or picked.start < -num):
        raise ContractError(
            f"the head wants slices {picked.start} to {picked.stop - 1}, of {num}: an error upstream, too"
        )
    slices = [z % num for z in picked if match_upstream or 0 <= z < num]
    return slices if cells is None else [z for z in slices if bool(cells[z].any())]


def read_head(folder: str | Path, *, device: str = "cpu") -> CuriaHead:
    """A released head. ContractError lists every tensor that is missing, left over or of another shape, and settings that no
    released head has."""
    folder = Path(folder)
    settings = read_settings(read_json(folder / "config.json"))
    path = folder / "model.safetensors"
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ContractError(f"{path} cannot be read as safetensors: {error}") from None
    dino = {n.removeprefix("dino."): tensors.pop(n) for n in list(tensors) if n.startswith("dino.")}
    config, state, report = translate_dinov2(dino, path)
    model = ViT(config)
    model.load_state_dict(state)
    wanted = _wanted(settings, model.width)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n))
    if wrong:
        listed = "; ".join(f"{n}: expected {wanted.get(n)}, found {shapes.get(n)}" for n in wrong)
        raise ContractError(f"{path}: {len(wrong)} tensors of the head do not fit its config.json: {listed}")
    contract = curia_contract({"crop_size": config.image[0]}, statistics="volume" if settings.of_volumes else "slice")
    encoder = Encoder(model, contract, f"curia/{folder.name}", patch=config.patch, device=device, report=report)
    return CuriaHead(encoder, settings, {name: tensor.float() for name, tensor in tensors.items()})


def _wanted(settings: HeadSettings, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a head's own tensors."""
    wanted: dict[str, tuple[int, ...]] = {"classifier.bias": (settings.num_classes,)}
    wanted["classifier.weight"] = (settings.num_classes, width)
    for block in settings.blocks:
        name = f"attention_module.{block}_attention"
        attention = f"{name}.attention.multihead_attn"
        wanted |= {f"{attention}.in_proj_weight": (3 * width, width), f"{attention}.in_proj_bias": (3 * width,)}
        wanted |= {f"{attention}.out_proj.weight": (width, width), f"{attention}.out_proj.bias": (width,)}
        wanted |= {f"{name}.attention.norm.weight": (width,), f"{name}.attention.norm.bias": (width,)}
        if block == "cross":
            wanted[f"{name}.learned_queries"] = (settings.num_queries, width)
    return wanted


def read_settings(config: Any) -> HeadSettings:
    """config.json of a head. Other keys of transformers are not read. ContractError for what no released head has."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "dinov2_custom_classifier":
        raise ContractError(f"config.json is of model_type '{kind}'; a head of Curia is dinov2_custom_classifier")
    attention = config.get("attention_cfg")
    cross = {} if attention is None else attention
    # "attention_block" stands in released configs and is read by nobody: the blocks are those of "block", or both.
    faults = [
        f"attention_cfg.{n} is unknown" for n in cross.keys() - {"num_heads", "num_queries", "block", "attention_block"}
    ]
    blocks = () if attention is None else tuple(cross.get("block", ("self", "cross")))
    averaged = config.get("use_avgpool_per_slice", False) or config.get("use_avgpool_on_the_volume", False)
    if set(blocks) - {"self", "cross"} or len(set(blocks)) != len(blocks):
        faults.append(f"attention_cfg.block is {list(blocks)}; known are self and cross")
    if cross.get("num_heads", 1) != 1:
        faults.append(f"attention_cfg.num_heads is {cross['num_heads']}; the padding mask of these heads allows only 1")
    if config.get("use_n_blocks") not in (None, 1):
        faults.append(f"use_n_blocks is {config['use_n_blocks']}, which does not fit the classifier")
    if averaged and config.get("use_class_token", False):
        faults.append("use_class_token with averages does not fit the classifier")
    if not blocks and config.get("use_avgpool_per_slice", False):
        faults.append("use_avgpool_per_slice without attention gives no single answer")
    if blocks and config.get("use_avgpool_on_the_volume", False):
        faults.append("attention over use_avgpool_on_the_volume has nothing to attend to")
    if faults:
        raise ContractError(f"config.json of the head: {'; '.join(faults)}")
    own = {name: config[name] for name in HeadSettings.__dataclass_fields__ if name in config}
    own |= {"blocks": blocks, "num_queries": cross.get("num_queries", 1)}
    return from_dict(HeadSettings, own, "config.json of the head")
