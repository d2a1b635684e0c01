"""Released heads, against transformers' Dinov2Model and torch's MultiheadAttention put together from their description."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hilum.archive.one import read
from hilum.errors import ContractError, UsageError
from hilum.probe.heads.curia import choose_slices, read_head
from hilum.volume import Volume

transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH, SIZE, NUM = 96, 64, 7
RNG = np.random.default_rng(0)
AFFINE = np.array([[0, 0, 1.0, 5], [0, 1.0, 0, 6], [3.0, 0, 0, 7], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small encoder with drawn weights, and its tensors as they are saved."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=3, image_size=SIZE, patch_size=16, num_channels=1
    )
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def save_head(folder: Path, dino, classes: int = 3, **settings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"classifier.weight": (classes, WIDTH), "classifier.bias": (classes,)}
    attention = settings.get("attention_cfg")
    if attention is not None:
        for block in attention.get("block", ("self", "cross")):
            name = f"attention_module.{block}_attention.attention"
            shapes |= {f"{name}.multihead_attn.in_proj_weight": (3 * WIDTH, WIDTH)}
            shapes |= {f"{name}.multihead_attn.in_proj_bias": (3 * WIDTH,)}
            shapes |= {f"{name}.multihead_attn.out_proj.weight": (WIDTH, WIDTH)}
            shapes |= {f"{name}.multihead_attn.out_proj.bias": (WIDTH,), f"{name}.norm.weight": (WIDTH,)}
            shapes |= {f"{name}.norm.bias": (WIDTH,)}
        queries = (attention.get("num_queries", 1), WIDTH)
        if "cross" in attention.get("block", ("self", "cross")):
            shapes["attention_module.cross_attention.learned_queries"] = queries
    own = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file({f"dino.{n}": t for n, t in dino[1].items()} | own, folder / "model.safetensors")
    config = {
        "model_type": "dinov2_custom_classifier", "architectures": ["Dinov2ForImageClassification"],
        "auto_map": {"AutoConfig": "modeling_dinov2.X"}, "model_name": "raidium/curia", "num_classes": classes,
        "num_slices": None, "kernel_size": None, "use_n_blocks": 1, "use_class_token": False,
        "use_avgpool_per_slice": False, "use_avgpool_on_the_volume": False, "attention_cfg": None, "regression": False,
        "transformers_version": "4.55.0",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | settings))
    return own


def make_scan(num: int = NUM, seed: int = 0) -> Volume:
    voxels = np.random.default_rng(seed).normal(0, 400, (num, 80, 70)).astype(np.int16)
    return Volume(voxels=voxels, affine=AFFINE, modality="CT", unit="HU")


def make_mask(scan: Volume, slices=(2, 3, 5), start: int = 10, stop: int = 45) -> Volume:
    voxels = np.zeros(scan.shape, np.uint8)
    for n, z in enumerate(slices):
        voxels[z, start : stop - 5 * n, 20:50] = 1
    return replace(scan, voxels=voxels, kind="label", modality="OT", unit="")


# ---- the slow version


def pixels_of(voxels: np.ndarray) -> Tensor:
    """(S, 1, size, size), one mean and deviation for all that is given."""
    x = torch.from_numpy(voxels)[:, None].float() / 32767
    x = nn.functional.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)
    return (x - x.mean()) / x.std()


def mask_of(voxels: np.ndarray) -> Tensor:
    """(S, size, size) of zeros and ones."""
    x = torch.from_numpy(voxels.astype(np.float32))[:, None]
    x = nn.functional.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)[:, 0]
    inside = x > 0.5
    return (inside if inside.any() else x > x.max() / 2).float()


def slow_slices(dino, own, scan: Volume, mask: Volume | None) -> Tensor:
    rows = []
    for z in range(len(scan.voxels)):
        with torch.no_grad():
            out = dino[0](pixels_of(scan.voxels[z][None])).last_hidden_state[0]
        feature = out[0]
        if mask is not None:
            if not mask.voxels[z].any():
                continue
            cells = nn.functional.max_pool2d(mask_of(mask.voxels[z][None])[None], 16)[0, 0].flatten()
            feature = sum(out[1 + n] for n in range(16) if cells[n]) / cells.sum()
        rows.append(own["classifier.weight"] @ feature + own["classifier.bias"])
    return torch.stack(rows)


def slow_tokens(dino, scan: Volume, mask: Volume | None, settings: dict) -> Tensor:
    with torch.no_grad():
        hidden = dino[0](pixels_of(scan.voxels), output_hidden_states=True).hidden_states[-1]
    inside = None if mask is None else mask_of(mask.voxels)
    num = settings.get("num_slices")
    if num is None:
        slices = list(range(len(hidden)))
    else:
        middle = len(hidden) // 2
        if inside is not None:
            full = [z for z in range(len(inside)) if inside[z].sum() > 0]
            middle = full[(len(full) - 1) // 2]
        slices = [middle - num // 2 + n for n in range(num)]
    if inside is not None:
        slices = [z for z in slices if inside[z].sum() > 0]
    sequences = []
    for z in slices:
        tokens = [hidden[z, 1 + n] for n in range(16)]
        if inside is not None:
            tokens = [t for n, t in enumerate(tokens) if inside[z, 16 * (n // 4) :, 16 * (n % 4) :][:16, :16].any()]
        elif settings.get("kernel_size") == 2:
            tokens = [sum(tokens[8 * r + 2 * c + s] for s in (0, 1, 4, 5)) / 4 for r in range(2) for c in range(2)]
        sequences.append(tokens)
    if settings.get("use_avgpool_on_the_volume"):
        every = [t for tokens in sequences for t in tokens]
        return (sum(every) / len(every))[None]
    out = []
    for place, (z, tokens) in enumerate(zip(slices, sequences)):
        if settings.get("use_avgpool_per_slice"):
            tokens = [sum(tokens) / len(tokens)]
        if settings.get("use_class_token"):
            tokens = [hidden[z, 0], *tokens]
        code = torch.zeros(WIDTH)
        for i in range(WIDTH // 2):
            angle = place / 10000 ** (2 * i / WIDTH)
            code[2 * i], code[2 * i + 1] = math.sin(angle), math.cos(angle)
        out += [t + code for t in tokens]
    return torch.stack(out)


def slow_attention(own, sequences: list[Tensor], blocks=("self", "cross")) -> Tensor:
    """Zero-padded batch, with the padding mask of the released module."""
    x = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    for block in blocks:
        name = f"attention_module.{block}_attention"
        attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        norm = nn.LayerNorm(WIDTH)
        part = f"{name}.attention.multihead_attn."
        attention.load_state_dict({n.removeprefix(part): t for n, t in own.items() if n.startswith(part)})
        norm.load_state_dict({k: own[f"{name}.attention.norm.{k}"] for k in ("weight", "bias")})
        real = (x != 0).any(-1)
        if block == "self":
            forbidden = real[:, :, None] != real[:, None, :]
            query = x
        else:
            query = own[f"{name}.learned_queries"][None].expand(len(x), -1, -1)
            forbidden = ~real[:, None, :].expand(-1, query.shape[1], -1)
        with torch.no_grad():
            x = norm(query + attention(query, x, x, attn_mask=forbidden)[0])
    return x.mean(1) @ own["classifier.weight"].T + own["classifier.bias"]


def close(found: np.ndarray, wanted: Tensor) -> None:
    np.testing.assert_allclose(found, wanted.numpy(), atol=3e-5)


# ---- heads of slices


@pytest.mark.parametrize("masked", [False, True])
def test_a_linear_head(dino, tmp_path, masked):
    own = save_head(tmp_path, dino, classes=4)
    scan = make_scan()
    mask = make_mask(scan) if masked else None
    found = read_head(tmp_path).predict(scan, mask)
    close(found.logits, slow_slices(dino, own, scan, mask))
    assert found.slices == ((2, 3, 5) if masked else tuple(range(NUM)))


def test_a_region_of_one_pixel(dino, tmp_path):
    own = save_head(tmp_path, dino)
    scan = make_scan(1)
    mask = replace(make_mask(scan, ()), voxels=np.zeros(scan.shape, np.uint8))
    mask.voxels[0, 33, 41] = 1
    close(read_head(tmp_path).predict(scan, mask).logits, slow_slices(dino, own, scan, mask))


def test_regression_gives_the_number(dino, tmp_path):
    own = save_head(tmp_path, dino, classes=1, regression=True)
    scan = make_scan(2)
    head = read_head(tmp_path)
    assert head.settings.regression
    close(head.predict(scan).logits, slow_slices(dino, own, scan, None))


# ---- heads of volumes

VOLUMES = {
    "all tokens": {"attention_cfg": {}},
    "as luna16-3D": {
        "attention_cfg": {"num_heads": 1, "num_queries": 1, "attention_block": ["cross"]},
        "num_slices": 3,
    },
    "three queries, squares": {"attention_cfg": {"num_queries": 3}, "kernel_size": 2, "num_slices": 4},
    "cross only": {"attention_cfg": {"block": ["cross"], "num_queries": 2}},
    "self only": {"attention_cfg": {"block": ["self"]}, "num_slices": 2},
    "a mean a slice": {"attention_cfg": {}, "use_avgpool_per_slice": True},
    "class tokens": {"attention_cfg": {}, "use_class_token": True, "num_slices": 3},
    "as oasis": {"use_avgpool_on_the_volume": True},
    "as oasis, some slices": {"use_avgpool_on_the_volume": True, "num_slices": 3},
}


def slow_volume(dino, own, scan, mask, settings) -> Tensor:
    tokens = slow_tokens(dino, scan, mask, settings)
    if "attention_cfg" not in settings:
        return tokens @ own["classifier.weight"].T + own["classifier.bias"]
    return slow_attention(own, [tokens], settings["attention_cfg"].get("block", ("self", "cross")))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", VOLUMES)
def test_a_head_of_volumes(dino, tmp_path, case, masked):
    settings = VOLUMES[case]
    own = save_head(tmp_path, dino, **settings)
    scan = make_scan()
    mask = make_mask(scan) if masked else None
    head = read_head(tmp_path)
    wanted = slow_volume(dino, own, scan, mask, settings)
    for match_upstream in (False, True):  # one volume has no padding, and its slices are inside
        close(head.predict(scan, mask, match_upstream=match_upstream).logits, wanted)
    close(head.predict_volumes([scan], None if mask is None else [mask]), wanted)


@pytest.mark.parametrize("blocks", [("self", "cross"), ("cross",), ("self",), ("cross", "self")])
def test_padding_speaks_only_when_upstream_is_matched(dino, tmp_path, blocks):
    settings = {"attention_cfg": {"block": list(blocks)}, "num_slices": 3}
    own = save_head(tmp_path, dino, **settings)
    scans = [make_scan(seed=1), make_scan(seed=2)]
    masks = [make_mask(scans[0], stop=20), make_mask(scans[1], stop=70)]
    sequences = [slow_tokens(dino, scan, mask, settings) for scan, mask in zip(scans, masks)]
    assert len(sequences[0]) < len(sequences[1])
    head = read_head(tmp_path)
    batch = slow_attention(own, sequences, blocks)
    alone = torch.cat([slow_attention(own, [tokens], blocks) for tokens in sequences])
    close(head.predict_volumes(scans, masks, match_upstream=True), batch)
    close(head.predict_volumes(scans, masks), alone)
    assert torch.allclose(batch[0], alone[0], atol=3e-5) == (blocks[0] == "cross")


def test_the_choice_of_slices():
    cells = torch.zeros(8, 4, dtype=torch.bool)
    cells[[1, 4, 5, 7], 2] = True
    assert choose_slices(8, None, None) == list(range(8))
    assert choose_slices(8, None, 3) == [3, 4, 5]
    assert choose_slices(7, None, 4) == [1, 2, 3, 4]
    assert choose_slices(8, cells, None) == [1, 4, 5, 7]
    assert choose_slices(8, cells, 3) == [4, 5]  # around slice 4, of which 3 is empty
    assert choose_slices(1, None, 1) == [0]
    # beyond the ends
    assert choose_slices(2, None, 3) == choose_slices(2, None, 2) == [0, 1]
    edge = torch.zeros(8, 4, dtype=torch.bool)
    edge[[0, 7], 1] = True
    assert choose_slices(8, edge, 3) == [0]
    assert choose_slices(8, edge, 3, match_upstream=True) == [7, 0]  # slice -1 is the last
    with pytest.raises(ContractError, match="wants slices 0 to 2, of 2: an error upstream, too"):
        choose_slices(2, None, 3, match_upstream=True)


# ---- what does not fit


def test_wrong_tensors_are_listed(dino, tmp_path):
    save_head(tmp_path, dino, attention_cfg={})
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "attention_module.cross_attention.learned_queries"
    del tensors[lost]
    tensors |= {"classifier.bias": torch.zeros(2), "extra.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ContractError) as raised:
        read_head(tmp_path)
    assert "3 tensors of the head do not fit" in str(raised.value)
    for told in (f"{lost}: expected (1, 96), found None", "classifier.bias: expected (3,), found (2,)", "extra.weight"):
        assert told in str(raised.value)
    save_head(tmp_path, dino)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["dino.layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ContractError, match=r"norm\.bias: missing"):
        read_head(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "dinov2"}, "model_type 'dinov2'; a head of Curia is dinov2_custom_classifier"),
        ({"attention_cfg": {"num_heads": 12}}, "num_heads is 12"),
        ({"attention_cfg": {"depth": 2}}, "attention_cfg.depth is unknown"),
        ({"attention_cfg": {"block": ["self", "ffn"]}}, r"block is \['self', 'ffn'\]"),
        ({"use_n_blocks": 4}, "use_n_blocks is 4"),
        ({"use_avgpool_per_slice": True, "use_class_token": True}, "use_class_token with averages"),
        ({"use_avgpool_per_slice": True}, "use_avgpool_per_slice without attention"),
        ({"attention_cfg": {}, "use_avgpool_on_the_volume": True}, "has nothing to attend to"),
    ],
)
def test_settings_that_no_head_has(dino, tmp_path, settings, told):
    save_head(tmp_path, dino)
    config = json.loads((tmp_path / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match=told):
        read_head(tmp_path)


def test_wrong_use(dino, tmp_path):
    save_head(tmp_path, dino)
    head, scan = read_head(tmp_path), make_scan(2)
    with pytest.raises(UsageError, match="this head judges slices"):
        head.predict_volumes([scan])
    with pytest.raises(ContractError, match="the mask is empty"):
        head.predict(scan, make_mask(scan, ()))
    with pytest.raises(ContractError, match="expected the same grid"):
        head.predict(scan, make_mask(make_scan(3), ()))
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_classes": "3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="num_classes: expected"):
        read_head(tmp_path)


@pytest.mark.parametrize("of_volumes", [False, True])
def test_hilum_predict_takes_a_released_head(dino, tmp_path, write_ct, hilum, of_volumes):
    settings = {"attention_cfg": {}} if of_volumes else {}
    (tmp_path / "head").mkdir()
    save_head(tmp_path / "head", dino, **settings)
    voxels = make_scan(3).voxels
    scan = write_ct("scan", voxels, AFFINE)
    code, out, err = hilum("predict", scan, "--head", tmp_path / "head", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    logits = read_head(tmp_path / "head").predict(read(scan)).logits
    expected = torch.from_numpy(logits).softmax(1).numpy()
    assert [row["slice"] for row in rows] == ([None] if of_volumes else [0, 1, 2])
    np.testing.assert_allclose([[row[f"class {c}"] for c in range(3)] for row in rows], expected, atol=1e-6)
    code, _, err = hilum("predict", scan, "--head", tmp_path / "head", "--model", "pixels")
    assert (code, "its own encoder" in err) == (2, True)
