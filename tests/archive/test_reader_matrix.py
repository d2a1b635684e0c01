"""Each kind of DICOM × what must become of it, in two tables; what is used is compared with other readers, voxel by voxel.

REAL: the folders of real data, by what their READMEs ask for. WRITTEN: kinds that the tests write themselves. Pixels and
places are checked against GDCM (through SimpleITK, file by file), pydicom (frames) and construction; mosaics are compared
with dcm2niix in test_dicom_mosaic.py, and other results beside the data in test_dicom.py.
"""

from dataclasses import dataclass, field
from typing import Any

import gdcm
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.encaps import generate_frames, itemize_fragment
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from hilum.archive.intake import read_entry
from hilum.archive.scan import scan

NOISE = "noise_pixels_real_headers/"
GAPS_XA30 = "gaps_between: slices 2 mm thick every 16 mm"
GAPS_MOSAIC = "gaps_between: slices 3 mm thick every 12 mm"
EVERY_FOURTH = "gaps_between: slices 4 mm thick every 19.2 mm; spacing_tag: says 4.8 mm, positions say 19.2 mm"
NO_TAGS = "SOP class missing: taken from the meta header; no SeriesInstanceUID: grouped by folder"


def used(files, shape, spacing, orientation, split="", notes="", times=1):
    """Rows of volumes: files, (Z, Y, X), mm, directions, splitting attribute, repairs and flags."""
    return [(files, shape, spacing, orientation, split, notes)] * times


