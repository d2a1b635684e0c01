"""Geometry against an independent library: SimpleITK, whose physical points are LPS millimetres too."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk

from hilum.errors import GeometryError
from hilum.volume import Volume, crop_or_pad, orient, orientation_of, resample, to_slices

LETTERS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
CODES = ["".join(c) for p in itertools.permutations(("LR", "PA", "SI")) for c in itertools.product(*p)]


def _affine(code="SPL", spacing=(3.0, 0.7, 0.5), origin=(-90.0, 40.0, 7.0)):
    affine = np.eye(4)
    affine[:3, :3] = np.array([LETTERS[c] for c in code], float).T * spacing
    affine[:3, 3] = origin
    return affine


def _volume(code="SPL", shape=(5, 7, 9), spacing=(3.0, 0.7, 0.5), kind="intensity", dtype=np.float32):
    voxels = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(dtype)  # no value twice
    return Volume(voxels=voxels, affine=_affine(code, spacing), modality="CT", unit="HU", kind=kind)


def _oblique(angle_deg=25.0, **options):
    vol = _volume(**options)
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = vol.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    return Volume(voxels=vol.voxels, affine=affine, modality="CT", unit="HU", kind=vol.kind)


def _to_sitk(vol):
    """SimpleITK indexes (i, j, k); its columns are the directions of these axes."""
    image = sitk.GetImageFromArray(vol.voxels)
    spacing = np.array(vol.spacing_mm)[::-1]
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(vol.affine[:3, 3].tolist())
    image.SetDirection((vol.affine[:3, 2::-1] / spacing).ravel().tolist())
    return image


def _assert_same_as_sitk(vol, image, atol=0.0):
    np.testing.assert_allclose(vol.voxels, sitk.GetArrayFromImage(image), atol=atol, rtol=0)
    for index in ((0, 0, 0), tuple(n - 1 for n in vol.shape), (1, 0, 2)):
        point = image.TransformContinuousIndexToPhysicalPoint([float(i) for i in index[::-1]])
        np.testing.assert_allclose((vol.affine @ [*index, 1])[:3], point, atol=1e-6)


def test_letters_name_where_the_axes_point_in_lps():
    # DICOM PS3.3 C.7.6.2.1.1: x grows to the patient's left, y to the back, z to the head
    assert _volume("SPL").orientation == "SPL"
    np.testing.assert_allclose(_affine("SPL") @ [1, 0, 0, 0], [0, 0, 3.0, 0])
    np.testing.assert_allclose(_affine("SPL") @ [0, 0, 1, 0], [0.5, 0, 0, 0])
    assert [orientation_of(_affine(code)) for code in CODES] == CODES


@pytest.mark.parametrize("make", [_volume, _oblique])
@pytest.mark.parametrize("code", CODES[::5])
def test_orient_agrees_with_simpleitk(make, code):
    vol = make()
    image = sitk.DICOMOrient(_to_sitk(vol), code[::-1])
    _assert_same_as_sitk(orient(vol, code), image)


@pytest.mark.parametrize("code", CODES)
def test_orient_and_back_is_the_identity_and_no_voxel_moves(code):
    vol = _oblique(10.0)
    there = orient(vol, code)
    assert there.orientation == code
    index = np.argwhere(there.voxels == there.voxels.max())[0]
    origin = np.argwhere(vol.voxels == vol.voxels.max())[0]
    np.testing.assert_allclose(there.affine @ [*index, 1], vol.affine @ [*origin, 1])
    back = orient(there, vol.orientation)
    np.testing.assert_array_equal(back.voxels, vol.voxels)
    np.testing.assert_allclose(back.affine, vol.affine)


def test_orient_permutes_the_spacing_with_the_axes():
    assert orient(_volume(spacing=(3.0, 0.7, 0.5)), "LIP").spacing_mm == pytest.approx((0.5, 3.0, 0.7))


@pytest.mark.parametrize("code", ["SPX", "SSL", "SP", "SIL"])
def test_orient_refuses_what_is_no_orientation(code):
    with pytest.raises(GeometryError, match="is no"):
        orient(_volume(), code)


def test_two_axes_never_claim_the_same_direction():
    vol = _oblique(44.0)
    assert sorted("LR" if c in "LR" else "PA" if c in "PA" else "SI" for c in vol.orientation) == ["LR", "PA", "SI"]


@pytest.mark.parametrize(
    ("code", "spacing", "expected"),
    [
        ("SPL", (5.0, 0.7, 0.7), "SPL"),  # axial stack
        ("IAR", (5.0, 0.7, 0.7), "SPL"),
        ("ASL", (5.0, 0.7, 0.7), "PIL"),  # coronal: down the image is towards the feet
        ("RSP", (5.0, 0.7, 0.7), "LIP"),  # sagittal
        ("LPS", (5.0, 0.7, 0.7), "LIP"),
        ("LPS", (1.0, 1.0, 1.0), "SPL"),  # isotropic: axial
        ("LPS", (1.05, 1.0, 1.0), "LIP"),  # square pixels in the plane of P and S
        ("SPL", (2.5, 3.9, 3.9), "SPL"),  # thinner slices than pixels
        ("LPS", (3.0, 1.0, 2.0), "LIP"),  # no square plane: the thickest axis
    ],
)
def test_to_slices_shows_the_acquired_plane_as_radiologists_see_it(code, spacing, expected):
    assert to_slices(_volume(code, spacing=spacing)).orientation == expected


def test_an_image_without_geometry_passes_to_slices_and_refuses_millimetres():
    vol = Volume(voxels=np.zeros((1, 4, 4)), affine=None, modality="OT")
    assert to_slices(vol) is vol
    assert crop_or_pad(vol, (0, -1, 0), (1, 6, 4), 0).shape == (1, 6, 4)
    for call in (lambda: vol.spacing_mm, lambda: orient(vol, "SPL"), lambda: resample(vol, (1, 1, 1))):
        with pytest.raises(GeometryError, match="needs a geometry"):
            call()


@pytest.mark.parametrize("make", [_volume, _oblique])
@pytest.mark.parametrize("kind", ["intensity", "label"])
def test_finer_resampling_agrees_with_simpleitk(make, kind):
    vol = make(kind=kind)
    found = resample(vol, (1.1, 0.6, 0.31))
    grid = sitk.Image(found.shape[::-1], sitk.sitkFloat32)
    grid.SetSpacing(found.spacing_mm[::-1])
    grid.SetOrigin(found.affine[:3, 3].tolist())
    grid.SetDirection((found.affine[:3, 2::-1] / np.array(found.spacing_mm)[::-1]).ravel().tolist())
    rule = sitk.sitkLinear if kind == "intensity" else sitk.sitkNearestNeighbor
    expected = sitk.GetArrayFromImage(sitk.Resample(_to_sitk(vol), grid, sitk.Transform(), rule, -1.0))
    inside = expected >= 0  # SimpleITK has no value outside the outermost voxel centres
    assert inside.mean() > 0.6
    np.testing.assert_allclose(found.voxels[inside], expected[inside], atol=0.02)


@pytest.mark.parametrize("make", [_volume, _oblique])
def test_resampling_to_the_same_spacing_is_the_identity(make):
    vol = make()
    found = resample(vol, vol.spacing_mm)
    np.testing.assert_allclose(found.voxels, vol.voxels, atol=1e-3)
    np.testing.assert_allclose(found.affine, vol.affine, atol=1e-9)
    nudged = resample(vol, tuple(s * (1 + 1e-9) for s in vol.spacing_mm))  # no blur by rounding
    np.testing.assert_allclose(nudged.voxels, vol.voxels, atol=1e-3)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (6.0, 2.0, 2.0), (0.9, 0.33, 1.7)])
def test_resampling_keeps_the_centre_and_the_mean(spacing):
    vol = _oblique(shape=(12, 20, 30))
    found = resample(vol, spacing)
    assert found.spacing_mm == pytest.approx(spacing)
    center, before = (v.affine @ [*((np.array(v.shape) - 1) / 2), 1] for v in (found, vol))
    np.testing.assert_allclose(center, before, atol=1e-3)
    assert found.voxels.mean() == pytest.approx(vol.voxels.mean(), rel=0.03)
    assert np.all(
        np.abs(np.array(found.shape) * spacing - np.array(vol.shape) * vol.spacing_mm) <= np.array(spacing) / 2 + 1e-6
    )


def test_a_ramp_in_millimetres_stays_the_same_ramp():
    vol = _oblique(shape=(10, 16, 16))
    index = np.stack([*np.meshgrid(*map(np.arange, vol.shape), indexing="ij"), np.ones(vol.shape)], axis=-1)
    ramp = Volume(voxels=(index @ vol.affine.T)[..., 0], affine=vol.affine, modality="MR")
    found = resample(ramp, (2.0, 1.0, 0.4))
    index = np.stack([*np.meshgrid(*map(np.arange, found.shape), indexing="ij"), np.ones(found.shape)], axis=-1)
    inner = (slice(2, -2), slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(found.voxels[inner], (index @ found.affine.T)[..., 0][inner], atol=1e-3)


def test_coarser_intensities_are_averaged_and_labels_keep_their_numbers():
    checker = np.indices((16, 16, 16)).sum(axis=0) % 2 * 100.0
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    vol = Volume(voxels=checker, affine=affine, modality="MR")
    assert np.abs(resample(vol, (4, 4, 4)).voxels[1:-1, 1:-1, 1:-1] - 50).max() < 1
    label = Volume(
        voxels=np.random.default_rng(0).choice([0, 7, 40], (16, 16, 16)), affine=affine, modality="MR", kind="label"
    )
    assert set(np.unique(resample(label, (2.5, 2.5, 0.4)).voxels)) <= {0, 7, 40}


@pytest.mark.parametrize("spacing", [(0, 1, 1), (-1, 1, 1), (1, 1), (np.nan, 1, 1)])
def test_resampling_refuses_what_is_no_spacing(spacing):
    with pytest.raises(GeometryError, match="three numbers > 0"):
        resample(_volume(), spacing)


@pytest.mark.parametrize("start", [(0, 0, 0), (1, 2, 3), (-2, -3, 4), (-20, 0, 0), (0, 30, 0)])
def test_crop_or_pad_keeps_every_voxel_where_it_is(start):
    vol = _oblique()
    found = crop_or_pad(vol, start, (4, 6, 8), -1024)
    assert found.shape == (4, 6, 8)
    for index in np.ndindex(*found.shape):
        old = tuple(np.array(index) + start)
        np.testing.assert_allclose(found.affine @ [*index, 1], vol.affine @ [*old, 1])
        inside = all(0 <= o < n for o, n in zip(old, vol.shape))
        assert found.voxels[index] == (vol.voxels[old] if inside else -1024)


def test_pad_then_crop_is_the_identity():
    vol = _volume()
    padded = crop_or_pad(vol, (-1, -2, -3), (8, 12, 14), 0)
    back = crop_or_pad(padded, (1, 2, 3), vol.shape, 0)
    np.testing.assert_array_equal(back.voxels, vol.voxels)
    np.testing.assert_allclose(back.affine, vol.affine)


def test_spacing_and_shear_of_oblique_and_tilted_scans():
    assert _oblique(spacing=(3.0, 0.7, 0.5)).spacing_mm == pytest.approx((3.0, 0.7, 0.5))
    assert _oblique().shear_deg == pytest.approx(0.0, abs=1e-5)
    tilted = _affine()
    tilted[1, 0] = 3.0 * np.tan(np.radians(20))  # gantry tilt: slices step sideways
    vol = Volume(voxels=np.zeros((2, 3, 4)), affine=tilted, modality="CT")
    assert vol.shear_deg == pytest.approx(20.0)
    assert vol.orientation == "SPL"


@pytest.mark.parametrize(
    ("voxels", "affine", "message"),
    [
        (np.zeros((3, 3)), np.eye(4), "three non-empty axes"),
        (np.zeros((0, 3, 3)), np.eye(4), "three non-empty axes"),
        (np.zeros((2, 3, 3)), np.eye(3), "4×4 and finite"),
        (np.zeros((2, 3, 3)), np.full((4, 4), np.nan), "4×4 and finite"),
        (np.zeros((2, 3, 3)), np.diag([1.0, 0.0, 1.0, 1.0]), "singular"),
    ],
)
def test_a_volume_with_an_impossible_geometry_is_never_made(voxels, affine, message):
    with pytest.raises(GeometryError, match=message):
        Volume(voxels=voxels, affine=affine, modality="CT")
