"""The checker finds what is wrong in a history, each kind of wrong by its own rule, and nothing in a good one."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.chaos.checker import check
from tests.chaos.figures import find_recoveries, summarize
from tests.chaos.history import History, read_history
from tests.chaos.schedule import DECK, draw_schedule
from tests.chaos.story import tell_story

Entries = list[dict[str, Any]]


def event(number: int, kind: str, status: str, job_id: str | None = None) -> tuple[str, str, dict[str, str]]:
    """Make an event of a batch's stream, one a second."""
    return f"{1000 * number}-0", kind, {"status": status} | ({"job_id": job_id} if job_id else {})


def good_history() -> Entries:
    """Tell of a batch of two jobs, one of which is lost by a killed worker, claimed again, fails, and is retried."""
    events = [
        event(1, "job.started", "running", "j1"),
        event(2, "job.started", "running", "j2"),
        event(3, "job.succeeded", "succeeded", "j1"),
        event(5, "job.retrying", "queued", "j2"),
        event(6, "job.started", "running", "j2"),
        event(7, "job.failed", "failed", "j2"),
        event(7, "batch.finished", "finished"),
        event(8, "job.retrying", "queued", "j2"),
        event(9, "job.cancelled", "cancelled", "j2"),
        event(9, "batch.finished", "finished"),
    ]
    # Two entries of a stream never have one id.
    events = [(f"{event_id[:-1]}{place}", kind, data) for place, (event_id, kind, data) in enumerate(events)]
    ids = [event_id for event_id, _, _ in events]
    batch = {
        "id": "b1",
        "status": "finished",
        "counts": {"total": 2, "queued": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 1},
        "jobs": [
            {"id": "j1", "status": "succeeded", "attempts": 1, "error": None, "output": {"sha256": "aa"}},
            {"id": "j2", "status": "cancelled", "attempts": 2, "error": None, "output": None},
        ],
    }
    accepted = {"owner": "ana", "key": "k1", "batch_id": "b1", "has_webhook": True}
    followed = [("snapshot", "0-0"), *((kind, event_id) for event_id, kind, _ in events[:7])]
    late = [("snapshot", ids[-1]), ("nothing.more", ids[-1])]
    log = {"kind": "worker.log", "worker": "worker-0"}
    end = {"kind": "process.ended", "pid": 1}
    return [
        {"at": 0.5, "kind": "client.begun", "client": "c1"},
        {"at": 0.9, "kind": "submit.accepted", **accepted, "roles": {"j1": "honest", "j2": "hostile"}},
        {"at": 0.9, "kind": "submit.accepted", **accepted, "roles": {"j1": "honest", "j2": "hostile"}},
        {"at": 1.0, "kind": "faults.begun"},
        {"at": 1.0, **log, "event": "job.claimed", "job_id": "j1"},
        {"at": 2.0, **log, "event": "job.claimed", "job_id": "j2"},
        {"at": 3.0, **log, "event": "job.succeeded", "job_id": "j1"},
        {"at": 4.0, "kind": "fault.begun", "number": 0, "fault": "worker.kill", "target": "worker-0"},
        {"at": 4.0, **end, "name": "worker-0", "status": -9, "cause": "fault"},
        {"at": 4.2, "kind": "fault.ended", "number": 0, "did_harm": True},
        {"at": 6.0, **log, "worker": "worker-1", "event": "job.claimed", "job_id": "j2"},
        {"at": 8.0, "kind": "cancel.sent", "job_ids": ["j2"]},
        *(
            {"at": 9.0, "kind": "followed", "stream": "c1-1", "batch_id": "b1", "type": k, "event_id": i}
            for k, i in followed
        ),
        *(
            {"at": 9.0, "kind": "followed", "stream": "c1-2", "batch_id": "b1", "type": k, "event_id": i}
            for k, i in late
        ),
        {"at": 9.0, "kind": "webhook", "webhook_id": "w1", "batch_id": "b1", "status": 500},
        {"at": 9.0, "kind": "webhook", "webhook_id": "w1", "batch_id": "b1", "status": 204},
        {"at": 9.5, "kind": "webhook", "webhook_id": "w2", "batch_id": "b1", "status": 204},
        {"at": 10.0, "kind": "faults.ended"},
        {"at": 11.0, "kind": "client.done", "client": "c1"},
        {"at": 11.0, "kind": "clients.ended"},
        {"at": 12.0, "kind": "final.list", "owner": "ana", "batch_ids": ["b1"], "job_ids": ["j1", "j2"]},
        {"at": 12.0, "kind": "final.object", "job_id": "j1", "sha256": "aa"},
        {"at": 12.0, "kind": "final.batch", "owner": "ana", "batch": batch},
        {"at": 12.0, "kind": "final.events", "batch_id": "b1", "events": events},
        {"at": 13.0, **end, "name": "worker-1", "status": 0, "cause": "stop"},
    ]


