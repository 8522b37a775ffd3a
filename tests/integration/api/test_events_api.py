"""Event streams: where a client may take them up again, when they end, and what they leave behind."""

import asyncio
import contextlib
import io
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from server.api.events import _Follower
from server.changes import Changes
from server.jobs import Job
from server.ledger.api_side import ApiLedger, connect
from server.ledger.worker_side import HeldJob
from server.main import create_app
from server.periodic import end_tasks

MODELS = ["tiny-qwen-image-edit-2511"]
# Ten times what a stream needs here to tell a change.
PATIENCE_SECONDS = 20.0


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def api(open_live_api):
    """Give an API behind a real socket."""
    with open_live_api() as running:
        yield running


@pytest.fixture
def accept(api):
    """Give a function that submits a batch of `count` jobs of one photo."""
    [upload_id] = api.upload(picture())
    return lambda count=1: api.accept(*[{"upload_id": upload_id}] * count)


@contextlib.contextmanager
def following(api, batch, last_event_id=None):
    """Open a stream; yields its frames, each a dict of its fields, `""` for a comment."""
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    with api.http.stream(
        "GET", f"/v1/batches/{batch['id']}/events", headers=headers, timeout=PATIENCE_SECONDS
    ) as response:
        assert response.status_code == 200, response.read()
        yield frames(response)


def frames(response):
    fields = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(":")
            assert name not in fields, f"{name} stands twice in one event"
            fields[name] = value.removeprefix(" ")
        else:
            yield fields
            fields = {}
    assert fields == {}, "the stream was cut within an event"


def follow(api, batch, last_event_id=None):
    """Read a stream to its end; returns its events as (kind, id, data)."""
    with following(api, batch, last_event_id) as stream:
        return [(one["event"], one.get("id"), json.loads(one["data"])) for one in stream if "data" in one]


def skip(stream, count):
    for _ in range(count):
        next(stream)


def read(api, batch):
    return api.http.get(f"/v1/batches/{batch['id']}").json()


def end(api, batch):
    assert api.http.post(f"/v1/batches/{batch['id']}/cancel").status_code == 200


def stored(api, batch):
    """List id and kind of what the ledger has told."""
    return [(entry_id, fields["type"]) for entry_id, fields in api.redis.xrange(f"restage:batch:{batch['id']}:events")]


def without_urls(value: Any) -> Any:
    """Take out what differs from one reading to the next."""
    if isinstance(value, dict):
        left_out = {"url", "url_expires_at", "eta_seconds"}
        return {name: without_urls(one) for name, one in value.items() if name not in left_out}
    return [without_urls(one) for one in value] if isinstance(value, list) else value


def test_a_stream_begins_with_the_batch_and_tells_each_change(api, accept):
    """First how to come back, then the batch, then every change with its id, in order; then the stream ends."""
    batch = accept(2)
    with api.http.stream("GET", f"/v1/batches/{batch['id']}/events", timeout=PATIENCE_SECONDS) as response:
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        stream = frames(response)
        assert next(stream) == {"retry": "2000"}
        snapshot = next(stream)
        assert (snapshot["event"], snapshot["id"]) == ("snapshot", "0-0")
        assert without_urls(json.loads(snapshot["data"])) == without_urls(batch)
        first, second = api.run_next(), api.fail_next()
        told = [(one["event"], one["id"], json.loads(one["data"])) for one in stream]
    assert [(event_id, kind) for kind, event_id, _ in told] == stored(api, batch)
    changes = [
        ("job.started", first.id, 0, "running", 1, None),
        ("job.succeeded", first.id, 0, "succeeded", 1, None),
        ("job.started", second.id, 1, "running", 1, None),
        ("job.failed", second.id, 1, "failed", 1, {"code": "invalid_input", "detail": "The photo is cut off."}),
    ]
    assert [(kind, data) for kind, _, data in told[:-1]] == [
        (
            kind,
            {"job_id": job_id, "index": index, "status": status, "progress": None, "attempts": tries, "error": error},
        )
        for kind, job_id, index, status, tries, error in changes
    ]
    kind, _, data = told[-1]
    assert kind == "batch.finished"
    assert without_urls(data) == {
        name: value for name, value in without_urls(read(api, batch)).items() if name != "jobs"
    }


