"""Encoders by name: folders of every layout, pulled models, baselines; and the self-test of a load."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder
from hilum.encode.released.doctor import check_model
from hilum.encode.released.golden import compare_vectors, golden_features, phantom_scans, read_golden, write_golden
from hilum.encode.released.models import MODELS, model_folder
from hilum.encode.vit import ViT, ViTConfig
from hilum.encode.volume_contract import VolumeContract
from hilum.encode.zoo import layout_of, load_encoder, open_folder
from hilum.errors import ContractError, InputError, UsageError, WeightsAbsent
from hilum.settings import from_dict

PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True, "do_rescale": True,
    "do_normalize": True, "resample": 3, "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HILUM_HOME", str(tmp_path / "home"))


@pytest.fixture
def released(tmp_path):
    """A small DINOv2 as transformers would save it, written by hand."""
    folder = tmp_path / "released"
    folder.mkdir()
    torch.manual_seed(0)
    width, state = 96, {}

    def add(name, *shape):
        state[name] = 0.2 * torch.randn(*shape)

    add("embeddings.cls_token", 1, 1, width)
    add("embeddings.mask_token", 1, width)
    add("embeddings.position_embeddings", 1, 17, width)
    add("embeddings.patch_embeddings.projection.weight", width, 3, 8, 8)
    add("embeddings.patch_embeddings.projection.bias", width)
    for n in range(3):
        layer = f"encoder.layer.{n}."
        for part in ("query", "key", "value"):
            add(f"{layer}attention.attention.{part}.weight", width, width)
            add(f"{layer}attention.attention.{part}.bias", width)
        for part, rows, columns in (("attention.output.dense", 96, 96), ("mlp.fc1", 384, 96), ("mlp.fc2", 96, 384)):
            add(f"{layer}{part}.weight", rows, columns)
            add(f"{layer}{part}.bias", rows)
        for part in (
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "layer_scale1.lambda1",
            "layer_scale2.lambda1",
        ):
            add(layer + part, width)
    add("layernorm.weight", width)
    add("layernorm.bias", width)
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "dinov2", "num_attention_heads": 3, "image_size": 32, "hidden_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def pretend_pulled(folder, name, repo, revision="main"):
    """As `hilum pull` would have left it."""
    target = model_folder(name, revision)
    shutil.copytree(folder, target)
    files = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in target.iterdir()
    }
    record = {"format": "hilum-pull", "version": 1, "name": name, "repo": repo, "asked": revision, "revision": "c" * 40}
    (target / "pull.json").write_text(json.dumps({**record, "files": files}))
    return target


# ---- by name


def test_a_released_folder(released):
    encoder = load_encoder(str(released))
    assert encoder.name.startswith("released@")
    assert encoder.contract.size_px == 32
    assert encoder.grid == (4, 4)
    assert encoder.report["layout"] == "transformers dinov2"
    assert encoder.report["num_tensors"] == len(load_file(released / "model.safetensors"))
    assert encoder.tokens(torch.randn(2, 3, 32, 32)).patches.shape == (2, 16, 96)


def test_a_pulled_model(released):
    with pytest.raises(WeightsAbsent, match=r"fetch it with: hilum pull dinov2-small$") as caught:
        load_encoder("dinov2-small")
    assert caught.value.exit_code == 6
    pretend_pulled(released, "dinov2-small", "facebook/dinov2-small")
    by_name, by_repo = load_encoder("dinov2-small"), load_encoder("facebook/dinov2-small")
    assert by_name.name == by_repo.name == "dinov2-small@cccccccc"
    assert by_name.contract.windows == ((-1024.0, 1024.0),)
    with pytest.raises(WeightsAbsent, match="hilum pull dinov2-small --revision v2"):
        load_encoder("dinov2-small", revision="v2")


def test_the_contract_of_a_pulled_model_is_its_own(released):
    """Windows of the table, size and constants of the folder."""
    folder = pretend_pulled(released, "medsiglip", "google/medsiglip-448")
    from hilum.encode.released.natural import processor_contract

    contract = processor_contract(folder)
    assert contract.windows == ((-1225.0, 1025.0), (-135.0, 215.0), (0.0, 80.0))
    assert (contract.size_px, contract.fit, contract.mean[0]) == (32, "crop", 0.485)


def test_a_model_of_the_hub_that_is_not_in_the_table(released):
    with pytest.raises(WeightsAbsent, match="hilum pull someone/model"):
        load_encoder("someone/model")
    pretend_pulled(released, "someone/model", "someone/model")
    assert load_encoder("someone/model").name == "someone/model@cccccccc"


def test_a_changed_file_of_a_pulled_model_is_refused(released):
    folder = pretend_pulled(released, "dinov2-small", "facebook/dinov2-small")
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.485", "0.486"))
    with pytest.raises(ContractError, match=r"preprocessor_config.json has changed\. Delete the folder"):
        load_encoder("dinov2-small")
    (folder / "pull.json").write_text("{}")
    with pytest.raises(ContractError, match="no record of hilum pull"):
        load_encoder("dinov2-small")


def test_a_hilum_folder_has_a_report(export):
    encoder = load_encoder(str(export))
    assert encoder.name == open_folder(export).name
    assert encoder.report["layout"] == "hilum encoder"
    assert encoder.report["used"] == encoder.report["num_tensors"]


def test_random_weights_of_a_released_model(released):
    trained = load_encoder(str(released))
    a, b, c = (load_encoder(f"random:{released}", seed=s) for s in (0, 0, 1))
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(a.tokens(image).cls, b.tokens(image).cls)
    assert not torch.equal(a.tokens(image).cls, c.tokens(image).cls)
    assert a.contract == trained.contract
    assert a.report == {}


def test_layouts(tmp_path, released):
    def made(name, **config):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return layout_of(folder)

    assert layout_of(released) == "natural"
    assert made("a", model_type="dinov2", num_channels=1) == "curia"
    assert made("b", model_type="gemma3") == made("c", model_type="siglip") == "siglip"
    assert made("d", format="hilum-encoder") == "hilum"
    with pytest.raises(ContractError, match="model_type 'bert'; known are"):
        made("e", model_type="bert")
    (tmp_path / "f" / "vitb_3d").mkdir(parents=True)
    with pytest.raises(UsageError, match="is no encoder"):
        layout_of(tmp_path / "f")
    (tmp_path / "f" / "vitb_3d" / "config.yaml").write_text("")
    assert layout_of(tmp_path / "f") == "voxelfm"


def test_our_own_in_the_layout_of_transformers(released, export):
    """contract.json decides, not what transformers would do to an image."""
    contract = {**json.loads((export / "contract.json").read_text()), "channels": 3}
    (released / "contract.json").write_text(json.dumps(contract))
    encoder = load_encoder(str(released))
    assert encoder.contract == open_folder(export).contract.__class__(size_px=32, channels=3)
    assert encoder.report["layout"] == "transformers dinov2"


def make_curia(folder, released):
    """One channel, as Curia's releases."""
    shutil.copytree(released, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_channels": 1}))
    state = load_file(folder / "model.safetensors")
    name = "embeddings.patch_embeddings.projection.weight"
    state[name] = state[name][:, :1].contiguous()
    save_file(state, folder / "model.safetensors")
    processor = {"crop_size": 32, "clip_below_air": False, "eps": 1e-6, "do_resize": True, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**processor, "image_processor_type": "CuriaImageProcessor"})
    )
    return folder


