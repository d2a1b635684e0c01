import hashlib
import hmac
import stat
import subprocess
import sys

import pytest

from hilum.archive.privacy import Key, _make_key, key_path, read_key
from hilum.errors import InputError

SECRET = bytes(range(32))


def test_a_hash_is_the_keyed_one_of_the_standard():
    expected = hmac.new(SECRET, b"patient:P1", hashlib.sha256).hexdigest()[:16]  # RFC 2104
    assert Key(SECRET).hash("patient", "P1") == expected


def test_kind_key_and_identifier_all_matter():
    key = Key(SECRET)
    names = [key.hash(kind, i) for kind in ("patient", "study", "series", "item") for i in ("1", "2")]
    names += [Key(SECRET[::-1]).hash("patient", "1")]
    assert len(set(names)) == len(names)


def test_an_unknown_patient_stays_unknown_and_odd_names_have_a_hash():
    assert Key(SECRET).hash("patient", "") == ""
    assert len(Key(SECRET).hash("item", "Müller/\udcff.dcm")) == 16


def test_the_secret_is_never_shown():
    key = Key(SECRET)
    for shown in (repr(key), str(key), key.fingerprint):
        assert SECRET.hex() not in shown
        assert SECRET.hex()[:8] not in shown
    assert len(key.fingerprint) == 8
    assert key.fingerprint != Key(SECRET[::-1]).fingerprint


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path, monkeypatch):
    path = tmp_path / "config" / "key"
    monkeypatch.setenv("HILUM_KEY", str(path))
    assert key_path() == path
    first = read_key()
    assert read_key() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(first.secret) == 32
    assert read_key(tmp_path / "other") != first


def test_processes_that_make_the_key_at_once_agree(tmp_path):
    code = (
        "import sys; from pathlib import Path; from hilum.archive.privacy import read_key; read_key(Path(sys.argv[1]))"
    )
    race = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "key")]) for _ in range(4)]
    assert [process.wait() for process in race] == [0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_a_key_made_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "key"
    path.write_text(SECRET.hex())
    _make_key(path)
    assert read_key(path) == Key(SECRET)


def test_without_a_setting_the_key_lives_in_the_users_config(tmp_path, monkeypatch):
    monkeypatch.delenv("HILUM_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_path() == tmp_path / ".config" / "hilum" / "key"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not hex", "expected 64 hex digits. Point HILUM_KEY"),
        ("abcd", "has 2 bytes; expected at least 16"),
        ("", "0 bytes"),
    ],
)
def test_a_broken_key_is_refused_and_never_replaced(tmp_path, text, message):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_key(path)
    assert path.read_text() == text


def test_a_key_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be read or made"):
        read_key(tmp_path / "file" / "key")
    with pytest.raises(InputError, match="cannot be read or made"):
        read_key(tmp_path)


def test_days_between_two_studies_of_a_patient_are_exact():
    key = Key(SECRET)
    first, leap, later = (key.study_day("P1", d) for d in ("20240228", "20240301", "20250228"))
    assert leap - first == 2  # 2024 has a 29 February
    assert later - first == 366
    assert key.study_day("P1", "2024.02.28") == first  # ACR-NEMA form


def test_a_study_day_does_not_show_the_date():
    """Each patient has an origin of their own: one calendar day gives as many numbers as there are patients."""
    key = Key(SECRET)
    days = [key.study_day(f"P{n}", "20240228") for n in range(500)]
    assert len(set(days)) > 480
    assert max(days) - min(days) > 30000  # spread over the century
    assert key.study_day("P1", "20240228") != Key(SECRET[::-1]).study_day("P1", "20240228")
    assert key.study_day("P1", "20240228") == Key(SECRET).study_day("P1", "20240228")


@pytest.mark.parametrize(
    ("patient", "date"),
    [("", "20240228"), ("P1", ""), ("P1", "20240230"), ("P1", "2024"), ("P1", "00000000"), ("P1", "２０２４０２２８"),
     ("P1", "20240228-20240301"), ("P1", "REMOVED!")],
)  # fmt: skip
def test_no_day_without_a_patient_or_a_date(patient, date):
    assert Key(SECRET).study_day(patient, date) is None
