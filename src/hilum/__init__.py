"""hilum: one door into foundation models for radiology. The commands as Python functions are in `hilum.api`.

hilum.load_encoder("curia-2-b").encode(hilum.read(path))
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hilum.archive.one import read
    from hilum.encode.table.patches import read_patches
    from hilum.encode.zoo import load_encoder

__all__ = ["__version__", "load_encoder", "read", "read_patches"]
__version__ = version("hilum")

_WHERE = {"read": "hilum.archive.one", "read_patches": "hilum.encode.table.patches", "load_encoder": "hilum.encode.zoo"}


def __getattr__(name: str) -> Any:
    """Loaded when first asked for: `import hilum` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'hilum' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)