def test_progress_is_told_once_and_without_an_id(api, accept):
    """Each step that the worker tells comes once; a cut there costs nothing, as only changes of state are counted."""
    batch = accept()
    with following(api, batch) as stream:
        skip(stream, 2)
        job = api.worker.claim(MODELS, num_held=0)
        assert isinstance(job, Job)
        assert next(stream)["event"] == "job.started"
        for step in (1, 1, 2):
            api.worker.renew([HeldJob(job.id, job.fence, step=step, total_steps=4)])
            if step != 1 or "seen" not in locals():
                seen = next(stream)
                assert (seen["event"], "id" in seen) == ("job.progress", False)
                assert json.loads(seen["data"]) == {
                    "job_id": job.id,
                    "index": 0,
                    "status": "running",
                    "progress": {"step": step, "total_steps": 4, "fraction": step / 4},
                    "attempts": 1,
                    "error": None,
                }
        api.worker.retry(
            job.id, job.fence, delay_seconds=0, counts=True, max_errors=3, code="out_of_memory", detail="No."
        )
        retrying = next(stream)
        assert retrying["event"] == "job.retrying"
        assert json.loads(retrying["data"])["error"] == {"code": "out_of_memory", "detail": "No."}
        assert json.loads(retrying["data"])["status"] == "queued"


def test_a_client_goes_on_behind_any_event(api, accept):
    """From each id on, and from the very beginning, exactly what came after it is told."""
    batch = accept(2)
    api.run_next()
    api.fail_next()
    told = stored(api, batch)
    for position, (last_id, _) in enumerate([("0-0", ""), *told[:-1]]):
        assert [(event_id, kind) for kind, event_id, _ in follow(api, batch, last_id)] == told[position:]


@pytest.mark.parametrize("is_finished", [False, True])
def test_an_id_that_is_unknown_gets_a_fresh_snapshot(api, accept, is_finished):
    """Whatever stands in Last-Event-ID, a client gets the whole batch rather than an error or a gap."""
    batch, other = accept(), accept()
    api.fail_next()
    end(api, other)
    foreign = stored(api, other)[-1][0]
    assert foreign not in [event_id for event_id, _ in stored(api, batch)]
    if not is_finished:
        api.http.post(f"/v1/batches/{batch['id']}/retry")
    last = stored(api, batch)[-1][0]
    beyond = f"{int(last.partition('-')[0]) + 1}-0"
    for unknown in (
        "",
        "nope",
        "1",
        "1-1",
        "1-2-3",
        "-1-0",
        "+",
        "$",
        "*",
        "0-1",
        last.replace("-", ":"),
        f"({last}",
        beyond,
        foreign,
        "18446744073709551615-18446744073709551615",
        "18446744073709551616-0",
        "99999999999999999999-0",
        "9" * 10_000,
        b"\xb2-\xb2",
        b"\xff\xfe",
    ):
        with following(api, batch, unknown) as stream:
            assert next(stream) == {"retry": "2000"}
            snapshot = next(stream)
            assert (snapshot["event"], snapshot["id"]) == ("snapshot", last), unknown
            assert json.loads(snapshot["data"])["id"] == batch["id"]
            if is_finished:
                assert [one["event"] for one in stream] == ["batch.finished"]


def test_events_that_were_cut_off_are_made_up_for_by_a_snapshot(api, accept):
    """A client that was away for too long hears where the batch stands now, and goes on from there."""
    batch = accept(3)
    api.run_next()
    api.run_next()
    first, *_, last = [event_id for event_id, _ in stored(api, batch)]
    api.redis.xtrim(f"restage:batch:{batch['id']}:events", maxlen=2, approximate=False)
    for away_since in ("0-0", first):
        with following(api, batch, away_since) as stream:
            next(stream)
            snapshot = next(stream)
            assert (snapshot["event"], snapshot["id"]) == ("snapshot", last)
            assert json.loads(snapshot["data"])["counts"]["succeeded"] == 2
    api.run_next()
    assert [kind for kind, _, _ in follow(api, batch, last)] == ["job.started", "job.succeeded", "batch.finished"]
    # Also when nothing at all is left of them.
    api.redis.delete(f"restage:batch:{batch['id']}:events")
    assert [kind for kind, _, _ in follow(api, batch, last)] == ["snapshot", "batch.finished"]


