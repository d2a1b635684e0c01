"""A transformer of slices and one of volumes agree where they should."""

import numpy as np
import pytest
import torch

from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder, write_encoder
from hilum.encode.grids import slice_token_affine
from hilum.encode.inflate import channels_of_axes, inflate
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import ViT, make_rotation
from hilum.encode.volume_contract import VolumeContract, prepare_volume
from hilum.errors import UsageError
from hilum.pretrain.start import fit_backbone, read_start
from hilum.volume import Volume


def pair(size="48x2x4-mlp96", positions="learned", depth=1, image=(24, 40), **changes) -> tuple[ViT, ViT]:
    torch.manual_seed(0)
    settings = {"size": size, "positions": positions, "num_registers": 2, "layer_scale": 1.0, **changes}
    flat = ViTConfig(patch=(8, 8), image=image, **settings)
    deep = ViTConfig(patch=(depth, 8, 8), image=(2 * depth, *image), **settings)
    one, two = ViT(flat).eval(), ViT(deep).eval()
    for name, p in one.named_parameters():  # so that nothing hides: attention, biases and prefix tokens say something
        torch.nn.init.normal_(p, std=0.2 if "qkv" in name or p.ndim < 2 else 0.1)
    two.load_state_dict(inflate(one.state_dict(), flat, deep))
    return one, two


def tokens_of(one: ViT, two: ViT, image: torch.Tensor):
    with torch.inference_mode():
        depth = two.config.patch[0]
        return one(image), two(image[:, :, None].repeat(1, 1, depth, 1, 1))


@pytest.mark.parametrize("depth", [1, 6])
def test_learned_positions_agree(depth):
    """A volume that one patch spans, and that does not change along z, has the tokens of its slice. At the reference size: at
    others 2D positions are interpolated by cubics, 3D ones linearly."""
    one, two = pair(depth=depth)
    for a, b in zip(*tokens_of(one, two, torch.randn(2, 1, 24, 40))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rotary_heads_of_six_channels_are_the_same_function():
    """One period an axis in both layouts; the pair that is left over stands still."""
    one, two = pair(size="48x2x8-mlp96", positions="rotary", depth=2)
    for sides in ((24, 40), (8, 48)):
        for a, b in zip(*tokens_of(one, two, torch.randn(2, 1, *sides))):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rotary_heads_agree_in_the_pairs_whose_period_is_shared():
    """Heads of 24 channels: 2D has periods 100^(i/6), 3D 100^(i/4), so i = 0 and 3 are i = 0 and 2. With queries that read
    only these pairs both networks are one function; with all of them they are not, and near each other."""
    one, two = pair(size="48x2x2-mlp96", positions="rotary")
    image = torch.randn(2, 1, 24, 40)
    flat, deep = tokens_of(one, two, image)
    assert (flat.patches - deep.patches).abs().max() > 1e-3
    shared = [a * 6 + i + half for half in (0, 12) for a in (0, 1) for i in (0, 3)]
    kept = torch.zeros(2, 24)
    kept[:, shared] = 1
    for block in one.blocks:
        block.attn.qkv.weight.data[:48] *= kept.flatten()[:, None]
        block.attn.qkv.bias.data[:48] *= kept.flatten()
    two.load_state_dict(inflate(one.state_dict(), one.config, two.config))
    for a, b in zip(*tokens_of(one, two, image)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [6, 12, 16, 18, 24, 32, 64, 72])
def test_every_channel_has_one_place_and_its_own_axis(head_dim):
    """Against the rotations themselves: what turns with y in 2D turns with y in 3D, at the nearest period, or with z."""
    order = channels_of_axes(head_dim)
    assert sorted(order) == list(range(head_dim))
    flat = make_rotation((3, 5), head_dim, 0, torch.device("cpu"))[1]  # sines
    deep = make_rotation((1, 3, 5), head_dim, 0, torch.device("cpu"))[1]
    per_axis = head_dim // 6
    for place in range(deep.shape[1]):
        axis = place % (3 * per_axis) // per_axis
        if axis == 0:
            assert not deep[:, place].any()  # z of one patch is 0
            continue
        was = flat[:, order[place]].view(3, 5)
        along = was[:, 0] if axis == 1 else was[0]
        across = was[0] if axis == 1 else was[:, 0]
        assert torch.allclose(across, across[:1].expand_as(across))
        assert not torch.allclose(along, along[:1].expand_as(along)) or place % per_axis == 0
        if place % per_axis == 0:
            torch.testing.assert_close(flat[:, order[place]], deep[:, place])


def test_from_a_scan_of_one_slice():
    """Through both contracts: the same tokens at the same places of the patient."""
    rng = np.random.default_rng(0)
    affine = np.array([[0, 0, 2.0, -5], [0, 2.0, 0, 6], [2.0, 0, 0, 7], [0, 0, 0, 1]])
    voxels = rng.integers(-900, 900, (1, 40, 40)).astype(np.int16)
    voxels[0, :8], voxels[0, 8:12] = -1000, 40
    scan = Volume(voxels=voxels, affine=affine, modality="CT", unit="HU")
    one, two = pair(image=(40, 40))
    deep = VolumeContract(orientation=scan.orientation, background_px=0, patch=(1, 8, 8), mean=-100.0, std=400.0)
    prepared = prepare_volume(scan, deep)
    found = Encoder(two, deep, "deep", patch=(1, 8, 8)).tokens(prepared.image[None])
    plain = Encoder(one, Contract(size_px=40), "flat", patch=(8, 8)).tokens(
        (torch.from_numpy(voxels)[None].float() + 100) / 400
    )
    torch.testing.assert_close(found.patches, plain.patches, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.cls, plain.cls, atol=1e-4, rtol=1e-4)
    assert prepared.grid == (1, 5, 5)
    placed = slice_token_affine(scan, 0, (5, 5), Contract(size_px=40))
    np.testing.assert_allclose(prepared.affine[:, 1:], placed[:, 1:])


def test_a_run_on_volumes_begins_from_an_encoder_of_slices(tmp_path):
    one, two = pair(depth=4)
    write_encoder(tmp_path, one, Contract(size_px=40), {})
    state, changes = fit_backbone(read_start(tmp_path).weights, two.config)
    assert changes == ["inflated from patches of 8×8 to 4×8×8"]
    for name, tensor in two.state_dict().items():
        torch.testing.assert_close(state[name], tensor, msg=name)


def test_what_does_not_fit_is_refused():
    flat = ViTConfig(size="48x2x4-mlp96", patch=(8, 8), image=(24, 24))
    deep = ViTConfig(size="48x2x4-mlp96", patch=(8, 4, 4), image=(8, 24, 24), num_registers=4)
    with pytest.raises(UsageError, match=r"num_registers 0 and 4, patch \(8, 8\) and \(8, 4, 4\)"):
        inflate(ViT(flat).state_dict(), flat, deep)
