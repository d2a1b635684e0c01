"""Large volumes: blocks that put together give what one pass gives, and a memory estimate that holds."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hilum.encode import chunks
from hilum.encode.chunks import encode_chunks, encode_prepared, is_out_of_memory, memory_estimate, plan_blocks
from hilum.encode.encoder import Encoder
from hilum.encode.vit import Tokens, ViT, ViTConfig, Window
from hilum.encode.volume_contract import PreparedVolume, VolumeContract
from hilum.errors import UsageError

PATCH, GRID = (4, 4, 4), (8, 10, 9)
CONTRACT = VolumeContract(patch=PATCH)


def smooth(grid=GRID) -> PreparedVolume:
    coarse = torch.randn(1, 1, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    sides = tuple(g * p for g, p in zip(grid, PATCH))
    image = functional.interpolate(coarse, sides, mode="trilinear")[0]
    return PreparedVolume(image=image, affine=np.eye(4), grid=grid, notes=())


def vit(**changes) -> ViT:
    torch.manual_seed(2)
    settings = {
        "size": "144x4x2-mlp288", "patch": PATCH, "image": (32, 32, 32), "positions": "rotary", "num_registers": 2,
        "layer_scale": 1.0, **changes,
    }  # fmt: skip
    return ViT(ViTConfig(**settings))


class Places(nn.Module):
    """A network whose patch tokens are the place in the whole volume and the mean of the patch; its class token their mean."""

    def forward(self, images: Tensor, window: Window | None = None) -> Tokens:
        grid = tuple(n // p for n, p in zip(images.shape[2:], PATCH))
        start = window.start if window else (0, 0, 0)
        places = torch.stack(torch.meshgrid(*[torch.arange(g) + s for g, s in zip(grid, start)], indexing="ij"), -1)
        means = functional.avg_pool3d(images, PATCH)[0, 0]
        patches = torch.cat([places.float(), means[..., None]], -1).flatten(0, 2)[None]
        return Tokens(patches.mean(1), patches.mean(1, keepdim=True), patches)


# ---- blocks


@pytest.mark.parametrize("grid", [(8, 10, 9), (1, 30, 5), (24, 31, 31), (7, 7, 7)])
@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("budget", [64, 100, 400, 5000])
def test_blocks_cover_everything_and_overlap(grid, budget, overlap):
    lines = plan_blocks(grid, budget, overlap)
    assert math.prod(len(parts[0].shares) for parts in lines) <= budget
    for n, parts in zip(grid, lines):
        total = torch.zeros(n)
        for part in parts:
            assert len(part.shares) == len(parts[0].shares)
            assert (part.shares > 0).all()
            total[part.start : part.start + len(part.shares)] += part.shares
        torch.testing.assert_close(total, torch.ones(n))
        for left, right in pairwise(parts):
            assert left.start < right.start
            assert left.start + len(left.shares) - right.start >= overlap


def test_shares_rise_and_fall_linearly():
    (first, second), *_ = plan_blocks((10, 2, 2), 28, 3)
    assert (first.start, second.start) == (0, 3)
    assert first.shares.tolist() == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert second.shares.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_a_budget_too_small_to_overlap():
    with pytest.raises(UsageError, match="blocks of 20 patches cannot overlap by 2; expected a budget of 27"):
        plan_blocks((8, 8, 8), 20, 2)


@pytest.mark.parametrize(("budget", "overlap"), [(300, 2), (64, 1), (27, 2), (100, 0)])
def test_what_does_not_look_around_comes_out_as_in_one_pass(budget, overlap):
    encoder, prepared = Encoder(Places(), CONTRACT, "places", patch=PATCH), smooth()
    whole = encoder.tokens(prepared.image[None])
    found = encode_chunks(encoder, prepared, budget, overlap)
    torch.testing.assert_close(found.patches, whole.patches, atol=1e-5, rtol=1e-5)
    assert found.cls.shape == whole.cls.shape
    assert found.registers.shape == whole.registers.shape


def test_the_class_token_counts_each_block_by_its_patches():
    """Without overlap the blocks are a partition: the mean of their means, weighted, is the mean of all."""
    encoder, prepared = Encoder(Places(), CONTRACT, "places", patch=PATCH), smooth((9, 5, 5))
    found = encode_chunks(encoder, prepared, 75, 0)
    torch.testing.assert_close(found.cls, encoder.tokens(prepared.image[None]).cls)


def test_one_block_is_the_whole_to_the_last_bit():
    encoder, prepared = Encoder(vit(), CONTRACT, "vit", patch=PATCH), smooth()
    for a, b in zip(encode_chunks(encoder, prepared, math.prod(GRID)), encoder.tokens(prepared.image[None])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_blocks_agree_with_one_pass(share, positions):
    """The stated tolerance: attention that reaches everywhere (random weights, no LayerScale), a volume that varies smoothly,
    two to eight blocks."""
    encoder, prepared = Encoder(vit(positions=positions), CONTRACT, "vit", patch=PATCH), smooth()
    whole, found = encoder.tokens(prepared.image[None]), encode_chunks(encoder, prepared, int(math.prod(GRID) * share))
    patches = functional.cosine_similarity(found.patches, whole.patches, dim=-1)
    assert patches.mean() > 0.998
    assert patches.min() > 0.98
    assert float(functional.cosine_similarity(found.cls, whole.cls)) > 0.97


# ---- where it does not matter where a volume is cut: within 1e-3 of one pass


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize(("budget", "overlap"), [(300, 2), (100, 0), (64, 1)])
def test_a_transformer_that_does_not_look_around(budget, overlap, positions):
    """Embedding, positions, norms and feed-forward parts are each patch's own; attention is silenced."""
    model = vit(positions=positions)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    encoder, prepared = Encoder(model, CONTRACT, "vit", patch=PATCH), smooth()
    whole = encoder.tokens(prepared.image[None])
    for a, b in zip(encode_chunks(encoder, prepared, budget, overlap), whole):  # class token and registers, too
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_transformer_that_looks_one_patch_far_in_each_block(monkeypatch):
    """Four blocks look four patches far: what is farther from every cut is that of one pass, what is nearer is not."""
    seen: dict[str, tuple[int, ...]] = {}
    rotations = ViT._rotations

    def remember(self, grids, *rest):
        seen["grid"] = grids[0]
        return rotations(self, grids, *rest)

    def near(q, k, v):
        place = torch.stack(torch.meshgrid(*map(torch.arange, seen["grid"]), indexing="ij"), -1).flatten(0, 2)
        reach = torch.eye(q.shape[2], dtype=torch.bool)
        reach[3:, 3:] = (place[:, None] - place).abs().amax(-1) <= 1
        reach[:3] = True  # class token and registers see all; patches do not see them
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=reach)

    monkeypatch.setattr(ViT, "_rotations", remember)
    monkeypatch.setattr("hilum.encode.vit.attend", near)
    grid = (4, 5, 24)
    encoder, prepared = Encoder(vit(), CONTRACT, "vit", patch=PATCH), smooth(grid)
    whole = encoder.tokens(prepared.image[None])
    apart = (
        (encode_chunks(encoder, prepared, 4 * 5 * 14, 4).patches - whole.patches).abs().view(*grid, -1).amax((0, 1, 3))
    )
    (_, _, parts) = plan_blocks(grid, 4 * 5 * 14, 4)
    cuts = [(part.start, part.start + len(part.shares)) for part in parts]
    assert cuts == [(0, 14), (10, 24)]
    far = torch.tensor([x + 4 < 14 or x - 4 >= 10 for x in range(24)]) & torch.tensor(
        [not 10 <= x < 14 for x in range(24)]
    )
    assert apart[far].max() < 1e-4
    assert apart[10:14].min() > 1e-3


