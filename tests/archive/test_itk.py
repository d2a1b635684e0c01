"""MetaImage and NRRD: every voxel, place and refusal, against what SimpleITK writes and says."""

import gzip
import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from hilum.archive.files import itk
from hilum.archive.intake import read_scan
from hilum.archive.scan import find, scan
from hilum.errors import ScanRefused

NAMES = ["x.mha", "x.mhd", "x.nrrd", "x.nhdr"]
ROTATED = sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.7).GetMatrix()
DIRECTIONS = {
    "axial": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "coronal": (1, 0, 0, 0, 0, 1, 0, -1, 0),
    "sagittal": (0, 0, 1, 1, 0, 0, 0, -1, 0),
    "mirrored": (-1, 0, 0, 0, 1, 0, 0, 0, 1),
    "oblique": ROTATED,
}


def make(dtype=np.int16, direction="oblique"):
    voxels = np.random.default_rng(0).permutation(5 * 6 * 7).reshape(5, 6, 7).astype(dtype)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 0.8, 2.5))
    image.SetOrigin((-11.0, 22.0, 33.0))
    image.SetDirection(DIRECTIONS[direction])
    return image


def write(path, image, packed=False):
    sitk.WriteImage(image, str(path), packed)
    return path


def edit(path, *changes):
    content = path.read_bytes()
    for old, new in changes:
        assert old in content
        content = content.replace(old, new)
    path.write_bytes(content)
    return path


def check_places(vol, path):
    """Every voxel lies where ITK says it lies."""
    image = sitk.ReadImage(str(path))
    for index in np.ndindex(vol.shape):
        point = (vol.affine @ [*index, 1])[:3]
        i, j, k = image.TransformPhysicalPointToIndex(point.tolist())
        np.testing.assert_allclose(image.TransformContinuousIndexToPhysicalPoint((i, j, k)), point, atol=1e-4)
        assert vol.voxels[index] == image[i, j, k]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_voxel_keeps_its_place(tmp_path, name, direction, packed):
    path = write(tmp_path / name, make(direction=direction), packed)
    vol, repairs = itk.read(path)
    assert (vol.modality, vol.unit, repairs) == ("OT", "", ())
    assert vol.voxels.dtype == np.int16
    check_places(vol, path)


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_element_types(tmp_path, name, dtype):
    voxels = (np.arange(210) % 90).reshape(5, 6, 7).astype(dtype)
    voxels[0, 0, 0] += 1
    image = sitk.GetImageFromArray(voxels)
    np.testing.assert_array_equal(itk.read(write(tmp_path / name, image))[0].voxels, voxels)


def test_space_of_nrrd(tmp_path):
    """The same numbers in RAS and in LAS mean mirrored places; ITK agrees."""
    path = write(tmp_path / "x.nrrd", make())
    before = itk.read(path)[0].affine
    for name in (b"right-anterior-superior", b"RAS", b"left-anterior-superior"):
        edit(write(path, make()), (b"left-posterior-superior", name))
        vol, _ = itk.read(path)
        assert not np.allclose(vol.affine, before)
        check_places(vol, path)


def test_big_endian_and_axes_without_extent(tmp_path):
    voxels = sitk.GetArrayFromImage(make()).astype(">i2")
    header = (
        "NRRD0005\n# a comment\ntype: int16\ndimension: 4\nspace: LPS\nsizes: 7 1 6 5\nkinds: domain stub domain domain\n"
        "space directions: (1,0,0) none (0,1,0) (0,0,0.002)\nspace origin: (0,0,0)\nendian: big\nencoding: raw\n"
        'space units: "mm" "mm" "m"\nDICOM:=1\n\n'
    )
    (tmp_path / "x").write_bytes(header.encode() + voxels.tobytes())
    vol, _ = itk.read(tmp_path / "x")
    np.testing.assert_array_equal(vol.voxels, voxels)
    np.testing.assert_allclose(vol.spacing_mm, (2, 1, 1))
    path = write(tmp_path / "y.mha", make())
    start = path.read_bytes().index(b"LOCAL\n") + 6
    stored = np.frombuffer(path.read_bytes()[start:], "<i2").astype(">i2").tobytes()
    path.write_bytes(path.read_bytes()[:start].replace(b"MSB = False", b"MSB = True") + stored)
    check_places(itk.read(path)[0], path)


