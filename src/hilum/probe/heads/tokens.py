"""The tokens of many scans, in memory or streamed from disk: what heads on patch tokens take as X.

A `TokenSequence` stands for N cases. Its tokens come in batches, padded where cases differ in length, with the next batch read
ahead by a thread: what is resident is two batches, however many volumes there are.
Axes in names: B cases, L tokens, D width, K planes of tokens.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hilum.encode.features import Features
from hilum.encode.table.patches import Patches, read_patches
from hilum.errors import GeometryError, InputError, UsageError

Array = NDArray[Any]
NOTHING = (slice(0, 0), slice(0, 0), slice(0, 0))


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseTokens:
    """Patch tokens of one case.

    tokens  (L, D) float16 or float32, in C order of the grid; with a region only those it touches
    grid    tokens along (k, j, i) of the whole scan
    place   (L,) number of each token in the grid, in C order
    affines (K, 4, 4): (0, j, i, 1) of a token in that plane → LPS mm; None without geometry
    weights (L,) share of each token that the region covers; None: all count the same
    planar  the planes are slices that were encoded one by one, not the depth of a 3D encoder
    """

    tokens: Array
    grid: tuple[int, int, int]
    place: NDArray[np.int64]
    affines: NDArray[np.float64] | None = None
    weights: NDArray[np.float32] | None = None
    planar: bool = True

    @property
    def planes(self) -> NDArray[np.int64]:
        """(L,) the plane of each token, counted within the planes that have one: 0 … k - 1."""
        number: NDArray[np.int64] = np.unique(self.place // (self.grid[1] * self.grid[2]), return_inverse=True)[1]
        return number

    def positions_mm(self) -> NDArray[np.float64]:
        """(L, 3) LPS mm of each token's centre. GeometryError without geometry."""
        if self.affines is None:
            raise GeometryError("this case has no geometry (PNG and JPEG carry none), and places are asked for in mm")
        k, j, i = np.unravel_index(self.place, self.grid)
        inside = np.stack([np.zeros(len(k)), j, i, np.ones(len(k))], 1)
        placed: NDArray[np.float64] = np.einsum("lab,lb->la", self.affines[k, :3], inside)
        return placed

    @property
    def affine(self) -> NDArray[np.float64]:
        """(k, j, i, 1) of a token → LPS mm. GeometryError without geometry or where planes lie at uneven steps."""
        if self.affines is None:
            raise GeometryError("this case has no geometry (PNG and JPEG carry none), and a grid in mm is asked for")
        whole: NDArray[np.float64] = self.affines[0].copy()
        steps = np.diff(self.affines[:, :3, 3], axis=0)
        if len(steps):
            if np.abs(steps - steps[0]).max() > 1e-3:
                raise GeometryError(
                    "the slices of this case lie at uneven steps; a head on the whole grid needs even ones. "
                    "Encode every slice (without --max-slices)"
                )
            whole[:3, 0] = steps[0]
        return whole


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Tokens that stay on disk until they are asked for.

    path     a `.b2nd` of `hilum embed --patches`
    slices   numbers of slices in the scan, of slice encoders; None: all in the file
    weights  (K · J · I,) of the tokens of those slices; zero: not inside the region; None: no region
    """

    path: Path
    slices: tuple[int, ...] | None = None
    weights: Array | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Tokens of B cases, padded at the end with zeros to the longest.

    tokens   (B, L, D) float32
    seen     (B, L) True for tokens, False for padding
    planes   (B, L) plane of each token, 0 for padding
    weights  (B, L) of the region, 0 for padding, summing to 1 in each case
    cases    the B cases; their own tokens are the unpadded ones
    numbers  which cases of the sequence they are
    """

    tokens: Tensor
    seen: Tensor
    planes: Tensor
    weights: Tensor
    cases: tuple[CaseTokens, ...]
    numbers: tuple[int, ...]

    def to(self, device: str) -> "TokenBatch":
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "seen", "planes", "weights")}
        return replace(self, **moved)