# Folder below dicom/ → every row of its DICOM files; one that is not used is (reason, files).
REAL: dict[str, list[tuple[Any, ...]]] = {
    "ct_axial_j2k_siemens": used(20, (20, 512, 512), (2, 0.977, 0.977), "SPL", notes=NO_TAGS),
    "ct_gantry_tilt_variable_spacing_ge": [("irregular_spacing", 28)],
    "ct_mixed_study_philips_phantom": [
        *used(28, (28, 512, 512), (5, 0.451, 0.451), "SPL"), *[("dicomdir", 1)] * 3, ("localizer", 1), ("secondary_capture", 2),
    ],
    "ct_transfer_syntaxes_ge": [*used(1, (1, 512, 512), (5, 0.676, 0.676), "SPL"), ("duplicate_instance", 6)],
    "enhanced_multiframe": [
        *used(1, (40, 96, 96), (4, 2.5, 2.5), "SPL", notes="philips_scaling"), ("derived", 1), ("no_geometry", 4),
    ],
    "header_oddities": [*used(1, (1, 484, 484), (4, 0.723, 0.723), "SPL"), ("no_geometry", 1)],
    "monochrome1_projection": [("projection", 1)],
    "mr_canon_dti": [*used(40, (40, 80, 80), (3, 3, 3), "SPL", "DiffusionBValue"), ("incomplete_volume", 38)],
    "mr_hitachi": used(4, (4, 64, 64), (4, 2.344, 2.344), "LIP"),
    "mr_mixed_series_one_folder": [
        *used(14, (14, 512, 384), (2.5, 0.43, 0.43), "SPL"), ("derived", 1), ("derived", 1), ("irregular_spacing", 20),
    ],
    "mr_philips_4d_phantom": used(
        9, (9, 64, 64), (8, 3.75, 3.75), "SPL", "TemporalPositionIdentifier", "philips_scaling", times=3
    ),
    "mr_sagittal_ge_fruit": used(32, (32, 256, 256), (1.2, 1.055, 1.055), "LIP"),
    "mr_sagittal_jpeg_variants": [
        *used(2, (2, 256, 224), (1, 1, 1), "LIP", "ImageType"),
        *used(2, (2, 256, 224), (1, 1, 1), "LIP", "ImageType", "lossy: 6.04:1"),
        ("duplicate_instance", 2), ("duplicate_positions", 2),
    ],
    "mr_sagittal_patient_position": used(9, (9, 256, 256), (19.2, 1.016, 1.016), "LIP", notes=EVERY_FOURTH, times=2),
    "mr_siemens_mosaic_phantom": used(1, (5, 72, 72), (12, 3, 3), "SPL", "AcquisitionNumber", GAPS_MOSAIC, times=4),
    "mr_three_plane_localizer_ge": [("localizer", 21)],
    "mr_transfer_syntaxes_siemens_mosaic": used(1, (35, 64, 64), (3.6, 3.25, 3.25), "SPL", "SOPInstanceUID", times=9),
    "mr_uih_mosaic_dti": used(1, (20, 64, 64), (4.2, 3.5, 3.5), "SPL", "ContentTime", times=6),
    "mr_xa30_jpeg_lossless": used(12, (12, 128, 128), (16, 2, 2), "LIP", notes=GAPS_XA30),
    NOISE + "ct_same_position_not_a_volume": [("duplicate_positions", 2)],
    NOISE + "ct_slice_missing": [("missing_slices", 4)],
    NOISE + "mr_compressed_jpeg": used(4, (4, 256, 256), (1, 1, 1), "LIP"),
    NOISE + "mr_compressed_rle": used(4, (4, 256, 256), (1, 1, 1), "LIP"),
    NOISE + "mr_ge_dti_4d": used(
        4, (4, 128, 128), (2, 2, 2), "SPL", "InstanceNumber", "split_by_order: 2 volumes", times=2
    ),
    NOISE + "mr_hyperfine_enhanced": used(1, (8, 138, 112), (5, 1.61, 1.59), "SPL"),
    NOISE + "mr_non_isotropic": used(4, (4, 28, 64), (0.5, 4, 6.4), "SPL"),
    NOISE + "mr_philips_3d_scaling": used(4, (4, 240, 240), (0.6, 1.042, 1.042), "PIL"),
    NOISE + "mr_philips_enhanced_3d": used(1, (8, 256, 256), (1.2, 1, 1), "LIP", notes="philips_scaling"),
    NOISE + "mr_philips_fmri_4d": used(
        2, (2, 80, 80), (3.3, 3, 3), "SPL", "InstanceNumber", "split_by_order: 4 volumes", times=4
    ),
    "parametric_map": [("parametric_map", 1)],
    "rt_ct_with_rtstruct": [*used(1, (1, 512, 512), (3, 1.074, 1.074), "SPL"), ("structure_set", 1)],
    "seg_encodings": [("segmentation", 1), ("segmentation", 1), ("segmentation", 2)],
    "seg_liver_ct": [*used(3, (3, 512, 512), (1, 0.811, 0.811), "SPL"), ("segmentation", 1)],
    "seg_tiny_24x38x3": [
        *used(1, (3, 38, 24), (2.5, 0.7, 0.7), "SPL"), *used(3, (3, 38, 24), (2.5, 0.7, 0.7), "SPL"), ("segmentation", 1),
    ],
}  # fmt: skip


def row_of(entry):
    """An entry as the table has it."""
    if not entry.used:
        return entry.reason, entry.num_files
    shape = entry.num_slices, entry.rows, entry.columns
    spacing = tuple(round(mm, 3) for mm in entry.spacing_mm)
    notes = "; ".join((*entry.repairs, *entry.flags))
    return entry.num_files, shape, spacing, entry.orientation, entry.split_by, notes


# Other readers: slices as (values (Y, X), LPS place of the first voxel, step down the rows, step along the columns).


def by_gdcm(paths):
    for path in paths:
        image = sitk.ReadImage(str(path))
        direction = np.reshape(image.GetDirection(), (3, 3))
        right, down = (direction * image.GetSpacing()).T[:2]
        yield sitk.GetArrayFromImage(image)[0], np.array(image.GetOrigin()), down, right


def by_pydicom(path):
    """Frames of an enhanced file, by its functional groups."""
    data = dcmread(path)
    (shared,) = data.SharedFunctionalGroupsSequence
    for own, pixels in zip(data.PerFrameFunctionalGroupsSequence, data.pixel_array):

        def group(name, own=own):
            return (own if name in own else shared)[name].value[0]

        plane = np.reshape(group("PlaneOrientationSequence").ImageOrientationPatient, (2, 3)).astype(float)
        dy, dx = map(float, group("PixelMeasuresSequence").PixelSpacing)
        values = group("PixelValueTransformationSequence")
        position = np.array(group("PlanePositionSequence").ImagePositionPatient, float)
        yield (pixels * float(values.RescaleSlope) + float(values.RescaleIntercept), position, dy * plane[1],
               dx * plane[0])  # fmt: skip


