"""VoxelFM's own loader, restated from its description, and the difference it makes on scans written here."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch.nn import functional

from hilum.encode.encoder import Encoder
from hilum.encode.released.voxelfm_upstream import compare_upstream, prepare_upstream, read_upstream
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract
from hilum.errors import ContractError, InputError, UsageError

CONTRACT = VolumeContract(background_px=5, patch=(8, 8, 8), max_patches=40)
AXES = {"S": (0, 0, 1), "I": (0, 0, -1), "P": (0, 1, 0), "A": (0, -1, 0), "L": (1, 0, 0), "R": (-1, 0, 0)}


@pytest.fixture(autouse=True)
def own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    config = ViTConfig(size="48x2x4-mlp96", patch=(8, 8, 8), image=(16, 16, 16), positions="rotary", layer_scale=0.5)
    return Encoder(ViT(config), CONTRACT, "small", patch=config.patch)


def anatomy() -> np.ndarray:
    """(Z, Y, X) = (24, 40, 44) in HU: a body in air, left unlike right, front unlike back, with metal of 2500 HU."""
    z, y, x = (np.linspace(-1, 1, n) for n in (24, 40, 44))
    r = (z[:, None, None] / 1.5) ** 2 + (y[:, None] / 0.8) ** 2 + (x / 0.85) ** 2
    voxels = np.where(r < 1, np.where(r > 0.75, -100.0, 45.0), -1000.0)
    lung = (z[:, None, None] / 0.8) ** 2 + (y[:, None] / 0.4) ** 2 + ((x + 0.4) / 0.25) ** 2 < 1
    voxels = np.where(lung, -850.0, voxels) + np.random.default_rng(0).normal(0, 10, r.shape)
    voxels[9:12, 26:30, 20:26] = 2500
    return np.rint(voxels).astype(np.int16)


def affine_of(code: str, spacing: tuple[float, float, float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array([AXES[letter] for letter in code]).T * spacing
    return affine


def write_nifti(path, voxels, code, spacing):
    """voxels (Z, Y, X) whose axes go to the letters of `code`."""
    ras = np.diag([-1.0, -1, 1, 1]) @ affine_of(code, spacing)[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(voxels.T, ras), path)
    return path


def upstream_pipeline(image: torch.Tensor, spacing: tuple[float, ...], contract: VolumeContract) -> torch.Tensor:
    """crop_volume → resize_isotropic → resize_max_patches → patch_crop → z-score, as described, on dense counts."""
    side, p = contract.background_px, contract.patch[0]
    counts = functional.conv3d((image > -800).float()[None, None], torch.ones(1, 1, side, side, side), padding="same")
    places = (counts[0, 0] > side**3 * 0.5).nonzero()
    low = (places.min(0).values - side // 2).clamp(min=0)
    high = torch.minimum(places.max(0).values + side // 2, torch.tensor(image.shape) - 1)
    image = image[tuple(slice(a, b + 1) for a, b in zip(low.tolist(), high.tolist()))]

    def resize(image, shape):
        return functional.interpolate(image[None, None], shape, mode="trilinear", align_corners=False)[0, 0]

    if len(set(spacing)) > 1:
        target = max(min(spacing), 0.75)
        image = resize(image, [round(n * s / target) for n, s in zip(image.shape, spacing)])
    patches = np.prod([n // p for n in image.shape])
    if patches > contract.max_patches:
        f, best = (contract.max_patches / patches) ** (1 / 3), None
        for share in (0.98, 0.99, 1.0, 1.01, 1.02):
            shape = [int(n * (f * share)) for n in image.shape]
            count = np.prod([n // p for n in shape])
            if count <= contract.max_patches and (best is None or count > best[0]):
                best = (count, shape)
        image = resize(image, best[1] if best else [int(n * (f * 0.95)) for n in image.shape])
    image = image[tuple(slice(n % p // 2, n - n % p + n % p // 2) for n in image.shape)]
    return (image - contract.mean) / contract.std


@pytest.mark.parametrize("spacing", [(2.0, 0.9, 0.9), (1.5, 0.6, 0.6), (1.0, 1.0, 1.0)])
def test_the_whole_way_is_theirs_to_the_last_bit(spacing, tmp_path, write_ct):
    voxels = anatomy()
    cases = {
        write_ct("dicom", voxels, affine_of("SPL", spacing)): voxels.clip(-1000, 1000),
        write_nifti(tmp_path / "a.nii.gz", voxels, "SAR", spacing): voxels.clip(-1000, 1900),
    }
    for path, clipped in cases.items():
        expected = upstream_pipeline(torch.from_numpy(clipped.astype(np.float32)), spacing, CONTRACT)
        assert torch.equal(prepare_upstream(path, CONTRACT).image[0], expected)
    np.save(tmp_path / "a.npy", voxels)
    expected = upstream_pipeline(torch.from_numpy(voxels.astype(np.float32)), (1.0, 1.0, 1.0), CONTRACT)
    assert torch.equal(prepare_upstream(tmp_path / "a.npy", CONTRACT).image[0], expected)


def test_axial_dicom_differs_in_the_clip_alone(encoder, write_ct):
    voxels = anatomy()
    report = compare_upstream(write_ct("dicom", voxels, affine_of("SPL", (2.0, 0.9, 0.9)), reverse=True), encoder)
    assert report["upstream"]["orientation"] == report["corrected"]["orientation"] == "SPL"
    assert report["upstream"]["range_hu"] == [-1000, 1000]
    assert report["corrected"]["range_hu"] == [-1000, 1900]
    assert report["upstream"]["grid"] == report["corrected"]["grid"]
    share = float((voxels > 1000).mean())
    assert report["voxels"] == pytest.approx({"share": share, "largest_hu": 900, "mean_hu": 900 * share})
    assert 0.5 < report["cosine"]["class"] < 0.999999


@pytest.mark.parametrize("code", ["SPL", "SAR", "SAL", "SPR"])
def test_nifti_differs_in_orientation_alone(code, encoder, tmp_path):
    """SPL arrays are what DICOM gives; SAR is a file in RAS order, SAL one in LAS order."""
    report = compare_upstream(write_nifti(tmp_path / "a.nii.gz", anatomy(), code, (2.0, 0.9, 0.9)), encoder)
    assert report["upstream"]["orientation"] == code
    assert report["corrected"]["orientation"] == "SPL"
    assert report["voxels"] == {"share": 0, "largest_hu": 0, "mean_hu": 0}  # the same voxels, once turned
    if code == "SPL":
        assert report["cosine"] == {"class": 1, "mean": 1}
    else:
        assert report["cosine"]["class"] < 0.99999


def test_sagittal_dicom_has_no_order_in_z(encoder, write_ct):
    sagittal = np.ascontiguousarray(anatomy().transpose(2, 0, 1)[:, ::-1])  # k to the left, rows down, columns back
    affine = affine_of("LIP", (0.9, 2.0, 0.9))
    refused = compare_upstream(write_ct("plain", sagittal, affine), encoder)
    assert "spacing (0.0, 2.0, 0.9)" in refused["upstream"]["refused"]
    assert refused["corrected"]["shape"] == [24, 40, 44]
    assert "cosine" not in refused
    report = compare_upstream(write_ct("tagged", sagittal, affine, SpacingBetweenSlices=0.9), encoder)
    assert report["upstream"]["orientation"] == "LIP"
    assert report["upstream"]["spacing_mm"] == [0.9, 2.0, 0.9]
    assert report["corrected"]["orientation"] == "SPL"
    assert report["cosine"]["class"] < 0.99999


def test_the_tag_and_the_first_slope_win(write_ct):
    affine = affine_of("SPL", (2.0, 0.9, 0.9))
    assert read_upstream(write_ct("plain", anatomy(), affine)).spacing_mm == (2, 0.9, 0.9)
    folder = write_ct("tag", anatomy(), affine, SpacingBetweenSlices=-5)
    assert read_upstream(folder).spacing_mm == (5, 0.9, 0.9)
    from pydicom import dcmread

    path = folder / "000.dcm"
    data = dcmread(path)
    data.RescaleSlope, data.RescaleIntercept = 0.5, 10
    data.save_as(path)
    (folder / "notes.txt").write_text("no DICOM")
    found = read_upstream(folder).voxels
    assert np.array_equal(found, (anatomy() * np.float32(0.5) + 10).clip(-1000, 1000))


def test_mhd(tmp_path):
    image = sitk.GetImageFromArray(anatomy())
    image.SetSpacing((0.9, 0.9, 2.0))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    found = read_upstream(tmp_path / "a.mhd")
    assert np.array_equal(found.voxels, anatomy().clip(-1000, 1900))
    assert found.spacing_mm == (2, 0.9, 0.9)
    np.testing.assert_allclose(found.affine, affine_of("SPR", (2.0, 0.9, 0.9)), atol=1e-12)
    image.SetSpacing((0.9, 0.8, 2.0))
    sitk.WriteImage(image, str(tmp_path / "b.mhd"))
    with pytest.raises(ContractError, match="square"):
        read_upstream(tmp_path / "b.mhd")


def test_what_their_loader_refuses(tmp_path, write_ct, encoder):
    affine = affine_of("SPL", (2.0, 0.9, 0.9))
    with pytest.raises(ContractError, match="no HU of a patient"):
        read_upstream(write_nifti(tmp_path / "a.nii", anatomy() + np.int16(2000), "SPL", (2.0, 0.9, 0.9)))
    with pytest.raises(ContractError, match="no CT slices"):
        read_upstream(write_ct("mr", anatomy(), affine, Modality="MR"))
    with pytest.raises(ContractError, match="neither positions nor numbers"):
        read_upstream(write_ct("nowhere", anatomy(), affine, ImagePositionPatient=None, InstanceNumber=None))
    with pytest.raises(ContractError, match="distance of the slices"):
        read_upstream(write_ct("one", anatomy()[:1], affine))
    with pytest.raises(UsageError, match=r"found 'a.png'"):
        read_upstream(tmp_path / "a.png")
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    with pytest.raises(ContractError, match=r"shape \(4, 4\)"):
        read_upstream(tmp_path / "flat.npy")
    for name in ("a.nii.gz", "a.npy", "a.mhd"):
        with pytest.raises(UsageError, match=f"'{name}' is not there"):
            read_upstream(tmp_path / name)
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ContractError, match="VoxelFM's loader fails: the scan cannot be read"):
            read_upstream(tmp_path / name)
    cut = write_ct("cut", anatomy(), affine)
    one = min(cut.iterdir())
    one.write_bytes(one.read_bytes()[:-100])
    with pytest.raises(ContractError, match="the scan cannot be read"):
        read_upstream(cut)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no scan")
    with pytest.raises(InputError, match="no scan"):
        compare_upstream(tmp_path / "other", encoder)
