"""`/v1/batches/{id}/events`: follow a batch as server-sent events, and go on behind the last one after a cut."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter
from litestar.response import Stream
from pydantic import ConfigDict, Field

from server.api.batches import find_batch
from server.api.errors import problems
from server.api.outputs import OutputSigner
from server.api.request_context import opened_files
from server.api.services import Services
from server.api.views import View, show_progress, view_batch, view_batch_summary
from server.errors import LedgerUnavailable
from server.jobs import BatchStatus, JobStatus
from server.keys import Principal
from server.ledger.reading import MOST_EVENTS, Event, JobProgress

# Proxies and clients take a connection that is silent for longer for dead.
_COMMENT_SECONDS = 15.0
# The ledger is looked at so often even if nothing woke the stream: it is the truth, a wake-up only a hint.
_LOOK_SECONDS = 5.0
_RECONNECT_MILLISECONDS = 2000
_EVENT_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")
_LastEventId = Annotated[
    str | None,
    HeaderParameter(
        name="Last-Event-ID",
        description="The id of the last event that was received; an unknown one gets a fresh snapshot.",
    ),
]


class EventView(View):
    """One event, as the fields of its lines."""

    # Progress has no id.
    model_config = ConfigDict(json_schema_extra={"required": ["event", "data"]})

    id: str = Field(default="", description="For `Last-Event-ID`; only changes of state have one.")
    event: Literal[
        "snapshot",
        "job.started",
        "job.progress",
        "job.retrying",
        "job.succeeded",
        "job.failed",
        "job.cancelled",
        "batch.finished",
    ]
    data: str = Field(
        description="JSON: of `snapshot` the batch, of `batch.finished` the batch without its jobs, of the others "
        "`{job_id, index, status, progress, attempts, error}`."
    )


@get(
    "/batches/{batch_id:str}/events",
    media_type="text/event-stream",
    tags=["Batches"],
    summary="Follow a batch",
    response_description="Server-sent events until the batch has finished",
    responses={
        200: ResponseSpec(
            EventView,
            description="Server-sent events until the batch has finished",
            media_type="text/event-stream",
            generate_examples=False,
        ),
        204: ResponseSpec(None, description="The batch has finished, and its last event was received"),
        **problems(404),
    },
)
async def follow_batch(
    batch_id: FromPath[str],
    request: Request[Any, Any, Any],
    services: NamedDependency[Services],
    principal: NamedDependency[Principal],
    last_event_id: _LastEventId = None,
) -> Response[Any]:
    """Answer a snapshot, then each change of state as it happens, and end when the batch has finished.

    A stream that ends before `batch.finished` was cut, or its server is being stopped: come back for the rest.
    Changes of state carry an `id`; a client that comes back with it as `Last-Event-ID` misses none. 204 tells an
    EventSource that nothing more will come.
    """
    services.streams.take(opened_files(request.scope))
    await find_batch(services, principal, batch_id)
    position = last_event_id if last_event_id is not None and _is_event_id(last_event_id) else None
    if position is not None:
        reading = await services.ledger.read_events(batch_id, position)
        if reading and reading.is_known and not reading.events and reading.status == BatchStatus.FINISHED:
            return Response(None, status_code=204)
    return Stream(
        _Follower(services, batch_id, position).events(),
        media_type="text/event-stream",
        # A proxy that collects the answer would hand it over when all is over.
        headers={"X-Accel-Buffering": "no"},
    )


class _Follower:
    """One client's stream. `position` is the last event that the client has; None asks for a snapshot."""

    def __init__(self, services: Services, batch_id: str, position: str | None) -> None:
        self._ledger = services.ledger
        self._changes = services.changes
        self._stopping = services.stopping
        self._sign = OutputSigner(services)
        self._batch_id = batch_id
        self._position = position
        self._progress: dict[str, JobProgress] = {}
        self._is_behind = False
        self._is_over = False

    async def events(self) -> AsyncGenerator[str]:
        """Yield the stream. While Redis is away it stays open, with comments only; it ends when the process is to."""
        with self._changes.subscribed(self._batch_id) as changed:
            yield f"retry: {_RECONNECT_MILLISECONDS}\n\n"
            sent_at = time.monotonic()
            while not self._is_over:
                # Cleared before the look: a change that comes during the look causes another one.
                changed.clear()
                texts = await self._look_patiently()
                if not texts and time.monotonic() - sent_at >= _COMMENT_SECONDS:
                    texts = [": nothing new\n\n"]
                if text := "".join(texts):  # in one piece: a history may be long
                    yield text
                    sent_at = time.monotonic()
                if self._stopping.has_begun:  # whoever comes back with the last id goes on elsewhere
                    return
                if not (self._is_over or self._is_behind):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), _LOOK_SECONDS)

    async def _look_patiently(self) -> list[str]:
        self._is_behind = False
        try:
            return await self._look()
        except LedgerUnavailable:  # woken when it is back
            return []

    async def _look(self) -> list[str]:
        if self._position is None:
            return await self._show_snapshot()
        reading = await self._ledger.read_events(self._batch_id, self._position)
        if reading is None:  # deleted, or forgotten
            self._is_over = True
            return []
        if not reading.is_known:
            return await self._show_snapshot()
        texts = [await self._show_event(event) for event in reading.events]
        texts += [_show_progress(one) for one in reading.progress if self._progress.get(one.job_id) != one]
        self._progress = {one.job_id: one for one in reading.progress}
        if reading.events:
            self._position = reading.events[-1].id
        self._is_behind = len(reading.events) == MOST_EVENTS
        self._is_over = reading.status == BatchStatus.FINISHED and not self._is_behind
        return texts

    async def _show_snapshot(self) -> list[str]:
        reading = await self._ledger.read_batch_and_event(self._batch_id)
        if reading is None:
            self._is_over = True
            return []
        batch, event_id = reading.batch, reading.last_event_id
        texts = [_write("snapshot", view_batch(batch, self._sign).model_dump_json(), event_id)]
        self._position = event_id
        if batch.status == BatchStatus.FINISHED:
            texts.append(_write("batch.finished", view_batch_summary(batch).model_dump_json(), event_id))
            self._is_over = True
        return texts

    async def _show_event(self, event: Event) -> str:
        if event.type != "batch.finished":
            return _write(event.type, json.dumps(event.data | {"progress": None}), event.id)
        batch = await self._ledger.read_batch(self._batch_id)
        # It is told as it is now: a retry may have begun another round.
        return "" if batch is None else _write(event.type, view_batch_summary(batch).model_dump_json(), event.id)


def _show_progress(one: JobProgress) -> str:
    progress = show_progress(one.step, one.total_steps)
    data = {
        "job_id": one.job_id,
        "index": one.index,
        "status": JobStatus.RUNNING,
        "progress": None if progress is None else progress.model_dump(),
        "attempts": one.attempts,
        "error": None,
    }
    return _write("job.progress", json.dumps(data))


def _write(kind: str, data: str, event_id: str | None = None) -> str:
    identity = "" if event_id is None else f"id: {event_id}\n"
    return f"{identity}event: {kind}\ndata: {data}\n\n"


def _is_event_id(text: str) -> bool:
    found = _EVENT_ID.fullmatch(text)
    return found is not None and all(int(part) < 2**64 for part in found.groups())
