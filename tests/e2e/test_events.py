"""Batches are followed as server-sent events: whatever is cut, killed or restarted, no change of state is missed."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from PIL import Image

from server.embedded import EmbeddedValkey

FLUX = "tiny-flux-kontext"
STATES = ("job.started", "job.retrying", "job.succeeded", "job.failed", "job.cancelled", "batch.finished")


@dataclass(frozen=True)
class Event:
    """One event as it came."""

    id: str | None
    kind: str
    data: dict[str, Any]


def parse(lines: Iterator[str]) -> Iterator[Event]:
    """Read events as the standard has it."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
            continue
        if "data" in fields:
            yield Event(fields.get("id"), fields["event"], json.loads(fields["data"]))
        fields = {}


@contextmanager
def following(stack, batch_id: str, last_event_id: str | None = None) -> Iterator[Iterator[Event]]:
    """Open a stream; it must begin at once and never be silent for half a minute."""
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    url = f"{stack.client.http.base_url}/v1/batches/{batch_id}/events"
    with httpx.stream("GET", url, headers=headers, timeout=30) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield parse(response.iter_lines())


def submit(stack, count: int, **params: Any) -> dict[str, Any]:
    """Submit a batch of different photos."""
    files = {}
    for index in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (96 + index, 80), (20 * index % 256, 90, 160)).save(buffer, "PNG")
        files[f"{index}.png"] = buffer.getvalue()
    items = [{"upload_id": upload_id} for upload_id in stack.client.upload(files)]
    return stack.client.submit({"defaults": {"model": FLUX, "params": params}, "items": items})


def stored_states(valkey_client, batch_id: str) -> list[tuple[str, str]]:
    """List id and kind of all changes of state that the ledger has told."""
    entries: Any = valkey_client.xrange(f"restage:batch:{batch_id}:events")
    return [(entry_id, fields["type"]) for entry_id, fields in entries]


def states(events: list[Event]) -> list[tuple[str | None, str]]:
    return [(event.id, event.kind) for event in events if event.kind in STATES]


def test_a_batch_is_followed_from_the_snapshot_to_its_end(stack, valkey) -> None:
    """Each change of state comes once, in order and with an id; progress has none; the stream ends by itself.

    Ten more streams of the batch, opened at any time, end with the same last event.
    """
    stack.wait_api()
    batch = submit(stack, 3, num_inference_steps=30)
    ends: list[Event] = []

    def follow() -> None:
        with following(stack, batch["id"]) as stream:
            ends.append(list(stream)[-1])

    others = [threading.Thread(target=follow) for _ in range(10)]
    with following(stack, batch["id"]) as stream:
        first = next(stream)
        assert first.kind == "snapshot"
        assert first.id is not None
        assert first.data["status"] == "queued"
        assert len(first.data["jobs"]) == 3
        for other in others[:5]:
            other.start()
        stack.start_worker()
        stack.wait_ready()
        for other in others[5:]:
            other.start()
        events = list(stream)
    for other in others:
        other.join(120)

    told = stored_states(valkey.client(decode_responses=True), batch["id"])
    assert states(events) == told
    assert told[-1][1] == "batch.finished"
    assert sum(kind == "job.succeeded" for _, kind in told) == 3
    assert events[-1].data["counts"]["succeeded"] == 3
    assert {end.id for end in ends} == {told[-1][0]}
    assert [end.data["counts"]["succeeded"] for end in ends] == [3] * 10
    assert "jobs" not in events[-1].data
    progress = [event for event in events if event.kind == "job.progress"]
    assert progress
    for event in progress:
        assert event.id is None
        assert event.data["status"] == "running"
        assert 0 < event.data["progress"]["fraction"] <= 1
        assert event.data["progress"]["total_steps"] == 30
    for event in events[:-1]:
        assert event.data.keys() == {"job_id", "index", "status", "progress", "attempts", "error"}


def test_a_client_that_was_cut_goes_on_behind_its_last_event(stack, valkey) -> None:
    """Cut again and again, over a restart of the API, a client sees the very events that the ledger told."""
    stack.wait_api()
    worker = stack.start_worker()
    stack.wait_ready()
    batch = submit(stack, 6, num_inference_steps=20)
    events: list[Event] = []
    last_id = None
    for turn in range(40):
        with following(stack, batch["id"], last_id) as stream:
            for event in stream:
                events.append(event)
                if event.id is not None:
                    last_id = event.id
                    break  # the connection is dropped in the middle of what comes
        if turn == 3:
            stack.restart_api()
        if events[-1].kind == "batch.finished":
            break
    told = stored_states(valkey.client(decode_responses=True), batch["id"])
    # The worker was quick, perhaps: what came before the snapshot is in it.
    num_before = [event_id for event_id, _ in [("0-0", ""), *told]].index(events[0].id or "")
    assert states(events) == told[num_before:]
    assert [event.kind for event in events].count("snapshot") == 1
    url = f"/v1/batches/{batch['id']}/events"
    assert stack.client.call("GET", url, headers={"Last-Event-ID": last_id}).status_code == 204
    assert worker.is_running


@pytest.fixture
def own_valkey(tmp_path) -> Iterator[EmbeddedValkey]:
    """Give a Valkey that a test may kill and start again."""
    server = EmbeddedValkey(tmp_path / "own-valkey")
    server.start()
    server.wait_ready()
    yield server
    server.kill()


def test_an_outage_of_redis_costs_a_stream_nothing(unstarted, own_valkey) -> None:
    """A stream that was open when Redis was killed stays open, and tells what happens after it has come back."""
    stack = unstarted
    stack.environment |= {"RESTAGE__REDIS__URL": own_valkey.url}
    stack.start("api")
    stack.wait_api()
    batch = submit(stack, 2, num_inference_steps=10)
    events: list[Event] = []
    with following(stack, batch["id"]) as stream:
        events.append(next(stream))
        own_valkey.kill()
        stack.wait_health(503)
        own_valkey.start()
        own_valkey.wait_ready()
        stack.start_worker()
        events += stream
    import redis

    with redis.Redis.from_url(own_valkey.url, decode_responses=True) as client:
        assert states(events) == stored_states(client, batch["id"])
    assert events[-1].data["counts"]["succeeded"] == 2
