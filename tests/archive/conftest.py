"""DICOM series whose every voxel and position is known because the test wrote them."""

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import itemize_fragment
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from hilum.archive.ledger import Entry, write_entries
from hilum.archive.store.index import index_path, write_index
from hilum.archive.store.store import open_for_writing, write_header, write_volume
from hilum.volume import Volume

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ROOT = "1.2.826.0.1.3680043.10.9999"


def make_slice(pixels: np.ndarray, position: Sequence[float], number: int, **attributes: Any) -> Dataset:
    """One CT slice in explicit little endian, 16 bits; `attributes` replace or (None) remove any attribute."""
    signed = np.issubdtype(pixels.dtype, np.signedinteger)
    series = attributes.pop("series", "1")
    data = Dataset()
    values: dict[str, Any] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": f"{ROOT}.{series}.{number}",
        "SeriesInstanceUID": f"{ROOT}.{series}",
        "StudyInstanceUID": f"{ROOT}.0",
        "PatientID": "P-001",
        "PatientName": "Secret^Name",
        "Modality": "MR" if attributes.get("SOPClassUID") == MR else "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Manufacturer": "SIEMENS",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(signed),
        "PixelSpacing": [0.8, 0.5],
        "ImageOrientationPatient": list(AXIAL),
        "ImagePositionPatient": [round(float(p), 6) for p in position],
        "InstanceNumber": number + 1,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": pixels.tobytes(),
    }
    for name, value in (values | attributes).items():
        if value is not None:
            setattr(data, name, value)
    data["PixelData"].VR = "OW"
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = values["SOPClassUID"]
    data.file_meta.MediaStorageSOPInstanceUID = data.get("SOPInstanceUID", "1.2.3")
    return data


WriteSeries = Callable[..., list[Path]]