def test_a_finished_batch_is_told_whole_and_then_no_more(api, accept):
    """Without an id a finished batch is a snapshot and its end; whoever has seen the end gets 204."""
    batch = accept(2)
    api.run_next()
    end(api, batch)
    (kind, event_id, snapshot), (last_kind, last_id, finished) = follow(api, batch)
    assert (kind, last_kind, event_id) == ("snapshot", "batch.finished", last_id)
    assert without_urls(snapshot) == without_urls(read(api, batch))
    assert finished == {name: value for name, value in snapshot.items() if name != "jobs"}
    response = api.http.get(f"/v1/batches/{batch['id']}/events", headers={"Last-Event-ID": last_id})
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers

    # A retry begins another round, and the same id goes on into it.
    assert api.http.post(f"/v1/batches/{batch['id']}/retry").status_code == 200
    with following(api, batch, last_id) as stream:
        next(stream)
        assert next(stream)["event"] == "job.retrying"
        api.run_next()
        assert [one["event"] for one in stream] == ["job.started", "job.succeeded", "batch.finished"]
    assert len([kind for _, kind in stored(api, batch) if kind == "batch.finished"]) == 2


def test_more_events_than_come_at_once_are_all_told(api, accept, monkeypatch):
    """A long history is told in parts, without a pause between them, up to its end."""
    batch = accept()
    data = json.dumps({"job_id": batch["jobs"][0]["id"], "index": 0, "status": "queued", "attempts": 1, "error": None})
    with api.redis.pipeline() as pipe:
        for _ in range(1500):
            pipe.xadd(f"restage:batch:{batch['id']}:events", {"type": "job.retrying", "data": data})
        pipe.execute()
    end(api, batch)
    told = stored(api, batch)
    assert len(told) == 1502
    monkeypatch.setattr("server.api.events._LOOK_SECONDS", 3600.0)
    assert [(event_id, kind) for kind, event_id, _ in follow(api, batch, "0-0")] == told


def test_an_idle_stream_is_kept_alive_with_comments(api, accept, monkeypatch):
    """While nothing happens, comments come; an event that comes meanwhile is told at once."""
    monkeypatch.setattr("server.api.events._COMMENT_SECONDS", 0.2)
    monkeypatch.setattr("server.api.events._LOOK_SECONDS", 0.05)
    batch = accept()
    with following(api, batch) as stream:
        skip(stream, 2)
        started = time.monotonic()
        comments = [next(stream) for _ in range(3)]
        assert time.monotonic() - started > 0.5
        assert [list(comment) for comment in comments] == [[""]] * 3
        end(api, batch)
        assert [one["event"] for one in stream if "event" in one] == ["job.cancelled", "batch.finished"]


def test_a_change_is_told_at_once(api, accept, monkeypatch):
    """A stream is woken by the change itself: it does not wait for its next look."""
    monkeypatch.setattr("server.api.events._LOOK_SECONDS", 3600.0)
    batch = accept()
    with following(api, batch) as stream:
        skip(stream, 2)
        started = time.monotonic()
        api.run_next()
        assert [one["event"] for one in stream] == ["job.started", "job.succeeded", "batch.finished"]
        assert time.monotonic() - started < PATIENCE_SECONDS


def test_clients_that_go_away_leave_nothing_behind(api, accept, wait_until):
    """When its client is gone, a stream is closed and nobody waits for the batch any more."""
    first, second = accept(), accept()
    waiting = api.services.changes._waiting
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(following(api, batch)) for batch in (first, first, first, second)]
        for stream in streams:
            skip(stream, 2)
        assert {batch_id: len(events) for batch_id, events in waiting.items()} == {first["id"]: 3, second["id"]: 1}
    wait_until(lambda: not waiting)
    with following(api, first) as stream:
        skip(stream, 2)
        end(api, first)
        assert [one["event"] for one in stream] == ["job.cancelled", "batch.finished"]
    wait_until(lambda: not waiting)
    end(api, second)
    follow(api, second)
    assert not waiting


def test_the_end_of_the_api_ends_its_streams(open_live_api):
    """A stopping server does not wait for those who follow: the connection ends, and they know how to come back."""
    with httpx.Client(timeout=PATIENCE_SECONDS) as client, contextlib.ExitStack() as opened:
        with open_live_api() as api:
            [upload_id] = api.upload(picture())
            batch = api.accept({"upload_id": upload_id})
            url = f"{api.http.base_url}/v1/batches/{batch['id']}/events"
            lines = opened.enter_context(client.stream("GET", url)).iter_lines()
            assert next(lines) == "retry: 2000"
            while not next(lines).startswith("data: "):
                pass
            started = time.monotonic()
        assert time.monotonic() - started < PATIENCE_SECONDS
        assert next(lines) == ""
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, StopIteration)):
            next(lines)


