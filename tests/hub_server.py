"""A stand-in for the Hugging Face Hub: what huggingface_hub asks over HTTP to make, fill and read a repository.

It has branches (main alone), commits, large files by the basic LFS protocol, and one token that may write to one name
space. Everything is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN, OWNER = "hf_made_up", "someone"


@dataclass
class Repository:
    """The files of each commit; the last one is main."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision: str) -> str | None:
        return next(reversed(self.commits)) if revision == "main" else revision if revision in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server, its repositories by USER/NAME, uploaded large files by SHA-256, and the paths of its requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.is_full = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Makes a repository, or adds a commit to it. Returns the commit."""
        return self.repositories.setdefault(name, Repository(private)).commit(files)

    def files(self, name: str) -> dict[str, bytes]:
        """The files of main."""
        repository = self.repositories[name]
        return repository.commits[str(repository.resolve("main"))]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs the server until the end of the block."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


_NAME = r"([\w.-]+/[\w.-]+)"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is said."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        for method, pattern, act in _ROUTES:
            if self.command == method and (found := re.fullmatch(pattern, path)):
                return act(self, body, *found.groups())
        self._send(404)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _may_write(self, name: str) -> bool:
        """Whether the token may write there; otherwise answers so."""
        token = self.headers.get("Authorization")
        if token != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password.")
        elif name.partition("/")[0] != OWNER:
            words = f'You don\'t have the rights to create a model under the namespace "{name.partition("/")[0]}"'
            self._send(403, {"error": words}, X_Error_Message=words)
        else:
            return True
        return False

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files, if the repository is there and may be read; otherwise answers so."""
        repository = self.server.repositories.get(name)
        hidden = repository is not None and repository.private and not self.headers.get("Authorization")
        if repository is None or hidden:
            self._send(401 if not self.headers.get("Authorization") else 404, X_Error_Code="RepoNotFound")
            return None
        sha = repository.resolve(revision) if repository.commits else None
        if sha is None:
            self._send(404, X_Error_Code="RevisionNotFound")
            return None
        return sha, repository.commits[sha]

    # --- To make and fill a repository ---

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self._may_write(name):
            there = name in self.server.repositories
            private = asked.get("private", False) or asked.get("visibility") == "private"
            self.server.repositories.setdefault(name, Repository(private)).commits or self.server.add(name, {})
            self._send(409 if there else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._may_write(name):
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self._may_write(name):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if self.server.is_full:
            self._send(403, X_Error_Message="Storage limit reached")
        elif hashlib.sha256(body).hexdigest() == oid:
            self.server.large[oid] = body
            self._send(200)
        else:
            self._send(400)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write(name) or (found := self._find(name, revision)) is None:
            return
        files = dict(found[1])
        for line in body.splitlines():
            asked = json.loads(line)
            value = asked["value"]
            if asked["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif asked["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif asked["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.add(name, files)
        self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    # --- To read it ---

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        if (found := self._find(name, revision)) is not None:
            sha, files = found
            private = self.server.repositories[name].private
            siblings = [{"rfilename": path} for path in files]
            self._send(200, {"id": name, "sha": sha, "private": private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if (found := self._find(name, revision)) is not None:
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in found[1].items()
            ]
            self._send(200, files)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        sha, files = found
        if path in files:
            self._send(200, files[path], ETag=f'"{hashlib.sha1(files[path]).hexdigest()}"', X_Repo_Commit=sha)
        else:
            self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)


_ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_NAME}/preupload/(\w+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(\w+)", _Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/(\w+)", _Handler.commit),
    ("POST", r"/api/validate-yaml", lambda self, body: self._send(200, {"errors": [], "warnings": []})),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/([\w.-]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(\w+)", _Handler.tree),
    ("HEAD", rf"/{_NAME}/resolve/(\w+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_NAME}/resolve/(\w+)/(.+)", _Handler.resolve),
)