def one(entries: Entries, kind: str, nth: int = 0) -> dict[str, Any]:
    return [entry for entry in entries if entry["kind"] == kind][nth]


def drop(entries: Entries, kind: str, nth: int = 0) -> None:
    entries.remove(one(entries, kind, nth))


def job(entries: Entries, nth: int) -> dict[str, Any]:
    return one(entries, "final.batch")["batch"]["jobs"][nth]


def events(entries: Entries) -> list[Any]:
    return one(entries, "final.events")["events"]


def rules(entries: Entries) -> set[str]:
    return {problem.rule for problem in check(tell_story(entries))}


def test_a_good_history_has_no_problem() -> None:
    """Kills, retries, cancels, repeated answers and webhooks are no problem by themselves."""
    assert check(tell_story(good_history())) == []


# What is forged, and the rule that must find it.
FORGED: dict[str, tuple[str, Callable[[Entries], Any]]] = {
    "a batch is gone": ("lost", lambda e: drop(e, "final.batch")),
    "a job never ends": ("lost", lambda e: job(e, 1).update(status="running")),
    "a job is gone": ("lost", lambda e: one(e, "final.batch")["batch"]["jobs"].pop()),
    "a batch never ends": ("lost", lambda e: one(e, "final.batch")["batch"].update(status="running")),
    "a list leaves a job out": ("lost", lambda e: one(e, "final.list")["job_ids"].pop()),
    "two workers commit a job": (
        "committed_twice",
        lambda e: e.append(one(e, "worker.log", 2) | {"worker": "worker-1", "at": 3.5}),
    ),
    "a success is told twice": ("committed_twice", lambda e: events(e).insert(3, ("3500-0", *events(e)[2][1:]))),
    "a commit is forgotten": ("commit_lost", lambda e: job(e, 0).update(status="failed")),
    "an object is gone": ("wrong_object", lambda e: one(e, "final.object").update(sha256=None)),
    "an object was never looked at": ("wrong_object", lambda e: drop(e, "final.object")),
    "an object has other bytes": ("wrong_object", lambda e: one(e, "final.object").update(sha256="bb")),
    "a counter is off": ("wrong_counter", lambda e: one(e, "final.batch")["batch"]["counts"].update(succeeded=2)),
    "the total is off": ("wrong_counter", lambda e: one(e, "final.batch")["batch"]["counts"].update(total=3)),
    "an end is told twice": ("wrong_finish", lambda e: events(e).append(("9999-0", *events(e)[-1][1:]))),
    "an end is told early": ("wrong_finish", lambda e: events(e).insert(3, ("3500-0", *events(e)[-1][1:]))),
    "an end is not told": ("wrong_finish", lambda e: events(e).pop()),
    "an end between rounds is not told": ("wrong_finish", lambda e: events(e).pop(6)),
    "an ended job runs again": ("wrong_events", lambda e: events(e).pop(7)),
    "a success is taken back": (
        "wrong_events",
        lambda e: events(e).insert(3, event(4, "job.retrying", "queued", "j1")),
    ),
    "events were not read": ("wrong_events", lambda e: drop(e, "final.events")),
    "a webhook is missing": ("wrong_webhook", lambda e: drop(e, "webhook", 2)),
    "a webhook was never taken": ("wrong_webhook", lambda e: drop(e, "webhook", 1)),
    "a round is told under two ids": (
        "wrong_webhook",
        lambda e: e.append(one(e, "webhook", 1) | {"webhook_id": "w3"}),
    ),
    "a batch is told that asked for nothing": (
        "wrong_webhook",
        lambda e: [entry.update(has_webhook=False) for entry in e if "has_webhook" in entry],
    ),
    "a stranger is shown a job": (
        "stranger",
        lambda e: e.append({"kind": "listed", "owner": "bob", "batch_ids": [], "job_ids": ["j1"]}),
    ),
    "a batch comes from nowhere": ("stranger", lambda e: one(e, "final.list")["batch_ids"].append("b2")),
    "a key leads to two batches": (
        "accepted_twice",
        lambda e: e.append(one(e, "submit.accepted") | {"batch_id": "b2", "roles": {}}),
    ),
    "a stream leaves a change out": ("gap", lambda e: drop(e, "followed", 3)),
    "a stream tells a change twice": ("gap", lambda e: e.insert(e.index(one(e, "followed", 3)), one(e, "followed", 3))),
    "a stream breaks off": ("gap", lambda e: drop(e, "followed", 7)),
    "an honest job fails": ("wrong_end", lambda e: job(e, 0).update(status="failed", error={"code": "internal_error"})),
    "a job is cancelled that nobody cancelled": ("wrong_end", lambda e: drop(e, "cancel.sent")),
    "an honest job is taken for poison at its first death": (
        "wrong_end",
        lambda e: job(e, 0).update(status="failed", error={"code": "poisoned"}),
    ),
    "a hostile photo is staged": ("wrong_end", lambda e: job(e, 1).update(status="succeeded")),
    "a try is not told": ("wrong_tries", lambda e: job(e, 1).update(attempts=3)),
    "a job is tried for ever": (
        "wrong_tries",
        lambda e: (
            job(e, 1).update(attempts=12),
            [events(e).insert(5, event(6, "job.started", "running", "j2")) for _ in range(10)],
        ),
    ),
    "a process dies of itself": ("process_ended", lambda e: one(e, "process.ended").update(cause=None)),
    "a process does not start": (
        "process_ended",
        lambda e: one(e, "process.ended", 1).update(cause="start", status=1, at=60.0),
    ),
    "a process crashes as it starts": (
        "process_ended",
        lambda e: one(e, "process.ended").update(cause="start", status=-11),
    ),
    "a process cannot be stopped": ("process_ended", lambda e: one(e, "process.ended", 1).update(status=-9)),
    "a client is answered 500": (
        "odd_answer",
        lambda e: e.append({"kind": "answer.odd", "path": "/v1/jobs", "status": 500, "text": ""}),
    ),
    "a client hangs": ("gave_up", lambda e: drop(e, "client.done")),
}


