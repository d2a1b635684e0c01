"""Raw voxels inside a file: plain or deflated, one volume of many, never more bytes than the file can hold.

A header says how many voxels follow. Before anything is read, that number is held against the size of the file, against
the tightest packing that deflate knows, and against the memory of this machine.
"""

import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hilum.errors import ScanRefused
from hilum.volume import FloatArray

MAX_BYTES = 1 << 34  # of one volume
MAX_WHOLE_BYTES = 1 << 29  # of a file whose volumes are interleaved, which is held in memory
MAX_VOLUMES = 10_000  # a functional MR run has a thousand or two
MAX_RATIO = 1032  # deflate packs no tighter (258 bytes in two bits)
_CHUNK = 1 << 14
_PIECE = 1 << 20  # unpacked at a time; also how far the end of a stream is looked for behind the last voxel


@dataclass(frozen=True)
class RawVoxels:
    """Where the voxels of a file lie.

    path     the file that holds them
    start    its byte at which they, or the stream they are packed in, begin
    skip     bytes between there and the first voxel, counted after unpacking
    packed   whether the stream is gzip or zlib
    dtype    with its byte order
    sizes    of all axes, fastest first: three of space, and one more when the file holds several volumes
    apart    index in `sizes` of the axis that separates volumes; None with a single volume
    z_first  whether the fastest axis is Z (an .npy in Fortran order), not X
    """

    path: Path
    start: int
    skip: int
    packed: bool
    dtype: np.dtype[Any]
    sizes: tuple[int, ...]
    apart: int | None = None
    z_first: bool = False

    @property
    def num_volumes(self) -> int:
        return 1 if self.apart is None else self.sizes[self.apart]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(k, j, i) of one volume."""
        i, j, k = (n for axis, n in enumerate(self.sizes) if axis != self.apart)
        return (i, j, k) if self.z_first else (k, j, i)

    @property
    def num_bytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image file says.

    voxels           where they lie, how many there are
    affine           (k, j, i, 1) → LPS mm; None for a file without geometry
    labels           whether it calls itself a label map
    slope, intercept value = stored · slope + intercept
    flags            cautions, as in `Entry.flags`
    """

    voxels: RawVoxels
    affine: FloatArray | None
    labels: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    flags: tuple[str, ...] = ()


def check_size(voxels: RawVoxels) -> None:
    """Raise ScanRefused unless the voxels fit into the file and one volume fits into memory."""
    sizes = "×".join(str(n) for n in voxels.sizes)
    if min(voxels.sizes) < 1:
        raise ScanRefused("corrupt", f"an axis without voxels: {sizes}")
    if voxels.num_volumes > MAX_VOLUMES:
        raise ScanRefused("too_large", f"{voxels.num_volumes} volumes, limit {MAX_VOLUMES}")
    one = voxels.num_bytes // voxels.num_volumes
    if one > MAX_BYTES or one + 4 * prod(voxels.shape) > _memory():
        raise ScanRefused("too_large", f"{sizes} voxels of {voxels.dtype.itemsize} bytes")
    try:
        available = voxels.path.stat().st_size - voxels.start
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    needed = voxels.skip + voxels.num_bytes
    if voxels.start < 0 or needed > available * (MAX_RATIO if voxels.packed else 1):
        packed = " packed" if voxels.packed else ""
        raise ScanRefused("truncated", f"{needed} bytes of voxels declared, {max(available, 0)}{packed} bytes present")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_stored(voxels: RawVoxels, volume: int = 0) -> NDArray[Any]:
    """The stored numbers (Z, Y, X) of one volume, in their own type. Raises ScanRefused.

    volume  number along `apart`

    A packed file with several volumes is unpacked once from end to end, which proves its checksum; marks on the way
    let every volume be read again from close by, so that all volumes together cost about two passes.
    """
    check_size(voxels)
    if not 0 <= volume < voxels.num_volumes:
        raise ScanRefused("corrupt", f"volume {volume} of {voxels.num_volumes}")
    try:
        status = voxels.path.stat()
        if voxels.apart in (None, len(voxels.sizes) - 1):
            one = voxels.num_bytes // voxels.num_volumes
            found = _read(voxels, volume * one, one, (status.st_size, status.st_mtime_ns))
        else:
            found = _interleaved(voxels, (status.st_size, status.st_mtime_ns)).take(volume, voxels.apart)
    except (EOFError, OSError) as error:
        raise ScanRefused("truncated", f"voxels ({type(error).__name__})") from None
    except zlib.error:
        raise ScanRefused("corrupt", "the packed voxels are broken or their checksum is wrong") from None
    if found.ndim == 3:
        return found.T
    return found.view(voxels.dtype).reshape(voxels.shape, order="F" if voxels.z_first else "C")


