"""Mosaics: written with every voxel and position known, and real ones against nibabel and dcm2niix."""

import random
import warnings
from functools import partial

import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from hilum.archive import dicom
from hilum.archive.dicom.mosaic import read_csa
from hilum.archive.intake import read_scan
from hilum.archive.scan import find, scan

MR = "1.2.840.10008.5.1.4.1.1.4"
PLANE = [1.0, 0.0, 0.0, 0.0, 0.6, -0.8]
NORMAL = np.array([0.0, 0.8, 0.6])
FIRST = np.array([-30.0, -20.0, 15.0])  # centre of the first voxel of tile 0
STEP = 4.5


@pytest.fixture
def write_siemens(write_mosaics, tmp_path):
    """Several volumes (T, N, Y, X), each as one mosaic."""
    return partial(write_mosaics, tmp_path, plane=PLANE, first=FIRST, step=STEP)


@pytest.fixture(scope="session")
def volumes():
    """Two time points of 7 slices, all values different."""
    return np.arange(2 * 7 * 6 * 5).reshape(2, 7, 6, 5).astype(np.uint16) + 1


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_voxel_lies_where_it_was_put(write_siemens, volumes, tmp_path, key, sign, newer):
    write_siemens(volumes, sign=sign, newer=newer)
    found = scan(tmp_path / "archive", key)
    assert [(e.verdict, e.num_files, e.num_slices, e.rows, e.columns) for e in found] == [("used", 1, 7, 6, 5)] * 2
    for entry in found:
        time = int(entry.paths[0].name[-1])
        vol = read_scan(entry)
        to_index = np.linalg.inv(vol.affine)
        for k, j, i in np.ndindex(volumes[time].shape):
            world = FIRST + sign * k * STEP * NORMAL + 0.8 * j * np.array(PLANE[3:]) + 0.5 * i * np.array(PLANE[:3])
            place = to_index @ [*world, 1]
            np.testing.assert_allclose(place, np.round(place), atol=1e-4)
            assert vol.voxels[tuple(np.round(place[:3]).astype(int))] == volumes[time][k, j, i]
        assert vol.shape == volumes[time].shape


def test_number_of_tiles_from_either_private_element(write_siemens, volumes, tmp_path, key):
    def state(number):
        def edit(k, data):
            data.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", number)

        return edit

    write_siemens(volumes, drop=("NumberOfImagesInMosaic",), edit=state(7))
    assert [e.num_slices for e in scan(tmp_path / "archive", key)] == [7, 7]
    write_siemens(volumes, edit=state(8))
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.detail) == ("mosaic", "8 or 7 tiles: the header contradicts itself")


@pytest.mark.parametrize(
    ("settings", "detail"),
    [
        ({"drop": ("NumberOfImagesInMosaic",)}, "the number of tiles is not stated"),
        ({"drop": ("SliceNormalVector",)}, "no SliceNormalVector in the CSA header: the order of the tiles is unknown"),
        ({"SpacingBetweenSlices": None}, "no SpacingBetweenSlices"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"PixelSpacing": None}, "no ImageOrientationPatient or PixelSpacing"),
        ({"ImageOrientationPatient": [1.0, 0, 0, 0, 1, 0]}, "SliceNormalVector is not at right angles to the image"),
        ({"edit": lambda k, d: setattr(d, "Rows", 17)}, "17×15 pixels are no 3×3 tiles"),
    ],
)
def test_what_is_missing_is_named(write_siemens, volumes, tmp_path, key, settings, detail):
    write_siemens(volumes, **settings)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.detail, entry.num_files) == ("mosaic", detail, 2)


@pytest.mark.parametrize("count", [-1, 0, 10**9, "many"])
def test_absurd_numbers_of_tiles(write_siemens, make_csa, volumes, tmp_path, key, count):
    def edit(k, data):
        block = data.private_block(0x0029, "SIEMENS CSA HEADER")
        block[0x10].value = make_csa({"NumberOfImagesInMosaic": [count], "SliceNormalVector": list(NORMAL)})

    write_siemens(volumes, edit=edit)
    assert [e.reason for e in scan(tmp_path / "archive", key)] == ["mosaic"]


