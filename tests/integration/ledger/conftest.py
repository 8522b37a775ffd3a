"""A ledger on an empty real Valkey, with the few moves that its tests share."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import redis
from redis.asyncio import Redis

from server.jobs import Batch, Job, JobInput, JobOutput, Priority
from server.ledger.api_side import ApiLedger, Idempotency, SubmitResult, SweepReport
from server.ledger.records import UploadRecord
from server.ledger.worker_side import WorkerLedger

T = TypeVar("T")

LEASE_SECONDS = 650
SWEEP_SECONDS = 50
RECORDS_SECONDS = 950

# The scripts read Redis' own clock, so time passes by moving everything that is stored in time back by ARGV[2] ms.
_MOVE_CLOCK = """#!lua flags=allow-oom
local prefix, ms = ARGV[1], tonumber(ARGV[2])
for _, name in ipairs({ "leases", "delayed", "forget" }) do
  for _, member in ipairs(redis.call("ZRANGE", prefix .. ":" .. name, 0, -1)) do
    redis.call("ZINCRBY", prefix .. ":" .. name, -ms, member)
  end
end
if redis.call("EXISTS", prefix .. ":swept") == 1 then
  redis.call("HINCRBY", prefix .. ":swept", "at", -ms)
  redis.call("HINCRBY", prefix .. ":swept", "grace_until", -ms)
end
for _, key in ipairs(redis.call("KEYS", prefix .. ":*")) do
  local left = redis.call("PTTL", key)
  if left >= 0 then
    if left <= ms then redis.call("DEL", key) else redis.call("PEXPIRE", key, left - ms) end
  end
