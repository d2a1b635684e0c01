"""Whatever the plane, the order of the files, their names, folders and form: every voxel lies where it was put.

Voxels carry numbers that occur once, so that a value in the wrong place cannot hide. Where each belongs is computed from
the attributes by PS3.3 C.7.6.2.1.1, without the package.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from hilum.archive.files import nifti
from hilum.archive.intake import read_scan
from hilum.archive.scan import scan
from hilum.archive.store.export import export_nifti
from hilum.archive.store.store import Store
from hilum.volume import Volume

MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
KEY = "0123456789abcdef0123456789abcdef"
HOW_MANY = pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.nightly)])
NAMES = ["im", "IMG.dcm", "a.png", "é", "0", "DICOMDIR", "x.nii.gz", "-", "a b", "zz"]


def holds(examples: int, *strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], None]:
    """Run a property now, on the same examples each time."""

    def run(check: Callable[..., None]) -> None:
        every = settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        every(given(*strategies)(check))()

    return run


@dataclass(frozen=True)
class Acquisition:
    """How a stack lies in the patient; `step` (3,) leads from slice to slice, along the normal or (tilt) leaning."""

    shape: tuple[int, int, int]
    plane: tuple[float, ...]
    spacing: tuple[float, float]
    start: tuple[float, ...]
    step: tuple[float, ...]

    @property
    def voxels(self) -> np.ndarray:
        """Numbers that occur once, in no order: neither a label map nor a ramp."""
        count = int(np.prod(self.shape))
        return np.random.default_rng(count).permutation(count).reshape(self.shape).astype(np.uint16)

    @property
    def affine(self) -> np.ndarray:
        """(k, j, i, 1) → LPS mm."""
        row, column = np.reshape(self.plane, (2, 3))
        affine = np.eye(4)
        affine[:3] = np.stack([self.step, column * self.spacing[0], row * self.spacing[1], self.start], 1)
        return affine


def lengths(low: float, high: float) -> st.SearchStrategy:
    return st.floats(low, high).map(lambda v: round(v, 4))


@st.composite
def acquisitions(draw: st.DrawFn, *, lean: bool = True, most: int = 6) -> Acquisition:
    """Any rotation of the plane, either direction through it; a lean of up to 45° within the plane (gantry tilt)."""
    angles = draw(st.tuples(*[st.integers(-180, 180)] * 3) | st.tuples(*[st.sampled_from([-90, 0, 90, 180])] * 3))
    row, column = Rotation.from_euler("xyz", angles, degrees=True).as_matrix().T[:2].round(8)
    column = column * draw(st.sampled_from([1, -1]))
    distance = draw(lengths(0.3, 8)) * draw(st.sampled_from([1, -1]))
    step = distance * np.cross(row, column)
    if lean and draw(st.booleans()):
        step += abs(distance) * (draw(lengths(-1, 1)) * row + draw(lengths(-1, 1)) * column)
    return Acquisition(
        shape=draw(st.tuples(st.integers(2, most), st.integers(3, 9), st.integers(3, 9))),
        plane=tuple(np.ravel([row, column]).tolist()),
        spacing=draw(st.tuples(lengths(0.2, 4), lengths(0.2, 4))),
        start=draw(st.tuples(*[lengths(-300, 300)] * 3)),
        step=tuple(step.tolist()),
    )


def geometry(a: Acquisition) -> dict[str, object]:
    return {"ImageOrientationPatient": list(a.plane), "PixelSpacing": list(a.spacing)}


@HOW_MANY
def test_files_in_any_order_under_any_name_in_any_folder(examples, write_series_to, places, in_place, key):
    @holds(examples, acquisitions(), st.integers(1, 3), st.randoms(use_true_random=False))
    def check(a, echoes, rng):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for echo in range(echoes):
                write_series_to(
                    root, a.voxels + 1000 * echo, start=a.start, step=a.step, SOPClassUID=MR, RescaleIntercept=0,
                    prefix=f"{echo}_", EchoTime=10.0 + echo, **geometry(a),
                    edit=lambda k, d, e=echo: setattr(d, "SOPInstanceUID", f"1.2.{e}.{k}"),
                )  # fmt: skip
            straight = {int(v.voxels.min()): v for v in map(read_scan, scan(root / "archive", key))}
            assert sorted(straight) == [1000 * n for n in range(echoes)]
            files = sorted((root / "archive").iterdir())
            rng.shuffle(files)
            for n, path in enumerate(files):
                other = root / "again" / "/".join(rng.choices("abc", k=rng.randrange(3)))
                other.mkdir(parents=True, exist_ok=True)
                path.rename(other / f"{n}{rng.choice(NAMES)}")
            found = scan(root / "again", key)
            assert [(e.verdict, e.num_slices) for e in found] == [("used", a.shape[0])] * echoes
            assert {e.split_by for e in found} == {"" if echoes == 1 else "EchoTime"}
            where = places(a.shape, a.plane, a.spacing, a.start, a.step)
            for vol in map(read_scan, found):
                low = int(vol.voxels.min())
                in_place(vol, where, a.voxels.astype(int) + low)
                same = straight.pop(low)
                assert vol.voxels.tobytes() == same.voxels.tobytes()
                assert vol.affine.tobytes() == same.affine.tobytes()
            assert not straight


@HOW_MANY
def test_frames_of_one_file_in_any_order(examples, write_multiframe, places, in_place, key):
    @holds(examples, acquisitions(), st.randoms(use_true_random=False))
    def check(a, rng):
        order = rng.sample(range(a.shape[0]), a.shape[0])
        where = places(a.shape, a.plane, a.spacing, a.start, a.step)
        with tempfile.TemporaryDirectory() as folder:
            write_multiframe(
                Path(folder, "x"), a.voxels[order], where[order, 0, 0], orientation=a.plane, spacing=a.spacing, bits=16,
                PixelData=a.voxels[order].tobytes(), SOPClassUID=ENHANCED_MR, SegmentSequence=None, SegmentationType=None,
            )  # fmt: skip
            (entry,) = scan(folder, key)
            assert (entry.verdict, entry.num_slices) == ("used", a.shape[0])
            in_place(read_scan(entry), where, a.voxels)


@HOW_MANY
def test_mosaics_of_any_plane(examples, write_mosaics, places, in_place, key):
    @holds(examples, acquisitions(lean=False, most=9))
    def check(a):
        normal = np.cross(a.plane[:3], a.plane[3:])
        sign = 1 if normal @ a.step > 0 else -1
        with tempfile.TemporaryDirectory() as folder:
            write_mosaics(Path(folder), a.voxels[None] + 1, plane=a.plane, first=a.start, sign=sign, spacing=a.spacing,
                          step=round(float(np.linalg.norm(a.step)), 6))  # fmt: skip
            (entry,) = scan(folder, key)
            in_place(read_scan(entry), places(a.shape, a.plane, a.spacing, a.start, a.step), a.voxels + 1)


def write_itk(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Voxels (k, j, i) with the affine of `Volume`."""
    image = sitk.GetImageFromArray(voxels)
    steps = affine[:3, 2::-1]
    image.SetSpacing(np.linalg.norm(steps, axis=0).tolist())
    image.SetDirection((steps / np.linalg.norm(steps, axis=0)).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(image, str(path))


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(voxels.T, ras), path)