def test_time_points_without_any_number_are_told_apart_by_file(write_siemens, volumes, tmp_path, key):
    write_siemens(volumes, edit=lambda k, d: delattr(d, "AcquisitionNumber"))
    found = scan(tmp_path / "archive", key)
    assert [(e.split_by, e.num_slices) for e in found] == [("SOPInstanceUID", 7)] * 2
    assert {int(read_scan(e).voxels.min()) for e in found} == {1, 211}


def test_maps_in_mosaics_are_set_aside(write_siemens, volumes, tmp_path, key):
    write_siemens(volumes, ImageType=["DERIVED", "PRIMARY", "DIFFUSION", "FA", "MOSAIC"])
    assert [(e.reason, e.detail) for e in scan(tmp_path / "archive", key)] == [("derived", "FA")]


def test_csa_headers_cut_or_changed_never_harm(make_csa):
    whole = make_csa({"NumberOfImagesInMosaic": [7], "SliceNormalVector": [0, 0, 1]})
    rng = random.Random(2)
    for n in range(2000):
        mutant = bytearray(whole)
        if n % 2:
            del mutant[rng.randrange(1, len(mutant)) :]
        for _ in range(3):
            mutant[rng.randrange(len(mutant))] = rng.choice((0, 255, rng.randrange(256)))
        read_csa(bytes(mutant))
    assert read_csa(whole)["SliceNormalVector"][:3] == ["0", "0", "1"]
    assert read_csa(None) == read_csa(b"") == {}


# United Imaging


@pytest.fixture
def write_uih(write_series, tile, volumes):
    """The first volume as a mosaic of 3 rows and 4 columns, with one private item per tile."""

    def write(edit=lambda data: None, step=STEP):
        image = np.pad(tile(volumes[0], 4), ((0, 6), (0, 0)))

        def add_private(k, data):
            items = []
            for n in range(7):
                items.append(Dataset())
                items[-1].ImagePositionPatient = [float(v) for v in FIRST + n * step * NORMAL]
            block = data.private_block(0x0065, "Image Private Header", create=True)
            block.add_new(0x04, "SH", "6*5")
            block.add_new(0x50, "DS", "7")
            block.add_new(0x51, "SQ", Sequence(items))
            edit(data)

        return write_series(
            image[None], edit=add_private, SOPClassUID=MR, ImageType=["ORIGINAL", "PRIMARY", "M", "VFRAME"],
            RescaleIntercept=0, ImageOrientationPatient=PLANE, ImagePositionPatient=None,
        )  # fmt: skip

    return write


def test_united_imaging(write_uih, volumes, tmp_path, key):
    write_uih()
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.verdict, entry.num_slices, entry.rows, entry.columns) == ("used", 7, 6, 5)
    vol, _ = dicom.read(entry.paths, entry.frames)
    k = 0 if vol.affine[:3, 0] @ NORMAL > 0 else 6
    np.testing.assert_allclose(vol.affine @ [k, 0, 0, 1], [*FIRST, 1], atol=1e-6)
    np.testing.assert_array_equal(vol.voxels if k == 0 else vol.voxels[::-1], volumes[0])


def without_place(data):
    del data.private_block(0x0065, "Image Private Header")[0x51].value[3].ImagePositionPatient


def set_private(element, value):
    def edit(data):
        data.private_block(0x0065, "Image Private Header")[element].value = value

    return edit


@pytest.mark.parametrize(
    ("edit", "detail"),
    [
        (without_place, "tiles without ImagePositionPatient"),
        (set_private(0x50, "8"), "7 tiles with a position, another number stated"),
        (set_private(0x04, "64*64"), "7 tiles of 64×64 in 18×20 pixels"),
        (set_private(0x04, "?"), "the size of a tile is not stated"),
        (lambda d: d.private_block(0x0065, "Image Private Header").__delitem__(0x51),
         "no readable private sequence (0065,xx51) with the positions of the tiles"),
    ],
)  # fmt: skip
def test_united_imaging_without_what_it_needs(write_uih, tmp_path, key, edit, detail):
    write_uih(edit)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.detail) == ("mosaic", detail)