def test_curia_by_name(released, tmp_path):
    pytest.importorskip("hilum.encode.released.curia")
    folder = make_curia(tmp_path / "curia", released)
    revision = MODELS["curia-2"].revision
    pretend_pulled(folder, "curia-2", "raidium/curia-2", revision)
    for name in ("curia-2-b", "raidium/curia-2", str(folder)):
        encoder = load_encoder(name)
        assert from_dict(Contract, {**MODELS["curia-2"].contract, "size_px": 32}) == encoder.contract
    assert check_model("curia-2", write=True)["faults"] == check_model("curia-2")["faults"] == 0


def test_voxelfm_by_name(tmp_path):
    voxelfm = pytest.importorskip("hilum.encode.released.voxelfm")
    torch.manual_seed(0)
    shape = ViTConfig(
        size="72x2x2-mlp144", patch=(8,) * 3, image=(32,) * 3, positions="rotary", num_registers=4, norm_eps=1e-5
    )
    folder = tmp_path / "voxelfm"
    voxelfm.write_voxelfm(ViT(shape), VolumeContract(patch=(8, 8, 8)), folder)
    encoder = load_encoder(str(folder))
    assert encoder.patch == (8, 8, 8)
    assert encoder.contract == VolumeContract(patch=(8, 8, 8))
    assert check_model(str(folder), write=True)["faults"] == 0
    told = check_model(str(folder))
    assert told["faults"] == 0
    assert "CT volume" in {what for what, _, _ in told["checks"]}
    assert load_encoder(str(folder)).name == encoder.name