@HOW_MANY
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.mha", "x.nrrd"])
def test_other_forms_stored_along_any_axes_equal_the_dicom(examples, name, write_series_to, places, in_place, key):
    axes = st.permutations(range(3)), st.tuples(*[st.sampled_from([1, -1])] * 3)

    @holds(examples, acquisitions(lean=name.startswith("x.nii")), *axes)
    def check(a, order, signs):
        where = places(a.shape, a.plane, a.spacing, a.start, a.step)
        voxels, affine = a.voxels.astype(np.int16).transpose(order), a.affine[:, [*order, 3]]
        for axis, sign in enumerate(signs):
            if sign < 0:
                voxels = np.flip(voxels, axis)
                affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
                affine[:3, axis] *= -1
        with tempfile.TemporaryDirectory() as folder:
            write = write_nifti if ".nii" in name else write_itk
            write(Path(folder, name), np.ascontiguousarray(voxels), affine)
            write_series_to(Path(folder), a.voxels, start=a.start, step=a.step, RescaleIntercept=0, **geometry(a))
            found = {e.reader: e for e in scan(folder, key)}
            assert [e.verdict for e in found.values()] == ["used", "used"]
            for entry in found.values():
                in_place(read_scan(entry), where, a.voxels)


@HOW_MANY
def test_a_store_and_its_export_keep_every_voxel_in_place(examples, write_store, places, in_place):
    @holds(examples, acquisitions(), st.booleans(), st.randoms(use_true_random=False))
    def check(a, scaled, rng):
        where = places(a.shape, a.plane, a.spacing, a.start, a.step)
        voxels = a.voxels.astype(np.int16)
        unit = np.float32(0.25) if scaled else 1
        vol = Volume(voxels=voxels * unit, affine=a.affine, modality="MR")
        start = tuple(rng.randrange(n) for n in a.shape)
        box = tuple(rng.randint(1, n - first) for n, first in zip(a.shape, start))
        cut = tuple(slice(first, first + n) for first, n in zip(start, box))

        def whole(found):
            assert np.abs(found.voxels / unit - np.rint(found.voxels / unit)).max() < 0.01
            return replace(found, voxels=np.rint(found.voxels / unit))

        with tempfile.TemporaryDirectory() as folder:
            store = Store(write_store(Path(folder, "store"), {KEY: vol}))
            assert (store.row(KEY).slope == 1) is not scaled
            read = whole(store.read_volume(KEY))
            in_place(read, where, voxels)
            in_place(whole(store.read_crop(KEY, start, box)), where[cut], voxels[cut])
            pixels, _ = store.read_slice(KEY, start[0])
            np.testing.assert_array_equal(np.rint(pixels / unit), read.voxels[start[0]])
            export_nifti(store.root, Path(folder, "out"), num_workers=1)
            again, _ = nifti.read(Path(folder, "out", f"{KEY}.nii.gz"))
            in_place(whole(again), where, voxels)
