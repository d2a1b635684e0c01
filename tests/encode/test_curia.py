"""Curia's processor, restated here on its own from its description, and its traps: ours must give the same bits."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hilum import large
from hilum.encode.contract import check_scan, prepare_slice, volume_statistics
from hilum.encode.encoder import Encoder
from hilum.encode.released.curia import curia_contract, read_curia, write_curia_settings
from hilum.errors import ContractError, InputError, UsageError
from hilum.volume import PLANES, Volume, orient, to_slices

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZE = 64


def released(images, size: int = SIZE, eps: float = 1e-6, clip_below_air: bool = False) -> list[Tensor]:
    """The released processor on NumPy input: an array (H, W) or (H, W, S), or a list of such."""

    def sized(plane: np.ndarray) -> Tensor:
        x = torch.from_numpy(plane).to(torch.int16).to(torch.float32) / 32767.0
        x = torch.nn.functional.interpolate(
            x.reshape(1, 1, *plane.shape), size=(size, size), mode="bicubic", align_corners=False, antialias=True
        ).reshape(size, size)
        return torch.clamp_min(x, -1000.0) if clip_below_air else x

    def zscore(x: Tensor) -> Tensor:
        mean, std = float(x.mean()), float(x.std())
        return x - mean if std < eps else (x - mean) / std

    outs = []
    for image in images if isinstance(images, list) else [images]:
        if image.ndim == 3:  # the last axis is taken for the slices
            outs.append(zscore(torch.stack([sized(image[:, :, s])[None] for s in range(image.shape[2])])))
        else:
            outs.append(zscore(sized(image))[None])
    return outs


CONTRACT = curia_contract({})


def ours(pixels: np.ndarray, modality: str = "MR", statistics=None, **changes) -> Tensor:
    contract = curia_contract({"crop_size": SIZE, **changes}, statistics="volume" if statistics else "slice")
    return prepare_slice(pixels, modality, "HU" if modality == "CT" else "", contract, statistics)


RNG = np.random.default_rng(0)
CT = RNG.integers(-1024, 3000, (6, 90, 70)).astype(np.int16)
INPUTS = {
    "int16 CT": ("CT", CT),
    "float CT with fractions": ("CT", (RNG.normal(-200, 500, (6, 100, 100))).astype(np.float32)),
    "float64 CT just below whole numbers": ("CT", CT + np.float64(1) - 1e-9),
    "float MR": ("MR", np.abs(RNG.normal(0, 300, (6, 48, 130))).astype(np.float32)),
    "uint16 MR": ("MR", RNG.integers(0, 4000, (6, 40, 50)).astype(np.uint16)),
    "of the network's size": ("CT", RNG.integers(-1024, 3000, (6, SIZE, SIZE)).astype(np.int16)),
    "a big-endian view": ("MR", RNG.integers(0, 900, (6, 80, 80)).astype(">i2")[:, ::-1, ::2]),
    "the whole range": ("MR", RNG.integers(-32768, 32768, (6, 66, 66)).astype(np.int32)),
}


def native(array: np.ndarray) -> np.ndarray:
    """As torch takes it."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))


@pytest.mark.parametrize("case", INPUTS)
def test_slices_have_the_released_bits(case):
    modality, stack = INPUTS[case]
    wanted = released([native(pixels) for pixels in stack])  # a list of slices: each by itself
    for pixels, want in zip(stack, wanted):
        assert torch.equal(ours(pixels, modality), want)


@pytest.mark.parametrize("case", INPUTS)
def test_volumes_have_the_released_bits(case):
    """An (H, W, S) array: one mean and one deviation for the whole scan."""
    modality, stack = INPUTS[case]
    wanted = released(native(stack.transpose(1, 2, 0)))[0]
    contract = curia_contract({"crop_size": SIZE}, statistics="volume")
    statistics = volume_statistics(stack, modality, "HU" if modality == "CT" else "", contract)
    found = torch.stack([ours(pixels, modality, statistics) for pixels in stack])
    assert torch.equal(found, wanted)


def test_the_bits_at_full_size():
    pixels = RNG.integers(-1024, 3000, (512, 512)).astype(np.int16)
    found = prepare_slice(pixels[:300, :400], "CT", "HU", curia_contract({}))
    assert torch.equal(found, released(pixels[:300, :400], 512)[0])
    assert torch.equal(prepare_slice(pixels, "CT", "HU", curia_contract({})), released(pixels, 512)[0])
    assert found.mean().abs() < 1e-5
    assert found.std() == pytest.approx(1, abs=1e-5)