def test_revisions_are_of_released_models(export):
    with pytest.raises(UsageError, match="is a folder and has no revisions"):
        load_encoder(str(export), revision="main")


# ---- golden features


def test_the_phantom_is_one_and_the_same():
    a, b = phantom_scans(), phantom_scans()
    assert set(a) == {"CT", "MR"}
    for name, volume in a.items():
        assert np.array_equal(volume.voxels, b[name].voxels)
        assert volume.voxels.shape == (24, 96, 96)
        assert volume.voxels.std() > 10


def test_golden_features_are_what_the_tokens_say(export):
    from hilum.encode.contract import prepare_slice

    encoder = open_folder(export)
    features = golden_features(encoder)
    assert set(features) == {"CT slice", "CT volume", "MR slice"}
    ct = phantom_scans()["CT"].voxels[3::6]
    tokens = encoder.tokens(torch.stack([prepare_slice(z, "CT", "HU", encoder.slice_contract) for z in ct]))
    expected = torch.cat([tokens.cls, tokens.patches.mean(1)], 1)
    np.testing.assert_allclose(features["CT slice"], expected[2], atol=1e-5)
    np.testing.assert_allclose(features["CT volume"], expected.mean(0), atol=1e-5)
    assert set(golden_features(encoder, quick=True)) == {"CT slice"}


def test_a_good_encoder(export):
    told = check_model(str(export), write=True)
    assert told["faults"] == 0
    assert read_golden(export)["features"]["CT slice"][:2] == pytest.approx(
        golden_features(open_folder(export))["CT slice"][:2]
    )
    told = check_model(str(export))
    assert told["faults"] == 0
    assert {what: detail for what, _, detail in told["checks"]}["CT volume"].startswith("identical")
    assert told["images_per_s"] > 0
    assert load_encoder(str(export)).name


def test_nothing_stored(export):
    told = check_model(str(export))
    assert told["faults"] == 0
    assert any("hilum doctor MODEL --write" in detail for _, result, detail in told["checks"] if result == "note")


def damage(folder, name="blocks.1.mlp.fc1.bias", by=1.0):
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[3] += by
    save_file(state, folder / "model.safetensors")


def faults(told):
    return {what: detail for what, result, detail in told["checks"] if result == "fault"}


def test_one_changed_weight_is_named(export):
    write_golden(open_folder(export), export)
    damage(export, by=1e-6)  # far below what the features show
    assert faults(check_model(str(export))) == {"tensors": "changed: blocks.1.mlp.fc1.bias"}
    assert load_encoder(str(export))
    damage(export, by=3.0)
    found = faults(check_model(str(export)))
    assert set(found) == {"tensors", "CT slice", "CT volume", "MR slice"}
    assert found["CT slice"].startswith("not the same function")
    with pytest.raises(ContractError, match=r"features of the phantom's CT slice are not the stored ones \(cosine 0\."):
        load_encoder(str(export))


def test_slightly_other_weights_are_refused_unless_the_type_is_narrow(export):
    """As large as the errors of bfloat16, but in float32 nothing excuses it."""
    write_golden(open_folder(export), export)
    state = load_file(export / "model.safetensors")
    save_file({n: t * 1.02 if n == "norm.weight" else t for n, t in state.items()}, export / "model.safetensors")
    with pytest.raises(ContractError, match=r"features of the phantom's CT slice are not the stored ones"):
        load_encoder(str(export))
    assert {"CT slice", "CT volume", "MR slice"} < set(faults(check_model(str(export))))
    assert load_encoder(str(export), precision="bfloat16")


