"""A hub of one's own: as much of its interface as a repository that is written and read asks for, kept in memory."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "b" * 34


class Hub(ThreadingHTTPServer):
    """`files` of the one repository by name, `commits` made so far; `refuse` answers every write with this status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.private: bool | None = None
        self.role, self.refuse = "write", 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does for a process that has not imported the client yet."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@contextmanager
def hub_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process and its children reach and are known to."""
    hub = Hub()
    Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    point_at(hub.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def do_GET(self) -> None:
        path, files = self._path(), self.server.files
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif path == "/api/whoami-v2":
            self._answer(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": self.server.role}}})
        elif "/tree/" in path:
            folder = path.partition("/tree/")[2].partition("/")[2]
            found = {name: content for name, content in files.items() if name.startswith(folder)}
            if found:
                self._answer(200, [self._entry(name, content) for name, content in found.items()])
            else:
                self._answer(404, {"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"})
        elif "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            self._content(files[name], self._entry(name, files[name])["oid"])
        else:
            self._answer(200, {"id": "me/safe", "sha": self._head(), "siblings": [], "private": True})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["content-length"]))
        if self.server.refuse:
            self._answer(self.server.refuse, {"error": "the storage of this account is full"})
        elif path == "/api/repos/create":
            exists, self.server.private = self.server.private is not None, json.loads(body)["visibility"] == "private"
            self._answer(409 if exists else 200, {"url": f"{self.server.address}/me/safe"})
        elif "/preupload/" in path:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer(200, {"files": modes})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])

    def _commit(self, parts: list[dict]) -> None:
        files = self.server.files
        for part in parts:
            value = part["value"]
            if part["key"] == "header":
                self.server.commits.append(value["summary"])
            elif part["key"] == "deletedFolder":
                for name in [name for name in files if name.startswith(value["path"])]:
                    del files[name]
            elif part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.address}/me/safe/commit/{self._head()}"
        self._answer(200, {"commitUrl": url, "commitOid": self._head(), "success": True})

    def _head(self) -> str:
        return hashlib.sha1(str(len(self.server.commits)).encode()).hexdigest()

    def _entry(self, name: str, content: bytes) -> dict:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def _content(self, content: bytes, etag: str) -> None:
        self.send_response(200)
        for name, value in {"etag": f'"{etag}"', "x-repo-commit": self._head(), "content-length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silence."""