class TokenSequence:
    """N cases with patch tokens. `len(X)`, `X[5]` (one `CaseTokens`), `X[[3, 1]]` or `X[mask]` (another sequence).

    items  `CaseTokens` (held in memory) or `TokenFile` (read when needed), mixed as wanted
    """

    def __init__(self, items: Sequence[CaseTokens | TokenFile]) -> None:
        self.items = tuple(items)
        self._shapes: list[tuple[int, int, int]] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, int | np.integer):
            item = self.items[which]
            return item if isinstance(item, CaseTokens) else _read(item)
        numbers = np.arange(len(self))[which]
        return TokenSequence([self.items[n] for n in numbers])

    def outline(self, number: int) -> CaseTokens:
        """A case without its tokens (0, D): grid and geometry alone, of a file from its header."""
        item = self.items[number]
        if isinstance(item, CaseTokens):
            return replace(item, tokens=item.tokens[:0], place=item.place[:0], weights=None)
        found = read_patches(item.path, box=NOTHING)
        rows = (
            np.arange(found.grid[0]) if item.slices is None else np.array([found.slices.index(z) for z in item.slices])
        )
        affines = None if found.affines is None else found.affines[rows]
        return case_tokens(found._replace(grid=(len(rows), *found.grid[1:]), affines=affines))

    def box(self, number: int, start: Sequence[int], size: Sequence[int]) -> Array:
        """(k, j, i, D) tokens of a box of a case; of a file only the planes that it touches are decoded.

        UsageError for a case that is a region: it has no boxes.
        """
        item = self.items[number]
        k, j, i = (slice(int(first), int(first + n)) for first, n in zip(start, size))
        if isinstance(item, CaseTokens):
            if len(item.tokens) != math.prod(item.grid):
                raise UsageError("segmentation needs the tokens of whole scans; these are of a region")
            return item.tokens.reshape(*item.grid, -1)[k, j, i]
        if item.weights is not None:
            raise UsageError("segmentation needs the tokens of whole scans; these are of a region")
        if item.slices is None:
            return read_patches(item.path, box=(k, j, i)).tokens
        return np.concatenate([read_patches(item.path, slice=z).tokens[:, j, i] for z in item.slices[k]])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each case. Of files only the headers are read."""
        return np.array([length for length, _, _ in self._sizes()])

    @property
    def num_planes(self) -> NDArray[np.int64]:
        """(N,) planes of each case, of the whole scan where a region is looked at."""
        return np.array([planes for _, _, planes in self._sizes()])

    @property
    def width(self) -> int:
        """D. UsageError when cases differ in it, or there are none."""
        widths = sorted({width for _, width, _ in self._sizes()})
        if len(widths) != 1:
            raise UsageError(
                f"a head needs tokens of one width; found {widths or 'no case'}. Were cases encoded by different models?"
            )
        return widths[0]

    def _sizes(self) -> list[tuple[int, int, int]]:
        if self._shapes is None:
            self._shapes = [
                (*item.tokens.shape, item.grid[0]) if isinstance(item, CaseTokens) else _size(item)
                for item in self.items
            ]
        return self._shapes

    def batches(self, plan: Sequence[Sequence[int]], *, per_plane: bool = False) -> Iterator[TokenBatch]:
        """One batch for each list of case numbers, in that order; the next is read while this one is used.

        per_plane  the tokens of each plane are averaged to one
        """
        with ThreadPoolExecutor(1, thread_name_prefix="tokens") as reader:
            coming = [reader.submit(self.batch, plan[0], per_plane=per_plane)] if plan else []
            for following in range(1, len(plan) + 1):
                batch = coming.pop().result()
                if following < len(plan):
                    coming.append(reader.submit(self.batch, plan[following], per_plane=per_plane))
                yield batch
                del batch  # else three would be held

    def batch(self, numbers: Sequence[int], *, per_plane: bool = False) -> TokenBatch:
        """These cases as one padded batch."""
        cases: list[CaseTokens] = [self[int(n)] for n in numbers]
        if per_plane:
            cases = [_plane_means(case) for case in cases]
        longest = max(len(case.tokens) for case in cases)
        tokens = torch.zeros(len(cases), longest, cases[0].tokens.shape[1])
        planes = torch.zeros(len(cases), longest, dtype=torch.int64)
        weights = torch.zeros(len(cases), longest)
        for row, case in enumerate(cases):
            length = len(case.tokens)
            tokens[row, :length] = torch.from_numpy(case.tokens)
            planes[row, :length] = torch.from_numpy(case.planes)
            share = np.ones(length, np.float32) if case.weights is None else case.weights
            weights[row, :length] = torch.from_numpy(share / share.sum())
        seen = torch.arange(longest) < torch.tensor([len(case.tokens) for case in cases])[:, None]
        return TokenBatch(
            tokens=tokens,
            seen=seen,
            planes=planes,
            weights=weights,
            cases=tuple(cases),
            numbers=tuple(int(n) for n in numbers),
        )


def case_tokens(found: Patches, weights: Array | None = None) -> CaseTokens:
    """One case from the patch tokens of its scan.

    weights  (K · J · I,), or that many in the shape of the grid: bool cells or the share that a region covers; tokens with
             zero are left out. InputError when none is left
    """
    flat = found.tokens.reshape(-1, found.tokens.shape[-1])
    affines = found.affines
    if affines is None and found.affine is not None:
        affines = np.repeat(found.affine[None], found.grid[0], 0)
        affines[:, :3, 3] += np.arange(found.grid[0])[:, None] * found.affine[:3, 0]
    place, share = np.arange(len(flat)), None
    if weights is not None:
        share = np.asarray(weights, np.float32).ravel()
        if len(share) != len(flat):
            raise InputError(f"a region has {len(share)} weights, the scan {len(flat)} tokens; expected as many")
        place = np.flatnonzero(share)
        if not len(place):
            raise InputError("no token of the scan touches the region; expected at least one. Leave this case out")
        flat, share = flat[place], share[place]
    planar = bool(found.slices)
    return CaseTokens(tokens=flat, grid=found.grid, place=place, affines=affines, weights=share, planar=planar)


def features_tokens(features: Features, weights: Array | None = None) -> CaseTokens:
    """One case from `Encoder.encode`, without a detour over the disk. UsageError when its patch tokens were left out."""
    if features.patches is None:
        raise UsageError("these features hold no patch tokens; encode with patches=True")
    tokens = features.patches
    grid = (int(tokens.shape[0]), int(tokens.shape[1]), int(tokens.shape[2]))
    planar = bool(features.slices)
    affine = None if planar or features.affines is None else features.affines[0]
    affines = features.affines if planar else None
    return case_tokens(Patches(tokens, grid, affine, affines, features.slices, {}), weights)


def plan_batches(lengths: Array, order: Sequence[int], batch_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Cases in `order` → batches of `batch_size`, cut into pieces of at most `max_tokens` padded tokens (or one case)."""
    batches = []
    for start in range(0, len(order), batch_size):
        pieces: list[list[int]] = [[]]
        longest = 0
        for case in order[start : start + batch_size]:
            longest = max(longest, int(lengths[case]))
            if pieces[-1] and longest * (len(pieces[-1]) + 1) > max_tokens:
                pieces.append([])
                longest = int(lengths[case])
            pieces[-1].append(int(case))
        batches.append(pieces)
    return batches