@pytest.mark.parametrize("what", FORGED)
def test_each_wrong_is_found_by_its_rule(what: str) -> None:
    """A history in which one thing is forged has a problem of the rule that is about it."""
    rule, forge = FORGED[what]
    entries = copy.deepcopy(good_history())
    forge(entries)
    assert rule in rules(entries), what


def test_figures_come_from_the_history() -> None:
    """Jobs, faults and the time from a kill to the next claim are counted from what was written down."""
    entries = good_history()
    summary = summarize(entries, check(tell_story(entries)))
    assert (summary["accepted_jobs"], summary["accepted_batches"]) == (2, 1)
    assert (summary["faults_by_kind"], summary["worker_kill_share"]) == ({"worker.kill": 1}, 1.0)
    assert (summary["fault_seconds"], summary["drain_seconds"]) == (9.0, 1.0)
    [recovery] = find_recoveries(entries)
    assert (recovery.job_id, recovery.queued_seconds, recovery.seconds, recovery.is_alone) == ("j2", 1.0, 2.0, True)


def test_a_history_is_read_as_it_was_written(tmp_path) -> None:
    """Two writers add whole lines; a line that a crash has cut off at the end is left out."""
    path = tmp_path / "history.jsonl"
    histories = [History(path), History(path)]
    for number, history in enumerate(histories):
        history.add("submit.sent", at=number, owner="ana", text="größe\n")
        history.close()
    with path.open("a") as file:
        file.write('{"at": 3, "kind": "cut')
    assert [(entry["at"], entry["text"]) for entry in read_history(path)] == [(0, "größe\n"), (1, "größe\n")]


def test_a_seed_draws_the_same_faults_and_few_kills_of_workers() -> None:
    """The schedule is a function of the seed; all kinds come, and kills of workers are at most a quarter."""

    def draw(seed: int) -> list[Any]:
        return draw_schedule(seed, seconds=1200, gap_seconds=4, num_apis=2, num_workers=3, lease_seconds=3)

    for seed in range(20):
        faults = draw(seed)
        assert faults == draw(seed) != draw(seed + 1)
        assert len(faults) >= 200
        assert {fault.kind for fault in faults} == DECK.keys()
        assert sum(fault.kind == "worker.kill" for fault in faults) <= len(faults) / 4
        assert all(one.at_seconds < other.at_seconds <= 1200 for one, other in pairwise(faults))
        losses = [fault for fault in faults if fault.kind == "reply.loss"]
        assert {fault.script for fault in losses} == {"submit", "claim", "start", "renew", "commit", "retry"}
        assert all(1 <= fault.times <= 4 for fault in losses)
        assert all(3 < fault.lasts_seconds <= 7.5 for fault in faults if fault.kind == "worker.pause")