def test_one_feature_may_be_far_off_in_a_narrow_type():
    """In a thousand features with errors of 2 % the largest error is that of a ViT-B in bfloat16."""
    golden = np.ones(1000)
    found = golden + np.where(np.arange(1000) == 7, 0.12, 0.02)
    told = compare_vectors(found.astype(np.float32), golden)
    assert told["verdict"] == "narrow type"
    assert told["difference"] == pytest.approx(0.12, rel=1e-3)
    assert compare_vectors((golden + 0.12).astype(np.float32), golden)["verdict"] == "another function"


def test_a_damaged_config_is_a_fault(export):
    (export / "config.json").write_text("{")
    assert "cannot be read as JSON" in faults(check_model(str(export)))["load"]


def test_a_changed_contract_is_named(export):
    write_golden(open_folder(export), export)
    record = json.loads((export / "contract.json").read_text())
    (export / "contract.json").write_text(json.dumps({**record, "clip_hu": [-1000.0, 1000.0]}))
    found = faults(check_model(str(export)))
    assert found["contract"] == "clip_hu: [-1000.0, 2000.0] ≠ [-1000.0, 1000.0]"
    assert "tensors" not in found
    with pytest.raises(ContractError, match=r"contract is not the one of the golden features \(clip_hu"):
        load_encoder(str(export))


def test_a_truncated_file_is_named(export):
    write_golden(open_folder(export), export)
    content = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").write_bytes(content[:-100])
    told = check_model(str(export))
    assert told["faults"] == 1
    assert "model.safetensors cannot be read as safetensors" in faults(told)["load"]


def test_damage_of_a_pulled_model_is_named(released):
    folder = pretend_pulled(released, "dinov2-small", "facebook/dinov2-small")
    assert check_model("dinov2-small", write=True)["faults"] == 0
    assert check_model("dinov2-small")["faults"] == 0  # golden.json beside the weights is no foreign file
    damage(folder, "encoder.layer.0.mlp.fc1.bias")
    assert "model.safetensors has changed" in faults(check_model("dinov2-small"))["load"]


def test_a_damaged_record(export):
    (export / "golden.json").write_text('{"format": "else"}')
    with pytest.raises(ContractError, match="no record of golden features"):
        load_encoder(str(export))
    (export / "golden.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_encoder(str(export))


def test_threads_and_types_are_told_from_another_function(export, vit):
    """Float64 stands for another order of sums; bfloat16 for a narrow type; a scaled layer for another function."""
    write_golden(open_folder(export), export)
    stored = read_golden(export)["features"]["CT slice"]

    def verdict(network):
        class Cast(torch.nn.Module):
            def forward(self, images):
                dtype = next(network.parameters()).dtype
                return network(images.to(dtype))

        encoder = Encoder(Cast(), Contract(size_px=32), "x", patch=(8, 8))
        return compare_vectors(golden_features(encoder, quick=True)["CT slice"], stored)

    def fresh(dtype):
        network = open_folder(export).network
        return network.to(dtype)

    assert verdict(fresh(torch.float32))["verdict"] == "identical"
    wide, narrow = verdict(fresh(torch.float64)), verdict(fresh(torch.bfloat16))
    assert wide["verdict"] == "rounding"
    assert 0 < wide["difference"] < 1e-4
    assert narrow["verdict"] == "narrow type"
    assert narrow["cosine"] > 0.999
    other = fresh(torch.float32)
    other.blocks[0].mlp.fc2.weight.mul_(5)
    assert verdict(other)["verdict"] == "another function"
    assert compare_vectors(np.zeros(3, np.float32), [0.0, 0.0])["verdict"] == "another function"
    assert compare_vectors(np.zeros(2, np.float32), [0.0, 0.0])["verdict"] == "identical"


def test_an_encoder_that_gives_nan_is_not_stored(export):
    encoder = open_folder(export)
    encoder.network.norm.weight.fill_(torch.nan)
    with pytest.raises(ContractError, match="not to be trusted"):
        write_golden(encoder, export)
