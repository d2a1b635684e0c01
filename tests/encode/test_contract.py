"""What the contract promises, by hand-written arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hilum.encode.contract import Contract, normalise_slice, prepare_slice, resize
from hilum.errors import ContractError
from hilum.settings import from_dict, to_dict


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 800, (20, 24)).astype(np.float32)


def test_ct_is_cut_then_standardised(pixels):
    pixels[0, 0], pixels[0, 1] = 5000, -3000
    cut = np.clip(pixels.astype(np.float64), -1000, 2000)
    wanted = (cut - cut.mean()) / cut.std(ddof=1)
    found = normalise_slice(pixels, "HU", Contract())
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert found.shape == (1, 20, 24)


def test_other_units_are_not_cut(pixels):
    pixels[0, 0] = 50_000
    wanted = (pixels.astype(np.float64) - pixels.mean(dtype=np.float64)) / pixels.std(ddof=1, dtype=np.float64)
    np.testing.assert_allclose(normalise_slice(pixels, "", Contract())[0].numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_a_slice_without_content_only_loses_its_mean():
    found = normalise_slice(np.full((8, 8), -1000, np.float32), "HU", Contract())
    assert torch.equal(found, torch.zeros(1, 8, 8))


def test_gain_and_offset_of_an_mr_do_not_matter(pixels):
    contract = Contract(size_px=16)
    a, b = (prepare_slice(p.astype(np.float32), "MR", "", contract) for p in (pixels, 3 * pixels + 500))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_prepared_slices_have_the_size_and_the_stretch(pixels):
    """Every output pixel of an exact halving is the mean that a triangle filter gives: here, of a constant per block."""
    blocks = np.kron(np.random.default_rng(1).normal(size=(4, 8)), np.ones((16, 8))).astype(np.float32)
    found = prepare_slice(blocks, "MR", "", Contract(size_px=32))
    assert found.shape == (1, 32, 32)
    wanted = normalise_slice(blocks, "", Contract())[0, ::16, ::8]
    middle = found[0].unfold(0, 8, 8).unfold(1, 4, 4)[:, :, 3:5, 1:3].mean((2, 3))  # (4, 8) blocks of 8×4 pixels
    torch.testing.assert_close(middle, wanted, atol=0.05, rtol=0)


def test_resize_to_the_same_size_is_identity():
    x = torch.randn(1, 1, 6, 5)
    assert resize(x, (6, 5), "bilinear") is x


def test_resize_keeps_a_constant_and_smooths_when_coarser():
    x = torch.full((1, 1, 40, 40), 3.0)
    assert torch.allclose(resize(x, (16, 16), "bilinear"), torch.full((1, 1, 16, 16), 3.0))
    checker = (torch.arange(64)[:, None] + torch.arange(64)[None, :]).remainder(2).float()[None, None]
    assert (resize(checker, (16, 16), "bilinear")[..., 1:-1, 1:-1] - 0.5).abs().max() < 0.05  # antialiased, not sampled


def test_the_hash_names_the_content():
    a = Contract()
    assert a.hash == Contract().hash == from_dict(Contract, to_dict(a)).hash
    changed = [
        replace(a, size_px=512),
        replace(a, pooling="class"),
        replace(a, clip_hu=(-1000.0, 1999.0)),
        replace(a, resampling="bicubic"),
        replace(a, modalities=("CT",)),
    ]
    assert len({a.hash, *(c.hash for c in changed)}) == 6


def test_what_breaks_the_contract_is_refused(pixels):
    contract = Contract(modalities=("CT", "MR"))
    with pytest.raises(ContractError, match="modality OT is not in the contract; expected CT or MR"):
        prepare_slice(pixels, "OT", "", contract)
    with pytest.raises(ContractError, match="CT comes in HU; found unit ''"):
        prepare_slice(pixels, "CT", "", contract)
    pixels[3, 3] = np.nan
    with pytest.raises(ContractError, match="NaN or infinite"):
        prepare_slice(pixels, "MR", "", contract)
    with pytest.raises(ContractError, match=r"at least 2 pixels a side; found shape \(1, 24\)"):
        prepare_slice(pixels[:1], "MR", "", contract)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channels": 4}, "4 channels"),
        ({"orientation": ("AR", "IL", "IP")}, r"this hilum can do \('PL', 'IL', 'IP'\)"),
        ({"windows": ((0.0, 80.0), (-100.0, 200.0))}, "1 channels and 2 windows"),
        ({"normalise": "constants"}, "constants for 1 channels expected"),
        ({"normalise": "volume"}, "set normalise_last"),
        ({"fit": "crop", "short_px": 200}, "a middle of 256 px cannot be cut from a short side of 200"),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused(changes, told):
    with pytest.raises(ContractError, match=told):
        Contract(**changes)
