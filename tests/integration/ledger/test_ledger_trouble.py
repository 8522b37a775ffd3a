"""The ledger when replies are lost, Redis is full, forgetful or away, and when texts are hostile."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.exceptions import ResponseError

from server.errors import LedgerUnavailable
from server.jobs import Job, JobStatus
from server.ledger import api_side, worker_side
from server.ledger.records import UploadRecord
from server.ledger.scripts import unavailable
from server.ledger.status import WorkerStatus
from server.ledger.worker_side import HeldJob, WorkerLedger
from server.settings import RedisSettings


class ReplyLoser:
    """A TCP proxy before Redis that lets scripts run and can lose their replies, closing the connection instead."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._redis_address = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.num_to_lose = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._redis_address)
                self._sockets += [client, server]
                losing = threading.Event()
                self._run(self._carry_requests, client, server, losing)
                self._run(self._carry_replies, client, server, losing)

    def _carry_requests(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if b"EVALSHA" in data and self.num_to_lose:
                    self.num_to_lose -= 1
                    losing.set()
                server.sendall(data)
        self._shut(client, server)

    def _carry_replies(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while (data := server.recv(65536)) and not losing.is_set():
                client.sendall(data)
        self._shut(client, server)

    @staticmethod
    def _shut(*sockets: socket.socket) -> None:
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close every connection and wait for the threads."""
        self._shut(self._listener, *self._sockets)
        for thread in self._threads:
            thread.join(10)
        for one in (self._listener, *self._sockets):
            one.close()


@pytest.fixture
def loser(ledger: Any) -> Iterator[ReplyLoser]:
    """Give a proxy before the ledger's Redis."""
    proxy = ReplyLoser(ledger.url)
    yield proxy
    proxy.close()


@pytest.fixture
def full_redis(ledger: Any) -> Iterator[Any]:
    """Give a function that lets no memory be free; it is, after the test."""
    yield lambda: ledger.client.config_set("maxmemory", 1)
    ledger.client.config_set("maxmemory", 0)


def settings_of(url: str) -> RedisSettings:
    """Describe a Redis that is given up soon."""
    return RedisSettings(url=url, timeout_seconds=2.0)


def test_a_submission_whose_reply_is_lost_is_accepted_once(ledger: Any, loser: ReplyLoser) -> None:
    """The client's own further try, and the caller's after that, find the batch that the first call wrote."""
    ledger.accept("warm", ["flux"])  # Redis knows the script
    batch = ledger.batch("b1", ["qwen", "qwen"])
    ledger.announce_uploads(batch)

    async def submit() -> str:
        through_proxy = api_side.ApiLedger(api_side.connect(settings_of(loser.url)), key_prefix=ledger.prefix)
        try:
            return (await through_proxy.submit(batch, records_ttl_seconds=950, max_open_jobs=3)).kind
        finally:
            await through_proxy.close()

    loser.num_to_lose = 2
    with pytest.raises(LedgerUnavailable):
        ledger.run(submit())
    assert loser.num_to_lose == 0
    loser.num_to_lose = 1
    assert ledger.run(submit()) == "accepted"
    assert loser.num_to_lose == 0
    assert ledger.read("b1").counts["queued"] == 2
    assert ledger.client.llen(f"dramatiq:{ledger.prefix}.qwen") == 2


def test_a_claim_whose_reply_is_lost_is_repeated(ledger: Any, loser: ReplyLoser) -> None:
    """The next call gets the job that the lost one took, with the same fence; the call after it gets another."""
    ledger.accept("b1", ["qwen", "qwen"])
    with closing(worker_side.connect(settings_of(loser.url))) as client:
        worker = WorkerLedger(client, worker_id="w1", key_prefix=ledger.prefix, lease_seconds=650)
        assert worker.claim(["flux"], num_held=0) is None  # Redis knows the script

        loser.num_to_lose = 3
        with pytest.raises(LedgerUnavailable):
            worker.claim(["qwen"], num_held=0)
        assert loser.num_to_lose == 0
        first = worker.claim(["qwen"], num_held=0)
        second = worker.claim(["qwen"], num_held=1)
    assert isinstance(first, Job)
    assert isinstance(second, Job)
    assert (first.id, first.fence, first.attempts) == ("b1-0", 1, 1)
    assert second.id == "b1-1"


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
    with pytest.raises(LedgerUnavailable, match="maxmemory"):
        ledger.submit(batch)
    record = UploadRecord("u1", "ana", "u1", "secret plan.jpg", "image/jpeg", 9)
    with pytest.raises(LedgerUnavailable, match=r"^Redis does not serve: command not allowed") as refused:
        ledger.run(ledger.api.create_uploads([record], ttl_seconds=100))
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
    assert ledger.run(ledger.api.reopen("ana", "b1", ["b1-4"])) == ["b1-4"]
    ledger.pass_time(100)
    assert ledger.sweep(["qwen"]).due == 1
    assert worker.backlog(["qwen"])["qwen"].num_ready == 2
    assert ledger.read("b1").counts["succeeded"] == 1
    worker.leave()


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


def test_a_redis_that_refuses_to_write_is_unavailable(ledger: Any) -> None:
    """A refusal is recognised in scripts and in pipelines alike, and reading goes on."""
    ledger.accept("b1", ["qwen"])
    ledger.client.config_set("min-replicas-to-write", 1)
    try:
        record = UploadRecord("u1", "ana", "u1", "a.jpg", "image/jpeg", 9)
        with pytest.raises(LedgerUnavailable, match=r"^Redis does not serve: NOREPLICAS Not enough good replicas"):
            ledger.run(ledger.api.create_uploads([record], ttl_seconds=100))
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
    batch = replace(batch, label=text, metadata={text: text})
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
    for number in range(4):
        ledger.accept(f"b{number}", ["qwen"] * 40)
    assert ledger.client.llen(f"dramatiq:{ledger.prefix}.qwen") == 100
    assert ledger.client.hlen(f"dramatiq:{ledger.prefix}.qwen.msgs") == 100
