"""A small exported encoder, and a hub on this machine."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hilum.encode.contract import Contract
from hilum.encode.encoder import write_encoder
from hilum.encode.vit import ViT, ViTConfig

sys.path.insert(0, str(Path(__file__).parent))
from fake_hub import Hub, serve

sys.path.pop(0)


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(3)
    return ViT(ViTConfig(size="nano", patch=(8, 8), image=(32, 32), layer_scale=0.0)).eval()


@pytest.fixture
def export(tmp_path: Path, vit: ViT) -> Path:
    folder = tmp_path / "export"
    write_encoder(folder, vit, Contract(size_px=32), {"recipe": "test", "step": 7})
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, facebook/dinov2-small, which the real client finds; models are kept in tmp_path/home."""
    from huggingface_hub import constants, file_download

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # what the client writes at once; 10 MB of its own
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HILUM_HOME", str(tmp_path / "home"))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hub = Hub({})
    with serve(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield hub
