"""Real worker processes on a real Valkey, a real store and the tiny twins; jobs go in as the API would put them."""

import asyncio
import hashlib
import io
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from PIL import Image
from redis.asyncio import Redis

from server.child import Child
from server.errors import LedgerUnavailable
from server.jobs import Batch, BatchStatus, Job, JobInput, OutputSpec, Priority
from server.ledger.api_side import ApiLedger
from server.ledger.records import UploadRecord
from server.ledger.status import WorkerStatus
from server.marker import marker_key
from server.registry import Registry, load_registry
from server.settings import RetentionSettings, Settings, load_settings
from server.store import Store
from server.worker.decoding import Decoders
from tests.conftest import untraced
from tests.integration.worker.lane_kit import LaneKit

OWNER = "ana"
# Generous: an import of torch alone takes half a minute on a busy machine.
PATIENCE_SECONDS = 120.0
SWEEP_SECONDS = 0.5


class Workers:
    """Worker processes, and the API's side of their ledger with a sweep of its own."""

    QWEN = "tiny-qwen-image-edit-2511"
    FLUX = "tiny-flux-kontext"

    def __init__(self, environment: dict[str, str], folder: Path, store: Store, *, is_traced: bool = False) -> None:
        self.environment = environment
        self._is_traced = is_traced
        self.settings: Settings = load_settings(env=environment)
        self.registry: Registry = load_registry(self.settings)
        self.store = store
        self.children: list[Child] = []
        self._folder = folder
        self._client = redis.Redis.from_url(self.settings.redis.url, decode_responses=True, socket_timeout=10)
        self._sweeping = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._api_client = Redis.from_url(self.settings.redis.url, decode_responses=True, socket_timeout=5)
        self.api = ApiLedger(self._api_client, key_prefix=self.prefix)
        self._sweep = asyncio.run_coroutine_threadsafe(self._sweep_on(), self._loop)

    @staticmethod
    def picture(
        height: int = 96, width: int = 128, *, seed: int = 0, file_format: str = "PNG", **options: Any
    ) -> bytes:
        """Return a photo's file; each seed gives another."""
        colors = [(37 * seed + 50 * place) % 256 for place in range(3)]
        image = Image.linear_gradient("L").resize((width, height))
        image = Image.merge("RGB", [image.point([(value + color) % 256 for value in range(256)]) for color in colors])
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    @property
    def prefix(self) -> str:
        """Of all keys of this ledger."""
        return self.settings.redis.key_prefix

    def close(self, *, stop_seconds: float = 0.0) -> None:
        """Kill all workers, after giving them time to write their coverage down, and close all connections."""
        for child in self.children:
            child.stop(stop_seconds)
        self._sweeping = False
        self._sweep.result(10)
        self.wait(self.api.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._client.close()

    async def _sweep_on(self) -> None:
        while self._sweeping:
            with suppress(LedgerUnavailable):
                await self.api.sweep(
                    self.registry.ids,
                    lease_seconds=self.settings.worker.lease_seconds,
                    interval_seconds=SWEEP_SECONDS,
                )
            await asyncio.sleep(SWEEP_SECONDS)

    def wait(self, call: Any) -> Any:
        """Wait for a call of the API's side."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    def start(self, *, module: str = "server.cli", **environment: str) -> Child:
        """Start a worker process; `module` is the command line, or one that wraps it."""
        child = Child(
            f"worker-{len(self.children)}",
            [sys.executable, "-m", module, "worker"],
            log_file=self._folder / f"worker-{len(self.children)}.log",
        )
        around = os.environ if self._is_traced else untraced()
        child.start({**around, **self.environment, **environment})
        self.children.append(child)
        return child

    def ensure(self, num_workers: int) -> None:
        """Have exactly so many workers ready: what an earlier test left alive is used again."""
        for child in self.children:
            if child.is_running and len(self.alive()) > num_workers:
                child.kill_group()
        for _ in range(num_workers - len(self.alive())):
            self.start()
        self.wait_ready(num_workers)

    def alive(self) -> list[Child]:
        """Return the processes that run."""
        return [child for child in self.children if child.is_running]

    def holder(self, job_id: str) -> Child:
        """Return the process of the worker that claimed a job last."""
        worker_id = self.read(job_id).worker or ""
        pid = int(worker_id.rsplit("-", 2)[1])
        return next(child for child in self.children if child.pid == pid)

    def statuses(self) -> list[WorkerStatus]:
        """Return what the living workers announce."""
        return self.wait(self.api.workers())

    def wait_ready(self, num_workers: int = 1) -> None:
        """Wait until so many workers are ready for a job."""

        def look() -> bool:
            alive = {child.pid for child in self.alive()}
            assert len(alive) >= num_workers, self.logs()
            ready = [one for one in self.statuses() if any(model.ready for model in one.models.values())]
            return len([one for one in ready if one.pid in alive]) >= num_workers

        self.until(f"{num_workers} ready workers", look)

    def until(self, what: str, look: Callable[[], Any], *, timeout_seconds: float = PATIENCE_SECONDS) -> Any:
        """Return the first truthy value of `look`."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            # A Redis that was killed has left dead connections behind.
            with suppress(LedgerUnavailable):
                if value := look():
                    return value
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout_seconds:g} s: {what}\n{self.logs()}")
            time.sleep(0.02)

    def logs(self) -> str:
        """Return what the workers wrote last."""
        return "\n\n".join(f"--- {child.name}\n{child.tail(60)}" for child in self.children)

    def upload(self, data: bytes, **recorded: Any) -> JobInput:
        """Store a photo, and describe it as the API would have seen it; `recorded` is what it saw otherwise."""
        upload_id = secrets.token_hex(16)
        form = self.store.upload_form(upload_id, content_type="image/png", max_size_bytes=10**8, ttl_seconds=600)
        httpx.post(form.url, data=form.fields, files={"file": data}).raise_for_status()
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        except OSError:
            height, width = 96, 128
        seen = {
            "etag": self.store.read_start(upload_id, 16).etag,
            "sha256": hashlib.sha256(data).hexdigest(),
            "height": height,
            "width": width,
        }
        return JobInput(
            upload_id=upload_id,
            key=upload_id,
            content_type="image/png",
            size_bytes=len(data),
            **(seen | recorded),
        )

    def job(
        self,
        photo: JobInput,
        model: str = "tiny-flux-kontext",
        *,
        params: dict[str, Any] | None = None,
        output: OutputSpec | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> Job:
        """Describe a job as the API would have resolved it; to be submitted."""
        entry = self.registry.get(model)
        resolved = entry.resolve_params(params or {}).resolved(photo.height, photo.width, entry.area, seed=7)
        return Job(
            id=secrets.token_hex(16),
            batch_id="",
            index=0,
            owner=OWNER,
            model=model,
            model_version=entry.version,
            prompt="a bright living room",
            inputs=(photo,),
            params=resolved,
            output_spec=output or OutputSpec(format="png"),
            priority=priority,
        )

    def submit(self, *jobs: Job) -> list[str]:
        """Have jobs accepted as one batch; returns their ids, and the batch's first."""
        batch = Batch(id=secrets.token_hex(16), owner=OWNER, priority=jobs[0].priority, jobs=jobs)
        records = [
            UploadRecord(one.upload_id, OWNER, one.key, "room.png", one.content_type, one.size_bytes)
            for job in jobs
            for one in job.inputs
        ]
        self.wait(self.api.announce_uploads(records, form_ttl_seconds=60, unused_ttl_seconds=600, offer_seconds=600))
        result = self.wait(self.api.submit(batch, retention=RetentionSettings(), max_open_jobs=1000))
        assert result.kind == "accepted", result
        return [batch.id, *(job.id for job in jobs)]

    def read(self, job_id: str) -> Job:
        """Return a job as it is now."""
        return self.wait(self.api.read_job(job_id))

    def field(self, job_id: str, name: str) -> Any:
        """Return one field of a job's hash that the API does not show."""
        return self._client.hget(f"{self.prefix}:job:{job_id}", name)

    def step(self, job_id: str, at_least: int = 1) -> Job:
        """Wait until a job has done so many steps."""

        def look() -> Job | None:
            job = self.read(job_id)
            return job if (job.step or 0) >= at_least else None

        return self.until(f"step {at_least} of job {job_id}", look)

    def finished(self, batch_id: str, *, timeout_seconds: float = PATIENCE_SECONDS) -> Batch:
        """Wait for the end of a batch."""

        def look() -> Batch | None:
            batch = self.wait(self.api.read_batch(batch_id))
            return batch if batch.status == BatchStatus.FINISHED else None

        return self.until(f"the end of batch {batch_id}", look, timeout_seconds=timeout_seconds)

    def events(self, batch_id: str) -> list[str]:
        """List the kinds of a batch's events, oldest first."""
        entries: Any = self._client.xrange(f"{self.prefix}:batch:{batch_id}:events")
        return [fields["type"] for _, fields in entries]

    def outputs(self, job_id: str) -> list[str]:
        """List the keys of all objects that any try of a job has left in the store, without its marker."""
        objects = self.store._client.list_objects("restage-outputs", prefix=f"{job_id}/", recursive=True)
        return [str(one.object_name) for one in objects if one.object_name != marker_key(job_id)]

    def image(self, job: Job) -> Image.Image:
        """Download a job's result and compare it with its record."""
        assert job.output is not None, job
        url, _ = self.store.output_url(
            job.output.key, filename="a.png", content_type=job.output.content_type, ttl_seconds=600
        )
        data = httpx.get(url).raise_for_status().content
        assert hashlib.sha256(data).hexdigest() == job.output.sha256
        assert len(data) == job.output.size_bytes
        image = Image.open(io.BytesIO(data))
        image.load()
        assert (image.height, image.width) == (job.output.height, job.output.width)
        return image


@pytest.fixture(scope="session")
def environment(s3: Any, weights_dir: Path) -> dict[str, str]:
    """Give the variables that all workers have in common; Redis is missing."""
    return {
        "RESTAGE_ENV": "test",
        "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir),
        "RESTAGE__MODELS__ENABLED": f'["{Workers.QWEN}", "{Workers.FLUX}"]',
        **s3.environment,
    }


@pytest.fixture
def new_workers(environment: dict[str, str], s3: Any, tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    """Give a function that opens a ledger for worker processes: `new_workers(valkey.url, RESTAGE__A__B="…")`."""
    opened: list[Workers] = []

    def make(redis_url: str, **extra: str) -> Workers:
        opened.append(Workers(environment | {"RESTAGE__REDIS__URL": redis_url} | extra, tmp_path, s3.store))
        return opened[-1]

    yield make
    for workers in opened:
        workers.close()


@pytest.fixture
def workers(new_workers: Callable[..., Workers], valkey: Any) -> Workers:
    """Give a ledger without workers on the shared Valkey; a test starts those that its story needs."""
    return new_workers(valkey.url)


@pytest.fixture(scope="session")
def steady(
    environment: dict[str, str], s3: Any, valkey_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    """Give a worker that no test harms, so that starting it is paid for once."""
    own = {
        "RESTAGE__REDIS__URL": valkey_server.url,
        "RESTAGE__REDIS__KEY_PREFIX": "steady",
        "RESTAGE__WORKER__RETRY_BASE_SECONDS": "0.2",
    }
    # Of the workers that are processes, this one alone shows what it covers: the others are mostly killed.
    workers = Workers(environment | own, tmp_path_factory.mktemp("steady"), s3.store, is_traced=True)
    try:
        workers.start()
        workers.wait_ready()
        yield workers
    finally:
        workers.close(stop_seconds=30)


@pytest.fixture(scope="module")
def crew(
    environment: dict[str, str], s3: Any, valkey_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    """Give a ledger whose workers may be killed: each test begins with `crew.ensure(n)`."""
    own = {"RESTAGE__REDIS__URL": valkey_server.url, "RESTAGE__REDIS__KEY_PREFIX": "crew"}
    workers = Workers(environment | own, tmp_path_factory.mktemp("crew"), s3.store)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def decoders() -> Iterator[Decoders]:
    """Give the processes that decode photos for stage threads in this process."""
    started = Decoders(2, max_pixels=10**8, max_file_bytes=10**8)
    yield started
    started.close()


@pytest.fixture
def running_lane(workers: Workers) -> Callable[..., Any]:
    """Give a function that runs a lane with some settings changed, as a context."""

    @contextmanager
    def run(**settings: Any) -> Iterator[LaneKit]:
        kit = LaneKit(workers, **settings)
        kit.thread.start()
        try:
            yield kit
        finally:
            kit.lane.stop()
            kit.thread.join(60)
        assert not kit.thread.is_alive()

    return run
