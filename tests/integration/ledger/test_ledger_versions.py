"""A ledger that an earlier version wrote is read, finished and forgotten by this one; one of a later version is not."""

import json
from typing import Any

import pytest

from server.errors import ConfigError
from server.jobs import BatchStatus, JobStatus
from server.ledger.scripts import SCHEMA_VERSION
from server.ledger.worker_side import HeldJob
from server.settings import AdmissionSettings
from tests.integration.ledger.kit import RECORDS_SECONDS, RETENTION, UNUSED_SECONDS, LedgerKit
from tests.integration.ledger.stored_ledger import FOLDER, REPLAYED, restore

STORED = sorted(FOLDER.glob("ledger-*.json"))
# How many jobs of each batch stand where, as the earlier version left them.
LEFT = {
    "old": {"succeeded": 1},
    "mixed": {"succeeded": 1, "failed": 1, "cancelled": 1},
    "told": {"succeeded": 1},
    "delayed": {"queued": 1},
    "running": {"running": 2},
    "staged": {"running": 1},
    "queued": {"queued": 2},
    "waiting": {"queued": 2},
}


@pytest.fixture(params=STORED, ids=lambda file: file.stem)
def old_ledger(request: Any, valkey: Any) -> Any:
    """Give a ledger as an earlier version left it a moment ago."""
    client = valkey.client(decode_responses=True)
    restore(client, json.loads(request.param.read_text()))
    kit = LedgerKit(valkey.url)
    yield kit
    kit.close()


def counts(ledger: LedgerKit, batch_id: str) -> dict[str, int]:
    """How many jobs of a batch stand where; what is nowhere is left out."""
    found = ledger.read(batch_id).counts
    return {name: count for name, count in found.items() if count and name != "total"}


def test_a_ledger_of_an_earlier_version_is_read_as_it_was_left(old_ledger: LedgerKit) -> None:
    """Batches, jobs, lists, events, uploads, workers and a kept answer are what they were; the version is ours now."""
    ledger = old_ledger
    ledger.run(ledger.api.check_schema())
    assert ledger.client.get("restage:schema") == SCHEMA_VERSION
    assert {batch_id: counts(ledger, batch_id) for batch_id in LEFT} == LEFT

    async def listed(owner: str, status: BatchStatus | None = None) -> list[str]:
        page = await ledger.api.list_batches(owner, status=status, label=None, limit=100, cursor=None)
        return [batch.id for batch in page.items]

    assert ledger.run(listed("ana")) == ["queued", "running", "delayed", "mixed"]
    assert ledger.run(listed("ben", BatchStatus.FINISHED)) == ["told", "old"]
    page = ledger.run(ledger.api.list_jobs("ana", status=JobStatus.FAILED, model=None, limit=10, cursor=None))
    assert [(job.id, job.error and job.error.code) for job in page.items] == [("mixed-1", "invalid_input")]

    queued = ledger.read("queued")
    assert (queued.label, queued.metadata, queued.jobs[0].queue_position) == ("12 Oak St", {"mls": "1"}, 1)
    assert [job.output is not None for job in (ledger.job("mixed-0"), ledger.job("old-0"))] == [True, False]
    delivery = ledger.read("mixed").webhook
    assert delivery is not None
    assert [(one.attempt, one.http_status) for one in delivery.deliveries] == [(1, 500)]
    running = ledger.job("running-0")
    assert (running.worker, running.step, running.total_steps, running.attempts) == ("host-1-old", 1, 8, 1)

    told: Any = ledger.client.xrange("restage:batch:mixed:events")
    first_id, *other_ids = [event_id for event_id, _ in told]
    reading = ledger.run(ledger.api.read_events("mixed", first_id))
    assert reading is not None
    assert reading.is_known
    assert [event.id for event in reading.events] == other_ids

    assert ledger.run(ledger.api.find_idempotent("ana", REPLAYED.key)) == (REPLAYED.body_sha256, REPLAYED.answer)
    again = ledger.submit(ledger.batch("again", ["qwen"]), idempotency=REPLAYED)
    assert (again.kind, again.text) == ("replayed", REPLAYED.answer)
    assert [one.id for one in ledger.run(ledger.api.workers())] == ["host-1-old"]


