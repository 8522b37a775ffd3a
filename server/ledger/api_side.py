"""The ledger as the API uses it: accept, read, cancel, sweep. One round trip a call, on the event loop."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import redis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError

from server.errors import ConfigError
from server.jobs import Batch, Job
from server.ledger.records import (
    UploadRecord,
    batch_fields,
    dump,
    job_fields,
    parse_batch,
    parse_job,
    parse_upload,
    upload_fields,
)
from server.ledger.scripts import SCHEMA_VERSION, as_map, script_keys, script_text, unavailable
from server.ledger.status import ModelStatus, WorkerStatus, model_statuses, parse_worker
from server.settings import RedisSettings

SubmitKind = Literal["accepted", "replayed", "conflict", "missing_upload", "full"]
CancelAnswer = Literal["cancelled", "requested", "finished", "unknown"]
POISON_AFTER_DEVICE_DEATHS = 3
_SWEEP_LIMIT = 100
_MAX_CONNECTIONS = 64
_SCRIPTS = ("submit", "read_batch", "read_job", "cancel", "reopen", "sweep")


@dataclass(frozen=True)
class Idempotency:
    """What makes a repeated submission the same one; `answer` is kept and given again."""

    key: str
    body_sha256: str
    answer: str
    ttl_seconds: int

    @property
    def key_sha256(self) -> str:
        """The client's key as it stands in Redis: any text, bounded length."""
        return hashlib.sha256(self.key.encode()).hexdigest()


@dataclass(frozen=True)
class SubmitResult:
    """How a submission ended; `text` is the first answer (replayed) or an upload's id (missing_upload)."""

    kind: SubmitKind
    text: str


@dataclass(frozen=True)
class SweepReport:
    """What one sweep did. `waiting`: leases have run out, but their holders still get time to renew."""

    requeued: int
    cancelled: int
    poisoned: int
    due: int
    rung: int
    forgotten: int
    waiting: bool


@asynccontextmanager
async def ledger_errors() -> AsyncGenerator[None]:
    """Turn a Redis that does not serve into `LedgerUnavailable`; mistakes of ours stay what they are."""
    try:
        yield
    except RedisError as error:
        if (translated := unavailable(error)) is None:
            raise
        raise translated from error


def connect(settings: RedisSettings) -> Redis:
    """Return a client that answers or fails within about two timeouts; it connects at its first call.

    A broken connection is made anew once. A timeout is not tried again: redis-py would do so for connecting and for the
    call, four times in all, while the client of the API waits. More calls than there are connections wait their turn.
    """
    pool = BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType] (redis types no **kwargs)
        settings.url,
        max_connections=_MAX_CONNECTIONS,
        timeout=settings.timeout_seconds,
        password=settings.password.get_secret_value() if settings.password else None,
        decode_responses=True,
        socket_timeout=settings.timeout_seconds,
        socket_connect_timeout=settings.timeout_seconds,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 1, supported_errors=(redis.ConnectionError,)),
    )
    return Redis.from_pool(pool)


