"""hilum: one door into foundation models for radiology.

Every command has a function of the same name here. They are loaded when first asked for, so `import hilum` is cheap.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hilum.archive.phantom import write_phantom as phantom
    from hilum.archive.prepare import prepare
    from hilum.archive.scan import scan
    from hilum.demo import demo
    from hilum.encode.embed import embed
    from hilum.pretrain.loop import pretrain
    from hilum.probe.fit import probe

__version__ = version("hilum")
__all__ = ["__version__", "demo", "embed", "phantom", "prepare", "pretrain", "probe", "scan"]

_FUNCTIONS = {
    "demo": ("hilum.demo", "demo"),
    "embed": ("hilum.encode.embed", "embed"),
    "phantom": ("hilum.archive.phantom", "write_phantom"),
    "prepare": ("hilum.archive.prepare", "prepare"),
    "pretrain": ("hilum.pretrain.loop", "pretrain"),
    "probe": ("hilum.probe.fit", "probe"),
    "scan": ("hilum.archive.scan", "scan"),
}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'hilum' has no attribute '{name}'")
    module, function = _FUNCTIONS[name]
    return getattr(import_module(module), function)
