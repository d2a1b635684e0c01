"""Other forms of the table, and the container form of the competition, written and read."""

import csv
import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

from hilum.archive.one import read
from hilum.archive.privacy import Key
from hilum.encode.encoder import pixel_encoder
from hilum.encode.regions import competition_vector
from hilum.encode.table.embed import embed
from hilum.encode.table.outputs import import_y_hat
from hilum.errors import InputError, UsageError
from hilum.probe.labels import match_cases, read_features, read_labels
from hilum.records import read_table


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Three CT of a container's input folder, in three spellings of NIfTI, and one broken file."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for n, name in enumerate(("case1.nii.gz", "case2.nii", "case.3.nii.gz")):
        voxels = np.random.default_rng(n).normal(0, 300, (16, 18, 5)).clip(-1024, 2000).astype(np.int16)
        voxels[:4] = -1024  # air, so that it is known as CT
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), folder / name)
    (folder / "broken.nii.gz").write_bytes((folder / "case1.nii.gz").read_bytes()[:900])
    return folder


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> list:
    """The competition's rule, replaced: what it is called with, and a vector that says which mask it saw."""
    calls: list = []

    def competition_vector(encoder, volume, mask, batch_size):
        calls.append((volume, mask))
        share = 0.0 if mask is None else float((mask.voxels > 0).mean())
        return np.array([float(volume.voxels.astype(float).mean()), share, 3], np.float64)

    monkeypatch.setattr("hilum.encode.table.outputs.competition_vector", competition_vector)
    return calls


def run(source: Path, out: Path, key: Key, **given) -> dict:
    return embed(source, model="pixels", out=out, key=key, **{"num_workers": 1, **given})


def test_the_container_form(inputs, tmp_path, key, rule):
    report = run(inputs, tmp_path / "outputs", key, form="y_hat")
    assert (report["num_scans"], report["num_encoded"], len(report["left_out"])) == (3, 4, 1)
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == ["case.3.h5", "case1.h5", "case2.h5"]
    for name, source in (("case1", "case1.nii.gz"), ("case2", "case2.nii")):
        with h5py.File(tmp_path / "outputs" / f"{name}.h5") as file:
            vector = file["y_hat"][()]
        assert (vector.dtype, vector.shape) == (np.float32, (3,))
        mean = np.asarray(nib.load(inputs / source).dataobj).mean()
        assert vector[0] == pytest.approx(mean, rel=1e-5)
    shutil.copy(inputs / "case2.nii", inputs / "case1.nii.gz.new")
    nib.save(nib.load(inputs / "case2.nii"), inputs / "case1.nii.gz")
    (inputs / "case1.nii.gz.new").unlink()
    assert run(inputs, tmp_path / "outputs", key, form="y_hat")["num_encoded"] == 2  # and the broken one is tried again


