"""What a key may use, as the ledger counts it: buckets of tokens, and the open jobs of an owner."""

import asyncio
from typing import Any

import pytest

from tests.integration.ledger.kit import RETENTION

MINUTE = {"capacity": 60, "fills_in_seconds": 60}


def take(ledger: Any, amount: int = 1, bucket: str = "b", **size: Any) -> float:
    """Take from a bucket of 60 that fills in a minute; returns how long to wait."""
    return ledger.run(ledger.api.take_tokens(bucket, amount, **MINUTE | size))


def test_a_bucket_is_full_at_first_and_fills_by_itself(ledger: Any) -> None:
    """All of a bucket goes at once, then what has come since; what is refused takes nothing."""
    assert [take(ledger) for _ in range(60)] == [0] * 60
    assert 0 < take(ledger, 10) <= 10
    ledger.pass_time(5)
    assert 0 < take(ledger, 10) <= 5
    ledger.pass_time(5)
    assert take(ledger, 10) == 0
    assert take(ledger, 10) > 0
    assert take(ledger, 60, "another") == 0


def test_a_bucket_holds_no_more_than_its_capacity(ledger: Any) -> None:
    """However long nobody takes, and whatever it held before it was made smaller, no more than that is there."""
    assert take(ledger, 1) == 0
    ledger.pass_time(30)
    assert take(ledger, 60) == 0
    assert take(ledger, 1) > 0
    ledger.pass_time(59)
    assert take(ledger, 30) == 0
    assert take(ledger, 10, capacity=10) == 0
    assert take(ledger, 10, capacity=10) == pytest.approx(60, abs=5)


def test_a_full_bucket_leaves_no_trace(ledger: Any) -> None:
    """A bucket is forgotten once it is full again, and one that refuses is not even written."""
    take(ledger, 60)
    kept = ledger.client.hgetall("restage:tokens:b")
    assert ledger.client.pttl("restage:tokens:b") == pytest.approx(60_000, abs=5_000)
    assert take(ledger) > 0
    assert ledger.client.hgetall("restage:tokens:b") == kept
    ledger.pass_time(61)
    assert ledger.keys() == ["schema"]


@pytest.mark.parametrize("capacity", [1, 10**15])
def test_buckets_of_every_size_are_exact(ledger: Any, capacity: int) -> None:
    """A byte a day and a petabyte a day are counted without losing any."""
    day: Any = {"capacity": capacity, "fills_in_seconds": 86_400}
    assert take(ledger, capacity, **day) == 0
    assert take(ledger, capacity, **day) == pytest.approx(86_400, abs=5)
    ledger.pass_time(86_401)
    assert take(ledger, capacity, **day) == 0


def test_a_clock_that_is_set_back_holds_nobody_up(ledger: Any) -> None:
    """A bucket goes on filling from the time that it is now, and gets nothing for the time that comes twice."""
    take(ledger, 60)
    ledger.pass_time(-3600)
    assert 0 < take(ledger, 30) <= 30
    ledger.pass_time(31)
    assert take(ledger, 30) == 0
    assert take(ledger, 30) > 0


def test_many_at_once_get_no_more_than_there_is(ledger: Any) -> None:
    """Of 50 that take 2 at the same time from a bucket of 60, 30 get them."""

    async def take_all() -> list[float]:
        day = {"capacity": 60, "fills_in_seconds": 86_400}
        return await asyncio.gather(*(ledger.api.take_tokens("b", 2, **day) for _ in range(50)))

    assert ledger.run(take_all()).count(0) == 30


def test_the_open_jobs_of_an_owner_have_a_limit(ledger: Any) -> None:
    """A batch fits wholly or is refused, by that owner's jobs alone; room comes with each job that ends."""
    ledger.accept("b1", ["qwen"] * 2)
    ledger.accept("other", ["qwen"] * 5, owner="bo")
    second = ledger.batch("b2", ["qwen"])
    ledger.announce_uploads(second)
    assert ledger.submit(second, max_owner_jobs=2).kind == "owner_full"
    assert ledger.submit(second, max_owner_jobs=2, max_open_jobs=7).kind == "full"
    ledger.commit(ledger.claim(["qwen"]))
    assert ledger.submit(second, max_owner_jobs=2).kind == "accepted"
    assert ledger.submit(second, max_owner_jobs=1).kind == "accepted"  # the same one again


def test_submissions_at_once_share_what_room_there_is(ledger: Any) -> None:
    """Of ten batches that come together, no more are accepted than fit."""
    batches = [ledger.batch(f"b{number}", ["qwen"] * 2) for number in range(10)]
    for batch in batches:
        ledger.announce_uploads(batch)

    async def submit_all() -> list[str]:
        limits = {"retention": RETENTION, "max_open_jobs": 100, "max_owner_jobs": 7}
        results = await asyncio.gather(*(ledger.api.submit(batch, **limits) for batch in batches))
        return sorted(result.kind for result in results)

    assert ledger.run(submit_all()) == ["accepted"] * 3 + ["owner_full"] * 7


def test_a_retry_counts_towards_the_open_jobs_of_its_owner(ledger: Any) -> None:
    """All that a retry names are queued again, or none; those of other owners do not count."""
    batch, other = ledger.accept("b1", ["qwen"] * 3), ledger.accept("b2", ["qwen"] * 2, owner="bo")
    ids = [job.id for job in (*batch.jobs, *other.jobs)]
    ledger.run(ledger.api.cancel("", ids))

    def reopen(wanted: list[str], most: int) -> list[str]:
        return ledger.run(ledger.api.reopen("", wanted, max_open_jobs=100, limited=("ana", most)))

    assert reopen([*ids, "none"], 2) == ["owner_full"] * 5 + ["unknown"]
    assert reopen(ids[3:], 0) == ["queued"] * 2
    assert reopen(ids[:2], 2) == ["queued"] * 2
    assert reopen(ids[2:], 2) == ["owner_full", "open", "open"]
    assert reopen(ids, 3) == ["open", "open", "queued", "open", "open"]


def test_what_an_older_process_ended_counts_no_more(ledger: Any) -> None:
    """A job that ended without leaving its owner's set holds nobody up for ever."""
    done = ledger.accept("b1", ["qwen"] * 2)
    for job in done.jobs:
        ledger.commit(ledger.claim(["qwen"]))
        ledger.client.sadd("restage:open:ana", job.id)
    ledger.accept("b2", ["qwen"])
    third = ledger.batch("b3", ["qwen"])
    ledger.announce_uploads(third)
    assert ledger.submit(third, max_owner_jobs=1).kind == "owner_full"
    assert ledger.submit(third, max_owner_jobs=2).kind == "accepted"
    assert ledger.client.smembers("restage:open:ana") == {"b2-0", "b3-0"}
