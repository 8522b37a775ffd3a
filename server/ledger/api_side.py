"""The ledger as the API uses it: announce, accept, change, sweep; reading and forgetting are in files of their own."""

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from server.jobs import Batch
from server.ledger.api_scripts import connect, ledger_errors
from server.ledger.deliveries import LedgerWebhooks
from server.ledger.expiring import LedgerJanitor
from server.ledger.reading import LedgerReader
from server.ledger.records import UploadRecord, batch_fields, dump, job_fields, parse_upload, upload_fields
from server.ledger.scripts import SCHEMA_VERSION, check_schema
from server.ledger.status import ModelStatus, WorkerStatus, model_statuses, parse_worker
from server.ledger.tokens import LedgerTokens
from server.settings import AdmissionSettings, RetentionSettings

__all__ = ["ApiLedger", "connect"]

SubmitKind = Literal[
    "accepted", "replayed", "conflict", "missing_upload", "full", "owner_full", "no_memory", "unserved"
]
CancelAnswer = Literal["cancelled", "requested", "finished", "unknown"]
ReopenAnswer = Literal["queued", "open", "succeeded", "expired", "unknown", "full", "owner_full"]
DeleteAnswer = Literal["deleted", "open", "unknown"]
POISON_AFTER_DEVICE_DEATHS = 3
_SWEEP_LIMIT = 100
# What the clocks of API, store and Redis may differ by before a form counts as one that can no longer be used.
_CLOCK_SLACK_SECONDS = 60.0


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
    """How a submission ended.

    Attributes:
        kind: in a word.
        text: the first answer (replayed), the id of an upload (missing_upload) or of a model (unserved), or how many
            percent of its memory Redis uses (no_memory).
    """

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
    waiting: bool


class ApiLedger(LedgerReader, LedgerJanitor, LedgerWebhooks, LedgerTokens):
    """The API's view of the ledger."""

    SCRIPTS = (
        "expect_models",
        "announce_uploads",
        "lost_upload",
        "submit",
        "cancel",
        "reopen",
        "delete_batch",
        "sweep",
        "fail_removed",
    )

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
        check_schema(cast("str | None", found), self._prefix)

    async def expect_models(self, models: Sequence[str]) -> None:
        """Begin to wait for workers of those `models` that nobody has served yet, as far as is known."""
        await self._run("expect_models", *models)

    async def announce_uploads(
        self,
        records: Sequence[UploadRecord],
        *,
        form_ttl_seconds: float,
        unused_ttl_seconds: float,
        offer_seconds: float,
    ) -> list[str]:
        """Remember photos that will come; those that no batch names go after `unused_ttl_seconds`.

        Args:
            records: all of one owner.
            form_ttl_seconds: how long the store will take each photo; 0 where nobody but the server sends it.
            unused_ttl_seconds: how long each id can be named in a batch.
            offer_seconds: how old an upload may be that is offered in place of another with the same bytes.

        Returns:
            For each record its own id, or that of an upload with the same bytes that the store has already.
        """
        if not records:
            return []
        form_ttl_seconds += min(_CLOCK_SLACK_SECONDS, form_ttl_seconds)
        request = {
            "owner": records[0].owner,
            "form_ttl_ms": int(form_ttl_seconds * 1000),
            "unused_ttl_ms": int(unused_ttl_seconds * 1000),
            "offer_ms": int(offer_seconds * 1000),
            "uploads": [{"id": record.id, "fields": upload_fields(record)} for record in records],
        }
        return await self._run("announce_uploads", dump(request))

    async def note_lost_upload(self, owner: str, upload_id: str) -> None:
        """Offer the bytes of an upload no more: its object is not in the store."""
        await self._run("lost_upload", owner, upload_id)

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
        self,
        batch: Batch,
        *,
        retention: RetentionSettings,
        max_open_jobs: int,
        max_owner_jobs: int | None = None,
        admission: AdmissionSettings | None = None,
        idempotency: Idempotency | None = None,
    ) -> SubmitResult:
        """Accept a batch: all of it, durably, or nothing. Repeating the call with the same batch id changes nothing.

        Without `admission` neither Redis' memory nor the workers are looked at, without `max_owner_jobs` only the open
        jobs of all owners together.
        """
        request: dict[str, Any] = {
            "batch": {"id": batch.id, "owner": batch.owner, "fields": batch_fields(batch, retention)},
            "jobs": [
                {
                    "id": job.id,
                    "version": job.model_version,
                    "fields": job_fields(job),
                    "uploads": [[one.upload_id, one.etag] for one in job.inputs],
                }
                for job in batch.jobs
            ],
            "max_open": max_open_jobs,
        }
        if max_owner_jobs is not None:
            request["max_owner_open"] = max_owner_jobs
        if admission:
            request["admission"] = {
                "max_memory_fraction": admission.max_memory_fraction,
                "grace_ms": int(admission.worker_grace_seconds * 1000),
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

    async def cancel(self, owner: str, job_ids: Sequence[str]) -> list[CancelAnswer]:
        """Cancel jobs of `owner` ("" for any); answers are in the order of `job_ids`."""
        return await self._run("cancel", secrets.token_hex(16), owner, *job_ids)

    async def reopen(
        self,
        owner: str,
        job_ids: Sequence[str],
        *,
        max_open_jobs: int,
        limited: tuple[str, int] | None = None,
    ) -> list[ReopenAnswer]:
        """Queue failed and cancelled jobs of `owner` ("" for any) again; answers are in the order of `job_ids`.

        Args:
            owner: whose jobs they may be.
            job_ids: each of them, or none, is queued as far as there is room.
            max_open_jobs: of all owners together.
            limited: an owner, and how many of that owner's jobs may be open.
        """
        limits = (max_open_jobs, *(limited or ("", "")))
        return await self._run("reopen", secrets.token_hex(16), owner, *limits, *job_ids)

    async def delete_batch(self, owner: str, batch_id: str) -> DeleteAnswer:
        """Forget a finished batch of `owner` ("" for any), its results, and its photos if nothing else needs them."""
        return await self._run("delete_batch", secrets.token_hex(16), owner, batch_id)

    async def sweep(self, models: Sequence[str], *, lease_seconds: float, interval_seconds: float) -> SweepReport:
        """Do what is due. `interval_seconds` is the usual time between sweeps: a longer pause looks like an outage."""
        lease_ms = int(lease_seconds * 1000)
        # Renewed at each third, a lease has at least two thirds left when Redis goes away. So a pause that is not taken
        # for an outage costs nobody a lease, as long as three intervals are not more than that.
        outage_ms = int(max(lease_ms / 3, interval_seconds * 3000))
        reply = await self._run("sweep", lease_ms, outage_ms, _SWEEP_LIMIT, POISON_AFTER_DEVICE_DEATHS, *models)
        return SweepReport(**json.loads(reply))

    async def fail_removed(self, models: Sequence[str], *, grace_seconds: float) -> int:
        """Fail jobs whose model neither is one of `models` nor is announced by a worker, for `grace_seconds` now.

        Returns:
            How many have failed.
        """
        return await self._run("fail_removed", int(grace_seconds * 1000), _SWEEP_LIMIT, *models)

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