def test_a_volume_whose_blocks_are_alike(monkeypatch):
    """A pattern that repeats with the block, no positions, attention that reaches every patch: a block has seen all there is
    to see. Class token and registers are not attended to: among fewer patches they would weigh more."""

    def all_patches(q, k, v):
        return functional.scaled_dot_product_attention(q, k[:, :, 3:], v[:, :, 3:])

    monkeypatch.setattr("hilum.encode.vit.attend", all_patches)
    model = vit(positions="learned")
    torch.nn.init.zeros_(model.pos_embed[:, 1:])
    one = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    prepared = PreparedVolume(image=one.repeat(1, 2, 2, 2), affine=np.eye(4), grid=(8, 8, 8), notes=())
    encoder = Encoder(model, CONTRACT, "vit", patch=PATCH)
    whole, found = encoder.tokens(prepared.image[None]), encode_chunks(encoder, prepared, 64, 0)
    for a, b in zip(found, whole):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert float((whole.cls - whole.patches.mean(1)).abs().max()) > 0.1


def test_a_block_has_the_positions_of_the_whole():
    """With a network that sees positions only, a block's tokens before attention are those of the whole."""
    for positions in ("rotary", "learned"):
        model = vit(positions=positions, size="144x1x2-mlp288").eval()
        if model.pos_embed is not None:
            table = model._positions((2, 3, 4), Window((1, 2, 3), (8, 10, 9))).view(2, 3, 4, -1)
            whole = model._positions((8, 10, 9)).view(8, 10, 9, -1)
            assert torch.equal(table, whole[1:3, 2:5, 3:7])
        else:
            (part,) = model._rotations([(2, 3, 4)], torch.device("cpu"), None, Window((1, 2, 3), (8, 10, 9)))
            (whole,) = model._rotations([(8, 10, 9)], torch.device("cpu"), None)
            inside = whole[:, 3:].view(2, 8, 10, 9, -1)[:, 1:3, 2:5, 3:7].reshape(2, 24, -1)
            assert torch.equal(part[:, 3:], inside)
            assert torch.equal(part[:, :3], whole[:, :3])


