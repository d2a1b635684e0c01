"""Parametric maps → volumes of real-world values."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from hilum.archive.dicom.parametric_map import PARAMETRIC_MAP, read
from hilum.errors import ScanRefused

POSITIONS = [(-12.5, 3.0, z) for z in (10.0, 4.0, 7.0, 1.0)]  # in no order
ORDER = [3, 1, 2, 0]


@pytest.fixture
def write_map(tmp_path, write_multiframe):
    def write(values, keyword, mapping=(1.0, 0.0), **attributes):
        def item(slope, intercept):
            item = Dataset()
            item.RealWorldValueSlope, item.RealWorldValueIntercept = slope, intercept
            if values.dtype.kind != "f":
                item.RealWorldValueFirstValueMapped, item.RealWorldValueLastValueMapped = 0, 1000
            return [item]

        given = {"PixelData": None, "SegmentSequence": None, "SegmentationType": None, "SOPClassUID": PARAMETRIC_MAP}
        given |= attributes | ({keyword: values.tobytes()} if keyword else {})
        positions = given.pop("positions", POSITIONS)
        path = write_multiframe(tmp_path / "map", values, positions, bits=values.dtype.itemsize * 8, **given)
        data = pydicom.dcmread(path)
        if isinstance(mapping, list):
            for groups, one in zip(data.PerFrameFunctionalGroupsSequence, mapping):
                groups.RealWorldValueMappingSequence = item(*one)
        elif mapping:
            data.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = item(*mapping)
        data.save_as(path)
        return path

    return write


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", np.float32), ("DoubleFloatPixelData", np.float64)])
def test_float_values_in_the_order_of_positions(write_map, keyword, dtype):
    values = np.random.default_rng(0).normal(size=(4, 7, 5)).astype(dtype)
    vol, notes = read(write_map(values, keyword))
    np.testing.assert_array_equal(vol.voxels, values[ORDER].astype(np.float32))
    assert (vol.kind, vol.modality, vol.unit, vol.voxels.dtype, notes) == ("intensity", "OT", "", np.float32, ())
    np.testing.assert_allclose(vol.affine, [[0, 0, 0.5, -12.5], [0, 0.8, 0, 3], [3, 0, 0, 1], [0, 0, 0, 1]], atol=1e-9)


def test_integers_become_real_world_values(write_map):
    """A slope and intercept for each frame; stored values beyond the mapped range are counted."""
    stored = np.arange(4 * 7 * 5).reshape(4, 7, 5).astype(np.uint16) * 8
    mapping = [(0.5, 10.0), (2.0, 0.0), (1e-6, -1.0), (-1.0, 3.0)]
    vol, notes = read(write_map(stored, "PixelData", mapping))
    wanted = np.array([frame * slope + intercept for frame, (slope, intercept) in zip(stored.astype(float), mapping)])
    np.testing.assert_allclose(vol.voxels, wanted[ORDER], rtol=1e-6)
    assert notes == (f"unmapped: {(stored > 1000).sum()} voxels beyond the range of the mapping",)


def test_maps_that_are_no_stack_are_refused(write_map):
    values = np.random.default_rng(0).normal(size=(4, 7, 5)).astype(np.float32)

    def refused(match, **given):
        with pytest.raises(ScanRefused, match=match):
            read(write_map(**({"values": values, "keyword": "FloatPixelData"} | given)))

    refused("missing_slices", positions=[(0, 0, z) for z in (0, 3, 6, 12)])
    refused("duplicate_positions", positions=[(0, 0, z) for z in (0, 3, 3, 6)])
    refused("corrupt: 4 frames, 3 of them described", positions=POSITIONS[:3])
    refused("corrupt: no real-world value mapping", mapping=None)
    refused("corrupt: real-world slope nan", mapping=(float("nan"), 0.0))
    refused("non_finite", mapping=(1e300, 0.0))
    refused("constant: all voxels 2", values=np.full((4, 7, 5), 2, np.float32))
    refused("truncated: 280 of 560 bytes", FloatPixelData=values[:2].tobytes(), keyword="")
    refused("truncated: no pixel data", keyword="")
    refused("other_object", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    refused("non_finite: 1 of 35 voxels", values=np.where(values == values[2, 3, 4], np.float32("nan"), values))


def test_a_real_map(real_data):
    path = real_data / "dicom" / "parametric_map" / "parametric_map_float.dcm"
    vol, _ = read(path)
    data = pydicom.dcmread(path)
    np.testing.assert_array_equal(vol.voxels[0], np.frombuffer(data.FloatPixelData, "<f4").reshape(128, 128))
    assert vol.spacing_mm == pytest.approx((5.0, 0.661468, 0.661468))
    assert vol.affine is not None
    np.testing.assert_allclose(vol.affine[:3, 3], (-158.135803, -179.035797, -75.699997))
