"""`embed` on files: what is written, what is kept, and that an interruption leaves no trace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hilum.archive.phantom import write_phantom
from hilum.archive.prepare import prepare
from hilum.archive.privacy import Key
from hilum.archive.reasons import REASONS
from hilum.encode.table import embed as embed_module
from hilum.encode.table.embed import embed
from hilum.encode.table.patches import read_patches
from hilum.errors import InputError, LabelsError, UsageError
from hilum.probe.labels import read_features
from hilum.records import read_table, table_metadata


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients, CT and MR, of 8 slices; one localizer a patient, a text page and a truncated slice."""
    folder = tmp_path_factory.mktemp("archive")
    write_phantom(folder, num_patients=2, num_slices=8, matrix=32, seed=0)
    return folder


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Nine small NIfTI scans of 3 to 11 slices, one label map, one broken file."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    for n in range(9):
        write_nifti(folder / f"case{n}.nii.gz", n, 3 + n)
    (folder / "broken.nii.gz").write_bytes((folder / "case1.nii.gz").read_bytes()[:200])
    labels = nib.Nifti1Image(np.eye(12, dtype=np.uint8)[:, :, None].repeat(4, 2), np.eye(4))
    nib.save(labels, folder / "labels.nii.gz")
    return folder


def write_nifti(path: Path, seed: int, num_slices: int) -> None:
    rng = np.random.default_rng(seed)
    voxels = rng.normal(200, 80, (20, 24, num_slices)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def run(source: Path | str, out: Path, key: Key, **given) -> dict:
    return embed(source, model="pixels", out=out, key=key, **{"num_workers": 1, **given})


class Killed(BaseException):
    """A kill: nothing catches it."""


def test_every_scan_is_in_the_table_or_counted(archive, tmp_path, key):
    report = run(archive / "scans", tmp_path / "f.parquet", key)
    assert (report["num_scans"], report["num_rows"], report["num_encoded"]) == (4, 4 * 8, 5)
    assert report["set_aside"] == {"localizer": 2, "secondary_capture": 1}
    (bad,) = report["left_out"]
    assert REASONS[bad["reason"].split(":")[0]].fault
    table = read_table(tmp_path / "f.parquet")
    assert table["series"].to_pylist() == sorted(table["series"].to_pylist())
    (row,) = [r for r in table.to_pylist() if r["reason"]]
    assert (row["vector"], row["series"], row["item"]) == (None, bad["series"], bad["series"])
    assert table_metadata(table)["set_aside"] == report["set_aside"]
    features = read_features(tmp_path / "f.parquet")
    assert (len(features.vectors), features.failed) == (32, 1)


def test_no_identifier_is_written(archive, tmp_path, key):
    run(archive / "scans", tmp_path / "f.parquet", key, patches=True)
    secrets = [b"PHANTOM0", b"Phantom^", b"1.2.826", str(archive).encode(), b"scans/"]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or not any(secret in path.read_bytes() for secret in secrets), path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_table_is_the_same_whatever_read_it(archive, tmp_path, key, workers):
    run(archive / "scans", tmp_path / "f.parquet", key)
    run(archive / "scans", tmp_path / "g.parquet", key, num_workers=workers)
    assert (tmp_path / "f.parquet").read_bytes() == (tmp_path / "g.parquet").read_bytes()


def test_store_and_files_agree(archive, tmp_path, key):
    prepare(archive / "scans", tmp_path / "store", key=key)
    run(archive / "scans", tmp_path / "f.parquet", key)
    run(tmp_path / "store", tmp_path / "g.parquet", key)
    files, store = (read_features(tmp_path / f"{name}.parquet") for name in "fg")
    assert files.column("item") == store.column("item")
    np.testing.assert_allclose(files.vectors, store.vectors, atol=1e-5)


# ---- interrupted, changed, again


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(volumes, tmp_path, key, monkeypatch, after):
    monkeypatch.setattr("hilum.encode.table.resume.SHARD_SLICES", 20)
    options = {"patches": True, "level": "slice"}
    run(volumes, tmp_path / "whole" / "f.parquet", key, **options)
    out, write, written = tmp_path / "f.parquet", embed_module.write_shard, []

    def stop(shard, *rest) -> None:
        if len(written) == after:
            raise Killed
        written.extend([shard])
        write(shard, *rest)

    monkeypatch.setattr(embed_module, "write_shard", stop)
    with pytest.raises(Killed):
        run(volumes, out, key, **options)
    monkeypatch.setattr(embed_module, "write_shard", write)
    report = run(volumes, out, key, **options)
    assert report["num_encoded"] == 11 - sum(len(shard.series) for shard in written)
    assert not (tmp_path / "f.parquet.parts").exists()
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file() and "inputs" not in path.name:
            assert (tmp_path / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("step", ["merge", "write_inputs", "clear_away"])
def test_a_kill_at_the_end_loses_nothing(volumes, tmp_path, key, monkeypatch, step):
    run(volumes, tmp_path / "whole.parquet", key)
    out = tmp_path / "f.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(embed_module, step, lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(volumes, out, key)
    assert run(volumes, out, key)["num_encoded"] == 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "f.parquet.parts").exists()


def test_a_process_killed_from_outside_leaves_what_it_finished(volumes, tmp_path, key):
    code = f"""
import os, signal
from pathlib import Path
from hilum.archive.privacy import Key
from hilum.encode.table import embed as module, resume
resume.SHARD_SLICES = 20
write = module.write_shard
def last(shard, *rest):
    write(shard, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
module.write_shard = last
module.embed({str(volumes)!r}, model="pixels", out={str(tmp_path / "f.parquet")!r}, key=Key(bytes(range(32))), num_workers=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert 0 < run(volumes, tmp_path / "f.parquet", key)["num_encoded"] < 11


def test_a_finished_table_is_confirmed_without_reading_scans(volumes, tmp_path, key, monkeypatch):
    first = run(volumes, tmp_path / "f.parquet", key)
    before = (tmp_path / "f.parquet").stat()
    monkeypatch.setattr("hilum.encode.table.sources.find", lambda *_, **__: pytest.fail("scans were looked for"))
    again = run(volumes, tmp_path / "f.parquet", key)
    assert again == first | {"num_encoded": 0}
    assert (tmp_path / "f.parquet").stat() == before


def test_only_what_changed_is_encoded_again(volumes, tmp_path, key):
    out = tmp_path / "f.parquet"
    run(volumes, out, key, patches=True)
    before = {r["series"]: r for r in read_table(out).to_pylist()}
    times = (volumes / "case0.nii.gz").stat()
    write_nifti(volumes / "case0.nii.gz", 77, 3)  # other content under the same name, size and time as near as may be
    os.utime(volumes / "case0.nii.gz", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.utime(volumes / "case1.nii.gz")  # touched only
    shutil.copy(volumes / "case2.nii.gz", tmp_path / "copy")
    shutil.move(tmp_path / "copy", volumes / "case2.nii.gz")  # another file with the same content
    (volumes / "case3.nii.gz").unlink()
    write_nifti(volumes / "new.nii.gz", 5, 4)
    assert run(volumes, out, key, patches=True)["num_encoded"] == 2
    after = {r["series"]: r for r in read_table(out).to_pylist()}
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    assert (len(gone), len(new)) == (1, 1)
    changed = {s for s in after.keys() & before.keys() if after[s]["content"] != before[s]["content"]}
    assert len(changed) == 1
    names = {row["patches"] for row in after.values() if row["patches"]}
    assert {p.name for p in (tmp_path / "f.patches").iterdir()} == names
    run(volumes, tmp_path / "whole.parquet", key, patches=True)
    whole, found = (read_features(tmp_path / name) for name in ("whole.parquet", "f.parquet"))
    assert whole.table.equals(found.table)
    np.testing.assert_allclose(whole.vectors, found.vectors, atol=1e-6)


def test_lost_patch_tokens_are_made_again(volumes, tmp_path, key):
    run(volumes, tmp_path / "f.parquet", key, patches=True)
    next((tmp_path / "f.patches").iterdir()).unlink()
    assert run(volumes, tmp_path / "f.parquet", key, patches=True)["num_encoded"] == 1


def test_without_its_companion_a_table_is_checked_by_content(volumes, tmp_path, key):
    run(volumes, tmp_path / "f.parquet", key)
    (tmp_path / "f.inputs.parquet").write_bytes(b"broken")
    assert run(volumes, tmp_path / "f.parquet", key)["num_encoded"] == 0


@pytest.mark.parametrize("change", [{"level": "volume"}, {"pooling": "mean"}, {"max_slices": 2}, {"patches": True}])
def test_other_settings_make_another_table(volumes, tmp_path, key, change):
    run(volumes, tmp_path / "f.parquet", key)
    assert run(volumes, tmp_path / "f.parquet", key, **change)["num_encoded"] == 11
    run(volumes, tmp_path / "g.parquet", key, **change)
    assert (tmp_path / "f.parquet").read_bytes() == (tmp_path / "g.parquet").read_bytes()


def test_several_devices_make_one_table(volumes, tmp_path, key, monkeypatch):
    run(volumes, tmp_path / "f.parquet", key)
    run(volumes, tmp_path / "g.parquet", key, device="cpu,cpu", num_workers=2)
    assert (tmp_path / "f.parquet").read_bytes() == (tmp_path / "g.parquet").read_bytes()


def test_on_ray(volumes, tmp_path, key):
    pytest.importorskip("ray", reason="ray is not installed")
    run(volumes, tmp_path / "f.parquet", key)
    run(volumes, tmp_path / "g.parquet", key, engine="ray")
    assert (tmp_path / "f.parquet").read_bytes() == (tmp_path / "g.parquet").read_bytes()


# ---- what cannot be done is said


def test_a_file_that_is_no_table_is_not_overwritten(volumes, tmp_path, key):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match="no feature table"):
        run(volumes, tmp_path / "f.parquet", key)
    (tmp_path / "f.parquet").write_text("mine")
    with pytest.raises(InputError, match="cannot be read as a feature table"):
        run(volumes, tmp_path / "f.parquet", key)
    assert (tmp_path / "f.parquet").read_text() == "mine"


def test_nothing_to_encode_is_an_error_that_says_why(tmp_path, key):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("no image")
    with pytest.raises(InputError, match=r"nothing in in could be encoded: 1 set aside as not_an_image"):
        run(tmp_path / "in", tmp_path / "f.parquet", key)
    (tmp_path / "in" / "b.nii").write_bytes(b"\\x5c\\1\\0\\0" + bytes(400))
    with pytest.raises(InputError):
        run(tmp_path / "in", tmp_path / "f.parquet", key)
    assert not (tmp_path / "f.parquet").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": "voxel"}, "level 'voxel' is unknown"),
        ({"pooling": "median"}, "pooling 'median' is unknown"),
        ({"across": "class"}, "across 'class' is unknown"),
        ({"max_slices": 0}, "at least 1"),
        ({"level": "region"}, "needs --masks"),
        ({"layers": (-2,)}, "no layers to choose from"),
        ({"form": "xlsx"}, "'xlsx' of f.parquet is unknown"),
        ({"engine": "slurm"}, "engine 'slurm' is unknown"),
    ],
)
def test_wrong_settings(volumes, tmp_path, key, given, message):
    with pytest.raises(UsageError, match=message):
        run(volumes, tmp_path / "f.parquet", key, **given)


def test_masks_that_fit_no_scan(volumes, tmp_path, key):
    (tmp_path / "m").mkdir()
    shutil.copy(volumes / "labels.nii.gz", tmp_path / "m" / "other.nii.gz")
    with pytest.raises(LabelsError, match="no mask of m belongs to a scan"):
        run(volumes, tmp_path / "f.parquet", key, level="region", masks=tmp_path / "m")


# ---- patch tokens


def test_patch_tokens_lie_where_their_pixels_do(volumes, tmp_path, key):
    run(volumes, tmp_path / "f.parquet", key, patches=True)
    row = next(r for r in read_table(tmp_path / "f.parquet").to_pylist() if r["slice"] == 2)
    path = tmp_path / "f.patches" / row["patches"]
    whole, one = read_patches(path), read_patches(path, slice=2)
    assert whole.tokens.dtype == np.float16
    assert whole.grid == whole.tokens.shape[:3]
    np.testing.assert_array_equal(one.tokens[0], whole.tokens[2])
    assert whole.facts["series"] == row["series"]
    assert whole.facts["contract"] == row["contract"]
    # NIfTI of 20×24 pixels of 1 mm in a RAS frame, 8 patches a side: the field begins half a pixel before the first
    # centre. Rows run to P, columns to L: the first patch is the most anterior on the right.
    assert whole.affine is not None and whole.affines is not None  # noqa: PT018
    dy, dx = 24 / 8, 20 / 8
    first = whole.affine @ [0, 0, 0, 1]
    last = whole.affine @ [2, 7, 7, 1]
    np.testing.assert_allclose(first[:3], [-19.5 + dx / 2, -23.5 + dy / 2, 0])
    np.testing.assert_allclose(last[:3], [0.5 - dx / 2, 0.5 - dy / 2, 6])
    np.testing.assert_allclose(whole.affines[2] @ [0, 7, 7, 1], last)


def test_patch_files_that_are_not_ours(tmp_path):
    (tmp_path / "a.b2nd").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as patch tokens"):
        read_patches(tmp_path / "a.b2nd")
    with pytest.raises(InputError, match="cannot be read as patch tokens"):
        read_patches(tmp_path / "none.b2nd")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"batch_size": 0}, "expected at least 1"),
        ({"num_workers": -1}, "expected at least 1"),
        ({"device": "cpu,"}, "empty device"),
        ({"masks": "m.csv"}, "add --level region"),
    ],
)
def test_settings_that_mean_nothing_are_refused(volumes, tmp_path, key, given, told):
    with pytest.raises(UsageError, match=told):
        run(volumes, tmp_path / "f.parquet", key, **given)


def test_a_source_of_which_nothing_can_be_encoded_leaves_nothing(volumes, tmp_path, key):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"nothing in broken\.nii\.gz could be encoded"):
        run(volumes / "broken.nii.gz", tmp_path / "out" / "f.parquet", key)
    assert not list((tmp_path / "out").iterdir())