def test_a_volume_that_lies_in_a_file_has_the_same_bits(monkeypatch):
    contract = curia_contract({"crop_size": SIZE}, statistics="volume")
    wanted = volume_statistics(CT, "CT", "HU", contract)
    monkeypatch.setattr(large, "LIMIT_BYTES", 1000)
    assert volume_statistics(CT, "CT", "HU", contract) == wanted


# ---- the traps


def test_fractions_are_cut_off_towards_zero():
    pixels = np.abs(CT[0].astype(np.float32))
    assert torch.equal(ours(pixels + 0.4), ours(pixels))
    assert torch.equal(ours(pixels + 0.9), ours(pixels))
    assert torch.equal(ours(-pixels - 0.9), ours(-pixels))
    assert not torch.equal(ours(np.rint(pixels + 0.9)), ours(pixels))


@pytest.mark.parametrize("value", [32768, 40000, -32769])
def test_what_int16_has_not_is_refused(value):
    """Upstream goes on with other values: 40000 is -25536 there."""
    pixels = CT[0].astype(np.int32)
    pixels[3, 4] = value
    with pytest.raises(
        ContractError, match=f"the slice holds .*{value}.*; this encoder wants whole numbers from -32768"
    ):
        ours(pixels, "CT")
    wrapped = pixels.astype(np.int16)
    assert wrapped[3, 4] != value
    assert torch.equal(released(pixels)[0], released(wrapped)[0])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.999), (-1, 1)])
def test_an_image_scaled_to_one_is_refused(low, high):
    """Upstream keeps nothing but the pixels that are one."""
    pixels = RNG.uniform(low, high, (70, 70)).astype(np.float32)
    pixels[0, :2] = low, high
    assert len(np.unique(pixels.astype(np.int16))) <= 3
    for modality in ("MR", "OT"):
        with pytest.raises(
            ContractError, match=r"cuts fractions off, which would leave next to nothing.*multiply by 1000"
        ):
            check_scan(pixels[None], modality, "", CONTRACT)
    dark = np.stack([pixels, 400 * pixels])
    check_scan(dark, "MR", "", CONTRACT)  # a dark slice of a bright scan
    assert torch.equal(ours(1000 * pixels), released(1000 * pixels)[0])


def test_what_loses_nothing_is_no_trap():
    """Masks, empty slices, a few specks of interpolation at the end of a scan, and air of a resampled CT."""
    rim = np.zeros((70, 70), np.float32)
    rim[:3, :3] = 0.7
    for pixels in (np.eye(70, dtype=np.float32), np.zeros((70, 70)), rim):
        check_scan(pixels[None], "MR", "", CONTRACT)
        assert torch.equal(ours(pixels), released(pixels)[0])
    air = RNG.uniform(-1000.4, -999.6, (70, 70)).astype(np.float32)
    assert torch.equal(ours(air, "CT"), released(air)[0])


def test_a_slice_with_a_leading_axis_is_not_a_slice():
    """Upstream sees (1, H, W) as W slices of 1×H."""
    pixels = CT[0][None]
    assert released(pixels)[0].shape == (70, 1, SIZE, SIZE)
    with pytest.raises(ContractError, match=r"a slice is \(Y, X\).*found shape \(1, 90, 70\)"):
        ours(pixels, "CT")


def test_clip_below_air_does_nothing():
    pixels = (CT[0] - 2000).astype(np.int16)
    assert torch.equal(released(pixels, clip_below_air=True)[0], released(pixels)[0])
    assert torch.equal(ours(pixels, "CT", clip_below_air=True), released(pixels)[0])


def test_normalisation_cannot_be_turned_off():
    assert curia_contract({"do_normalize": False}) == curia_contract({})


def test_eps_is_in_units_of_the_scaled_slice():
    """1e-6 is 0.033 grey levels: one pixel in 4096 that is 2 higher has a deviation of 0.031, one that is 3 higher 0.047."""
    for height, flat in ((2, True), (3, False)):
        pixels = np.zeros((SIZE, SIZE), np.int16)
        pixels[5, 5] = height
        found = ours(pixels)
        assert torch.equal(found, released(pixels)[0])
        assert (found.max() < 1e-3) == flat
    assert torch.equal(ours(CT[0], "CT", eps=1.0), released(CT[0], eps=1.0)[0])
    assert ours(CT[0], "CT", eps=1.0).std() < 1