@lru_cache(maxsize=1)
def _interleaved(voxels: RawVoxels, version: tuple[int, int]) -> NDArray[Any]:
    """All voxels of a file in which volumes alternate voxel by voxel, or slice by slice."""
    if voxels.num_bytes > MAX_WHOLE_BYTES:
        raise ScanRefused("too_large", f"{voxels.num_bytes} bytes of interleaved volumes, limit {MAX_WHOLE_BYTES}")
    return _read(voxels, 0, voxels.num_bytes, version).view(voxels.dtype).reshape(voxels.sizes, order="F")


def _read(voxels: RawVoxels, first: int, count: int, version: tuple[int, int]) -> NDArray[np.uint8]:
    """`count` bytes from `first` on, counted from the first voxel."""
    if voxels.packed:
        return _packed(voxels, version).read(voxels.skip + first, count)
    found = np.fromfile(voxels.path, np.uint8, count, offset=voxels.start + voxels.skip + first)
    if len(found) < count:
        raise EOFError
    return found


@lru_cache(maxsize=2)
def _packed(voxels: RawVoxels, version: tuple[int, int]) -> "_Unpacker":
    """The unpacker of one file; `version` changes when the file does."""
    unpacker = _Unpacker(voxels.path, voxels.start, voxels.skip + voxels.num_bytes)
    if voxels.num_volumes > 1:
        unpacker.read(unpacker.size, 0)
    return unpacker


class _Unpacker:
    """A gzip or zlib stream inside a file, read from any place; gzip may have several members (RFC 1950, 1952).

    size  bytes that are wanted of it; nothing behind them is unpacked but the end of the stream
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        self.path, self.size = path, size
        self.step = max(1 << 20, size // 256)  # a mark takes 50 kB
        self.marks = [_Mark(0, start, b"", zlib.decompressobj(47))]
        self.here = self.marks[0]

    def read(self, first: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from `first` on. EOFError when the stream is cut off, zlib.error when it is broken."""
        nearest = max((m for m in (*self.marks, self.here) if m.at <= first), key=lambda m: m.at)
        at, place, rest, inflate = nearest.at, nearest.place, nearest.rest, nearest.inflate.copy()
        found = np.empty(count, np.uint8)
        end = first + count
        with open(self.path, "rb") as handle:
            handle.seek(place)
            while at < end:
                if inflate.eof:
                    inflate, rest = _next_member(inflate, handle)
                rest = rest or handle.read(_CHUNK)
                if not rest:
                    raise EOFError
                goal = first if at < first else end
                piece = inflate.decompress(rest, min(_PIECE, goal - at))
                rest = inflate.unconsumed_tail
                if at >= first:
                    found[at - first : at - first + len(piece)] = np.frombuffer(piece, np.uint8)
                at += len(piece)
                if at >= self.marks[-1].at + self.step and not inflate.eof:
                    self.marks.append(_Mark(at, handle.tell(), rest, inflate.copy()))
            if end == self.size:
                _check_end(inflate, rest, handle)
            elif not inflate.eof:
                self.here = _Mark(at, handle.tell(), rest, inflate)
        return found


@dataclass(frozen=True)
class _Mark:
    """The state of unpacking at one byte of the content: where the file is read next, and what was read but not used."""

    at: int
    place: int
    rest: bytes
    inflate: Any


def _next_member(inflate: Any, handle: BinaryIO) -> tuple[Any, bytes]:
    """The decompressor of the next gzip member and the bytes at hand for it. EOFError when there is none."""
    rest = inflate.unused_data
    while rest.startswith(b"\0") or not rest:  # padding is allowed between members
        rest = rest.lstrip(b"\0") or handle.read(_CHUNK)
        if not rest:
            raise EOFError
    return zlib.decompressobj(47), rest


def _check_end(inflate: Any, rest: bytes, handle: BinaryIO) -> None:
    """Unpack to the end of the member, where zlib compares the checksum; up to _PIECE bytes may follow the voxels."""
    behind = 0
    while not inflate.eof and behind < _PIECE:
        rest = rest or handle.read(_CHUNK)
        if not rest:
            raise EOFError
        behind += len(inflate.decompress(rest, _PIECE))
        rest = inflate.unconsumed_tail
