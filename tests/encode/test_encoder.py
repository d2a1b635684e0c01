"""Export and load, damage, baselines and pooling."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder, pick_device, pixel_encoder, read_model_config
from hilum.encode.pooling import pool
from hilum.encode.vit import Tokens
from hilum.encode.zoo import load_encoder, open_folder
from hilum.errors import ContractError, HilumError, InputError, UsageError


def some_images(size: int = 32, num: int = 2) -> torch.Tensor:
    return torch.randn(num, 1, size, size, generator=torch.Generator().manual_seed(0))


# ---- export and load


def test_a_loaded_encoder_gives_the_same_bits(export, vit):
    encoder = open_folder(export)
    with torch.inference_mode():
        wanted = vit(some_images())
    for a, b in zip(encoder.tokens(some_images()), wanted):
        assert torch.equal(a, b)
    assert encoder.contract == Contract(size_px=32)
    assert encoder.name == "test@7"
    assert encoder.grid == (4, 4)
    assert not any(p.requires_grad for p in encoder.network.parameters())


def test_the_export_says_what_it_is(export):
    config, contract = read_model_config(export)
    assert (config.size, config.patch, contract.size_px) == ("nano", (8, 8), 32)
    card = (export / "README.md").read_text()
    assert contract.hash in card
    assert "Research use only" in card
    record = json.loads((export / "config.json").read_text())
    assert record["step"] == 7
    assert record["versions"]["torch"]


def test_export_leaves_no_temporary_files(export):
    assert sorted(os.listdir(export)) == ["README.md", "config.json", "contract.json", "model.safetensors"]


# ---- damage


def change_weights(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_cut_weights_file(export):
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ContractError, match=r"model\.safetensors cannot be read as safetensors"):
        open_folder(export)


def test_an_absent_weights_file(export):
    (export / "model.safetensors").unlink()
    with pytest.raises(ContractError, match=r"model\.safetensors cannot be read as safetensors"):
        open_folder(export)


def test_a_missing_tensor(export):
    change_weights(export, lambda state: state.pop("norm.bias"))
    with pytest.raises(ContractError, match=r"1 tensors do not fit: norm\.bias: missing, expected \(96,\)"):
        open_folder(export)


def test_a_tensor_of_another_shape(export):
    change_weights(export, lambda state: state.update({"cls_token": torch.zeros(1, 1, 95)}))
    with pytest.raises(ContractError, match=r"cls_token: expected \(1, 1, 96\), found \(1, 1, 95\)"):
        open_folder(export)


def test_a_tensor_too_many(export):
    change_weights(export, lambda state: state.update({"extra": torch.zeros(2)}))
    with pytest.raises(ContractError, match=r"extra: no place for it"):
        open_folder(export)


def test_another_version(export):
    record = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**record, "version": 2}))
    with pytest.raises(ContractError, match="hilum-encoder version 2; this hilum reads hilum-encoder version 1"):
        open_folder(export)


def test_unknown_settings_in_the_config(export):
    record = json.loads((export / "config.json").read_text())
    record["vit"]["window"] = 7
    (export / "config.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"unknown setting window"):
        open_folder(export)


def test_a_config_without_its_parts(export):
    """Foreign or half-written files end in an error of ours, not in a KeyError."""
    (export / "config.json").write_text(json.dumps({"format": "hilum-encoder", "version": 1}))
    with pytest.raises(HilumError, match=r"config\.json"):
        open_folder(export)
    (export / "config.json").write_text("[1, 2]")
    with pytest.raises(HilumError, match=r"config\.json"):
        open_folder(export)
    (export / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read as JSON"):
        open_folder(export)


def test_a_folder_that_is_no_encoder(tmp_path):
    with pytest.raises(UsageError, match="is no encoder; expected a folder"):
        load_encoder(str(tmp_path))
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "file"), str(tmp_path / "absent"), "dinov9"):
        with pytest.raises(UsageError, match=r"no encoder '.*'; expected a folder .* or one of: pixels, random:MODEL"):
            load_encoder(name)


# ---- devices


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_devices_that_torch_knows_and_hilum_does_not(export, name):
    with pytest.raises(
        UsageError, match=f"device '{name}' is none that hilum runs on; expected auto, cpu, cuda or cuda:N"
    ):
        load_encoder(str(export), device=name)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="device 'cuda:2' is not there; torch sees 2, cuda:0 to cuda:1"):
        pick_device("cuda:2")


# ---- baselines


def test_random_weights_follow_the_seed_and_leave_global_randomness_alone(export):
    state = torch.random.get_rng_state()
    outs = [load_encoder(f"random:{export}", seed=s).tokens(some_images()).cls for s in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    trained = open_folder(export)
    assert not torch.equal(trained.tokens(some_images()).cls, outs[0])
    random = load_encoder(f"random:{export}")
    assert random.name == "random-nano"
    assert random.contract == trained.contract


def test_pixel_tokens_are_the_pixels():
    """Class token: means of 4×4 pixels. Patch token: the 16×16 pixels of the patch."""
    encoder = pixel_encoder()
    x = some_images(128)
    tokens = encoder.tokens(x)
    assert encoder.grid == (8, 8)
    torch.testing.assert_close(tokens.cls[0].view(32, 32), x[0, 0].view(32, 4, 32, 4).mean((1, 3)))
    for n in (0, 7, 27, 63):
        row, column = divmod(n, 8)
        patch = x[0, 0][16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert torch.equal(tokens.patches[0, n].view(16, 16), patch)


# ---- pooling


def test_pooling():
    tokens = Tokens(torch.randn(3, 4), torch.zeros(3, 0, 4), torch.randn(3, 6, 4))
    mean = torch.stack([sum(p) / 6 for p in tokens.patches])
    torch.testing.assert_close(pool(tokens, "class"), tokens.cls)
    torch.testing.assert_close(pool(tokens, "mean"), mean)
    torch.testing.assert_close(pool(tokens, "class+mean"), torch.cat([tokens.cls, mean], 1))


def test_a_region_is_the_weighted_mean_of_its_patches():
    tokens = Tokens(torch.randn(2, 4), torch.zeros(2, 0, 4), torch.randn(2, 3, 4))
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.2, 0.0]])
    found = pool(tokens, "class+mean", weights)
    torch.testing.assert_close(found[0], (tokens.patches[0, 0] + 0.5 * tokens.patches[0, 2]) / 1.5)
    torch.testing.assert_close(found[1], tokens.patches[1, 1])
    with pytest.raises(ContractError, match="a region covers no patch"):
        pool(tokens, "mean", torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


# ---- precision


def test_half_precision_gives_nearly_the_same_tokens(export):
    encoder, half = open_folder(export), open_folder(export)
    half = Encoder(half.network, half.contract, "half", patch=half.patch, precision="bfloat16")
    for a, b in zip(encoder.tokens(some_images()), half.tokens(some_images())):
        assert b.dtype == torch.float32
        assert torch.cosine_similarity(a, b, -1).min() > 0.9999 if a.numel() else True
    assert half.network.norm.weight.dtype == torch.float32
    assert half.network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16


def test_small_networks_stay_in_full_precision():
    assert Encoder(torch.nn.Linear(2, 2), Contract(), "small", patch=(16, 16), precision="auto").precision == "float32"
    with pytest.raises(UsageError, match="precision 'half' is unknown; expected auto, float32, bfloat16"):
        Encoder(torch.nn.Linear(2, 2), Contract(), "small", patch=(16, 16), precision="half")
