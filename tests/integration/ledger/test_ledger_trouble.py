"""The ledger when Redis is full, forgetful or away, and when texts are hostile."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from redis.exceptions import ResponseError

from server.errors import LedgerFull, LedgerUnavailable
from server.jobs import Job, JobStatus, Webhook
from server.ledger import api_side, worker_side
from server.ledger.scripts import script_text, unavailable
from server.ledger.status import WorkerStatus
from server.ledger.worker_side import HeldJob, WorkerLedger
from server.settings import RedisSettings
from tests.integration.ledger.kit import record


@pytest.fixture
def full_redis(ledger: Any) -> Iterator[Any]:
    """Give a function that lets no memory be free; it is, after the test."""
    before = ledger.client.config_get("maxmemory")["maxmemory"]
    yield lambda: ledger.client.config_set("maxmemory", 1)
    ledger.client.config_set("maxmemory", before)


def settings_of(url: str) -> RedisSettings:
    """Describe a Redis that is given up soon."""
    return RedisSettings(url=url, timeout_seconds=2.0)


def test_a_lost_claim_is_not_answered_with_a_job_that_went_elsewhere(ledger: Any) -> None:
    """Where the job was taken back before the claim was repeated, the repetition answers nothing."""
    ledger.accept("b1", ["qwen"])
    worker = ledger.worker()
    worker._claim_token = "lost"  # noqa: S105 - it guards nothing
    assert isinstance(worker.claim(["qwen"], num_held=0), Job)
    # The reply was lost; the lease runs out before the worker asks again, and while Redis still remembers the claim.
    ledger.client.zadd(f"{ledger.prefix}:leases", {"b1-0": 0})
    ledger.client.hset(f"{ledger.prefix}:swept", mapping={"at": int(time.time() * 1000), "grace_until": 0})
    assert ledger.sweep().requeued == 1
    worker._claim_token = "lost"  # noqa: S105 - it guards nothing
    assert worker.claim(["qwen"], num_held=0) is None
    assert isinstance(worker.claim(["qwen"], num_held=0), Job)


def test_accepted_work_drains_while_memory_is_full(ledger: Any, full_redis: Any) -> None:
    """New work is refused as unavailable; claiming, renewing, ending, sweeping and reading go on."""
    ledger.accept("b1", ["qwen"] * 5)
    worker = ledger.worker()
    full_redis()
    batch = ledger.batch("b2", ["qwen"])
    with pytest.raises(LedgerFull, match="maxmemory"):
        ledger.submit(batch)
    with pytest.raises(LedgerFull, match=r"^Redis does not serve: command not allowed") as refused:
        ledger.announce([record("u1", filename="secret plan.jpg")])
    assert "secret" not in refused.value.detail

    jobs = [ledger.claim(["qwen"]) for _ in range(4)]
    worker.announce(WorkerStatus("w1", "cpu", 1))
    assert worker.start(jobs[0].id, 1, on_device=True) == "ok"
    assert worker.renew([HeldJob(job.id, job.fence, 1, 4) for job in jobs]) == ["ok"] * 4
    assert ledger.commit(jobs[0]) == "ok"
    assert worker.fail(jobs[1].id, 1, code="x", detail="y", timings={}) == "ok"
    given_back = worker.retry(jobs[2].id, 1, delay_seconds=5, counts=True, max_errors=3, code="x", detail="y")
    assert given_back == "ok"
    assert ledger.run(ledger.api.cancel("ana", [jobs[3].id, "b1-4"])) == ["requested", "cancelled"]
    assert ledger.run(ledger.api.reopen("ana", ["b1-4"], max_open_jobs=99)) == ["queued"]
    ledger.pass_time(100)
    assert ledger.sweep(["qwen"]).due == 1
    fleet = worker.backlog(["qwen"])
    assert fleet.models["qwen"].num_ready == 2
    assert worker.place(fleet.version, "qwen", ["flux"])
    assert ledger.read("b1").counts["succeeded"] == 1
    worker.leave()


def test_what_frees_memory_goes_on_while_it_is_full(ledger: Any, full_redis: Any) -> None:
    """Expiry, deletion, the trash and webhooks work; so do lists and events."""
    ledger.finish("b1", ["qwen"], hook=True)
    ledger.finish("b2", ["qwen"], hook=True)
    full_redis()
    api = ledger.api
    [first, _] = ledger.run(api.take_webhooks(limit=9, lease_seconds=60))
    outcome = {"outcome": "retrying", "http_status": None, "detail": "refused", "delay_seconds": 9}
    ledger.run(api.note_delivery(first.batch.id, 1, 1, **outcome))
    assert len(ledger.read(first.batch.id).webhook.deliveries) == 1
    assert len(ledger.run(api.list_batches("ana", status=None, label=None, limit=9, cursor=None)).items) == 2
    assert len(ledger.run(api.list_jobs("ana", status=None, model=None, limit=9, cursor=None)).items) == 2
    assert len(ledger.run(api.read_events("b1", "0-0")).events) == 3
    assert ledger.run(api.delete_batch("ana", "b1")) == "deleted"
    ledger.pass_time(2000)
    assert ledger.expire() == {"inputs": 1, "outputs": 1, "records": 1, "uploads": 2}
    assert len(ledger.trash()) == 6


# Reading scripts that Redis refuses to let write.
READERS = ("read_batch", "read_jobs", "list_batches", "list_jobs", "read_events", "backlog")


def test_reading_writes_nothing(ledger: Any) -> None:
    """Redis itself would refuse it; and what is stored is the same after every kind of reading."""
    ledger.finish("b1", ["qwen"], hook=True)
    ledger.accept("b2", ["qwen"])
    ledger.worker().renew([HeldJob(ledger.claim(["qwen"]).id, 1, 3, 8)])
    for name in READERS:
        assert script_text(name).startswith("#!lua flags=no-writes\n")
    changed = ledger.client.info("persistence")["rdb_changes_since_last_save"]
    api = ledger.api
    for call in (
        api.read_batch("b2"),
        api.read_batch("b-none"),
        api.read_job("b1-0"),
        api.read_events("b2", "0-0"),
        api.read_events("b2", "12-34"),
        api.list_batches("ana", status=None, label="x", limit=9, cursor=None),
        api.list_jobs(None, status=JobStatus.RUNNING, model=None, limit=1, cursor=None),
        api.workers(),
        api.changes_position(),
        api.get_uploads("ana", ["b1-upload-0"]),
        api.find_idempotent("ana", "key"),
    ):
        ledger.run(call)
    ledger.worker().backlog(["qwen"])
    assert ledger.client.info("persistence")["rdb_changes_since_last_save"] == changed
    ledger.sweep()
    assert ledger.client.info("persistence")["rdb_changes_since_last_save"] > changed


def test_scripts_are_sent_again_when_redis_forgot_them(ledger: Any, full_redis: Any) -> None:
    """A restart or SCRIPT FLUSH costs a round trip and nothing else, even while memory is full."""
    batch = ledger.batch("b1", ["qwen"])
    ledger.announce_uploads(batch)
    ledger.client.script_flush()
    assert ledger.submit(batch).kind == "accepted"
    full_redis()
    ledger.client.script_flush()
    job = ledger.claim(["qwen"])
    ledger.client.script_flush()
    assert ledger.commit(job) == "ok"
    ledger.client.script_flush()
    assert ledger.job(job.id).status == JobStatus.SUCCEEDED
    ledger.client.script_flush()
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "deleted"


def test_a_redis_that_refuses_to_write_is_unavailable(ledger: Any) -> None:
    """A refusal is recognised in scripts and in pipelines alike, and reading goes on."""
    ledger.accept("b1", ["qwen"])
    ledger.client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(LedgerUnavailable, match=r"^Redis does not serve: NOREPLICAS Not enough good replicas"):
            ledger.announce([record("u1")])
        with pytest.raises(LedgerUnavailable, match="NOREPLICAS"):
            ledger.run(ledger.api.expire())
        with pytest.raises(LedgerUnavailable, match="NOREPLICAS"):
            ledger.run(ledger.api.drop_trash(["uploads/u1"]))
        with pytest.raises(LedgerUnavailable, match="NOREPLICAS"):
            ledger.claim(["qwen"])
        with pytest.raises(LedgerUnavailable, match="NOREPLICAS"):
            ledger.worker().leave()
        assert ledger.job("b1-0").status == JobStatus.QUEUED
    finally:
        ledger.client.config_set("min-replicas-to-write", 0)


def test_a_mistake_of_ours_is_not_called_an_outage(ledger: Any) -> None:
    """A key of the wrong type is an error of the program and stays one."""
    ledger.client.set(f"{ledger.prefix}:batch:b1", "not a hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        ledger.read("b1")
    ledger.client.set(f"{ledger.prefix}:upload:u1", "MISCONF in a value is no outage")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        ledger.run(ledger.api.get_uploads("ana", ["u1"]))
    assert unavailable(ResponseError("ERR the word OOM stands inside")) is None


def test_a_redis_that_is_away_is_told_at_once(ledger: Any) -> None:
    """Refused connections and a server that accepts and never answers both end within two timeouts or so."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        _expect_unavailable(f"redis://127.0.0.1:{port}/0")
    _expect_unavailable(f"redis://127.0.0.1:{port}/0")


