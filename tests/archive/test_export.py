"""What leaves the store comes back through other readers: nibabel for NIfTI, tarfile and numpy for shards."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from hilum import cli
from hilum.archive.files import nifti
from hilum.archive.store import export as module
from hilum.archive.store.export import export_nifti, export_webdataset
from hilum.archive.store.store import Store, volume_path
from hilum.errors import StoreError, UsageError
from hilum.volume import Volume, to_slices

CT, MR, FLAT = "a" * 16, "b" * 16, "c" * 16


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_store, make_volume) -> Path:
    """A CT, an MR whose values need a slope, an image without geometry, and five small ones."""
    mr = make_volume(2, (5, 21, 33))
    mr = replace(mr, voxels=mr.voxels * np.float32(0.37) + 80, modality="MR", unit="")
    flat = Volume(voxels=make_volume(3, (1, 30, 20)).voxels, affine=None, modality="OT")
    small = {f"d{n}" * 8: make_volume(n, (2, 40, 50)) for n in range(5)}
    volumes = {CT: make_volume(1, (7, 24, 30)), MR: mr, FLAT: flat, **small}
    return write_store(tmp_path_factory.mktemp("export") / "store", volumes)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- NIfTI


@pytest.mark.parametrize("gzip", [True, False])
def test_nifti_through_nibabel(store, tmp_path, gzip):
    assert export_nifti(store, tmp_path / "out", gzip=gzip, num_workers=1) == {"num_volumes": 8, "num_files": 8}
    suffix = ".nii.gz" if gzip else ".nii"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"export.json"} | {
        k + suffix for k in Store(store).sorted_keys()
    }
    for key in (CT, MR):
        vol, row = Store(store).read_volume(key), Store(store).row(key)
        image = nib.load(tmp_path / "out" / f"{key}{suffix}")
        np.testing.assert_array_equal(image.dataobj.get_unscaled().T, Store(store).read_stored(key))
        np.testing.assert_allclose(image.get_fdata().T, vol.voxels, rtol=1e-6, atol=1e-4)
        assert image.header.get_data_dtype() == np.int16
        assert image.dataobj.slope == np.float32(row.slope)
        rng = np.random.default_rng(0)
        for index in rng.uniform(0, 20, (9, 3)):  # any place in the scan is the same place in the patient
            place = (vol.affine @ [*index, 1])[:3]
            np.testing.assert_allclose((image.affine @ [*index[::-1], 1])[:3] * [-1, -1, 1], place, atol=1e-4)
        assert image.header["qform_code"] == 0  # a sheared grid
    image = nib.load(tmp_path / "out" / f"{FLAT}{suffix}")
    assert (image.header["qform_code"], image.header["sform_code"]) == (0, 0)


def test_nifti_through_our_own_reader(store, tmp_path):
    export_nifti(store, tmp_path / "out", num_workers=1)
    read, _ = nifti.read(tmp_path / "out" / f"{CT}.nii.gz")
    vol = Store(store).read_volume(CT)
    np.testing.assert_array_equal(read.voxels, to_slices(vol).voxels)
    np.testing.assert_allclose(read.affine, to_slices(vol).affine, rtol=1e-6)
    assert read.voxels.dtype == np.int16


def test_a_real_scan_goes_in_and_out(real_data, tmp_path, write_store):
    source = sorted((real_data / "nifti" / "ct_head_neck_openkbp").rglob("*.nii*"))[0]
    vol, _ = nifti.read(source)
    root = write_store(tmp_path / "store", {CT: vol})
    export_nifti(root, tmp_path / "out", num_workers=1)
    read, _ = nifti.read(tmp_path / "out" / f"{CT}.nii.gz")
    np.testing.assert_array_equal(read.voxels, vol.voxels)
    np.testing.assert_allclose(read.affine, vol.affine, rtol=1e-6, atol=1e-5)
    crop = Store(root).read_crop(CT, (3, 5, 7), (9, 20, 30))
    np.testing.assert_array_equal(crop.voxels, vol.voxels[3:12, 5:25, 7:37])


def test_qform_and_sform_agree_without_shear(tmp_path):
    turned = np.array([[0.0, 0.6, 0.8], [0.0, -0.8, 0.6], [1.0, 0.0, 0.0]]) * [3.0, 0.5, 0.7]
    affine = np.block([[turned, np.array([[-30.0], [20], [100]])], [np.zeros((1, 3)), 1.0]])
    nifti.write(tmp_path / "x.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine, 1.0, 0.0, packed=False)
    image = nib.load(tmp_path / "x.nii")
    assert (image.header["qform_code"], image.header["sform_code"]) == (1, 1)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-5)
    itk = sitk.ReadImage(str(tmp_path / "x.nii"))  # positions in LPS, as ours
    assert sitk.GetArrayFromImage(itk)[2, 1, 4] == 49
    np.testing.assert_allclose(itk.TransformIndexToPhysicalPoint((4, 1, 2)), (affine @ [2, 1, 4, 1])[:3], atol=1e-4)


def test_an_axis_beyond_nifti_1(tmp_path):
    stored = np.arange(40000, dtype=np.int32).astype(np.int16).reshape(1, 1, -1)
    nifti.write(tmp_path / "long.nii", stored, np.eye(4), 1.0, 0.0, packed=False)
    image = nib.load(tmp_path / "long.nii")
    assert isinstance(image, nib.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, stored)


# ---- WebDataset


def read_shards(folder: Path) -> dict[str, dict[str, bytes]]:
    """Samples as WebDataset groups them: neighbours whose names agree up to the first dot."""
    samples: dict[str, dict[str, bytes]] = {}
    last = None
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                key, extension = member.name.split(".", 1)
                assert (key == last) == (key in samples), "members of a sample are neighbours"
                last = key
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def test_shards_with_npy(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_plan", lambda *args: [(0, 2), (2, 7), (7, 8)])
    result = export_webdataset(store, tmp_path / "out", num_workers=1)
    assert result == {"num_volumes": 8, "num_shards": 3, "num_files": 3}
    opened = Store(store)
    samples = read_shards(tmp_path / "out")
    assert list(samples) == list(opened.sorted_keys())
    for key, sample in samples.items():
        facts, stored = json.loads(sample["json"]), np.load(io.BytesIO(sample["npy"]))
        vol = opened.read_volume(key)
        assert stored.dtype == np.int16
        values = stored * np.float32(facts["slope"]) + np.float32(facts["intercept"])
        np.testing.assert_array_equal(values, vol.voxels)
        assert (facts["shape"], facts["modality"], facts["unit"]) == (list(vol.shape), vol.modality, vol.unit)
        assert (facts["patient"], facts["plane"]) == ("p", "axial")
        if vol.affine is None:
            assert facts["affine"] is facts["spacing_mm"] is None
        else:
            assert np.array_equal(facts["affine"], vol.affine)
            np.testing.assert_allclose(facts["spacing_mm"], vol.spacing_mm)


def test_shards_with_the_files_of_the_store(store, tmp_path):
    export_webdataset(store, tmp_path / "out", voxels="b2nd", num_workers=1)
    for key, sample in read_shards(tmp_path / "out").items():
        assert sample["b2nd"] == volume_path(store, key).read_bytes()


@pytest.mark.parametrize("voxels", ["npy", "b2nd"])
def test_shards_are_as_large_as_asked_and_not_larger(store, voxels):
    opened = Store(store)
    sizes = [r.bytes if voxels == "b2nd" else 2 * int(np.prod(r.shape)) for r in opened.rows]
    for limit in (1, 9000, 20_000, 10**9):
        shards = module._plan(opened, limit, voxels)
        assert [n for first, end in shards for n in range(first, end)] == list(range(8))
        for (first, end), following in zip(shards, [*shards[1:], None]):
            filled = sum(sizes[first:end]) + 2048 * (end - first)
            assert filled <= limit or end - first == 1
            if following:
                assert filled + sizes[end] + 2048 > limit


def test_two_exports_are_equal_whoever_did_the_work(store, tmp_path, monkeypatch):
    export_webdataset(store, tmp_path / "a", num_workers=1)
    export_webdataset(store, tmp_path / "b", num_workers=2)
    assert content(tmp_path / "a") == content(tmp_path / "b")


# ---- interrupted


@pytest.mark.parametrize("kind", ["nifti", "webdataset"])
def test_an_export_stopped_anywhere_goes_on(store, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "_plan", lambda *args: [(n, n + 2) for n in range(0, 8, 2)])
    export = export_nifti if kind == "nifti" else export_webdataset
    export(store, tmp_path / "wanted", num_workers=1)
    original, written = module.write_atomic, []

    def stop(path: Path):
        written.append(path)
        if len(written) == 3:
            path.with_name(f".{path.name}.1.tmp").write_text("half")
            raise KeyboardInterrupt
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", stop)
        with pytest.raises(KeyboardInterrupt):
            export(store, tmp_path / "out", num_workers=1)
    assert len(content(tmp_path / "out")) == 4  # export.json, two whole files, one half
    result = export(store, tmp_path / "out", num_workers=1)
    assert result["num_files"] == (6 if kind == "nifti" else 2)
    assert content(tmp_path / "out") == content(tmp_path / "wanted")


RUN = """
import sys
from hilum.archive.store import export
export._plan = lambda *args: [(n, n + 1) for n in range(8)]
export.export_webdataset(sys.argv[1], sys.argv[2], num_workers=1)
"""


def test_killed_export_goes_on(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_plan", lambda *args: [(n, n + 1) for n in range(8)])
    export_webdataset(store, tmp_path / "wanted", num_workers=1)
    process = subprocess.Popen([sys.executable, "-c", RUN, str(store), str(tmp_path / "out")])
    while process.poll() is None and not list(tmp_path.glob("out/shard-*.tar")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    export_webdataset(store, tmp_path / "out", num_workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "wanted")


# ---- refusals


def test_what_is_refused(store, tmp_path, monkeypatch, capsys):
    export_nifti(store, tmp_path / "out", num_workers=1)
    with pytest.raises(StoreError, match="export of another store or with other settings"):
        export_nifti(store, tmp_path / "out", gzip=False)
    with pytest.raises(UsageError, match="npy or b2nd"):
        export_webdataset(store, tmp_path / "new", voxels="png")
    with pytest.raises(StoreError, match="not empty and no export"):
        export_nifti(store, store)
    broken = shutil.copytree(store, tmp_path / "broken")
    volume_path(broken, MR).write_bytes(b"nothing")
    with pytest.raises(StoreError, match=f"volume {MR}"):
        export_nifti(broken, tmp_path / "partly", num_workers=1)
    assert (tmp_path / "partly" / f"{CT}.nii.gz").exists()
    monkeypatch.setattr(sys, "argv", ["hilum", "store", "export", str(store), "-o", "x", "--format", "png"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_command(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["hilum", "store", "export", store, "-o", out, "--format", "webdataset", "--num-workers", "1", "--json"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert json.loads(capsys.readouterr().out) == {"num_files": 1, "num_shards": 1, "num_volumes": 8}
    assert len(read_shards(out)) == 8
