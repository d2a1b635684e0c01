"""NumPy arrays out of pickle files that publishers ship, without running anything a pickle may ask for.

A pickle is a program. This reader follows the standard library's unpickler, but every name that a pickle of an array asks for
is answered with a stand-in of ours that only notes what it is given; any other name is refused before it is imported. The
array is made afterwards, from a checked shape, a plain type and bytes.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.errors import ScanRefused

MAX_BYTES = 1 << 30
_PLAIN = re.compile(r"[iu][1248]|f[248]")


class _Type:
    """Stands for numpy.dtype: a plain number, in a byte order."""

    def __init__(self, text: Any, align: Any = False, copy: Any = False) -> None:
        self.text, self.order = str(text).lstrip("<>|="), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"

    @property
    def dtype(self) -> np.dtype[Any]:
        if not _PLAIN.fullmatch(self.text):
            raise ValueError("no plain numbers")
        return np.dtype(self.order + self.text)


class _Array:
    """Stands for an array while its state is unpickled."""

    def __init__(self) -> None:
        self.shape: Any = ()
        self.type: Any = None
        self.by_column = False
        self.raw: Any = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.type, self.by_column, self.raw = state


def _empty(kind: Any, shape: Any, letter: Any) -> _Array:
    return _Array()


def _of_buffer(raw: Any, kind: Any, shape: Any, order: Any, *axes: Any) -> _Array:
    """What numpy writes in protocol 5."""
    array = _Array()
    array.shape, array.type, array.by_column, array.raw = shape, kind, order == "F", raw
    return array


def _bytes_of_text(text: Any, encoding: Any) -> bytes:
    """What bytes are written as before protocol 3."""
    return str(text).encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _of_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _bytes_of_text,
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("asks for an object outside of the file")


def read_array(path: Path) -> NDArray[Any]:
    """The one array in a pickle, of Python 2 or 3. Raises ScanRefused.

    returns  an array of plain numbers
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ScanRefused("too_large", f"a pickle of {path.stat().st_size >> 20} MiB")
        found = _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        if not isinstance(found, _Array):
            raise ScanRefused("other_format", f"a pickle of {type(found).__name__}; expected one NumPy array")
        return _make(found)
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except pickle.UnpicklingError as error:
        raise ScanRefused("other_format", f"a pickle that {error}; expected one NumPy array") from None
    except (ValueError, TypeError, LookupError, EOFError, AttributeError, ArithmeticError, MemoryError) as error:
        raise ScanRefused("corrupt", f"pickle ({type(error).__name__})") from None


def _make(found: _Array) -> NDArray[Any]:
    """Raises ValueError or TypeError when shape, type and bytes do not belong together."""
    if not isinstance(found.type, _Type):
        raise ValueError("no type")
    dtype, shape = found.type.dtype, tuple(int(n) for n in found.shape)
    raw = found.raw.encode("latin1") if isinstance(found.raw, str) else bytes(found.raw)
    if min(shape, default=0) < 1 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError("another number of bytes")
    order = "F" if found.by_column else "C"
    return np.frombuffer(raw, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))  # type: ignore[call-overload,no-any-return]