def _expect_unavailable(url: str) -> None:
    settings = RedisSettings(url=url, timeout_seconds=0.5)

    async def ask() -> None:
        ledger = api_side.ApiLedger(api_side.connect(settings), key_prefix="restage")
        for call in (ledger.ping, lambda: ledger.read_batch("b1")):
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                await call()
            took.append(time.monotonic() - began)
        await ledger.close()

    took: list[float] = []
    asyncio.run(ask())
    with closing(worker_side.connect(settings, decode=False)) as client:
        worker = WorkerLedger(client, worker_id="w1", key_prefix="restage", lease_seconds=3)
        for call in (lambda: worker.claim(["qwen"], num_held=0), worker.control_position):
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                call()
            took.append(time.monotonic() - began)
    # Tried again, redis-py's way, they would take 4 and 9 timeouts.
    assert max(took) < 1.5


HOSTILE = (
    "\0 NUL \x01\x1f\x7f",
    "'quotes\" \\back\\slash\\ \r\n\t",
    "🛋️ 客厅 غرفة \u2028 \ufeff \U0010ffff",
    '{"json": ["]}", null]} -- "); redis.call("FLUSHALL")',
    "%s %d {0} $1 \\u0000 \\ud800",
    "x" * 4000,
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_comes_back_unchanged(ledger: Any, text: str) -> None:
    """Prompts, names, labels, metadata and error texts may hold anything that UTF-8 can say."""
    batch = ledger.batch("b1", ["qwen"], prompt=text, negative_prompt=text, name=text, metadata={text: text, "": ""})
    batch = replace(batch, label=text, metadata={text: text}, webhook=Webhook(text))
    ledger.announce_uploads(batch)
    idempotency = api_side.Idempotency(key=text, body_sha256="aa", answer=text, ttl_seconds=100)
    assert ledger.submit(batch, idempotency=idempotency).kind == "accepted"
    assert ledger.run(ledger.api.find_idempotent("ana", text)) == ("aa", text)
    job = ledger.claim(["qwen"])
    ledger.worker().retry(job.id, 1, delay_seconds=0, counts=True, max_errors=9, code="x", detail=text)
    entries = ledger.client.xrange(f"{ledger.prefix}:batch:b1:events")
    assert json.loads(entries[-1][1]["data"])["error"]["detail"] == text

    read = ledger.read("b1")
    assert (read.label, read.metadata) == (text, {text: text})
    for one in (job, read.jobs[0]):
        assert (one.prompt, one.negative_prompt, one.name) == (text, text, text)
        assert one.metadata == {text: text, "": ""}
    assert read.jobs[0].error.detail == text

    # And so do what a webhook's host has answered, the name of a file, and whoever looks for the label.
    assert ledger.run(ledger.api.cancel("ana", [job.id])) == ["cancelled"]
    [due] = ledger.run(ledger.api.take_webhooks(limit=1, lease_seconds=60))
    outcome = {"outcome": "gave_up", "http_status": None, "detail": text, "delay_seconds": None}
    ledger.run(ledger.api.note_delivery("b1", 1, 1, **outcome))
    assert due.batch.webhook.url == text
    assert ledger.read("b1").webhook.deliveries[0].detail == text
    ledger.announce([record("u1", filename=text)])
    assert ledger.upload("u1").filename == text
    found = ledger.run(ledger.api.list_batches("ana", status=None, label=text, limit=9, cursor=None))
    assert [one.label for one in found.items] == [text]


def test_what_is_no_text_is_refused_whole_or_escaped(ledger: Any) -> None:
    """A lone surrogate in a request stores nothing; in an error's detail it must not keep the job from failing."""
    batch = ledger.batch("b1", ["qwen"], prompt="half \ud83d a sofa")
    ledger.announce_uploads(batch)
    with pytest.raises(UnicodeEncodeError):
        ledger.submit(batch)
    assert ledger.run(ledger.api.read_batch("b1")) is None

    ledger.accept("b2", ["qwen"])
    job, worker = ledger.claim(["qwen"]), ledger.worker()
    detail = "cannot read hall\udce9.jpg"
    assert worker.retry(job.id, 1, delay_seconds=0, counts=True, max_errors=9, code="x", detail=detail) == "ok"
    ledger.claim(["qwen"])
    assert worker.fail(job.id, 2, code="x", detail=detail, timings={}) == "ok"
    assert ledger.job(job.id).error.detail == "cannot read hall\\udce9.jpg"


def test_parameters_keep_their_types_and_digits(ledger: Any) -> None:
    """Empty objects and lists, big integers and long floats pass through the scripts as they are."""
    params = {
        "seed": 2**53 + 1,
        "huge": 10**30,
        "tiny": 5e-324,
        "third": 1 / 3,
        "minus_zero": -0.0,
        "one": 1.0,
        "empty": {},
        "none": None,
        "list": [],
        "nested": {"a": [{"b": [[], {}, [None, True, 1e300]]}]},
    }
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    batch = ledger.batch("b1", ["qwen"], params=params | {"deep": deep}, loras=({"id": "x", "scale": 0.1},))
    ledger.announce_uploads(batch)
    assert ledger.submit(batch).kind == "accepted"
    job = ledger.claim(["qwen"])
    assert repr(job.params) == repr(params | {"deep": deep})
    assert job.loras == ({"id": "x", "scale": 0.1},)


def test_the_clients_wait_no_longer_than_told(ledger: Any) -> None:
    """Both clients carry the configured timeout and password."""
    settings = RedisSettings.model_validate({"url": ledger.url, "timeout_seconds": 1.5, "password": "hunter2"})
    for client in (worker_side.connect(settings), api_side.connect(settings)):
        options = client.connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1.5, 1.5)
        assert options["password"] == "hunter2"  # noqa: S105


