"""A small exported encoder."""

from pathlib import Path

import pytest
import torch

from hilum.encode.contract import Contract
from hilum.encode.encoder import write_encoder
from hilum.encode.vit import ViT, ViTConfig


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(3)
    return ViT(ViTConfig(size="nano", patch=(8, 8), image=(32, 32), layer_scale=0.0)).eval()


@pytest.fixture
def export(tmp_path: Path, vit: ViT) -> Path:
    folder = tmp_path / "export"
    write_encoder(folder, vit, Contract(size_px=32), {"recipe": "test", "step": 7})
    return folder