@pytest.mark.parametrize("name", ["x.mha", "x.mhd"])
def test_four_axes_are_several_volumes(tmp_path, key, name):
    volumes = [make(), make() + 1000, make() * 3]
    write(tmp_path / name, sitk.JoinSeries(volumes), packed=True)
    entries = [e for e in scan(tmp_path, key) if e.reader == "itk"]
    entries.sort(key=lambda e: e.frames)
    assert [(e.frames, e.split_by, e.num_files, e.verdict) for e in entries] == [
        ((0,), "axis 4", 1, "used"), ((1,), "axis 4", 0, "used"), ((2,), "axis 4", 0, "used"),
    ]  # fmt: skip
    for entry, volume in zip(entries, volumes):
        alone = itk.read(write(tmp_path / "alone.mha", volume))[0]
        np.testing.assert_array_equal(read_scan(entry).voxels, alone.voxels)
        np.testing.assert_allclose(read_scan(entry).affine, alone.affine)


def test_a_space_of_four_axes_has_no_patient_directions(tmp_path):
    """What ITK makes of a 4D image in NRRD."""
    with pytest.raises(ScanRefused, match="no_geometry"):
        itk.read(write(tmp_path / "x.nrrd", sitk.JoinSeries([make(), make()])))


NRRD_4D = (
    "NRRD0005\ntype: int16\ndimension: 4\nspace: RAS\nsizes: {sizes}\nkinds: {kinds}\nspace directions: {directions}\n"
    "space origin: (1,2,3)\nendian: little\nencoding: {encoding}\n\n"
)
AXES = "(2,0,0) (0,2,0) (0,0,3)"


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("kind", ["list", "time"])
def test_nrrd_volumes_along_any_axis(tmp_path, key, encoding, axis, kind):
    voxels = np.random.default_rng(0).integers(0, 999, (3, 5, 6, 7)).astype("<i2")  # volume, k, j, i
    stored = np.moveaxis(voxels, 0, 3 - axis)
    directions, kinds = AXES.split(), ["space"] * 3
    directions.insert(axis, "none")
    kinds.insert(axis, kind)
    header = NRRD_4D.format(
        sizes=" ".join(map(str, stored.shape[::-1])), kinds=" ".join(kinds), directions=" ".join(directions),
        encoding=encoding,
    )  # fmt: skip
    data = stored.tobytes()
    (tmp_path / "x.nrrd").write_bytes(header.encode() + (gzip.compress(data) if encoding == "gzip" else data))
    entries = sorted(scan(tmp_path, key), key=lambda e: e.frames)
    assert [e.split_by for e in entries] == [f"axis {axis + 1}"] * 3
    for entry, volume in zip(entries, voxels):
        vol = read_scan(entry)
        assert (vol.shape, vol.orientation, vol.affine[2, 3]) == ((5, 6, 7), "SPL", 3)
        np.testing.assert_array_equal(vol.voxels, volume[:, ::-1, ::-1])  # RAS to LPS


@pytest.mark.parametrize(("kind", "reason"), [("vector", "not_3d"), ("???", "not_3d"), ("RGB-color", "colour")])
def test_numbers_that_are_no_volumes(tmp_path, kind, reason):
    header = NRRD_4D.format(
        sizes="3 7 6 5", kinds=f"{kind} space space space", directions=f"none {AXES}", encoding="raw"
    )
    (tmp_path / "x").write_bytes(header.encode() + bytes(3 * 7 * 6 * 5 * 2))
    with pytest.raises(ScanRefused, match=reason):
        itk.read_header(tmp_path / "x")


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_colour_and_vectors_as_itk_writes_them(tmp_path, key, name):
    colour = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 255, (5, 6, 7, 3)).astype(np.uint8), True)
    field = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(5, 6, 7, 3)), True)
    assert find(write(tmp_path / name, colour), key)[0].reason in ("colour", "not_3d")
    assert [e.reason for e in find(write(tmp_path / name, field), key)] == ["not_3d"]