def test_a_list_of_slices_and_their_array_differ():
    array, each = released(CT[:3].transpose(1, 2, 0))[0], torch.stack(released(list(CT[:3])))
    assert array.shape == each.shape
    assert not torch.allclose(array, each, atol=1e-3)
    with pytest.raises(ContractError, match="a slice alone has no statistics of its volume"):
        prepare_slice(CT[0], "CT", "HU", curia_contract({}, statistics="volume"))


# ---- settings of the processor


def test_settings_are_read_and_written():
    assert curia_contract({}) == curia_contract({"image_processor_type": "CuriaImageProcessor", "crop_size": 512})
    contract = curia_contract({"crop_size": 256, "eps": 1e-5})
    assert (contract.size_px, contract.eps, contract.pooling) == (256, 1e-5, "class")
    settings = write_curia_settings(contract)
    assert settings is not None
    assert curia_contract(settings) == contract
    assert settings["auto_map"]["AutoImageProcessor"].endswith("curia_image_processor.CuriaImageProcessor")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"image_mean": [0.5]}, "unknown setting image_mean"),
        ({"image_processor_type": "BitImageProcessor"}, "image_processor_type is BitImageProcessor"),
        ({"crop_size": "512"}, "crop_size is '512'"),
        ({"eps": None}, "eps is None"),
        ({"do_resize": False}, "do_resize is off"),
    ],
)
def test_settings_of_something_else_are_refused(settings, told):
    with pytest.raises(ContractError, match=told):
        curia_contract(settings)


# ---- planes


@pytest.mark.parametrize("code", ["SPL", "SAR", "IPR", "PIL", "LIP", "LSA", "RAI", "PLS"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_planes_from_every_orientation(code, plane):
    """Voxels are their own patient position. In Curia's arrays axial rows run to P and columns to L; coronal ones to I, L;
    sagittal ones to I, P. From an array (S, P, L) these are v[z], v[::-1, y] and v[::-1, :, x]."""
    standard = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    affine = np.array([[0, 0, 1.0, -20], [0, 1.0, 0, 30], [1.0, 0, 0, 7], [0, 0, 0, 1]])
    scan = orient(Volume(voxels=standard, affine=affine, modality="CT", unit="HU"), code)
    through = {"axial": "SI", "coronal": "PA", "sagittal": "LR"}[plane]
    axis = next(n for n, letter in enumerate(code) if letter in through)
    found = to_slices(scan, axis).voxels
    wanted = {
        "axial": [standard[z] for z in range(3)],
        "coronal": [standard[::-1, y, :] for y in range(4)],
        "sagittal": [standard[::-1, :, x] for x in range(5)],
    }[plane]
    np.testing.assert_array_equal(found, np.stack(wanted))
    assert tuple(PLANES[p][1:] for p in "SPL") == curia_contract({}).orientation


# ---- a release on disk


def save_release(folder: Path, **changes) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    settings = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**settings | {"num_channels": 1} | changes)).eval()
    model.save_pretrained(folder)
    processor = {"image_processor_type": "CuriaImageProcessor", "crop_size": 64, "eps": 1e-6, "clip_below_air": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def test_a_release_gives_the_features_of_transformers(tmp_path):
    theirs = save_release(tmp_path)
    model, contract, report = read_curia(tmp_path)
    assert contract == curia_contract({"crop_size": 64})
    assert report["used"] + sum(report["transformed"].values()) == report["num_tensors"]
    tokens = Encoder(model, contract, "curia", patch=model.config.patch).tokens(ours(CT[0], "CT")[None])
    with torch.no_grad():
        wanted = theirs(released(CT[0])[0][None]).last_hidden_state
    torch.testing.assert_close(tokens.cls, wanted[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.patches, wanted[:, 1:], atol=1e-5, rtol=0)


def test_what_is_no_release(tmp_path):
    with pytest.raises(UsageError, match="holds no weights"):
        read_curia(tmp_path)
    save_release(tmp_path / "a", num_channels=3)
    with pytest.raises(ContractError, match="model_type dinov2 and 3 channels; Curia is dinov2 with one channel"):
        read_curia(tmp_path / "a")
    save_release(tmp_path / "b")
    (tmp_path / "b" / "preprocessor_config.json").write_text('{"crop_size": 100}')
    with pytest.raises(ContractError, match="crop_size 100 is no multiple of the patch"):
        read_curia(tmp_path / "b")
    (tmp_path / "b" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json is missing"):
        read_curia(tmp_path / "b")
