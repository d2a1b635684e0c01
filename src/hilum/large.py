"""Arrays larger than a process should hold: their pages lie in a file without a name and leave memory when not in use.

An array of more than LIMIT_BYTES is a memory map over a file in the temporary folder ($TMPDIR) that vanishes with the
array, even when the process is killed. Whoever goes through it slice by slice (`each`) keeps one slice in memory.
Everything else is as with any other array, so nobody needs to know which kind it is.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LIMIT_BYTES = 160 << 20  # two such arrays, the modules (170 MiB) and what is worked on stay below 600 MB


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array to be filled. Where the temporary folder has no room for a large one, memory must do."""
    num_bytes = prod(shape) * np.dtype(dtype).itemsize
    if num_bytes <= LIMIT_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="hilum-") as handle:
        try:
            # Reserved now: a disk that fills up later would end the process in the midst of an assignment.
            os.posix_fallocate(handle.fileno(), 0, num_bytes)
        except OSError:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, mmap.mmap(handle.fileno(), num_bytes))


def each(array: NDArray[Any], order: Iterable[int] | None = None) -> Iterator[NDArray[Any]]:
    """The slices along axis 0, in this order; each leaves memory when the next is asked for."""
    pages = _pages(array)
    for k in range(len(array)) if order is None else order:
        yield array[k]
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED)


def gather(slices: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Slices one after the other as an array of this shape, converted without a check of their range."""
    out = empty(shape, dtype)
    pages = _pages(out)
    for k, one in enumerate(slices):
        out[k] = one
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED)
    return out


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself when it lies in order (C), else a copy that does."""
    if array.flags.c_contiguous or array.nbytes <= LIMIT_BYTES:
        return np.ascontiguousarray(array)
    return gather(each(array), array.shape, array.dtype)


def _pages(array: NDArray[Any]) -> mmap.mmap | None:
    """The map behind an array or a view of one. On a shared map, pages given back come again from the file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
