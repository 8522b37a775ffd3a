"""The ledger when replies are lost: whoever repeats a call hears what the first one was answered."""

import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from server.errors import LedgerUnavailable
from server.jobs import Job, JobStatus
from server.ledger import api_side, worker_side
from server.ledger.api_side import ApiLedger
from server.ledger.worker_side import WorkerLedger
from server.settings import RedisSettings
from tests.integration.ledger.kit import FORM_SECONDS, RETENTION, UNUSED_SECONDS, record


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


def settings_of(url: str) -> RedisSettings:
    """Describe a Redis that is given up soon."""
    return RedisSettings(url=url, timeout_seconds=2.0)


@pytest.fixture
def call_through_loser(ledger: Any, loser: ReplyLoser) -> Callable[..., Any]:
    """Give a function that makes a call of the API while some replies are lost: `call(ask, num_to_lose=1)`.

    The client library repeats a call once, so with one lost reply the caller notices nothing.
    """

    def call(ask: Callable[[ApiLedger], Awaitable[Any]], *, num_to_lose: int = 1) -> Any:
        async def make() -> Any:
            through_proxy = ApiLedger(api_side.connect(settings_of(loser.url)), key_prefix=ledger.prefix)
            try:
                return await ask(through_proxy)
            finally:
                await through_proxy.close()

        loser.num_to_lose = num_to_lose
        try:
            return ledger.run(make())
        finally:
            assert loser.num_to_lose == 0

    return call


def test_a_submission_whose_reply_is_lost_is_accepted_once(ledger: Any, call_through_loser: Callable[..., Any]) -> None:
    """The client's own further try, and the caller's after that, find the batch that the first call wrote."""
    ledger.accept("warm", ["flux"])  # Redis knows the script
    batch = ledger.batch("b1", ["qwen", "qwen"])
    ledger.announce_uploads(batch)

    def submit(api: ApiLedger) -> Awaitable[Any]:
        return api.submit(batch, retention=RETENTION, max_open_jobs=3)

    with pytest.raises(LedgerUnavailable):
        call_through_loser(submit, num_to_lose=2)
    assert call_through_loser(submit).kind == "accepted"
    assert ledger.read("b1").counts["queued"] == 2
    assert ledger.client.llen(f"dramatiq:{ledger.prefix}.qwen") == 1
    assert [ledger.upload(f"b1-upload-{number}").references for number in range(2)] == [1, 1]


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


def test_a_cancellation_whose_reply_is_lost_is_answered_as_it_was(
    ledger: Any, call_through_loser: Callable[..., Any]
) -> None:
    """Not `finished`, as a second cancellation would be; and the worker is told once."""
    ledger.accept("b1", ["qwen", "qwen"])
    job = ledger.claim(["qwen"])
    ledger.run(ledger.api.cancel("ana", ["j-none"]))  # Redis knows the script
    answers = call_through_loser(lambda api: api.cancel("ana", [job.id, "b1-1", "j-none"]))
    assert answers == ["requested", "cancelled", "unknown"]
    told = [fields["type"] for _, fields in ledger.client.xrange(f"{ledger.prefix}:control")]
    assert told == ["ready", "cancel"]
    assert ledger.client.xrange(f"{ledger.prefix}:control")[0][1]["models"] == "qwen"
    assert ledger.events("b1").count("job.cancelled") == 1
    # Another call is another question.
    assert ledger.run(ledger.api.cancel("ana", ["b1-1"])) == ["finished"]


def test_a_retry_whose_reply_is_lost_begins_one_round(ledger: Any, call_through_loser: Callable[..., Any]) -> None:
    """Not `open`, as a second retry would be answered."""
    ledger.accept("b1", ["qwen"])
    ledger.fail(ledger.claim(["qwen"]))
    ledger.run(ledger.api.reopen("ana", ["j-none"], max_open_jobs=9))
    assert call_through_loser(lambda api: api.reopen("ana", ["b1-0"], max_open_jobs=9)) == ["queued"]
    assert (ledger.read("b1").round, ledger.job("b1-0").status) == (2, JobStatus.QUEUED)
    assert ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=9)) == ["open"]


def test_a_deletion_whose_reply_is_lost_was_one(ledger: Any, call_through_loser: Callable[..., Any]) -> None:
    """Not `unknown`, as a second deletion would be answered."""
    ledger.finish("b1", ["qwen"])
    ledger.run(ledger.api.delete_batch("ana", "b-none"))
    assert call_through_loser(lambda api: api.delete_batch("ana", "b1")) == "deleted"
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "unknown"


def test_uploads_whose_reply_is_lost_are_announced_once(ledger: Any, call_through_loser: Callable[..., Any]) -> None:
    """The forms that are handed out belong to records, whichever of the two calls made them."""
    ledger.announce([record("u1")])
    ids = call_through_loser(
        lambda api: api.announce_uploads(
            [record("u2"), record("u3")],
            form_ttl_seconds=FORM_SECONDS,
            unused_ttl_seconds=UNUSED_SECONDS,
            offer_seconds=UNUSED_SECONDS,
        )
    )
    assert ids == ["u2", "u3"]
    assert ledger.client.zcard(f"{ledger.prefix}:unused") == 3


def test_what_a_lost_reply_took_comes_again(ledger: Any, call_through_loser: Callable[..., Any]) -> None:
    """Names in the trash and deliveries that nobody received are due again after their lease."""
    ledger.finish("b1", ["qwen"], hook=True)
    ledger.pass_time(2000)
    ledger.client.zrem(f"{ledger.prefix}:forget", "b1")
    ledger.expire()
    taking = {"limit": 9, "lease_seconds": 60}
    ledger.run(ledger.api.take_trash(limit=0, lease_seconds=60))
    ledger.run(ledger.api.take_webhooks(limit=0, lease_seconds=60))
    assert call_through_loser(lambda api: api.take_trash(**taking)) == []
    assert call_through_loser(lambda api: api.take_webhooks(**taking)) == []
    ledger.pass_time(61)
    assert len(ledger.run(ledger.api.take_trash(**taking))) == 2
    [due] = ledger.run(ledger.api.take_webhooks(**taking))
    assert (due.batch.id, due.attempt) == ("b1", 2)
