"""The transformer against explicit sums, and the laws of its parts."""

import copy
import math

import pytest
import torch
from torch import Tensor

from hilum.encode.attention import attend
from hilum.encode.vit import (
    Attention,
    FeedForward,
    LayerScale,
    ViT,
    ViTConfig,
    add_residual,
    make_rotation,
    rotate,
    sample_kept,
)
from hilum.errors import UsageError


def config(**changes) -> ViTConfig:
    return ViTConfig(**{"size": "nano", "patch": (8, 8), "image": (32, 32), "layer_scale": 0.0, **changes})


def make_vit(seed: int = 0, **changes) -> ViT:
    """A model whose every parameter has a say: tokens, biases and scales are random too."""
    torch.manual_seed(seed)
    model = ViT(config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- sizes


@pytest.mark.parametrize(
    ("size", "image", "wanted"),
    [
        ("base", 512, 86_072_832),
        ("base", 256, 85_483_008),
        ("large", 512, 304_101_632),
        ("large", 256, 303_315_200),
    ],
)
def test_parameter_counts_of_the_public_models(size, image, wanted):
    """facts/curia.md §2.1: ViT-B and ViT-L with SwiGLU, 16-pixel patches, one channel."""
    with torch.device("meta"):
        model = ViT(ViTConfig(size=size, image=(image, image)))
    assert sum(p.numel() for p in model.parameters()) == wanted


def test_parameter_count_of_giant():
    """DINOv2's ViT-g: 1,132.5 M in the matrices of its blocks, 1.135 B in all."""
    with torch.device("meta"):
        model = ViT(ViTConfig(size="giant", image=(512, 512)))
    assert sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2) == pytest.approx(1132.5e6, abs=0.1e6)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.135e9, abs=1e6)


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_widths_follow_the_rule_of_dinov2(width, hidden):
    from hilum.encode.vit import SIZES

    assert 8 * math.ceil((2 * 4 * width // 3) / 8) == hidden
    assert hidden in [s[4] for s in SIZES.values() if s[0] == width]


# ---- parts


def slow_attention(module: Attention, x_ND: Tensor, queries: list[int]) -> Tensor:
    """One sequence: for each head and some queries, a softmax over keys, written out."""
    num, width = x_ND.shape
    size = width // module.heads
    q, k, v = (x_ND @ module.qkv.weight.T + module.qkv.bias).split(width, 1)
    out = torch.zeros(len(queries), width, dtype=x_ND.dtype)
    for h in range(module.heads):
        part = slice(h * size, (h + 1) * size)
        for place, i in enumerate(queries):
            scores = torch.stack([(q[i, part] * k[j, part]).sum() / math.sqrt(size) for j in range(num)])
            weights = scores.exp() / scores.exp().sum()
            out[place, part] = sum(weights[j] * v[j, part] for j in range(num))
    return out @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("num_tokens", [5, 140])
def test_attention_equals_explicit_sums(num_tokens):
    """On both sides of the length at which the kernel changes."""
    torch.manual_seed(0)
    module = Attention(6, 3).double()
    x = torch.randn(2, num_tokens, 6, dtype=torch.float64)
    found = module(x.flatten(0, 1), [(2, num_tokens)], [None], LayerScale(6, 0.0)).view(2, num_tokens, 6)
    queries = [0, 2, num_tokens - 1]
    for b in range(2):
        torch.testing.assert_close(found[b, queries], slow_attention(module, x[b], queries), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_tokens", [5, 261])
def test_attention_in_bf16_agrees_with_fp32_in_value_and_gradient(num_tokens):
    """bf16 keeps three digits; torch's own bf16 kernel is as far from fp32."""
    torch.manual_seed(0)
    given = [torch.randn(2, 3, num_tokens, 16) for _ in range(4)]

    def run(dtype: torch.dtype, attention) -> list[Tensor]:
        q, k, v = (x.clone().to(dtype).detach().requires_grad_() for x in given[:3])
        out = attention(q, k, v)
        out.backward(given[3].to(dtype))
        return [x.float() for x in (out.detach(), q.grad, k.grad, v.grad)]

    exact = run(torch.float32, torch.nn.functional.scaled_dot_product_attention)
    for ours, torchs, wanted in zip(
        run(torch.bfloat16, attend), run(torch.bfloat16, torch.nn.functional.scaled_dot_product_attention), exact
    ):
        error = (ours - wanted).norm() / wanted.norm()
        assert error < 0.012
        assert error < 2.5 * (torchs - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("block_bytes", [2 * 70 * 70 * 4, 2 * 70 * 70, 2 * 70 * 9])
def test_attention_in_blocks_is_the_same_whatever_the_blocks(monkeypatch, block_bytes):
    """A few heads at a time, one head, and a few rows of one head; keys far from zero, which bf16 would round badly."""
    monkeypatch.setattr("hilum.encode.attention.BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 70, 16).bfloat16() for _ in range(3))
    k = k + 8
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with torch.no_grad():
        found = attend(q, k, v).float()
    assert (found - exact).norm() / exact.norm() < 0.012


def test_folding_layer_scale_changes_nothing():
    model = make_vit(layer_scale=0.3).eval()
    x = images(2, 1, 32, 32)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.uniform_(0.1, 2)
            block.ls2.gamma.uniform_(0.1, 2)
        before = model(x)
        for block in model.blocks:
            block.fold_layer_scale()
        after = model(x)
    assert not any("gamma" in name for name in model.state_dict())
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_feed_forward_kinds():
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    gated, plain, scale = FeedForward(4, 5, "swiglu"), FeedForward(4, 5, "mlp"), LayerScale(4, 0.5)
    assert scale.gamma is not None
    scale.gamma.data *= torch.tensor([1, 2, 3, 4])
    as_is = LayerScale(4, 0.0)
    h = x @ gated.fc1.weight.T + gated.fc1.bias
    a, b = h[:, :5], h[:, 5:]
    wanted = (a / (1 + torch.exp(-a)) * b) @ gated.fc2.weight.T + gated.fc2.bias
    torch.testing.assert_close(gated(x, as_is), wanted)
    torch.testing.assert_close(gated(x, scale), scale.gamma * wanted)
    with torch.no_grad():  # another way there
        half = copy.deepcopy(gated).bfloat16()(x.bfloat16(), as_is).float()
    torch.testing.assert_close(half, wanted.detach(), atol=0.02, rtol=0.02)
    h = x @ plain.fc1.weight.T + plain.fc1.bias
    gelu = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    torch.testing.assert_close(plain(x, as_is), gelu @ plain.fc2.weight.T + plain.fc2.bias)


def test_patch_embedding_cuts_patches_in_c_order():
    """Token n of a model without blocks' influence is the product of patch (n // columns, n % columns) with the kernel."""
    model = make_vit(image=(16, 24))
    x = images(1, 1, 16, 24)
    embedded, grid = model._embed(x, None)
    assert grid == (2, 3)
    for n in range(6):
        row, column = divmod(n, 3)
        patch = x[0, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert model.pos_embed is not None
        wanted = (
            (model.patch_embed.weight[:, 0] * patch).sum((1, 2)) + model.patch_embed.bias + model.pos_embed[0, 1 + n]
        )
        torch.testing.assert_close(embedded[0, 1 + n], wanted, rtol=1e-4, atol=1e-5)


# ---- several crop sizes in one pass


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_one_pass_over_crops_equals_one_pass_each(positions):
    model = make_vit(positions=positions, num_registers=2)
    crops = [images(4, 1, 32, 32), images(6, 1, 16, 16, seed=1)]
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    masks = [mask, None]

    def gradients(outs) -> tuple[list[Tensor], list[Tensor]]:
        model.zero_grad()
        loss = sum((part.square() * (1 + n)).mean() for n, tokens in enumerate(outs) for part in tokens)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [part.detach() for tokens in outs for part in tokens], grads

    together, grads = gradients(model.encode_crops(crops, masks))
    apart, grads_apart = gradients([model.encode_crops([c], [m])[0] for c, m in zip(crops, masks)])
    assert len(grads) == len(grads_apart)
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, grads_apart):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_crops_do_not_see_one_another():
    """A change of one local crop changes that crop's tokens and no others, in training with drop path too."""
    model = make_vit(drop_path=0.3).train()
    a, b = images(4, 1, 32, 32), images(6, 1, 16, 16, seed=1)
    changed = b.clone()
    changed[2] += 1

    def run(local: Tensor):
        with torch.no_grad():
            return model.encode_crops([a, local], [None, None], torch.Generator().manual_seed(7))

    before, after = run(b), run(changed)
    for x, y in zip(before[0], after[0]):
        assert torch.equal(x, y)
    same = [n for n in range(6) if n != 2]
    assert torch.equal(before[1].patches[same], after[1].patches[same])
    assert not torch.equal(before[1].patches[2], after[1].patches[2])


# ---- drop path on subsets


def test_no_drop_path_adds_the_whole_branch():
    xs = [images(3, 4, 2), images(5, 2, 2, seed=1)]
    found = add_residual(xs, lambda x, shapes: 3 * x, None)
    assert all(torch.equal(f, x + 3 * x) for f, x in zip(found, xs))


def test_drop_path_zero_in_training_is_evaluation():
    model = make_vit(drop_path=0.0)
    x = images(4, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.train()(x).cls, model.eval()(x).cls)
        dropping = make_vit(drop_path=0.5).eval()
        assert torch.equal(dropping(x).cls, model(x).cls)


@pytest.mark.parametrize(("num", "rate", "kept"), [(10, 0.3, 7), (10, 0.35, 6), (4, 0.9, 1), (1, 0.5, 1)])
def test_drop_path_keeps_exactly_so_many_samples(num, rate, kept):
    """max(⌊B(1 − p)⌋, 1) samples, each scaled by B/kept, the rest untouched."""
    x = images(num, 3, 2)
    seen = []

    def branch(rows: Tensor, shapes) -> Tensor:
        seen.append(tuple(shapes))
        return torch.ones_like(rows)

    [subset] = sample_kept([num], rate, 1, torch.Generator().manual_seed(0), torch.device("cpu"))
    found = add_residual([x], branch, subset)[0]
    added = found - x
    touched = added.abs().amax((1, 2)) > 0
    assert int(touched.sum()) == kept
    assert seen == [((kept, 3),)]
    torch.testing.assert_close(added[touched], torch.full_like(added[touched], num / kept))


def test_drop_path_averages_to_the_full_residual():
    """Over many draws; the standard error of the mean bounds the difference."""
    xs = [images(5, 2, 3), images(4, 1, 3, seed=1)]
    generator = torch.Generator().manual_seed(0)
    num_draws = 1500
    total = [torch.zeros_like(x) for x in xs]
    for _ in range(num_draws):
        [subsets] = sample_kept([5, 4], 0.4, 1, generator, torch.device("cpu"))
        for t, out in zip(total, add_residual(xs, lambda x, shapes: x**2 + 1, subsets)):
            t += out
    for t, x in zip(total, xs):
        full = x**2 + 1
        num_kept = max(int(len(x) * 0.6), 1)
        error = full * math.sqrt((len(x) / num_kept - 1) / num_draws)
        assert ((t / num_draws - x - full).abs() < 5 * error + 1e-5).all()


def test_attention_and_feed_forward_draw_their_own_subsets():
    model = make_vit(drop_path=0.5).train()
    x = images(8, 1, 32, 32)
    first = model.encode_crops([x], [None], torch.Generator().manual_seed(0))[0].cls
    again = model.encode_crops([x], [None], torch.Generator().manual_seed(0))[0].cls
    other = model.encode_crops([x], [None], torch.Generator().manual_seed(1))[0].cls
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- rotary positions


@pytest.mark.parametrize(("grid", "head_dim", "turned"), [((3, 4), 32, 32), ((2, 3, 2), 32, 30), ((5,), 8, 8)])
def test_rotation_equals_complex_multiplication(grid, head_dim, turned):
    """DINOv3: coordinates in [-1, 1], angle 2π·x / 100^(i/periods), channel i paired with i + R/2."""
    num_patches = math.prod(grid)
    x = images(1, 2, 3 + num_patches, head_dim)
    rotation = make_rotation(grid, head_dim, 3, torch.device("cpu"))
    assert rotation.shape == (2, 3 + num_patches, turned)
    found = rotate(x, rotation)
    assert torch.equal(found[:, :, :3], x[:, :, :3])  # class and register tokens stay
    assert torch.equal(found[..., turned:], x[..., turned:])
    half, periods = turned // 2, turned // (2 * len(grid))
    for n in range(num_patches):
        place, rest = [], n
        for size in reversed(grid):
            rest, index = divmod(rest, size)
            place.insert(0, 2 * (index + 0.5) / size - 1)
        for axis, coordinate in enumerate(place):
            for i in range(periods):
                channel = axis * periods + i
                angle = 2 * math.pi * coordinate / 100 ** (i / periods)
                z = torch.complex(x[0, :, 3 + n, channel], x[0, :, 3 + n, channel + half])
                wanted = z * complex(math.cos(angle), math.sin(angle))
                torch.testing.assert_close(found[0, :, 3 + n, channel], wanted.real, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found[0, :, 3 + n, channel + half], wanted.imag, rtol=1e-4, atol=1e-4)


def test_rotated_scores_depend_on_the_offset_only():
    """Along each axis of the grid: score(query at a, key at b) is a function of b − a; and norms are kept."""
    grid, size = (6, 6), 32
    rotation = make_rotation(grid, size, 0, torch.device("cpu"))
    q, k = images(size), images(size, seed=1)
    queries = rotate(q.expand(1, 1, 36, size), rotation)[0, 0].view(6, 6, size)
    keys = rotate(k.expand(1, 1, 36, size), rotation)[0, 0].view(6, 6, size)
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(6, 6))
    for scores in (queries[2] @ keys[2].T, queries[:, 3] @ keys[:, 3].T):
        for offset in range(-5, 6):
            line = scores.diagonal(offset)
            torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-3)
        assert scores[0].std() > 0.1


def test_rotary_models_have_no_table_and_know_places():
    model = make_vit(positions="rotary").eval()
    assert model.pos_embed is None
    x = images(1, 1, 32, 32)
    swapped = x.clone()
    swapped[..., :8, :8], swapped[..., 24:, 24:] = x[..., 24:, 24:], x[..., :8, :8]
    with torch.no_grad():
        assert not torch.allclose(model(x).cls, model(swapped).cls, atol=1e-4)
        assert model(images(1, 1, 48, 16)).patches.shape == (1, 12, 96)


# ---- learned positions


def test_learned_positions_on_the_reference_grid_are_the_table():
    model = make_vit()
    assert model.pos_embed is not None
    assert torch.equal(model._positions((4, 4)), model.pos_embed[:, 1:])


@pytest.mark.parametrize("grid", [(8, 8), (2, 2), (3, 5)])
def test_learned_positions_elsewhere_are_half_pixel_interpolated(grid):
    """A table that is linear in the coordinates stays so in the middle; a constant one everywhere."""
    model = make_vit(image=(64, 64))
    assert model.pos_embed is not None
    centers = (torch.arange(8) + 0.5) / 8
    table = torch.zeros(8, 8, 96)
    table[..., 0], table[..., 1], table[..., 2] = centers[:, None], centers[None, :], 7.0
    model.pos_embed.data[0, 1:] = table.flatten(0, 1)
    found = model._positions(grid)[0].view(*grid, 96).detach()
    y, x = ((torch.arange(n) + 0.5) / n for n in grid)
    inside = slice(None) if grid == (2, 2) else slice(2, -2) if grid == (8, 8) else slice(1, -1)
    torch.testing.assert_close(found[inside, :, 0], y[inside, None].expand(-1, grid[1]), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[:, inside, 1], x[None, inside].expand(grid[0], -1), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[..., 2], torch.full(grid, 7.0))


# ---- volumes, registers, masks, errors


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_volumes_go_through_the_same_class(positions):
    model = make_vit(patch=(4, 8, 8), image=(8, 16, 16), positions=positions, num_registers=1).eval()
    with torch.no_grad():
        tokens = model(images(2, 1, 8, 16, 16))
        assert (tokens.cls.shape, tokens.registers.shape, tokens.patches.shape) == ((2, 96), (2, 1, 96), (2, 8, 96))
        bigger = model(images(1, 1, 12, 16, 24))
    assert bigger.patches.shape == (1, 18, 96)


def test_registers_are_apart_from_patches():
    model = make_vit(num_registers=3).eval()
    with torch.no_grad():
        tokens = model(images(2, 1, 32, 32))
    assert tokens.registers.shape == (2, 3, 96)
    assert tokens.patches.shape == (2, 16, 96)
    assert make_vit()(images(1, 1, 32, 32)).registers.shape == (1, 0, 96)


def test_the_mask_token_replaces_masked_patches_only():
    model = make_vit()
    x = images(2, 1, 32, 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [1, 7]] = True
    plain, masked = model._embed(x, None)[0], model._embed(x, mask)[0]
    assert model.pos_embed is not None
    for b in range(2):
        for n in range(16):
            if mask[b, n]:
                torch.testing.assert_close(masked[b, 1 + n], model.mask_token[0] + model.pos_embed[0, 1 + n])
            else:
                assert torch.equal(masked[b, 1 + n], plain[b, 1 + n])
    assert torch.equal(masked[:, 0], plain[:, 0])
    # what lies under the mask cannot matter
    other = x.clone()
    other[0, :, :8, 8:16] += 100  # patch 1
    with torch.no_grad():
        a, b = (model.encode_crops([i], [mask])[0].cls for i in (x, other))
    assert torch.equal(a, b)


def test_layer_scale_starts_near_the_identity():
    """With LayerScale 1e-5 the blocks hardly change their input; the output is the norm of the embedding."""
    torch.manual_seed(0)
    model = ViT(config(layer_scale=1e-5)).eval()
    x = images(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x).patches, model.norm(model._embed(x, None)[0])[:, 1:], atol=1e-3, rtol=1e-3)


def test_bad_shapes_are_refused_with_the_numbers():
    model = make_vit()
    with pytest.raises(UsageError, match=r"image sides \(32, 36\) are no multiples of the patch \(8, 8\)"):
        model(images(1, 1, 32, 36))
    with pytest.raises(UsageError, match=r"'huge' is unknown; known: nano, .*giant"):
        ViTConfig(size="huge")
    with pytest.raises(UsageError, match=r"image \(30, 32\) is no multiple of the patch \(8, 8\)"):
        config(image=(30, 32))
    with pytest.raises(UsageError, match=r"two axes \(2D\) or three \(3D\)"):
        config(image=(32, 32, 32))
