"""What every encoder must do. A new encoder is tested by one line in ENCODERS."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from hilum.archive.one import read
from hilum.archive.phantom import write_phantom
from hilum.archive.privacy import Key
from hilum.encode.contract import Contract, prepare_slice
from hilum.encode.encoder import Encoder, pixel_encoder
from hilum.encode.features import Features
from hilum.encode.pooling import pool
from hilum.encode.vit import ViT, ViTConfig
from hilum.volume import Volume


def make_vit(**changes: object) -> Encoder:
    torch.manual_seed(5)
    settings: dict = {"size": "nano", "patch": (8, 8), "image": (32, 32), **changes}
    return Encoder(ViT(ViTConfig(**settings)), Contract(size_px=48), "test", patch=(8, 8))


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "pixels": pixel_encoder,
    "vit, learned positions": make_vit,
    "vit, rotary positions": lambda: make_vit(positions="rotary", num_registers=2),
    "vit, drop path in training": lambda: make_vit(drop_path=0.5, layer_scale=0.0),
}


@pytest.fixture(params=ENCODERS, ids=list(ENCODERS))
def encoder(request) -> Encoder:
    return ENCODERS[request.param]()


@pytest.fixture
def images(encoder) -> torch.Tensor:
    rng = np.random.default_rng(0)
    slices = [rng.normal(0, 300, (60, 50)).astype(np.float32) for _ in range(5)]
    return torch.stack([prepare_slice(s, "CT", "HU", encoder.contract) for s in slices])


def test_shapes(encoder, images):
    tokens = encoder.tokens(images)
    rows, columns = encoder.grid
    assert tokens.cls.shape[0] == tokens.patches.shape[0] == tokens.registers.shape[0] == 5
    assert tokens.patches.shape[1] == rows * columns
    assert images.shape[1:] == (1, encoder.contract.size_px, encoder.contract.size_px)
    for part in tokens:
        assert part.dtype == torch.float32
        assert part.device.type == "cpu"
        assert not part.requires_grad
        assert torch.isfinite(part).all()
    assert pool(tokens, encoder.contract.pooling).shape[0] == 5


def test_an_image_alone_is_encoded_as_in_a_batch(encoder, images):
    together = encoder.tokens(images)
    for n in (0, 4):
        alone = encoder.tokens(images[n : n + 1])
        for a, b in zip(alone, together):
            torch.testing.assert_close(a[0], b[n], atol=1e-5, rtol=1e-5)


def test_order_of_the_batch_does_not_matter(encoder, images):
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        encoder.tokens(images[order]).cls, encoder.tokens(images).cls[order], atol=1e-5, rtol=1e-5
    )


def test_twice_the_same(encoder, images):
    before = images.clone()
    for a, b in zip(encoder.tokens(images), encoder.tokens(images)):
        assert torch.equal(a, b)
    assert torch.equal(images, before)


def test_different_images_differ(encoder, images):
    vectors = pool(encoder.tokens(images), encoder.contract.pooling)
    assert torch.pdist(vectors).min() > 1e-4


def test_patches_lie_row_by_row(encoder):
    """A bright square in one corner changes that corner's patch token more than the opposite one's."""
    size, (rows, columns) = encoder.contract.size_px, encoder.grid
    plain = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(1)) * 0.1
    marked = plain.clone()
    marked[..., : size // rows, size - size // columns :] += 3  # first row, last column
    change = (encoder.tokens(marked).patches - encoder.tokens(plain).patches)[0].norm(dim=1).view(rows, columns)
    assert change.argmax() == columns - 1


@pytest.mark.parametrize("kind", ENCODERS)
def test_contract_and_name_are_stable(kind):
    encoder, again = ENCODERS[kind](), ENCODERS[kind]()
    assert encoder.contract.hash == again.contract.hash
    assert len(encoder.contract.hash) == 16
    assert encoder.name


# ---- the same scan, whatever it is stored as


def write_nifti(path: Path, vol: Volume, axes: tuple[int, ...], flips: tuple[int, ...]) -> Path:
    """A scan with its array axes in another order and direction; the affine says so, in NIfTI's RAS."""
    assert vol.affine is not None
    to_ras = np.diag([-1.0, -1, 1, 1]) @ vol.affine
    voxels, affine = vol.voxels.transpose(axes), to_ras[:, [*axes, 3]].copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
        affine[:3, axis] *= -1
        voxels = np.flip(voxels, axis)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(voxels), affine), path)
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One CT of 8 slices in several forms, and its mirror image."""
    folder = tmp_path_factory.mktemp("forms")
    write_phantom(folder / "phantom", num_patients=1, num_slices=8, matrix=48, seed=3)
    source = folder / "phantom" / "scans" / "PHANTOM0000" / "ct"
    slices = {p: pydicom.dcmread(p) for p in source.iterdir()}
    rows = max(s.Rows for s in slices.values())
    (folder / "dicom").mkdir()
    (folder / "reversed").mkdir()
    whole = sorted((s for s in slices.values() if s.Rows == rows), key=lambda s: float(s.ImagePositionPatient[2]))
    for number, part in enumerate(whole):
        part.save_as(folder / "dicom" / f"{number:03}.dcm")
        part.InstanceNumber = 900 - number
        part.save_as(folder / "reversed" / f"{len(whole) - number:03}")
    vol = read(folder / "dicom", key=Key(bytes(32)))
    assert vol.modality == "CT"
    mirrored = replace(vol, voxels=np.ascontiguousarray(vol.voxels[:, :, ::-1]))
    return {
        "DICOM": folder / "dicom",
        "files in reverse": folder / "reversed",
        "NIfTI": write_nifti(folder / "a.nii.gz", vol, (2, 1, 0), ()),
        "NIfTI, RAS": write_nifti(folder / "b.nii", vol, (2, 1, 0), (0, 1)),
        "NIfTI, axes turned": write_nifti(folder / "c.nii", vol, (0, 2, 1), (0, 2)),
        "mirrored": write_nifti(folder / "m.nii", mirrored, (2, 1, 0), ()),
    }


def test_the_same_scan_gives_the_same_features(encoder, forms):
    found = {name: encoder.encode(read(path, key=Key(bytes(32))), "slice") for name, path in forms.items()}
    wanted = found.pop("DICOM")
    mirrored = found.pop("mirrored")

    def cosines(features: Features) -> np.ndarray:
        a, b = wanted.vectors, features.vectors
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    for name, features in found.items():
        assert cosines(features).min() >= 0.9999, name
        np.testing.assert_allclose(features.affines, wanted.affines, atol=1e-3, err_msg=name)
    assert cosines(mirrored).max() < 0.9999
