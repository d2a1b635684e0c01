"""Saved heads on patch tokens say what the head said; `hilum predict` puts classes and places where the scan has them."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from safetensors.numpy import load_file, save_file
from scipy import ndimage

from hilum.archive.one import read
from hilum.archive.privacy import Key
from hilum.encode.contract import Contract
from hilum.encode.encoder import Encoder, write_encoder
from hilum.encode.shape import ViTConfig
from hilum.encode.vit import ViT
from hilum.encode.volume_contract import VolumeContract
from hilum.errors import ContractError
from hilum.probe.heads import make_head
from hilum.probe.heads.tokens import TokenSequence, features_tokens
from hilum.probe.predict_tokens import on_file_grid
from hilum.probe.saved import load_head, write_head
from hilum.probe.saved_tokens import TOKEN_HEADS, token_features
from hilum.records import hash_file
from hilum.volume import Volume

FEW = {"seeds": 2, "epochs": 1, "learning_rates": (1e-2,)}
TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])  # 16° about the long axis
AXES = {  # RAS directions of the file's i, j, k, in voxels of 2 × 2 × 3 mm
    "plain": np.diag([-2.0, -2, 3]),
    "flipped": np.diag([2.0, -2, -3]),
    "sagittal first": np.array([[0, 0, 2.0], [2.0, 0, 0], [0, 3.0, 0]]),
    "oblique": TURN @ np.diag([-2.0, 2, 3]),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A slice and a volume encoder with random weights, as folders."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    flat = ViT(ViTConfig(size="nano", patch=(8, 8), image=(64, 64)))
    write_encoder(folder / "2d", flat, Contract(size_px=64), {"recipe": "flat", "step": 0})
    deep = ViT(ViTConfig(size="nano", patch=(4, 4, 4), image=(16, 16, 16), positions="rotary"))
    contract = VolumeContract(background_px=0, patch=(4, 4, 4), min_spacing_mm=2.0)
    write_encoder(folder / "3d", deep, contract, {"recipe": "deep", "step": 0})
    return folder


def _scan(path, axes, seed=0):
    """A warm box in a cooler body, in HU; its mask as an array of the file's axes."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, [11, -7, 30]
    shape = tuple((np.array([32, 28, 16]) if axes[0, 2] == 0 else np.array([28, 16, 32])).tolist())
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    along = apply_affine(affine, at)
    middle = apply_affine(affine, (np.array(shape) - 1) / 2) + np.array([6, 8, 3])
    mask = (np.abs(along - middle) < [13, 11, 10]).all(-1)
    voxels = np.random.default_rng(seed).normal(40, 6, shape) + 300 * mask
    inside = (np.abs(at / (np.array(shape) - 1) - 0.5) < 0.4).all(-1)
    voxels = np.where(inside, voxels, -1000)
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), path)
    return mask, affine


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_a_saved_head_on_tokens_says_what_the_head_said(tmp_path, encoders, name):
    encoder = load(encoders / "2d")
    grids = [np.random.default_rng(n).normal(size=(3, 4, 4, 6)).astype(np.float32) for n in range(8)]
    affine = np.array([[0, 0, 2.0, 1], [0, 2, 0, 2], [3, 0, 0, 3], [0, 0, 0, 1]])
    X = TokenSequence([features_like(grid, affine) for grid in grids])
    y, classes = np.arange(8) % 2, ("no", "yes")
    if name == "localisation":
        y, classes = np.random.default_rng(0).normal(size=(8, 3)), ()
    if name == "segmentation":
        voxels = np.zeros((3, 8, 8), np.uint8)
        voxels[1, 2:5, 3:6] = 1
        fine = affine.copy()
        fine[:3, 1:3] /= 2
        y, classes = [Volume(voxels=voxels, affine=fine, modality="CT", kind="label")] * 8, ("organ",)
    more = {"min_steps": 2} if name == "segmentation" else {}
    more |= {"hidden": 16} if name == "cross-attention" else {}
    head = make_head(name, task={"localisation": name, "segmentation": name}.get(name, "classification"), **FEW, **more)
    head.fit(X, y)
    features = token_features(encoder, "enc", 0, "volume")
    write_head(tmp_path, head, name=name, target="t", classes=classes, features=features, scores={}, training={"n": 8})
    saved = load_head(tmp_path)
    if name == "segmentation":
        for one, other in zip(saved.head.segment(X, y), head.segment(X, y)):
            np.testing.assert_array_equal(one.voxels, other.voxels)
        np.testing.assert_array_equal(saved.head.outputs(X, y), head.outputs(X, y))
    else:
        np.testing.assert_array_equal(saved.outputs(X), head.outputs(X))
    saved.check_encoder(encoder)
    with pytest.raises(ContractError, match="trained under contract"):
        saved.check_encoder(load(encoders / "3d"))
    record = json.loads((tmp_path / "head.json").read_text())
    for change in ({"settings": record["settings"] | {"seeds": 3}}, {"fitted": {"n_features_in_": 7}}, {"settings": {}},
                   {"fitted": record["fitted"] | {"device": "cuda"}}):  # fmt: skip
        (tmp_path / "head.json").write_text(json.dumps(record | change))
        with pytest.raises(ContractError):
            load_head(tmp_path)
    tensors = load_file(tmp_path / "head.safetensors")
    save_file({n: t[:, :1] if t.ndim > 1 else t for n, t in tensors.items()}, tmp_path / "head.safetensors")
    (tmp_path / "head.json").write_text(json.dumps(record | {"tensors": hash_file(tmp_path / "head.safetensors")}))
    with pytest.raises(ContractError, match="not those of"):
        load_head(tmp_path)