def test_a_full_redis_can_still_be_opened(ledger: Any, full_redis: Any) -> None:
    """An API that starts while memory is full reads the schema and goes on: its sweep is what frees memory."""
    ledger.run(ledger.api.check_schema())
    full_redis()
    ledger.run(ledger.api.check_schema())


def test_more_calls_than_connections_wait_their_turn(ledger: Any) -> None:
    """Three hundred calls at once are all answered; none is told that Redis does not serve."""

    async def read_all() -> list[Any]:
        api = api_side.ApiLedger(api_side.connect(settings_of(ledger.url)), key_prefix=ledger.prefix)
        try:
            return await asyncio.gather(*(api.read_batch("nobody") for _ in range(300)))
        finally:
            await api.close()

    assert ledger.run(read_all()) == [None] * 300


def test_bells_do_not_pile_up(ledger: Any) -> None:
    """Where no worker listens, a hundred bells wait for a model at most, however many jobs are submitted."""
    ledger.client.sadd(f"{ledger.prefix}:workers", *(f"w{number}" for number in range(40)))
    for number in range(4):
        ledger.accept(f"b{number}", ["qwen"] * 40)
    assert ledger.client.llen(f"dramatiq:{ledger.prefix}.qwen") == 100
    assert ledger.client.hlen(f"dramatiq:{ledger.prefix}.qwen.msgs") == 100