def test_values_decide_what_it_is(tmp_path):
    grid = np.indices((20, 20, 20)).sum(0)
    labels = sitk.GetImageFromArray(((grid > 20) * 1 + (grid > 40)).astype(np.uint8))
    with pytest.raises(ScanRefused, match="label_map"):
        itk.read(write(tmp_path / "x.nrrd", labels))
    body = np.random.default_rng(0).integers(-120, 120, (20, 20, 20)).astype(np.int16)
    body[:8] = -1000
    vol, _ = itk.read(write(tmp_path / "x.mha", sitk.GetImageFromArray(body)))
    assert (vol.modality, vol.unit) == ("CT", "HU")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("x.mha", [(b"TransformMatrix", b"AnotherMatrixxx")], "no_geometry: no directions"),
        ("x.mha", [(b"ElementSpacing", b"AnotherSpacing")], "no_geometry: no spacing"),
        ("x.mha", [(b"Offset = -11", b"Nowher = -11")], "no_geometry: no origin"),
        ("x.mha", [(b"ElementSpacing = 0.5", b"ElementSpacing = -.5")], "no_geometry"),
        ("x.mha", [(b"ElementSpacing = 0.5", b"ElementSpacing = nan")], "no_geometry"),
        ("x.mha", [(b"TransformMatrix = 1 0 0", b"TransformMatrix = 2 0 0")], "bad_orientation"),
        ("x.mha", [(b"TransformMatrix = 1 0 0", b"TransformMatrix = 0 1 0")], "no_geometry"),
        ("x.mha", [(b"DimSize = 7 6 5", b"DimSize = 7 6 5555555555555")], "too_large"),
        ("x.mha", [(b"DimSize = 7 6 5", b"DimSize = 7 6 500")], "truncated"),
        ("x.mha", [(b"DimSize = 7 6 5", b"DimSize = 7 6 -5")], "corrupt"),
        ("x.mha", [(b"DimSize = 7 6 5", b"DimSize = 7 6 0")], "corrupt"),
        ("x.mha", [(b"DimSize = 7 6 5", b"DimSize = 7 6")], "corrupt"),
        ("x.mha", [(b"DimSize = 7 6 5", b"DimSize = 7 6 x")], "corrupt"),
        ("x.mha", [(b"BinaryData = True", b"BinaryData = False")], "other_format"),
        ("x.mha", [(b"MET_SHORT", b"MET_STRING")], "other_format"),
        ("x.mha", [(b"BinaryData = True", b"ElementToIntensityFunctionSlope = 2\nBinaryData = True")], "other_format"),
        ("x.mha", [(b"BinaryData = True", b"HeaderSize = -7\nBinaryData = True")], "corrupt"),
        ("x.nrrd", [(b"space: left-posterior-superior\n", b"")], "no_geometry"),
        ("x.nrrd", [(b"space: left-posterior-superior", b"space: scanner-xyz")], "no_geometry"),
        ("x.nrrd", [(b"space origin", b"space nowhere")], "no_geometry"),
        ("x.nrrd", [(b"sizes: 7 6 5", b"sizes: 7 6 5555555555555")], "too_large"),
        ("x.nrrd", [(b"sizes: 7 6 5", b"sizes: 7 6 500")], "truncated"),
        ("x.nrrd", [(b"encoding: raw", b"encoding: bzip2")], "other_format"),
        ("x.nrrd", [(b"endian: little", b"endian: middle")], "corrupt"),
        ("x.nrrd", [(b"endian: little\n", b"")], "corrupt"),
        ("x.nrrd", [(b"type: short", b"type: block")], "other_format"),
        ("x.nrrd", [(b"type: short", b"type: short\ntype: short")], "corrupt"),
        ("x.nrrd", [(b"encoding: raw", b'encoding: raw\nspace units: "px" "px" "px"')], "no_geometry"),
    ],
)
def test_broken_headers(tmp_path, key, name, changes, reason):
    path = edit(write(tmp_path / name, make(direction="axial")), *changes)
    with pytest.raises(ScanRefused, match=reason):
        itk.read(path)
    (entry,) = scan(tmp_path, key)
    assert entry.reason == reason.split(":")[0]


# Voxels in a file beside the header