def check_slices(vol, slices):
    """Every voxel of every slice lies in `vol` where its own reader says, and `vol` holds nothing else."""
    found = set()
    for values, first, down, right in slices:
        rows, columns = values.shape
        corners = np.array([first, first + (rows - 1) * down, first + (columns - 1) * right])
        index = (corners - vol.affine[:3, 3]) @ np.linalg.inv(vol.affine[:3, :3]).T
        np.testing.assert_allclose(index, np.rint(index), atol=0.02)
        index = np.rint(index).astype(int)
        j, i = np.indices(values.shape)
        per_row = (index[1] - index[0]) // max(rows - 1, 1)
        per_column = (index[2] - index[0]) // max(columns - 1, 1)
        place = index[0][:, None, None] + per_row[:, None, None] * j + per_column[:, None, None] * i
        np.testing.assert_allclose(vol.voxels[tuple(place)], values, rtol=1e-5, atol=1e-3)
        found.add(tuple(index.ravel().tolist()))
    assert len(found) * values.size == vol.voxels.size


@pytest.mark.parametrize("folder", REAL)
def test_real(real_data, key, folder):
    found = [e for e in scan(real_data / "dicom" / folder, key) if e.reader == "dicom"]
    assert sorted(map(str, map(row_of, found))) == sorted(map(str, map(_as_floats, REAL[folder])))
    for entry in found:
        if entry.used and "mosaic" not in folder:
            vol, repairs = read_entry(entry)
            assert vol.shape == (entry.num_slices, entry.rows, entry.columns)
            assert (vol.orientation, vol.spacing_mm) == (entry.orientation, pytest.approx(entry.spacing_mm))
            padded = any("padding" in r for r in repairs)
            assert padded is (folder == "seg_liver_ct")  # −3024 HU outside the field of view becomes air
            slices = by_pydicom(entry.paths[0]) if entry.frames else by_gdcm(entry.paths)
            check_slices(
                vol, ((np.where(v < -1024, -1024, v), *place) if padded else (v, *place) for v, *place in slices)
            )


def _as_floats(row):
    return row if len(row) == 2 else (*row[:2], tuple(float(mm) for mm in row[2]), *row[3:])


