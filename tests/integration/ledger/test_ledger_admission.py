"""New work that could not be kept, or would only wait, is refused whole; what is open goes on."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from server.jobs import JobStatus
from server.ledger.api_side import ApiLedger
from server.ledger.status import WorkerModel, WorkerStatus
from server.settings import AdmissionSettings
from tests.integration.ledger.kit import RETENTION

GRACE = AdmissionSettings(worker_grace_seconds=950)


def announce(ledger: Any, **ready: bool) -> None:
    """Let a worker say of models whether it is ready for them."""
    models = {
        model: WorkerModel(ready=is_ready, reason=None if is_ready else "no folder")
        for model, is_ready in ready.items()
    }
    ledger.worker().announce(WorkerStatus("w1", "cpu", 1, models))


def submit(ledger: Any, batch_id: str, models: list[str], admission: AdmissionSettings = GRACE) -> tuple[str, str]:
    """Submit a batch under these rules; where it is refused nothing may have been written."""
    batch = ledger.batch(batch_id, models)
    ledger.announce_uploads(batch)
    before = contents(ledger)
    result = ledger.submit(batch, admission=admission)
    assert (contents(ledger) == before) == (result.kind != "accepted")
    return result.kind, result.text


def contents(ledger: Any) -> dict[str, bytes]:
    """Return everything that the ledger holds."""
    names = ledger.keys()
    return {name: ledger.raw_client.dump(f"{ledger.prefix}:{name}") for name in names}


def test_a_model_that_nobody_has_served_yet_gets_the_grace(ledger: Any) -> None:
    """A fresh ledger accepts while the first worker loads, and no longer, however often an API process starts.

    Where no API was there lately, all may have been away, and the grace begins anew.
    """
    ledger.run(ledger.api.expect_models(["qwen"]))
    ledger.pass_time(500)
    assert submit(ledger, "b1", ["qwen", "flux"]) == ("accepted", "")
    ledger.sweep()
    ledger.run(ledger.api.expect_models(["qwen", "flux"]))
    ledger.pass_time(500)
    # qwen was expected by the API 1,000 s ago, flux by the first batch 500 s ago.
    assert submit(ledger, "b2", ["flux", "qwen"]) == ("unserved", "qwen")
    assert submit(ledger, "b3", ["flux"]) == ("accepted", "")
    assert ledger.submit(ledger.batch("b1", ["qwen", "flux"]), admission=GRACE).kind == "accepted"
    ledger.pass_time(500)
    assert submit(ledger, "b4", ["flux"]) == ("unserved", "flux")
    ledger.client.delete(f"{ledger.prefix}:swept")  # it ends by itself a minute after the last sweep
    ledger.run(ledger.api.expect_models(["flux"]))
    assert submit(ledger, "b4", ["flux"]) == ("accepted", "")


def test_only_a_worker_that_is_ready_keeps_a_model_open(ledger: Any) -> None:
    """A worker that knows a model and cannot run it is none; when the last ready one has gone, the grace begins."""
    announce(ledger, qwen=True, flux=False)
    assert submit(ledger, "b1", ["flux"]) == ("accepted", "")
    for _ in range(3):
        ledger.pass_time(500)
        announce(ledger, qwen=True, flux=False)
    assert submit(ledger, "b2", ["qwen", "flux"]) == ("unserved", "flux")
    ledger.worker().leave()
    ledger.pass_time(900)
    assert submit(ledger, "b3", ["qwen"]) == ("accepted", "")
    ledger.pass_time(100)
    assert submit(ledger, "b4", ["qwen"]) == ("unserved", "qwen")
    # What was accepted waits on, may be retried, and is claimed by whoever comes.
    assert ledger.run(ledger.api.cancel("ana", ["b1-0"])) == ["cancelled"]
    assert ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=99)) == ["queued"]
    announce(ledger, qwen=True, flux=True)
    assert submit(ledger, "b5", ["qwen", "flux"]) == ("accepted", "")


@pytest.fixture
def bound_memory(ledger: Any) -> Iterator[Callable[[float], None]]:
    """Give a function that bounds the memory of Redis so that a share of it is in use."""
    before = ledger.client.config_get("maxmemory")["maxmemory"]

    def bound(share: float) -> None:
        used = ledger.client.info("memory")["used_memory"]
        ledger.client.config_set("maxmemory", int(used / share) if share else 0)

    yield bound
    ledger.client.config_set("maxmemory", before)


def test_what_is_left_of_memory_is_for_open_jobs(ledger: Any, bound_memory: Callable[[float], None]) -> None:
    """Beyond the share SUBMIT refuses and says how much is in use; claims, results and retries go on."""
    ledger.accept("b1", ["qwen"] * 3)
    bound_memory(0.9)
    kind, percent = submit(ledger, "b2", ["qwen"])
    assert kind == "no_memory"
    assert 85 <= int(percent) <= 95
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    assert ledger.run(ledger.api.cancel("ana", ["b1-1"])) == ["cancelled"]
    assert ledger.run(ledger.api.reopen("ana", ["b1-1"], max_open_jobs=9)) == ["queued"]
    # A batch that was accepted stays so, whatever has happened since.
    assert ledger.submit(ledger.batch("b1", ["qwen"] * 3), admission=GRACE).kind == "accepted"

    assert submit(ledger, "b3", ["qwen"], AdmissionSettings(max_memory_fraction=1.0)) == ("accepted", "")
    bound_memory(0.5)
    assert submit(ledger, "b4", ["qwen"]) == ("accepted", "")
    bound_memory(0)
    assert submit(ledger, "b5", ["qwen"], AdmissionSettings(max_memory_fraction=1e-9)) == ("accepted", "")


def test_where_info_is_denied_memory_is_not_looked_at(ledger: Any, bound_memory: Callable[[float], None]) -> None:
    """A user without INFO can still submit: Redis' own bound is all that is left then."""
    ledger.client.acl_setuser(
        "shy", enabled=True, passwords=["+secret"], keys=["*"], channels=["*"], categories=["+@all"], commands=["-info"]
    )
    batch = ledger.batch("b1", ["qwen"])
    ledger.announce_uploads(batch)
    bound_memory(0.9)

    async def submit_shyly() -> str:
        client = Redis.from_url(ledger.url, username="shy", password="secret", decode_responses=True)  # noqa: S106
        api = ApiLedger(client, key_prefix=ledger.prefix)
        try:
            return (await api.submit(batch, retention=RETENTION, max_open_jobs=9, admission=GRACE)).kind
        finally:
            await api.close()

    try:
        assert ledger.run(submit_shyly()) == "accepted"
    finally:
        ledger.client.acl_deluser("shy")