def write(
    root: Path,
    voxels: np.ndarray,
    *,
    step: Sequence[float] = (0.0, 0.0, 2.0),
    start: Sequence[float] = (-50.0, -40.0, 10.0),
    folder: str = "archive",
    positions: Sequence[Sequence[float]] | None = None,
    edit: Callable[[int, Dataset], None] | None = None,
    prefix: str = "im",
    **attributes: Any,
) -> list[Path]:
    """Write voxels (Z, Y, X) as one file a slice, slice k at start + k · step, and return the paths."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for k, pixels in enumerate(voxels):
        where = positions[k] if positions is not None else np.array(start) + k * np.array(step)
        data = make_slice(pixels, where, k, **attributes)
        if edit:
            edit(k, data)
        paths.append(root / folder / f"{prefix}{k:03d}")
        data.save_as(paths[-1], enforce_file_format=True)
    return paths


@pytest.fixture(scope="session")
def write_series_to() -> WriteSeries:
    return write


@pytest.fixture
def write_series(tmp_path: Path) -> WriteSeries:
    return partial(write, tmp_path)


@pytest.fixture(scope="session")
def voxels() -> np.ndarray:
    """(6, 9, 7) unsigned stored values, all different, so that any flip or swap shows."""
    return (np.arange(6 * 9 * 7).reshape(6, 9, 7) * 5 + 3).astype(np.uint16)


@pytest.fixture(scope="session")
def large(voxels: np.ndarray) -> np.ndarray:
    """(6, 18, 21): `voxels` with each pixel six times, large enough to be stored."""
    return voxels.repeat(2, 1).repeat(3, 2)


def write_frames(
    path: Path,
    frames: np.ndarray,
    positions: Sequence[Sequence[float]],
    *,
    orientation: Sequence[float] = AXIAL,
    spacing: Sequence[float] = (0.8, 0.5),
    segments: Sequence[int] = (),
    bits: int = 1,
    **attributes: Any,
) -> Path:
    """Write a multi-frame object: frame n of (N, Y, X) at positions[n], of segment segments[n]. Segment n is "part n"."""
    data = make_slice(frames[0], (0, 0, 0), 0, PixelSpacing=None, ImagePositionPatient=None,
                      ImageOrientationPatient=None, RescaleSlope=None, RescaleIntercept=None)  # fmt: skip
    shared, measures, turned = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(spacing), 2.5
    turned.ImageOrientationPatient = [round(float(v), 8) for v in orientation]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [turned]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = []
    for n, position in enumerate(positions):
        own, place = Dataset(), Dataset()
        place.ImagePositionPatient = [round(float(p), 6) for p in position]
        own.PlanePositionSequence = [place]
        if segments:
            named = Dataset()
            named.ReferencedSegmentNumber = segments[n]
            own.SegmentIdentificationSequence = [named]
        data.PerFrameFunctionalGroupsSequence.append(own)
    data.SegmentSequence = []
    for number in sorted(set(segments)):
        segment = Dataset()
        segment.SegmentNumber, segment.SegmentLabel = number, f"part {number}"
        data.SegmentSequence.append(segment)
    data.NumberOfFrames, data.BitsAllocated, data.BitsStored, data.HighBit = len(frames), bits, bits, bits - 1
    if bits == 1:
        data.PixelData = np.packbits(frames.astype(bool).ravel(), bitorder="little").tobytes()
    data.PixelRepresentation = 0
    data.SOPClassUID, data.SegmentationType = "1.2.840.10008.5.1.4.1.1.66.4", "BINARY"
    for name, value in attributes.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    if len(data.get("PixelData", b"")) % 2:
        data.PixelData += b"\0"
    if "PixelData" in data:
        data["PixelData"].VR = "OB" if bits <= 8 else "OW"
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="session")
def write_multiframe() -> Callable[..., Path]:
    return write_frames


def siemens_csa(values: dict[str, list[Any]], newer: bool = True) -> bytes:
    """A Siemens CSA header with these elements."""
    content = b"SV10\4\3\2\1" if newer else b""
    content += struct.pack("<II", len(values), 77)
    for name, items in values.items():
        content += struct.pack("<64si4siii", name.encode(), len(items), b"DS\0\0", 3, 6, 205)
        for n in range(6):
            raw = f"{items[n]}\0".encode() if n < len(items) else b""
            lengths = (len(raw),) * 4 if newer else (len(raw) + 6, len(raw), 77, len(raw) + 6)
            content += struct.pack("<4I", *lengths) + raw + b"\0" * (-len(raw) % 4)
    return content


def tiled(voxels: np.ndarray, columns: int) -> np.ndarray:
    """(N, Y, X) → one image, tiles along the rows."""
    n, y, x = voxels.shape
    image = np.zeros((math.ceil(n / columns) * y, columns * x), voxels.dtype)
    for k, pixels in enumerate(voxels):
        top, left = k // columns * y, k % columns * x
        image[top : top + y, left : left + x] = pixels
    return image


def write_siemens_mosaics(
    root: Path,
    volumes: np.ndarray,
    *,
    plane: Sequence[float],
    first: Sequence[float],
    step: float,
    spacing: Sequence[float] = (0.8, 0.5),
    sign: int = 1,
    drop: Sequence[str] = (),
    newer: bool = True,
    edit: Callable[[int, Dataset], None] | None = None,
    **attributes: Any,
) -> list[Path]:
    """Several volumes (T, N, Y, X), each as one mosaic with as many rows as columns of tiles.

    first  centre of the first voxel of tile 0; tile n lies n · step mm from it along sign · (row × column)
    drop   elements of the CSA header to leave out
    """
    side = math.ceil(math.sqrt(volumes.shape[1]))
    images = np.stack([tiled(np.pad(v, ((0, side**2 - len(v)), (0, 0), (0, 0))), side) for v in volumes])
    y, x = images[0].shape
    row, column = np.reshape(plane, (2, 3)).astype(float)
    corner = np.array(first) - 0.5 * spacing[1] * (x - x // side) * row - 0.5 * spacing[0] * (y - y // side) * column
    csa = {
        "EchoLinePosition": [32], "NumberOfImagesInMosaic": [volumes.shape[1]],
        "SliceNormalVector": [f"{sign * v:.8f}" for v in np.cross(row, column)],
    }  # fmt: skip

    def add_private(k: int, data: Dataset) -> None:
        block = data.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", siemens_csa({n: v for n, v in csa.items() if n not in drop}, newer))
        data.AcquisitionNumber = k + 1
        if edit:
            edit(k, data)

    settings = {
        "SOPClassUID": MR, "ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "RescaleIntercept": 0,
        "SpacingBetweenSlices": step, "SliceThickness": 3.0, "PixelSpacing": list(spacing),
        "ImageOrientationPatient": [round(float(v), 8) for v in np.ravel(plane)],
    }  # fmt: skip
    return write(root, images, positions=[corner] * len(images), edit=add_private, **settings | attributes)


@pytest.fixture(scope="session")
def write_mosaics() -> Callable[..., list[Path]]:
    return write_siemens_mosaics


@pytest.fixture(scope="session")
def make_csa() -> Callable[..., bytes]:
    return siemens_csa


@pytest.fixture(scope="session")
def tile() -> Callable[..., np.ndarray]:
    return tiled


def write_finished_store(root: Path, volumes: dict[str, Volume], *, refused: Sequence[Entry] = ()) -> Path:
    """A store as `prepare` leaves it: volumes by key, index, ledger with a used row for each, header."""
    open_for_writing(root, {"key": "k"})
    rows = [write_volume(root, key, v, patient="p", plane="axial") for key, v in volumes.items()]
    write_index(index_path(root), rows)
    used = [Entry(key=key, modality=v.modality, num_slices=v.shape[0]) for key, v in volumes.items()]
    write_entries(root / "ledger.parquet", [*used, *refused])
    write_header(root, {"key": "k", "status": "complete"})
    return root


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Path]:
    return write_finished_store


def random_volume(seed: int, shape: tuple[int, int, int] = (5, 70, 90)) -> Volume:
    """CT noise around a body, sheared and anisotropic."""
    rng = np.random.default_rng(seed)
    voxels = rng.integers(-1000, 1500, shape).astype(np.int16)
    voxels[:, : shape[1] // 3] = -1000
    affine = np.array([[0.1, 0.2, 0.7, -20 - seed], [0.0, 0.8, 0.1, 30], [2.5, 0.3, 0.0, 12.5], [0, 0, 0, 1]])
    return Volume(voxels=voxels, affine=affine, modality="CT", unit="HU")


@pytest.fixture(scope="session")
def make_volume() -> Callable[..., Volume]:
    return random_volume


def places_of(
    shape: Sequence[int],
    plane: Sequence[float],
    spacing: Sequence[float],
    start: Sequence[float],
    step: Sequence[float],
) -> np.ndarray:
    """(Z, Y, X, 3) LPS mm of every voxel, by PS3.3 C.7.6.2.1.1 alone. `spacing` is PixelSpacing: rows, columns."""
    row, column = np.reshape(plane, (2, 3)).astype(float)
    k, j, i = (n[..., None] for n in np.indices(shape))
    return np.array(start) + k * np.array(step) + j * spacing[0] * column + i * spacing[1] * row


@pytest.fixture(scope="session")
def places() -> Callable[..., np.ndarray]:
    return places_of


def check_places(vol: Volume, where: np.ndarray, values: np.ndarray) -> None:
    """`vol` holds the values (…) at the places (…, 3) in LPS mm, each exactly once, and nothing else."""
    assert vol.affine is not None
    index = np.linalg.solve(vol.affine[:3, :3], (where.reshape(-1, 3) - vol.affine[:3, 3]).T)
    near = np.rint(index).astype(int)
    np.testing.assert_allclose(index, near, atol=0.01)
    assert vol.voxels.size == values.size
    assert len(np.unique(near, axis=1).T) == values.size
    np.testing.assert_array_equal(vol.voxels[tuple(near)], values.ravel())


@pytest.fixture(scope="session")
def in_place() -> Callable[..., None]:
    return check_places


def encode_slice(path: Path, syntax: str) -> None:
    """Write one uncompressed slice again in another transfer syntax."""
    boxed, deflated_frames = UID("1.2.840.10008.1.2.1.98"), UID("1.2.840.10008.1.2.8.1")
    data = dcmread(path)
    list(data.iterall())  # pydicom writes unread elements as they were
    if syntax == ExplicitVRBigEndian:
        data.PixelData = data.pixel_array.astype(">u2").tobytes()
        data["PixelData"].VR = "OW"
    elif syntax in (boxed, deflated_frames):
        raw = data.PixelData
        if syntax == deflated_frames:
            packer = zlib.compressobj(wbits=-15)
            raw = packer.compress(raw) + packer.flush()
        box_items(data, itemize_fragment(raw + b"\0" * (len(raw) % 2)))
    elif syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        data.compress(syntax, generate_instance_uid=False)
    data.set_original_encoding(syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    data.file_meta.TransferSyntaxUID = boxed if syntax == deflated_frames else UID(syntax)
    dcmwrite(path, data)
    if syntax == deflated_frames:  # newer than the dictionary of pydicom
        path.write_bytes(path.read_bytes().replace(boxed.encode(), syntax.encode() + b"\0"))


def box_items(data: Dataset, items: bytes) -> None:
    """Encapsulate without an offset table."""
    data.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0" + items + b"\xfe\xff\xdd\xe0\0\0\0\0"
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True


@pytest.fixture(scope="session")
def encode_as() -> Callable[[Path, str], None]:
    return encode_slice


@pytest.fixture(scope="session")
def box() -> Callable[[Dataset, bytes], None]:
    return box_items