def lps_of(image):
    """Index (i, j, k) → LPS mm of a NIfTI as nibabel reads it."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine


@pytest.mark.parametrize("folder", ["mr_ge_dti_4d", "mr_philips_fmri_4d"])
def test_volumes_of_one_series_equal_dicom2nifti(real_data, key, folder):
    """Each volume is one of the time points of the result beside the data, and each time point is there once."""
    image = nibabel.load(real_data / "dicom" / NOISE / folder / "expected.nii.gz")
    expected = np.asanyarray(image.dataobj)
    times = []
    for entry in scan(real_data / "dicom" / NOISE / folder, key):
        if entry.reader == "dicom":
            vol, _ = read_entry(entry)
            theirs = on_our_grid(vol, expected, lps_of(image))
            times += [t for t in range(expected.shape[3]) if np.array_equal(theirs[..., t], vol.voxels)]
    assert sorted(times) == list(range(expected.shape[3]))


def on_our_grid(vol, values, affine):
    """Values (i, j, k, …) with an affine to LPS, at the places of the voxels of `vol`: (Z, Y, X, …)."""
    index = np.moveaxis(np.indices(vol.shape), 0, -1)
    to_theirs = np.linalg.inv(affine) @ vol.affine
    place = index @ to_theirs[:3, :3].T + to_theirs[:3, 3]
    np.testing.assert_allclose(place, np.rint(place), atol=0.02)
    assert np.prod(vol.shape) == np.prod(values.shape[:3])
    return values[tuple(np.rint(np.moveaxis(place, -1, 0)).astype(int))]


# Folder below nifti/ → file → verdict or reason, (Z, Y, X) as stored, directions of k, j, i as stored, repairs and flags.
REAL_NIFTI = {
    "format_oddities": {
        "anatomical_big_endian_int16_neg_x.nii": ("used", (25, 41, 33), "SAL", ""),
        "epi_4d_two_volumes.nii.gz": ("used", (24, 96, 128), "SAL", ""),
    },
    "ct_mr_totalsegmentator": {
        "ct_3mm_full.nii.gz": ("used", (112, 101, 122), "SAR", "modality_guessed: CT"),
        "ct_3mm_slab.nii.gz": ("used", (30, 101, 122), "SAR", "modality_guessed: CT"),
        "mr_3mm_slab.nii.gz": ("used", (20, 91, 117), "SPL", ""),
        "ct_3mm_full_seg_total.nii.gz": ("label_map",),
        "ct_3mm_slab_seg_total.nii.gz": ("label_map",),
        "mr_3mm_slab_seg_total_mr.nii.gz": ("label_map",),
    },
    "mr_spinal_cord_sct": {
        "fmri_tsnr.nii.gz": ("used", (6, 68, 68), "SAL", "NaN set to 0 in 408 of 27744 voxels"),
        "t1w.nii.gz": ("used", (77, 76, 42), "SAR", ""),
        "t2.nii.gz": ("used", (52, 55, 60), "RSP", ""),
        "t2s_uncropped.nii.gz": ("used", (11, 320, 320), "SAL", ""),
        "t1w_seg-manual.nii.gz": ("label_map",),
        "t2_seg-manual.nii.gz": ("label_map",),
        "t2_seg-manual_labeled.nii.gz": ("label_map",),
        "t2s_uncropped_gmseg_manual.nii.gz": ("label_map",),
    },
}


@pytest.mark.parametrize("folder", REAL_NIFTI)
def test_real_nifti(real_data, key, folder):
    found = [e for e in scan(real_data / "nifti" / folder, key) if e.reader == "nifti"]
    assert {e.paths[0].name for e in found} == set(REAL_NIFTI[folder])
    for entry in found:
        expected = REAL_NIFTI[folder][entry.paths[0].name]
        assert (entry.reason or "used") == expected[0]
        if not entry.used:
            continue
        shape = entry.num_slices, entry.rows, entry.columns
        assert (shape, entry.orientation, "; ".join((*entry.repairs, *entry.flags))) == expected[1:]
        vol, _ = read_entry(entry)
        image = nibabel.load(entry.paths[0])
        values = np.asanyarray(image.dataobj)
        if values.ndim == 4:
            values = values[..., entry.frames[0]]
        theirs = on_our_grid(vol, values, lps_of(image))
        np.testing.assert_allclose(vol.voxels, np.nan_to_num(theirs), rtol=1e-5, atol=1e-4)


# What the tests write: five slices of 40 × 36 pixels, 2 mm apart, stored values of 12 bits.

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
AXIAL = (1, 0, 0, 0, 1, 0)
STORED = np.random.default_rng(0).integers(0, 4096, (5, 40, 36)).astype(np.uint16)
START = (-50.0, -40.0, 10.0)


@dataclass(frozen=True)
class Written:
    """One kind: how it is written, and the row that must come of it.

    attributes   of every slice; `edit` (k, data) changes slice k; `encoding` is a transfer syntax or a word
    expected     verdict or reason, then what the row must say
    values       what the voxels must be; None: stored values and intercept −1024 for CT, 0 for MR
    gdcm         also compare with GDCM
    """

    expected: str = "used"
    attributes: dict[str, Any] = field(default_factory=dict)
    plane: tuple[float, ...] = AXIAL
    step: tuple[float, ...] = (0.0, 0.0, 2.0)
    order: tuple[int, ...] = (0, 1, 2, 3, 4)
    stored: np.ndarray = field(default_factory=lambda: STORED)
    values: np.ndarray | None = None
    edit: Any = None
    encoding: str = ""
    orientation: str = "SPL"
    shear_deg: float = 0.0
    notes: str = ""
    gdcm: bool = True


def along(x_deg, z_deg, distance):
    """An axial plane turned about x, then z: row and column direction, and a step along its normal."""
    x, z = np.radians([x_deg, z_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    row, column, normal = (about_z @ about_x).T
    return {"plane": tuple(np.ravel([row, column]).round(8).tolist()), "step": tuple((distance * normal).tolist())}


def each(**lists):
    """Slice k gets value k of each list."""

    def edit(k, data):
        for name, values in lists.items():
            setattr(data, name, values[k])

    return edit


def sop(uid, **attributes):
    return {"SOPClassUID": "1.2.840.10008.5.1.4.1.1." + uid, **attributes}


def kind_of(*words):
    return {"ImageType": list(words)}


SLOPES = np.array([0.5, 1.5, 2.5, 1.0, 3.0])[:, None, None]
SIGNED = STORED.astype(np.int16) - 2000
PADDED_CT = np.where(np.arange(36) < 4, -2000, SIGNED.clip(-1000)).astype(np.int16)
MR0 = {"SOPClassUID": MR, "RescaleIntercept": 0}
Z = [(-50.0, -40.0, z) for z in (0, 2, 4, 8, 10)], [(-50.0, -40.0, z) for z in (0, 2, 4, 7, 10)]

WRITTEN = {
    "plain CT": Written(),
    "plain MR": Written(attributes=MR0),
    "MR without rescale": Written(attributes={"SOPClassUID": MR, "RescaleSlope": None, "RescaleIntercept": None}),
    "coronal": Written(plane=(1, 0, 0, 0, 0, -1), step=(0, 2, 0), orientation="PIL"),
    "sagittal": Written(plane=(0, 1, 0, 0, 0, -1), step=(2, 0, 0), orientation="LIP"),
    "oblique": Written(**along(20, 0, 2.0)),
    "double oblique": Written(**along(25, -30, 2.0)),
    "double oblique, slices downwards": Written(**along(25, -30, -2.0)),
    "feet first": Written(plane=(-1, 0, 0, 0, 1, 0), orientation="SPR", attributes={"PatientPosition": "FFS"}),
    "decubitus": Written(plane=(0, 1, 0, -1, 0, 0), orientation="SRP", attributes={"PatientPosition": "HFDL"}),
    "prone": Written(plane=(-1, 0, 0, 0, -1, 0), orientation="SAR", attributes={"PatientPosition": "HFP"}),
    "PatientPosition that contradicts": Written(attributes={"PatientPosition": "FFP"}),
    "interleaved order": Written(order=(2, 0, 4, 1, 3), edit=each(InstanceNumber=[3, 1, 5, 2, 4])),
    "gantry tilt": Written(plane=(1, 0, 0, 0, 0.93969262, -0.34202014), shear_deg=20.0),
    "spacing tag that contradicts": Written(attributes={"SpacingBetweenSlices": 3.0},
                                            notes="spacing_tag: says 3 mm, positions say 2 mm"),
    "thin slices with gaps": Written(attributes={"SliceThickness": 0.5},
                                     notes="gaps_between: slices 0.5 mm thick every 2 mm"),
    "NumberOfFrames=1": Written(attributes={"NumberOfFrames": 1}),
    "slope and intercept of each slice": Written(
        attributes=MR0, values=STORED * SLOPES, edit=each(RescaleSlope=SLOPES.ravel().tolist())),
    "Philips scaling": Written(attributes={**MR0, "Manufacturer": "Philips", "RescaleSlope": 2.5}, values=STORED * 2.5,
                               notes="philips_scaling"),
    "signed": Written(stored=SIGNED, attributes={"RescaleIntercept": 0}, values=SIGNED),
    "unsigned beyond 15 bits": Written(attributes=MR0, stored=STORED * 16),
    "12 of 16 bits": Written(attributes={"BitsStored": 12, "HighBit": 11}),
    "overlay in unused bits": Written(attributes={"BitsStored": 12, "HighBit": 11}, stored=STORED | 0x5000,
                                      values=STORED.astype(int) - 1024),
    "padding": Written(stored=PADDED_CT, attributes={"RescaleIntercept": 0, "PixelPaddingValue": -2000},
                       values=np.where(PADDED_CT == -2000, -1024, PADDED_CT), gdcm=False),
    "MONOCHROME1 CT": Written(attributes={"PhotometricInterpretation": "MONOCHROME1"},
                              notes="MONOCHROME1: values kept, they are HU", gdcm=False),
    "MONOCHROME1 MR": Written(
        attributes={**MR0, "PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11},
        values=4095 - STORED.astype(int), notes="MONOCHROME1: inverted", gdcm=False),
    "implicit": Written(encoding=ImplicitVRLittleEndian),
    "big-endian": Written(encoding=ExplicitVRBigEndian),
    "deflated": Written(encoding=DeflatedExplicitVRLittleEndian),
    "RLE": Written(encoding=RLELossless),
    "JPEG-LS": Written(encoding=JPEGLSLossless),
    "JPEG 2000": Written(encoding=JPEG2000Lossless),
    "JPEG lossless": Written(encoding="JPEGLosslessProcess14"),
    "JPEG lossless, first order": Written(encoding="JPEGLosslessProcess14_1"),
    "JPEG extended, 12 bits": Written("cannot_decode", {"BitsStored": 12, "HighBit": 11}, encoding="JPEGExtendedProcess2_4"),
    "fragments without offset table": Written(encoding="fragments", gdcm=False),
    "encapsulated, uncompressed": Written(encoding="1.2.840.10008.1.2.1.98", gdcm=False),
    "deflated frames": Written(encoding="1.2.840.10008.1.2.8.1", gdcm=False),
    "no meta header": Written(encoding="bare", notes="no preamble or meta header", gdcm=False),
    "syntax without a decoder": Written("cannot_decode", encoding="unknown"),
    "missing slice": Written("missing_slices", {"positions": Z[0]}),
    "two spacings": Written("irregular_spacing", {"positions": Z[1]}),
    "several slices at one place": Written("duplicate_positions", {"positions": [START] * 5, "InstanceNumber": 1}),
    "localizer": Written("localizer", kind_of("ORIGINAL", "PRIMARY", "LOCALIZER")),
    "secondary capture": Written("secondary_capture", sop("7")),
    "CR": Written("projection", sop("1")),
    "DX": Written("projection", sop("1.1")),
    "angiogram": Written("projection", sop("12.1")),
    "ultrasound": Written("ultrasound", sop("6.1")),
    "SEG": Written("segmentation", sop("66.4")),
    "RTSTRUCT": Written("structure_set", sop("481.3")),
    "SR": Written("report", sop("88.33")),
    "encapsulated PDF": Written("report", sop("104.1")),
    "presentation state": Written("presentation", sop("11.1")),
    "parametric map": Written("parametric_map", sop("30")),
    "PET": Written("other_modality", sop("128")),
    "ADC map": Written("derived", {**MR0, **kind_of("DERIVED", "PRIMARY", "DIFFUSION", "ADC")}),
    "maximum intensity projection": Written("derived", kind_of("DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP")),
    "colour": Written("colour", {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}),
    "many frames of a classic class": Written("multiframe", {"NumberOfFrames": 3}),
    "CT without rescale": Written("no_rescale", {"RescaleSlope": None}),
    "CT of another quantity": Written("not_hu", {"RescaleType": "Z_EFF"}),
    "two patients": Written("mixed_patients", edit=each(PatientID=list("AABBB"))),
}  # fmt: skip


def recode(path, syntax):
    """Write one slice again in another transfer syntax, by GDCM."""
    reader, change, writer, codec = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
        gdcm.JPEGCodec(),
    )
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    codec.SetLossless(syntax != gdcm.TransferSyntax.JPEGExtendedProcess2_4)
    change.SetUserCodec(codec)
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.fixture
def encode(encode_as, box):
    def write(path, encoding):
        if encoding == "bare":
            content = path.read_bytes()
            path.write_bytes(content[content.index(b"\x08\x00\x08\x00CS") :])
        elif encoding in ("fragments", "unknown"):
            data = dcmread(path)
            data.compress(JPEG2000Lossless, generate_instance_uid=False)
            (frame,) = generate_frames(data.PixelData, number_of_frames=1)
            box(data, b"".join(itemize_fragment(f) for f in (frame[:100], frame[100:500], frame[500:])))
            if encoding == "unknown":
                data.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.92")
            data.save_as(path)
        elif encoding.startswith("JPEG"):
            recode(path, getattr(gdcm.TransferSyntax, encoding))
        else:
            encode_as(path, encoding)

    return write


@pytest.mark.parametrize("kind", WRITTEN)
def test_written(write_series, encode, places, in_place, tmp_path, key, kind):
    case = WRITTEN[kind]
    plane = [float(v) for v in case.plane]
    positions = np.array(START) + np.outer(case.order, case.step)
    attributes = {"positions": positions, "ImageOrientationPatient": plane, **case.attributes}
    paths = write_series(case.stored, edit=case.edit, **attributes)
    if case.encoding:
        for path in paths:
            encode(path, case.encoding)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason or "used", entry.num_files) == (case.expected, 5)
    if not entry.used:
        return
    assert row_of(entry) == (5, (5, 40, 36), (2.0, 0.8, 0.5), case.orientation, "", case.notes)
    assert entry.shear_deg == pytest.approx(case.shear_deg, abs=1e-3)
    vol, _ = read_entry(entry)
    assert vol.orientation == {"S": "SPL", "P": "PIL", "L": "LIP"}[case.orientation[0]]
    values = case.values
    if values is None:
        values = case.stored.astype(int) + (-1024 if entry.modality == "CT" else 0)
    where = places((5, 40, 36), plane, (0.8, 0.5), START, case.step)
    in_place(vol, where[list(case.order)], values.astype(vol.voxels.dtype))
    if case.gdcm:
        check_slices(vol, by_gdcm(paths))


# Two volumes at the same places in one series: the attribute that tells them apart, and its values.
SPLIT: dict[str, tuple[str, tuple[Any, Any], dict[str, Any]]] = {
    "echoes": ("EchoTime", (10.0, 80.0), MR0),
    "b-values": ("DiffusionBValue", (0.0, 1000.0), MR0),
    "gradients": ("DiffusionGradientOrientation", ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), MR0),
    "dynamics": ("TemporalPositionIdentifier", (1, 2), MR0),
    "cardiac phases": ("TriggerTime", (0.0, 35.5), MR0),
    "inversion times": ("InversionTime", (50.0, 2500.0), MR0),
    "flip angles": ("FlipAngle", (5.0, 20.0), MR0),
    "magnitude and real": ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "R"]), MR0),
    "reconstructions": ("ConvolutionKernel", ("B30f", "B70f"), {}),
    "energies": ("KVP", (80, 140), {}),
    "acquisitions": ("AcquisitionNumber", (1, 2), {}),
    "times": ("ContentTime", ("101500.25", "101700.5"), {}),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_split(write_series, places, in_place, tmp_path, key, kind):
    """Files of the two volumes are mixed, InstanceNumber says nothing."""
    keyword, pair, attributes = SPLIT[kind]
    for n, value in enumerate(pair):
        edit = each(SOPInstanceUID=[f"1.2.{n}.{k}" for k in range(5)])
        write_series(
            STORED + 5000 * n, edit=edit, prefix="ab"[n], **{keyword: value, "InstanceNumber": 1}, **attributes
        )
    found = scan(tmp_path / "archive", key)
    assert [row_of(e) for e in found] == [(5, (5, 40, 36), (2.0, 0.8, 0.5), "SPL", keyword, "")] * 2
    lowest = []
    for vol, _ in map(read_entry, found):
        low = int(vol.voxels.min()) - int(STORED.min())
        in_place(vol, places((5, 40, 36), AXIAL, (0.8, 0.5), START, (0, 0, 2)), STORED.astype(int) + low)
        lowest.append(low)
    first = 0 if attributes else -1024
    assert sorted(lowest) == [first, first + 5000]