def test_the_bound_on_open_jobs_holds_for_all_at_once(ledger: Any) -> None:
    """Submissions and retries at the same time never open more jobs than may be, and each is taken whole or not."""
    ledger.accept("old", ["qwen"] * 6)
    ledger.run(ledger.api.cancel("ana", [f"old-{index}" for index in range(6)]))
    batches = [ledger.batch(f"b{number}", ["qwen"] * 3) for number in range(12)]
    for batch in batches:
        ledger.announce_uploads(batch)

    async def call_all() -> list[Any]:
        retries = [
            ledger.api.reopen("ana", [f"old-{2 * number}", f"old-{2 * number + 1}"], max_open_jobs=10)
            for number in range(3)
        ]
        submissions = [ledger.api.submit(batch, retention=RETENTION, max_open_jobs=10) for batch in batches]
        return await asyncio.gather(*submissions[:6], *retries, *submissions[6:])

    answers = ledger.run(call_all())
    results, retried = [*answers[:6], *answers[9:]], answers[6:9]
    assert {result.kind for result in results} == {"accepted", "full"}
    assert all(answer in (["queued"] * 2, ["full"] * 2) for answer in retried)
    num_open = ledger.client.scard(f"{ledger.prefix}:open")
    assert 8 <= num_open <= 10
    num_retried = sum(answer.count("queued") for answer in retried)
    assert num_open == 3 * [result.kind for result in results].count("accepted") + num_retried
    assert [job.status for job in ledger.read("old").jobs].count(JobStatus.QUEUED) == num_retried
