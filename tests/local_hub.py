"""A server on this machine that speaks what ``huggingface_hub`` needs of the hub's protocol.

Nothing here reaches the real hub. Spoken are the questions about a repository (``/api/models``),
its tree, and its files (``/resolve``): ETag, X-Linked-Etag, X-Repo-Commit, the redirect of large
files to another address, Range, and the errors by X-Error-Code. Not spoken: Xet storage, git and
writing.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_accepted"  # of an account that has accepted all licences
CARD = {"license": "other", "license_name": "some-community", "license_link": "LICENSE.md"}


@dataclass
class Request:
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class LocalHub:
    """The repositories and moods of the server.

    Attributes:
        repositories: files by path, by name of the repository.
        gated: repositories whose files need TOKEN.
        lies: SHA-256 to give for a file, in place of the true one.
        drop_after: bytes of a file after which the connection is closed, once; then back to None.
        status: the answer to every question about a file's content, in place of it.
        requests: all that was asked.
    """

    repositories: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    lies: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    status: int | None = None
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def ranges(self) -> list[str | None]:
        """The ranges of contents that were asked for."""
        return [r.range for r in self.requests if r.method == "GET" and r.path.startswith("/cdn/")]

    def fetched(self) -> set[str]:
        """The files whose contents were asked for."""
        contents = {self.sha256(n, b): n for f in self.repositories.values() for n, b in f.items()}
        paths = {r.path for r in self.requests if r.method == "GET"}
        return {name for digest, name in contents.items() if f"/cdn/{digest}" in paths}

    def sha256(self, name: str, content: bytes) -> str:
        """The SHA-256 that the hub gives."""
        return self.lies.get(name) or hashlib.sha256(content).hexdigest()

    def describe(self, repository: str) -> dict[str, object]:
        """The answer about a repository."""
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": "0",
                "lfs": {
                    "sha256": self.sha256(name, content),
                    "size": len(content),
                    "pointerSize": 130,
                },
            }
            for name, content in self.repositories[repository].items()
        ]
        return {"id": repository, "sha": COMMIT, "cardData": CARD, "siblings": siblings}

    def tree(self, repository: str) -> list[dict[str, object]]:
        """The answer about the files of a repository."""
        return [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": "0",
                "lfs": {
                    "oid": self.sha256(name, content),
                    "size": len(content),
                    "pointerSize": 130,
                },
            }
            for name, content in self.repositories[repository].items()
        ]


@contextmanager
def local_hub(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[LocalHub]:
    """Run a server for as long as the block runs, and turn ``huggingface_hub`` to it.

    Args:
        patch: for the client, which has read its settings when it was imported.
        folder: for the client's cache.
    """
    with _serving() as hub:
        from huggingface_hub import constants

        patch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # so that half of a file arrives
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("SGM_CACHE", str(folder / "digests"))
        yield hub


@contextmanager
def _serving() -> Iterator[LocalHub]:
    hub = LocalHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: LocalHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        asked = Request(self.command, path, self.headers.get("Range"), token)
        self.state.requests.append(asked)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._about("/".join(parts[2:4]), "tree" in parts[4:5])
        elif parts[0] == "cdn":
            self._content(parts[1])
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]), token)
        else:
            self._send(404)

    def _about(self, repository: str, tree: bool) -> None:
        if repository not in self.state.repositories:
            self._send(401, {"X-Error-Code": "RepoNotFound"})
            return
        answer = self.state.tree(repository) if tree else self.state.describe(repository)
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _resolve(self, repository: str, name: str, token: str | None) -> None:
        """As the hub does it for large files: to another host, which knows no repository."""
        content = self.state.repositories.get(repository, {}).get(name)
        if repository in self.state.gated and token != TOKEN:
            self._send(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        elif content is None:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        else:
            digest = self.state.sha256(name, content)
            about = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "ETag": '"0"',
                "Location": f"{self.state.url}/cdn/{digest}".replace("127.0.0.1", "localhost"),
            }
            self._send(302, about)

    def _content(self, digest: str) -> None:
        hub = self.state
        if hub.status:
            self._send(hub.status)
            return
        content = next(
            content
            for files in hub.repositories.values()
            for name, content in files.items()
            if hub.sha256(name, content) == digest
        )
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body, hub.drop_after, cut = content[start:], None, hub.drop_after
        length = {"Content-Length": str(len(body))}
        self._send(206 if start else 200, (part if start else {}) | length, body[:cut])

    def _send(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True
