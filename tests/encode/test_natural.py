"""Encoders of natural images: the contract is what their processor says, and the tokens are transformers' own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hilum.encode.contract import Contract, prepare_slice
from hilum.encode.released.curia import curia_contract
from hilum.encode.released.natural import processor_contract, read_natural, read_processor
from hilum.errors import ContractError

DINOV2 = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True, "do_rescale": True,
    "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
DINOV3 = {
    **DINOV2, "image_processor_type": "DINOv3ViTImageProcessorFast", "do_center_crop": None, "crop_size": None,
    "resample": 2, "size": {"height": 32, "width": 32},
}  # fmt: skip


def save(folder, kind="Dinov2", processor=DINOV2, **settings):
    transformers = pytest.importorskip("transformers", reason="pip install 'hilum[hf]'")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8, **settings
    )
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return theirs


def by_pillow(pixels, processor):
    """What the processor does to an 8-bit image, with Pillow as in its slow form."""
    how = {2: Image.Resampling.BILINEAR, 3: Image.Resampling.BICUBIC}[processor["resample"]]
    image, size = Image.fromarray(pixels).convert("RGB"), processor["size"]
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(image.size)
        image = image.resize((int(image.width * scale + 1e-9), int(image.height * scale + 1e-9)), how)
        side = processor["crop_size"]["height"]
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((size["width"], size["height"]), how)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(processor["image_mean"])[:, None, None]) / torch.tensor(processor["image_std"])[
        :, None, None
    ]


@pytest.mark.parametrize(
    ("kind", "processor", "settings"),
    [
        ("Dinov2", DINOV2, {}),
        ("Dinov2WithRegisters", DINOV2, {"num_register_tokens": 4}),
        ("DINOv3ViT", DINOV3, {"intermediate_size": 384, "num_register_tokens": 4}),
    ],
)
@pytest.mark.filterwarnings("default")  # of transformers
def test_a_ct_slice_as_the_original_would_see_it(tmp_path, kind, processor, settings):
    """From Hounsfield units to the class token: windowed to an 8-bit image by hand, then Pillow, then transformers."""
    theirs = save(tmp_path, kind, processor, **settings)
    network, contract, report = read_natural(tmp_path)
    assert network.patch_embed.weight.shape[1] == 3  # kernels of the channels are kept: each has constants of its own
    assert not any("summed" in how for how in report["transformed"])
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.uniform(-1400, 1400, (8, 6)), np.ones((9, 9)))  # 72×54, larger and smaller than the window
    image = prepare_slice(smooth, "CT", "HU", contract)
    seen = np.rint(255 * np.clip((smooth + 1024) / 2048, 0, 1)).astype(np.uint8)
    expected = by_pillow(seen, processor)
    assert (image - expected).abs().max() < 3 / 255 / 0.224  # Pillow rounds and cuts to 8 bits after each of two passes
    with torch.inference_mode():
        ours, original = network.eval()(image[None]), theirs(expected[None])
        exact = theirs(image[None])
    assert torch.cosine_similarity(ours.cls, original.pooler_output) > 0.9999
    torch.testing.assert_close(ours.cls, exact.pooler_output, atol=1e-5, rtol=0)


def test_channels_with_windows_of_their_own(tmp_path):
    """The reason to keep RGB kernels: three windows are three images."""
    save(tmp_path)
    network, contract, _ = read_natural(tmp_path)
    three = replace(contract, windows=((-1024, 1024), (-135, 215), (0, 80)))
    slice_ = np.linspace(-1200, 1200, 60 * 60).reshape(60, 60)
    image = prepare_slice(slice_, "CT", "HU", three)
    mean, std = (torch.tensor(v)[:, None, None] for v in (contract.mean, contract.std))
    shown = image * std + mean
    assert ((shown > -1e-6) & (shown < 1 + 1e-6)).all()  # although bicubic resampling overshoots
    assert (shown[1] - shown[0]).abs().max() > 0.3
    with torch.inference_mode():
        assert torch.isfinite(network(image[None]).cls).all()


def test_mr_and_images_by_percentiles(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DINOV3))
    contract = processor_contract(tmp_path)
    pixels = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (contract.mean, contract.std))
    for modality in ("MR", "OT"):
        shown = prepare_slice(pixels, modality, "", contract) * std + mean
        assert (shown.min(), shown.max()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))
    other_scale = prepare_slice(3 * pixels + 7, "MR", "", contract)
    torch.testing.assert_close(other_scale, prepare_slice(pixels, "MR", "", contract), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "SomethingElse"}, "its type is SomethingElse"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_pad": True}, "do_pad is True"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0; expected 1/255"),
        ({"rescale_factor": None}, "rescale_factor is None; expected 1/255"),
        ({"resample": 1}, "resample is 1; expected 2"),
        ({"size": [40, 40]}, "gives no square"),
        ({"image_mean": None}, "image_mean is None"),
        ({"do_center_crop": False}, "gives no square of one size"),
        ({"crop_size": {"height": 32, "width": 30}}, "gives no square"),
        ({"crop_size": {"height": 40, "width": 40}}, "gives no square"),
        ({"size": {"height": 40, "width": 40}}, "gives no square"),
        ({"size": {"longest_edge": 40}}, "gives no square"),
    ],
)
def test_processors_that_cannot_be_followed(changes, message):
    with pytest.raises(ContractError, match=message):
        read_processor(DINOV2 | changes, "preprocessor_config.json")


def test_a_processor_that_is_no_table():
    with pytest.raises(ContractError, match="holds no table of settings"):
        read_processor([], "preprocessor_config.json")
    with pytest.raises(ContractError, match="holds no table of settings"):
        curia_contract([])


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(ContractError, match=r"std is \(0\.2, 0\.0, 0\.2\); expected numbers above 0"):
        Contract(normalise="constants", mean=(0.0,) * 3, std=(0.2, 0.0, 0.2), channels=3)


def test_forms_of_a_size():
    same = {"fit": "stretch", "short_px": 0, "size_px": 32}
    for size in (32, {"height": 32, "width": 32}):
        assert same.items() <= read_processor({**DINOV3, "size": size}, "").items()
    cut = {"fit": "crop", "short_px": 36, "size_px": 32}
    assert cut.items() <= read_processor({**DINOV2, "crop_size": 32}, "").items()
    assert read_processor({**DINOV3, "do_normalize": False, "image_mean": None}, "")["std"] == [1.0, 1.0, 1.0]


def test_a_folder_that_does_not_say_what_it_expects(tmp_path):
    with pytest.raises(ContractError, match="nobody knows what images this model expects"):
        processor_contract(tmp_path)
    save(tmp_path, processor={**DINOV2, "crop_size": 30})
    with pytest.raises(
        ContractError, match="the contract gives 3 channels of 30 px; the network takes 3 channels in patches of"
    ):
        read_natural(tmp_path)
    save(tmp_path, num_channels=1)
    with pytest.raises(ContractError, match="the network takes 1 channels"):
        read_natural(tmp_path)