class ApiLedger:
    """The API's view of the ledger."""

    def __init__(self, client: Redis, *, key_prefix: str) -> None:
        self._client = client
        self._prefix = key_prefix
        self._keys = script_keys(key_prefix)
        self._scripts = {name: client.register_script(script_text(name)) for name in _SCRIPTS}

    async def _run(self, name: str, *args: object) -> Any:
        async with ledger_errors():
            return await self._scripts[name](keys=self._keys, args=[*args])  # pyright: ignore[reportArgumentType]

    async def ping(self) -> None:
        """Return when Redis answers.

        Raises:
            LedgerUnavailable: it does not.
        """
        async with ledger_errors():
            await cast("Any", self._client).ping()

    async def check_schema(self) -> None:
        """Store the schema version in an empty ledger; refuse one that another version wrote.

        Raises:
            ConfigError: the ledger has another schema version.
        """
        async with ledger_errors():
            found = await self._client.get(f"{self._prefix}:schema")
            if (
                found is None
            ):  # a full Redis refuses even a SET that would change nothing, and must be read all the same
                await self._client.set(f"{self._prefix}:schema", SCHEMA_VERSION, nx=True)
                found = await self._client.get(f"{self._prefix}:schema")
        if found != SCHEMA_VERSION:
            raise ConfigError(
                [f"redis: the ledger under '{self._prefix}' has schema {found}; this version reads {SCHEMA_VERSION}"]
            )

    async def create_uploads(self, records: Sequence[UploadRecord], *, ttl_seconds: int) -> None:
        """Remember forms that were handed out, in one round trip; those that no batch names go after `ttl_seconds`."""
        async with ledger_errors(), self._client.pipeline(transaction=True) as pipe:
            for record in records:
                key = f"{self._prefix}:upload:{record.id}"
                pipe.hset(key, mapping=cast("Any", upload_fields(record)))
                pipe.expire(key, ttl_seconds)
            await pipe.execute()

    async def get_uploads(self, owner: str, upload_ids: Sequence[str]) -> list[UploadRecord | None]:
        """Return the uploads in the order of `upload_ids`; None where unknown or another owner's."""
        async with ledger_errors(), self._client.pipeline(transaction=False) as pipe:
            for upload_id in upload_ids:
                pipe.hgetall(f"{self._prefix}:upload:{upload_id}")
            replies: list[dict[str, str]] = await pipe.execute()
        return [parse_upload(fields) if fields and fields["owner"] == owner else None for fields in replies]

    async def find_idempotent(self, owner: str, key: str) -> tuple[str, str] | None:
        """Return the body's sha256 and the answer of an earlier submission under this key, or None."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        async with ledger_errors():
            found = await cast(
                "Any",
                self._client.hmget(f"{self._prefix}:idempotency:{owner}:{digest}", ["body_sha256", "answer"]),
            )
        return (found[0], found[1]) if found[0] is not None else None

    async def submit(
        self, batch: Batch, *, records_ttl_seconds: int, max_open_jobs: int, idempotency: Idempotency | None = None
    ) -> SubmitResult:
        """Accept a batch: all of it, durably, or nothing. Repeating the call with the same batch id changes nothing."""
        request: dict[str, Any] = {
            "batch": {"id": batch.id, "owner": batch.owner, "fields": batch_fields(batch, records_ttl_seconds)},
            "jobs": [
                {"id": job.id, "fields": job_fields(job), "uploads": [one.upload_id for one in job.inputs]}
                for job in batch.jobs
            ],
            "max_open": max_open_jobs,
        }
        if idempotency:
            request["idempotency"] = {
                "key": idempotency.key_sha256,
                "body_sha256": idempotency.body_sha256,
                "answer": idempotency.answer,
                "ttl_ms": idempotency.ttl_seconds * 1000,
            }
        kind, text = await self._run("submit", dump(request))
        return SubmitResult(kind=kind, text=text)

    async def read_batch(self, batch_id: str) -> Batch | None:
        """Return a batch with all its jobs, or None when it is unknown."""
        reply = await self._run("read_batch", batch_id)
        if not reply:
            return None
        return parse_batch(
            as_map(reply[0]), tuple(parse_job(as_map(job), position or None) for job, position in reply[1:])
        )

    async def read_job(self, job_id: str) -> Job | None:
        """Return a job, or None when it is unknown."""
        reply = await self._run("read_job", job_id)
        return parse_job(as_map(reply[0]), reply[1] or None) if reply else None

    async def cancel(self, owner: str, job_ids: Sequence[str]) -> list[CancelAnswer]:
        """Cancel jobs of `owner` ("" for any); answers are in the order of `job_ids`."""
        return await self._run("cancel", owner, *job_ids)

    async def reopen(self, owner: str, batch_id: str, job_ids: Sequence[str]) -> list[str]:
        """Queue failed and cancelled jobs of a batch again; returns the ids that were."""
        return await self._run("reopen", owner, batch_id, *job_ids)

    async def sweep(self, models: Sequence[str], *, lease_seconds: float, interval_seconds: float) -> SweepReport:
        """Do what is due. `interval_seconds` is the usual time between sweeps: a longer pause looks like an outage."""
        lease_ms = int(lease_seconds * 1000)
        # Renewed at each third, a lease has at least two thirds left when Redis goes away. So a pause that is not taken
        # for an outage costs nobody a lease, as long as three intervals are not more than that.
        outage_ms = int(max(lease_ms / 3, interval_seconds * 3000))
        reply = await self._run("sweep", lease_ms, outage_ms, _SWEEP_LIMIT, POISON_AFTER_DEVICE_DEATHS, *models)
        return SweepReport(**json.loads(reply))

    async def workers(self) -> list[WorkerStatus]:
        """Return every worker that announced itself lately."""
        async with ledger_errors():
            ids = sorted(await cast("Any", self._client.smembers(f"{self._prefix}:workers")))
            async with self._client.pipeline(transaction=False) as pipe:
                for worker_id in ids:
                    pipe.hgetall(f"{self._prefix}:worker:{worker_id}")
                replies: list[dict[str, str]] = await pipe.execute()
        return [parse_worker(fields) for fields in replies if fields]

    async def model_statuses(self, model_ids: Sequence[str]) -> dict[str, ModelStatus]:
        """Say for each model whether a job for it would run now, and why not."""
        return model_statuses(await self.workers(), model_ids)

    async def close(self) -> None:
        """Close the connections; calls that wait for Redis end first or fail."""
        await asyncio.shield(self._client.aclose())
