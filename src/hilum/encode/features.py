"""Scans in memory → features.

A slice encoder sees slices in batches; a volume encoder one volume at a time. Images are prepared by threads ahead of the
network. A scan that breaks the contract becomes one row with the reason.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.encode.chunks import encode_prepared
from hilum.encode.contract import Contract
from hilum.encode.describe import notes_of
from hilum.encode.encoder import Encoder
from hilum.encode.grids import (
    slice_token_affine,
    stack_affine,
    volume_region_weights,
)
from hilum.encode.items import LAST, AnyItem, How, Item, Refused, Scan, Whole3D, make_items, unseen_note
from hilum.encode.pooling import pool, pool_slices
from hilum.encode.table.patches import Patches, write_patches
from hilum.encode.vit import Tokens
from hilum.encode.volume_contract import PreparedVolume
from hilum.errors import ContractError, HilumError, ScanRefused
from hilum.volume import Volume

Keep = type[np.float16] | type[np.float32] | None
_HALF = 65504.0  # the largest float16


@dataclass(frozen=True, eq=False)
class Part:
    """What the network made of one slice, one region, or one volume.

    vector   (D,), or of a slice at level volume
    cls      (D',) class token of the chosen layers
    patches  (N, D') patch tokens of the chosen layers; None when not asked for
    """

    vector: NDArray[np.float32]
    cls: NDArray[np.float32]
    patches: NDArray[Any] | None
    slice: int | None = None
    region: int | None = None


@dataclass
class Encoded:
    """All that one scan gave.

    parts    in order; () when refused
    grid     tokens of a slice (rows, columns) or of a volume (k, j, i)
    affine   of a volume's tokens; None for slice encoders
    reason   why it was refused; "" when it was not
    """

    scan: Scan
    parts: list[Part] = field(default_factory=list)
    grid: tuple[int, ...] = ()
    affine: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()
    reason: str = ""


def encode_scans(
    encoder: Encoder, scans: Iterable[Scan], how: How, batch_size: int, *, num_threads: int = 1, keep: Keep = None
) -> Iterator[Encoded]:
    """Scans in, what the network made of them out, in their order; a batch may hold slices of several scans of one group.

    num_threads  prepare images while the network runs
    keep         patch tokens, too, in this precision; they are large. None: no
    """
    ahead = 2 * batch_size if isinstance(encoder.contract, Contract) else 1
    stream = _prepared(_all_items(encoder, scans, how), ahead, num_threads)
    with closing(stream):
        parts = _parts(encoder, stream, how, batch_size, keep)
        for _, group in groupby(parts, key=lambda pair: pair[0].scan):
            yield _gather(encoder, how, list(group))


def _all_items(encoder: Encoder, scans: Iterable[Scan], how: How) -> Iterator[AnyItem]:
    for scan in scans:
        try:
            yield from list(make_items(scan, encoder, how))
        except HilumError as broken:
            yield Refused(scan, str(broken))


Prepared = tuple[AnyItem, Any]  # an item with its image, or with the error that preparing it met


def _prepared(items: Iterator[AnyItem], ahead: int, num_threads: int) -> Generator[Prepared, None, None]:
    """Items with their images, in order, prepared by threads; at most `ahead` wait."""
    waiting: deque[tuple[AnyItem, Future[Any]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="prepare") as pool_:
        try:
            for item in items:
                waiting.append((item, pool_.submit(_image_of, item)))
                if len(waiting) > ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _image_of(item: AnyItem) -> Any:
    try:
        return item.image
    except (ContractError, ScanRefused) as broken:
        return broken


def _parts(
    encoder: Encoder, stream: Iterator[Prepared], how: How, batch_size: int, keep: Keep
) -> Iterator[tuple[AnyItem, Any]]:
    """Each item with its `Part`, or with the error instead."""
    batch: list[Prepared] = []

    def flush() -> Iterator[tuple[AnyItem, Any]]:
        if batch:
            yield from _encode_batch(encoder, batch, how, keep)
            batch.clear()

    for item, image in stream:
        if batch and batch[0][0].scan.group != item.scan.group:
            yield from flush()
        if isinstance(item, Item) and isinstance(image, Tensor):
            batch.append((item, image))
            if len(batch) == batch_size:
                yield from flush()
            continue
        yield from flush()
        if isinstance(item, Refused):
            yield item, ContractError(item.reason)
        elif isinstance(image, HilumError):
            yield item, image
        else:
            yield item, _encode_volume(encoder, item, image, how, keep)
    yield from flush()


def _encode_batch(encoder: Encoder, batch: list[Prepared], how: How, keep: Keep) -> Iterator[tuple[AnyItem, Any]]:
    """One forward pass over slices."""
    found = encoder.layers(torch.stack([image for _, image in batch]), how.layers)
    items = [item for item, _ in batch if isinstance(item, Item)]
    given = [item.weights for item in items if item.weights is not None]
    vectors = _vectors(found, how.pooling or encoder.contract.pooling, torch.stack(given) if given else None)
    cls = torch.cat([tokens.cls for tokens in found], -1)
    patches = torch.cat([tokens.patches for tokens in found], -1) if keep else None
    for n, item in enumerate(items):
        if not bool(torch.isfinite(vectors[n]).all()):
            yield item, _damaged()
            continue
        own = kept(patches[n].numpy(), keep) if patches is not None else None
        yield item, Part(vectors[n].numpy(), cls[n].numpy(), own, item.slice, item.region)


def _encode_volume(
    encoder: Encoder, item: AnyItem, prepared: Any, how: How, keep: Keep
) -> tuple[Any, tuple[str, ...], list[Part]] | HilumError:
    """One prepared volume and its parts: itself, or its regions."""
    found, notes = _volume_tokens(encoder, prepared, how)
    pooling = how.pooling or encoder.contract.pooling
    cls = torch.cat([tokens.cls for tokens in found], -1)[0].numpy()
    patches = kept(torch.cat([tokens.patches for tokens in found], -1)[0].numpy(), keep) if keep else None
    if how.level != "region":
        parts = [Part(_vectors(found, pooling)[0].numpy(), cls, patches)]
    else:
        mask = item.scan.mask
        assert mask is not None
        regions = volume_region_weights(mask, prepared.affine, prepared.grid)
        if not regions:
            return ContractError("the mask covers no token of the volume; expected at least one voxel inside")
        notes = (*notes, *unseen_note((int(label) for label in np.unique(mask.voxels[mask.voxels > 0])), regions))
        parts = [
            Part(_vectors(found, pooling, weights[None])[0].numpy(), cls, patches, None, label)
            for label, weights in regions.items()
        ]
    if not all(np.isfinite(part.vector).all() for part in parts):
        return _damaged()
    return prepared, notes, parts


def kept(patches: NDArray[Any], keep: Keep) -> NDArray[Any]:
    """Tokens in less precision, unless a value does not fit."""
    return patches.astype(keep or np.float32) if np.abs(patches).max() <= _HALF else patches


def _vectors(found: list[Tokens], pooling: str, weights: Tensor | None = None) -> Tensor:
    """(B, D) of the chosen layers, one after the other."""
    return torch.cat([pool(tokens, pooling, weights) for tokens in found], 1)


def _damaged() -> ContractError:
    return ContractError("the encoder returned NaN or infinite features; the scan or its weights are damaged")


def _gather(encoder: Encoder, how: How, pairs: list[tuple[AnyItem, Any]]) -> Encoded:
    """What the items of one scan gave, as one. A single bad slice refuses the scan."""
    scan = pairs[0][0].scan
    if broken := next((found for _, found in pairs if isinstance(found, HilumError)), None):
        return Encoded(scan, reason=scan.reason or _reason(broken))
    notes = notes_of(scan.image, encoder.contract)
    if isinstance(pairs[0][0], Item):
        notes = (*notes, *pairs[0][0].notes)
    if isinstance(pairs[0][0], Whole3D):
        prepared, more, parts = pairs[0][1]
        notes = tuple(dict.fromkeys((*notes, *prepared.notes, *more)))
        return Encoded(scan, parts, tuple(prepared.grid), prepared.affine, notes)
    return Encoded(scan, [found for _, found in pairs], encoder.grid, None, notes)


def _volume_tokens(encoder: Encoder, prepared: PreparedVolume, how: How) -> tuple[list[Tokens], tuple[str, ...]]:
    """Tokens of a prepared volume, in blocks where that was asked for or memory does not hold it at once, and what was done
    then."""
    if how.layers != LAST:
        return encoder.layers(prepared.image[None], how.layers), ()
    tokens, notes = encode_prepared(encoder, prepared, most=how.max_patches)
    return [tokens], notes


def _reason(broken: HilumError) -> str:
    return str(broken) if isinstance(broken, ScanRefused) else f"contract: {broken}"


@dataclass(frozen=True)
class Features:
    """What `Encoder.encode` returns.

    vectors  (M, D) one for each slice, region, or one of the scan
    cls      (K, D') class tokens of the K slices that were encoded, or of the volume (K = 1)
    patches  (K, rows, columns, D') patch tokens, or (k, j, i, D') of a volume encoder; None when not asked for
    grid     tokens of a slice (rows, columns), or of a volume (k, j, i)
    affines  (K, 4, 4) for each slice (0, row, column, 1) of a token → LPS mm; (1, 4, 4) of a volume's token grid, which
             takes (k, j, i, 1). None when the scan has no geometry
    slices   number of each slice in the scan; () for volume encoders
    regions  label of each vector at level region
    notes    what was done to this scan beside what the contract does to every scan
    """

    vectors: NDArray[np.float32]
    cls: NDArray[np.float32]
    patches: NDArray[Any] | None
    grid: tuple[int, ...]
    affines: NDArray[np.float64] | None
    slices: tuple[int, ...]
    regions: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def first(self) -> NDArray[np.float32]:
        """The only vector of a scan at level volume."""
        vector: NDArray[np.float32] = self.vectors[0]
        return vector


def encode_volume(
    encoder: Encoder,
    vol: Volume,
    how: How,
    *,
    mask: Volume | None = None,
    batch_size: int = 32,
    keep: Keep = np.float32,
) -> Features:
    """One scan through an encoder, without files. ContractError when it breaks the contract."""
    scan = Scan("scan", "", "", vol, mask)
    (found,) = encode_scans(encoder, [scan], how, batch_size, keep=keep)
    if found.reason:
        raise ContractError(found.reason.removeprefix("contract: "))
    planes = found.parts if found.affine is None else found.parts[:1]
    tokens = _stacked(found) if keep else None
    return Features(
        vectors=np.stack(vectors_of(found, how)),
        cls=np.stack([part.cls for part in planes]),
        patches=tokens,
        grid=found.grid,
        affines=token_affines(found, encoder),
        slices=tuple(part.slice for part in planes if part.slice is not None),
        regions=tuple(part.region for part in found.parts if part.region is not None),
        notes=found.notes,
    )


def vectors_of(found: Encoded, how: How) -> list[NDArray[np.float32]]:
    """The vectors of a scan's rows: one a part, or at level volume one alone."""
    vectors = [part.vector for part in found.parts]
    if how.level != "volume" or found.affine is not None:
        return vectors
    return [pool_slices(torch.from_numpy(np.stack(vectors)), how.across).numpy()]


def token_affines(found: Encoded, encoder: Encoder) -> NDArray[np.float64] | None:
    """As `Features.affines`."""
    if found.affine is not None:
        return found.affine[None]
    rows, columns = encoder.grid
    placed = [
        slice_token_affine(found.scan.image, part.slice, (rows, columns), encoder.slice_contract)
        for part in found.parts
        if part.slice is not None
    ]
    return np.stack([affine for affine in placed if affine is not None]) if placed[0] is not None else None


def save_patches(path: Path, found: Encoded, encoder: Encoder, facts: dict[str, str]) -> None:
    """The patch tokens of a scan as a side file (`hilum.encode.table.patches`)."""
    affines, tokens = token_affines(found, encoder), _stacked(found)
    k, j, i = tokens.shape[:3]
    if found.affine is not None:
        write_patches(path, Patches(tokens, (k, j, i), found.affine, None, (), facts))
        return
    slices = tuple(part.slice for part in found.parts if part.slice is not None)
    write_patches(path, Patches(tokens, (k, j, i), stack_affine(affines), affines, slices, facts))


def _stacked(found: Encoded) -> NDArray[Any]:
    """Patch tokens of a scan, (K, rows, columns, D) of its slices or (k, j, i, D) of the volume."""
    planes = [part.patches for part in found.parts if part.patches is not None]
    if found.affine is not None:
        return planes[0].reshape(*found.grid, -1)
    return np.stack([plane.reshape(*found.grid, -1) for plane in planes])
