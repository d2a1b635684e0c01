"""What one file is, by its content, whatever its name; and that each file counts once."""

import builtins
import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from hilum.archive.intake import check
from hilum.archive.recognise import look_at
from hilum.archive.scan import scan

VOXELS = np.random.default_rng(0).integers(0, 999, (5, 6, 7)).astype(np.int16)


def write_all(folder):
    """One file of each kind → the reader that should take it."""
    image = sitk.GetImageFromArray(VOXELS)
    for name in ("meta.mha", "packed.nrrd"):
        sitk.WriteImage(image, str(folder / name), True)
    nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), folder / "one.nii")
    nib.save(nib.Nifti2Image(VOXELS, np.eye(4)), folder / "two.nii.gz")
    np.save(folder / "numbers.npy", VOXELS)
    for name in ("a.png", "b.tif"):
        Image.fromarray(VOXELS[0].astype(np.uint16)).save(folder / name)
    Image.fromarray(VOXELS[0].astype(np.uint8)).save(folder / "c.jpg")
    (folder / "notes.txt").write_text("ObjectType = what is written here\n")
    (folder / "table.gz").write_bytes(gzip.compress(b"a,b\n"))
    return {
        "meta.mha": "itk", "packed.nrrd": "itk", "one.nii": "nifti", "two.nii.gz": "nifti", "numbers.npy": "array",
        "a.png": "image", "b.tif": "image", "c.jpg": "image", "notes.txt": "", "table.gz": "",
    }  # fmt: skip


def test_dicom_files_and_images_are_opened_once(write_series, large, tmp_path, key, monkeypatch):
    opened = []
    real_open = builtins.open

    def count(file, *args, **kwargs):
        opened.append(str(file))
        return real_open(file, *args, **kwargs)

    write_series(large, series="1")
    for name in ("a.png", "b.tif", "c.jpg"):
        Image.fromarray(VOXELS[0].astype(np.uint8)).save(tmp_path / name)
    monkeypatch.setattr(builtins, "open", count)
    entries = scan(tmp_path, key)
    files = [str(p) for p in tmp_path.rglob("*") if p.is_file()]
    assert sum(e.used for e in entries) == 4
    assert len(files) == len(large) + 3
    assert [opened.count(f) for f in files] == [1] * len(files)


def test_names_do_not_matter(tmp_path, key):
    for number, (name, reader) in enumerate(write_all(tmp_path).items()):
        (tmp_path / name).rename(tmp_path / f"IM{number}.dcm")
        (entry,) = look_at(f"IM{number}.dcm", tmp_path, key, None)
        assert (entry.reader, entry.used) == (reader, reader != ""), name


def test_every_file_counts_once(tmp_path, key):
    expected = write_all(tmp_path)
    nib.save(nib.Nifti1Image(np.stack([VOXELS, VOXELS + 1, VOXELS * 2], 3), np.eye(4)), tmp_path / "many.nii.gz")
    entries = scan(tmp_path, key, pixels=True)
    assert sum(e.num_files for e in entries) == len(expected) + 1
    assert len({e.key for e in entries}) == len(entries) == len(expected) + 3
    assert {e.paths[0].name for e in entries} == {*expected, "many.nii.gz"}


def test_voxels_are_read_only_when_asked(tmp_path, key):
    nib.save(nib.Nifti1Image((VOXELS > 500).astype(np.uint8), np.eye(4)), tmp_path / "x.nii")
    assert [e.reason for e in look_at("x.nii", tmp_path, key, None)] == [""]
    assert [e.reason for e in look_at("x.nii", tmp_path, key, check)] == ["label_map"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_an_image"),
        (b"\x1f\x8b", "not_an_image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "other_format"),
        ((348).to_bytes(4, "little") + bytes(344), "other_format"),
        (b"NRRD0004\n", "truncated"),
        (b"NRRD0004\n\n", "corrupt"),
        (b"ObjectType = Image\nNDims = 3\nDimSize = 1 1 1\n", "truncated"),
        (b"\x93NUMPY", "truncated"),
        (b"\x93NUMPY\x09\0", "other_format"),
        (bytes(344) + b"n+1\0", "corrupt"),
        (bytes(344) + b"n+1", "not_an_image"),
        (bytes(4) + b"n+2\0" + bytes(400), "truncated"),
        (b"II*\0" + bytes(20), "corrupt"),
    ],
)
def test_beginnings_without_a_file(tmp_path, key, content, reason):
    (tmp_path / "x").write_bytes(content)
    (entry,) = look_at("x", tmp_path, key, check)
    assert (entry.reason, entry.num_files) == (reason, 1)


def test_noise_behind_every_magic(tmp_path, key):
    """500 files that begin like a known format and go on at random: a row with a reason each."""
    rng = np.random.default_rng(0)
    write_all(tmp_path)
    heads = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for name, head in heads.items():
        for _ in range(50):
            broken = bytearray(head)
            for place in rng.integers(0, min(len(head), 600), 4):
                broken[place] = rng.integers(256)
            (tmp_path / name).write_bytes(broken)
            rows = look_at(name, tmp_path, key, check)
            assert sum(row.num_files for row in rows) == 1