def test_the_work_of_an_earlier_version_is_finished_and_leaves_nothing(old_ledger: LedgerKit) -> None:
    """Its running jobs can be committed by the worker that has them or go back, all else runs, and no key stays."""
    ledger = old_ledger
    ledger.run(ledger.api.check_schema())
    # The worker of before goes on beside the new API: one job is done by it, one was cancelled, one dies with it.
    running = [ledger.job(f"running-{index}") for index in range(2)]
    held = HeldJob(running[0].id, running[0].fence, 2, 8)
    assert ledger.worker("host-1-old").renew([held]) == ["ok"]
    assert [ledger.commit(job) for job in running] == ["ok", "cancelled"]
    assert counts(ledger, "running") == {"succeeded": 1, "cancelled": 1}
    ledger.sweep_for_a_lease()
    assert counts(ledger, "staged") == {"queued": 1}

    # What a user may do with what was there before.
    assert ledger.run(ledger.api.reopen("ana", ["mixed-1", "mixed-2"], max_open_jobs=100)) == ["queued", "queued"]
    assert ledger.run(ledger.api.cancel("ben", ["waiting-1"])) == ["cancelled"]
    ledger.accept("fresh", ["qwen"], owner="ben")

    done: list[str] = []
    while (job := ledger.worker("host-2-new").claim(["qwen", "flux"], num_held=0)) is not None:
        done.append(job.id)  # pyright: ignore[reportAttributeAccessIssue]
        assert ledger.commit(job) == "ok"  # pyright: ignore[reportArgumentType]
    # `high` first, then the owners in turn, each in the order in which they asked.
    assert done[:2] == ["queued-0", "queued-1"]
    assert done[-1] == "waiting-0"
    assert sorted(done[2:-1]) == ["delayed-0", "fresh-0", "mixed-1", "mixed-2", "staged-0"]
    assert done.index("mixed-1") < done.index("mixed-2")
    finished = [*LEFT, "fresh"]
    assert {ledger.read(batch_id).status for batch_id in finished} == {BatchStatus.FINISHED}
    assert counts(ledger, "mixed") == {"succeeded": 3}
    told = [ledger.events(batch_id).count("batch.finished") for batch_id in finished]
    assert told == [2 if batch_id == "mixed" else 1 for batch_id in finished]
    due = ledger.run(ledger.api.take_webhooks(limit=10, lease_seconds=60))
    assert sorted((one.batch.id, one.round) for one in due) == [("mixed", 1), ("mixed", 2), ("running", 1), ("told", 1)]

    ledger.pass_time(max(RECORDS_SECONDS, UNUSED_SECONDS) + 100)
    ledger.expire()
    ledger.trash()
    # What is left tells of models and workers, or of a submission that may be repeated, and goes by itself.
    left = ledger.keys()
    assert [key for key in left if ledger.client.ttl(f"restage:{key}") == -1] == ["schema"]


def test_new_rules_hold_in_a_ledger_that_does_not_know_them(old_ledger: LedgerKit) -> None:
    """What newer versions count was not counted before: nobody is refused for that, and new work counts at once."""
    ledger = old_ledger
    ledger.run(ledger.api.check_schema())

    def submit(batch_id: str) -> str:
        batch = ledger.batch(batch_id, ["qwen"], owner="ben")
        ledger.announce_uploads(batch)
        rules = {"max_owner_jobs": 1, "admission": AdmissionSettings()}
        return ledger.run(ledger.api.submit(batch, retention=RETENTION, max_open_jobs=10_000, **rules)).kind

    # Three of `ben` were open before, and no worker has said for how long it serves `qwen`. A worker of the older
    # version that still runs ends a job without taking it out of what newer ones count.
    ledger.client.sadd("restage:open:ben", "ended-by-an-older-worker")
    assert [submit("first"), submit("second")] == ["accepted", "owner_full"]
    assert ledger.run(ledger.api.cancel("ben", ["first-0"])) == ["cancelled"]
    assert submit("third") == "accepted"


@pytest.mark.parametrize("schema", ["3000", "1", "not a number"])
def test_a_ledger_of_another_version_is_refused_by_both_sides(ledger: LedgerKit, schema: str) -> None:
    """What this version cannot read is not touched, and the message says which version it is of and what to do."""
    ledger.client.set("restage:schema", schema)
    newer = "a later version of Restage wrote it" if schema == "3000" else "let the version that wrote it"
    with pytest.raises(ConfigError, match=f"has schema {schema}.*{newer}"):
        ledger.run(ledger.api.check_schema())
    with pytest.raises(ConfigError, match=f"has schema {schema}.*{newer}"):
        ledger.worker().check_schema()
    assert ledger.client.get("restage:schema") == schema
    assert ledger.keys() == ["schema"]
