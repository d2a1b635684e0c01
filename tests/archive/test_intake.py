"""One scan on its way into the store: what its voxels show becomes its row, and a face does not get in."""

import ast
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hilum.archive import intake
from hilum.archive.files import nifti
from hilum.archive.intake import check, take_in
from hilum.archive.judge.screening import screen
from hilum.archive.ledger import Entry
from hilum.archive.phantom.head import make_head
from hilum.archive.policy import AS_IS, Policy, parse_policy
from hilum.archive.reasons import FLAGS, REASONS
from hilum.archive.scan import find
from hilum.errors import UsageError
from hilum.volume import Volume


def save(path, vol):
    voxels = np.rint(vol.voxels).astype(np.int16)
    nifti.write(path, voxels, vol.affine, 1.0, 0.0, packed=False)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A CT head on disk, and the face that is known to be in it."""
    ct, _, face, _ = make_head(1)
    path = tmp_path_factory.mktemp("head") / "head.nii"
    save(path, ct)
    return path, face


def test_a_face_is_removed_and_said_so(head, key):
    path, face = head
    (entry,) = find(path, key)
    with_face, without = take_in(entry, Policy(deface=False)), take_in(entry)
    changed = with_face.volume.voxels != without.volume.voxels
    assert changed[(face.voxels > 0) & (with_face.volume.voxels > -500)].mean() > 0.9
    assert any(r.startswith("defaced: ") for r in without.entry.repairs)
    assert without.entry.verdict == "repaired"
    assert not with_face.entry.repairs
    assert "face" in {f.split(":")[0] for f in without.entry.flags}
    assert without.entry.flags == with_face.entry.flags
    assert with_face.entry.plane == "axial"


def test_burned_in_text_is_noticed(tmp_path, key):
    from PIL import Image, ImageDraw

    y, x = np.indices((256, 256)) - 128
    body = (np.where((x / 90) ** 2 + (y / 70) ** 2 < 1, 120, 5) + np.random.default_rng(0).normal(0, 2, x.shape)).clip(
        0
    )
    for name in ("clean", "named"):
        image = Image.fromarray(body.astype(np.uint8))
        if name == "named":
            ImageDraw.Draw(image).text((8, 8), "MUSTERMANN ERIKA 12.08.1964", fill=255, font_size=14)
        image.save(tmp_path / f"{name}.png")
    found = {e.paths[0].stem: [f.split(":")[0] for f in take_in(e).entry.flags] for e in find(tmp_path, key)}
    assert "burned_in" in found["named"]
    assert "burned_in" not in found["clean"]


def test_identifiers_left_in_a_header_are_named_by_place(write_series, large, tmp_path, key):
    write_series(large, SOPClassUID="1.2.840.10008.5.1.4.1.1.4", RescaleIntercept=0)
    (entry,) = find(tmp_path / "archive", key)
    (found,) = [f for f in check(entry).flags if f.startswith("residual_identifiers")]
    assert "(0010,0010)" in found  # the patient's name is in the header
    assert "Secret" not in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v + 1024, "not_hu"),
        (lambda v: np.random.default_rng(0).permutation(v.ravel()).reshape(v.shape), "noise"),
        (lambda v: np.where(v > 300, 1, 0), "few_levels"),
    ],
)
def test_what_is_no_image_is_refused(write_series, tmp_path, key, change, reason):
    """A CT in which one thing is wrong; the same CT as it should be is used."""
    ct = make_head(0, spacing_mm=5.0)[0]
    voxels = np.rint(ct.voxels).clip(-1000, 2000).astype(np.int16)
    for name, values in (("good", voxels), ("bad", change(voxels).astype(np.int16))):
        write_series(values, folder=f"archive/{name}", series=(name[0] == "g" and "1") or "2", RescaleIntercept=0)
    verdicts = {e.paths[0].parent.name: take_in(e).entry.reason for e in find(tmp_path / "archive", key)}
    assert verdicts == {"good": "", "bad": reason}


def test_words_of_the_command_line():
    assert parse_policy() == AS_IS
    assert parse_policy(
        accept=["gap=6mm"], resample=["tilt"], drop=["duplicates"], deface=False, min_slices=1
    ) == Policy(min_slices=1, accept_gap_mm=6.0, resample_tilt=True, drop_duplicates=True, deface=False)
    assert parse_policy(accept=["gap=2.5"]).accept_gap_mm == 2.5
    for wrong in ({"accept": ["gap=-1"]}, {"accept": ["6mm"]}, {"resample": ["all"]}, {"drop": ["faces"]}):
        with pytest.raises(UsageError, match="is unknown; expected"):
            parse_policy(**wrong)


def test_an_entry_says_when_it_was_repaired():
    assert [Entry(key="0", repairs=r).verdict for r in ((), ("x",))] == ["used", "repaired"]


def test_a_fault_of_ours_costs_one_scan(head, key, monkeypatch):
    def fail(vol):
        raise ZeroDivisionError("secret name")

    monkeypatch.setattr(intake, "screen", fail)
    (entry,) = find(head[0], key)
    refused = take_in(entry).entry
    assert refused.reason == "reader_crashed"
    assert refused.detail.startswith("ZeroDivisionError in test_intake.py, line ")
    assert "secret" not in refused.detail


def test_huge_values_are_refused(tmp_path, key):
    voxels = np.random.default_rng(0).normal(0, 1e37, (20, 20, 20)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "x.nii")
    assert [take_in(e).entry.reason for e in find(tmp_path, key)] == ["non_finite"]


@pytest.mark.parametrize("depth", [256, 257, 192])
def test_grey_levels_are_counted_over_the_whole_slice(depth):
    """Zero around the object on both sides: no stride of the sample may fall into one column."""
    voxels = np.zeros((depth, 128, 128), np.int16)
    voxels[:, 30:100, 30:100] = np.arange(70 * 70).reshape(70, 70) + np.arange(100, 100 + depth)[:, None, None]
    vol = Volume(voxels=voxels, affine=np.eye(4), modality="MR")
    assert screen(vol).refusal is None


def test_every_reason_and_caution_in_the_code_has_a_sentence():
    """Codes are written as literals where they are raised; a missing one would end a run."""
    missing = []
    for path in sorted((Path(intake.__file__).parent).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            place = {"ScanRefused": 0, "refuse": 1, "flag": 0, "loose": 3}.get(name)
            if place is None or len(node.args) <= place or not isinstance(node.args[place], ast.Constant):
                continue
            code = node.args[place].value
            if code not in (FLAGS if name == "flag" else REASONS):
                missing.append(f"{path.name}:{node.lineno} {code}")
    assert not missing
