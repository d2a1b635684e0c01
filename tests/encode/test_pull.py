"""Pulling with the real client from a hub on this machine: whole or not at all, gone on with, checked, then offline."""

import hashlib
import json
from pathlib import Path

import pytest

from hilum.encode.released import pull as module
from hilum.encode.released.models import MODELS, is_pulled, model_folder
from hilum.encode.released.pull import pull, read_pull, verify
from hilum.errors import ContractError, InputError, LicenceError, StoreError, UsageError, WeightsAbsent

WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "dinov2"}', "preprocessor_config.json": b"{}", "model.safetensors": WEIGHTS,
    "README.md": b"long", "pytorch_model.bin": b"not needed",
}  # fmt: skip


@pytest.fixture(autouse=True)
def files(hub):
    hub.files = dict(FILES)


def test_only_what_is_needed_with_hashes(hub):
    seen = []
    record = pull("dinov2-small", progress=lambda *told: seen.append(told))
    folder = model_folder("dinov2-small")
    assert folder.name == "dinov2-small@main"
    assert {p.name for p in folder.iterdir()} == {*list(FILES)[:3], "pull.json"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert record["revision"] == hub.commit
    assert record["files"]["model.safetensors"] == {"size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    assert record["licence"] == "Apache-2.0"
    assert read_pull(folder) == {k: v for k, v in record.items() if k not in ("folder", "fetched")}
    assert seen[-1][0] == seen[-1][1]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_what_is_there_needs_no_network(hub, monkeypatch):
    pull("dinov2-small")
    count = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull("facebook/dinov2-small")["fetched"] is False
    assert len(hub.requests) == count
    with pytest.raises(WeightsAbsent, match="HF_HUB_OFFLINE is set") as caught:
        pull("dinov2-base")
    assert caught.value.exit_code == 6


def test_a_whole_folder_may_be_read_only(hub, monkeypatch):
    pull("dinov2-small")

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(module, "hold", refuse)
    assert pull("dinov2-small")["fetched"] is False


def test_only_rests_of_its_own_are_removed(hub, tmp_path):
    old, other = tmp_path / f".dino.{'a' * 40}.part", tmp_path / f".dino.large.{'a' * 40}.part"
    old.mkdir()
    other.mkdir()
    pull("dinov2-small", out=tmp_path / "dino")
    assert not old.exists()
    assert other.exists()


def test_a_changed_file_is_refused(hub):
    folder = Path(pull("dinov2-small")["folder"])
    verify(folder)
    (folder / "config.json").write_bytes(FILES["config.json"].replace(b"2", b"3"))
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    (folder / "preprocessor_config.json").unlink()
    for check in (lambda: verify(folder), lambda: pull("dinov2-small")):
        with pytest.raises(ContractError) as caught:
            check()
        found = str(caught.value)
        for part in ("config.json has changed", "1,023,999 bytes, expected 1,024,000", "r_config.json is missing"):
            assert part in found


def test_a_broken_connection_is_gone_on_with(hub):
    hub.cut["model.safetensors"] = 300_000
    with pytest.raises(WeightsAbsent, match="run the same command again"):
        pull("dinov2-small")
    folder = model_folder("dinov2-small")
    assert not folder.exists()
    rest = list(folder.parent.glob(".dinov2-small@main.*.part/model.safetensors.rest"))
    assert [p.stat().st_size for p in rest] == [300_000]
    hub.broken, hub.requests = False, []
    pull("dinov2-small")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    gets = [(path.rpartition("/")[2], ranged) for method, path, ranged in hub.requests if method == "GET"]
    assert gets == [("main", None), ("model.safetensors", "bytes=300000-")]


def test_a_connection_that_breaks_now_and_then_is_no_trouble(hub):
    hub.cut["model.safetensors"] = 300_000
    calls = []

    def mend(_):
        calls.append(1)
        hub.broken = False

    from huggingface_hub import file_download

    file_download.time.sleep = mend
    pull("dinov2-small")
    assert calls == [1]


def test_content_that_is_not_what_was_announced(hub):
    hub.lies = {"model.safetensors", "config.json"}
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(InputError, match=f"{name} of facebook/dinov2-small did not arrive as the hub announced"):
            pull("dinov2-small")
        hub.lies.discard(name)
    assert pull("dinov2-small")["fetched"]


def test_gated_and_refused(hub, monkeypatch):
    hub.gated = True
    with pytest.raises(
        LicenceError, match=r"Ask for it at https://huggingface.co/facebook/dinov2-small.*HF_TOKEN"
    ) as caught:
        pull("dinov2-small")
    assert caught.value.exit_code == 5
    monkeypatch.setenv("HF_TOKEN", "good")
    folder = Path(pull("dinov2-small")["folder"])
    assert b"good" not in b"".join(p.read_bytes() for p in folder.iterdir())


def test_names_and_revisions(hub):
    with pytest.raises(UsageError, match="no revision 'v9'"):
        pull("dinov2-small", revision="v9")
    assert Path(pull("dinov2-small", revision="v1")["folder"]).name == "dinov2-small@v1"
    with pytest.raises(UsageError, match=r"no model .dinov9-small.; did you mean dinov[23]-"):
        pull("dinov9-small")
    with pytest.raises(UsageError, match="is not on the hub"):
        pull("somebody/else")


def test_out(hub, tmp_path):
    assert pull("dinov2-small", out=tmp_path / "here")["fetched"]
    assert not pull("dinov2-small", out=tmp_path / "here")["fetched"]
    with pytest.raises(UsageError, match="holds facebook/dinov2-small at main"):
        pull("dinov2-base", out=tmp_path / "here")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="was not made by hilum pull"):
        pull("dinov2-small", out=tmp_path / "mine")


def test_a_repository_that_is_no_encoder(hub):
    del hub.files["model.safetensors"]
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        pull("dinov2-small")


def test_of_shards_only_those_with_the_tower(hub):
    hub.repo = MODELS["medgemma"].repo
    places = {"vision_tower.a": "a.safetensors", "language_model.b": "b.safetensors", "vision_tower.c": "c.safetensors"}
    del hub.files["model.safetensors"]
    hub.files |= {name: name.encode() for name in places.values()}
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    record = pull("medgemma")
    assert set(record["files"]) == {"config.json", "preprocessor_config.json", "model.safetensors.index.json",
                                    "a.safetensors", "c.safetensors"}  # fmt: skip


def test_the_hub_is_not_there(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsAbsent, match="cannot be fetched"):
        pull("dinov2-small")


def test_two_at_once(hub):
    folder = model_folder("dinov2-small")
    with module.hold(folder.parent / f".{folder.name}.lock", "x"), pytest.raises(StoreError, match="being written by"):
        pull("dinov2-small")
    assert not is_pulled(folder)
