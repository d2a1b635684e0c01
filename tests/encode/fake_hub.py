"""A small stand-in for the Hugging Face hub on this machine, which the real client talks to."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What the hub holds and how it behaves.

    files     of the one repository: path → content
    gated     answers 403 to everybody without the token "good"
    cut       {path: bytes after which the connection breaks}, while `broken` is set
    lies      paths whose content is not what is announced
    requests  (method, path, Range) of every request
    """

    commit = "c" * 40

    def __init__(self, files: dict[str, bytes], repo: str = "facebook/dinov2-small") -> None:
        self.files, self.repo = files, repo
        self.gated, self.cut, self.broken, self.lies = False, {}, True, set()
        self.requests: list[tuple[str, str, str | None]] = []

    def info(self) -> dict:
        siblings = []
        for path, content in self.files.items():
            sibling = {
                "rfilename": path,
                "size": len(content),
                "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if path.endswith((".safetensors", ".pth")):
                sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append(sibling)
        return {"id": self.repo, "sha": self.commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range")))
            api = f"/api/models/{hub.repo}/revision/"
            if path.startswith(api):
                if path.removeprefix(api) not in ("main", "v1", hub.commit):
                    return self.fail(404, "RevisionNotFound")
                return self.send(json.dumps(hub.info()).encode(), "")
            start = f"/{hub.repo}/resolve/{hub.commit}/"
            if not path.startswith(start):
                return self.fail(404, "RepoNotFound")
            if hub.gated and self.headers.get("Authorization") != "Bearer good":
                return self.fail(403, "GatedRepo")
            name = path.removeprefix(start)
            if name not in hub.files:
                return self.fail(404, "EntryNotFound")
            content = hub.files[name]
            return self.send(content[::-1] if name in hub.lies else content, name)

        def send(self, content: bytes, name: str) -> None:
            ranged = self.headers.get("Range")
            start = int(ranged.removeprefix("bytes=").split("-")[0]) if ranged else 0
            self.send_response(206 if ranged else 200)
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start))
            if ranged:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            end = hub.cut.get(name) if hub.broken else None
            self.wfile.write(content[start:end] if end is None or end > start else b"")
            if end is not None:
                self.wfile.flush()
                self.close_connection = True

    return Handler


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """The address while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
