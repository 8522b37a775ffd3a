"""One ledger as the tests of this folder use it: both sides, the times of its records, the moves that they share."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import redis
from redis.asyncio import Redis

from server.jobs import Batch, Job, JobInput, JobOutput, Priority, Webhook
from server.ledger.api_side import ApiLedger, Idempotency, SubmitResult, SweepReport
from server.ledger.reconciling import LedgerReconciler
from server.ledger.records import UploadRecord
from server.ledger.worker_side import WorkerLedger
from server.marker import Marker
from server.settings import AdmissionSettings, RetentionSettings
from tests.conftest import MOVE_CLOCK

T = TypeVar("T")

# Time passes in steps of 100 s, and none of these deadlines falls on such a step: the seconds that a test itself takes
# never decide.
STEP_SECONDS = 100
LEASE_SECONDS = 650
SWEEP_SECONDS = 50
INPUTS_SECONDS = 350
OUTPUTS_SECONDS = 450
RECORDS_SECONDS = 950
ORPHANS_SECONDS = 150
GRACE_SECONDS = 1050
RETENTION = RetentionSettings(
    inputs_seconds=INPUTS_SECONDS,
    outputs_seconds=OUTPUTS_SECONDS,
    records_seconds=RECORDS_SECONDS,
    orphans_seconds=ORPHANS_SECONDS,
)
FORM_SECONDS = 190
# The ledger takes a form for usable a minute longer, since clocks differ.
FORM_USABLE_SECONDS = 250
UNUSED_SECONDS = 1550
# Longer than any life of a ledger here.
# Longer than any test lasts.
OFFER_SECONDS = 10_000_000
HOOK_URL = "https://example.org/hook"


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
        self.reconciler = LedgerReconciler(self._api_client, key_prefix=prefix)
        self._move_clock = self.client.register_script(MOVE_CLOCK)

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

    def pass_time(self, seconds: float) -> None:
        """Let time pass without waiting: every deadline that is stored comes nearer by `seconds`."""
        self._move_clock(args=[self.prefix, int(seconds * 1000)])

    # From a batch to its jobs.

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

    def announce(
        self,
        records: Sequence[UploadRecord],
        *,
        form_seconds: float = FORM_SECONDS,
        unused_seconds: float = UNUSED_SECONDS,
        offer_seconds: float = OFFER_SECONDS,
    ) -> list[str]:
        """Hand out forms; returns the ids to use."""
        return self.run(
            self.api.announce_uploads(
                records,
                form_ttl_seconds=form_seconds,
                unused_ttl_seconds=unused_seconds,
                offer_seconds=offer_seconds,
            )
        )

    def announce_uploads(self, batch: Batch) -> None:
        """Hand out the forms for all uploads that `batch` names."""
        self.announce([record(one.upload_id, batch.owner) for job in batch.jobs for one in job.inputs])

    def submit(
        self,
        batch: Batch,
        *,
        idempotency: Idempotency | None = None,
        max_open_jobs: int = 10_000,
        max_owner_jobs: int | None = None,
        admission: AdmissionSettings | None = None,
    ) -> SubmitResult:
        """Submit a batch."""
        return self.run(
            self.api.submit(
                batch,
                retention=RETENTION,
                max_open_jobs=max_open_jobs,
                max_owner_jobs=max_owner_jobs,
                admission=admission,
                idempotency=idempotency,
            )
        )

    def accept(
        self, batch_id: str, models: list[str], *, hook: bool = False, label: str | None = None, **options: Any
    ) -> Batch:
        """Announce the uploads of a batch and have it accepted."""
        batch = self.batch(batch_id, models, **options)
        batch = replace(batch, label=label, webhook=Webhook(HOOK_URL) if hook else None)
        self.announce_uploads(batch)
        assert self.submit(batch).kind == "accepted"
        return batch

    def finish(self, batch_id: str, models: list[str], **options: Any) -> Batch:
        """Have a batch accepted and bring all its jobs to a result; nothing else of its models may be queued."""
        batch = self.accept(batch_id, models, **options)
        for _ in models:
            assert self.commit(self.claim(sorted(set(models)))) == "ok"
        return batch

    def claim(self, models: list[str], worker_id: str = "w1") -> Job:
        """Claim a job that must be there."""
        job = self.worker(worker_id).claim(models, num_held=0)
        assert isinstance(job, Job)
        return job

    def commit(self, job: Job, *, speeds: dict[str, float] | None = None, weights_sha256: str | None = None) -> str:
        """Hand in a result for a job as it was claimed."""
        upload_ids = [one.upload_id for one in job.inputs]
        return self.commit_as(
            self.worker(),
            job.id,
            job.fence,
            upload_ids,
            speeds=speeds or {"run": 1.5},
            weights_sha256=weights_sha256,
        )

    def commit_as(
        self,
        worker: WorkerLedger,
        job_id: str,
        fence: int,
        upload_ids: list[str],
        *,
        speeds: dict[str, float],
        weights_sha256: str | None = None,
    ) -> str:
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
            speeds=speeds,
            weights_sha256=weights_sha256,
        )

    def marker(self, job_id: str, batch_id: str, owner: str, fence: int, upload_ids: list[str]) -> Marker:
        """Describe the end of a job as the store has it."""
        output = {"key": f"{job_id}/{fence}/output.webp", "sha256": "5" * 64, "content_type": "image/webp"}
        return Marker.model_validate(
            {
                "job_id": job_id,
                "batch_id": batch_id,
                "index": 0,
                "owner": owner,
                "fence": fence,
                "attempts": fence,
                "worker": "w9",
                "started_at_ms": 1_700_000_000_000,
                "finished_at_ms": 1_700_000_001_000,
                "output": output | {"height": 768, "width": 1024, "size_bytes": 500},
                "inputs": [vars(photo(upload_id)) for upload_id in upload_ids],
                "params": {"seed": 7},
                "timings": {"run": 1.5},
                "weights_sha256": None,
                "optimizations": {},
            }
        )

    def fail(self, job: Job) -> None:
        """Give up a job as it was claimed."""
        assert self.worker().fail(job.id, job.fence, code="invalid_input", detail="truncated", timings={}) == "ok"

    # What is there.

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

    def upload(self, upload_id: str, owner: str = "ana") -> UploadRecord | None:
        """Read an upload."""
        return self.run(self.api.get_uploads(owner, [upload_id]))[0]

    def events(self, batch_id: str) -> list[str]:
        """List the kinds of a batch's events, oldest first."""
        entries: Any = self.client.xrange(f"{self.prefix}:batch:{batch_id}:events")
        return [fields["type"] for _, fields in entries]

    def trash(self) -> set[str]:
        """Take all names that are due out of the trash, and drop them."""
        names = self.run(self.api.take_trash(limit=1000, lease_seconds=60))
        self.run(self.api.drop_trash(names))
        return set(names)

    def keys(self) -> list[str]:
        """List what the ledger holds, without its prefix."""
        keys: Any = self.client.keys(f"{self.prefix}:*")
        return sorted(key.removeprefix(f"{self.prefix}:") for key in keys)

    # What is due.

    def sweep(self, models: list[str] | None = None) -> SweepReport:
        """Sweep once."""
        return self.run(
            self.api.sweep(models or [], lease_seconds=LEASE_SECONDS, interval_seconds=SWEEP_SECONDS),
        )

    def sweep_for_a_lease(self) -> None:
        """Sweep in time for longer than a lease: what nobody renews is taken back."""
        for _ in range(LEASE_SECONDS // (2 * STEP_SECONDS) + 1):
            self.sweep()
            self.pass_time(2 * STEP_SECONDS)
        self.sweep()

    def expire(self) -> dict[str, int]:
        """Let what is due leave the ledger; returns what did, by kind."""
        report = vars(self.run(self.api.expire()))
        return {kind: count for kind, count in report.items() if count}


def photo(upload_id: str) -> JobInput:
    """Describe an accepted photo."""
    return JobInput(
        upload_id=upload_id,
        key=upload_id,
        etag=f"etag of {upload_id}",
        sha256=None,
        content_type="image/jpeg",
        size_bytes=1000,
        height=768,
        width=1024,
    )


def record(upload_id: str, owner: str = "ana", **fields: Any) -> UploadRecord:
    """Describe a photo that will come."""
    plain = UploadRecord(upload_id, owner, f"key of {upload_id}", "room.jpg", "image/jpeg", 1000)
    return replace(plain, **fields)
