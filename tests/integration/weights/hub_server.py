"""A hub on this machine that speaks what the real client of the Hugging Face Hub asks for, politely or not."""

import hashlib
import json
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MAIN = "1" * 40
LFS_BYTES = 2000  # what is larger lies in LFS, and comes from another host
TOKEN = "hf_secret"  # noqa: S105 - of this hub


@dataclass
class Repository:
    """A repository with one branch, `main`, at `commit`.

    Attributes:
        announced: path → size or digest that is announced in place of the true one.
    """

    files: dict[str, bytes]
    commit: str = MAIN
    is_gated: bool = False
    announced: dict[str, dict[str, Any]] = field(default_factory=dict)

    def sibling(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        about: dict[str, Any] = {"size": len(content), **self.announced.get(path, {})}
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if len(content) <= LFS_BYTES:
            return {"rfilename": path, "blobId": git, **about}
        sha256 = about.pop("sha256", hashlib.sha256(content).hexdigest())
        lfs = {"sha256": sha256, "pointerSize": 130, **about}
        return {"rfilename": path, "blobId": git, "size": lfs["size"], "lfs": lfs}


@dataclass(frozen=True)
class Request:
    """One request for a file's content, as it arrived."""

    path: str
    range: str | None
    is_authorized: bool


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed break connections off; what a test expects of them it asserts itself."""


@dataclass
class HubServer:
    """Listens on this machine. What is set here holds for the requests that follow.

    Attributes:
        bodies: what happens to the next answers for a path, in turn: a number of bytes after which the connection is
            closed, a negative one after which it is reset, or the bytes that are sent instead of the right ones.
        statuses: path → HTTP statuses of the next answers.
        takes_ranges: whether a part of a file may be asked for.
        bytes_per_second: of every body.
        requests: for contents; `listings` for what there is.
    """

    repositories: dict[str, Repository]
    bodies: dict[str, list[int | bytes]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    takes_ranges: bool = True
    bytes_per_second: float | None = None
    requests: list[Request] = field(default_factory=list)
    listings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    owner.answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the library has it
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        return [request.path for request in self.requests]

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(http.path).path)
        for name, repository in self.repositories.items():
            for prefix, work in ((f"/api/models/{name}/revision/", self._list), (f"/{name}/resolve/", self._resolve)):
                if path.startswith(prefix):
                    work(http, name, repository, path.removeprefix(prefix))
                    return
            if path.startswith(f"/cdn/{name}/"):
                self._send_file(http, repository, path.removeprefix(f"/cdn/{name}/"))
                return
        self.unknown.append(path)
        _send(http, 404 if path.startswith("/api/models/") else 400, {"X-Error-Code": "RepoNotFound"})

    def _list(self, http: BaseHTTPRequestHandler, name: str, repository: Repository, revision: str) -> None:
        self.listings.append(revision)
        if revision not in {"main", repository.commit}:
            _send(http, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [repository.sibling(path) for path in repository.files]
        body = json.dumps({"id": name, "sha": repository.commit, "siblings": siblings}).encode()
        _send(http, 200, {"Content-Type": "application/json"}, body)

    def _resolve(self, http: BaseHTTPRequestHandler, name: str, repository: Repository, rest: str) -> None:
        revision, _, path = rest.partition("/")
        is_authorized = http.headers["Authorization"] == f"Bearer {TOKEN}"
        if repository.is_gated and not is_authorized:
            _send(http, 401, {"X-Error-Code": "GatedRepo"})
        elif revision != repository.commit or path not in repository.files:
            _send(http, 404, {"X-Error-Code": "EntryNotFound"})
        elif "lfs" in repository.sibling(path):
            # As the hub does: large files come from another host, by a signed URL.
            self._send_head_of(http, f"http://localhost:{self.port}/cdn/{name}/{path}?signature=signed")
        else:
            self._send_file(http, repository, path)

    def _send_head_of(self, http: BaseHTTPRequestHandler, location: str) -> None:
        _send(http, 302, {"Location": location})

    def _send_file(self, http: BaseHTTPRequestHandler, repository: Repository, path: str) -> None:
        asked = http.headers["Range"]
        self.requests.append(Request(path, asked, http.headers["Authorization"] is not None))
        statuses = self.statuses.get(path)
        if statuses:
            _send(http, statuses.pop(0), {})
            return
        content, fault = repository.files[path], (self.bodies.get(path) or [None]).pop(0)
        if isinstance(fault, bytes):
            content = fault
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.takes_ranges else 0
        body = content[start:]
        http.send_response(206 if start else 200)
        http.send_header("Content-Length", str(len(body)))
        if start:
            http.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        http.end_headers()
        self._send_body(http, body if not isinstance(fault, int) else body[: abs(fault)])
        if isinstance(fault, int):
            _break_off(http, reset=fault < 0)

    def _send_body(self, http: BaseHTTPRequestHandler, body: bytes) -> None:
        block_bytes = len(body) if self.bytes_per_second is None else max(int(self.bytes_per_second / 50), 1)
        for start in range(0, len(body), block_bytes or 1):
            http.wfile.write(body[start : start + block_bytes])
            if self.bytes_per_second is not None:
                time.sleep(0.02)


def _send(http: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    http.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        http.send_header(name, value)
    http.end_headers()
    http.wfile.write(body)


def _break_off(http: BaseHTTPRequestHandler, *, reset: bool) -> None:
    http.close_connection = True
    http.wfile.flush()
    if reset:
        # Let what was sent arrive first: a reset throws away what the peer has not read yet.
        time.sleep(0.3)
        http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        http.connection.shutdown(socket.SHUT_RDWR)
    http.connection.close()


def make_lora(size_bytes: int) -> bytes:
    """Make a LoRA of about this size for one layer, in a pattern in which a shift would show."""
    width = size_bytes // 8
    header = json.dumps(
        {
            "layer.lora_A.weight": {"dtype": "F32", "shape": [1, width], "data_offsets": [0, width * 4]},
            "layer.lora_B.weight": {"dtype": "F32", "shape": [width, 1], "data_offsets": [width * 4, width * 8]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    pattern = b"".join(struct.pack("<I", number) for number in range(4096))
    return struct.pack("<Q", len(header)) + header + (pattern * (width * 8 // len(pattern) + 1))[: width * 8]
