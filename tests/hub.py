"""A hub that answers as Hugging Face's does, on this machine: for tests of what is downloaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, name: str, folder: Path, revision: str = "main") -> Path:
    """A folder moved into a cache, as snapshot_download leaves it: the snapshot."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for place in (snapshot, home / "blobs", home / "refs"):
        place.mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(home / "blobs" / f"{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    return snapshot


class Hub:
    """models: id -> folder, or the name of an error. asked: what has been asked for."""

    def __init__(self) -> None:
        self.models: dict[str, Path | str] = {}
        self.asked: list[str] = []

    @property
    def downloaded(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self.asked if "/resolve/" in path}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serves it: the endpoint's address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            self.answer()

        def answer(self) -> None:
            path = unquote(self.path.partition("?")[0]).removeprefix("/api/models/").strip("/")
            owner, name, *rest = path.split("/")
            folder = hub.models.get(f"{owner}/{name}", "RepoNotFound")
            if not isinstance(folder, Path):
                self.reply(404 if folder == "RepoNotFound" else 403, b"", {"X-Error-Code": folder})
            elif rest[0] == "revision" and rest[1] not in ("main", COMMIT):
                self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif rest[0] in ("revision", "tree"):
                files = [_about(file, folder) for file in folder.rglob("*") if file.is_file()]
                about = {"id": f"{owner}/{name}", "sha": COMMIT, "tags": [], "siblings": []}
                self.reply(200, json.dumps(about if rest[0] == "revision" else files).encode())
            else:  # resolve/COMMIT/FILE
                data = (folder / "/".join(rest[2:])).read_bytes()
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.reply(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT})

        def reply(self, code: int, data: bytes, more: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for header, value in {"Content-Length": str(len(data)), **(more or {})}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _about(file: Path, folder: Path) -> dict:
    return {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": file.stat().st_size,
        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
    }


def point_at(monkeypatch: pytest.MonkeyPatch, cache: Path, endpoint: str) -> None:
    """Downloads come from this endpoint and go to this cache, for the rest of the test."""
    real = functools.partial(
        huggingface_hub.snapshot_download, cache_dir=cache, endpoint=endpoint, token=False
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", real)
