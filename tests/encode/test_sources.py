"""Where scans come from: the same scan by any door gives the same features."""

import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

import hilum
from hilum.archive.phantom import write_phantom
from hilum.archive.privacy import Key
from hilum.archive.web import Address, parse_address
from hilum.encode.table.embed import embed
from hilum.encode.table.sources import open_source, stem_of
from hilum.errors import InputError, LabelsError, UsageError
from hilum.probe.labels import read_features
from hilum.records import read_table


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One patient: a CT and an MR series of 8 slices."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, num_patients=1, num_slices=8, matrix=32, seed=0)
    return folder


@pytest.fixture(scope="module")
def ct_folder(phantom: Path) -> Path:
    """The folder of the CT series alone."""
    for path in sorted((phantom / "scans").rglob("*.dcm")):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if header.Modality == "CT" and len(list(path.parent.iterdir())) >= 8:
            return path.parent
    raise AssertionError("the phantom has no CT folder")


def run(source: Path | str, out: Path, key: Key, **given) -> dict:
    return embed(source, model="pixels", out=out, key=key, **{"num_workers": 1, **given})


# ---- a table of paths


def write_table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def write_scan(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).normal(200, 80, (16, 18, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def test_a_table_of_paths_is_the_same_as_its_files(phantom, ct_folder, tmp_path, key):
    shutil.copytree(ct_folder, tmp_path / "ct")
    write_scan(tmp_path / "a" / "scan.nii.gz", 1)
    write_scan(tmp_path / "b" / "scan.nii.gz", 2)  # the same name in another folder is another scan
    table = write_table(
        tmp_path / "list.csv", "path,age", "ct,60", "a/scan.nii.gz,61", "b/scan.nii.gz,62", "gone.nii,63"
    )
    report = run(table, tmp_path / "f.parquet", key)
    assert (report["num_scans"], len(report["left_out"])) == (3, 1)
    assert report["left_out"][0]["reason"].startswith("unreadable")
    whole = tmp_path / "all"
    for name in ("ct", "a", "b"):
        shutil.copytree(tmp_path / name, whole / name)
    run(whole, tmp_path / "g.parquet", key)
    chosen, walked = (read_features(tmp_path / f"{name}.parquet") for name in "fg")
    assert chosen.column("item") == walked.column("item")
    np.testing.assert_array_equal(chosen.vectors, walked.vectors)
    assert {key.hash("item", "a/scan.nii.gz"), key.hash("item", "b/scan.nii.gz")} < set(chosen.column("series"))


def test_masks_in_the_table(tmp_path, key):
    for n in range(2):
        write_scan(tmp_path / f"{n}.nii.gz", n)
    labels = np.zeros((16, 18, 4), np.uint8)
    labels[2:9, 3:9, 1] = 5
    nib.save(nib.Nifti1Image(labels, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "m.nii.gz")
    table = write_table(tmp_path / "list.csv", "path,mask", "0.nii.gz,m.nii.gz", "1.nii.gz,")
    report = run(table, tmp_path / "f.parquet", key, level="region")
    assert (report["num_rows"], report["set_aside"]) == (1, {"no_mask": 1})
    (row,) = read_table(tmp_path / "f.parquet").to_pylist()
    assert (row["region"], row["slice"]) == (5, 1)
    (tmp_path / "masks").mkdir()
    shutil.copy(tmp_path / "m.nii.gz", tmp_path / "masks" / "0.nii")
    plain = write_table(tmp_path / "plain.csv", "path", "0.nii.gz", "1.nii.gz")
    (tmp_path / "masks" / "0.nii").unlink()
    shutil.copy(tmp_path / "m.nii.gz", tmp_path / "masks" / "0.nii.gz")
    run(plain, tmp_path / "g.parquet", key, level="region", masks=tmp_path / "masks")
    np.testing.assert_array_equal(read_table(tmp_path / "g.parquet")["vector"][0].as_py(), row["vector"])
    labels[2:9, 3:9, 1] = 6  # a changed mask is a changed scan
    nib.save(nib.Nifti1Image(labels, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "m.nii.gz")
    assert run(table, tmp_path / "f.parquet", key, level="region")["num_encoded"] == 1
    assert read_table(tmp_path / "f.parquet")["region"].to_pylist() == [6]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (["file", "a.nii"], LabelsError, "expected a column path"),
        (["path"], LabelsError, "has 0 rows"),
        (["path,age", ",3"], InputError, "row 1 names no path"),
        (["path", "a.nii.gz", "a.nii.gz"], InputError, "rows 1 and 2 hold the same file"),
        (["path,mask", "a.nii.gz,none.nii"], LabelsError, "the mask of row 1 is missing"),
    ],
)
def test_bad_tables(tmp_path, key, rows, error, message):
    write_scan(tmp_path / "a.nii.gz")
    with pytest.raises(error, match=message):
        run(write_table(tmp_path / "list.csv", *rows), tmp_path / "f.parquet", key)


def test_voxels_in_a_file_of_their_own_count_as_content(tmp_path, key):
    folder = tmp_path / "in"
    folder.mkdir()
    voxels = np.random.default_rng(0).normal(200, 80, (4, 16, 18)).astype("<i2")
    (folder / "a.raw").write_bytes(voxels.tobytes())
    (folder / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 18 16 4\nElementType = MET_SHORT\nElementSpacing = 1 1 3\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementByteOrderMSB = False\nElementDataFile = a.raw\n"
    )
    assert run(folder, tmp_path / "f.parquet", key)["num_scans"] == 1
    (folder / "a.raw").write_bytes(voxels[::-1].tobytes())
    assert run(folder, tmp_path / "f.parquet", key)["num_encoded"] == 1


def test_names_without_suffixes():
    assert [stem_of(Path(n)) for n in ("a.nii.gz", "a.b.mha", "a.tar.gz", ".nii", "CASE 1.NII")] == [
        "a", "a.b", "a.tar", ".nii", "CASE 1"]  # fmt: skip


# ---- DICOMweb


class Server:
    """A DICOMweb service on this machine that knows one study.

    missing   instances that are listed and never sent
    status    what it answers to everything, if not 200
    """

    def __init__(self, files: list[Path]) -> None:
        self.files, self.missing, self.status, self.num_fetched = files, 0, 200, 0
        found = [pydicom.dcmread(path) for path in files]
        self.study = str(found[0].StudyInstanceUID)
        self.series = {str(f.SeriesInstanceUID) for f in found}
        self.uids = {path: (str(f.SeriesInstanceUID), str(f.SOPInstanceUID)) for path, f in zip(files, found)}
        handler = type("Handler", (_Handler,), {"service": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/dicom-web"

    def answer(self, path: str) -> tuple[int, str, bytes]:
        place = path.partition("?")[0].removeprefix("/dicom-web").strip("/").split("/")
        if self.status != 200 or place[:2] != ["studies", self.study]:
            return (404 if self.status == 200 else self.status), "text/plain", b"no"
        series = place[3] if len(place) > 3 and place[2] == "series" else None
        files = [p for p in self.files if series in (None, self.uids[p][0])]
        if place[-1] == "instances":  # seven at a time, as servers do
            first = int((re.findall(r"offset=(\d+)", path) or ["0"])[0])
            rows = [{"00080018": {"vr": "UI", "Value": [self.uids[p][1]]}} for p in files]
            return 200, "application/dicom+json", json.dumps(rows[first : first + 7]).encode()
        self.num_fetched += 1
        part = b"--mark\r\nContent-Type: application/dicom\r\n\r\n%s\r\n"
        body = b"".join(part % p.read_bytes() for p in files[self.missing :]) + b"--mark--\r\n"
        return 200, 'multipart/related; type="application/dicom"; boundary=mark', body


class _Handler(BaseHTTPRequestHandler):
    service: Server

    def do_GET(self) -> None:
        status, kind, body = self.service.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def serve(phantom: Path) -> Iterator[Callable[[], Server]]:
    made: list[Server] = []

    def start() -> Server:
        files = sorted((phantom / "scans").rglob("*.dcm"))
        study = pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID
        headers = {p: pydicom.dcmread(p, stop_before_pixels=True) for p in files}
        same = {h.SOPInstanceUID: p for p, h in headers.items() if h.StudyInstanceUID == study}
        server = Server(list(same.values()))
        threading.Thread(target=server.http.serve_forever, daemon=True).start()
        made.append(server)
        return server

    yield start
    for server in made:
        server.http.shutdown()
        server.http.server_close()


def test_a_study_on_a_server_is_the_same_as_its_files(serve, tmp_path, key, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = serve()
    folder = tmp_path / "files"
    folder.mkdir()
    for number, path in enumerate(server.files):
        shutil.copy(path, folder / f"{number}.dcm")
    run(folder, tmp_path / "f.parquet", key)
    run(f"{server.url}/studies/{server.study}", tmp_path / "g.parquet", key)
    files, web = (read_features(tmp_path / f"{name}.parquet") for name in "fg")
    assert files.column("item") == web.column("item")
    np.testing.assert_array_equal(files.vectors, web.vectors)
    assert server.num_fetched == 1
    again = run(f"{server.url}/studies/{server.study}", tmp_path / "g.parquet", key)
    assert (again["num_encoded"], server.num_fetched) == (0, 1)
    assert not [p for p in tmp_path.rglob("*.dcm") if folder not in p.parents]
    for path in (tmp_path / "g.parquet", tmp_path / "g.inputs.parquet"):
        assert server.study.encode() not in path.read_bytes()


def test_one_series_of_a_server(serve, tmp_path, key):
    server = serve()
    series = Counter(s for s, _ in server.uids.values()).most_common(1)[0][0]
    assert 1 < sum(s == series for s, _ in server.uids.values()) < len(server.files)
    report = run(f"{server.url}/studies/{server.study}/series/{series}", tmp_path / "f.parquet", key)
    assert report["num_scans"] == 1
    assert set(read_features(tmp_path / "f.parquet").column("series")) == {key.hash("series", series)}


def test_what_a_server_can_do_wrong(serve, tmp_path, key):
    server = serve()
    address = f"{server.url}/studies/{server.study}"
    for change, message in (
        ({"missing": 2}, f"lists {len(server.files)} instances and sent {len(server.files) - 2}"),
        ({"status": 401}, "answers 401"),
        ({"status": 404}, "answers 404"),
    ):
        for name, value in change.items():
            setattr(server, name, value)
        with pytest.raises(InputError, match=message) as error:
            run(address, tmp_path / "f.parquet", key)
        assert server.study not in str(error.value)
    with pytest.raises(InputError, match=r"127\.0\.0\.1 cannot be reached"):
        run("http://127.0.0.1:9/studies/1.2.3", tmp_path / "f.parquet", key)
    assert not (tmp_path / "f.parquet").exists()


def test_addresses():
    assert parse_address("https://h/dicom-web/studies/1.2/series/3.4") == Address("https://h/dicom-web", "1.2", "3.4")
    assert parse_address("http://h:8042/a/studies/1.2/") == Address("http://h:8042/a", "1.2")
    assert "1.2" not in repr(parse_address("http://h/a/studies/1.2"))
    for wrong in ("https://h/dicom-web/studies", "https://h/dicom-web/studies/../x", "https://h/dicom-web/patients/1"):
        with pytest.raises(UsageError, match="no DICOMweb study"):
            parse_address(wrong)


# ---- one scan in Python


def test_read_gives_one_scan(phantom, ct_folder, key, monkeypatch, tmp_path):
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    whole = hilum.read(ct_folder)
    slice_alone = hilum.read(next(ct_folder.iterdir()))
    assert (whole.modality, whole.unit, whole.shape[0]) == ("CT", "HU", 8)
    np.testing.assert_array_equal(whole.voxels, slice_alone.voxels)
    with pytest.raises(InputError, match=r"holds 2 scans: .*choose one with series=") as error:
        hilum.read(phantom / "scans")
    first = str(error.value).partition("scans: ")[2][:16]
    assert hilum.read(phantom / "scans", series=first[:6]).shape[0] == 8
    with pytest.raises(InputError, match="no scan that can be used with key zz"):
        hilum.read(phantom / "scans", series="zz")


def test_read_is_not_confused_by_a_label_map_beside_the_scan(ct_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HILUM_KEY", str(tmp_path / "key"))
    shutil.copytree(ct_folder, tmp_path / "scan")
    labels = np.zeros((32, 32, 8), np.uint8)
    labels[8:20, 8:20] = 1
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "scan" / "labels.nii.gz")
    assert hilum.read(tmp_path / "scan").modality == "CT"


def test_a_missing_source(tmp_path, key):
    with pytest.raises(InputError, match="is missing"), open_source(tmp_path / "none", key):
        pass
