"""The API in this process, from routing to a real Valkey and a real store; workers are played by their own ledger."""

import asyncio
import hashlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import redis
import uvicorn
from litestar import Litestar
from litestar.testing import TestClient
from PIL import Image

from server.api.services import Services
from server.jobs import Job, JobOutput
from server.ledger.status import WorkerModel, WorkerStatus
from server.ledger.worker_side import WorkerLedger
from server.main import create_app
from server.settings import Settings
from server.store import Store

QWEN = "tiny-qwen-image-edit-2511"
FLUX = "tiny-flux-kontext"
MODELS = [QWEN, FLUX]


def picture(image_format: str = "JPEG", size: tuple[int, int] = (160, 120), **options: Any) -> bytes:
    """Encode a photo; `size` is width, height, as Pillow has it."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, image_format, **options)
    return buffer.getvalue()


@dataclass
class Api:
    """One API, its clients and a worker's ledger beside it."""

    http: TestClient[Any] | httpx.Client
    settings: Settings
    store: Store
    redis: redis.Redis
    worker: WorkerLedger
    services: Services

    def announce(self, *files: bytes, content_type: str = "image/jpeg", **options: Any) -> list[dict[str, Any]]:
        """Ask for a form for each file."""
        announced = [
            {"filename": f"{number}.jpg", "content_type": content_type, "size_bytes": len(data)}
            for number, data in enumerate(files)
        ]
        response = self.http.post("/v1/uploads", json={"files": announced}, **options)
        assert response.status_code == 201, response.text
        return response.json()["uploads"]

    def upload(self, *files: bytes, **options: Any) -> list[str]:
        """Announce files and send them to the store; returns the ids of the uploads."""
        forms = self.announce(*files, **options)
        for form, data in zip(forms, files, strict=True):
            sent = httpx.post(form["url"], data=form["fields"], files={"file": data})
            assert sent.is_success, sent.text
        return [form["upload_id"] for form in forms]

    def submit(self, *items: dict[str, Any], headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        """Submit a batch."""
        return self.http.post("/v1/batches", json={"items": list(items), **body}, headers=headers)

    def accept(self, *items: dict[str, Any], **body: Any) -> dict[str, Any]:
        """Submit a batch of which every item must be accepted."""
        response = self.submit(*items, **body)
        assert response.status_code == 201, response.text
        return response.json()["batch"]

    def run_next(self, data: bytes | None = None) -> Job:
        """Do one job as a worker does; the result is a photo of another kind, or `data`."""
        job = self.worker.claim(MODELS, num_held=0)
        assert isinstance(job, Job)
        self.worker.start(job.id, job.fence, on_device=True)
        data = picture("WEBP", (128, 96)) if data is None else data
        key = f"{job.id}/{job.fence}/output.webp"
        self.store.put_output(key, data, "image/webp")
        output = JobOutput(key, hashlib.sha256(data).hexdigest(), "image/webp", 96, 128, len(data))
        timings = {"fetch": 0.1, "run": 0.2, "store": 0.1}
        answer = self.worker.commit(
            job.id,
            job.fence,
            output=output,
            timings=timings,
            params=job.params,
            inputs=job.inputs,
            speeds={"run": 0.2},
        )
        assert answer == "ok"
        return job

    def fail_next(self) -> Job:
        """Do one job as a worker does that cannot decode its photo."""
        job = self.worker.claim(MODELS, num_held=0)
        assert isinstance(job, Job)
        answer = self.worker.fail(job.id, job.fence, code="invalid_input", detail="The photo is cut off.", timings={})
        assert answer == "ok"
        return job

    def announce_worker(
        self, *, model: str = QWEN, ready: bool = True, reason: str | None = None, **weights: Any
    ) -> None:
        """Say that a worker lives that serves, or cannot serve, a model alone; `weights` tell what it found."""
        models = {model: WorkerModel(ready=ready, resident=ready, reason=reason, **weights)}
        self.worker.announce(WorkerStatus("worker-1", "cpu", 1, models))


@pytest.fixture
def open_api(valkey, s3, settings_for) -> Callable[..., Any]:
    """Let a test open an API with settings of its own, as a context manager."""

    @contextmanager
    def opened(**environment: str) -> Iterator[Api]:
        settings = settings_for(valkey=valkey, s3=s3, **environment)
        worker = WorkerLedger(
            valkey.client(decode_responses=True),
            worker_id="worker-1",
            key_prefix=settings.redis.key_prefix,
            lease_seconds=60,
        )
        # What a handler fails with must come out as an answer, as it does behind a real server.
        app = create_app(settings)
        with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as http:
            http.follow_redirects = False
            yield Api(http, settings, s3.store, valkey.client(decode_responses=True), worker, app.state.services)

    return opened


@pytest.fixture
def open_live_api(valkey, s3, settings_for) -> Callable[..., Any]:
    """Let a test open an API behind a real socket: a test client shows no stream, and no client that goes away.

    It runs in a thread of this process; `services` are what its handlers work with.
    """

    @contextmanager
    def opened(**environment: str) -> Iterator[Api]:
        settings = settings_for(valkey=valkey, s3=s3, **environment)
        worker = WorkerLedger(
            valkey.client(decode_responses=True),
            worker_id="worker-1",
            key_prefix=settings.redis.key_prefix,
            lease_seconds=60,
        )
        app = create_app(settings)
        with _serving(app) as url, httpx.Client(base_url=url, timeout=30) as http:
            http.get("/health/live")
            yield Api(http, settings, s3.store, valkey.client(decode_responses=True), worker, app.state.services)

    return opened


@contextmanager
def _serving(app: Litestar) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", **options))

        async def serve() -> None:
            async with app.lifespan():
                await server.serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def api(open_api) -> Iterator[Api]:
    """Give an API without keys."""
    with open_api() as running:
        yield running
