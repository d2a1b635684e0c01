"""Files broken on purpose: every mutant is refused by name or read, within two seconds, and never with a silent wrong shape."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from hilum.archive.dicom import parametric_map
from hilum.archive.dicom.parametric_map import PARAMETRIC_MAP
from hilum.archive.dicom.rtstruct import STRUCTURE_SET
from hilum.archive.intake import read_scan
from hilum.archive.labels import read_labels
from hilum.archive.scan import find
from hilum.volume import Volume

FUZZ = Path(__file__).with_name("fuzz.py")
MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
LARGEST, MOST = 400_000, 12  # bytes of a real file; files of a real folder
POSITIONS = [(-50.0, -40.0, 10.0 + 2 * k) for k in range(6)]
NO_SEGMENTS = {"SegmentSequence": None, "SegmentationType": None}


def write_encodings(path, folder):
    """One plain slice in every encoding that pydicom writes."""
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        data = dcmread(path)
        data.compress(syntax, generate_instance_uid=False)
        data.save_as(folder / f"{syntax.keyword}.dcm")
    for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian):
        data = dcmread(path)
        list(data.iterall())  # pydicom writes unread elements as they were
        if syntax == ExplicitVRBigEndian:
            data.PixelData = data.pixel_array.astype(">u2").tobytes()
        data.set_original_encoding(syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(folder / f"{syntax.keyword}.dcm")
    content = path.read_bytes()
    (folder / "no_meta_header.dcm").write_bytes(content[content.index(b"\x08\x00\x08\x00CS") :])


def write_structures(path, like):
    """A square of 6 × 4 mm on two slices."""
    data, roi, drawn = Dataset(), Dataset(), Dataset()
    data.file_meta, data.SOPClassUID, data.SOPInstanceUID = like.file_meta, STRUCTURE_SET, "1.2.3.4"
    roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber = 1, "organ", 1
    drawn.ContourSequence = []
    for z in (12.0, 14.0):
        contour = Dataset()
        contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
        contour.ContourData = [-48, -38, z, -42, -38, z, -42, -34, z, -48, -34, z]
        drawn.ContourSequence.append(contour)
    data.Modality, data.StructureSetROISequence, data.ROIContourSequence = "RTSTRUCT", [roi], [drawn]
    data.save_as(path, enforce_file_format=True)


def write_map(write_multiframe, path, values):
    write_multiframe(path, values, POSITIONS, bits=32, PixelData=None, FloatPixelData=values.tobytes(),
                     SOPClassUID=PARAMETRIC_MAP, **NO_SEGMENTS)  # fmt: skip
    data, item = dcmread(path), Dataset()
    item.RealWorldValueSlope, item.RealWorldValueIntercept = 2.0, 1.0
    data.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = [item]
    data.save_as(path)


def write_files(folder, voxels):
    """What is no DICOM."""
    grey = np.random.default_rng(0).integers(0, 250, (40, 30)).astype(np.uint8)
    Image.fromarray(grey).save(folder / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 200).save(folder / "16.png")
    Image.fromarray(grey).save(folder / "grey.jpg")
    Image.fromarray(grey.astype(np.uint16) * 200).save(folder / "grey.tif")
    np.save(folder / "voxels.npy", voxels)
    image = sitk.GetImageFromArray(voxels)
    for name in ("plain.mha", "packed.mha", "plain.nrrd", "packed.nrrd"):
        sitk.WriteImage(image, str(folder / name), name.startswith("packed"))
    affine = np.diag([0.5, 0.8, 2.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / "plain.nii")
    nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / "packed.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.stack([voxels, voxels + 9], 3), affine), folder / "4d.nii")
    nibabel.save(nibabel.Nifti2Image(voxels.astype(np.float32), affine), folder / "2.nii.gz")


@pytest.fixture(scope="module")
def written(tmp_path_factory, write_series_to, write_multiframe, write_mosaics):
    """One small file of each kind."""
    large = np.random.default_rng(0).integers(0, 4000, (6, 36, 42)).astype(np.uint16)
    root, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("samples")
    (ct,) = write_series_to(root, large[:1], SliceThickness=2.0)
    (mr,) = write_series_to(root, large[:1], folder="mr", SOPClassUID=MR, SliceThickness=2.0, RescaleIntercept=0)
    shutil.copy(ct, folder / "ct.dcm")
    shutil.copy(mr, folder / "mr.dcm")
    write_encodings(ct, folder)
    enhanced = write_multiframe(folder / "enhanced.dcm", large, POSITIONS, bits=16, PixelData=large.tobytes(),
                                SOPClassUID=ENHANCED_MR, **NO_SEGMENTS)  # fmt: skip
    data = dcmread(enhanced)
    data.compress(RLELossless, generate_instance_uid=False)
    data.save_as(folder / "enhanced_rle.dcm")
    plane = (1.0, 0.0, 0.0, 0.0, 0.6, -0.8)
    (mosaic,) = write_mosaics(root, large[None], plane=plane, first=(-30, -20, 15), step=4.5, folder="mosaic")
    shutil.copy(mosaic, folder / "mosaic.dcm")
    masks = large > 2000
    write_multiframe(folder / "seg.dcm", masks, POSITIONS, segments=[1] * 6)
    write_multiframe(folder / "seg_fractional.dcm", masks, POSITIONS, segments=[1, 2, 1, 2, 1, 2], bits=8,
                     PixelData=(masks * 255).astype(np.uint8).tobytes(), SegmentationType="FRACTIONAL",
                     MaximumFractionalValue=255)  # fmt: skip
    write_structures(folder / "structures.dcm", data)
    write_map(write_multiframe, folder / "map.dcm", large.astype(np.float32))
    write_files(folder, large.astype(np.int16))
    return folder


@pytest.fixture(scope="module")
def samples(written, tmp_path_factory):
    """The written files and, where they are, small real ones of each folder."""
    given = os.environ.get("HILUM_TEST_DATA")
    root = Path(given) if given else Path(__file__).parents[3] / "shared" / "data"
    folder = tmp_path_factory.mktemp("all")
    real = {below: sorted(p for p in below.iterdir() if p.is_file() and p.stat().st_size <= LARGEST)[:MOST]
            for below in sorted(root.rglob("*")) if below.is_dir()}  # fmt: skip
    for n, path in enumerate([*sorted(written.iterdir()), *(p for files in real.values() for p in files)]):
        shutil.copy(path, folder / f"{n:04d}_{path.name}")
    return folder


def fuzz(samples: Path, first: int, count: int, seconds: float) -> list[dict[str, object]]:
    """The findings, in a process of its own: a decoder in C may take it down."""
    run = subprocess.run(
        [sys.executable, str(FUZZ), str(samples), str(first), str(count)],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"died with {run.returncode} at {lines[-1:]}: {run.stderr[-2000:]}"
    assert sum("at" in line for line in lines) == count
    return [line for line in lines if "found" in line]


SPOILT = {
    "another shape": ("return Volume(voxels=fuzz.np.zeros((1, 2, 3)), affine=None, modality='CT')", "AssertionError"),
    "hangs": ("end = time.process_time() + 2.1\n    while time.process_time() < end: pass", "took 2."),
    "dies": ("os.abort()", "died with -6"),
}
ASIDE = {"seg.dcm": "segmentation", "seg_fractional.dcm": "segmentation", "structures.dcm": "structure_set",
         "map.dcm": "parametric_map"}  # fmt: skip


def test_unbroken_samples_are_read(written, key):
    """The fuzzer stands on firm ground: without a change, every written sample has a reader."""
    for path in written.iterdir():
        found = find(path, key)
        assert [e.reason for e in found] == [ASIDE.get(path.name, "")] * (2 if path.name == "4d.nii" else 1), path.name
        assert all(read_scan(e).shape[0] == e.num_slices for e in found if e.used)
    grid = Volume(voxels=np.zeros((6, 36, 42)), modality="CT",
                  affine=np.array([[0, 0, 0.5, -50], [0, 0.8, 0, -40], [2.0, 0, 0, 10], [0, 0, 0, 1]]))  # fmt: skip
    for name in ("seg.dcm", "seg_fractional.dcm", "structures.dcm"):
        assert read_labels(written / name, grid).volume.voxels.any()
    assert parametric_map.read(written / "map.dcm")[0].shape == (6, 36, 42)


@pytest.mark.parametrize("fault", SPOILT)
def test_the_fuzzer_sees(written, tmp_path, fault):
    """A reader that answers with another shape, hangs or dies is a finding."""
    reader, expected = SPOILT[fault]
    (tmp_path / "in").mkdir()
    shutil.copy(written / "ct.dcm", tmp_path / "in")
    code = f"""
import os, sys, time
sys.path.insert(0, {str(FUZZ.parent)!r})
import fuzz
from hilum.volume import Volume
fuzz.mutate = lambda data, *_: data
def read(entry, read_scan=fuzz.read_scan):
    {reader}
fuzz.read_scan = read
fuzz.main(fuzz.Path(sys.argv[1]), 0, 1)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "in")], capture_output=True, text=True)
    assert expected in f"{run.stdout} died with {run.returncode}"


def test_five_hundred_mutants(samples):
    assert fuzz(samples, 0, 500, 120) == []


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(0, 20_000, 1000))
def test_twenty_thousand_mutants(samples, first):
    assert fuzz(samples, first, 1000, 600) == []
