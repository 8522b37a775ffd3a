"""A whole Restage on loopback: API and worker processes beside a real Valkey and a real S3 server."""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.child import Child
from server.ports import free_ports
from tests.conftest import untraced

PYTHON = [sys.executable, "-m", "server.cli"]
PATIENCE_SECONDS = 120.0


def wait_for(what: str, check: Callable[[], Any], *, timeout_seconds: float = PATIENCE_SECONDS) -> Any:
    """Return the first truthy value of `check`, or fail naming `what` never came."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := check()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(0.05)
    return value


@dataclass
class Client:
    """The HTTP calls that every story makes."""

    http: httpx.Client
    received: list[int] = field(default_factory=list)
    # Of the store: a call outside a client reads the certificates of all the world first.
    _store: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request and remember its status."""
        response = self.http.request(method, path, **options)
        self.received.append(response.status_code)
        return response

    def announce(self, files: dict[str, bytes], content_types: dict[str, str] | None = None) -> list[dict[str, Any]]:
        """Ask for a form for each file."""
        announced = [
            {
                "filename": name,
                "content_type": (content_types or {}).get(name) or content_type_of(name),
                "size_bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            for name, data in files.items()
        ]
        response = self.call("POST", "/v1/uploads", json={"files": announced})
        assert response.status_code == 201, response.text
        return response.json()["uploads"]

    def send(self, form: dict[str, Any], data: bytes) -> None:
        """Send one file straight to the store."""
        response = self._store.post(form["url"], data=form["fields"], files={"file": data})
        assert response.is_success, response.text

    def upload(self, files: dict[str, bytes]) -> list[str]:
        """Announce and send files; returns their upload ids in order."""
        forms = self.announce(files)
        for form, data in zip(forms, files.values(), strict=True):
            self.send(form, data)
        return [form["upload_id"] for form in forms]

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Submit a batch that must be accepted whole."""
        response = self.call("POST", "/v1/batches", json=body)
        assert response.status_code == 201, response.text
        return response.json()["batch"]

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch as it is now."""
        response = self.call("GET", f"/v1/batches/{batch_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def finished(self, batch_id: str, *, timeout_seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """Wait for the end of a batch."""

        def look() -> dict[str, Any] | None:
            batch = self.batch(batch_id)
            return batch if batch["status"] == "finished" else None

        return wait_for(f"the end of batch {batch_id}", look, timeout_seconds=timeout_seconds)

    def output(self, job: dict[str, Any]) -> bytes:
        """Download a job's result and compare it with its record."""
        response = self._store.get(job["output"]["url"])
        assert response.status_code == 200, response.text
        data = response.content
        assert hashlib.sha256(data).hexdigest() == job["output"]["sha256"]
        assert len(data) == job["output"]["size_bytes"]
        return data

    def close(self) -> None:
        """Close all connections."""
        self.http.close()
        self._store.close()


def content_type_of(name: str) -> str:
    """Return the content type that a browser would send for a file of this name."""
    types = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
    return types[name.rsplit(".", 1)[-1]]


@dataclass
class Stack:
    """API and workers that a test may stop, kill and start; what they cover is measured where `is_traced` says so."""

    environment: dict[str, str]
    folder: Path
    port: int
    is_traced: bool = False
    children: list[Child] = field(default_factory=list)
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        """Open the client; connections are made at the first call."""
        self.client = Client(httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30))

    def start(self, *args: str, **environment: str) -> Child:
        """Start `restage <args>`."""
        name = f"{args[0]}-{len(self.children)}"
        child = Child(
            name,
            [*PYTHON, *args],
            log_file=self.folder / f"{name}.log",
        )
        around = os.environ if self.is_traced else untraced()
        child.start({**around, **self.environment, **environment})
        self.children.append(child)
        return child

    def start_worker(self, **environment: str) -> Child:
        """Start a worker on the CPU."""
        return self.start("worker", "--device", "cpu", **environment)

    def wait_ready(self, num_workers: int = 1) -> None:
        """Wait until the API answers and `num_workers` workers serve every model."""

        def look() -> bool:
            for child in self.children:
                assert child.poll() is None, f"{child.name} ended:\n{child.tail()}"
            try:
                models = self.client.http.get("/health/ready").json()["models"]
            except (httpx.HTTPError, KeyError):
                return False
            return bool(models) and all(count >= num_workers for count in models.values())

        wait_for(f"{num_workers} ready workers", look)

    def wait_health(self, status: int) -> None:
        """Wait until `/health/ready` answers with a status."""

        def look() -> bool:
            try:
                return self.client.http.get("/health/ready").status_code == status
            except httpx.HTTPError:
                return False

        wait_for(f"/health/ready to answer {status}", look)

    def wait_api(self) -> None:
        """Wait until the API serves, with workers or without."""
        self.wait_health(200)

    def restart_api(self, **environment: str) -> Child:
        """End the API and start another on the same port."""
        old = next(child for child in self.children if child.name.startswith("api"))
        old.stop(30)
        self.children.remove(old)
        started = self.start("api", **environment)
        self.wait_api()
        return started

    def logs(self) -> str:
        """Return what the processes wrote last."""
        return "\n\n".join(f"--- {child.name}\n{child.tail(60)}" for child in self.children)

    def stop(self) -> None:
        """End everything, workers first; in good order where that is needed, to write down what was covered."""
        self.client.close()
        for child in reversed(self.children):
            child.stop(30 if self.is_traced else 0)


@contextmanager
def opened_stack(environment: dict[str, str], folder: Path, *, is_traced: bool = False) -> Iterator[Stack]:
    """Give a stack on a free port, without any process yet; all that it has by the end are ended."""
    port = free_ports(1)[0]
    own = {"RESTAGE_ENV": "test", "RESTAGE__SERVER__PORT": str(port)}
    running = Stack(own | environment, folder, port, is_traced)
    try:
        yield running
    finally:
        running.stop()
        print(re.sub(r"X-Amz-[^ \"]*", "…", running.logs()))  # noqa: T201 (pytest shows it with a failure)


@pytest.fixture
def unstarted(valkey, s3, weights_dir, tmp_path) -> Iterator[Stack]:
    """Give a stack whose environment may still be changed."""
    environment = {
        "RESTAGE__REDIS__URL": valkey.url,
        "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir),
        **s3.environment,
    }
    with opened_stack(environment, tmp_path) as stack:
        yield stack


@pytest.fixture
def stack(unstarted: Stack) -> Stack:
    """Give an API without workers; a test starts the workers that its story needs."""
    unstarted.start("api")
    return unstarted


@pytest.fixture(scope="module")
def served(valkey_server, s3, weights_dir, tmp_path_factory) -> Iterator[Stack]:
    """Give an API and a worker, for all tests of a file; these leave `valkey` alone, which is emptied for each test."""
    environment = {
        "RESTAGE__REDIS__URL": valkey_server.url,
        "RESTAGE__REDIS__KEY_PREFIX": "served",
        "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir),
        **s3.environment,
    }
    with opened_stack(environment, tmp_path_factory.mktemp("served")) as stack:
        stack.start("api")
        stack.start_worker()
        stack.wait_ready()
        yield stack


@pytest.fixture
def make_client() -> Iterator[Callable[[str], Client]]:
    """Give a function that opens a client to a server's URL."""
    opened: list[Client] = []

    def make(url: str) -> Client:
        opened.append(Client(httpx.Client(base_url=url, timeout=30)))
        return opened[-1]

    yield make
    for client in opened:
        client.close()
