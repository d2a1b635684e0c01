"""NumPy arrays out of pickle files that publishers ship, without running anything a pickle may ask for.

A pickle is a program. This reader follows the standard library's unpickler, but lets it find only the four callables that
rebuild plain arrays of numbers; any other name is refused before it is imported or called.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hilum.errors import ScanRefused

MAX_BYTES = 1 << 30
_REBUILD = type(np.empty(0)).__reduce__(np.empty(0))[0]  # numpy's _reconstruct, wherever this version keeps it


def _bytes_of_text(text: str, encoding: str) -> bytes:
    """What Python 2 arrays are written as in Python 3: latin-1 text of the bytes."""
    return text.encode(encoding if encoding in ("latin1", "latin-1") else "ascii")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _bytes_of_text,
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return _ALLOWED[module, name]

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
    except OSError as error:
        raise ScanRefused("unreadable", type(error).__name__) from None
    except pickle.UnpicklingError as error:
        raise ScanRefused("other_format", f"a pickle that {error}; expected one NumPy array") from None
    except (ValueError, TypeError, LookupError, EOFError, AttributeError, MemoryError, OverflowError) as error:
        raise ScanRefused("corrupt", f"pickle ({type(error).__name__})") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iuf":
        raise ScanRefused("other_format", f"a pickle of {type(found).__name__}; expected one array of numbers")
    return found