# Real files


def equals_nifti(vol, values, affine):
    """Every voxel has the value of the NIfTI voxel at the same place in the patient."""
    to_index = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ affine) @ vol.affine
    index = np.moveaxis(np.indices(vol.shape), 0, -1).reshape(-1, 3)
    place = index @ to_index[:3, :3].T + to_index[:3, 3]
    np.testing.assert_allclose(place, np.round(place), atol=1e-3)
    place = np.round(place).astype(int)
    assert len(np.unique(place, axis=0)) == values.size
    np.testing.assert_array_equal(values[tuple(place.T)], vol.voxels.ravel())


def test_one_mosaic_in_nine_encodings_equals_dcm2niix(real_data, key):
    folder = real_data / "dicom" / "mr_transfer_syntaxes_siemens_mosaic"
    image = nibabel.load(folder / "expected_dcm2niix.nii")
    found = [e for e in find(folder, key) if e.reader == "dicom"]
    assert [e.num_slices for e in found] == [35] * 9
    assert len({e.transfer_syntax for e in found}) == 7
    for entry in found:
        equals_nifti(read_scan(entry), np.asanyarray(image.dataobj), image.affine)


def test_two_series_of_two_time_points_equal_dcm2niix(real_data, key):
    folder = real_data / "dicom" / "mr_siemens_mosaic_phantom"
    found = [e for e in find(folder, key) if e.reader == "dicom"]
    assert len(found) == 4
    for entry in found:
        name = entry.paths[0].name
        image = nibabel.load(folder / f"expected_dcm2niix_series{3 if '_ap-' in name else 5}.nii")
        time = int(name.split(".")[0][-1]) - 1
        equals_nifti(read_scan(entry), np.asanyarray(image.dataobj)[..., time], image.affine)


def test_csa_header_and_affine_as_nibabel_reads_them(real_data):
    with warnings.catch_warnings(action="ignore"):  # nibabel calls its DICOM part experimental
        from nibabel.nicom import csareader
        from nibabel.nicom.dicomwrappers import wrapper_from_data
    for name in ("mr_siemens_mosaic_phantom/epi_pe_rl-00001.dcm", "mr_transfer_syntaxes_siemens_mosaic/1.dcm"):
        path = real_data / "dicom" / name
        data = dcmread(path)
        content = data[0x0029, 0x1010].value
        expected = csareader.read(content)["tags"]
        found = read_csa(content)
        assert found.keys() == expected.keys()
        for n, element in expected.items():
            for theirs, ours in zip(element["items"], found[n]):
                assert theirs == (ours.encode() if isinstance(theirs, bytes) else type(theirs)(ours)), n
        num_tiles = int(found["NumberOfImagesInMosaic"][0])
        vol, _ = dicom.read([path] * num_tiles, range(num_tiles))
        to_index = np.linalg.inv(vol.affine) @ wrapper_from_data(data).affine  # from rows, columns, tiles
        for corner in ([0, 0, 0, 1], [0, 0, num_tiles - 1, 1]):
            place = to_index @ corner
            np.testing.assert_allclose(place, np.round(place), atol=1e-3)
            assert round(place[0]) in (0, num_tiles - 1)


def test_united_imaging_tiles_lie_where_their_items_say(real_data, key):
    folder = real_data / "dicom" / "mr_uih_mosaic_dti"
    found = [e for e in find(folder, key) if e.reader == "dicom"]
    assert [(e.num_slices, e.rows, e.columns) for e in found] == [(20, 64, 64)] * 6
    for entry in found:
        data = dcmread(entry.paths[0])
        vol = read_scan(entry)
        image = data.pixel_array
        for n, item in enumerate(data[0x0065, 0x1051].value):
            index = np.linalg.inv(vol.affine) @ [*(float(v) for v in item.ImagePositionPatient), 1]
            np.testing.assert_allclose(index[1:], [0, 0, 1], atol=1e-3)
            top, left = n // 5 * 64, n % 5 * 64
            np.testing.assert_array_equal(vol.voxels[round(index[0])], image[top : top + 64, left : left + 64])
