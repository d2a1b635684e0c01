"""SigLIP's tower is the function that transformers computes, from one file or shards, alone or inside MedGemma."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hilum.encode.encoder import Encoder
from hilum.encode.released.shards import read_index, read_tensors
from hilum.encode.released.siglip import read_siglip
from hilum.errors import ContractError, UsageError

transformers = pytest.importorskip("transformers")

TOWER = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
    "resample": 3, "rescale_factor": 1 / 255, "size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def save(folder, model, **settings):
    model.save_pretrained(folder, **settings)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def make_tower(**changes):
    torch.manual_seed(0)
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER, **changes)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():  # biases and norms too: what begins as zero or one would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(network, tower):
    with torch.inference_mode():
        ours, theirs = network.eval()(images()), tower(images())
    torch.testing.assert_close(ours.patches, theirs.last_hidden_state, atol=1e-5, rtol=0)
    assert ours.registers.shape == (2, 0, 48)
    return ours, theirs


def test_tower_as_transformers(tmp_path):
    tower = make_tower()
    network, contract, report = read_siglip(save(tmp_path, tower))
    ours, theirs = close(network, tower)
    torch.testing.assert_close(ours.cls, theirs.pooler_output, atol=1e-5, rtol=0)
    assert contract.size_px == 32
    assert contract.resampling == "bicubic"
    assert contract.mean == (0.5, 0.5, 0.5)
    assert report["num_tensors"] == len(tower.state_dict())
    assert report["used"] + report["transformed"]["q, k and v joined into attn.qkv"] == report["num_tensors"]
    assert report["num_parameters"] == sum(p.numel() for p in network.parameters())
    assert report["not_read"] == 0


def test_tower_of_a_whole_siglip_in_shards(tmp_path):
    text = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "vocab_size": 50,
    }
    whole = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=TOWER)).eval()
    save(tmp_path, whole, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    network, _, report = read_siglip(tmp_path)
    ours, theirs = close(network, whole.vision_model)
    torch.testing.assert_close(ours.cls, theirs.pooler_output, atol=1e-5, rtol=0)
    assert report["not_read"] == len(whole.state_dict()) - report["num_tensors"] > 10


@pytest.mark.parametrize(
    "prefix", ["vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_model."]
)
def test_tower_inside_medgemma(tmp_path, prefix):
    tower = make_tower(vision_use_head=False)
    state = {prefix + name: tensor.to(torch.bfloat16) for name, tensor in tower.state_dict().items()}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "vision_config": {**TOWER, "vision_use_head": False}})
    )
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**PROCESSOR, "image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": None})
    )
    save_file(state, tmp_path / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(state, "model-00001-of-00002.safetensors")
    places["language_model.model.embed_tokens.weight"] = (
        "model-00002-of-00002.safetensors"  # never fetched, never opened
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    network, _, report = read_siglip(tmp_path)
    tower.load_state_dict({name: t.to(torch.bfloat16).float() for name, t in tower.state_dict().items()})
    ours, _ = close(network, tower)
    torch.testing.assert_close(ours.cls, ours.patches.mean(1))
    assert report["not_read"] == 1
    assert report["transformed"]["bfloat16 read as float32"] == len(state)


def test_what_does_not_fit_is_listed(tmp_path):
    tower = make_tower()
    save(tmp_path, tower)
    whole = load_file(tmp_path / "model.safetensors")
    first = next(n for n in whole if n.endswith("embeddings.patch_embedding.weight"))
    prefix = first.removesuffix("embeddings.patch_embedding.weight")

    def with_changes(message, **changes):
        state = {n: t for n, t in {**whole, **changes}.items() if t is not None}
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ContractError, match=message):
            read_siglip(tmp_path)

    with_changes(r"1 tensors do not fit: head\.probe: missing", **{f"{prefix}head.probe": None})
    with_changes("no place for it", **{f"{prefix}extra": torch.zeros(1)})
    with_changes(r"expected \(48,\), found \(47,\)", **{f"{prefix}post_layernorm.bias": torch.zeros(47)})
    with_changes(r"attn\.q\.bias: missing|attn\.qkv\.bias: missing",
                 **{f"{prefix}encoder.layers.1.self_attn.k_proj.bias": None})  # fmt: skip
    with_changes("0 vision towers", **{first: None})
    with_changes("2 vision towers", **{"other.embeddings.patch_embedding.weight": torch.zeros(1)})


def test_settings_that_we_have_not(tmp_path):
    save(tmp_path, make_tower())
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"model_type": "clip"}, "model_type 'clip'"),
        ({"image_size": 33}, "expected a multiple"),
        ({"image_size": 64}, "the tower sees"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ContractError, match=message):
            read_siglip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="this tower sees"):
        read_siglip(tmp_path)[0](torch.zeros(1, 3, 40, 40))


def test_an_index_never_leaves_its_folder(tmp_path):
    for content in (
        b"{}",
        b"nothing",
        b'{"weight_map": {"a": "../b"}}',
        b'{"weight_map": {"a": "/b"}}',
        b'{"weight_map": {"a": ".."}}',
        b'{"weight_map": 3}',
    ):
        with pytest.raises(ContractError, match="no index of shards"):
            read_index(content, "index")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(ContractError, match="cannot be read as safetensors"):
        read_tensors(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ContractError, match="cannot be read as safetensors"):
        read_tensors(tmp_path)


def test_half_precision(tmp_path):
    save(tmp_path, make_tower())
    network, contract, _ = read_siglip(tmp_path)
    whole = Encoder(network, contract, "x", patch=(8, 8)).tokens(images())
    half = Encoder(network, contract, "x", patch=(8, 8), precision="bfloat16").tokens(images())
    assert torch.cosine_similarity(half.cls, whole.cls).min() > 0.999
    assert torch.cosine_similarity(half.patches, whole.patches, dim=-1).min() > 0.999
