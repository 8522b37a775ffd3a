"""Stories of webhooks: when a delivery is due, who has it, and what is kept of how it went."""

from typing import Any

from server.jobs import BatchStatus, Delivery
from tests.integration.ledger.kit import HOOK_URL


def take(ledger: Any, *, limit: int = 10) -> list[tuple[str, int, int]]:
    """Take what is due: batch, round and attempt."""
    due = ledger.run(ledger.api.take_webhooks(limit=limit, lease_seconds=60))
    return [(one.batch.id, one.round, one.attempt) for one in due]


def note(ledger: Any, batch_id: str, round_: int, attempt: int, outcome: str, delay_seconds: float | None) -> None:
    """Say how an attempt went."""
    call = ledger.api.note_delivery(
        batch_id, round_, attempt, outcome=outcome, http_status=503, detail="busy", delay_seconds=delay_seconds
    )
    ledger.run(call)


def end_the_only_job(ledger: Any, batch_id: str) -> None:
    """Let the only job of a batch fail, so that it can be retried."""
    job = ledger.claim(["qwen"])
    assert job.batch_id == batch_id
    ledger.fail(job)


def test_a_delivery_is_due_when_its_batch_has_finished(ledger: Any) -> None:
    """Not before, and only where there is somebody to tell; the batch comes with it as it is."""
    ledger.accept("b1", ["qwen"], hook=True)
    assert take(ledger) == []
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    ledger.finish("b2", ["qwen"])
    [due] = ledger.run(ledger.api.take_webhooks(limit=10, lease_seconds=60))
    assert (due.batch, due.round, due.attempt) == (ledger.read("b1"), 1, 1)
    assert due.due_since_ms == due.batch.finished_at_ms
    assert due.batch.webhook.url == HOOK_URL
    assert ledger.read("b2").webhook is None


def test_a_delivery_has_one_sender_at_a_time(ledger: Any) -> None:
    """Whoever takes it has some time for it; if nothing is heard then, it is another attempt of somebody's."""
    ledger.finish("b1", ["qwen"], hook=True)
    assert take(ledger) == [("b1", 1, 1)]
    assert take(ledger) == []
    ledger.pass_time(61)
    assert take(ledger) == [("b1", 1, 2)]


def test_what_is_due_first_is_taken_first(ledger: Any) -> None:
    """A limited number comes at once."""
    for number in range(3):
        ledger.finish(f"b{number}", ["qwen"], hook=True)
        ledger.pass_time(1)
    assert take(ledger, limit=2) == [("b0", 1, 1), ("b1", 1, 1)]
    assert take(ledger, limit=2) == [("b2", 1, 1)]


def test_attempts_are_logged_and_go_on_until_one_succeeds(ledger: Any) -> None:
    """A failed attempt is followed by one after the given time, a delivered one by none; the batch shows them all."""
    ledger.finish("b1", ["qwen"], hook=True)
    take(ledger)
    note(ledger, "b1", 1, 1, "retrying", 300)
    ledger.pass_time(200)
    assert take(ledger) == []
    ledger.pass_time(101)
    [due] = ledger.run(ledger.api.take_webhooks(limit=10, lease_seconds=60))
    assert (due.attempt, due.due_since_ms) == (2, ledger.read("b1").finished_at_ms)
    note(ledger, "b1", 1, 2, "delivered", None)
    ledger.pass_time(3000)
    assert take(ledger) == []

    first, second = ledger.read("b1").webhook.deliveries
    assert 0 <= first.at_ms - ledger.read("b1").finished_at_ms < 60_000
    assert first == Delivery(1, 1, first.at_ms, "retrying", 503, "busy")
    assert (second.attempt, second.outcome) == (2, "delivered")
    page = ledger.run(ledger.api.list_batches("ana", status=None, label=None, limit=5, cursor=None))
    assert page.items[0].webhook == ledger.read("b1").webhook


def test_giving_up_is_an_end(ledger: Any) -> None:
    """What was given up is not tried again."""
    ledger.finish("b1", ["qwen"], hook=True)
    take(ledger)
    note(ledger, "b1", 1, 1, "gave_up", None)
    ledger.pass_time(3000)
    assert take(ledger) == []


def test_a_late_sender_does_not_revive_a_delivery(ledger: Any) -> None:
    """A slow sender's failure comes after another's success: it is logged, and nothing is sent again."""
    ledger.finish("b1", ["qwen"], hook=True)
    take(ledger)
    ledger.pass_time(61)
    assert take(ledger) == [("b1", 1, 2)]
    note(ledger, "b1", 1, 2, "delivered", None)
    note(ledger, "b1", 1, 1, "retrying", 10)
    ledger.pass_time(100)
    assert take(ledger) == []
    assert [one.attempt for one in ledger.read("b1").webhook.deliveries] == [2, 1]


def test_each_round_is_told_by_itself(ledger: Any) -> None:
    """A round that was not delivered when the next one begins is still delivered, with attempts of its own."""
    ledger.accept("b1", ["qwen"], hook=True)
    end_the_only_job(ledger, "b1")
    assert take(ledger) == [("b1", 1, 1)]
    ledger.pass_time(10)
    assert ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=99)) == ["queued"]
    end_the_only_job(ledger, "b1")
    assert take(ledger) == [("b1", 2, 1)]
    ledger.pass_time(61)
    due = ledger.run(ledger.api.take_webhooks(limit=10, lease_seconds=60))
    assert [(one.round, one.attempt) for one in due] == [(1, 2), (2, 2)]
    first, second = due
    assert first.due_since_ms < second.due_since_ms == second.batch.finished_at_ms
    note(ledger, "b1", 1, 2, "delivered", None)
    ledger.pass_time(61)
    assert take(ledger) == [("b1", 2, 3)]


def test_an_open_batch_is_told_as_it_is_now(ledger: Any) -> None:
    """A delivery that comes after a retry has begun shows the batch of today."""
    ledger.accept("b1", ["qwen"], hook=True)
    end_the_only_job(ledger, "b1")
    ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=99))
    [due] = ledger.run(ledger.api.take_webhooks(limit=10, lease_seconds=60))
    assert (due.round, due.batch.round, due.batch.status) == (1, 2, BatchStatus.QUEUED)


def test_a_deleted_batch_is_told_to_nobody(ledger: Any) -> None:
    """What waits to be delivered goes with the batch, of all rounds, and a late word of a sender's changes nothing."""
    ledger.accept("b1", ["qwen"], hook=True)
    end_the_only_job(ledger, "b1")
    ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=99))
    end_the_only_job(ledger, "b1")
    assert take(ledger, limit=1) == [("b1", 1, 1)]
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "deleted"
    keys = ledger.keys()
    assert "webhooks" not in keys
    note(ledger, "b1", 1, 1, "retrying", 5)
    note(ledger, "b1", 1, 1, "delivered", None)
    assert ledger.keys() == keys
    ledger.pass_time(100)
    assert take(ledger) == []


def test_the_log_of_deliveries_is_bounded(ledger: Any) -> None:
    """The latest fifty attempts are kept."""
    ledger.finish("b1", ["qwen"], hook=True)
    for attempt in range(1, 61):
        note(ledger, "b1", 1, attempt, "retrying", 5)
    assert [one.attempt for one in ledger.read("b1").webhook.deliveries] == list(range(11, 61))