end
"""


class LedgerKit:
    """Both sides of one ledger; the API's side is called from ordinary tests through `run`."""

    def __init__(self, url: str, *, prefix: str = "restage") -> None:
        self.url = url
        self.prefix = prefix
        self.client = redis.Redis.from_url(url, decode_responses=True, socket_timeout=10)
        # Dramatiq's messages are bytes to it.
        self.raw_client = redis.Redis.from_url(url, socket_timeout=10)
        self._runner = asyncio.Runner()
        self._api_client = Redis.from_url(url, decode_responses=True, socket_timeout=10)
        self.api = ApiLedger(self._api_client, key_prefix=prefix)
        self._move_clock = self.client.register_script(_MOVE_CLOCK)

    def close(self) -> None:
        """Close all connections."""
        self.run(self.api.close())
        self._runner.close()
        self.client.close()
        self.raw_client.close()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Wait for a call of the API's side."""
        return self._runner.run(call)

    def worker(self, worker_id: str = "w1", *, lease_seconds: float = LEASE_SECONDS) -> WorkerLedger:
        """Give a worker's side of the ledger."""
        return WorkerLedger(self.client, worker_id=worker_id, key_prefix=self.prefix, lease_seconds=lease_seconds)

    def batch(
        self, batch_id: str, models: list[str], *, owner: str = "ana", priority: str = "normal", **fields: Any
    ) -> Batch:
        """Describe a batch with one job and one upload for each of `models`; `fields` are set on every job."""
        jobs = tuple(
            Job(
                id=f"{batch_id}-{index}",
                batch_id=batch_id,
                index=index,
                owner=owner,
                model=model,
                model_version="1",
                prompt="a bright living room",
                inputs=(photo(f"{batch_id}-upload-{index}"),),
                priority=Priority(priority),
            )
            for index, model in enumerate(models)
        )
        return Batch(
            id=batch_id, owner=owner, priority=Priority(priority), jobs=tuple(replace(job, **fields) for job in jobs)
        )

    def with_uploads(self, batch: Batch, upload_ids: list[list[str]]) -> Batch:
        """Let the jobs of `batch` name these uploads."""
        named = zip(batch.jobs, upload_ids, strict=True)
        return replace(batch, jobs=tuple(replace(job, inputs=tuple(map(photo, ids))) for job, ids in named))

    def announce_uploads(self, batch: Batch) -> None:
        """Hand out the forms for all uploads that `batch` names."""
        records = [
            UploadRecord(
                id=one.upload_id,
                owner=batch.owner,
                key=one.key,
                filename="room.jpg",
                content_type=one.content_type,
                size_bytes=one.size_bytes,
            )
            for job in batch.jobs
            for one in job.inputs
        ]
        self.run(self.api.create_uploads(records, ttl_seconds=1550))

    def submit(
        self, batch: Batch, *, idempotency: Idempotency | None = None, max_open_jobs: int = 10_000
    ) -> SubmitResult:
        """Submit a batch."""
        return self.run(
            self.api.submit(
                batch,
                records_ttl_seconds=RECORDS_SECONDS,
                max_open_jobs=max_open_jobs,
                idempotency=idempotency,
            )
        )

    def accept(self, batch_id: str, models: list[str], **options: Any) -> Batch:
        """Announce the uploads of a batch and have it accepted."""
        batch = self.batch(batch_id, models, **options)
        self.announce_uploads(batch)
        assert self.submit(batch).kind == "accepted"
        return batch

    def claim(self, models: list[str], worker_id: str = "w1") -> Job:
        """Claim a job that must be there."""
        job = self.worker(worker_id).claim(models, num_held=0)
        assert isinstance(job, Job)
        return job

    def job(self, job_id: str) -> Job:
        """Read a job that must be there."""
        job = self.run(self.api.read_job(job_id))
        assert job is not None
        return job

    def read(self, batch_id: str) -> Batch:
        """Read a batch that must be there."""
        batch = self.run(self.api.read_batch(batch_id))
        assert batch is not None
        return batch

    def sweep(self, models: list[str] | None = None) -> SweepReport:
        """Sweep once."""
        return self.run(
            self.api.sweep(models or [], lease_seconds=LEASE_SECONDS, interval_seconds=SWEEP_SECONDS),
        )

    def commit(self, job: Job) -> str:
        """Hand in a result for a job as it was claimed."""
        return self.commit_as(self.worker(), job.id, job.fence, [one.upload_id for one in job.inputs])

    def commit_as(self, worker: WorkerLedger, job_id: str, fence: int, upload_ids: list[str]) -> str:
        """Hand in a result under a fence of one's own choice."""
        output = JobOutput(
            key=f"{job_id}/{fence}/output.webp",
            sha256="5" * 64,
            content_type="image/webp",
            height=768,
            width=1024,
            size_bytes=500,
        )
        return worker.commit(
            job_id,
            fence,
            output=output,
            timings={"run": 1.5},
            params={"seed": 7},
            inputs=[photo(upload_id) for upload_id in upload_ids],
        )

    def pass_time(self, seconds: float) -> None:
        """Let time pass without waiting: every deadline that is stored comes nearer by `seconds`."""
        self._move_clock(args=[self.prefix, int(seconds * 1000)])

    def sweep_for_a_lease(self) -> None:
        """Sweep in time for longer than a lease: what nobody renews is taken back."""
        for _ in range(LEASE_SECONDS // 100 + 2):
            self.sweep()
            self.pass_time(100)
        self.sweep()

    def events(self, batch_id: str) -> list[str]:
        """List the kinds of a batch's events, oldest first."""
        entries: Any = self.client.xrange(f"{self.prefix}:batch:{batch_id}:events")
        return [fields["type"] for _, fields in entries]


def photo(upload_id: str) -> JobInput:
    """Describe an accepted photo."""
    return JobInput(
        upload_id=upload_id,
        key=upload_id,
        etag="e1",
        sha256=None,
        content_type="image/jpeg",
        size_bytes=1000,
        height=768,
        width=1024,
    )


@pytest.fixture
def new_ledger(valkey: Any) -> Callable[[str], LedgerKit]:
    """Give a function that opens a ledger under a key prefix of its own; whoever calls it closes the ledger."""
    return lambda prefix: LedgerKit(valkey.url, prefix=prefix)


@pytest.fixture
def ledger(valkey: Any) -> Iterator[LedgerKit]:
    """Give a ledger on an empty Valkey."""
    kit = LedgerKit(valkey.url)
    kit.run(kit.api.check_schema())
    yield kit
    kit.close()
