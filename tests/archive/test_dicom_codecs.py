"""Stored pixels → values: every encoding of the same voxels gives the same voxels, or is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames, itemize_fragment
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from hilum.archive import dicom
from hilum.archive.dicom import codecs
from hilum.archive.dicom.codecs import missing_decoder, stream_size, syntax_name
from hilum.archive.dicom.pixels import read_slice
from hilum.archive.intake import read_entry, read_scan
from hilum.archive.scan import find, scan
from hilum.errors import ScanRefused

MR = "1.2.840.10008.5.1.4.1.1.4"
BOXED, DEFLATED_FRAMES = UID("1.2.840.10008.1.2.1.98"), UID("1.2.840.10008.1.2.8.1")


def stored_values(bits, signed):
    low = -(1 << (bits - 1)) if signed else 0
    values = np.random.default_rng(bits).integers(low, low + (1 << bits), (5, 40, 36))
    return values.astype(np.int16 if signed else np.uint16)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless,
     JPEG2000Lossless, BOXED, DEFLATED_FRAMES],
)  # fmt: skip
def test_every_encoding_gives_the_same_voxels(write_series, encode_as, key, tmp_path, syntax, bits, signed):
    values = stored_values(bits, signed)
    paths = write_series(values, BitsStored=bits, HighBit=bits - 1, RescaleIntercept=-10, RescaleSlope=2)
    for path in paths:
        encode_as(path, syntax)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.detail, entry.repairs, entry.flags) == ("", "", (), ())
    assert entry.transfer_syntax == syntax_name(syntax) != "unknown transfer syntax"
    vol, repairs = read_entry(entry)
    assert repairs == ()
    np.testing.assert_array_equal(vol.voxels, values * 2.0 - 10)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_fragments_without_offset_table(write_series, box, syntax):
    paths = write_series(stored_values(12, False))
    plain, _ = dicom.read(paths)
    for path in paths:
        data = dcmread(path)
        data.compress(syntax, generate_instance_uid=False)
        (frame,) = generate_frames(data.PixelData, number_of_frames=1)
        third = len(frame) // 6 * 2
        box(data, b"".join(itemize_fragment(f) for f in (frame[:third], frame[third : 2 * third], frame[2 * third :])))
        data.save_as(path)
    np.testing.assert_array_equal(dicom.read(paths)[0].voxels, plain.voxels)


def test_syntax_without_decoder_is_refused_from_the_header_by_name(write_series, voxels, tmp_path, key):
    def edit(k, data):
        data.PixelData = encapsulate([b"\0" * 10])
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.92")

    paths = write_series(voxels, edit=edit)
    (entry,) = find(tmp_path / "archive", key)
    assert entry.reason == "cannot_decode"
    assert entry.detail.startswith("JPEG 2000 Part 2")
    assert entry.detail.endswith("no decoder is known for it")
    with pytest.raises(ScanRefused, match="cannot_decode: JPEG 2000 Part 2"):
        dicom.read(paths)


def test_missing_decoder_names_its_package(monkeypatch):
    missing_decoder.cache_clear()
    monkeypatch.setattr(type(get_decoder(RLELossless)), "is_available", property(lambda self: False))
    try:
        assert "JPEG 2000" in missing_decoder("1.2.840.10008.1.2.4.90", 12)
        assert missing_decoder("1.2.840.10008.1.2.4.90", 12).endswith("needs the package pylibjpeg-openjpeg")
        assert missing_decoder("1.2.840.10008.1.2.4.70", 12).endswith("needs the package python-gdcm")
        assert missing_decoder("1.2.840.10008.1.2.4.80", 12).endswith("needs the package pyjpegls")
    finally:
        missing_decoder.cache_clear()


def test_text_in_place_of_a_syntax_never_passes():
    for text in ("Secret^Name", "1.2.3.4.5", "", "1..2", "1.2.840.113619.5.2", "1.2.840.10008.5.1.4.1.1.2"):
        assert syntax_name(text) == "unknown transfer syntax"


@pytest.mark.parametrize("signed", [0, 1])
def test_monochrome1(write_series, voxels, tmp_path, key, signed):
    stored = voxels.astype(np.int16) - 900 if signed else voxels
    plain = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "RescaleIntercept": 0}
    vol, _ = dicom.read(write_series(stored, **plain))
    np.testing.assert_array_equal(vol.voxels, stored)
    (entry,) = find(tmp_path / "archive", key)
    assert entry.repairs == ("MONOCHROME1: values kept, they are HU",)
    vol, _ = dicom.read(write_series(stored, SOPClassUID=MR, **plain))
    np.testing.assert_array_equal(vol.voxels, (-1 if signed else 4095) - stored.astype(int))
    (entry,) = find(tmp_path / "archive", key)
    assert entry.repairs == ("MONOCHROME1: inverted",)


def with_padding(voxels, value):
    padded = voxels.astype(np.int16)
    padded[:, :2, :3] = value
    return padded


def test_padding_of_ct_becomes_air(write_series, voxels):
    padded = with_padding(voxels, -2000)
    unsigned = lambda k, data: data.add_new(0x00280120, "US", 65536 - 2000)  # noqa: E731  as some writers do
    vol, notes = dicom.read(write_series(padded, edit=unsigned, RescaleIntercept=-100))
    assert notes == ("36 padding pixels set to -1024 HU",)
    np.testing.assert_array_equal(vol.voxels, np.where(padded == -2000, -1024, padded.astype(int) - 100))


def test_padding_range(write_series, voxels):
    padded = with_padding(voxels, -2000)
    padded[:, 2, 3], padded[:, 3, 3] = -1990, -1989

    def edit(k, data):
        data.PixelPaddingValue, data.PixelPaddingRangeLimit = -2000, -1990

    vol, notes = dicom.read(write_series(padded, edit=edit, RescaleIntercept=0))
    assert notes == ("42 padding pixels set to -1024 HU",)
    assert (vol.voxels[:, 2, 3] == -1024).all()
    assert (vol.voxels[:, 3, 3] == -1989).all()


def test_padding_of_mr_and_padding_among_tissue_stay(write_series, voxels):
    padded = with_padding(voxels, 0)
    vol, notes = dicom.read(write_series(padded, PixelPaddingValue=0, RescaleIntercept=0))  # 0 HU: water
    np.testing.assert_array_equal(vol.voxels, padded)
    assert notes == ()
    vol, notes = dicom.read(write_series(padded, PixelPaddingValue=0, RescaleIntercept=0, SOPClassUID=MR))
    np.testing.assert_array_equal(vol.voxels, padded)
    assert notes == ()


def test_lossy_compression_is_flagged(write_series, voxels, tmp_path, key):
    write_series(voxels, LossyImageCompression="01", LossyImageCompressionRatio=[8.25, 2.0])
    assert scan(tmp_path / "archive", key)[0].flags == ("lossy: 8.25:1 and 2:1",)
    paths = write_series(voxels)
    assert scan(tmp_path / "archive", key)[0].flags == ()
    for path in paths:
        data = dcmread(path)
        data.compress(JPEGLSNearLossless, jls_error=2, generate_instance_uid=False)
        data.pop("LossyImageCompression", None)
        data.pop("LossyImageCompressionRatio", None)
        data.save_as(path)
    (entry,) = scan(tmp_path / "archive", key)
    assert entry.flags == ("lossy",)
    assert np.abs(read_scan(entry).voxels - (voxels.astype(int) - 1024)).max() == pytest.approx(1, abs=1)


def test_philips_values_are_the_displayed_ones(write_series, voxels, tmp_path, key):
    write_series(voxels, SOPClassUID=MR, Manufacturer="Philips Medical Systems", RescaleSlope=2.5, RescaleIntercept=0)
    (entry,) = scan(tmp_path / "archive", key)
    assert entry.flags == ("philips_scaling",)
    np.testing.assert_array_equal(read_scan(entry).voxels, voxels * 2.5)


def test_a_slice_of_impossible_size_is_not_decoded(write_series, box, voxels, tmp_path, key):
    def edit(k, data):
        data.Rows = data.Columns = 60000
        data.file_meta.TransferSyntaxUID = RLELossless
        box(data, itemize_fragment(b"\0" * 64))

    write_series(voxels, edit=edit)
    (entry,) = scan(tmp_path / "archive", key)
    assert (entry.reason, entry.detail) == ("too_large", "60000×60000")


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_stream_of_another_size_is_not_decoded(write_series, syntax):
    paths = write_series(stored_values(12, False))
    for path in paths:
        data = dcmread(path)
        data.compress(syntax, generate_instance_uid=False)
        data.Rows = 20
        data.save_as(path)
    with pytest.raises(ScanRefused, match=r"cannot_decode: .*: 40×36 pixels in the stream, 20×36 in the header"):
        dicom.read(paths)


def test_stream_sizes(real_data):
    folder = real_data / "dicom" / "ct_transfer_syntaxes_ge"
    sizes = []
    for path in folder.glob("JPEG*"):
        (frame,) = generate_frames(dcmread(path).PixelData, number_of_frames=1)
        sizes.append(stream_size(frame))
    assert sizes == [(512, 512)] * 3
    assert stream_size(b"\xff\xd8\xff\xff\xff\xc0\0\x0b\x08\0\x07\0\x09") == (7, 9)
    assert stream_size(b"\xff\xd8\xff") is stream_size(b"") is stream_size(b"\xff\xd8" + b"a" * 50) is None


def test_deflated_files_that_unpack_without_end(write_series, encode_as, voxels, tmp_path, key, monkeypatch):
    paths = write_series(np.zeros((1, 600, 600), np.uint16), SliceThickness=1.0)
    encode_as(paths[0], DeflatedExplicitVRLittleEndian)
    assert [e.reason for e in scan(tmp_path / "archive", key)] == [""]
    monkeypatch.setattr(codecs, "MAX_INFLATED", 500_000)
    assert [(e.reason, e.detail) for e in scan(tmp_path / "archive", key)] == [
        ("too_large", "more than 500000 bytes when unpacked")
    ]
    with pytest.raises(ScanRefused, match="too_large"):
        dicom.read(paths)


# pydicom's own files; their values as pydicom's documentation and its plain twins state them.


@pytest.mark.parametrize("twin", ["_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless"])
def test_twins_of_one_small_mr(twin):
    _, plain, _ = read_slice(Path(get_testdata_file("MR_small.dcm")))
    _, other, _ = read_slice(Path(get_testdata_file(f"MR_small{twin}.dcm")))
    np.testing.assert_array_equal(plain, other)


def test_jpeg2000_with_the_wrong_sign():
    header, pixels, _ = read_slice(Path(get_testdata_file("J2K_pixelrep_mismatch.dcm")))
    assert (header.modality, pixels.dtype) == ("CT", np.int16)
    assert pixels[0, 0] == -2000  # outside the field of view
    assert pixels.min() == -2000