# ---- memory


def test_blocks_follow_from_free_memory(monkeypatch):
    encoder, prepared = Encoder(vit(), CONTRACT, "vit", patch=PATCH), smooth()
    tokens, notes = encode_prepared(encoder, prepared)
    assert notes == ()
    assert torch.equal(tokens.cls, encoder.tokens(prepared.image[None]).cls)
    needed = chunks.pass_bytes(encoder.network.config, math.prod(GRID) + 3, torch.float32)
    monkeypatch.setattr(chunks, "available_memory", lambda device: needed // 2)
    tokens, notes = encode_prepared(encoder, prepared)
    assert tokens.patches.shape == (1, math.prod(GRID), 144)
    assert "needed for 720 patches at once" in notes[0]
    assert "encoded in" in notes[1]


@dataclass
class _Full:
    """Memory that runs out above a number of patches."""

    limit: int
    error: BaseException


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_out_of_memory_falls_back_and_says_so(error, monkeypatch):
    encoder, prepared, full = Encoder(vit(), CONTRACT, "vit", patch=PATCH), smooth(), _Full(200, error)
    plain = encoder.tokens

    def tokens(images, window=None):
        if images[0].numel() / math.prod(PATCH) > full.limit:
            raise full.error
        return plain(images, window)

    monkeypatch.setattr(encoder, "tokens", tokens)
    found, notes = encode_prepared(encoder, prepared)
    assert found.patches.shape == (1, 720, 144)
    assert notes[:2] == ("out of memory with 720 patches at once", "out of memory with 360 patches at once")
    assert "blocks of up to 180 patches" in notes[2]
    full.limit = 0
    with pytest.raises(type(error)):
        encode_prepared(encoder, prepared)


def test_other_errors_are_not_taken_for_it(monkeypatch):
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    encoder = Encoder(vit(), CONTRACT, "vit", patch=PATCH)
    monkeypatch.setattr(encoder, "tokens", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        encode_prepared(encoder, smooth())


def test_free_memory_is_a_number_of_this_machine():
    free = chunks.available_memory(torch.device("cpu"))
    assert 1 << 20 < free < 1 << 50


def test_files_in_the_cache_of_a_container_are_free_memory(tmp_path):
    assert chunks._free_in_container(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("16000\n")
    (tmp_path / "memory.current").write_text("15500\n")
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 12500\nshmem 500\ninactive_file 10000\nactive_file 2000\n")
    assert chunks._free_in_container(tmp_path) == 16000 - 3000 - 500
    (tmp_path / "memory.max").write_text("max\n")
    assert chunks._free_in_container(tmp_path) == 1 << 62


CODE = """
import json, resource, sys, torch
from hilum.encode.encoder import Encoder
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract
size, dtype, patch, sides = json.loads(sys.argv[1])
torch.set_num_threads(1)

def encode(size, patch, sides):
    config = ViTConfig(size=size, patch=(patch,) * 3, image=(8 * patch,) * 3, positions="rotary", num_registers=4)
    encoder = Encoder(ViT(config), VolumeContract(), "test", patch=config.patch, precision=dtype)
    encoder.tokens(torch.randn(1, 1, *(n * patch for n in sides)))

encode("96x1x2-mlp96", 4, (10, 10, 10))  # what libraries load once
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
encode(size, patch, sides)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # ru_maxrss remembers the parent
print(int(status["VmHWM"].split()[0]) * 1024 - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("size", "dtype", "patch", "sides"),
    [
        ("432x1x6-mlp1728", "float32", 8, (12, 17, 17)),
        ("288x1x4-mlp4608", "bfloat16", 8, (12, 18, 18)),
        ("192x1x4-swiglu1024", "float32", 4, (12, 20, 20)),
    ],
)  # fmt: skip
def test_the_estimate_holds(size, dtype, patch, sides):
    """Peak resident memory of a fresh process, within 30 %; measured thrice at most, as what the allocator keeps varies."""
    settings = json.dumps([size, dtype, patch, sides])
    config = ViTConfig(size=size, patch=(patch,) * 3, image=(8 * patch,) * 3, positions="rotary", num_registers=4)
    estimate = memory_estimate(config, math.prod(sides) + 5, getattr(torch, dtype))
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CODE, settings], capture_output=True, text=True, check=True)
        if estimate == pytest.approx(int(done.stdout), rel=0.3):
            break
    assert estimate == pytest.approx(int(done.stdout), rel=0.3)


def test_blocks_on_request():
    """No more than so many patches at once, though memory would allow it."""
    encoder, prepared = Encoder(vit(), CONTRACT, "vit", patch=PATCH), smooth()
    asked = max(math.prod(prepared.grid) // 2, 27)
    tokens, notes = encode_prepared(encoder, prepared, most=asked)
    expected = encode_chunks(encoder, prepared, asked)
    assert torch.equal(tokens.patches, expected.patches)
    assert len(notes) == 1
    assert f"of up to {asked:,} patches" in notes[0]
