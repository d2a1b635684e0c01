"""`Encoder.encode`: tokens of chosen layers, poolings, regions, and the place of each token; slices and volumes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hilum.encode.contract import Contract, prepare_slice
from hilum.encode.encoder import Encoder, pixel_encoder
from hilum.encode.grids import region_weights, slice_token_affine, stack_affine, volume_region_weights
from hilum.encode.pooling import pool
from hilum.encode.vit import Tokens, ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract, prepare_volume
from hilum.errors import ContractError, UsageError
from hilum.volume import Volume, orient

AFFINE = np.array([[0, 0, 0.5, 5], [0, 0.7, 0, 6], [3.0, 0, 0, 7], [0, 0, 0, 1]])


def make_volume(shape=(5, 40, 30), seed: int = 0) -> Volume:
    voxels = np.random.default_rng(seed).normal(0, 300, shape).astype(np.int16)
    return Volume(voxels=voxels, affine=AFFINE, modality="CT", unit="HU")


def make_mask(vol: Volume) -> Volume:
    labels = np.zeros(vol.shape, np.uint8)
    labels[1, 4:20, 5:9], labels[3, 25:, 10:20], labels[3, :3, :3] = 2, 9, 2
    return Volume(voxels=labels, affine=vol.affine, modality="OT", kind="label")


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(5)
    vit = ViT(ViTConfig(size="nano", patch=(8, 8), image=(32, 32), num_registers=2, layer_scale=0.5))
    return Encoder(vit, Contract(size_px=48), "test", patch=(8, 8))


# ---- layers


def test_layers_are_the_blocks_by_hand(encoder):
    vit, images = encoder.network, torch.randn(2, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    x, _ = vit._embed(images, None)
    by_hand = []
    for block in vit.blocks:
        (x,) = block([x], [None], None, None)
        by_hand.append(vit.norm(x))
    for numbers in ((-1, -3), (0, 1, 2), (-2,), (2, -1)):
        found = vit.layers(images, numbers)
        for number, tokens in zip(numbers, found, strict=True):
            torch.testing.assert_close(torch.cat([tokens.cls[:, None], *tokens[1:]], 1), by_hand[number])
    assert torch.equal(encoder.layers(images, (-1,))[0].patches, encoder.tokens(images).patches)
    with pytest.raises(UsageError, match="no layer 3; this encoder has 3"):
        vit.layers(images, (3,))


def test_layers_stand_one_after_the_other(encoder):
    vol = make_volume()
    both = encoder.encode(vol, "slice", layers=(-1, -3))
    one, three = (encoder.encode(vol, "slice", layers=(n,)) for n in (-1, -3))
    np.testing.assert_allclose(both.vectors, np.concatenate([one.vectors, three.vectors], 1), atol=1e-5)
    np.testing.assert_allclose(both.patches, np.concatenate([one.patches, three.patches], -1), atol=1e-5)


# ---- pooling


def test_poolings_against_loops():
    rng = torch.Generator().manual_seed(0)
    tokens = Tokens(torch.randn(2, 4, generator=rng), torch.zeros(2, 0, 4), torch.randn(2, 6, 4, generator=rng))
    weights = torch.tensor([[0, 0.5, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1.0]])
    for name in ("class", "mean", "max", "class+mean", "mean+max", "class+mean+max"):
        whole, region = pool(tokens, name), pool(tokens, name, weights)
        for b in range(2):
            parts = {"class": tokens.cls[b], "mean": tokens.patches[b].mean(0), "max": tokens.patches[b].max(0).values}
            torch.testing.assert_close(whole[b], torch.cat([parts[p] for p in name.split("+")]))
            chosen = [n for n in range(6) if weights[b, n] > 0]
            mean = sum(weights[b, n] * tokens.patches[b, n] for n in chosen) / weights[b].sum()
            parts = {"mean": mean, "max": torch.stack([tokens.patches[b, n] for n in chosen]).amax(0)}
            wanted = [parts[p] for p in name.split("+") if p in parts] or [mean]
            torch.testing.assert_close(region[b], torch.cat(wanted))


# ---- what comes back


def test_features_of_slices(encoder):
    vol = make_volume()
    found = encoder.encode(vol, "slice", max_slices=2)
    assert (found.slices, found.grid, found.regions) == ((1, 3), (6, 6), ())
    assert found.vectors.shape == (2, 2 * 96)
    assert found.cls.shape == (2, 96)
    images = torch.stack([prepare_slice(vol.voxels[z], "CT", "HU", encoder.contract) for z in (1, 3)])
    tokens = encoder.tokens(images)
    np.testing.assert_allclose(found.patches.reshape(2, 36, 96), tokens.patches.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.vectors, pool(tokens, "class+mean").numpy(), atol=1e-5)
    whole = encoder.encode(vol, patches=False)
    assert whole.patches is None
    np.testing.assert_allclose(whole.first, encoder.encode(vol, "slice").vectors.mean(0), atol=1e-5)


def test_features_of_regions(encoder):
    vol = make_volume()
    found = encoder.encode(vol, "region", mask=make_mask(vol))
    assert (found.regions, found.slices) == ((2, 9), (1, 3))
    assert found.vectors.shape == (2, 96)
    with pytest.raises(ContractError, match="needs a mask"):
        encoder.encode(vol, "region")
    with pytest.raises(ContractError, match="holds no label"):
        encoder.encode(
            vol, "region", mask=Volume(voxels=np.zeros(vol.shape), affine=AFFINE, modality="OT", kind="label")
        )
    with pytest.raises(ContractError, match="modality PT is not in the contract"):
        encoder.encode(Volume(voxels=vol.voxels, affine=AFFINE, modality="PT"))


def test_a_scan_without_geometry_has_no_places(encoder):
    vol = Volume(voxels=make_volume().voxels, affine=None, modality="OT")
    assert encoder.encode(vol, "slice").affines is None


# ---- places


@pytest.mark.parametrize("contract", [Contract(size_px=32), Contract(size_px=24, fit="crop", short_px=32)])
def test_a_token_lies_where_a_bright_spot_moves_it(contract):
    """A blob of 5 pixels at a known place: the patch that changes most has its centre nearest to it, in millimetres."""
    encoder = Encoder(pixel_encoder().network, contract, "pixels", patch=(16, 16))
    encoder.network.patch_px = 4
    encoder.patch = (4, 4)
    rng = np.random.default_rng(0)
    plain = np.zeros((1, 80, 60), np.float32)
    for _ in range(12):
        y, x = rng.integers(20, 60), rng.integers(15, 45)
        spot = plain.copy()
        spot[0, y - 2 : y + 3, x - 2 : x + 3] = 1000
        vols = [Volume(voxels=v + rng.normal(0, 1, v.shape), affine=AFFINE, modality="MR") for v in (plain, spot)]
        before, after = (encoder.encode(v, "slice") for v in vols)
        change = np.abs(after.patches - before.patches).max(-1)[0]
        row, column = np.unravel_index(change.argmax(), change.shape)
        assert before.affines is not None
        place = before.affines[0] @ [0, row, column, 1]
        centres = before.affines[0] @ np.array([[0, r, c, 1] for r in range(8) for c in range(8)]).T
        wanted = AFFINE @ [0, y, x, 1]
        nearest = np.linalg.norm(centres - wanted[:, None], axis=0).min()
        assert np.linalg.norm(place - wanted) < nearest + 1.5


def test_steps_that_differ_have_no_affine_of_the_stack():
    vol, contract = make_volume((10, 40, 30)), Contract(size_px=32)
    even, uneven = ([slice_token_affine(vol, z, (4, 4), contract) for z in n] for n in ((1, 4, 7), (1, 2, 7)))
    whole = stack_affine(np.stack(even))
    assert whole is not None
    np.testing.assert_allclose(whole @ [2, 1, 1, 1], even[2] @ [0, 1, 1, 1])
    assert stack_affine(np.stack(uneven)) is None


def test_a_mask_is_cut_as_the_slice_is():
    """Short side 24 of 48×24 becomes 16, the middle 12 px stay: 18 pixels of the slice, from 15 down and 3 across."""
    contract = Contract(size_px=12, fit="crop", short_px=16)
    mask = np.zeros((48, 24), bool)
    mask[15:21, 3:12] = True
    weights = region_weights(mask, (3, 3), contract).reshape(3, 3)
    np.testing.assert_allclose(weights, [[1, 0.5, 0], [0, 0, 0], [0, 0, 0]])
    mask = np.zeros((48, 24), bool)
    mask[:10] = True
    assert float(region_weights(mask, (3, 3), contract).sum()) == 0


# ---- volume encoders, against a stand-in for `prepare_volume`


class Mean3D(torch.nn.Module):
    """Patch tokens: mean, largest value and number of the patch; class token: the same of the volume."""

    def forward(self, images: torch.Tensor) -> Tokens:
        b, _, z, y, x = images.shape
        parts = images.view(b, z // 2, 2, y // 4, 4, x // 4, 4).permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3).flatten(2)
        patches = torch.stack([parts.mean(-1), parts.amax(-1), torch.arange(parts.shape[1]).expand(b, -1)], -1)
        return Tokens(patches.mean(1), patches[:, :0], patches)


@pytest.fixture
def volume_encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    def prepare_volume(vol: Volume, contract: VolumeContract) -> SimpleNamespace:
        z, y, x = (n // p for n, p in zip(vol.shape, (2, 4, 4)))
        image = torch.from_numpy(vol.voxels[: z * 2, : y * 4, : x * 4].astype(np.float32))[None]
        scale = np.diag([2.0, 4, 4, 1])
        scale[:3, 3] = [0.5, 1.5, 1.5]
        return SimpleNamespace(image=image, affine=vol.affine @ scale, grid=(z, y, x), notes=("cut to whole patches",))

    monkeypatch.setattr("hilum.encode.items.prepare_volume", prepare_volume)
    monkeypatch.setattr("hilum.encode.features.encode_prepared", lambda e, p, most: (e.tokens(p.image[None]), ()))
    return Encoder(Mean3D(), VolumeContract(pooling="mean"), "mean3d", patch=(2, 4, 4))


def test_features_of_a_volume(volume_encoder):
    vol = make_volume((5, 16, 12))
    found = volume_encoder.encode(vol)
    assert (found.grid, found.slices) == ((2, 4, 3), ())
    assert "cut to whole patches" in found.notes
    assert found.patches.shape == (2, 4, 3, 3)
    np.testing.assert_allclose(found.first[0], vol.voxels[:4].mean(), rtol=1e-4)
    np.testing.assert_allclose(found.patches[1, 2, 0, 0], vol.voxels[2:4, 8:12, :4].mean(), rtol=1e-4)
    centre = vol.affine @ [2.5, 9.5, 1.5, 1]
    np.testing.assert_allclose(found.affines[0] @ [1, 2, 0, 1], centre)
    with pytest.raises(UsageError, match="no layers to choose from"):
        volume_encoder.encode(vol, layers=(-2,))


def test_regions_of_a_volume(volume_encoder):
    vol = make_volume((5, 16, 12))
    labels = np.zeros(vol.shape, np.uint8)
    labels[0:2, 0:4, 0:4], labels[2, 8:12, 2:6], labels[4] = 7, 3, 5  # 5 lies where no patch is
    mask = Volume(voxels=labels, affine=vol.affine, modality="OT", kind="label")
    found = volume_encoder.encode(vol, "region", mask=mask)
    assert found.regions == (3, 7)
    patches = found.patches
    np.testing.assert_allclose(found.vectors[1], patches[0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(found.vectors[0], (patches[1, 2, 0] + patches[1, 2, 1]) / 2, rtol=1e-5)


def test_volume_weights_count_voxels_whatever_the_orientation(volume_encoder):
    vol = make_volume((4, 8, 8))
    mask = Volume(voxels=(np.random.default_rng(0).random(vol.shape) < 0.3).astype(np.uint8), affine=vol.affine,
                  modality="OT", kind="label")  # fmt: skip
    scale = np.diag([2.0, 4, 4, 1])
    scale[:3, 3] = [0.5, 1.5, 1.5]
    weights = volume_region_weights(mask, AFFINE @ scale, (2, 2, 2))[1].reshape(2, 2, 2)
    for k, j, i in np.ndindex(2, 2, 2):
        assert weights[k, j, i] == mask.voxels[2 * k : 2 * k + 2, 4 * j : 4 * j + 4, 4 * i : 4 * i + 4].sum()


def test_the_real_contract_of_volumes_agrees_with_the_network_alone():
    """A transformer of volumes through `encode`: what it makes of the prepared volume, and the same from a turned scan."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(size="nano", patch=(14, 14, 14), image=(28, 28, 28), positions="rotary"))
    encoder = Encoder(vit, VolumeContract(max_patches=64), "volumes", patch=(14, 14, 14))
    rng = np.random.default_rng(0)
    voxels = rng.normal(0, 100, (30, 50, 44)).astype(np.int16)
    voxels[:, :6] = -1024
    vol = Volume(voxels=voxels, affine=np.array([[0, 0, 1.0, 5], [0, 1, 0, 6], [1, 0, 0, 7], [0, 0, 0, 1]]),
                 modality="CT", unit="HU")  # fmt: skip
    prepared = prepare_volume(vol, encoder.contract)
    tokens = encoder.tokens(prepared.image[None])
    found, turned = encoder.encode(vol), encoder.encode(orient(vol, "RAI"))
    np.testing.assert_allclose(found.first, tokens.cls[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.patches.reshape(-1, 96), tokens.patches[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(turned.first, found.first, atol=1e-4)
    np.testing.assert_allclose(found.affines[0], prepared.affine)
    both = encoder.encode(vol, layers=(-1, -2))
    np.testing.assert_allclose(both.first[:96], found.first, atol=1e-5)
