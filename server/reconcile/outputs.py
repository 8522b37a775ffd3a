"""From the store to the ledger: what the outputs bucket holds, and whether a job knows of it."""

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from server.errors import ObjectNotFound
from server.jobs import JobStatus
from server.ledger.reconciling import FinishAnswer, JobState
from server.marker import MAX_MARKER_BYTES, BadMarker, Marker, decode_marker, marked_job, marker_key
from server.reconcile.comparison import Comparison
from server.reconcile.findings import Finding, Kind, Outcome
from server.store_inventory import StoredObject

_TRY = re.compile(r"([\w-]{1,64})/([0-9]{1,15})/[\w-][\w.-]*", re.ASCII)
_OPEN = (JobStatus.QUEUED, JobStatus.RUNNING)
_REASONS: dict[FinishAnswer, str] = {
    "differs": "the marker tells another batch, owner or photo than the ledger",
    "newer": "the ledger has handed it out more often than the marker tells",
    "held": "just now a worker may be doing it, or the janitor deleting its result: run this again later",
    "cancelling": "its cancel was accepted",
    "settled": "it was settled meanwhile",
    "unknown": "the ledger does not know it any more",
}


@dataclass(frozen=True)
class _Named:
    """An object whose name tells its job; `fence` is that of the try that wrote it, "" for a marker."""

    stored: StoredObject
    job_id: str
    fence: str

    @property
    def names(self) -> set[str]:
        """Under what it may stand in the trash."""
        name = f"outputs/{self.stored.key}"
        return {name, f"outputs/{self.job_id}/{self.fence}/"} if self.fence else {name}


async def compare_outputs(comparison: Comparison) -> AsyncGenerator[Finding]:
    """Walk through the outputs bucket."""
    after = ""
    while page := await comparison.ask(comparison.store.inventory.outputs, after):
        after = page[-1].key
        comparison.tally.num_outputs += len(page)
        async for finding in _compare_page(comparison, page):
            yield finding


async def _compare_page(comparison: Comparison, page: Sequence[StoredObject]) -> AsyncGenerator[Finding]:
    named: list[_Named] = []
    for stored in page:
        if job_id := marked_job(stored.key):
            named.append(_Named(stored, job_id, ""))
        elif match := _TRY.fullmatch(stored.key):
            named.append(_Named(stored, match[1], match[2]))
        else:
            yield Finding("foreign_object", "left", "no job of this server writes such a name", key=stored.key)
    # After the listing: what is written or committed meanwhile is then known as such.
    states = await comparison.ledger.job_states(sorted({one.job_id for one in named}))
    trash = await comparison.ledger.in_trash(sorted({name for one in named for name in one.names}))
    for one in named:
        judge = _judge_try if one.fence else _judge_marker
        if finding := await judge(comparison, one, states.get(one.job_id), is_in_trash=not one.names.isdisjoint(trash)):
            yield finding


async def _judge_try(
    comparison: Comparison, one: _Named, state: JobState | None, *, is_in_trash: bool
) -> Finding | None:
    is_its_own = state is not None and (
        state.output_key == one.stored.key or (state.status is JobStatus.RUNNING and str(state.fence) == one.fence)
    )
    # After the ledger was set back this fence will be handed out again, and its worker writes to the very same key.
    is_to_come = state is not None and state.status is not JobStatus.SUCCEEDED and int(one.fence) > state.fence
    if is_its_own or is_to_come or is_in_trash:
        return None
    may_be_marked = state is None or state.status is not JobStatus.SUCCEEDED
    # A job that is marked as done is told with its marker, and keeps what it has until that is settled.
    if may_be_marked and await comparison.ask(comparison.store.inventory.has_output, marker_key(one.job_id)):
        return None
    return await comparison.judge_stray("stray_output", one.stored, "try", named_id=one.job_id, fence=one.fence)


async def _judge_marker(
    comparison: Comparison, one: _Named, state: JobState | None, *, is_in_trash: bool
) -> Finding | None:
    if state is not None and state.status is JobStatus.SUCCEEDED:
        is_stray = state.output_key is None and not is_in_trash
        return await _judge_stray_marker(comparison, one) if is_stray else None
    if state is None and is_in_trash:
        return None
    try:
        data = await comparison.ask(comparison.store.read_marker, one.stored.key, MAX_MARKER_BYTES)
        return await _judge_mark(comparison, decode_marker(one.job_id, data), state)
    except ObjectNotFound:  # it has gone since it was listed
        return None
    except BadMarker as error:
        if state is None:
            return await _judge_stray_marker(comparison, one)
        return Finding("bad_marker", "left", f"it cannot be used: {error}", key=one.stored.key, job_id=one.job_id)


async def _judge_stray_marker(comparison: Comparison, one: _Named) -> Finding | None:
    return await comparison.judge_stray("stray_output", one.stored, "marker", named_id=one.job_id)


async def _judge_mark(comparison: Comparison, marker: Marker, state: JobState | None) -> Finding | None:
    if state is None:
        return _about("unknown_job", marker, "the ledger does not know it; its result stays in the store")
    if state.status not in _OPEN:
        return _about(
            "settled_job", marker, f"the ledger has it as {state.status.value}; its result stays in the store"
        )
    if trouble := await _find_trouble(comparison, marker):
        return _about("unfinished_job", marker, trouble)
    if comparison.is_dry:
        is_newer = state.fence > marker.fence
        detail = _REASONS["newer"] if is_newer else f"is {state.status.value} in the ledger"
        return _about("unfinished_job", marker, detail, "left" if is_newer else comparison.repair)
    answer = await comparison.ledger.finish_marked(marker)
    if answer == "finished":
        return _about("unfinished_job", marker, f"was {state.status.value} in the ledger", comparison.repair)
    # Done it is by its worker, or by another of our kind.
    return None if answer == "done" else _about("unfinished_job", marker, _REASONS[answer])


async def _find_trouble(comparison: Comparison, marker: Marker) -> str | None:
    """Say why an open job cannot be finished as its marker tells: the result must be there, to the byte."""
    try:
        sha256 = await comparison.ask(comparison.store.inventory.output_sha256, marker.output.key)
    except ObjectNotFound:
        return f"its result {marker.output.key} is not in the store; it will run again"
    if sha256 != marker.output.sha256:
        return "its result has other bytes than the marker tells; it will run again"
    return None


def _about(kind: Kind, marker: Marker, detail: str, outcome: Outcome = "left") -> Finding:
    return Finding(
        kind, outcome, detail, key=marker.output.key, job_id=marker.job_id, batch_id=marker.batch_id, owner=marker.owner
    )