def in_process(settings_for, valkey, s3, story):
    """Run a coroutine function with the services of an API that listens nowhere."""
    app = create_app(settings_for(valkey=valkey, s3=s3))

    async def run():
        async with app.lifespan():
            return await story(app.state.services)

    return asyncio.run(run())


@pytest.mark.parametrize("position", [None, "0-0"])
def test_a_deletion_ends_the_stream(api, accept, settings_for, valkey, s3, position):
    """A stream whose batch is deleted between two of its looks ends, and so does one that has not begun."""
    batch = accept()

    async def story(services):
        follower = _Follower(services, batch["id"], position)
        events = follower.events()
        first = [await anext(events)]
        if position is None:
            first.append(await anext(events))
        await asyncio.to_thread(end, api, batch)
        assert await services.ledger.delete_batch("", batch["id"]) == "deleted"
        rest = [text async for text in events]
        unbegun = [text async for text in _Follower(services, batch["id"], position).events()]
        return first, rest, unbegun, services.changes._waiting

    first, rest, unbegun, waiting = in_process(settings_for, valkey, s3, story)
    assert first[0] == "retry: 2000\n\n"
    assert rest == []
    assert unbegun == ["retry: 2000\n\n"]
    assert not waiting


def test_each_process_wakes_its_own_streams(valkey, settings_for, api, accept):
    """Two API processes on one ledger both hear of a change, and only those who wait for that batch are woken."""
    batch, other = accept(), accept()

    async def story():
        settings = settings_for(valkey=valkey)
        ledgers = [ApiLedger(connect(settings.redis), key_prefix="restage") for _ in range(2)]
        both = [Changes(ledger, block_seconds=0.5) for ledger in ledgers]
        readers = [asyncio.create_task(changes.run()) for changes in both]
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(changes.subscribed(batch["id"])) for changes in both]
            waiting.append(stack.enter_context(both[0].subscribed(batch["id"])))
            idle = [stack.enter_context(changes.subscribed(other["id"])) for changes in both]
            # Whoever waits when a reader begins is woken once: what came before is not told again.
            await asyncio.wait_for(asyncio.gather(*[one.wait() for one in [*waiting, *idle]]), PATIENCE_SECONDS)
            for one in [*waiting, *idle]:
                one.clear()
            await asyncio.to_thread(api.run_next)
            await asyncio.wait_for(asyncio.gather(*[one.wait() for one in waiting]), PATIENCE_SECONDS)
            assert not any(one.is_set() for one in idle)
        assert not any(changes._waiting for changes in both)
        for reader in readers:
            reader.cancel()
        assert all(
            isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*readers, return_exceptions=True)
        )
        for ledger in ledgers:
            await ledger.close()

    asyncio.run(story())


def test_a_reader_of_changes_ends_when_it_is_told_to(valkey, settings_for):
    """A cancel may be lost where it meets the end of a call of Redis; the reader ends all the same."""

    async def story():
        ledger = ApiLedger(connect(settings_for(valkey=valkey).redis), key_prefix="restage")
        for _ in range(20):
            task = asyncio.create_task(Changes(ledger, block_seconds=0.5).run())
            await asyncio.sleep(random.uniform(0, 0.01))
            await asyncio.wait_for(end_tasks([task]), PATIENCE_SECONDS)
            assert task.cancelled()
        await ledger.close()

    asyncio.run(story())


def test_a_burst_gets_no_more_streams_than_there_may_be(open_live_api, wait_until):
    """Of many that come at once only so many are let in, and their places are free again however they end."""
    with open_live_api(RESTAGE__SERVER__MAX_STREAMS="2") as api:
        [upload_id] = api.upload(picture())
        path = f"/v1/batches/{api.accept({'upload_id': upload_id})['id']}/events"
        for _ in range(3):
            assert api.http.get(f"/v1/batches/{'0' * 32}/events").status_code == 404
        all_answered = threading.Barrier(10)

        def come(_):
            with api.http.stream("GET", path, timeout=PATIENCE_SECONDS) as response:
                all_answered.wait(PATIENCE_SECONDS)
                return response.status_code

        for _ in range(2):
            with ThreadPoolExecutor(10) as clients:
                statuses = list(clients.map(come, range(10)))
            assert sorted(statuses) == [200] * 2 + [503] * 8
            wait_until(lambda: api.services.streams._num_open == 0)
