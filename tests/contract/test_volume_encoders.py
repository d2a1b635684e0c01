"""What every encoder of volumes must do. A new one is tested by one line in ENCODERS."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional

from hilum.archive.intake import read_scan
from hilum.archive.privacy import Key
from hilum.archive.scan import find
from hilum.encode.chunks import encode_prepared
from hilum.encode.encoder import Encoder
from hilum.encode.released.voxelfm import read_voxelfm, write_voxelfm
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract, prepare_volume
from hilum.volume import Volume, orient

CONTRACT = VolumeContract(background_px=5, patch=(6, 6, 6), max_patches=150)
CONFIG = ViTConfig(
    size="48x2x4-mlp96", patch=(6, 6, 6), image=(12, 12, 12), positions="rotary", num_registers=2, norm_eps=1e-5,
    layer_scale=0.5,
)  # fmt: skip


def make_vit(**changes: object) -> Encoder:
    torch.manual_seed(5)
    return Encoder(ViT(replace(CONFIG, **changes)), CONTRACT, "test", patch=CONFIG.patch)


def make_voxelfm(folder: Path) -> Encoder:
    """Through VoxelFM's files."""
    model = make_vit().network
    assert isinstance(model, ViT)
    write_voxelfm(model, CONTRACT, folder)
    model, contract, report = read_voxelfm(folder)
    contract = replace(contract, background_px=5, max_patches=150)
    return Encoder(model, contract, "voxelfm", patch=contract.patch, report=report)


ENCODERS: dict[str, Callable[[Path], Encoder]] = {
    "vit, rotary positions": lambda _: make_vit(),
    "vit, learned positions": lambda _: make_vit(positions="learned", num_registers=0),
    "voxelfm": make_voxelfm,
}


@pytest.fixture(params=ENCODERS, ids=list(ENCODERS))
def encoder(request, tmp_path_factory) -> Encoder:
    return ENCODERS[request.param](tmp_path_factory.mktemp("model"))


def scan() -> Volume:
    """A body in air, unlike from every side, axial, 2 × 0.9 × 0.9 mm, not in the middle of the scanner."""
    z, y, x = (np.linspace(-1, 1, n) for n in (20, 40, 44))
    r = (z[:, None, None] / 1.5) ** 2 + (y[:, None] / 0.8) ** 2 + (x / 0.85) ** 2
    voxels = np.where(r < 1, np.where(r > 0.75, -100.0, 45.0), -1000.0)
    lung = (z[:, None, None] / 0.8) ** 2 + (y[:, None] / 0.4) ** 2 + ((x + 0.4) / 0.25) ** 2 < 1
    voxels = np.where(lung, -850.0, voxels)
    voxels[8:11, 25:31, 20:26] = 1400
    voxels += np.random.default_rng(0).normal(0, 10, r.shape)
    affine = np.array([[0, 0, 0.9, -21.5], [0, 0.9, 0, -130.25], [2, 0, 0, 40], [0, 0, 0, 1]])
    return Volume(voxels=np.rint(voxels).astype(np.int16), affine=affine, modality="CT", unit="HU")


def write_nifti(path: Path, vol: Volume) -> Path:
    ras = np.diag([-1.0, -1, 1, 1]) @ vol.affine[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(vol.voxels.T, ras), path)
    return path


@pytest.fixture
def ways(tmp_path, write_ct) -> dict[str, Path]:
    """The same scan in other files."""
    vol = scan()
    coronal, sagittal = orient(vol, "PIL"), orient(vol, "LIP")
    return {
        "DICOM, file names reversed": write_ct("reversed", vol.voxels, vol.affine, reverse=True),
        "DICOM, acquired from head to feet": write_ct("down", *_both(orient(vol, "IPL"))),
        "DICOM, coronal": write_ct("coronal", *_both(coronal)),
        "DICOM, sagittal": write_ct("sagittal", *_both(sagittal)),
        "NIfTI": write_nifti(tmp_path / "a.nii.gz", vol),
        "NIfTI in RAS order": write_nifti(tmp_path / "b.nii", orient(vol, "SAR")),
        "NIfTI, coronal": write_nifti(tmp_path / "c.nii.gz", orient(vol, "ASL")),
    }


