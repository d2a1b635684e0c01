"""Left is left in every path: one phantom with three marks goes in by every form and position, and out by every door.

Bright marks lie to the patient's left (3000), front (2000) and head (1000). Where they come out is read from array
positions and from other readers, never from the package's own affine alone.
"""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from hilum.archive.doctor.display import middle_planes
from hilum.archive.intake import read_scan
from hilum.archive.scan import scan
from hilum.archive.store.export import export_nifti
from hilum.archive.store.store import Store
from hilum.encode.contract import Contract, prepare_slice

MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
KEY = "0123456789abcdef0123456789abcdef"
SHAPE, SPACING, STEP_MM = (9, 36, 40), (2.0, 2.0), 8.0
CENTRE = np.array([15.0, -25.0, 40.0])  # of the field, LPS mm
# Letter of the mark → its value and where it lies, from CENTRE.
MARKS = {"L": (3000, (22.0, 0, 0)), "A": (2000, (0, -22.0, 0)), "S": (1000, (0, 0, 22.0))}
OPPOSITE = dict(zip("LRPASI", "RLAPIS"))


def turned(x_deg, y_deg, z_deg):
    """Row and column direction of an axial plane turned about the three axes."""
    x, y, z = np.radians([x_deg, y_deg, z_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return tuple((about_z @ about_y @ about_x)[:, :2].T.ravel().round(8).tolist())


# Name → (row and column direction, side to which the slices go, PatientPosition, how the reader must turn it).
POSITIONS = {
    "axial": ((1, 0, 0, 0, 1, 0), 1, "HFS", "SPL"),
    "axial, from the head": ((1, 0, 0, 0, 1, 0), -1, "HFS", "SPL"),
    "axial, feet first": ((-1, 0, 0, 0, 1, 0), 1, "FFS", "SPL"),
    "axial, prone": ((-1, 0, 0, 0, -1, 0), 1, "HFP", "SPL"),
    "axial, on the left side": ((0, 1, 0, -1, 0, 0), 1, "HFDL", "SPL"),
    "axial, on the right side, feet first": ((0, 1, 0, 1, 0, 0), -1, "FFDR", "SPL"),
    "sagittal": ((0, 1, 0, 0, 0, -1), 1, "HFS", "LIP"),
    "sagittal, from the left": ((0, 1, 0, 0, 0, -1), -1, "HFS", "LIP"),
    "coronal": ((1, 0, 0, 0, 0, -1), 1, "HFS", "PIL"),
    "coronal, upside down": ((-1, 0, 0, 0, 0, 1), 1, "FFS", "PIL"),
    "oblique": (turned(18, 0, 0), 1, "HFS", "SPL"),
    "double oblique": (turned(20, -15, 25), -1, "HFS", "SPL"),
    "double oblique coronal": (turned(75, 10, -20), 1, "HFS", "PIL"),
}


def phantom(where):
    """Values at places (…, 3): noise below 60, and a ball of 9 mm radius for each mark."""
    values = np.random.default_rng(0).integers(0, 60, where.shape[:-1])
    for bright, place in MARKS.values():
        values[np.linalg.norm(where - (CENTRE + place), axis=-1) < 9] = bright
    return values.astype(np.uint16)


def check_places(values, where):
    """The marks lie at their LPS places (…, 3)."""
    for bright, place in MARKS.values():
        np.testing.assert_allclose(where[values == bright].mean(0), CENTRE + place, atol=2)


@pytest.fixture
def write_scan(tmp_path, write_series_to, write_multiframe, write_mosaics, places):
    """Write the phantom in one form and position; the folder to scan."""

    def write(form, position):
        plane, side, lying, _ = POSITIONS[position]
        row, column = np.reshape(plane, (2, 3)).astype(float)
        step = side * STEP_MM * np.cross(row, column)
        middle = step * (SHAPE[0] - 1) / 2 + column * 2.0 * (SHAPE[1] - 1) / 2 + row * 2.0 * (SHAPE[2] - 1) / 2
        start = CENTRE - middle
        where = places(SHAPE, plane, SPACING, start, step)
        values = phantom(where)
        affine = np.eye(4)
        affine[:3] = np.stack([step, column * 2.0, row * 2.0, start], 1)
        if form == "dicom":
            write_series_to(tmp_path / "in", values, start=start, step=step, SOPClassUID=MR, RescaleIntercept=0,
                            PixelSpacing=list(SPACING), ImageOrientationPatient=list(plane), PatientPosition=lying)  # fmt: skip
        elif form == "enhanced":
            (tmp_path / "in").mkdir()
            write_multiframe(
                tmp_path / "in" / "x", values, where[:, 0, 0], orientation=plane, spacing=SPACING, bits=16,
                PixelData=values.tobytes(), SOPClassUID=ENHANCED_MR, SegmentSequence=None, SegmentationType=None,
                PatientPosition=lying,
            )  # fmt: skip
        elif form == "mosaic":
            write_mosaics(tmp_path / "in", values[None], plane=plane, spacing=SPACING, first=start, step=STEP_MM,
                          sign=side, PatientPosition=lying)  # fmt: skip
        elif form == "nii.gz":
            (tmp_path / "in").mkdir()
            ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine[:, [2, 1, 0, 3]]
            nibabel.save(nibabel.Nifti1Image(values.astype(np.int16).T, ras), tmp_path / "in" / "x.nii.gz")
        else:
            (tmp_path / "in").mkdir()
            image = sitk.GetImageFromArray(values.astype(np.int16))
            image.SetSpacing((2.0, 2.0, STEP_MM))
            image.SetOrigin(start.tolist())
            image.SetDirection((affine[:3, 2::-1] / (2.0, 2.0, STEP_MM)).ravel().tolist())
            sitk.WriteImage(image, str(tmp_path / "in" / f"x.{form}"))
        return tmp_path / "in"

    return write


def check_sides(vol, code):
    """Each mark lies on its side of the array, by the letters that this plane must have; no affine is used."""
    assert vol.orientation == code
    for letter, (bright, _) in MARKS.items():
        axis = next(n for n, c in enumerate(code) if c in letter + OPPOSITE[letter])
        offset = np.argwhere(vol.voxels == bright).mean(0)[axis] - (vol.shape[axis] - 1) / 2
        assert offset * (1 if code[axis] == letter else -1) > 1.5, letter


def by_nibabel(path):
    """Values and LPS places as nibabel reads a NIfTI."""
    image = nibabel.load(path)
    values = np.asanyarray(image.dataobj)
    index = np.moveaxis(np.indices(values.shape), 0, -1)
    ras = index @ image.affine[:3, :3].T + image.affine[:3, 3]
    return values, ras * [-1, -1, 1]


def check_doors(vol, code, folder, write_store):
    """Store, slice, crop, export, pictures and the encoder's input keep the sides."""
    store = Store(write_store(folder / "store", {KEY: vol}))
    check_sides(store.read_volume(KEY), code)
    crop = store.read_crop(KEY, (1, 3, 5), (8, 30, 33))
    write_store(folder / "cropped", {KEY: crop})
    for root in (folder / "store", folder / "cropped"):
        export_nifti(root, folder / f"{root.name}-out", num_workers=1)
        check_places(*by_nibabel(folder / f"{root.name}-out" / f"{KEY}.nii.gz"))
    check_pictures(vol)
    k = int(np.argwhere(vol.voxels == 3000).mean(0).round()[0])
    pixels, _ = store.read_slice(KEY, k)
    np.testing.assert_array_equal(pixels, vol.voxels[k])
    seen = prepare_slice(pixels, vol.modality, vol.unit, Contract())[0].numpy()
    for axis in (0, 1):
        before = (np.argwhere(pixels == 3000).mean(0)[axis] + 0.5) / pixels.shape[axis]
        after = (np.argwhere(seen > 0.75 * seen.max()).mean(0)[axis] + 0.5) / seen.shape[axis]
        assert after == pytest.approx(before, abs=0.02)


def check_pictures(vol):
    """In both pictures that a mark's letter is written on, the slab of voxels that holds the mark lies towards it."""
    for letter, (bright, _) in MARKS.items():
        name = {"S": "H"}.get(letter, letter)
        others = tuple(n for n, c in enumerate(vol.orientation) if c not in letter + OPPOSITE[letter])
        slab = np.broadcast_to((vol.voxels == bright).any(others, keepdims=True), vol.shape)
        shown = 0
        for panel in middle_planes(replace(vol, voxels=slab.astype(np.int16))):
            top, bottom, left, right = (edge[0] for edge in panel.edges)
            if name in (top, bottom, left, right):
                y, x = (np.argwhere(panel.pixels).mean(0) + 0.5) / panel.pixels.shape - 0.5
                assert {top: -y, bottom: y, left: -x, right: x}[name] > 0.1
                shown += 1
        assert shown == 2


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("form", ["dicom", "enhanced", "mosaic", "nii.gz", "mha", "nrrd"])
def test_left_is_left(write_scan, write_store, tmp_path, key, form, position):
    code = POSITIONS[position][3]
    (entry,) = scan(write_scan(form, position), key)
    assert entry.verdict == "used"
    vol = read_scan(entry)
    check_sides(vol, code)
    index = np.moveaxis(np.indices(vol.shape), 0, -1)
    where = index @ vol.affine[:3, :3].T + vol.affine[:3, 3]
    check_places(vol.voxels, where)
    check_doors(vol, code, tmp_path, write_store)
