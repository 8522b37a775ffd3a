"""The ledger when replies are lost: whoever repeats a call hears what the first one was answered."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.backoff import NoBackoff

from server.errors import LedgerUnavailable
from server.jobs import Job, JobStatus
from server.ledger import api_side, worker_side
from server.ledger.api_side import ApiLedger
from server.ledger.scripts import script_text
from server.ledger.worker_side import HeldJob, SentStart, WorkerLedger
from server.settings import RedisSettings
from tests.chaos.proxy import Proxy, script_needle
from tests.integration.ledger.kit import FORM_SECONDS, RETENTION, UNUSED_SECONDS, record

# Every script that a worker calls for a job of its own.
OF_WORKERS = ("claim", "start", "renew", "commit", "fail", "retry")


@pytest.fixture
def proxy(ledger: Any) -> Iterator[Proxy]:
    """Give a proxy before the ledger's Redis, which knows all scripts of workers."""
    for name in OF_WORKERS:
        ledger.client.script_load(script_text(name))
    with Proxy(urlsplit(ledger.url).port or 0) as started:
        yield started


def settings_of(proxy: Proxy) -> RedisSettings:
    """Describe a Redis that is given up soon."""
    return RedisSettings(url=f"redis://{proxy.address}/0", timeout_seconds=2.0)


@pytest.fixture
def call_through_loser(ledger: Any, proxy: Proxy) -> Callable[..., Any]:
    """Give a function that makes a call of the API while some replies are lost: `call(ask, num_to_lose=1)`.

    The client library repeats a call once, so with one lost reply the caller notices nothing.
    """

    def call(ask: Callable[[ApiLedger], Awaitable[Any]], *, num_to_lose: int = 1) -> Any:
        async def make() -> Any:
            through_proxy = ApiLedger(api_side.connect(settings_of(proxy)), key_prefix=ledger.prefix)
            try:
                return await ask(through_proxy)
            finally:
                await through_proxy.close()

        proxy.lose_replies(b"EVALSHA", times=num_to_lose)
        try:
            return ledger.run(make())
        finally:
            assert proxy.num_to_lose == 0

    return call


def test_a_submission_whose_reply_is_lost_is_accepted_once(ledger: Any, call_through_loser: Callable[..., Any]) -> None:
    """The client's own further try, and the caller's after that, find the batch that the first call wrote."""
    ledger.accept("warm", ["flux"])  # Redis knows the script
    batch = ledger.batch("b1", ["qwen", "qwen"])
    ledger.announce_uploads(batch)

    def submit(api: ApiLedger) -> Awaitable[Any]:
        return api.submit(batch, retention=RETENTION, max_open_jobs=3)

    for _ in range(2):
        with pytest.raises(LedgerUnavailable):
            call_through_loser(submit, num_to_lose=2)
    assert call_through_loser(submit).kind == "accepted"
    assert ledger.read("b1").counts["queued"] == 2
    assert ledger.client.llen(f"dramatiq:{ledger.prefix}.qwen") == 1
    assert [ledger.upload(f"b1-upload-{number}").references for number in range(2)] == [1, 1]


@contextmanager
def worker_behind(proxy: Proxy, ledger: Any) -> Iterator[WorkerLedger]:
    """Yield a worker's side that reaches Redis through the proxy."""
    with closing(worker_side.connect(settings_of(proxy))) as client:
        # It tries as often as ever, but without its pauses.
        client.connection_pool.connection_kwargs["retry"]._backoff = NoBackoff()
        yield WorkerLedger(client, worker_id="w1", key_prefix=ledger.prefix, lease_seconds=650)


@pytest.mark.parametrize("num_to_lose", [1, 2, 3, 4])
def test_calls_of_a_worker_whose_replies_are_lost_are_done_once(ledger: Any, proxy: Proxy, num_to_lose: int) -> None:
    """One to four lost replies in a row of each call: a result, a failure and an error are each counted once.

    A job that was given back is answered as `lost` to whoever repeats it: it is not theirs any more.
    """
    ledger.accept("b1", ["qwen"] * 3)
    with worker_behind(proxy, ledger) as worker:

        def insist(name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
            proxy.lose_replies(script_needle(name), times=num_to_lose)
            while True:
                with suppress(LedgerUnavailable):
                    answer = call(*args, **options)
                    assert proxy.num_to_lose == 0
                    return answer

        done, failed, given_back = (insist("claim", worker.claim, ["qwen"], num_held=0) for _ in range(3))
        assert [job.attempts for job in (done, failed, given_back)] == [1, 1, 1]
        assert insist("start", worker.start, done.id, 1, on_device=True) == "ok"
        sent: list[SentStart] = []

        def hear_start() -> str:
            sent.extend([] if sent else [worker.send_start(failed.id, 1, instead_of=HeldJob(done.id, 1))])
            return sent[0].reply()

        assert insist("start", hear_start) == "ok"
        assert insist("renew", worker.renew, [HeldJob(done.id, 1, 2, 8)]) == ["ok"]
        upload_ids = [done.inputs[0].upload_id]
        assert insist("commit", ledger.commit_as, worker, done.id, 1, upload_ids, speeds={"run": 1.5}) == "ok"
        assert insist("fail", worker.fail, failed.id, 1, code="x", detail="y", timings={}) == "ok"
        error = {"delay_seconds": 0, "counts": True, "max_errors": 3, "code": "x", "detail": "y"}
        assert insist("retry", worker.retry, given_back.id, 1, **error) == "lost"
        again = insist("claim", worker.claim, ["qwen"], num_held=0)
        assert (again.id, again.attempts, again.fence) == (given_back.id, 2, 2)
        assert insist("retry", worker.retry, again.id, 2, **error | {"max_errors": 2}) == "lost"

    batch = ledger.read("b1")
    assert [job.status for job in batch.jobs] == [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.FAILED]
    assert (batch.counts["succeeded"], batch.counts["failed"]) == (1, 2)
    assert [ledger.client.hget(f"{ledger.prefix}:job:{job.id}", "errors") for job in batch.jobs] == ["0", "0", "2"]
    told = Counter(ledger.events("b1"))
    assert told == {"job.started": 4, "job.succeeded": 1, "job.failed": 2, "job.retrying": 1, "batch.finished": 1}


def test_a_claim_whose_reply_is_lost_is_repeated(ledger: Any, proxy: Proxy) -> None:
    """The next call gets the job that the lost one took, with the same fence; the call after it gets another."""
    ledger.accept("b1", ["qwen", "qwen"])
    with worker_behind(proxy, ledger) as worker:
        proxy.lose_replies(script_needle("claim"), times=3)
        with pytest.raises(LedgerUnavailable):
            worker.claim(["qwen"], num_held=0)
        assert proxy.num_to_lose == 0
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
    assert len(ledger.run(ledger.api.take_trash(**taking))) == 3  # photo, result, marker
    [due] = ledger.run(ledger.api.take_webhooks(**taking))
    assert (due.batch.id, due.attempt) == ("b1", 2)