def _both(vol: Volume) -> tuple[np.ndarray, np.ndarray]:
    assert vol.affine is not None
    return vol.voxels, vol.affine


def read(path: Path, key: Key) -> Volume:
    (entry,) = [entry for entry in find(path, key) if entry.used]
    return read_scan(entry)


def test_shapes(encoder):
    prepared = prepare_volume(scan(), encoder.contract)
    tokens = encoder.tokens(prepared.image[None])
    assert tokens.cls.shape[0] == tokens.registers.shape[0] == 1
    assert tokens.patches.shape[:2] == (1, np.prod(prepared.grid))
    assert prepared.image.shape == (1, *(g * p for g, p in zip(prepared.grid, encoder.patch)))
    for part in tokens:
        assert part.dtype == torch.float32
        assert part.device.type == "cpu"
        assert torch.isfinite(part).all()


def test_the_same_scan_in_any_file_has_the_same_features(encoder, ways, key):
    original = prepare_volume(scan(), encoder.contract)
    expected = encoder.tokens(original.image[None])
    for way, path in ways.items():
        prepared = prepare_volume(read(path, key), encoder.contract)
        found = encoder.tokens(prepared.image[None])
        assert prepared.grid == original.grid, way
        np.testing.assert_allclose(prepared.affine, original.affine, atol=1e-3, err_msg=way)
        assert float(functional.cosine_similarity(found.cls, expected.cls)) >= 0.9999, way
        assert functional.cosine_similarity(found.patches, expected.patches, dim=-1).min() >= 0.9999, way


def test_a_volume_alone_is_encoded_as_in_a_batch(encoder):
    image = prepare_volume(scan(), encoder.contract).image
    images = torch.stack([image, image.flip(1), image * 0.5])
    together = encoder.tokens(images)
    for n in range(3):
        for a, b in zip(encoder.tokens(images[n : n + 1]), together):
            torch.testing.assert_close(a[0], b[n], atol=1e-5, rtol=1e-5)


def test_twice_the_same(encoder):
    image = prepare_volume(scan(), encoder.contract).image[None]
    before = image.clone()
    for a, b in zip(encoder.tokens(image), encoder.tokens(image)):
        assert torch.equal(a, b)
    assert torch.equal(image, before)


def test_a_patch_token_is_where_its_affine_says(encoder):
    """A bright spot changes the token of the patch that the affine names more than any other."""
    vol = scan()
    plain = prepare_volume(vol, encoder.contract)
    place = tuple(n // 2 for n in plain.grid)
    world = plain.affine @ [*place, 1.0]
    index = np.rint(np.linalg.solve(vol.affine, world)[:3]).astype(int)
    voxels = vol.voxels.copy()
    voxels[tuple(slice(i - 1, i + 2) for i in index)] = 1900
    marked = prepare_volume(replace(vol, voxels=voxels), encoder.contract)
    assert marked.grid == plain.grid
    change = (encoder.tokens(marked.image[None]).patches - encoder.tokens(plain.image[None]).patches)[0].norm(dim=1)
    assert np.unravel_index(int(change.argmax()), plain.grid) == place


def test_one_pass_where_memory_allows(encoder):
    prepared = prepare_volume(scan(), encoder.contract)
    tokens, notes = encode_prepared(encoder, prepared)
    assert notes == ()
    assert torch.equal(tokens.patches, encoder.tokens(prepared.image[None]).patches)


def test_bfloat16_keeps_the_features(encoder):
    image = prepare_volume(scan(), encoder.contract).image[None]
    exact = encoder.tokens(image)
    encoder.network.to(torch.bfloat16)
    rough = encoder.tokens(image)
    assert rough.cls.dtype == torch.float32
    assert float(functional.cosine_similarity(rough.cls, exact.cls)) > 0.999
    assert functional.cosine_similarity(rough.patches, exact.patches, dim=-1).min() > 0.999


def test_contract_and_name_are_stable(encoder):
    assert len(encoder.contract.hash) == 16
    assert encoder.contract.hash == replace(encoder.contract).hash
    assert encoder.name
