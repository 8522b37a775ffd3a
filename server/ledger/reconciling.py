"""The ledger as `restage reconcile` sees it: what it knows of objects, and the few moves that bring both together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from server.errors import ConfigError
from server.jobs import Job, JobStatus
from server.ledger.api_scripts import ledger_errors
from server.ledger.reading import EVERYBODY, LedgerReader
from server.ledger.records import dump
from server.ledger.scripts import SCHEMA_VERSION
from server.marker import Marker

FinishAnswer = Literal["finished", "done", "differs", "newer", "held", "cancelling", "settled", "unknown"]
StrayKind = Literal["upload", "try", "marker"]
_BATCHES_A_PAGE = 20


@dataclass(frozen=True)
class JobState:
    """What decides whether an object belongs to a job; `output_key` is None where it has no result (any more)."""

    status: JobStatus
    fence: int
    output_key: str | None


class LedgerReconciler(LedgerReader):
    """Reads the ledger in pages, and changes it by comparing first: safe beside running APIs and workers."""

    SCRIPTS = ("finish_marked", "discard_stray", "fail_without_photo", "lost_upload")

    async def require_schema(self) -> None:
        """Return when there is a ledger that this version reads; nothing is written.

        Raises:
            ConfigError: there is none, or another version's.
        """
        async with ledger_errors():
            found = await self._client.get(f"{self._prefix}:schema")
        if found is None:
            problem = f"there is no ledger under '{self._prefix}': is it another Redis, or another redis.key_prefix?"
            raise ConfigError([f"redis: {problem}"])
        if found != SCHEMA_VERSION:
            problem = f"the ledger under '{self._prefix}' has schema {found}; this version reads {SCHEMA_VERSION}"
            raise ConfigError([f"redis: {problem}"])

    async def has_batches(self) -> bool:
        """Whether the ledger knows any batch at all."""
        async with ledger_errors():
            return bool(await cast("Any", self._client).exists(f"{self._prefix}:shelf:{EVERYBODY}:all"))

    async def other_ledgers(self) -> list[str]:
        """Return the key prefixes of what may be other ledgers in the same Redis, of whatever schema."""
        async with ledger_errors():
            # Redis serves nobody else meanwhile. SCAN would be kinder, but its users need KEYS anyway, for Dramatiq.
            found: list[str] = await cast("Any", self._client).keys("*:schema")
        prefixes = {key.removesuffix(":schema") for key in found} - {self._prefix}
        # Names that users choose stand behind another colon, and no prefix has one.
        return sorted(prefix for prefix in prefixes if ":" not in prefix)

    async def batch_page(self, after: str) -> tuple[list[str], str]:
        """Return the ids of the next batches behind the position `after` ("" for the first), and the position then."""
        async with ledger_errors():
            found: list[tuple[str, float]] = await cast("Any", self._client).zrangebyscore(
                f"{self._prefix}:shelf:{EVERYBODY}:all",
                f"({after}" if after else "-inf",
                "+inf",
                start=0,
                num=_BATCHES_A_PAGE,
                withscores=True,
            )
        return [batch_id for batch_id, _ in found], f"{found[-1][1]:.0f}" if found else after

    async def jobs_of(self, batch_ids: Sequence[str]) -> list[Job]:
        """Return all jobs of these batches."""
        async with ledger_errors(), self._client.pipeline(transaction=False) as pipe:
            for batch_id in batch_ids:
                pipe.lrange(f"{self._prefix}:batch:{batch_id}:jobs", 0, -1)
            ids: list[list[str]] = await pipe.execute()
        jobs: list[Job] = []
        for some in ids:  # a batch at a time: Redis serves nobody else meanwhile
            jobs += await self.read_jobs(some)
        return jobs

    async def job_states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Return by id how those of the jobs stand that are known."""
        async with ledger_errors(), self._client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(f"{self._prefix}:job:{job_id}", ["status", "fence", "output"])
            replies: list[list[str | None]] = await pipe.execute()
        return {job_id: _state(reply) for job_id, reply in zip(job_ids, replies, strict=True) if reply[0] is not None}

    async def known_uploads(self, upload_ids: Sequence[str]) -> set[str]:
        """Return those of the ids under which the ledger has an upload."""
        async with ledger_errors(), self._client.pipeline(transaction=False) as pipe:
            for upload_id in upload_ids:
                pipe.exists(f"{self._prefix}:upload:{upload_id}")
            replies: list[int] = await pipe.execute()
        return {upload_id for upload_id, found in zip(upload_ids, replies, strict=True) if found}

    async def in_trash(self, names: Sequence[str]) -> set[str]:
        """Return those of the names that stand in the trash."""
        async with ledger_errors(), self._client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zscore(f"{self._prefix}:trash", name)
            replies: list[float | None] = await pipe.execute()
        return {name for name, due in zip(names, replies, strict=True) if due is not None}

    async def finish_marked(self, marker: Marker) -> FinishAnswer:
        """Finish a queued or running job as its marker tells, once; a worker's later commit of it is lost."""
        documents = (
            marker.output.model_dump(),
            marker.timings,
            marker.params,
            [one.model_dump() for one in marker.inputs],
        )
        return await self._run(
            "finish_marked",
            marker.job_id,
            marker.batch_id,
            marker.owner,
            marker.fence,
            marker.attempts,
            marker.worker or "",
            marker.started_at_ms,
            marker.finished_at_ms,
            *map(dump, documents),
            marker.weights_sha256 or "",
            dump(marker.optimizations) if marker.optimizations else "",
        )

    async def discard_stray(
        self, kind: StrayKind, name: str, named_id: str, fence: str, *, delay_seconds: float
    ) -> bool:
        """Put an object into the trash, unless a record names it by now.

        Args:
            kind: what it is.
            name: as the trash has it.
            named_id: of the upload, or of the job, whose name it bears.
            fence: of the try; "" where it is no try's.
            delay_seconds: until a janitor may delete it.

        Returns:
            Whether it will go.
        """
        return await self._run("discard_stray", kind, name, named_id, fence, int(delay_seconds * 1000)) == "thrown"

    async def fail_without_photo(self, job: Job, upload_id: str) -> bool:
        """Fail a job whose photo is gone, if it is still queued as it was; the photo's bytes are offered to nobody."""
        await self._run("lost_upload", job.owner, upload_id)
        return await self._run("fail_without_photo", job.id, job.fence, upload_id) == "failed"


def _state(reply: Sequence[str | None]) -> JobState:
    status, fence, output = reply
    return JobState(JobStatus(status or ""), int(fence or 0), json.loads(output)["key"] if output else None)