def load(folder) -> Encoder:
    from hilum.encode.zoo import load_encoder

    return load_encoder(str(folder))


def features_like(grid, affine):
    from hilum.encode.table.patches import Patches
    from hilum.probe.heads.tokens import case_tokens

    affines = np.repeat(affine[None], len(grid), 0)
    affines[:, :3, 3] += np.arange(len(grid))[:, None] * affine[:3, 0]
    return case_tokens(Patches(grid, grid.shape[:3], affine, affines, tuple(range(len(grid))), {}))


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_a_segmentation_overlays_its_scan_in_world_coordinates(hilum, encoders, tmp_path, monkeypatch, kind):
    """However the file's axes run: same grid and affine; the centre of the found box is the true one within half a voxel."""
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    key = Key.from_file(tmp_path / "key") if hasattr(Key, "from_file") else None
    encoder = load(encoders / kind)
    scans, truth = {}, {}
    for n, (name, axes) in enumerate(AXES.items()):
        scans[name] = tmp_path / f"{n}.nii.gz"
        truth[name] = _scan(scans[name], axes, n)
    volumes = {name: read(path, key=key) for name, path in scans.items()}
    labels = [
        dataclasses.replace(v, voxels=(v.voxels > 200).astype(np.uint8), kind="label", unit="")
        for v in volumes.values()
    ]
    X = TokenSequence([features_tokens(encoder.encode(v, patches=True)) for v in volumes.values()])
    head = make_head("segmentation", seeds=1, epochs=1, min_steps=200, learning_rates=(2e-2,), width=16)
    head.fit(X, labels, validation=(X[[0]], labels[:1]))
    features = token_features(encoder, str(encoders / kind), 0, "volume")
    write_head(tmp_path / "head", head, name="segmentation", target="box", classes=("box",), features=features,
               scores={}, training={"cases": 4})  # fmt: skip
    for name, path in scans.items():
        out = tmp_path / "seg.nii.gz"
        code, said, err = hilum("predict", path, "--head", tmp_path / "head", "-o", out)
        assert code == 0, err
        assert "box" in said
        seg, scan = nib.load(out), nib.load(path)
        np.testing.assert_allclose(seg.affine, scan.affine, atol=1e-4)
        assert seg.shape == scan.shape
        found, (mask, affine) = np.asarray(seg.dataobj) == 1, truth[name]
        apart = apply_affine(affine, ndimage.center_of_mass(found)) - apply_affine(affine, ndimage.center_of_mass(mask))
        assert np.linalg.norm(apart) < 1, (name, apart)  # half of the smallest voxel side
        assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.9
    about = json.loads((tmp_path / "seg.json").read_text())
    assert about["classes"] == {"0": "background", "1": "box"}
    assert about["contract"] == encoder.contract.hash
    code, _, err = hilum("predict", path, "--head", tmp_path / "head", "-o", tmp_path / "seg.csv")
    assert (code, "writes a NIfTI" in err) == (2, True)
    other = "3d" if kind == "2d" else "2d"
    code, _, err = hilum("predict", path, "--head", tmp_path / "head", "--model", encoders / other)
    assert (code, "trained under contract" in err) == (3, True)


