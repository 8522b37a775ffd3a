"""Stories of those who follow a batch: events from a known place, progress, and the wake-ups of all followers."""

from typing import Any

from server.jobs import BatchStatus
from server.ledger.reading import EventsReading, JobProgress
from server.ledger.worker_side import HeldJob


def read(ledger: Any, batch_id: str, after: str) -> EventsReading:
    """Read the events of a batch that must be there."""
    found = ledger.run(ledger.api.read_events(batch_id, after))
    assert found is not None
    return found


def types(found: EventsReading) -> list[str]:
    """List what happened."""
    return [one.type for one in found.events]


def last_event_id(ledger: Any, batch_id: str) -> str:
    """Read the id that a snapshot comes with."""
    found = ledger.run(ledger.api.read_batch_and_event(batch_id))
    assert found is not None
    assert found.batch == ledger.read(batch_id)
    return found.last_event_id


def test_a_follower_goes_on_behind_its_last_event(ledger: Any) -> None:
    """From a snapshot's event on nothing is missed, nothing comes twice, and the end is told."""
    ledger.accept("b1", ["qwen", "qwen"])
    assert last_event_id(ledger, "b1") == "0-0"
    job = ledger.claim(["qwen"])
    assert types(read(ledger, "b1", "0-0")) == ["job.started"]
    snapshot = last_event_id(ledger, "b1")
    found = read(ledger, "b1", snapshot)
    assert (found.is_known, found.status, found.events) == (True, BatchStatus.RUNNING, [])

    ledger.commit(job)
    ledger.fail(ledger.claim(["qwen"]))
    found = read(ledger, "b1", snapshot)
    assert types(found) == ["job.succeeded", "job.started", "job.failed", "batch.finished"]
    assert found.status == BatchStatus.FINISHED
    assert found.events[2].data == {
        "job_id": "b1-1",
        "index": 1,
        "status": "failed",
        "attempts": 1,
        "error": {"code": "invalid_input", "detail": "truncated"},
    }
    assert found.events[-1].data == {"batch_id": "b1", "round": 1}
    assert types(read(ledger, "b1", found.events[1].id)) == ["job.failed", "batch.finished"]
    assert last_event_id(ledger, "b1") == found.events[-1].id


def test_an_event_that_nobody_knows_is_told_so(ledger: Any) -> None:
    """The follower takes a fresh snapshot, also where its id is older or younger than all, or between two of them."""
    ledger.accept("b1", ["qwen"])
    ledger.claim(["qwen"])
    milliseconds, _, _ = last_event_id(ledger, "b1").partition("-")
    for after in ("", f"{milliseconds}-999", "18446744073709551615-18446744073709551615", "1-1"):
        found = read(ledger, "b1", after)
        assert (found.is_known, found.status, found.events, found.progress) == (False, BatchStatus.RUNNING, [], [])


def test_the_beginning_is_known_until_something_was_cut_off(ledger: Any) -> None:
    """Whoever has seen nothing yet needs no snapshot, unless the stream has lost its first events."""
    ledger.accept("b1", ["qwen"])
    found = read(ledger, "b1", "0-0")
    assert (found.is_known, found.events) == (True, [])
    ledger.commit(ledger.claim(["qwen"]))
    assert types(read(ledger, "b1", "0-0")) == ["job.started", "job.succeeded", "batch.finished"]
    first, _, last = (one.id for one in read(ledger, "b1", "0-0").events)
    ledger.client.xtrim(f"{ledger.prefix}:batch:b1:events", maxlen=2, approximate=False)
    assert not read(ledger, "b1", "0-0").is_known
    assert not read(ledger, "b1", first).is_known
    assert read(ledger, "b1", last).is_known


def test_a_long_story_comes_in_parts(ledger: Any) -> None:
    """A thousand events at once, the others behind the last of them; very old ones are cut off."""
    ledger.accept("b1", ["qwen"])
    stop = {"delay_seconds": 0, "counts": False, "max_errors": 1, "code": "shutdown", "detail": ""}
    for _ in range(600):
        job = ledger.claim(["qwen"])
        ledger.worker().retry(job.id, job.fence, **stop)
    found = read(ledger, "b1", "0-0")
    assert len(found.events) == 1000
    rest = read(ledger, "b1", found.events[-1].id)
    assert len(rest.events) == 200
    assert rest.events[-1].id == last_event_id(ledger, "b1")


def test_what_is_gone_has_no_events(ledger: Any) -> None:
    """A batch that was deleted, or never was, is unknown."""
    assert ledger.run(ledger.api.read_events("b-none", "0-0")) is None
    assert ledger.run(ledger.api.read_batch_and_event("b-none")) is None
    ledger.finish("b1", ["qwen"])
    ledger.run(ledger.api.delete_batch("ana", "b1"))
    assert ledger.run(ledger.api.read_events("b1", "0-0")) is None


def test_progress_is_told_of_running_jobs_that_have_begun(ledger: Any) -> None:
    """With the events comes how far each run is; nothing is said of a job before its first step or after its end."""
    ledger.accept("b1", ["qwen"] * 4)
    running = [ledger.claim(["qwen"]) for _ in range(3)]
    worker = ledger.worker()
    worker.renew([HeldJob(running[0].id, 1, 2, 8), HeldJob(running[1].id, 1), HeldJob(running[2].id, 1, 1, None)])
    known, unknown = read(ledger, "b1", "0-0").progress
    assert known == JobProgress("b1-0", 0, 2, 8, 1)
    # A run whose number of steps is not known yet is told without it.
    assert (unknown.job_id, unknown.step, unknown.total_steps, unknown.attempts) == ("b1-2", 1, None, 1)
    ledger.commit(running[0])
    ledger.fail(running[2])
    assert read(ledger, "b1", "0-0").progress == []


def test_followers_are_woken_by_every_change(ledger: Any) -> None:
    """Acceptance, moves of jobs, progress and deletion wake them; a renewal without progress does not."""
    api, position = ledger.api, ledger.run(ledger.api.changes_position())
    assert position == "0-0"

    def woken() -> set[str]:
        nonlocal position
        position, batch_ids = ledger.run(api.wait_for_changes(position, block_seconds=0.01))
        return batch_ids

    assert woken() == set()
    ledger.accept("b1", ["qwen"])
    ledger.accept("b2", ["qwen"])
    assert woken() == {"b1", "b2"}
    assert position == ledger.run(api.changes_position())
    job = ledger.claim(["qwen"])
    assert woken() == {"b1"}
    ledger.worker().renew([HeldJob(job.id, 1)])
    assert woken() == set()
    ledger.worker().renew([HeldJob(job.id, 1, 3, 8)])
    assert woken() == {"b1"}
    ledger.worker().renew([HeldJob(job.id, 1, 3, 8)])
    assert woken() == set()
    ledger.commit(job)
    assert woken() == {"b1"}
    ledger.run(api.delete_batch("ana", "b1"))
    assert woken() == {"b1"}
