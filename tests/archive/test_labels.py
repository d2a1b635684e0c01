"""One door to labels: every form of one segmentation gives the same voxels on the scan's grid, or a refusal."""

import csv
from dataclasses import replace

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk

from hilum.archive.intake import read_scan
from hilum.archive.labels import read_labels
from hilum.archive.scan import find
from hilum.errors import ScanRefused
from hilum.volume import Volume, orient

START, STEP, SPACING = (-50.0, -40.0, 10.0), 2.0, (0.8, 0.5)  # of the series that conftest writes


@pytest.fixture
def scan(write_series, voxels, key, tmp_path) -> Volume:
    write_series(voxels)
    return read_scan(next(e for e in find(tmp_path / "archive", key) if e.used))


@pytest.fixture
def labels() -> np.ndarray:
    found = np.zeros((6, 9, 7), np.uint8)
    found[1:5, 2:7, 1:4], found[2:4, 5:, 4:] = 2, 7
    return found


@pytest.fixture
def write_labels(tmp_path, write_multiframe):
    """The same labels (Z, Y, X) as a file of any form; geometry from the constants, not from our reader."""

    def write(labels, suffix, shift_mm=0.0):
        path = tmp_path / f"labels{suffix}"
        where = np.add(START, (shift_mm, 0, 0))
        if suffix == ".dcm":
            found = [(k, n) for n in (7, 2) for k in range(len(labels)) if (labels[k] == n).any()]
            frames = np.array([labels[k] == n for k, n in found])
            places = [np.add(where, (0, 0, STEP * k)) for k, _ in found]
            return write_multiframe(path, frames, places, segments=[n for _, n in found])
        if suffix == ".nii.gz":
            affine = np.diag([-SPACING[1], -SPACING[0], STEP, 1])
            affine[:3, 3] = where * (-1, -1, 1)
            nib.save(nib.Nifti1Image(labels.T, affine), path)
            return path
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing((SPACING[1], SPACING[0], STEP))
        image.SetOrigin(where.tolist())
        sitk.WriteImage(image, str(path), suffix == ".nrrd")
        return path

    return write


FORMS = [".dcm", ".nii.gz", ".mha", ".nrrd"]


@pytest.mark.parametrize("suffix", FORMS)
def test_every_form_gives_the_same_voxels(scan, labels, write_labels, suffix):
    path = write_labels(labels, suffix)
    for code in ("SPL", "ARI"):
        grid = orient(scan, code)
        found = read_labels(path, grid).volume
        wanted = orient(replace(scan, voxels=labels), code)
        np.testing.assert_array_equal(found.voxels, wanted.voxels)
        assert np.array_equal(found.affine, grid.affine)
        assert (found.kind, found.unit) == ("label", "")


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_another_grid_is_refused_and_never_resampled(scan, labels, write_labels, suffix):
    read_labels(write_labels(labels, suffix, shift_mm=0.2), scan)
    with pytest.raises(ScanRefused, match=r"labels_off_grid: labels and scan lie 0\.3 mm apart"):
        read_labels(write_labels(labels, suffix, shift_mm=0.3), scan)
    with pytest.raises(ScanRefused, match=r"labels_off_grid: labels of shape \(5, 9, 7\), a scan of \(6, 9, 7\)"):
        read_labels(write_labels(labels[1:], suffix), scan)
    own = read_labels(write_labels(labels, suffix), None).volume
    assert own.affine is not None
    assert scan.affine is not None
    np.testing.assert_allclose(own.affine, scan.affine, atol=1e-6)
    np.testing.assert_array_equal(own.voxels, labels)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_what_holds_no_class_numbers_is_refused(scan, labels, write_labels, suffix):
    for wrong in (labels + np.float32(0.5), labels.astype(np.int16) - 1, labels.astype(np.float32) + np.float32("nan")):
        with pytest.raises(ScanRefused, match=r"corrupt|non_finite"):
            read_labels(write_labels(wrong, suffix), scan)


def test_headers_that_point_elsewhere_are_refused(scan, labels, write_labels, tmp_path):
    """A header may name any file of the machine as its voxels; none outside its folder is opened."""
    (tmp_path / "secret.raw").write_bytes(bytes(1000))
    (tmp_path / "below").mkdir()
    mha = write_labels(labels, ".mha").read_bytes()
    nrrd = write_labels(labels, ".nrrd").read_bytes()
    for name, text in {
        "a": mha.replace(b"ElementDataFile = LOCAL", b"ElementDataFile = ../secret.raw"),
        "b": nrrd.replace(b"encoding: gzip", b"encoding: raw\ndata file: ../secret.raw"),
    }.items():
        (tmp_path / "below" / name).write_bytes(text)
        with pytest.raises(ScanRefused, match="detached_voxels"):
            read_labels(tmp_path / "below" / name, scan)
    (tmp_path / "d").write_bytes(mha.replace(b"DimSize = 7 9 6", b"DimSize = 7000 9000 6000"))
    with pytest.raises(ScanRefused, match=r"too_large|truncated|corrupt"):
        read_labels(tmp_path / "d", scan)


def test_what_holds_no_labels_is_refused(scan, tmp_path):
    (tmp_path / "a").write_bytes(b"label,1\n" * 99)
    with pytest.raises(ScanRefused, match="other_format"):
        read_labels(tmp_path / "a", scan)
    with pytest.raises(ScanRefused, match="unreadable"):
        read_labels(tmp_path / "missing", scan)
    with pytest.raises(ScanRefused, match="other_object"):
        read_labels(tmp_path / "archive" / "im000", scan)


@pytest.mark.parametrize("suffix", FORMS)
def test_features_of_regions(scan, labels, write_labels, tmp_path, key, suffix):
    """`embed` takes any form as a mask: the same regions, slices and vectors."""
    from hilum.encode.table.embed import embed

    def rows(mask):
        with open(tmp_path / "masks.csv", "w", newline="") as handle:
            csv.writer(handle).writerows([["series_uid", "mask"], ["1.2.826.0.1.3680043.10.9999.1", mask.name]])
        outcome = embed(tmp_path / "archive", model="pixels", out=tmp_path / "f.parquet", level="region",
                        masks=tmp_path / "masks.csv", key=key)  # fmt: skip
        assert outcome["left_out"] == []
        return pq.read_table(tmp_path / "f.parquet").to_pylist()

    found, plain = rows(write_labels(labels, suffix)), rows(write_labels(labels, ".nii.gz"))
    assert [(row["region"], row["slice"]) for row in found] == [(2, 1), (7, 2)]
    assert [row["vector"] for row in found] == [row["vector"] for row in plain]