def test_a_label_map_goes_back_to_the_axes_of_its_file(tmp_path):
    """Voxel by voxel: what `read` turned is turned back, for each way that axes can run."""
    for n, axes in enumerate(AXES.values()):
        path = tmp_path / f"{n}.nii"
        mask, _ = _scan(path, axes)
        vol = read(path, key=Key(bytes(32)))
        back = on_file_grid(dataclasses.replace(vol, voxels=(vol.voxels > 200).astype(np.uint8), kind="label"), path)
        np.testing.assert_array_equal(back.voxels.T, mask)


def test_places_are_printed_in_millimetres_and_voxels(hilum, encoders, tmp_path, monkeypatch):
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    _scan(tmp_path / "a.nii.gz", AXES["oblique"])
    encoder = load(encoders / "2d")
    volume = read(tmp_path / "a.nii.gz")
    X = TokenSequence([features_tokens(encoder.encode(volume, patches=True))] * 4)
    point = (volume.affine @ [5, 6, 7, 1])[:3]
    head = make_head("localisation", seeds=1, epochs=60, learning_rates=(3e-2,)).fit(X, np.repeat(point[None], 4, 0))
    write_head(tmp_path / "head", head, name="localisation", target="spot", classes=(), scores={}, training={"cases": 4},
               features=token_features(encoder, str(encoders / "2d"), 0, "volume"))  # fmt: skip
    code, out, err = hilum("predict", tmp_path / "a.nii.gz", "--head", tmp_path / "head", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    np.testing.assert_allclose([row["x_mm"], row["y_mm"], row["z_mm"]], point, atol=1.5)
    np.testing.assert_allclose([row["k"], row["j"], row["i"]], [5, 6, 7], atol=1)
    code, out, _ = hilum("predict", tmp_path / "a.nii.gz", "--head", tmp_path / "head")
    assert "voxel" in out


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_regions_are_judged_by_their_own_tokens(hilum, encoders, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    mask, affine = _scan(tmp_path / "a.nii.gz", AXES["plain"])
    nib.save(nib.Nifti1Image((mask + 2 * ~mask).astype(np.uint8), affine), tmp_path / "m.nii.gz")
    encoder = load(encoders / kind)
    from hilum.archive.labels import read_labels
    from hilum.probe.predict_tokens import scan_tokens

    volume = read(tmp_path / "a.nii.gz")
    labels = read_labels(tmp_path / "m.nii.gz", volume).volume
    features = token_features(encoder, str(encoders / kind), 0, "region")
    places, X, _ = scan_tokens(encoder, volume, labels, features)
    assert [place["region"] for place in places] == [1, 2]
    assert X.lengths[0] < X.lengths[1]
    head = make_head("cross-attention", seeds=1, epochs=30, learning_rates=(1e-3,), hidden=32).fit(
        TokenSequence([X.items[0], X.items[1]] * 4), np.arange(8) % 2
    )
    write_head(tmp_path / "head", head, name="cross-attention", target="part", classes=("box", "rest"), features=features,
               scores={}, training={"cases": 8})  # fmt: skip
    code, out, err = hilum("predict", tmp_path / "a.nii.gz", "--head", tmp_path / "head", "--mask", tmp_path / "m.nii.gz",
                           "--json")  # fmt: skip
    assert code == 0, err
    assert [row["predicted"] for row in json.loads(out)["rows"]] == ["box", "rest"]
