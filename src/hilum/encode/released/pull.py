"""`hilum pull`: a released encoder into one folder with hashes; then no network is needed, ever.

Only `pull` uses the network. A folder is either whole (pull.json is in it) or is not there: files arrive in a hidden folder
beside it, which the same command goes on with after an interruption, and which is renamed at the end.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hilum.archive.locks import hold
from hilum.encode.released.models import RECORD, find_released, is_pulled, model_folder, repo_of
from hilum.errors import ContractError, InputError, LicenceError, UsageError, WeightsAbsent
from hilum.records import explain_full_disk, read_json, sha256_file, write_json
from hilum.terminal import Progress

_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")  # of a repository that is not in the table
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OPTIONAL = "preprocessor_config.json"  # its content may stand in the table
_NETWORK = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # whose errors mean: the hub was not reached


@dataclass(frozen=True)
class _File:
    """One file of a repository: sha256 of large ones, else git's blob id."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


def read_pull(folder: Path) -> dict[str, Any]:
    """pull.json of a folder; {} when `pull` did not make it. ContractError when it is damaged."""
    if not is_pulled(folder):
        return {}
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("format") != "hilum-pull" or record.get("version") != 1:
        raise ContractError(f"{folder / RECORD} is no record of hilum pull; delete the folder and pull again")
    return record


def verify(folder: Path) -> None:
    """Every file of pull.json is there and has its hash, or ContractError names those that have not."""
    wrong = []
    for path, facts in read_pull(folder).get("files", {}).items():
        file = folder / path
        if not file.is_file():
            wrong.append(f"{path} is missing")
        elif (size := file.stat().st_size) != facts.get("size"):
            wrong.append(f"{path} has {size:,} bytes, expected {facts.get('size', 0):,}")
        elif sha256_file(file) != facts.get("sha256"):
            wrong.append(f"{path} has changed")
    if wrong:
        raise ContractError(
            f"{folder} is not as it was pulled: {'; '.join(wrong)}. Delete the folder and run hilum pull again"
        )


