"""Measures what it costs to accept a batch durably, against sending as many Dramatiq messages to the same Valkey."""

import asyncio
import secrets
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import redis
from bench_report import Figure, Target
from bench_servers import MODEL, BenchFailed, Servers

from server.jobs import Batch, Job, JobInput, Priority
from server.ledger.api_side import ApiLedger, Idempotency, connect
from server.ledger.records import UploadRecord
from server.prompts import Prompts
from server.queue import ACTOR_NAME, DRAMATIQ_NAMESPACE, create_broker, declare_ring, queue_name
from server.registry import load_registry
from server.settings import Settings
from server.submit.request import ItemRequest, ItemSettings
from server.submit.resolve import Resolver

_OWNER = "bench"
_WARM_UPS = 3
TARGET = Target("at least", 5)


def measure_submit(servers: Servers, *, num_jobs: int, repetitions: int) -> Iterator[Figure]:
    """Compare SUBMIT with Dramatiq's own `send()`, in turn, on queues that are empty before each."""
    servers.empty_ledger()
    settings = servers.settings()
    with redis.Redis.from_url(settings.redis.url) as client:
        if client.config_get("appendfsync") != {"appendfsync": "always"}:
            raise BenchFailed("Valkey does not write at once, so the comparison would mean nothing")
        sender = _Sender(client, queue_name(settings.redis.key_prefix, MODEL), num_jobs)
        with asyncio.Runner() as runner:
            submitter = _Submitter(settings, num_jobs)
            submit_ms, send_ms, set_ms = [], [], []
            for _ in range(_WARM_UPS + repetitions):
                sender.forget()
                submit_ms.append(1000 * runner.run(submitter.time_submit()))
                sender.forget()
                send_ms.append(1000 * sender.time_sends())
                set_ms.append(1000 * _time_set(client))
            runner.run(submitter.close())
    submit, send, one_set = (statistics.median(times[_WARM_UPS:]) for times in (submit_ms, send_ms, set_ms))
    yield Figure(
        f"SUBMIT of {num_jobs} jobs against {num_jobs} Dramatiq send() calls",
        send / submit,
        "x faster",
        f"{submit:.2f} ms against {send:.2f} ms, medians of {repetitions}; one SET takes {one_set:.2f} ms",
        TARGET,
    )


def _time_set(client: redis.Redis) -> float:
    """Time the smallest durable write, which tells how fast the disk is; the slower it is, the more SUBMIT gains."""
    start = time.perf_counter()
    client.set("bench", 1)
    return time.perf_counter() - start


class _Sender:
    """Sends messages through the project's broker."""

    def __init__(self, client: redis.Redis, queue: str, num_messages: int) -> None:
        self._client = client
        self._num_messages = num_messages
        self._keys = [f"{DRAMATIQ_NAMESPACE}:{queue}", f"{DRAMATIQ_NAMESPACE}:{queue}.msgs"]
        broker = create_broker(client)
        declare_ring(broker, lambda _model: None, queue)
        self._actor = broker.get_actor(ACTOR_NAME)

    def time_sends(self) -> float:
        """Send them one after another, as Dramatiq does; returns seconds."""
        start = time.perf_counter()
        for _ in range(self._num_messages):
            self._actor.send(MODEL)
        seconds = time.perf_counter() - start
        if self._client.llen(self._keys[0]) != self._num_messages:
            raise BenchFailed("not every message is in its queue")
        return seconds

    def forget(self) -> None:
        """Empty the queue: SUBMIT rings no more once so many bells lie there."""
        self._client.delete(*self._keys)


class _Submitter:
    """Submits batches of jobs as the API makes them."""

    def __init__(self, settings: Settings, num_jobs: int) -> None:
        self._settings = settings
        self._num_jobs = num_jobs
        self._ledger = ApiLedger(connect(settings.redis), key_prefix=settings.redis.key_prefix)
        self._resolver = Resolver(
            load_registry(settings), Prompts.load(settings.config_dir), default_model=MODEL, max_prompt_characters=4000
        )

    async def time_submit(self) -> float:
        """Announce photos, then accept a batch of them; returns the seconds of the second."""
        uploads = [_upload(index) for index in range(self._num_jobs)]
        await self._ledger.announce_uploads(uploads, form_ttl_seconds=900, unused_ttl_seconds=86400, offer_seconds=3600)
        batch_id = secrets.token_hex(16)
        jobs = tuple(self._make_job(batch_id, index, upload) for index, upload in enumerate(uploads))
        batch = Batch(batch_id, _OWNER, label="12 Oak St", jobs=jobs)
        idempotency = Idempotency(secrets.token_hex(16), secrets.token_hex(32), answer='{"errors": []}', ttl_seconds=60)
        start = time.perf_counter()
        result = await self._ledger.submit(
            batch, retention=self._settings.retention, max_open_jobs=10**6, idempotency=idempotency
        )
        seconds = time.perf_counter() - start
        if result.kind != "accepted":
            raise BenchFailed(f"the ledger answers {result.kind}")
        return seconds

    async def close(self) -> None:
        """Close the connections."""
        await self._ledger.close()

    def _make_job(self, batch_id: str, index: int, upload: UploadRecord) -> Job:
        item = ItemRequest(upload_id=upload.id, name=upload.filename, room_type="living_room")
        draft = self._resolver.draft(index, item, ItemSettings())
        photo = JobInput(
            upload_id=upload.id,
            key=upload.key,
            etag=secrets.token_hex(16),
            sha256=upload.sha256,
            content_type=upload.content_type,
            size_bytes=upload.size_bytes,
            height=1536,
            width=2048,
        )
        job = draft.complete([photo], owner=_OWNER, priority=Priority.NORMAL)
        return replace(job, batch_id=batch_id)


def _upload(index: int) -> UploadRecord:
    upload_id = secrets.token_hex(16)
    return UploadRecord(
        id=upload_id,
        owner=_OWNER,
        key=upload_id,
        filename=f"photo-{index + 1:02d}.jpg",
        content_type="image/jpeg",
        size_bytes=300_000,
        sha256=secrets.token_hex(32),
    )