def region_vectors(X: TokenSequence, max_tokens: int = 50_000) -> NDArray[np.float32]:
    """(N, D) mean of each case's tokens, weighted by its region: what any head on vectors takes.

    With Curia's cells (`encode.regions.curia_cells`) as weights this is CuriaBench's feature of a region; with the share of
    each patch that a region covers (`encode.grids.region_weights`) it is ours.
    """
    plan = [piece for batch in plan_batches(X.lengths, range(len(X)), len(X), max_tokens) for piece in batch]
    means = [torch.einsum("bl,bld->bd", batch.weights, batch.tokens) for batch in X.batches(plan)]
    vectors: NDArray[np.float32] = torch.cat(means).numpy()
    return vectors


def _read(item: TokenFile) -> CaseTokens:
    if item.slices is None:
        return case_tokens(read_patches(item.path), item.weights)
    parts = [read_patches(item.path, slice=z) for z in item.slices]
    whole = parts[0]
    rows = [whole.slices.index(z) for z in item.slices]
    tokens = np.concatenate([part.tokens for part in parts])
    affines = None if whole.affines is None else whole.affines[rows]
    grid = (len(rows), *whole.grid[1:])
    return case_tokens(Patches(tokens, grid, None, affines, item.slices, whole.facts), item.weights)


def _plane_means(case: CaseTokens) -> CaseTokens:
    """One token a plane, at the place of the plane's first token."""
    planes, starts, counts = np.unique(case.planes, return_index=True, return_counts=True)
    sums = np.stack([case.tokens[case.planes == plane].astype(np.float32).sum(0) for plane in planes])
    return replace(case, tokens=sums / counts[:, None].astype(np.float32), place=case.place[starts], weights=None)


def _size(item: TokenFile) -> tuple[int, int, int]:
    """Tokens, width and planes of a file, from its header."""
    try:
        k, j, i, width = blosc2.open(str(item.path), mode="r").shape
    except (OSError, RuntimeError, ValueError, FileNotFoundError) as error:
        raise InputError(f"{item.path} cannot be read as patch tokens: {error}") from None
    if item.weights is not None:
        return int(np.count_nonzero(item.weights)), width, k
    planes = k if item.slices is None else len(item.slices)
    return planes * j * i, width, planes
