"""The shape of a transformer as a value, apart from `vit.py` so that looking at settings loads no torch."""

import re
from dataclasses import dataclass
from typing import Literal

from hilum.errors import UsageError

Size = tuple[int, int, int, Literal["mlp", "swiglu"], int]


class _Sizes(dict[str, Size]):
    """A size that has no name is spelt "WIDTHxDEPTHxHEADS-KINDHIDDEN", as in "48x2x4-mlp192"."""

    def __missing__(self, name: str) -> Size:
        spelt = re.fullmatch(r"(\d+)x(\d+)x(\d+)-(mlp|swiglu)(\d+)", name)
        if spelt is None:
            raise UsageError(
                f"model size '{name}' is unknown; known: {', '.join(self)}, and WIDTHxDEPTHxHEADS-KINDHIDDEN, as 48x2x4-mlp192"
            )
        width, depth, heads, hidden = (int(spelt[n]) for n in (1, 2, 3, 5))
        if not heads or width % heads:
            raise UsageError(f"model size '{name}' has a width of {width}, which {heads} heads cannot share")
        return width, depth, heads, "mlp" if spelt[4] == "mlp" else "swiglu", hidden

    def name_of(self, size: Size) -> str:
        """The first name of a size, else its spelling."""
        width, depth, heads, kind, hidden = size
        return next((name for name, known in self.items() if known == size), f"{width}x{depth}x{heads}-{kind}{hidden}")


# name: (width, depth, heads, feed-forward kind, feed-forward width). B, L, g as in DINOv2 with Curia's SwiGLU widths
# (hidden = 8·ceil(⌊2·4D/3⌋/8)); "-mlp" as DINOv2 and DINOv3 release B and L, "-plus" as DINOv3; the small ones are ours.
SIZES = _Sizes(
    {
        "nano": (96, 3, 3, "mlp", 384),
        "micro": (128, 4, 2, "mlp", 512),
        "tiny": (192, 6, 3, "mlp", 768),
        "small": (384, 12, 6, "mlp", 1536),
        "base": (768, 12, 12, "swiglu", 2048),
        "large": (1024, 24, 16, "swiglu", 2736),
        "giant": (1536, 40, 24, "swiglu", 4096),
        "small-plus": (384, 12, 6, "swiglu", 1536),
        "base-mlp": (768, 12, 12, "mlp", 3072),
        "large-mlp": (1024, 24, 16, "mlp", 4096),
        "huge-plus": (1280, 32, 20, "swiglu", 5120),
        "voxelfm-base": (864, 12, 12, "mlp", 3456),
    }
)


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The shape of a transformer.

    patch, image   patch and reference image size in pixels, two numbers (2D) or three (3D)
    positions      "learned": one vector a cell of the reference grid, interpolated to other grids;
                   "rotary": axial rotary embedding of DINOv3 (base 100, coordinates in [-1, 1])
    antialias      learned positions are interpolated with antialiasing, as by DINOv2's models with registers
    norm_eps       of every LayerNorm (DINOv2: 1e-6, DINOv3: 1e-5)
    layer_scale    initial LayerScale (Touvron 2021); 0 leaves it out
    drop_path      share of samples whose residual branch is skipped in training, the same at every depth
    rope_rescale   in training, rotary coordinates are scaled by a log-uniform factor in [1/this, this], one a step for all
                   crops and blocks (DINOv3 draws 1/2 to 2, anew in each block); 1 leaves them
    """

    size: str = "base"
    patch: tuple[int, ...] = (16, 16)
    image: tuple[int, ...] = (256, 256)
    channels: int = 1
    positions: Literal["learned", "rotary"] = "learned"
    antialias: bool = False
    num_registers: int = 0
    norm_eps: float = 1e-6
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    rope_rescale: float = 1.0

    def __post_init__(self) -> None:
        _ = SIZES[self.size]  # an unknown size is refused here
        if len(self.patch) not in (2, 3) or len(self.patch) != len(self.image):
            raise UsageError(f"patch {self.patch} and image {self.image} need two axes (2D) or three (3D) each")
        if any(i % p for i, p in zip(self.image, self.patch)):
            raise UsageError(f"image {self.image} is no multiple of the patch {self.patch}")
        if self.antialias and len(self.patch) == 3:
            raise UsageError(
                "positions of a 3D transformer are interpolated without antialiasing; set antialias to false"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(i // p for i, p in zip(self.image, self.patch))