def test_detached_voxels_are_counted_once(tmp_path, key):
    write(tmp_path / "a.mhd", make())
    write(tmp_path / "b.mhd", make(), packed=True)
    write(tmp_path / "c.nhdr", make())
    write(tmp_path / "d.nhdr", make(), packed=True)
    (tmp_path / "other.raw").write_bytes(b"x")
    found = {e.paths[0].name: (e.reason or e.verdict, e.detail, e.num_files) for e in scan(tmp_path, key)}
    beside = ("not_an_image", "voxels of the header file beside it", 1)
    assert found.pop("other.raw") == ("not_an_image", "", 1)
    assert {n: f for n, f in found.items() if n[-3:] not in ("mhd", "hdr")} == dict.fromkeys(
        ["a.raw", "b.zraw", "c.raw", "d.raw.gz"], beside
    )
    assert [found[n][0] for n in ("a.mhd", "b.mhd", "c.nhdr", "d.nhdr")] == ["used"] * 4


@pytest.mark.parametrize(
    "elsewhere", ["/etc/passwd", "../x.raw", "sub/x.raw", "..", ".", "", "LIST", "x%03d.raw 1 3 1", "C:\\x.raw", "gone"]
)
@pytest.mark.parametrize("name", ["x.mhd", "x.nhdr"])
def test_a_header_names_no_file_outside_its_folder(tmp_path, key, name, elsewhere):
    folder = tmp_path / "archive"
    (folder / "sub").mkdir(parents=True)
    path = write(folder / name, make())
    (folder / "x.raw").rename(tmp_path / "x.raw")
    (folder / "sub" / "x.raw").write_bytes((tmp_path / "x.raw").read_bytes())
    edit(path, (b"x.raw", elsewhere.encode()))
    with pytest.raises(ScanRefused, match="detached_voxels"):
        itk.read(path)
    assert {e.paths[0].name: e.reason for e in scan(folder, key)}[name] == "detached_voxels"


def test_header_size_and_byte_skip(tmp_path):
    expected = itk.read(write(tmp_path / "x.mhd", make()))[0].voxels
    raw = (tmp_path / "x.raw").read_bytes()
    for size in (b"-1", b"10"):
        (tmp_path / "x.raw").write_bytes(b"0123456789" + raw)
        path = edit(write(tmp_path / "y.mhd", make()), (b"y.raw", b"x.raw"))
        edit(path, (b"ElementDataFile", b"HeaderSize = " + size + b"\nElementDataFile"))
        np.testing.assert_array_equal(itk.read(path)[0].voxels, expected)
        path = edit(write(tmp_path / "y.nhdr", make()), (b"y.raw", b"x.raw"))
        edit(path, (b"data file", b"byte skip: " + size + b"\ndata file"))
        (tmp_path / "x.raw").write_bytes(b"0123456789" + raw)
        np.testing.assert_array_equal(itk.read(path)[0].voxels, expected)


# Broken files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_cut_off_anywhere(tmp_path, key, name, packed):
    content = write(tmp_path / name, make(), packed).read_bytes()
    for length in range(0, len(content), 10):
        (tmp_path / name).write_bytes(content[:length])
        (entry,) = scan(tmp_path, key)
        assert not entry.used, length


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_a_flipped_bit_in_packed_voxels_is_noticed(tmp_path, name):
    content = write(tmp_path / name, make(), packed=True).read_bytes()
    for place in range(len(content) - 200, len(content), 7):
        broken = bytearray(content)
        broken[place] ^= 4
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ScanRefused, match=r"corrupt|truncated"):
            itk.read(tmp_path / name)


def test_a_small_file_cannot_claim_much(tmp_path):
    """Packed voxels of 8 GB that are 10 bytes on disk, and 500 MB of zeros in 500 kB read as 10 voxels."""
    path = write(tmp_path / "x.mha", make(), packed=True)
    edit(path, (b"DimSize = 7 6 5", b"DimSize = 2000 2000 1000"))
    with pytest.raises(ScanRefused, match="truncated"):
        itk.read_header(path)
    start = path.read_bytes().index(b"LOCAL\n") + 6
    header = path.read_bytes()[:start].replace(b"2000 2000 1000", b"7 6 5")
    path.write_bytes(header + zlib.compress(bytes(420) + bytes(range(1, 251)) + bytes(1 << 22)))
    with pytest.raises(ScanRefused, match="constant"):
        itk.read(path)