def pull(
    name: str, revision: str | None = None, out: str | Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Fetch a released encoder. Interrupted, it goes on when it is called again; a whole folder is checked and left alone.

    name      of the table, or a Hugging Face id OWNER/NAME
    revision  branch, tag or commit; the table's, else "main"
    out       the folder to make; `model_folder(name, revision)` without it
    returns   the record that is kept as pull.json, with `folder` and `fetched` (False: it was there)

    Raises LicenceError (gated, or refused), WeightsAbsent (offline, or the hub cannot be reached), UsageError (unknown name or
    revision), InputError (what came is not what the hub announced).
    """
    folder = Path(out) if out is not None else model_folder(name, revision)
    released, repo = find_released(name), repo_of(name)
    asked = revision or (released.revision if released else "main")
    if is_pulled(folder):  # needs no lock, which a folder shared read-only could not have
        return _left_alone(folder, repo, asked)
    with hold(folder.parent / f".{folder.name}.lock", str(folder)):
        if is_pulled(folder):
            return _left_alone(folder, repo, asked)
        if folder.exists():
            raise UsageError(f"{folder} exists and was not made by hilum pull; choose another --out")
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise WeightsAbsent(f"{name} is not here and HF_HUB_OFFLINE is set; unset it, or bring the folder {folder}")
        with _explained(repo, asked):
            record = _fetch(name, repo, asked, folder, progress)
    return {**record, "folder": str(folder), "fetched": True}


def _left_alone(folder: Path, repo: str, asked: str) -> dict[str, Any]:
    """The record of a whole folder, checked."""
    record = read_pull(folder)
    if (record["repo"], record["asked"]) != (repo, asked):
        raise UsageError(f"{folder} holds {record['repo']} at {record['asked']}; choose another --out")
    verify(folder)
    return {**record, "folder": str(folder), "fetched": False}


def _fetch(name: str, repo: str, asked: str, folder: Path, progress: Progress | None) -> dict[str, Any]:
    from huggingface_hub import HfApi

    released, api = find_released(name), HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    info = api.model_info(repo, revision=asked, files_metadata=True)
    there = {
        s.rfilename: _File(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or ()
    }
    part = folder.with_name(f".{folder.name}.{info.sha}.part")

    def fetch(file: _File) -> None:
        path = part / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with explain_full_disk(path):
            _download(api, repo, str(info.sha), file, path, _counter(name, file, progress))

    wanted = _choose(
        repo, released.files if released else _FILES, released.part if released else "", there, part, fetch
    )
    for file in wanted:
        fetch(file)
    record = {
        "format": "hilum-pull",
        "version": 1,
        "name": released.name if released else repo,
        "repo": repo,
        "asked": asked,
        "revision": info.sha,
        "files": {f.path: {"size": f.size, "sha256": sha256_file(part / f.path)} for f in wanted},
        "licence": released.weights_licence if released else "see the repository",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(part / RECORD, record)
    os.rename(part, folder)
    for old in folder.parent.iterdir():  # of other commits
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{40}}\.part", old.name):
            shutil.rmtree(old, ignore_errors=True)
    return record


def _choose(
    repo: str,
    names: tuple[str, ...],
    wanted: str,
    there: dict[str, _File],
    part: Path,
    fetch: Callable[[_File], None],
) -> list[_File]:
    """The needed files of a repository, config first; of a model in shards those that hold tensors of the `wanted` part."""
    chosen = [path for path in names if path in there or path != _OPTIONAL]
    if _WHOLE in chosen and _WHOLE not in there and _INDEX in there:
        from hilum.encode.released.shards import read_index

        fetch(there[_INDEX])
        places = read_index((part / _INDEX).read_bytes(), f"{repo}/{_INDEX}")
        chosen[chosen.index(_WHOLE) :] = [_INDEX, *sorted({file for n, file in places.items() if wanted in n})]
    if missing := [path for path in chosen if path not in there]:
        raise InputError(f"{repo} has no {' and no '.join(missing)}; it is no encoder that hilum can read")
    return [there[path] for path in chosen]


def _download(api: Any, repo: str, commit: str, file: _File, path: Path, counted: Callable[[int], None] | None) -> None:
    """One file, from where an earlier attempt ended; a whole one is kept, one with a wrong hash is deleted."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import get_hf_file_metadata, http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    if not path.is_file():
        disable_progress_bars()
        rest = path.with_name(path.name + ".rest")
        url = hf_hub_url(repo, file.path, revision=commit, endpoint=api.endpoint)
        at = get_hf_file_metadata(url).location
        headers = build_hf_headers() if urlsplit(at).netloc == urlsplit(url).netloc else {}
        with _Counted(rest, counted) as handle:
            start = handle.seek(0, io.SEEK_END)
            if start > file.size:
                start = handle.truncate(handle.seek(0))
            http_get(at, handle, resume_size=start, headers=headers, expected_size=file.size)
            os.fsync(handle.fileno())
        os.replace(rest, path)
    content_matches = sha256_file(path) == file.sha256 if file.sha256 else _git_blob(path) == file.blob
    if not content_matches:
        path.unlink()
        raise InputError(
            f"{file.path} of {repo} did not arrive as the hub announced it (its hash differs); it was deleted. Run the same "
            "command again, and if it ends like this again, a proxy between here and the hub changes files"
        )


class _Counted(io.FileIO):
    """A file that tells how long it is."""

    def __init__(self, path: Path, counted: Callable[[int], None] | None) -> None:
        super().__init__(path, "r+" if path.exists() else "w+")
        self._counted = counted

    def write(self, data: Any) -> int:
        view, done = memoryview(data), 0
        while done < len(view):
            done += super().write(view[done:]) or 0
        if self._counted:
            self._counted(self.tell())
        return done


def _counter(name: str, file: _File, progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    return lambda size: progress(size // 10**6, file.size // 10**6, f"{name}: {file.path} (MB)")


@contextlib.contextmanager
def _explained(repo: str, asked: str) -> Iterator[None]:
    """Errors of the hub's client as ours, with what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    page = f"https://huggingface.co/{repo}"
    try:
        yield
    except RevisionNotFoundError:
        raise UsageError(f"{repo} has no revision '{asked}'; {page} lists its branches and commits") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if isinstance(error, GatedRepoError) or status in (401, 403):
            raise LicenceError(
                f"{repo} is handed out on request only, or is private, or is not there (the hub answers {status}). Ask for it "
                f"at {page}, accept its licence, make a token at https://huggingface.co/settings/tokens and set HF_TOKEN to it"
            ) from None
        if status == 404:
            raise UsageError(f"{repo} is not on the hub, or lacks a file that it announced; look at {page}") from None
        raise WeightsAbsent(f"{repo} cannot be fetched now: the hub answers {status}; {_AGAIN}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in _NETWORK or isinstance(error, ConnectionError | TimeoutError):
            raise WeightsAbsent(f"{repo} cannot be fetched: {type(error).__name__}: {error}; {_AGAIN}") from None
        if isinstance(error, OSError) and "Consistency check failed" in str(error):
            raise WeightsAbsent(f"{repo} did not arrive whole; {_AGAIN}") from None
        raise


_AGAIN = "what came so far is kept, run the same command again when the network is there"


def _git_blob(path: Path) -> str:
    """Git's name for a file's content: SHA-1 over its length and bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