def test_masks_of_the_container(inputs, tmp_path, key, rule, monkeypatch):
    masks = tmp_path / "masks"
    masks.mkdir()
    labels = np.zeros((16, 18, 5), np.uint8)
    labels[:8] = 1
    nib.save(nib.Nifti1Image(labels, np.diag([1.0, 1.0, 3.0, 1.0])), masks / "case2.nii.gz")
    monkeypatch.setenv("MASKS_DIR", str(masks))
    run(inputs, tmp_path / "outputs", key, form="y_hat")
    shares = {}
    for path in (tmp_path / "outputs").iterdir():
        with h5py.File(path) as file:
            shares[path.stem] = float(file["y_hat"][1])
    assert shares == {"case1": 0.0, "case2": 0.5, "case.3": 0.0}
    monkeypatch.setenv("MASKS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="MASKS_DIR"):
        run(inputs, tmp_path / "outputs", key, form="y_hat")


def test_one_name_for_two_scans_is_refused(inputs, tmp_path, key, rule):
    shutil.copytree(inputs, inputs / "again")
    with pytest.raises(UsageError, match="several scans have one file name"):
        run(inputs, tmp_path / "outputs", key, form="y_hat")


def test_features_of_others_come_back(inputs, tmp_path, key, rule):
    run(inputs, tmp_path / "outputs", key, form="y_hat")
    with h5py.File(tmp_path / "outputs" / "damaged.h5", "w") as file:
        file["y_hat"] = np.array([1, np.nan, 2], np.float32)
    report = import_y_hat(tmp_path / "outputs", tmp_path / "f.parquet", model="curia-team", key=key)
    assert (report["num_rows"], len(report["left_out"])) == (3, 1)
    features = read_features(tmp_path / "f.parquet")
    assert (features.level, features.model, features.failed) == ("volume", "curia-team", 1)
    (tmp_path / "labels.csv").write_text("file,age\ncase1,50\ncase2,60\ncase.3,70\n")
    cases = match_cases(
        features, read_labels(tmp_path / "labels.csv"), target="age", groups=None, patients=None, key=key
    )
    assert sorted(cases.target) == ["50", "60", "70"]
    assert cases.left_out["scans that could not be encoded"] == 1
    for name, age in (("case1", "50"), ("case.3", "70")):
        with h5py.File(tmp_path / "outputs" / f"{name}.h5") as file:
            np.testing.assert_array_equal(features.vectors[cases.index[cases.target.index(age)]], file["y_hat"][()])


def test_folders_that_are_no_container_output(tmp_path, key):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"holds no \.h5 file"):
        import_y_hat(tmp_path / "a", tmp_path / "f.parquet", model="x", key=key)
    with h5py.File(tmp_path / "a" / "1.h5", "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(InputError, match="holds no vector y_hat"):
        import_y_hat(tmp_path / "a", tmp_path / "f.parquet", model="x", key=key)
    for number, length in ((1, 3), (2, 4)):
        with h5py.File(tmp_path / "a" / f"{number}.h5", "w") as file:
            file["y_hat"] = np.zeros(length, np.float32)
    with pytest.raises(InputError, match=r"lengths \[3, 4\]"):
        import_y_hat(tmp_path / "a", tmp_path / "f.parquet", model="x", key=key)


def test_csv_and_npz_hold_what_the_table_holds(inputs, tmp_path, key):
    report = run(inputs, tmp_path / "f.csv", key)
    assert report["num_rows"] == 15
    table = read_table(tmp_path / "f.parquet")
    with open(tmp_path / "f.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [r["item"] for r in rows] == table["item"].to_pylist()
    assert [r["reason"] for r in rows] == [r or "" for r in table["reason"].to_pylist()]
    for row, vector in zip(rows, table["vector"].to_pylist()):
        found = [row[f"v{n}"] for n in range(1024)]
        if vector is None:
            assert set(found) == {""}
        else:
            np.testing.assert_array_equal(np.array(found, np.float32), np.array(vector, np.float32))
    assert run(inputs, tmp_path / "f.npz", key)["num_encoded"] == 0
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        features = read_features(tmp_path / "f.parquet")
        np.testing.assert_array_equal(arrays["vectors"], features.vectors)
        assert arrays["item"].tolist() == features.column("item")
        assert arrays["slice"].dtype == np.int32
        assert arrays["failed"].shape == (1, 2)
    assert pq.read_schema(tmp_path / "f.parquet").field("vector").type.list_size == 1024


def test_the_rule_itself_on_files(inputs, tmp_path, key):
    """Without the stand-in: the vector is what the rule gives for the scan that `hilum.read` reads."""
    run(inputs, tmp_path / "outputs", key, form="y_hat")
    encoder = pixel_encoder()
    for path in (tmp_path / "outputs").iterdir():
        source = next(p for p in inputs.iterdir() if p.name.startswith(path.stem + ".nii"))
        with h5py.File(path) as file:
            np.testing.assert_allclose(file["y_hat"][()], competition_vector(encoder, read(source, key=key)), atol=1e-6)


def test_the_table_is_never_overwritten_by_its_other_form(inputs, tmp_path, key):
    with pytest.raises(UsageError, match=r"expected f\.csv"):
        run(inputs, tmp_path / "f.parquet", key, form="csv")
    assert not (tmp_path / "f.parquet").exists()


def test_a_scan_that_is_refused_now_has_no_vector_of_before(inputs, tmp_path, key, rule):
    out, source = tmp_path / "outputs", inputs / "case1.nii.gz"
    run(inputs, out, key, form="y_hat")
    source.write_bytes(source.read_bytes()[:900])
    assert len(run(inputs, out, key, form="y_hat")["left_out"]) == 2
    assert sorted(p.name for p in out.iterdir()) == ["case.3.h5", "case2.h5"]


def test_what_the_form_of_the_container_cannot_do(inputs, tmp_path, key):
    for given in ({"max_slices": 2}, {"pooling": "mean"}, {"patches": True}, {"level": "slice"}):
        with pytest.raises(UsageError, match="follows the rule of the competition"):
            run(inputs, tmp_path / "outputs", key, form="y_hat", **given)


def test_vectors_of_others_in_every_form(inputs, tmp_path, key, rule):
    run(inputs, tmp_path / "outputs", key, form="y_hat")
    for name in ("f.csv", "f.npz", "f.parquet"):
        import_y_hat(tmp_path / "outputs", tmp_path / name, model="m", key=key)
    lines = (tmp_path / "f.csv").read_text().splitlines()
    assert lines[0].endswith(",v0,v1,v2")
    assert len(lines) == 4
    assert np.load(tmp_path / "f.npz")["vectors"].shape == (3, 3)
    assert pq.read_table(tmp_path / "f.parquet").num_rows == 3


def test_npz_has_every_column(inputs, tmp_path, key):
    run(inputs, tmp_path / "f.npz", key, patches=True)
    columns = set(pq.read_schema(tmp_path / "f.parquet").names)
    with np.load(tmp_path / "f.npz") as found:
        assert set(found) == columns - {"vector", "reason"} | {"vectors", "failed"}
        assert found["patches"][0].endswith(".b2nd")
        assert "stretched" in found["notes"][0]


def test_an_output_that_cannot_be_written(inputs, tmp_path, key, rule, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    for form, out in (("parquet", "file/f.parquet"), ("csv", "file/f.csv"), ("y_hat", "file/new/outputs")):
        with pytest.raises(InputError, match="file is a file, so that nothing can be written"):
            run(inputs, tmp_path / out, key, form=form)
    with pytest.raises(UsageError, match="inputs is a folder; expected the name of a table"):
        run(inputs, inputs, key)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="not writable for this user"):
        run(inputs, tmp_path / "f.parquet", key)
