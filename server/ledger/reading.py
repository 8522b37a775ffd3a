"""What clients read of the ledger: batches, jobs, lists of both, and the events of a batch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from server.eta import ModelLoad, estimate_seconds
from server.jobs import Batch, BatchStatus, Job, JobStatus
from server.ledger.api_scripts import ApiScripts, ledger_errors
from server.ledger.records import parse_batch, parse_job
from server.ledger.scripts import as_map

T = TypeVar("T")

# A page may be short of its limit, or empty, where a filter leaves out more than this.
MOST_LOOKS = 2000
# How many events come at once.
MOST_EVENTS = 1000
EVERYBODY = "*"


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list; `next_cursor` goes on behind it, None where there is nothing more."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True)
class Event:
    """A change of state as it was told; `data` is JSON's."""

    id: str
    type: str
    data: dict[str, Any]


@dataclass(frozen=True)
class JobProgress:
    """How far a running job is."""

    job_id: str
    index: int
    step: int
    total_steps: int
    attempts: int


@dataclass(frozen=True)
class EventsReading:
    """What happened in a batch behind an event. `is_known` is False where the batch has no such event (any more)."""

    status: BatchStatus
    is_known: bool
    events: list[Event]
    progress: list[JobProgress]


@dataclass(frozen=True)
class BatchReading:
    """A batch, and the id of the last event that it shows."""

    batch: Batch
    last_event_id: str


class LedgerReader(ApiScripts):
    """Reads, each in one round trip."""

    SCRIPTS = ("read_batch", "read_jobs", "list_batches", "list_jobs", "read_events")

    async def read_batch(self, batch_id: str) -> Batch | None:
        """Return a batch with all its jobs, or None when it is unknown."""
        reading = await self.read_batch_and_event(batch_id)
        return None if reading is None else reading.batch

    async def read_batch_and_event(self, batch_id: str) -> BatchReading | None:
        """Return a batch with all its jobs and the last event that it shows, or None when it is unknown."""
        reply = await self._run("read_batch", batch_id)
        return BatchReading(parse_batch_reply(reply), reply[2]) if reply else None

    async def read_job(self, job_id: str) -> Job | None:
        """Return a job, or None when it is unknown."""
        jobs = await self.read_jobs([job_id])
        return jobs[0] if jobs else None

    async def read_jobs(self, job_ids: Sequence[str]) -> list[Job]:
        """Return those of the jobs that are known, in the given order."""
        return [parse_job_reply(reply) for reply in await self._run("read_jobs", *job_ids)]

    async def list_batches(
        self, owner: str, *, status: BatchStatus | None, label: str | None, limit: int, cursor: str | None
    ) -> Page[Batch]:
        """Return a page of an owner's batches without their jobs, newest first.

        Args:
            owner: whose.
            status: only batches that stand there.
            label: only batches with exactly this label.
            limit: most batches to return.
            cursor: `next_cursor` of the page before.
        """
        shelf = "all" if status is None else status.value
        reply = await self._run("list_batches", owner, shelf, label or "", limit, cursor or "", MOST_LOOKS)
        batches = [parse_batch(json.loads(fields), deliveries=deliveries) for fields, deliveries in reply[1:]]
        return Page(batches, reply[0] or None)

    async def list_jobs(
        self, owner: str | None, *, status: JobStatus | None, model: str | None, limit: int, cursor: str | None
    ) -> Page[Job]:
        """Return a page of jobs across batches, those of the newest batch first.

        Args:
            owner: whose; None for everybody's.
            status: only jobs that stand there.
            model: only jobs of this model.
            limit: most jobs to return.
            cursor: `next_cursor` of the page before.
        """
        order, _, num_shown = (cursor or "").partition(".")
        shelf = "all" if status is None else f"has-{status.value}"
        filters = ("" if status is None else status.value, model or "")
        reply = await self._run(
            "list_jobs", owner or EVERYBODY, shelf, *filters, limit, order, num_shown or 0, MOST_LOOKS
        )
        next_cursor = f"{reply[0]}.{reply[1]}" if reply[0] else None
        return Page([parse_job_reply(job) for job in reply[2:]], next_cursor)

    async def read_events(self, batch_id: str, after: str) -> EventsReading | None:
        """Return what happened in a batch behind the event `after`, or None when the batch is unknown.

        At most `MOST_EVENTS` come at once. `after` has the form of a stream's id: two numbers of 64 bits.
        """
        reply = await self._run("read_events", batch_id, after, MOST_EVENTS)
        if not reply:
            return None
        status, is_known, entries, progress = reply
        events = [
            Event(entry_id, fields["type"], json.loads(fields["data"]))
            for entry_id, fields in ((entry_id, as_map(flat)) for entry_id, flat in entries)
        ]
        return EventsReading(
            BatchStatus(status), bool(is_known), events, [JobProgress(*one) for one in json.loads(progress)]
        )

    async def changes_position(self) -> str:
        """Return the id after which new changes will stand."""
        async with ledger_errors():
            last: Any = await self._client.xrevrange(f"{self._prefix}:changes", count=1)
        return last[0][0] if last else "0-0"

    async def wait_for_changes(self, position: str, *, block_seconds: float) -> tuple[str, set[str]]:
        """Wait until batches change; returns the new position and their ids, none after `block_seconds`.

        `block_seconds` must stay under the client's socket timeout.
        """
        async with ledger_errors():
            reply: Any = await self._client.xread(
                {f"{self._prefix}:changes": position}, count=1000, block=int(block_seconds * 1000)
            )
        entries = cast("list[tuple[str, dict[str, str]]]", reply[0][1] if reply else [])
        return (entries[-1][0] if entries else position), {fields["batch_id"] for _, fields in entries}


def parse_job_reply(reply: Sequence[Any]) -> Job:
    """Build a job from its part of a script's reply: its fields, its place in the line or ""."""
    return parse_job(json.loads(reply[0]), reply[1] or None)


def parse_batch_reply(reply: Sequence[Any]) -> Batch:
    """Build a batch with its jobs from `batch_reply` of the scripts."""
    fields, deliveries, _, loads, *jobs = reply
    batch = parse_batch(json.loads(fields), tuple(map(parse_job_reply, jobs)), deliveries)
    # Lua writes an empty table as an object.
    by_model: dict[str, list[Any]] = json.loads(loads)
    parsed = {
        model: ModelLoad(num_ahead, num_workers, {name: float(seconds) for name, seconds in speeds.items()})
        for model, (num_ahead, num_workers, speeds) in by_model.items()
    }
    return batch.estimated(estimate_seconds(batch, parsed))
